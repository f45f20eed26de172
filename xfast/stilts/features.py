"""Token ids from examples: the inputs of the task types, with what is needed to read predictions back.

Conventions (Phang et al. 2020 through jiant; Hu et al. 2020): ``<s> A </s>``, pairs ``<s> A </s></s> B </s>`` as the
tokenizer has it, pairs shortened at the longer text, prompts of multiple choice shortened at their start, one label a
word on its first piece, windows over long contexts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.stilts.examples import (
    ChoiceExample,
    Examples,
    MatchExample,
    PairExample,
    SpanExample,
    TaggedExample,
    TextExample,
)
from xfast.stilts.task import CHOICE, CLASSIFICATION, MATCHING, MLM, SPAN, TAGGING, Recipe, Task

Ids = npt.NDArray[np.int32]

IGNORED = -100
"""Label of a position that has none, as PyTorch's cross entropy has it."""

TRUNCATED = "text shortened to the length limit"
UNKNOWN_WORD = "word that the tokenizer drops: <unk> instead"
LONG_WORD = "word longer than a window: <unk> instead"
SPLIT_SENTENCE = "sentence split into windows"
LONG_CONTEXT = "context longer than one window"
UNANSWERED = "training question without an answer: left out"
UNLABELLED = "training example without a label: left out"
EMPTY_CONTEXT = "empty context"
EMPTY_TEXT = "text that the tokenizer drops: left out"
UNMASKABLE = "text of unknown pieces alone, with none to mask: left out"
UNKNOWN_TAG = "tag that is no label: its word is not learned from"
UNTOUCHED_ANSWER = "training answer that the tokenizer drops: left out"
MISPLACED_ANSWER = "training question whose context does not hold its answer: left out"


@dataclass(slots=True)
class Feature:
    """One input of a model, or several that are scored together (choices; a query and its target).

    Attributes:
        rows: token ids, special tokens included.
        second: where the second text starts in each row (its token types are 1 in BERT), the row's length without one.
        label: class index; (start, end) positions; an id for each token of the row; or None.
        example: index of the example it comes from.
        extra: what decoding needs: a :class:`Window` for spans, (first word, first pieces) for tags.
    """

    rows: tuple[Ids, ...]
    second: tuple[int, ...]
    label: Any
    example: int
    extra: Any = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.rows)


@dataclass(slots=True)
class Window:
    """A window over a context.

    Attributes:
        first: row position of its first context token.
        offsets: [tokens, 2] where each token lies in the context, in characters.
        best: [tokens] whether no other window shows the token with more context around it.
    """

    first: int
    offsets: npt.NDArray[np.int64]
    best: npt.NDArray[np.bool_]


@dataclass
class Features:
    """Features of one split and what happened on the way, counted by reason."""

    items: list[Feature] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.items)


