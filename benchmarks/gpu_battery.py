"""All that needs a GPU, in one command under ten minutes: correctness first, then speed; a table and a JSON file.

    python -m xfast.benchmarks.gpu_battery --out benchmarks/results

On a machine without a package registry: ``pip install --no-build-isolation --no-deps .`` in a copy of this repository
(needs cmake, ninja and pybind11), then the command above. Sections that no longer fit the time are named as skipped.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import triton
import typer
from rich.console import Console

import xfast
from xfast.benchmarks import gpu_kernels, gpu_models
from xfast.benchmarks.gpu_time import Clock

FORMAT = 1
TESTS = ("packing_triton", "attention_triton", "rows_triton", "gemm_triton", "triton_backend", "attention_interface")
TEST_SECONDS = 240
app = typer.Typer(add_completion=False)


def correctness(tests: Path) -> dict[str, Any]:
    """The GPU tests of the suite, on the GPU: counts and the names of failures."""
    files = [str(tests / f"test_{name}.py") for name in TESTS]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=25", *files]
    try:
        result = subprocess.run(
            command,
            env=environment,
            cwd=tests.parent,
            capture_output=True,
            text=True,
            timeout=TEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {"passed": 0, "failed": [f"not finished within {TEST_SECONDS} s"], "output": _tail(error.stdout)}
    passed = re.search(r"(\d+) passed", result.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    return {
        "passed": int(passed[1]) if passed else 0,
        "failed": failed or ([] if result.returncode == 0 else [f"pytest ended with {result.returncode}"]),
        "output": "" if result.returncode == 0 else _tail(result.stdout),
    }


def _tail(text: str | bytes | None) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return (text or "")[-6000:]


def section(
    document: dict[str, Any], name: str, clock: Clock, rows: Callable[[Clock], Iterable[Any]], console: Console
) -> None:
    """Runs one section; what fails is recorded and the rest goes on."""
    document[name] = found = []
    try:
        for row in rows(clock):
            found.append(row)
            console.print(name, row)
    except Exception:  # the lease is short: one broken section must not cost the others
        document.setdefault("errors", {})[name] = traceback.format_exc()[-4000:]
        console.print_exception()
    if clock.left <= 0:
        document.setdefault("skipped", []).append(f"{name}: cut short, no time left")


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for gpu-DEVICE-DATE.json.")] = Path("benchmarks/results"),
    seconds: Annotated[float, typer.Option(help="Time for everything.")] = 560,
    tests: Annotated[Path, typer.Option(help="Folder with the test suite.")] = Path("tests"),
    only: Annotated[str, typer.Option(help="Comma-separated sections; empty for all.")] = "",
) -> None:
    """Checks every GPU kernel and model on this GPU, then measures them."""
    console = Console(width=200)
    if not torch.cuda.is_available():
        console.print("no CUDA device: this battery needs one; kernels are tested without by `make test`")
        raise typer.Exit(1)
    clock = Clock(seconds)
    document = _header()
    wanted = set(filter(None, only.split(",")))
    if not wanted or "correctness" in wanted:
        document["correctness"] = correctness(tests.resolve())
        console.print("correctness", document["correctness"])
    sections: dict[str, Callable[[Clock], Iterable[Any]]] = {
        "ceilings": lambda _: [gpu_kernels.ceilings()],
        "attention": gpu_kernels.attention_rows,
        "models": gpu_models.models,
        "rows": gpu_kernels.row_kernels,
        "gemm": gpu_kernels.gemm_rows,
    }
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    path = out / f"gpu-{device}-{datetime.date.today().isoformat()}.json"
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in sections.items():
        if not wanted or name in wanted:
            section(document, name, clock, rows, console)
            path.write_text(json.dumps(document, indent=1))  # after every section: the machine may be taken back
    console.print(f"written: {path}")
    raise typer.Exit(1 if document.get("errors") or document.get("correctness", {}).get("failed") else 0)


def _header() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "format": FORMAT,
        "device": {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
        },
        "versions": {
            "xfast": xfast.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": os.environ.get("XFAST_COMMIT", "unknown"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    app()
