"""Locks between processes and between threads: one process at a time in a folder, one thread at a time in a block.

The system gives a folder's lock back when its process ends, however it does (and the processes that it has forked
meanwhile, which share its open files; a lock that is given up is theirs no more).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from typing import IO, Any

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems without locks say (Lustre, some NFS): better to work there unguarded than not at all."""


def lock(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Takes a file's lock for as long as the file is open. False: another process has it; with ``wait``, never.

    Raises:
        OSError: the system refuses for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


def unlock(file: IO[Any] | int) -> None:
    """Gives a lock up, for forked processes that still have the file open, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


class ThreadLock:
    """A lock between threads that a forked child finds open: whoever held it is not there to open it.

    ``with lock.held(): ...``; the same thread may hold it twice. What it guards must be whole whenever a fork may come:
    built aside, and put in place at the end.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _thread_locks.add(self)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Waits for its turn."""
        lock = self._lock  # of this process: a fork within the block replaces the other
        with lock:
            yield

    def renew(self) -> None:
        """In a child that was forked."""
        self._lock = threading.RLock()


_thread_locks: weakref.WeakSet[ThreadLock] = weakref.WeakSet()


def _renew() -> None:
    for lock in list(_thread_locks):
        lock.renew()


os.register_at_fork(after_in_child=_renew)
