"""The token ids that cells are measured on: from real text where there is some, else random ids of the right lengths.

Both arms, every engine and every model size get the same ids. An *example* is what a user counts: a sentence, a pair, a
question (several windows over its context), a multiple-choice item (one sequence a choice). Ids of texts are made by
``inputs.py``, as evaluations make them; random ones are cut at the same length, and not parted in windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfast.benchmarks import workloads
from xfast.benchmarks.workloads import Batch
from xfast.errors import DataFileError
from xfast.stilts.task import CHOICE, SPAN
from xfast.stilts.tasks import get
from xfast.study import corpus, inputs
from xfast.study.arms import tokenizer_of
from xfast.study.factors import ARRIVAL, BUDGET, ONE_TASK, SINGLE, TYPES, Settings
from xfast.study.profiles import LANGUAGES_WITHOUT_SPACES, LengthProfile, load_profiles, sample_lengths

CHOICES = {"xcopa": 2, "siqa": 3}
"""Sequences of one multiple-choice example."""

_PAIR_SPECIALS, _SINGLE_SPECIALS = 4, 2
_SINGLE_TASKS = ("tatoeba", "bucc2018", "mewslix", "mlm", "udpos", "panx")


@dataclass(frozen=True)
class Work:
    """Examples of one task in one language.

    Attributes:
        examples: for each, its sequences of token ids [length], int64.
        words: in all examples, by whitespace; None in languages that do not part words.
        windows: sequences per example, where contexts are cut in windows; None for other tasks and for profiles.
        fertility: tokens per word, special tokens not counted; None likewise.
    """

    task: str
    language: str
    examples: tuple[tuple[torch.Tensor, ...], ...]
    words: int | None
    windows: float | None
    fertility: float | None

    def __reduce__(self) -> tuple[Any, ...]:
        # As arrays: between processes torch sends each tensor with a file descriptor of its own, and there are too few.
        arrays = tuple(tuple(ids.numpy() for ids in example) for example in self.examples)
        return _unpickled, (self.task, self.language, arrays, self.words, self.windows, self.fertility)

    def first(self, count: int) -> Work:
        """Its first examples; words and windows stay those of all."""
        return replace(self, examples=self.examples[:count])

    @property
    def digest(self) -> str:
        """Names the token ids and how they are parted into examples."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{len(example)}:".encode())
            for ids in example:
                digest.update(f"{len(ids)} ".encode() + ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """Real tokens, special ones included."""
        return sum(len(sequence) for example in self.examples for sequence in example)

    @property
    def sequences(self) -> int:
        """Sequences of all examples."""
        return sum(len(example) for example in self.examples)


def _unpickled(task: str, language: str, arrays: Any, *others: Any) -> Work:
    return Work(task, language, tuple(tuple(map(torch.from_numpy, example)) for example in arrays), *others)


class Texts:
    """Where work comes from: a data folder with a tokenizer, or length profiles.

    Attributes:
        source: which of these, in words.
        tokenizers: by task.
        unread: tasks whose files cannot be read, and why, where no task was named.

    Raises:
        DataFileError: the folder, its tokenizer or the file of profiles cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.seed = settings.seed
        self.folder = None if settings.data is None else Path(settings.data)
        profiles = "shipped length profiles" if settings.profiles is None else f"length profiles {settings.profiles}"
        self.source = profiles if self.folder is None else "data"
        self.unread: dict[str, str] = {}
        self._profiles: dict[tuple[str, str], LengthProfile] = {}
        self._samples: corpus.Samples = {}
        if self.folder is None:
            self._profiles = {(one.task, one.language): one for one in load_profiles(settings.profiles)}
            return
        if not self.folder.is_dir():
            raise DataFileError(f"data: {self.folder} is no folder")
        tasks = TYPES if settings.tasks == (ONE_TASK,) else settings.tasks
        folders = {task: tokenizer_of(settings, task) for task in tasks}
        known = {folder: corpus.load_tokenizer(folder) for folder in dict.fromkeys(folders.values())}
        self.tokenizers: dict[str, Any] = {task: known[folder] for task, folder in folders.items()}
        self._read(self.folder, settings.tasks)

    def _read(self, folder: Path, tasks: Sequence[str]) -> None:
        """Read the files of the tasks that were named; without names, of all that can be read."""
        if tasks != (ONE_TASK,):
            self._samples = corpus.collect(folder, *tasks)
        else:
            for task in TYPES:
                self._samples |= self._readable(folder, task)
        if not self._samples:
            why = "; ".join(self.unread.values()) or "expected XTREME's layout under xtreme/"
            named = "" if tasks == (ONE_TASK,) else f" of {', '.join(tasks)}"
            raise DataFileError(f"data: {folder} has no task files{named}; {why}")

    def _readable(self, folder: Path, task: str) -> corpus.Samples:
        """A task's samples; none where its files cannot be read, since another task stands for its languages."""
        try:
            return corpus.collect(folder, task)
        except DataFileError as error:
            self.unread[task] = str(error)
            return {}

    @property
    def there(self) -> list[tuple[str, str]]:
        """(task, language) pairs at hand."""
        return sorted(self._profiles or self._samples)

    def labelled(self, task: str, language: str) -> int:
        """Examples that an evaluation runs; 0 without a data folder."""
        return len(self._samples.get((task, language), ())) // CHOICES.get(task, 1)

    def work(self, task: str, language: str, count: int, model: workloads.Model) -> Work:
        """``count`` examples, or as many as there are, the same for the same seed.

        Raises:
            DataFileError: the tokenizer gives ids that the model does not have.
        """
        if self.folder is None:
            return self._from_profile(self._profiles[task, language], count, model)
        return self._from_text(task, language, count, model)

    def _from_profile(self, profile: LengthProfile, count: int, model: workloads.Model) -> Work:
        choices = CHOICES.get(profile.task, 1)
        limit = get(profile.task).recipe.within(model.limit).max_length
        lengths = [min(int(length), limit) for length in sample_lengths(profile, count * choices, self.seed)]
        batches = workloads.batches_of(lengths, 1, model, self.seed)
        sequences = [ids[0] for ids, _ in batches]
        specials = _SINGLE_SPECIALS if profile.task in _SINGLE_TASKS else _PAIR_SPECIALS
        words = None
        if profile.fertility:
            words = round(sum(max(0, len(ids) - specials) for ids in sequences) / profile.fertility)
        examples = tuple(tuple(sequences[start : start + choices]) for start in range(0, len(sequences), choices))
        return Work(profile.task, profile.language, examples, words, None, profile.fertility)

    def _from_text(self, task: str, language: str, count: int, model: workloads.Model) -> Work:
        samples = self._samples[task, language]
        choices = CHOICES.get(task, 1)
        groups = [samples[start : start + choices] for start in range(0, len(samples) - choices + 1, choices)]
        chosen = np.random.default_rng(self.seed).permutation(len(groups))[:count]
        sequences = inputs.rows(task, [groups[index] for index in chosen], self.tokenizers[task], model.limit)
        examples = tuple(tuple(torch.from_numpy(ids.astype(np.int64)) for ids in mine) for mine in sequences)
        largest = max(int(ids.max()) for example in examples for ids in example)
        if largest >= model.vocab:
            raise DataFileError(
                f"tokenizer: it gives the id {largest}, the model has {model.vocab} ids; name the model's own tokenizer"
            )
        words, fertility = self._words(task, language, [groups[index] for index in chosen], sequences)
        windows = sum(map(len, examples)) / len(examples) if TYPES[task] == SPAN else None
        return Work(task, language, examples, words, windows, fertility)

    def _words(
        self, task: str, language: str, groups: Sequence[Sequence[Any]], sequences: Sequence[Sequence[Any]]
    ) -> tuple[int | None, float | None]:
        """Words of the texts, of those that were cut by the share of their tokens that is left; and tokens a word."""
        if language in LANGUAGES_WITHOUT_SPACES:
            return None, None
        sides = [[sample] if isinstance(sample, str) else sample for group in groups for sample in group]
        texts = [text for side in sides for text in side]
        words = sum(len(text.split()) for text in texts)
        tokenizer = self.tokenizers[task]
        tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        if not words:
            return None, None
        kept = tokens
        if TYPES[task] != SPAN:  # whose windows hold all of a context, and parts of it twice
            special = tokenizer.num_special_tokens_to_add(pair=len(sides[0]) > 1)
            kept = sum(len(ids) - special for mine in sequences for ids in mine)
        return round(words * min(1.0, kept / max(tokens, 1))), round(tokens / words, 4)


def batches_of(work: Work, policy: str, batch_size: int, pad: int) -> tuple[Batch, ...]:
    """The examples as padded batches; multiple-choice batches are [examples, choices, length].

    Args:
        work: the examples.
        policy: "arrival", "sorted" (by length), "budget" (sorted, as many as fit), "single" (one by one).
        batch_size: examples in a batch; for "budget" padded tokens in a batch (at least one example).
        pad: padding id.
    """
    order = list(range(len(work.examples)))
    longest = [max(len(ids) for ids in example) for example in work.examples]
    if policy not in (ARRIVAL, SINGLE):
        order.sort(key=lambda index: -longest[index])
    found = []
    for chunk in _chunks(order, longest, work.examples, policy, batch_size):
        sequences = [ids for index in chunk for ids in work.examples[index]]
        ((ids, mask),) = workloads.padded(sequences, len(sequences), pad)
        if TYPES[work.task] == CHOICE:
            ids, mask = (tensor.view(len(chunk), -1, tensor.shape[-1]) for tensor in (ids, mask))
        found.append((ids, mask))
    return tuple(found)


def _chunks(
    order: Sequence[int], longest: Sequence[int], examples: Sequence[Sequence[Any]], policy: str, batch_size: int
) -> Iterator[list[int]]:
    """Indices of each batch."""
    if policy != BUDGET:
        for start in range(0, len(order), batch_size):
            yield list(order[start : start + batch_size])
        return
    chunk: list[int] = []
    rows = 0
    for index in order:  # sorted: the first of a batch is its longest
        width = longest[chunk[0]] if chunk else longest[index]
        if chunk and (rows + len(examples[index])) * width > batch_size:
            yield chunk
            chunk, rows = [], 0
        chunk.append(index)
        rows += len(examples[index])
    if chunk:
        yield chunk


def facts(work: Work, batches: Sequence[Batch]) -> Mapping[str, Any]:
    """What a cell's line in the document says of its work."""
    slots = sum(ids.numel() for ids, _ in batches)
    return {
        "samples": len(work.examples),
        "tokens": work.tokens,
        "sequences": work.sequences,
        "words": work.words,
        "padding": round(1.0 - work.tokens / slots, 4),
        "fertility": work.fertility,
        "windows_per_example": work.windows,
    }
