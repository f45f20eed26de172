"""Reading samples of every task from XTREME's layout, and the tokenizer that is checked before it is believed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from xfast.errors import DataFileError
from xfast.study import corpus
from xfast.study.profiles import load_profiles

ELSEWHERE = (
    '{"context": {"language": "xx", "text": "a", "sentence_spans": [{"start": 0, "end": 1}]}, "mention": '
    '{"example_id": "m", "entity_id": "Q", "mention_span": {"start": 0, "end": 1, "text": "a"}}}\n'
)
"""A mention of Mewsli-X in a language that there is not."""


def test_corpus_reads_every_layout(tmp_path: Path) -> None:
    squad = {"data": [{"paragraphs": [{"context": "C", "qas": [{"question": "Q1"}, {"question": "Q2"}]}]}]}
    lareqa = {"data": [{"paragraphs": [{"context": "S1 S2", "sentences": ["S1", "S2"], "qas": []}]}]}
    xcopa = {"premise": "P.", "choice1": "A", "choice2": "B", "question": "cause"}
    siqa = {"context": "C.", "question": "Q?", "answerA": "1", "answerB": "2", "answerC": "3"}
    spans = {"text": "In Rome.", "sentence_spans": [{"start": 0, "end": 8}]}
    mention = {"example_id": "m", "entity_id": "Q", "mention_span": {"start": 3, "end": 7, "text": "Rome"}}
    mentions = [{"context": {"language": code, **spans}, "mention": mention} for code in ("de", "ta")]
    files = {
        "xtreme/tatoeba/sw-en.sw": "moja\nmbili\u2028 tatu\n\n",
        "xtreme/tatoeba/sw-en.en": "one\n",
        "xtreme/udpos/test-te.tsv": "a\nb\n\nc\n\n",
        "xtreme/udpos/dev-te.tsv": "d\tNOUN\ne\tVERB\n",
        "xtreme/udpos/train-te.tsv": "not\tREAD\n",
        "xtreme/xnli/test-sw.tsv": 'plain\t"quoted ""word"""\r\n"two\r\nlines"\tb\r\n',
        "xtreme/xquad/xquad.el.json": json.dumps(squad),
        "xtreme/mlqa/MLQA_V1/dev/dev-context-hi-question-hi.json": json.dumps(squad),
        "xtreme/mlqa/MLQA_V1/dev/dev-context-hi-question-en.json": json.dumps(squad),
        "xtreme/tydiqa/tydiqa-goldp-v1.1-dev/tydiqa.goldp.te.dev.json": json.dumps(squad),
        "xtreme/lareqa/xquad-r/vi.json": json.dumps(lareqa),
        "xtreme/xcopa/val-qu.jsonl": json.dumps(xcopa) + "\n",
        "xtreme/siqa/socialIQa_v1.4_dev.jsonl": json.dumps(siqa) + "\r\n",
        "xtreme/bucc2018/zh-en.dev.zh": "zh-1\tx y\n",
        "xtreme/bucc2018/zh-en.dev.gold": "zh-1\ten-1\n",
        "xtreme/mewslix/wikinews_mentions-test.jsonl": "".join(f"{json.dumps(row)}\n" for row in mentions),
        "mlm/yo_ytb.txt": "one\n\ntwo\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert corpus.collect(tmp_path, "xnli", "mlm").keys() == {("xnli", "sw"), ("mlm", "yo")}
    assert corpus.collect(tmp_path) == {
        ("tatoeba", "sw"): ["moja", "mbili\u2028 tatu"],
        ("tatoeba", "en"): ["one"],
        ("udpos", "te"): ["d e", "a b", "c"],
        ("xnli", "sw"): [("plain", 'quoted "word"'), ("two\nlines", "b")],
        ("xquad", "el"): [("Q1", "C"), ("Q2", "C")],
        ("mlqa", "hi"): [("Q1", "C"), ("Q2", "C")],
        ("tydiqa", "te"): [("Q1", "C"), ("Q2", "C")],
        ("lareqa", "vi"): [("S1", "S1 S2"), ("S2", "S1 S2")],
        ("xcopa", "qu"): [("P. What was the cause?", "A"), ("P. What was the cause?", "B")],
        ("siqa", "en"): [("C. Q?", "1"), ("C. Q?", "2"), ("C. Q?", "3")],
        ("bucc2018", "zh"): ["x y"],
        ("mewslix", "de"): ["Rome: In { Rome } ."],
        ("mewslix", "ta"): ["Rome: In { Rome } ."],
        ("mlm", "yo"): ["one", "two"],
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("xtreme/tatoeba/xx-en.xx", "a\n"),
        ("xtreme/xnli/test-sw.tsv", "one column\n"),
        ("xtreme/xquad/xquad.el.json", "{"),
        ("xtreme/xcopa/val-qu.jsonl", "{}\n"),
        ("xtreme/bucc2018/zh-en.dev.zh", "no id\n"),
        ("xtreme/mewslix/wikinews_mentions-dev.jsonl", '{"context": {}}\n'),
        ("xtreme/mewslix/wikinews_mentions-test.jsonl", ELSEWHERE),
    ],
)
def test_corpus_names_the_file_it_cannot_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataFileError, match=re.escape(name)):
        corpus.collect(tmp_path)


