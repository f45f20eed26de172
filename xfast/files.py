"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from xfast.errors import InvalidOptionError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; whoever reads meanwhile, or after a crash, sees the old file or the new one."""
    # The process's number: two that write the same file must not share what they have half written.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, like :func:`write_bytes`."""
    write_bytes(path, text.encode())


def require_place(argument: str, path: Path) -> None:
    """Asked before a long computation whose result :func:`save` is to write into a folder that is there.

    Raises:
        InvalidOptionError: no file can be written there; names the argument and the file.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.TemporaryFile(dir=path.absolute().parent):  # root may write where no file can be made
            pass
    except OSError as error:
        why = f": {error.strerror}" if error.strerror else ""
        raise InvalidOptionError(
            f"{argument}: {path}{why}; accepted: a file's name in a folder that is there"
        ) from None


def save(argument: str, path: Path, content: bytes) -> None:
    """Write a file that a user asked for, and the folders it lies in; like :func:`write_bytes`.

    Raises:
        InvalidOptionError: it cannot be written; names the argument and the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise InvalidOptionError(f"{argument}: cannot write {path}: {error.strerror or error}") from None
