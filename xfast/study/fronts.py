"""Accuracy beside cost: scores, Pareto fronts, and what intermediate training buys in each language."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xfast.study import document, statistics
from xfast.study.document import BASELINE, INTERMEDIATE
from xfast.study.factors import Settings, batch_sizes
from xfast.study.languages import language as language_facts
from xfast.study.languages import ordered
from xfast.study.profiles import GROUPS
from xfast.study.store import Record
from xfast.study.view import ALL

Kind = tuple[str, str, str, str, int | None]
"""Arm, size, engine, task and layers: what has one point on a front."""


def scores(records: Sequence[Record]) -> list[document.Accuracy]:
    """Scores of a store; the last one counts, should a run have measured it twice."""
    last: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record["kind"] == "accuracy" and record["value"] is not None:
            last[tuple(record[n] for n in ("arm", "size", "engine", "task", "language", "layers"))] = record
    order = ordered({record["language"] for record in last.values()})
    rows = sorted(last.values(), key=lambda one: (one["task"], order.index(one["language"]), one["engine"], one["arm"]))
    return [document.part(document.Accuracy, row) for row in rows]


class _Costs:
    """Milliseconds a sample in the study's first way of batching; of a truncated encoder by its share of the layers."""

    def __init__(self, rows: Sequence[document.Cell], settings: Settings, sizes: Mapping[str, Record]) -> None:
        first = (settings.policies[0], batch_sizes(settings, settings.policies[0])[0])
        self._whole = {
            (arm, row["size"], row["engine"], row["task"], row["language"]): 1e3 / figures["samples_per_s"]
            for row in rows
            if (row["policy"], row["batch_size"]) == first
            for arm, figures in row["throughput"].items()
        }
        self._layers = {size: facts["layers"] for size, facts in sizes.items()}

    def estimated(self, kind: Kind) -> bool:
        """Whether the cost is not that of what was timed, which is the whole encoder."""
        return kind[4] not in (None, self._layers[kind[1]])

    def of(self, kind: Kind, language: str) -> float | None:
        arm, size, engine, task, layers = kind
        whole = self._whole.get((arm, size, engine, task, language))
        return whole if whole is None or layers is None else whole * layers / self._layers[size]


def pareto(
    rows: Sequence[document.Cell],
    found: Sequence[document.Accuracy],
    settings: Settings,
    sizes: Mapping[str, Record],
) -> list[document.ParetoPoint]:
    """Accuracy and cost by task and resource group, over the languages that every point of the task has."""
    costs = _Costs(rows, settings, sizes)
    points: list[document.ParetoPoint] = []
    for task in dict.fromkeys(score["task"] for score in found):
        by_kind = _by_kind([score for score in found if score["task"] == task])
        by_kind = {kind: mine for kind, mine in by_kind.items() if any(costs.of(kind, code) for code in mine)}
        for group in (ALL, *GROUPS):
            shared = [
                code
                for code in next(iter(by_kind.values()), {})
                if (group in (ALL, language_facts(code)["group"]))
                and all(code in mine and costs.of(kind, code) for kind, mine in by_kind.items())
            ]
            if shared:
                points += _front(by_kind, shared, group, costs)
    return points


def _by_kind(found: Sequence[document.Accuracy]) -> dict[Kind, dict[str, float]]:
    """Scores by language of every arm, size, engine, task and number of layers."""
    groups: dict[Kind, dict[str, float]] = {}
    for score in found:
        kind = (score["arm"], score["size"], score["engine"], score["task"], score["layers"])
        groups.setdefault(kind, {})[score["language"]] = score["value"]
    return groups


def _front(
    by_kind: dict[Kind, dict[str, float]], shared: Sequence[str], group: str, costs: _Costs
) -> list[document.ParetoPoint]:
    points = []
    for kind, mine in by_kind.items():
        prices = [costs.of(kind, code) or 0.0 for code in shared]
        points.append((kind, plain.geometric_mean(prices), plain.fmean(mine[code] for code in shared)))
    best = statistics.pareto([(price, value) for _, price, value in points])
    return [
        document.ParetoPoint(
            arm=arm,
            size=size,
            engine=engine,
            task=task,
            group=group,
            layers=layers,
            accuracy=value,
            ms_per_sample=price,
            estimated=costs.estimated((arm, size, engine, task, layers)),
            on_front=front,
        )
        for ((arm, size, engine, task, layers), price, value), front in zip(points, best, strict=True)
    ]


