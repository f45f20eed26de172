"""The document of :mod:`xfast.stilts.report` for people: terminal tables, an HTML page, Markdown and a heat map.

Every rendering shows the same sheets, made once from the document. Names and error texts come from a file and may hold
anything: each renderer escapes them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from xfast import figures, pages
from xfast.pages import Item, Sheet, html_text, markdown_text, signed
from xfast.stilts.tasks import BASELINE
from xfast.study.profiles import GROUPS

Document = dict[str, Any]

UNCLASSIFIED = "unclassified"
"""Group of the languages that have no Joshi class here."""

_SHORT = {"udpos": "POS", "tydiqa": "TyDiQA", "bucc2018": "BUCC", "mewslix": "Mewsli"}
_METRICS = {"accuracy": "accuracy", "f1": "F1", "exact_match": "exact match"}
_CLIP = 24  # characters of a name in the terminal and the picture
_LEGEND = "± sample standard deviation over seeds; * best of its target; † not over all targets; ? SQuAD v1.1 or v2.0"
_TITLE = "STILTs: what English intermediate training adds"


# --- figures --------------------------------------------------------------------------------------


def _name(document: Document, name: str) -> str:
    return str(document["titles"].get(name, name))


def _heads(document: Document) -> list[str]:
    heads = []
    for target in document["targets"]:
        split = document["splits"][target]
        name = _SHORT.get(target) or _name(document, target)
        heads.append(name if split == document["split"] else f"{name} ({split})")
    return heads


def _most(document: Document, key: str) -> int:
    return max((e[key]["n"] for row in document["entries"].values() for e in row.values() if e[key]), default=0)


def _spread(spread: Document, most: int, figure: str) -> tuple[str, str]:
    """Mean, and under it the deviation; the number of seeds where it is not the usual one."""
    if spread["deviation"] is None:
        return figure, "n=1"
    few = f" n={spread['n']}" if spread["n"] < most else ""
    return figure, f"±{spread['deviation']:.1f}{few}"


def _absent(entry: Document) -> Item:
    if entry["score"]:
        return Item("–", "no pair", missing=True)
    return Item("–", "failed" if entry["failed"] else "", missing=True)


def _score(entry: Document, most: int) -> Item:
    score = entry["score"]
    return Item(*_spread(score, most, f"{score['mean']:.1f}")) if score else _absent(entry)


def _delta(document: Document, entry: Document, most: int) -> Item:
    delta = entry["delta"]
    if not delta:
        return _absent(entry)
    best = document["best"][entry["target"]]["intermediate"] == entry["intermediate"]
    figure = signed(delta["mean"]) + ("*" if best else "")
    return Item(*_spread(delta, most, figure), value=delta["mean"], best=best)


def _mean(mean: Document | None, gain: bool = True) -> Item:
    if mean is None:
        return Item("–", missing=True)
    mark = "" if mean["n"] == mean["of"] else "†"
    figure = signed(mean["mean"]) if gain else f"{mean['mean']:.1f}"
    return Item(figure + mark, f"{mean['n']} of {mean['of']}", mean["mean"] if gain else None)


# --- sheets ---------------------------------------------------------------------------------------


def sheets(document: Document) -> list[Sheet]:
    """Every table that has a row, in the order in which they are shown."""
    makers = (_differences, _scores, _best, _groups, _languages, _unfinished)
    return [sheet for sheet in (make(document) for make in makers) if sheet.rows]


def _differences(document: Document) -> Sheet:
    published = document["published"]["averages"]
    rows, most = [], _most(document, "delta")
    with_published = any(row in published["gains"] for row in document["intermediates"])
    base = document["entries"][BASELINE]
    if document["baseline_average"]:
        scores = [_score(base[target], _most(document, "score")) for target in document["targets"]]
        rows.append([Item("baseline (score)"), *scores, _mean(document["baseline_average"], gain=False)])
        for row in document["intermediates"]:
            deltas = [_delta(document, document["entries"][row][target], most) for target in document["targets"]]
            rows.append([Item(_name(document, row)), *deltas, _mean(document["averages"].get(row))])
        for name, cells in zip((BASELINE, *document["intermediates"]), rows, strict=True):
            if with_published:
                mark = "?" * (name in published["unsettled"])
                cells.append(Item(signed(published["gains"][name]) + mark if name in published["gains"] else ""))
    return Sheet(
        "differences",
        "Difference to the baseline, percentage points",
        ["after", *_heads(document), "average", *(["published"] if with_published else [])],
        rows,
        [_LEGEND],
        coloured=True,
    )


def _scores(document: Document) -> Sheet:
    most = _most(document, "score")
    rows = [
        [Item(_name(document, row)), *(_score(entry, most) for entry in entries.values())]
        for row, entries in document["entries"].items()
        if any(entry["score"] or entry["failed"] for entry in entries.values())
    ]
    return Sheet("scores", "Scores in percent, mean over seeds", ["after", *_heads(document)], rows)


def _best(document: Document) -> Sheet:
    published = document["published"]["test"]
    rows: list[list[Item]] = []
    for target, title in zip(document["targets"], _heads(document), strict=True):
        best, theirs = document["best"].get(target), published["scores"].get(target, {})
        if not (best or theirs):
            continue
        found = [best[key] for key in ("delta", "test")] if best else [None, None]
        gains = [Item(signed(gain["mean"]), value=gain["mean"]) if gain else Item("–") for gain in found]
        before, after = [pair[0] for pair in theirs.values()], [pair[1] for pair in theirs.values()]
        figures = [
            " / ".join(_METRICS[metric] for metric in theirs),
            *(" / ".join(f"{score:.1f}" for score in scores) for scores in (before, after)),
            " / ".join(signed(new - old) for old, new in zip(before, after, strict=True)),
        ]
        name = _name(document, best["intermediate"]) if best else "–"
        rows.append([Item(title), Item(name), *gains, *(Item(figure or "–") for figure in figures)])
    if rows and document["best_average"]:
        means = [_mean(document["best_average"]), _mean(document["best_test_average"])]
        gain = Item(signed(document["published"]["best_per_target"]["gain"]), "9 tasks, test")
        rows.append([Item("average"), Item(""), *means, Item(""), Item(""), Item(""), gain])
    head = ["target", "best", "gain", "its gain on test", "metric", *published["columns"], "difference"]
    return Sheet(
        "best", "Best intermediate task of each target, beside published test scores", head, rows, coloured=True
    )


def _groups(document: Document) -> Sheet:
    groups = [group for group in (*GROUPS, UNCLASSIFIED) if any(group in row for row in document["groups"].values())]
    rows = [
        [Item(_name(document, row)), *(_mean(found.get(group)) for group in groups)]
        for row, found in document["groups"].items()
        if found
    ]
    legend = ["Mean over pairs of target and language; † not all the pairs that other rows have."]
    return Sheet("groups", "Difference by language group, percentage points", ["after", *groups], rows, legend, True)


def _languages(document: Document) -> Sheet:
    names = sorted({name for row in document["languages"].values() for name in row})
    columns = [row for row in document["intermediates"] if document["languages"].get(row)]
    rows = [[Item(name), *(_mean(document["languages"][row].get(name)) for row in columns)] for name in names]
    head = ["language", *(_name(document, row) for row in columns)]
    return Sheet(
        "languages",
        "Difference by language over the targets that have it, percentage points",
        head,
        rows,
        coloured=True,
    )


def _unfinished(document: Document) -> Sheet:
    rows = [
        [Item(_name(document, cell["intermediate"])), Item(_name(document, cell["target"]), prose=True)]
        + [Item(str(cell[key] if cell[key] is not None else ""), prose=True) for key in ("seed", "split", "error")]
        for cell in document["unfinished"]
    ]
    return Sheet("unfinished", "Failed runs", ["after", "target", "seed", "split", "error"], rows)


# --- notes ----------------------------------------------------------------------------------------


def notes(document: Document) -> list[str]:
    """What a reader has to know before comparing figures: what is missing, left out or measured otherwise."""
    if not document["targets"]:
        return ["The grid has no cells."]
    found = list(_pairing(document)) if document["baseline_average"] else ["No finished baseline: no differences."]
    heads = {target: _name(document, target) for target in document["targets"]}
    other = [heads[target] for target, split in document["splits"].items() if split != document["split"]]
    if other:
        found.append(f"Without cells on {document['split']}, shown on the other split: {', '.join(other)}.")
    found += [
        f"{heads[target]}: {what}; official figures are over all." for target, what in document["partial"].items()
    ]
    if document["together"]:
        tasks = ", ".join(_name(document, task) for task in document["together"])
        found.append(f"All together: {tasks}; the published figure, of all nine tasks, is not beside it.")
    for row, mean in document["averages"].items():
        if mean["n"] < mean["of"]:
            absent = [heads[target] for target, entry in document["entries"][row].items() if not entry["delta"]]
            found.append(
                f"† {_name(document, row)}: average over {mean['n']} of {mean['of']} targets, without "
                f"{', '.join(absent)}; do not compare it with an average over others."
            )
    if document["best"]:
        found.append(
            "The best of a target is picked and measured on the same runs, which flatters it; its gain on test is not, "
            "where it was picked on dev."
        )
    if set(document["targets"]) != set(document["published"]["averages"]["targets"]):
        found.append("The targets are not the nine XTREME targets: published averages do not compare with these.")
    if document["duplicates"]:
        found.append(f"Rows of the file replaced by later ones of the same run: {document['duplicates']}.")
    if document["hidden"]:
        found.append(f"Finished cells of the split that is not shown: {document['hidden']}.")
    if any(document["languages"].values()):
        found.append(
            "Language means cover different targets: compare them down the rows of one language, not across languages. "
            "English counts, as in XTREME's own averages."
        )
    return found


def _pairing(document: Document) -> Iterator[str]:
    kinds = {
        "unpaired": "Left out of the differences, finished only here or only in the baseline",
        "mismatched": "Left out of the differences, other languages than the baseline",
    }
    yield "Differences are formed between runs of the same seed."
    for key, text in kinds.items():
        places = [
            f"{_name(document, row)} on {_name(document, target)} (seed {', '.join(map(str, entry[key]))})"
            for row, entries in document["entries"].items()
            for target, entry in entries.items()
            if entry[key]
        ]
        if places:
            yield f"{text}: {'; '.join(places)}."


# --- terminal -------------------------------------------------------------------------------------


def clip(text: str) -> str:
    """A name short enough for a column head."""
    return text if len(text) <= _CLIP else text[: _CLIP - 1] + "…"


def print_tables(document: Document, console: Console) -> None:
    """Prints the sheets but the longest; a table too wide for the console is printed in parts."""
    shown = ("differences", "best", "groups") if document["baseline_average"] else ("scores", "best")
    for sheet in sheets(document):
        if sheet.key in shown:
            for table in _parts(sheet, console):
                console.print(table, "")
            for line in sheet.legend:
                console.print(Text(line, "dim"), "")
    theirs = document["published"]
    for line in (*document["notes"], *theirs["notes"], *_sources(theirs)):
        console.print(Text(line))
    for line in _failures(document):
        console.print(Text(line, "red"))


def _failures(document: Document) -> Iterator[str]:
    """One line for all seeds of a cell that have no score for the same reason."""
    seeds: dict[tuple[str, ...], list[str]] = {}
    for cell in document["unfinished"]:
        # A traceback's last line says what happened.
        error = ((cell["error"] or "").strip().splitlines() or ["no message"])[-1].strip()
        names = [_name(document, cell[key]) for key in ("intermediate", "target")]
        seeds.setdefault((cell["status"], *names, cell["split"], error), []).append(str(cell["seed"]))
    for (status, row, target, split, error), which in seeds.items():
        yield f"{status}: {row} on {target}, {split}, seed {', '.join(which)}: {error}"


def _sources(published: Document) -> list[str]:
    """Which figure is whose, one line per source."""
    best = published["best_per_target"]
    return [
        f"Published averages: {published['averages']['source']}.",
        f"Published {signed(best['gain'])} on test, best task of each target: {best['source']}.",
        f"Published test scores: {published['test']['source']}.",
    ]


def _parts(sheet: Sheet, console: Console) -> list[Table]:
    """The sheet in as few parts as the console's width allows, each with the column that names the rows."""
    columns = len(sheet.head) - 1
    unbounded = console.options.update(width=100_000)
    for size in range(columns, 0, -1):
        tables = [_part(sheet, start, min(start + size, columns)) for start in range(0, columns, size)]
        if all(Measurement.get(console, unbounded, table).maximum <= console.width for table in tables):
            break
    return tables


