"""What a report picks out of a study: the order of things, the setting that figures show, lookups, and checks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from xfast.errors import InvalidInputError
from xfast.pages import signed
from xfast.study.document import (
    BASELINE,
    CONTROL,
    EQUIVALENT,
    INTERMEDIATE,
    NOTHING_KNOWN,
    Cell,
    CostModel,
    Equivalence,
    Latency,
    Study,
    Throughput,
    rank,
)
from xfast.study.factors import BUDGET, STOCK
from xfast.study.languages import ordered
from xfast.study.profiles import GROUPS
from xfast.study.statistics import MIN_UNITS
from xfast.study.tables import grouped

ALL = "all"
"""The group that every language is in."""


@dataclass(frozen=True)
class Setting:
    """What is held fixed while languages and engines vary; ``batch_size`` and ``policy`` are the throughput cells'."""

    size: str
    task: str
    policy: str
    batch_size: int


def check(study: Study) -> None:
    """Refuse figures that are no numbers, rates that are none, and names that the document does not define.

    Raises:
        InvalidInputError: names the place in the document, what is there and what is accepted.
    """
    for index, one in enumerate(all_tests(study)):
        if not isinstance(one["margin"], (int, float)):
            raise InvalidInputError(f"study: tests[{index}].margin: {one['margin']} given; accepted: a number")
    for place, value in _numbers(study, ""):
        if not math.isfinite(value):
            raise InvalidInputError(
                f"study: {place}: {value} given; accepted: finite numbers, null for what is not known"
            )
    rates: list[tuple[str, Any]] = [
        (f"cells[{index}].throughput.{arm}", found)
        for index, cell in enumerate(study["cells"])
        for arm, found in cell["throughput"].items()
    ]
    rates += [(f"scaling[{index}]", row) for index, row in enumerate(study["scaling"])]
    for place, found in rates:
        for name in ("samples_per_s", "tokens_per_s"):
            if found[name] <= 0:
                raise InvalidInputError(f"study: {place}.{name}: {found[name]} given; accepted: above 0")
    defined: dict[str, Any] = {
        "size": study["sizes"],
        "engine": study["engines"],
        "language": study["languages"],
        "arm": study["arms"],
    }
    many: dict[str, Any] = {"cells": "size engine language", "accuracy": "size engine language arm"}
    many |= {"scaling": "size engine arm", "cost_models": "size engine", "pareto": "size engine arm"}
    many |= {"probes": "arm size language", "memory": "size engine", "equivalence": "arm"}
    many |= {"trades": "size engine language"}
    for part, fields in many.items():
        for index, row in enumerate(study[part]):  # type: ignore[literal-required]
            for name in fields.split():
                if row[name] not in defined[name]:
                    known = ", ".join(defined[name]) or "none"
                    raise InvalidInputError(f"study: {part}[{index}]: {name}: {row[name]!r} given; accepted: {known}")


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{place}[{index}]")


# --- order ----------------------------------------------------------------------------------------


def languages(study: Study) -> list[str]:
    """The codes of the study's languages, low-resource first."""
    return ordered(study["languages"])


def groups(study: Study) -> list[str]:
    """The resource groups that have a language here, low-resource first."""
    found = {language["group"] for language in study["languages"].values()}
    return [group for group in GROUPS if group in found]


def other_arms(study: Study) -> list[str]:
    """The arms that are compared with the baseline; intermediate training first, the control last."""
    arms = [arm for arm in study["arms"] if arm != BASELINE]
    return sorted(arms, key=lambda arm: (arm == CONTROL, arm != INTERMEDIATE))


def trained_arms(study: Study) -> list[str]:
    """The arms that differ in their weights: all but the control, the baseline first."""
    arms = [arm for arm in study["arms"] if arm != CONTROL]
    return sorted(arms, key=lambda arm: (arm != BASELINE, arm != INTERMEDIATE))


def ranked(study: Study, part: str, name: str) -> int:
    """Place of a size or engine in the document; what is not there comes last."""
    return rank(list(study[part]), name)  # type: ignore[literal-required]


def language_name(study: Study, code: str) -> str:
    """The English name, the code where there is none."""
    return study["languages"][code]["name"] or code


# --- the setting that figures show ----------------------------------------------------------------


