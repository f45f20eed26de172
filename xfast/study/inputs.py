"""Token ids of samples exactly as an evaluation makes them: what is timed is what is scored.

Recipes, windows, shortening and special tokens are those of :mod:`xfast.stilts`; nothing of them is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xfast.stilts.examples import ChoiceExample, Examples, PairExample, SpanExample, TaggedExample, TextExample
from xfast.stilts.features import Encoder, Ids, encode, passage
from xfast.stilts.task import BITEXT, CHOICE, CLASSIFICATION, MATCHING, MLM, SPAN, TAGGING
from xfast.stilts.tasks import get

Group = Sequence[Any]
"""What ``corpus.py`` reads of one example: a text or a pair, of multiple choice a pair for each choice."""

_EXAMPLES: dict[str, Callable[[Group], Any]] = {
    CLASSIFICATION: lambda group: PairExample("", group[0][0], group[0][1], None),
    CHOICE: lambda group: ChoiceExample("", group[0][0], tuple(choice for _, choice in group), None),
    SPAN: lambda group: SpanExample("", group[0][0], group[0][1], ()),
    TAGGING: lambda group: TaggedExample("", tuple(group[0].split(" ")), None),
    MLM: lambda group: TextExample("", group[0]),
}


def rows(name: str, groups: Sequence[Group], tokenizer: Any, positions: int) -> list[list[Ids]]:
    """The sequences of each example: one, or as many as its choices, or as the windows over its text.

    Args:
        name: of the task.
        groups: one for each example.
        tokenizer: a fast one.
        positions: tokens of the longest sequence that the model takes.

    Raises:
        InvalidOptionError, InvalidInputError: the tokenizer or a length does not do.
    """
    task = get(name)
    recipe = task.recipe.within(positions)
    if task.type in (MATCHING, BITEXT):
        limit = recipe.query_length if task.type == MATCHING else None
        return _texts(Encoder(tokenizer, recipe), [group[0] for group in groups], limit)
    examples: Examples[Any] = Examples([_EXAMPLES[task.type](group) for group in groups])
    found: list[list[Ids]] = [[] for _ in groups]
    for feature in encode(examples, task, tokenizer, recipe).items:
        found[feature.example] += feature.rows
    return found


def _texts(encoder: Encoder, samples: Sequence[Any], limit: int | None) -> list[list[Ids]]:
    """Of retrieval: sentences and queries alone, candidates with their paragraphs."""
    pairs = [(sample, "") if isinstance(sample, str) else sample for sample in samples]
    texts, contexts = (encoder.ids([pair[side] for pair in pairs]) for side in (0, 1))
    return [
        [(encoder.single(text, limit) if isinstance(sample, str) else passage(encoder, text, context))[0]]
        for sample, text, context in zip(samples, texts, contexts, strict=True)
    ]
