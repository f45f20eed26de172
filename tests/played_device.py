"""Builds and loads ``played_device.cpp`` when it is imported, which must be before torch is."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path


def load() -> None:
    """Tells torch that there is a device called cuda.

    Raises:
        RuntimeError: torch is already there, and has been told otherwise.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the played device: pytest -p played_cuda")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "played_device.so")
        flags = ["-shared", "-fPIC", "-std=c++20", "-I", str(root / "include"), "-L", str(root / "lib")]
        source = Path(__file__).with_suffix(".cpp")
        libraries = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
        subprocess.run(["c++", *flags, str(source), "-o", str(library), *libraries], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load()