def setting(study: Study, language: str | None = None) -> Setting | None:
    """The setting whose throughput was measured most often, over languages and engines; of equals the one asked first.

    Args:
        study: the document.
        language: only settings in which this one was measured.
    """
    measured = [cell for cell in study["cells"] if cell["throughput"].get(BASELINE)]
    counts = Counter(map(_setting, measured))
    allowed = {_setting(cell): None for cell in measured if language in (None, cell["language"])}
    return min(allowed, key=lambda found: (-counts[found], *_asked(study, found)), default=None)


def _setting(cell: Cell) -> Setting:
    return Setting(cell["size"], cell["task"], cell["policy"], cell["batch_size"])


def _asked(study: Study, found: Setting) -> tuple[int, ...]:
    """Places in the order in which the study was asked for."""
    factors = {"tasks": found.task, "policies": found.policy, "batch_sizes": found.batch_size}
    places = (rank(study["settings"].get(name, []), value) for name, value in factors.items())
    return (ranked(study, "sizes", found.size), *places)


def described(study: Study, chosen: Setting) -> str:
    """A setting in words; a batch has as many examples as there are, where a cell has fewer than fill one."""
    if chosen.policy == BUDGET:
        batches = f"batches of at most {grouped(chosen.batch_size)} padded tokens"
    else:
        mine = (cell for cell in study["cells"] if cell["throughput"] and _setting(cell) == chosen)
        counts = {min(cell["samples"], cell["batch_size"]) for cell in mine} or {chosen.batch_size}
        batches = f"batches of {min(counts)}{f' to {max(counts)}' if len(counts) > 1 else ''}"
    return f"{chosen.size}, {chosen.task}, {chosen.policy} order, {batches}"


def throughput_cells(study: Study, of: Setting) -> dict[str, dict[str, Cell]]:
    """By engine and language, both in their order, the throughput cells of a setting."""
    found = {
        (cell["engine"], cell["language"]): cell
        for cell in study["cells"]
        if cell["throughput"].get(BASELINE) and _setting(cell) == of
    }
    return _by_engine(study, found)


def main_cells(study: Study) -> tuple[Setting | None, dict[str, dict[str, Cell]], list[str]]:
    """The setting that figures show, its throughput cells, and those of languages that only another setting has.

    Returns:
        The setting, cells by engine and language, and a line for each other setting whose languages were added.
    """
    chosen = setting(study)
    if chosen is None:
        return None, {}, []
    found = throughput_cells(study, chosen)
    others: dict[str, list[str]] = {}
    for code in languages(study):
        own = None if any(code in row for row in found.values()) else setting(study, code)
        if own is not None:
            for engine, row in throughput_cells(study, own).items():
                if code in row:
                    found.setdefault(engine, {})[code] = row[code]
            others.setdefault(described(study, own), []).append(language_name(study, code))
    return chosen, found, [f"{', '.join(names)}*: {where}." for where, names in others.items()]


def elsewhere(cells: dict[str, dict[str, Cell]], code: str, chosen: Setting) -> str:
    """A star for a language that :func:`main_cells` has from another setting than the chosen one."""
    return "*" if any(_setting(row[code]) != chosen for row in cells.values() if code in row) else ""


def latency_cells(study: Study, of: Setting) -> dict[str, dict[str, Cell]]:
    """By engine and language, both in their order, the latency cells of a setting's size and task."""
    found = {
        (cell["engine"], cell["language"]): cell
        for cell in study["cells"]
        if cell["latency"].get(BASELINE) and (cell["size"], cell["task"]) == (of.size, of.task)
    }
    return _by_engine(study, found)


def _by_engine(study: Study, found: dict[tuple[str, str], Cell]) -> dict[str, dict[str, Cell]]:
    order = languages(study)
    rows = {
        engine: {language: found[engine, language] for language in order if (engine, language) in found}
        for engine in study["engines"]
    }
    return {engine: row for engine, row in rows.items() if row}


def rate(cell: Cell) -> Throughput:
    """The baseline's throughput of a cell that has one."""
    return cell["throughput"][BASELINE]


def latency(cell: Cell) -> Latency:
    """The baseline's latency of a cell that has one."""
    return cell["latency"][BASELINE]


def speed(row: dict[str, Cell], among: Sequence[str] | None = None) -> float:
    """Geometric mean of an engine's samples per second over its languages, or over some of them."""
    return geometric_mean(rate(row[code])["samples_per_s"] for code in (among if among is not None else row))


