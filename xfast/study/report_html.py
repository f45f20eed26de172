"""The page of a study: one file with its style, script and figures inside, readable without network and script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xfast import pages
from xfast.pages import html_list, html_text
from xfast.study import view
from xfast.study.answer import Answer
from xfast.study.document import Study
from xfast.study.plots import Absent, Plot
from xfast.study.tables import Table, sheet

_ROWS = 1000  # of a table in the page; its files have all
_SECTIONS = {"answer": "Answer", "figures": "Figures", "tables": "Tables", "method": "Method", "setup": "Environment"}
_METHOD = """
The same encoder runs with the weights of every arm; the only difference between arms is the numbers in them. All arms
of a size and engine live in one process and take turns, so that every comparison is of neighbours in time.

Throughput is of whole batches, medians over rounds; latency is of single texts, one at a time, and its quantiles are
over texts, of each the median of its responses. Ratios are times over the baseline's, from paired visits. Intervals of
a cell are order statistics of the median from 6 rounds on, Student's of the mean logarithm below. The control is the
baseline a second time: it shows what noise looks like.

Whether two arms cost the same is asked with two one-sided tests against a margin: “equivalent” is a finding, not the
absence of one. Tests of single languages are not corrected for their number.

Low-resource languages come first everywhere: XTREME's Javanese, Burmese, Malayalam, Telugu, Swahili, Yoruba and
Marathi, then by class (Joshi et al. 2020), 0 to 5.
"""


def page(study: Study, answer: Answer, tables: Sequence[Table], plots: Sequence[Plot | Absent]) -> str:
    """The whole page."""
    body = [
        *_header(study),
        *(_remark("warning", *pair) for pair in answer.warnings),
        *(_remark("note", *pair) for pair in answer.cautions),
        *_answer(answer),
        _heading("figures"),
        *(_figure(plot) for plot in plots if isinstance(plot, Plot)),
        *_absent([plot for plot in plots if isinstance(plot, Absent)]),
        _heading("tables"),
        *(_table(table) for table in tables),
        _heading("method"),
        *(f"<p>{html_text(text)}</p>" for text in _METHOD.strip().split("\n\n")),
        *([html_list(study["notes"])] if study["notes"] else []),
        "<h3>Settings</h3>",
        _pairs(study["settings"]),
        _heading("setup"),
        *_setup(study),
    ]
    return pages.page(study["title"], body, script=True)


def _heading(section: str) -> str:
    return f'<h2 id="{section}">{_SECTIONS[section]}</h2>'


def _header(study: Study) -> Iterator[str]:
    counts = [(len(study[part]), part) for part in ("languages", "engines", "sizes", "arms")]
    facts = [f"{count} {part if count != 1 else part[:-1]}" for count, part in counts]
    minutes = study["seconds"] / 60
    facts += [study["text"], f"{study['created'][:10]}, {minutes:.0f} min"]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in _SECTIONS.items())
    yield f'<header><h1>{html_text(study["title"])}</h1>\n<p class="facts">{html_text(" · ".join(facts))}</p></header>'
    yield f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _remark(kind: str, what: str, so: str) -> str:
    return f'<div class="{kind}" role="note"><p><strong>{html_text(what)}</strong> {html_text(so)}</p></div>'


def _answer(answer: Answer) -> Iterator[str]:
    yield f'<section class="lead" aria-labelledby="answer"><h2 id="answer">{_SECTIONS["answer"]}</h2>'
    yield from (f"<p>{html_text(text)}</p>" for text in answer.lead)
    items = "".join(
        f"<li><strong>{html_text(name)}</strong>: {html_text(text)}</li>" for name, text in answer.languages
    )
    yield f'<ul class="languages">{items}</ul></section>'


def _figure(plot: Plot) -> str:
    key, title = plot.key, html_text(plot.title)
    opening, rest = plot.svg.split(">", 1)
    width = float(opening.split('viewBox="')[1].split('"')[0].split()[2])
    # Text keeps a readable size: a narrow window scrolls the figure instead of shrinking it.
    size = f"min-width: {0.9 * width:.0f}px; max-width: {1.55 * width:.0f}px"
    names = f'<title id="{key}-name">{title}</title><desc id="{key}-about">{html_text(plot.caption)}</desc>'
    image = f'{opening} role="img" aria-labelledby="{key}-name {key}-about" style="{size}">{names}{rest}'
    return (
        f'<figure id="figure-{key}"><h3>{title}</h3><div class="wide" role="region" aria-label="{title}" tabindex="0">'
        f"{image}</div>\n<figcaption>{html_text(plot.caption)}</figcaption></figure>"
    )


def _absent(left_out: Sequence[Absent]) -> Iterator[str]:
    if left_out:
        yield "<h3>Not drawn</h3>"
        yield html_list(f"{one.title}: {one.why}." for one in left_out)


def _table(table: Table) -> str:
    shown = sheet(table)
    if len(shown.rows) > _ROWS:
        more = f"The first {_ROWS} of {len(shown.rows)} rows; the files have all."
        shown = replace(shown, rows=shown.rows[:_ROWS], legend=[*shown.legend, more])
    kinds = {"csv": "CSV", "md": "Markdown", "tex": "LaTeX"}
    links = ", ".join(f'<a href="tables/{table.key}.{end}">{name}</a>' for end, name in kinds.items())
    return f'{pages.html_table(shown)}\n<p class="legend">{links}</p>'


# --- environment ----------------------------------------------------------------------------------


def _setup(study: Study) -> Iterator[str]:
    yield "<h3>Weights</h3>"
    yield _pairs({name: f"{arm['source']}: {arm['description']}" for name, arm in study["arms"].items()})
    if held := study.get("held"):
        yield "<h3>How the weights are held</h3>"
        yield _pairs({where: "; ".join(f"{arm}: {how}" for arm, how in by.items()) for where, by in held.items()})
    yield "<h3>Sizes</h3>"
    yield _pairs(
        {
            name: f"{size['parameters'] / 1e6:,.0f} M parameters, {size['layers']} layers of {size['hidden_size']}"
            for name, size in study["sizes"].items()
        }
    )
    yield "<h3>Engines</h3>"
    yield _pairs({name: f"{engine['device']}: {engine['explain']}" for name, engine in study["engines"].items()})
    yield "<h3>Machine</h3>"
    yield _pairs(study["machine"])
    codes = [code for code in view.languages(study) if not study["languages"][code]["in_pretraining"]]
    unknown = ", ".join(view.language_name(study, code) for code in codes)
    if unknown:
        yield f"<p>Not in XLM-R's pretraining text: {html_text(unknown)}.</p>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{html_text(str(name))}</dt><dd>{html_text(_text(value))}</dd>" for name, value in values.items()
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "–" if value is None else str(value)
