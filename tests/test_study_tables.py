"""The study's tables: values are the document's, low-resource languages lead, every format keeps its columns."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
import study as builder
from hypothesis import given
from hypothesis import strategies as st

from xfast.study import contents, tables, view
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE, Study
from xfast.study.languages import LOW_RESOURCE
from xfast.study.profiles import GROUPS
from xfast.study.tables import Column, Table

STUDIES = {"full": builder.study(), "minimal": builder.minimal(), "wide": builder.wide(), "hostile": builder.hostile()}


@pytest.fixture(params=list(STUDIES))
def made(request: pytest.FixtureRequest) -> Study:
    return STUDIES[request.param]


def parsed(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(tables.to_csv(table))))


# --- values ---------------------------------------------------------------------------------------


def test_every_table_of_a_full_study() -> None:
    assert tuple(table.key for table in contents.tables(STUDIES["full"])) == contents.KEYS
    assert [table.key for table in contents.tables(STUDIES["minimal"])] == ["overview", "languages", "equivalence"]


def test_low_resource_languages_lead(made: Study) -> None:
    for table in contents.tables(made):
        if table.columns[0].key == "language":
            order = list(dict.fromkeys(table.column("language")))
            leading = [code for code in LOW_RESOURCE if code in order]
            assert order[: len(leading)] == leading
            classes = [made["languages"][str(code)]["joshi_class"] for code in order[len(leading) :]]
            assert classes == sorted(classes)


def test_overview_is_the_documents() -> None:
    found = STUDIES["full"]
    rows = {row["language"]: row for row in parsed(contents.overview(found))}
    assert len(rows) == len(builder.LANGUAGES)
    for cell in found["cells"]:
        if cell["kind"] == "throughput" and cell["size"] == "base":
            row = rows[cell["language"]]
            rate = cell["throughput"][BASELINE]["samples_per_s"]
            assert float(row[f"samples_per_s {cell['engine']}"]) == rate  # to the last bit
            assert row["fertility"] == ("" if cell["fertility"] is None else repr(cell["fertility"]))
            assert row["cc100_gb"] == repr(found["languages"][cell["language"]]["cc100_gb"])


def test_languages_join_throughput_latency_and_scores() -> None:
    found = STUDIES["full"]
    rows = {(row["size"], row["engine"], row["language"]): row for row in parsed(contents.languages(found))}
    assert len(rows) == 2 * 3 * len(builder.LANGUAGES)
    for cell in found["cells"]:
        row = rows[cell["size"], cell["engine"], cell["language"]]
        if cell["kind"] == "latency":
            assert float(row["p99_ms"]) == cell["latency"][BASELINE]["p99_ms"]
            continue
        rate, ratio = cell["throughput"][BASELINE], cell["ratios"][INTERMEDIATE]
        assert float(row["tokens_per_s"]) == rate["tokens_per_s"]
        ends = [float(row[f"tokens_per_s_{end}95"]) for end in ("low", "high")]
        assert ends == rate["tokens_per_s_interval"]
        assert float(row["ratio_intermediate"]) == ratio["ratio"]
        assert [float(row[f"ratio_intermediate_{end}95"]) for end in ("low", "high")] == ratio["interval95"]
        assert row["joules_per_sample"] == (
            "" if rate["joules_per_sample"] is None else repr(rate["joules_per_sample"])
        )
    for score in found["accuracy"]:
        assert float(rows[score["size"], score["engine"], score["language"]][f"score_{score['arm']}"]) == score["value"]


def test_latency_without_throughput_has_its_row() -> None:
    found = builder.study(languages=("sw",), sizes=("base",), engines=("native int8",))
    found["cells"] = [cell for cell in found["cells"] if cell["kind"] == "latency"]
    (row,) = parsed(contents.languages(found))
    assert row["samples_per_s"] == "" and float(row["p50_ms"]) == found["cells"][0]["latency"][BASELINE]["p50_ms"]
    assert row["policy"] == "single" and contents.overview(found).rows == []


def test_arms_have_every_ratio_of_every_cell() -> None:
    found = STUDIES["wide"]
    rows = parsed(contents.arms(found))
    assert len(rows) == sum(len(cell["ratios"]) for cell in found["cells"])
    expected = sorted(ratio["ratio"] for cell in found["cells"] for ratio in cell["ratios"].values())
    assert sorted(float(row["ratio"]) for row in rows) == expected


def test_control_leads_the_tests_of_equivalence() -> None:
    found = builder.study(control=1.04)
    rows = parsed(contents.equivalence(found))
    assert [rows[0][key] for key in ("arm", "verdict")] == [CONTROL, "different"] and rows[0]["pairs_needed"] == ""
    assert [row["scope"] for row in rows[1:5]] == ["all", "low-resource", "mid-resource", "high-resource"]
    assert float(rows[1]["ratio_low90"]) == found["equivalence"][0]["interval90"][0]
    assert float(rows[1]["ratio_high95"]) == found["equivalence"][0]["interval95"][1]
    also = {**found["equivalence"][2], "arm": CONTROL}
    found["equivalence"].insert(0, also)
    found["equivalence"].append(found["control"])
    order = contents.comparisons(found)
    assert order.count(found["control"]) == 1 and order[-1] == also  # parts of the control come last
    languages = [one["scope"] for one in order if one["scope"] in found["languages"]]
    assert languages == view.languages(found)


def test_predictions_of_several_tasks() -> None:
    found = builder.study(languages=("sw", "en"), engines=("native int8",), sizes=("base",))
    model = found["cost_models"][0]
    found["cost_models"] = [
        {**model, "task": "panx", "seen": {"sw": 2.0}, "predicted": {"sw": 1.0}},
        {**model, "task": "udpos", "seen": {"sw": 4.0}, "predicted": {"sw": 5.0}},
    ]
    rows = parsed(contents.predictions(found))
    assert [(row["language"], row["task"], row["error"]) for row in rows] == [
        ("sw", "panx", "-0.5"),
        ("sw", "udpos", "0.25"),
    ]


def test_accuracy_pairs_arms() -> None:
    found = builder.study(languages=("sw", "en"), engines=("native int8",), sizes=("base",))
    found["accuracy"] = [row for row in found["accuracy"] if (row["language"], row["arm"]) != ("en", BASELINE)]
    swahili, english = parsed(contents.accuracy(found))
    scores = {row["arm"]: row["value"] for row in found["accuracy"] if row["language"] == "sw"}
    assert float(swahili["difference_intermediate"]) == scores[INTERMEDIATE] - scores[BASELINE]
    assert english["score_baseline"] == "" and english["difference_intermediate"] == ""  # no partner, no difference


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (contents.pareto, "pareto"),
        (contents.scaling, "scaling"),
        (contents.probes, "probes"),
        (contents.memory, "memory"),
        (contents.skipped, "skipped"),
    ],
)
def test_plain_parts_keep_every_row(make: Any, part: str) -> None:
    found: Any = STUDIES["full"]
    table = make(found)
    keys = [column.key for column in table.columns if column.key != "name"]
    expected = [tuple(row[key] for key in keys) for row in found[part]]
    assert sorted(map(repr, expected)) == sorted(repr(tuple(row[key] for key in keys)) for row in table.rows)


def test_groups_come_low_resource_first() -> None:
    assert list(dict.fromkeys(contents.scaling(STUDIES["full"]).column("group"))) == [*GROUPS, "all"]


def test_predictions_and_explained_shares() -> None:
    rows = parsed(contents.predictions(STUDIES["full"]))
    assert all(float(row["error"]) == pytest.approx(0.02) for row in rows)
    assert parsed(contents.cost_models(STUDIES["full"]))[0]["explained fertility"] == "0.62"
    found = builder.study(languages=("sw",))
    found["cost_models"][0]["seen"]["sw"] = 0.0
    assert parsed(contents.predictions(found))[0]["error"] == ""


# --- what people read -----------------------------------------------------------------------------


def test_sheets_leave_out_what_no_row_has_and_name_what_all_share() -> None:
    sheet = tables.sheet(contents.languages(STUDIES["wide"]))
    assert not {"metric", "score, baseline", "windows", "size"} & set(sheet.head)
    assert "task" in sheet.head  # three of them
    assert sheet.legend[0] == "All rows: size base, order sorted, batch at most 16, texts 400."
    (one,) = tables.sheet(contents.languages(STUDIES["minimal"])).rows
    assert len(one) == len(tables.sheet(contents.languages(STUDIES["minimal"])).head) and one[0].text == "sw"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([11.88, 49.1, 279.19], ["11.9", "49.1", "279.2"]),
        ([0.0123, 0.5], ["0.012", "0.500"]),
        ([12_345.6, 98_765.4], ["12,346", "98,765"]),
        ([0.0, 150.0], ["0", "150"]),
        ([0.0], ["0.00"]),
        ([9.999, None], ["10.00", "–"]),
    ],
)
def test_figures_get_the_decimals_of_their_column(values: list[float | None], expected: list[str]) -> None:
    table = Table(
        "t", "t", [Column("name", "name"), Column("x", "x", "figure")], [{"name": "a", "x": x} for x in values]
    )
    assert [row[1].text for row in tables.sheet(table).rows] == expected


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("p", 0.0004, "<0.001"),
        ("p", 0.05, "0.050"),
        ("share", 0.354, "35.4"),
        ("ratio", 1.0004, "1.000"),
        ("bytes", 1_390_000_000, "1.39"),
        ("count", 278_043_648, "278,043,648"),
        ("count", 9999, "9999"),
        ("flag", True, "yes"),
        ("number", 0.0011, "0.0011"),
        ("score", 71.25, "71.2"),
        ("text", None, "–"),
    ],
)
def test_formats(kind: str, value: Any, expected: str) -> None:
    assert tables.shown(kind, value) == expected


def test_markdown_tables_keep_their_columns(made: Study) -> None:
    for table in contents.tables(made):
        text = tables.to_markdown(table)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == len(table.rows) + 2
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert "<script" not in text


# --- CSV and LaTeX --------------------------------------------------------------------------------


def test_csv_gives_back_every_value(made: Study) -> None:
    for table in contents.tables(made):
        rows = list(csv.reader(io.StringIO(tables.to_csv(table))))
        assert rows[0] == [column.key for column in table.columns] and len(set(rows[0])) == len(rows[0])
        for row, values in zip(rows[1:], table.rows, strict=True):
            for text, column in zip(row, table.columns, strict=True):
                value = values.get(column.key)
                if isinstance(value, bool) or value is None:
                    assert text == {True: "true", False: "false", None: ""}[value]
                else:
                    assert type(value)(text) == value


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30))
def test_csv_round_trip_of_any_name(name: str) -> None:
    table = Table("t", "t", [Column("name", "name"), Column("x", "x", "figure")], [{"name": name, "x": 0.1 + 0.2}])
    assert list(csv.reader(io.StringIO(tables.to_csv(table))))[1:] == [
        [name.replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd"), "0.30000000000000004"]
    ]


@given(st.text(max_size=40))
def test_latex_text_has_no_bare_special(text: str) -> None:
    set_text = tables.latex_text(text)
    without = re.sub(r"\\text[a-z]+\{\}|\\[&%$#_{}]|\$(?:\\times|\\mu|-)\$", "", set_text)
    assert not re.search(r"[\\&%$#_{}~^<>|\"]", without)
    set_text.encode()


def test_latex_tables_are_balanced(made: Study) -> None:
    for table in contents.tables(made):
        text = tables.to_latex(table)
        sheet = tables.sheet(table)
        for kind in ("table", "tabular", "longtable"):
            assert text.count(f"\\begin{{{kind}}}") == text.count(f"\\end{{{kind}}}")
        assert ("longtable" in text) == (len(table.rows) > 45)
        body = re.sub(r"\\[&{}%$#_]", "", text)
        assert body.count("{") == body.count("}")
        lines = [line for line in body.splitlines() if line.endswith("\\\\") and "&" in line]
        assert {line.count("&") for line in lines} == {len(sheet.head) - 1}
        assert not any(line.lstrip().startswith("[") for line in lines)
        assert text.isascii() or text.encode()


def test_hostile_names_are_set_as_text() -> None:
    text = tables.to_latex(contents.skipped(STUDIES["hostile"]))
    assert r"\textless{}script\textgreater{}alert(\textquotedbl{}x\textquotedbl{})" in text
    assert r"\$x\_1\$ \textbackslash{}end\{table\} \textbar{} \%" in text
    table = Table("t", "Really?", [Column("a", "a"), Column("b", "b")], [{"a": "[1]", "b": "*"}])
    assert "{[1]} & {*} \\\\" in tables.to_latex(table) and "\\caption{Really?}" in tables.to_latex(table)


# --- the view -------------------------------------------------------------------------------------


def test_setting_is_the_one_measured_most() -> None:
    chosen = view.setting(STUDIES["wide"])
    assert chosen is not None and chosen.task == "panx"
    found = builder.study(languages=("sw", "en", "yo"), tasks=("tatoeba", "panx"))
    found["cells"] = [cell for cell in found["cells"] if (cell["task"], cell["language"]) != ("panx", "sw")]
    first, other = view.setting(found), view.setting(found, "yo")
    assert first is not None and first.task == "tatoeba"  # as many as panx, and before it
    assert other is not None and other.task == "panx"
    assert view.setting(found, "none") is None
    found["cells"] = []
    assert view.setting(found) is None


def test_margin_is_the_same_factor_both_ways() -> None:
    for ends, beyond in (([1.021, 1.03], True), ([0.9, 0.98], True), ([0.97, 1.0], False), ([0.981, 0.99], False)):
        assert view.outside({**builder.equivalence("all", INTERMEDIATE, 1.0, 0.1), "interval95": ends}) is beyond
