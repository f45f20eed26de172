"""What ``xfast convert`` reads: checkpoints of several types, checkpoints that change, and folders that are others'."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from models import arguments, build, quick_settings
from test_artifact import names_in, same, same_files

import xfast
from xfast import artifact
from xfast.checkpoint import Checkpoint
from xfast.convert import convert
from xfast.tensor_files import TensorFile

quick = pytest.fixture(autouse=True)(quick_settings)

HEAD = "sequence-classification"


def _rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """In place, as a copy over it would be; with the same times."""
    path = folder / "model.safetensors"
    times = path.stat()
    tensors = {name: change(name, tensor) for name, tensor in safetensors.torch.load_file(path).items()}
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["float16", "float32", None])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_checkpoint_of_several_types_becomes_a_model_of_one(
    named: str | None, precision: str, tmp_path: Path
) -> None:
    config = build(head=HEAD).config
    build(head=HEAD).save_pretrained(tmp_path / "m")
    config.dtype = named
    config.architectures = ["XLMRobertaForSequenceClassification"]
    config.save_pretrained(tmp_path / "m")
    _rewrite(tmp_path / "m", lambda name, tensor: tensor.half() if name.startswith("roberta") else tensor)
    convert(str(tmp_path / "m"), tmp_path / "a", precision)
    stock = transformers.XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "m", dtype="auto").eval()
    loaded = xfast.load(tmp_path / "a")
    assert {one.dtype for one in loaded.parameters()} == {stock.dtype}
    want = xfast.accelerate(stock, precision=precision, keep_weights=False)
    assert same(loaded(**arguments("xlm-roberta", HEAD)), want(**arguments("xlm-roberta", HEAD)))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("named", ["float16", "bfloat16", "float32", None])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_the_config_names_the_type(stored: torch.dtype, named: str | None, key: str, tmp_path: Path) -> None:
    build(head=HEAD).to(stored).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**{name: config[name] for name in config if "dtype" not in name}, key: named}))
    stock = transformers.XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "m", dtype="auto").eval()
    assert stock.dtype == (stored if named is None else getattr(torch, named))
    for precision in ("fp32", "int8"):
        convert(str(tmp_path / "m"), tmp_path / precision, precision)
        xfast.save(xfast.accelerate(stock, precision=precision), tmp_path / f"saved {precision}")
        xfast.restore(stock)
        for name in (name for name in names_in(tmp_path / precision) if name.endswith(".safetensors")):
            saved = (tmp_path / f"saved {precision}" / name).read_bytes()
            assert (tmp_path / precision / name).read_bytes() == saved, name


def test_a_type_that_weights_cannot_have(tmp_path: Path) -> None:
    model = build(head=HEAD)
    model.save_pretrained(tmp_path / "m")
    _rewrite(tmp_path / "m", lambda name, tensor: tensor.half() if name.startswith("roberta") else tensor)
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(config.replace('"float32"', '"float64"'))
    with pytest.raises(xfast.DataFileError, match=r"dtype 'float64' in config\.json; accepted: float32, bfloat16"):
        convert(str(tmp_path / "m"), tmp_path / "a")


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint16])
def test_types_that_are_not_read_may_lie_unused(dtype: torch.dtype, used: bool, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    name = "pooler.dense.bias" if used else "extra_mask"
    odd = torch.ones(64).to(dtype)
    path.write_bytes(safetensors.torch.save({**safetensors.torch.load_file(path), name: odd}, {"format": "pt"}))
    if used:
        with pytest.raises(xfast.DataFileError, match=r"pooler\.dense\.bias is (BOOL|F8_E4M3|C64|U16) in the checkp"):
            convert(str(tmp_path / "m"), tmp_path / "a")
        return
    convert(str(tmp_path / "m"), tmp_path / "a")
    want = xfast.accelerate(model, precision="int8", keep_weights=False)
    batch = arguments("xlm-roberta", "base")
    assert same(xfast.load(tmp_path / "a")(**batch), want(**batch))
    with pytest.raises(xfast.DataFileError, match="tensor extra_mask is"):
        TensorFile(path)  # an artifact has no such tensors


@pytest.mark.parametrize(("shape", "size", "good"), [([4], 2, True), ([3], 2, False), ([4], 4, False)])
def test_values_of_less_than_a_byte(shape: list[int], size: int, good: bool, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    if good:
        assert TensorFile(tmp_path / "f", foreign=True).entries["a"].end == size
        return
    with pytest.raises(xfast.DataFileError, match="are not the bytes of F4"):
        TensorFile(tmp_path / "f", foreign=True)


@pytest.mark.parametrize("factor", [1, 2])
def test_an_encoder_that_is_there_twice(factor: int, tmp_path: Path) -> None:
    build(head=HEAD).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    second = {name.removeprefix("roberta."): factor * one for name, one in tensors.items() if "roberta" in name}
    path.write_bytes(safetensors.torch.save({**second, **tensors}, {"format": "pt"}))
    for architecture in (None, "XLMRobertaModel"):
        if factor == 1:
            convert(str(tmp_path / "m"), tmp_path / "a", architecture=architecture)
            continue
        with pytest.raises(xfast.DataFileError, match=r"has (roberta\.)?emb.* and (roberta\.)?emb.*, with other"):
            convert(str(tmp_path / "m"), tmp_path / "a", architecture=architecture)


def test_a_model_without_a_padding_token(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None}))
    with pytest.raises(xfast.UnsupportedModelError, match="has no padding token"):
        convert(str(tmp_path / "m"), tmp_path / "a")
    with pytest.raises(xfast.UnsupportedModelError, match="has no padding token"):
        xfast.accelerate(transformers.AutoModel.from_pretrained(tmp_path / "m").eval())


# --- checkpoints that change --------------------------------------------------------------------------


@pytest.mark.parametrize("at", [artifact.layer_file(1), artifact.PARAMETERS])
@pytest.mark.parametrize("renamed", [True, False])
def test_a_checkpoint_that_is_replaced_while_it_is_read(at: str, renamed: bool, tmp_path: Path) -> None:
    build(seed=1).save_pretrained(tmp_path / "m")
    build(seed=2).save_pretrained(tmp_path / "new")

    def replace(name: str) -> None:
        if name == at:
            source, target = (tmp_path / folder / "model.safetensors" for folder in ("new", "m"))
            if renamed:
                source.rename(target)
            else:
                target.write_bytes(source.read_bytes())
                os.utime(target, ns=(1, 1))

    with pytest.raises(xfast.DataFileError, match=r"model\.safetensors: was replaced or changed while"):
        convert(str(tmp_path / "m"), tmp_path / "a", advance=replace)
    assert not (tmp_path / "a" / artifact.MANIFEST).exists()


def test_a_checkpoint_that_is_replaced_after_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(seed=1).save_pretrained(tmp_path / "m")
    content = artifact.Staging.content

    def replaced(staging: Any, name: str, data: bytes) -> None:
        content(staging, name, data)
        if name == artifact.CONFIG:  # the last file of all
            build(seed=2).save_pretrained(tmp_path / "m")

    monkeypatch.setattr(artifact.Staging, "content", replaced)
    with pytest.raises(xfast.DataFileError, match="was replaced or changed while"):
        convert(str(tmp_path / "m"), tmp_path / "a")
    assert not (tmp_path / "a" / artifact.MANIFEST).exists()


def test_a_file_that_is_replaced_before_it_is_mapped(tmp_path: Path) -> None:
    build(seed=1).save_pretrained(tmp_path / "m")
    file = TensorFile(tmp_path / "m" / "model.safetensors")
    build(seed=2).save_pretrained(tmp_path / "m")
    with pytest.raises(xfast.DataFileError, match="was replaced or changed"):
        file.map()


def test_a_killed_run_is_not_continued_with_another_model_of_the_same_times(tmp_path: Path) -> None:
    build(seed=1).save_pretrained(tmp_path / "m")
    before = Checkpoint(str(tmp_path / "m")).identity()

    def interrupt(name: str) -> None:
        if name == artifact.PARAMETERS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(tmp_path / "m"), tmp_path / "a", advance=interrupt)
    (tmp_path / "m").rename(tmp_path / "moved")
    assert Checkpoint(str(tmp_path / "moved")).identity() == before
    _rewrite(tmp_path / "moved", lambda name, tensor: 2 * tensor)
    assert [one[:3] for one in Checkpoint(str(tmp_path / "moved")).identity()] == [one[:3] for one in before]
    convert(str(tmp_path / "moved"), tmp_path / "a")
    convert(str(tmp_path / "moved"), tmp_path / "whole")
    assert same_files(tmp_path / "a", tmp_path / "whole")


# --- folders ------------------------------------------------------------------------------------------


def _killed(monkeypatch: pytest.MonkeyPatch, folder: Path, source: Path, moved: str) -> None:
    """A run that is killed when a file's turn to be moved into place comes."""
    move = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if path.parent.name == artifact.STAGING and path.name == moved and Path(target).parent == folder:
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), folder)


