"""Which tables a study has: one function each, values as they are in the document, low-resource languages first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xfast.study import view
from xfast.study.document import BASELINE, CONTROL, TEXTS_NEEDED, Cell, CostModel, Equivalence, Scaling, Study
from xfast.study.profiles import GROUPS
from xfast.study.tables import Column, Table, Value, ends, interval

_LANGUAGE = [Column("language", "language"), Column("name", "name")]
_WHERE = [Column("size", "size", factor=True), Column("engine", "engine", factor=True)]
_TASK = Column("task", "task", factor=True)
# At most: of examples, or with a token budget of padded tokens; there may be fewer texts than fill a batch.
_BATCHES = [Column("policy", "order", factor=True), Column("batch_size", "batch at most", "count", factor=True)]

Row = dict[str, Value]


def tables(study: Study) -> list[Table]:
    """Every table that has a row, in the order of the report."""
    return [table for make in _MAKERS if (table := make(study)).rows]


def _taken(row: Mapping[str, Any], columns: Iterable[Column]) -> Row:
    """What a part of the document has under the names of the columns."""
    return {column.key: row[column.key] for column in columns if column.key in row}


def _named(study: Study, code: str) -> Row:
    return {"language": code, "name": study["languages"][code]["name"]}


def overview(study: Study) -> Table:
    """One row a language: what it is, and samples per second of every engine in the main setting."""
    chosen, found, others = view.main_cells(study)
    columns = [
        *_LANGUAGE,
        *(Column(f"samples_per_s {engine}", f"{engine}, samples/s", "figure") for engine in found),
        Column("fertility", "tokens/word", "figure"),
        Column("padding", "padding, %", "share"),
        Column("joshi_class", "class", "count"),
        Column("cc100_gb", "CC-100, GB", "number"),
        Column("in_pretraining", "in pretraining", "flag"),
    ]
    rows: list[Row] = []
    for code in view.languages(study):
        cells = {engine: row[code] for engine, row in found.items() if code in row}
        if cells:
            known = {**study["languages"][code], **next(iter(cells.values())), "language": code}
            speeds = {f"samples_per_s {engine}": view.rate(cell)["samples_per_s"] for engine, cell in cells.items()}
            name = f"{study['languages'][code]['name']}{view.elsewhere(found, code, chosen)}" if chosen else ""
            rows.append({**_taken(known, columns), **speeds, "name": name})
    legend = [
        (
            "class: Joshi et al. 2020, 0 to 5. CC-100: text in the rebuild of XLM-R's pretraining corpus. padding: "
            "what transformers computes and xfast does not."
        ),
        *others,
    ]
    where = view.described(study, chosen) if chosen else "none"
    return Table("overview", f"Speed by language and engine: {where}", columns, rows, legend)


# --- every cell -----------------------------------------------------------------------------------


def _places(study: Study) -> dict[str, int]:
    """Of the languages in every table."""
    return {code: at for at, code in enumerate(view.languages(study))}


def _ordered(study: Study, cells: Iterable[Cell]) -> list[Cell]:
    order = _places(study)

    def place(cell: Cell) -> tuple[Any, ...]:
        where = view.ranked(study, "sizes", cell["size"]), view.ranked(study, "engines", cell["engine"])
        return (order[cell["language"]], *where, cell["task"], cell["policy"], cell["batch_size"])

    return sorted(cells, key=place)


def _place(row: Any) -> tuple[str, ...]:
    return row["size"], row["engine"], row["task"], row["language"]


def _scores(study: Study) -> dict[tuple[str, ...], Row]:
    """By size, engine, task and language, the scores of every arm's whole encoder, and their metric."""
    found: dict[tuple[str, ...], Row] = {}
    for score in study["accuracy"]:
        if view.whole(study, score["size"], score["layers"]):
            row = found.setdefault(_place(score), {"metric": score["metric"]})
            row[f"score_{score['arm']}"] = score["value"]
    return found


