"""One process at a time in a folder. The system gives a lock back when its process ends, however it does.

(And the processes that it has forked meanwhile, which share its open files; a lock that is given up is theirs no more.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
from typing import IO, Any

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems without locks say (Lustre, some NFS): better to work there unguarded than not at all."""


def lock(file: IO[Any] | int) -> bool:
    """Takes a file's lock for as long as the file is open. False: another process has it.

    Raises:
        OSError: the system refuses for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
