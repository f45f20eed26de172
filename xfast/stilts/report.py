"""A grid of STILTs runs as a table of differences, beside the published figures.

Rows are intermediate tasks, columns are target tasks, every cell has several seeds. A difference is always formed
between an intermediate task and the baseline of the same target, split and seed; what has no partner is listed, never
compared. Scores are percentages (higher is better), differences are percentage points.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from xfast import files
from xfast.errors import DataFileError, require_one_of
from xfast.stilts import report_html
from xfast.stilts.rows import json_rows
from xfast.stilts.tasks import ALL, BASELINE, INTERMEDIATE_TASKS, TASKS, XTREME_R_TARGETS, XTREME_TARGETS
from xfast.study.profiles import JOSHI_CLASS, group_of

SPLITS, STATUSES = ("dev", "test"), ("done", "failed", "unscored")

PUBLISHED: dict[str, Any] = {
    "averages": {
        "gains": {"squad_v1": 8.2, "squad_v2": 8.2, "mnli": 7.5, "hellaswag": 7.0, ALL: 8.7},
        "unsettled": ["squad_v1", "squad_v2"],
        "targets": list(XTREME_TARGETS),
        "source": "Phang et al. 2020 (arXiv 2005.13013 v2, AACL 2020) as the project's brief states it, table not read",
    },
    "best_per_target": {"gain": 5.4, "split": "test", "source": "abstract of arXiv 2005.13013 v2 (AACL 2020)"},
    "test": {
        "source": "Chung et al. 2021 (arXiv 2010.12821), Table 16",
        "columns": ["XLM-R large", "X-STILTs"],
        "scores": {
            "xnli": {"accuracy": [79.2, 80.0]},
            "pawsx": {"accuracy": [86.4, 87.9]},
            "udpos": {"f1": [73.8, 74.9]},
            "panx": {"f1": [65.4, 64.0]},
            "xquad": {"exact_match": [60.8, 63.3], "f1": [76.6, 78.7]},
            "mlqa": {"exact_match": [53.2, 53.7], "f1": [71.6, 72.4]},
            "tydiqa": {"exact_match": [45.0, 59.5], "f1": [65.1, 76.0]},
        },
    },
    "notes": [
        "The model is XLM-R large; averages are gains on dev over the nine XTREME targets, +8.7 after all nine tasks.",
        "Whether SQuAD +8.2 is of v1.1 or of v2.0 is not settled: the paper's nine tasks have both.",
        "Not used: the figures of the paper's first version (seven tasks; SQuAD +8.4 on dev, +6.1 on test).",
        "The README of google-research/multilingual-t5 has XNLI 80.4, PAWS-X 87.7, PANX 64.7, XQuAD F1 77.2.",
        "The paper's table of every intermediate task by every target was not at hand: its cells are not shown.",
    ],
}
"""Published gains in points and scores in percent, each with its source. Nothing here is derived or recalled."""


@dataclass(frozen=True)
class Cell:
    """One run: a model after an intermediate task, fine-tuned and evaluated on a target with one seed.

    Attributes:
        intermediate: name of the intermediate task, "none" for the baseline, "all" for all together.
        target: name of the target task.
        seed: of training.
        split: "dev" or "test".
        status: "done", "failed", or "unscored" where there is no gold.
        score: the target's main score over its languages in percent; None unless done.
        languages: that score by language, in percent.
        error: why it failed or has no score.
        partial: what the score does not cover, in words; None: it is over the whole benchmark.
        together: of "all", its tasks where they are not all nine.
        replaced: earlier rows of the file that this one stands for.
    """

    intermediate: str
    target: str
    seed: int
    split: str
    status: str
    score: float | None = None
    languages: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    partial: str | None = None
    together: tuple[str, ...] = ()
    replaced: int = 0


@dataclass(frozen=True)
class Spread:
    """``n`` values: their mean and sample standard deviation, None for a single value."""

    n: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` things out of ``of``: two such means cover the same things only if both are complete."""

    mean: float
    n: int
    of: int


@dataclass(frozen=True)
class Entry:
    """One cell of the grid, over its seeds.

    Attributes:
        intermediate: row.
        target: column.
        split: of the column.
        score: in percent, over the seeds that are done; None if there is none.
        delta: in points, over the seeds that the baseline has, too; None for the baseline and without such a seed.
        unpaired: seeds that are done here or in the baseline, not in both; none if none is done here.
        mismatched: seeds done in both, but on different languages, so that the two scores cannot be compared.
        failed: seeds that failed.
        languages: difference by language in points, over the same seeds as ``delta``.
    """

    intermediate: str
    target: str
    split: str
    score: Spread | None
    delta: Spread | None
    unpaired: tuple[int, ...]
    mismatched: tuple[int, ...]
    failed: tuple[int, ...]
    languages: Mapping[str, float]