def _part(sheet: Sheet, start: int, stop: int) -> Table:
    title = Text(sheet.title + (" (continued)" if start else ""), "bold")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(Text(clip(sheet.head[0])), no_wrap=True)
    for head in sheet.head[start + 1 : stop + 1]:
        table.add_column(Text(clip(head).replace(" (", "\n(")), justify="right", no_wrap=True)
    for first, *items in sheet.rows:
        cells = [Text(f"{item.text}\n{item.note}".rstrip("\n"), "bold" * item.best) for item in items[start:stop]]
        table.add_row(Text(clip(first.text)), *cells)
    return table


# --- Markdown -------------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """The report as GitHub Markdown, beside heatmap.png."""
    parts = [f"# {_TITLE}", "![Differences to the baseline; the same figures are in the first table](heatmap.png)"]
    for sheet in sheets(document):
        parts += [f"## {markdown_text(sheet.title)}", pages.markdown_table(sheet), *map(markdown_text, sheet.legend)]
    for title, lines in _prose(document):
        parts += [f"## {title}", "\n".join(f"- {markdown_text(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _prose(document: Document) -> list[tuple[str, list[str]]]:
    published = document["published"]
    return [("Notes", document["notes"]), ("Published figures", [*published["notes"], *_sources(published)])]


# --- HTML -----------------------------------------------------------------------------------------


def page(document: Document, png: bytes) -> str:
    """The report as one HTML file: no script, no network, the heat map inside."""
    size = f"{len(document['intermediates'])} intermediate tasks by {len(document['targets'])} targets"
    alt = html_text(f"Heat map of the differences, {size}. The table of differences holds the same figures.")
    figure = f'<figure><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
    tables = [pages.html_table(sheet, 2) for sheet in sheets(document)]
    # The picture stands after the table of differences, which it repeats, or first where there is none.
    tables.insert(1 if document["baseline_average"] else 0, figure)
    prose = [f"<h2>{html_text(title)}</h2>\n{pages.html_list(lines)}" for title, lines in _prose(document)]
    return pages.page(_TITLE, [f"<header><h1>{html_text(_TITLE)}</h1></header>", *tables, *prose])


# --- heat map -------------------------------------------------------------------------------------


def picture(document: Document) -> bytes:
    """The differences as a PNG image.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    figures.require("output")
    sheet = _differences(document)
    rows = sheet.rows[1:] or [[Item("no differences"), *[Item("–", missing=True)] * (len(document["targets"]) + 1)]]
    columns = len(document["targets"]) + 1  # and the average
    size = min(3.2 + 0.85 * columns, 100), min(1.8 + 0.5 * len(rows), 100)
    figure = figures.new(*size)
    axes = figure.add_subplot()
    _draw(axes, [row[1 : columns + 1] for row in rows], pages.limit(sheet))
    # Names come from a file: a dollar sign in one is no formula.
    axes.set_xticks(range(columns), [clip(head) for head in sheet.head[1 : columns + 1]], parse_math=False)
    axes.set_yticks(range(len(rows)), [clip(row[0].text) for row in rows], parse_math=False)
    axes.tick_params(axis="x", labelrotation=40, labelsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title("Difference to the baseline, percentage points" + " (none)" * (not sheet.rows), fontsize=9)
    return figures.png(figure)


def _draw(axes: Any, rows: Sequence[Sequence[Item]], limit: float) -> None:
    from matplotlib.patches import Rectangle

    values = [[float("nan") if item.value is None else item.value for item in row] for row in rows]
    image = axes.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    axes.figure.colorbar(image, ax=axes, shrink=0.9).ax.tick_params(labelsize=8)
    for y, row in enumerate(rows):
        for x, item in enumerate(row):
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": "black"}
            if item.value is None:
                place = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="0.9", edgecolor="0.65", hatch="///", linewidth=0)
                axes.add_patch(place)
            elif _luminance(*image.cmap(image.norm(item.value))) < 0.18:  # where white stands out as much as black
                style["color"] = "white"
            text = item.text if item.missing else f"{item.text}\n{item.note}"
            axes.text(x, y, text, weight="bold" if item.best else "normal", **style)
    axes.axvline(len(rows[0]) - 1.5, color="black", linewidth=1.5)


def _luminance(red: float, green: float, blue: float, _: float) -> float:
    """Relative luminance of an sRGB colour, its channels in [0, 1], with a gamma of 2.2."""
    return float(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)
