"""Damaged and hostile artifacts: a typed error or the same numbers, never a crash and never a wrong number."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import build, quick_settings, ragged

import xfast
from xfast import _C, artifact, packed_model
from xfast.artifact import Reader

quick = pytest.fixture(autouse=True)(quick_settings)
USED = (artifact.MANIFEST, artifact.CONFIG, artifact.PARAMETERS, artifact.WORDS, artifact.layer_file(0))
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = xfast.accelerate(build(**SMALL), precision="int8", keep_weights=False)
    xfast.save(model, tmp_path / "a")
    return tmp_path / "a"


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    for at in rng.integers(0, len(data), rng.integers(1, 4)):
        data[at] ^= 1 << rng.integers(8)


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[rng.integers(0, len(data)) :]


def _extend(data: bytearray, rng: np.random.Generator) -> None:
    data += rng.bytes(rng.integers(1, 100))


def _zero(data: bytearray, rng: np.random.Generator) -> None:
    begin = rng.integers(0, len(data))
    data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))


def _swap(data: bytearray, rng: np.random.Generator) -> None:
    one, two = sorted(rng.integers(0, len(data), 2))
    count = min(64, two - one, len(data) - two)
    data[one : one + count], data[two : two + count] = data[two : two + count], data[one : one + count]


def _header(data: bytearray, rng: np.random.Generator) -> None:
    at = rng.integers(0, min(len(data), 700))
    data[at] = b'0123456789{}[]",:-.eIF'[rng.integers(22)]


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (_flip, _cut, _extend, _zero, _swap, _header)


def _bytes_used(folder: Path, verify: str) -> bytes:
    """What ``xfast.load`` builds a model from, read by what it reads it with."""
    reader = Reader(folder, verify)
    mapped = [reader.tensors(name, None)[0].memory.tobytes() for name in USED[2:]]
    facts = repr({**vars(reader.manifest), "files": None})
    return b"".join([facts.encode(), reader.content(artifact.CONFIG), *mapped])


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["checksum", "full"])
def test_ten_thousand_accidents(verify: str, folder: Path, rng: np.random.Generator) -> None:
    want, originals = _bytes_used(folder, verify), {name: (folder / name).read_bytes() for name in USED}
    refused = same = 0
    for turn in range(5000):
        name = USED[turn % len(USED)]
        data = bytearray(originals[name])
        MUTATIONS[rng.integers(len(MUTATIONS))](data, rng)
        (folder / name).write_bytes(data)
        try:
            assert _bytes_used(folder, verify) == want, (name, turn)
            same += 1
        except xfast.ArtifactError:
            refused += 1
        (folder / name).write_bytes(originals[name])
    assert refused > 4500 and same < 500  # zeros over zeros, a digit over itself


def test_every_single_bit_of_a_header_and_a_row_counts(folder: Path) -> None:
    path = folder / artifact.layer_file(0)
    original = path.read_bytes()
    for at in (*range(600), *range(4096, 4300), *range(len(original) - 200, len(original))):
        data = bytearray(original)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(xfast.ArtifactError):
            xfast.load(folder)
    path.write_bytes(original)
    xfast.load(folder)


def test_whole_loads_of_damaged_artifacts(folder: Path, rng: np.random.Generator) -> None:
    want = xfast.load(folder)(**ragged()).last_hidden_state
    originals = {name: (folder / name).read_bytes() for name in USED}
    for turn in range(300):
        name = USED[turn % len(USED)]
        data = bytearray(originals[name])
        MUTATIONS[rng.integers(len(MUTATIONS))](data, rng)
        (folder / name).write_bytes(data)
        with contextlib.suppress(xfast.ArtifactError):
            assert torch.equal(xfast.load(folder)(**ragged()).last_hidden_state, want)
        (folder / name).write_bytes(originals[name])


HOSTILE = """
import json, sys, struct
from pathlib import Path
import numpy as np, torch, xfast
from xfast import artifact
from xfast.tensor_files import record_of
from dataclasses import asdict

folder, seed, turns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(seed)
names = [name for name in json.loads((folder / artifact.MANIFEST).read_text())["files"]]
originals = {name: (folder / name).read_bytes() for name in [*names, artifact.MANIFEST]}
NUMBERS = [0, 1, -1, 2, 7, 31, 32, 33, 64, 4096, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 1e300]
NUMBERS += [None, True, "x", [], {}]

def edit(value):
    # one value somewhere in a JSON document is replaced
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[rng.integers(len(keys))]
        if rng.random() < 0.1 and isinstance(value, dict):
            del value[key]
        else:
            value[key] = edit(value[key])
        return value
    return NUMBERS[rng.integers(len(NUMBERS))]

def change_tensors(data):
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    kind = rng.integers(4)
    if kind == 0:
        header = edit(header)
    elif kind == 1:  # tensors trade places
        keys = list(header); rng.shuffle(keys); header = {key: header[key] for key in keys}
    elif kind == 2:  # everything is one byte off
        body = b"\\0" + body
    else:
        body = bytes(rng.integers(0, 256, len(body), np.uint8))  # NaN, infinity, -128
    raw = json.dumps(header).encode()
    raw += b" " * ((-len(raw) - 8) % (4096 if rng.random() < 0.7 else 1))
    return struct.pack("<Q", len(raw)) + raw + body

