"""Batches: padded tensors from features, and which examples form which step.

The order is a pure function of sizes, options and seed, and so is the masking of words: a run that was killed continues
with the very batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.stilts.features import IGNORED, Feature, Ids
from xfast.stilts.task import CHOICE, CLASSIFICATION, MATCHING, SPAN, TAGGING

GROUPED_BATCHES = 50
"""Batches whose examples are sorted by length together, before they are shuffled again."""


class Key(NamedTuple):
    """One example of a step: its task, its index, and how many were drawn before it (which seeds the masking)."""

    task: str
    example: int
    serial: int


@dataclass(frozen=True)
class Padding:
    """What padding needs to know of a model.

    Attributes:
        pad_id: id of the padding token.
        token_types: whether the second text has token type 1 (BERT).
    """

    pad_id: int
    token_types: bool = False


def pad_rows(rows: Sequence[Ids], second: Sequence[int], padding: Padding) -> dict[str, torch.Tensor]:
    """[rows, longest] int64 ``input_ids``, ``attention_mask`` and, for BERT, ``token_type_ids``."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), padding.pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    types = np.zeros((len(rows), longest), np.int64)
    for i, (row, start) in enumerate(zip(rows, second, strict=True)):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
        types[i, start : len(row)] = 1
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if padding.token_types:
        batch["token_type_ids"] = torch.from_numpy(types)
    return batch


def collate(features: Sequence[Feature], type: str, padding: Padding, *, labels: bool = True) -> dict[str, Any]:
    """A model's inputs for features of one type, with labels where all have one and ``labels`` asks for them.

    Returns:
        [batch, length] tensors; [batch, choices, length] for multiple choice; for matching, a dictionary each for
        ``query`` and ``target``.
    """
    if type == MATCHING:
        return {
            side: pad_rows([f.rows[i] for f in features], [f.second[i] for f in features], padding)
            for i, side in enumerate(("query", "target"))
        }
    rows = [row for f in features for row in f.rows]
    batch: dict[str, Any] = pad_rows(rows, [start for f in features for start in f.second], padding)
    if type == CHOICE:
        if len(counts := {len(f.rows) for f in features}) > 1:
            raise InvalidInputError(f"choices: {sorted(counts)} in one batch; all examples need as many")
        batch = {name: value.view(len(features), -1, value.shape[1]) for name, value in batch.items()}
    if labels and all(f.label is not None for f in features):
        batch.update(_labels(features, type, batch["input_ids"].shape[-1]))
    return batch


def _labels(features: Sequence[Feature], type: str, longest: int) -> dict[str, torch.Tensor]:
    if type in (CLASSIFICATION, CHOICE):
        return {"labels": torch.tensor([f.label for f in features])}
    if type == SPAN:
        starts, ends = zip(*(f.label for f in features), strict=True)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    if type == TAGGING:
        return {"labels": pad_labels([f.label for f in features], longest)}
    return {}


