"""Readers on made-up files in every variant and with every kind of fault, and on the real data's row counts."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stilts

from xfast.errors import DataFileError
from xfast.stilts import readers
from xfast.stilts.examples import Answer, ChoiceExample, Examples, PairExample, SpanExample
from xfast.stilts.rows import MissingDataError, json_rows, lines
from xfast.stilts.task import Task
from xfast.stilts.tasks import TASKS, get

Write = Callable[..., Path]


write = pytest.fixture(stilts.write)


def read(path: Path, task: str, language: str = "en") -> Examples[Any]:
    return readers.READERS[get(task).reader](path, get(task), language)


def pairs(examples: Examples[PairExample]) -> list[tuple[str, str, str | None]]:
    return [(example.first, example.second, example.label) for example in examples.items]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mnli", "qqp", "squad_v2", "ccg", "udpos", "siqa", "cosmosqa", "mlm"])
def test_a_missing_file_a_folder_and_other_encodings_are_typed_errors(write: Write, tmp_path: Path, task: str) -> None:
    with pytest.raises(DataFileError, match=r"none: cannot be read: No such file"):
        read(tmp_path / "none", task)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataFileError, match=r"folder: cannot be read: Is a directory"):
        read(tmp_path / "folder", task)
    with pytest.raises(DataFileError, match=r"file/below: cannot be read: Not a directory"):
        read(write("file", "x") / "below", task)
    with pytest.raises(DataFileError, match=r"latin:1: not UTF-8 \(.* at byte 3 of it\)"):
        read(write("latin", "caf\u00e9".encode("latin-1").replace(b"caf", b"ca")), task)
    with pytest.raises(DataFileError, match=r"utf16:1: not UTF-8"):
        read(write("utf16", "a\tb".encode("utf-16")), task)


def test_the_line_that_is_not_utf8_is_named_far_into_a_file(write: Write) -> None:
    path = write("words.tsv", b"word\n" * 20_000 + b"\xff\n")
    with pytest.raises(DataFileError, match=r"words\.tsv:20001: not UTF-8 \(invalid start byte at byte 1 of it\)"):
        read(path, "udpos")


def test_lines_end_with_lf_or_crlf_and_a_first_mark_is_dropped(write: Write) -> None:
    path = write("text", "\ufeffone\r\ntwo\n\n\u2028three\u0085\ufeff")
    assert list(lines(path)) == [(1, "one"), (2, "two"), (3, ""), (4, "\u2028three\u0085\ufeff")]
    assert list(lines(write("empty", ""))) == []


def test_json_lines(write: Write) -> None:
    path = write("rows.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": 2}')
    assert list(json_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(DataFileError, match=r"cut\.jsonl:2: not JSON, perhaps truncated"):
        list(json_rows(write("cut.jsonl", '{"a": 1}\n{"a": ')))
    with pytest.raises(DataFileError, match=r"list\.jsonl:1: expected a JSON object, got list"):
        list(json_rows(write("list.jsonl", "[1]\n")))


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_of_json_lines_under_every_name(write: Write) -> None:
    path = write(
        "train.jsonl",
        [
            {"premise": "p", "hypothesis": "h", "label": "neutral"},  # jiant, the Hub
            {"sentence1": "p", "sentence2": "h", "gold_label": "entailment", "pairID": "7e"},  # SNLI, MultiNLI
            {"context": "p", "hypothesis": "h", "label": "c", "uid": "u1"},  # ANLI
            {"premise": "p", "hypothesis": "h", "label": "contradictory"},  # XNLI's training set
            {"premise": "", "hypothesis": " ", "label": " neutral "},  # empty sentences stay
            {"premise": "p", "hypothesis": "h"},
            {"premise": "p", "hypothesis": "h", "label": -1},
        ],
    )
    examples = read(path, "anli")
    labels = ["neutral", "entailment", "contradiction", "contradiction", "neutral", None, None]
    assert [label for _, _, label in pairs(examples)] == labels
    assert pairs(examples)[4][:2] == ("", " ")
    identities = [example.id for example in examples.items]
    assert identities[1:3] == ["7e", "u1"] and identities[3] == f"{path}:4"
    assert len(set(identities)) == 7 and not examples.skipped


def test_rows_without_an_agreed_label_are_left_out_and_counted(write: Write) -> None:
    rows = [{"sentence1": "p", "sentence2": "h", "gold_label": label} for label in ("-", "neutral", "-")]
    examples = read(write("snli.jsonl", rows), "snli")
    assert pairs(examples) == [("p", "h", "neutral")]
    assert examples.skipped == Counter({readers.UNLABELLED: 2})


def test_of_a_file_of_several_languages_only_one_is_read(write: Write) -> None:
    """As XNLI's own release: all fifteen in one file."""
    rows = [
        {"language": code, "sentence1": f"p {code}", "sentence2": "h", "gold_label": "neutral"}
        for code in ("ar", "sw", "en", "ar", "sw")
    ]
    path = write("xnli.test.jsonl", rows)
    found = readers.read_pairs(path, get("xnli"), "sw")
    assert pairs(found) == [("p sw", "h", "neutral")] * 2
    assert found.skipped == Counter({readers.OTHER_LANGUAGE_ROW: 3})
    one = write("ar.jsonl", [row for row in rows if row["language"] == "ar"])  # translations keep their language's name
    assert len(readers.read_pairs(one, get("xnli"), "en")) == 2
    with pytest.raises(MissingDataError, match=r"xnli\.test\.jsonl: no row is in ur; it has ar, en, sw"):
        readers.read_pairs(path, get("xnli"), "ur")
    both = write("translations.jsonl", [row for row in rows if row["language"] != "en"])
    assert len(readers.read_pairs(both, get("xnli"), "en")) == 4  # translations, to train on