def test_another_checkpoint_beside_what_a_killed_run_left(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "m")

    def interrupt(name: str) -> None:
        if name == artifact.PARAMETERS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(tmp_path / "m"), tmp_path / "a", advance=interrupt)
    (tmp_path / "a" / "config.json").write_text("mine")
    with pytest.raises(xfast.ArtifactWriteError, match=r"holds something else.*config\.json"):
        convert(str(tmp_path / "m"), tmp_path / "a")
    assert (tmp_path / "a" / "config.json").read_text() == "mine"
    (tmp_path / "a" / "config.json").unlink()
    convert(str(tmp_path / "m"), tmp_path / "a")


def test_a_run_that_was_killed_while_it_moved_files_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(num_hidden_layers=4).save_pretrained(tmp_path / "old")
    build(num_hidden_layers=2).save_pretrained(tmp_path / "new")
    convert(str(tmp_path / "old"), tmp_path / "a")
    for _ in range(2):
        _killed(monkeypatch, tmp_path / "a", tmp_path / "new", artifact.PARAMETERS)
        assert artifact.MANIFEST not in names_in(tmp_path / "a")
    convert(str(tmp_path / "new"), tmp_path / "a")
    convert(str(tmp_path / "new"), tmp_path / "whole")
    assert same_files(tmp_path / "a", tmp_path / "whole")


def test_a_config_may_have_fields_of_its_own(tmp_path: Path) -> None:
    model = build()
    model.config.num_seen_tokens, model.config.corpus_size = 10**13, 10**12
    xfast.save(xfast.accelerate(model, precision="int8"), tmp_path / "a")
    assert xfast.load(tmp_path / "a").config.num_seen_tokens == 10**13


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "num_layers"])
def test_sizes_without_data_are_refused(name: str, tmp_path: Path) -> None:
    for config in ({name: 10**12}, {"text_config": {name: 10**12}}):
        with pytest.raises(xfast.ArtifactError, match=f"{name} is {10**12}, more than"):
            artifact.refuse_huge(config, 10**9, 50, tmp_path / "config.json")
