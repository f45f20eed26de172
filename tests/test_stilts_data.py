"""Where examples come from: folders with one alternative or another, the user's files, and Hub datasets as parquet."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from xfast.errors import BackendUnavailableError, DataFileError, InvalidOptionError
from xfast.stilts import data, readers
from xfast.stilts.data import Source
from xfast.stilts.examples import (
    Answer,
    ChoiceExample,
    Examples,
    MatchExample,
    PairExample,
    SpanExample,
    TaggedExample,
)
from xfast.stilts.tasks import TASKS, get


def write(path: Path, content: Any) -> Path:
    """Text, JSON lines (a list for ``.jsonl``) or a JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def nli(text: str, label: str) -> dict[str, str]:
    return {"sentence1": text, "sentence2": "h", "gold_label": label}


def firsts(examples: Examples[Any]) -> list[str]:
    return [example.first for example in examples.items]


# --- folders --------------------------------------------------------------------------------------


def test_alternatives_are_tried_in_order_and_xtreme_may_lie_inside_or_be_the_folder(tmp_path: Path) -> None:
    source, task = Source(tmp_path), get("mnli")
    assert not source.has(task, "train") and source.paths(task, "train") is None
    found = []
    for name, content in (
        ("xnli/train-en.tsv", "root\th\tneutral\n"),
        ("xtreme/xnli/train-en.tsv", "inside\th\tneutral\n"),
        ("intermediate/mnli/mnli_train.jsonl", [nli("jiant", "neutral")]),
        ("intermediate/mnli/multinli_1.0_train.jsonl", [nli("original", "entailment"), nli("p", "-")]),
    ):
        write(tmp_path / name, content)
        assert source.has(task, "train")
        found.append(source.load(task, "train"))
    assert [firsts(examples) for examples in found] == [["root"], ["inside"], ["jiant"], ["original"]]
    assert found[3].skipped == Counter({readers.UNLABELLED: 1}) and not found[2].skipped


def test_an_alternative_counts_when_all_its_files_are_there(tmp_path: Path) -> None:
    source, task = Source(tmp_path), get("anli")
    row = {"context": "p", "hypothesis": "h", "label": "n"}
    for part in (1, 2):
        write(tmp_path / f"intermediate/anli/R{part}/train.jsonl", [{**row, "context": f"R{part}"}])
    assert not source.has(task, "train")
    with pytest.raises(DataFileError, match=r"R1/train\.jsonl \+ .*R2/train\.jsonl \+ .*R3/train\.jsonl; published at"):
        source.load(task, "train")
    write(tmp_path / "intermediate/anli/R3/train.jsonl", [{**row, "context": "R3"}, row])
    assert firsts(source.load(task, "train")) == ["R1", "R2", "R3", "p"]


def test_anli_plus_joins_its_parts_and_counts_what_they_left_out(tmp_path: Path) -> None:
    source, task = Source(tmp_path), get("anli_plus")
    write(tmp_path / "intermediate/snli/snli_1.0_train.jsonl", [nli("s", "neutral"), nli("?", "-"), nli("?", "-")])
    write(tmp_path / "intermediate/mnli/multinli_1.0_train.jsonl", [nli("m", "contradiction"), nli("?", "-")])
    for part in (1, 2):
        write(
            tmp_path / f"intermediate/anli/R{part}/train.jsonl",
            [{"context": f"a{part}", "hypothesis": "h", "label": "e"}],
        )
    assert not source.has(task, "train")
    with pytest.raises(DataFileError, match=r"^anli train en: not found"):
        source.load(task, "train")
    write(tmp_path / "intermediate/anli/R3/train.jsonl", [{"context": "a3", "hypothesis": "h", "label": "c"}])
    assert source.has(task, "train") and not source.has(task, "dev")
    found = source.load(task, "train")
    assert firsts(found) == ["s", "m", "a1", "a2", "a3"] and found.skipped == Counter({readers.UNLABELLED: 3})
    assert [e.label for e in found.items] == ["neutral", "contradiction", "entailment", "entailment", "contradiction"]
    one = Source(tmp_path, files={"anli_plus": {"train": [write(tmp_path / "own.tsv", "o\th\tneutral\n")]}})
    assert firsts(one.load(task, "train")) == ["o"]
    part = Source(tmp_path, files={"mnli": {"train": [tmp_path / "own.tsv"]}})
    assert firsts(part.load(task, "train")) == ["s", "o", "a1", "a2", "a3"]


