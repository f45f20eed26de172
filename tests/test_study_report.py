"""The study's report: sentences follow from the figures, the page is sound, offline and usable, files are whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as browsers
import pytest
import study as builder

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.study import contents, report, report_html, view
from xfast.study.answer import answer
from xfast.study.document import BASELINE, INTERMEDIATE, Study, load
from xfast.study.plots import Absent, Plot

VOID = {"meta", "img", "input", "br"}
SMALL: dict[str, Any] = {"languages": ("sw", "yo", "en", "fi"), "sizes": ("base",)}


def page_of(study: Study) -> str:
    """The page without figures, which take seconds."""
    return report_html.page(
        study, answer(study), contents.tables(study), [Absent("heat-map", "Speed", "left out here")]
    )


class Page(HTMLParser):
    """Checks that tags close in order, and keeps them; text by the tag it lies in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("script", "style"))


def check_page(text: str) -> Page:
    """What every page must be."""
    page = Page(text)
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-labelledby"]
        assert tag != "img" or attributes["alt"]
        assert not any(name.startswith("on") for name in attributes)
        link = attributes.get("href") or attributes.get("src") or "#"
        assert link == "#" or (link[0] == "#" and link[1:] in ids) or re.fullmatch(r"tables/[a-z_]+\.\w+", link)
    outside = re.sub(r"<desc.*?</desc>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|@import|url\((?!#)", outside)
    assert [tag for tag, _ in page.tags].count("h1") == 1
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return report.write(builder.study(**SMALL, tasks=("panx", "udpos")), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return report.write(builder.hostile(), tmp_path_factory.mktemp("hostile"))


# --- sentences ------------------------------------------------------------------------------------


def said(study: Study) -> str:
    found = answer(study)
    lines = [
        *(" ".join(pair) for pair in (*found.warnings, *found.cautions)),
        *found.lead,
        *(": ".join(pair) for pair in found.languages),
    ]
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def test_sentences_follow_from_the_figures() -> None:
    study = builder.study(**SMALL)
    cells = {(cell["engine"], cell["language"]): cell for cell in study["cells"] if cell["kind"] == "throughput"}
    fast, stock = (view.rate(cells[engine, "sw"])["samples_per_s"] for engine in ("native int8", "stock fp32"))
    (test,) = view.tests_of(study, "sw")
    low, high = (f"{100 * (end - 1):+.1f}" for end in test["interval90"])
    text = said(study)
    assert f"Swahili: {fast:.3g} samples/s with native int8, {fast / stock:.1f}× stock fp32;" in text
    change = f"intermediate training changes the cost by {100 * (test['ratio'] - 1):+.1f} % [{low}, {high}]"
    assert f"{change}: equivalent within 2 %." in text
    assert "Intermediate training changes the time of inference by -0.1 % [-0.5, +0.3]: equivalent within 2 %." in text
    assert "Fertility explains 62 % of the variance of speed between 4 languages, padding 11 %." in text
    assert "Not measured: xxl (needs 43 GB of memory, 31 GB are there)." in text
    gains = [
        one["value"] - two["value"]
        for one in study["accuracy"]
        for two in study["accuracy"]
        if (one["arm"], two["arm"]) == (INTERMEDIATE, BASELINE)
        and one["engine"] == two["engine"] == "stock fp32"
        and one["language"] == two["language"]
    ]
    assert len(gains) == 4
    assert f"accuracy by {sum(gains) / 4:+.1f} points (give or take " in text
    assert ", by the number of examples) over 1 task and 4 languages" in text
    assert [name for name, _ in answer(study).languages] == ["Swahili", "Yoruba"]
    assert answer(study).warnings == answer(study).cautions == []


def test_low_resource_gains_are_those_of_the_studys_own_group() -> None:
    """Quechua is of Joshi class 1, and none of XTREME's languages; Estonian's class is 3."""
    study = builder.study(
        languages=("sw", "qu", "et"), engines=("native int8",), tasks=("xcopa",), labels=True, probes=False
    )
    gains = {"sw": 6.0, "qu": -12.0, "et": 3.0}
    for row in study["accuracy"]:
        row["value"] = 60.0 + gains[row["language"]] * (row["arm"] == INTERMEDIATE)
    assert "accuracy by -1.0 points" in said(study)
    assert "over 1 task and 3 languages, -3.0 in the low-resource ones" in said(study)


def test_failing_control_forbids_conclusions() -> None:
    text = said(builder.study(**SMALL, control=1.04))
    assert text.startswith("The control failed: the noise is too high.") and "+4.0 %" in text.splitlines()[0]
    assert text.count("not to be judged, since the control failed") == 1 and "equivalent within" not in text
    page = check_page(page_of(builder.study(**SMALL, control=1.04)))
    assert any(attributes.get("class") == "warning" for _, attributes in page.tags)


def test_control_that_was_not_measured() -> None:
    study = builder.study(**SMALL)
    study["control"] |= {"pairs": 0, "verdict": "undecided"}  # type: ignore[typeddict-item]
    assert said(study).startswith("There is no control:") and "The control failed" not in said(study)


def test_seeded_weights_claim_no_accuracy() -> None:
    text = said(builder.study(**SMALL, labels=False))
    assert "The weights are seeded" in text and "nothing is claimed about accuracy" in text
    assert "changes accuracy" not in text
    half = builder.study(**SMALL)
    half["arms"][INTERMEDIATE]["source"] = "seeded"
    assert "That is so for intermediate." in said(half) and "changes accuracy" not in said(half)


@pytest.mark.parametrize(
    ("middle", "half", "expected"),
    [
        (1.05, 0.01, "+5.0 % [+4.0, +6.1]: different, by more than 2 %."),
        (1.02, 0.005, "+2.0 % [+1.5, +2.5]: different, whether by 2 % is open."),
        (1.01, 0.02, "+1.0 % [-1.0, +3.0]: undecided at 2 % (128 cells, about 310 are needed)."),
        (0.999, 0.001, "-0.1 % [-0.2, -0.0]: equivalent within 2 %."),
    ],
)
def test_verdicts(middle: float, half: float, expected: str) -> None:
    study = builder.study(**SMALL)
    study["equivalence"] = [builder.equivalence("all", INTERMEDIATE, middle, half)]
    assert f"Intermediate training changes the time of inference by {expected}".replace("-0.0]", "+0.0]") in said(study)


def test_verdict_of_one_language() -> None:
    study = builder.study(**SMALL)
    study["equivalence"] = [
        builder.equivalence("sw", INTERMEDIATE, 1.05, 0.1),
        builder.equivalence("yo", INTERMEDIATE, 1.05, 0.001),
        {**builder.equivalence("yo", "control", 1.5, 0.001)},
        {**builder.equivalence("all", INTERMEDIATE, 1.0, 0.001), "pairs": 0},
    ]
    assert "different, but as much as the baseline's two copies there" in said(study)
    study["equivalence"][2] = builder.equivalence("yo", "control", 1.02, 0.001)
    text = said(study)
    assert "[-5.0, +16.0]: undecided at 2 %." in text and "[+4.9, +5.1]: different, by more than 2 %." in text
    assert "+50" not in text  # a part of the control says nothing about training
    assert "nothing is said about intermediate training" in text  # what has no pair is no test


def test_little_to_say() -> None:
    text = said(builder.minimal())
    assert "nothing is said about intermediate training" in text and "×" not in text and "slowest" not in text
    empty = builder.study(languages=("en",), labels=False, probes=False)
    empty["cells"] = []
    empty["skipped"] = [{"what": f"size {at}", "why": "time"} for at in range(9)]
    assert "No throughput was measured." in said(empty) and "English: no throughput was measured." in said(empty)
    assert "9 parts were not measured" in said(empty)


def test_language_measured_elsewhere_says_where() -> None:
    study = builder.study(**SMALL, tasks=("tatoeba", "panx"))
    study["cells"] = [c for c in study["cells"] if c["task"] == "tatoeba" or c["language"] in ("yo", "en")]
    assert re.search(r"Yoruba: .* \(base, panx, sorted order, batches of 16\)\.", said(study))
    assert not re.search(r"Swahili: .*\(base", said(study))


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_figures_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    study = builder.study(**SMALL)
    assert study["cells"][3]["kind"] == "latency"
    study["cells"][3]["latency"][BASELINE]["p50_ms"] = bad
    with pytest.raises(InvalidInputError, match=r"study: cells\[3\]\.latency\.baseline\.p50_ms: -?(nan|inf) given"):
        report.write(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rates_of_nothing_are_refused() -> None:
    study = builder.study(**SMALL)
    study["cells"][0]["throughput"][INTERMEDIATE]["samples_per_s"] = 0.0
    with pytest.raises(InvalidInputError, match=r"cells\[0\]\.throughput\.intermediate\.samples_per_s: 0\.0 given"):
        view.check(study)


@pytest.mark.parametrize(
    ("part", "field", "message"),
    [
        ("cells", "language", r"cells\[0\]: language: 'xx' given; accepted: sw, yo, fi, en"),
        ("cells", "engine", r"cells\[0\]: engine: 'xx' given; accepted: stock fp32, "),
        ("accuracy", "arm", r"accuracy\[0\]: arm: 'xx' given; accepted: baseline, intermediate, control"),
        ("memory", "size", r"memory\[0\]: size: 'xx' given; accepted: base"),
    ],
)
def test_names_that_are_not_defined_are_refused(part: str, field: str, message: str) -> None:
    study: Any = builder.study(**SMALL)
    study[part][0][field] = "xx"
    with pytest.raises(InvalidInputError, match=message):
        view.check(study)


# --- the page -------------------------------------------------------------------------------------


def test_page_is_sound(written: dict[str, Path]) -> None:
    page = check_page(written["index.html"].read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 11 and tags.count("table") == len(contents.KEYS)
    for tag, attributes in page.tags:
        assert tag != "th" or attributes["scope"] in ("col", "row")
    text = page.text()
    assert text.index("Intermediate training changes the time") < text.index("Speed by language and engine")
    assert "Speed against model size: one model size was measured" in text
    assert "avx512_bf16" in text and "Batches are formed inside one language." in text
    assert "Not in XLM-R's pretraining text: Yoruba." in text


@pytest.mark.parametrize("make", [builder.minimal, builder.wide, lambda: builder.study(**SMALL, probes=False)])
def test_other_pages_are_sound(make: Any) -> None:
    page = check_page(page_of(make()))
    assert "Speed: left out here." in page.text()


def test_tables_of_the_page_are_cut_and_say_so() -> None:
    study = builder.study(languages=("sw", "en"), sizes=("base",), probes=False)
    study["memory"] *= 500
    text = page_of(study)
    assert "The first 1000 of 1500 rows; the files have all." in text
    assert text.count("<tr>") < 1200


def test_hostile_names_are_text(hostile: dict[str, Path]) -> None:
    text = hostile["index.html"].read_text(encoding="utf-8")
    page = check_page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text().count(builder.HOSTILE) > 8  # as it was given, in sentences, tables and figures
    assert any(tag == "h1" and data == f"{builder.HOSTILE}\ufffd\ufffd" for tag, data in page.texts)
    assert all(re.fullmatch(r"[a-z0-9/_.-]+", name, re.IGNORECASE) for name in hostile)
    assert load(hostile["study.json"]) == builder.hostile()


# --- files ----------------------------------------------------------------------------------------


def test_files(written: dict[str, Path]) -> None:
    folder = written["index.html"].parent
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(written)
    assert load(written["study.json"]) == builder.study(**SMALL, tasks=("panx", "udpos"))
    assert {f"tables/{key}.{end}" for key in contents.KEYS for end in ("csv", "md", "tex")} <= set(written)
    pictures = [name for name in written if name.endswith(".png")]
    assert len(pictures) == 11
    assert all(written[name].read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_second_report_replaces_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = Plot("scaling", "t", "c.", '<svg viewBox="0 0 9 9"></svg>', b"png")
    monkeypatch.setattr(report, "plots", lambda study: [plot])
    report.write(builder.study(**SMALL), tmp_path)
    (tmp_path / "figures" / "probe-layer.png").write_bytes(b"of an earlier report")
    for name in ("tables/notes.md", "figures/mine.png"):
        (tmp_path / name).write_text("kept")
    monkeypatch.setattr(report, "plots", lambda study: [Absent("scaling", "t", "one size")])
    written = report.write(builder.minimal(), tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*written, "tables/notes.md", "figures/mine.png"}
    before = {name: path.read_bytes() for name, path in written.items()}
    assert {name: path.read_bytes() for name, path in report.write(builder.minimal(), tmp_path).items()} == before


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plots", lambda study: [])
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOptionError, match=r"folder: cannot write .*file"):
        report.write(builder.minimal(), tmp_path / "file")
    (tmp_path / "out" / "index.html").mkdir(parents=True)  # in the way of the page
    with pytest.raises(InvalidOptionError, match=r"folder: cannot write .*index\.html"):
        report.write(builder.minimal(), tmp_path / "out")
    assert not list(tmp_path.rglob(".*"))


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    if browsers.CHROMIUM is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with browsers.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


HEAD = "document.querySelector('#overview th:nth-child(%d)')"
COLUMN = "[...document.querySelectorAll('#overview tbody tr')].map(row => row.cells[%d].textContent)"


def test_page_loads_and_fits(chromium: browsers.Browser, written: dict[str, Path], hostile: dict[str, Path]) -> None:
    for path in (written["index.html"], hostile["index.html"]):
        for width in (360, 768, 1280):
            chromium.open(path, width)
            inner = chromium.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert inner[0] <= inner[1] <= width
        assert chromium.problems == []  # neither errors nor requests


def test_tables_sort_by_mouse_and_keyboard(chromium: browsers.Browser, written: dict[str, Path]) -> None:
    chromium.open(written["index.html"], 1280)
    order = [HEAD % (at + 1) for at in range(6)]
    languages = chromium.run(COLUMN % 0)
    assert languages == ["sw", "yo", "fi", "en"]
    speeds = [float(text) for text in chromium.run(COLUMN % 2)]
    chromium.run(f"{order[2]}.querySelector('button').click()")
    assert [float(text) for text in chromium.run(COLUMN % 2)] == sorted(speeds)
    assert chromium.run(f"{order[2]}.getAttribute('aria-sort')") == "ascending"
    chromium.run(f"{order[2]}.querySelector('button').focus()")
    chromium.press("Enter", "\r")
    assert [float(text) for text in chromium.run(COLUMN % 2)] == sorted(speeds, reverse=True)
    assert chromium.run(f"{order[2]}.getAttribute('aria-sort')") == "descending"
    chromium.press(" ", " ")
    assert chromium.run(COLUMN % 0) == languages  # the third time: as it was
    assert chromium.run("document.querySelectorAll('#overview [aria-sort=none]').length") == len(
        contents.overview(builder.study(**SMALL)).columns
    )
    chromium.run(f"{order[1]}.querySelector('button').click()")
    assert chromium.run(COLUMN % 1) == ["English", "Finnish", "Swahili", "Yoruba"]
    assert chromium.problems == []


def test_filter_hides_rows(chromium: browsers.Browser, written: dict[str, Path]) -> None:
    chromium.open(written["index.html"], 1280)
    chromium.run(
        "(input => { input.value = 'yoruba INT8'; input.dispatchEvent(new Event('input')); })"
        "(document.querySelector('#languages').closest('.wide').previousElementSibling.querySelector('input'))"
    )
    shown = chromium.run(
        "[...document.querySelectorAll('#languages tbody tr:not([hidden])')].map(row => row.textContent)"
    )
    assert len(shown) == 2 and all("Yoruba" in row and "int8" in row for row in shown)


def test_colours_follow_the_scheme_and_the_switch(chromium: browsers.Browser, written: dict[str, Path]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#heat-map-name').parentNode.querySelector('text')).fill"
    seen = {}
    for scheme in ("dark", "light"):
        chromium.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        chromium.open(written["index.html"], 800)
        seen[scheme] = chromium.run(ground), chromium.run(ink)
    assert seen["light"][0] == "rgb(255, 255, 255)" and seen["dark"][0] == "rgb(21, 24, 28)"
    assert seen["light"][1] != seen["dark"][1]
    assert chromium.run("document.querySelector('#theme').textContent") == "Dark"
    chromium.run("document.querySelector('#theme').click()")
    assert (chromium.run(ground), chromium.run(ink)) == seen["dark"]
    chromium.open(written["index.html"], 800)
    assert chromium.run(ground) == seen["dark"][0]  # remembered
    chromium.run("localStorage.clear()")


def test_page_prints_light(chromium: browsers.Browser, written: dict[str, Path]) -> None:
    chromium.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    chromium.open(written["index.html"], 800)
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    chromium.send("Emulation.setEmulatedMedia", media="", features=[])


def test_long_tables_sort_too(chromium: browsers.Browser, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(page_of(builder.wide()), encoding="utf-8")
    chromium.open(path, 1280)
    chromium.run("document.querySelector('#arms th:nth-child(2) button').click()")
    names = chromium.run("[...document.querySelectorAll('#arms tbody tr')].map(row => row.cells[1].textContent)")
    assert len(names) == len(contents.arms(builder.wide()).rows) and names == sorted(names)
    assert chromium.problems == []
