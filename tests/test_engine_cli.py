"""``xfast engine``: real engines built for GPUs that are not here, listed, damaged, and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import alt_clip, build, text_tower
from tensorrt_stub import BLOB, KEY
from typer.testing import CliRunner

from xfast.architecture import describe, find_encoders
from xfast.backends import tensorrt_store as stores
from xfast.cli import app
from xfast.engine import load_weights

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT: pip install tensorrt-rtx-cu13")

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


def test_a_checkpoint_that_lacks_weights_gives_no_engine(tmp_path: Path) -> None:
    model = build("xlm-roberta", "sequence-classification", num_hidden_layers=2)
    kept = {name: values for name, values in model.state_dict().items() if ".layer.1.attention.output" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=kept)
    done = _run("build", tmp_path / "model", tmp_path / "engines", "--target", "SM89")
    assert done.exit_code == 2 and "lacks encoder.layer.1.attention.output.LayerNorm.bias, " in done.stderr, done.output


@NO_GPU
def test_what_needs_a_gpu_says_so(model: Path, tmp_path: Path) -> None:
    done = _run("build", model, tmp_path)
    assert done.exit_code == 2 and "there is no GPU here" in done.stderr and "SM89" in done.stderr
    done = _run("verify", model, tmp_path)
    assert done.exit_code == 2 and "there is no GPU here" in done.stderr


def test_folders_that_look_like_markup(model: Path, tmp_path: Path) -> None:
    for name in ("engines[v2]", "x[", "[bold]", "end[/b]"):  # a closing tag without its beginning is an error of Rich's
        folder = tmp_path / name
        done = _run("build", model, folder, "--target", "SM89", "--precision", "fp16")
        assert done.exit_code == 0 and f"/{name}/" in done.stdout, done.output
        (file,) = folder.iterdir()
        (folder / "junk[red].engine").write_bytes(b"xfastTRT" + b"[/b]" * 9)
        done = _run("inspect", folder)
        assert done.exit_code == 0 and "".join(done.stdout.split()).count("junk[red].engine") == 1, done.output
        done = _run("prune", folder, "--max-bytes", "0")
        assert done.exit_code == 0 and f"removed {file.stem}" in done.stdout and f"/{name}: 1 " in done.stdout


def test_headers_that_look_like_anything(tmp_path: Path) -> None:
    """Whatever a file says of itself is shown, and nothing of it is obeyed."""
    for number, text in enumerate(("[/red]", "\x1b[31m", "\ud800", "x" * 300, "[link=a]b")):
        values = {"bytes": text, "key": {"weights": text}, "sha256": ""}
        header = json.dumps(values).encode()
        (tmp_path / f"{number}.engine").write_bytes(b"xfastTRT" + struct.pack("<II", 1, len(header)) + header)
    spec = dataclasses.replace(KEY.spec, family="[/family]")
    for target in ("[/b]", "\ud800", "\x1b[2J"):
        assert stores.Store(tmp_path).save(dataclasses.replace(KEY, spec=spec, target=target), BLOB) is not None
    done = _run("inspect", tmp_path)
    assert done.exit_code == 0 and "[/family]" in done.stdout and "\x1b" not in done.stdout, done.output
    rows = json.loads(_run("inspect", tmp_path, "--json").stdout)
    assert len(rows) == 8 and {row["target"] for row in rows if "target" in row} == {"[/b]", "\ud800", "\x1b[2J"}


def test_damage_is_told_of_each_file_alone(tmp_path: Path) -> None:
    store = stores.Store(tmp_path)
    for layers in (1, 2):
        path = store.save(dataclasses.replace(KEY, layers=layers), BLOB)
        assert path is not None
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.utime(path, (1e9, 1e9))
    rows = json.loads(_run("inspect", tmp_path, "--json").stdout)
    assert [row["state"] for row in rows] == [f"damaged: {row['file']}: its checksum is wrong" for row in rows]


def test_looking_is_no_use(tmp_path: Path) -> None:
    """Else the engine that was looked at last would be the last to be pruned."""
    path = stores.Store(tmp_path).save(KEY, BLOB)
    assert path is not None
    os.utime(path, (1e9, 1e9))
    assert _run("inspect", tmp_path).exit_code == 0 and path.stat().st_mtime == 1e9


def test_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, keys = stores.Store(tmp_path), [dataclasses.replace(KEY, layers=layers) for layers in (1, 2, 3)]
    for age, key in enumerate(keys):
        path = store.save(key, BLOB)
        assert path is not None
        os.utime(path, (1e9 - age, 1e9 - age))
    size = store.entries()[0].bytes
    monkeypatch.setenv("XFAST_CACHE", str(tmp_path))
    done = _run("prune", "--max-bytes", 2 * size + 10, "--json")
    assert json.loads(done.stdout) == {"folder": str(tmp_path), "max_bytes": 2 * size + 10, "removed": [keys[2].name]}
    monkeypatch.setenv("XFAST_CACHE_BYTES", str(size + 10))
    done = _run("prune", tmp_path)
    assert done.stdout.splitlines() == [f"removed {keys[1].name}", f"{tmp_path}: 1 engines removed, 1 left"]
    for arguments, words in (
        ((tmp_path / "none",), "no such folder"),
        ((tmp_path, "--max-bytes", "-1"), "max_bytes: -1"),
    ):
        done = _run("prune", *arguments)
        assert done.exit_code == 2 and words in done.stderr
    monkeypatch.setenv("XFAST_CACHE", str(tmp_path / "none"))  # a cache that was never used is an empty one
    assert _run("prune").stdout == f"{tmp_path / 'none'}: 0 engines removed, 0 left\n"


def test_bad_input_is_found_before_the_checkpoint_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", never)
    (tmp_path / "file").write_bytes(b"")
    for arguments, words in (
        ((tmp_path, "--precision", "int3", "--target", "SM89"), "precision: 'int3' is not accepted; accepted: fp32, "),
        ((tmp_path, "--target", "SM12"), "target: SM12 is not accepted"),
        ((tmp_path, "--target", "SM89", "--layers", "3"), "layers: 3 is not accepted; accepted: 0 to 2"),
        ((tmp_path, "--target", "SM89", "--layers", "-1"), "layers: -1 is not accepted"),
        ((tmp_path / "file", "--target", "SM89"), "engines could not be written: NotADirectoryError"),
        ((tmp_path / "file" / "below", "--target", "SM89"), "engines could not be written: NotADirectoryError"),
    ):
        done = _run("build", model, *arguments)
        assert done.exit_code == 2 and words in done.stderr, (arguments, done.output)
    monkeypatch.setattr(os, "open", lambda *_, **__: _raise(OSError(errno.EROFS, "Read-only file system")))
    done = _run("build", model, tmp_path / "new", "--target", "SM89")
    assert done.exit_code == 2 and "Read-only file system" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was left behind


def _raise(error: Exception) -> Any:
    raise error
