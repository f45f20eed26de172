"""Readers of the tasks' native formats and of XTREME's download layout.

Every reader takes (path, task, language) and returns :class:`Examples`. A row that cannot be used is either an error
that names file, line and what was expected, or a documented skip that is counted. Files may start with a byte-order
mark and end their lines with CRLF (XTREME writes its TSV files with Python's csv module).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xfast.errors import DataFileError
from xfast.stilts.examples import (
    Answer,
    ChoiceExample,
    Example,
    Examples,
    PairExample,
    SpanExample,
    TaggedExample,
    TextExample,
)
from xfast.stilts.languages import NAMES
from xfast.stilts.rows import MissingDataError, csv_rows, headed_rows, json_rows, lines, load_json, pick, text
from xfast.stilts.task import CHOICE, TAGGING, Task

UNLABELLED = "no agreed label"
"""Why SNLI's rows with the gold label ``-`` are left out: the paper's sizes count without them."""
BROKEN_ROW = "a row with the wrong number of columns"
OTHER_LANGUAGE_ROW = "a row of another language in a file of several"


# --- pairs ----------------------------------------------------------------------------------------

_LABEL_NAMES = {"contradictory": "contradiction", "c": "contradiction", "e": "entailment", "n": "neutral"}
_WITHHELD = ("", None, -1, "-1")
_FIRST, _SECOND = ("premise", "sentence1", "context", "question1"), ("hypothesis", "sentence2", "question2")
_HEADINGS = (*_FIRST, *_SECOND, "hypo")


def label_name(value: Any, labels: Sequence[str], where: str) -> str | None:
    """The task's name of a label, or None where it is withheld; an error where it is none of ``labels``.

    By name, never by position, because sources number their labels differently.
    """
    if value in _WITHHELD:
        return None
    name = str(value).strip()
    name = _LABEL_NAMES.get(name, name)
    if name not in labels:
        raise DataFileError(f"{where}: label {value!r}; accepted: {', '.join(labels)}")
    return name


def pair_row(row: Mapping[str, Any], task: Task, where: str) -> PairExample | str:
    """A pair from named columns, or the reason why the row is left out."""
    label = next((row[name] for name in ("gold_label", "label", "is_duplicate") if name in row), None)
    if label == "-":
        return UNLABELLED
    first, second = text(row, _FIRST, where), text(row, _SECOND, where)
    name = label_name(label, task.labels, where)
    return PairExample(str(row.get("uid") or row.get("pairID") or where), first, second, name)


def read_pairs(path: Path, task: Task, language: str) -> Examples[PairExample]:
    """Pairs: JSON lines, GLUE's TSV with a header, or XTREME's TSV without one (sentence1, sentence2, label)."""
    if path.suffix == ".jsonl":
        return _of_language(path, language, task)
    first_line = next(iter(lines(path)), (0, ""))[1]
    if first_line.startswith("id\t"):
        return _read_glue(path, task)
    examples: Examples[PairExample] = Examples()
    columns = None
    for number, row in csv_rows(path, "\t"):
        where = f"{path}:{number}"
        if len(row) not in ((2, 3) if columns is None else (columns,)):
            # of a file with labels, a row without one is two texts that a stray quotation mark has joined
            many = "sentence1, sentence2, label (or none)" if columns is None else f"{columns} as before"
            raise DataFileError(f"{where}: {len(row)} columns, expected {many}")
        columns = len(row)
        if number == 1 and row[0].strip().lower() in _HEADINGS and row[1].strip().lower() in _HEADINGS:
            raise DataFileError(f"{where}: a heading, which XTREME's files do not have; leave the line out")
        label = label_name(row[2], task.labels, where) if len(row) == 3 else None
        examples.items.append(PairExample(f"{path.stem}-{len(examples)}", row[0], row[1], label))
    return examples


def _of_language(path: Path, language: str, task: Task) -> Examples[PairExample]:
    """JSON lines; of a file with several languages, as XNLI's own release, those that are ``language``'s.

    Read as English, a file of translations into several languages is taken whole: it is training data.
    """
    rows = list(json_rows(path))
    spoken = {str(row.get("language", language)) for _, row in rows}
    if len(spoken) < 2 or (language == "en" and language not in spoken):
        return _collect(path, iter(rows), pair_row, task)
    if language not in spoken:
        raise MissingDataError(f"{path}: no row is in {language}; it has {', '.join(sorted(spoken))}")
    mine = [(number, row) for number, row in rows if row.get("language", language) == language]
    examples = _collect(path, iter(mine), pair_row, task)
    examples.skipped[OTHER_LANGUAGE_ROW] += len(rows) - len(mine)
    return examples


def _read_glue(path: Path, task: Task) -> Examples[PairExample]:
    """GLUE's TSV: no quoting at all, and QQP's own file has a few rows that are broken off at a line end."""
    (_, header), *rows = [(number, line.split("\t")) for number, line in lines(path) if line]
    whole = [(number, dict(zip(header, row, strict=True))) for number, row in rows if len(row) == len(header)]
    examples = _collect(path, iter(whole), pair_row, task)
    examples.skipped += Counter({BROKEN_ROW: len(rows) - len(whole)})
    return examples


def _collect(
    path: Path,
    rows: Iterator[tuple[int, dict[str, Any]]],
    convert: Callable[[Mapping[str, Any], Task, str], Any],
    task: Task,
) -> Examples[Any]:
    examples: Examples[Any] = Examples()
    for number, row in rows:
        converted = convert(row, task, f"{path}:{number}")
        if isinstance(converted, str):
            examples.skipped[converted] += 1
        else:
            examples.items.append(converted)
    return examples


# --- multiple choice ------------------------------------------------------------------------------


def _choice(where: str, prompt: str, choices: Any, label: Any) -> ChoiceExample:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise DataFileError(f"{where}: choices {choices!r}; expected a list of texts")
    index = _position(label, [str(number) for number in range(len(choices))], where)
    return ChoiceExample(where, prompt, tuple(choices), index)


def _position(label: Any, names: Sequence[str], where: str) -> int | None:
    if label in _WITHHELD:
        return None
    try:
        return list(names).index(str(label).strip())
    except ValueError:
        raise DataFileError(f"{where}: label {label!r}; accepted: {', '.join(names)}") from None


def hellaswag_row(row: Mapping[str, Any], task: Task, where: str) -> ChoiceExample:
    """A = ctx_a; each B = ctx_b + " " + ending."""
    start, endings = text(row, ("ctx_b",), where), pick(row, ("endings",), where)
    example = _choice(where, text(row, ("ctx_a",), where), endings, row.get("label"))
    return replace(example, choices=tuple(f"{start} {ending}" for ending in example.choices))


def cosmosqa_row(row: Mapping[str, Any], task: Task, where: str) -> ChoiceExample:
    """A = context + " " + question; each B = an answer."""
    prompt = f"{text(row, ('context',), where)} {text(row, ('question',), where)}"
    answers = [pick(row, (f"answer{i}",), where) for i in range(4)]
    return _choice(where, prompt, answers, row.get("label"))


def commonsenseqa_row(row: Mapping[str, Any], task: Task, where: str) -> ChoiceExample:
    """A = question; each B = a choice. The original's nested ``question.stem`` and the Hub's flat columns."""
    question = pick(row, ("question",), where)
    nested = isinstance(question, Mapping)
    choices = pick(question if nested else row, ("choices",), where)
    try:
        if isinstance(choices, Mapping):
            pairs = list(zip(choices["label"], choices["text"], strict=True))
        else:
            pairs = [(choice["label"], choice["text"]) for choice in choices]
    except (KeyError, TypeError, ValueError):
        raise DataFileError(f"{where}: choices {choices!r}; expected a label and a text for each") from None
    label = _position(row.get("answerKey"), [str(letter) for letter, _ in pairs], where)
    stem = text(question if nested else row, ("stem",) if nested else ("question",), where)
    return _choice(where, stem, [choice for _, choice in pairs], label)


def siqa_row(row: Mapping[str, Any], task: Task, where: str) -> ChoiceExample:
    """A = context + " " + question; each B = an answer. ``correct`` is a letter, the Hub's ``label`` counts from 1."""
    prompt = f"{text(row, ('context',), where)} {text(row, ('question',), where)}"
    answers = [pick(row, (f"answer{letter}",), where) for letter in "ABC"]
    given = pick(row, ("correct", "label"), where)
    letter = "ABC"[int(given) - 1] if str(given).strip() in ("1", "2", "3") else given
    return _choice(where, prompt, answers, _position(letter, "ABC", where))


