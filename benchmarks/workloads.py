"""Batches to measure on, by name.

mixed, sorted   64 sentences and short paragraphs in batches of 16, in arrival order or sorted by length
full            8 x 384, no padding
BxL             one batch of B sequences of L tokens, such as 1x8, 1x32, 1x128
alpha=A         16 sequences padded to 256, share A of the slots real tokens (0.1 to 1); ``alpha`` is the sweep
length=L        2048 tokens in sequences of L; ``length`` is the sweep 8 to 512
TASK[:LANG]     64 inputs of an XTREME task: tatoeba, xnli, ..., of all its languages in turn or of one

Token ids are random except in tasks with real text: the time of a forward pass does not depend on which ids it gets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfast.errors import InvalidInputError, InvalidOptionError, UnsupportedModelError
from xfast.study import corpus
from xfast.study.profiles import load_profiles, sample_lengths

Batch = tuple[torch.Tensor, torch.Tensor]
"""Padded (input_ids, attention_mask), int64 [batch, length]."""

VOCAB, PAD, LIMIT = 250002, 1, 512
"""Token ids, padding id and longest sequence of XLM-R."""

BATCH_SIZE = 16
SENTENCES = 64
SWEEPS = {
    "alpha": ("alpha=0.2", "alpha=0.4", "alpha=0.6", "alpha=0.8", "alpha=1.0"),
    "length": tuple(f"length={2**power}" for power in range(3, 10)),
}
TASKS = (
    *("xnli", "pawsx", "udpos", "panx", "xquad", "mlqa", "tydiqa", "bucc2018", "tatoeba"),
    *("xcopa", "lareqa", "siqa", "mlm"),
)
ACCEPTED = (
    f"mixed, sorted, full, BxL (1x32), alpha=0.1..1, length=1..{LIMIT}, or a task {'|'.join(TASKS)}, :LANG optional"
)

_ALPHA_SLOTS = (16, 256)
_LENGTH_TOKENS = 2048
_MAX_BATCH = 4096


@dataclass(frozen=True)
class Model:
    """What a workload must know of the model: how many ids it has, which one pads, how long a sequence may be."""

    vocab: int = VOCAB
    pad: int = PAD
    limit: int = LIMIT

    @classmethod
    def of(cls, config: Any) -> Model:
        """Read from a transformers configuration.

        Raises:
            UnsupportedModelError: no sequence fits.
        """
        pad = config.pad_token_id or 0
        # RoBERTa's positions begin behind the padding index; the others lose a position or so, which does not matter.
        limit = min(config.max_position_embeddings - pad - 1, LIMIT)
        if limit < 2 or config.vocab_size < 2:
            raise UnsupportedModelError(
                f"the model has {limit} usable positions and {config.vocab_size} token ids: too few to measure"
            )
        return cls(config.vocab_size, pad, limit)


XLMR = Model()


@dataclass(frozen=True)
class Workload:
    """Padded batches in arrival order. ``source`` says where lengths and ids come from: random, profiles or text."""

    name: str
    batches: tuple[Batch, ...]
    source: str = "random"

    @property
    def tokens(self) -> int:
        """Real tokens, special ones included."""
        return sum(int(mask.sum()) for _, mask in self.batches)

    @property
    def samples(self) -> int:
        """Sequences."""
        return sum(ids.shape[0] for ids, _ in self.batches)

    @property
    def slots(self) -> int:
        """Real tokens and padding."""
        return sum(ids.numel() for ids, _ in self.batches)

    @property
    def padding(self) -> float:
        """Share of padding among all slots, 0 to 1."""
        return 1.0 - self.tokens / self.slots if self.slots else 0.0


def expand(names: Iterable[str]) -> list[str]:
    """Replaces the sweeps ``alpha`` and ``length`` by their points, drops repetitions, keeps the order."""
    return list(dict.fromkeys(point for name in names for point in SWEEPS.get(name, (name,))))


def workload(name: str, model: Model = XLMR, *, data_dir: Path | None = None, seed: int = 0) -> Workload:
    """A workload by name; see the top of this file.

    Args:
        name: which one.
        model: the model that will run it; sequences longer than its limit are cut.
        data_dir: folder with ``xtreme/`` and ``tokenizer/`` for the tasks; None looks for one as ``find_data`` does,
            and without one the lengths follow the shipped profiles.
        seed: seed of lengths and ids.

    Raises:
        InvalidOptionError: the name is not accepted.
        InvalidInputError: ``data_dir`` cannot be read.
    """
    lengths = {"mixed": mixed_lengths, "sorted": lambda: sorted(mixed_lengths())}
    if name in lengths:
        return Workload(name, batches_of(lengths[name](), BATCH_SIZE, model, seed))
    if name == "full":
        return Workload(name, batches_of([384] * 8, 8, model, seed))
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        batch = _within(name, int(match[1]), 1, _MAX_BATCH)
        return Workload(name, batches_of([_within(name, int(match[2]), 1, model.limit)] * batch, batch, model, seed))
    if match := re.fullmatch(r"alpha=(\d?\.\d+|1|1\.0*)", name):
        return Workload(name, batches_of(alpha_lengths(_within(name, float(match[1]), 0.1, 1.0)), 16, model, seed))
    if match := re.fullmatch(r"length=(\d+)", name):
        length = _within(name, int(match[1]), 1, model.limit)
        batch = max(1, _LENGTH_TOKENS // length)
        return Workload(name, batches_of([length] * batch, batch, model, seed))
    task, _, language = name.partition(":")
    if task not in TASKS:
        raise InvalidOptionError(f"workload: {name!r} is not accepted; accepted: {ACCEPTED}")
    return _task(name, task, language or None, model, data_dir, seed)


def batches_of(
    lengths: Sequence[int], batch_size: int, model: Model = XLMR, seed: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Random sequences of the given token lengths, cut at the model's limit, right-padded in batches, in order."""
    generator = torch.Generator().manual_seed(seed)
    cut = [min(length, model.limit) for length in lengths]
    sequences = []
    for length in cut:
        ids = torch.randint(0, model.vocab - 1, (length,), generator=generator)
        sequences.append(ids + (ids >= model.pad))  # every id but the padding one
    return padded(sequences, batch_size, model.pad)


