"""From observations to the document, with observations made up so that every figure is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xfast.study import document, summary, view
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import Settings
from xfast.study.languages import ordered
from xfast.study.profiles import GROUPS, JOSHI_CLASS

LANGUAGES = tuple(ordered(["sw", "te", "yo", "el", "ta", "de", "en", "ru"]))
FERTILITY = {"sw": 1.6, "te": 2.3, "yo": 2.8, "el": 1.8, "ta": 2.2, "de": 1.5, "en": 1.3, "ru": 1.7}
PER_TOKEN = {"native:fp32": 1e-3, "native:int8": 4e-4}


def records(slowdown: float = 0.0, noise: float = 0.01, rounds: int = 5, **changes: Any) -> list[dict[str, Any]]:
    """A study of one size, two engines and eight languages; time is proportional to tokens."""
    settings = Settings(engines=tuple(PER_TOKEN), languages=LANGUAGES, rounds=rounds, tasks=("panx",), **changes)
    generator = np.random.default_rng(0)
    found: list[dict[str, Any]] = [
        {"kind": "study", "format": 1, "settings": settings.as_dict(), "machine": {"cpu": "made up", "versions": {}}}
    ]
    for engine, cost in PER_TOKEN.items():
        found.append({"kind": "engine", "engine": engine, "size": "base", "explain": engine})
        for language in LANGUAGES:
            words = 200
            tokens = round(words * FERTILITY[language]) + 64
            for policy, samples in (("sorted", 32), ("single", 4)):
                key = f"base/{engine}/panx/{language}/{policy}/{1 if policy == 'single' else 16}"
                share = samples / 32
                facts = {"samples": samples, "tokens": round(tokens * share), "sequences": samples, "padding": 0.1}
                facts |= {"words": round(words * share), "fertility": FERTILITY[language], "windows_per_example": None}
                found.append({"kind": "cell", "cell": key, **facts})
                for number in range(rounds):
                    seconds = {}
                    for arm in (BASELINE, INTERMEDIATE, CONTROL):
                        factor = 1 + slowdown * (arm == INTERMEDIATE)
                        parts = samples if policy == "single" else 1
                        each = cost * tokens * share * factor / parts
                        seconds[arm] = list(each * np.exp(generator.normal(0, noise, parts)))
                    joules = dict.fromkeys(seconds, 10.0 * share)
                    found.append({"kind": "visit", "cell": key, "round": number, "seconds": seconds, "joules": joules})
        found.append({"kind": "memory", "size": "base", "engine": engine, "arms": 3, "peak_bytes": 4_000_000_000})
    found.append({"kind": "ended", "at": "2026-01-01T00:00:00+00:00", "seconds": 60.0})
    return found


def study(**changes: Any) -> document.Study:
    return summary.document_of(records(**changes), Path("made up"))


def test_rates_by_hand() -> None:
    made = study(noise=0.0)
    cell = next(c for c in made["cells"] if c["language"] == "te" and c["engine"] == "native:fp32" and c["throughput"])
    tokens = 200 * 2.3 + 64
    figures = cell["throughput"][BASELINE]
    assert figures["tokens_per_s"] == pytest.approx(1000)
    assert figures["tokens_per_s_interval"] == pytest.approx([1000, 1000])
    assert made["control"]["cells"] == 2 * 2 * len(LANGUAGES)
    assert figures["samples_per_s"] == pytest.approx(32 / (tokens * 1e-3))
    assert figures["words_per_s"] == pytest.approx(200 / (tokens * 1e-3))
    assert figures["joules_per_sample"] == pytest.approx(10 / 32)
    latency = next(c for c in made["cells"] if c["language"] == "te" and c["latency"])["latency"][CONTROL]
    assert latency["p50_ms"] == latency["quantiles_ms"][-1] == pytest.approx(tokens / 32)
    assert (latency["texts"], latency["responses"], len(latency["quantiles_ms"])) == (4, 20, len(document.PERCENTILES))
    assert cell["ratios"][CONTROL] == {"ratio": 1.0, "interval95": [1.0, 1.0], "pairs": 5}
    assert made["seconds"] == 60.0 and made["created"].startswith("2026-01-01")
    json.dumps(made, allow_nan=False)


def _with_latency(texts: int, passes: int, milliseconds: Any) -> tuple[document.Latency, list[str]]:
    """Of one cell whose responses take ``milliseconds(visit, pass, text)``; and the notes."""
    key = "base/native:fp32/panx/sw/single/1"
    facts = {"samples": texts, "tokens": 10, "sequences": texts, "padding": 0.0, "words": None}
    rows = [
        records(rounds=3)[0],
        {"kind": "cell", "cell": key, **facts, "fertility": None, "windows_per_example": None},
    ]
    for number in range(3):
        times = [1e-3 * milliseconds(number, turn, text) for turn in range(passes) for text in range(texts)]
        seconds = dict.fromkeys((BASELINE, INTERMEDIATE, CONTROL), times)
        rows.append({"kind": "visit", "cell": key, "round": number, "seconds": seconds, "joules": {}})
    made = summary.document_of(rows, Path("x"))
    return made["cells"][0]["latency"][BASELINE], made["notes"]


def test_quantiles_of_latency_are_over_texts_not_over_their_repetitions() -> None:
    # One text of a hundred is slow, and every first response of a text is interrupted: no quantile of a text.
    figures, notes = _with_latency(
        100, 3, lambda _, turn, text: 1000 if turn == 0 else 50 if text == 7 else 1 + text / 100
    )
    texts = sorted(50 if text == 7 else 1 + text / 100 for text in range(100))
    assert (figures["texts"], figures["responses"], figures["unknown"]) == (100, 900, {})
    for name, percent in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99)):
        assert figures[name] == pytest.approx(np.percentile(texts, percent))  # type: ignore[literal-required]
    assert figures["quantiles_ms"][0] == pytest.approx(1.0) and figures["quantiles_ms"][-1] == pytest.approx(50)
    assert not any("of latency" in note for note in notes)


@pytest.mark.parametrize(("texts", "unknown"), [(1, 2), (19, 2), (20, 1), (99, 1), (100, 0)])
def test_tails_are_null_where_there_are_too_few_texts_however_often_they_are_answered(texts: int, unknown: int) -> None:
    figures, notes = _with_latency(texts, 200, lambda visit, turn, text: 1 + text)
    missing = ("p99_ms", "p95_ms")[:unknown]
    assert [name for name in ("p99_ms", "p95_ms") if figures[name] is None] == list(missing)  # type: ignore[literal-required]
    assert set(figures["unknown"]) == set(missing)
    assert all(why.startswith(f"{texts} texts") for why in figures["unknown"].values())
    assert figures["p50_ms"] == pytest.approx((1 + texts) / 2)
    for name in ("p95", "p99"):
        said = [
            note for note in notes if note.startswith(f"{name} of latency is not given where a cell has {texts} texts")
        ]
        assert len(said) == (f"{name}_ms" in missing)


def test_the_time_of_runs_that_were_killed_counts() -> None:
    rows = [row for row in records() if row["kind"] != "ended"]
    thirds = [rows[: len(rows) // 3], rows[len(rows) // 3 : 2 * len(rows) // 3], rows[2 * len(rows) // 3 :]]
    timed = [
        {**row, "run": run, "after": float(at)} for run, part in enumerate(thirds, 1) for at, row in enumerate(part)
    ]
    spent = sum(len(part) - 1 for part in thirds)
    assert summary.document_of(timed, Path("x"))["seconds"] == spent
    ended = {"kind": "ended", "at": "2026-01-01T00:00:00+00:00", "run": 3, "after": 1e6}
    assert summary.document_of([*timed, ended], Path("x"))["seconds"] == spent - (len(thirds[2]) - 1) + 1e6


def test_low_resource_languages_lead_the_cells() -> None:
    seen = list(dict.fromkeys(cell["language"] for cell in study()["cells"]))
    assert seen == list(LANGUAGES) == ["te", "sw", "yo", "el", "ta", "ru", "de", "en"]


def test_a_planted_slowdown_is_found_everywhere_it_is_and_only_there() -> None:
    made = study(slowdown=0.05, rounds=10)
    assert made["control"]["verdict"] == "equivalent" and made["control"]["arm"] == CONTROL
    whole = next(one for one in made["equivalence"] if one["scope"] == "all")
    assert (whole["arm"], whole["verdict"]) == (INTERMEDIATE, "different")
    assert whole["ratio"] == pytest.approx(1.05, abs=0.003)
    scopes = {one["scope"] for one in made["equivalence"]}
    assert scopes >= {"base native:int8", "low-resource", "latency", "throughput", "sw"}
    for one in made["equivalence"]:
        assert one["verdict"] == ("different" if one["arm"] == INTERMEDIATE else "equivalent"), one["scope"]
    assert not any("control failed" in note for note in made["notes"])


def test_equal_arms_are_equivalent() -> None:
    made = study()
    assert made["equivalence"][0]["verdict"] == "equivalent"
    low, high = made["control"]["interval95"]
    assert 0.995 < low < high < 1.005


def test_a_noisy_machine_is_said_with_the_pairs_it_takes() -> None:
    made = study(noise=0.5, rounds=2)
    assert made["control"]["verdict"] == "undecided"
    assert any("A/A control failed" in note for note in made["notes"])
    needed = made["control"]["cells_needed"]
    assert needed and needed > made["control"]["cells"]
    assert any(f"About {needed} cells are needed at this noise, 32 were had." in note for note in made["notes"])


def test_too_few_pairs_have_no_verdict() -> None:
    made = study(rounds=1)
    (swahili,) = [one for one in made["equivalence"] if one["scope"] == "sw" and one["arm"] == INTERMEDIATE]
    assert (swahili["pairs"], swahili["cells"]) == (4, 4)
    rows = [row for row in records(rounds=1) if "/sw/sorted" in row.get("cell", "/sw/sorted")]
    alone = summary.document_of(rows, Path("x"))["control"]
    assert (alone["verdict"], alone["pairs"], alone["pairs_needed"]) == ("undecided", 2, None)
    assert alone["interval95"] == [0.01, 100.0] and not document.passed(alone)


def test_the_cost_model_is_the_planted_one_and_fertility_explains_the_languages() -> None:
    made = study(noise=0.0)
    for model in made["cost_models"]:
        assert model["us_per_token"] == pytest.approx(1e6 * PER_TOKEN[model["engine"]])
        assert model["us_per_sequence"] == pytest.approx(0, abs=1e-3)
        assert model["r2"] == pytest.approx(1)
        assert model["explained"]["fertility"] > 0.97  # the rest is that special tokens are no words
        assert model["task"] == "panx"
        assert model["explained"]["length"] == pytest.approx(1) and "padding" not in model["explained"]
        assert model["predicted"] == pytest.approx(model["seen"])
        assert list(model["seen"]) == list(LANGUAGES)


def test_scaling_averages_by_group() -> None:
    made = study(noise=0.0)
    rows = {(one["engine"], one["group"]): one for one in made["scaling"] if one["arm"] == BASELINE}
    assert set(rows) == {
        (engine, group) for engine in PER_TOKEN for group in ("all", "low-resource", "mid-resource", "high-resource")
    }
    low = [32 / ((200 * FERTILITY[code] + 64) * 1e-3) for code in LANGUAGES if JOSHI_CLASS[code] <= 2]
    assert rows["native:fp32", "low-resource"]["samples_per_s"] == pytest.approx(np.prod(low) ** (1 / len(low)))
    assert rows["native:int8", "all"]["tokens_per_s"] == pytest.approx(2500)
    assert rows["native:fp32", "all"]["parameters"] == 277_453_056
    assert CONTROL not in {one["arm"] for one in made["scaling"]}


def test_repeated_observations_count_once() -> None:
    rows = records(noise=0.0)
    visit = next(dict(row) for row in rows if row["kind"] == "visit")
    visit["seconds"] = {arm: [2 * second for second in seconds] for arm, seconds in visit["seconds"].items()}
    made = summary.document_of([*rows, visit], Path("made up"))
    assert all(cell["rounds"] == 5 for cell in made["cells"])


def test_an_effect_in_one_part_is_named() -> None:
    rows = records(noise=0.002, rounds=3)
    for row in rows:
        if row["kind"] == "visit" and "/te/" in row["cell"]:
            row["seconds"] = {**row["seconds"], INTERMEDIATE: [1.06 * each for each in row["seconds"][INTERMEDIATE]]}
    made = summary.document_of(rows, Path("x"))
    assert made["equivalence"][0]["verdict"] == "equivalent"
    single = [one for one in made["equivalence"] if one["scope"] == "te" and one["arm"] == INTERMEDIATE]
    assert single[0]["verdict"] == "different" and single[0]["ratio"] == pytest.approx(1.06, abs=0.005)
    assert any(
        note.startswith("Equivalent over all cells, but different in:") and "te" in note for note in made["notes"]
    )


def test_a_stopped_run_with_probes_has_a_report(tmp_path: Path) -> None:
    from xfast.study import report

    rows = [row for row in records() if row["kind"] != "ended" and "/sw/" not in row.get("cell", "")]
    probe = {"kind": "probe", "probe": "quantisation", "arm": BASELINE, "size": "base", "task": "panx"}
    rows.append({**probe, "language": "sw", "x": "native:int8", "what": "cosine", "value": 0.99})
    made = summary.document_of(rows, Path("x"))
    assert "sw" in made["languages"]
    assert report.write(made, tmp_path)["index.html"].is_file()


def test_failures_are_listed_unless_a_later_run_mended_them() -> None:
    failure = {"kind": "failed", "size": "base", "engine": "native:bf16", "why": "no such instruction"}
    mended = {"kind": "failed", "size": "base", "engine": "native:int8", "why": "killed"}
    ended = {"kind": "ended_group", "size": "base", "engine": "native:int8"}
    rows = [*records(), failure, failure, mended, ended, {"kind": "note", "text": "a note"}]
    made = summary.document_of(rows, Path("x"))
    assert made["skipped"] == [{"what": "base native:bf16", "why": "no such instruction"}]
    assert "a note" in made["notes"]


def test_a_failure_after_timing_is_listed_beside_the_cells_that_were_timed() -> None:
    # The memory of the timed models is stored before the scores: it does not say that the worker came to its end.
    failure = {"kind": "failed", "size": "base", "engine": "native:int8", "why": "killed while scoring"}
    ended = {"kind": "ended_group", "size": "base", "engine": "native:int8"}
    listed = [{"what": "base native:int8", "why": "killed while scoring"}]
    for rows, expected in (
        ([failure], listed),
        ([ended, failure], listed),  # a later run failed where an earlier one had ended
        ([failure, ended], []),
    ):
        made = summary.document_of([*records(), *rows], Path("x"))
        assert made["skipped"] == expected
        timed = [cell for cell in made["cells"] if cell["engine"] == "native:int8"]
        assert len(timed) == 2 * len(LANGUAGES) and all(cell["rounds"] == 5 for cell in timed)
        assert {one["engine"] for one in made["memory"]} == set(PER_TOKEN)


def test_scores_that_a_later_run_made_are_no_longer_missing() -> None:
    missed = {"kind": "skipped", "what": "accuracy of baseline on panx", "why": "no folder", "job": "accuracy panx"}
    withheld = {"kind": "skipped", "what": "accuracy of baseline on panx in te", "why": "no labels"}
    kept = {name: withheld[name] for name in ("what", "why")}
    before = summary.document_of([*records(), missed, missed, withheld], Path("x"))["skipped"]
    assert before == [{name: missed[name] for name in ("what", "why")}, kept]
    done = {"kind": "done", "job": "accuracy panx"}
    assert summary.document_of([*records(), missed, withheld, done], Path("x"))["skipped"] == [kept]


def test_the_peak_of_memory_is_that_of_the_largest_process() -> None:
    memory = {"kind": "memory", "size": "base", "engine": "native:int8"}
    more = [{**memory, "arms": 2, "peak_bytes": peak} for peak in (6_000_000_000, 5_000_000_000)]
    made = summary.document_of([*records(), *more], Path("x"))
    assert made["memory"] == [
        {"size": "base", "engine": "native:fp32", "arms": 3, "peak_bytes": 4_000_000_000},
        {"size": "base", "engine": "native:int8", "arms": 2, "peak_bytes": 6_000_000_000},
    ]


def test_what_was_not_finite_is_not_known() -> None:
    probe = {
        "kind": "probe",
        "probe": "quantisation",
        "arm": BASELINE,
        "size": "base",
        "task": "panx",
        "what": "cosine",
    }
    score = {"kind": "accuracy", "arm": BASELINE, "size": "base", "engine": "native:fp32", "task": "panx"}
    score |= {"metric": "f1", "examples": 5}
    rows = [
        {**probe, "language": "sw", "x": "native:int8", "value": None},
        {**probe, "language": "te", "x": "native:int8", "value": 0.9},
        {**probe, "language": "te", "x": "native:int8", "value": None},  # measured once more, in vain
        {**score, "language": "sw", "layers": 3, "value": None},
        {**score, "language": "sw", "layers": 6, "value": 20.0},
        {**score, "language": "sw", "layers": None, "value": None},
        {**score, "language": "te", "layers": None, "value": None},
    ]
    made = summary.document_of([*records(noise=0.0), *rows], Path("x"))
    quantised = [one for one in made["probes"] if one["probe"] == "quantisation"]
    assert [(one["language"], one["value"]) for one in quantised] == [("te", 0.9)]
    assert [(one["language"], one["layers"], one["value"]) for one in made["accuracy"]] == [("sw", 6, 20.0)]
    (best,) = [one for one in made["probes"] if one["probe"] == "layer"]
    assert (best["language"], best["value"]) == ("sw", 6.0)
    assert {point["layers"] for point in made["pareto"]} == {6}
    view.check(made)


def test_energy_is_the_median_of_the_visits_that_have_it() -> None:
    rows = records(noise=0.0)
    key = "base/native:fp32/panx/te/sorted/16"
    for row in rows:
        if row["kind"] == "visit" and row["cell"] == key:
            row["joules"] = {BASELINE: None if row["round"] in (0, 2) else 32.0 * row["round"], CONTROL: None}
    (cell,) = [cell for cell in summary.document_of(rows, Path("x"))["cells"] if cell["key"] == key]
    joules = {arm: figures["joules_per_sample"] for arm, figures in cell["throughput"].items()}
    assert joules == {BASELINE: 3.0, INTERMEDIATE: None, CONTROL: None}


@pytest.mark.parametrize(("ticks", "known"), [(100.0, True), (79.0, False), (None, False)])
def test_energy_of_a_counter_that_is_too_coarse_is_not_known(ticks: float | None, known: bool) -> None:
    rows = records(noise=0.0)
    for row in rows:
        if row["kind"] == "visit":
            row |= {"joules": {BASELINE: 32.0}, "ticks": {BASELINE: ticks}}  # in each of five rounds
    for cell in summary.document_of(rows, Path("x"))["cells"]:
        if cell["throughput"]:
            assert (cell["throughput"][BASELINE]["joules_per_sample"] is not None) is known


def test_what_was_planned_and_not_measured_is_listed() -> None:
    rows = records()
    keys = [row["cell"] for row in rows if row["kind"] == "cell"]
    first = {"kind": "plan", "cells": keys, "skipped": [{"what": "xl", "why": "no memory"}], "notes": ["no probes"]}
    more = "base/native:int8/udpos/sw/sorted/16"
    last = {"kind": "plan", "cells": [*keys, more], "skipped": [{"what": "xxl", "why": "no memory"}], "notes": ["now"]}
    made = summary.document_of([*rows, first, last], Path("x"))
    stopped = {"what": "5 of 85 visits to cells of base native:int8", "why": "the run was stopped before them"}
    assert made["skipped"] == [{"what": "xxl", "why": "no memory"}, stopped]  # the last plan counts
    assert "now" in made["notes"] and "no probes" not in made["notes"]
    for what in ("base native:int8", "base native:int8 udpos"):
        known = {"kind": "skipped", "what": what, "why": "no such instruction"}
        assert stopped not in summary.document_of([*rows, last, known], Path("x"))["skipped"]
    short = [row for row in rows if row["kind"] != "visit" or row["round"] < 4 or "/te/single" not in row["cell"]]
    found = summary.document_of([*short, first], Path("x"))["skipped"]
    assert [one["what"] for one in found[1:]] == [f"1 of 80 visits to cells of base {engine}" for engine in PER_TOKEN]


def test_a_stopped_run_has_a_document_too(tmp_path: Path) -> None:
    rows = [row for row in records() if row["kind"] != "ended"]
    made = summary.document_of(rows[: len(rows) // 2], Path("x"))
    assert made["created"] == "unfinished"
    path = tmp_path / "study.json"
    path.write_text(json.dumps(made))
    assert document.load(path) == made


def test_pareto_fronts_join_scores_and_costs() -> None:
    scores = []
    for arm, engine, value in [
        (BASELINE, "native:fp32", 70.0),
        (BASELINE, "native:int8", 69.0),
        (INTERMEDIATE, "native:fp32", 75.0),
        (INTERMEDIATE, "native:int8", 68.0),
    ]:
        for language in LANGUAGES:
            score = {"kind": "accuracy", "arm": arm, "size": "base", "engine": engine, "task": "panx", "layers": None}
            scores.append({**score, "language": language, "metric": "f1", "value": value, "examples": 10})
    made = summary.document_of([*records(noise=0.0), *scores, scores[0]], Path("x"))
    assert len(made["accuracy"]) == 4 * len(LANGUAGES)
    front = {(p["arm"], p["engine"]): p["on_front"] for p in made["pareto"] if p["group"] == "all"}
    assert front == {
        (BASELINE, "native:fp32"): False,  # the intermediate arm costs the same and is better
        (BASELINE, "native:int8"): True,
        (INTERMEDIATE, "native:fp32"): True,
        (INTERMEDIATE, "native:int8"): False,
    }
    assert {p["group"] for p in made["pareto"]} == {"all", *GROUPS}
    (swahili,) = [one for one in made["trades"] if one["language"] == "sw"]
    assert (swahili["accuracy"], swahili["best_accuracy"], swahili["best_by"]) == (70.0, 75.0, "native:fp32")
    assert (swahili["least_by"], swahili["least_ms"]) == ("native:fp32", pytest.approx(swahili["ms_per_sample"]))
    assert [one["language"] for one in made["trades"]] == list(LANGUAGES)
    # int8 alone would not do: the baseline's own scores less with it, and it costs less for no less accuracy than 70
    assert (swahili["own_accuracy"], swahili["own_ms"]) == (70.0, pytest.approx(swahili["ms_per_sample"]))
    fewer = [row for row in scores if row["language"] != "sw" or row["arm"] == BASELINE]
    made = summary.document_of([*records(noise=0.0), *fewer], Path("x"))
    group = {p["ms_per_sample"] for p in made["pareto"] if p["group"] == "all" and p["engine"] == "native:fp32"}
    assert len({round(each, 9) for each in group}) == 1  # the same languages in every point


def test_the_best_layer_is_a_probe() -> None:
    rows = []
    for layer, value in ((3, 10.0), (6, 30.0), (9, 20.0), (12, 5.0)):
        score = {"kind": "accuracy", "arm": BASELINE, "size": "base", "engine": "native:fp32", "task": "panx"}
        rows.append({**score, "language": "sw", "layers": layer, "metric": "acc", "value": value, "examples": 5})
    made = summary.document_of([*records(noise=0.0), *rows], Path("x"))
    (probe,) = [one for one in made["probes"] if one["probe"] == "layer"]
    assert (probe["value"], probe["x"], probe["language"]) == (6.0, "native:fp32", "sw")
    whole = next(c for c in made["cells"] if c["language"] == "sw" and c["engine"] == "native:fp32" and c["throughput"])
    points = {p["layers"]: p["ms_per_sample"] for p in made["pareto"] if p["group"] == "all"}
    assert points[6] == pytest.approx(0.5 * 1e3 / whole["throughput"][BASELINE]["samples_per_s"])


def test_a_document_of_another_format_is_refused(tmp_path: Path) -> None:
    from xfast.errors import DataFileError

    path = tmp_path / "study.json"
    for text, message in [
        ("{", "cannot read"),
        ("[]", "got 'list'"),
        ('{"format": 1}', "got 1"),
        ('{"format": 2}', "not a whole study: accuracy"),
    ]:
        path.write_text(text)
        with pytest.raises(DataFileError, match=message):
            document.load(path)
    with pytest.raises(DataFileError, match="cannot read"):
        document.load(tmp_path / "nowhere.json")
