"""From observations to the document: medians, intervals, tests, models of time, Pareto fronts. It measures nothing."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xfast.study import accuracy, arms, document, fronts, statistics, view
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE, PERCENTILES
from xfast.study.factors import CHECKPOINT, SINGLE, STOCK, EngineName, Settings, batch_sizes
from xfast.study.languages import language as language_facts
from xfast.study.languages import ordered
from xfast.study.profiles import GROUPS, JOSHI_CLASS
from xfast.study.store import Record, settings_of

Visits = list[Record]

ALL = "all"

NOTHING_KNOWN = (0.01, 100.0)
"""The interval of a ratio of which there are too few pairs to say anything."""


class _Cells:
    """The cells that were measured, with their visits, in the order of the tables."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.facts: dict[str, Record] = {}
        self.visits: dict[str, dict[int, Record]] = {}
        for record in records:
            if record["kind"] == "cell":
                self.facts[record["cell"]] = record
            if record["kind"] == "visit":  # the last one counts, should a run have measured it twice
                self.visits.setdefault(record["cell"], {})[record["round"]] = record
        languages = ordered({_parts(key)["language"] for key in self.visits})
        self.keys = sorted(
            self.visits,
            key=lambda key: (languages.index(_parts(key)["language"]), list(_parts(key).values())),
        )

    def of(self, key: str) -> Visits:
        """Its visits, by round."""
        return [visit for _, visit in sorted(self.visits[key].items())]

    def seconds(self, key: str, arm: str) -> list[float]:
        """Of one pass, visit by visit (in a latency cell the sum over all single responses)."""
        return [sum(visit["seconds"][arm]) for visit in self.of(key)]

    def logs(self, key: str, arm: str) -> statistics.Floats:
        """log(time of the arm / time of the baseline), visit by visit."""
        return statistics.log_ratios(self.seconds(key, arm), self.seconds(key, BASELINE))

    def arms(self, key: str) -> list[str]:
        """Those that ran in all its visits: a run that was continued may have had memory for fewer, or for more."""
        first, *others = [visit["seconds"] for visit in self.of(key)]
        return [arm for arm in first if all(arm in each for each in others)]


def _parts(key: str) -> dict[str, str]:
    size, engine, task, language, policy, batch = key.split("/")
    return {"size": size, "engine": engine, "task": task, "language": language, "policy": policy, "batch_size": batch}


def document_of(records: Sequence[Record], path: Path) -> document.Study:
    """The whole document.

    Args:
        records: of a store.
        path: of its file, for messages.

    Raises:
        DataFileError: the settings in the first line are damaged.
    """
    settings = settings_of(list(records), path)
    cells = _Cells(records)
    rows = [_cell(cells, key) for key in cells.keys]
    scores = fronts.scores(records)
    tests = _equivalence(cells, settings)
    ended = [record for record in records if record["kind"] == "ended"]
    noted = [record["text"] for record in records if record["kind"] == "note"]
    engines = {record["engine"]: record for record in records if record["kind"] == "engine"}
    sizes = {size: arms.size_facts(size) for size in settings.sizes if size != CHECKPOINT}
    sizes |= {record["size"]: record for record in records if record["kind"] == "size"}
    # Probes are stored before the first visit: a run that was stopped has languages without a cell.
    named = [record for record in records if record["kind"] in ("probe", "accuracy")]
    sized = dict.fromkeys([*(row["size"] for row in rows), *(record["size"] for record in named)])
    spoken = ordered({*(row["language"] for row in rows), *(record["language"] for record in named)})
    names = dict.fromkeys([*(row["engine"] for row in rows), *engines, *(r["engine"] for r in named if "engine" in r)])
    return document.Study(
        format=document.FORMAT,
        title="Throughput, latency and accuracy by language",
        created=ended[-1]["at"] if ended else "unfinished",
        seconds=_seconds(records),
        settings=settings.as_dict(),
        text="profiles" if settings.data is None else "real text",
        machine=records[0]["machine"],
        arms={arm: document.Arm(**facts) for arm, facts in arms.describe(settings).items()},  # type: ignore[typeddict-item]
        sizes={size: _size(sizes[size]) for size in sized},
        held=_held(records),
        engines={name: _engine(name, engines.get(name), settings.device) for name in names},
        languages={code: language_facts(code) for code in spoken},
        cells=rows,
        control=tests[0],
        equivalence=tests[1:],
        scaling=_scaling(rows, settings, sizes),
        cost_models=_cost_models(cells, rows),
        accuracy=scores,
        pareto=fronts.pareto(rows, scores, settings, sizes),
        trades=fronts.trades(rows, scores, settings, sizes),
        probes=_probes(records),
        memory=_memory(records),
        skipped=_skipped(records, cells, settings),
        notes=list(dict.fromkeys([*_notes(settings, tests), *_tails(rows), *_plan(records)["notes"], *noted])),
    )