def trades(
    rows: Sequence[document.Cell],
    found: Sequence[document.Accuracy],
    settings: Settings,
    sizes: Mapping[str, Record],
) -> list[document.Trade]:
    """Accuracy at equal cost and cost at equal accuracy, language by language; see ``document.Trade``."""
    costs = _Costs(rows, settings, sizes)
    made = []
    for mine in _by_task(found).values():
        reference = _reference(mine, costs, settings)
        if reference is None:
            continue
        for code, value in ((code, mine[reference][code]) for code in ordered(mine[reference])):
            price = costs.of(reference, code)
            arms = {arm: _points(mine, arm, code, costs) for arm in (BASELINE, INTERMEDIATE)}
            if price is not None and arms[INTERMEDIATE]:
                made.append(_trade(reference, code, (price, value), arms, settings.margin))
    return made


_Point = tuple[float, float, str]


def _points(mine: Mapping[Kind, Mapping[str, float]], arm: str, code: str, costs: _Costs) -> list[_Point]:
    """(cost, score, name) of an arm's engines and truncations in one language."""
    there = [(costs.of(kind, code), kind, values) for kind, values in mine.items() if kind[0] == arm and code in values]
    return [(cost, values[code], _name(kind, costs)) for cost, kind, values in there if cost is not None]


def untraded(
    rows: Sequence[document.Cell],
    found: Sequence[document.Accuracy],
    settings: Settings,
    sizes: Mapping[str, Record],
) -> Iterator[document.Skipped]:
    """Yields what :func:`trades` has nothing to compare with, though intermediate training has scores."""
    costs = _Costs(rows, settings, sizes)
    for (size, task), mine in _by_task(found).items():
        if any(kind[0] == INTERMEDIATE for kind in mine) and _reference(mine, costs, settings) is None:
            what = f"accuracy at equal cost, cost at equal accuracy of {size} on {task}"
            yield {"what": what, "why": "no engine has both scores and times of the baseline"}


def _by_task(found: Sequence[document.Accuracy]) -> dict[tuple[str, str], dict[Kind, dict[str, float]]]:
    """Scores as :func:`_by_kind` has them, by size and task."""
    groups: dict[tuple[str, str], dict[Kind, dict[str, float]]] = {}
    for kind, values in _by_kind(found).items():
        groups.setdefault((kind[1], kind[3]), {})[kind] = values
    return groups


def _reference(mine: Mapping[Kind, Mapping[str, float]], costs: _Costs, settings: Settings) -> Kind | None:
    """The whole baseline with the first engine that has scores and times: one may have been skipped."""
    layers = max((kind[4] for kind in mine if kind[4] is not None), default=None)
    size, task = next((kind[1], kind[3]) for kind in mine)
    kinds: list[Kind] = [(BASELINE, size, engine, task, layers) for engine in settings.engines]
    there = (kind for kind in kinds if any(costs.of(kind, code) is not None for code in mine.get(kind, ())))
    return next(there, None)


def _trade(
    reference: Kind, code: str, here: tuple[float, float], arms: Mapping[str, Sequence[_Point]], margin: float
) -> document.Trade:
    price, value = here

    def best_of(arm: str) -> tuple[float, float, str] | None:
        cheap = [(score, -cost, name) for cost, score, name in arms[arm] if cost <= price * (1 + margin)]
        return max(cheap, default=None)

    def least_of(arm: str) -> tuple[float, float, str] | None:
        return min([(cost, -score, name) for cost, score, name in arms[arm] if score >= value], default=None)

    best, least = best_of(INTERMEDIATE), least_of(INTERMEDIATE)
    own_best, own_least = best_of(BASELINE), least_of(BASELINE)
    assert own_best is not None and own_least is not None  # the reference is one of its points
    return document.Trade(
        size=reference[1],
        task=reference[3],
        language=code,
        engine=reference[2],
        accuracy=value,
        ms_per_sample=price,
        best_accuracy=best[0] if best else None,
        best_by=best[2] if best else None,
        least_ms=least[0] if least else None,
        least_by=least[2] if least else None,
        own_accuracy=own_best[0],
        own_ms=own_least[0],
    )


def _name(kind: Kind, costs: _Costs) -> str:
    if kind[4] is None:
        return kind[2]
    return f"{kind[2]}, {kind[4]} layers{' (cost estimated)' * costs.estimated(kind)}"
