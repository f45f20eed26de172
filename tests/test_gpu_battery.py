"""The battery's frame, without a GPU: what a section leaves behind that fails, crashes or does not end."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from xfast.benchmarks import gpu_battery, gpu_models
from xfast.benchmarks.gpu_battery import Report, app, run_section
from xfast.benchmarks.gpu_time import Clock

ADD_A_ROW = """
import json, os, signal, sys, time
name, path, _, seconds = sys.argv[1:]
document = json.load(open(path))
document.setdefault(name, []).append({"seconds": float(seconds)})
json.dump(document, open(path, "w"))
"""


@pytest.fixture
def report(tmp_path: Path) -> Report:
    made = Report(tmp_path / "r.json", Console(file=io.StringIO()), {"format": 1})
    made.write()
    return made


def _run(report: Report, tmp_path: Path, ending: str, seconds: float = 30) -> None:
    command = [sys.executable, "-c", ADD_A_ROW + ending]
    run_section(report, tmp_path / "r.json", "models", Clock(seconds), command)


def test_a_section_adds_its_rows_to_the_report(report: Report, tmp_path: Path) -> None:
    _run(report, tmp_path, "")
    (row,) = report.document["models"]
    assert 28 <= row["seconds"] <= 30 and not report.failed and report.document["format"] == 1


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with -11"),
        ("print('illegal memory access', file=sys.stderr); sys.exit(3)", "ended with 3\nillegal memory access"),
    ],
)
def test_a_section_that_crashes_costs_itself_alone(ending: str, message: str, report: Report, tmp_path: Path) -> None:
    _run(report, tmp_path, ending)
    (error,) = report.document["errors"]
    assert message in error["models"] and len(report.document["models"]) == 1 and report.failed
    _run(report, tmp_path, "")  # the next one runs in a process of its own
    assert len(report.document["models"]) == 2
    assert json.loads((tmp_path / "r.json").read_text()) == report.document


def test_a_section_that_does_not_end_is_killed(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_battery, "GRACE", 1)
    _run(report, tmp_path, "time.sleep(60)", seconds=4)
    (error,) = report.document["errors"]
    assert "killed after 1 s beyond its time" in error["models"] and len(report.document["models"]) == 1
    _run(report, tmp_path, "", seconds=-1)
    assert report.document["skipped"] == ["models: no time left"]


def test_a_failure_within_a_section_keeps_its_rows(report: Report, tmp_path: Path) -> None:
    def rows(clock: Clock) -> Iterator[Any]:
        yield {"a": 1}
        raise RuntimeError("out of registers")

    report.section("gemm", Clock(9), rows)
    (error,) = report.document["errors"]
    assert report.document["gemm"] == [{"a": 1}] and "out of registers" in error["gemm"]
    report.section("rows", Clock(-1), lambda clock: [])
    assert report.document["skipped"] == ["rows: cut short, no time left"]
    assert Report(tmp_path / "r.json", Console(file=io.StringIO())).document == report.document


def test_an_engine_that_does_not_run_is_in_the_report(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    good, failed = gpu_models._that_run({"a": lambda: torch.zeros(1), "b": broken})
    assert list(good) == ["a"] and failed == {"b": "RuntimeError: no kernel image"}
    report.add("models", {"failed": {}})
    assert not report.failed
    report.add("models", {"failed": failed})
    assert report.failed


def test_the_sections_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    result = CliRunner().invoke(app, ["--only", "models,modls"])
    assert result.exit_code == 2 and "no section modls; accepted: correctness, ceilings" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "no CUDA device" in result.output and not (tmp_path / "out").exists()
    monkeypatch.setitem(gpu_battery.SECTIONS, "rows", lambda clock: [{"left": clock.left > 0}])
    result = CliRunner().invoke(app, ["section", "rows", str(tmp_path / "r.json"), "--seconds", "9"])
    assert result.exit_code == 0, result.output
    report.reload()
    assert report.document["rows"] == [{"left": True}]
