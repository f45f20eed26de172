"""What reports have in common: tables ready to be shown, as HTML and Markdown, and the page around them.

Names and messages come from files and may hold anything: everything here escapes them. A page is one file that needs no
network; its colours follow the reader's light or dark scheme, and printing is provided for.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

_LONG, _LONG_HEAD = 40, 16  # characters that stay on one line, of prose and of a column's name
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Item:
    """A cell of a sheet: a figure, a smaller remark with it, and how it stands out without colour.

    Attributes:
        text: what is shown.
        note: smaller, under the text.
        value: the figure itself, for sorting and colours; None for words.
        best: shown in bold.
        missing: there is no figure; shown faint.
        prose: words, set from the left and wrapped.
    """

    text: str
    note: str = ""
    value: float | None = None
    best: bool = False
    missing: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table: the first column names its rows.

    Attributes:
        key: its id in the page.
        title: its caption.
        head: names of the columns.
        rows: items, one a column.
        legend: lines under it.
        coloured: whether values are differences, shown in blue above zero and in orange below.
        sortable: whether a reader can sort it, on a page with the script.
    """

    key: str
    title: str
    head: list[str]
    rows: list[list[Item]]
    legend: list[str] = field(default_factory=list)
    coloured: bool = False
    sortable: bool = False


def limit(sheet: Sheet) -> float:
    """The largest difference of a sheet, where the colours end."""
    return max((abs(item.value) for row in sheet.rows for item in row if item.value is not None), default=0.0) or 1.0


def signed(value: float) -> str:
    """A difference to one decimal, always with a sign; no negative zero."""
    return f"{round(value, 1) + 0.0:+.1f}"


def printable(text: str) -> str:
    """The text with U+FFFD for what no file of text may hold: control characters and lone surrogates."""
    return _UNPRINTABLE.sub("\ufffd", text)


# --- Markdown -------------------------------------------------------------------------------------


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line of a table."""
    text = " ".join(escape(printable(text), quote=False).split())
    return "".join(f"\\{char}" if char in "\\`*_[]|~" else char for char in text)


def markdown_table(sheet: Sheet) -> str:
    """The sheet as a GitHub Markdown table without its title and legend; figures to the right."""
    rows = [[markdown_text(f"{item.text} {item.note}") or " " for item in row] for row in sheet.rows]
    words = [any(row[column].prose for row in sheet.rows) for column in range(len(sheet.head))]
    rules = [":--" if prose or not column else "--:" for column, prose in enumerate(words)]
    lines = ([markdown_text(head) for head in sheet.head], rules, *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- HTML -----------------------------------------------------------------------------------------


def html_text(text: str) -> str:
    """Text as HTML, inside an element or an attribute in double quotes."""
    return escape(printable(text))


def html_list(lines: Iterable[str]) -> str:
    """Lines of text as a bulleted list."""
    return f"<ul>{''.join(f'<li>{html_text(line)}</li>' for line in lines)}</ul>"


def html_table(sheet: Sheet, level: int = 3) -> str:
    """The sheet as an HTML table that scrolls sideways inside its own frame, its title above and its legend below.

    Args:
        sheet: what to show.
        level: of the heading.
    """
    most = limit(sheet) if sheet.coloured else None
    words = [all(row[column].prose for row in sheet.rows) for column in range(len(sheet.head))]
    head = "".join(_head(text, prose) for text, prose in zip(sheet.head, words, strict=True))
    rows = [
        f'<tr><th scope="row">{html_text(first.text)}</th>{"".join(_data(item, most) for item in items)}</tr>'
        for first, *items in sheet.rows
    ]
    key, kind = html_text(sheet.key), ' class="sortable"' * sheet.sortable
    legend = "".join(f'<p class="legend">{html_text(line)}</p>' for line in sheet.legend)
    return (
        f'<h{level} id="{key}-title">{html_text(sheet.title)}</h{level}>\n'
        f'<div class="wide" role="region" aria-labelledby="{key}-title" tabindex="0">'
        f'<table id="{key}" aria-labelledby="{key}-title"{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>{legend}"
    )


def _head(text: str, prose: bool) -> str:
    kinds = " ".join(["prose"] * prose + ["long"] * (len(text) > _LONG_HEAD))
    attribute = f' class="{kinds}"' if kinds else ""
    return f'<th scope="col"{attribute}>{html_text(text)}</th>'


def _data(item: Item, most: float | None) -> str:
    kinds = " ".join(name for name in ("missing", "best", "prose") if getattr(item, name))
    kinds += " long" * (item.prose and (len(item.text) > _LONG or "\n" in item.text))
    attributes = f' class="{kinds}"' if kinds else ""
    if item.value is not None:
        attributes += f' data-value="{item.value!r}"'
        if most is not None:
            attributes += f' style="background: {_tint(item.value / most)}; color: #111"'
    note = f"<small>{html_text(item.note)}</small>" if item.note else ""
    return f"<td{attributes}>{html_text(item.text)}{note}</td>"


def _tint(share: float) -> str:
    """Blue for gains, orange for losses, so light that black text stays readable; white for 0."""
    end = (33, 102, 172) if share > 0 else (230, 97, 1)
    return "#" + "".join(f"{round(255 - 0.5 * abs(share) * (255 - channel)):02x}" for channel in end)


def page(title: str, body: Sequence[str], *, script: bool = False) -> str:
    """A whole page: one file that needs no network.

    Args:
        title: as text; shown by the browser, not on the page.
        body: pieces of HTML.
        script: whether tables sort and the colour scheme can be switched; without it the page holds no script.
    """
    assets = importlib.resources.files("xfast")
    style = assets.joinpath("pages.css").read_text(encoding="utf-8")
    code = f"<script>\n{assets.joinpath('pages.js').read_text(encoding='utf-8')}</script>\n" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>\n{style}</style></head><body><main>\n"
        + "\n".join(body)
        + f"\n</main>\n{code}</body>\n</html>\n"
    )
