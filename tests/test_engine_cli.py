"""``xfast engine``: real engines built for GPUs that are not here, listed, damaged, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import alt_clip, build, text_tower
from typer.testing import CliRunner

from xfast.architecture import describe, find_encoders
from xfast.backends import tensorrt_store as stores
from xfast.cli import app
from xfast.engine import load_weights

trt = pytest.importorskip("tensorrt_rtx", reason='needs TensorRT: pip install "xfast[tensorrt-rtx]"')

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["engine", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("xlm-roberta", "sequence-classification", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_build_and_inspect(precision: str, model: Path, tmp_path: Path) -> None:
    done = _run("build", model, tmp_path, "--precision", precision, "--target", "SM89", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert Path(made["path"]).is_file() and made["target"] == "SM89" and made["bytes"] > 10_000
    (row,) = json.loads(_run("inspect", tmp_path, "--json").stdout)
    assert (row["family"], row["layers"], row["precision"], row["target"]) == ("xlm-roberta", 2, precision, "SM89")
    assert row["state"].startswith("intact") and row["header"]["targets"] == ["SM89"]
    assert precision in _run("inspect", tmp_path).stdout
    again = json.loads(_run("build", model, tmp_path, "--precision", precision, "--target", "SM89", "--json").stdout)
    assert again["path"] == made["path"]  # the same key, replaced


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_a_pre_norm_model(precision: str, tmp_path: Path) -> None:
    build("xlm-roberta-xl", "masked-lm", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    names = set()
    for layers in ([], ["--layers", "1"]):
        options = ("--precision", precision, "--target", "SM89", *layers, "--json")
        done = _run("build", tmp_path / "model", tmp_path / "engines", *options)
        assert done.exit_code == 0, done.output
        names.add(Path(json.loads(done.stdout)["path"]).name)
    rows = json.loads(_run("inspect", tmp_path / "engines", "--json").stdout)
    assert {row["file"] for row in rows} == names
    assert sorted((row["family"], row["layers"]) for row in rows) == [("xlm-roberta-xl", 1), ("xlm-roberta-xl", 2)]
    assert all(row["state"].startswith("intact") for row in rows)


@pytest.mark.parametrize("tower", [alt_clip, text_tower], ids=["AltCLIPModel", "AltCLIPTextModel"])
def test_altclip(tower: Callable[[], Any], tmp_path: Path) -> None:
    model = tower()
    model.save_pretrained(tmp_path / "model")
    done = _run("build", tmp_path / "model", tmp_path / "engines", "--target", "SM89", "--json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(_run("inspect", tmp_path / "engines", "--json").stdout)
    assert (row["family"], row["layers"], row["precision"]) == ("altclip", 3, "bf16")
    # accelerate finds it by the weights: whichever model they were read from, the encoder's are the same
    ((_, encoder, family),) = find_encoders(model)
    assert stores.digest(describe(encoder, family)) == stores.digest(load_weights(str(tmp_path / "model")))


def test_a_checkpoint_of_another_class_is_named(tmp_path: Path) -> None:
    build("xlm-roberta-xl", "masked-lm", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "model_type": "xlm-roberta"})
    (tmp_path / "model" / "config.json").write_text(text, encoding="utf-8")
    done = _run("build", tmp_path / "model", tmp_path / "engines", "--target", "SM89")
    assert done.exit_code == 2 and "transformers.XLMRobertaXLForMaskedLM" in done.stderr


def test_layers_and_targets_are_other_engines(model: Path, tmp_path: Path) -> None:
    for extra in (["--target", "SM80"], ["--target", "SM89"], ["--target", "SM89", "--layers", "1"]):
        assert _run("build", model, tmp_path, *extra).exit_code == 0
    rows = json.loads(_run("inspect", tmp_path, "--json").stdout)
    assert sorted((row["target"], row["layers"]) for row in rows) == [("SM80", 2), ("SM89", 1), ("SM89", 2)]


def test_damage_is_seen(model: Path, tmp_path: Path) -> None:
    made = json.loads(_run("build", model, tmp_path, "--target", "SM89", "--json").stdout)
    path = Path(made["path"])
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    (row,) = json.loads(_run("inspect", tmp_path, "--json").stdout)
    assert row["state"].startswith("damaged")
    path.write_bytes(b"nonsense")
    (row,) = json.loads(_run("inspect", tmp_path, "--json").stdout)
    assert row["state"].startswith("unusable")


def test_errors(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    transformers.ViTConfig(num_hidden_layers=1).save_pretrained(other)
    damaged = tmp_path / "damaged"
    build().save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes(b"no")
    for arguments, words in (
        (("build", "/nowhere/at/all", tmp_path, "--target", "SM89"), "/nowhere/at/all"),
        (("build", damaged, tmp_path, "--target", "SM89"), "damaged: SafetensorError"),
        (("build", model, tmp_path, "--target", "SM12"), "target: SM12 is not accepted"),
        (("build", model, tmp_path, "--target", "SM89", "--precision", "int3"), "int3"),
        (("build", model, tmp_path, "--target", "SM80", "--precision", "fp8"), "datatypes: fp8_e4m3"),
        (("build", model, tmp_path, "--target", "SM89", "--layers", "7"), "layers"),
        (("inspect", tmp_path / "none"), "no such folder"),
        (("build", other, tmp_path, "--target", "SM89"), "model"),
    ):
        done = _run(*arguments)
        assert done.exit_code == 2 and words in done.stderr, (arguments, done.output)


@NO_GPU
def test_what_needs_a_gpu_says_so(model: Path, tmp_path: Path) -> None:
    done = _run("build", model, tmp_path)
    assert done.exit_code == 2 and "there is no GPU here" in done.stderr and "SM89" in done.stderr
    done = _run("verify", model, tmp_path)
    assert done.exit_code == 2 and "there is no GPU here" in done.stderr