@dataclass(frozen=True)
class Best:
    """The row with the largest ``delta`` of a column; ``test`` is its difference on test if it was picked on dev."""

    intermediate: str
    delta: Spread
    test: Spread | None


@dataclass(frozen=True)
class GridSummary:
    """A grid of runs, summarized.

    Attributes:
        split: preferred split.
        targets: columns in the benchmark's order.
        splits: split of every column: the preferred one, the other where a target has no cell of it.
        intermediates: rows without the baseline, in the paper's order.
        entries: by intermediate task and target, the baseline's among them.
        averages: by intermediate task, mean difference over the targets that have one.
        baseline_average: mean score of the baseline in percent, over the targets that have one; None if none has.
        best: by target; targets without any difference are absent. Of equal ones the first row.
        best_average: mean of the best differences.
        best_test_average: the same on test, over the targets whose best was picked on dev.
        languages: by intermediate task and language, mean difference over the targets that have the language.
        groups: by intermediate task and language group, mean over all pairs of a target and a language.
        unfinished: cells without a score, of either split.
        duplicates: rows that a later one replaced.
        hidden: done cells of the split that is not shown.
        partial: by target, what the scores that are shown do not cover, gains on test among them.
        together: tasks of the row "all" where they are not all nine.
    """

    split: str
    targets: tuple[str, ...]
    splits: Mapping[str, str]
    intermediates: tuple[str, ...]
    entries: Mapping[str, Mapping[str, Entry]]
    averages: Mapping[str, Mean]
    baseline_average: Mean | None
    best: Mapping[str, Best]
    best_average: Mean | None
    best_test_average: Mean | None
    languages: Mapping[str, Mapping[str, Mean]]
    groups: Mapping[str, Mapping[str, Mean]]
    unfinished: tuple[Cell, ...]
    duplicates: int
    hidden: int
    partial: Mapping[str, str]
    together: tuple[str, ...]


# --- reading --------------------------------------------------------------------------------------


def load_cells(path: Path | str) -> list[Cell]:
    """The cells of a JSON-lines file, in order of first appearance; none of an empty file.

    Of rows with the same intermediate task, target, seed and split the last one counts; its ``replaced`` counts the
    others.

    Raises:
        DataFileError: the file is missing, unreadable or malformed; names the file and, where there is one, the line.
    """
    path = Path(path)
    return _deduplicated(_cell(row, f"{path}:{line}") for line, row in json_rows(path))


def _cell(row: Any, where: str) -> Cell:
    if not isinstance(row, dict):
        raise DataFileError(f"{where}: expected a JSON object, got {type(row).__name__}")
    split = _one_of(row.get("split"), SPLITS, f"{where}: split")
    status = _one_of(row.get("status"), STATUSES, f"{where}: status")
    seed, error, languages = row.get("seed"), row.get("error"), row.get("languages")
    if type(seed) is not int:
        raise DataFileError(f"{where}: seed must be an integer, got {seed!r:.80}")
    if error is not None and not isinstance(error, str):
        raise DataFileError(f"{where}: error must be a string or null, got {error!r:.80}")
    if languages is not None and not isinstance(languages, dict):
        raise DataFileError(f"{where}: languages must be an object of scores by language, got {languages!r:.80}")
    if status != "done":  # whatever a run left behind that did not finish is no score
        languages = None
    return Cell(
        intermediate=_name(row.get("intermediate"), f"{where}: intermediate"),
        target=_name(row.get("target"), f"{where}: target"),
        seed=seed,
        split=split,
        status=status,
        score=_percent(row.get("score"), f"{where}: score") if status == "done" else None,
        languages={
            _name(name, f"{where}: languages"): _percent(value, f"{where}: languages: {name!r:.80}")
            for name, value in (languages or {}).items()
        },
        # Control characters would reach the terminal, lone surrogates could not be written.
        error=None if error is None else "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in error),
        partial=None if row.get("partial") is None else _name(row["partial"], f"{where}: partial"),
        together=tuple(_name(name, f"{where}: together") for name in row.get("together") or ()),
    )


def _one_of(value: Any, accepted: tuple[str, ...], where: str) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise DataFileError(f"{where} must be one of {', '.join(accepted)}, got {value!r:.80}")
    return value


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise DataFileError(f"{where} must be a printable, non-empty name, got {value!r:.80}")
    return value


