"""The study's tests: the control, then every arm in every part of the study; and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np

from xfast.study import document, statistics, view
from xfast.study.cells import Cells, parts
from xfast.study.document import CONTROL, INTERMEDIATE, NOTHING_KNOWN
from xfast.study.factors import SINGLE, Settings
from xfast.study.languages import language as language_facts
from xfast.study.profiles import JOSHI_CLASS
from xfast.study.view import ALL


def tests_of(cells: Cells, settings: Settings) -> list[document.Equivalence]:
    """The A/A control first, then the arms: all cells, every size and engine, every resource group, every language."""
    found = [_test(cells, cells.keys, ALL, CONTROL, settings)]
    there = {arm for key in cells.keys for arm in cells.arms(key)}
    for arm in (INTERMEDIATE, CONTROL):
        if arm not in there:
            continue
        if arm == INTERMEDIATE:
            found.append(_test(cells, cells.keys, ALL, arm, settings))
        for scope, keys in _scopes(cells):
            if any(arm in cells.arms(key) for key in keys):  # a size may have no room for an arm
                found.append(_test(cells, keys, scope, arm, settings))
    return found


def _scopes(cells: Cells) -> Iterator[tuple[str, list[str]]]:
    """Parts of the study that are tested on their own."""
    by: list[Callable[[dict[str, str]], str]] = [
        lambda parts: f"{parts['size']} {parts['engine']}",
        lambda parts: language_facts(parts["language"])["group"],
        lambda parts: "latency" if parts["policy"] == SINGLE else "throughput",
        lambda parts: parts["language"],
    ]
    for name in by:
        groups: dict[str, list[str]] = {}
        for key in cells.keys:
            groups.setdefault(name(parts(key)), []).append(key)
        yield from groups.items()


def _test(cells: Cells, keys: Sequence[str], scope: str, arm: str, settings: Settings) -> document.Equivalence:
    logs = [cells.logs(key, arm) for key in keys if arm in cells.arms(key)]
    pairs = sum(map(len, logs))
    if pairs < statistics.MIN_UNITS:
        ratio = float(np.exp(np.median(np.concatenate(logs)))) if logs else 1.0
        known = NOTHING_KNOWN, NOTHING_KNOWN, 1.0, document.UNDECIDED
        found = statistics.Comparison(ratio, *known, pairs, len(logs), None, None)
    else:
        found = statistics.compare(logs, settings.margin)
    row = {**asdict(found), "interval90": list(found.interval90), "interval95": list(found.interval95)}
    return document.part(document.Equivalence, {**row, "scope": scope, "arm": arm, "margin": settings.margin})


def notes(settings: Settings, tests: Sequence[document.Equivalence]) -> Iterator[str]:
    """What the tests leave open, and what else than the weights may be behind them; the first is the control's."""
    control = tests[0]
    low, high = control["interval95"]
    margin = f"{100 * settings.margin:g} %"
    if control["pairs"] and view.too_few(control):
        yield f"The A/A control has too few pairs ({control['pairs']}) to say how much of a difference is noise."
    elif not document.passed(control):
        yield (
            f"The A/A control failed: the same weights against themselves came out at {control['ratio']:.4f} "
            f"[{low:.4f}, {high:.4f}], too noisy for a margin of {margin}."
        )
        if needed := view.needed(control):
            had, wanted, unit = needed
            yield f"About {wanted} {unit} are needed at this noise, {had} were had."
    mine = [test for test in tests[1:] if test["arm"] == INTERMEDIATE]
    undecided = [test for test in mine if test["verdict"] == document.UNDECIDED]
    if undecided:
        yield (
            f"{len(undecided)} comparisons are undecided at a margin of {margin}; their table says how many cells it "
            "takes where more would do."
        )
    different = [test["scope"] for test in mine if test["verdict"] == document.DIFFERENT]
    if named := [scope for scope in different if scope != ALL]:
        equivalent = any(test["scope"] == ALL and test["verdict"] == document.EQUIVALENT for test in mine)
        yield f"{'Equivalent over all cells, but different' if equivalent else 'Different'} in: {', '.join(named)}."
    yield from _doubts(different, tests)


def _doubts(different: Sequence[str], tests: Sequence[document.Equivalence]) -> Iterator[str]:
    """What else than other weights may have made these parts of a study differ."""
    mine = {test["scope"]: test for test in tests if test["arm"] == INTERMEDIATE and test["pairs"]}
    if both := [scope for scope in different if view.like_the_control(mine[scope], tests)]:
        yield f"The control differs as much in: {', '.join(both)}; there the weights are not the cause."
    languages = [scope for scope in mine if scope in JOSHI_CLASS]
    if any(scope in different for scope in languages):
        chance = statistics.ALPHA * len(languages)
        yield (
            f"Of {len(languages)} languages that are tested one by one, at most about {chance:.1f} differ by chance "
            "alone."
        )
