"""What a study says follows from all that was measured, in one task at a time, and no more is said than is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study as builder
import test_study_summary as made_up

from xfast.study import (
    contents,
    document,
    equivalence,
    fronts,
    left_out,
    plots_speed,
    speeds,
    statistics,
    summary,
    view,
)
from xfast.study.answer import answer
from xfast.study.cells import Cells
from xfast.study.document import BASELINE, CONTROL, DIFFERENT, EQUIVALENT, INTERMEDIATE, UNDECIDED, Study
from xfast.study.drawing import Drawing
from xfast.study.factors import Settings

MARGIN = 0.02


def of(records: list[dict[str, Any]]) -> Study:
    return summary.document_of(records, Path("made up"))


def with_settings(records: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    first = {**records[0], "settings": {**records[0]["settings"], **changes}}
    return [first, *records[1:]]


def lead(study: Study) -> str:
    return " ".join(answer(study).lead).replace("\N{NO-BREAK SPACE}", " ")


def test_sizes_are_compared_within_one_task() -> None:
    """Where one task stands for each language, a group's languages may have longer texts than another's."""
    records = made_up.records(noise=0.0)
    for record in records:
        if "/te/" in record.get("cell", ""):
            record["cell"] = record["cell"].replace("/panx/", "/xcopa/")
            for arm, seconds in record.get("seconds", {}).items():
                record["seconds"][arm] = [10 * each for each in seconds]
    made = of(with_settings(records, tasks=["one"]))
    rows = {(row["task"], row["group"]): row for row in made["scaling"] if row["engine"] == "native:fp32"}
    low = [32 / ((200 * made_up.FERTILITY[code] + 64) * 1e-3) for code in ("sw", "yo")]
    assert rows["panx", "low-resource"]["samples_per_s"] == pytest.approx(math.sqrt(low[0] * low[1]))
    assert rows["xcopa", "all"]["samples_per_s"] == pytest.approx(32 / ((200 * 2.3 + 64) * 1e-2))
    assert set(contents.scaling(made).column("task")) == {"panx", "xcopa"}


def test_shares_of_variance_say_how_many_languages_they_are_over() -> None:
    records = made_up.records(noise=0.001)
    for at, record in enumerate(record for record in records if record["kind"] == "cell"):
        record["padding"] = 0.1 + 0.01 * (at % 7)
        if "/ru/" in record["cell"] or "/el/" in record["cell"]:
            record["fertility"] = None
    made = of(records)
    for model in made["cost_models"]:
        assert model["explained_over"] == {"fertility": 6, "length": 8, "fertility + length": 6}
        rates = [math.log(model["seen"][code]) for code in made_up.LANGUAGES]
        mine = {
            cell["language"]: cell for cell in made["cells"] if cell["engine"] == model["engine"] and cell["throughput"]
        }
        tokens = [math.log(mine[code]["tokens"]) for code in made_up.LANGUAGES]
        alone = 1 - (1 - np.corrcoef(rates, tokens)[0, 1] ** 2) * 7 / 6
        assert model["explained"]["length"] == pytest.approx(alone)
    text = lead(made)
    assert "of the variance of speed between 6 languages" in text and "% over 8." in text
    assert "(tokens per word are not known of Greek and Russian)" in text
    table = contents.cost_models(made)
    assert set(table.column("over length")) == {8} and "Greek, Russian" in table.legend[-1]


def test_padding_is_a_cause_for_engines_that_compute_it() -> None:
    """Elsewhere it goes along with length, and would explain what it does not cause."""
    cells = [cell for cell in of(made_up.records(noise=0.0))["cells"] if cell["engine"] == "native:fp32"]
    rows = [{**cell, "padding": 0.1 * (at % 5)} for at, cell in enumerate(cells) if cell["throughput"]]
    stock: Any = [copy.deepcopy({**row, "engine": "stock:fp32"}) for row in rows]
    for row in stock:  # time is by the tokens of a padded batch
        row["throughput"][BASELINE]["samples_per_s"] = 1e4 * (1 - row["padding"]) * row["samples"] / row["tokens"]
    ours, theirs = (speeds.explained(each)[0] for each in (rows, stock))
    assert not any("padding" in cause for cause in ours) and ours["length"] == pytest.approx(1)
    assert theirs["length + padding"] > 0.97 > theirs["padding"] > 0.05


def test_units_that_are_lacking_are_those_of_the_test() -> None:
    rng = np.random.default_rng(0)
    few = statistics.compare([rng.normal(0.004, 0.02, 3) for _ in range(4)], MARGIN)
    many = statistics.compare([np.repeat(rng.normal(0.004, 0.02), 30) for _ in range(4)], MARGIN)
    for found in (few, many):
        deviation = math.sqrt(4) * (math.log(found.interval95[1]) - math.log(found.ratio)) / 3.182446
        assert found.cells_needed == statistics.units_needed(deviation, MARGIN) and found.cells_needed > 4
        assert found.pairs_needed is None
    rounds = statistics.compare([rng.normal(0.0, 0.05, 5)], MARGIN)  # one cell: its rounds are the units
    assert rounds.cells_needed is None and rounds.pairs_needed is not None and rounds.pairs_needed > 5
    # Undecided because the ratio is off, with more cells than equal arms would take: there is nothing to say.
    units = rng.normal(0, 1, 80)
    units = (units - units.mean()) / units.std(ddof=1) * 0.0492
    assert (statistics.units_needed(0.0492, MARGIN) or 0) < 80
    shifted = statistics.compare(list((0.0108 + units)[:, None]), MARGIN)
    assert (shifted.verdict, shifted.cells_needed) == (UNDECIDED, None)
    assert statistics.compare(list(rng.normal(0, 0.01, (10, 1))), MARGIN).cells_needed is None


def test_a_page_never_says_that_fewer_are_needed_than_there_are() -> None:
    study = builder.study(languages=("sw",))
    one = builder.equivalence("sw", INTERMEDIATE, 1.01, 0.02)
    for cells_needed, said in (
        (310, "undecided at 2 % (128 cells, about 310 are needed)"),
        (None, "undecided at 2 %."),
    ):
        study["equivalence"] = [{**one, "cells_needed": cells_needed}]
        assert said in answer(study).languages[0][1].replace("\N{NO-BREAK SPACE}", " ")
    older: Any = {name: value for name, value in one.items() if name != "cells_needed"} | {"pairs": 12, "cells": 4}
    assert view.needed({**older, "pairs_needed": 12}) is None
    assert view.needed({**older, "pairs_needed": 13}) == (4, 5, "cells")
    assert view.needed({**older, "pairs_needed": 13, "verdict": EQUIVALENT}) is None


def test_the_headline_is_held_against_the_control_too() -> None:
    study = builder.study(languages=("sw",), control=1.012)
    study["equivalence"] = [builder.equivalence("all", INTERMEDIATE, 1.012, 0.0001) | {"verdict": DIFFERENT}]  # type: ignore[list-item]
    assert document.passed(study["control"])
    assert "not to be told from the control" in lead(study)
    study["control"] = builder.equivalence("all", CONTROL, 1.0, 0.001)
    assert "not to be told from the control" not in lead(study)


def test_doubts_do_not_depend_on_the_overall_verdict() -> None:
    def one(scope: str, arm: str, ratio: float, verdict: str) -> Any:
        return {**builder.equivalence(scope, arm, ratio, 0.001), "verdict": verdict}

    for overall, begins in ((UNDECIDED, "Different in: latency, sw."), (EQUIVALENT, "Equivalent over all cells, but")):
        tests = [
            one("all", CONTROL, 1.0, EQUIVALENT),
            one("all", INTERMEDIATE, 1.01, overall),
            one("latency", INTERMEDIATE, 0.98, DIFFERENT),
            one("latency", CONTROL, 0.98, EQUIVALENT),
            *(one(code, INTERMEDIATE, 1.03, DIFFERENT if code == "sw" else EQUIVALENT) for code in ("sw", "te")),
        ]
        notes = list(equivalence.notes(Settings(), tests))
        assert any(note.startswith(begins) for note in notes)
        assert any(note.startswith("The control differs as much in: latency;") for note in notes)
        assert "Of 2 languages that are tested one by one, at most about 0.1 differ by chance alone." in notes
    tests[:2] = [one("all", CONTROL, 1.012, EQUIVALENT), one("all", INTERMEDIATE, 1.01, DIFFERENT)]
    assert any("as much in: all, latency" in note for note in equivalence.notes(Settings(), tests))


def test_batches_are_as_large_as_there_are_texts() -> None:
    study = builder.study(languages=("sw", "en"))
    chosen = view.setting(study)
    assert chosen is not None and view.described(study, chosen) == "base, panx, sorted order, batches of 16"
    for cell in study["cells"]:
        cell["samples"] = 12
    drawn = plots_speed.heat_map(study)
    assert isinstance(drawn, Drawing) and "sorted order, batches of 12)" in drawn.caption
    assert "batches of 12" in lead(study) and contents.overview(study).title.endswith("batches of 12")
    study["cells"][0]["samples"] = 3
    assert view.described(study, chosen).endswith("batches of 3 to 12")
    budget = replace(chosen, policy="budget", batch_size=2048)
    assert view.described(study, budget) == "base, panx, budget order, batches of at most 2048 padded tokens"


def test_an_engine_is_explained_for_every_size_and_head() -> None:
    records = made_up.records(noise=0.0)
    engine = {"kind": "engine", "engine": "native:fp32"}
    more = [
        {**engine, "size": "base", "head": "tagging", "explain": "fast"},
        {**engine, "size": "base", "head": "span", "explain": "slow"},
        {**engine, "size": "large", "head": "tagging", "explain": "fast"},
    ]
    rest = [row for row in records if row["kind"] != "engine" or row["engine"] != "native:fp32"]
    made = of([*rest, *more])
    assert made["engines"]["native:fp32"]["explain"] == "base tagging, large tagging: fast\nbase span: slow"
    assert of([*rest, *more[::2]])["engines"]["native:fp32"]["explain"] == "fast"


def _scored(engine: str, arm: str, language: str) -> dict[str, Any]:
    row = {"kind": "accuracy", "arm": arm, "size": "base", "engine": engine, "task": "panx", "layers": None}
    return {**row, "language": language, "metric": "f1", "value": 70.0 + 5 * (arm == INTERMEDIATE), "examples": 9}


def test_what_the_engine_saves_is_not_credited_to_training() -> None:
    """Equal arms: int8 is cheaper for both, and the baseline's own best says so."""
    records = with_settings(made_up.records(noise=0.0), engines=["native:fp32", "native:int8"])
    scores = [_scored(engine, BASELINE, "sw") for engine in ("native:fp32", "native:int8")]
    scores += [{**score, "arm": INTERMEDIATE} for score in scores]
    (trade,) = of([*records, *scores])["trades"]
    assert trade["least_by"] == "native:int8" and trade["ms_per_sample"] > 1.5 * trade["least_ms"]
    assert trade["own_ms"] == pytest.approx(trade["least_ms"])
    assert trade["own_accuracy"] == trade["best_accuracy"] == 70.0


