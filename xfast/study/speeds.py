"""What speed depends on: averages by model size, and models of time with what explains the languages' differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean

import numpy as np

from xfast.study import document, statistics
from xfast.study.cells import Cells
from xfast.study.document import BASELINE, CONTROL
from xfast.study.factors import STOCK, EngineName, Settings, batch_sizes
from xfast.study.languages import language as language_facts
from xfast.study.profiles import GROUPS
from xfast.study.store import Record
from xfast.study.view import ALL


def scaling(rows: Sequence[document.Cell], settings: Settings, sizes: Mapping[str, Record]) -> list[document.Scaling]:
    """Geometric means over languages, by task, size, engine, arm and resource group; the first policy and batch size.

    Over what every size has been measured on: a run that was stopped has less of some, and not the same. Tasks are
    never averaged: a resource group whose languages have longer texts only because theirs is another task is no slower.
    """
    first = (settings.policies[0], batch_sizes(settings, settings.policies[0])[0])
    batched = [row for row in rows if (row["policy"], row["batch_size"]) == first]
    found: list[document.Scaling] = []
    kinds = dict.fromkeys((row["task"], row["engine"], arm) for row in batched for arm in row["throughput"])
    for task, engine, arm in kinds:
        if arm == CONTROL:
            continue
        where = (task, engine)
        fast = _shared([row for row in batched if (row["task"], row["engine"]) == where and arm in row["throughput"]])
        slow = _shared([row for row in rows if (row["task"], row["engine"]) == where and arm in row["latency"]])
        for size, by_language in fast.items():
            for group in (ALL, *GROUPS):
                codes = [code for code in by_language if group in (ALL, language_facts(code)["group"])]
                batches = [by_language[code] for code in codes]
                single = [slow[size][code] for code in codes if code in slow.get(size, {})]
                if batches:
                    found.append(_scaling_row(sizes[size], engine, arm, group, batches, single))
    return found


def _shared(rows: Sequence[document.Cell]) -> dict[str, dict[str, document.Cell]]:
    """A task's rows by size and language, of the languages that all sizes have."""
    by_size: dict[str, dict[str, document.Cell]] = {}
    for row in rows:
        by_size.setdefault(row["size"], {})[row["language"]] = row
    common = set.intersection(*(set(mine) for mine in by_size.values())) if by_size else set()
    return {size: {code: row for code, row in mine.items() if code in common} for size, mine in by_size.items()}


def _scaling_row(
    facts: Record,
    engine: str,
    arm: str,
    group: str,
    batches: Sequence[document.Cell],
    single: Sequence[document.Cell],
) -> document.Scaling:
    return document.Scaling(
        size=batches[0]["size"],
        engine=engine,
        arm=arm,
        group=group,
        task=batches[0]["task"],
        parameters=facts["parameters"],
        samples_per_s=geometric_mean([row["throughput"][arm]["samples_per_s"] for row in batches]),
        tokens_per_s=geometric_mean([row["throughput"][arm]["tokens_per_s"] for row in batches]),
        p50_ms=geometric_mean([row["latency"][arm]["p50_ms"] for row in single]) if single else None,
    )


def cost_models(cells: Cells, rows: Sequence[document.Cell]) -> list[document.CostModel]:
    """One for each size, engine, task, policy and batch size that has enough languages."""
    kinds: dict[tuple[str, str, str, str, int], list[document.Cell]] = {}
    for row in rows:
        if row["throughput"]:
            kind = (row["size"], row["engine"], row["task"], row["policy"], row["batch_size"])
            kinds.setdefault(kind, []).append(row)
    return [_cost_model(cells, mine) for mine in kinds.values() if len(mine) >= statistics.MIN_CELLS]


def _cost_model(cells: Cells, rows: Sequence[document.Cell]) -> document.CostModel:
    """Of the tokens that the engine computes: without padding, but for transformers itself."""
    first = rows[0]
    stock = _is_stock(first["engine"])
    seconds = [row["samples"] / row["throughput"][BASELINE]["samples_per_s"] for row in rows]
    tokens = [row["tokens"] / (1 - row["padding"] if stock else 1) for row in rows]
    sequences = [float(cells.facts[row["key"]]["sequences"]) for row in rows]
    model = statistics.time_model(seconds, tokens, sequences)
    predicted = model(np.asarray(tokens), np.asarray(sequences))
    shares, over = explained(rows)
    return document.CostModel(
        size=first["size"],
        engine=first["engine"],
        task=first["task"],
        policy=first["policy"],
        batch_size=first["batch_size"],
        us_per_token=1e6 * model.per_token,
        us_per_sequence=1e6 * model.per_sequence,
        r2=model.r2,
        languages=len(rows),
        explained=shares,
        explained_over=over,
        predicted={row["language"]: row["samples"] / float(s) for row, s in zip(rows, predicted, strict=True)},
        seen={row["language"]: row["throughput"][BASELINE]["samples_per_s"] for row in rows},
    )


def explained(rows: Sequence[document.Cell]) -> tuple[dict[str, float], dict[str, int]]:
    """Shares of the variance of speed between languages by cause, and over how many languages each is.

    Length (tokens a sample) is known of every language and is taken over all, and so is padding, which is a cause for
    stock engines alone: where it is not computed it only goes along with length. Whatever has fertility in it is over
    the languages that part words.
    """
    parted = [row for row in rows if row["fertility"]]
    shares = statistics.explained(_log_rates(parted), {"fertility": _fertility(parted), **_sizes(parted)})
    shares |= statistics.explained(_log_rates(rows), _sizes(rows))
    return shares, {cause: len(parted if "fertility" in cause else rows) for cause in shares}


def _fertility(rows: Sequence[document.Cell]) -> list[float]:
    return [float(np.log(row["fertility"] or 1.0)) for row in rows]


def _sizes(rows: Sequence[document.Cell]) -> dict[str, list[float]]:
    causes = {"length": [float(np.log(row["tokens"] / row["samples"])) for row in rows]}
    if rows and _is_stock(rows[0]["engine"]):
        causes["padding"] = [row["padding"] for row in rows]
    return causes


def _is_stock(engine: str) -> bool:
    return EngineName.parse(engine).backend == STOCK


def _log_rates(rows: Sequence[document.Cell]) -> list[float]:
    return [float(np.log(row["throughput"][BASELINE]["samples_per_s"])) for row in rows]
