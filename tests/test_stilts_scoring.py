"""Scores of whole prediction folders: the official script's own example, and made-up trees with every kind of fault."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts.languages import ISO3, NAMES, UDPOS_WITHOUT_DEV, XTREME, XTREME_R
from xfast.stilts.scoring import GROUPS, TARGETS, metric_of, score, score_file

# Averages over languages that the benchmark's own test expects of its example files.
OFFICIAL = {
    "pawsx": {"accuracy": 51.42857142857143},
    "xnli": {"accuracy": 30.666666666666668},
    "panx": {"f1": 57.50793650793652, "precision": 54.729166666666664, "recall": 62.750000000000014},
    "udpos": {"f1": 70.21746048354693, "precision": 71.02232625883823, "recall": 69.54982073976082},
    "bucc2018": {"f1": 55.0, "precision": 55.0, "recall": 55.0},
    "tatoeba": {"accuracy": 53.611111111111114},
    "xquad": {"exact_match": 77.27272727272727, "f1": 79.9586776859504},
    "mlqa": {"exact_match": 57.142857142857146, "f1": 81.76870748299321},
    "tydiqa": {"exact_match": 88.88888888888889, "f1": 97.22222222222223},
}


@pytest.fixture(scope="module")
def official(data_dir: Path) -> Path:
    return data_dir / "xtreme" / "mock_test_data"


@pytest.fixture(scope="module")
def result(official: Path) -> dict[str, Any]:
    return score(official / "predictions", official / "labels")


def _task_score(task: str) -> float:
    averages = OFFICIAL[task]
    if "exact_match" in averages:
        return (averages["exact_match"] + averages["f1"]) / 2
    return averages.get("accuracy", averages.get("f1", -1.0))


@pytest.mark.parametrize("task", list(OFFICIAL))
def test_the_official_averages_come_out(result: dict[str, Any], task: str) -> None:
    block = result["tasks"][task]
    found = {name: block["metrics"][name]["average"] for name in OFFICIAL[task]}
    assert found == pytest.approx(OFFICIAL[task], abs=1e-9)
    assert block["score"] == pytest.approx(_task_score(task), abs=1e-9)
    assert tuple(block["languages"]) == XTREME[task]
    assert block["score"] == pytest.approx(fmean(block["languages"].values()), abs=1e-9)


def test_group_and_overall_scores_are_means_of_tasks(result: dict[str, Any]) -> None:
    groups = {
        "classification": ["pawsx", "xnli"],
        "tagging": ["udpos", "panx"],
        "qa": ["xquad", "mlqa", "tydiqa"],
        "retrieval": ["bucc2018", "tatoeba"],
    }
    expected = {group: fmean(map(_task_score, tasks)) for group, tasks in groups.items()}
    assert result["groups"] == pytest.approx(expected, abs=1e-9)
    assert result["overall"] == pytest.approx(fmean(map(_task_score, OFFICIAL)), abs=1e-9)
    assert result["benchmark"] == "xtreme"
    assert result["missing_tasks"] == [] and result["missing_languages"] == {}


def test_part_of_speech_blocks_carry_the_accuracy_of_words_too(result: dict[str, Any]) -> None:
    metrics = result["tasks"]["udpos"]["metrics"]
    assert set(metrics) == {"f1", "precision", "recall", "token_accuracy"}
    assert metrics["token_accuracy"]["average"] > metrics["f1"]["average"]
    assert set(result["tasks"]["xquad"]["metrics"]) == {"exact_match", "f1"}


def test_mewslix_of_the_official_example_is_the_mean_reciprocal_rank(official: Path) -> None:
    result = score(official / "predictions", official / "labels", "xtreme-r", allow_missing=True)
    by_language = {}
    for language in XTREME_R["mewslix"]:
        name = f"mewslix/test-{language}.json"
        gold = json.loads((official / "labels" / name).read_text(encoding="utf-8"))
        ranked = json.loads((official / "predictions" / name).read_text(encoding="utf-8"))
        ranks = [
            ranked[query].index(items[0]) + 1 if items[0] in ranked[query] else None for query, items in gold.items()
        ]
        by_language[language] = 100 * fmean(0.0 if rank is None else 1 / rank for rank in ranks)
    assert len(set(by_language.values())) > 5  # else any order of the languages would do
    assert result["tasks"]["mewslix"]["languages"] == pytest.approx(by_language, abs=1e-9)
    assert result["tasks"]["mewslix"]["score"] == pytest.approx(fmean(by_language.values()), abs=1e-9)
    assert set(result["missing_tasks"]) == {"xcopa", "lareqa"} and result["overall"] is None
    assert result["missing_languages"]["xquad"] == ["ro"]
    assert result["groups"]["retrieval"] is None and result["groups"]["qa"] is not None


def test_a_missing_language_of_the_official_example_is_an_error(official: Path) -> None:
    with pytest.raises(DataFileError, match=r"predictions.*test-lt\.tsv and .*labels.*test-lt\.tsv: missing"):
        score(official / "predictions", official / "labels", "xtreme-r")


# --- made-up trees --------------------------------------------------------------------------------


def _squad(answers: dict[str, list[str]]) -> dict[str, Any]:
    qas = [{"id": i, "question": "?", "answers": [{"text": t} for t in texts]} for i, texts in answers.items()]
    return {"version": "1.1", "data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}


def _contents(task: str, half: bool) -> tuple[str, str]:
    """(predictions, labels) of one language that score 100, or 50."""
    suffix, second = metric_of(task).suffix, "wrong" if half else "right"
    if task in ("udpos", "panx"):
        tags = ("NOUN", "VERB", "NUM") if task == "udpos" else ("B-PER", "B-LOC", "B-ORG")
        return f"{tags[0]}\n\n{tags[2] if half else tags[1]}\n", f"{tags[0]}\n\n{tags[1]}\n"
    if task == "bucc2018":
        return f"s-1\tt-1\ns-2\t{second}\n", "s-1\tt-1\ns-2\tright\n"
    if suffix == "tsv":
        return f"right\n{second}\n", "right\nright\n"
    if suffix == "jsonl":
        return "\n".join(json.dumps({"label": n}) for n in (1, int(half))), '{"label": 1}\n{"label": 0}\n'
    if task in ("lareqa", "mewslix"):
        return json.dumps({"q": ["right"], "r": [second]}), json.dumps({"q": ["right"], "r": ["right"]})
    return json.dumps({"q": "right", "r": second}), json.dumps(_squad({"q": ["right"], "r": ["right"]}))


def _write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def _tree(folder: Path, benchmark: str, tasks: Iterable[str]) -> tuple[Path, Path]:
    """Every second language of every task scores 50, the others 100."""
    languages = XTREME if benchmark == "xtreme" else XTREME_R
    for task in tasks:
        for index, language in enumerate(languages[task]):
            contents = _contents(task, half=index % 2 == 1)
            for side, content in zip(("predictions", "labels"), contents, strict=True):
                _write(folder / side, f"{task}/test-{language}.{metric_of(task).suffix}", content)
    return folder / "predictions", folder / "labels"


def _expected(benchmark: str, task: str) -> float:
    count = len((XTREME if benchmark == "xtreme" else XTREME_R)[task])
    return 100 - 50 * (count // 2) / count


@pytest.mark.parametrize("name", ["xtreme", "xtreme-r"])
def test_a_complete_benchmark_has_an_overall_score(tmp_path: Path, name: str) -> None:
    result = score(*map(str, _tree(tmp_path, name, TARGETS[name])), name)
    expected = {task: _expected(name, task) for task in TARGETS[name]}
    assert {task: block["score"] for task, block in result["tasks"].items()} == pytest.approx(expected, abs=1e-9)
    assert len(expected) == (9 if name == "xtreme" else 10)
    assert result["overall"] == pytest.approx(fmean(expected.values()), abs=1e-9)
    assert result["missing_tasks"] == [] and result["missing_languages"] == {}
    for group, tasks in GROUPS[name].items():
        assert result["groups"][group] == pytest.approx(fmean(expected[task] for task in tasks), abs=1e-9)
    json.dumps(result, allow_nan=False)


def test_every_task_of_a_benchmark_is_in_one_group() -> None:
    for benchmark, groups in GROUPS.items():
        members = [task for tasks in groups.values() for task in tasks]
        assert sorted(members) == sorted(TARGETS[benchmark])  # LAReQA counted, XCOPA once


def test_missing_tasks_leave_no_overall_score(tmp_path: Path) -> None:
    predictions, labels = _tree(tmp_path, "xtreme", ["xnli", "pawsx", "xquad"])
    (labels / "xquad").rename(labels / "elsewhere")  # one folder alone is not enough
    result = score(predictions, labels)
    assert set(result["tasks"]) == {"xnli", "pawsx"}
    assert result["missing_tasks"] == ["udpos", "panx", "xquad", "mlqa", "tydiqa", "bucc2018", "tatoeba"]
    assert result["overall"] is None
    assert result["groups"]["classification"] == pytest.approx(
        fmean([_expected("xtreme", "xnli"), _expected("xtreme", "pawsx")])
    )
    assert result["groups"]["qa"] is None


def test_a_missing_language_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    predictions, labels = _tree(tmp_path, "xtreme", ["xnli"])
    (predictions / "xnli" / "test-sw.tsv").unlink()
    with pytest.raises(DataFileError) as caught:
        score(predictions, labels)
    assert str(predictions / "xnli" / "test-sw.tsv") in str(caught.value)
    assert "labels" not in str(caught.value)  # that file is there
    result = score(predictions, labels, allow_missing=True)
    assert result["missing_languages"] == {"xnli": ["sw"]}
    assert "sw" not in result["tasks"]["xnli"]["languages"] and len(result["tasks"]["xnli"]["languages"]) == 14
    # sw is the tenth language, one of the seven at 50.
    assert result["tasks"]["xnli"]["score"] == pytest.approx((8 * 100 + 6 * 50) / 14, abs=1e-9)


def test_a_task_without_any_language_is_missing(tmp_path: Path) -> None:
    predictions, labels = _tree(tmp_path, "xtreme", ["xnli"])
    (predictions / "mlqa").mkdir()
    (labels / "mlqa").mkdir()
    result = score(predictions, labels, allow_missing=True)
    assert result["missing_languages"] == {"mlqa": list(XTREME["mlqa"])}
    assert "mlqa" in result["missing_tasks"] and "mlqa" not in result["tasks"]


def test_folders_and_options_that_are_none(tmp_path: Path) -> None:
    predictions, labels = _tree(tmp_path, "xtreme", ["xnli"])
    with pytest.raises(InvalidOptionError, match=r"benchmark: 'glue' is not accepted; accepted: xtreme, xtreme-r"):
        score(predictions, labels, "glue")
    with pytest.raises(DataFileError, match="nowhere: no such folder"):
        score(predictions, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataFileError, match="no task in common; xtreme has xnli, pawsx"):
        score(tmp_path / "empty", labels)
    with pytest.raises(DataFileError, match="no task in common"):
        score(predictions / "xnli", labels)  # one level too deep


# --- one file -------------------------------------------------------------------------------------


def _score(folder: Path, task: str, predictions: str, labels: str, language: str = "en") -> dict[str, float]:
    suffix = metric_of(task).suffix
    files = [_write(folder, f"{side}.{suffix}", text) for side, text in (("guess", predictions), ("gold", labels))]
    return score_file(task, language, *files)


def test_line_ends_and_byte_order_marks_do_not_count(tmp_path: Path) -> None:
    mark = "\ufeff"
    assert _score(tmp_path, "xnli", f"{mark}neutral\r\nentailment\r\n", "neutral\nentailment") == {"accuracy": 100.0}
    tags = _score(tmp_path, "udpos", "NOUN\r\n\r\nVERB\r\n", f"{mark}NOUN\n\nVERB\n")
    assert tags["f1"] == tags["token_accuracy"] == 100.0
    answers = json.dumps(_squad({"q": ["right"]}), indent=1)
    assert _score(tmp_path, "xquad", f'{mark}{{"q":\r\n"right"}}', mark + answers)["exact_match"] == 100.0
    assert _score(tmp_path, "xcopa", f'{mark}{{"label": 1}}\r\n', '{"label": 1}')["accuracy"] == 100.0
    assert _score(tmp_path, "bucc2018", "a\tb\r\n", f"{mark}a\tb")["f1"] == 100.0
    assert _score(tmp_path, "mewslix", f'{mark}{{"q": ["Q1"]}}', '{"q": ["Q1"]}')["map@20"] == 100.0


@pytest.mark.parametrize("lines", [1, 3])
def test_a_wrong_number_of_lines_names_both_files(tmp_path: Path, lines: int) -> None:
    with pytest.raises(DataFileError, match=rf"guess\.tsv against .*gold\.tsv: predictions: {lines} for 2 examples"):
        _score(tmp_path, "xnli", "neutral\n" * lines, "neutral\nneutral\n")
    with pytest.raises(DataFileError, match=rf"{lines} for 2 examples"):
        _score(tmp_path, "xcopa", '{"label": 0}\n' * lines, '{"label": 0}\n' * 2)


def test_a_blank_line_ends_a_sentence_and_two_end_an_empty_one(tmp_path: Path) -> None:
    gold = "NOUN\nVERB\n\nNOUN\n"
    assert _score(tmp_path, "udpos", gold + "\n", gold)["f1"] == 100.0  # the last sentence may be ended or not
    with pytest.raises(DataFileError, match="predictions: 3 for 2 examples"):
        _score(tmp_path, "udpos", "NOUN\nVERB\n\n\nNOUN\n", gold)
    # Both alike: the empty sentence is one, as for the official reader.
    assert _score(tmp_path, "udpos", "NOUN\n\n\nNOUN\n", "NOUN\n\n\nNOUN\n")["f1"] == 100.0
    with pytest.raises(DataFileError, match="sentence 1 has 1 tags for 2 words"):
        _score(tmp_path, "udpos", "NOUN\n\nNOUN\n", gold)


def test_files_without_examples_are_errors(tmp_path: Path) -> None:
    answers = json.dumps({"data": []})
    for task, guess, gold in (
        ("xnli", "", ""),
        ("udpos", "", ""),
        ("bucc2018", "", ""),
        ("xquad", "{}", answers),
        ("mewslix", "{}", "{}"),
        ("xcopa", "", ""),
    ):
        with pytest.raises(DataFileError, match=r"gold\.\w+: gold: no "):
            _score(tmp_path, task, guess, gold)


def test_predictions_of_unknown_ids_change_nothing(tmp_path: Path) -> None:
    gold = json.dumps(_squad({"q": ["right"], "r": ["right"]}))
    few, many = '{"q": "right"}', '{"q": "right", "x": "right", "y": ""}'
    assert _score(tmp_path, "xquad", many, gold) == _score(tmp_path, "xquad", few, gold)
    assert _score(tmp_path, "xquad", few, gold) == {"exact_match": 50.0, "f1": 50.0}  # r, unanswered, counts 0
    ranking = '{"q": ["Q1"], "r": ["Q2"]}'
    assert _score(tmp_path, "lareqa", '{"q": ["Q0", "Q1"], "z": ["Q2"]}', ranking) == {"map@20": 25.0}


def test_mlqa_uses_the_rules_of_its_language(tmp_path: Path) -> None:
    gold = json.dumps(_squad({"q": ["der Hund"]}))
    assert _score(tmp_path, "mlqa", '{"q": "Hund"}', gold, "de") == {"exact_match": 100.0, "f1": 100.0}
    assert _score(tmp_path, "tydiqa", '{"q": "Hund"}', gold, "de")["exact_match"] == 0.0


def test_gold_may_be_a_bare_list_of_articles(tmp_path: Path) -> None:
    gold = json.dumps(_squad({"q": ["right"]})["data"])
    assert _score(tmp_path, "xquad", '{"q": "Right."}', gold)["exact_match"] == 100.0


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("xquad", '{"q": "right"', None, r"guess\.json:1: not JSON, perhaps truncated"),
        ("xquad", '{"q":\n"right",\n"r"', None, r"guess\.json:3: not JSON"),
        ("xquad", '["right"]', None, r"guess\.json: expected a JSON object by id, got list"),
        ("xquad", '{"q": null}', None, r"guess\.json: q: expected a text, got None"),
        ("xquad", '{"q": ["right"]}', None, r"q: expected a text, got \['right'\]"),
        (
            "xquad",
            "{}",
            '{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}',
            r"gold\.json: not SQuAD's format.*answers",
        ),
        ("xquad", "{}", '{"data": 3}', r"gold\.json: not SQuAD's format"),
        ("xquad", "{}", "7", r"gold\.json: not SQuAD's format"),
        ("xquad", '{"q": ""}', json.dumps(_squad({"q": [""]})), "question q has no answer; is the gold withheld"),
        ("xquad", "{}", json.dumps(_squad({"q": []})), "question q has no answer"),
        ("mewslix", '{"q": "Q1"}', '{"q": ["Q1"]}', "q: expected a list of ids, got 'Q1'"),
        ("mewslix", '{"q": ["Q1"]}', '{"q": "Q1"}', "q: expected a list of ids, got 'Q1'"),
        ("mewslix", '{"q": [1]}', '{"q": ["Q1"]}', r"q: expected a list of ids, got \[1\]"),
        ("lareqa", '{"q": ["Q1"]}', '{"q": []}', "a query without a right answer"),
        ("xcopa", '{"label": 1}\n{"label"', '{"label": 1}', r"guess\.jsonl:2: not JSON, perhaps truncated"),
        ("xcopa", '{"label": 1}\n{"idx": 1}', '{"label": 1}', r"guess\.jsonl:2: no column label; the row has idx"),
        ("xcopa", "1\n", '{"label": 1}', r"guess\.jsonl:1: expected a JSON object, got int"),
        ("bucc2018", "a\tb\nc d\n", "a\tb\n", r"guess\.tsv:2: expected two ids parted by a tab, got 'c d'"),
        ("bucc2018", "a\tb\n", "a\tb\t0.7\n", r"gold\.tsv:1: expected two ids"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, task: str, predictions: str, labels: str | None, message: str
) -> None:
    with pytest.raises(DataFileError, match=message):
        _score(tmp_path, task, predictions, labels or json.dumps(_squad({"q": ["right"]})))


def test_a_question_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    gold = _squad({"q": ["right"]})
    gold["data"] *= 2
    with pytest.raises(DataFileError, match=r"gold\.json: question q occurs twice"):
        _score(tmp_path, "xquad", '{"q": "right"}', json.dumps(gold))


def test_labels_of_xcopa_may_be_numbers_or_strings(tmp_path: Path) -> None:
    assert _score(tmp_path, "xcopa", '{"label": "1"}\n{"label": 0}', '{"label": 1}\n{"label": 1}')["accuracy"] == 50.0


def test_blank_lines_between_pairs_are_no_pairs(tmp_path: Path) -> None:
    # The official reader takes an empty line for a pair: the wrong pair below would then score 50.
    assert _score(tmp_path, "bucc2018", "a\tx\n\n", "a\tb\n\n")["f1"] == 0.0


def test_a_file_that_is_not_utf8_or_not_there(tmp_path: Path) -> None:
    gold = _write(tmp_path, "gold.tsv", "neutral\nneutral\n")
    guess = tmp_path / "guess.tsv"
    with pytest.raises(DataFileError, match=r"guess\.tsv: cannot be read: No such file"):
        score_file("xnli", "en", guess, gold)
    guess.write_bytes("neutral\nneutr\u00e9l\n".encode("latin-1"))
    with pytest.raises(DataFileError, match=r"guess\.tsv:2: not UTF-8"):
        score_file("xnli", "en", guess, gold)


# --- the tables of languages ----------------------------------------------------------------------


def test_the_languages_of_the_benchmarks() -> None:
    counts = {"xnli": 15, "pawsx": 7, "udpos": 33, "panx": 40, "xquad": 11, "mlqa": 7, "tydiqa": 9, "bucc2018": 4}
    assert {task: len(languages) for task, languages in XTREME.items()} == {**counts, "tatoeba": 36}
    counts_r = {"xnli": 15, "udpos": 38, "panx": 48, "xquad": 12, "mlqa": 7, "tydiqa": 9, "tatoeba": 41}
    counts_r |= {"xcopa": 11, "lareqa": 11, "mewslix": 11}
    assert {task: len(languages) for task, languages in XTREME_R.items()} == counts_r
    assert set(XTREME) == set(TARGETS["xtreme"]) and set(XTREME_R) == set(TARGETS["xtreme-r"])
    for table in (XTREME, XTREME_R):
        for task, languages in table.items():
            assert len(set(languages)) == len(languages), task
            assert set(languages) <= NAMES.keys()
    assert "en" not in XTREME["tatoeba"] and set(XTREME_R["tatoeba"]) <= ISO3.keys()
    assert len(set(ISO3.values())) == len(ISO3) and len(set(NAMES.values())) == len(NAMES)
    assert set(UDPOS_WITHOUT_DEV) < set(XTREME["udpos"])