def test_too_few_pairs_are_said_without_an_interval() -> None:
    records = made_up.records(rounds=1)
    keys = {row["cell"] for row in records if "/te/sorted" in row.get("cell", "")}
    made = of([row for row in records if row.get("cell", next(iter(keys))) in keys])
    found = answer(made)
    assert "The control has too few pairs:" in [what for what, _ in found.warnings]
    said = " ".join([*map(" ".join, found.warnings), *found.lead, *made["notes"], *map(" ".join, found.languages)])
    assert "9900" not in said and "idle machine" not in said
    for name in ("ratio_low90", "ratio_high95"):
        assert set(contents.equivalence(made).column(name)) == {None}


def test_the_gain_is_of_the_engine_that_was_named_first() -> None:
    records = with_settings(made_up.records(noise=0.0), engines=["native:int8", "native:fp32"])
    scores = [
        _scored(engine, arm, "sw") for engine in ("native:fp32", "native:int8") for arm in (BASELINE, INTERMEDIATE)
    ]
    for row in scores:
        row["value"] += 10 * (row["engine"] == "native:int8" and row["arm"] == INTERMEDIATE)
    made = of([*records, *scores])
    for arm in made["arms"].values():
        arm["source"] = "given"
    text = lead(made)
    # nine examples, two scores of which 70 and 85 are right
    shares = [(6.3 + 2) / 13, (0.85 * 9 + 2) / 13]
    half = 196 * math.sqrt(sum(share * (1 - share) / 13 for share in shares))
    assert f"+15.0 points (give or take {half:.1f}, by the number of examples)" in text and "base, native:int8" in text


