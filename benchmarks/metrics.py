"""From seconds to figures: pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """One engine on a number of threads, as it was measured."""

    label: str
    engine: str
    precision: str
    threads: int

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return not self.engine.startswith("xfast-")


@dataclass(frozen=True)
class Size:
    """What a workload holds."""

    tokens: int
    samples: int
    padding: float


@dataclass
class Round:
    """One turn of every runner: ``passes[label][pass][batch]`` in seconds; ``ceilings[threads][kind]`` in 1e9/s."""

    workload: str
    passes: dict[str, list[list[float]]] = field(default_factory=dict)
    ceilings: dict[int, dict[str, float]] = field(default_factory=dict)

    def seconds(self, label: str) -> float:
        """Of one pass over the workload: the mean of this turn."""
        return statistics.fmean(sum(batches) for batches in self.passes[label])


def gflop_per_token(config: Any) -> float:
    """1e9 operations of one token in the products with weights; a multiplication and an addition are two."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return 2e-9 * config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * inner)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(list(values), [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def distance(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Largest difference over the largest value, mean and least cosine of two [tokens, hidden] arrays."""
    largest = float(np.abs(want).max()) or 1.0
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    cosines = (got * want).sum(1, dtype=np.float64) / np.maximum(norms, 1e-30)
    return {
        "max_rel": float(np.abs(got - want).max()) / largest,
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
    }


def rows(
    runners: Sequence[Runner],
    sizes: Mapping[str, Size],
    rounds: Sequence[Round],
    gflop: float,
    errors: Mapping[tuple[str, str], Mapping[str, float]],
) -> list[Row]:
    """One row per workload and runner, in the order of ``sizes`` and ``runners``.

    Args:
        runners: everything that was measured.
        sizes: of each workload, by name.
        rounds: the raw times.
        gflop: see ``gflop_per_token``.
        errors: by (workload, label), see ``distance``.
    """
    found = []
    for workload, size in sizes.items():
        mine = [one for one in rounds if one.workload == workload]
        present = [runner for runner in runners if mine and all(runner.label in one.passes for one in mine)]
        for runner in present:
            row = _row(runner, size, mine, gflop)
            row |= {"workload": workload, "error": dict(errors.get((workload, runner.label), {})) or None}
            row["same_precision"] = _best(runner, present, mine, same=True)
            row["best_peer"] = _best(runner, present, mine, same=False)
            found.append(row)
    return found


def _row(runner: Runner, size: Size, rounds: Sequence[Round], gflop: float) -> Row:
    seconds = [one.seconds(runner.label) for one in rounds]
    batch_ms = [1e3 * batch for one in rounds for batches in one.passes[runner.label] for batch in batches]
    p50, p95, p99 = np.percentile(batch_ms, [50, 95, 99])
    rate = spread([size.tokens / each for each in seconds])
    gops = [gflop * size.tokens / each for each in seconds]
    ceilings = [one.ceilings.get(runner.threads, {}).get(runner.precision) for one in rounds]
    shares = [100 * rate / top for rate, top in zip(gops, ceilings, strict=True) if top]
    return {
        "engine": runner.engine,
        "label": runner.label,
        "precision": runner.precision,
        "threads": runner.threads,
        "tokens_per_s": rate["median"],
        "tokens_per_s_quartiles": [rate["q25"], rate["q75"]],
        "samples_per_s": size.samples / statistics.median(seconds),
        "p50_ms": float(p50),
        # of fewer none lies beyond it
        "p95_ms": float(p95) if len(batch_ms) >= 20 else None,
        "p99_ms": float(p99) if len(batch_ms) >= 100 else None,
        "gops": statistics.median(gops),
        "ceiling_percent": statistics.median(shares) if shares else None,
        "padding": size.padding,
    }


def _best(runner: Runner, present: Sequence[Runner], rounds: Sequence[Round], *, same: bool) -> Row | None:
    """How many times as fast as the fastest peer on as many threads, from paired rounds. None for peers."""
    rivals = [
        other
        for other in present
        if other.is_peer and other.threads == runner.threads and (not same or other.precision == runner.precision)
    ]
    if runner.is_peer or not rivals:
        return None
    fastest = min(rivals, key=lambda other: statistics.median(one.seconds(other.label) for one in rounds))
    return {"peer": fastest.engine, **ratio(fastest.label, runner.label, rounds)}


def ratio(slow: str, fast: str, rounds: Sequence[Round]) -> dict[str, float]:
    """Time of ``slow`` over time of ``fast``, round by round: median and quartiles."""
    return spread([one.seconds(slow) / one.seconds(fast) for one in rounds])


def summaries(runners: Sequence[Runner], table: Sequence[Row], rounds: Sequence[Round]) -> Row:
    """Across workloads: ``alpha_flatness``, ``length_flatness`` (most over least tokens/s) and ``thread_scaling``."""
    found: Row = {"alpha_flatness": {}, "length_flatness": {}, "thread_scaling": {}}
    for sweep in ("alpha", "length"):
        for runner in runners:
            rates = [
                row["tokens_per_s"]
                for row in table
                if row["label"] == runner.label and row["workload"].startswith(f"{sweep}=")
            ]
            if len(rates) > 1:
                found[f"{sweep}_flatness"][runner.label] = max(rates) / min(rates)
    for one in runners:
        for many in runners:
            if one.engine != many.engine or one.threads != 1 or many.threads == 1:
                continue
            for workload in dict.fromkeys(row["workload"] for row in table):
                paired = [r for r in rounds if r.workload == workload and {one.label, many.label} <= r.passes.keys()]
                if paired:
                    found["thread_scaling"].setdefault(many.label, {})[workload] = ratio(one.label, many.label, paired)
    return found
