"""Batches to measure on. Token ids are random: the time of a forward pass does not depend on which ids it gets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

PAD = 1


@dataclass(frozen=True)
class Workload:
    """A list of padded batches, each (input_ids, attention_mask) int64 [batch, length]."""

    name: str
    batches: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(int(mask.sum()) for _, mask in self.batches)

    @property
    def samples(self) -> int:
        """Sequences."""
        return sum(ids.shape[0] for ids, _ in self.batches)

    @property
    def padding(self) -> float:
        """Share of padding among all positions of the padded batches."""
        slots = sum(ids.numel() for ids, _ in self.batches)
        return 1 - self.tokens / slots if slots else 0.0


def batches_of(lengths: list[int], batch_size: int, vocab: int = 250002, seed: int = 0) -> tuple:
    """Random sequences of the given token lengths (specials included), right-padded in batches, in order."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, len(lengths), batch_size):
        chunk = lengths[start : start + batch_size]
        ids = torch.randint(4, vocab - 1, (len(chunk), max(chunk)), generator=generator)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(chunk):
            mask[row, :length] = 1
            ids[row, 0], ids[row, length - 1] = 0, 2
            ids[row, length:] = PAD
        batches.append((ids, mask))
    return tuple(batches)


def mixed_lengths(count: int = 64, seed: int = 0) -> list[int]:
    """Log-normal token lengths, mean about 42, cut at 256: sentences and short paragraphs as they arrive."""
    draw = np.random.default_rng(seed).lognormal(mean=3.45, sigma=0.75, size=count)
    return [int(length) for length in np.clip(draw, 3, 256)]


def workload(name: str, vocab: int = 250002) -> Workload:
    """A workload by name: ``mixed``, ``sorted``, ``full`` (8 x 384), or ``BxL`` such as ``1x32``."""
    if name == "mixed":
        return Workload(name, batches_of(mixed_lengths(), 16, vocab))
    if name == "sorted":
        return Workload(name, batches_of(sorted(mixed_lengths()), 16, vocab))
    if name == "full":
        return Workload(name, batches_of([384] * 8, 8, vocab))
    batch, length = (int(part) for part in name.split("x"))
    return Workload(name, batches_of([length] * batch, batch, vocab))