@pytest.mark.parametrize(("lines", "begins"), [('a\tb\n"c\td\ne\tf\n', 2), ('a\tb\nc "d" e\t"f" g\n', 2)])
def test_stray_quotes_do_not_swallow_rows(tmp_path: Path, lines: str, begins: int) -> None:
    path = tmp_path / "xtreme" / "pawsx" / "test-de.tsv"
    path.parent.mkdir(parents=True)
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(DataFileError, match=rf"test-de\.tsv:{begins}: the row that begins here"):
        corpus.collect(tmp_path)


def test_fields_of_any_length_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "xtreme" / "xnli" / "test-sw.tsv"
    path.parent.mkdir(parents=True)
    path.write_text(f"{'long ' * 40_000}\tb\n", encoding="utf-8")  # beyond the csv module's own limit
    ((first, _),) = corpus.collect(tmp_path)["xnli", "sw"]
    assert len(first) == 200_000
    path.write_text(f"{'x' * (2**24 + 1)}\tb\n", encoding="utf-8")
    with pytest.raises(DataFileError, match="field larger than field limit"):
        corpus.collect(tmp_path)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "tatoeba").mkdir(parents=True)
    (tmp_path / "elsewhere" / "tatoeba" / "sw-en.sw").write_text("moja\n", encoding="utf-8")
    data = tmp_path / "data"
    data.mkdir()
    (data / "xtreme").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    (tmp_path / "elsewhere" / "gone").symlink_to(tmp_path / "nowhere")
    assert corpus.collect(data) == {("tatoeba", "sw"): ["moja"]}
    assert [path.name for path in corpus._files(data)] == ["gone", "sw-en.sw"]


def test_a_tokenizer_is_checked_against_published_ids(tmp_path: Path, data_dir: Path) -> None:
    folder = data_dir / "tokenizer" / "xlmr"
    assert corpus.load_tokenizer(folder).num_special_tokens_to_add(pair=True) == 4
    with pytest.raises(DataFileError, match="no folder"):
        corpus.load_tokenizer(tmp_path / "nowhere")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "sentencepiece.bpe.model").write_bytes((folder / "sentencepiece.bpe.model").read_bytes())
    (wrong / "reference_ids.json").write_text(json.dumps([{"text": "Hello", "ids": [0, 5, 2]}]))
    with pytest.raises(DataFileError, match="does not reproduce"):
        corpus.load_tokenizer(wrong)
    (wrong / "reference_ids.json").write_text("[{}]")
    with pytest.raises(DataFileError, match="expected a list"):
        corpus.load_tokenizer(wrong)


def test_profiles_are_measured_and_written(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "data" / "xtreme" / "tatoeba").mkdir(parents=True)
    text = (data_dir / "xtreme" / "tatoeba" / "jv-en.jv").read_bytes()
    (tmp_path / "data" / "xtreme" / "tatoeba" / "jv-en.jv").write_bytes(text)
    out = tmp_path / "profiles.json"
    (profile,) = corpus.measure_profiles(tmp_path / "data", data_dir / "tokenizer" / "xlmr", out, list)
    shipped = [one for one in load_profiles() if (one.task, one.language) == ("tatoeba", "jv")]
    assert shipped == [profile] == load_profiles(out)
    with pytest.raises(DataFileError, match="no task files"):
        corpus.measure_profiles(tmp_path / "nothing", data_dir / "tokenizer" / "xlmr", out, list)
