"""The document of ``xfast bench`` as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xfast import figures, files

Row = dict[str, Any]

_COLOURS = {"fp32": "Greens", "bf16": "Oranges", "int8": "Blues"}
_PANEL_INCHES = (11.0, 4.2)


def save(document: Row, path: Path) -> None:
    """Tokens per second: bars by workload and engine, and a line chart for each sweep; needs matplotlib.

    Raises:
        InvalidOptionError: the file cannot be written.
    """
    panels = _panels(document["results"])
    figure = figures.new(_PANEL_INCHES[0], _PANEL_INCHES[1] * len(panels))
    labels = [engine["label"] for engine in document["engines"]]
    for index, (kind, rows) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        if kind == "bars":
            _bars(axes, rows, labels)
        else:
            _lines(axes, rows, labels, kind)
        axes.set_ylabel("real tokens per second")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    model, run = document["model"]["name"], document["run"]
    threads = "/".join(str(count) for count in run["threads"])
    figure.suptitle(f"{model}, {threads} threads, {document['machine']['cpu']}", fontsize=10)
    files.save("plot", path, figures.png(figure))


def _panels(results: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    panels: dict[str, list[Row]] = {}
    for row in results:
        sweep, found, _ = row["workload"].partition("=")
        panels.setdefault(sweep if found else "bars", []).append(row)
    return list(panels.items())


def _colours(labels: Sequence[str]) -> dict[str, Any]:
    """One shade per engine in the colour of its precision; xfast's own is the darkest."""
    import matplotlib

    shades = {}
    for precision, name in _COLOURS.items():
        mine = [label for label in labels if label.partition("@")[0].endswith(precision)]
        for index, label in enumerate(mine):
            shades[label] = matplotlib.colormaps[name](0.95 - 0.7 * index / max(len(mine), 1))
    return shades


def _bars(axes: Any, rows: Sequence[Row], labels: Sequence[str]) -> None:
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    present = [label for label in labels if any(row["label"] == label for row in rows)]
    colours, width = _colours(labels), 0.85 / len(present)
    for index, label in enumerate(present):
        mine = [row for row in rows if row["label"] == label]
        places = [workloads.index(row["workload"]) + (index - (len(present) - 1) / 2) * width for row in mine]
        heights = [row["tokens_per_s"] for row in mine]
        edges = [
            [row["tokens_per_s"] - row["tokens_per_s_quartiles"][0] for row in mine],
            [row["tokens_per_s_quartiles"][1] - row["tokens_per_s"] for row in mine],
        ]
        axes.bar(places, heights, width, yerr=edges, label=label, color=colours[label], error_kw={"lw": 0.8})
    axes.set_xticks(range(len(workloads)), workloads)


def _lines(axes: Any, rows: Sequence[Row], labels: Sequence[str], sweep: str) -> None:
    colours = _colours(labels)
    for label in labels:
        mine = sorted(
            (float(row["workload"].partition("=")[2]), row["tokens_per_s"]) for row in rows if row["label"] == label
        )
        if mine:
            style = "-" if label.startswith("xfast-") else "--"
            axes.plot(*zip(*mine, strict=True), style, marker="o", ms=3, label=label, color=colours[label])
    axes.set_xlabel({"alpha": "share of real tokens", "length": "tokens per sequence"}.get(sweep, sweep))
    axes.set_ylim(bottom=0)
    if sweep == "length":
        axes.set_xscale("log", base=2)
