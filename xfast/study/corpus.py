"""Samples of every task and language from data in XTREME's layout, as a model reads them: texts and pairs of texts.

A data folder holds ``xtreme/`` (what XTREME's download script leaves) and optionally ``mlm/``. Evaluation splits only
(dev, val and test), because inference is what the study is about.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from xfast.errors import DataFileError
from xfast.stilts import tokenizer as tokenizers
from xfast.stilts.retrieval_data import mewslix_texts
from xfast.stilts.rows import csv_rows
from xfast.study.profiles import JOSHI_CLASS, MAX_LENGTH, LengthProfile, Tokenizer, measure, save_profiles

Samples = dict[tuple[str, str], list[Any]]
"""(task, language) -> its samples, all texts or all pairs."""

MEASURED = (
    "XTREME dev, val and test files (sub-sampled) and UD plain text; lengths include special tokens: <s> A </s> or "
    f"<s> A </s></s> B </s>; samples longer than {MAX_LENGTH} tokens count as {MAX_LENGTH} (percent_over_limit says "
    "how many). Single: tatoeba (en: all English sides), bucc2018, mlm, mewslix mentions in their sentences; udpos and "
    "panx with words joined by a space. "
    "Pairs: xnli, pawsx; xquad, mlqa, tydiqa question + whole context; xcopa 'premise What was the cause|effect?' + "
    "each choice; siqa 'context question' + each answer; lareqa candidate sentence + its paragraph. Words by "
    "whitespace; fertility is tokens without specials per word, uncut; both null for ja my th zh."
)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their ends.

    Only the newline ends a line: ``str.splitlines`` would also split at U+2028 or U+0085 inside a sentence.
    """
    with path.open(encoding="utf-8", newline="") as file:
        for line in "".join(file).removesuffix("\n").split("\n"):
            yield line.removesuffix("\r")


def sentences(path: Path) -> Iterator[str]:
    """Yield the non-empty lines (tatoeba, mlm)."""
    return (line for line in lines_of(path) if line.strip())


def numbered_sentences(path: Path) -> Iterator[str]:
    """Yield the text of ``id<TAB>sentence`` lines (bucc2018)."""
    return (line.split("\t", 1)[1] for line in sentences(path))


def tagged_sentences(path: Path) -> Iterator[str]:
    """Yield sentences of ``token[<TAB>tag]`` lines parted by empty lines, words joined by a space (udpos, panx)."""
    words: list[str] = []
    for line in (*lines_of(path), ""):
        if line:
            words.append(line.split("\t", 1)[0])
        elif words:
            yield " ".join(words)
            words = []


def tab_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the first two columns of XTREME's CSV-quoted, CRLF-ended tables (xnli, pawsx), as evaluations read them."""
    for _, row in csv_rows(path, "\t"):
        yield row[0], row[1]


def paragraphs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the paragraphs of a SQuAD-format file."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        yield from article["paragraphs"]


def question_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (question, whole context) of each question (xquad, mlqa, tydiqa)."""
    for paragraph in paragraphs(path):
        for question in paragraph["qas"]:
            yield question["question"], paragraph["context"]


def candidate_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (candidate sentence, its paragraph), what a LAReQA answer encoder reads."""
    for paragraph in paragraphs(path):
        for sentence in paragraph["sentences"]:
            yield sentence, paragraph["context"]


def choice_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (premise and question, choice) for both choices (xcopa), with XTREME's English question."""
    for row in map(json.loads, sentences(path)):
        for choice in ("choice1", "choice2"):
            yield f"{row['premise']} What was the {row['question']}?", row[choice]


