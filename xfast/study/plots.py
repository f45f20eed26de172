"""The figures of a study: as SVG for its page and as PNG; what cannot be drawn says why.

A figure takes the colours of the page around it (:mod:`xfast.figures`), so it is readable in the light and in the dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from xfast import figures
from xfast.study import plots_arms, plots_speed
from xfast.study.document import Study
from xfast.study.drawing import Drawing

_ODD = re.compile(r"[^A-Za-z0-9]+")  # in a file name or an id
_TITLES = {
    "heat-map": ("Speed by language and engine", plots_speed.heat_map),
    "ratios": ("Cost of intermediate training by language", plots_arms.ratios),
    "equivalence": ("Tests of equivalence", plots_arms.equivalence),
    "accuracy": ("Accuracy by language and arm", plots_arms.accuracy),
    "pareto": ("Accuracy against cost", plots_arms.pareto),
    "fertility": ("Tokens per word against speed", plots_speed.fertility),
    "latency": ("Time of a single response", plots_speed.latency),
    "scaling": ("Speed against model size", plots_speed.scaling),
}
_PROBES = {
    "layer": "Layer by layer",
    "early": "How early an answer is settled",
    "quantisation": "What int8 and the other engines change",
    "answers": "Answers",
}
"""Titles of the kinds of probes that the document names; any other kind is its own title."""

PROBE = "probe-"
"""Begins the names of the probes' figures."""

KEYS = tuple(_TITLES)
"""Names of the other figures that there can be."""


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        key: its name, in the page and among the files.
        title: above it.
        caption: below it: what is shown, and of what.
        svg: an ``<svg>`` element whose ids begin with the key.
        png: the same as an image on white ground.
    """

    key: str
    title: str
    caption: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Absent:
    """A figure that could not be drawn, and why, as the end of a sentence."""

    key: str
    title: str
    why: str


def plots(study: Study) -> list[Plot | Absent]:
    """Every figure, or why there is none, in the order of the report.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    figures.require("plots", "scipy")
    with figures.style():
        return [_finished(key, title, made) for key, title, made in _drawn(study)]


def _drawn(study: Study) -> Iterator[tuple[str, str, Drawing | str]]:
    for key, (title, draw) in _TITLES.items():
        yield key, title, draw(study)
    made = plots_arms.probes(study)
    if not made:
        yield "probes", "Probes", "no probe was run"
    for kind in sorted(made, key=[*_PROBES, *made].index):
        yield f"{PROBE}{_ODD.sub('-', kind)}", _PROBES.get(kind, kind), made[kind]


def _finished(key: str, title: str, made: Drawing | str) -> Plot | Absent:
    if isinstance(made, str):
        return Absent(key, title, made)
    png = figures.png(made.figure, dpi=160)
    made.figure.set_layout_engine("none")  # done once: it takes longer than drawing
    return Plot(key, title, made.caption, figures.svg(made.figure, key), png)
