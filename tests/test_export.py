"""``xfast export onnx``: every head beside ONNX Runtime, files that appear whole or not at all, and every refusal."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import transformers
from models import HEADS, LABELS, build, error, left_padded, norm_error, outputs_of, quick_settings, ragged
from typer.testing import CliRunner

import xfast
from xfast import export
from xfast.cli import app
from xfast.errors import (
    BackendUnavailableError,
    DataFileError,
    InvalidOptionError,
    InvalidWeightsError,
    UnsupportedModelError,
    WeightsFreedError,
)

onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX: pip install onnxruntime onnxscript")
pytest.importorskip("onnxscript", reason="needs ONNX: pip install onnxruntime onnxscript")

_quick = pytest.fixture(autouse=True)(quick_settings)
SIZES = {"num_hidden_layers": 2, "max_position_embeddings": 514}
BOUND = 1e-5


def model_of(head: str, family: str = "xlm-roberta", **changes: Any) -> Any:
    return build(family, head, **{**SIZES, **changes})


def run(path: Path, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {name: t.numpy() for name, t in batch.items()})]


def same(path: Path, model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Every output at every position, padding included: the original's arithmetic, whatever it does there."""
    got, want = run(path, batch), outputs_of(model(**batch))
    for ours, theirs in zip(got, want.values(), strict=True):
        # A single small logit is a difference of larger numbers: its own size is no scale
        assert error(ours, theirs) <= BOUND or float((ours - theirs).abs().max()) <= 1e-6


def padded(kind: str, length: int) -> dict[str, torch.Tensor]:
    """Four sequences, the longest of ``length`` tokens."""
    lengths = (length, max(1, length // 2), 1, max(1, length - 1))
    batch = ragged(lengths=lengths, seed=length)
    if kind == "left":
        return left_padded(batch)
    if kind == "holes":
        batch["attention_mask"][:, 1 : length - 1 : 3] = 0
    return batch


@pytest.fixture(scope="module", params=HEADS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Any]:
    """(head, model, file, what was reported)."""
    model, path = model_of(request.param), tmp_path_factory.mktemp(request.param) / "model.onnx"
    return request.param, model, path, export.export_onnx(model, path)


@pytest.mark.parametrize("length", [1, 7, 64, 512])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_every_head_is_the_original(exported: tuple[str, Any, Path, Any], kind: str, length: int) -> None:
    head, model, path, _ = exported
    batch = padded(kind, length)
    if head == "multiple-choice":
        batch = {name: values.view(2, 2, -1) for name, values in batch.items()}
    same(path, model, batch)


def test_other_batches_and_no_tokens_at_all(exported: tuple[str, Any, Path, Any]) -> None:
    head, model, path, made = exported
    for rows in (1, 5):
        batch = ragged(lengths=[9] * rows)
        if head == "multiple-choice":  # other numbers of choices, too
            batch = {name: values.view(1, rows, -1) for name, values in batch.items()}
        same(path, model, batch)
    batch = ragged(lengths=(5, 3))
    batch["attention_mask"][1] = 0
    if head != "multiple-choice":
        assert all(bool(torch.isfinite(each).all()) for each in run(path, batch))
    assert made.error <= BOUND and made.batches == 4 and made.data is None and made.bytes == path.stat().st_size
    assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]


def test_names_and_types(exported: tuple[str, Any, Path, Any]) -> None:
    head, _, path, made = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    dims = ["batch", "choices", "length"] if head == "multiple-choice" else ["batch", "length"]
    assert [(each.name, each.type, each.shape) for each in session.get_inputs()] == [
        (name, "tensor(int64)", dims) for name in ("input_ids", "attention_mask")
    ]
    want = {
        "base": [["batch", "length", 64], ["batch", 64]],
        "base-no-pooler": [["batch", "length", 64]],
        "sequence-classification": [["batch", LABELS]],
        "token-classification": [["batch", "length", LABELS]],
        "question-answering": [["batch", "length"]] * 2,
        "multiple-choice": [["batch", "choices"]],
        "masked-lm": [["batch", "length", 101]],
    }
    assert [each.shape for each in session.get_outputs()] == want[head]
    assert tuple(each.name for each in session.get_outputs()) == made.outputs


def test_token_types_and_positions_by_column(tmp_path: Path) -> None:
    model, path = model_of("token-classification", "bert"), tmp_path / "m.onnx"
    made = export.export_onnx(model, str(path))
    assert made.inputs == ("input_ids", "attention_mask", "token_type_ids")
    for batch in (ragged("bert"), left_padded(ragged("bert"))):
        types = torch.randint(0, 2, batch["input_ids"].shape)
        same(path, model, {**batch, "token_type_ids": types})


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *(("bert", head) for head in HEADS),
        ("camembert", "sequence-classification"),
        ("xlm-roberta-xl", "sequence-classification"),
    ],
)
def test_heads_of_every_family(family: str, head: str, tmp_path: Path) -> None:
    model, path = model_of(head, family, num_hidden_layers=1), tmp_path / "m.onnx"
    export.export_onnx(model, path)
    batch = ragged(family)
    if family == "bert":
        batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    if head == "multiple-choice":
        batch = {name: values.view(1, len(values), -1) for name, values in batch.items()}
    same(path, model, batch)


