"""Files in a data folder, and folders that one process writes at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import TextIO

from xfast import locks
from xfast.errors import InvalidOptionError

LOCK = ".lock"


def find(folder: Path, relative: str) -> Path | None:
    """The file of that name in XTREME's download folder, or in a folder that holds it as ``xtreme/``; None: neither."""
    for path in (folder / "xtreme" / relative, folder / relative):
        if path.is_file():
            return path
    return None


class Lock:
    """Keeps a second process out of a folder: two would delete and overwrite each other's files.

    ``with Lock("output", folder) as lock`` takes it where the folder is there already, ``lock.make()`` makes the folder
    and takes it where it is not: what is refused in between leaves no folder. The system gives it back when the process
    ends, however it does.

    Args:
        argument: what names the folder, for messages.
        folder: the folder.
        name: of the lock's file in it; another name is another lock.
        wait: for the other process, which holds it for a moment only.

    Raises:
        InvalidOptionError: another process is at work there, or the folder cannot be written; names the argument.
    """

    def __init__(self, argument: str, folder: Path, name: str = LOCK, *, wait: bool = False) -> None:
        self.argument, self.folder, self.name, self.wait = argument, folder, name, wait
        self._file: TextIO | None = None

    def __enter__(self) -> Lock:
        if self.folder.is_dir():
            self.make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            locks.unlock(self._file)
            self._file.close()

    def make(self) -> None:
        """Make the folder; from here on it is this process's. Again: nothing happens."""
        if self._file is not None:
            return
        path = self.folder / self.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                file = opened.enter_context(path.open("a", encoding="utf-8"))
                if not locks.lock(file, wait=self.wait):
                    raise InvalidOptionError(
                        f"{self.argument}: another process is at work in {self.folder}; wait for it, or choose another "
                        "folder"
                    )
                opened.pop_all()
        except OSError as error:
            raise InvalidOptionError(f"{self.argument}: cannot write {path}: {error.strerror or error}") from None
        self._file = file