def languages(study: Study) -> Table:
    """One row for each language, size, engine, task and way of batching."""
    speeds = [Column("samples_per_s", "samples/s", "figure"), *interval("tokens_per_s", "tokens/s", "figure")]
    speeds.append(Column("words_per_s", "words/s", "figure"))
    times = [Column(f"p{percent}_ms", f"p{percent}, ms", "figure") for percent in (50, 95, 99)]
    times.append(Column("texts", "texts", "count", factor=True))
    shape = [Column("padding", "padding, %", "share"), Column("fertility", "tokens/word", "figure")]
    shape.append(Column("windows_per_example", "windows", "figure"))
    energy = Column("joules_per_sample", "J/sample", "figure")
    ratios = [column for arm in view.other_arms(study) for column in interval(f"ratio_{arm}", f"time, {arm}")]
    scores = [Column(f"score_{arm}", f"score, {arm}", "score") for arm in view.trained_arms(study)]
    where = [*_LANGUAGE, *_WHERE, _TASK, *_BATCHES]
    columns = [*where, *speeds, *times, *shape, *ratios, energy, Column("metric", "metric"), *scores]

    single = {_place(cell): cell for cell in study["cells"] if cell["latency"].get(BASELINE)}
    batched = [cell for cell in study["cells"] if cell["throughput"].get(BASELINE)]
    alone = [cell for place, cell in single.items() if place not in {_place(cell) for cell in batched}]
    accuracy_of = _scores(study)
    rows: list[Row] = []
    for cell in _ordered(study, [*batched, *alone]):
        row = {**_taken(cell, [*where, *shape]), **_named(study, cell["language"])}
        if fast := cell["throughput"].get(BASELINE):
            row |= _taken(fast, [*speeds, energy]) | ends("tokens_per_s", fast["tokens_per_s_interval"])
        if slow := single.get(_place(cell)):
            row |= _taken(view.latency(slow), times)
        for arm, ratio in cell["ratios"].items():
            row |= {f"ratio_{arm}": ratio["ratio"], **ends(f"ratio_{arm}", ratio["interval95"])}
        rows.append({**row, **accuracy_of.get(_place(cell), {})})
    legend = [
        (
            "time: of that arm over the baseline's, paired visits; above 1 is slower. p50, p95, p99: over texts, one "
            f"at a time, of each the median of its responses; p95 takes {TEXTS_NEEDED['p95_ms']} texts, p99 "
            f"{TEXTS_NEEDED['p99_ms']}. padding: share of the slots that transformers computes; xfast computes none."
        )
    ]
    return Table("languages", "Every language and engine", columns, rows, legend)


def arms(study: Study) -> Table:
    """One row for each cell and arm that was compared with the baseline in it."""
    where = [*_LANGUAGE, *_WHERE, _TASK, Column("kind", "kind", factor=True), *_BATCHES]
    ratios = interval("ratio", "time over baseline")
    columns = [*where, Column("arm", "arm", factor=True), *ratios, Column("pairs", "pairs", "count")]
    rows: list[Row] = []
    for cell in _ordered(study, study["cells"]):
        for arm in view.other_arms(study):
            if ratio := cell["ratios"].get(arm):
                row = {**_taken(cell, where), **_named(study, cell["language"]), **_taken(ratio, columns)}
                rows.append({**row, "arm": arm, **ends("ratio", ratio["interval95"])})
    legend = ["Time of the arm over the time of the baseline, from paired visits; above 1 is slower."]
    return Table("arms", "Cost of every arm over the baseline", columns, rows, legend)


# --- conclusions ----------------------------------------------------------------------------------


def comparisons(study: Study) -> list[Equivalence]:
    """The control first, then tests of other arms, then of parts of the control.

    Each from everything together over resource groups, low-resource first, and other parts to single languages.
    """
    codes = view.languages(study)

    def place(found: Equivalence) -> tuple[Any, ...]:
        scope = found["scope"]
        group = next((at for at, name in enumerate(GROUPS) if name in scope), len(GROUPS))
        language = codes.index(scope) if scope in codes else -1
        size, _, engine = scope.partition(" ")
        where = view.ranked(study, "sizes", size), view.ranked(study, "engines", engine)
        return (found["arm"] == CONTROL, language, scope != view.ALL, group, *where)

    return [study["control"], *sorted((one for one in study["equivalence"] if one != study["control"]), key=place)]


def equivalence(study: Study) -> Table:
    """The control, then every comparison with its margin and verdict."""
    ratios = interval("ratio", "time over baseline", percent=90)
    also = [Column(end, end, "ratio", hidden=True) for end in ends("ratio", (0, 1))]
    columns = [
        Column("scope", "scope"),
        Column("arm", "arm"),
        *ratios,
        *also,
        Column("p_value", "p", "p"),
        Column("margin", "margin, %", "share", factor=True),
        Column("verdict", "verdict"),
        Column("pairs", "pairs", "count"),
        Column("pairs_needed", "pairs needed", "count"),
        Column("cells", "cells", "count"),
        Column("cells_needed", "cells needed", "count"),
    ]
    rows: list[Row] = []
    for one in comparisons(study):
        row = {**_taken(one, columns), "pairs_needed": None, "cells_needed": None}
        if needed := view.needed(one):
            row[f"{needed[2]}_needed"] = needed[1]
        none = (None, None) if view.too_few(one) else None
        row |= ends("ratio", none or one["interval90"], 90)
        rows.append({**row, **ends("ratio", none or one["interval95"])})
    legend = [
        (
            "Two one-sided tests at 5 %: equivalent where the 90 % interval lies inside the margin. p: of the weaker "
            "of the two. Cells: of one size, engine, task, language and way of batching; their pairs are its rounds. "
            "Needed: so many would find equal arms equivalent with a power of 0.9 at the noise seen; a dash where it "
            "is found, where there are as many, or where no number would do. Where the copies of the weights lie in "
            "memory is in no interval: a part in which the control differs as much tells nothing of the weights."
        )
    ]
    return Table("equivalence", "Tests of equivalence", columns, rows, legend)