def test_rows_of_a_file_with_labels_have_labels(tmp_path: Path) -> None:
    """Quotation marks around a tabulator make two texts one: such a row would have no label, and the file no gold."""
    path = tmp_path / "dev-sw.tsv"
    path.write_text('A man sleeps.\tHe is awake.\tcontradiction\n"Go away\tHe spoke"\tneutral\n', encoding="utf-8")
    with pytest.raises(DataFileError, match=r"dev-sw\.tsv:2: 2 columns, expected 3 as before"):
        readers.read_pairs(path, get("xnli"), "sw")
    path.write_text("a\tb\nc\td\tneutral\n", encoding="utf-8")
    with pytest.raises(DataFileError, match=r"dev-sw\.tsv:2: 3 columns, expected 2 as before"):
        readers.read_pairs(path, get("xnli"), "sw")
    path.write_text("a\tb\nc\td\n", encoding="utf-8")
    assert [example.label for example in readers.read_pairs(path, get("xnli"), "sw").items] == [None, None]


def test_numbers_are_labels_only_where_the_labels_are_numbers(write: Write) -> None:
    rows = [{"question1": "a", "question2": "b", "label": label} for label in (1, "0")]
    assert [e.label for e in read(write("qqp.jsonl", rows), "qqp").items] == ["1", "0"]
    # NLI numbers differ from source to source: never by position.
    with pytest.raises(DataFileError, match=r"nli\.jsonl:1: label 0; accepted: contradiction, entailment, neutral"):
        read(write("nli.jsonl", [{"premise": "p", "hypothesis": "h", "label": 0}]), "mnli")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"premise": "p", "label": "neutral"},
            r"x\.jsonl:2: no column hypothesis or sentence2 or question2; the row has",
        ),
        ({"hypothesis": "h"}, r"x\.jsonl:2: no column premise or sentence1 or context or question1"),
        ({"premise": None, "hypothesis": "h"}, r"x\.jsonl:2: premise or .* is None, expected text"),
        ({"premise": "p", "hypothesis": 3}, r"x\.jsonl:2: hypothesis or .* is 3, expected text"),
        ({"premise": "p", "hypothesis": "h", "label": "maybe"}, r"x\.jsonl:2: label 'maybe'; accepted: contradiction"),
    ],
)
def test_faulty_pairs_name_file_and_line(write: Write, row: dict[str, Any], message: str) -> None:
    good = {"premise": "p", "hypothesis": "h", "label": "neutral"}
    with pytest.raises(DataFileError, match=message):
        read(write("x.jsonl", [good, row]), "mnli")


