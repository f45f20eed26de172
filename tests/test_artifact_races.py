"""Several writers and readers of one folder: each gets a whole artifact, or is told; every interleaving is forced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, quick_settings, ragged

import xfast
from xfast import artifact, locks

_settings = pytest.fixture(autouse=True)(quick_settings)


def saved(folder: Path, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Saves a model there and returns what it gives."""
    model = xfast.accelerate(build(seed=seed, **changes), precision="int8", keep_weights=False)
    xfast.save(model, folder)
    hidden: torch.Tensor = model(**ragged())[0]
    return hidden


def once(patch: pytest.MonkeyPatch, owner: Any, name: str, first: Callable[[], object]) -> None:
    """Does something right before the next call of a function."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        patch.setattr(owner, name, real)
        first()
        return real(*args, **kwargs)

    patch.setattr(owner, name, call)


def test_a_lock_file_that_was_removed_meanwhile_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer has opened the first one's lock file when that ends and a third begins."""
    first, third = artifact.Staging(tmp_path / "it"), []

    def meanwhile() -> None:
        first.abandon()
        third.append(artifact.Staging(tmp_path / "it"))
        third[0].content("note.json", b"{}")

    once(monkeypatch, locks, "lock", meanwhile)
    with pytest.raises(xfast.ArtifactWriteError, match="another process is writing"):
        artifact.Staging(tmp_path / "it")
    assert (tmp_path / "it" / ".xfast-partial" / "note.json").exists()
    third[0].abandon()
    artifact.Staging(tmp_path / "it").abandon()
    assert not (tmp_path / "it").exists()


def test_a_lock_file_that_was_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once(monkeypatch, locks, "lock", artifact.Staging(tmp_path / "it").abandon)
    second = artifact.Staging(tmp_path / "it")
    with pytest.raises(xfast.ArtifactWriteError, match="another process is writing"):
        artifact.Staging(tmp_path / "it")
    second.abandon()


def test_a_staging_folder_that_goes_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdir finds it there, and then that it is no folder."""
    real = Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(Path, "mkdir", real)
        raise FileExistsError(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    artifact.Staging(tmp_path / "it").abandon()


def test_a_writer_that_comes_while_another_clears_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is saved, and the one who came can go on."""
    folder, came = tmp_path / "it", []
    saved(folder)
    once(monkeypatch, os, "rmdir", lambda: came.append(artifact.Staging(folder)))
    want = saved(folder, seed=1)
    assert torch.equal(xfast.load(folder)(**ragged())[0], want)
    came[0].content("note.json", b"{}")
    came[0].abandon()
    assert not (folder / ".xfast-partial").exists()


@pytest.mark.parametrize("other", ["same", "another size", "gone"])
@pytest.mark.parametrize("after", ["read_manifest", "tensors"])
def test_loading_while_another_artifact_is_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, other: str
) -> None:
    """Never the parts of two: by their sizes they may go together."""
    saved(tmp_path)
    owner: Any = artifact if after == "read_manifest" else artifact.Reader
    real, done = getattr(owner, after), []

    def read(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if not done:
            done.append(True)
            if other == "gone":
                (tmp_path / artifact.MANIFEST).unlink()
            else:
                saved(tmp_path, seed=1, **({} if other == "same" else {"vocab_size": 200}))
        return result

    monkeypatch.setattr(owner, after, read)
    with pytest.raises(xfast.ArtifactError, match="was replaced while it was read; load it again"):
        xfast.load(tmp_path, verify=False)
    assert done
    if other != "gone":
        assert xfast.load(tmp_path)(**ragged())[0].shape[-1] == 64


@pytest.mark.parametrize("change", [{"format": 99}, {"layout": "old"}], ids=str)
def test_an_artifact_of_another_version_is_replaced(tmp_path: Path, change: dict[str, Any]) -> None:
    """After an upgrade: what it lists goes, what it does not list stays."""
    saved(tmp_path, num_hidden_layers=3)
    path = tmp_path / artifact.MANIFEST
    content = {**json.loads(path.read_text()), **change}
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": artifact.digest(content)}))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(xfast.ArtifactError, match=r"format 99|layout"):
        xfast.load(tmp_path)
    want = saved(tmp_path, num_hidden_layers=2)
    assert torch.equal(xfast.load(tmp_path)(**ragged())[0], want)
    assert (tmp_path / "notes.txt").exists() and not (tmp_path / "layer-002.safetensors").exists()


@pytest.mark.parametrize("content", ["{}", '{"format": 2}', "no JSON", '{"format": 99, "sha256": "0"}', ""])
def test_a_file_that_is_only_called_like_a_manifest(tmp_path: Path, content: str) -> None:
    """Another program's, a damaged or a later one: what lies beside it would be replaced."""
    build().save_pretrained(tmp_path)
    (tmp_path / artifact.MANIFEST).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = xfast.accelerate(build(seed=1), precision="int8")
    with pytest.raises(xfast.ArtifactWriteError, match=r"xfast\.json is damaged or another program's; accepted"):
        xfast.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