def copa_row(row: Mapping[str, Any], task: Task, where: str) -> ChoiceExample:
    """A = premise + " What was the cause?" (or effect); each B = a choice."""
    asked = pick(row, ("question",), where)
    if asked not in ("cause", "effect"):
        raise DataFileError(f"{where}: question {asked!r}; accepted: cause, effect")
    prompt = f"{text(row, ('premise',), where)} What was the {asked}?"
    return _choice(where, prompt, [pick(row, (f"choice{i}",), where) for i in (1, 2)], row.get("label"))


def _choice_reader(convert: Callable[[Mapping[str, Any], Task, str], ChoiceExample]) -> Reader:
    def read(path: Path, task: Task, language: str) -> Examples[Any]:
        rows = headed_rows(path) if path.suffix == ".csv" else json_rows(path)
        return _collect(path, rows, convert, task)

    return read


# --- spans ----------------------------------------------------------------------------------------

OTHER_LANGUAGE = "a question of another language in a one-language file"
ANSWER_MOVED = "answer_start did not point at the answer: moved to its only occurrence"
ANSWER_LOST = "the context does not hold the answer"


def read_squad(path: Path, task: Task, language: str) -> Examples[SpanExample]:
    """SQuAD's JSON (v1.1, v2.0), as XQuAD, MLQA and TyDiQA-GoldP use it.

    An answer whose ``answer_start`` is wrong is moved if the context holds it exactly once; otherwise it has no place,
    which is counted: such an answer is scored, but nothing learns from it. TyDiQA's question ids begin with their
    language: questions of another one are left out and counted (published copies of the English training file held
    all nine).
    XTREME's preparation of those files cuts the ids to their last number: repeated ids get their position added.
    """
    document = load_json(path)
    articles = document.get("data", document) if isinstance(document, dict) else document
    examples: Examples[SpanExample] = Examples()
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for qa in paragraph["qas"]:
                    add_question(examples, context, qa, task, language)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise DataFileError(
            f"{path}: not SQuAD's format, data[].paragraphs[].{{context, qas[].{{id, question, answers}}}}: {error!r}"
        ) from None
    ids = Counter(example.id for example in examples.items)
    unique = [e if ids[e.id] == 1 else replace(e, id=f"{e.id}-{i}") for i, e in enumerate(examples.items)]
    return Examples(unique, examples.skipped)


