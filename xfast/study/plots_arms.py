"""Figures of what intermediate training changes: cost, accuracy, and what lies between them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from xfast import figures
from xfast.figures import INK, LINE, PAPER, SERIES, SOFT
from xfast.study import view
from xfast.study.contents import comparisons
from xfast.study.document import (
    BASELINE,
    CONTROL,
    DIFFERENT,
    EQUIVALENT,
    UNDECIDED,
    ParetoPoint,
    Probe,
    Study,
)
from xfast.study.drawing import (
    PANELS,
    WIDTH,
    Drawing,
    Line,
    arm_style,
    clip,
    forest,
    label,
    language_axis,
    legend_above,
    panels,
    plain_log,
    series,
)
from xfast.study.languages import LOW_RESOURCE

_LINES = 40  # of a forest plot; more are in the table
_TASKS = 6  # panels of accuracy against cost

VERDICTS = {EQUIVALENT: SERIES[2], DIFFERENT: SERIES[1], UNDECIDED: SOFT}


def _change(ratio: float) -> float:
    return 100 * (ratio - 1)


def _changes(interval: Sequence[float]) -> list[float]:
    return [_change(end) for end in interval]


# --- cost -----------------------------------------------------------------------------------------


def equivalence(study: Study) -> Drawing | str:
    """The control and every comparison but single languages', which ``ratios`` shows, with the band of the margin."""
    known = [one for one in comparisons(study) if one["pairs"] and not view.too_few(one)]
    found = [one for one in known if one["scope"] not in study["languages"]]
    if all(one["arm"] == CONTROL for one in found):
        return "no arm was compared with the baseline"
    lines = [
        Line(
            f"{clip(one['scope'])}, {clip(one['arm'])}"
            if one["arm"] != CONTROL
            else f"control (A/A), {clip(one['scope'])}",
            _change(one["ratio"]),
            _changes(one["interval90"]),
            _changes(one["interval95"]),
            VERDICTS[one["verdict"]],
            one["verdict"],
            strong=one is study["control"],
        )
        for one in found[:_LINES]
    ]
    made = figures.new(WIDTH, 0.9 + 0.27 * len(lines))
    forest(made.add_subplot(), lines, study["control"]["margin"])
    more = f" Of {len(found)} comparisons the first {_LINES}." if len(found) > _LINES else ""
    margin = 100 * study["control"]["margin"]
    caption = (
        f"Thick: 90 % interval, what the tests compare with the margin of {margin:g} % (grey band). Thin: 95 %. The "
        f"control is the baseline against itself: what it shows is noise.{more}"
    )
    return Drawing(made, caption)


def ratios(study: Study) -> Drawing | str:
    """Change of time by language, over all of its cells."""
    arm = next((name for name in view.other_arms(study) if name != CONTROL), None)
    tests = {code: [one for one in view.tests_of(study, code) if one["arm"] == arm] for code in view.languages(study)}
    lines = [
        Line(
            label(study, code),
            _change(one["ratio"]),
            _changes(one["interval90"]),
            _changes(one["interval95"]),
            VERDICTS[one["verdict"]],
            view.change_text(one["ratio"], one["interval90"]),
            code in LOW_RESOURCE,
        )
        for code, found in tests.items()
        for one in found
        if not view.too_few(one)
    ]
    if not lines:
        return "no arm was compared with the baseline language by language"
    made = figures.new(WIDTH, 0.9 + 0.27 * len(lines))
    forest(made.add_subplot(), lines, study["control"]["margin"])
    caption = (
        f"{arm} over baseline, all measurements of a language together. Thick and in figures: 90 % interval; "
        f"thin: 95 %. Grey band: the margin of {100 * study['control']['margin']:g} %. Green: equivalent, orange: "
        "different, grey: undecided."
    )
    return Drawing(made, caption)


# --- accuracy -------------------------------------------------------------------------------------


def accuracy(study: Study) -> Drawing | str:
    """Scores by language and arm, on the task that has most of them."""
    trained = view.trained_arms(study)
    rows = [row for row in study["accuracy"] if view.whole(study, row["size"], row["layers"]) and row["arm"] in trained]
    counts = Counter((row["task"], row["metric"], row["size"], row["engine"]) for row in rows)
    if not counts:
        return _no_scores(study)
    task, metric, size, engine = max(counts, key=lambda key: counts[key])
    values = {
        (row["language"], row["arm"]): row["value"]
        for row in rows
        if (row["task"], row["metric"], row["size"], row["engine"]) == (task, metric, size, engine)
    }
    codes = [code for code in view.languages(study) if any(code == where for where, _ in values)]
    made = figures.new(WIDTH, 1.1 + 0.25 * len(codes))
    axes = made.add_subplot()
    for y, code in enumerate(codes):
        mine = [values[code, arm] for arm in study["arms"] if (code, arm) in values]
        axes.plot([min(mine), max(mine)], [y, y], color=LINE, linewidth=3, solid_capstyle="round")
    for arm in view.trained_arms(study):
        points = [(values[code, arm], y) for y, code in enumerate(codes) if (code, arm) in values]
        if points:
            colour, marker = arm_style(arm)
            face = PAPER if arm == BASELINE else colour
            axes.plot(
                *zip(*points, strict=True), marker, color=face, markeredgecolor=colour, markersize=6, label=clip(arm)
            )
    language_axis(study, axes, codes, range(len(codes)))
    axes.set_xlabel(metric)
    axes.grid(axis="x")
    legend_above(made, axes)
    return Drawing(made, f"{metric} on {task} ({size}, {engine}).")


