"""What a model's output becomes: one class a kind of output, each collecting a shard's rows in the input's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from xfast.encode.tokens import Batch
from xfast.errors import InvalidOptionError

EMBEDDING, LABEL, SCORE = "embedding", "label", "score"
LABELS, SCORES, STARTS, ENDS = "labels", "scores", "starts", "ends"

Chunk = tuple[np.ndarray, ...]


class Collector(Protocol):
    """Takes batches in any order; ``columns`` are those of all ``rows`` rows, in order."""

    def add(self, batch: Batch, output: torch.Tensor) -> None:
        """Rows of a batch; output: [B, L, hidden], [B, labels] or [B, L, labels] in the model's type."""

    def columns(self) -> dict[str, pa.Array]:
        """By name, each as long as the shard; rows that were never added hold whatever."""


class Pooled:
    """One vector a row: ``embedding`` as FixedSizeList<float32 or float16>."""

    names = (EMBEDDING,)

    def __init__(self, rows: int, hidden: int, pooling: str, normalize: bool, dtype: str) -> None:
        self.values = np.zeros((rows, hidden), dtype)
        self.pooling, self.normalize = pooling, normalize

    def add(self, batch: Batch, output: torch.Tensor) -> None:
        """[B, L, hidden]; L may be the first token alone."""
        if self.pooling == "cls":
            vectors = output[:, 0].float()
        else:
            weights = batch.mask.to(output.device, torch.float32)
            weights /= weights.sum(1, keepdim=True)
            vectors = (output.float() * weights.unsqueeze(2)).sum(1)
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        self.values[batch.rows] = _cast(vectors.cpu().numpy(), self.values.dtype)

    def columns(self) -> dict[str, pa.Array]:
        """``embedding``."""
        return {EMBEDDING: _vectors(self.values)}


class PerToken:
    """A vector for every token, special ones included: ``embedding`` as List<FixedSizeList>."""

    names = (EMBEDDING,)

    def __init__(self, rows: int, hidden: int, dtype: str) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.values: list[np.ndarray] = [np.zeros((0, hidden), dtype)] * rows

    def add(self, batch: Batch, output: torch.Tensor) -> None:
        """[B, L, hidden]."""
        vectors = _cast(output.float().cpu().numpy(), np.dtype(self.dtype))
        for row, length, padded in zip(batch.rows, batch.lengths, vectors, strict=True):
            self.values[row] = padded[:length].copy()

    def columns(self) -> dict[str, pa.Array]:
        """``embedding``."""
        flat = np.concatenate([np.zeros((0, self.hidden), self.dtype), *self.values])
        return {EMBEDDING: pa.LargeListArray.from_arrays(_offsets(self.values), _vectors(flat))}


def _cast(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """In the wanted type.

    Raises:
        InvalidOptionError: float16 cannot hold them.
    """
    if dtype == np.float16 and float(np.abs(values).max(initial=0.0)) > float(np.finfo(np.float16).max):
        raise InvalidOptionError("dtype: float16 holds values up to 65504, an embedding has larger ones; use float32")
    return values.astype(dtype, copy=False)


class Classes:
    """The likeliest label of a row and its probability: ``label`` (string), ``score`` (float32)."""

    names = (LABEL, SCORE)

    def __init__(self, rows: int, labels: Sequence[str]) -> None:
        self.labels = labels
        self.best = np.zeros(rows, np.int64)
        self.scores = np.zeros(rows, np.float32)

    def add(self, batch: Batch, output: torch.Tensor) -> None:
        """[B, labels]."""
        score, best = output.float().softmax(1).max(1)
        self.best[batch.rows], self.scores[batch.rows] = best.cpu().numpy(), score.cpu().numpy()

    def columns(self) -> dict[str, pa.Array]:
        """``label``, ``score``."""
        return {LABEL: _named(self.best, self.labels), SCORE: pa.array(self.scores)}


class Relevance:
    """The one score of a reranker or a regression: ``score`` (float32), the raw output or its sigmoid."""

    names = (SCORE,)

    def __init__(self, rows: int, normalize: bool) -> None:
        self.normalize = normalize
        self.scores = np.zeros(rows, np.float32)

    def add(self, batch: Batch, output: torch.Tensor) -> None:
        """[B, 1]."""
        scores = output[:, 0].float()
        self.scores[batch.rows] = (scores.sigmoid() if self.normalize else scores).cpu().numpy()

    def columns(self) -> dict[str, pa.Array]:
        """``score``."""
        return {SCORE: pa.array(self.scores)}


class Tags:
    """A label for every token of the text: lists ``labels``, ``scores`` and the characters ``starts`` to ``ends``."""

    names = (LABELS, SCORES, STARTS, ENDS)

    def __init__(self, rows: int, labels: Sequence[str]) -> None:
        self.labels = labels
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32))
        self.values: list[Chunk] = [nothing] * rows
        self._nothing = nothing

    def add(self, batch: Batch, output: torch.Tensor) -> None:
        """[B, L, labels]."""
        score, best = (part.cpu().numpy() for part in output.float().softmax(2).max(2))
        spans, start = batch.spans, 0
        assert spans is not None
        for i, (row, length) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            real = ~spans.special[start : start + length]
            starts, ends = spans.starts[start : start + length], spans.ends[start : start + length]
            self.values[row] = (best[i, :length][real], score[i, :length][real], starts[real], ends[real])
            start += length

    def columns(self) -> dict[str, pa.Array]:
        """``labels``, ``scores``, ``starts``, ``ends``."""
        best, scores, starts, ends = (np.concatenate(parts) for parts in zip(self._nothing, *self.values, strict=True))
        offsets = _offsets([chunk[0] for chunk in self.values])
        flat: tuple[Any, ...] = (_named(best, self.labels), *(pa.array(part) for part in (scores, starts, ends)))
        return {
            name: pa.LargeListArray.from_arrays(offsets, values) for name, values in zip(self.names, flat, strict=True)
        }


def _vectors(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _offsets(rows: Sequence[np.ndarray]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, rows)]), pa.int64())


def _named(numbers: np.ndarray, labels: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(labels)).cast(pa.string())
