"""What the figures of a study share: sizes, markers, labels and two kinds of axes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from xfast import figures
from xfast.figures import INK, LINE, PAPER, SERIES, SOFT
from xfast.study import view
from xfast.study.document import CONTROL, INTERMEDIATE, Study
from xfast.study.languages import LOW_RESOURCE
from xfast.study.profiles import GROUPS

WIDTH = 8.4
"""Inches; the column of the page is about as wide."""

PANELS = 3
"""Beside each other, at most."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Beside colours, so that series are told apart without them."""

GROUP_COLOURS = dict(zip(GROUPS, (SERIES[1], SERIES[2], SERIES[0]), strict=True))

_CLIP = 28
_REACH = 30.0  # percent; what a handful of pairs leaves open may be wider and is cut off at the frame


@dataclass(frozen=True)
class Drawing:
    """A finished matplotlib figure and what is said under it."""

    figure: Any
    caption: str


@dataclass(frozen=True)
class Line:
    """A row of a forest plot; changes in percent."""

    label: str
    change: float
    inner: Sequence[float] | None
    outer: Sequence[float]
    colour: str
    remark: str = ""
    strong: bool = False


def clip(text: str) -> str:
    """A name short enough for a label."""
    return text if len(text) <= _CLIP else text[: _CLIP - 1] + "…"


def label(study: Study, code: str) -> str:
    """The name of a language with its code."""
    return f"{clip(view.language_name(study, code))} ({code})"


def series(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name; from the ninth on colours repeat with other markers."""
    return {
        name: (SERIES[at % len(SERIES)], MARKERS[(at + at // len(SERIES)) % len(MARKERS)])
        for at, name in enumerate(names)
    }


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm, the same in every figure."""
    return {CONTROL: (SERIES[7], "D"), INTERMEDIATE: (SERIES[1], "s")}.get(arm, (SERIES[0], "o"))


def panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of some panels of equal size, at most three beside each other."""
    columns = min(count, PANELS)
    rows = -(-count // columns)
    made = figures.new(WIDTH, height * rows)
    return made, [made.add_subplot(rows, columns, at + 1) for at in range(count)]


def language_axis(
    study: Study, axes: Any, codes: Sequence[str], places: Sequence[float], starred: Container[str] = ()
) -> None:
    """Names of languages down the y axis, the first at the top; XTREME's low-resource languages stand out."""
    axes.set_yticks(places, [label(study, code) + "*" * (code in starred) for code in codes])
    for text, code in zip(axes.get_yticklabels(), codes, strict=True):
        text.set_color(INK)
        text.set_fontweight("bold" if code in LOW_RESOURCE else "normal")
    axes.set_ylim(max(places) + 0.6, min(places) - 0.6)
    bare(axes)


def bare(axes: Any) -> None:
    """No frame and no tick marks: what is drawn is its own frame."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def plain_log(axis: Any) -> None:
    """A logarithmic axis with ordinary numbers; asked for when everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 3.0) if high / low > 12 else (1.0, 2.0, 5.0)  # more would run into each other in a narrow panel
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_above(made: Any, axes: Any, columns: int = 4) -> None:
    """One legend over the whole figure."""
    handles, names = axes.get_legend_handles_labels()
    made.legend(handles, names, loc="outside upper left", ncols=columns, labelcolor=SOFT, borderaxespad=0)


def forest(axes: Any, lines: Sequence[Line], margin: float) -> None:
    """Intervals of changes in percent, one a row from the top, over the band of the margin."""
    from matplotlib.transforms import blended_transform_factory

    low, high = 100 * (1 / (1 + margin) - 1), 100 * margin
    axes.axvspan(low, high, color=LINE, alpha=0.45, linewidth=0)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    right = blended_transform_factory(axes.transAxes, axes.transData)
    for y, line in enumerate(lines):
        axes.plot(line.outer, [y, y], color=line.colour, linewidth=1.1, solid_capstyle="butt")
        if line.inner:
            axes.plot(line.inner, [y, y], color=line.colour, linewidth=3.2, solid_capstyle="butt")
        axes.plot([line.change], [y], "o", color=PAPER, markeredgecolor=line.colour, markersize=5, markeredgewidth=1.4)
        weight = "bold" if line.strong else "normal"
        axes.text(1.015, y, line.remark, transform=right, va="center", fontsize=8, color=SOFT, weight=weight)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    for text, line in zip(axes.get_yticklabels(), lines, strict=True):
        text.set_color(INK)
        text.set_fontweight("bold" if line.strong else "normal")
    axes.set_ylim(len(lines) - 0.4, -0.6)
    reach = max(abs(end) for line in lines for end in (*line.outer, high)) * 1.15
    reach = min(reach, _REACH)
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("change of time over the baseline, %")
    axes.grid(axis="x")
    bare(axes)