def add_question(
    examples: Examples[SpanExample], context: str, qa: Mapping[str, Any], task: Task, language: str
) -> None:
    """Add a question of SQuAD's format (id, question, answers, is_impossible), or count why it is left out.

    Raises:
        TypeError, KeyError, ValueError: it has not this format.
    """
    identity = str(qa["id"])
    if task.name == "tydiqa" and _names_another_language(identity, language):
        examples.skipped[OTHER_LANGUAGE] += 1
        return
    if not isinstance(context, str) or not isinstance(qa["question"], str):
        raise TypeError(f"the context or the question of {identity} is no text")
    impossible = bool(qa.get("is_impossible", False))
    answers = [] if impossible else [(a["text"], int(a["answer_start"])) for a in qa.get("answers", ())]
    kept = tuple(_located(text, start, context, examples) for text, start in answers if text)
    examples.items.append(SpanExample(identity, qa["question"], context, kept, impossible))


def _names_another_language(identity: str, language: str) -> bool:
    prefix = identity.split("-")[0].lower()
    return prefix in {name.lower() for name in NAMES.values()} and prefix != NAMES.get(language, "").lower()


def _located(text: str, start: int, context: str, examples: Examples[SpanExample]) -> Answer:
    if start >= 0 and context.startswith(text, start):
        return Answer(text, start)
    if context.count(text) == 1:
        examples.skipped[ANSWER_MOVED] += 1
        return Answer(text, context.index(text))
    examples.skipped[ANSWER_LOST] += 1
    return Answer(text, None)


# --- tagging --------------------------------------------------------------------------------------


def sentences(path: Path, empty: bool = False) -> Iterator[list[tuple[int, str]]]:
    """Blocks of non-empty lines with their line numbers.

    Several empty lines in a row separate as one does; or, with ``empty``, there are sentences without words between
    them, as the official reader of labels and predictions has it. At the file's end there are none.
    """
    block: list[tuple[int, str]] = []
    waiting = 0  # empty sentences, until another one follows
    for number, line in lines(path):
        if line.strip():
            if not block:
                yield from ([] for _ in range(waiting if empty else 0))
                waiting = 0
            block.append((number, line))
        elif block:
            yield block
            block = []
        else:
            waiting += 1
    if block:
        yield block


