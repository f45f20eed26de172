"""Paths that the system refuses to look at: closed folders and names that are too long are an error in plain words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stilts
from models import build, quick_settings
from typer.testing import CliRunner

import xfast
from xfast import export
from xfast.cli import app
from xfast.convert import convert
from xfast.encode import source
from xfast.encode.settings import Settings

base = pytest.fixture(scope="module")(stilts.base)
quick = pytest.fixture(autouse=True)(quick_settings)


@pytest.fixture(params=["closed", "too long"])
def refused(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "too long":
        return tmp_path / ("x" * 300)
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> Any:  # root may look into any folder
        if "closed" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    return tmp_path / "closed" / "folder"


CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "encode's input": lambda path, _: source.find(str(path), Path("out")),
    "encode's model": lambda path, _: Settings(model=str(path)),
    "encode's tokenizer": lambda path, base: Settings(model=str(base), tokenizer=str(path)),
    "convert's model": lambda path, base: convert(str(path), base.parent / "artifact"),
    "convert's folder": lambda path, base: convert(str(base), path, architecture="XLMRobertaModel"),
    "the exported file": lambda path, _: export.check_free(path, force=True),
    "load": lambda path, _: xfast.load(path),
    "save": lambda path, _: xfast.save(xfast.accelerate(build(), precision="fp32"), path),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_the_system_refuses_is_named(call: str, refused: Path, base: Path) -> None:
    kind = {"load": xfast.ArtifactError, "convert's folder": xfast.ArtifactWriteError, "save": xfast.ArtifactWriteError}
    with pytest.raises(kind.get(call, xfast.DataFileError), match=r"(Permission denied|File name too long)") as caught:
        CALLS[call](refused, base)
    assert str(refused) in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "PATH", "OUT", "--model", "BASE"),
        ("encode", "BASE", "OUT", "--model", "PATH"),
        ("convert", "PATH", "OUT"),
        ("convert", "BASE", "PATH", "--architecture", "XLMRobertaModel"),
        ("convert", "PATH", "--check"),
        ("engine", "inspect", "PATH"),
        ("export", "onnx", "BASE", "PATH"),
    ],
)
def test_commands_end_in_one_line(arguments: tuple[str, ...], refused: Path, base: Path, tmp_path: Path) -> None:
    if arguments[0] == "export":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    names = {"PATH": str(refused), "BASE": str(base), "OUT": str(tmp_path / "out")}
    ended = CliRunner().invoke(app, [names.get(part, part) for part in arguments])
    assert ended.exit_code == 2 and isinstance(ended.exception, SystemExit), ended.exception
    assert ended.stderr.startswith("error: ") and str(refused) in ended.stderr
