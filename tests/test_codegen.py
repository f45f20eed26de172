"""The generated code of the matrix-product tiles: accumulators must stay in registers.

GCC has been seen to spill them around dot-product intrinsics, which halves the speed without failing any other test.
Compiles to assembly, so targets that this machine cannot run are checked as well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-S", "-o", "-"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TARGETS = {
    "avx2": (AVX2, {"DotF32": ("vfmadd", 12), "DotInt8": ("vpmaddwd", 8), "DotInt16": ("vpmaddwd", 12)}),
    "avx2_vnni": (
        [*AVX2, "-mavxvnni"],
        {"DotF32": ("vfmadd", 12), "DotInt8": (r"{vex} vpdpbusd", 12), "DotInt16": (r"{vex} vpdpwssd", 12)},
    ),
    "avx512": (AVX512, {"DotF32": ("vfmadd", 28), "DotInt8": ("vpmaddwd", 40), "DotInt16": ("vpmaddwd", 28)}),
    "avx512_bf16": (
        [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        {
            "DotF32": ("vfmadd", 28),
            "DotBf16": ("vdpbf16ps", 28),
            "DotInt8": ("vpdpbusd", 28),
            "DotInt16": ("vpdpwssd", 28),
        },
    ),
    "amx": (
        [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
        {"DotF32": ("vfmadd", 28), "DotInt16": ("vpdpwssd", 28), "true": ("tdpbusd", 4), "false": ("tdpbf16ps", 4)},
    ),
}


def tile_bodies(assembly: str) -> dict[str, str]:
    """Text of each tile<Dot, R, PrefetchLines> and amx_tile<is int8, registers, prefetched lines> by mangled name."""
    names = r"^(_ZN\S*(?:4tile|8amx_tile)I\S*):\n(.*?)^\s*\.size\s+\1,"
    return {match[1]: match[2] for match in re.finditer(names, assembly, re.MULTILINE | re.DOTALL)}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_keep_their_accumulators_in_registers(target: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    if (
        not (ROOT / "csrc").is_dir()
        or "x86_64" not in subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    ):
        pytest.skip("needs the sources and an x86-64 compiler")
    flags, multiplies = TARGETS[target]
    source = ROOT / "csrc" / "targets" / f"{target}.cpp"
    command = [compiler, *FLAGS, *flags, "-DXFAST_X86", str(source)]
    bodies = tile_bodies(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(bodies) >= 30
    for name, body in bodies.items():
        # Whatever reads a whole register: Dot::unpack stores activations there, which are broadcast.
        read = r"^\s*(?!v\w*broadcast)v\w+\s+(?:\$\d+, )?[^,\n]*\(%r[sb]p\)(?!\{1to).*%[yz]mm.*"
        spills = re.findall(read, body, re.MULTILINE)
        assert not spills, f"{name} spills vector registers:\n" + "\n".join(spills[:5])
    # The tallest tile of each kind really consists of the instruction it was written for.
    for dot, (instruction, count) in multiplies.items():
        mangled = {"true": "ILb1E", "false": "ILb0E"}.get(dot, f"{len(dot)}{dot}E")
        own = [body for name, body in bodies.items() if mangled in name]
        assert max(len(re.findall(rf"^\s*{instruction}", body, re.MULTILINE)) for body in own) >= count, dot
