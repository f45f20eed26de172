"""Figures of speed: languages by engines, fertility, latency, model size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from xfast import figures
from xfast.figures import INK, LINE, PAPER, SOFT, heat
from xfast.study import view
from xfast.study.document import BASELINE, PERCENTILES, Cell, Scaling, Study
from xfast.study.drawing import (
    GROUP_COLOURS,
    WIDTH,
    Drawing,
    clip,
    language_axis,
    legend_above,
    panels,
    plain_log,
    series,
)
from xfast.study.languages import LOW_RESOURCE
from xfast.study.tables import decimals, grouped

_ENGINES = 6  # panels of latency; more are in the table
_NEAR = 0.15  # share of the axis of sizes that a label takes
_DARK = 0.7  # share of the heat map's scale from which text is light


def heat_map(study: Study) -> Drawing | str:
    """Samples per second by language and engine; or why there is none."""
    chosen, cells, others = view.main_cells(study)
    if chosen is None:
        return "no throughput was measured"
    found = {
        (code, engine): view.rate(cell)["samples_per_s"] for engine, row in cells.items() for code, cell in row.items()
    }
    codes = [code for code in view.languages(study) if any(code in row for row in cells.values())]
    blocks = [study["languages"][code]["group"] for code in codes]
    places = [at + 0.35 * sum(blocks[i] != blocks[i + 1] for i in range(at)) for at in range(len(codes))]
    made = figures.new(min(3.0 + 1.25 * len(cells), 20), 0.9 + 0.27 * (places[-1] + 1))
    axes = made.add_subplot()
    low, high = (math.log(end) for end in (min(found.values()), max(found.values())))
    for x, engine in enumerate(cells):
        for y, code in zip(places, codes, strict=True):
            value = found.get((code, engine))
            share = None if value is None else (math.log(value) - low) / (high - low) if high > low else 0.5
            _tile(axes, x, y, value, share)
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_xticks(range(len(cells)), [clip(engine) for engine in cells], fontsize=9)
    axes.xaxis.tick_top()
    if len(cells) > 4:
        axes.tick_params(axis="x", labelrotation=30)
    language_axis(study, axes, codes, places, [code for code in codes if view.elsewhere(cells, code, chosen)])
    for group in dict.fromkeys(blocks):
        inside = [place for place, block in zip(places, blocks, strict=True) if block == group]
        if len(inside) > 2:  # else there is no room for the name
            middle = (inside[0] + inside[-1]) / 2
            axes.text(len(cells) - 0.42, middle, group, rotation=270, va="center", ha="left", color=SOFT, fontsize=8)
    absent = " Hatched: not measured." if len(found) < len(codes) * len(cells) else ""
    caption = f"Samples per second ({view.described(study, chosen)}); the colours follow a logarithmic scale.{absent}"
    return Drawing(made, " ".join((caption, *others)))


def _tile(axes: Any, x: float, y: float, value: float | None, share: float | None) -> None:
    from matplotlib.patches import Rectangle

    place = (x - 0.485, y - 0.46)
    if value is None or share is None:
        axes.add_patch(Rectangle(place, 0.97, 0.92, facecolor="none", edgecolor=LINE, hatch="////", linewidth=0))
        return
    axes.add_patch(Rectangle(place, 0.97, 0.92, facecolor=heat(share), linewidth=0))
    text = grouped(value, decimals([value]))
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=PAPER if share > _DARK else INK)


def fertility(study: Study) -> Drawing | str:
    """Samples per second over tokens per word; or why there is none."""
    chosen = view.setting(study)
    if chosen is None:
        return "no throughput was measured"
    cells = view.throughput_cells(study, chosen)
    known = {
        engine: {code: cell for code, cell in row.items() if cell["fertility"] is not None}
        for engine, row in cells.items()
    }
    codes = [code for code in view.languages(study) if any(code in row for row in known.values())]
    if len(codes) < 3:
        return "tokens per word are known of fewer than three languages"
    made = figures.new(WIDTH, 4.6)
    axes = made.add_subplot()
    for engine, (colour, marker) in series(list(known)).items():
        for low in (False, True):
            mine = [cell for code, cell in known[engine].items() if (code in LOW_RESOURCE) == low]
            x, y = [cell["fertility"] for cell in mine], [view.rate(cell)["samples_per_s"] for cell in mine]
            face = colour if low else PAPER
            name = {"label": clip(engine)} if low or not any(code in LOW_RESOURCE for code in known[engine]) else {}
            axes.plot(x, y, marker, color=face, markeredgecolor=colour, markersize=5.5, markeredgewidth=1.2, **name)
    top = view.fastest(cells)
    _name_points(study, axes, {code: cell for code, cell in known[top].items() if code in LOW_RESOURCE})
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_xlabel("tokens per word")
    axes.set_ylabel("samples per second")
    axes.grid()
    legend_above(made, axes)
    unknown = [view.language_name(study, code) for code in view.languages(study) if code not in codes]
    without = f" Without: {', '.join(unknown)}." if unknown else ""
    where = view.described(study, chosen)
    return Drawing(made, f"Filled and named: XTREME's low-resource languages ({where}).{without}")


def _name_points(study: Study, axes: Any, cells: dict[str, Cell]) -> None:
    by_x = sorted(cells.items(), key=lambda item: (item[1]["fertility"] or 0.0, item[0]))
    for at, (code, cell) in enumerate(by_x):
        # Neighbours go to different sides of their points.
        offset = (0, 8) if at % 2 == 0 else (0, -15)
        point = cell["fertility"], view.rate(cell)["samples_per_s"]
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
        axes.annotate(clip(view.language_name(study, code)), point, offset, **style)


def latency(study: Study) -> Drawing | str:
    """Distributions of the time of single responses, a panel for each engine; or why there is none."""
    chosen = view.setting(study) or next(
        (view.Setting(cell["size"], cell["task"], "", 1) for cell in study["cells"] if cell["latency"]), None
    )
    cells = view.latency_cells(study, chosen) if chosen else {}
    if chosen is None or not cells:
        return "no single responses were measured"
    engines = list(cells)[:_ENGINES]
    made, all_axes = panels(len(engines), 2.9)
    for axes, engine in zip(all_axes, engines, strict=True):
        for group in view.groups(study):
            mine = [cell for code, cell in cells[engine].items() if study["languages"][code]["group"] == group]
            if mine:
                _distribution(axes, group, [view.latency(cell)["quantiles_ms"] for cell in mine])
        axes.set_title(clip(engine), color=INK)
        axes.set_xscale("log")
        plain_log(axes.xaxis)
        axes.set_ylim(0, 100)
        axes.set_yticks((0, 25, 50, 75, 95))
        axes.set_xlabel("ms")
        axes.grid()
    all_axes[0].set_ylabel("texts that took at most, %")
    legend_above(made, all_axes[0])
    more = f" Of {len(cells)} engines the first {_ENGINES}." if len(cells) > _ENGINES else ""
    counts = [view.latency(cell)["texts"] for engine in engines for cell in cells[engine].values()]
    texts = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    where = f"{chosen.size}, {chosen.task}, {texts} texts a language, one at a time, of each the median"
    return Drawing(made, f"Median over the languages of a group, and the range over them ({where}).{more}")


def _distribution(axes: Any, group: str, curves: Sequence[Sequence[float]]) -> None:
    colour = GROUP_COLOURS[group]
    by_percent = list(zip(*curves, strict=True))
    axes.fill_betweenx(
        PERCENTILES,
        *([end(times) for times in by_percent] for end in (min, max)),
        color=colour,
        alpha=0.13,
        linewidth=0,
    )
    axes.plot([median(times) for times in by_percent], PERCENTILES, color=colour, linewidth=1.8, label=group)


def scaling(study: Study) -> Drawing | str:
    """Samples per second over parameters, on the task that is shown elsewhere; or why there is none."""
    rows = [one for one in study["scaling"] if one["arm"] == BASELINE]
    task = _scaling_task(study, rows)
    found = [one for one in rows if one["task"] == task]
    if len({one["size"] for one in found}) < 2:
        return "one model size was measured; the curve needs two"
    measures = ["samples_per_s", *(["p50_ms"] if any(one["p50_ms"] is not None for one in found) else [])]
    titles = {"samples_per_s": "samples per second", "p50_ms": "median time of a response, ms"}
    made, all_axes = panels(len(measures), 3.6)
    names: dict[float, list[str]] = {}
    for one in sorted(found, key=lambda one: view.ranked(study, "sizes", one["size"])):
        mine = names.setdefault(one["parameters"] / 1e6, [])
        mine += [] if one["size"] in mine else [one["size"]]
    sizes = {millions: ", ".join(mine) for millions, mine in names.items()}
    for axes, measure in zip(all_axes, measures, strict=True):
        _curves(study, axes, found, measure)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.set_xticks(*_size_ticks(sizes))
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(sizes) * 0.8, max(sizes) * 1.25)
        axes.set_title(titles[measure], color=INK)
        axes.grid()
    legend_above(made, all_axes[0], 3)
    return Drawing(made, f"Geometric means over the languages ({task}); both axes are logarithmic.")


def _scaling_task(study: Study, rows: Sequence[Scaling]) -> str | None:
    """The task of the shown setting where it has rows, else that of the first row; None where there is none."""
    tasks = list(dict.fromkeys(one["task"] for one in rows))
    chosen = view.setting(study)
    return chosen.task if chosen and chosen.task in tasks else next(iter(tasks), None)


def _curves(study: Study, axes: Any, found: Sequence[Scaling], measure: str) -> None:
    shown = [group for group in (view.ALL, *view.groups(study)[:1]) if any(one["group"] == group for one in found)]
    for engine, (colour, marker) in series(list(study["engines"])).items():
        for group, dashes in zip(shown, ("-", ":"), strict=False):
            mine = sorted(
                (one for one in found if (one["engine"], one["group"]) == (engine, group)),
                key=lambda one: one["parameters"],
            )
            points = [(one["parameters"] / 1e6, one[measure]) for one in mine if one[measure] is not None]  # type: ignore[literal-required]
            if points:
                name = f"{clip(engine)}, {group} languages" if len(shown) > 1 else clip(engine)
                style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
                axes.plot(*zip(*points, strict=True), dashes, label=name, **style)


def _size_ticks(sizes: Mapping[float, str]) -> tuple[list[float], list[str]]:
    """Places and labels by millions of parameters; a label too near to the one before it is written below that."""
    places = sorted(sizes)
    near = _NEAR * math.log(places[-1] / places[0])
    labels: list[str] = []
    for i, millions in enumerate(places):
        close = i > 0 and math.log(millions / places[i - 1]) < near and not labels[-1].startswith("\n")
        count = f"{millions:,.0f} M" if millions < 1000 else f"{millions / 1000:,.1f} B"
        labels.append("\n\n" * close + f"{clip(sizes[millions])}\n{count}")
    return places, labels
