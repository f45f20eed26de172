"""The study's figures: drawn where there is something, else said why not; SVG that a page can hold, PNG that is one."""

from __future__ import annotations

import re
import struct
import sys
from xml.etree import ElementTree

import pytest
import study as builder

from xfast import figures
from xfast.errors import BackendUnavailableError
from xfast.study import plots_arms, plots_speed, view
from xfast.study.document import BASELINE, INTERMEDIATE, Study
from xfast.study.plots import Absent, Plot, plots

FULL = builder.study(languages=("sw", "yo", "my", "te", "bn", "th", "en", "fi"))


@pytest.fixture(scope="module")
def full() -> dict[str, Plot | Absent]:
    return {plot.key: plot for plot in plots(FULL)}


def svg_texts(plot: Plot | Absent) -> list[str]:
    assert isinstance(plot, Plot)
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(plot.svg).iter("text")]


def test_a_full_study_has_every_figure(full: dict[str, Plot | Absent]) -> None:
    speed = ["fertility", "latency", "scaling"]
    probes = [f"probe-{kind}" for kind in ("layer", "early", "quantisation", "windows")]
    assert list(full) == ["heat-map", "ratios", "equivalence", "accuracy", "pareto", *speed, *probes]
    assert all(isinstance(plot, Plot) for plot in full.values())


def test_images(full: dict[str, Plot | Absent]) -> None:
    for plot in full.values():
        assert isinstance(plot, Plot) and plot.caption.endswith((".", "?"))
        assert plot.png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", plot.png[16:24])
        assert 300 < width < 4000 and 150 < height < 4000


def test_svg_is_well_formed_and_takes_the_pages_colours(full: dict[str, Plot | Absent]) -> None:
    ids: list[str] = []
    for plot in full.values():
        assert isinstance(plot, Plot)
        ids += [node.get("id", "") for node in ElementTree.fromstring(plot.svg).iter() if node.get("id")]
        assert "http" not in plot.svg and "<metadata" not in plot.svg and "font-family" not in plot.svg
        references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg))
        assert references <= set(re.findall(r'\bid="([^"]+)"', plot.svg))
        # No colour is fixed: each is a variable of the page, or a mixture of them.
        assert not re.search(r"(fill|stroke): ?#|(fill|stroke)=\"#", plot.svg)
    assert len(ids) == len(set(ids))


def test_heat_map_shows_every_cell(full: dict[str, Plot | Absent]) -> None:
    texts = svg_texts(full["heat-map"])
    chosen = view.setting(FULL)
    assert chosen is not None
    for row in view.throughput_cells(FULL, chosen).values():
        for cell in row.values():
            value = view.rate(cell)["samples_per_s"]
            assert any(
                re.fullmatch(r"[\d.,]+", text) and float(text.replace(",", "")) == pytest.approx(value, rel=6e-3)
                for text in texts
            )
    names = [text for text in texts if text.endswith(")")]
    assert [re.search(r"\((..)\)", name)[1] for name in names][:4] == ["my", "te", "sw", "yo"]  # type: ignore[index]


def test_fertility_names_low_resource_languages_and_what_is_missing(full: dict[str, Plot | Absent]) -> None:
    texts = svg_texts(full["fertility"])
    assert {"Swahili", "Yoruba", "Telugu"} <= set(texts) and not {"English", "Finnish"} & set(texts)
    assert isinstance(full["fertility"], Plot) and "Without: Burmese, Thai." in full["fertility"].caption


def test_forest_has_the_control_first(full: dict[str, Plot | Absent]) -> None:
    texts = svg_texts(full["equivalence"])
    rows = [text for text in texts if "intermediate" in text or "control" in text]
    assert rows[0].startswith("control (A/A)") and rows[1] == "all, intermediate"
    languages = [text for text in svg_texts(full["ratios"]) if text.endswith(")")]
    assert len(languages) == len(FULL["languages"]) and not any(text.endswith(")") for text in rows[1:])


# --- what cannot be drawn -------------------------------------------------------------------------