def test_trades_are_over_the_first_engine_that_has_scores_and_times() -> None:
    engines = ["native:fp8", "native:fp32", "native:int8"]
    records = with_settings(made_up.records(noise=0.0), engines=engines)
    scores = [_scored(engine, arm, "sw") for engine in engines[1:] for arm in (BASELINE, INTERMEDIATE)]
    (trade,) = of([*records, *scores])["trades"]
    assert (trade["engine"], trade["best_accuracy"]) == ("native:fp32", 75.0)
    untimed = [{**score, "engine": "native:fp8"} for score in scores[:2]]
    made = of([*records, *untimed])
    assert made["trades"] == []
    (missing,) = [one for one in made["skipped"] if "base on panx" in one["what"]]
    assert missing["why"] == "no engine has both scores and times of the baseline"
    assert not list(fronts.untraded(made["cells"], [], Settings(), {}))


def test_what_another_run_has_measured_is_not_missing() -> None:
    records = made_up.records(noise=0.0)
    keys = [row["cell"] for row in records if row["kind"] == "cell"]
    skips = [
        {"kind": "skipped", "what": what, "why": "no memory"}
        for what in ("base native:int8", "base native:int8 panx", "base panx", "base native:int8 udpos", "mewslix")
    ]
    plan = {"kind": "plan", "cells": keys, "notes": []}
    last = {**plan, "skipped": [{"what": "intermediate arm of base native:int8", "why": "no memory"}]}
    cells = Cells(records, Settings())
    found = left_out.skipped([*records, plan | {"skipped": []}, *skips, last], cells, Settings())
    assert [one["what"] for one in found] == ["base native:int8 udpos", "mewslix"]
    short = [row for row in records if row["kind"] != "visit" or "/te/" not in row["cell"] or row["round"] < 4]
    for row in short:
        if row["kind"] == "visit" and "int8" in row["cell"]:
            row["seconds"] = {arm: row["seconds"][arm] for arm in (BASELINE, CONTROL)}
    found = left_out.skipped([*short, *skips, last], Cells(short, Settings()), Settings())
    named = [one["what"] for one in found]
    assert named[:4] == [last["skipped"][0]["what"], *(one["what"] for one in skips[:3])]  # type: ignore[index]