def read_tagged(path: Path, task: Task, language: str) -> Examples[TaggedExample]:
    """One ``word<TAB>tag`` a line (the word alone where tags are withheld), an empty line between sentences.

    Sentences without words stay: predictions have to have them, too. Where tags are withheld, theirs are.
    """
    examples: Examples[TaggedExample] = Examples()
    blocks = list(sentences(path, empty=True))
    # what comes before the first word is withheld where that word's tag is
    width = next((len(block[0][1].split("\t")) for block in blocks if block), 2)
    for block in blocks:
        rows = [line.split("\t") for _, line in block]
        width = len(rows[0]) if rows else width
        for (number, _), row in zip(block, rows, strict=True):
            if width > 2 or len(row) != width:
                raise DataFileError(f"{path}:{number}: expected word<TAB>tag throughout a sentence, or words alone")
        tags = tuple(row[1].strip() for row in rows) if width == 2 else None
        _check_tags(tags or (), [number for number, _ in block], path, task)
        examples.items.append(TaggedExample(f"{path.stem}-{len(examples)}", tuple(row[0] for row in rows), tags))
    return examples


def _check_tags(tags: Sequence[str], numbers: Sequence[int], path: Path, task: Task) -> None:
    if task.labels and not set(tags) <= set(task.labels):
        index = next(i for i, tag in enumerate(tags) if tag not in task.labels)
        raise DataFileError(f"{path}:{numbers[index]}: tag {tags[index]!r}; accepted: {', '.join(task.labels)}")


def read_ccg(path: Path, task: Task, language: str) -> Examples[TaggedExample]:
    """``sentence<TAB>tags``, words and supertags separated by single spaces."""
    examples: Examples[TaggedExample] = Examples()
    for number, line in lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        words, tags = fields[0].split(), fields[1].split() if len(fields) == 2 else []
        if len(fields) != 2 or len(words) != len(tags):
            raise DataFileError(f"{path}:{number}: {len(words)} words and {len(tags)} tags; expected sentence<TAB>tags")
        examples.items.append(TaggedExample(f"{path.stem}-{len(examples)}", tuple(words), tuple(tags)))
    return examples


WITHHELD_WORDS = "a sentence without its words"
_TAG_RANK = " VERB NOUN PROPN PRON ADJ NUM ADV INTJ AUX ADP DET PART CCONJ SCONJ X PUNCT "
_TAG_RANKS = {
    "es": " VERB AUX PRON ADP DET ",
    "fr": " VERB AUX PRON NOUN ADJ ADV ADP DET PART SCONJ CONJ ",
    "it": " VERB AUX ADV PRON ADP DET INTJ ",
}
"""The languages for which XTREME's preparation ranks tags otherwise."""


def read_conllu(path: Path, task: Task, language: str) -> Examples[TaggedExample]:
    """CoNLL-U as XTREME prepares it: FORM and UPOS, empty nodes left out.

    A multi-word token stays one word (German "im"), tagged as its part nearest the root; of several as near, as the one
    whose tag ranks first in that language. Sentences with at most one form that is not ``_`` (their treebank may not
    publish its text) are left out and counted.
    """
    examples: Examples[TaggedExample] = Examples()
    for block in sentences(path):
        rows = [(number, line.split("\t")) for number, line in block if line[0] != "#"]
        words = list(_conllu_words(rows, path, _TAG_RANKS.get(language, _TAG_RANK)))
        forms = tuple(word[1].replace(" ", "").replace("\u200c", "") or "_" for _, word in words)
        tags = tuple(word[3] for _, word in words)
        _check_tags(tags, [number for number, _ in words], path, task)
        if "_" in forms and forms.count("_") >= len(forms) - 1:
            examples.skipped[WITHHELD_WORDS] += 1
        elif forms:
            examples.items.append(TaggedExample(f"{path.stem}-{len(examples)}", forms, tags))
    return examples


