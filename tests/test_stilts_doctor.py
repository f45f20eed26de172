"""The examination of data folders: made-up ones with one fault each, and the real data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts.doctor import ERROR, MISSING, OK, WARNING, Diagnosis, Finding, Row, diagnose, table_rows
from xfast.stilts.languages import XTREME, XTREME_R
from xfast.stilts.retrieval_data import tatoeba
from xfast.stilts.scoring import TARGETS
from xfast.stilts.tasks import INTERMEDIATE_TASKS, get

Write = Callable[[str, Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the folder: text, bytes, or an object as JSON."""

    def save(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return save


def found(diagnosis: Diagnosis, task: str, split: str, severity: str | None = None) -> list[tuple[str, str, str]]:
    """(severity, language, message) of the findings on a split."""
    return [
        (f.severity, f.language, f.message)
        for f in diagnosis.findings
        if (f.task, f.split) == (task, split) and severity in (None, f.severity)
    ]


def row(diagnosis: Diagnosis, task: str) -> Row:
    (found_row,) = [r for r in table_rows(diagnosis) if r.task == task]
    return found_row


def squad(*questions: tuple[str, str, str]) -> dict[str, Any]:
    """(id, context, answer); each context is its own paragraph, the question "id?"."""
    return {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": identity,
                                "question": f"{identity}?",
                                "answers": [{"text": answer, "answer_start": max(context.find(answer), 0)}],
                            }
                        ],
                    }
                    for identity, context, answer in questions
                ]
            }
        ]
    }


# --- what is there --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xtreme", "xtreme-r"])
def test_of_an_empty_folder_everything_is_missing_and_its_owner_named(tmp_path: Path, name: str) -> None:
    diagnosis = diagnose(tmp_path, name)
    assert diagnosis.found == () and diagnosis.counts()[OK] == 0
    assert {f.severity for f in diagnosis.findings} == {MISSING}
    assert set(TARGETS[name]) | set(INTERMEDIATE_TASKS) <= set(diagnosis.tasks)
    assert {f.task for f in diagnosis.findings} == set(diagnosis.tasks) == {r.task for r in table_rows(diagnosis)}
    assert all(f.owner == get(f.task).owner and f.owner for f in diagnosis.findings)
    table = XTREME if name == "xtreme" else XTREME_R
    languages = " ".join(XTREME["xnli"])
    assert found(diagnosis, "xnli", "test") == [
        (MISSING, languages, "not there in 15 of 15 languages: xnli/test-{language}.tsv")
    ]
    with_dev = " ".join(language for language in table["udpos"] if language not in ("kk", "th", "tl", "yo"))
    assert found(diagnosis, "udpos", "dev")[0][1] == with_dev
    assert found(diagnosis, "udpos", "train") == [(MISSING, "en", "not there: udpos/train-{language}.tsv")]
    assert row(diagnosis, "panx") == Row("panx", "", f"0/{len(table['panx'])}", 0, "3 missing")


def test_the_tasks_of_a_benchmark(tmp_path: Path) -> None:
    assert diagnose(tmp_path).tasks == (
        *("anli_plus", "mnli", "qqp", "squad_v2", "squad_v1", "hellaswag", "ccg", "cosmosqa", "commonsenseqa"),
        *("snli", "anli", "xnli", "pawsx", "udpos", "panx", "xquad", "mlqa", "tydiqa", "bucc2018", "tatoeba"),
    )
    assert {"siqa", "copa", "xcopa", "lareqa", "mewslix"} <= set(diagnose(tmp_path, "xtreme-r").tasks)


def test_what_is_no_folder_or_benchmark(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="benchmark: 'glue' is not accepted; accepted: xtreme, xtreme-r"):
        diagnose(tmp_path, "glue")
    with pytest.raises(DataFileError, match="nowhere: no such folder"):
        diagnose(tmp_path / "nowhere")