def test_sizes_with_as_many_parameters_are_two() -> None:
    study = builder.study(languages=("sw", "en"), sizes=("base", "large"))
    for row in study["scaling"]:
        row["parameters"] = 559_890_432
    drawn = plots_speed.scaling(study)
    assert isinstance(drawn, Drawing)
    labels = [label.get_text() for label in drawn.figure.axes[0].get_xticklabels()]
    assert labels == ["base, large\n560 M"]


def test_the_peak_of_a_group_that_was_continued_is_marked() -> None:
    records = [{**row, "run": 1, "after": 0.0} for row in made_up.records(noise=0.0)]
    visits = [row for row in records if row["kind"] == "visit" and "int8" in row["cell"]]
    for row in visits[len(visits) // 2 :]:
        row["run"] = 2
    smaller = {"kind": "memory", "size": "base", "engine": "native:int8", "arms": 3, "peak_bytes": 10**9, "run": 2}
    made = of([*records, {**smaller, "after": 1.0}])
    by_engine = {one["engine"]: one for one in made["memory"]}
    assert by_engine["native:int8"]["peak_bytes"] == 4_000_000_000 and by_engine["native:int8"]["resumed"]
    assert "resumed" not in by_engine["native:fp32"]
    assert contents.memory(made).column("resumed") == [None, True]
    assert "killed" in contents.memory(made).legend[-1]


def test_sizes_engines_and_batches_come_as_they_were_asked(tmp_path: Path) -> None:
    first = made_up.records(noise=0.0)
    records = with_settings(
        first, sizes=["xxl", "base", "13b"], engines=list(made_up.PER_TOKEN)[::-1], batch_sizes=[8, 16]
    )
    more: list[dict[str, Any]] = []
    for record in first[1:]:
        for old, new in (("base/", "13b/"), ("base/", "xxl/"), ("/16", "/8")):
            changed = copy.deepcopy(record)
            changed["cell"] = record.get("cell", "").replace(old, new)
            if changed["cell"] != record.get("cell", ""):
                more.append(changed)
    made = of([*records, *more])
    assert list(made["sizes"]) == ["xxl", "base", "13b"] and list(made["engines"]) == ["native:int8", "native:fp32"]
    first_cells = [(c["size"], c["engine"], c["batch_size"]) for c in made["cells"] if c["language"] == "te"]
    assert first_cells[:2] == [("xxl", "native:int8", 16), ("xxl", "native:int8", 1)]
    mine = [cell for cell in first_cells if cell[:2] == ("base", "native:int8")]
    assert [batch for _, _, batch in mine] == [8, 16, 1]
    chosen = view.setting(made)
    assert chosen is not None and (chosen.size, chosen.batch_size) == ("xxl", 16)
    assert list(dict.fromkeys(contents.cost_models(made).column("size"))) == ["xxl", "base", "13b"]
    made["equivalence"].reverse()  # as it may be in an older document
    scopes = [one["scope"] for one in contents.comparisons(made) if " native:" in one["scope"]]
    assert scopes[:2] == ["xxl native:int8", "xxl native:fp32"]


def test_documents_are_read_in_the_order_that_was_asked(tmp_path: Path) -> None:
    import json

    study = builder.study(languages=("sw",), sizes=("large", "base"), probes=False)
    study["settings"]["sizes"] = ["base", "large"]
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study))
    read = document.load(path)
    assert read == study and list(read["sizes"]) == ["base", "large"]
    chosen = view.setting(read)
    assert chosen is not None and chosen.size == "base"


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("benchmarks/results/study-*/study.json")))
def test_stored_studies_have_a_page(path: Path) -> None:
    study = document.load(path)
    view.check(study)
    assert contents.tables(study) and answer(study).lead
    assert contents.scaling(study).rows
