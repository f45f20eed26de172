"""``xfast convert``: the same files as ``xfast.save``, streamed, resumable, and plain words for every broken input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from models import ALL_FAMILIES, HEADS, build, outputs_of, quick_settings, ragged
from test_artifact import names_in, same, same_files
from typer.testing import CliRunner

import xfast
from xfast import artifact, packed_model
from xfast.cli import app
from xfast.convert import convert
from xfast.tensor_files import TensorFile, write_tensors

quick = pytest.fixture(autouse=True)(quick_settings)


def checkpoint(folder: Path, family: str = "xlm-roberta", head: str = "masked-lm", **changes: Any) -> Any:
    """A tiny sharded checkpoint and its model."""
    model = build(family, head, **changes)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text("{}")
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_converting_writes_what_saving_writes(family: str, head: str, precision: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "a b ü", family, head)
    model.config._name_or_path = str(tmp_path / "a b ü")
    xfast.save(xfast.accelerate(model, precision=precision), tmp_path / "saved")
    convert(str(tmp_path / "a b ü"), tmp_path / "ç d", precision)
    assert same_files(tmp_path / "ç d", tmp_path / "saved")
    assert not list(tmp_path.glob("*/" + artifact.STAGING))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_in_one_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(head="token-classification").to(dtype)
    model.save_pretrained(tmp_path / "m")
    model.config._name_or_path = str(tmp_path / "m")
    for precision in artifact.CPU_PRECISIONS:
        convert(str(tmp_path / "m"), tmp_path / precision, precision)
        xfast.save(xfast.accelerate(model, precision=precision), tmp_path / f"saved-{precision}")
        assert same_files(tmp_path / precision, tmp_path / f"saved-{precision}")


def test_the_encoder_of_a_model_with_a_head(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "a", architecture="XLMRobertaModel")
    loaded = xfast.load(tmp_path / "a")
    assert type(loaded) is transformers.XLMRobertaModel and loaded.pooler is None
    want = xfast.accelerate(model.roberta, precision="int8", keep_weights=False)
    assert same(loaded(**ragged()), want(**ragged()))


def test_a_head_on_an_encoders_checkpoint_misses_its_tensors(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", head="base")
    with pytest.raises(xfast.DataFileError, match=r"classifier.*--architecture"):
        convert(str(tmp_path / "m"), tmp_path / "a", architecture="XLMRobertaForTokenClassification")


def test_one_file_comes_before_an_older_index(tmp_path: Path) -> None:
    # What transformers leaves behind when a sharded checkpoint is saved again in one file
    old, new = build(seed=1), build(seed=2)
    old.save_pretrained(tmp_path / "both", max_shard_size="20KB")
    index = (tmp_path / "both" / "model.safetensors.index.json").read_bytes()
    new.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "model.safetensors.index.json").write_bytes(index)
    convert(str(tmp_path / "both"), tmp_path / "out", "int8")
    want = xfast.accelerate(new, precision="int8", keep_weights=False)(**ragged())
    assert torch.equal(xfast.load(tmp_path / "out")(**ragged())[0], want[0])


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(renamed, path)
    convert(str(tmp_path / "m"), tmp_path / "a")
    want = xfast.accelerate(model, precision="int8", keep_weights=False)
    assert same(xfast.load(tmp_path / "a")(**ragged("bert")), want(**ragged("bert")))


def _drop(folder: Path, wanted: str) -> None:
    """Removes a tensor from its shard."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if tensors.pop(wanted, None) is not None:
            safetensors.torch.save_file(tensors, path)


def _change(folder: Path, wanted: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if wanted in tensors:
            tensors[wanted] = change(tensors[wanted]).contiguous()
            safetensors.torch.save_file(tensors, path)


def _one_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _as_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def _sizes(folder: Path, **sizes: int) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))