def _seconds(records: Sequence[Record]) -> float:
    """Spent by all runs; of one that was killed, until its last record."""
    spent: dict[int, float] = {}
    for record in records:
        if "run" in record:
            spent[record["run"]] = max(record["after"], spent.get(record["run"], 0.0))
    before = [record["seconds"] for record in records if record["kind"] == "ended" and "run" not in record]
    return round(sum(before) + sum(spent.values()), 1)


def _size(facts: Record) -> document.Size:
    return document.Size(parameters=facts["parameters"], layers=facts["layers"], hidden_size=facts["hidden_size"])


def _held(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """How the arms of each size and engine were held when they were last measured."""
    known = [record for record in records if record["kind"] == "engine" and "held" in record]
    return {f"{record['size']} {record['engine']}": record["held"] for record in known}


def _engine(name: str, record: Record | None, device: str) -> document.Engine:
    engine = EngineName.parse(name)
    explain = "" if record is None else record["explain"]
    return document.Engine(backend=engine.backend, precision=engine.precision, device=device, explain=explain)


def _cell(cells: _Cells, key: str) -> document.Cell:
    parts, facts = _parts(key), cells.facts[key]
    latency = parts["policy"] == SINGLE
    names = cells.arms(key)
    return document.Cell(
        key=key,
        kind="latency" if latency else "throughput",
        size=parts["size"],
        engine=parts["engine"],
        task=parts["task"],
        language=parts["language"],
        policy=parts["policy"],
        batch_size=int(parts["batch_size"]),
        samples=facts["samples"],
        tokens=facts["tokens"],
        words=facts["words"],
        padding=facts["padding"],
        fertility=facts["fertility"],
        windows_per_example=facts["windows_per_example"],
        rounds=len(cells.of(key)),
        throughput={} if latency else {arm: _throughput(cells, key, arm) for arm in names},
        latency={arm: _latency(cells, key, arm) for arm in names} if latency else {},
        ratios={arm: _ratio(cells, key, arm) for arm in names if arm != BASELINE},
    )


def _throughput(cells: _Cells, key: str, arm: str) -> document.Throughput:
    facts = cells.facts[key]
    seconds = cells.seconds(key, arm)
    middle = plain.median(seconds)
    low, high = statistics.interval([facts["tokens"] / each for each in seconds])
    joules = [visit["joules"].get(arm) for visit in cells.of(key)]
    known = [each for each in joules if each is not None]
    return document.Throughput(
        samples_per_s=facts["samples"] / middle,
        tokens_per_s=facts["tokens"] / middle,
        words_per_s=facts["words"] / middle if facts["words"] else None,
        tokens_per_s_interval=[low, high],
        joules_per_sample=plain.median(known) / facts["samples"] if known else None,
    )


def _latency(cells: _Cells, key: str, arm: str) -> document.Latency:
    """Quantiles over texts; a visit's responses are all texts in their order, then all again."""
    texts = cells.facts[key]["samples"]
    every = np.concatenate([np.reshape(visit["seconds"][arm], (-1, texts)) for visit in cells.of(key)])
    medians = 1e3 * np.median(every, axis=0)
    p50, p95, p99 = (float(value) for value in np.percentile(medians, [50, 95, 99]))
    unknown = {
        name: f"{texts} texts; from {needed} on one lies beyond it"
        for name, needed in document.TEXTS_NEEDED.items()
        if texts < needed
    }
    return document.Latency(
        p50_ms=p50,
        p95_ms=None if "p95_ms" in unknown else p95,
        p99_ms=None if "p99_ms" in unknown else p99,
        texts=texts,
        responses=every.size,
        quantiles_ms=[float(value) for value in np.percentile(medians, PERCENTILES)],
        unknown=unknown,
    )


def _ratio(cells: _Cells, key: str, arm: str) -> document.Ratio:
    ratios = np.exp(cells.logs(key, arm)).tolist()
    return document.Ratio(ratio=plain.median(ratios), interval95=list(statistics.interval(ratios)), pairs=len(ratios))


def _equivalence(cells: _Cells, settings: Settings) -> list[document.Equivalence]:
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


def _scopes(cells: _Cells) -> Iterable[tuple[str, list[str]]]:
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
            groups.setdefault(name(_parts(key)), []).append(key)
        yield from groups.items()


def _test(cells: _Cells, keys: Sequence[str], scope: str, arm: str, settings: Settings) -> document.Equivalence:
    logs = [cells.logs(key, arm) for key in keys if arm in cells.arms(key)]
    made = document.Equivalence(
        scope=scope,
        arm=arm,
        ratio=float(np.exp(np.median(np.concatenate(logs)))) if logs else 1.0,
        interval90=list(NOTHING_KNOWN),
        interval95=list(NOTHING_KNOWN),
        p_value=1.0,
        margin=settings.margin,
        verdict=document.UNDECIDED,
        pairs=sum(map(len, logs)),
        cells=len(logs),
        pairs_needed=None,
    )
    if made["pairs"] < statistics.MIN_UNITS:
        return made
    found = statistics.compare(logs, settings.margin)
    return {
        **made,
        "ratio": found.ratio,
        "interval90": list(found.interval90),
        "interval95": list(found.interval95),
        "p_value": found.p_value,
        "verdict": found.verdict,
        "pairs_needed": found.pairs_needed,
    }


def _scaling(rows: Sequence[document.Cell], settings: Settings, sizes: Mapping[str, Record]) -> list[document.Scaling]:
    """Geometric means over languages, by size, engine, arm and resource group; the first policy and batch size.

    Over what every size has been measured on: a run that was stopped has less of some, and not the same.
    """
    first = (settings.policies[0], batch_sizes(settings, settings.policies[0])[0])
    batched = [row for row in rows if (row["policy"], row["batch_size"]) == first]
    found: list[document.Scaling] = []
    for engine, arm in dict.fromkeys((row["engine"], arm) for row in batched for arm in row["throughput"]):
        if arm == CONTROL:
            continue
        fast = _shared([row for row in batched if row["engine"] == engine and arm in row["throughput"]])
        slow = _shared([row for row in rows if row["engine"] == engine and arm in row["latency"]])
        for size, mine in fast.items():
            for group in (ALL, *GROUPS):
                batches, single = (
                    [row for row in each if _in_group(row["language"], group)] for each in (mine, slow.get(size, ()))
                )
                if batches:
                    found.append(_scaling_row(sizes[size], size, engine, arm, group, batches, single))
    return found


def _shared(rows: Sequence[document.Cell]) -> dict[str, list[document.Cell]]:
    """The rows by size, of the tasks and languages that all sizes have."""
    by_size: dict[str, list[document.Cell]] = {}
    for row in rows:
        by_size.setdefault(row["size"], []).append(row)
    places = [{(row["task"], row["language"]) for row in mine} for mine in by_size.values()]
    common = set.intersection(*places) if places else set()
    return {size: [row for row in mine if (row["task"], row["language"]) in common] for size, mine in by_size.items()}


def _scaling_row(
    facts: Record,
    size: str,
    engine: str,
    arm: str,
    group: str,
    batches: Sequence[document.Cell],
    single: Sequence[document.Cell],
) -> document.Scaling:
    mean = statistics.geometric_mean
    return document.Scaling(
        size=size,
        engine=engine,
        arm=arm,
        group=group,
        parameters=facts["parameters"],
        samples_per_s=mean([row["throughput"][arm]["samples_per_s"] for row in batches]),
        tokens_per_s=mean([row["throughput"][arm]["tokens_per_s"] for row in batches]),
        p50_ms=mean([row["latency"][arm]["p50_ms"] for row in single]) if single else None,
    )


def _in_group(code: str, group: str) -> bool:
    return group in (ALL, language_facts(code)["group"])


def _cost_models(cells: _Cells, rows: Sequence[document.Cell]) -> list[document.CostModel]:
    """One for each size, engine, task, policy and batch size that has enough languages."""
    kinds: dict[tuple[str, str, str, str, int], list[document.Cell]] = {}
    for row in rows:
        if row["throughput"]:
            kind = (row["size"], row["engine"], row["task"], row["policy"], row["batch_size"])
            kinds.setdefault(kind, []).append(row)
    return [_cost_model(cells, mine) for mine in kinds.values() if len(mine) >= statistics.MIN_CELLS]


def _cost_model(cells: _Cells, rows: Sequence[document.Cell]) -> document.CostModel:
    """Of the tokens that the engine computes: without padding, but for transformers itself."""
    first = rows[0]
    stock = EngineName.parse(first["engine"]).backend == STOCK
    seconds = [row["samples"] / row["throughput"][BASELINE]["samples_per_s"] for row in rows]
    tokens = [row["tokens"] / (1 - row["padding"] if stock else 1) for row in rows]
    sequences = [float(cells.facts[row["key"]]["sequences"]) for row in rows]
    model = statistics.time_model(seconds, tokens, sequences)
    predicted = model(np.asarray(tokens), np.asarray(sequences))
    parted = [row for row in rows if row["fertility"]]
    rates = [float(np.log(row["throughput"][BASELINE]["samples_per_s"])) for row in parted]
    causes = {
        "fertility": [float(np.log(row["fertility"] or 1.0)) for row in parted],
        "padding": [row["padding"] for row in parted],
    }
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
        explained=statistics.explained(rates, causes),
        predicted={row["language"]: row["samples"] / float(s) for row, s in zip(rows, predicted, strict=True)},
        seen={row["language"]: row["throughput"][BASELINE]["samples_per_s"] for row in rows},
    )


