"""Readers of the retrieval benchmarks: Tatoeba, BUCC 2018, LAReQA (XQuAD-R) and Mewsli-X.

``folder`` is XTREME's download folder, or one that holds it as ``xtreme/``. Sources: the download and preprocessing
scripts of XTREME, the data formats that LASER, BUCC, LAReQA and Mewsli-X publish, and XTREME-R's own reading of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts.examples import Examples, MatchExample
from xfast.stilts.folders import find
from xfast.stilts.languages import ISO3
from xfast.stilts.rows import json_rows, lines, load_json

NO_SENTENCE = "the answer starts in no sentence"
CROSSES = "the mention lies in no single sentence"


@dataclass(frozen=True)
class Sentences:
    """Texts and their ids, in the file's order: ``ids[i]`` names ``texts[i]``."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tatoeba:
    """Translated sentences of one language.

    Attributes:
        foreign: N sentences, row by row as in the file, empty ones included: a prediction is a row number.
        english: N sentences, in an order of their own.
        gold: for each English sentence the row of its translation in ``foreign``; None where no labels are there.
    """

    foreign: tuple[str, ...]
    english: tuple[str, ...]
    gold: tuple[int, ...] | None


@dataclass(frozen=True)
class Bucc:
    """Two monolingual corpora that hold some translations of each other.

    Attributes:
        source: sentences of the language.
        target: English sentences.
        gold: (source id, target id) of the translations; None where they are withheld.
    """

    source: Sentences
    target: Sentences
    gold: frozenset[tuple[str, str]] | None


@dataclass(frozen=True)
class Queries:
    """Queries: ``ids[i]``, ``texts[i]`` and ``languages[i]`` belong together."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    languages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Passages:
    """LAReQA's candidates: sentence ``i`` and the paragraph that it comes from."""

    ids: tuple[str, ...]
    sentences: tuple[str, ...]
    contexts: tuple[str, ...]
    languages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Ranking:
    """LAReQA's questions of all languages, which rank one pool of sentences of all languages.

    Attributes:
        gold: by query id, the ids of the candidates that answer it, in every language.
        skipped: by language, questions that were left out, by reason.
    """

    queries: Queries
    candidates: Passages
    gold: dict[str, frozenset[str]]
    skipped: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Mentions:
    """Mewsli-X's mentions of one language.

    Attributes:
        queries: the mentions as :func:`mention_text` writes them.
        gold: by query id, the one right entity id (a set, as the ranking metric wants it); without those of mentions
            that have an empty one: XTREME writes it over what it withholds. See
            :func:`xfast.stilts.scoring.mewslix_gold`.
        skipped: mentions that were left out, by reason.
    """

    queries: Queries
    gold: dict[str, frozenset[str]]
    skipped: Counter[str] = field(default_factory=Counter)


# --- helpers --------------------------------------------------------------------------------------


def _needed(folder: Path, relative: str) -> Path:
    path = find(folder, relative)
    if path is None:
        raise DataFileError(f"{folder / relative}: no such file (nor below {folder / 'xtreme'})")
    return path


@contextmanager
def _expecting(where: object, form: str) -> Iterator[None]:
    try:
        yield
    except DataFileError:
        raise  # says more already
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataFileError(f"{where}: expected {form}: {error!r}") from None


def _unique(ids: Sequence[str], path: Path, what: str) -> None:
    if len(set(ids)) != len(ids):
        twice = next(identity for identity, count in Counter(ids).items() if count > 1)
        raise DataFileError(f"{path}: {what} {twice!r} occurs more than once")


# --- bitext ---------------------------------------------------------------------------------------


