"""Workloads by name: their shapes, where lengths come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xfast.benchmarks import workloads
from xfast.benchmarks.workloads import Model, Workload, workload
from xfast.errors import InvalidInputError, InvalidOptionError, UnsupportedModelError

SMALL = Model(vocab=50, pad=3, limit=40)


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workloads from text only where a test asks for them."""
    monkeypatch.delenv("XFAST_TEST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def lengths(work: Workload) -> list[int]:
    return [int(length) for _, mask in work.batches for length in mask.sum(1)]


@pytest.mark.parametrize(
    ("name", "batches", "samples", "tokens"),
    [
        ("mixed", 4, 64, 2641),
        ("sorted", 4, 64, 2641),
        ("full", 1, 8, 3072),
        ("1x8", 1, 1, 8),
        ("3x17", 1, 3, 51),
        ("alpha=0.2", 1, 16, 819),
        ("alpha=1.0", 1, 16, 4096),
        ("length=8", 1, 256, 2048),
        ("length=512", 1, 4, 2048),
        ("length=384", 1, 5, 1920),
    ],
)
def test_sizes(name: str, batches: int, samples: int, tokens: int) -> None:
    work = workload(name)
    assert (work.name, work.source) == (name, "random")
    assert (len(work.batches), work.samples, work.tokens) == (batches, samples, tokens)
    assert work.padding == pytest.approx(1 - tokens / work.slots)


def test_mixed_and_sorted_are_the_same_sentences() -> None:
    assert sorted(lengths(workload("mixed"))) == lengths(workload("sorted"))
    assert workload("sorted").padding < workload("mixed").padding


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.35, 0.5, 0.75, 0.99, 1.0])
def test_alpha_is_the_share_of_real_tokens(alpha: float) -> None:
    drawn = workloads.alpha_lengths(alpha)
    assert len(drawn) == 16
    assert max(drawn) == 256
    assert min(drawn) >= 2
    assert sum(drawn) == round(alpha * 16 * 256)


def test_sweeps_expand_in_place() -> None:
    assert workloads.expand(["1x8", "alpha", "1x8"])[:2] == ["1x8", "alpha=0.2"]
    assert workloads.expand(["length"]) == [f"length={n}" for n in (8, 16, 32, 64, 128, 256, 512)]
    for name in workloads.expand(["alpha", "length"]):
        assert workload(name).samples


@pytest.mark.parametrize("name", ["mixed", "2x40", "alpha=0.5", "xquad"])
def test_another_model_gets_its_own_ids_padding_and_limit(name: str) -> None:
    for ids, mask in workload(name, SMALL).batches:
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape[1] <= 40
        assert torch.equal(ids == 3, mask == 0)
        assert ids.min() >= 0 and ids.max() < 50
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)


def test_seeds() -> None:
    first, again, other = (workload("mixed", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first.batches, again.batches, strict=True))
    assert not torch.equal(first.batches[0][0], other.batches[0][0])


@pytest.mark.parametrize("task", workloads.TASKS)
def test_tasks_without_data_follow_the_profiles(task: str) -> None:
    work = workload(task)
    assert (work.source, work.samples) == ("profiles", 64)
    assert all(2 <= length <= 512 for length in lengths(work))


def test_one_language() -> None:
    assert sum(lengths(workload("tatoeba:sw"))) < sum(lengths(workload("tatoeba:de")))


@pytest.mark.parametrize(
    "name",
    [
        *("", "mixd", "x", "1x", "x32", "0x8", "1x0", "1x513", "99999x8", "glue", "tatoeba:xx", "xnli:ja"),
        *("alpha=0.05", "alpha=1.2", "alpha=x", "length=0", "length=513", "length="),
    ],
)
def test_names_that_are_not_accepted(name: str) -> None:
    with pytest.raises(InvalidOptionError, match="accepted: ") as caught:
        workload(name)
    assert repr(name) in str(caught.value) or ":" in name


def test_only_data_that_is_named_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared" / "data" / "xtreme").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert workloads.find_data() is None
    assert workload("tatoeba:sw").source == "profiles"


def test_a_data_folder_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="xtreme"):
        workload("xnli", data_dir=tmp_path)
    monkeypatch.setenv("XFAST_TEST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInputError, match="nowhere"):
        workload("xnli")
    (tmp_path / "xtreme").mkdir()
    with pytest.raises(InvalidInputError, match="tokenizer"):
        workload("xnli", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["tatoeba:sw", "xnli", "udpos"])
def test_real_text(name: str, data_dir: Path) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    work = workload(name, data_dir=data_dir)
    assert (work.source, work.samples) == ("text", 64)
    for ids, mask in work.batches:
        assert torch.all(ids[:, 0] == 0)
        assert torch.equal(ids == 1, mask == 0)
        assert torch.all(ids.gather(1, mask.sum(1, keepdim=True) - 1) == 2)
    if name == "xnli":
        again = workload(name, Model(vocab=300, limit=30), data_dir=data_dir)
        assert lengths(again) == [min(length, 30) for length in lengths(work)]
        assert max(int(ids.max()) for ids, _ in again.batches) < 300


def test_model_of_a_configuration() -> None:
    config = SimpleNamespace(pad_token_id=None, vocab_size=300, max_position_embeddings=600)
    assert Model.of(config) == Model(300, 0, 512)
    config.max_position_embeddings = 2
    with pytest.raises(UnsupportedModelError, match="1 usable positions"):
        Model.of(config)