def test_minimal_study_says_why() -> None:
    found = {plot.key: plot for plot in plots(builder.minimal())}
    absent = {key: plot.why for key, plot in found.items() if isinstance(plot, Absent)}
    assert list(found) == [*absent, "heat-map"][-1:] + list(absent)
    assert absent == {
        "ratios": "no arm was compared with the baseline language by language",
        "equivalence": "no arm was compared with the baseline",
        "accuracy": "the weights are seeded, so there is no accuracy to show",
        "pareto": "the weights are seeded, so there is no accuracy to show",
        "fertility": "tokens per word are known of fewer than three languages",
        "latency": "no single responses were measured",
        "scaling": "one model size was measured; the curve needs two",
        "probes": "no probe was run",
    }


def test_without_any_cell() -> None:
    found = builder.study(languages=("sw",), labels=False, probes=False)
    found["cells"], found["scaling"], found["equivalence"] = [], [], []
    assert {plot.key for plot in plots(found) if isinstance(plot, Plot)} == set()
    assert plots_speed.heat_map(found) == plots_speed.fertility(found) == "no throughput was measured"


def test_trained_but_unlabelled() -> None:
    found = builder.study(languages=("sw",), labels=False)
    for arm in found["arms"].values():
        arm["source"] = "runs/x"
    assert plots_arms.accuracy(found) == "no labelled data was scored"


def test_missing_cells_are_hatched() -> None:
    found = builder.study(languages=("sw", "en"), sizes=("base",), labels=False, probes=False, latency=False)
    found["cells"] = [cell for cell in found["cells"] if (cell["language"], cell["engine"]) != ("sw", "stock fp32")]
    made = plots_speed.heat_map(found)
    assert not isinstance(made, str) and made.caption.endswith("Hatched: not measured.")


def latencies_only() -> Study:
    found = builder.study(languages=("sw", "en"), sizes=("base",), labels=False, probes=False)
    found["cells"] = [cell for cell in found["cells"] if cell["kind"] == "latency"]
    return found


def test_latency_needs_no_throughput() -> None:
    assert not isinstance(plots_speed.latency(latencies_only()), str)


@pytest.mark.parametrize("rate", [5e-4, 1.0, 3e6])
def test_equal_and_extreme_rates(rate: float) -> None:
    found = builder.study(languages=("sw", "en", "fi"), sizes=("base",), labels=False, probes=False, latency=False)
    for cell in found["cells"]:
        cell["throughput"][BASELINE]["samples_per_s"] = rate
    for draw in (plots_speed.heat_map, plots_speed.fertility):
        made = draw(found)
        assert not isinstance(made, str) and figures.png(made.figure, dpi=50)


def test_long_forests_are_cut_and_say_so() -> None:
    found = builder.study(languages=("sw",), sizes=("base",), labels=False, probes=False)
    found["equivalence"] = [builder.equivalence(f"scope {at}", INTERMEDIATE, 1.0, 0.001) for at in range(60)]
    made = plots_arms.equivalence(found)
    assert not isinstance(made, str) and "Of 61 comparisons the first 40." in made.caption


@pytest.mark.parametrize("module", ["matplotlib", "scipy"])
def test_without_what_it_is_drawn_with(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailableError, match=f"plots: needs {module}; pip install matplotlib scipy"):
        plots(FULL)


def test_heat_scale_is_monotonous() -> None:
    reds = [int(figures.heat(step / 100)[1:3], 16) for step in range(101)]
    assert reds == sorted(reds, reverse=True) and figures.heat(1) == figures.HEAT


def test_same_study_same_bytes() -> None:
    assert plots(builder.minimal()) == plots(builder.minimal())


def test_labels_of_sizes_that_are_near_are_written_below() -> None:
    places, labels = plots_speed._size_ticks({13113.0: "13b", 277.0: "base", 559.0: "large", 10696.0: "xxl"})
    assert places == [277.0, 559.0, 10696.0, 13113.0]
    assert labels == ["base\n277 M", "large\n559 M", "xxl\n10.7 B", "\n\n13b\n13.1 B"]