def test_files_lie_in_the_folder_or_in_its_xtreme(write: Write, tmp_path: Path) -> None:
    write("xquad/xquad.de.json", squad(("q", "ein Hund", "Hund")))
    write("xtreme/xquad/xquad.es.json", squad(("q", "un perro", "perro"), ("r", "un gato", "gato")))
    write("xquad/xquad.es.json", "not looked at")
    diagnosis = diagnose(str(tmp_path))
    assert [(f.language, f.rows, f.labelled) for f in diagnosis.found] == [("es", 2, 2), ("de", 1, 1)]
    assert found(diagnosis, "xquad", "test") == [
        (MISSING, "en el ru tr ar vi th zh hi", "not there in 9 of 11 languages: xquad/xquad.{language}.json"),
        (WARNING, "es de", "3 of 2,380 rows: a sample?"),
        (OK, "", "2 of 11 languages, 3 rows"),
    ]
    assert row(diagnosis, "xquad") == Row("xquad", "test", "2/11", 3, "1 missing, 1 warning")


def test_training_sets_of_other_languages_are_counted_but_not_missed(write: Write, tmp_path: Path) -> None:
    write("panx/train-en.tsv", "Ann\tB-PER\n")
    write("panx/train-sw.tsv", "Juma\tB-PER\n\nNairobi\tB-LOC\n")
    diagnosis = diagnose(tmp_path)
    assert [(f.language, f.split, f.rows) for f in diagnosis.found] == [("en", "train", 1), ("sw", "train", 2)]
    assert found(diagnosis, "panx", "train", OK) == [(OK, "", "1 rows")]


def test_a_set_of_several_files_names_those_that_are_not_there(write: Write, tmp_path: Path) -> None:
    nli = json.dumps({"context": "p", "hypothesis": "h", "label": "e", "uid": "1"})
    for part in (1, 3):
        write(f"intermediate/anli/R{part}/train.jsonl", nli)
    write("tatoeba/de-en.de", "Hund\n")
    diagnosis = diagnose(tmp_path)
    assert found(diagnosis, "anli", "train") == [(MISSING, "", "not there: intermediate/anli/R2/train.jsonl")]
    assert (MISSING, "de", "not there in 1 of 36 languages: tatoeba/{language}-en.en") in found(
        diagnosis, "tatoeba", "test"
    )


def test_parts_are_examined_under_their_own_names(write: Write, tmp_path: Path) -> None:
    pair = json.dumps({"premise": "p", "hypothesis": "h", "label": "neutral"})
    write("intermediate/mnli/multinli_1.0_train.jsonl", pair)
    write("intermediate/snli/snli_1.0_train.jsonl", pair.replace("neutral", "entailment"))
    diagnosis = diagnose(tmp_path)
    assert found(diagnosis, "anli_plus", "train") == [(MISSING, "", "of its parts snli, mnli, anli not there: anli")]
    assert row(diagnosis, "anli_plus") == Row("anli_plus", "", "0/1", 2, "2 missing")
    for part in (1, 2, 3):
        write(f"intermediate/anli/R{part}/train.jsonl", pair)
    diagnosis = diagnose(tmp_path)
    assert found(diagnosis, "anli_plus", "train") == [(OK, "", "all its parts are there")]
    assert row(diagnosis, "anli_plus") == Row("anli_plus", "train", "1/1", 5, "1 missing")  # missing: dev
    assert row(diagnosis, "anli").rows == 3


def test_a_diagnosis_becomes_json(write: Write, tmp_path: Path) -> None:
    write("xquad/xquad.de.json", squad(("q", "ein Hund", "Hund")))
    diagnosis = diagnose(tmp_path)
    document = json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
    assert document["folder"] == str(tmp_path) and document["benchmark"] == "xtreme"
    assert document["tasks"] == list(diagnosis.tasks)
    assert document["found"] == [{"task": "xquad", "split": "test", "language": "de", "rows": 1, "labelled": 1}]
    assert [Finding(**finding) for finding in document["findings"]] == list(diagnosis.findings)
    assert document["counts"] == {OK: 1, MISSING: len(diagnosis.findings) - 2, WARNING: 1, ERROR: 0}