def _conllu_words(rows: list[tuple[int, list[str]]], path: Path, ranks: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, columns) of every word; ``ranks``: tags between spaces."""
    for number, row in rows:
        if len(row) != 10:
            raise DataFileError(f"{path}:{number}: {len(row)} columns, expected CoNLL-U's 10")
    by_id = {row[0]: row for _, row in rows}

    def rank(part: list[str]) -> tuple[int, int]:
        depth, head = 0, part[6]
        while head in by_id and depth < len(rows):  # the bound: a broken tree may hold a cycle
            depth, head = depth + 1, by_id[head][6]
        return depth, ranks.find(f" {part[3]} ") % len(ranks)  # what is not ranked comes last

    covered = 0
    for number, row in rows:
        first, _, last = row[0].partition("-")
        if "." in first or (first.isdigit() and int(first) <= covered):
            continue
        try:
            parts = [by_id[str(i)] for i in range(int(first), int(last or first) + 1)]
            tag = min(parts, key=rank)[3]
        except (KeyError, ValueError):
            raise DataFileError(f"{path}:{number}: id {row[0]!r} is none, or a part of the word is missing") from None
        covered = int(last or first)
        yield number, [*row[:3], tag, *row[4:]]


# --- plain text -----------------------------------------------------------------------------------

EMPTY_LINE = "empty line"


def read_lines(path: Path, task: Task, language: str) -> Examples[TextExample]:
    """One text a line."""
    examples: Examples[TextExample] = Examples()
    for number, line in lines(path):
        if line.strip():
            examples.items.append(TextExample(f"{path.stem}-{number}", line.strip()))
        else:
            examples.skipped[EMPTY_LINE] += 1
    return examples


def read_gold(path: Path) -> list[str]:
    """A label file of XTREME: one label a line."""
    return [line.strip() for _, line in lines(path)]


def with_gold(examples: Examples[Any], path: Path, task: Task) -> Examples[Any]:
    """The pairs, choices or sentences of an unlabelled file joined with its gold file, which must match one to one."""
    joined = []
    if task.type == TAGGING:
        blocks = sentences(path)
        for example, block in _beside(examples.items, blocks):
            words, tags = example.words if example else (), tuple(line.strip() for _, line in block or ())
            if len(words) != len(tags):
                where = f"{path}:{block[0][0]}" if block else f"{path}: after its end"
                raise DataFileError(f"{where}: {len(tags)} tags for {len(words)} words")
            _check_tags(tags, [number for number, _ in block], path, task)
            joined.append(replace(example, tags=tags))
        return Examples(joined, examples.skipped)
    if task.type == CHOICE:
        gold = [(number, pick(row, ("label",), f"{path}:{number}")) for number, row in json_rows(path)]
    else:
        gold = [(number, line.strip()) for number, line in lines(path) if line.strip()]
    if len(gold) != len(examples):
        raise DataFileError(f"{path}: {len(gold)} labels for {len(examples)} examples")
    for example, (number, given) in zip(examples.items, gold, strict=True):
        names = [str(i) for i in range(len(example.choices))] if task.type == CHOICE else task.labels
        convert = _position if task.type == CHOICE else label_name
        joined.append(replace(example, label=convert(given, names, f"{path}:{number}")))
    return Examples(joined, examples.skipped)


def _beside(examples: Sequence[TaggedExample], blocks: Iterator[list[tuple[int, str]]]) -> Iterator[tuple[Any, Any]]:
    """Each sentence with its block of gold; None for what is missing. Sentences without words have an empty one."""
    for example in examples:
        yield example, next(blocks, None) if example.words else []
    yield from ((None, block) for block in blocks)


Reader = Callable[[Path, Task, str], Examples[Any]]

ROWS: dict[str, Callable[[Mapping[str, Any], Task, str], Example | str]] = {
    "pairs": pair_row,
    "hellaswag": hellaswag_row,
    "cosmosqa": cosmosqa_row,
    "commonsenseqa": commonsenseqa_row,
    "siqa": siqa_row,
    "copa": copa_row,
}
"""One row with named columns to one example: shared by the files' readers and the Hub's."""

READERS: dict[str, Reader] = {
    "pairs": read_pairs,
    "squad": read_squad,
    "tagged": read_tagged,
    "ccg": read_ccg,
    "conllu": read_conllu,
    "lines": read_lines,
    **{name: _choice_reader(convert) for name, convert in ROWS.items() if name != "pairs"},  # type: ignore[arg-type]
}
"""Readers by the name that :class:`Task` gives."""
