"""From observations to the document: medians, intervals, tests, models of time, Pareto fronts. It measures nothing."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xfast.study import accuracy, arms, document, equivalence, fronts, left_out, speeds, statistics
from xfast.study.cells import Cells, parts
from xfast.study.document import BASELINE, PERCENTILES, rank
from xfast.study.factors import CHECKPOINT, SINGLE, EngineName, Settings
from xfast.study.languages import language as language_facts
from xfast.study.languages import ordered
from xfast.study.store import Record, settings_of

_MIN_TICKS = 400
"""Of an energy counter, in the time that it was read over: each stretch has one too many or too few, 5 % in all."""


def document_of(records: Sequence[Record], path: Path) -> document.Study:
    """The whole document.

    Args:
        records: of a store.
        path: of its file, for messages.

    Raises:
        DataFileError: the settings in the first line are damaged.
    """
    settings = settings_of(list(records), path)
    cells = Cells(records, settings)
    rows = [_cell(cells, key) for key in cells.keys]
    scores = fronts.scores(records)
    tests = equivalence.tests_of(cells, settings)
    ended = [record for record in records if record["kind"] == "ended"]
    noted = [record["text"] for record in records if record["kind"] == "note"]
    sizes = {size: arms.size_facts(size) for size in settings.sizes if size != CHECKPOINT}
    sizes |= {record["size"]: record for record in records if record["kind"] == "size"}
    # Probes are stored before the first visit: a run that was stopped has languages without a cell.
    named = [record for record in records if record["kind"] in ("probe", "accuracy")]
    sized = {*(row["size"] for row in rows), *(record["size"] for record in named)}
    spoken = ordered({*(row["language"] for row in rows), *(record["language"] for record in named)})
    explained = _explained(records)
    names = {*(row["engine"] for row in rows), *explained, *(one["engine"] for one in named if "engine" in one)}
    remarks = [*_weights(settings), *equivalence.notes(settings, tests), *_tails(rows)]
    return document.Study(
        format=document.FORMAT,
        title="Throughput, latency and accuracy by language",
        created=ended[-1]["at"] if ended else "unfinished",
        seconds=_seconds(records),
        settings=settings.as_dict(),
        text="profiles" if settings.data is None else "real text",
        machine=records[0]["machine"],
        arms={arm: document.Arm(**facts) for arm, facts in arms.describe(settings).items()},  # type: ignore[typeddict-item]
        sizes={size: _size(sizes[size]) for size in _in_order(sized, settings.sizes)},
        held=_held(records),
        engines={
            name: _engine(name, explained.get(name, ""), settings.device) for name in _in_order(names, settings.engines)
        },
        languages={code: language_facts(code) for code in spoken},
        cells=rows,
        control=tests[0],
        equivalence=tests[1:],
        scaling=speeds.scaling(rows, settings, sizes),
        cost_models=speeds.cost_models(cells, rows),
        accuracy=scores,
        pareto=fronts.pareto(rows, scores, settings, sizes),
        trades=fronts.trades(rows, scores, settings, sizes),
        probes=_probes(records),
        memory=_memory(records),
        skipped=[*left_out.skipped(records, cells, settings), *fronts.untraded(rows, scores, settings, sizes)],
        notes=list(dict.fromkeys([*remarks, *left_out.plan(records)["notes"], *noted])),
    )


def _in_order(names: set[str], asked: Sequence[str]) -> list[str]:
    """As they were asked for; the shown setting and every table follow this order."""
    return sorted(names, key=lambda name: (rank(asked, name), name))


def _weights(settings: Settings) -> Iterator[str]:
    if not settings.baseline:
        yield "Weights are seeded at random: speeds hold for trained weights too, accuracies are not measured."


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


def _explained(records: Sequence[Record]) -> dict[str, str]:
    """By engine what it made of the models: of every size and head, which may have gone different ways."""
    texts: dict[str, dict[str, str]] = {}
    for record in records:
        if record["kind"] == "engine":
            where = f"{record['size']} {record['head']}" if "head" in record else record["size"]
            texts.setdefault(record["engine"], {})[where] = record["explain"]
    found = {}
    for engine, by_place in texts.items():
        places: dict[str, list[str]] = {}
        for where, text in by_place.items():
            places.setdefault(text, []).append(where)
        named = (f"{', '.join(mine)}: {text}" for text, mine in places.items())
        found[engine] = next(iter(places)) if len(places) == 1 else "\n".join(named)
    return found


def _engine(name: str, explain: str, device: str) -> document.Engine:
    engine = EngineName.parse(name)
    return document.Engine(backend=engine.backend, precision=engine.precision, device=device, explain=explain)


def _cell(cells: Cells, key: str) -> document.Cell:
    where, facts = parts(key), cells.facts[key]
    latency = where["policy"] == SINGLE
    names = cells.arms(key)
    return document.Cell(
        key=key,
        kind="latency" if latency else "throughput",
        size=where["size"],
        engine=where["engine"],
        task=where["task"],
        language=where["language"],
        policy=where["policy"],
        batch_size=int(where["batch_size"]),
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


def _throughput(cells: Cells, key: str, arm: str) -> document.Throughput:
    facts = cells.facts[key]
    seconds = cells.seconds(key, arm)
    middle = plain.median(seconds)
    low, high = statistics.interval([facts["tokens"] / each for each in seconds])
    visits = cells.of(key)
    known = [each for visit in visits if (each := visit["joules"].get(arm)) is not None]
    # older studies do not say how coarse their counters were
    ticks = [visit["ticks"].get(arm) or 0.0 for visit in visits if "ticks" in visit]
    if ticks and sum(ticks) < _MIN_TICKS:
        known = []
    return document.Throughput(
        samples_per_s=facts["samples"] / middle,
        tokens_per_s=facts["tokens"] / middle,
        words_per_s=facts["words"] / middle if facts["words"] else None,
        tokens_per_s_interval=[low, high],
        joules_per_sample=plain.median(known) / facts["samples"] if known else None,
    )


def _latency(cells: Cells, key: str, arm: str) -> document.Latency:
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


def _ratio(cells: Cells, key: str, arm: str) -> document.Ratio:
    ratios = np.exp(cells.logs(key, arm)).tolist()
    return document.Ratio(ratio=plain.median(ratios), interval95=list(statistics.interval(ratios)), pairs=len(ratios))


def _probes(records: Sequence[Record]) -> list[document.Probe]:
    last: dict[tuple[Any, ...], Record] = {}
    known = [record for record in records if record.get("value") is not None]  # null: it was not finite
    found = [record for record in known if record["kind"] == "probe"]
    found += accuracy.best_layers([record for record in known if record["kind"] == "accuracy"])
    for record in found:
        last[tuple(record[n] for n in ("probe", "arm", "size", "task", "language", "x", "what"))] = record
    return [document.part(document.Probe, row) for row in last.values()]


def _memory(records: Sequence[Record]) -> list[document.Memory]:
    """The largest peak that a process of each size and engine told."""
    last: dict[tuple[str, str], Record] = {}
    runs: dict[tuple[str, str], set[int]] = {}
    for record in records:
        if record["kind"] == "memory":  # each run that measured anew has some
            key = record["size"], record["engine"]
            if record["peak_bytes"] >= last.get(key, record)["peak_bytes"]:
                last[key] = record
        if record["kind"] == "visit":
            mine = parts(record["cell"])
            runs.setdefault((mine["size"], mine["engine"]), set()).add(record.get("run", 1))
    resumed = {key for key, mine in runs.items() if len(mine) > 1}
    return [
        document.part(document.Memory, {**row, **({"resumed": True} if key in resumed else {})})
        for key, row in last.items()
    ]


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