def padded(sequences: Sequence[torch.Tensor], batch_size: int, pad: int) -> tuple[Batch, ...]:
    """Right-pads sequences of ids in batches, in order."""
    batches = []
    for start in range(0, len(sequences), batch_size):
        chunk = sequences[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(list(chunk), batch_first=True, padding_value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(sequence) for sequence in chunk]).unsqueeze(1)
        batches.append((ids, mask.long()))
    return tuple(batches)


def mixed_lengths() -> list[int]:
    """Log-normal token lengths, mean about 42, cut at 256: sentences and short paragraphs as they arrive."""
    draw = np.random.default_rng(0).lognormal(mean=3.45, sigma=0.75, size=SENTENCES)
    return [int(length) for length in np.clip(draw, 3, 256)]


def alpha_lengths(alpha: float) -> list[int]:
    """Token lengths of one batch of 16 padded to 256 with ``alpha`` of its slots real: spread evenly, shuffled."""
    batch, longest = _ALPHA_SLOTS
    total = round(alpha * batch * longest)
    mean = (total - longest) / (batch - 1)  # of the others: one sequence has the full length
    spread = min(mean - 2, longest - mean)
    edges = np.cumsum(np.linspace(mean - spread, mean + spread, batch - 1))
    others = np.diff(np.rint(edges), prepend=0)  # rounds the running sum, so that the total is exact
    lengths = [*(int(length) for length in others), longest]
    return [lengths[index] for index in np.random.default_rng(0).permutation(batch)]


def find_data(data_dir: Path | None = None) -> Path | None:
    """The folder with real text: the given one, else ``XFAST_TEST_DATA``; None where neither is given.

    Raises:
        InvalidInputError: a folder was given, here or in ``XFAST_TEST_DATA``, and holds no ``xtreme/``.
    """
    given = data_dir or os.environ.get("XFAST_TEST_DATA")
    if not given:
        return None
    if not (Path(given) / "xtreme").is_dir():
        raise InvalidInputError(f"data: {given} holds no xtreme/ folder, XTREME's download layout")
    return Path(given)


def _task(name: str, task: str, language: str | None, model: Model, data_dir: Path | None, seed: int) -> Workload:
    profiles = {profile.language: profile for profile in load_profiles() if profile.task == task}
    if language is not None and language not in profiles:
        raise InvalidOptionError(
            f"workload: {task} has no language {language!r}; accepted: {', '.join(sorted(profiles))}"
        )
    if (folder := find_data(data_dir)) is not None:
        sequences = _read_task(folder, task, language, model, seed)
        return Workload(name, padded(sequences, BATCH_SIZE, model.pad), "text")
    languages = [language] if language else sorted(profiles)
    turns = [profiles[languages[index % len(languages)]] for index in range(SENTENCES)]
    lengths = [int(sample_lengths(profile, 1, seed + index)[0]) for index, profile in enumerate(turns)]
    return Workload(name, batches_of(lengths, BATCH_SIZE, model, seed), "profiles")


def _read_task(folder: Path, task: str, language: str | None, model: Model, seed: int) -> list[torch.Tensor]:
    """Token ids of ``SENTENCES`` inputs from files in XTREME's layout, the languages in turn."""
    tokenizer: Any = corpus.load_tokenizer(folder / "tokenizer" / "xlmr")
    found = corpus.collect(folder, task)
    samples = {spoken: texts for (_, spoken), texts in sorted(found.items()) if language in (None, spoken)}
    if not samples:
        raise InvalidInputError(f"data: {folder} has no {task} files{f' for {language}' if language else ''}")
    languages, generator = list(samples), np.random.default_rng(seed)
    sequences = []
    for index in range(SENTENCES):
        texts = samples[languages[index % len(languages)]]
        sample = texts[int(generator.integers(len(texts)))]
        pair = (sample,) if isinstance(sample, str) else sample
        ids = torch.tensor(tokenizer(*pair, truncation=True, max_length=model.limit)["input_ids"])
        sequences.append(ids if model.vocab >= VOCAB and model.pad == PAD else _other_ids(len(ids), model, index))
    return sequences


def _other_ids(length: int, model: Model, seed: int) -> torch.Tensor:
    """Random ids for a model with a vocabulary that is not XLM-R's: the lengths are what counts."""
    return batches_of([length], 1, model, seed)[0][0][0]


def _within(name: str, value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:
        raise InvalidOptionError(f"workload: {name!r}: {value} is not accepted; accepted: {low} to {high}")
    return value
