"""Equivalence tests, intervals and models of time: against scipy, against values by hand, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.study import statistics
from xfast.study.statistics import DIFFERENT, EQUIVALENT, UNDECIDED, compare

MARGIN = 0.02
REPETITIONS = 400


def noisy(
    generator: np.random.Generator, pairs: int, slowdown: float, deviation: float
) -> tuple[list[float], list[float]]:
    """Pairs of times with drift that both arms share, heavy-tailed noise, and a hiccup of 3x now and then."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.05, pairs)))

    def arm() -> np.ndarray:
        noise = np.exp(deviation * generator.standard_t(4, pairs))
        return drift * noise * np.where(generator.random(pairs) < 0.02, 3.0, 1.0)

    return list(arm() * (1 + slowdown)), list(arm())


def verdicts(slowdown: float, pairs: int, deviation: float = 0.02) -> dict[str, float]:
    generator = np.random.default_rng(7)
    found = [compare(*noisy(generator, pairs, slowdown, deviation), MARGIN).verdict for _ in range(REPETITIONS)]
    return {verdict: found.count(verdict) / REPETITIONS for verdict in (EQUIVALENT, DIFFERENT, UNDECIDED)}


# --- power and level, by simulation


def test_a_planted_slowdown_of_5_percent_is_found() -> None:
    assert verdicts(0.05, 100)[DIFFERENT] >= 0.9
    assert verdicts(0.05, 100)[EQUIVALENT] == 0.0


def test_a_null_is_not_flagged() -> None:
    assert verdicts(0.0, 100)[DIFFERENT] <= 0.05
    assert verdicts(0.0, 100)[EQUIVALENT] >= 0.9


@pytest.mark.parametrize("pairs", [5, 10, 20, 40])
def test_few_pairs_flag_no_null_either(pairs: int) -> None:
    assert verdicts(0.0, pairs)[DIFFERENT] <= 0.07  # 5 % and what 400 repetitions can differ by


def test_a_difference_at_the_margin_passes_rarely() -> None:
    # The level of the two one-sided tests: at the edge of the margin "equivalent" must not come more often than 5 %.
    assert verdicts(MARGIN, 60)[EQUIVALENT] <= 0.075


def test_the_planned_number_of_pairs_has_the_planned_power() -> None:
    generator, deviation = np.random.default_rng(3), 0.03
    pilot = compare(np.exp(generator.normal(0, deviation, 4000)).tolist(), [1.0] * 4000, MARGIN)
    needed = pilot.pairs_needed
    assert needed is not None
    found = 0
    for _ in range(REPETITIONS):
        ones = np.exp(generator.normal(0, deviation, needed))
        found += compare(ones.tolist(), np.ones(needed).tolist(), MARGIN).verdict == EQUIVALENT
    assert 0.85 <= found / REPETITIONS <= 0.96  # planned 0.9


# --- against scipy and by hand


def test_intervals_are_yuens() -> None:
    logs = np.random.default_rng(0).normal(0.01, 0.05, 37)
    found = compare(np.exp(logs).tolist(), np.ones(37).tolist(), MARGIN)
    for confidence, interval in ((0.90, found.interval90), (0.95, found.interval95)):
        low, high = stats.mstats.trimmed_mean_ci(logs, limits=(0.2, 0.2), alpha=1 - confidence)
        assert np.log(interval) == pytest.approx([low, high], rel=1e-9)
    assert math.log(found.ratio) == pytest.approx(stats.trim_mean(logs, 0.2))


@pytest.mark.parametrize("shift", [-0.05, -0.01, 0.0, 0.012, 0.019, 0.03])
def test_the_verdict_is_what_the_intervals_say(shift: float) -> None:
    logs = np.random.default_rng(1).normal(shift, 0.02, 30)
    found = compare(np.exp(logs).tolist(), np.ones(30).tolist(), MARGIN)
    inside = found.interval90[0] > 1 / (1 + MARGIN) and found.interval90[1] < 1 + MARGIN
    assert (found.verdict == EQUIVALENT) == inside
    assert (found.p_value <= 0.05) == inside
    if not inside:
        assert (found.verdict == DIFFERENT) == (not found.interval95[0] <= 1 <= found.interval95[1])


