"""All that needs a GPU, in one command under ten minutes: correctness first, then speed; a table and a JSON file.

    python -P -m xfast.benchmarks.gpu_battery --out benchmarks/results

``-P``: in a checkout, ``xfast`` must mean the installed package. On a machine without a package registry:
``pip install --no-build-isolation --no-deps .`` in a copy of this repository (needs cmake, ninja and pybind11).
Every section runs in a process of its own. Sections that no longer fit the time are named as skipped.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import transformers
import triton
import typer
from rich.console import Console

import xfast
from xfast import files
from xfast.benchmarks import gpu_kernels, gpu_models
from xfast.benchmarks.gpu_time import Clock, age

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
        "training",
    ),
    "tensorrt_backend",
)
ASYNCHRONOUS = ("triton_backend",)
"""Of these, once more without waiting for each launch: streams then overlap, as they do for users."""
TEST_SECONDS = 240
GRACE = 20
"""Seconds that a section may take beyond its time: it looks at the clock between its rows."""
TESTS_FOLDER, OUT_FOLDER = "XFAST_BATTERY_TESTS", "XFAST_BATTERY_OUT"
app = typer.Typer(add_completion=False)


def correctness(tests: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """The GPU tests of the suite: counts, and what failed and why; all that pytest said goes to ``folder``."""
    clock, log = Clock(seconds), folder / "correctness.log"
    log.write_bytes(b"")
    # a fault is raised by the launch that caused it where each is waited for
    passed, failed = _pytest(tests, TESTS, log, clock, {"CUDA_LAUNCH_BLOCKING": "1"})
    if again := [name for name in TESTS if name in ASYNCHRONOUS]:
        more, others = _pytest(tests, again, log, clock, {"CUDA_LAUNCH_BLOCKING": "0"})
        passed, failed = passed + more, {**failed, **{f"asynchronous: {name}": why for name, why in others.items()}}
    output = log.read_text(encoding="utf-8", errors="replace")
    return {"passed": passed, "failed": failed, "output": output[-3000:]}


def _pytest(
    tests: Path, names: Sequence[str], log: Path, clock: Clock, variables: dict[str, str]
) -> tuple[int, dict[str, str]]:
    """How many tests of these files passed, and why the others did not; what pytest says is added to the log."""
    seconds = clock.left
    if seconds <= 0:
        return 0, {"the suite": "not started: no time left"}
    files, junit = [str(tests / f"test_{name}.py") for name in names], log.with_suffix(".xml")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # -W default: a warning of that machine's older or newer packages is no failure of a kernel
    command = [*_python(), "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--junitxml", str(junit), "-o", "junit_logging=no"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    junit.unlink(missing_ok=True)
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *files],
            env=environment | variables,
            cwd=tests.parent,
            stdout=output,
            stderr=output,
            preexec_fn=_interruptible,
        )
        ended = _wait(process, seconds)
    passed, failed = _outcomes(junit)
    junit.unlink(missing_ok=True)
    if ended is None:
        failed["the suite"] = f"not finished within {seconds:.0f} s"
    elif ended != 0 and not failed:
        failed["the suite"] = f"pytest ended with {ended}"
    return passed, failed


def _interruptible() -> None:
    """What shells start in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None after ``seconds``: then pytest is asked to write down what it has, and killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def _outcomes(junit: Path) -> tuple[int, dict[str, str]]:
    """How many tests passed, and why the others did not: of a file that pytest may not have written."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return 0, {}
    failed: dict[str, str] = {}
    passed = 0
    for case in cases:
        wrong = next((child for child in case if child.tag in ("failure", "error")), None)
        if wrong is not None:
            # the first word of it: a worker that leaves after a fault (tests/conftest.py) is told of once more
            failed.setdefault(f"{case.get('classname')}::{case.get('name')}", (wrong.get("message") or "")[:400])
        elif case.find("skipped") is None:
            passed += 1
    return passed, failed


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


@dataclass(frozen=True)
class Section:
    """What makes a section's rows, and the seconds that it may take: one that hangs must leave time for the others.

    Where the sections that are wanted may take less than there is, each gets its share of the rest.
    """

    rows: Callable[[Clock], Iterable[Any]]
    seconds: float


def _correctness(clock: Clock) -> list[dict[str, Any]]:
    tests, out = (Path(os.environ.get(name, usual)) for name, usual in ((TESTS_FOLDER, "tests"), (OUT_FOLDER, ".")))
    return [correctness(tests.resolve(), out, clock.left - GRACE)]


SECTIONS = {
    "correctness": Section(_correctness, TEST_SECONDS + GRACE),
    "ceilings": Section(lambda _: [gpu_kernels.ceilings()], 30),
    "models": Section(functools.partial(gpu_models.models, size="large"), 150),
    "models-base": Section(functools.partial(gpu_models.models, size="base"), 60),
    "tensorrt": Section(gpu_models.tensorrt, 180),
    "attention": Section(gpu_kernels.attention_rows, 60),
    "rows": Section(gpu_kernels.row_kernels, 20),
    "gemm": Section(gpu_kernels.gemm_rows, 60),
    "weight-only": Section(gpu_kernels.weight_only_rows, 60),
    "compiled": Section(gpu_models.compiled, 240),
}
"""Most telling first: what comes last may find no time left."""


def run_section(
    report: Report, path: Path, name: str, clock: Clock, command: Sequence[str], share: float = 1.0
) -> None:
    """Run a section in a process of its own: a kernel that reads where it must not ruins that process's GPU context.

    Args:
        report: of this process; has the section's rows afterwards.
        path: the report's file, which the process adds rows to.
        name: of the section.
        clock: a process that runs ``GRACE`` seconds beyond it, or beyond the section's own time, is killed.
        command: what to run; gets the section's name, the file and the seconds that are left.
        share: times the section's own time is what it may take.
    """
    if clock.left <= 0:
        report.add("skipped", f"{name}: no time left")
        return
    seconds = min(clock.left, share * SECTIONS[name].seconds)
    full = [*command, name, str(path), "--seconds", f"{seconds:.0f}"]
    try:
        done = subprocess.run(full, stderr=subprocess.PIPE, text=True, timeout=seconds + GRACE, check=False)
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
    seconds: Annotated[float, typer.Option(help="Time for everything, but for one section's grace of 20 s.")] = 540,
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
    clock = Clock(seconds - age())
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    out.mkdir(parents=True, exist_ok=True)
    path = out.resolve() / f"gpu-{device}-{datetime.datetime.now().strftime('%Y-%m-%d-%H%M')}.json"
    report = Report(path, console, _header())
    report.write()
    os.environ[TESTS_FOLDER], os.environ[OUT_FOLDER] = str(tests.resolve()), str(out.resolve())
    share = max(1.0, clock.left / sum(SECTIONS[name].seconds for name in wanted))
    for name in SECTIONS:
        if name in wanted:
            command = [*_python(), "-m", "xfast.benchmarks.gpu_battery", "section"]
            run_section(report, path, name, clock, command, share)
    console.print(f"written: {path}")
    raise typer.Exit(1 if report.failed else 0)


@app.command(hidden=True)
def section(
    name: Annotated[str, typer.Argument(help="Of the section.")],
    path: Annotated[Path, typer.Argument(help="The report to add to.")],
    seconds: Annotated[float, typer.Option(help="Time that is left.")],
) -> None:
    """Runs one section in this process."""
    Report(path, Console(width=200)).section(name, Clock(seconds - age()), SECTIONS[name].rows)


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
