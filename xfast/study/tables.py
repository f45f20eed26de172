"""The tables of a study as data, and as CSV, Markdown, LaTeX and sheets of the page.

CSV has every column in full precision; the others show rounded figures, intervals beside them, leave out columns
without a figure, and name in the caption what is the same in all rows.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from xfast import pages
from xfast.pages import Item, Sheet

Value = str | int | float | bool | None

_LATEX_ROWS = 45  # more do not fit on a page: a longtable
_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: its name in CSV, with the unit.
        title: its name where people read it.
        kind: text, flag, count, figure (a rate or a time: as many decimals as the column needs), number (six digits),
            share (0 to 1, shown in percent), ratio, score, p, bytes.
        bounds: keys of the columns that hold the ends of an interval, shown beside the figure.
        hidden: whether only CSV has it, such as those ends.
        factor: whether it says which row this is: it moves to the caption where it is the same in all rows.
    """

    key: str
    title: str
    kind: str = "text"
    bounds: tuple[str, str] | None = None
    hidden: bool = False
    factor: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of plain values by the key of their column; one that is None or not there is not known."""

    key: str
    title: str
    columns: list[Column]
    rows: list[dict[str, Value]]
    legend: list[str] = field(default_factory=list)

    def column(self, key: str) -> list[Value]:
        """The values of one column, from top to bottom."""
        return [row.get(key) for row in self.rows]


def interval(key: str, title: str, kind: str = "ratio", percent: int = 95) -> list[Column]:
    """A figure's column and the two of its interval's ends."""
    low, high = ends(key, (0.0, 1.0), percent)
    figure = Column(key, f"{title} [{percent}\N{NO-BREAK SPACE}%]", kind, (low, high))
    return [figure, *(Column(end, end, kind, hidden=True) for end in (low, high))]


def ends(key: str, pair: Sequence[float | None], percent: int = 95) -> dict[str, Value]:
    """The ends of an interval as the columns of :func:`interval` name them; of a single measurement none."""
    if pair[0] == pair[1]:
        pair = (None, None)
    return dict(zip((f"{key}_low{percent}", f"{key}_high{percent}"), pair, strict=True))


# --- figures as text ------------------------------------------------------------------------------


def decimals(values: Sequence[float]) -> int:
    """Decimals that leave three digits to the middle one of some rates or times, two to the smallest; at most three."""
    sizes = sorted(abs(value) for value in values if value) or [1.0]
    wanted = (2 - math.floor(math.log10(sizes[len(sizes) // 2])), 1 - math.floor(math.log10(sizes[0])))
    return min(max(0, *wanted), 3)


def grouped(value: float, places: int = 0) -> str:
    """A number with commas between thousands from ten thousand on."""
    return f"{value:,.{places}f}" if abs(value) >= 10_000 else f"{value:.{places}f}"


def shown(kind: str, value: Value, places: int = 0) -> str:
    """A value as people read it; ``places`` counts for figures only."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if kind == "p":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    if kind == "number":
        return f"{value:.6g}"
    if kind == "bytes":
        return f"{value / 1e9:.2f}"
    if kind == "share":
        return f"{100 * value:.1f}"
    if kind in ("ratio", "score"):
        return f"{value:.{3 if kind == 'ratio' else 1}f}"
    return grouped(value, places if kind == "figure" else 0)


