"""Readers of Tatoeba, BUCC, LAReQA and Mewsli-X: made-up files, and the real ones where they are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts.languages import XTREME
from xfast.stilts.retrieval_data import (
    CROSSES,
    NO_SENTENCE,
    bucc,
    lareqa,
    mewslix_entities,
    mewslix_mentions,
    mewslix_pairs,
    mewslix_texts,
    tatoeba,
)

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file below ``tmp_path`` and return its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path

    return write


# --- Tatoeba --------------------------------------------------------------------------------------


def test_tatoeba_rows_keep_their_numbers(write: Write, tmp_path: Path) -> None:
    write("tatoeba/sw-en.sw", "moja\n\n  \ntatu\n")
    write("tatoeba/sw-en.en", "\ufeffa\r\nb\r\n\r\nd\r\n")
    assert tatoeba(tmp_path, "sw").gold is None
    write("labels/tatoeba/test-sw.tsv", "3\n0\n1\n2\n")
    data = tatoeba(str(tmp_path), "sw")
    assert data.foreign == ("moja", "", "  ", "tatu")
    assert data.english == ("a", "b", "", "d")
    assert data.gold == (3, 0, 1, 2)


def test_tatoeba_in_a_folder_that_holds_xtreme(write: Write, tmp_path: Path) -> None:
    write("xtreme/tatoeba/sw-en.sw", "moja\n")
    write("xtreme/tatoeba/sw-en.en", "one\n")
    write("xtreme/labels/tatoeba/test-sw.tsv", "0\n")
    assert tatoeba(tmp_path, "sw") == tatoeba(tmp_path / "xtreme", "sw")


def test_tatoeba_as_laser_has_it(write: Write, tmp_path: Path) -> None:
    write("tatoeba/tatoeba.swh-eng.swh", "mbili\nmoja\ntatu\nMoja")
    write("tatoeba/tatoeba.swh-eng.eng", "two\none\nthree\none\n")
    write("labels/tatoeba/test-sw.tsv", "1\n0\n")  # belongs to the sorted layout
    data = tatoeba(tmp_path, "sw")  # the English side sorted as XTREME's files and labels have it
    assert data.english == ("one", "one", "three", "two") and data.gold == (1, 3, 2, 0)


def test_tatoeba_errors(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"neither tatoeba/sw-en\.sw nor tatoeba/tatoeba\.swh-eng\.swh"):
        tatoeba(tmp_path, "sw")
    write("tatoeba/sw-en.sw", "moja\nmbili\n")
    with pytest.raises(DataFileError, match=r"sw-en\.en: no such file"):
        tatoeba(tmp_path, "sw")
    write("tatoeba/sw-en.en", "one\n")
    with pytest.raises(DataFileError, match="2 and 1 sentences"):
        tatoeba(tmp_path, "sw")
    write("tatoeba/sw-en.en", "one\ntwo\n")
    for labels, message in [("0\n2\n", ":2: '2'"), ("0\n-1\n", ":2: '-1'"), ("0\n\n", ":2: ''"), ("1\n", "1 labels")]:
        write("labels/tatoeba/test-sw.tsv", labels)
        with pytest.raises(DataFileError, match=message):
            tatoeba(tmp_path, "sw")


def test_tatoeba_of_xtreme(data_dir: Path) -> None:
    sizes = {}
    for language in XTREME["tatoeba"]:
        data = tatoeba(data_dir / "xtreme", language)
        assert data.gold is not None and sorted(data.gold) == list(range(len(data.foreign)))
        assert list(data.english) == sorted(data.english)
        sizes[language] = len(data.english)
    assert len(sizes) == 36 and sum(sizes.values()) == 31692
    assert {language: size for language, size in sizes.items() if size < 400} == {
        "jv": 205,
        "sw": 390,
        "ta": 307,
        "te": 234,
    }


# --- BUCC -----------------------------------------------------------------------------------------


def test_bucc(write: Write, tmp_path: Path) -> None:
    write("bucc2018/de-en.dev.de", "de-1\tEins\nde-2\t\nde-3\t drei\tDrei \n")
    write("bucc2018/de-en.dev.en", "en-1\tone\r\n\r\nen-2\ttwo\r\n")
    data = bucc(tmp_path, "de", "dev")
    assert data.source.ids == ("de-1", "de-2", "de-3") and data.source.texts == ("Eins", "", " drei\tDrei ")
    assert data.target.ids == ("en-1", "en-2") and data.target.texts == ("one", "two")
    assert data.gold is None and len(data.target) == 2
    write("bucc2018/de-en.dev.gold", "de-1\ten-1\nde-3\ten-2\n\n")
    assert bucc(tmp_path, "de", "dev").gold == {("de-1", "en-1"), ("de-3", "en-2")}


@pytest.mark.parametrize(
    ("source", "gold", "message"),
    [
        ("de-1 Eins\n", "", r"dev\.de:1: .*expected id<TAB>sentence"),
        ("de-1\tEins\n\tZwei\n", "", r"dev\.de:2: .*expected id<TAB>sentence"),
        ("de-1\tEins\nde-1\tZwei\n", "", r"dev\.de: id 'de-1' occurs more than once"),
        ("de-1\tEins\n", "de-1\n", r"dev\.gold:1: "),
        ("de-1\tEins\n", "de-1\ten-1\nen-1\tde-1\n", r"dev\.gold:2: "),
    ],
)
def test_bucc_errors(write: Write, tmp_path: Path, source: str, gold: str, message: str) -> None:
    write("bucc2018/de-en.dev.de", source)
    with pytest.raises(DataFileError, match=r"de-en\.dev\.en: no such file|" + message):
        bucc(tmp_path, "de", "dev")
    write("bucc2018/de-en.dev.en", "en-1\tone\n")
    write("bucc2018/de-en.dev.gold", gold)
    with pytest.raises(DataFileError, match=message):
        bucc(tmp_path, "de", "dev")


def test_bucc_of_xtreme(data_dir: Path) -> None:
    data = bucc(data_dir / "xtreme", "zh", "dev")
    assert (len(data.source), len(data.target)) == (3500, 4042)
    assert data.gold is not None and len(data.gold) == 64
    assert {pair[0] for pair in data.gold} <= set(data.source.ids)
    assert {pair[1] for pair in data.gold} <= set(data.target.ids)
    with pytest.raises(DataFileError, match=r"zh-en\.test\.zh: no such file"):
        bucc(data_dir / "xtreme", "zh", "test")


# --- LAReQA ---------------------------------------------------------------------------------------


def xquad_r(*paragraphs: tuple[str, list[list[int]], list[tuple[str, int]]]) -> str:
    """Each paragraph an article of its own: (context, sentence breaks, (question id, start of its answer))."""
    return json.dumps({"data": [{"paragraphs": [paragraph(*p)]} for p in paragraphs]}, ensure_ascii=False)


def paragraph(context: str, breaks: list[list[int]], questions: list[tuple[str, int]]) -> dict[str, Any]:
    qas = [
        {"id": name, "question": f"{name}?", "answers": [{"answer_start": start, "text": context[start : start + 2]}]}
        for name, start in questions
    ]
    return {"context": context, "sentence_breaks": breaks, "qas": qas}


def test_lareqa(write: Write, tmp_path: Path) -> None:
    write(
        "lareqa/xquad-r/en.json",
        xquad_r(("One. Two.", [[0, 4], [5, 9]], [("q1", 5), ("q2", 4)]), ("Three.", [[0, 6]], [("q3", 0)])),
    )
    write("lareqa/xquad-r/de.json", xquad_r(("Eins. Zwei.", [[0, 5], [6, 11]], [("q1", 7), ("q2", 0), ("q9", 11)])))
    data = lareqa(tmp_path, ("en", "de"))
    assert data.candidates.ids == ("en_1_0", "en_1_1", "en_2_0", "de_1_0", "de_1_1")
    assert data.candidates.sentences == ("One.", "Two.", "Three.", "Eins.", "Zwei.")
    assert data.candidates.contexts == ("One. Two.", "One. Two.", "Three.", "Eins. Zwei.", "Eins. Zwei.")
    assert data.candidates.languages == ("en", "en", "en", "de", "de")
    assert data.queries.ids == ("q1_en", "q3_en", "q1_de", "q2_de")
    assert data.queries.texts == ("q1?", "q3?", "q1?", "q2?")
    assert data.queries.languages == ("en", "en", "de", "de")
    # Between two sentences is in none: q2 has an answer in German alone.
    assert data.skipped == {"en": {NO_SENTENCE: 1}, "de": {NO_SENTENCE: 1}}
    assert data.gold == {
        "q1_en": {"en_1_1", "de_1_1"},
        "q1_de": {"en_1_1", "de_1_1"},
        "q2_de": {"de_1_0"},
        "q3_en": {"en_2_0"},
    }
    assert len(data.queries) == 4 and len(data.candidates) == 5


def test_lareqa_errors(write: Write, tmp_path: Path) -> None:
    for languages in ((), ("en", "en")):
        with pytest.raises(InvalidOptionError, match="languages: "):
            lareqa(tmp_path, languages)
    with pytest.raises(DataFileError, match=r"xquad-r/en\.json: no such file"):
        lareqa(tmp_path, ["en"])
    good = paragraph("One.", [[0, 4]], [("q1", 0)])
    bad: list[tuple[Any, str]] = [
        ([good], "expected data"),
        ({"data": [{"paragraphs": [{"context": "One.", "qas": []}]}]}, "sentence_breaks"),
        ({"data": [{"paragraphs": [{**good, "sentence_breaks": [[0, 5]]}]}]}, "paragraph 1: sentence 0 to 5"),
        ({"data": [{"paragraphs": [{**good, "sentence_breaks": [[0, 1, 2]]}]}]}, "expected data"),
        ({"data": [{"paragraphs": [good, good]}]}, "question 'q1_en' occurs more than once"),
        ({"data": [{"paragraphs": [{**good, "qas": [{"id": "q", "answers": []}]}]}]}, "question q has 0 answers"),
    ]
    for document, message in bad:
        write("lareqa/xquad-r/en.json", json.dumps(document))
        with pytest.raises(DataFileError, match=message):
            lareqa(tmp_path, ["en"])


def test_lareqa_of_xtreme(data_dir: Path) -> None:
    languages = ("ar", "en", "hi", "th", "tr", "vi")
    data = lareqa(data_dir / "xtreme", languages)
    assert (len(data.queries), len(data.candidates), any(data.skipped.values())) == (6 * 177, 684, False)
    assert set(data.gold) == set(data.queries.ids)
    place = {identity: i for i, identity in enumerate(data.candidates.ids)}
    assert len(place) == len(data.candidates)
    whole = 0
    for language in languages:
        document = json.loads((data_dir / f"xtreme/lareqa/xquad-r/{language}.json").read_text())
        for article in document["data"]:
            for p in article["paragraphs"]:
                for qa in p["qas"]:
                    gold = data.gold[f"{qa['id']}_{language}"]
                    assert sorted(name[:2] for name in gold) == sorted(languages)
                    here = place[next(name for name in gold if name.startswith(language))]
                    sentence, answer = data.candidates.sentences[here], qa["answers"][0]
                    assert data.candidates.contexts[here] == p["context"]
                    at = p["context"].index(sentence)
                    assert at <= answer["answer_start"] < at + len(sentence)
                    whole += answer["text"] in sentence
    assert whole == 6 * 177 - 1  # one Turkish answer runs over its sentence's end


# --- Mewsli-X -------------------------------------------------------------------------------------

TEXT = "First {one}. In  Rome\nthe {a} Pope {b}. End."
SPANS = [{"start": 0, "end": 12}, {"start": 13, "end": 39}, {"start": 40, "end": 44}]


def context(language: str = "en", text: str = TEXT) -> dict[str, Any]:
    return {"document_id": "d", "language": language, "text": text, "sentence_spans": SPANS}


def mention(name: str, start: int, end: int, entity: str = "Q1") -> dict[str, Any]:
    span = {"start": start, "end": end, "text": TEXT[start:end]}
    return {"example_id": name, "mention_span": span, "entity_id": entity}


def rows(*objects: dict[str, Any]) -> str:
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def test_mentions(write: Write) -> None:
    path = write(
        "mentions.jsonl",
        rows(
            {"context": context(), "mentions": [mention("a", 17, 21), mention("b", 30, 34, "Q2"), mention("x", 8, 17)]},
            {"context": context("de"), "mention": mention("c", 0, 5)},
            {"context": {**context(), "sentence_spans": []}, "mention": mention("y", 0, 5)},
            {"context": context(), "mention": mention("d", 0, 12)},
        ),
    )
    data = mewslix_mentions(path, "en")
    assert data.queries.ids == ("a", "b", "d")
    assert data.queries.texts == (
        "Rome: In  { Rome } the (a) Pope (b).",  # of three spaces two are left
        "Pope: In Rome the (a) { Pope } (b).",
        "First {one}.: { First {one}. }",
    )
    assert data.queries.languages == ("en",) * 3
    assert data.gold == {"a": {"Q1"}, "b": {"Q2"}, "d": {"Q1"}}
    assert data.skipped == {CROSSES: 2}
    assert mewslix_mentions(path, "de").queries.texts == ("First: { First } (one).",)
    english, german = ([text for code, text in mewslix_texts(path) if code == wanted] for wanted in ("en", "de"))
    assert tuple(english) == data.queries.texts and tuple(german) == mewslix_mentions(path, "de").queries.texts
    assert len(mewslix_mentions(path, "ta").queries) == 0


def test_entities(write: Write) -> None:
    spans = [{"start": 0, "end": 4}, {"start": 6, "end": 11}]
    path = write(
        "entities.jsonl",
        rows(
            {"entity_id": "Q1", "title": "t", "description": "One.\n\nTwo\n{}. Left out", "sentence_spans": spans},
            {"entity_id": "Q2", "title": "t", "description": " One   line\nno sentence ", "sentence_spans": []},
            {"entity_id": "Q3", "title": "t", "description": "", "sentence_spans": []},
        ),
    )
    data = mewslix_entities(path)
    assert data.ids == ("Q1", "Q2", "Q3")
    assert data.texts == ("One. Two {", "One  line no sentence", "")


def test_pairs(write: Write) -> None:
    entity = {"entity_id": "Q1", "title": "t", "description": "A city.", "sentence_spans": [{"start": 0, "end": 7}]}
    path = write(
        "pairs.jsonl",
        rows(
            {"contextual_mention": {"context": context(), "mention": mention("a", 17, 21)}, "entity": entity},
            {"contextual_mention": {"context": context(), "mention": mention("b", 8, 17)}, "entity": entity},
        ),
    )
    examples = mewslix_pairs(path)
    assert [(e.id, e.query, e.target) for e in examples.items] == [
        ("a", "Rome: In  { Rome } the (a) Pope (b).", "A city.")
    ]
    assert examples.skipped == {CROSSES: 1}


def test_mewslix_errors(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"none\.jsonl: "):
        mewslix_mentions(tmp_path / "none.jsonl", "en")
    good, wrong = mention("a", 17, 21), mention("a", 17, 21)
    wrong["mention_span"] = {"start": 18, "end": 22, "text": "Rome"}
    bad: list[tuple[list[dict[str, Any]], str]] = [
        ([{"context": context()}], ":1: expected .*'mention'"),
        ([{"context": context(), "mention": good}, {"context": context(), "mention": good}], "mention 'a' occurs more"),
        ([{"context": context(), "mention": wrong}], ":1: mention a: its text at 18 to 22 is not 'Rome'"),
        ([{"context": context(text=""), "mention": good}], ":1: mention a: no text"),
        ([{"context": context(), "mention": {**good, "mention_span": None}}], ":1: expected"),
    ]
    for objects, message in bad:
        with pytest.raises(DataFileError, match=message):
            mewslix_mentions(write("bad.jsonl", rows(*objects)), "en")
    entity = {"entity_id": "Q1", "description": "", "sentence_spans": []}
    with pytest.raises(DataFileError, match="entity 'Q1' occurs more"):
        mewslix_entities(write("bad.jsonl", rows(entity, entity)))
    with pytest.raises(DataFileError, match=r":2: expected .*description"):
        mewslix_entities(write("bad.jsonl", rows(entity, {"entity_id": "Q2"})))
    with pytest.raises(DataFileError, match=r":1: expected .*contextual_mention"):
        mewslix_pairs(write("bad.jsonl", rows({"entity": entity})))
