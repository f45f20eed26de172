"""Timing one cell: batches or single responses through each arm, with the energy that the machine reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xfast.benchmarks.workloads import Batch
from xfast.errors import InvalidInputError
from xfast.study import arms

_TICKS = 1000
"""A timed stretch must be this many times the clock's resolution, so that reading the clock adds at most 0.1 %."""

_RAPL = Path("/sys/class/powercap")


class Runner:
    """One arm: runs batches and waits for the device."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model = model
        self.device = torch.device(device)
        self._sequences = not arms.has_head(model)

    def __call__(self, batch: Batch) -> Any:
        """The model's output, ready."""
        ids, mask = batch
        if self._sequences:  # a bare encoder reads [sequences, length], not [examples, choices, length]
            ids, mask = (tensor.view(-1, tensor.shape[-1]) for tensor in batch)
        with torch.inference_mode():
            output = self.model(input_ids=ids, attention_mask=mask)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output


def seconds_of(run: Callable[[Batch], Any], batches: Sequence[Batch]) -> list[float]:
    """Seconds of each batch.

    Raises:
        InvalidInputError: the clock is too coarse for the shortest of them.
    """
    found = []
    for batch in batches:
        start = time.perf_counter()
        run(batch)
        found.append(time.perf_counter() - start)
    resolution = time.get_clock_info("perf_counter").resolution
    if min(found) < _TICKS * resolution:
        raise InvalidInputError(
            f"clock: a batch took {min(found):.2g} s and the clock's resolution is {resolution:.2g} s, too coarse; "
            "give more samples or larger batches"
        )
    return found


class Energy:
    """Joules of the whole machine (RAPL's packages) or GPU (NVML) between two readings; None where unreadable."""

    def __init__(self, device: str) -> None:
        self._zones = [] if device == "cuda" else _rapl_zones()
        self._gpu = _nvml() if device == "cuda" else None
        self._tick: float | None = None

    @property
    def source(self) -> str | None:
        """Where the figures come from."""
        return "RAPL" if self._zones else "NVML" if self._gpu else None

    def ticks(self, seconds: float) -> float | None:
        """How often the counters are brought up to date in so many seconds; None: not once in a second, or unreadable.

        From package to package and card to card that is every millisecond to every tenth of a second.
        """
        if self._tick is None:
            self._tick = _tick(self.read)
        return seconds / self._tick if math.isfinite(self._tick) else None

    def read(self) -> list[float] | None:
        """Counters in joules, to give to :meth:`since`."""
        if self._gpu is not None:
            return [self._gpu()]
        if not self._zones:
            return None
        return [_number(zone / "energy_uj") * 1e-6 for zone in self._zones]

    def since(self, before: list[float] | None) -> float | None:
        """Joules since ``before``, counters that wrapped around allowed for."""
        after = self.read()
        if before is None or after is None:
            return None
        total = 0.0
        for index, (first, last) in enumerate(zip(before, after, strict=True)):
            wrapped = last < first and bool(self._zones)
            total += last - first + (_number(self._zones[index] / "max_energy_range_uj") * 1e-6 if wrapped else 0.0)
        return total


def _tick(read: Callable[[], list[float] | None]) -> float:
    """Seconds between two changes of a counter; infinity where that takes longer than a second."""
    changes: list[float] = []
    begin, last = time.perf_counter(), read()
    while last is not None and (now := time.perf_counter()) < begin + 1:
        if (found := read()) != last:
            last = found
            changes.append(now)
        if len(changes) == 2:
            return changes[1] - changes[0]
    return math.inf


def _rapl_zones() -> list[Path]:
    """The packages whose counters this user may read.

    Nothing else: sub-zones (cores, memory) are parts of their package, and the zone ``psys`` has the packages in it.
    """
    return [zone for zone in sorted(_RAPL.glob("intel-rapl:*")) if _readable_package(zone)]


def _readable_package(zone: Path) -> bool:
    try:
        _number(zone / "energy_uj")
        return (zone / "name").read_text().startswith("package")
    except (OSError, ValueError):
        return False


def _number(path: Path) -> float:
    return float(path.read_text())


def _nvml() -> Callable[[], float] | None:
    """Joules that the current GPU has used since the driver was loaded."""
    try:
        import pynvml

        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, a GPU older than Volta: there is no figure then
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3