def answer_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (context and question, answer) for the three answers (siqa)."""
    for row in map(json.loads, sentences(path)):
        for answer in ("answerA", "answerB", "answerC"):
            yield f"{row['context']} {row['question']}", row[answer]


# (task, file name pattern under the root, reader). The named group ``language`` is the language; without one: English.
# MLQA files whose question is in another language than the context belong to no single language and are not read.
# The readers of ``MIXED`` tasks, whose files hold all languages, yield (language, sample).
SOURCES: tuple[tuple[str, str, Callable[[Path], Iterator[Any]]], ...] = (
    ("tatoeba", r"xtreme/tatoeba/[a-z]+-en\.(?P<language>[a-z]+)", sentences),
    ("udpos", r"xtreme/udpos/(dev|test)-(?P<language>[a-z]+)\.tsv", tagged_sentences),
    ("panx", r"xtreme/panx/(dev|test)-(?P<language>[a-z]+)\.tsv", tagged_sentences),
    ("xnli", r"xtreme/xnli/(dev|test)-(?P<language>[a-z]+)\.tsv", tab_pairs),
    ("pawsx", r"xtreme/pawsx/(dev|test)-(?P<language>[a-z]+)\.tsv", tab_pairs),
    ("xquad", r"xtreme/xquad/xquad\.(?P<language>[a-z]+)\.json", question_pairs),
    (
        "mlqa",
        r"xtreme/mlqa/MLQA_V1/(dev|test)/(dev|test)-context-(?P<language>[a-z]+)-question-(?P=language)\.json",
        question_pairs,
    ),
    (
        "tydiqa",
        r"xtreme/tydiqa/tydiqa-goldp-v1\.1-dev/tydiqa\.goldp\.(?P<language>[a-z]+)\.dev\.json",
        question_pairs,
    ),
    ("lareqa", r"xtreme/lareqa/xquad-r/(?P<language>[a-z]+)\.json", candidate_pairs),
    ("xcopa", r"xtreme/xcopa/(val|test)-(?P<language>[a-z]+)\.jsonl", choice_pairs),
    ("siqa", r"xtreme/siqa/socialIQa_v1\.4_dev\.jsonl", answer_pairs),
    ("bucc2018", r"xtreme/bucc2018/[a-z]+-en\.(dev|test)\.(?P<language>(?!gold)[a-z]+)", numbered_sentences),
    ("mewslix", r"xtreme/mewslix/wikinews_mentions(-(dev|test)|/(dev|test)-[a-z]+)\.jsonl", mewslix_texts),
    ("mlm", r"mlm/(?P<language>[a-z]+)_[a-z]+\.txt", sentences),
)
MIXED = frozenset({"mewslix"})


def collect(data_dir: Path, *only: str) -> Samples:
    """Read every sample of every known task file under ``data_dir`` (which holds ``xtreme/`` and ``mlm/``).

    ``only`` names the tasks to read; without any, all are.

    Raises:
        DataFileError: a file cannot be understood, or its language is unknown; nothing is skipped silently.
    """
    samples: Samples = defaultdict(list)
    for path in _files(data_dir):
        name = path.relative_to(data_dir).as_posix()
        for task, pattern, read in SOURCES:
            match = re.fullmatch(pattern, name)
            if match is None or (only and task not in only):
                continue
            language = match.groupdict().get("language", "en")
            try:
                for spoken, sample in read(path) if task in MIXED else zip(repeat(language), read(path)):
                    if spoken not in JOSHI_CLASS:
                        raise DataFileError(f"{name}: unknown language {spoken!r}")
                    samples[task, spoken].append(sample)
            except DataFileError:
                raise  # says more already
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                raise DataFileError(f"{name}: not in XTREME's layout of {task}: {error!r}") from error
    return dict(samples)


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names; links to folders are followed, but not in circles.

    Raises:
        DataFileError: a folder cannot be listed.
    """
    real = folder.resolve()
    if real in above or not folder.is_dir():
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataFileError(f"{folder}: cannot be listed: {error.strerror}") from error
    for path in inside:
        if path.is_dir():
            yield from _files(path, (*above, real))
        else:
            yield path


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load XLM-R's tokenizer and check it against published ids, ``reference_ids.json``, where they lie beside it.

    A tokenizer folder without its files loads without complaint in transformers 5.x and maps every piece to
    ``<unk>``; only known ids tell.

    Raises:
        DataFileError: no tokenizer there, or not XLM-R's.
        BackendUnavailableError: a library that reads it is not installed.
    """
    if not folder.is_dir():
        raise DataFileError(f"tokenizer: {folder} is no folder")
    tokenizer = tokenizers.load_tokenizer(str(folder))
    reference = folder / "reference_ids.json"
    if reference.is_file():
        _check_ids(tokenizer, reference)
    pair = tokenizer(["A"], ["B"])["input_ids"][0]
    single = len(tokenizer(["A"])["input_ids"][0])
    if len(pair) not in (2 * single, 2 * single - 1):  # XLM-R: <s> A </s></s> B </s>; BERT: one separator
        raise DataFileError(f"tokenizer: {folder} does not build pairs of texts with their separators")
    checked: Tokenizer = tokenizer
    return checked


def _check_ids(tokenizer: Any, reference: Path) -> None:
    try:
        cases = [(case["text"], case["ids"]) for case in json.loads(reference.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataFileError(f"tokenizer: {reference}: expected a list of {{text, ids}}: {error!r}") from error
    for text, ids in cases:
        # A special token spelled out in the text is one token to transformers and plain text to SentencePiece, which
        # made the published ids; such a text says nothing about the vocabulary.
        if any(special in text for special in tokenizer.all_special_tokens):
            continue
        if tokenizer(text)["input_ids"] != ids:
            raise DataFileError(f"tokenizer: it does not reproduce {reference}: not the tokenizer of these ids")


def measure_profiles(data_dir: Path, tokenizer: Path, out: Path, track: Callable[[Any], Any]) -> list[LengthProfile]:
    """Measure a length profile for every task and language under ``data_dir`` and write them to one JSON file.

    Args:
        data_dir: folder with ``xtreme/`` and optionally ``mlm/``.
        tokenizer: folder of the tokenizer.
        out: the file.
        track: shows progress over a list while it is gone through.

    Raises:
        DataFileError: no task files, or one that cannot be understood.
    """
    encode = load_tokenizer(tokenizer)
    samples = collect(data_dir)
    if not samples:
        raise DataFileError(f"{data_dir}: no task files found; expected XTREME's layout under xtreme/")
    profiles = [
        measure(texts, encode, task=task, language=language) for (task, language), texts in track(list(samples.items()))
    ]
    name = getattr(encode, "name_or_path", "") or str(tokenizer)
    known = (tokenizer / "reference_ids.json").is_file()
    title = f"XLM-RoBERTa SentencePiece unigram, {len(encode)} ids" if known else Path(name).name  # type: ignore[arg-type]
    save_profiles(profiles, out, tokenizer=title, measured=MEASURED, date=datetime.date.today().isoformat())
    return profiles