def _probes(records: Sequence[Record]) -> list[document.Probe]:
    last: dict[tuple[Any, ...], Record] = {}
    known = [record for record in records if record.get("value") is not None]  # null: it was not finite
    found = [record for record in known if record["kind"] == "probe"]
    found += accuracy.best_layers([record for record in known if record["kind"] == "accuracy"])
    for record in found:
        last[tuple(record[n] for n in ("probe", "arm", "size", "task", "language", "x", "what"))] = record
    return [document.part(document.Probe, row) for row in last.values()]


def _memory(records: Sequence[Record]) -> list[document.Memory]:
    last: dict[tuple[str, str], Record] = {}
    for record in records:  # each run that measured anew has one
        key = record["kind"] == "memory" and (record["size"], record["engine"])
        if key and record["peak_bytes"] >= last.get(key, record)["peak_bytes"]:
            last[key] = record
    return [document.part(document.Memory, row) for row in last.values()]


def _plan(records: Sequence[Record]) -> Record:
    """What the last run wanted to measure; nothing where no run has got so far."""
    nothing: Record = {"cells": [], "skipped": [], "notes": []}
    return next((record for record in reversed(records) if record["kind"] == "plan"), nothing)


def _skipped(records: Sequence[Record], cells: _Cells, settings: Settings) -> list[document.Skipped]:
    done = {record["job"] for record in records if record["kind"] == "done"}  # also what a former run could not do
    missed = [r for r in records if r["kind"] == "skipped" and r.get("job") not in done]
    missed = [*_plan(records)["skipped"], *missed]
    found = [document.Skipped(what=record["what"], why=record["why"]) for record in missed]
    failed: dict[str, str] = {}
    for record in records:
        if record["kind"] in ("failed", "ended_group"):  # the last run's outcome counts
            failed[f"{record['size']} {record['engine']}"] = record.get("why", "")
    found += [document.Skipped(what=what, why=why) for what, why in failed.items() if why]
    found += _unvisited(_plan(records)["cells"], cells, {one["what"] for one in found}, settings.rounds)
    return [one for index, one in enumerate(found) if one not in found[:index]]