class Encoder:
    """Turns examples into features with one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer (offsets are needed for spans).
        recipe: lengths.

    Raises:
        InvalidOptionError: a length leaves no room for text.
    """

    batch = 1000

    def __init__(self, tokenizer: Any, recipe: Recipe) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InvalidOptionError("tokenizer: a fast one is needed, for offsets")
        text = tokenizer("a", add_special_tokens=False)["input_ids"]
        pair = tokenizer("a", "a")["input_ids"]
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.cls, self.middle, self.sep = pair[:1], pair[1 + len(text) : -1 - len(text)], pair[-1:]
        self.unknown = tokenizer.unk_token_id
        self.notes: Counter[str] = Counter()
        if recipe.doc_stride < 1 or recipe.query_length < 3:
            given = f"doc_stride: {recipe.doc_stride}, query_length: {recipe.query_length}"
            raise InvalidOptionError(f"{given}; accepted: 1 or more, 3 or more")
        if self.room < 2:
            raise InvalidOptionError(
                f"max_length: {recipe.max_length}; accepted: {recipe.max_length - self.room + 2} or more"
            )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Pieces of each text, without special tokens."""
        found: list[list[int]] = []
        for start in range(0, len(texts), self.batch):
            part = list(texts[start : start + self.batch])
            found += self.tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        return found

    def single(self, ids: Sequence[int], limit: int | None = None) -> tuple[Ids, int]:
        """``<s> A </s>``, cut at its end, and its length."""
        room = min(limit or self.recipe.max_length, self.recipe.max_length) - 2
        if len(ids) > room:
            self.notes[TRUNCATED] += 1
        row = np.asarray([*self.cls, *ids[:room], *self.sep], np.int32)
        return row, len(row)

    def pair(self, first: Sequence[int], second: Sequence[int]) -> tuple[Ids, int]:
        """``<s> A </s></s> B </s>`` and where B starts. Nothing is cut here."""
        row = np.asarray([*self.cls, *first, *self.middle, *second, *self.sep], np.int32)
        return row, 1 + len(first) + len(self.middle)

    @property
    def room(self) -> int:
        """Tokens that both texts of a pair may have together."""
        return self.recipe.max_length - len(self.cls) - len(self.middle) - len(self.sep)

    def shortened(self, first: Sequence[int], second: Sequence[int]) -> tuple[Ids, int]:
        """A pair whose longer text was shortened one token at a time until both fit."""
        a, b = fitting(len(first), len(second), self.room)
        if (a, b) != (len(first), len(second)):
            self.notes[TRUNCATED] += 1
        return self.pair(first[:a], second[:b])

    def prompted(self, prompt: Sequence[int], choice: Sequence[int]) -> tuple[Ids, int]:
        """A pair whose prompt lost its beginning if need be: the end of a story matters for what follows."""
        if len(prompt) + len(choice) > self.room:
            self.notes[TRUNCATED] += 1
        choice = choice[: self.room]
        keep = min(len(prompt), self.room - len(choice))
        return self.pair(prompt[len(prompt) - keep :], choice)


def fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths after taking tokens away one by one, from the longer text (the second where they are equal)."""
    kept = min(first, max(room - second, (room + 1) // 2))
    return kept, min(second, room - kept)


# --- the task types ----------------------------------------------------------------------------------


def _pairs(encoder: Encoder, items: Sequence[PairExample], labels: Sequence[str], train: bool) -> Iterable[Feature]:
    index = {name: i for i, name in enumerate(labels)}
    texts = zip(encoder.ids([e.first for e in items]), encoder.ids([e.second for e in items]), strict=True)
    for number, (example, (first, second)) in enumerate(zip(items, texts, strict=True)):
        if train and example.label is None:
            encoder.notes[UNLABELLED] += 1
            continue
        row, start = encoder.shortened(first, second)
        label = None if example.label is None or not labels else index[example.label]
        yield Feature((row,), (start,), label, number)


def _choices(encoder: Encoder, items: Sequence[ChoiceExample], labels: Sequence[str], train: bool) -> Iterable[Feature]:
    prompts = encoder.ids([e.prompt for e in items])
    flat = iter(encoder.ids([choice for e in items for choice in e.choices]))
    for number, (example, prompt) in enumerate(zip(items, prompts, strict=True)):
        choices = [next(flat) for _ in example.choices]
        if train and example.label is None:
            encoder.notes[UNLABELLED] += 1
            continue
        pairs = [encoder.prompted(prompt, choice) for choice in choices]
        yield Feature(tuple(row for row, _ in pairs), tuple(start for _, start in pairs), example.label, number)


def _texts(encoder: Encoder, items: Sequence[TextExample], labels: Sequence[str], train: bool) -> Iterable[Feature]:
    special = frozenset(encoder.tokenizer.all_special_ids)
    for number, ids in enumerate(encoder.ids([e.text for e in items])):
        row, end = encoder.single(ids)
        if train and all(
            piece in special for piece in row.tolist()
        ):  # nothing to mask, and a batch of nothing has no loss
            encoder.notes[UNMASKABLE if ids else EMPTY_TEXT] += 1
            continue
        yield Feature((row,), (end,), None, number)


def _matches(encoder: Encoder, items: Sequence[MatchExample], labels: Sequence[str], train: bool) -> Iterable[Feature]:
    queries = encoder.ids([e.query for e in items])
    targets = encoder.ids([e.target for e in items])
    contexts = encoder.ids([e.context for e in items])
    limit = encoder.recipe.query_length
    for number, (query, target, context) in enumerate(zip(queries, targets, contexts, strict=True)):
        first, first_end = encoder.single(query, limit)
        second, start = passage(encoder, target, context)
        yield Feature((first, second), (first_end, start), None, number)


def passage(encoder: Encoder, text: Sequence[int], context: Sequence[int]) -> tuple[Ids, int]:
    """A candidate of a dual encoder: alone, or as a pair with its paragraph, whose end is cut."""
    if not len(context):
        return encoder.single(text)
    if len(text) + len(context) > encoder.room:
        encoder.notes[TRUNCATED] += 1
    text = text[: encoder.room]
    return encoder.pair(text, context[: encoder.room - len(text)])


def _tags(encoder: Encoder, items: Sequence[TaggedExample], labels: Sequence[str], train: bool) -> Iterable[Feature]:
    index = {name: i for i, name in enumerate(labels)}
    pieces = _pieces(encoder, items)
    room = encoder.recipe.max_length - 2
    for number, example in enumerate(items):
        if train and example.tags is None:
            encoder.notes[UNLABELLED] += 1
            continue
        words = [pieces[at > 0, word] for at, word in enumerate(example.words)]
        windows = list(_word_windows(encoder, words, room))
        encoder.notes[SPLIT_SENTENCE] += len(windows) > 1
        for first, parts in windows:
            starts = np.cumsum([1, *(len(part) for part in parts)])[:-1]
            row, end = encoder.single([piece for part in parts for piece in part])
            label = None
            if example.tags is not None and index:
                label = np.full(len(row), IGNORED, np.int64)
                tags = example.tags[first : first + len(parts)]
                label[starts] = [index.get(tag, IGNORED) for tag in tags]
                encoder.notes[UNKNOWN_TAG] += sum(tag not in index for tag in tags)
            yield Feature((row,), (end,), label, number, (first, starts))


def _pieces(encoder: Encoder, items: Sequence[TaggedExample]) -> dict[tuple[bool, str], list[int]]:
    """Pieces of every word, at a sentence's start (False) and after another word (True).

    For byte-level tokenizers (RoBERTa's) that is not the same: the space before a word is a part of its first piece.
    """
    words = list({word for example in items for word in example.words})
    first = encoder.ids(words)
    spaced, alone = encoder.ids([" a", "a"])
    later = first if spaced == alone else encoder.ids([f" {word}" for word in words])
    return {
        (after, word): ids
        for after, all_ in ((False, first), (True, later))
        for word, ids in zip(words, all_, strict=True)
    }


def _word_windows(encoder: Encoder, words: Sequence[list[int]], room: int) -> Iterable[tuple[int, list[list[int]]]]:
    """(index of the first word, pieces of each word): as many words as fit, again and again."""
    first, used = 0, 0
    parts: list[list[int]] = []
    for number, given in enumerate(words):
        word = given
        if not word or len(word) > room:
            encoder.notes[LONG_WORD if word else UNKNOWN_WORD] += 1
            word = [encoder.unknown]
        if used + len(word) > room:
            yield first, parts
            first, used, parts = number, 0, []
        parts.append(word)
        used += len(word)
    if parts:
        yield first, parts


def _spans(encoder: Encoder, items: Sequence[SpanExample], labels: Sequence[str], train: bool) -> Iterable[Feature]:
    questions = encoder.ids([e.question.strip() for e in items])
    limit = encoder.recipe.query_length
    contexts: dict[str, tuple[list[int], npt.NDArray[np.int64]]] = {}  # several questions share one
    for number, (example, question) in enumerate(zip(items, questions, strict=True)):
        if train and not example.answers and not example.impossible:
            encoder.notes[UNANSWERED] += 1
            continue
        if example.context not in contexts:
            contexts = {example.context: _tokens_with_offsets(encoder, example.context)}
        ids, offsets = contexts[example.context]
        places = [(a.start, a.start + len(a.text)) for a in example.answers if a.start is not None]
        answer = _answer_tokens(*places[0], offsets) if places else None
        if train and example.answers and answer is None:  # labelled "no answer" it would teach what is wrong
            encoder.notes[UNTOUCHED_ANSWER if places else MISPLACED_ANSWER] += 1
            continue
        encoder.notes[EMPTY_CONTEXT] += not ids
        encoder.notes[TRUNCATED] += len(question) > limit
        yield from _windows(encoder, number, question[:limit], ids, offsets, answer)


def _tokens_with_offsets(encoder: Encoder, text: str) -> tuple[list[int], npt.NDArray[np.int64]]:
    encoded = encoder.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return encoded["input_ids"], _with_unseen(offsets, text)


def _with_unseen(offsets: npt.NDArray[np.int64], text: str) -> npt.NDArray[np.int64]:
    """Each token with the characters behind it that are in no token, up to a space.

    The vocabulary's normalisation drops joiners and other marks without width, and composes accents: an answer that is
    cut out of the text would lose them.
    """
    behind = np.append(offsets[1:, 0], len(text))
    for which in np.flatnonzero(behind > offsets[:, 1]):
        unseen = text[offsets[which, 1] : behind[which]]
        if not unseen[0].isspace():
            offsets[which, 1] += len(unseen.split(maxsplit=1)[0])
    return offsets


def _answer_tokens(start: int, end: int, offsets: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """First and last token that touch the characters of an answer."""
    touching = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    return (int(touching[0]), int(touching[-1])) if touching.size else None


def _windows(
    encoder: Encoder,
    number: int,
    question: Sequence[int],
    ids: Sequence[int],
    offsets: npt.NDArray[np.int64],
    answer: tuple[int, int] | None,
) -> Iterable[Feature]:
    """One feature a window. A window without the whole answer is labelled with position 0, ``<s>``: no answer here."""
    size = encoder.room - len(question)
    if size < 1:
        raise InvalidInputError(f"max_length: {encoder.recipe.max_length} leaves no room beside a question")
    starts = [0]
    while starts[-1] + size < len(ids):
        starts.append(starts[-1] + min(size, encoder.recipe.doc_stride))
    encoder.notes[LONG_CONTEXT] += len(starts) > 1
    best = _best_windows(starts, size, len(ids))
    for which, start in enumerate(starts):
        row, first = encoder.pair(question, ids[start : start + size])
        label = (0, 0)
        if answer is not None and start <= answer[0] and answer[1] < start + size:
            label = (first + answer[0] - start, first + answer[1] - start)
        window = Window(first, offsets[start : start + size], best[start : start + size] == which)
        yield Feature((row,), (first,), label, number, window)


def _best_windows(starts: Sequence[int], size: int, tokens: int) -> npt.NDArray[np.int64]:
    """[tokens] the window in which each token has most context: min(left, right), longer windows winning ties."""
    positions = np.arange(tokens)
    scores = np.full((len(starts), tokens), -1.0)
    for which, start in enumerate(starts):
        end = min(start + size, tokens)
        inside = positions[start:end]
        scores[which, start:end] = np.minimum(inside - start, end - 1 - inside) + 0.01 * (end - start)
    return scores.argmax(0) if tokens else np.zeros(0, np.int64)


_TYPES: dict[str, Callable[[Encoder, Any, Sequence[str], bool], Iterable[Feature]]] = {
    CLASSIFICATION: _pairs,
    CHOICE: _choices,
    SPAN: _spans,
    TAGGING: _tags,
    MATCHING: _matches,
    MLM: _texts,
}


def encode(
    examples: Examples[Any],
    task: Task,
    tokenizer: Any,
    recipe: Recipe,
    *,
    labels: Sequence[str] = (),
    train: bool = False,
) -> Features:
    """Features of a split.

    Args:
        examples: of the task's type.
        task: says the type.
        tokenizer: a fast tokenizer.
        recipe: lengths.
        labels: class names in the order of the model's outputs.
        train: leave out, and count, what cannot be learned from.

    Returns:
        Features; ``notes`` counts what the readers left out, too.

    Raises:
        InvalidOptionError: the tokenizer or a length does not do.
        InvalidInputError: a question leaves no room for its context.
    """
    encoder = Encoder(tokenizer, recipe)
    items = list(_TYPES[task.type](encoder, examples.items, labels, train))
    return Features(items, +(Counter(examples.skipped) + encoder.notes))
