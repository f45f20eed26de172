"""The forms in which Triton kernels were launched, and compiling them for a GPU as its own launcher would.

``python launch_forms.py FORMS.jsonl --capability 90``, in a process in which Triton does not interpret.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

FILE = "XFAST_LAUNCH_FORMS"
_noted: dict[str, dict[str, Any]] = {}


def note(fn: Any, names: list[str], constants: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Write down a launch, by everything that Triton specialises code on."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    form = {
        "module": fn.__module__,
        "name": fn.__qualname__,
        "arguments": {name: _described(value, name in constants) for name, value in given.items() if name in names},
        "options": {name: value for name, value in given.items() if name not in names},
    }
    _noted.setdefault(json.dumps(form, sort_keys=True), form)


def save() -> None:
    """Adds what was noted to the file that the environment names, a line a form."""
    path = os.environ.get(FILE)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in _noted)


def _described(value: Any, constant: bool) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"pointer": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if constant and value is not None and not isinstance(value, (bool, int, float, str)):
        return {"type": str(value)}
    if constant or value is None or isinstance(value, (bool, float)):
        return {"value": value}
    # of a number only what decides its type and what is assumed of it
    if value in (0, 1):
        return {"value": value}
    return {"value": (16 if value % 16 == 0 else 17) + (2**40 if abs(value) >= 2**31 else 0)}


def _argument(described: dict[str, Any]) -> Any:
    """Something that Triton's launcher takes for the argument that was described."""
    import triton.language as tl

    if "pointer" in described:
        address = 256 if described["aligned"] else 257
        return SimpleNamespace(dtype=getattr(torch, described["pointer"]), data_ptr=lambda: address)
    if "type" in described:
        return {"fp64": tl.float64, "fp32": tl.float32}[described["type"]]
    return described["value"]


def compiled(form: dict[str, Any]) -> Any:
    """What a launch of this form would run."""
    kernel = getattr(importlib.import_module(form["module"]), form["name"])
    arguments = {name: _argument(described) for name, described in form["arguments"].items()}
    return kernel.run(grid=(1,), warmup=True, **arguments, **form["options"])


def _prepare(capability: int) -> None:
    """Makes Triton compile for a GPU that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    )


def _row(text: str) -> str:
    """What came of one form, as JSON."""
    from xfast.benchmarks import static_gpu

    form = json.loads(text)
    try:
        made = compiled(form)
        registers, spills = static_gpu.resources(made.asm["cubin"])
        row: dict[str, Any] = {"registers": registers, "spills": spills, "shared": int(made.metadata.shared)}
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps({**row, "form": form})


def main(path: str, capability: int) -> None:
    """Compiles every form of a file and prints what came of it, a line of JSON each; exits with 1 if one does not."""
    texts = dict.fromkeys(Path(path).read_text(encoding="utf-8").splitlines())
    with ProcessPoolExecutor(initializer=_prepare, initargs=(capability,), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_row, texts))
    print("\n".join(rows), flush=True)
    failed = [row for row in rows if "error" in json.loads(row)]
    if failed or not rows:
        sys.exit("\n".join(failed) or f"{path}: no kernel was launched")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
