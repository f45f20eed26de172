"""The study's statistics: intervals, equivalence, the repetitions a margin needs, and where time goes. Pure functions.

A *pair* is one visit to a cell: both arms on the same token ids, in turns. What is compared is log(time of the arm /
time of the baseline). The median over a cell's rounds is robust against the machine's hiccups; the mean over cells
weighs an effect that only some cells have by their share. Rounds of one cell are not independent (each arm's copy lies
where it lies in memory), so cells are what is counted, not pairs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.study.document import DIFFERENT, EQUIVALENT, UNDECIDED

Floats = npt.NDArray[np.float64]

ALPHA = 0.05
"""Level of every test."""

POWER = 0.9
"""What ``units_needed`` plans for."""

MIN_UNITS = 3
"""Cells (or pairs of a single cell) that a test needs."""

MAX_UNITS = 100_000
"""No study has more."""

MIN_CELLS = 3
"""Languages that a model of time needs."""

MIN_EXPLAINED = 6
"""Languages below which no share of their differences is told."""

_MIN_ORDERED = 6


@dataclass(frozen=True)
class Comparison:
    """A ratio of times with what can be said of it; see :func:`compare`.

    ``cells_needed`` or ``pairs_needed``, whichever were the units, is how many of them would find equal arms
    equivalent with a probability of 0.9; None where they are found so, where there are as many, where no number would
    do, and for the other.
    """

    ratio: float
    interval90: tuple[float, float]
    interval95: tuple[float, float]
    p_value: float
    verdict: str
    pairs: int
    cells: int
    pairs_needed: int | None
    cells_needed: int | None


def compare(cells: Sequence[Floats], margin: float) -> Comparison:
    """Two one-sided t-tests (Schuirmann 1987): is the mean ratio of times within 1 / (1 + margin) .. 1 + margin?

    Args:
        cells: for each cell the log ratios of its rounds, see :func:`log_ratios`. With fewer than ``MIN_UNITS`` cells
            the rounds are the units: what is said then holds for these cells as they lie in memory.
        margin: of equivalence, such as 0.02.

    Returns:
        The verdict is "equivalent" when both tests reject at 5 % (the 90 % interval lies inside the margin), else
        "different" when the 95 % interval excludes 1, else "undecided". ``p_value`` is the larger of the two tests'.

    Raises:
        InvalidInputError: fewer than ``MIN_UNITS`` rounds in all.
        InvalidOptionError: a margin outside (0, 1).
    """
    bound = _bound(margin)
    filled = [rounds for rounds in cells if len(rounds)]
    pairs = sum(map(len, filled))
    units = np.asarray([np.median(rounds) for rounds in filled], np.float64)
    by_cells = len(units) >= MIN_UNITS
    if not by_cells:
        units = np.concatenate([*filled, np.empty(0)])
    if len(units) < MIN_UNITS:
        raise InvalidInputError(f"pairs: at least {MIN_UNITS} are needed to test equivalence, got {len(units)}")
    centre, error, degrees = float(units.mean()), float(stats.sem(units)), len(units) - 1
    low90, high90 = _interval(centre, error, degrees, 0.90)
    low95, high95 = _interval(centre, error, degrees, 0.95)
    p_value = _p_value(centre, error, degrees, bound)
    if p_value <= ALPHA:
        verdict = EQUIVALENT
    elif low95 > 0 or high95 < 0:
        verdict = DIFFERENT
    else:
        verdict = UNDECIDED
    # More rounds of a cell are no more units where cells are.
    needed = units_needed(float(units.std(ddof=1)), margin)
    lacking = needed if needed is not None and needed > len(units) and verdict != EQUIVALENT else None
    return Comparison(
        ratio=math.exp(centre),
        interval90=(math.exp(low90), math.exp(high90)),
        interval95=(math.exp(low95), math.exp(high95)),
        p_value=p_value,
        verdict=verdict,
        pairs=pairs,
        cells=len(filled),
        pairs_needed=None if by_cells else lacking,
        cells_needed=lacking if by_cells else None,
    )


def log_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Floats:
    """log(numerator / denominator), pair by pair.

    Raises:
        InvalidInputError: unequal numbers, or times that are not positive and finite.
    """
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if above.shape != below.shape or above.ndim != 1:
        raise InvalidInputError(f"pairs: {above.size} and {below.size} times; as many of each are needed")
    both = np.concatenate([above, below])
    if not np.all(np.isfinite(both) & (both > 0)):
        raise InvalidInputError("pairs: a time is zero, negative or not finite: the clock is too coarse for this work")
    return np.log(above / below)


def _interval(centre: float, error: float, degrees: int, confidence: float) -> tuple[float, float]:
    half = float(stats.t.ppf(0.5 + confidence / 2, degrees)) * error
    return centre - half, centre + half


def _p_value(centre: float, error: float, degrees: int, bound: float) -> float:
    if error == 0:
        return 0.0 if abs(centre) < bound else 1.0
    return float(stats.t.sf((bound - abs(centre)) / error, degrees))


def _bound(margin: float) -> float:
    if not 0 < margin < 1:
        raise InvalidOptionError(f"margin: {margin}; accepted: between 0 and 1, such as 0.02")
    return math.log1p(margin)


def units_needed(deviation: float, margin: float) -> int | None:
    """Units with which two one-sided t-tests at 5 % find two equal arms equivalent with a probability of ``POWER``.

    The least n with 2 T(bound / error - t_crit) - 1 >= ``POWER``, T being Student's distribution with n - 1 degrees of
    freedom and error = deviation / sqrt(n) (Chow, Shao & Wang 2008, 3.3).

    Args:
        deviation: standard deviation of the units' log ratios.
        margin: of equivalence.

    Returns:
        At least ``MIN_UNITS``; None where it would be more than ``MAX_UNITS``.
    """
    bound = _bound(margin)

    def reached(units: int) -> float:
        if deviation == 0:
            return 1.0
        limit = bound * math.sqrt(units) / deviation - float(stats.t.ppf(1 - ALPHA, units - 1))
        return 2 * float(stats.t.cdf(limit, units - 1)) - 1

    if not math.isfinite(deviation) or reached(MAX_UNITS) < POWER:
        return None
    return MIN_UNITS + bisect.bisect_left(range(MIN_UNITS, MAX_UNITS), POWER, key=reached)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the middle of positive values.

    Order statistics of the median from 6 values on (the narrowest pair that covers at least 95 %, whatever the noise),
    Student's interval of the mean logarithm below, of which no two values cover a median so often. A bootstrap of the
    median would be narrower and cover 90 to 95 %.

    One value gives (value, value): there is nothing to judge it by, and tables show no interval.
    """
    if len(values) < 2:
        return values[0], values[0]
    if len(values) >= _MIN_ORDERED:
        found = stats.quantile_test(values).confidence_interval(0.95)
        return float(found.low), float(found.high)
    logs = np.log(np.asarray(values, np.float64))
    low, high = _interval(float(logs.mean()), float(stats.sem(logs)), len(logs) - 1, 0.95)
    return math.exp(low), math.exp(high)