QUERY = "roberta.encoder.layer.1.attention.self.query.weight"
TABLE = "roberta.embeddings.position_embeddings.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a pickle": (_as_pickle, xfast.DataFileError, r"pytorch_model.bin is a pickle.*save_pretrained"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], xfast.DataFileError, "neither"),
    "no config": (lambda f: (f / "config.json").unlink(), xfast.DataFileError, "config.json"),
    "a config that is none": (lambda f: (f / "config.json").write_text("[1"), xfast.DataFileError, "not JSON"),
    "no heads": (lambda f: _sizes(f, num_attention_heads=-1), xfast.UnsupportedModelError, "num_attention_heads, -1"),
    # transformers would count them all, in memory
    "positions for 16 GiB": (
        lambda f: _sizes(f, max_position_embeddings=2**31),
        xfast.DataFileError,
        "max_position_embeddings is 2147483648, more than",
    ),
    "a missing shard": (lambda f: _one_shard(f).unlink(), xfast.DataFileError, "shards are missing"),
    "a cut shard": (lambda f: os.truncate(_one_shard(f), 3000), xfast.DataFileError, "safetensors"),
    "an empty shard": (lambda f: os.truncate(_one_shard(f), 0), xfast.DataFileError, "safetensors"),
    "a missing tensor": (lambda f: _drop(f, QUERY), xfast.DataFileError, "lacks 1 tensors .*query"),
    "another shape": (lambda f: _change(f, QUERY, lambda t: t[:3]), xfast.DataFileError, r"has shape \(3, 64\)"),
    "integers": (lambda f: _change(f, QUERY, lambda t: t.to(torch.int8)), xfast.DataFileError, "is I8"),
    "NaN in a layer": (
        lambda f: _change(f, QUERY, lambda t: t * float("nan")),
        xfast.InvalidWeightsError,
        "query.weight",
    ),
    "NaN in a norm": (
        lambda f: _change(f, "roberta.embeddings.LayerNorm.bias", lambda t: t * float("inf")),
        xfast.InvalidWeightsError,
        "LayerNorm.bias",
    ),
    "NaN in a table": (
        lambda f: _change(f, TABLE, lambda t: t / 0),
        xfast.InvalidWeightsError,
        "position_embeddings",
    ),
    "an index that leaves the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        xfast.DataFileError,
        "weight_map",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_checkpoints(case: str, tmp_path: Path) -> None:
    damage, error, text = BROKEN[case]
    checkpoint(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(error, match=text):
        convert(str(tmp_path / "m"), tmp_path / "a")
    assert not (tmp_path / "a" / artifact.MANIFEST).exists()


def test_what_is_not_accepted(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    source = str(tmp_path / "m")
    for call, text in (
        (lambda: convert(source, tmp_path / "a", "int2"), "precision"),
        (lambda: convert(source, tmp_path / "a", architecture="os"), "architecture"),
        (lambda: convert(source, tmp_path / "m"), "checkpoint itself"),
    ):
        with pytest.raises(xfast.InvalidOptionError, match=text):
            call()
    with pytest.raises(xfast.DataFileError, match="hf download nobody/nothing-xfast"):
        convert("nobody/nothing-xfast", tmp_path / "a")
    config = transformers.DistilBertConfig(dim=8, n_heads=2, n_layers=1, hidden_dim=8, vocab_size=9)
    config.save_pretrained(tmp_path / "d")
    write_tensors(tmp_path / "d" / "model.safetensors", {"a": ("F32", (1,))}, [b"\0\0\0\0"])
    with pytest.raises(xfast.UnsupportedModelError, match="0 supported encoders"):
        convert(str(tmp_path / "d"), tmp_path / "a", architecture="DistilBertModel")


CHILD = """
import sys, time
from pathlib import Path
from xfast.convert import convert
def advance(name):
    print(name, flush=True)
    if name == sys.argv[3]: time.sleep(600)
convert(sys.argv[1], Path(sys.argv[2]), advance=advance)
"""


@pytest.mark.parametrize("at", ["layer-000.safetensors", "layer-002.safetensors", "parameters.safetensors"])
def test_a_killed_run_is_continued(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "m")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(tmp_path / "a"), at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        assert child.stdout is not None
        while child.stdout.readline().strip() != at:
            pass
        with pytest.raises(xfast.ArtifactWriteError, match="another process"):
            convert(str(tmp_path / "m"), tmp_path / "a")
        child.send_signal(signal.SIGKILL)
    with pytest.raises(xfast.ArtifactError, match="not finished"):
        xfast.load(tmp_path / "a")
    packed: list[int] = []
    original = packed_model.artifact.Staging.tensors

    def counted(staging: Any, name: str, shapes: Any, pieces: Any) -> None:
        original(staging, name, shapes, lambda: (packed.append(name), pieces())[1])

    monkeypatch.setattr(packed_model.artifact.Staging, "tensors", counted)
    convert(str(tmp_path / "m"), tmp_path / "a")
    order = [*map(artifact.layer_file, range(3)), artifact.PARAMETERS]
    assert packed == order[order.index(at) :]
    convert(str(tmp_path / "m"), tmp_path / "whole")
    assert same_files(tmp_path / "a", tmp_path / "whole")


@pytest.mark.parametrize("change", ["the checkpoint", "the precision", "a finished file", "the journal"])
def test_what_a_killed_run_left_is_used_only_when_it_fits(change: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", seed=1)

    def interrupt(name: str) -> None:
        if name == artifact.PARAMETERS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(tmp_path / "m"), tmp_path / "a", advance=interrupt)
    left, precision = tmp_path / "a" / artifact.STAGING, "int8"
    assert artifact.layer_file(2) in names_in(left)
    if change == "the checkpoint":
        time.sleep(0.01)
        checkpoint(tmp_path / "m", seed=2)
    elif change == "the precision":
        precision = "bf16"
    elif change == "a finished file":
        with (left / artifact.layer_file(1)).open("r+b") as file:
            file.seek(5000)
            file.write(b"damaged")
    else:
        (left / "journal.json").write_text('{"identity": 3')
    convert(str(tmp_path / "m"), tmp_path / "a", precision)
    convert(str(tmp_path / "m"), tmp_path / "whole", precision)
    assert same_files(tmp_path / "a", tmp_path / "whole")


@pytest.mark.parametrize("limit", [0, 10, 300, 5000, 20000, 50000])
def test_a_full_disk_can_be_continued(limit: int, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(xfast.ArtifactWriteError, match="cannot be written"):
            convert(str(tmp_path / "m"), tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a" / artifact.MANIFEST).exists()
    convert(str(tmp_path / "m"), tmp_path / "a")
    xfast.load(tmp_path / "a", verify=True)


MEASURE = """
import sys
from pathlib import Path
from xfast.convert import convert
def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024
convert(sys.argv[1], Path(sys.argv[2]))  # whatever the first call imports
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
start = memory("VmRSS")
convert(sys.argv[3], Path(sys.argv[4]))
print(memory("VmHWM") - start)
"""


def test_memory_stays_far_below_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 20000}
    build("xlm-roberta", "base-no-pooler", **sizes).save_pretrained(tmp_path / "m", max_shard_size="30MB")
    checkpoint(tmp_path / "tiny")
    names = ("tiny", "b", "m", "a")
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in names)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    total = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    packed = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert int(child.stdout) < 1.8 * packed < 0.7 * total


def test_the_command(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m", head="sequence-classification")
    run = CliRunner().invoke
    made = run(app, ["convert", str(tmp_path / "m"), str(tmp_path / "a"), "--precision", "bf16", "--json", "--check"])
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert facts["precision"] == "bf16" and facts["checked"] and facts["path"] == str(tmp_path / "a")
    want = outputs_of(xfast.accelerate(model, precision="bf16", keep_weights=False)(**ragged()))
    assert torch.equal(xfast.load(tmp_path / "a")(**ragged()).logits, want["logits"])
    assert "every file has its SHA-256" in run(app, ["convert", "--check", str(tmp_path / "a")]).stdout
    (tmp_path / "a" / "tokenizer.json").write_text("{ }")
    xfast.load(tmp_path / "a")  # which reads no tokenizer
    damaged = run(app, ["convert", str(tmp_path / "a"), "--check"])
    assert damaged.exit_code == 2 and "tokenizer.json" in damaged.stderr
    assert run(app, ["convert", str(tmp_path / "m")]).exit_code == 2
    for option, value in (("precision", "bf16"), ("group-size", "64"), ("architecture", "XLMRobertaModel")):
        refused = run(app, ["convert", str(tmp_path / "a"), "--check", f"--{option}", value])
        assert refused.exit_code == 2 and f"{option}: not accepted with --check" in refused.stderr


def test_mapped_files_start_on_whole_pages(tmp_path: Path) -> None:
    for size in range(1, 60):
        write_tensors(tmp_path / "t", {"x" * size: ("I8", (3,))}, [b"abc"])
        assert TensorFile(tmp_path / "t").read("x" * size).tolist() == [97, 98, 99]
        assert (tmp_path / "t").stat().st_size % 4096 == 3