def _numbers(values: Sequence[Value]) -> list[float]:
    return [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


def sheet(table: Table) -> Sheet:
    """The table as people read it."""
    values = {column.key: table.column(column.key) for column in table.columns}
    fixed = {
        column.key: column
        for column in table.columns[1:]  # the first one names the rows
        if column.factor and len(table.rows) > 1 and len(set(values[column.key])) == 1
    }
    columns = [
        column
        for column in table.columns
        if not column.hidden and column.key not in fixed and any(value is not None for value in values[column.key])
    ]
    same = ", ".join(_named(column, values[key][0]) for key, column in fixed.items() if values[key][0] is not None)
    by_column = [_items(column, values) for column in columns]
    return Sheet(
        table.key,
        table.title,
        [column.title for column in columns],
        [list(row) for row in zip(*by_column, strict=True)],
        [*([f"All rows: {same}."] if same else []), *table.legend],
        sortable=True,
    )


def _named(column: Column, value: Value) -> str:
    unit = " %" if column.kind == "share" else ""
    return f"{column.title.removesuffix(', %')} {shown(column.kind, value)}{unit}"


def _items(column: Column, values: dict[str, list[Value]]) -> list[Item]:
    mine = values[column.key]
    places = decimals(_numbers(mine)) if column.kind == "figure" else 0
    words = column.kind in ("text", "flag")
    notes = [""] * len(mine)
    if column.bounds:
        pairs = zip(values[column.bounds[0]], values[column.bounds[1]], strict=True)
        notes = [
            ""
            if low is None or high is None
            else f"[{shown(column.kind, low, places)}, {shown(column.kind, high, places)}]"
            for low, high in pairs
        ]
    return [
        Item(
            shown(column.kind, value, places),
            note,
            None if words or isinstance(value, str) or value is None else float(value),
            missing=value is None,
            prose=words,
        )
        for value, note in zip(mine, notes, strict=True)
    ]


# --- files ----------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """Every column and row in full precision; empty fields are what is not known."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        writer.writerow([_exact(row.get(column.key)) for column in table.columns])
    return buffer.getvalue()


def _exact(value: Value) -> str:
    if isinstance(value, str):
        return pages.printable(value)
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_markdown(table: Table) -> str:
    """A GitHub Markdown table with its title and legend."""
    view = sheet(table)
    legend = [pages.markdown_text(line) for line in view.legend]
    return "\n\n".join([f"## {pages.markdown_text(view.title)}", pages.markdown_table(view), *legend]) + "\n"


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is."""
    text = "".join(_LATEX_SPECIAL.get(char, char) for char in " ".join(pages.printable(text).split()))
    return text.replace("–", "--").replace("×", r"$\times$").replace("−", r"$-$").replace("µ", r"$\mu$")


def to_latex(table: Table) -> str:
    """A ``booktabs`` table to ``\\input``; a ``longtable`` where it is longer than a page."""
    view = sheet(table)
    words = [any(row[at].prose for row in view.rows) or at == 0 for at in range(len(view.head))]
    spec = "".join("l" if prose else "r" for prose in words)
    caption = " ".join(latex_text(line if line[-1] in ".?" else f"{line}.") for line in (view.title, *view.legend))
    label = "tab:study-" + re.sub(r"[^a-z0-9]+", "-", view.key)
    head = " & ".join(latex_text(text) for text in view.head) + r" \\"
    rows = [" & ".join(_latex_item(item) for item in row) + r" \\" for row in view.rows]
    if len(rows) > _LATEX_ROWS:
        lines = [f"\\begin{{longtable}}{{{spec}}}", f"\\caption{{{caption}}}\\label{{{label}}}\\\\", r"\toprule", head]
        lines += [r"\midrule", r"\endfirsthead", r"\toprule", head, r"\midrule", r"\endhead"]
        lines += [r"\bottomrule", r"\endfoot", *rows, r"\end{longtable}"]
    else:
        lines = [r"\begin{table}", r"\centering", f"\\caption{{{caption}}}\\label{{{label}}}"]
        lines += [f"\\begin{{tabular}}{{{spec}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        lines += [r"\end{tabular}", r"\end{table}"]
    packages = "booktabs, longtable" if len(rows) > _LATEX_ROWS else "booktabs"
    return f"% needs: {packages}\n" + "\n".join(lines) + "\n"


def _latex_item(item: Item) -> str:
    note = f" {{\\scriptsize {latex_text(item.note)}}}" if item.note else ""
    # A bracket at the start of a row would be read as the argument of the line break before it.
    text = latex_text(item.text)
    return (f"{{{text}}}" if text.startswith(("[", "*")) else text) + note