def test_tsv_of_the_benchmark_is_what_the_csv_module_writes(tmp_path: Path) -> None:
    texts = ['He said "no".', '"Quoted"', "a\tb", "two\nlines", "", "plain", "crlf\r\nin it", "'", '""', "ends in \\"]
    path = tmp_path / "dev-en.tsv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([first, second, "neutral"] for first in texts for second in texts)
    examples = read(path, "xnli")
    expected = [(a.replace("\r\n", "\n"), b.replace("\r\n", "\n"), "neutral") for a in texts for b in texts]
    assert pairs(examples) == expected
    assert [example.id for example in examples.items[:2]] == ["dev-en-0", "dev-en-1"]


def test_tsv_without_labels_and_with_mixed_line_ends(write: Write) -> None:
    examples = read(write("test-de.tsv", "a\tb\r\nc\td\n\ne\tf"), "pawsx", "de")
    assert pairs(examples) == [("a", "b", None), ("c", "d", None), ("e", "f", None)]
    assert pairs(read(write("dev-de.tsv", "a\tb\t1\nc\td\t\n"), "pawsx")) == [("a", "b", "1"), ("c", "d", None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\tneutral\na\tb\tc\td\n", r"x\.tsv:2: 4 columns, expected 3 as before"),
        ("a\n", r"x\.tsv:1: 1 columns, expected sentence1"),
        ("a\tb\tneutral\na\tb\tNeutral\n", r"x\.tsv:2: label 'Neutral'; accepted: contradiction, entailment, neutral"),
        # A file written without quoting: its stray quotes must not swallow rows.
        (
            'a\tb\tneutral\n"a\tb\tneutral\nc\td\tneutral\n',
            r"x\.tsv:2: the row that begins here: unexpected end of data",
        ),
        ('a\tb\tneutral\n"a" b\tc\tneutral\n', r"x\.tsv:2: the row that begins here: .* expected after"),
    ],
)
def test_faulty_tsv_names_file_and_line(write: Write, content: str, message: str) -> None:
    with pytest.raises(DataFileError, match=message):
        read(write("x.tsv", content), "xnli")


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def test_tsv_of_glue_has_a_header_and_no_quoting(write: Write) -> None:
    path = write("train.tsv", QQP + '0\t1\t2\t"What is\tthis" ?\t0\r\n3\t4\t5\t""a""\t"b\t1\n')
    assert pairs(read(path, "qqp")) == [('"What is', 'this" ?', "0"), ('""a""', '"b', "1")]


def test_broken_rows_of_glue_are_counted(write: Write) -> None:
    # One question of the owner's file holds a line end: two rows with too few columns.
    path = write("train.tsv", QQP + '0\t1\t2\ta\tb\t0\n3\t4\t5\tHow\n"\tdoes it?\t1\n6\t7\t8\tc\td\t1\n\n')
    examples = read(path, "qqp")
    assert pairs(examples) == [("a", "b", "0"), ("c", "d", "1")]
    assert examples.skipped == Counter({readers.BROKEN_ROW: 2})
    assert read(write("fine.tsv", QQP + "0\t1\t2\ta\tb\t0\n"), "qqp").skipped == Counter()
    with pytest.raises(DataFileError, match=r"wrong\.tsv:2: label '2'; accepted: 0, 1"):
        read(write("wrong.tsv", QQP + "0\t1\t2\ta\tb\t2\n"), "qqp")


# --- multiple choice ------------------------------------------------------------------------------

HELLASWAG = {"ctx_a": "A man sits.", "ctx_b": "he", "endings": ["runs.", "eats.", "sits.", "flies."], "label": "2"}
COSMOS = {"context": "c", "question": "q?", **{f"answer{i}": f"a{i}" for i in range(4)}, "label": 3}
CSQA = {"label": ["A", "B", "C"], "text": ["x", "y", "z"]}
SIQA = {"context": "c", "question": "q?", "answerA": "x", "answerB": "y", "answerC": "z", "correct": "B"}
COPA = {"premise": "It rained.", "choice1": "x", "choice2": "y", "question": "effect", "label": 0}