def test_an_accelerated_model_is_exported_as_it_was_and_stays_accelerated(tmp_path: Path) -> None:
    model, batch = model_of("sequence-classification"), ragged()
    want = model(**batch).logits
    model.set_attn_implementation("eager")
    xfast.accelerate(model, precision="int8", layers=1)
    fast, training = model(**batch).logits, model.training
    path = tmp_path / "m.onnx"
    export.export_onnx(model.train(), path)
    assert model.training and model.config._attn_implementation == "eager"
    model.train(training)
    assert error(run(path, batch)[0], want) <= BOUND and norm_error(fast, want) > 1e-3
    assert torch.equal(model(**batch).logits, fast)
    assert xfast.explain(model).encoders[0].fallbacks == {}
    xfast.accelerate(model, keep_weights=False)
    with pytest.raises(WeightsFreedError):
        export.export_onnx(model, tmp_path / "n.onnx")
    assert not (tmp_path / "n.onnx").exists()


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, path = model_of("base-no-pooler"), ragged(), tmp_path / "m.onnx"
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 100_000)
    made = export.export_onnx(model, path)
    assert made.data == tmp_path / "m.onnx.data" and made.data.stat().st_size > 300_000
    assert {each.name for each in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    same(path, model, batch)
    for name in ("m.onnx", "m.onnx.data"):  # either is there: nothing is touched
        (tmp_path / name).rename(tmp_path / "aside")
        with pytest.raises(InvalidOptionError, match=r"exists; --force"):
            export.export_onnx(model, path)
        (tmp_path / "aside").rename(tmp_path / name)
    other = model_of("base-no-pooler", seed=1)
    export.export_onnx(other, path, force=True)
    same(path, other, batch)
    monkeypatch.undo()
    export.export_onnx(model, path, force=True)  # one file again: the old weights go with their graph
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    same(path, model, batch)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that a failing export must leave as it is, with nothing beside it."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_wrong_export_is_not_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = export._write

    def other_weights(traced: Any, path: Path, example: Any) -> int:
        weight = traced.model.encoder.layer[1].output.dense.weight
        weight.mul_(1.01)
        try:
            return original(traced, path, example)
        finally:
            weight.div_(1.01)

    monkeypatch.setattr(export, "_write", other_weights)
    with pytest.raises(export.ExportError, match=r"last_hidden_state differs from PyTorch's by .* nothing was written"):
        export.export_onnx(model_of("base-no-pooler"), old, force=True)


def test_a_damaged_export_is_not_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = export._write

    def cut(traced: Any, path: Path, example: Any) -> int:
        opset = original(traced, path, example)
        path.write_bytes(path.read_bytes()[:-1000])
        return opset

    monkeypatch.setattr(export, "_write", cut)
    with pytest.raises(export.ExportError, match="ONNX Runtime does not load the export"):
        export.export_onnx(model_of("base-no-pooler"), old, force=True)


def test_a_full_disk(old: Path) -> None:
    model = model_of("base-no-pooler")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk: the write of more bytes fails
    try:
        with pytest.raises(DataFileError, match=r"out: .*model\.onnx cannot be written: OSError: .*File too large"):
            export.export_onnx(model, old, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_the_exporter_raises_is_typed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("base-no-pooler")
    output = type(model.encoder.layer[0].output)

    def forward(self: Any, x: Any, y: Any) -> Any:
        return x if x.sum().item() > 0 else y

    # as if transformers had written it: a class that was changed by somebody else is refused
    monkeypatch.setattr(output, "forward", FunctionType(forward.__code__, vars(sys.modules[output.__module__])))
    with pytest.raises(export.ExportError, match="XLMRobertaModel was not exported: "):
        export.export_onnx(model, old, force=True)


def test_an_interrupt(old: Path) -> None:
    def interrupt(step: str) -> None:
        if step.startswith("comparing"):
            raise KeyboardInterrupt

    model = xfast.accelerate(model_of("base-no-pooler"))
    with pytest.raises(KeyboardInterrupt):
        export.export_onnx(model, old, force=True, progress=interrupt)
    assert xfast.explain(model).encoders


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InvalidOptionError, match="exists; --force"):
        export.export_onnx(model_of("base-no-pooler"), path, progress=lambda _: path.write_bytes(b"other"))
    assert path.read_bytes() == b"other" and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = model_of("base-no-pooler")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "none" / "m.onnx", tmp_path / "file" / "m.onnx", Path("/proc/m.onnx")):
        with pytest.raises(DataFileError, match=f"out: {out} cannot be written"):
            export.export_onnx(model, out)
    for out in (tmp_path, Path(), Path("/")):
        with pytest.raises(InvalidOptionError, match="is a folder"):
            export.export_onnx(model, out, force=True)
    (tmp_path / "m.onnx.data").mkdir()
    with pytest.raises(InvalidOptionError, match=r"m\.onnx\.data exists"):
        export.export_onnx(model, tmp_path / "m.onnx", force=True)