def reference(study: Study, engines: Sequence[str]) -> str | None:
    """The engine that others are compared with: transformers in fp32, else transformers; None where there is none."""
    stock = [name for name in engines if study["engines"][name]["backend"] == STOCK]
    return next((name for name in stock if study["engines"][name]["precision"] == "fp32"), stock[0] if stock else None)


def fastest(rows: dict[str, dict[str, Cell]]) -> str:
    """The engine that is fastest over the languages that all engines have, or else over its own."""
    shared = [code for code in next(iter(rows.values())) if all(code in row for row in rows.values())]
    return max(rows, key=lambda name: speed(rows[name], shared or None))


# --- what may be said -----------------------------------------------------------------------------


def seeded(study: Study) -> list[str]:
    """The arms whose weights are random: they carry no accuracy."""
    return [name for name, arm in study["arms"].items() if arm["source"] == "seeded"]


def all_tests(study: Study) -> list[Equivalence]:
    """The control over everything, then every other test."""
    return [study["control"], *study["equivalence"]]


def needed(one: Equivalence) -> tuple[int, int, str] | None:
    """How many units a test had and needs, and what they are; None where more would not do or are not needed."""
    if one["verdict"] == EQUIVALENT:
        return None
    cells = one.get("cells_needed")
    if "cells_needed" not in one and one["pairs_needed"] and one["cells"] >= MIN_UNITS:
        cells = math.ceil(one["pairs_needed"] * one["cells"] / one["pairs"])  # as older documents have it
    elif one["pairs_needed"]:
        return (one["pairs"], one["pairs_needed"], "pairs") if one["pairs_needed"] > one["pairs"] else None
    return (one["cells"], cells, "cells") if cells and cells > one["cells"] else None


def explained_over(study: Study, model: CostModel) -> tuple[dict[str, int], list[str]]:
    """How many languages are behind each share that a model explains, and which have no known fertility."""
    known = {
        cell["language"]: cell["fertility"]
        for cell in study["cells"]
        if cell["task"] == model["task"] and cell["throughput"]
    }
    return model["explained_over"], [code for code in model["seen"] if code in known and not known[code]]


def like_the_control(one: Equivalence, tests: Sequence[Equivalence]) -> bool:
    """Whether the baseline's two copies differ in the same part of the study, and by as much, in either direction.

    Where copies lie in memory matters a little to speed, and is in no interval: the weights are not the cause then.
    """
    for other in tests:
        if (other["arm"], other["scope"]) == (CONTROL, one["scope"]) and other["pairs"]:
            low, high = (math.log(end) for end in other["interval95"])
            return low * high > 0 and abs(math.log(one["ratio"])) <= max(abs(low), abs(high))
    return False


def whole(study: Study, size: str, layers: int | None) -> bool:
    """Whether a score is of all the encoder's layers (None: its task has no choice)."""
    return layers in (None, study["sizes"][size]["layers"])


def tests_of(study: Study, language: str) -> list[Equivalence]:
    """The tests of one language alone, of every arm but the control; those without a pair left out."""
    return [one for one in study["equivalence"] if one["scope"] == language and one["arm"] != CONTROL and one["pairs"]]


def outside(one: Equivalence) -> bool:
    """Whether the 95 % interval lies wholly beyond the margin, the same factor upwards and downwards."""
    low, high = one["interval95"]
    return low > 1 + one["margin"] or high < 1 / (1 + one["margin"])


def too_few(one: Equivalence) -> bool:
    """Whether a test has fewer pairs than it takes to say anything."""
    return list(one["interval95"]) == list(NOTHING_KNOWN)


def change_of(one: Equivalence) -> str:
    """What a test found, with the interval that is compared with the margin; without, where too few pairs give none."""
    if too_few(one):
        return f"{signed(100 * (one['ratio'] - 1))}\N{NO-BREAK SPACE}%"
    return change_text(one["ratio"], one["interval90"])


def change_text(ratio: float, interval: Sequence[float]) -> str:
    """A ratio of times as a change in percent with its interval, in one piece: with no-break spaces."""
    low, high = (signed(100 * (end - 1)) for end in interval)
    return f"{signed(100 * (ratio - 1))}\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}[{low},\N{NO-BREAK SPACE}{high}]"