def test_multiple_choice_in_every_format(write: Write) -> None:
    def one(task: str, row: dict[str, Any]) -> ChoiceExample:
        (example,) = read(write("x.jsonl", [row]), task).items
        return example

    found = one("hellaswag", HELLASWAG)
    assert (found.prompt, found.label) == ("A man sits.", 2)
    assert found.choices == ("he runs.", "he eats.", "he sits.", "he flies.")
    found = one("cosmosqa", COSMOS)
    assert (found.prompt, found.choices, found.label) == ("c q?", ("a0", "a1", "a2", "a3"), 3)
    nested = {"stem": "q?", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}
    for row in ({"question": nested, "answerKey": "B"}, {"question": "q?", "choices": CSQA, "answerKey": "B"}):
        found = one("commonsenseqa", row)
        assert (found.prompt, found.choices[:2], found.label) == ("q?", ("x", "y"), 1)
    for label in ({"correct": "B"}, {"label": "2"}, {"label": 2}, {"label": "2 "}):
        found = one("siqa", {**{key: value for key, value in SIQA.items() if key != "correct"}, **label})
        assert (found.prompt, found.choices, found.label) == ("c q?", ("x", "y", "z"), 1)
    found = one("copa", COPA)
    assert (found.prompt, found.choices, found.label) == ("It rained. What was the effect?", ("x", "y"), 0)
    assert one("copa", {**COPA, "question": "cause"}).prompt == "It rained. What was the cause?"


@pytest.mark.parametrize(
    ("task", "row", "key"),
    [
        ("hellaswag", HELLASWAG, "label"),
        ("cosmosqa", COSMOS, "label"),
        ("commonsenseqa", {"question": "q?", "choices": CSQA}, "answerKey"),
        ("siqa", SIQA, "correct"),
        ("copa", COPA, "label"),
    ],
)
def test_withheld_choices_are_none_and_wrong_ones_errors(
    write: Write, task: str, row: dict[str, Any], key: str
) -> None:
    for withheld in ("", None, -1, "-1"):
        assert [e.label for e in read(write("x.jsonl", [{**row, key: withheld}]), task).items] == [None]
    for wrong in (9, "9", "x", 1.5, True, [0]):
        with pytest.raises(DataFileError, match=r"x\.jsonl:2: label .*; accepted: [0A], [1B]"):
            read(write("x.jsonl", [row, {**row, key: wrong}]), task)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("hellaswag", {**HELLASWAG, "endings": "abcd"}, "choices 'abcd'; expected a list of texts"),
        ("hellaswag", {**HELLASWAG, "endings": []}, "expected a list of texts"),
        ("hellaswag", {**HELLASWAG, "endings": ["a", None]}, "expected a list of texts"),
        ("hellaswag", {**HELLASWAG, "ctx_a": None}, "ctx_a is None, expected text"),
        ("cosmosqa", {**COSMOS, "answer2": None}, "expected a list of texts"),
        ("cosmosqa", {"context": "c", "question": "q", "answer0": "a"}, "no column answer1"),
        (
            "commonsenseqa",
            {"question": "q?", "choices": {"label": ["A"]}, "answerKey": "A"},
            "a label and a text for each",
        ),
        ("commonsenseqa", {"question": "q?", "choices": {"label": ["A"], "text": []}}, "a label and a text for each"),
        ("commonsenseqa", {"question": "q?", "choices": ["a", "b"], "answerKey": "A"}, "a label and a text for each"),
        ("commonsenseqa", {"question": {"choices": []}, "answerKey": ""}, "no column stem"),
        ("siqa", {key: value for key, value in SIQA.items() if key != "correct"}, "no column correct or label"),
        ("copa", {**COPA, "question": "why"}, "question 'why'; accepted: cause, effect"),
    ],
)
def test_faulty_choices_name_file_and_line(write: Write, task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFileError, match=r"x\.jsonl:1: .*" + message):
        read(write("x.jsonl", [row]), task)