def _unvisited(
    planned: Iterable[str], cells: _Cells, explained: Container[str], rounds: int
) -> Iterable[document.Skipped]:
    """Visits that were planned and are not there, where nothing else says why."""
    counts: dict[str, list[int]] = {}
    for key in planned:
        where = f"{_parts(key)['size']} {_parts(key)['engine']}"
        if where not in explained and f"{where} {_parts(key)['task']}" not in explained:
            had, all_ = counts.setdefault(where, [0, 0])
            counts[where] = [had + min(rounds, len(cells.visits.get(key, ()))), all_ + rounds]
    for where, (had, all_) in counts.items():
        if had < all_:
            what = f"{all_ - had} of {all_} visits to cells of {where}"
            yield document.Skipped(what=what, why="the run was stopped before them")


def _tails(rows: Sequence[document.Cell]) -> Iterator[str]:
    """Which quantiles of latency are not given."""
    found = [figures for row in rows for figures in row["latency"].values()]
    for name, needed in document.TEXTS_NEEDED.items():
        few = {figures["texts"] for figures in found if name in figures["unknown"]}
        if few:
            counts = f"{min(few)} to {max(few)}" if len(few) > 1 else f"{min(few)}"
            yield (
                f"{name.removesuffix('_ms')} of latency is not given where a cell has {counts} texts; it takes "
                f"{needed}, and answering a text again is no other text."
            )


