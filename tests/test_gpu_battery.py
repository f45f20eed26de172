"""The battery's frame, without a GPU: what a section leaves behind that fails, crashes or does not end."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build
from rich.console import Console
from typer.testing import CliRunner

import xfast
from xfast.benchmarks import gpu_battery, gpu_kernels, gpu_models, gpu_time
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


def test_what_the_battery_runs_is_rehearsed() -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"GPU_TESTS = \$\(addprefix tests/test_,((?:.|\n)*?)\)", makefile)
    assert listed is not None
    names = {name.removesuffix(".py") for name in listed[1].replace("\\", " ").split()}
    assert names == {*gpu_battery.TESTS, "played_cuda", "gpu_battery"}


def test_an_engine_that_does_not_run_is_in_the_report(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    good, failed = gpu_time.that_run({"a": lambda: torch.zeros(1), "b": broken})
    assert list(good) == ["a"] and failed == {"b": "RuntimeError: no kernel image"}
    report.add("models", {"failed": {}})
    assert not report.failed
    report.add("models", {"failed": failed})
    assert report.failed


def test_a_fault_that_ends_the_context_is_blamed_on_who_caused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = []

    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fault() -> torch.Tensor:
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(gpu_time.DeviceLost, match="'guilty': 'RuntimeError: CUDA error"):
        gpu_time.that_run({"guilty": fault, "innocent": lambda: torch.zeros(1)})


@pytest.mark.parametrize("wrong", [1.4, float("nan")])
def test_an_engine_that_computes_something_else_fails(wrong: float) -> None:
    found = gpu_models._wrong({"stock sdpa bf16": 0.0, "xfast bf16": 0.01, "xfast int4": 0.2, "tensorrt fp8": wrong})
    assert list(found) == ["tensorrt fp8"] and "limit 0.3" in found["tensorrt fp8"]


def test_a_section_has_its_own_time(report: Report, tmp_path: Path) -> None:
    _run(report, tmp_path, "", seconds=9999)
    assert report.document["models"][0]["seconds"] <= gpu_battery.SECTIONS["models"].seconds


A_SUITE = """
import pytest, time
@pytest.mark.parametrize("n", [(1, 2), (3, 4)], ids=str)
def test_it(n): assert n == (1, 2), "three"
@pytest.mark.skip
def test_skipped(): pass
def test_last(): time.sleep({sleep})
"""


@pytest.mark.parametrize("sleep", [0, 600])
def test_correctness_says_what_failed_and_why(sleep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests, out = tmp_path / "tests", tmp_path / "out"
    tests.mkdir(), out.mkdir()
    (tests / "test_rows_triton.py").write_text(A_SUITE.replace("{sleep}", str(sleep)))
    monkeypatch.setattr(gpu_battery, "TESTS", ("rows_triton",))
    found = gpu_battery.correctness(tests, out, 25 if sleep else 120)
    assert any("test_it[(3, 4)]" in name and "three" in why for name, why in found["failed"].items())
    assert found["passed"] >= 1  # the one that was interrupted has no outcome
    assert ("the suite" in found["failed"]) == bool(sleep)
    assert "test_rows_triton" in (out / "correctness.log").read_text()


LOST = """
import pytest, torch
lost = False
def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")
torch.cuda.is_available, torch.cuda.synchronize = (lambda: True), synchronize
@pytest.mark.parametrize("n", range(60))
def test_it(n):
    global lost
    lost = lost or n == 5
    assert not lost, f"illegal in {n}"
"""


def test_a_lost_context_fails_no_other_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's conftest ends a process that CUDA answers no more."""
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "interpreter_speed.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path / "tests")
    (tmp_path / "tests" / "test_rows_triton.py").write_text(LOST)
    monkeypatch.setattr(gpu_battery, "TESTS", ("rows_triton",))
    found = gpu_battery.correctness(tmp_path / "tests", tmp_path, 120)
    (failed,) = found["failed"].items()
    assert found["passed"] == 59 and "test_it[5]" in failed[0] and "illegal in 5" in failed[1]
    assert "the GPU context is lost after" in (tmp_path / "correctness.log").read_text()


def test_some_tests_run_once_more_without_waiting_for_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for every launch hides what streams do to each other."""
    (tmp_path / "tests").mkdir()
    text = "import os\ndef test_it():\n    assert os.environ['CUDA_LAUNCH_BLOCKING'] == '{}'\n"
    for name, value in (("rows_triton", 1), ("triton_backend", 1), ("training", 0)):
        (tmp_path / f"tests/test_{name}.py").write_text(text.format(value))
    monkeypatch.setattr(gpu_battery, "TESTS", ("rows_triton", "triton_backend"))
    found = gpu_battery.correctness(tmp_path / "tests", tmp_path, 120)
    assert found["passed"] == 2 and [name.split(":")[0] for name in found["failed"]] == ["asynchronous"]
    monkeypatch.setattr(gpu_battery, "ASYNCHRONOUS", ())
    assert gpu_battery.correctness(tmp_path / "tests", tmp_path, 120)["failed"] == {}
    assert "no time left" in str(gpu_battery.correctness(tmp_path / "tests", tmp_path, 0)["failed"])


@pytest.mark.parametrize(("seconds", "share"), [("9000", 20.0), ("400", 1.0)])
def test_sections_share_the_time_that_there_is(
    seconds: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few sections in a command of their own may take longer; all of them together no longer than they are given."""
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(gpu_battery, "_header", dict)
    monkeypatch.setattr(gpu_battery, "age", lambda: 0.0)
    monkeypatch.setattr(gpu_battery, "run_section", lambda *given: shares.append(given[-1]))
    sections = "weight-only,compiled,models" if share > 1 else ""  # 60 + 240 + 150
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--seconds", seconds, "--only", sections])
    assert result.exit_code == 0, result.output
    assert shares == pytest.approx([share] * len(shares), rel=0.01) and len(shares) == (3 if share > 1 else 10)


