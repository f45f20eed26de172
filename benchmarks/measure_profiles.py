"""Measure token-length profiles on data in XTREME's layout and write them as JSON (figures only, never text).

    python benchmarks/measure_profiles.py DATA_DIR --tokenizer DIR --out xfast/study/profiles.json

DATA_DIR holds ``xtreme/`` (what XTREME's download script leaves) and optionally ``mlm/``. Evaluation splits only (dev,
val and test), because inference is what the profiles stand for.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from xfast.study.profiles import JOSHI_CLASS, MAX_LENGTH, Tokenizer, group_of, measure, save_profiles

Sample = str | tuple[str, str]
Samples = dict[tuple[str, str], list[Any]]
"""(task, language) -> its samples, all texts or all pairs."""

MEASURED = (
    "XTREME dev, val and test files (sub-sampled) and UD plain text; lengths include special tokens: <s> A </s> or "
    f"<s> A </s></s> B </s>; samples longer than {MAX_LENGTH} tokens count as {MAX_LENGTH} (percent_over_limit says "
    "how many). Single: tatoeba (en: all English sides), bucc2018, mlm; udpos and panx with words joined by a space. "
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
    """Yield the first two columns of XTREME's CSV-quoted, CRLF-ended tables (xnli, pawsx)."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file, delimiter="\t"):
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
SOURCES: tuple[tuple[str, str, Callable[[Path], Iterator[Sample]]], ...] = (
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
    ("mlm", r"mlm/(?P<language>[a-z]+)_[a-z]+\.txt", sentences),
)


def collect(data_dir: Path, only: str | None = None) -> Samples:
    """Read every sample of every known task file under ``data_dir`` (which holds ``xtreme/`` and ``mlm/``).

    ``only`` names the one task to read.

    A file that cannot be understood ends the run with its name; nothing is skipped silently.
    """
    samples: Samples = defaultdict(list)
    for path in sorted(data_dir.rglob("*")):
        name = path.relative_to(data_dir).as_posix()
        for task, pattern, read in SOURCES:
            match = re.fullmatch(pattern, name)
            if match is None or only not in (None, task):
                continue
            language = match.groupdict().get("language", "en")
            if language not in JOSHI_CLASS:
                raise typer.BadParameter(f"{name}: unknown language {language!r}")
            try:
                samples[task, language].extend(read(path))
            except (ValueError, KeyError, IndexError) as error:
                raise typer.BadParameter(f"{name}: not in XTREME's layout of {task}: {error!r}") from error
    return dict(samples)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load XLM-R's tokenizer and check it against published ids.

    A tokenizer folder without its files loads without complaint in transformers 5.x and maps every piece to
    ``<unk>``; only known ids tell.
    """
    from transformers import XLMRobertaTokenizer  # slow to import: not before --help

    reference = folder / "reference_ids.json"
    if not reference.is_file():
        raise typer.BadParameter(f"{reference.name} is missing from the tokenizer folder")
    try:
        tokenizer: Any = XLMRobertaTokenizer.from_pretrained(str(folder))
    except (ImportError, ValueError) as error:  # without these, transformers asks for tiktoken, which does not help
        raise typer.BadParameter(f"the tokenizer needs: pip install sentencepiece protobuf ({error})") from None
    for case in json.loads(reference.read_text(encoding="utf-8")):
        # A special token spelled out in the text is one token to transformers and plain text to SentencePiece, which
        # made the published ids; such a text says nothing about the vocabulary.
        if any(special in case["text"] for special in tokenizer.all_special_tokens):
            continue
        if tokenizer(case["text"])["input_ids"] != case["ids"]:
            raise typer.BadParameter(f"the tokenizer does not reproduce {reference.name}: not XLM-R's")
    pair = tokenizer(["A"], ["B"])["input_ids"][0]
    if len(pair) != len(tokenizer(["A"])["input_ids"][0]) + len(tokenizer(["B"])["input_ids"][0]):
        raise typer.BadParameter("the tokenizer does not build pairs as <s> A </s></s> B </s>")
    checked: Tokenizer = tokenizer
    return checked


def main(
    data_dir: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="folder with xtreme/ and mlm/")],
    tokenizer: Annotated[Path, typer.Option(exists=True, file_okay=False, help="XLM-R tokenizer folder")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file to write")],
) -> None:
    """Measure a length profile for every task and language in DATA_DIR and write them to one JSON file."""
    encode = load_tokenizer(tokenizer)
    samples = collect(data_dir)
    if not samples:
        raise typer.BadParameter("no task files found; expected XTREME's layout under xtreme/", param_hint="data_dir")
    profiles = [
        measure(texts, encode, task=task, language=language)
        for (task, language), texts in track(samples.items(), description="Tokenising")
    ]
    save_profiles(
        profiles,
        out,
        tokenizer="XLM-RoBERTa SentencePiece unigram, 250002 ids",
        measured=MEASURED,
        date=datetime.date.today().isoformat(),
    )
    groups = sorted({(group_of(profile), profile.language) for profile in profiles})
    typer.echo(f"{len(profiles)} profiles, {len({language for _, language in groups})} languages -> {out.name}")


if __name__ == "__main__":
    typer.run(main)