def test_cosmosqa_as_csv(write: Write) -> None:
    header = "id,context,question,answer0,answer1,answer2,answer3,label\r\n"
    path = write("valid.csv", "\ufeff" + header + 'i,"He said ""no"", twice\nover",q?,a,b,"c, d",e,2\r\n')
    (example,) = read(path, "cosmosqa").items
    assert example.prompt == 'He said "no", twice\nover q?'
    assert example.choices == ("a", "b", "c, d", "e") and example.label == 2
    with pytest.raises(DataFileError, match=r"cut\.csv:3: 3 columns, expected 8: id, context"):
        read(write("cut.csv", header + "i,c,q,a,b,c,d,0\ni,c,q\n"), "cosmosqa")
    with pytest.raises(DataFileError, match=r"open\.csv:2: the row that begins here"):
        read(write("open.csv", header + 'i,"c,q\nq,a\n'), "cosmosqa")
    with pytest.raises(DataFileError, match=r"less\.csv:2: no column answer3; the row has context, question"):
        read(write("less.csv", "context,question,answer0,answer1,answer2,label\nc,q,a,b,c,0\n"), "cosmosqa")


# --- spans ----------------------------------------------------------------------------------------


def _squad(context: str, *qas: dict[str, Any]) -> dict[str, Any]:
    return {"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}


def _qa(identity: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": identity, "question": f"{identity}?", "answers": given, **more}


def test_squad_with_and_without_answers(write: Write) -> None:
    context = "Der Hund 犬 schläft."
    document = _squad(
        context,
        _qa("a", ("Hund", 4), ("犬", 9)),
        _qa("blank", ("", 0)),  # as XTREME withholds answers
        _qa("v2", ("Hund", 4), is_impossible=True),
        {"id": 5, "question": "no answers at all?"},
    )
    for content in (document, document["data"], json.dumps(document, indent=1).replace("\n", "\r\n")):
        examples = read(write("x.json", content), "squad_v2")
        assert examples.items == [
            SpanExample("a", "a?", context, (Answer("Hund", 4), Answer("犬", 9))),
            SpanExample("blank", "blank?", context, ()),
            SpanExample("v2", "v2?", context, (), True),
            SpanExample("5", "no answers at all?", context, ()),
        ]
        assert not examples.skipped


def test_answers_that_are_not_where_they_should_be(write: Write) -> None:
    context = "red dog, red cat"
    path = write(
        "x.json",
        _squad(
            context,
            _qa("moved", ("cat", 3)),
            _qa("partly", ("red", 9), ("blue", 0)),
            _qa("twice", ("red", 5)),  # two places, so none
            _qa("lost", ("green", 0), ("black", 1)),
            _qa("negative", ("red", -7)),
        ),
    )
    examples = read(path, "squad_v1")
    assert [(e.id, e.answers) for e in examples.items] == [
        ("moved", (Answer("cat", 13),)),
        ("partly", (Answer("red", 9), Answer("blue", None))),
        ("twice", (Answer("red", None),)),
        ("lost", (Answer("green", None), Answer("black", None))),
        ("negative", (Answer("red", None),)),
    ]
    assert examples.skipped == Counter({readers.ANSWER_MOVED: 1, readers.ANSWER_LOST: 5})


def test_repeated_ids_are_made_unique(write: Write) -> None:
    # The benchmark's preparation of TyDiQA's training files leaves the last number of "english-8-12" alone.
    questions = [_qa(identity, ("ctx", 0)) for identity in ("12", "0", "12", "12")]
    examples = read(write("x.json", _squad("ctx", *questions)), "tydiqa")
    assert [e.id for e in examples.items] == ["12-0", "0", "12-2", "12-3"]
    assert [e.question for e in examples.items] == ["12?", "0?", "12?", "12?"]


def test_tydiqa_questions_of_other_languages_are_counted(write: Write) -> None:
    document = _squad("ctx", *(_qa(f"{name}-1-0", ("ctx", 0)) for name in ("english", "telugu", "Finnish", "klingon")))
    english = read(write("x.json", document), "tydiqa")
    assert [e.id for e in english.items] == ["english-1-0", "klingon-1-0"]
    assert english.skipped == Counter({readers.OTHER_LANGUAGE: 2})
    assert [e.id for e in read(write("x.json", document), "tydiqa", "te").items] == ["telugu-1-0", "klingon-1-0"]
    assert len(read(write("x.json", document), "squad_v1")) == 4  # no other task's ids mean anything


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', r"x\.json:1: not JSON, perhaps truncated"),
        ('{"data":\n[\n{"paragraphs": [', r"x\.json:3: not JSON, perhaps truncated"),
        ('{"data": 3}', r"x\.json: not SQuAD's format, data\[\]\.paragraphs"),
        ("7", r"x\.json: not SQuAD's format"),
        ('{"questions": []}', r"x\.json: not SQuAD's format"),
        ({"data": [{"title": "t"}]}, r"x\.json: not SQuAD's format.*paragraphs"),
        (_squad("c", {"question": "q"}), r"x\.json: not SQuAD's format.*'id'"),
        (_squad("c", {"id": "i"}), r"x\.json: not SQuAD's format.*'question'"),
        (_squad("c", {"id": "i", "question": None}), r"the context or the question of i is no text"),
        (_squad(None, {"id": "i", "question": "q"}), r"the context or the question of i is no text"),  # type: ignore[arg-type]
        (_squad("c", {"id": "i", "question": "q", "answers": [{"text": "c"}]}), r"'answer_start'"),
        (_squad("c", _qa("i", ("c", "zero"))), r"x\.json: not SQuAD's format.*invalid literal"),  # type: ignore[arg-type]
        (_squad("c", {"id": "i", "question": "q", "answers": None}), r"x\.json: not SQuAD's format"),
    ],
)
def test_faulty_squad_files_are_named(write: Write, content: Any, message: str) -> None:
    with pytest.raises(DataFileError, match=message):
        read(write("x.json", content), "xquad")


