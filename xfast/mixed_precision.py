"""The search for the smallest assignment of formats to products whose error is within a tolerance."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from xfast.calibration import Product
from xfast.errors import BackendUnavailableError
from xfast.quantization_reports import Measured
from xfast.recipe import LinearFormat
from xfast.trials import Trials


@dataclass(frozen=True)
class Rung:
    """One way to hold a product: the error of the encoder's output that it causes alone."""

    chosen: LinearFormat
    error: float
    bytes: int


Ladders = dict[Product, list[Rung]]
"""Of every product the formats to choose from, in one order for all."""


def climb(ladders: Ladders, trials: Trials, formats: Mapping[Product, LinearFormat]) -> None:
    """Packs a format of every product, measures each alone, and appends it to the ladders."""
    trials.pack(formats)
    for key, chosen in formats.items():
        error = trials.error({key: chosen})
        ladders.setdefault(key, []).append(Rung(chosen, error, trials.bytes({key: chosen})))


def cheapest(
    trials: Trials, ladders: Ladders, tolerance: float
) -> tuple[dict[Product, Rung], dict[str, Measured], Measured]:
    """The smallest assignment that is measured to be within ``tolerance``, all uniform ones, and its own figures.

    Candidates are the uniform assignments and those on the way up the ladders.
    """
    names = [rung.chosen.precision for rung in next(iter(ladders.values()), [])]
    same = [{key: rungs[i] for key, rungs in ladders.items()} for i in range(len(names))]
    uniform = [trials.measure(formats_of(each)) for each in same]
    path = _path(ladders)
    measured = functools.cache(lambda step: trials.measure(formats_of(path[step])))
    # Errors fall along the path, nearly always. Whatever is taken was measured itself.
    step = bisect.bisect_left(range(len(path)), True, key=lambda i: measured(i).error <= tolerance)
    step = min(step, len(path) - 1)
    tried = [*zip(same, uniform, strict=True), (path[step], measured(step))]
    within = [each for each in tried if each[1].error <= tolerance]
    if not within:
        least = min(m.error for _, m in tried)
        exact = trials.plain.precision
        remedy = "" if exact in names else f", or add {exact} to precisions"
        raise BackendUnavailableError(
            f"tolerance: no choice of {', '.join(names)} stays within {tolerance:g} on the calibration batches; the "
            f"least error was {least:.2e}; raise it{remedy}"
        )
    chosen, result = min(within, key=lambda each: each[1].bytes)
    return chosen, dict(zip(names, uniform, strict=True)), result


def _path(ladders: Ladders) -> list[dict[Product, Rung]]:
    """Assignments from the smallest to the most exact, one product more exact in each.

    The next is the one that removes most squared error per byte: errors of different products add up like
    independent noise.
    """
    climbable = {key: _climbable(rungs) for key, rungs in ladders.items()}
    path = [{key: rungs[0] for key, rungs in climbable.items()}]
    while True:
        now, steps = path[-1], []
        for key, rungs in climbable.items():
            for rung in rungs[rungs.index(now[key]) + 1 :]:
                gain = (now[key].error ** 2 - rung.error**2) / (rung.bytes - now[key].bytes)
                steps.append((gain, key, rung))
        if not steps:
            return path
        _, key, rung = max(steps, key=lambda step: step[0])
        path.append({**now, key: rung})


def _climbable(rungs: list[Rung]) -> list[Rung]:
    """From small to large, without those that are larger but not more exact."""
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.bytes, rung.error)):
        if not kept or rung.error < kept[-1].error:
            kept.append(rung)
    return kept


def formats_of(assignment: dict[Product, Rung]) -> dict[Product, LinearFormat]:
    return {key: rung.chosen for key, rung in assignment.items()}
