"""What a reader returns: one frozen record per example of each task type, and what it had to leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two texts and a class.

    Attributes:
        id: unique within its file.
        first: premise, first sentence or first question.
        second: hypothesis, second sentence or second question.
        label: name of the class, never its number (sources disagree about the order), or None where it is withheld.
    """

    id: str
    first: str
    second: str
    label: str | None


@dataclass(frozen=True, slots=True)
class ChoiceExample:
    """A prompt and its possible continuations; ``label`` is the index of the right one, or None."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    label: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's text and where it starts in the context, in characters; None: the context does not hold it."""

    text: str
    start: int | None


@dataclass(frozen=True, slots=True)
class SpanExample:
    """A question about a context.

    Attributes:
        answers: every accepted answer; empty where the gold is withheld or there is none.
        impossible: SQuAD v2.0 says that the context holds no answer.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    impossible: bool = False


@dataclass(frozen=True, slots=True)
class TaggedExample:
    """The words of a sentence and a tag for each, or None where the tags are withheld."""

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class MatchExample:
    """A query text and the text it should find, with the paragraph around that: what a dual encoder learns from."""

    id: str
    query: str
    target: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class TextExample:
    """One line of plain text, for masked language modelling."""

    id: str
    text: str


Example = PairExample | ChoiceExample | SpanExample | TaggedExample | MatchExample | TextExample


def unlabelled(example: Example) -> bool:
    """Whether its label, tags or answers are withheld."""
    if isinstance(example, PairExample | ChoiceExample):
        return example.label is None
    if isinstance(example, TaggedExample):
        return example.tags is None
    return isinstance(example, SpanExample) and not example.answers and not example.impossible


@dataclass
class Examples(Generic[T]):
    """Examples and what was left out on the way, by reason: nothing is dropped silently."""

    items: list[T] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.items)

    def extend(self, other: Examples[T]) -> None:
        """Append another file's examples and add up what both left out."""
        self.items.extend(other.items)
        self.skipped.update(other.skipped)

    @classmethod
    def of(cls, parts: Iterable[Examples[T]]) -> Examples[T]:
        """Concatenate."""
        joined = cls()
        for part in parts:
            joined.extend(part)
        return joined