# --- sizes ----------------------------------------------------------------------------------------


def test_the_size_of_a_training_set(write: Write, tmp_path: Path) -> None:
    size = get("pawsx").train_size
    for rows, said in (
        (size - 1, [(WARNING, "en", f"{size - 1:,} of {size:,} rows: a sample?")]),
        (size, []),
        (size + 1, [(WARNING, "en", f"{size + 1:,} rows, more than the {size:,} expected")]),
    ):
        write("pawsx/train-en.tsv", "a\tb\t1\n" * rows)
        assert found(diagnose(tmp_path), "pawsx", "train", WARNING) == said


def test_sizes_that_were_only_recalled_are_marked(write: Write, tmp_path: Path) -> None:
    write("intermediate/ccg/ccg.train", "a\tN\n")
    (said,) = found(diagnose(tmp_path), "ccg", "train", WARNING)
    assert said[2] == "1 of 38,015 rows (a number that could not be confirmed): a sample?"


def test_sizes_of_test_sets_are_known_by_language(write: Write, tmp_path: Path) -> None:
    sentences = "word\n\n"
    for language, rows in (("te", 146), ("mr", 46), ("ta", 121), ("de", 3)):
        write(f"udpos/test-{language}.tsv", sentences * rows)
    assert found(diagnose(tmp_path), "udpos", "test", WARNING) == [
        (WARNING, "de mr ta te", "labels withheld: predictions can be written but not scored here"),
        (WARNING, "mr", "46 of 47 rows: a sample?"),
        (WARNING, "ta", "121 rows, more than the 120 expected"),
    ]


# --- files that do not parse ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "task", "split", "message"),
    [
        ("xnli/dev-de.tsv", "a\tb\tmaybe\n", "xnli", "dev", "dev-de.tsv:1: label 'maybe'"),
        ("xnli/dev-de.tsv", b"a\tb\tneutral\n\xff", "xnli", "dev", "dev-de.tsv:2: not UTF-8"),
        ("xnli/dev-de.tsv", "", "xnli", "dev", "dev-de.tsv: no examples; was the download interrupted?"),
        ("xquad/xquad.de.json", '{"data": [', "xquad", "test", "xquad.de.json:1: not JSON, perhaps truncated"),
        ("tatoeba/de-en.de", "eins\nzwei\n", "tatoeba", "test", "de-en.en: 2 and 1 sentences, expected as many"),
        ("bucc2018/de-en.dev.de", "de-1 Hund\n", "bucc2018", "dev", "de:1: 'de-1 Hund'; expected id<TAB>sentence"),
        ("mewslix/wikinews_mentions/test-de.jsonl", "[", "mewslix", "test", "test-de.jsonl:1: not JSON"),
        ("lareqa/xquad-r/de.json", "[1]", "lareqa", "test", "de.json: not SQuAD's format"),
    ],
)
def test_faults_are_collected_and_hide_nothing_else(
    write: Write, tmp_path: Path, name: str, content: Any, task: str, split: str, message: str
) -> None:
    write("tatoeba/de-en.en", "one\n")
    write("bucc2018/de-en.dev.en", "en-1\tdog\n")
    write(name, content)
    write("panx/dev-en.tsv", "Ann\tB-PER\n")
    diagnosis = diagnose(tmp_path, "xtreme" if task == "bucc2018" else "xtreme-r")
    ((_, language, said),) = found(diagnosis, task, split, ERROR)
    assert message in said and str(tmp_path) in said
    assert language == "de"
    assert found(diagnosis, task, split, OK) == []
    assert [(f.task, f.rows) for f in diagnosis.found] == [("panx", 1)]