def accuracy(study: Study) -> Table:
    """One row for each score, the arms side by side."""
    trained = view.trained_arms(study)
    which = [Column("layers", "layers", "count", factor=True), Column("metric", "metric", factor=True)]
    where = [*_LANGUAGE, *_WHERE, _TASK, *which]
    columns = [
        *where,
        *(Column(f"score_{arm}", arm, "score") for arm in trained),
        *(Column(f"difference_{arm}", f"{arm} − {BASELINE}", "score") for arm in trained if arm != BASELINE),
        Column("examples", "examples", "count"),
    ]
    found: dict[tuple[Value, ...], Row] = {}
    for score in study["accuracy"]:
        place = _taken(score, where)
        row = found.setdefault(tuple(place.values()), {**place, **_named(study, score["language"])})
        row |= {f"score_{score['arm']}": score["value"], "examples": score["examples"]}
    for row in found.values():
        base = row.get(f"score_{BASELINE}")
        for arm in trained:
            mine = row.get(f"score_{arm}")
            if arm != BASELINE and isinstance(base, (int, float)) and isinstance(mine, (int, float)):
                row[f"difference_{arm}"] = mine - base
    order = _places(study)
    # What remains is as in the document: the sort is stable.
    rows = sorted(found.values(), key=lambda row: order[str(row["language"])])
    return Table("accuracy", "Accuracy by arm", columns, rows, ["Scores are 0 to 100; layers: – is all of them."])


def _group_place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def pareto(study: Study) -> Table:
    """Accuracy against cost."""
    columns = [
        Column("group", "languages"),
        _TASK,
        *_WHERE,
        Column("arm", "arm", factor=True),
        Column("layers", "layers", "count", factor=True),
        Column("accuracy", "accuracy", "score"),
        Column("ms_per_sample", "ms/sample", "figure"),
        Column("estimated", "cost estimated", "flag"),
        Column("on_front", "on the front", "flag"),
    ]
    points = sorted(study["pareto"], key=lambda point: (_group_place(point["group"]), point["task"]))
    legend = [
        "On the front: nothing of the same task and group is both faster and more accurate. layers: – is all.",
        "Cost estimated: the whole encoder's, by the share of its layers.",
    ]
    return Table("pareto", "Accuracy against cost", columns, [_taken(point, columns) for point in points], legend)


def trades(study: Study) -> Table:
    """Accuracy at equal cost, and cost at equal accuracy."""
    columns = [
        *_LANGUAGE,
        _TASK,
        *_WHERE,
        Column("accuracy", "baseline", "score"),
        Column("ms_per_sample", "baseline, ms/sample", "figure"),
        Column("own_accuracy", "its best for no more", "score"),
        Column("best_accuracy", "with training, for no more", "score"),
        Column("best_by", "by"),
        Column("own_ms", "its least ms/sample for no less", "figure"),
        Column("least_ms", "with training, ms/sample for no less", "figure"),
        Column("least_by", "by"),
    ]
    order = _places(study)
    found = sorted(study["trades"], key=lambda trade: (trade["task"], order[trade["language"]]))
    rows = [{**_taken(trade, columns), **_named(study, trade["language"])} for trade in found]
    legend = [
        (
            "For no more, for no less: over all engines and layers, at no more cost or no less accuracy than the whole "
            "baseline with its engine. What training buys is the difference from the baseline's own best."
        ),
        "A dash: nothing with intermediate training is as cheap, or as accurate.",
    ]
    return Table("trades", "Accuracy at equal cost, cost at equal accuracy", columns, rows, legend)


def scaling(study: Study) -> Table:
    """Speed by model size."""
    columns = [
        Column("group", "languages"),
        Column("size", "size"),
        Column("parameters", "parameters", "count"),
        _TASK,
        Column("engine", "engine", factor=True),
        Column("arm", "arm", factor=True),
        Column("samples_per_s", "samples/s", "figure"),
        Column("tokens_per_s", "tokens/s", "figure"),
        Column("p50_ms", "p50, ms", "figure"),
    ]
    arms = [BASELINE, *view.other_arms(study)]

    tasks = list(dict.fromkeys(one["task"] for one in study["scaling"]))

    def place(one: Scaling) -> tuple[int, ...]:
        ranks = view.ranked(study, "sizes", one["size"]), view.ranked(study, "engines", one["engine"])
        where = tasks.index(one["task"]), _group_place(one["group"])
        return (*where, one["parameters"], *ranks, arms.index(one["arm"]))

    found = sorted(study["scaling"], key=place)
    legend = ["Geometric means over the languages of each group that were measured with every size of an engine."]
    return Table("scaling", "Speed by model size", columns, [_taken(one, columns) for one in found], legend)


