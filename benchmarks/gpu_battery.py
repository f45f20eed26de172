"""All that needs a GPU, in one command under ten minutes: correctness first, then speed; a table and a JSON file.

    python -P -m xfast.benchmarks.gpu_battery --out benchmarks/results

``-P``: in a checkout, ``xfast`` must mean the installed package. On a machine without a package registry:
``pip install --no-build-isolation --no-deps .`` in a copy of this repository (needs cmake, ninja and pybind11).
Every section runs in a process of its own. Sections that no longer fit the time are named as skipped.
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import triton
import typer
from rich.console import Console

import xfast
from xfast import files
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
GRACE = 20
"""Seconds that a section may take beyond its time: it looks at the clock between its rows."""
TESTS_FOLDER = "XFAST_BATTERY_TESTS"
app = typer.Typer(add_completion=False)


def correctness(tests: Path) -> dict[str, Any]:
    """The GPU tests of the suite, on the GPU: counts and the names of failures."""
    files = [str(tests / f"test_{name}.py") for name in TESTS]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # -W default: a warning of that machine's older or newer packages is no failure of a kernel
    command = [*_python(), "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", "--tb=short"]
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

    def __init__(self, path: Path, console: Console, document: dict[str, Any] | None = None) -> None:
        self._path, self._console = path, console
        self.document: dict[str, Any] = {} if document is None else document
        if document is None:
            self.reload()

    def reload(self) -> None:
        """Take over what another process has added to the file."""
        self.document = json.loads(self._path.read_text(encoding="utf-8"))

    @property
    def failed(self) -> bool:
        """Whether a section ended badly, a test failed or an engine did not run."""
        rows = [row for rows in self.document.values() if isinstance(rows, list) for row in rows]
        return "errors" in self.document or any(isinstance(row, dict) and row.get("failed") for row in rows)

    def add(self, name: str, row: Any) -> None:
        """One more row of a section."""
        self.document.setdefault(name, []).append(row)
        self._console.print(name, row)
        self.write()

    def write(self) -> None:
        """The whole file, or the one before: a process may be killed at any moment."""
        files.write_text(self._path, json.dumps(self.document, indent=1))

    def section(self, name: str, clock: Clock, rows: Callable[[Clock], Iterable[Any]]) -> None:
        """Runs one section; what fails is recorded and the rest goes on: the lease is short."""
        try:
            for row in rows(clock):
                self.add(name, row)
        except Exception:
            self.add("errors", {name: traceback.format_exc()[-4000:]})
        if clock.left <= 0:
            self.add("skipped", f"{name}: cut short, no time left")


SECTIONS: dict[str, Callable[[Clock], Iterable[Any]]] = {
    "correctness": lambda _: [correctness(Path(os.environ.get(TESTS_FOLDER, "tests")).resolve())],
    "ceilings": lambda _: [gpu_kernels.ceilings()],
    "models": gpu_models.models,
    "tensorrt": gpu_models.tensorrt,
    "attention": gpu_kernels.attention_rows,
    "rows": gpu_kernels.row_kernels,
    "gemm": gpu_kernels.gemm_rows,
    "weight-only": gpu_kernels.weight_only_rows,
    "compiled": gpu_models.compiled,
}
"""Most telling first: what comes last may find no time left."""


def run_section(report: Report, path: Path, name: str, clock: Clock, command: Sequence[str]) -> None:
    """Run a section in a process of its own: a kernel that reads where it must not ruins that process's GPU context.

    Args:
        report: of this process; has the section's rows afterwards.
        path: the report's file, which the process adds rows to.
        name: of the section.
        clock: a process that runs ``GRACE`` seconds beyond it is killed.
        command: what to run; gets the section's name, the file and the seconds that are left.
    """
    if clock.left <= 0:
        report.add("skipped", f"{name}: no time left")
        return
    full = [*command, name, str(path), "--seconds", f"{clock.left:.0f}"]
    try:
        done = subprocess.run(full, stderr=subprocess.PIPE, text=True, timeout=clock.left + GRACE, check=False)
        code, errors = done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        code, errors = None, _text(error.stderr)
    report.reload()
    if code != 0:
        ended = f"killed after {GRACE} s beyond its time" if code is None else f"the process ended with {code}"
        report.add("errors", {name: f"{ended}\n{errors[-4000:]}"})


def _python() -> list[str]:
    """This Python, without the current folder on its path where it has been started so."""
    return [sys.executable, *(["-P"] if getattr(sys.flags, "safe_path", False) else [])]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for gpu-DEVICE-DATE.json.")] = Path("benchmarks/results"),
    seconds: Annotated[float, typer.Option(help="Time for everything.")] = 560,
    tests: Annotated[Path, typer.Option(help="Folder with the test suite.")] = Path("tests"),
    only: Annotated[str, typer.Option(help="Comma-separated sections; empty for all.")] = "",
) -> None:
    """Checks every GPU kernel and model on this GPU, then measures them."""
    if context.invoked_subcommand is not None:
        return
    console = Console(width=200)
    wanted = list(filter(None, only.split(","))) or list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        console.print(f"only: no section {', '.join(sorted(unknown))}; accepted: {', '.join(SECTIONS)}")
        raise typer.Exit(2)
    if not torch.cuda.is_available():
        console.print("no CUDA device: this battery needs one; kernels are tested without by `make test`")
        raise typer.Exit(1)
    clock = Clock(seconds)
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    out.mkdir(parents=True, exist_ok=True)
    path = out.resolve() / f"gpu-{device}-{datetime.datetime.now().strftime('%Y-%m-%d-%H%M')}.json"
    report = Report(path, console, _header())
    report.write()
    os.environ[TESTS_FOLDER] = str(tests.resolve())
    for name in SECTIONS:
        if name in wanted:
            run_section(report, path, name, clock, [*_python(), "-m", "xfast.benchmarks.gpu_battery", "section"])
    console.print(f"written: {path}")
    raise typer.Exit(1 if report.failed else 0)


@app.command(hidden=True)
def section(
    name: Annotated[str, typer.Argument(help="Of the section.")],
    path: Annotated[Path, typer.Argument(help="The report to add to.")],
    seconds: Annotated[float, typer.Option(help="Time that is left.")],
) -> None:
    """Runs one section in this process."""
    Report(path, Console(width=200)).section(name, Clock(seconds), SECTIONS[name])


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
