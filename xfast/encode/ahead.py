"""Work done in a thread of its own while the caller computes, a bounded distance ahead of it or behind it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

_POLL = 0.1  # seconds after which a producer that nobody reads looks whether it is still wanted
_END = object()


@contextmanager
def ahead(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """``items`` made by a thread, at most ``depth`` of them waiting; its exception is raised where they are read.

    The thread has ended when the block has.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        waiting = True
        while waiting and not unwanted.is_set():
            with suppress(queue.Full):
                ready.put((item, error), timeout=_POLL)
                waiting = False

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if unwanted.is_set():
                    return
            put(_END)
        except BaseException as error:  # raised again by whoever reads
            put(_END, error)

    def read() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    thread = threading.Thread(target=produce, name="xfast-encode-tokenise")
    thread.start()
    try:
        yield read()
    finally:
        unwanted.set()
        thread.join()


class Behind:
    """Runs calls in order in a thread of its own, one waiting at most; without ``overlap`` at once, in the caller's.

    ``with Behind(True) as behind: behind(function)``; the block ends when all calls have, and raises what they raised.
    """

    def __init__(self, overlap: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "xfast-encode-write") if overlap else None
        self._last: Future[None] | None = None

    def __call__(self, call: Callable[[], None]) -> None:
        if self._pool is None:
            return call()
        self._wait()
        self._last = self._pool.submit(call)
        return None

    def _wait(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
