"""``xfast demo`` on tiny models: the figures it prints, the workloads behind them, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import xfast
from xfast import demo
from xfast.benchmarks import models
from xfast.cli import app
from xfast.study.profiles import GROUPS, group_of, load_profiles
from xfast.threads import num_threads

WORKLOADS = [*GROUPS, "latency"]
FIGURES = {"samples_per_s", "tokens_per_s", "p50_ms", "p95_ms", "padding", "speedup", "error"}
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}

runner = CliRunner()


def tiny_model(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(**{**SIZES, "max_position_embeddings": 514, "pad_token_id": 1, **changes})
    return transformers.XLMRobertaModel(config).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def document(tiny: Path) -> dict[str, Any]:
    """The JSON of one run."""
    arguments = ["--model", str(tiny), "--sentences", "20", "--batch-size", "8", "--threads", "1", "--json"]
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # exactly one object, nothing around it


def refusal(*arguments: str) -> str:
    """The one line that a refused run leaves on stderr."""
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in result.stderr
    return message


def test_json_has_every_engine_on_every_workload(document: dict[str, Any]) -> None:
    pairs = [(row["workload"], row["engine"]) for row in document["results"]]
    engines = ["transformers-fp32", "xfast-fp32", "xfast-bf16", "xfast-int8"]
    assert pairs == [(workload, engine) for workload in WORKLOADS for engine in engines]
    assert list(document) == ["machine", "results"]


def test_json_figures_are_sound(document: dict[str, Any]) -> None:
    for row in document["results"]:
        assert set(row) >= FIGURES
        assert all(math.isfinite(row[name]) for name in FIGURES if row[name] is not None)
        enough = row["workload"] == "latency"  # 20 calls; two batches in two rounds otherwise
        assert (row["p95_ms"] is not None) == enough
        assert row["samples_per_s"] > 0
        assert row["tokens_per_s"] / row["samples_per_s"] == pytest.approx(row["tokens"] / row["samples"])
        assert 0 < row["p50_ms"] <= (row["p95_ms"] or math.inf)
        assert 0 <= row["padding"] < 1
        assert row["samples"] == (10 if row["workload"] == "latency" else 20)


def test_json_speedups_follow_from_the_rates(document: dict[str, Any]) -> None:
    reference = {row["workload"]: row for row in document["results"] if row["engine"] == "transformers-fp32"}
    for row in document["results"]:
        stock = reference[row["workload"]]
        assert row["speedup"] == pytest.approx(row["samples_per_s"] / stock["samples_per_s"])
        assert row["padding"] == stock["padding"]
    assert all(row["speedup"] == 1.0 for row in reference.values())
    assert all(row["error"] == 0.0 and row["cosine"] == 1.0 for row in reference.values())


def test_json_errors_are_within_bounds(document: dict[str, Any]) -> None:
    bounds = {"xfast-fp32": (1e-5, 0.99999), "xfast-bf16": (0.03, 0.999), "xfast-int8": (0.1, 0.999)}
    for row in document["results"]:
        if row["engine"] in bounds:
            largest, cosine = bounds[row["engine"]]
            assert 0 < row["error"] <= largest
            assert row["cosine"] >= cosine


def test_json_machine(document: dict[str, Any], tiny: Path) -> None:
    machine = document["machine"]
    assert set(machine) >= {"cpu", "cores", "threads", "isa", "isas", "versions", "commit", "run", "notes"}
    assert machine["threads"] == 1
    run = machine["run"]
    assert run["model"] == str(tiny)
    assert (run["seed"], run["batch_size"], run["sentences"], run["rounds"]) == (0, 8, 20, demo.ROUNDS)
    assert any(note.startswith("xfast-bf16: ") for note in machine["notes"])
    assert not any("original code" in note for note in machine["notes"])


def test_tables_fit_80_columns(tiny: Path) -> None:
    result = runner.invoke(app, ["demo", "--model", str(tiny), "--sentences", "4"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    for text in (
        *WORKLOADS,
        *demo.ENGINES,
        "samples/s",
        "tokens/s",
        "p50 ms",
        "p95 ms",
        "padding",
        "speed-up",
        "error",
    ):
        assert text in result.stdout
    assert 'xfast.accelerate(model, precision="int8")' in result.stdout
    assert "…" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if str(tiny) not in line)


@pytest.mark.parametrize(("seconds_per_token", "sentences"), [(1e-6, demo.DEFAULT_SENTENCES), (1.0, 1)])
def test_the_number_of_sentences_follows_the_machine(
    seconds_per_token: float, sentences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "random_model", lambda seed: tiny_model())
    monkeypatch.setattr(demo, "_probe", lambda *_: dict.fromkeys(demo.ENGINES, seconds_per_token))
    report = demo.run(demo.DemoOptions(), Console(file=io.StringIO()))
    assert report.run["random_weights"]
    assert report.run["sentences"] == sentences
    assert {row["samples"] for row in report.results} == {sentences, demo.LATENCY_CALLS}
    assert any("slow or busy" in note for note in report.notes) == (sentences == 1)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--batch-size", "0"], ["batch-size: 0", "accepted: 1 to "]),
        (["--batch-size", "-3"], ["batch-size: -3"]),
        (["--sentences", "0"], ["sentences: 0", "accepted: 1 to "]),
        (["--seed", "-1"], ["seed: -1", "accepted: 0 to "]),
        (["--threads", "0"], ["threads", "0"]),
        (["--threads", "100000"], ["threads", "100000"]),
        (["--model", "./no/such/folder"], ["'./no/such/folder'", "directory", "Hub id"]),
        (["--model", ""], ["''", "Hub id"]),
        (["--model", "~nobody-has-this-name/x"], ["~nobody", "Hub id"]),
        (["--model", "x" * 5000], ["xxx", "Hub id"]),
    ],
)
def test_bad_options(arguments: list[str], parts: list[str]) -> None:
    message = refusal(*arguments)
    assert all(part in message for part in parts), message


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    assert "is no directory" in refusal("--model", str(file))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    message = refusal("--model", str(tmp_path))
    assert str(tmp_path) in message and "cannot load it" in message


def test_a_model_of_another_family(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    message = refusal("--model", str(tmp_path))
    assert "GPT2Model" in message
    assert "xlm-roberta" in message and "bert" in message


def test_a_decoder_of_a_supported_family(tmp_path: Path) -> None:
    tiny_model(is_decoder=True).save_pretrained(tmp_path)
    assert "decoder" in refusal("--model", str(tmp_path))


def test_damaged_and_incomplete_weights(tiny: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"not safetensors")
    assert "cannot load its weights" in refusal("--model", str(damaged))
    (damaged / "model.safetensors").unlink()
    assert "cannot load its weights" in refusal("--model", str(damaged))
    deeper = shutil.copytree(tiny, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    message = refusal("--model", str(deeper))
    assert "weights are missing" in message and "encoder.layer.2" in message


def test_weights_with_nan(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path)
    assert "encoder.layer.1.output.dense.weight holds NaN" in refusal("--model", str(tmp_path))


def test_too_few_positions(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=3).save_pretrained(tmp_path)
    assert "1 usable positions" in refusal("--model", str(tmp_path))


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect\nand here is a page of advice")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert refusal("--model", "some/model") == "error: model: some/model: cannot load it: We couldn't connect"


@pytest.mark.parametrize("family", ["Roberta", "Camembert", "Bert"])
def test_other_families_load(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES, max_position_embeddings=40)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path)
    result = runner.invoke(app, ["demo", "--model", str(tmp_path), "--sentences", "3", "--json"])
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout)["results"]:
        assert row["error"] < 0.1


def test_half_precision_checkpoints_are_loaded_in_fp32(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = demo.load_model(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize("group", GROUPS)
def test_group_lengths(group: str) -> None:
    lengths = demo.group_lengths(group, 60, 5)
    assert lengths == demo.group_lengths(group, 60, 5)
    assert lengths[:20] == demo.group_lengths(group, 20, 5)
    assert lengths != demo.group_lengths(group, 60, 6)
    profiles = [profile for profile in load_profiles() if group_of(profile.joshi_class) == group]
    for index, task in enumerate(demo.TASKS):
        quantiles = [profile.quantiles for profile in profiles if profile.task == task]
        assert quantiles, f"no profile of {task} for {group}"
        low, high = min(q[0] for q in quantiles), max(q[-1] for q in quantiles)
        assert all(max(low, 2) <= length <= high for length in lengths[index :: len(demo.TASKS)])


def test_workloads_are_right_padded_and_hold_no_padding_id() -> None:
    model = tiny_model(max_position_embeddings=22)
    options = demo.DemoOptions(batch_size=4)
    workloads = demo.make_workloads(model, {"one": [2, 50, 7, 3, 9]}, options)
    assert [workload.name for workload in workloads] == ["one", "latency"]
    one = workloads[0]
    assert [tuple(ids.shape) for ids, _ in one.batches] == [(4, 20), (1, 9)]  # 22 positions less padding's 2
    assert [int(n) for _, mask in one.batches for n in mask.sum(1)] == [2, 20, 7, 3, 9]
    assert (one.samples, one.tokens, one.slots) == (5, 41, 89)
    assert one.padding == pytest.approx(1 - 41 / 89)
    for ids, mask in one.batches:
        assert ids.dtype == mask.dtype == torch.int64
        assert torch.equal(ids == 1, mask == 0)
        assert ids.min() >= 0 and ids.max() < 300
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)


def test_engines_share_parameters_and_leave_the_model_alone() -> None:
    model = tiny_model()
    engines = demo.build_engines(model)
    assert engines[demo.REFERENCE] is model
    assert "forward" not in model.__dict__
    for name in demo.ENGINES[1:]:
        assert xfast.explain(engines[name]).encoders[0].precision == name.split("-")[1]
        for mine, theirs in zip(engines[name].parameters(), model.parameters(), strict=True):
            assert mine is theirs


def test_calls_that_ran_the_original_code_are_admitted() -> None:
    engines = demo.build_engines(tiny_model())
    patch: Any = engines["xfast-int8"].forward
    patch.fallbacks["some reason"] = 3
    assert "xfast-int8: 3 calls ran the original code: some reason" in demo._notes(engines)


def test_the_number_of_sentences_shrinks_on_a_slow_machine() -> None:
    lengths = {group: [10] * demo.DEFAULT_SENTENCES for group in GROUPS}
    latency = demo.make_workloads(tiny_model(), {}, demo.DemoOptions())[-1]

    def affordable(seconds_per_token: float, batch_size: int) -> int:
        return demo._affordable(30.0, lengths, latency, dict.fromkeys(demo.ENGINES, seconds_per_token), batch_size)

    assert affordable(1e-6, 16) == affordable(1e-6, 24) == affordable(1e-6, 100) == demo.DEFAULT_SENTENCES
    # 4 engines, 2 rounds, 3 groups: 240 tokens per sentence of each group, 2560 in the latency workload
    assert affordable(30 / (2560 + 240 * 33), 16) == 32
    assert affordable(30 / (2560 + 240 * 33), 10) == 30
    assert affordable(30 / (2560 + 240 * 9), 16) == 8
    assert affordable(1.0, 16) == 1


def test_past_the_deadline_there_is_one_round() -> None:
    engines = demo.build_engines(tiny_model())
    workloads = demo.make_workloads(engines[demo.REFERENCE], {"one": [5, 3]}, demo.DemoOptions())
    rates = dict.fromkeys(demo.ENGINES, 1e-6)
    shown: list[dict[str, Any]] = []
    late = demo._measure(engines, workloads, rates, lambda **update: shown.append(update), 0.0)
    assert {len(tally.seconds) for tally in late.values()} == {1}
    done = sum(update.get("advance", 0.0) for update in shown)
    assert done == pytest.approx(shown[0]["total"] / demo.ROUNDS)
    unbounded = demo._measure(engines, workloads, rates, lambda **_: None, math.inf)
    assert {len(tally.seconds) for tally in unbounded.values()} == {demo.ROUNDS}


def test_random_weights_depend_on_the_seed_alone() -> None:
    def filled(seed: int, threads: int) -> dict[str, torch.Tensor]:
        with num_threads(threads), models._NoRandomInit():
            model = tiny_model(vocab_size=5000, hidden_size=256)
        with num_threads(threads):
            models.fill(model, seed, 0.02)
        return model.state_dict()

    first, again, other = filled(3, 1), filled(3, 2), filled(4, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    word = "embeddings.word_embeddings.weight"
    assert not torch.equal(first[word], other[word])
    assert float(first[word].std()) == pytest.approx(0.02, rel=0.01)
    assert torch.all(first["embeddings.LayerNorm.weight"] == 1) and torch.all(first["embeddings.LayerNorm.bias"] == 0)
    assert torch.all(first["encoder.layer.0.output.dense.bias"] == 0)


@pytest.mark.slow
def test_the_default_model_has_the_size_of_xlm_r_base() -> None:
    model = demo.random_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 277_453_056  # without the pooler
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.config.max_position_embeddings == 514
    assert not model.training
