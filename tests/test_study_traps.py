"""Figures of a study that once looked right and were not: each test holds one of them to what it says it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import study as builder
import test_study_summary as made_up
import torch

from xfast.benchmarks.models import load_model, random_model
from xfast.errors import InvalidOptionError
from xfast.machine import machine
from xfast.study import answer, arms, contents, equivalence, fronts, plots_arms, plots_speed, run, summary, view
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.drawing import Drawing
from xfast.study.factors import Settings
from xfast.study.profiles import load_profiles, save_profiles
from xfast.study.run import Plan
from xfast.study.store import Store
from xfast.study.work import Texts


def test_sizes_are_compared_over_the_languages_that_all_have() -> None:
    """A run that was stopped within its second size has some of its languages, not the average ones."""
    first = made_up.records(noise=0.0)
    settings = {**first[0]["settings"], "sizes": ["base", "large"]}
    first[0] = {**first[0], "settings": settings}
    second: list[dict[str, Any]] = []
    for record in first[1:]:
        cell = record.get("cell", "")
        if "/te/" in cell or "/yo/" in cell:  # the two with the most tokens a word
            more = copy.deepcopy(record)
            more["cell"] = cell.replace("base/", "large/")
            for arm, seconds in more.get("seconds", {}).items():
                more["seconds"][arm] = [3 * each for each in seconds]
            second.append(more)
    engines = [{"kind": "engine", "engine": name, "size": "large", "explain": name} for name in made_up.PER_TOKEN]
    document = summary.document_of([*first, *engines, *second], Path("made up"))
    rows = {(row["size"], row["engine"], row["group"]): row for row in document["scaling"] if row["arm"] == BASELINE}
    base, large = (rows[size, "native:int8", "all"] for size in ("base", "large"))
    assert base["samples_per_s"] / large["samples_per_s"] == pytest.approx(3)
    assert large["p50_ms"] / base["p50_ms"] == pytest.approx(3)
    assert ("base", "native:int8", "high-resource") not in rows  # large has none of them


def test_what_explains_speed_is_of_the_task_that_is_shown() -> None:
    study = builder.study()
    other = copy.deepcopy(study["cost_models"])
    for model in other:
        model["task"], model["explained"] = "bucc2018", {"the moon": 0.99}
    study["cost_models"] = [*other, *study["cost_models"]]
    assert "moon" not in " ".join(answer.answer(study).lead)


def test_scores_of_all_layers_are_the_tasks_scores() -> None:
    """Retrieval is scored at several depths, the last of which is the whole encoder."""
    study = builder.study()
    whole = [row for row in study["accuracy"] if row["layers"] is None]
    for row in whole:
        row["layers"] = study["sizes"][row["size"]]["layers"]
    assert " points (give or take " in " ".join(answer.answer(study).lead)
    assert any(value is not None for value in contents.languages(study).column(f"score_{INTERMEDIATE}"))
    assert isinstance(plots_arms.accuracy(study), Drawing)
    for row in whole:
        row["layers"] -= 1
    assert not any(name.startswith("score_") and row[name] for row in contents.languages(study).rows for name in row)


def test_a_cost_that_was_measured_is_not_called_estimated() -> None:
    costs = fronts._Costs([], Settings(), {"base": {"layers": 12}})
    kinds = [("baseline", "base", "native:fp32", "tatoeba", layers) for layers in (None, 12, 6)]
    assert [costs.estimated(kind) for kind in kinds] == [False, False, True]


def test_a_language_with_another_task_is_shown_with_its_own() -> None:
    study = builder.study(languages=("sw", "en", "de"), tasks=("panx",))
    extra = builder.study(languages=("qu",), tasks=("xcopa",))
    for part in ("cells",):
        study[part] += extra[part]  # type: ignore[literal-required]
    study["languages"] |= extra["languages"]
    table = contents.overview(study)
    assert "Quechua*" in table.column("name") and "Swahili" in table.column("name")
    assert any("Quechua*: " in line and "xcopa" in line for line in table.legend)
    drawn = plots_speed.heat_map(study)
    assert isinstance(drawn, Drawing) and "Quechua*: " in drawn.caption
    scattered = plots_speed.fertility(study)
    assert isinstance(scattered, Drawing) and "Without: Quechua" in scattered.caption


def test_a_single_visit_has_no_interval() -> None:
    study = summary.document_of(made_up.records(rounds=1), Path("made up"))
    for table in contents.tables(study):
        for name in (column.key for column in table.columns if column.key.endswith(("low95", "low90"))):
            if table.key in ("languages", "arms"):
                assert set(table.column(name)) == {None}, (table.key, name)


def test_a_part_in_which_the_control_differs_as_much_says_nothing() -> None:
    arm = builder.equivalence("latency", INTERMEDIATE, 0.983, 0.001)
    for ratio, noise, alike in ((0.985, 0.004, True), (1.02, 0.004, True), (1.004, 0.001, False), (1.0, 0.03, False)):
        assert view.like_the_control(arm, [builder.equivalence("latency", CONTROL, ratio, noise)]) == alike
    assert not view.like_the_control(arm, [builder.equivalence("throughput", CONTROL, 0.98, 0.001)])


def test_notes_say_what_chance_and_the_control_do() -> None:
    def one(scope: str, name: str, ratio: float, verdict: str) -> Any:
        return {**builder.equivalence(scope, name, ratio, 0.001), "verdict": verdict}

    tests = [
        one("all", CONTROL, 1.0, "equivalent"),
        one("all", INTERMEDIATE, 1.0, "equivalent"),
        one("latency", INTERMEDIATE, 0.99, "different"),
        one("latency", CONTROL, 0.99, "different"),
        *(one(code, INTERMEDIATE, 1.01 if code == "tl" else 1.0, "different") for code in ("tl", "sw", "yo", "te")),
    ]
    text = " ".join(equivalence.notes(Settings(), tests))
    assert "The control differs as much in: latency" in text
    assert "Of 4 languages that are tested one by one, at most about 0.2 differ by chance alone." in text


def test_another_version_or_number_of_threads_is_no_silent_change(tmp_path: Path) -> None:
    here = machine()
    settings = Settings()
    Store(tmp_path, settings, here, resume=False).close()
    with pytest.raises(InvalidOptionError, match=r"another machine \(threads: "):
        Store(tmp_path, settings, {**here, "threads": 99}, resume=True)
    with pytest.raises(InvalidOptionError, match=r"another machine \(gpu: "):
        Store(tmp_path, settings, {**here, "gpu": "another"}, resume=True)
    newer = {**here, "versions": {**here["versions"], "torch": "9.9"}}
    store = Store(tmp_path, settings, newer, resume=True)
    assert store.records[-1]["text"].startswith("Continued with torch 9.9; it was begun with ")
    store.close()


def test_words_that_were_cut_off_are_not_counted(data_dir: Path) -> None:
    """Candidates of LAReQA are pairs with their paragraph, whose end is cut: in Hindi a fifth of it."""
    from xfast.benchmarks import workloads

    texts = Texts(Settings(tasks=("lareqa", "udpos"), data=str(data_dir)))
    long, short = (texts.work(task, "hi", 64, workloads.XLMR) for task in ("lareqa", "udpos"))
    for work, specials in ((long, 4), (short, 2)):
        tokens = sum(len(ids) - specials for example in work.examples for ids in example)
        assert work.words and work.fertility and work.words == pytest.approx(tokens / work.fertility, rel=0.01)


def test_options_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="limit: 0"):
        Settings(limit=0)
    for engine in ("stock:int8", "stock:fp8"):
        with pytest.raises(InvalidOptionError, match="transformers itself runs"):
            Settings(engines=(engine,))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOptionError, match="path: cannot write"):
        save_profiles([], tmp_path / "file" / "p.json", tokenizer="t", measured="m", date="2026-01-01")


def test_two_arms_of_a_checkpoint_without_a_pooler_have_the_same_weights(tmp_path: Path) -> None:
    random_model("tiny").save_pretrained(tmp_path)
    one, other = (arms.with_head(load_model(str(tmp_path)), "xcopa", seed=3).state_dict() for _ in range(2))
    assert "roberta.pooler.dense.weight" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_languages_that_were_found_since_need_a_study_of_their_own(tmp_path: Path) -> None:
    """Their probes and scores would never be measured."""
    all_of_them, path = load_profiles(), tmp_path / "profiles.json"

    def planned(*languages: str) -> Plan:
        chosen = [one for one in all_of_them if one.task == "xnli" and one.language in languages]
        save_profiles(chosen, path, tokenizer="t", measured="m", date="2026-01-01")
        return run.plan(settings, Texts(settings), output=tmp_path)

    settings = Settings(sizes=("tiny",), tasks=("xnli",), profiles=str(path), engines=("native:int8",))
    first = planned("sw", "ur")
    for plan in (first, planned("sw")):
        store = Store(tmp_path / "study", settings, machine(), resume=plan is not first)
        run._prepare(plan, store)
        store.close()
    store = Store(tmp_path / "study", settings, machine(), resume=True)
    with pytest.raises(InvalidOptionError, match="xnli in vi was not in the data or profiles when it was begun"):
        run._prepare(planned("sw", "vi"), store)
    store.close()


def test_rates_are_never_written_with_an_exponent() -> None:
    assert [answer._rate(value) for value in (999.4, 999.7, 12.345, 123456.0)] == ["999", "1000", "12.3", "123,456"]
