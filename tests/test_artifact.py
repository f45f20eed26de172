"""Packed artifacts: what was saved comes back bit for bit, mapped, and everything that cannot be done says so."""

from __future__ import annotations

import copy
import filecmp
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import (
    ALL_FAMILIES,
    HEADS,
    alt_clip,
    arguments,
    build,
    encoder_of,
    outputs_of,
    quick_settings,
    ragged,
    text_tower,
)
from torch import nn

import xfast
from xfast import _C, artifact

quick = pytest.fixture(autouse=True)(quick_settings)
PRECISIONS = ("fp32", "bf16", "int8", "int4")
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TOLERANCE = 0.03  # of the largest value


def accelerated(family: str = "xlm-roberta", head: str = "base", precision: str = "int8", **changes: Any) -> Any:
    return xfast.accelerate(build(family, head, **changes), precision=precision, keep_weights=False)


def same(got: Any, want: Any) -> bool:
    left, right = outputs_of(got), outputs_of(want)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_files(left: Path, right: Path) -> bool:
    names = names_in(left)
    return names == names_in(right) and filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_loaded_model_gives_the_same_bits(family: str, head: str, precision: str, tmp_path: Path) -> None:
    model, batch = accelerated(family, head, precision), arguments(family, head)
    xfast.save(model, tmp_path / "mit Lücke ü")
    loaded = xfast.load(tmp_path / "mit Lücke ü")
    assert type(loaded) is type(model) and not loaded.training
    assert same(loaded(**batch), model(**batch))
    kept = xfast.accelerate(build(family, head), precision=precision)
    xfast.save(kept, str(tmp_path / "kept"))  # weights that are still there make no difference
    assert same_files(tmp_path / "kept", tmp_path / "mit Lücke ü")
    xfast.save(loaded, tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "kept")


def test_saving_a_loaded_model_keeps_its_tokenizer(tmp_path: Path) -> None:
    source, folder = tmp_path / "checkpoint", tmp_path / "artifact"
    build().save_pretrained(source)
    (source / "tokenizer.json").write_text('{"any": "bytes"}')
    xfast.save(xfast.accelerate(transformers.XLMRobertaModel.from_pretrained(source).eval()), folder)
    for target in (folder, tmp_path / "elsewhere"):
        xfast.save(xfast.load(folder), target)
        assert (target / "tokenizer.json").read_text() == '{"any": "bytes"}'
        assert xfast.load(target, verify=True) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_weights(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = xfast.accelerate(build(head="masked-lm").to(dtype), precision=precision, keep_weights=False)
    xfast.save(model, tmp_path)
    loaded = xfast.load(tmp_path)
    assert same(loaded(**ragged()), model(**ragged()))
    assert loaded.dtype == dtype and {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 0}, {"hidden_size": 24, "intermediate_size": 7}])
