"""What a grid's report says of figures that stand for less than the published ones beside them."""

from __future__ import annotations

from dataclasses import replace

from xfast.stilts.report import Cell, as_dict, summarize
from xfast.stilts.report_html import markdown
from xfast.stilts.tasks import XTREME_TARGETS

PART = "1 of 15 languages"


def done(row: str, split: str, score: float, target: str = "xnli") -> Cell:
    return Cell(row, target, 0, split, "done", score, {"sw": score})


def test_gains_on_test_say_what_they_cover() -> None:
    """The table shows dev, whose scores are whole; the gain on test beside them is over fewer languages."""
    dev = [done("none", "dev", 70.0), done("mnli", "dev", 72.0)]
    test = [replace(done(row, "test", score), partial=PART) for row, score in (("none", 60.0), ("mnli", 66.0))]
    assert summarize(dev + test).partial == {"xnli": f"gain on test: {PART}"}
    assert f"XNLI: gain on test: {PART}; official figures are over all." in markdown(as_dict(summarize(dev + test)))
    assert summarize(dev + test, "test").partial == {"xnli": PART}  # then it is the scores themselves
    both = [replace(dev[0], partial="2 of 15 languages"), dev[1], *test]
    assert summarize(both).partial == {"xnli": f"2 of 15 languages; gain on test: {PART}"}
    assert summarize([dev[0], *test]).partial == {}  # no row after a task on dev: no gain on test is shown


def test_all_together_is_beside_the_published_figure_only_if_it_is_of_all() -> None:
    cells = [done(row, "dev", 50.0, target) for row in ("none", "all") for target in XTREME_TARGETS]
    assert "+8.7" in _row(cells)
    fewer = [replace(cell, together=("mnli", "qqp")) if cell.intermediate == "all" else cell for cell in cells]
    assert "+8.7" not in _row(fewer)
    assert "All together: MNLI, QQP; the published figure, of all nine tasks, is not" in markdown(
        as_dict(summarize(fewer))
    )
    assert "+8.7" in _row(cells)  # what is published stays as it is


def _row(cells: list[Cell]) -> str:
    (line, *_) = [
        line for line in markdown(as_dict(summarize(cells))).splitlines() if line.startswith("| all together")
    ]
    return line
