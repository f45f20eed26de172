"""From seconds to figures, on synthetic timings whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from xfast.benchmarks import metrics
from xfast.benchmarks.metrics import Round, Runner, Size

OURS = Runner("xfast-int8", "xfast-int8", "int8", 2)
FAST = Runner("openvino-int8", "openvino-int8", "int8", 2)
SLOW = Runner("ctranslate2-int8", "ctranslate2-int8", "int8", 2)
OTHER = Runner("zentorch-bf16", "zentorch-bf16", "bf16", 2)
RUNNERS = (OURS, FAST, SLOW, OTHER)
GFLOP = 0.5


def turn(speed: float, workload: str = "mixed") -> Round:
    """Two batches a pass; a machine of half the speed takes twice as long and has half the ceiling."""
    seconds = {"xfast-int8": [0.1, 0.3], "openvino-int8": [0.4, 0.4], "ctranslate2-int8": [0.5, 0.7]}
    seconds["zentorch-bf16"] = [0.3, 0.3]
    passes = {label: [[t / speed for t in batches]] for label, batches in seconds.items()}
    return Round(workload, passes, {2: {"int8": 400.0 * speed, "read": 40.0 * speed}})


@pytest.fixture
def table() -> dict[str, metrics.Row]:
    rounds = [turn(1.0), turn(0.5), turn(1.0), turn(1.0), turn(0.8)]
    errors = {("mixed", "xfast-int8"): {"max_rel": 0.01, "cosine_mean": 0.999, "cosine_min": 0.99}}
    rows = metrics.rows(RUNNERS, {"mixed": Size(80, 8, 0.25)}, rounds, GFLOP, errors)
    assert [row["label"] for row in rows] == [runner.label for runner in RUNNERS]
    return {row["label"]: row for row in rows}


def test_rates_are_medians_of_the_rounds(table: dict[str, metrics.Row]) -> None:
    ours = table["xfast-int8"]
    assert ours["tokens_per_s"] == pytest.approx(80 / 0.4)
    assert ours["tokens_per_s_quartiles"] == pytest.approx([80 / 0.4 * 0.8, 80 / 0.4])
    assert ours["samples_per_s"] == pytest.approx(8 / 0.4)
    assert ours["gops"] == pytest.approx(GFLOP * 80 / 0.4)
    assert ours["padding"] == 0.25


def test_latencies_are_of_all_batches(table: dict[str, metrics.Row]) -> None:
    batches = [1e3 * t / speed for speed in (1.0, 0.5, 1.0, 1.0, 0.8) for t in (0.1, 0.3)]
    assert table["xfast-int8"]["p50_ms"] == pytest.approx(np.percentile(batches, 50))


@pytest.mark.parametrize(("turns", "known"), [(9, ()), (10, ("p95_ms",)), (50, ("p95_ms", "p99_ms"))])
def test_quantiles_need_batches_beyond_them(turns: int, known: tuple[str, ...]) -> None:
    rounds = [turn(1.0) for _ in range(turns)]  # of two batches
    for row in metrics.rows(RUNNERS, {"mixed": Size(80, 8, 0.25)}, rounds, GFLOP, {}):
        for name, percent in (("p95_ms", 95), ("p99_ms", 99)):
            times = [batch for one in rounds for batches in one.passes[row["label"]] for batch in batches]
            want = pytest.approx(1e3 * np.percentile(times, percent)) if name in known else None
            assert row[name] == want


def test_a_drifting_machine_cancels(table: dict[str, metrics.Row]) -> None:
    ours = table["xfast-int8"]
    assert ours["ceiling_percent"] == pytest.approx(100 * GFLOP * 80 / 0.4 / 400)
    assert ours["same_precision"]["peer"] == "openvino-int8"
    assert [ours["same_precision"][key] for key in ("median", "q25", "q75")] == pytest.approx([2.0, 2.0, 2.0])
    assert ours["best_peer"]["peer"] == "zentorch-bf16"
    assert ours["best_peer"]["median"] == pytest.approx(1.5)


def test_what_is_unknown_is_none(table: dict[str, metrics.Row]) -> None:
    assert table["zentorch-bf16"]["ceiling_percent"] is None  # no such ceiling in the rounds
    assert table["zentorch-bf16"]["same_precision"] is None
    assert table["openvino-int8"]["error"] is None
    assert table["xfast-int8"]["error"]["cosine_min"] == 0.99


def test_passes_of_a_turn_are_averaged() -> None:
    one = Round("1x8", {"a": [[0.1], [0.3]]})
    assert one.seconds("a") == pytest.approx(0.2)


def test_an_engine_that_left_has_no_row() -> None:
    rounds = [turn(1.0), turn(1.0)]
    del rounds[1].passes["openvino-int8"]
    labels = [row["label"] for row in metrics.rows(RUNNERS, {"mixed": Size(80, 8, 0.0)}, rounds, GFLOP, {})]
    assert labels == ["xfast-int8", "ctranslate2-int8", "zentorch-bf16"]
    assert metrics.rows(RUNNERS, {"other": Size(80, 8, 0.0)}, rounds, GFLOP, {}) == []


def test_threads_are_compared_with_equals() -> None:
    one = [
        Runner(f"{name}@{threads}", name, "int8", threads) for threads in (1, 2) for name in ("xfast-int8", "peer-int8")
    ]
    passes = {"xfast-int8@1": [[0.4]], "xfast-int8@2": [[0.2]], "peer-int8@1": [[0.8]], "peer-int8@2": [[0.6]]}
    rounds = [Round("mixed", passes)]
    rows = metrics.rows(one, {"mixed": Size(10, 1, 0.0)}, rounds, GFLOP, {})
    ratios = {row["label"]: row["same_precision"] and row["same_precision"]["median"] for row in rows}
    assert ratios == {
        "xfast-int8@1": pytest.approx(2.0),
        "xfast-int8@2": pytest.approx(3.0),
        "peer-int8@1": None,
        "peer-int8@2": None,
    }
    scaling = metrics.summaries(one, rows, rounds)["thread_scaling"]
    assert scaling["xfast-int8@2"]["mixed"]["median"] == pytest.approx(2.0)


def test_flatness_is_most_over_least() -> None:
    rates = {"alpha=0.2": 90.0, "alpha=1.0": 100.0, "length=8": 5.0, "mixed": 1.0}
    rows = [{"label": "xfast-int8", "workload": name, "tokens_per_s": rate} for name, rate in rates.items()]
    found = metrics.summaries([OURS], rows, [])
    assert found["alpha_flatness"] == {"xfast-int8": pytest.approx(100 / 90)}
    assert found["length_flatness"] == {}


def test_gflop_per_token_of_base_and_large() -> None:
    base = SimpleNamespace(num_hidden_layers=12, hidden_size=768, intermediate_size=3072)
    large = SimpleNamespace(num_hidden_layers=24, hidden_size=1024, intermediate_size=4096)
    assert metrics.gflop_per_token(base) == pytest.approx(0.170, abs=5e-4)
    assert metrics.gflop_per_token(large) == pytest.approx(0.604, abs=5e-4)


def test_distance() -> None:
    want = np.array([[3.0, 4.0], [0.0, 2.0]], dtype=np.float32)
    got = np.array([[3.0, 4.0], [2.0, 0.0]], dtype=np.float32)
    found = metrics.distance(got, want)
    assert found == {"max_rel": pytest.approx(0.5), "cosine_mean": pytest.approx(0.5), "cosine_min": pytest.approx(0.0)}
    zero = np.zeros((1, 2), dtype=np.float32)
    assert metrics.distance(zero, zero)["max_rel"] == 0.0
