"""Timing on a GPU: CUDA events, alternating between what is compared, medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 3
L2_FLUSH_BYTES = 256 * 2**20
_AWAKE_CYCLES = 100_000_000
"""The device spins this long (some 50 ms) before it is timed: it slows down while kernels are compiled."""
_SPIN_CYCLES = 1_000_000
"""The device spins this long before each timed call, so that the host is ahead and its launches are not measured."""


def age() -> float:
    """Seconds since this process began: importing torch on a cold machine is a part of a battery's time."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    # In a sandbox the two may count from different moments, which must not cost the battery its time
    return min(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began), 60.0)


class Clock:
    """Says how much of the battery's time is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def alternate(functions: Mapping[str, Callable[[], object]], rounds: int = 15, cold: bool = False) -> dict[str, float]:
    """Median milliseconds of each function, asked in turn ``rounds`` times after ``WARM_UPS`` each.

    ``cold`` fills the L2 cache with other data before every call: for kernels whose operands would not be there in a
    model. The data are read: written ones would have to go to memory while the kernel is timed.
    """
    for function in functions.values():
        for _ in range(WARM_UPS):
            function()
    torch.cuda.synchronize()
    flush = torch.zeros(L2_FLUSH_BYTES // 4, device="cuda") if cold else None
    torch.cuda._sleep(_AWAKE_CYCLES)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(rounds):
        for name in names if index % 2 == 0 else names[::-1]:
            if flush is not None:
                flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_SPIN_CYCLES)
            begin.record()
            functions[name]()
            end.record()
            pairs[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(b.elapsed_time(e) for b, e in pairs[name]) for name in functions}


class DeviceLost(RuntimeError):
    """A fault has ended the process's GPU context: whatever ran next would be blamed for it."""


def that_run(
    functions: Mapping[str, Callable[[], T]], calls: int = 4
) -> tuple[dict[str, Callable[[], T]], dict[str, str]]:
    """Those functions that run (``calls`` times: graphs are captured when a shape comes again), and why others do not.

    Raises:
        DeviceLost: after one of them nothing runs any more; names it.
    """
    good, failed = {}, {}
    for name, function in functions.items():
        try:
            for _ in range(calls):
                function()
            torch.cuda.synchronize()
            good[name] = function
        except Exception as error:  # noqa: PERF203
            failed[name] = said(error)
            _raise_if_lost(str(failed), error)
    return good, failed


def said(error: Exception) -> str:
    """An error in a report's words."""
    return f"{type(error).__name__}: {error}"[:1000]


def _raise_if_lost(what: str, error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise DeviceLost(what) from error


def attempt(about: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A report's row: what it is about, and what was measured, or why that failed; the rows that follow are not lost.

    Raises:
        DeviceLost: nothing runs any more.
    """
    try:
        return {**about, **measure()}
    except DeviceLost:
        raise
    except Exception as error:
        _raise_if_lost(f"{about}: {said(error)}", error)
        return {**about, "failed": {"the row": said(error)}}


def measured(
    functions: Mapping[str, Callable[[], object]], rounds: int = 15, cold: bool = False
) -> tuple[dict[str, float], dict[str, Any]]:
    """:func:`alternate` of those that run, and for the row of a report ``{"failed": why}`` where others do not."""
    good, failed = that_run(functions, calls=1)
    return alternate(good, rounds, cold), {"failed": failed} if failed else {}


def wall(function: Callable[[], object], rounds: int = 50) -> list[float]:
    """Milliseconds from call to result on the host, sorted: latency as a user sees it."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)