def test_swapping_the_arms_inverts_the_ratio_and_nothing_else() -> None:
    above, below = noisy(np.random.default_rng(5), 25, 0.01, 0.02)
    one, other = compare(above, below, MARGIN), compare(below, above, MARGIN)
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert one.interval95 == pytest.approx((1 / other.interval95[1], 1 / other.interval95[0]))
    assert (one.verdict, one.pairs_needed) == (other.verdict, other.pairs_needed)
    assert one.p_value == pytest.approx(other.p_value)


def test_equal_times_are_equivalent_and_shifted_ones_are_not() -> None:
    assert compare([1.0] * 8, [1.0] * 8, MARGIN).verdict == EQUIVALENT
    assert compare([1.05] * 8, [1.0] * 8, MARGIN).verdict == DIFFERENT


def test_pairs_needed_by_hand() -> None:
    # (1.6449 + 1.6449) * 0.1 / log(1.02) = 16.61, squared 275.9
    assert statistics.pairs_needed(0.1, 0.02) == 276
    assert statistics.pairs_needed(0.0, 0.02) == statistics.MIN_PAIRS
    assert statistics.pairs_needed(math.nan, 0.02) is None


@pytest.mark.parametrize(
    ("above", "below", "message"),
    [
        ([1.0] * 4, [1.0] * 4, "at least 5"),
        ([1.0] * 5, [1.0] * 6, "as many"),
        ([0.0] * 5, [1.0] * 5, "clock is too coarse"),
        ([math.nan] * 5, [1.0] * 5, "not finite"),
    ],
)
def test_bad_pairs_are_refused(above: list[float], below: list[float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        compare(above, below, MARGIN)


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0, math.nan])
def test_bad_margins_are_refused(margin: float) -> None:
    with pytest.raises(InvalidOptionError, match="margin"):
        compare([1.0] * 5, [1.0] * 5, margin)


def test_bootstrap_intervals_hold_the_median_and_repeat() -> None:
    values = np.random.default_rng(2).lognormal(0, 0.3, 15).tolist()
    low, high = statistics.median_interval(values)
    assert low < np.median(values) < high
    assert statistics.median_interval(values) == (low, high)
    assert statistics.median_interval([3.0]) == (3.0, 3.0)
    covered = 0
    generator = np.random.default_rng(4)
    for _ in range(200):
        low, high = statistics.median_interval(generator.normal(5, 1, 25).tolist())
        covered += low <= 5 <= high
    assert covered >= 180  # 95 % asked of 200, less what chance takes


# --- where time goes


def test_the_time_model_finds_planted_costs() -> None:
    generator = np.random.default_rng(0)
    tokens, sequences = generator.integers(100, 3000, 40), generator.integers(16, 65, 40)
    seconds = (2e-4 * tokens + 1e-3 * sequences) * np.exp(generator.normal(0, 0.01, 40))
    model = statistics.time_model(seconds.tolist(), tokens.tolist(), sequences.tolist())
    assert model.per_token == pytest.approx(2e-4, rel=0.02)
    assert model.per_sequence == pytest.approx(1e-3, rel=0.1)
    assert model.r2 > 0.99
    assert model(np.array([10.0]), np.array([0.0])) == pytest.approx([10 * model.per_token])
    with pytest.raises(InvalidInputError, match="at least 3"):
        statistics.time_model([1.0, 2.0], [1.0, 2.0], [1.0, 1.0])


def test_costs_are_never_negative() -> None:
    model = statistics.time_model([1.0, 0.5, 0.25], [10, 20, 40], [1, 1, 1])
    assert model.per_token >= 0
    assert model.per_sequence >= 0


def test_explained_shares_add_up_for_independent_causes() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 4000))
    shares = statistics.explained(list(2 * first + second), {"first": list(first), "second": list(second)})
    assert shares["first"] == pytest.approx(0.8, abs=0.03)
    assert shares["second"] == pytest.approx(0.2, abs=0.03)
    assert shares["first + second"] == pytest.approx(1.0)
    assert statistics.explained([1.0, 2.0, 3.0], {"first": [1.0, 2.0, 3.0]}) == {}
    assert statistics.explained([1.0] * 9, {"first": list(range(9))}) == {}


def test_the_pareto_front_by_hand() -> None:
    points = [(1.0, 50.0), (2.0, 60.0), (2.0, 55.0), (3.0, 60.0), (4.0, 70.0), (1.0, 50.0)]
    assert statistics.pareto(points) == [True, True, False, False, True, True]
    assert statistics.pareto([]) == []
