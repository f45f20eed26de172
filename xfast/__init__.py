"""xfast: fast inference for multilingual encoders. ``model = xfast.accelerate(model)``."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("xfast._C") is None:  # before an import in the middle of the package fails with less to say
    raise ImportError(
        f"xfast was found in {__path__[0]}, which has no compiled part. If that is the source, run Python in another "
        "folder, where the installed xfast is found, or install with: pip install -e ."
    )

from xfast import _C, quantization
from xfast.api import accelerate, accelerated, explain, load, restore, restored, save
from xfast.errors import (
    ArtifactError,
    ArtifactWriteError,
    BackendUnavailableError,
    DataFileError,
    InvalidInputError,
    InvalidOptionError,
    InvalidWeightsError,
    ModelFreedError,
    TokenIdError,
    UnsupportedModelError,
    WeightsFreedError,
    XfastError,
)
from xfast.explain import Explanation
from xfast.options import Options
from xfast.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"


def available_isas() -> list[str]:
    """Instruction-set targets this CPU can run, slowest first; ``XFAST_ISA`` forces one.

    Of "portable" (every CPU) and on x86-64 "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx".
    """
    return list(_C.available_isas())


__all__ = [
    "ArtifactError",
    "ArtifactWriteError",
    "BackendUnavailableError",
    "DataFileError",
    "Explanation",
    "InvalidInputError",
    "InvalidOptionError",
    "InvalidWeightsError",
    "ModelFreedError",
    "Options",
    "TokenIdError",
    "UnsupportedModelError",
    "WeightsFreedError",
    "XfastError",
    "accelerate",
    "accelerated",
    "available_isas",
    "explain",
    "get_num_threads",
    "load",
    "quantization",
    "restore",
    "restored",
    "save",
    "set_num_threads",
]