def test_rows_that_a_reader_leaves_out_are_told(write: Write, tmp_path: Path) -> None:
    rows = [{"sentence1": "p", "sentence2": "h", "gold_label": label} for label in ("-", "neutral", "-")]
    write("intermediate/snli/snli_1.0_dev.jsonl", "\n".join(map(json.dumps, rows)))
    assert found(diagnose(tmp_path), "snli", "dev") == [(WARNING, "en", "2 × no agreed label"), (OK, "", "1 rows")]


# --- labels ---------------------------------------------------------------------------------------

WITHHELD = "labels withheld: predictions can be written but not scored here"


@pytest.mark.parametrize(
    ("rows", "split", "said"),
    [
        ("a\tb\t\nc\td\t\n", "train", [(ERROR, "en", "2 of 2 rows lack their label")]),
        ("a\tb\t1\nc\td\t\n", "train", [(ERROR, "en", "1 of 2 rows lack their label")]),
        ("a\tb\t1\nc\td\t\n", "dev", [(ERROR, "en", "1 of 2 rows lack their label")]),
        ("a\tb\nc\td\n", "dev", [(WARNING, "en", WITHHELD)]),
        ("a\tb\nc\td\n", "test", [(WARNING, "en", WITHHELD)]),
        ("a\tb\t1\nc\td\t0\n", "test", []),
    ],
)
def test_labels_that_are_not_there(write: Write, tmp_path: Path, rows: str, split: str, said: list[Any]) -> None:
    write(f"pawsx/{split}-en.tsv", rows)
    diagnosis = diagnose(tmp_path)
    told = [f for f in found(diagnosis, "pawsx", split) if f[0] in (WARNING, ERROR) and "sample?" not in f[2]]
    assert told == said
    assert found(diagnosis, "pawsx", split, OK) == [
        (OK, "", "2 rows" if split == "train" else "1 of 7 languages, 2 rows")
    ]


def test_rows_with_fewer_columns_than_the_others_are_told(write: Write, tmp_path: Path) -> None:
    write("pawsx/dev-en.tsv", "a\tb\t1\nc\td\n")
    (told,) = [one for one in found(diagnose(tmp_path), "pawsx", "dev") if one[0] == ERROR]
    assert told[2].endswith("dev-en.tsv:2: 2 columns, expected 3 as before")


def test_sentences_without_their_tags(write: Write, tmp_path: Path) -> None:
    write("udpos/dev-te.tsv", "a\tX\n\nb\n\nc\n")
    assert found(diagnose(tmp_path), "udpos", "dev", ERROR) == [(ERROR, "te", "2 of 3 rows lack their tags")]


@pytest.mark.parametrize("where", ["labels", "xtreme/labels"])
def test_gold_that_lies_apart(write: Write, tmp_path: Path, where: str) -> None:
    write("panx/test-de.tsv", "Anna\nlacht\n\nBonn\n")
    write("panx/test-fr.tsv", "Anne\n")
    write(f"{where}/panx/test-de.tsv", "B-PER\nO\n\nB-LOC\n")
    diagnosis = diagnose(tmp_path)
    assert (OK, "de", "labels lie apart and fit") in found(diagnosis, "panx", "test")
    assert (WARNING, "fr", WITHHELD) in found(diagnosis, "panx", "test")
    write(f"{where}/panx/test-de.tsv", "B-PER\n\nB-LOC\n")
    ((_, language, said),) = found(diagnose(tmp_path), "panx", "test", ERROR)
    assert language == "de" and "test-de.tsv:1: 1 tags for 2 words" in said