def tatoeba(folder: Path | str, language: str) -> Tatoeba:
    """Tatoeba's sentences of a language and their English translations.

    Reads XTREME's layout, ``tatoeba/{language}-en.{language}`` and ``.en`` (the English side sorted by XTREME, so that
    its gold is in ``labels/tatoeba/test-{language}.tsv`` and only there), or else LASER's own,
    ``tatoeba/tatoeba.{iso3}-eng.{iso3}`` and ``.eng``, where row i translates row i; its English side is sorted here.

    Raises:
        DataFileError: a file is missing or not UTF-8, the sides differ in length, or a label is no row.
    """
    folder, iso = Path(folder), ISO3.get(language, language)
    names = [
        (f"tatoeba/{language}-en.{language}", f"tatoeba/{language}-en.en"),
        (f"tatoeba/tatoeba.{iso}-eng.{iso}", f"tatoeba/tatoeba.{iso}-eng.eng"),
    ]
    layout = next((i for i, (name, _) in enumerate(names) if find(folder, name)), None)
    if layout is None:
        raise DataFileError(f"{folder}: neither {names[0][0]} nor {names[1][0]}")
    paths = [_needed(folder, name) for name in names[layout]]
    foreign, english = (tuple(line for _, line in lines(path)) for path in paths)
    if len(foreign) != len(english):
        raise DataFileError(f"{paths[0]} and {paths[1]}: {len(foreign)} and {len(english)} sentences, expected as many")
    if layout == 1:  # in XTREME's order, in which its labels and submissions are
        order = sorted(range(len(english)), key=english.__getitem__)
        return Tatoeba(foreign, tuple(english[row] for row in order), tuple(order))
    labels = find(folder, f"labels/tatoeba/test-{language}.tsv")
    return Tatoeba(foreign, english, None if labels is None else _rows(labels, len(foreign)))


def _rows(path: Path, count: int) -> tuple[int, ...]:
    rows = []
    for number, line in lines(path):
        label = line.strip()
        if not (label.isdecimal() and int(label) < count):
            raise DataFileError(f"{path}:{number}: {label!r}; expected the number of a row, 0 to {count - 1}")
        rows.append(int(label))
    if len(rows) != count:
        raise DataFileError(f"{path}: {len(rows)} labels for {count} sentences")
    return tuple(rows)


def bucc(folder: Path | str, language: str, split: str) -> Bucc:
    """BUCC 2018's sentences of a language pair with English.

    Args:
        language: de, fr, ru or zh.
        split: "dev" (BUCC's sample) or "test" (its training set, whose gold XTREME deletes): any name whose files
            ``bucc2018/{language}-en.{split}.{language}`` and ``.en`` are there. Gold is in ``.gold`` beside them or in
            ``labels/bucc2018/{split}-{language}.tsv``.

    Raises:
        DataFileError: a file is missing or has a line that is not ``id<TAB>sentence``, an id occurs twice, or the gold
            names an id that its file does not have.
    """
    prefix = f"bucc2018/{language}-en.{split}"
    source, target = (_tabbed(_needed(Path(folder), f"{prefix}.{side}")) for side in (language, "en"))
    path = find(Path(folder), f"{prefix}.gold") or find(Path(folder), f"labels/bucc2018/{split}-{language}.tsv")
    if path is None:
        return Bucc(source, target, None)
    known = frozenset(source.ids), frozenset(target.ids)
    gold = set()
    for number, line in lines(path):
        if not line.strip():
            continue
        pair = tuple(part.strip() for part in line.split("\t"))
        if len(pair) != 2 or pair[0] not in known[0] or pair[1] not in known[1]:
            raise DataFileError(f"{path}:{number}: {line!r}; expected {language} id<TAB>en id of the sentence files")
        gold.add((pair[0], pair[1]))
    return Bucc(source, target, frozenset(gold))


def _tabbed(path: Path) -> Sentences:
    ids, texts = [], []
    for number, line in lines(path):
        if not line:
            continue  # a row has at least an id: no sentence is lost
        identity, tab, text = line.partition("\t")
        if not (tab and identity.strip()):
            raise DataFileError(f"{path}:{number}: {line[:60]!r}; expected id<TAB>sentence")
        ids.append(identity.strip())
        texts.append(text)
    _unique(ids, path, "id")
    return Sentences(tuple(ids), tuple(texts))


# --- LAReQA ---------------------------------------------------------------------------------------