@dataclass(frozen=True)
class TimeModel:
    """seconds = per_token * tokens + per_sequence * sequences; ``r2`` of the logarithms."""

    per_token: float
    per_sequence: float
    r2: float

    def __call__(self, tokens: Floats, sequences: Floats) -> Floats:
        return self.per_token * tokens + self.per_sequence * sequences


def time_model(seconds: Sequence[float], tokens: Sequence[float], sequences: Sequence[float]) -> TimeModel:
    """Least squares of relative errors with coefficients that cannot be negative.

    Raises:
        InvalidInputError: fewer than three cells.
    """
    if len(seconds) < MIN_CELLS:
        raise InvalidInputError(f"cells: at least {MIN_CELLS} are needed to model time, got {len(seconds)}")
    target = np.asarray(seconds, np.float64)
    inputs = np.stack([np.asarray(tokens, np.float64), np.asarray(sequences, np.float64)], axis=1)
    found, _ = optimize.nnls(inputs / target[:, None], np.ones(len(target)))
    predicted = inputs @ found
    return TimeModel(float(found[0]), float(found[1]), _r2(np.log(target), np.log(np.maximum(predicted, 1e-300))))


def explained(target: Sequence[float], causes: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Share of the variance of ``target`` between languages that each cause explains alone, and all do together.

    Adjusted R² of linear least squares with a constant, 0 to 1: what chance alone explains is taken off. Causes that do
    not vary explain nothing. Empty with fewer than ``MIN_EXPLAINED`` languages, of which chance explains anything.
    """
    values = np.asarray(target, np.float64)
    if len(values) < max(MIN_EXPLAINED, len(causes) + 3) or not np.ptp(values):
        return {}
    columns = {name: np.asarray(cause, np.float64) for name, cause in causes.items()}
    shares = {name: _fit(values, [column]) for name, column in columns.items()}
    if len(columns) > 1:
        shares[" + ".join(columns)] = _fit(values, list(columns.values()))
    return shares


def _fit(values: Floats, columns: Sequence[Floats]) -> float:
    design = np.stack([np.ones(len(values)), *columns], axis=1)
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    left = 1.0 - _r2(values, design @ found)
    return max(0.0, 1.0 - left * (len(values) - 1) / (len(values) - design.shape[1]))


def _r2(values: Floats, predicted: Floats) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    return 1.0 - float(((values - predicted) ** 2).sum()) / total if total else 0.0


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, accuracy) points no other one beats: nobody is as accurate at less cost, or better at the same."""
    return [
        not any((cost <= mine and score >= my_score) and (cost < mine or score > my_score) for cost, score in points)
        for mine, my_score in points
    ]