# --- the real data --------------------------------------------------------------------------------


def _manifest(data_dir: Path) -> list[tuple[str, str, int]]:
    """(path, language, rows) of every file."""
    with (data_dir / "MANIFEST.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["path"], row["language"], int(row["rows"])) for row in rows]


REAL = {
    **{task: rf"xtreme/{task}/\w+-\w+\.tsv" for task in ("xnli", "pawsx", "udpos", "panx")},
    **{task: rf"xtreme/{task}/.*\.json" for task in ("xquad", "mlqa", "tydiqa")},
    **{task: rf"xtreme/{task}/.*\.jsonl" for task in ("xcopa", "siqa")},
    **{task: rf"intermediate/{task}/.*" for task in ("hellaswag", "cosmosqa", "commonsenseqa", "snli", "mnli")},
    **{f"squad_v{version}": rf"intermediate/squad_v{version}\.\d/.*" for version in (1, 2)},
    "mlm": r"mlm/.*\.txt",
}


@pytest.mark.parametrize("task", list(REAL))
def test_no_row_of_the_real_data_is_lost(data_dir: Path, task: str) -> None:
    files = [(path, language, rows) for path, language, rows in _manifest(data_dir) if re.fullmatch(REAL[task], path)]
    assert files
    for path, language, rows in files:
        examples = read(data_dir / path, task, language.split("/")[0])
        skipped = {reason: count for reason, count in examples.skipped.items() if reason != readers.EMPTY_LINE}
        assert (len(examples), skipped) == (rows, {}), path
        assert len({example.id for example in examples.items}) == rows, path


def test_every_reader_of_a_task_is_known_or_read_elsewhere() -> None:
    elsewhere = {"bitext", "lareqa", "mewslix"}
    assert {task.reader for task in TASKS.values()} - elsewhere <= readers.READERS.keys()
    assert set(readers.ROWS) <= set(readers.READERS)
    assert all(isinstance(task, Task) and set(task.gold) <= set(task.files) for task in TASKS.values())