def test_gold_files_of_the_folder_join_its_unlabelled_files_alone(tmp_path: Path) -> None:
    source = Source(tmp_path)
    write(tmp_path / "xtreme/udpos/test-sw.tsv", "a\nb\n\nc\n")
    assert [e.tags for e in source.load(get("udpos"), "test", "sw").items] == [None, None]
    write(tmp_path / "xtreme/labels/udpos/test-sw.tsv", "NOUN\nVERB\n\nADJ\n")
    assert [e.tags for e in source.load(get("udpos"), "test", "sw").items] == [("NOUN", "VERB"), ("ADJ",)]
    write(tmp_path / "xnli/test-sw.tsv", "a\tb\nc\td\n")
    write(tmp_path / "labels/xnli/test-sw.tsv", "neutral\nentailment\n")
    assert [e.label for e in source.load(get("xnli"), "test", "sw").items] == ["neutral", "entailment"]
    write(tmp_path / "xcopa/test-sw.jsonl", [{"premise": "p", "choice1": "a", "choice2": "b", "question": "cause"}])
    write(tmp_path / "labels/xcopa/test-sw.jsonl", [{"label": 1}])
    assert [e.label for e in source.load(get("xcopa"), "test", "sw").items] == [1]
    # XTREME wrote zeros over these labels: withheld, not gold
    withheld = {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    for language in ("et", "id"):
        write(tmp_path / f"xcopa/test-{language}.jsonl", [withheld] * 20)
    write(tmp_path / "labels/xcopa/test-et.jsonl", [{"label": 1}] * 20)
    labels = [{e.label for e in source.load(get("xcopa"), "test", language).items} for language in ("et", "id")]
    assert labels == [{1}, {None}]
    # a file that has labels keeps them, and the user's file is not this gold's
    write(tmp_path / "xnli/test-sw.tsv", "a\tb\tcontradiction\nc\td\tcontradiction\n")
    assert {e.label for e in source.load(get("xnli"), "test", "sw").items} == {"contradiction"}
    own = write(tmp_path / "own.tsv", "x\ty\nz\tz\n")
    named = Source(tmp_path, files={"xnli": {"test": [own]}}).load(get("xnli"), "test", "sw")
    assert [(e.first, e.label) for e in named.items] == [("x", None), ("z", None)]


def test_real_test_sets_get_their_gold(data_dir: Path) -> None:
    examples = Source(data_dir).load(get("udpos"), "test", "te")
    assert len(examples) > 50 and all(len(e.words) == len(e.tags) for e in examples.items)
    assert {tag for e in examples.items for tag in e.tags} <= set(get("udpos").labels)
    withheld = Source(data_dir).load(get("panx"), "test", "sw")
    assert len(withheld) > 50 and all(e.tags is None for e in withheld.items)


def test_named_files_come_first_each_language_from_its_own(tmp_path: Path) -> None:
    for language in ("sw", "tr"):
        write(tmp_path / f"mine/{language}.tsv", f"{language}\th\tneutral\n")
        write(tmp_path / f"xnli/dev-{language}.tsv", "folder\th\tneutral\n")
    pattern = str(tmp_path / "mine/{language}.tsv")
    source, task = Source(tmp_path, files={"xnli": {"dev": [pattern]}}), get("xnli")
    assert [firsts(source.load(task, "dev", language)) for language in ("sw", "tr")] == [["sw"], ["tr"]]
    assert source.has(task, "dev", "sw") and not source.has(task, "dev", "ar")
    # another name that is wrong is no missing language: loading says what is wrong
    wrong = Source(tmp_path, files={"xnli": {"dev": ["/nowhere/dev.tsv"]}})
    assert wrong.has(task, "dev", "sw")
    with pytest.raises(DataFileError, match=r"/nowhere/dev\.tsv: cannot be read"):
        wrong.load(task, "dev", "sw")
    two = Source(files={"xnli": {"dev": [tmp_path / "mine/tr.tsv", tmp_path / "mine/sw.tsv"]}})
    assert firsts(two.load(task, "dev")) == ["tr", "sw"]


def test_conllu_works_for_every_tagging_task(tmp_path: Path) -> None:
    rows = "".join(f"{i}\t{word}\t_\t{tag}" + "\t_" * 6 + "\n" for i, word, tag in ((1, "a", "NOUN"), (2, "b", "VERB")))
    path = write(tmp_path / "tree.conllu", rows + "\n")
    (found,) = Source(files={"udpos": {"dev": [path]}}).load(get("udpos"), "dev", "yo").items
    assert found.words == ("a", "b") and found.tags == ("NOUN", "VERB")


def test_what_cannot_be_loaded_is_a_typed_error(tmp_path: Path) -> None:
    source = Source(tmp_path)
    with pytest.raises(InvalidOptionError, match="split: 'validation' is not accepted; accepted: train, dev, test"):
        source.load(get("mnli"), "validation")
    with pytest.raises(InvalidOptionError, match="tatoeba has sentence files"):
        source.load(get("tatoeba"), "test")
    with pytest.raises(DataFileError, match="xquad: the task has no train split; it has test"):
        source.load(get("xquad"), "train")
    with pytest.raises(DataFileError, match="mlm: the task has no train split; it has none"):
        source.load(get("mlm"), "train")
    with pytest.raises(
        DataFileError, match=rf"xnli dev sw: not found in {tmp_path}: xnli/dev-sw\.tsv; published at https"
    ):
        source.load(get("xnli"), "dev", "sw")
    with pytest.raises(DataFileError, match=r"not found in no data folder given: intermediate/qqp/dev\.tsv or "):
        Source().load(get("qqp"), "dev")


def test_lareqa_pairs_a_question_with_the_sentence_that_holds_its_answer(tmp_path: Path) -> None:
    context = "It rained. The U.S. Army came! Who knew?\nNobody in St. Louis did. The end"
    wanted = {
        "rained": "It rained.",
        "U.S. Army": "The U.S. Army came!",
        "Nobody": "Nobody in St.",  # a full stop ends a sentence, but not inside an answer
        "St. Louis": "Nobody in St. Louis did.",
        "end": "The end",
        "Who": "Who knew?",
    }
    questions = [
        {"id": answer, "question": f"{answer}?", "answers": [{"text": answer, "answer_start": context.index(answer)}]}
        for answer in wanted
    ]
    questions.append({"id": "none", "question": "?", "answers": []})
    path = write(tmp_path / "t.json", {"data": [{"paragraphs": [{"context": context, "qas": questions}]}]})
    found = Source(files={"lareqa": {"train": [path]}}).load(get("lareqa"), "train")
    assert {e.id: e.target for e in found.items} == wanted
    assert found.items[0] == MatchExample("rained", "rained?", "It rained.", context)
    assert found.skipped == Counter({"a question without an answer in its context": 1})


# --- the Hub --------------------------------------------------------------------------------------

NLI = ["entailment", "neutral", "contradiction"]
UPOS = [tag for tag in get("udpos").labels if tag != "_"]
BIO = list(get("panx").labels)
CONTEXT = "Dar es Salaam ni jiji kubwa"


def question(identity: str, answer: str, start: int) -> dict[str, Any]:
    answers = {"text": [answer] if answer else [], "answer_start": [start] if answer else []}
    return {"id": identity, "title": "t", "context": CONTEXT, "question": "q", "answers": answers}


def nli_rows(*labels: int) -> list[dict[str, Any]]:
    return [{"premise": f"p{n}", "hypothesis": "h", "label": label, "idx": n} for n, label in enumerate(labels)]


COPA = {"premise": "p", "choice1": "a", "choice2": "b", "question": "effect", "idx": 0}
CHOICES = {"label": ["A", "B", "C"], "text": ["x", "y", "z"]}
COSMOS = {"id": "1", "context": "c", "question": "q", **{f"answer{i}": f"a{i}" for i in range(4)}}
SIQA = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c"}
SWAG = {"ind": 4, "ctx_a": "A", "ctx_b": "b", "ctx": "A b", "endings": ["w", "x", "y", "z"], "split": "train"}

# Hub split -> rows with the Hub's own columns; names of integer labels by column; what comes out
HUB: dict[str, tuple[str, str, dict[str, list[dict[str, Any]]], dict[str, list[str]], list[Any]]] = {
    "mnli": ("dev", "en", {"validation_matched": nli_rows(0, 1, 2)}, {"label": NLI}, NLI),
    "snli": ("train", "en", {"train": nli_rows(2, -1, 0, -1)}, {"label": NLI}, ["contradiction", "entailment"]),
    "anli": ("train", "en", {f"train_r{i + 1}": nli_rows(i) for i in range(3)}, {"label": NLI}, NLI),
    "qqp": (
        *("dev", "en"),
        {"validation": [{"question1": "a", "question2": "b", "label": i, "idx": i} for i in (1, 0)]},
        {"label": ["not_duplicate", "duplicate"]},
        ["1", "0"],
    ),
    "xnli": ("test", "sw", {"test": nli_rows(1, 2)}, {"label": NLI}, ["neutral", "contradiction"]),
    "pawsx": (
        *("test", "ko"),
        {"test": [{"id": i, "sentence1": "a", "sentence2": "b", "label": i} for i in (1, 0)]},
        {"label": ["0", "1"]},
        ["1", "0"],
    ),
    "hellaswag": ("train", "en", {"train": [{**SWAG, "label": "3"}, {**SWAG, "label": ""}]}, {}, [3, None]),
    "cosmosqa": ("dev", "en", {"validation": [{**COSMOS, "label": 2}, {**COSMOS, "label": -1}]}, {}, [2, None]),
    "commonsenseqa": (
        *("dev", "en"),
        {"validation": [{"id": "1", "question": "q", "choices": CHOICES, "answerKey": key} for key in ("C", "")]},
        {},
        [2, None],
    ),
    "siqa": ("dev", "en", {"validation": [{**SIQA, "label": key} for key in ("1", "2", "3")]}, {}, [0, 1, 2]),
    "copa": ("train", "en", {"train": [{**COPA, "label": 1}]}, {"label": ["choice1", "choice2"]}, [1]),
    "xcopa": ("test", "qu", {"test": [{**COPA, "label": 0, "changed": False}]}, {}, [0]),
    "squad_v1": ("train", "en", {"train": [question("1", "jiji", 17)]}, {}, [("1", ("jiji", 17), False)]),
    "squad_v2": (
        *("dev", "en"),
        {"validation": [question("1", "jiji", 17), question("2", "", 0)]},
        {},
        [("1", ("jiji", 17), False), ("2", None, True)],
    ),
    "xquad": ("test", "ar", {"validation": [question("1", "jiji", 3)]}, {}, [("1", ("jiji", 17), False)]),  # moved
    "mlqa": (
        "dev",
        "hi",
        {"validation": [{**question("1", "", 0), "answers": [{"text": "kubwa", "answer_start": 22}]}]},
        {},
        [("1", ("kubwa", 22), False)],
    ),
    "tydiqa": (
        *("train", "sw"),
        {"train": [question("swahili-1-0", "jiji", 17), question("thai-1-0", "jiji", 17)]},
        {},
        [("swahili-1-0", ("jiji", 17), False)],
    ),
    "udpos": (
        *("test", "yo"),
        {"test": [{"tokens": ["a", "b"], "pos_tags": [7, 15]}]},
        {"pos_tags": UPOS},
        [("NOUN", "VERB")],
    ),
    "panx": (
        *("dev", "sw"),
        {"validation": [{"tokens": ["a", "b"], "ner_tags": [3, 0], "langs": ["sw", "sw"]}]},
        {"ner_tags": BIO},
        [("B-ORG", "O")],
    ),
}
SKIPPED = {
    "snli": {readers.UNLABELLED: 2},
    "xquad": {readers.ANSWER_MOVED: 1},
    "tydiqa": {readers.OTHER_LANGUAGE: 1},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``datasets`` with its cache in this test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def rows_of(datasets: Any, rows: list[dict[str, Any]], names: Mapping[str, list[str]]) -> Any:
    """A dataset in memory whose integer labels have names."""
    found = datasets.Dataset.from_list(rows)
    for column, classes in names.items():
        label = datasets.ClassLabel(names=classes)
        found = found.cast_column(column, datasets.Sequence(label) if isinstance(rows[0][column], list) else label)
    return found


def folder_of(datasets: Any, folder: Path, splits: Mapping[str, Any], names: Mapping[str, list[str]]) -> str:
    for split, rows in splits.items():
        rows_of(datasets, rows, names).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def essence(example: Any) -> Any:
    """What the table above says of an example."""
    if isinstance(example, SpanExample):
        answers = [(answer.text, answer.start) for answer in example.answers]
        assert (example.context, example.question) == (CONTEXT, "q") and len(answers) < 2
        return example.id, answers[0] if answers else None, example.impossible
    return example.tags if isinstance(example, TaggedExample) else example.label


def test_every_task_on_the_hub_is_in_the_table() -> None:
    assert set(HUB) == {name for name, task in TASKS.items() if task.hub is not None}


@pytest.mark.parametrize("name", HUB)
def test_hub_rows_become_examples(name: str, hub: Any, tmp_path: Path) -> None:
    split, language, splits, names, wanted = HUB[name]
    source = Source(hub={name: folder_of(hub, tmp_path / "set", splits, names)})
    assert source.has(get(name), split, language)
    found = source.load(get(name), split, language)
    assert [essence(example) for example in found.items] == wanted
    assert found.skipped == Counter(SKIPPED.get(name, {}))


def test_hub_texts_are_those_of_the_file_readers(hub: Any, tmp_path: Path) -> None:
    def first(name: str) -> Any:
        split, language, splits, names, _ = HUB[name]
        return data.load_hub(get(name), split, language, folder_of(hub, tmp_path / name, splits, names)).items[0]

    pair = first("qqp")
    assert isinstance(pair, PairExample) and (pair.first, pair.second) == ("a", "b")
    choices = {name: first(name) for name in ("hellaswag", "cosmosqa", "commonsenseqa", "siqa", "xcopa")}
    assert all(isinstance(example, ChoiceExample) for example in choices.values())
    assert {name: (example.prompt, example.choices) for name, example in choices.items()} == {
        "hellaswag": ("A", ("b w", "b x", "b y", "b z")),
        "cosmosqa": ("c q", ("a0", "a1", "a2", "a3")),
        "commonsenseqa": ("q", ("x", "y", "z")),
        "siqa": ("c q", ("a", "b", "c")),
        "xcopa": ("p What was the effect?", ("a", "b")),
    }
    assert first("squad_v2").answers == (Answer("jiji", 17),)


@pytest.mark.parametrize(
    ("name", "rows", "names", "wanted"),
    [
        ("mnli", nli_rows(0, 1, 2), {"label": ["neutral", "contradiction", "entailment"]}, [NLI[i] for i in (1, 2, 0)]),
        ("mnli", nli_rows(0, 1, 2), {"label": ["e", "n", "contradictory"]}, NLI),
        ("mnli", nli_rows(0, 1, 2), {}, NLI),  # numbers without names are in the order of the task's own dataset
        ("mnli", [{**row, "label": NLI[row["label"]]} for row in nli_rows(2, 0)], {}, ["contradiction", "entailment"]),
        ("qqp", nli_rows(0, 1), {"label": ["duplicate", "not_duplicate"]}, ["1", "0"]),
        ("panx", [{"tokens": ["a", "b"], "ner_tags": [0, 6]}], {"ner_tags": BIO[::-1]}, [("I-LOC", "O")]),
        ("panx", [{"tokens": ["a"], "ner_tags": ["B-PER"]}], {}, [("B-PER",)]),
    ],
)
def test_labels_go_by_name(name: str, rows: Any, names: Any, wanted: Any, hub: Any, tmp_path: Path) -> None:
    if name == "qqp":
        rows = [{"question1": row["premise"], "question2": "h", "label": row["label"]} for row in rows]
    split = {"mnli": "validation_matched"}.get(name, "validation")
    found = data.load_hub(get(name), "dev", "en", folder_of(hub, tmp_path / "set", {split: rows}, names))
    assert [essence(example) for example in found.items] == wanted


@pytest.mark.parametrize(
    ("name", "rows", "names", "message"),
    [
        ("mnli", nli_rows(0), {"label": ["LABEL_0", "LABEL_1"]}, r"\[0\]: label 'LABEL_0'; accepted: contradiction"),
        ("mnli", nli_rows(0, 3), {}, r"\[1\]: label 3; accepted: 0 to 2: entailment"),
        ("mnli", [{"text": "a", "label": 0}], {}, r"\[0\]: no column premise or sentence1"),
        ("squad_v1", [{"id": "1", "context": "c", "question": "q"}], {}, r"\[0\]: no column answers; the row has id"),
        (
            "squad_v1",
            [{"id": "1", "answers": {"text": ["a"]}}],
            {},
            r"\[0\]: answers .*expected a text and an answer_st",
        ),
        ("squad_v1", [{"id": "1", "answers": ["a"]}], {}, r"\[0\]: answers \['a'\]; expected"),
        ("squad_v1", [{"id": "1", "context": "c", "answers": []}], {}, r"\[0\]: no column question"),
        ("panx", [{"tokens": ["a"], "ner_tags": [0]}], {}, r"\[0\]: 1 words, tags \(0,\)"),
        ("panx", [{"tokens": ["a"], "ner_tags": [-1]}], {"ner_tags": BIO}, r"\[0\]: 1 words, tags \(-1,\)"),
        ("panx", [{"tokens": ["a"], "ner_tags": [0, 0]}], {"ner_tags": BIO}, r"\[0\]: 1 words, tags \('O', 'O'\)"),
        ("panx", [{"words": ["a"], "ner_tags": [0]}], {"ner_tags": BIO}, r"\[0\]: no column tokens"),
    ],
)
def test_other_columns_and_labels_are_typed_errors(
    name: str, rows: Any, names: Any, message: str, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: rows_of(hub, rows, names))
    split = {"squad_v1": "dev"}.get(name, "dev")
    with pytest.raises(DataFileError, match=message):
        Source(hub={name: ""}).load(get(name), split)


def test_names_and_configurations_on_the_hub(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        raise ConnectionError("offline")

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    for name, own, split, language in [
        ("mnli", "", "dev", "en"),
        ("mnli", "me/glue", "train", "en"),
        ("anli", "", "dev", "en"),
        ("xnli", "", "test", "sw"),
        ("udpos", "", "train", "yo"),
        ("panx", "", "test", "yo"),
        ("mlqa", "", "dev", "ar"),
        ("xquad", "", "test", "th"),
        ("tydiqa", "", "test", "sw"),
    ]:
        with pytest.raises(DataFileError, match="offline"):
            Source(hub={name: own}).load(get(name), split, language)
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("me/glue", "mnli", "train"),
        ("facebook/anli", None, "dev_r1+dev_r2+dev_r3"),
        ("facebook/xnli", "sw", "test"),
        ("google/xtreme", "udpos.Yoruba", "train"),
        ("google/xtreme", "PAN-X.yo", "test"),
        ("google/xtreme", "MLQA.ar.ar", "validation"),
        ("google/xquad", "xquad.th", "validation"),
        ("google-research-datasets/tydiqa", "secondary_task", "validation"),
    ]


def test_the_hub_the_users_files_and_joined_tasks(hub: Any, tmp_path: Path) -> None:
    _, _, splits, names, _ = HUB["mnli"]
    folder = folder_of(hub, tmp_path / "set", {**splits, "train": nli_rows(0)}, names)
    own = write(tmp_path / "own.tsv", "own\th\tneutral\n")
    write(tmp_path / "xnli/train-en.tsv", "folder\th\tneutral\n")
    source = Source(tmp_path, {"mnli": {"dev": [own]}}, {"mnli": folder})
    assert firsts(source.load(get("mnli"), "dev")) == ["own"]
    assert firsts(source.load(get("mnli"), "train")) == ["p0"]
    # a split that the Hub's dataset has not is not taken from elsewhere unasked
    assert not source.has(get("mnli"), "test")
    with pytest.raises(DataFileError, match="mnli test: known to no Hub dataset"):
        source.load(get("mnli"), "test")
    with pytest.raises(DataFileError, match="ccg train: known to no Hub dataset"):
        Source(hub={"ccg": ""}).load(get("ccg"), "train")


def test_a_joined_task_on_the_hub_is_its_parts(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load_dataset", lambda name, *_, **__: rows_of(hub, nli_rows(0, -1), {"label": NLI}))
    task = get("anli_plus")
    found = Source(hub={"anli_plus": ""}).load(task, "train")
    identities = [example.id.split(":")[0] for example in found.items if example.label]
    assert identities == ["stanfordnlp/snli", "nyu-mll/glue", "facebook/anli"]
    assert Source(hub={"anli_plus": ""}).has(task, "dev") and not Source(hub={"anli_plus": ""}).has(task, "test")
    with pytest.raises(InvalidOptionError, match="hub: anli_plus joins snli, mnli, anli: name the datasets of these"):
        Source(hub={"anli_plus": "me/all"}).load(task, "train")


def test_what_datasets_says_becomes_a_typed_error(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken" / "data").mkdir(parents=True)
    (tmp_path / "broken" / "data" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    (tmp_path / "empty").mkdir()
    folder = folder_of(hub, tmp_path / "set", {"train": nli_rows(0)}, {"label": NLI})
    for name, split in ((str(tmp_path / "broken"), "train"), (str(tmp_path / "empty"), "train"), (folder, "dev")):
        with pytest.raises(DataFileError, match=f"^{name}:"):
            data.load_hub(get("mnli"), split, "en", name)

    def script(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found social_i_qa.py")

    monkeypatch.setattr(hub, "load_dataset", script)
    with pytest.raises(DataFileError, match=r"allenai/social_i_qa:train: Dataset scripts .* a copy as parquet"):
        data.load_hub(get("siqa"), "train", "en")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendUnavailableError, match="pip install datasets"):
        data.load_hub(get("siqa"), "train", "en")