def test_a_row_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_time.attempt({"model": "base"}, lambda: {"ms": 1}) == {"model": "base", "ms": 1}
    failed = {"the row": "RuntimeError: out of memory"}
    assert gpu_time.attempt({"model": "base"}, broken) == {"model": "base", "failed": failed}
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(gpu_time.DeviceLost, match=r"'base'.*out of memory"):
        gpu_time.attempt({"model": "base"}, broken)


def test_the_sections_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    result = CliRunner().invoke(app, ["--only", "models,modls"])
    assert result.exit_code == 2 and "no section modls; accepted: correctness, ceilings" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "no CUDA device" in result.output and not (tmp_path / "out").exists()
    monkeypatch.setattr(gpu_battery, "age", lambda: 4.0)  # what the process took to begin is gone
    monkeypatch.setitem(
        gpu_battery.SECTIONS, "rows", gpu_battery.Section(lambda clock: [{"left": 4 < clock.left <= 5}], 9)
    )
    result = CliRunner().invoke(app, ["section", "rows", str(tmp_path / "r.json"), "--seconds", "9"])
    assert result.exit_code == 0, result.output
    report.reload()
    assert report.document["rows"] == [{"left": True}]


def test_a_precision_that_a_card_lacks_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stock:
        def to(self, *_: Any) -> Stock:
            return self

    def accelerate(model: Any, backend: str, precision: str) -> str:
        if precision == "fp8":
            raise xfast.BackendUnavailableError("fp8 needs 8.9 or later")
        return f"{backend} {precision}"

    monkeypatch.setattr(gpu_models, "find", lambda: SimpleNamespace(name="rtx", version_text="1", targets=list))
    monkeypatch.setattr(gpu_models, "random_model", lambda size: Stock())
    monkeypatch.setattr(xfast, "accelerate", accelerate)
    monkeypatch.setattr(xfast, "explain", lambda model: SimpleNamespace(fallbacks={}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("_batch", "_runner"):
        monkeypatch.setattr(gpu_models, name, lambda *_: lambda: None)
    for name in ("_one_by_32", "_tokens_a_second"):
        monkeypatch.setattr(gpu_models, name, lambda stock, engines, *_: {"engines": list(engines)})
    rows = [row for row in gpu_models.tensorrt(Clock(1000)) if isinstance(row, dict)]
    failed = [row["failed"] for row in rows if row.get("failed")]
    assert failed == 2 * [{"tensorrt fp8": "fp8 needs 8.9 or later"}]
    measured = [row["engines"] for row in rows if "engines" in row]
    names = ["xfast bf16", "tensorrt bf16", "tensorrt int8", "tensorrt fp16"]
    assert measured == 2 * (len(gpu_models.WORKLOADS) + 1) * [names]


def test_graphs_are_told_of_all_of_xfasts_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xfast, "explain", lambda model: f"graphs of {model}")
    engines = {"xfast bf16": 1, "tensorrt bf16": 2, "stock + xfast attention": 3, "torch.compile bf16": 4}
    assert gpu_models._explained(engines) == {"xfast bf16": "graphs of 1", "tensorrt bf16": "graphs of 2"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that kernels which are interpreted get through."""
    sizes = {
        "SHAPES": {"large": (64, 112)}, "LARGER_SHAPES": {}, "ATTENTION_TOKENS": 24, "ATTENTION_LENGTHS": (11,),
        "HEADS": 2, "GEMM_ROWS": (3,), "WEIGHT_ONLY_ROWS": (1, 40), "NORM_ROWS": 4, "CEILING_SIDE": 32,
        "CEILING_BYTES": 2**10,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    monkeypatch.setattr(gpu_time, "L2_FLUSH_BYTES", 1)
    monkeypatch.setattr(gpu_time, "WARM_UPS", 1)
    plain = gpu_time.alternate
    monkeypatch.setattr(gpu_time, "alternate", lambda functions, rounds, cold: plain(functions, 1, cold))
    monkeypatch.setattr(gpu_models, "WORKLOADS", {"few": (3, 5, 9)})
    monkeypatch.setattr(
        gpu_models,
        "random_model",
        lambda size: build(head="base-no-pooler", intermediate_size=112, num_hidden_layers=1),
    )
    monkeypatch.setattr(gpu_models, "VOCABULARY", 90)
    monkeypatch.setattr(gpu_models, "ROUNDS", 1)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in which kernels are interpreted
@pytest.mark.skipif("played_cuda" not in sys.modules, reason="for pytest -p played_cuda")
@pytest.mark.parametrize("name", ["ceilings", "models", "attention", "rows", "gemm", "weight-only"])
def test_every_section_runs_through(name: str, small: None, report: Report) -> None:
    report.section(name, Clock(300), gpu_battery.SECTIONS[name].rows)
    assert "errors" not in report.document, report.document["errors"]
    rows = report.document[name]
    assert rows
    for row in rows:
        assert not row.get("failed") and "not available" not in row, row
