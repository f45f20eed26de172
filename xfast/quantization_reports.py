"""What ``xfast.quantization`` found, as plain data: printable (``print(report)``, rich) and JSON (``to_dict()``)."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from xfast.recipe import LINEARS

_SHOWN = 20
_WIDTH = 120


class Report:
    """Prints itself as tables."""

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only, as ``json.dumps`` takes them."""
        return asdict(self)  # type: ignore[call-overload]

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=_WIDTH, force_terminal=False, highlight=False).print(self)
        return text.getvalue().rstrip()


@dataclass(frozen=True)
class ProductOutliers:
    """What one product reads.

    Attributes:
        layer, name: which product.
        ratio: largest |x| of the largest channel over that of the median channel.
        channel: the largest channel.
        outliers: channels more than ``OutlierReport.threshold`` times the median channel, largest first.
        kurtosis: of a token's values, mean over tokens; 3 for a normal distribution.
        error: relative error of its outputs when inputs and weights are int8, median token.
        worst_error: the worst token's.
        from_outliers: share of the squared error that disappears when the outlier channels are computed exactly.
    """

    layer: int
    name: str
    ratio: float
    channel: int
    outliers: tuple[int, ...]
    kurtosis: float
    error: float
    worst_error: float
    from_outliers: float


@dataclass(frozen=True)
class OutlierReport(Report):
    """Which products suffer from a few large input channels. ``products`` in the order in which they run."""

    threshold: float
    tokens: int
    products: tuple[ProductOutliers, ...]

    def channels(self) -> dict[int, int]:
        """Outlier channels of the LayerNorms' outputs (inputs of qkv and ffn_in), with the number of products."""
        found = Counter(c for p in self.products if p.name in ("qkv", "ffn_in") for c in p.outliers)
        return dict(found.most_common())

    def __rich__(self) -> RenderableType:
        table = Table(title=f"Outliers in {self.tokens} tokens", box=box.SIMPLE, title_justify="left")
        for heading in ("layer", "product"):
            table.add_column(heading)
        for heading in (
            "largest/median",
            "channel",
            "outliers",
            "kurtosis",
            "int8 error",
            "worst token",
            "by outliers",
        ):
            table.add_column(heading, justify="right")
        shown = sorted(self.products, key=lambda p: -p.ratio)[:_SHOWN]
        for p in sorted(shown, key=lambda p: (p.layer, LINEARS.index(p.name))):
            table.add_row(
                *(str(p.layer), p.name, f"{p.ratio:.1f}", str(p.channel), str(len(p.outliers)), f"{p.kurtosis:.0f}"),
                *(f"{p.error:.2%}", f"{p.worst_error:.2%}", f"{p.from_outliers:.0%}"),
            )
        lines = []
        if len(shown) < len(self.products):
            lines.append(f"The {len(shown)} products with the largest ratio of {len(self.products)}.")
        if channels := self.channels():
            worst = ", ".join(f"{channel} ({count})" for channel, count in list(channels.items())[:8])
            lines.append(f"LayerNorm outputs above {self.threshold:g} x the median channel (in products): {worst}")
        return Group(table, *lines)


@dataclass(frozen=True)
class ProductError:
    """Error of the encoder's output when this product alone is quantised."""

    layer: int
    name: str
    error: float


@dataclass(frozen=True)
class SensitivityReport(Report):
    """Errors of the encoder's output (as in ``Options.tolerance``), everything else in fp32.

    Attributes:
        precision: what was tried.
        tokens: measured on.
        products: one alone.
        layers: the four of one layer.
        everything: all of them.
    """

    precision: str
    tokens: int
    products: tuple[ProductError, ...]
    layers: tuple[float, ...]
    everything: float

    def worst(self, count: int = 5) -> tuple[ProductError, ...]:
        """The most sensitive products, first the worst."""
        return tuple(sorted(self.products, key=lambda p: -p.error)[:count])

    def __rich__(self) -> RenderableType:
        title = f"Error of the output with one part in {self.precision}, {self.tokens} tokens"
        table = Table(title=title, box=box.SIMPLE, title_justify="left")
        for heading in ("layer", *LINEARS, "whole layer"):
            table.add_column(heading, justify="right")
        errors = {(p.layer, p.name): p.error for p in self.products}
        for layer, whole in enumerate(self.layers):
            cells = [errors[layer, name] for name in LINEARS]
            table.add_row(str(layer), *(f"{value:.2e}" for value in (*cells, whole)))
        return Group(table, f"All in {self.precision}: {self.everything:.2e}")


@dataclass(frozen=True)
class ProductChoice:
    """What one product got. ``error``: of the output with this product alone in that format; ``bytes``: packed."""

    layer: int
    name: str
    precision: str
    smoothed: bool
    error: float
    bytes: int


@dataclass(frozen=True)
class Measured:
    """A recipe run on the calibration batches: error as in ``Options.tolerance``, cosines of tokens, packed bytes."""

    error: float
    worst_cosine: float
    mean_cosine: float
    bytes: int


@dataclass(frozen=True)
class MixedReport(Report):
    """What :func:`xfast.quantization.mixed` chose, and what it measured.

    Attributes:
        tolerance: what was asked.
        tokens: measured on.
        result: the recipe as a whole.
        products: its choices.
        uniform: the same with one precision everywhere.
        runs: how many recipes were packed and run.
    """

    tolerance: float
    tokens: int
    result: Measured
    products: tuple[ProductChoice, ...]
    uniform: dict[str, Measured]
    runs: int

    def __rich__(self) -> RenderableType:
        choices = Table(title="Chosen (~: smoothed)", box=box.SIMPLE, title_justify="left")
        choices.add_column("layer", justify="right")
        for name in LINEARS:
            choices.add_column(name)
        cells = {(p.layer, p.name): p.precision + ("~" if p.smoothed else "") for p in self.products}
        for layer in sorted({p.layer for p in self.products}):
            choices.add_row(str(layer), *(cells[layer, name] for name in LINEARS))
        title = f"Measured on {self.tokens} tokens, tolerance {self.tolerance:.2e}"
        measured = Table(title=title, box=box.SIMPLE, title_justify="left")
        measured.add_column("products in")
        for heading in ("relative error", "worst token's cosine", "mean cosine", "MiB"):
            measured.add_column(heading, justify="right")
        for label, m in ((f"all {name}", m) for name, m in self.uniform.items()):
            measured.add_row(label, *_cells(m))
        measured.add_row("chosen", *_cells(self.result), style="bold")
        return Group(choices, measured)


def _cells(m: Measured) -> tuple[str, ...]:
    return f"{m.error:.2e}", f"{m.worst_cosine:.5f}", f"{m.mean_cosine:.5f}", f"{m.bytes / 2**20:.1f}"