def test_answers_that_were_blanked(write: Write, tmp_path: Path) -> None:
    write("xquad/xquad.de.json", squad(("q", "ein Hund", ""), ("r", "zwei", "")))
    assert (WARNING, "de", WITHHELD) in found(diagnose(tmp_path), "xquad", "test")
    assert diagnose(tmp_path).found[0].labelled == 0
    write("labels/xquad/test-de.json", squad(("q", "ein Hund", "Hund"), ("r", "zwei", "zwei")))
    assert (OK, "de", "labels lie apart and fit") in found(diagnose(tmp_path), "xquad", "test")
    write("labels/xquad/test-de.json", squad(("q", "ein Hund", "Hund"), ("r", "zwei", "")))
    ((_, _, said),) = found(diagnose(tmp_path), "xquad", "test", ERROR)
    assert said.endswith("test-de.json: no answer to 1 questions, as r")
    write("xquad/xquad.de.json", squad(("q", "ein Hund", ""), ("r", "zwei", "zwei")))
    assert (ERROR, "de", "1 of 2 rows lack their answers") in found(diagnose(tmp_path), "xquad", "test")


def test_questions_without_an_answer_are_no_fault_where_the_file_says_so(write: Write, tmp_path: Path) -> None:
    document = squad(("q", "a dog", "dog"), ("r", "a cat", ""))
    document["data"][0]["paragraphs"][1]["qas"][0]["is_impossible"] = True
    write("intermediate/squad_v2.0/train-v2.0.json", document)
    assert found(diagnose(tmp_path), "squad_v2", "train", ERROR) == []


def test_labels_that_were_overwritten_with_zeros(write: Write, tmp_path: Path) -> None:
    def rows(*labels: int) -> str:
        row = {"premise": "p", "choice1": "x", "choice2": "y", "question": "cause"}
        return "\n".join(json.dumps({**row, "label": label}) for label in labels)

    write("xcopa/test-et.jsonl", rows(*[0] * 20))
    write("xcopa/test-id.jsonl", rows(*[0] * 19, 1))
    told = found(diagnose(tmp_path, "xtreme-r"), "xcopa", "test", WARNING)
    assert (WARNING, "et", f"every label is 0: {WITHHELD}") in told and len(told) == 2  # and: a sample
    write("labels/xcopa/test-et.jsonl", rows(*[1] * 20))
    assert (OK, "et", "labels lie apart and fit") in found(diagnose(tmp_path, "xtreme-r"), "xcopa", "test")


# --- leaks ----------------------------------------------------------------------------------------