def test_models_that_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    bad = build()
    bad.encoder.layer[1].output.dense.bias[3] = torch.nan
    with pytest.raises(InvalidWeightsError, match=r"encoder\.layer\.1\.output\.dense\.bias holds NaN"):
        export.export_onnx(bad, out)
    with pytest.raises(InvalidWeightsError, match=r"is torch\.bfloat16; accepted: torch\.float32"):
        export.export_onnx(build().bfloat16(), out)
    lazy = build(head="sequence-classification")
    lazy.classifier.dense = torch.nn.LazyLinear(64)
    with pytest.raises(InvalidWeightsError, match=r"classifier\.dense\.weight is not initialised"):
        export.export_onnx(lazy, out)
    with pytest.raises(InvalidWeightsError, match="is on the meta device"):
        export.export_onnx(build().to("meta"), out)
    causal = transformers.XLMRobertaForCausalLM(build().config)
    for model in (causal, torch.nn.Linear(2, 2), torch.nn.Sequential(build())):
        with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} cannot be exported; accepted: "):
            export.export_onnx(model, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", export.PACKAGES)
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(BackendUnavailableError, match=f"needs {package}: pip install {package}"):
        export.export_onnx(build(), tmp_path / "m.onnx")


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", "onnx", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model_of("sequence-classification", num_hidden_layers=1).bfloat16().save_pretrained(folder)
    return folder


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    done = command(checkpoint, out, "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["path"] == str(out) and made["outputs"] == ["logits"] and made["bytes"] == out.stat().st_size
    assert made["error"] <= BOUND and made["batches"] == 4 and made["data"] is None
    model = transformers.XLMRobertaForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    same(out, model, ragged())
    again = command(checkpoint, out)
    assert again.exit_code == 2 and "exists; --force" in again.stderr
    done = command(checkpoint, out, "--encoder", "--force")  # it has no pooler: the head replaced it
    assert done.exit_code == 0 and "last_hidden_state; within" in done.stdout, done.output
    same(out, model.base_model, ragged())


def test_names_that_look_like_markup(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x[").mkdir()  # a closing tag without its beginning is an error of Rich's
    done = command(checkpoint, tmp_path / "x[" / "b].onnx")
    assert done.exit_code == 0 and "/x[/b].onnx: " in done.stdout, done.output


def test_what_the_command_refuses(checkpoint: Path, tmp_path: Path) -> None:
    out, vit, odd, bare = tmp_path / "m.onnx", tmp_path / "vit", tmp_path / "odd", tmp_path / "bare"
    vit_config = transformers.ViTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, image_size=32)
    transformers.ViTModel(vit_config).save_pretrained(vit)
    for folder, name in ((odd, "XLMRobertaForDreams"), (bare, "XLMRobertaForTokenClassification")):
        build("xlm-roberta", "base-no-pooler").save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    damaged = tmp_path / "damaged"
    build().save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes(b"no")
    for model, words in (
        ("/nowhere/at/all", "/nowhere/at/all"),
        (vit, "ViTModel cannot be exported; accepted: xlm-roberta"),
        (odd, "XLMRobertaForDreams, which transformers does not have"),
        (bare, "lacks classifier."),
        (damaged, "damaged"),
    ):
        done = command(model, out)
        assert done.exit_code == 2 and words in done.stderr, (model, done.output)
    assert not out.exists()
