"""The grid's report: values by hand and by brute force, hostile names, missing runs, every rendering."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from xfast.errors import BackendUnavailableError, DataFileError, InvalidOptionError
from xfast.stilts import report
from xfast.stilts.report import Cell, GridSummary, Mean, as_dict, load_cells, print_tables, summarize, write_report
from xfast.stilts.tasks import INTERMEDIATE_TASKS, XTREME_TARGETS
from xfast.study.profiles import JOSHI_CLASS

HOSTILE = '<script>alert("x")</script>|$\\frac[red]*語&amp;'
PNG = b"\x89PNG\r\n\x1a\n"


def done(row: str, target: str, seed: int, score: float, split: str = "dev", **languages: float) -> Cell:
    return Cell(row, target, seed, split, "done", score, languages)


def failed(row: str, target: str, seed: int, error: str = "out of memory") -> Cell:
    return Cell(row, target, seed, "dev", "failed", error=error)


def tiny() -> list[Cell]:
    """Three rows by three columns with everything that goes wrong: one row of seeds per line."""
    return [
        *(done("none", "xnli", seed, score) for seed, score in enumerate((78.0, 79.0, 77.0))),
        *(done("none", "panx", seed, score) for seed, score in enumerate((60.0, 61.0))),
        done("none", "tydiqa", 0, 50.0),
        *(done("mnli", "xnli", seed, score) for seed, score in enumerate((78.5, 80.0, 77.0))),
        *(done("mnli", "panx", seed, score) for seed, score in enumerate((59.0, 61.0, 62.0))),
        done("mnli", "tydiqa", 0, 56.0),
        *(done("squad_v1", "xnli", 0, 77.0), failed("squad_v1", "xnli", 1), done("squad_v1", "xnli", 2, 77.5)),
        failed("squad_v1", "panx", 0, f"Traceback:\n  {HOSTILE}"),
        done("squad_v1", "tydiqa", 0, 60.0),
        done("hellaswag", "xnli", 0, 79.0),
        done("hellaswag", "tydiqa", 3, 55.0),
    ]


def rows_of(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    names = ("intermediate", "target", "seed", "split", "status", "score", "languages", "error")
    return [{name: getattr(cell, name) for name in names} for cell in cells]


def save(path: Path, cells: Iterable[Cell]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(cells)), encoding="utf-8")
    return path


def printed(summary: GridSummary, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_tables(summary, console)
    return console.file.getvalue()


# --- summary --------------------------------------------------------------------------------------


def test_differences_by_hand() -> None:
    summary = summarize(tiny())
    assert summary.targets == ("xnli", "panx", "tydiqa")
    assert summary.intermediates == ("mnli", "squad_v1", "hellaswag")
    expected = {
        ("mnli", "xnli"): (3, 0.5, 0.5),
        ("mnli", "panx"): (2, -0.5, 0.5**0.5),
        ("mnli", "tydiqa"): (1, 6.0, None),
        ("squad_v1", "xnli"): (2, -0.25, 1.5 / 2**0.5),
        ("squad_v1", "tydiqa"): (1, 10.0, None),
        ("hellaswag", "xnli"): (1, 1.0, None),
    }
    entries = [entry for row in summary.entries.values() for entry in row.values()]
    found = {(entry.intermediate, entry.target): entry.delta for entry in entries if entry.delta}
    assert found.keys() == expected.keys()
    for key, delta in found.items():
        assert (delta.n, delta.mean, delta.deviation) == pytest.approx(expected[key])
    score = summary.entries["mnli"]["panx"].score
    assert score is not None and (score.n, score.mean) == (3, pytest.approx(182 / 3))


def test_what_is_left_out_is_named() -> None:
    summary = summarize(tiny())
    assert summary.entries["mnli"]["panx"].unpaired == (2,)  # no baseline of that seed
    assert summary.entries["squad_v1"]["xnli"].unpaired == (1,)  # a baseline, but this run failed
    assert summary.entries["squad_v1"]["xnli"].failed == (1,)
    assert summary.entries["hellaswag"]["tydiqa"].unpaired == (0, 3)
    assert summary.entries["squad_v1"]["panx"].unpaired == ()
    assert [f"{cell.intermediate} {cell.target}" for cell in summary.unfinished] == ["squad_v1 xnli", "squad_v1 panx"]
    notes = "\n".join(as_dict(summary)["notes"])
    assert "MNLI on PANX (seed 2)" in notes and "HellaSwag on TyDiQA-GoldP (seed 0, 3)" in notes
    assert "SQuAD v1.1: average over 2 of 3 targets, without PANX;" in notes


def test_averages_and_best_by_hand() -> None:
    summary = summarize(tiny())
    assert [(mean.n, mean.of) for mean in summary.averages.values()] == [(3, 3), (2, 3), (1, 3)]
    assert [mean.mean for mean in summary.averages.values()] == pytest.approx([2.0, 4.875, 1.0])
    assert summary.baseline_average == Mean(pytest.approx((78 + 60.5 + 50) / 3), 3, 3)
    assert [best.intermediate for best in summary.best.values()] == ["hellaswag", "mnli", "squad_v1"]
    assert summary.best_average == Mean(pytest.approx((1 - 0.5 + 10) / 3), 3, 3)
    assert summary.best_test_average is None


def test_languages_and_groups_by_hand() -> None:
    cells = [
        done("none", "xnli", 0, 50.0, en=80.0, sw=20.0),
        done("none", "panx", 0, 40.0, sw=30.0, xx=50.0),
        done("mnli", "xnli", 0, 52.0, en=81.0, sw=23.0),
        done("mnli", "panx", 0, 40.0, sw=31.0, xx=49.0),
        done("qqp", "xnli", 0, 49.0, en=80.0, sw=18.0),
    ]
    summary = summarize(cells)
    assert summary.languages["mnli"] == {"en": Mean(1.0, 1, 1), "sw": Mean(2.0, 2, 2), "xx": Mean(-1.0, 1, 1)}
    assert summary.languages["qqp"] == {"en": Mean(0.0, 1, 1), "sw": Mean(-2.0, 1, 2)}
    means = {"low-resource": Mean(2.0, 2, 2), "high-resource": Mean(1.0, 1, 1), "unclassified": Mean(-1.0, 1, 1)}
    assert summary.groups["mnli"] == means
    assert summary.groups["qqp"]["low-resource"] == Mean(-2.0, 1, 2)  # of two pairs that MNLI has: marked
    assert "-2.0†" in printed(summary, 100)


@pytest.mark.parametrize(("language", "group"), [("my", 0), ("sw", 0), ("ta", 1), ("fi", 2), ("en", 2)])
def test_groups_are_those_of_the_profiles(language: str, group: int) -> None:
    assert JOSHI_CLASS[language] in ((0, 1, 2), (3,), (4, 5))[group]
    cells = [done(row, "panx", 0, 1.0, **{language: 1.0}) for row in ("none", "mnli")]
    assert list(summarize(cells).groups["mnli"]) == [("low-resource", "mid-resource", "high-resource")[group]]


def test_scores_over_other_languages_are_not_compared() -> None:
    cells = [
        *(done("none", "xnli", seed, 50.0, en=60.0, sw=40.0) for seed in (0, 1)),
        done("mnli", "xnli", 0, 60.0, en=60.0),
        done("mnli", "xnli", 1, 51.0, en=61.0, sw=41.0),
    ]
    entry = summarize(cells).entries["mnli"]["xnli"]
    assert entry.mismatched == (0,)
    assert entry.delta == report.Spread(1, 1.0, None)
    assert "other languages than the baseline: MNLI on XNLI (seed 0)" in "\n".join(as_dict(summarize(cells))["notes"])


def test_splits_are_never_mixed() -> None:
    cells = [
        *(done("none", "xnli", 0, 70.0, split) for split in ("dev", "test")),
        *(done("mnli", "xnli", 0, score, split) for score, split in ((75.0, "dev"), (71.0, "test"))),
        *(done("qqp", "xnli", 0, score, split) for score, split in ((72.0, "dev"), (79.0, "test"))),
        *(done(row, "xquad", 0, score, "test") for row, score in (("none", 60.0), ("mnli", 63.0))),
    ]
    dev, test = summarize(cells), summarize(cells, split="test")
    assert dev.splits == {"xnli": "dev", "xquad": "test"}
    best = dev.best["xnli"]
    assert best.intermediate == "mnli" and best.delta.mean == 5.0
    assert best.test == report.Spread(1, 1.0, None)  # of the row picked on dev, not the largest on test
    assert dev.best_test_average == Mean(1.0, 1, 2)
    assert dev.best["xquad"].test is None
    assert dev.hidden == 3
    assert test.best["xnli"].intermediate == "qqp" and test.best["xnli"].test is None
    assert "XQuAD (test)" in json.dumps(report.report_html.sheets(as_dict(dev))[0].head)


@pytest.mark.parametrize("trial", range(25))
def test_summary_agrees_with_brute_force(trial: int) -> None:
    rng = np.random.default_rng(trial)
    rows = ["none", *rng.choice([*INTERMEDIATE_TASKS, "all", "other"], size=rng.integers(1, 6), replace=False)]
    targets = [str(name) for name in rng.choice(XTREME_TARGETS, size=rng.integers(1, 6), replace=False)]
    cells = [
        done(str(row), target, seed, float(rng.uniform(0, 100))) if rng.random() < 0.8 else failed(row, target, seed)
        for row in rows
        for target in targets
        for seed in range(rng.integers(0, 5))
        if rng.random() < 0.9
    ]
    rng.shuffle(cells)
    summary = summarize(cells)
    scores = {(cell.intermediate, cell.target, cell.seed): cell.score for cell in cells if cell.status == "done"}
    means: dict[tuple[str, str], float] = {}
    for row in summary.intermediates:
        for target in summary.targets:
            values = [
                scores[row, target, seed] - scores["none", target, seed]
                for seed in range(5)
                if (row, target, seed) in scores and ("none", target, seed) in scores
            ]
            delta = summary.entries[row][target].delta
            assert (delta is None) == (not values)
            if delta is not None:
                means[row, target] = delta.mean
                assert (delta.n, delta.mean) == (len(values), pytest.approx(float(np.mean(values)), abs=1e-9))
                assert delta.deviation == (pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None)
        mine = [means[row, target] for target in summary.targets if (row, target) in means]
        average = Mean(pytest.approx(np.mean(mine)), len(mine), len(summary.targets)) if mine else None
        assert summary.averages.get(row) == average
    for target in summary.targets:
        column = [means[row, target] for row in summary.intermediates if (row, target) in means]
        assert (target in summary.best) == bool(column)
        if column:
            assert summary.best[target].delta.mean == max(column)
    assert len(summary.unfinished) == sum(cell.status == "failed" for cell in cells)
    backwards = summarize(reversed(cells))
    assert replace(backwards, unfinished=summary.unfinished) == summary
    printed(summary, 80)


def test_rows_and_columns_have_the_papers_order() -> None:
    rows, targets = ("all", "mix", "mnli", "none"), ("new", "tatoeba", "xnli")
    summary = summarize(done(row, target, 0, 1.0) for target in targets for row in rows)
    assert summary.targets == ("xnli", "tatoeba", "new")
    assert summary.intermediates == ("mnli", "mix", "all")


# --- reading --------------------------------------------------------------------------------------


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    rows = rows_of(tiny())
    texts = {
        "lines": "\r\n\r\n".join(map(json.dumps, rows)),
        "bom": "\ufeff" + "\n".join(map(json.dumps, rows)),
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(text.encode())
        assert load_cells(path) == tiny()


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    cells = [done("mnli", "xnli", 0, 1.0), done("none", "xnli", 0, 1.0), failed("mnli", "xnli", 0)]
    cells += [done("mnli", "xnli", 0, 3.0), done("mnli", "xnli", 0, 9.0, "test")]
    loaded = load_cells(save(tmp_path / "cells.jsonl", cells))
    assert [(cell.score, cell.replaced) for cell in loaded] == [(3.0, 2), (1.0, 0), (9.0, 0)]
    assert summarize(loaded).duplicates == summarize(cells).duplicates == 2
    assert "replaced by later ones of the same run: 2" in "\n".join(as_dict(summarize(cells))["notes"])


GOOD = {"intermediate": "mnli", "target": "xnli", "seed": 0, "status": "done", "split": "dev", "score": 50}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate": None}, "intermediate must be a printable, non-empty name"),
        ({"target": " "}, "target must be"),
        ({"target": "a\x1b[31m"}, "target must be"),
        ({"seed": True}, "seed must be an integer"),
        ({"seed": "0"}, "seed must be an integer"),
        ({"status": "finished"}, "status must be one of done, failed, unscored, got"),
        ({"split": ["dev"]}, "split must be one of dev, test"),
        ({"score": None}, "score must be a number in"),
        ({"score": float("nan")}, "score must be a number in"),
        ({"score": 100.5}, "score must be a number in"),
        ({"score": True}, "score must be a number in"),
        ({"languages": [1]}, "languages must be an object"),
        ({"languages": {"sw": "65"}}, "languages: 'sw' must be a number"),
        ({"languages": {"sw": 10**400}}, "languages: 'sw' must be a number"),
        ({"error": 3}, "error must be a string or null"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "cells.json"
    rows = [json.dumps({**GOOD, "seed": 7}), json.dumps({**GOOD, **change})]
    path.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataFileError, match=re.escape(f"{path}:2: ") + f".*{re.escape(message)}") as raised:
        load_cells(path)
    assert len(str(raised.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"intermediate": "mn', ":1: not JSON"),
        ("[3]", ":1: expected a JSON object, got list"),
        ("\n\n3", ":3: expected a JSON object, got int"),
        ("[" + "[" * 100_000, ":1: not JSON"),
        ("[" + "1" * 5000 + "]", ":1: not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataFileError, match=re.escape(f"{path}{message}")):
        load_cells(path)


def test_missing_files_and_options(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"(?i)no such file"):
        load_cells(tmp_path / "none.jsonl")
    with pytest.raises(DataFileError, match=r"(?i)folder|directory"):
        load_cells(tmp_path)
    with pytest.raises(InvalidOptionError, match="split: 'train' is not accepted; accepted: dev, test"):
        summarize([], split="train")
    with pytest.raises(DataFileError, match="mnli on xnli, seed 0: done, but has no score"):
        summarize([Cell("mnli", "xnli", 0, "dev", "done")])


# --- renderings -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags close in order, and keeps tables by id as rows of (tag, attributes, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[list[Any]]]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(str(dict(attrs)["id"]), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append([tag, dict(attrs), ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1][2] += data


def hostile() -> list[Cell]:
    renamed = [Cell(**{**vars(cell), "target": HOSTILE}) if cell.target == "panx" else cell for cell in tiny()]
    return [*renamed, done(HOSTILE, "xnli", 0, 70.0, sw=1.0), failed(HOSTILE, HOSTILE, 1, f"{HOSTILE}\n@all")]


def test_page_escapes_and_has_every_cell() -> None:
    summary = summarize(hostile())
    text = report.report_html.page(as_dict(summary), b"")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags} and HOSTILE in page.text
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(", text)
    table = page.tables["differences"]
    assert [cell[2] for cell in table[0]][1:4] == ["XNLI", "TyDiQA", HOSTILE]
    assert len(table) == 2 + 4  # heads, baseline, four rows
    assert {len(row) for row in table} == {1 + 3 + 2}  # name, targets, average, published
    assert [row[0][2] for row in table[2:]] == ["MNLI", "SQuAD v1.1", "HellaSwag", HOSTILE]
    for sheet in page.tables.values():
        assert all(cell[1].get("scope") == "col" for cell in sheet[0])
        assert all(row[0][:2] == ["th", {"scope": "row"}] for row in sheet[1:])
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert "4 intermediate tasks by 3 targets" in str(image["alt"])
    squad = [cell[2] for cell in table[3]]
    assert squad == ["SQuAD v1.1", "-0.2±1.1 n=2", "+10.0*n=1", "–failed", "+4.9†2 of 3", "+8.2?"]


def test_heat_map_is_a_png() -> None:
    for cells in (tiny(), hostile(), [], tiny()[6:]):
        content = report.report_html.picture(as_dict(summarize(cells)))
        assert content.startswith(PNG)
        width, height = struct.unpack(">II", content[16:24])
        assert 300 < width < 3000 and 150 < height < 3000


@pytest.mark.parametrize("width", [20, 80, 120])
def test_terminal(width: int) -> None:
    for cells in (tiny(), hostile(), tiny()[6:], []):
        text = printed(summarize(cells), width)
        assert max(map(len, text.splitlines())) <= width or width < 80
    text = printed(summarize(tiny()), width)
    if width >= 80:
        assert re.search(r"MNLI +\+0\.5 +-0\.5\* +\+6\.0 +\+2\.0 +\+7\.5\n +±0\.5 +±0\.7 n=2 +n=1 +3 of 3", text)
        assert "baseline (score)" in text and "+8.2?" in text and "+5.4" in text
        assert "failed: SQuAD v1.1 on XNLI, dev, seed 1: out of memory" in text


def test_whole_grid_fits_120_columns_in_one_part() -> None:
    cells = [
        done(row, target, seed, 50.0 + len(row) * (seed + 1), en=50.0)
        for row in ("none", *INTERMEDIATE_TASKS, "all")
        for target in XTREME_TARGETS
        for seed in range(3)
    ]
    text = printed(summarize(cells), 120)
    assert "continued" not in text and "…" not in text
    assert "not the nine XTREME targets" not in text
    assert "continued" in printed(summarize(cells), 80)


def test_styles_only_bold_the_best() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    print_tables(summarize(tiny()), console)
    assert re.search(r"\x1b\[1m *\+10\.0\*", console.file.getvalue())


def test_without_a_baseline(tmp_path: Path) -> None:
    document = write_report(save(tmp_path / "cells.jsonl", tiny()[6:]), tmp_path / "out")
    assert document["notes"][0] == "No finished baseline: no differences."
    assert document["best"] == {} and document["averages"] == {} and document["best_average"] is None
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "differences" not in page.tables
    assert [cell[2] for cell in page.tables["scores"][1]] == ["MNLI", "78.5±1.5", "60.7±1.5", "56.0n=1"]
    text = printed(summarize(tiny()[6:]), 80)
    assert "No finished baseline" in text and "78.5" in text


def test_empty_file(tmp_path: Path) -> None:
    for text in ("", "\n \n"):
        (tmp_path / "cells.jsonl").write_text(text, encoding="utf-8")
        assert load_cells(tmp_path / "cells.jsonl") == []
    assert write_report(tmp_path / "cells.jsonl", tmp_path)["notes"] == ["The grid has no cells."]
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).tables == {}


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    write_report(save(tmp_path / "cells.jsonl", hostile()), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| MNLI | +0.5 ±0.5 | +6.0 n=1 | -0.5\\* ±0.7 n=2 | +2.0 3 of 3 | +7.5 |" in text


def test_report_survives_a_second_run(tmp_path: Path) -> None:
    cells, out = save(tmp_path / "cells.jsonl", tiny()), tmp_path / "deep" / "out"
    document = write_report(str(cells), str(out))
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == {"report.json", "report.html", "report.md", "heatmap.png"}
    assert json.loads(first["report.json"]) == document
    write_report(cells, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert write_report(save(cells, tiny()[:-1]), out) != document


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = save(tmp_path / "cells.jsonl", tiny())
    with pytest.raises(InvalidOptionError, match=r"out_dir: cannot write .*cells\.jsonl"):
        write_report(cells, cells)
    folder = tmp_path / "out" / "report.md"
    folder.mkdir(parents=True)  # in the way of a file of that name
    with pytest.raises(InvalidOptionError, match=r"out_dir: cannot write .*report\.md"):
        write_report(cells, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match="pip install matplotlib"):
        write_report(cells, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- published figures ----------------------------------------------------------------------------


def test_published_figures_are_the_sources() -> None:
    published = report.PUBLISHED
    gains = {"squad_v1": 8.2, "squad_v2": 8.2, "mnli": 7.5, "hellaswag": 7.0, "all": 8.7}
    assert published["averages"]["gains"] == gains
    assert published["best_per_target"]["gain"] == 5.4
    assert list(published["test"]["scores"]) == list(XTREME_TARGETS[:7])  # BUCC and Tatoeba are not in that table
    pairs = [pair for scores in published["test"]["scores"].values() for pair in scores.values()]
    assert [round(new - old, 1) for old, new in pairs] == [0.8, 1.5, 1.1, -1.4, 2.5, 2.1, 0.5, 0.8, 14.5, 10.9]


def test_published_figures_are_beside_ours() -> None:
    text = printed(summarize(tiny()), 120)
    assert re.search(
        r"TyDiQA +SQuAD v1\.1 +\+10\.0 +– +exact match / F1 45\.0 / 65\.1 59\.5 / 76\.0 \+14\.5 / \+10\.9", text
    )
    assert "Whether SQuAD +8.2 is of v1.1 or of v2.0 is not settled" in text
    assert "The targets are not the nine XTREME targets" in text
    plain = printed(summarize([done("none", "xnli", 0, 1.0), done("qqp", "xnli", 0, 2.0)]), 120)
    assert "published" not in plain.split("\n")[1]
