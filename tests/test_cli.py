"""The command line: ``info``, help, and how errors and Ctrl-C reach the user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import xfast
from xfast import cli

runner = CliRunner()


def test_info_json_names_versions_cpu_and_instruction_sets() -> None:
    result = runner.invoke(cli.app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["versions"]["xfast"] == xfast.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["cpu"] and facts["architecture"]
    assert facts["cores"] >= 1
    assert facts["threads"] == xfast.get_num_threads()
    assert facts["isas"] == xfast.available_isas()
    assert facts["isa"] in facts["isas"]


def test_info_json_lists_backends_with_a_reason_for_each_missing_one() -> None:
    rows = json.loads(runner.invoke(cli.app, ["info", "--json"]).stdout)["backends"]
    native = next(row for row in rows if row["name"] == "native")
    assert native == {
        "name": "native",
        "available": True,
        "precisions": ["fp32", "bf16", "int8", "int4"],
        "reason": None,
    }
    assert [row["name"] for row in rows] == ["native", "triton", "tensorrt"]
    for row in rows:
        assert row["available"] == bool(row["precisions"])
        assert row["available"] or row["reason"]


def test_info_json_without_ceilings_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ceilings", lambda: pytest.fail("measured"))
    assert "ceilings" not in json.loads(runner.invoke(cli.app, ["info", "--json"]).stdout)


def test_info_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ceilings", lambda: {"fp32": 123.4, "read": 45.6})
    facts = json.loads(runner.invoke(cli.app, ["info", "--ceilings", "--json"]).stdout)
    assert facts["ceilings"] == {"fp32": 123.4, "read": 45.6}
    shown = runner.invoke(cli.app, ["info", "--ceilings"]).stdout
    assert "123 GOP/s" in shown and "46 GB/s" in shown


def test_info_for_people() -> None:
    result = runner.invoke(cli.app, ["info"])
    assert result.exit_code == 0, result.output
    for text in ("xfast", "torch", "instruction set", "portable", "threads", "backend native", "fp32, bf16, int8"):
        assert text in result.stdout
    assert result.stderr == ""


def test_info_of_what_looks_like_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "triton", "available": False, "precisions": [], "reason": "no driver [/usr/lib]"}]
    monkeypatch.setattr(cli, "backends", lambda: rows)
    result = runner.invoke(cli.app, ["info"])
    assert result.exit_code == 0 and "no driver [/usr/lib]" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["demo", "--help"], ["info", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_unknown_command_and_option_exit_with_2() -> None:
    assert runner.invoke(cli.app, ["fly"]).exit_code == 2
    assert runner.invoke(cli.app, ["info", "--fly"]).exit_code == 2


def test_an_xfast_error_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XFAST_ISA", "nonsense")
    result = runner.invoke(cli.app, ["info", "--json"])
    assert result.exit_code == cli.BAD_INPUT == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: XFAST_ISA: ")
    assert "nonsense" in result.stderr and "portable" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_error_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise xfast.InvalidInputError("first [bold]line\n  second line " + "and more " * 30)

    monkeypatch.setattr(cli, "machine", fail)
    result = runner.invoke(cli.app, ["info"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: first [bold]line second line and more")
    assert result.stderr.count("\n") == 1


def test_other_exceptions_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "machine", fail)
    result = runner.invoke(cli.app, ["info"])
    assert isinstance(result.exception, RuntimeError)


def test_ctrl_c_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "machine", interrupt)
    result = runner.invoke(cli.app, ["info"])
    assert result.exit_code == cli.INTERRUPTED == 130
    assert result.stdout == ""
    assert result.stderr == "interrupted\n"


def test_python_dash_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xfast", "demo", "--batch-size", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: batch-size: 0 is not accepted; accepted: 1 to 4096\n"