def _percent(value: Any, where: str) -> float:
    # bool is an int in Python, and the JSON reader accepts NaN and Infinity: the comparison refuses both.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise DataFileError(f"{where} must be a number in [0, 100], got {value!r:.80}")
    return float(value)


def _deduplicated(cells: Iterable[Cell]) -> list[Cell]:
    kept: dict[tuple[str, str, int, str], Cell] = {}
    for cell in cells:
        key = (cell.intermediate, cell.target, cell.seed, cell.split)
        before = kept.get(key)
        kept[key] = cell if before is None else replace(cell, replaced=cell.replaced + before.replaced + 1)
    return list(kept.values())


def _partial(cells: Sequence[Cell], target: str, split: str, best: Best | None) -> str:
    """In words: what the split does not cover, and the test split where the best row's gain on it is shown beside."""
    where = {split: ""}
    if best and best.test:  # then the split that is shown is dev
        where["test"] = "gain on test: "
    shown = [
        where[cell.split] + cell.partial
        for cell in cells
        if cell.target == target and cell.split in where and cell.partial
    ]
    return "; ".join(dict.fromkeys(shown))


# --- summarizing ----------------------------------------------------------------------------------

Entries = Mapping[str, Mapping[str, Entry]]
Runs = dict[tuple[str, str, str], dict[int, Cell]]


def summarize(cells: Iterable[Cell], split: str = "dev") -> GridSummary:
    """Means, paired differences, averages and best rows of a grid.

    Args:
        cells: as :func:`load_cells` gives them.
        split: "dev" or "test"; a target that has no cell of it is shown on the other, and marked.

    Raises:
        InvalidOptionError: ``split`` is neither.
    """
    require_one_of("split", split, SPLITS)
    cells = _deduplicated(cells)
    targets = _ordered((cell.target for cell in cells), (*XTREME_TARGETS, *XTREME_R_TARGETS))
    rows = [name for name in _ordered((cell.intermediate for cell in cells), INTERMEDIATE_TASKS) if name != BASELINE]
    rows.sort(key=lambda name: name == ALL)  # last; the sort is stable
    runs: Runs = {}
    for cell in cells:
        runs.setdefault((cell.intermediate, cell.target, cell.split), {})[cell.seed] = cell
    other = SPLITS[1 - SPLITS.index(split)]
    present = {(cell.target, cell.split) for cell in cells}
    splits = {target: split if (target, split) in present else other for target in targets}
    entries = {row: {name: _entry(row, name, splits[name], runs) for name in targets} for row in (BASELINE, *rows)}
    best = {target: found for target in targets if (found := _best(rows, target, splits, entries, runs))}
    base = [entry.score.mean for entry in entries[BASELINE].values() if entry.score]
    gains = {row: [entry.delta.mean for entry in entries[row].values() if entry.delta] for row in rows}
    return GridSummary(
        split=split,
        targets=targets,
        splits=splits,
        intermediates=tuple(rows),
        entries=entries,
        averages={row: mean for row in rows if (mean := _mean(gains[row], len(targets)))},
        baseline_average=_mean(base, len(targets)),
        best=best,
        best_average=_mean([found.delta.mean for found in best.values()], len(targets)),
        best_test_average=_mean([found.test.mean for found in best.values() if found.test], len(targets)),
        languages=_by_language(entries, str),
        groups=_by_language(entries, _group),
        unfinished=tuple(cell for cell in cells if cell.status != "done"),
        duplicates=sum(cell.replaced for cell in cells),
        hidden=sum(cell.status == "done" and cell.split != splits[cell.target] for cell in cells),
        partial={
            target: what for target in targets if (what := _partial(cells, target, splits[target], best.get(target)))
        },
        together=next((cell.together for cell in cells if cell.together), ()),
    )