def cost_models(study: Study) -> Table:
    """Least squares of time on tokens and sequences."""
    causes = list(dict.fromkeys(cause for model in study["cost_models"] for cause in model["explained"]))
    columns = [
        Column("engine", "engine"),
        Column("size", "size", factor=True),
        _TASK,
        *_BATCHES,
        Column("us_per_token", "µs/token", "figure"),
        Column("us_per_sequence", "µs/sequence", "figure"),
        Column("r2", "R²", "ratio"),
        Column("languages", "languages", "count"),
    ]
    for cause in causes:
        columns.append(Column(f"explained {cause}", f"explained by {cause}, %", "share"))
        columns.append(Column(f"over {cause}", f"languages behind {cause}", "count", factor=True))
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    for model in _models(study):
        over, without = view.explained_over(study, model)
        row = _taken(model, columns)
        for cause, share in model["explained"].items():
            row |= {f"explained {cause}": share, f"over {cause}": over[cause]}
        rows.append(row)
        left_out |= dict.fromkeys(without)
    legend = ["Explained: share of the variance of log samples/s between languages."] if causes else []
    if causes and left_out:
        names = ", ".join(view.language_name(study, code) for code in left_out)
        legend.append(f"Tokens per word are not known of {names}: what has fertility in it is over the others.")
    return Table("cost_models", "What time is made of", columns, rows, legend)


def _models(study: Study) -> list[CostModel]:
    """In the order of sizes and engines."""

    def place(model: CostModel) -> tuple[int, int]:
        return view.ranked(study, "sizes", model["size"]), view.ranked(study, "engines", model["engine"])

    return sorted(study["cost_models"], key=place)


def predictions(study: Study) -> Table:
    """What the cost models say of each language beside what was seen."""
    columns = [
        *_LANGUAGE,
        *_WHERE,
        *_BATCHES,
        _TASK,
        Column("seen", "seen, samples/s", "figure"),
        Column("predicted", "predicted, samples/s", "figure"),
        Column("error", "error, %", "share"),
    ]
    rows: list[Row] = []
    for code in view.languages(study):
        for model in _models(study):
            if code in model["seen"] and code in model["predicted"]:
                seen, said = model["seen"][code], model["predicted"][code]
                figures: Row = {"seen": seen, "predicted": said, "error": said / seen - 1 if seen else None}
                where = _taken(model, [*_WHERE, *_BATCHES, _TASK])
                rows.append({**where, **_named(study, code), **figures})
    return Table("predictions", "The cost model, language by language", columns, rows)


def probes(study: Study) -> Table:
    """What intermediate training could change although the graph is the same."""
    columns = [*_LANGUAGE, Column("probe", "probe"), Column("what", "value of"), Column("x", "at"), _TASK, _WHERE[0]]
    columns += [Column("arm", "arm", factor=True), Column("value", "value", "number")]
    order = _places(study)
    found = sorted(study["probes"], key=lambda probe: order[probe["language"]])
    rows = [{**_taken(probe, columns), **_named(study, probe["language"])} for probe in found]
    return Table("probes", "Probes", columns, rows)


def memory(study: Study) -> Table:
    """Peak memory of each process."""
    columns = [Column("engine", "engine"), Column("size", "size"), Column("arms", "arms", "count")]
    columns.append(Column("peak_bytes", "peak, GB", "bytes"))
    legend = ["Of the process that held all arms of one size and engine at once."]
    if any(one.get("resumed") for one in study["memory"]):
        columns.append(Column("resumed", "resumed", "flag"))
        legend.append(
            "Resumed: by several processes, the largest peak that one of them told; a killed one may have had more."
        )
    rows = [_taken(one, columns) for one in study["memory"]]
    return Table("memory", "Memory", columns, rows, legend)


def skipped(study: Study) -> Table:
    """What was planned or asked for and not measured."""
    columns = [Column("what", "what"), Column("why", "why")]
    return Table("skipped", "Not measured", columns, [_taken(one, columns) for one in study["skipped"]])


_MAKERS = (
    *(overview, languages, arms, equivalence, accuracy, trades, pareto, scaling, cost_models),
    *(predictions, probes, memory, skipped),
)

KEYS = tuple(make.__name__ for make in _MAKERS)
"""Names of all tables that there can be."""