def lareqa(folder: Path | str, languages: Sequence[str]) -> Ranking:
    """LAReQA's XQuAD-R: every question of every language ranks all sentences of all paragraphs of all languages.

    Reads ``lareqa/xquad-r/{language}.json``, SQuAD's format with ``sentence_breaks`` ([start, end) in characters). A
    candidate's id is ``{language}_{paragraph, counted from 1 over the file}_{position of the sentence, from 0}``, a
    query's ``{question id}_{language}``. A question's gold are the sentences that its answer starts in, of all
    languages that have a question of this id.

    Raises:
        InvalidOptionError: no language, or one twice.
        DataFileError: a file is missing or malformed, or a question has not exactly one answer.
    """
    if not languages or len(set(languages)) != len(languages):
        raise InvalidOptionError(f"languages: {', '.join(languages) or 'none'}; accepted: different ones, at least one")
    queries: list[tuple[str, str, str, str]] = []
    passages: list[tuple[str, str, str, str]] = []
    answers: dict[str, set[str]] = {}
    skipped: dict[str, Counter[str]] = {language: Counter() for language in languages}
    for language in languages:
        path = _needed(Path(folder), f"lareqa/xquad-r/{language}.json")
        document, before = load_json(path), len(queries)
        with _expecting(path, "data[].paragraphs[].{context, sentence_breaks, qas[].{id, question, answers}}"):
            paragraphs = [paragraph for article in document["data"] for paragraph in article["paragraphs"]]
            for number, paragraph in enumerate(paragraphs, start=1):
                name, breaks = f"{language}_{number}", _breaks(paragraph, path, number)
                context = paragraph["context"]
                passages += [(f"{name}_{i}", context[a:b], context, language) for i, (a, b) in enumerate(breaks)]
                for qa in paragraph["qas"]:
                    start = _answer_start(qa, path)
                    if not isinstance(qa["question"], str):
                        raise DataFileError(f"{path}: question {qa['id']} is {qa['question']!r}, expected text")
                    holds = next((i for i, (a, b) in enumerate(breaks) if a <= start < b), None)
                    if holds is None:
                        skipped[language][NO_SENTENCE] += 1
                        continue
                    queries.append((f"{qa['id']}_{language}", qa["question"], language, qa["id"]))
                    answers.setdefault(qa["id"], set()).add(f"{name}_{holds}")
        _unique([query[0] for query in queries[before:]], path, "question")
    gold = {query[0]: frozenset(answers[query[3]]) for query in queries}
    return Ranking(Queries(*_columns(queries, 4)[:3]), Passages(*_columns(passages, 4)), gold, skipped)