def _ordered(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Each name once: known ones in their order, then the others in order of appearance."""
    unique = dict.fromkeys(names)
    return tuple(dict.fromkeys((*(name for name in known if name in unique), *unique)))


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(len(values), fmean(values), stdev(values) if len(values) > 1 else None) if values else None


def _mean(values: Sequence[float], of: int) -> Mean | None:
    return Mean(fmean(values), len(values), of) if values else None


def _with(cells: Mapping[int, Cell], status: str) -> dict[int, Cell]:
    return {seed: cell for seed, cell in sorted(cells.items()) if cell.status == status}


def _comparable(cell: Cell, base: Cell) -> bool:
    # A score over other languages is another figure. Rows without scores by language cannot be checked.
    return not (cell.languages and base.languages) or cell.languages.keys() == base.languages.keys()


def _entry(row: str, target: str, split: str, runs: Runs) -> Entry:
    cells = runs.get((row, target, split), {})
    mine, base = _with(cells, "done"), _with(runs.get((BASELINE, target, split), {}), "done")
    shared = [(cell, base[seed]) for seed, cell in mine.items() if seed in base]
    pairs = [pair for pair in shared if _comparable(*pair)] if row != BASELINE else []
    by_language: dict[str, list[float]] = {}
    for cell, partner in pairs:
        for language in cell.languages.keys() & partner.languages.keys():
            by_language.setdefault(language, []).append(cell.languages[language] - partner.languages[language])
    return Entry(
        intermediate=row,
        target=target,
        split=split,
        score=_spread([_score(cell) for cell in mine.values()]),
        delta=_spread([_score(cell) - _score(partner) for cell, partner in pairs]),
        unpaired=tuple(sorted(mine.keys() ^ base.keys())) if mine else (),
        mismatched=tuple(cell.seed for cell, partner in shared if not _comparable(cell, partner)),
        failed=tuple(_with(cells, "failed")),
        languages={language: fmean(by_language[language]) for language in sorted(by_language)},
    )


def _score(cell: Cell) -> float:
    if cell.score is None:
        raise DataFileError(f"cells: {cell.intermediate} on {cell.target}, seed {cell.seed}: done, but has no score")
    return cell.score


def _best(rows: Sequence[str], target: str, splits: Mapping[str, str], entries: Entries, runs: Runs) -> Best | None:
    gains = [(delta, row) for row in rows if (delta := entries[row][target].delta)]
    if not gains:
        return None
    delta, row = max(gains, key=lambda gain: gain[0].mean)
    return Best(row, delta, _entry(row, target, "test", runs).delta if splits[target] == "dev" else None)


def _by_language(entries: Entries, key: Callable[[str], str]) -> dict[str, dict[str, Mean]]:
    """By row, the mean over its pairs of target and language, of which ``key`` names the column."""
    gains = {
        row: {(target, name): gain for target, entry in cells.items() for name, gain in entry.languages.items()}
        for row, cells in entries.items()
        if row != BASELINE
    }
    reach = Counter(key(name) for _, name in {pair for found in gains.values() for pair in found})
    table: dict[str, dict[str, Mean]] = {}
    for row, found in gains.items():
        columns: dict[str, list[float]] = {}
        for (_, name), gain in found.items():
            columns.setdefault(key(name), []).append(gain)
        table[row] = {name: Mean(fmean(columns[name]), len(columns[name]), reach[name]) for name in sorted(columns)}
    return table


def _group(language: str) -> str:
    return group_of(JOSHI_CLASS[language]) if language in JOSHI_CLASS else report_html.UNCLASSIFIED


# --- the document ---------------------------------------------------------------------------------


def as_dict(summary: GridSummary) -> dict[str, Any]:
    """The summary as a JSON-ready document with titles, notes and published figures: all that the renderings show."""
    document: dict[str, Any] = {
        "format": 1,
        **asdict(summary),
        "titles": {
            name: _title(name) for name in (BASELINE, *summary.intermediates, *summary.targets, *summary.together)
        },
        "published": copy.deepcopy(PUBLISHED),
    }
    if summary.together:  # the published gain is that of all nine
        del document["published"]["averages"]["gains"][ALL]
    document["notes"] = report_html.notes(document)
    return dict(json.loads(json.dumps(document)))  # tuples become lists, as in the file


def _title(name: str) -> str:
    return {BASELINE: "baseline", ALL: "all together"}.get(name) or (TASKS[name].title if name in TASKS else name)


def print_tables(summary: GridSummary, console: Console) -> None:
    """Prints differences, best rows, language groups, published figures and failures; wide tables in parts."""
    report_html.print_tables(as_dict(summary), console)


def write_report(cells_path: Path | str, out_dir: Path | str, *, split: str = "dev") -> dict[str, Any]:
    """Writes report.json (which it returns), report.html, report.md and heatmap.png, each whole or not at all.

    Args:
        cells_path: the grid's cell file.
        out_dir: where; created if need be. Files of an earlier report are replaced.
        split: as for :func:`summarize`.

    Raises:
        DataFileError: the cell file is missing or malformed.
        InvalidOptionError: ``split`` is unknown, or ``out_dir`` cannot be written.
        BackendUnavailableError: matplotlib is not installed.
    """
    document = as_dict(summarize(load_cells(cells_path), split))
    png = report_html.picture(document)
    written = {
        "heatmap.png": png,
        "report.md": report_html.markdown(document).encode(),
        "report.html": report_html.page(document, png).encode(),
        "report.json": (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    for name, content in written.items():
        files.save("out_dir", Path(out_dir) / name, content)
    return document