def _notes(settings: Settings, tests: Sequence[document.Equivalence]) -> list[str]:
    notes = []
    if not settings.baseline:
        notes.append("Weights are seeded at random: speeds hold for trained weights too, accuracies are not measured.")
    control = tests[0]
    low, high = control["interval95"]
    margin = f"{100 * settings.margin:g} %"
    if not document.passed(control):
        notes.append(
            f"The A/A control failed: the same weights against themselves came out at {control['ratio']:.4f} "
            f"[{low:.4f}, {high:.4f}], too noisy for a margin of {margin}."
        )
        if control["pairs_needed"]:
            notes.append(
                f"About {control['pairs_needed']} pairs are needed at this noise, {control['pairs']} were had."
            )
    mine = [test for test in tests[1:] if test["arm"] == INTERMEDIATE]
    undecided = [test for test in mine if test["verdict"] == document.UNDECIDED]
    if undecided:
        notes.append(f"{len(undecided)} comparisons are undecided at a margin of {margin}; see pairs_needed.")
    different = [test["scope"] for test in mine if test["verdict"] == document.DIFFERENT and test["scope"] != ALL]
    if different and mine[0]["verdict"] == document.EQUIVALENT:
        notes.append(f"Equivalent over all cells, but different in: {', '.join(different)}.")
        notes += _doubts(different, tests)
    return notes


def _doubts(different: Sequence[str], tests: Sequence[document.Equivalence]) -> Iterator[str]:
    """What else than other weights may have made these parts of a study differ."""
    mine = {test["scope"]: test for test in tests if test["arm"] == INTERMEDIATE and test["pairs"]}
    if both := [scope for scope in different if view.like_the_control(mine[scope], tests)]:
        yield f"The control differs as much in: {', '.join(both)}; there the weights are not the cause."
    languages = [scope for scope in mine if scope in JOSHI_CLASS]
    if any(scope in different for scope in languages):
        chance = statistics.ALPHA * len(languages)
        yield f"Of {len(languages)} languages that are tested one by one, about {chance:.1f} differ by chance alone."
