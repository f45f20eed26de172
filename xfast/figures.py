"""Figures by matplotlib, drawn without a display: as PNG, and as SVG that takes the colours of the page around it."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xfast.errors import BackendUnavailableError

INK, SOFT, LINE, PAPER = "#1a1d21", "#58616b", "#dfe3e7", "#ffffff"
"""Text, secondary text, thin lines and the ground: what they are in a PNG and on a light page."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5568f", "#c98a00", "#3d8fc4", "#6b5fb5", "#7a7a7a")
"""Colours that people with any kind of colour vision tell apart (Okabe and Ito), as on a light page."""

HEAT = "#005b96"
"""Where the scale of a heat map ends; it begins at ``PAPER``."""

_STEPS = 64  # colours of a heat map


def heat(share: float) -> str:
    """The colour of a share from 0 to 1 on the scale from ``PAPER`` to ``HEAT``."""
    return _MIXES[round(share * (_STEPS - 1))]


def _mixed(step: int) -> float:
    return 0.04 + 0.96 * step / (_STEPS - 1)


def _mix(share: float) -> str:
    ends = zip(bytes.fromhex(PAPER[1:]), bytes.fromhex(HEAT[1:]), strict=True)
    return "#" + "".join(f"{round(light + share * (full - light)):02x}" for light, full in ends)


_MIXES = [_mix(_mixed(step)) for step in range(_STEPS)]

# The same names as in pages.css, which has a dark colour beside each of these.
_ON_A_PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", PAPER: "var(--paper)"}
_ON_A_PAGE |= {colour: f"var(--s{number})" for number, colour in enumerate(SERIES, 1)}
_ON_A_PAGE |= {
    colour: f"color-mix(in srgb, var(--heat) {100 * _mixed(step):.1f}%, var(--paper))"
    for step, colour in enumerate(_MIXES)
}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "xfast",  # the same figure gives the same bytes
    "text.parse_math": False,  # names come from files: a dollar sign in one is no formula
}


def require(argument: str, *others: str) -> None:
    """Asked before anything is drawn. ``others``: what is needed besides matplotlib, as it is imported and installed.

    Raises:
        BackendUnavailableError: one of them is not installed.
    """
    needed = ("matplotlib", *others)
    missing = next((module for module in needed if importlib.util.find_spec(module) is None), None)
    if missing is not None:
        raise BackendUnavailableError(f"{argument}: needs {missing}; pip install {' '.join(needed)}")


def new(width: float, height: float) -> Any:
    """An empty matplotlib ``Figure`` of that size in inches; matplotlib must be there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def style() -> Iterator[None]:
    """Quiet axes in the colours of the page; matplotlib must be there."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def png(figure: Any, dpi: int = 120) -> bytes:
    """The figure as a PNG image."""
    buffer = io.BytesIO()
    figure.set_dpi(dpi)
    with _any_glyph():
        figure.canvas.print_png(buffer)  # savefig would draw everything twice
    return buffer.getvalue()


@contextmanager
def _any_glyph() -> Iterator[None]:
    with warnings.catch_warnings():  # a name in a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def svg(figure: Any, key: str) -> str:
    """The figure as an ``<svg>`` element to put into a page: text is text, colours are the page's CSS variables.

    Args:
        figure: drawn inside :func:`style`.
        key: begins every id, so that several figures live on one page.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    figure.patch.set_visible(False)  # the ground is the page's
    with style(), _any_glyph():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', body)
    # Only what a browser acts on is rewritten; text between tags stays as matplotlib escaped it.
    rest = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], key), re.sub(r"<!--.*?-->", "", rest, flags=re.DOTALL))
    return f'<svg {box[0] if box else ""} focusable="false">{rest.strip()}'


def _tag(tag: str, key: str) -> str:
    tag = re.sub(r'\bid="', f'id="{key}-', tag)
    tag = re.sub(r'(xlink:)?href="#', f'href="#{key}-', tag).replace("url(#", f"url(#{key}-")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"font: (\d+|bold) ([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", tag)
    return re.sub(r"#[0-9a-f]{6}", lambda colour: _ON_A_PAGE.get(colour[0], colour[0]), tag)
