"""The study's statistics: intervals, equivalence, the repetitions a margin needs, and where time goes. Pure functions.

A *pair* is one visit to a cell: both arms on the same token ids, one after the other, in random order. What is compared
is log(time of the arm / time of the baseline), whose 20 % trimmed mean is robust against the machine's hiccups and has
a t-interval of its own (Yuen 1974, on winsorised variances; ``scipy.stats.mstats.trimmed_mean_ci``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.study.document import DIFFERENT, EQUIVALENT, UNDECIDED

Floats = npt.NDArray[np.float64]

ALPHA = 0.05
"""Level of every test."""

POWER = 0.9
"""What ``pairs_needed`` plans for."""

TRIM = 0.2
"""Share of the pairs left out at each end."""

MIN_PAIRS = 5
"""Fewer say nothing: one of them would be trimmed away at each end, three would remain."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """A ratio of times with what can be said of it; see :func:`compare`."""

    ratio: float
    interval90: tuple[float, float]
    interval95: tuple[float, float]
    p_value: float
    verdict: str
    pairs: int
    pairs_needed: int | None


def compare(numerator: Sequence[float], denominator: Sequence[float], margin: float) -> Comparison:
    """Two one-sided tests (Schuirmann 1987) of paired times: is their ratio within 1 / (1 + margin) .. 1 + margin?

    Args:
        numerator, denominator: seconds of the two arms, pair by pair.
        margin: of equivalence, such as 0.02.

    Returns:
        The verdict is "equivalent" when both tests reject at 5 % (the 90 % interval lies inside the margin), else
        "different" when the 95 % interval excludes 1, else "undecided". ``p_value`` is the larger of the two tests'.

    Raises:
        InvalidInputError: fewer than ``MIN_PAIRS`` pairs, unequal numbers, times that are not positive and finite.
        InvalidOptionError: a margin outside (0, 1).
    """
    logs = log_ratios(numerator, denominator)
    bound = _bound(margin)
    if len(logs) < MIN_PAIRS:
        raise InvalidInputError(f"pairs: at least {MIN_PAIRS} are needed to test equivalence, got {len(logs)}")
    centre, error, degrees = trimmed(logs)
    low90, high90 = _interval(centre, error, degrees, 0.90)
    low95, high95 = _interval(centre, error, degrees, 0.95)
    p_value = _p_value(centre, error, degrees, bound)
    if p_value <= ALPHA:
        verdict = EQUIVALENT
    elif low95 > 0 or high95 < 0:
        verdict = DIFFERENT
    else:
        verdict = UNDECIDED
    return Comparison(
        ratio=math.exp(centre),
        interval90=(math.exp(low90), math.exp(high90)),
        interval95=(math.exp(low95), math.exp(high95)),
        p_value=p_value,
        verdict=verdict,
        pairs=len(logs),
        pairs_needed=pairs_needed(error * math.sqrt(len(logs)), margin),
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


def trimmed(values: Floats) -> tuple[float, float, int]:
    """The 20 % trimmed mean, its standard error on winsorised values, and the degrees of freedom (Yuen 1974)."""
    cut = int(TRIM * len(values))
    kept = len(values) - 2 * cut
    centre = float(stats.trim_mean(values, TRIM))
    error = float(stats.mstats.trimmed_stde(values, limits=(TRIM, TRIM), inclusive=(True, True)))
    return centre, error, kept - 1


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


def pairs_needed(deviation: float, margin: float, power: float = POWER) -> int | None:
    """Pairs with which two one-sided tests at 5 % find two equal arms equivalent with this probability.

    Normal approximation (Chow, Shao & Wang 2008, 3.3): n = ((z_{1-alpha} + z_{1-(1-power)/2}) deviation / bound)^2.

    Args:
        deviation: of one log ratio: the standard error of their trimmed mean, times the root of their number.
        margin: of equivalence.
        power: wanted probability.

    Returns:
        At least ``MIN_PAIRS``; None where the deviation is not finite.
    """
    if not math.isfinite(deviation):
        return None
    z = float(stats.norm.ppf(1 - ALPHA) + stats.norm.ppf(1 - (1 - power) / 2))
    return max(MIN_PAIRS, math.ceil((z * deviation / _bound(margin)) ** 2))


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median (percentile method; BCa is undefined for medians of few values)."""
    if len(values) < 2:
        return values[0], values[0]
    found = stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.median,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ratio_interval(logs: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Median of exp(log ratios) and its 95 % bootstrap interval: for a single cell, whose pairs are few."""
    low, high = median_interval(logs.tolist(), seed)
    return math.exp(float(np.median(logs))), math.exp(low), math.exp(high)


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
    if len(seconds) < 3:
        raise InvalidInputError(f"cells: at least 3 are needed to model time, got {len(seconds)}")
    target = np.asarray(seconds, np.float64)
    inputs = np.stack([np.asarray(tokens, np.float64), np.asarray(sequences, np.float64)], axis=1)
    found, _ = optimize.nnls(inputs / target[:, None], np.ones(len(target)))
    predicted = inputs @ found
    return TimeModel(float(found[0]), float(found[1]), _r2(np.log(target), np.log(np.maximum(predicted, 1e-300))))


def explained(target: Sequence[float], causes: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Share of the variance of ``target`` between languages that each cause explains alone, and all do together.

    Linear least squares with a constant; 0 to 1. Causes that do not vary explain nothing. Empty with fewer than three
    more languages than causes: a line through every point explains everything and says nothing.
    """
    values = np.asarray(target, np.float64)
    if len(values) < len(causes) + 3 or not np.ptp(values):
        return {}
    columns = {name: np.asarray(cause, np.float64) for name, cause in causes.items()}
    shares = {name: _fit(values, [column]) for name, column in columns.items()}
    if len(columns) > 1:
        shares[" + ".join(columns)] = _fit(values, list(columns.values()))
    return shares


def _fit(values: Floats, columns: Sequence[Floats]) -> float:
    design = np.stack([np.ones(len(values)), *columns], axis=1)
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    return max(0.0, _r2(values, design @ found))


def _r2(values: Floats, predicted: Floats) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    return 1.0 - float(((values - predicted) ** 2).sum()) / total if total else 0.0


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, accuracy) points no other one beats: nobody is as accurate at less cost, or better at the same."""
    return [
        not any((cost <= mine and score >= my_score) and (cost < mine or score > my_score) for cost, score in points)
        for mine, my_score in points
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; what rates are averaged with."""
    result: Any = stats.gmean(values)
    return float(result)
