"""From observations to the document: medians, intervals, tests, models of time, Pareto fronts. It measures nothing."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xfast.study import accuracy, arms, document, statistics
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE, PERCENTILES
from xfast.study.factors import CHECKPOINT, SINGLE, EngineName, Settings
from xfast.study.languages import language as language_facts
from xfast.study.languages import ordered
from xfast.study.profiles import GROUPS
from xfast.study.store import Record, settings_of

Visits = list[Record]

Costs = dict[tuple[str, str, str, str, str], float]
"""Milliseconds a sample by arm, size, engine, task and language."""

ALL = "all"


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

    def arms(self, key: str) -> list[str]:
        """Those that ran in it."""
        return list(self.of(key)[0]["seconds"])


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
    scores = _scores(records)
    tests = _equivalence(cells, settings)
    ended = [record for record in records if record["kind"] == "ended"]
    engines = {record["engine"]: record for record in records if record["kind"] == "engine"}
    sizes = {size: arms.size_facts(size) for size in settings.sizes if size != CHECKPOINT}
    sizes |= {record["size"]: record for record in records if record["kind"] == "size"}
    return document.Study(
        format=document.FORMAT,
        title="Throughput, latency and accuracy by language",
        created=ended[-1]["at"] if ended else "unfinished",
        seconds=sum(record["seconds"] for record in ended),
        settings=settings.as_dict(),
        text="profiles" if settings.data is None else "real text",
        machine=records[0]["machine"],
        arms={arm: document.Arm(**facts) for arm, facts in arms.describe(settings).items()},  # type: ignore[typeddict-item]
        sizes={size: _size(sizes[size]) for size in dict.fromkeys(row["size"] for row in rows)},
        engines={name: _engine(name, record, settings.device) for name, record in engines.items()},
        languages={code: language_facts(code) for code in dict.fromkeys(row["language"] for row in rows)},
        cells=rows,
        control=tests[0],
        equivalence=tests[1:],
        scaling=_scaling(rows, sizes),
        cost_models=_cost_models(cells, rows),
        accuracy=scores,
        pareto=_pareto(rows, scores, sizes),
        probes=_probes(records),
        memory=_memory(records),
        skipped=_skipped(records),
        notes=[*_notes(settings, tests), *(record["text"] for record in records if record["kind"] == "note")],
    )


def _size(facts: Record) -> document.Size:
    return document.Size(parameters=facts["parameters"], layers=facts["layers"], hidden_size=facts["hidden_size"])


def _engine(name: str, record: Record, device: str) -> document.Engine:
    engine = EngineName.parse(name)
    return document.Engine(backend=engine.backend, precision=engine.precision, device=device, explain=record["explain"])


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
    low, high = statistics.median_interval([facts["tokens"] / each for each in seconds])
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
    every = [1e3 * second for visit in cells.of(key) for second in visit["seconds"][arm]]
    p50, p95, p99 = np.percentile(every, [50, 95, 99])
    return document.Latency(
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        responses=len(every),
        quantiles_ms=[float(value) for value in np.percentile(every, PERCENTILES)],
    )


def _ratio(cells: _Cells, key: str, arm: str) -> document.Ratio:
    logs = statistics.log_ratios(cells.seconds(key, arm), cells.seconds(key, BASELINE))
    middle, low, high = statistics.ratio_interval(logs)
    return document.Ratio(ratio=middle, interval95=[low, high], pairs=len(logs))


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
    above = [second for key in keys if arm in cells.arms(key) for second in cells.seconds(key, arm)]
    below = [second for key in keys if arm in cells.arms(key) for second in cells.seconds(key, BASELINE)]
    if len(above) < statistics.MIN_PAIRS:
        return _untested(scope, arm, above, below, settings)
    found = statistics.compare(above, below, settings.margin)
    return document.Equivalence(
        scope=scope,
        arm=arm,
        ratio=found.ratio,
        interval90=list(found.interval90),
        interval95=list(found.interval95),
        p_value=found.p_value,
        margin=settings.margin,
        verdict=found.verdict,
        pairs=found.pairs,
        pairs_needed=found.pairs_needed,
    )


def _untested(
    scope: str, arm: str, above: Sequence[float], below: Sequence[float], settings: Settings
) -> document.Equivalence:
    """Too few pairs for any test: the ratio, the widest interval, no verdict."""
    logs = statistics.log_ratios(above, below)
    ratio = float(np.exp(np.median(logs))) if len(logs) else 1.0
    widest = [float(np.exp(logs.min())), float(np.exp(logs.max()))] if len(logs) else [0.0, 10.0]
    return document.Equivalence(
        scope=scope,
        arm=arm,
        ratio=ratio,
        interval90=widest,
        interval95=widest,
        p_value=1.0,
        margin=settings.margin,
        verdict=statistics.UNDECIDED,
        pairs=len(logs),
        pairs_needed=statistics.MIN_PAIRS,
    )


def _scaling(rows: Sequence[document.Cell], sizes: Mapping[str, Record]) -> list[document.Scaling]:
    """Geometric means over languages, by size, engine, arm and resource group; the first policy and batch size."""
    first = next(((r["policy"], r["batch_size"]) for r in rows if r["throughput"]), None)
    found: list[document.Scaling] = []
    for size, engine in dict.fromkeys((row["size"], row["engine"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["engine"]) == (size, engine)]
        for group in (ALL, *GROUPS):
            inside = [row for row in mine if _in_group(row["language"], group)]
            batches = [row for row in inside if (row["policy"], row["batch_size"]) == first]
            single = [row for row in inside if row["latency"]]
            names = dict.fromkeys(arm for row in batches for arm in row["throughput"] if arm != CONTROL)
            found += [_scaling_row(sizes[size], size, engine, arm, group, batches, single) for arm in names]
    return found


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
    """One for each size, engine, policy and batch size that has enough languages."""
    found = []
    kinds = dict.fromkeys((r["size"], r["engine"], r["policy"], r["batch_size"]) for r in rows if r["throughput"])
    for size, engine, policy, batch in kinds:
        wanted = (size, engine, policy, batch)
        mine = [r for r in rows if (r["size"], r["engine"], r["policy"], r["batch_size"]) == wanted and r["throughput"]]
        if len(mine) >= 3:
            found.append(_cost_model(cells, mine))
    return found


def _cost_model(cells: _Cells, rows: Sequence[document.Cell]) -> document.CostModel:
    seconds = [row["samples"] / row["throughput"][BASELINE]["samples_per_s"] for row in rows]
    tokens = [float(row["tokens"]) for row in rows]
    sequences = [float(cells.facts[row["key"]]["sequences"]) for row in rows]
    model = statistics.time_model(seconds, tokens, sequences)
    predicted = model(np.asarray(tokens), np.asarray(sequences))
    parted = [row for row in rows if row["fertility"]]
    rates = [float(np.log(row["throughput"][BASELINE]["samples_per_s"])) for row in parted]
    causes = {
        "fertility": [float(np.log(row["fertility"] or 1.0)) for row in parted],
        "words per example": [float(np.log((row["words"] or 1) / row["samples"])) for row in parted],
        "padding": [row["padding"] for row in parted],
    }
    names = [f"{row['task']} {row['language']}" if _repeats(rows) else row["language"] for row in rows]
    return document.CostModel(
        size=rows[0]["size"],
        engine=rows[0]["engine"],
        policy=rows[0]["policy"],
        batch_size=rows[0]["batch_size"],
        us_per_token=1e6 * model.per_token,
        us_per_sequence=1e6 * model.per_sequence,
        r2=model.r2,
        languages=len(rows),
        explained=statistics.explained(rates, causes),
        predicted={n: r["samples"] / float(s) for n, r, s in zip(names, rows, predicted, strict=True)},
        seen={n: r["throughput"][BASELINE]["samples_per_s"] for n, r in zip(names, rows, strict=True)},
    )


def _repeats(rows: Sequence[document.Cell]) -> bool:
    return len({row["language"] for row in rows}) < len(rows)


def _scores(records: Sequence[Record]) -> list[document.Accuracy]:
    last: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record["kind"] == "accuracy" and record["value"] is not None:
            last[tuple(record[n] for n in ("arm", "size", "engine", "task", "language", "layers"))] = record
    order = ordered({record["language"] for record in last.values()})
    rows = sorted(last.values(), key=lambda one: (one["task"], order.index(one["language"]), one["engine"], one["arm"]))
    return [document.Accuracy(**{k: v for k, v in row.items() if k != "kind"}) for row in rows]  # type: ignore[typeddict-item]


def _pareto(
    rows: Sequence[document.Cell], scores: Sequence[document.Accuracy], sizes: Mapping[str, Record]
) -> list[document.ParetoPoint]:
    """Accuracy and cost by task and resource group; a truncated encoder costs its share of the layers."""
    cost: Costs = {}
    for row in rows:
        for arm, figures in row["throughput"].items():
            cost[arm, row["size"], row["engine"], row["task"], row["language"]] = 1e3 / figures["samples_per_s"]
    points: list[document.ParetoPoint] = []
    for task in dict.fromkeys(score["task"] for score in scores):
        for group in (ALL, *GROUPS):
            mine = [s for s in scores if s["task"] == task and _in_group(s["language"], group)]
            points += _front(mine, group, cost, sizes)
    return points


def _front(
    scores: Sequence[document.Accuracy], group: str, cost: Costs, sizes: Mapping[str, Record]
) -> list[document.ParetoPoint]:
    groups: dict[tuple[str, str, str, str, int | None], list[document.Accuracy]] = {}
    for score in scores:
        kind = (score["arm"], score["size"], score["engine"], score["task"], score["layers"])
        groups.setdefault(kind, []).append(score)
    points = []
    for kind, mine in groups.items():
        arm, size, engine, task, layers = kind
        costs = [cost.get((arm, size, engine, task, score["language"])) for score in mine]
        known = [each for each in costs if each is not None]
        if len(known) == len(costs):
            share = 1.0 if layers is None else layers / sizes[size]["layers"]
            value = plain.fmean(score["value"] for score in mine)
            points.append((kind, share * statistics.geometric_mean(known), value))
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
            on_front=front,
        )
        for ((arm, size, engine, task, layers), price, value), front in zip(points, best, strict=True)
    ]


def _probes(records: Sequence[Record]) -> list[document.Probe]:
    last: dict[tuple[Any, ...], Record] = {}
    known = [record for record in records if record.get("value") is not None]  # null: it was not finite
    found = [record for record in known if record["kind"] == "probe"]
    found += accuracy.best_layers([record for record in known if record["kind"] == "accuracy"])
    for record in found:
        last[tuple(record[n] for n in ("probe", "arm", "size", "task", "language", "x", "what"))] = record
    return [document.Probe(**{k: v for k, v in row.items() if k != "kind"}) for row in last.values()]  # type: ignore[typeddict-item]


def _memory(records: Sequence[Record]) -> list[document.Memory]:
    last: dict[tuple[str, str], Record] = {}
    for record in records:  # each run that measured anew has one
        key = record["kind"] == "memory" and (record["size"], record["engine"])
        if key and record["peak_bytes"] >= last.get(key, record)["peak_bytes"]:
            last[key] = record
    return [document.Memory(**{k: v for k, v in row.items() if k != "kind"}) for row in last.values()]  # type: ignore[typeddict-item]


def _skipped(records: Sequence[Record]) -> list[document.Skipped]:
    done = {record["job"] for record in records if record["kind"] == "done"}  # also what a former run could not do
    missed = [r for r in records if r["kind"] == "skipped" and r.get("job") not in done]
    found = [document.Skipped(what=record["what"], why=record["why"]) for record in missed]
    failed: dict[str, str] = {}
    for record in records:
        if record["kind"] in ("failed", "ended_group"):  # the last run's outcome counts
            failed[f"{record['size']} {record['engine']}"] = record.get("why", "")
    found += [document.Skipped(what=what, why=why) for what, why in failed.items() if why]
    return [one for index, one in enumerate(found) if one not in found[:index]]


def _notes(settings: Settings, tests: Sequence[document.Equivalence]) -> list[str]:
    notes = []
    if not settings.baseline:
        notes.append("Weights are seeded at random: speeds hold for trained weights too, accuracies are not measured.")
    control = tests[0]
    low, high = control["interval95"]
    margin = f"{100 * settings.margin:g} %"
    if not 1 / (1 + settings.margin) <= low <= high <= 1 + settings.margin:
        notes.append(
            f"The A/A control failed: the same weights against themselves came out at {control['ratio']:.4f} "
            f"[{low:.4f}, {high:.4f}], too noisy for a margin of {margin}."
        )
        if control["pairs_needed"]:
            notes.append(
                f"About {control['pairs_needed']} pairs are needed at this noise, {control['pairs']} were had."
            )
    undecided = [test for test in tests[1:] if test["verdict"] == statistics.UNDECIDED and test["arm"] == INTERMEDIATE]
    if undecided:
        notes.append(f"{len(undecided)} comparisons have too few pairs for a margin of {margin}; see pairs_needed.")
    return notes