def pad_labels(labels: Sequence[npt.NDArray[np.int64]], longest: int) -> torch.Tensor:
    """[rows, longest] int64 labels, ``IGNORED`` at padded positions."""
    padded = np.full((len(labels), longest), IGNORED, np.int64)
    for i, row in enumerate(labels):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class Masking:
    """BERT's masking (Devlin et al. 2019): ``share`` of the pieces; 80 % of these become ``<mask>``, 10 % a random one.

    Attributes:
        mask_id, vocabulary: id of ``<mask>``, and number of ids to draw random pieces from.
        special: ids that are never masked.
    """

    mask_id: int
    vocabulary: int
    special: frozenset[int]
    seed: int
    share: float = 0.15

    def __call__(self, row: Ids, serial: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        """(masked ids, labels), the same for the same ``serial``. At least one piece is masked where there is one."""
        rng = np.random.default_rng((self.seed, serial))
        candidates = np.flatnonzero(~np.isin(row, list(self.special)))
        chosen = candidates[rng.random(len(candidates)) < self.share]
        if not len(chosen) and len(candidates):
            chosen = rng.choice(candidates, 1)
        labels = np.full(len(row), IGNORED, np.int64)
        labels[chosen] = row[chosen]
        masked, draw = row.copy(), rng.random(len(chosen))
        masked[chosen[draw < 0.8]] = self.mask_id
        random = chosen[draw >= 0.9]
        masked[random] = rng.integers(0, self.vocabulary, len(random))
        return masked, labels


def masked_batch(
    rows: Sequence[Ids], serials: Sequence[int], masking: Masking, padding: Padding
) -> dict[str, torch.Tensor]:
    """Inputs of masked language modelling: each row masked by its serial, ``labels`` at the masked pieces alone."""
    masked = [masking(row, serial) for row, serial in zip(rows, serials, strict=True)]
    batch = pad_rows([ids for ids, _ in masked], [len(ids) for ids, _ in masked], padding)
    return {**batch, "labels": pad_labels([labels for _, labels in masked], batch["input_ids"].shape[1])}


# --- which examples, in which order --------------------------------------------------------------------


def stream(
    lengths: npt.NDArray[np.int64], rng: np.random.Generator, batch_size: int, grouped: bool
) -> Iterator[list[int]]:
    """Batches of example indices without end: one permutation after another, cut into full batches.

    With ``grouped``, up to ``GROUPED_BATCHES`` batches of one permutation are sorted by length, cut, and shuffled as
    batches. What is left of a permutation and fills no batch goes before the next one.
    """
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += rng.permutation(len(lengths)).tolist()
        # One permutation at a time: copies of an example, sorted together, would share a batch. Only the few that
        # filled no batch meet theirs.
        count = min(len(waiting) // batch_size, GROUPED_BATCHES) if grouped else 1
        taken, waiting = waiting[: count * batch_size], waiting[count * batch_size :]
        if grouped:
            taken = [taken[i] for i in np.argsort(lengths[taken], kind="stable")]  # equal lengths stay in random order
        batches = [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


def shares(sizes: Mapping[str, int], cap: int | None = None, temperature: float = 1.0) -> dict[str, float]:
    """Probability of each task: proportional to min(examples, cap)^(1/temperature).

    Raises:
        InvalidOptionError: a task has no examples.
    """
    if empty := [name for name, size in sizes.items() if size < 1]:
        raise InvalidOptionError(f"tasks: no training examples for {', '.join(empty)}")
    capped = {name: min(size, cap or size) for name, size in sizes.items()}
    largest = max(capped.values(), default=1)  # powers of numbers up to 1 do not overflow, whatever the temperature
    weights = {name: (size / largest) ** (1 / temperature) for name, size in capped.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@dataclass(frozen=True)
class Schedule:
    """Every batch of a run, in order: an iterable of lists of :class:`Key`, all of one task.

    A step's examples are split into ``micro`` batches (gradient accumulation times devices), all of one task.

    Attributes:
        lengths: tokens of every example, by task.
        probabilities: of the tasks.
        steps: optimizer steps.
        micro: batches of one step.
        batch_size: examples of one micro-batch.
        seed: of everything random here.
        grouped: group examples of like length.
    """

    lengths: Mapping[str, npt.NDArray[np.int64]]
    probabilities: Mapping[str, float]
    steps: int
    micro: int
    batch_size: int
    seed: int
    grouped: bool = True
    drop_last: bool = True  # accelerate asks: no batch is ever short

    def __len__(self) -> int:
        return self.steps * self.micro

    def __iter__(self) -> Iterator[list[Key]]:
        names = list(self.lengths)
        children = np.random.default_rng(self.seed).spawn(len(names) + 1)
        size = self.batch_size * self.micro
        streams = {
            name: stream(self.lengths[name], rng, size, self.grouped)
            for name, rng in zip(names, children[1:], strict=True)
        }
        chosen = children[0].choice(len(names), self.steps, p=[self.probabilities[name] for name in names])
        serial = 0
        for which in chosen:
            name = names[which]
            indices = next(streams[name])
            for start in range(0, size, self.batch_size):
                part = indices[start : start + self.batch_size]
                yield [Key(name, example, serial + i) for i, example in enumerate(part)]
                serial += len(part)


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Batches for evaluation: indices from long to short, as many as stay below ``tokens``, at least one."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + size].tolist()
        start += size