def _no_scores(study: Study) -> str:
    if view.seeded(study):
        return "the weights are seeded, so there is no accuracy to show"
    return "no labelled data was scored"


def pareto(study: Study) -> Drawing | str:
    """Accuracy over time of a sample, a panel for each task, over all languages where that was formed."""
    if not study["pareto"]:
        return _no_scores(study)
    groups = Counter(point["group"] for point in study["pareto"])
    group = view.ALL if view.ALL in groups else groups.most_common(1)[0][0]
    points = [point for point in study["pareto"] if point["group"] == group]
    tasks = list(dict.fromkeys(point["task"] for point in points))
    made, all_axes = panels(min(len(tasks), _TASKS), 3.6)
    colours = {engine: colour for engine, (colour, _) in series(list(study["engines"])).items()}
    for axes, task in zip(all_axes, tasks, strict=False):
        _front(axes, [point for point in points if point["task"] == task], colours, len(study["sizes"]) > 1)
        axes.set_title(clip(task), color=INK)
        axes.set_xscale("log")
        plain_log(axes.xaxis)
        axes.set_xlabel("ms per sample")
        axes.grid()
    all_axes[0].set_ylabel("accuracy")
    for engine in dict.fromkeys(point["engine"] for point in points):
        all_axes[0].plot([], [], "o", color=colours[engine], label=clip(engine))
    for arm in dict.fromkeys(point["arm"] for point in points):
        marker = arm_style(arm)[1]
        all_axes[0].plot([], [], marker, color=PAPER, markeredgecolor=SOFT, label=clip(arm))
    legend_above(made, all_axes[0], 5)
    more = f" Of {len(tasks)} tasks the first {_TASKS}." if len(tasks) > _TASKS else ""
    numbers = " Numbers: layers that run." if any(point["layers"] is not None for point in points) else ""
    caption = (
        f"Mean over {group} languages. Filled and joined: nothing is both faster and more accurate.{numbers}{more}"
    )
    return Drawing(made, caption)


def _front(axes: Any, points: Sequence[ParetoPoint], colours: dict[str, str], name_sizes: bool) -> None:
    front = sorted((point["ms_per_sample"], point["accuracy"]) for point in points if point["on_front"])
    if front:
        axes.plot(*zip(*front, strict=True), color=SOFT, linewidth=1, drawstyle="steps-post", zorder=1)
    for point in points:
        colour, marker = colours[point["engine"]], arm_style(point["arm"])[1]
        face = colour if point["on_front"] else PAPER
        place = point["ms_per_sample"], point["accuracy"]
        axes.plot(*place, marker, color=face, markeredgecolor=colour, markersize=6, zorder=2)
        words = [clip(point["size"])] if name_sizes and point["on_front"] else []
        words += [f"{point['layers']}"] if point["layers"] is not None else []
        if words:
            axes.annotate(" ".join(words), place, (5, -9), textcoords="offset points", fontsize=7, color=SOFT)


# --- probes ---------------------------------------------------------------------------------------


def probes(study: Study) -> dict[str, Drawing]:
    """A figure for each kind of probe, by name, of the size and task that it has most of."""
    rows = sorted(study["probes"], key=lambda row: row["probe"])
    return {kind: _probe(list(mine)) for kind, mine in groupby(rows, key=lambda row: row["probe"])}


def _probe(rows: Sequence[Probe]) -> Drawing:
    counts = Counter((row["size"], row["task"]) for row in rows)
    size, task = max(counts, key=lambda key: counts[key])
    mine = [row for row in rows if (row["size"], row["task"]) == (size, task)]
    whats = list(dict.fromkeys(row["what"] for row in mine))[:_TASKS]
    made, all_axes = panels(len(whats), 3.2)
    for axes, what in zip(all_axes, whats, strict=True):
        _probe_panel(axes, [row for row in mine if row["what"] == what])
        if rows[0]["probe"] == "early":
            axes.set_xlabel("layer")
        axes.set_title(textwrap.fill(what, 96 // min(len(whats), PANELS), max_lines=3, placeholder="…"), color=INK)
    legend_above(made, all_axes[0])
    languages = len({row["language"] for row in mine})
    return Drawing(made, f"Mean over {languages} languages, and the range over them ({size}, {task}).")


def _probe_panel(axes: Any, rows: Sequence[Probe]) -> None:
    from matplotlib.ticker import MaxNLocator

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    over_numbers = all(isinstance(row["x"], (int, float)) for row in rows)
    names = list(dict.fromkeys(str(row["x"]) if row["x"] is not None else "" for row in rows))
    for at, arm in enumerate(arms):
        colour, marker = arm_style(arm)
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["arm"] == arm:
                place = row["x"] if over_numbers else names.index(str(row["x"]) if row["x"] is not None else "")
                found.setdefault(float(place or 0), []).append(row["value"])
        xs = sorted(found)
        means, low, high = ([of(found[x]) for x in xs] for of in (fmean, min, max))
        if over_numbers:
            axes.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(xs, means, color=colour, marker=marker, markersize=4, linewidth=1.5, label=clip(arm))
        else:
            beside = [x + 0.16 * (at - (len(arms) - 1) / 2) for x in xs]
            axes.vlines(beside, low, high, color=colour, linewidth=1.2)
            axes.plot(beside, means, marker, color=colour, markersize=6, label=clip(arm))
    if not over_numbers:
        axes.set_xticks(range(len(names)), [clip(name) for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