def _columns(rows: Iterable[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    return list(zip(*rows, strict=True)) or [()] * count


def _breaks(paragraph: Mapping[str, Any], path: Path, number: int) -> list[tuple[int, int]]:
    breaks = [(start, end) for start, end in paragraph["sentence_breaks"]]
    for start, end in breaks:
        if not 0 <= start <= end <= len(paragraph["context"]):
            raise DataFileError(f"{path}: paragraph {number}: sentence {start} to {end} lies outside its context")
    return breaks


def _answer_start(qa: Mapping[str, Any], path: Path) -> int:
    if len(qa["answers"]) != 1:
        raise DataFileError(f"{path}: question {qa['id']} has {len(qa['answers'])} answers, expected 1")
    return int(qa["answers"][0]["answer_start"])


# --- Mewsli-X -------------------------------------------------------------------------------------

_BRACES = re.compile(r"\{(.*?)\}")
_CONTEXT = "{context: {language, text, sentence_spans}, mentions: [{example_id, entity_id, mention_span}]}"
_ENTITY = "{entity_id, description, sentence_spans: [{start, end}]}"
_PAIR = "{contextual_mention: {context, mention}, entity}"


def mention_text(context: Mapping[str, Any], mention: Mapping[str, Any], where: str) -> str | None:
    """A mention as Mewsli-X's baseline writes it: ``span: left { span } right``, with its own sentence as context.

    Braces of the sentence itself become parentheses, line breaks become spaces and double spaces single ones (once).

    Returns:
        The text, or None if no single sentence holds the mention.

    Raises:
        DataFileError: the context does not have the mention where its span says.
        KeyError, TypeError: ``context`` or ``mention`` has not Mewsli-X's fields.
    """
    text, span = context["text"], mention["mention_span"]
    start, end, name = span["start"], span["end"], span["text"]
    if not 0 <= start < end or text[start:end] != name:
        why = "its text" if text else "no text (Mewsli-X's own script fills it in): its text"
        raise DataFileError(f"{where}: mention {mention['example_id']}: {why} at {start} to {end} is not {name!r}")
    for sentence in context["sentence_spans"]:
        if sentence["start"] <= start and end <= sentence["end"]:
            left, right = (
                _BRACES.sub(r"(\1)", part) for part in (text[sentence["start"] : start], text[end : sentence["end"]])
            )
            return _one_line(f"{name}: {left} {{ {name} }} {right}")
    return None


def entity_text(entity: Mapping[str, Any]) -> str:
    """An entity's sentences, joined by spaces (its whole description if it has none), in one line.

    Raises:
        KeyError, TypeError: ``entity`` has not Mewsli-X's fields.
    """
    description = entity["description"]
    parts = [description[span["start"] : span["end"]] for span in entity["sentence_spans"]]
    return _one_line(" ".join(parts) if parts else description)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).replace("  ", " ").strip()


def mewslix_mentions(path: Path | str, language: str) -> Mentions:
    """Mewsli-X's mentions of one language, from ``wikinews_mentions-{split}.jsonl`` or XTREME's file of the language.

    A line holds an article with several ``mentions``, as published, or with one ``mention``. Those that cross a
    sentence's end are left out and counted.

    Raises:
        DataFileError: the file is missing or malformed, the articles' texts are not filled in, or an id occurs twice.
    """
    path = Path(path)
    rows: list[tuple[str, str, str]] = []
    gold: dict[str, frozenset[str]] = {}
    skipped: Counter[str] = Counter()
    for spoken, text, identity, entity in _mentions(path, language):
        if text is None:
            skipped[CROSSES] += spoken == language
            continue
        rows.append((identity, text, language))
        if entity:
            gold[identity] = frozenset({entity})
    _unique([row[0] for row in rows], path, "mention")
    return Mentions(Queries(*_columns(rows, 3)), gold, +skipped)


def mewslix_texts(path: Path | str) -> Iterator[tuple[str, str]]:
    """(language, text) of Mewsli-X's mentions of all languages, as :func:`mewslix_mentions` has them.

    Raises:
        DataFileError: likewise.
    """
    return ((language, text) for language, text, *_ in _mentions(Path(path)) if text is not None)


def _mentions(path: Path, only: str | None = None) -> Iterator[tuple[str, str | None, str, str]]:
    """(language, text, mention's id, entity's id); text None where no sentence holds it or the language is another."""
    for number, row in json_rows(path):
        with _expecting(f"{path}:{number}", _CONTEXT):
            context = row["context"]
            language = context["language"]
            for mention in row["mentions"] if "mentions" in row else [row["mention"]]:
                known = only in (None, language)
                text = mention_text(context, mention, f"{path}:{number}") if known else None
                for name in ("entity_id", "example_id"):
                    if not isinstance(mention[name], str):
                        raise TypeError(f"{name} {mention[name]!r} is no text")
                yield language, text, mention["example_id"], mention["entity_id"]


def mewslix_entities(path: Path | str) -> Sentences:
    """Mewsli-X's candidates, from ``candidate_set_entities.jsonl``: ids of the entities and their texts.

    Raises:
        DataFileError: the file is missing or malformed, or an id occurs twice.
    """
    path = Path(path)
    ids, texts = [], []
    for number, row in json_rows(path):
        with _expecting(f"{path}:{number}", _ENTITY):
            ids.append(_entity_id(row, f"{path}:{number}"))
            texts.append(entity_text(row))
    _unique(ids, path, "entity")
    return Sentences(tuple(ids), tuple(texts))


def _entity_id(row: Mapping[str, Any], where: str) -> str:
    identity = row["entity_id"]
    if not identity:
        raise DataFileError(f"{where}: an empty entity_id; expected an entity's")
    if not isinstance(identity, str):
        raise DataFileError(f"{where}: entity_id {identity!r:.80} is no text")
    return identity


def mewslix_pairs(path: Path | str) -> Examples[MatchExample]:
    """Mewsli-X's training pairs, from ``wikipedia_pairs-{split}.jsonl``: a mention and its entity's text.

    Mentions that cross a sentence's end are left out and counted.

    Raises:
        DataFileError: the file is missing or malformed, or a pair does not name its entity.
    """
    path = Path(path)
    examples: Examples[MatchExample] = Examples()
    for number, row in json_rows(path):
        with _expecting(f"{path}:{number}", _PAIR):
            context, mention = row["contextual_mention"]["context"], row["contextual_mention"]["mention"]
            query = mention_text(context, mention, f"{path}:{number}")
            for named in (mention, row["entity"]):
                _entity_id(named, f"{path}:{number}")
            if query is None:
                examples.skipped[CROSSES] += 1
            else:
                examples.items.append(MatchExample(mention["example_id"], query, entity_text(row["entity"])))
    return examples
