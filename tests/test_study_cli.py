"""The commands: run, report, profile, and what they say about bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import study_processes as processes
from typer.testing import CliRunner

from xfast.cli import BAD_INPUT, app
from xfast.study import document, store
from xfast.study.profiles import load_profiles

_forked = pytest.fixture(scope="module", autouse=True)(processes.forked)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def test_a_study_from_the_command_line_to_its_report(tmp_path: Path) -> None:
    options = ("--sizes", "tiny", "--engines", "native:int8", "--languages", "sw,en", "--samples", 2)
    options += ("--responses", 1, "--rounds", 1, "--no-probes", "--threads", 1)
    found = invoke("run", tmp_path, *options)
    assert found.exit_code == 0, found.output
    assert "2 languages" in found.stderr and "4 visits" in found.stderr
    assert f"report: {tmp_path / 'index.html'}" in found.stdout.replace("\n", "")
    study = document.load(tmp_path / "study.json")
    assert study["settings"]["languages"] == ["sw", "en"]
    assert "Swahili" in (tmp_path / "index.html").read_text(encoding="utf-8")

    assert "nothing to continue" not in found.stderr
    refused = invoke("run", tmp_path, *options)
    assert refused.exit_code == BAD_INPUT and "--resume" in refused.stderr
    assert invoke("run", tmp_path, *options, "--resume").exit_code == 0

    new = invoke("run", tmp_path / "new", *options, "--resume")
    assert new.exit_code == 0 and "nothing to continue" in new.stderr

    # A run that was stopped in the middle of a line has a report too.
    path = tmp_path / store.NAME
    kept = [line for line in path.read_bytes().split(b"\n") if b'"ended"' not in line]
    path.write_bytes(b"\n".join(kept)[:-9])
    (tmp_path / "index.html").unlink()
    again = invoke("report", tmp_path)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "index.html").is_file()
    assert document.load(tmp_path / "study.json")["created"] == "unfinished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "huge"], "size: 'huge'"),
        (["--engines", "int8"], "engine: 'int8'"),
        (["--tasks", "glue"], "task: 'glue'"),
        (["--languages", "xx"], "language: 'xx'"),
        (["--languages", "my", "--tasks", "xnli"], "no data for xnli in my"),
        (["--batch-sizes", "16,x"], "batch-sizes: '16,x'"),
        (["--baseline", "/nowhere"], "/nowhere is no folder"),
        (["--baseline", "/tmp", "--sizes", "large"], "a size of their own"),
        (["--baseline", "/tmp", "--sizes", "base"], "sizes: 'base' is not accepted with checkpoints"),
        (["--data", "/nowhere"], "data: /nowhere is no folder"),
        (["--profiles", "/nowhere.json"], "profiles: /nowhere.json: cannot be read: No such file"),
        (["--profiles", "p.json", "--data", "d"], "profiles: not accepted with data"),
        (["--margin", "2"], "margin: 2.0"),
        (["--quick", "--rounds", "5"], "sets --rounds itself"),
        (["--quick", "--batch-sizes", "8"], "sets --batch-sizes itself"),
        (["--languages", ""], "languages: at least one"),
        (["--engines", "native:fp32,native:fp32"], "engines: native:fp32 given more than once"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str, monkeypatch: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = invoke("run", tmp_path / "out", *arguments)
    assert found.exit_code == BAD_INPUT, found.output
    assert message in found.stderr
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    found = invoke("report", tmp_path)
    assert found.exit_code == BAD_INPUT and "observations.jsonl" in found.stderr
    (tmp_path / store.NAME).write_text('{"kind": "study", "format": 1}\n')
    found = invoke("report", tmp_path)
    assert found.exit_code == BAD_INPUT and "no settings" in found.stderr


def test_profile_measures_a_folder(tmp_path: Path, data_dir: Path) -> None:
    folder = tmp_path / "xtreme" / "tatoeba"
    folder.mkdir(parents=True)
    (folder / "sw-en.sw").write_bytes((data_dir / "xtreme" / "tatoeba" / "sw-en.sw").read_bytes())
    out = tmp_path / "profiles.json"
    found = invoke("profile", tmp_path, "--tokenizer", data_dir / "tokenizer" / "xlmr", "--output", out)
    assert found.exit_code == 0, found.output
    shipped = [one for one in load_profiles() if (one.task, one.language) == ("tatoeba", "sw")]
    assert load_profiles(out) == shipped
    assert "text" not in json.loads(out.read_text())
    refused = invoke("profile", tmp_path, "--output", out)
    assert refused.exit_code == BAD_INPUT and "no folder" in refused.stderr
