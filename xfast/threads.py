"""How many threads the CPU kernels use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xfast import _C
from xfast.errors import InvalidOptionError

_threads: int | None = None


def set_num_threads(threads: int | None) -> None:
    """Threads that xfast uses for one call, of every model; None (the default) follows ``torch.get_num_threads()``.

    Raises:
        InvalidOptionError: not an int from 1 to 256 (or None).
    """
    global _threads
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidOptionError(f"threads: expected a positive int or None, got {threads!r}")
    if threads is not None and threads > _C.max_threads:
        raise InvalidOptionError(f"threads: {threads} is not accepted; accepted: 1 to {_C.max_threads}")
    _threads = threads


def get_num_threads() -> int:
    """Threads that the next call will use."""
    return min(_threads or torch.get_num_threads(), _C.max_threads)


@contextmanager
def num_threads(threads: int | None) -> Iterator[None]:
    """xfast and PyTorch both use ``threads`` threads inside the block; None leaves them as they are.

    For the whole process, so for one thread at a time: blocks that overlap put back what each found.

    Raises:
        InvalidOptionError: not accepted.
    """
    if threads is None:
        yield
        return
    before, torchs = _threads, torch.get_num_threads()
    set_num_threads(threads)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(torchs)
        set_num_threads(before)
