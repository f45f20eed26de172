"""Checkpoints of a training run: which one is whole, and what to say when one cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from xfast.errors import XfastError

COMPLETE = "complete.json"
"""Written last into a checkpoint: a run that was killed while saving continues from the one before."""

UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""What the system says when a file cannot be written."""


class CheckpointError(XfastError, RuntimeError):
    """A checkpoint could not be written (a full disk, for instance); the earlier ones are untouched."""


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a checkpoint but its mark."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


class MarkComplete(transformers.TrainerCallback):
    """Writes the mark when every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a part: its random state, its shards
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            content = {"step": state.global_step, "files": _sizes(folder)}
            (folder / COMPLETE).write_text(json.dumps(content), encoding="utf-8")


@contextlib.contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turns what a full disk and the like raise into :class:`CheckpointError`, with the checkpoint to continue from."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in UNWRITABLE
        # safetensors and torch have their own types for what the system said
        if not full and not any(words in str(error) for words in ("No space left", "File too large", "PytorchStream")):
            raise
        last = last_complete(folder)
        state = f"continue from {last} with the same command" if last else "no complete checkpoint yet"
        raise CheckpointError(f"{folder}: {error}; {state}") from error


def last_complete(folder: Path) -> str | None:
    """The newest checkpoint that was written whole and still is."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}") if _is_whole(path)]
    return str(max(found, key=lambda path: int(path.name.split("-")[-1]))) if found else None


def _is_whole(mark: Path) -> bool:
    """Whether a marked checkpoint still has its files: a run may have died while it removed an old one."""
    try:
        files = json.loads(mark.read_text(encoding="utf-8")).get("files", {})
        return all((mark.parent / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False
