"""What a study planned or was asked for and does not have, and why."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

from xfast.study import document
from xfast.study.cells import Cells, parts
from xfast.study.document import INTERMEDIATE
from xfast.study.factors import Settings
from xfast.study.store import Record


def plan(records: Sequence[Record]) -> Record:
    """What the last run wanted to measure; nothing where no run has got so far."""
    nothing: Record = {"cells": [], "skipped": [], "notes": []}
    return next((record for record in reversed(records) if record["kind"] == "plan"), nothing)


def skipped(records: Sequence[Record], cells: Cells, settings: Settings) -> list[document.Skipped]:
    """What is missing; not what one run skipped and another one has measured."""
    done = {record["job"] for record in records if record["kind"] == "done"}  # also what a former run could not do
    missed = [r for r in records if r["kind"] == "skipped" and r.get("job") not in done]
    missed = [*plan(records)["skipped"], *missed]
    measured = _measured(records, cells, settings)
    found = [document.Skipped(what=one["what"], why=one["why"]) for one in missed if one["what"] not in measured]
    failed: dict[str, str] = {}
    for record in records:
        if record["kind"] in ("failed", "ended_group"):  # the last run's outcome counts
            failed[f"{record['size']} {record['engine']}"] = record.get("why", "")
    found += [document.Skipped(what=what, why=why) for what, why in failed.items() if why]
    found += _unvisited(plan(records)["cells"], cells, {one["what"] for one in found}, settings.rounds)
    return [one for index, one in enumerate(found) if one not in found[:index]]


def _measured(records: Sequence[Record], cells: Cells, settings: Settings) -> set[str]:
    """The names under which parts of the study are skipped, of those parts whose cells have all their visits."""
    planned = (key for record in records if record["kind"] == "plan" for key in record["cells"])
    by_name: dict[str, list[str]] = {}
    for key in dict.fromkeys((*planned, *cells.visits)):
        mine = parts(key)
        group = f"{mine['size']} {mine['engine']}"
        for name in (group, f"{group} {mine['task']}", f"{mine['size']} {mine['task']}"):
            by_name.setdefault(name, []).append(key)
    whole = {name: keys for name, keys in by_name.items() if all(cells.whole(key, settings.rounds) for key in keys)}
    trained = {name for name, keys in whole.items() if all(INTERMEDIATE in cells.arms(key) for key in keys)}
    return {*whole, *(f"{INTERMEDIATE} arm of {name}" for name in trained)}


def _unvisited(
    planned: Iterable[str], cells: Cells, explained: Container[str], rounds: int
) -> Iterator[document.Skipped]:
    """Visits that were planned and are not there, where nothing else says why."""
    counts: dict[str, list[int]] = {}
    for key in planned:
        where = f"{parts(key)['size']} {parts(key)['engine']}"
        if where not in explained and f"{where} {parts(key)['task']}" not in explained:
            had, all_ = counts.setdefault(where, [0, 0])
            counts[where] = [had + min(rounds, len(cells.visits.get(key, ()))), all_ + rounds]
    for where, (had, all_) in counts.items():
        if had < all_:
            what = f"{all_ - had} of {all_} visits to cells of {where}"
            yield document.Skipped(what=what, why="the run was stopped before them")
