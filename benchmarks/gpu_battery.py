"""All that needs a GPU, in one command under ten minutes: correctness first, then speed; a table and a JSON file.

    python -P -m xfast.benchmarks.gpu_battery --out benchmarks/results

``-P``: in a checkout, ``xfast`` must mean the installed package. On a machine without a package registry:
``pip install --no-build-isolation --no-deps .`` in a copy of this repository (needs cmake, ninja and pybind11).
Sections that no longer fit the time are named as skipped.
"""

from __future__ import annotations

import datetime
import importlib.util
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
TESTS = (
    *(
        "packing_triton",
        "attention_triton",
        "rows_triton",
        "gemm_triton",
        "gemm_weight_only_triton",
        "triton_backend",
        "triton_precisions",
        "artifact_triton",
        "attention_interface",
    ),
    "tensorrt_backend",
)
TEST_SECONDS = 240
app = typer.Typer(add_completion=False)


def correctness(tests: Path) -> dict[str, Any]:
    """The GPU tests of the suite, on the GPU: counts and the names of failures."""
    files = [str(tests / f"test_{name}.py") for name in TESTS]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # -W default: a warning of that machine's older or newer packages is no failure of a kernel
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        result = subprocess.run(
            [*command, *files], env=environment, cwd=tests.parent, capture_output=True, text=True, timeout=TEST_SECONDS,
            check=False,
        )  # fmt: skip
        output, ended = result.stdout, result.returncode
    except subprocess.TimeoutExpired as error:
        output, ended = _text(error.stdout), -1
    failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests\S+)", output)))
    if ended == -1:
        failed.append(f"not finished within {TEST_SECONDS} s")
    elif ended != 0 and not failed:
        failed.append(f"pytest ended with {ended}")
    return {
        "passed": len(re.findall(r"(?:\sPASSED\s+\[|PASSED tests)", output)),
        "failed": failed,
        "output": output[-6000:],
    }


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


class Report:
    """The document and its file, written after every row: the machine may be taken back at any moment."""

    def __init__(self, path: Path, document: dict[str, Any], console: Console) -> None:
        self.document = document
        self._path, self._console = path, console

    def add(self, name: str, row: Any) -> None:
        """One more row of a section."""
        self.document.setdefault(name, []).append(row)
        self._console.print(name, row)
        self._path.write_text(json.dumps(self.document, indent=1))

    def section(self, name: str, clock: Clock, rows: Callable[[Clock], Iterable[Any]]) -> None:
        """Runs one section; what fails is recorded and the rest goes on: the lease is short."""
        try:
            for row in rows(clock):
                self.add(name, row)
        except Exception:
            self.add("errors", {name: traceback.format_exc()[-4000:]})
        if clock.left <= 0:
            self.add("skipped", f"{name}: cut short, no time left")


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
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{device}-{datetime.datetime.now().strftime('%Y-%m-%d-%H%M')}.json"
    report = Report(path, _header(), console)
    sections: dict[str, Callable[[Clock], Iterable[Any]]] = {
        "correctness": lambda _: [correctness(tests.resolve())],
        "ceilings": lambda _: [gpu_kernels.ceilings()],
        "models": gpu_models.models,
        "tensorrt": gpu_models.tensorrt,
        "attention": gpu_kernels.attention_rows,
        "rows": gpu_kernels.row_kernels,
        "gemm": gpu_kernels.gemm_rows,
        "weight-only": gpu_kernels.weight_only_rows,
        "compiled": gpu_models.compiled,
    }
    wanted = set(filter(None, only.split(",")))
    for name, rows in sections.items():
        if not wanted or name in wanted:
            report.section(name, clock, rows)
    console.print(f"written: {path}")
    wrong = [row for row in report.document.get("correctness", []) if row["failed"]]
    raise typer.Exit(1 if wrong or report.document.get("errors") else 0)


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