outcomes = {}
for turn in range(turns):
    for name, data in originals.items():
        (folder / name).write_bytes(data)
    manifest = json.loads(originals[artifact.MANIFEST])
    name = [*names, artifact.MANIFEST][rng.integers(len(names) + 1)]
    if name == artifact.MANIFEST:
        manifest = edit(manifest) if rng.random() < 0.5 else {**manifest, "spec": edit(manifest["spec"])}
    elif name == artifact.CONFIG:
        (folder / name).write_text(json.dumps(edit(json.loads(originals[name]))))
    else:
        (folder / name).write_bytes(change_tensors(originals[name]))
    if isinstance(manifest, dict):  # signed again: hashes protect from nothing here
        if isinstance(manifest.get("files"), dict) and name in manifest["files"]:
            manifest["files"][name] = asdict(record_of(folder / name))
        manifest.pop("sha256", None)
        manifest["sha256"] = artifact.digest(manifest)
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    try:
        model = xfast.load(folder, verify=[None, True, False][turn % 3])
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 5, 9, 30, 2]]))
        outcome = "ran"
    except xfast.XfastError as error:
        outcome = type(error).__name__
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(json.dumps(outcomes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_artifacts_crash_nothing(seed: int, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOSTILE, str(folder), str(seed), "600"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    outcomes = json.loads(child.stdout.splitlines()[-1])
    assert outcomes.pop("ArtifactError") > 200 and outcomes.pop("ran") > 20
    assert set(outcomes) <= {"InvalidWeightsError"}, outcomes


def test_what_the_default_mode_does_not_promise(folder: Path) -> None:
    """``verify=False`` believes the weights; the tokenizer's files are verified by ``verify=True`` only."""
    path = folder / artifact.layer_file(0)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    xfast.load(folder, verify=False)
    for verify in (None, True):
        with pytest.raises(xfast.ArtifactError, match="damaged"):
            xfast.load(folder, verify=verify)


def test_the_header_is_what_safetensors_reads(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for name in USED[2:]:
        tensors = safetensors.load_file(folder / name)
        mapped, shapes = Reader(folder, "size").tensors(name, None, copy_on_write=True)
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {k: s for k, (_, s) in shapes.items()}
        assert all(torch.equal(value, mapped.tensor(key)) for key, value in tensors.items())


def test_a_config_that_does_not_fit_its_weights(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "b")
    model = xfast.accelerate(build(**{**SMALL, "num_attention_heads": 4}), precision="int8")
    xfast.save(model, folder.parent / "c")
    shutil.copy(folder.parent / "c" / artifact.CONFIG, folder / artifact.CONFIG)
    with pytest.raises(xfast.ArtifactError, match=artifact.CONFIG):
        packed_model.load(folder, "size", torch.device("cpu"), "auto")


def test_the_bindings_refuse_memory_that_does_not_fit() -> None:
    shape = {"layers": 1, "hidden": 32, "heads": 2, "head_dim": 16, "intermediate": 40, "vocab": 9, "positions": 9}
    encoder = _C.Encoder({**shape, "types": 1, "eps": 1e-5, "pre_norm": False}, "int8", "auto")
    room = np.zeros(3 * 2048 + 65, np.uint8)
    start = -room.ctypes.data % 64
    data, vector, sums = room[start:][: 3 * 2048], np.zeros(96, np.float32), np.zeros(96, np.int32)
    good = {"data": data, "bias": vector, "scale": vector, "compensation": sums}
    odd = np.zeros(97 * 4, np.uint8)[1 : 96 * 4 + 1].view(np.float32)
    for change in (
        {"data": data[:-1]},
        {"data": room[start + 1 :][: 3 * 2048]},
        {"data": data.view(np.int8)},
        {"data": room[::2]},
        {"bias": vector[:-1]},
        {"bias": odd},
        {"scale": None},
        {"scale": vector.astype(np.float64)},
        {"compensation": None},
        {"compensation": sums[:95]},
    ):
        with pytest.raises((ValueError, TypeError)):
            encoder.use_linear(0, "qkv", **{**good, **change})
    for layer, name in ((1, "qkv"), (-1, "qkv"), (0, "none")):
        with pytest.raises(ValueError, match=r"layer|name"):
            encoder.use_linear(layer, name, **good)
    encoder.use_linear(0, "qkv", **good)
    with pytest.raises(ValueError, match="reads the caller's memory"):
        encoder.set_linear(0, "qkv", 0, np.zeros((96, 32), np.float32), None, 1)
    with pytest.raises(ValueError, match="weights are missing"):
        encoder.linear(0, "ffn_in")
    encoder.set_linear(0, "ffn_in", 0, np.zeros((40, 32), np.float32), None, 1)
    with pytest.raises(ValueError, match="of its own"):
        encoder.use_linear(0, "ffn_in", data[: 2 * 2048], vector[:64], vector[:64], sums[:64])
    with pytest.raises(ValueError, match="read-only"):
        encoder.linear(0, "ffn_in")["data"][0] = 1
    table = np.zeros((9, 32), np.float32)
    for words, scale in ((table, vector[:9]), (table.astype(np.int8), None), (table.astype(np.int8), vector[:8])):
        with pytest.raises(ValueError, match="word"):
            encoder.set_tables(words, table, table[:1], scale)
    with pytest.raises(ValueError, match="weights are missing"):
        encoder.forward(None, table[:1], sums[:1], None, np.array([0, 1], np.int32), None, 1, table[:1], None, 1)