def overlaps(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    return [(f.task, f.split, f.message) for f in diagnosis.findings if f.message.endswith("training set, too")]


def test_pairs_of_a_training_set_in_english_test_sets(write: Write, tmp_path: Path) -> None:
    write(
        "intermediate/mnli/multinli_1.0_train.jsonl",
        json.dumps({"premise": "A  Dog.", "hypothesis": "b", "label": "neutral"}),
    )
    write("intermediate/qqp/train.jsonl", json.dumps({"question1": "A dog.", "question2": "B", "label": 1}))
    write("xnli/test-en.tsv", "a dog.\tB\nA dog.\tc\nA DOG.\tb \n")
    write("xnli/test-de.tsv", "A dog.\tb\n")  # the other languages are not compared
    write("pawsx/dev-en.tsv", "B\ta dog.\t1\n")  # the other way round it is another pair
    write(
        "intermediate/snli/snli_1.0_dev.jsonl",
        json.dumps({"sentence1": "a dog.", "sentence2": "b", "gold_label": "neutral"}),
    )
    assert overlaps(diagnose(tmp_path)) == [
        ("xnli", "test", "2 of 3 rows are in mnli's training set, too"),
        ("xnli", "test", "2 of 3 rows are in qqp's training set, too"),
    ]


def test_questions_of_a_training_set_in_english_test_sets(write: Write, tmp_path: Path) -> None:
    document = squad(("q", "the dog", "dog"), ("r", "the cat", "cat"))
    write("squad/train-v1.1.json", document)
    write("squad/dev-v1.1.json", squad(("r", "The cat", "cat"), ("r", "the cow", "cow")))
    write("xquad/xquad.en.json", squad(("q", "the dog", ""), ("q", "the cat", ""), ("r", "the cat", "")))
    write("lareqa/xquad-r/en.json", squad(("q", "the dog", "dog")))
    assert overlaps(diagnose(tmp_path)) == [
        ("squad_v1", "dev", "1 of 2 rows are in its own training set, too"),
        ("xquad", "test", "2 of 3 rows are in squad_v1's training set, too"),
    ]
    # One file is LAReQA's training set, too: told once, under its own name.
    assert [finding for finding in overlaps(diagnose(tmp_path, "xtreme-r")) if finding[0] == "lareqa"] == [
        ("lareqa", "dev", "1 of 2 rows are in its own training set, too"),
        ("lareqa", "test", "1 of 1 rows are in its own training set, too"),
    ]


def test_sentences_of_a_training_set_in_its_own_dev_and_test_sets(write: Write, tmp_path: Path) -> None:
    write("panx/train-en.tsv", "Ann\tB-PER\nlaughs\tO\n\nBonn\tB-LOC\n")
    write("panx/dev-en.tsv", "Ann\tO\nlaughs\tO\n\nAnn\tO\n")
    write("panx/test-en.tsv", "Bonn\n\nbonn\n\nKiel\n")
    assert overlaps(diagnose(tmp_path)) == [
        ("panx", "dev", "1 of 2 rows are in its own training set, too"),
        ("panx", "test", "2 of 3 rows are in its own training set, too"),
    ]


def test_questions_of_other_languages_in_the_english_training_file(write: Write, tmp_path: Path) -> None:
    name = "tydiqa/tydiqa-goldp-v1.1-train/tydiqa.goldp.en.train.json"
    write(name, squad(("english-1-2", "a dog", "dog"), ("swahili-1-2", "mbwa", "mbwa"), ("telugu-1-2", "x", "x")))
    told = found(diagnose(tmp_path), "tydiqa", "train")
    assert (WARNING, "en", "2 × a question of another language in a one-language file") in told
    assert not [said for _, _, said in told if "ids do not tell" in said]
    write(name, squad(("2", "a dog", "dog"), ("2", "mbwa", "mbwa")))
    told = found(diagnose(tmp_path), "tydiqa", "train", WARNING)
    assert (WARNING, "en", "the ids do not tell the language: are all questions English?") in told


# --- bitext ---------------------------------------------------------------------------------------


def test_tatoeba_in_both_layouts(write: Write, tmp_path: Path) -> None:
    for name, rows in (("de-en.de", 3), ("de-en.en", 3), ("fr-en.fr", 2), ("fr-en.en", 2)):
        write(f"tatoeba/{name}", "sentence\n" * rows)
    write("labels/tatoeba/test-de.tsv", "2\n0\n1\n")
    for code in ("jav", "eng"):
        write(f"tatoeba/tatoeba.jav-eng.{code}", "sentence\n" * 205)
    diagnosis = diagnose(tmp_path)
    by_language = {f.language: (f.rows, f.labelled) for f in diagnosis.found}
    assert by_language == {"de": (3, 3), "fr": (2, 0), "jv": (205, 205)}
    told = found(diagnosis, "tatoeba", "test", WARNING)
    assert told == [(WARNING, "fr", WITHHELD), (WARNING, "de fr", "5 of 2,000 rows: a sample?")]
    assert row(diagnosis, "tatoeba").languages == "3/36"
    write("labels/tatoeba/test-de.tsv", "2\n0\n")
    ((_, language, said),) = found(diagnose(tmp_path), "tatoeba", "test", ERROR)
    assert language == "de" and said.endswith("labels/tatoeba/test-de.tsv: 2 labels for 3 sentences")


def test_what_evaluation_refuses_of_tatoeba_is_a_finding(write: Write, tmp_path: Path) -> None:
    for name in ("de-en.de", "tatoeba.deu-eng.deu", "tatoeba.deu-eng.eng", "fr-en.fr", "fr-en.en"):
        write(f"tatoeba/{name}", "eins\nzwei\n")
    write("labels/tatoeba/test-fr.tsv", "0\n7\n")
    diagnosis = diagnose(tmp_path)
    assert diagnosis.found == ()
    for language in ("de", "fr"):
        with pytest.raises(DataFileError):
            tatoeba(tmp_path, language)
    ((_, language, said),) = found(diagnosis, "tatoeba", "test", ERROR)
    assert language == "fr" and "test-fr.tsv:2: '7'" in said
    missing = {code: said for _, codes, said in found(diagnosis, "tatoeba", "test", MISSING) for code in codes.split()}
    assert missing["de"].endswith("languages: tatoeba/{language}-en.en")


def test_bucc(write: Write, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        write(f"bucc2018/zh-en.{split}.zh", "zh-1\t一\nzh-2\t二\n")
        write(f"bucc2018/zh-en.{split}.en", "en-1\tone\n")
    write("bucc2018/zh-en.dev.gold", "zh-1\ten-1\n")
    diagnosis = diagnose(tmp_path)
    assert [(f.split, f.rows, f.labelled) for f in diagnosis.found] == [("dev", 2, 1), ("test", 2, 0)]
    assert found(diagnosis, "bucc2018", "dev", WARNING) == []
    assert found(diagnosis, "bucc2018", "test", WARNING) == [(WARNING, "zh", WITHHELD)]
    write("bucc2018/zh-en.dev.gold", "zh-1\ten-1\nzh-2\ten-2\n")
    ((_, _, said),) = found(diagnose(tmp_path), "bucc2018", "dev", ERROR)
    assert "zh-en.dev.gold:2: " in said and said.endswith("expected zh id<TAB>en id of the sentence files")


# --- the real data --------------------------------------------------------------------------------


def test_the_real_data(data_dir: Path) -> None:
    diagnosis = diagnose(data_dir, "xtreme-r")
    assert diagnosis.counts()[ERROR] == 0
    with (data_dir / "MANIFEST.tsv").open(encoding="utf-8") as file:
        listed = {r["path"]: r["rows"] for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    rows = {(f.task, f.split, f.language): f.rows for f in diagnosis.found}
    for (task, split, language), count in rows.items():
        if task in ("xnli", "udpos", "panx"):
            assert count == int(listed[f"xtreme/{task}/{split}-{language}.tsv"])
        elif task == "tatoeba":
            assert count == int(listed[f"xtreme/tatoeba/{language}-en.{language}"])
    assert (OK, "", "36 of 41 languages, 31,692 rows") in found(diagnosis, "tatoeba", "test")
    assert rows["hellaswag", "dev", "en"] == 700 and rows["siqa", "dev", "en"] == 1_954
    assert rows["lareqa", "test", "tr"] == 177 and rows["xcopa", "test", "qu"] == 500
    assert row(diagnosis, "xcopa") == Row("xcopa", "dev test", "9/11", 5_400, "2 missing")  # complete where it is there
    assert row(diagnosis, "tatoeba").problems == "1 missing"
    assert (MISSING, "", "of its parts snli, mnli, anli not there: anli") in found(diagnosis, "anli_plus", "train")
    assert (WARNING, "en", "the ids do not tell the language: are all questions English?") in found(
        diagnosis, "tydiqa", "train"
    )
    assert found(diagnosis, "udpos", "test", OK)[0][2] == "labels lie apart and fit"


def test_the_real_chinese_pairs(data_dir: Path) -> None:
    diagnosis = diagnose(data_dir)
    assert [(f.language, f.rows, f.labelled) for f in diagnosis.found if f.task == "bucc2018"] == [("zh", 3_500, 64)]
    assert row(diagnosis, "bucc2018").splits == "dev"
