"""Choosing an instruction set: the probe, the names, and XFAST_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import xfast
from xfast import _C
from xfast.backends.native import requested_isa

BUILT = ("portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
CHAIN = [name for name in BUILT if name != "avx2_vnni"]  # each extends the one before; it extends avx2
MODEL_AMX = bool(os.environ.get("XFAST_MODEL_AMX"))  # `make play-amx`: its instructions are plain code
UNAVAILABLE = sorted(set(_C.built_isas()) - set(_C.available_isas()))
UNKNOWN = ("sse9", "avx1024", "portable ", "avx512-vnni", "PORTABLE", "a" * 1000, "\N{SNOWMAN}")
SHAPE = {
    "layers": 1,
    "hidden": 8,
    "heads": 2,
    "head_dim": 4,
    "intermediate": 16,
    "vocab": 10,
    "positions": 12,
    "types": 1,
    "eps": 1e-5,
    "pre_norm": False,
}


def test_available_is_the_subset_of_built_that_keeps_its_order() -> None:
    built, available = _C.built_isas(), _C.available_isas()
    assert available[0] == built[0] == "portable"
    assert [name for name in built if name in available] == available
    assert [name for name in BUILT if name in built] == built
    assert xfast.available_isas() == available
    # A target never comes without those it extends.
    for narrow, wide in [*pairwise(CHAIN), ("avx2", "avx2_vnni")]:
        assert wide not in available or narrow in available


def test_probe_agrees_with_the_kernel() -> None:
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text(encoding="utf-8").split()) if path.exists() else set()
    if "avx2" not in flags and "sse2" not in flags:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    wide = {"avx2", "fma"}
    assert ("avx2" in _C.available_isas()) == (wide <= flags)
    assert ("avx2_vnni" in _C.available_isas()) == (wide | {"avx_vnni"} <= flags)
    wide |= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert ("avx512" in _C.available_isas()) == (wide <= flags)
    wide |= {"avx512_vnni"}
    assert ("avx512_vnni" in _C.available_isas()) == (wide <= flags)
    wide |= {"avx512_bf16"}
    assert ("avx512_bf16" in _C.available_isas()) == (wide <= flags)
    if not MODEL_AMX:
        wide |= {"amx_tile", "amx_int8", "amx_bf16"}
    assert "amx" not in _C.available_isas() or wide <= flags  # the system may refuse tiles all the same


def test_names(isa: str) -> None:
    assert _C.check_isa(isa) == isa
    assert _C.Encoder(SHAPE, "fp32", isa).isa == isa


def fastest() -> str:
    """The widest, except where vdpbf16ps is slower than the same products in fp32 (Intel's cores with AVX-512 FP16)."""
    available = _C.available_isas()
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    slow = {"GenuineIntel", "avx512_fp16"} <= words and available[-1] == "avx512_bf16"
    return available[-2 if slow else -1]


def test_auto_is_the_fastest() -> None:
    assert _C.check_isa("auto") == _C.check_isa("") == fastest()
    assert _C.Encoder(SHAPE, "int8", "auto").isa == fastest()


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:12])
def test_an_unknown_name_is_refused_with_the_accepted_ones(name: str) -> None:
    calls = (
        lambda: _C.check_isa(name),
        lambda: _C.Encoder(SHAPE, "fp32", name),
        lambda: _C.kernels.quantize(name, np.ones((1, 1), np.float32)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"unknown instruction set .*accepted: auto, portable"):
            call()


@pytest.mark.skipif(not UNAVAILABLE, reason="this CPU runs every target that is built in")
@pytest.mark.parametrize("name", UNAVAILABLE)
def test_a_target_that_this_cpu_lacks_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"'{name}' is not supported by this CPU, which has: portable"
    with pytest.raises(ValueError, match=message):
        _C.check_isa(name)
    monkeypatch.setenv("XFAST_ISA", name)
    with pytest.raises(xfast.InvalidOptionError, match=f"^XFAST_ISA: .*{message}"):
        requested_isa()


def test_the_environment_decides(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for spelling in (isa, isa.upper()):
        monkeypatch.setenv("XFAST_ISA", spelling)
        assert requested_isa() == isa


@pytest.mark.parametrize("value", [None, "", "auto", "AUTO"])
def test_without_a_wish_the_fastest_is_taken(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XFAST_ISA", raising=False)
    if value is not None:
        monkeypatch.setenv("XFAST_ISA", value)
    assert requested_isa() == fastest()


def test_the_bf16_note_tells_whether_the_instruction_is_there(isa: str) -> None:
    note = _C.Encoder(SHAPE, "bf16", isa).bf16_note
    assert ("widened to fp32" in note) == (isa not in ("avx512_bf16", "amx"))


def test_a_fresh_process_obeys_the_environment(tmp_path: Path) -> None:
    # One process is enough (it imports torch): every other name is forced in this process above.
    code = "from xfast.backends.native import requested_isa; print(requested_isa())"
    environment = {**os.environ, "XFAST_ISA": "portable"}
    # From outside the checkout, whose xfast/ has no compiled extension.
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "portable"), done.stderr


@pytest.mark.parametrize("value", ["sse9", "avx512-vnni", "1"])
def test_an_unknown_wish_is_a_typed_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFAST_ISA", value)
    with pytest.raises(xfast.InvalidOptionError, match=r"^XFAST_ISA: unknown instruction set .*accepted: auto, portab"):
        requested_isa()
