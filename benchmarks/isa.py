"""Forces an instruction set on every engine, for a fair comparison of what older CPUs would do.

Most engines have a switch of their own. ONNX Runtime and OpenVINO choose by CPUID alone: for them the instruction is
made to answer for an older CPU (``cpuid_mask.c``), which Linux on x86-64 allows where the CPU has cpuid_fault.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from xfast.benchmarks.peers import ENGINES

_AVX2 = {
    "XFAST_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
}
_VNNI = {
    "XFAST_ISA": "avx2_vnni",
    "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
    "DNNL_MAX_CPU_ISA": "AVX2_VNNI",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2_E1",
}
SWITCHES = {"avx2": _AVX2, "avx2_vnni": _AVX2 | _VNNI}
"""Environment variables by instruction set: AVX2 alone, and with AVX-VNNI's byte dot product."""

WITHOUT_SWITCH = ("onnxruntime", "openvino", "torch-dynamic", "zentorch")

_SOURCE = Path(__file__).with_name("cpuid_mask.c")
_REFUSED = 97


def environment(isa: str | None, mask: Path | None) -> dict[str, str]:
    """What to add to a worker's environment; ``isa`` is one of ``SWITCHES``."""
    if isa is None:
        return {}
    return {**SWITCHES[isa], **({"LD_PRELOAD": str(mask)} if mask else {})}


def unforceable(engine: str, isa: str | None, mask: Path | None) -> str | None:
    """Why an engine cannot be held to an instruction set that this CPU has, or None."""
    if isa is None or mask is not None or ENGINES[engine].family not in WITHOUT_SWITCH:
        return None
    return f"has no switch for {isa}, and this machine does not allow to mask CPUID"


def build_mask(folder: Path, isa: str) -> tuple[Path | None, str | None]:
    """Compiles the library to preload and tries it. Returns (it, None) or (None, why there is none)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, "masking CPUID needs Linux on x86-64"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None, "masking CPUID needs a C compiler (cc)"
    library = folder / "cpuid_mask.so"
    shown = ["-DSHOW_AVX_VNNI"] if isa == "avx2_vnni" else []
    command = [compiler, "-O2", "-shared", "-fPIC", "-Wl,-z,initfirst", *shown, "-o", str(library), str(_SOURCE)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        return None, f"cpuid_mask.c does not compile: {built.stderr.strip().splitlines()[-1:]}"
    tried = subprocess.run(["true"], env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, check=False)
    if tried.returncode == _REFUSED:
        return None, "this kernel or CPU has no CPUID faulting"
    return (library, None) if tried.returncode == 0 else (None, f"cpuid_mask.so fails with status {tried.returncode}")