def test_awkward_sizes(changes: dict[str, int], tmp_path: Path) -> None:
    model = accelerated(precision="int8", **changes)
    xfast.save(model, tmp_path)
    assert same(xfast.load(tmp_path)(**ragged()), model(**ragged()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_altclip_with_one_tower_and_with_both(precision: str, tmp_path: Path) -> None:
    for name, make, inputs in (("text", text_tower, {}), ("both", alt_clip, {"pixel_values": torch.randn(2, 3, 8, 8)})):
        model = xfast.accelerate(make(), precision=precision, keep_weights=False)
        xfast.save(model, tmp_path / name)
        want, got = (tuple(m(**ragged(), **inputs).values()) for m in (model, xfast.load(tmp_path / name)))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_fewer_layers(tmp_path: Path) -> None:
    model = xfast.accelerate(build(), precision="int8", layers=2, keep_weights=False)
    xfast.save(model, tmp_path)
    loaded = xfast.load(tmp_path)
    assert same(loaded(**ragged()), model(**ragged())) and xfast.explain(loaded).encoders[0].layers == 2


@pytest.mark.parametrize("saved_on", _C.available_isas())
def test_int8_gives_the_same_bits_on_every_instruction_set(
    saved_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XFAST_ISA", saved_on)
    model = accelerated(head="token-classification")
    want = model(**ragged())
    xfast.save(model, tmp_path)
    for target in _C.available_isas():
        monkeypatch.setenv("XFAST_ISA", target)
        loaded = xfast.load(tmp_path)
        assert same(loaded(**ragged()), want), target
        text = str(xfast.explain(loaded))
        assert f"instruction set: {target}" in text and "layout (1) is every target's" in text


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    xfast.save(accelerated(head="masked-lm"), tmp_path)
    loaded = xfast.load(tmp_path)
    word = encoder_of(loaded).embeddings.word_embeddings.weight
    assert loaded.lm_head.decoder.weight is word and not word.is_meta
    assert loaded.lm_head.decoder.bias is loaded.lm_head.bias


def test_pipelines_and_a_tokenizer(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")
            (Path(folder) / "xfast.json").write_text("not a tokenizer's file")

    xfast.save(accelerated(), tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    xfast.load(tmp_path, verify=True)


def test_the_tokenizer_comes_along_from_the_models_folder(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "sentencepiece.bpe.model").write_bytes(b"\x00pieces")
    model = transformers.XLMRobertaModel.from_pretrained(tmp_path / "source")
    xfast.save(xfast.accelerate(model, precision="int8"), tmp_path / "a")
    assert (tmp_path / "a" / "sentencepiece.bpe.model").read_bytes() == b"\x00pieces"


def _mappings(folder: Path) -> list[tuple[int, int, dict[str, int]]]:
    """[begin, end) and kB by kind of this process's mappings of files in ``folder``."""
    found: list[tuple[int, int, dict[str, int]]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            inside = str(folder) in line
            if inside:
                begin, end = (int(part, 16) for part in first.split("-"))
                found.append((begin, end, {}))
        elif inside and line.endswith("kB"):
            found[-1][2][first.rstrip(":")] = int(line.split()[-2])
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_and_tables_are_read_in_place_from_shared_pages(precision: str, tmp_path: Path) -> None:
    xfast.save(accelerated(head="masked-lm", precision=precision), tmp_path)
    loaded = xfast.load(tmp_path)
    loaded(**ragged())
    mappings = _mappings(tmp_path)
    engine = encoder_of(loaded).forward.plan.engine
    memory = [part.ctypes.data for layer in range(3) for linear in engine.packed_layer(layer).values()
              for part in linear.values()]  # fmt: skip
    memory += [tensor.data_ptr() for tensor in loaded.parameters() if not tensor.is_meta]
    assert len(memory) > 50 and all(any(begin <= at < end for begin, end, _ in mappings) for at in memory)
    assert sum(kinds["Private_Dirty"] for *_, kinds in mappings) == 0


def test_writing_to_a_mapped_parameter_leaves_the_file(tmp_path: Path) -> None:
    xfast.save(accelerated(), tmp_path)
    loaded = xfast.load(tmp_path)
    encoder_of(loaded).embeddings.position_embeddings.weight.data.fill_(1)
    with pytest.raises(xfast.WeightsFreedError, match="packed artifact"):
        loaded(**ragged())
    xfast.load(tmp_path, verify=True)


@pytest.mark.parametrize("family", ["xlm-roberta", "bert", "xlm-roberta-xl"])
@pytest.mark.parametrize("head", HEADS[2:6])
def test_an_encoder_is_loaded_under_another_head(family: str, head: str, tmp_path: Path) -> None:
    under = build(family, head)
    want = xfast.accelerate(copy.deepcopy(under), precision="int8", keep_weights=False)(**arguments(family, head))
    encoder = encoder_of(copy.deepcopy(under))
    encoder.pooler = None  # which comes with the head where its class has one
    for saved in (encoder, build(family, "token-classification")):
        encoder_of(saved).load_state_dict(encoder_of(under).state_dict(), strict=False)
        xfast.save(xfast.accelerate(saved, precision="int8"), tmp_path)
        given = copy.deepcopy(under)
        pooler = getattr(encoder_of(given), "pooler", None)
        encoder_of(given).to("meta")
        if pooler is not None:
            encoder_of(given).pooler = copy.deepcopy(encoder_of(under).pooler)
        loaded = xfast.load(tmp_path, head=given)
        assert loaded is given and same(loaded(**arguments(family, head)), want)
        assert "mapped from" in str(xfast.explain(loaded))
        xfast.save(loaded, tmp_path / "again")
        assert same(xfast.load(tmp_path / "again")(**arguments(family, head)), want)


def test_a_head_for_another_encoder_is_refused(tmp_path: Path) -> None:
    xfast.save(accelerated(), tmp_path)
    wrong = build(head="token-classification", num_hidden_layers=2, hidden_size=32)
    with pytest.raises(xfast.InvalidOptionError, match=r"head: .*num_layers 2 for 3, hidden_size 32 for 64"):
        xfast.load(tmp_path, head=wrong)
    for given in (build(), nn.Linear(2, 2), "panx"):
        with pytest.raises(xfast.InvalidOptionError, match="one encoder under a head"):
            xfast.load(tmp_path, head=given)
    with pytest.raises(xfast.InvalidOptionError, match=r"head: .*classifier.*meta device"):
        xfast.load(tmp_path, head=build(head="token-classification").to("meta"))


LOSSES: dict[str, Callable[[Any, Path], Any]] = {
    "state_dict": lambda model, folder: model.state_dict(),
    "restore": lambda model, folder: xfast.restore(model),
    "accelerate": lambda model, folder: xfast.accelerate(model),
    "pickle": lambda model, folder: pickle.dumps(model),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder / "x"),
    "attention weights": lambda model, folder: model(**ragged(), output_attentions=True),
}


@pytest.mark.parametrize("action", list(LOSSES))
def test_what_needs_the_original_weights_says_where_they_are_not(action: str, tmp_path: Path) -> None:
    xfast.save(accelerated(head="token-classification"), tmp_path / "a")
    loaded = xfast.load(tmp_path / "a")
    with pytest.raises(xfast.WeightsFreedError, match=r"packed artifact .* that this model was loaded from"):
        LOSSES[action](loaded, tmp_path)


def test_a_copy_shares_the_packed_weights(tmp_path: Path) -> None:
    xfast.save(accelerated(head="masked-lm"), tmp_path)
    loaded = xfast.load(tmp_path)
    want = loaded(**ragged())
    clone = copy.deepcopy(loaded)
    del loaded
    assert same(clone(**ragged()), want)
    assert "packed artifact" in str(xfast.explain(clone))


def test_saving_over_an_artifact_in_use(tmp_path: Path) -> None:
    xfast.save(accelerated(), tmp_path)
    first = xfast.load(tmp_path)
    want, wrong, stop = first(**ragged()), [], threading.Event()

    def use() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not same(first(**ragged()), want):
                    wrong.append(1)

    user = threading.Thread(target=use)
    user.start()
    try:
        xfast.save(first, tmp_path)  # itself, while it is mapped and running
        other = accelerated(seed=7, num_hidden_layers=2)
        xfast.save(other, tmp_path)
    finally:
        stop.set()
        user.join()
    assert not wrong and same(first(**ragged()), want)
    assert same(xfast.load(tmp_path, verify=True)(**ragged()), other(**ragged()))
    assert not (tmp_path / artifact.layer_file(2)).exists()


CHILD = """
import sys, hashlib, torch, xfast
model = xfast.load(sys.argv[1])
with torch.no_grad():
    out = model(input_ids=torch.arange(3, 60).view(3, 19)).last_hidden_state
print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    xfast.save(accelerated(), tmp_path)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    lines = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0] and lines[0] == lines[1] and len(lines[0]) == 65


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xfast.save(accelerated(head="masked-lm"), tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    xfast.load(tmp_path)(**ragged())


@pytest.mark.parametrize("name", ["format1", "format2"])
def test_the_golden_artifact_of_every_format(name: str) -> None:
    """format1: int8. format2: int8 and int4 in one layer, with divided inputs.

    Files and ``-expected`` never change: what they gave when they were made, within the rounding steps of such a tiny
    model, since arithmetic may change. ``-bits`` is what today's arithmetic gives, to be written anew when it changes.
    """
    expected = json.loads((GOLDEN / f"{name}-expected.json").read_text())
    model = xfast.load(GOLDEN / name, verify=True)
    out = model(input_ids=torch.tensor(expected["input_ids"])).last_hidden_state.numpy()
    want = np.frombuffer(bytes.fromhex(expected["last_hidden_state"]), "<f4").reshape(out.shape)
    assert np.abs(out - want).max() <= GOLDEN_TOLERANCE * np.abs(want).max()
    today = json.loads((GOLDEN / f"{name}-bits.json").read_text())
    assert out.astype("<f4").tobytes().hex() == today["last_hidden_state"]


@pytest.mark.parametrize("verify", [0, 1, "full", "no"])
def test_verify_takes_three_values(verify: Any) -> None:
    with pytest.raises(xfast.InvalidOptionError, match="verify"):
        xfast.load(GOLDEN / "format1", verify=verify)


class Other(transformers.XLMRobertaModel):
    pass


def _with_other_head() -> Any:
    model = xfast.accelerate(build(head="sequence-classification"))
    model.classifier = nn.Linear(64, 3)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not accelerated": (build, xfast.InvalidOptionError, "accelerate"),
    "no transformers model": (lambda: nn.Sequential(build()), xfast.UnsupportedModelError, "auto_model"),
    "a class of the user's": (
        lambda: xfast.accelerate(Other(build().config).eval()),
        xfast.UnsupportedModelError,
        "Other",
    ),
    "a replaced head": (_with_other_head, xfast.UnsupportedModelError, "classifier"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_saved(case: str, tmp_path: Path) -> None:
    make, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        xfast.save(make(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    model = accelerated()
    for folder in (tmp_path, tmp_path / "file", tmp_path / "file" / "below", Path("/proc/xfast-artifact")):
        with pytest.raises(xfast.ArtifactWriteError, match=str(folder)):
            xfast.save(model, folder)
    assert names_in(tmp_path) == ["config.json", "file"]


@pytest.mark.parametrize("limit", [0, 100, 4096, 5000, 10000, 20000, 30000])
def test_a_full_disk_leaves_what_was_there(limit: int, tmp_path: Path) -> None:
    old, new = accelerated(num_hidden_layers=1), accelerated(num_hidden_layers=2)
    xfast.save(old, tmp_path / "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for name in ("old", "new"):
            with pytest.raises(xfast.ArtifactWriteError, match="File too large"):
                xfast.save(new, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == ["old"] and artifact.STAGING not in names_in(tmp_path / "old")
    assert same(xfast.load(tmp_path / "old", verify=True)(**ragged()), old(**ragged()))


def test_an_interrupted_replacement_is_not_finished_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = accelerated(num_hidden_layers=1), accelerated(num_hidden_layers=2)
    xfast.save(old, tmp_path / "a")
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == artifact.PARAMETERS:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            xfast.save(new, tmp_path / "a")
    for _ in range(2):
        with pytest.raises(xfast.ArtifactError, match="is not finished"):
            xfast.load(tmp_path / "a")
        with monkeypatch.context() as patched:  # nor does a save that fails earlier lose what is known of the files
            patched.setattr(artifact, "write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                xfast.save(new, tmp_path / "a")
    xfast.save(new, tmp_path / "a")
    assert same(xfast.load(tmp_path / "a", verify=True)(**ragged()), new(**ragged()))
    assert artifact.STAGING not in names_in(tmp_path / "a")


def test_nothing_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(xfast.ArtifactError):
            xfast.load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "layer-001.safetensors", "words.safetensors", "parameters.safetensors"]
)
@pytest.mark.parametrize("verify", [None, False, True])
def test_a_missing_or_short_file(name: str, verify: bool | None, tmp_path: Path) -> None:
    xfast.save(accelerated(), tmp_path)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    with pytest.raises(xfast.ArtifactError, match=name):
        xfast.load(tmp_path, verify=verify)
    (tmp_path / name).unlink()
    with pytest.raises(xfast.ArtifactError, match=name):
        xfast.load(tmp_path, verify=verify)


def _resigned(folder: Path, **changes: Any) -> None:
    """Changes fields of the manifest and gives it the right hash, as someone who means it would."""
    content = json.loads((folder / artifact.MANIFEST).read_text()) | changes
    del content["sha256"]
    content["sha256"] = artifact.digest(content)
    (folder / artifact.MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 3}, "format 3; this version reads 1 and 2"),
        ({"format": True}, "names no format"),
        ({"layout": 2}, "layout 2"),
        ({"precision": "int2"}, "field"),
        ({"layers": 99}, "layers 99"),
        ({"layers": -1}, "layers -1"),
        ({"model_class": "os:system"}, "os:system"),
        ({"model_class": "transformers.models.bert.modeling_bert:torch"}, "no model class"),
        ({"model_class": "transformers.models.t5.modeling_t5:T5Model"}, "T5Model"),
        ({"arguments": {"trust": True}}, "trust"),
        ({"aliases": {"a": "b"}}, "other parameters"),
        ({"linear_dtype": "int64"}, "type"),
        ({"packed_words": False}, "different models"),
        ({"spec": {}}, "different models"),
        ({"files": {}}, "does not list"),
        ({"files": {"../x": {"bytes": 1, "sha256": "", "checksum": ""}}}, "files"),
        ({"more": 1}, "fields"),
    ],
)
def test_a_manifest_of_something_else(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    xfast.save(accelerated(), tmp_path)
    _resigned(tmp_path, **changes)
    with pytest.raises(xfast.ArtifactError, match=text):
        xfast.load(tmp_path)


@pytest.mark.parametrize("folder", [3, None, b"folder"])
def test_what_is_no_folder(folder: Any) -> None:
    for call in (lambda: xfast.load(folder), lambda: xfast.save(accelerated(), folder)):
        with pytest.raises(xfast.InvalidOptionError, match=f"folder: expected a str or a path, got {folder!r}"):
            call()


def test_checksum_does_not_depend_on_threads_and_sees_every_byte(rng: np.random.Generator) -> None:
    for size in (0, 1, 7, 63, 64, 65, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 5):
        data = rng.integers(0, 256, size, np.uint8)
        want = _C.checksum(data, 1)
        assert {_C.checksum(data, threads) for threads in (2, 3, 8)} <= {want}
        assert size == 0 or _C.checksum(data[:-1], 1) != want
        for at in rng.integers(0, size, 20) if size else ():
            data[at] ^= 1 << rng.integers(8)
            assert _C.checksum(data, 2) != want
            want = _C.checksum(data, 2)
