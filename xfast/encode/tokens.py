"""From texts to batches: a window of rows is tokenised in one call, sorted by length and cut by a token budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import normalizers

from xfast.encode.sentences import pinned
from xfast.errors import DataFileError, InvalidOptionError, TokenIdError, UnsupportedModelError

_PADDED = 4  # times a batch's budget, with padding


@dataclass(frozen=True)
class Spans:
    """Where each of T tokens lies in its text, in characters. Special tokens are in no text.

    Attributes:
        special: bool [T].
        starts, ends: int32 [T].
    """

    special: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Window:
    """Tokens of some rows of a shard, the longest row first. n rows, T tokens in all.

    Attributes:
        rows: int64 [n], row numbers in the shard.
        lengths: int64 [n], tokens of each.
        ids: int64 [T].
        types: int64 [T], or None where the model takes no token types.
        spans: where the tokens lie, or None where nobody asks.
        truncated: rows that were longer.
        empty: row numbers in the shard of rows without a token; they are not among ``rows``.
    """

    rows: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    types: np.ndarray | None
    spans: Spans | None
    truncated: int
    empty: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together. B rows, L tokens in the longest.

    Attributes:
        rows: int64 [B], row numbers in the shard.
        lengths: int64 [B].
        ids, mask: int64 [B, L].
        types: int64 [B, L] or None.
        spans: of the batch's real tokens, row after row, or None.
    """

    rows: np.ndarray
    lengths: np.ndarray
    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor | None
    spans: Spans | None


class Tokenizer:
    """A fast tokenizer with the model's limits.

    Args:
        name: folder or Hub id.
        max_length: that was asked for, or None.
        capacity: tokens that the model takes.
        vocab_size: rows of the model's embedding table.
        pairs: whether inputs are pairs.
        spans: whether to keep where the tokens lie.
        revision: of a Hub id.
        lower: whether texts are put into lower case before anything else.

    Raises:
        DataFileError: no tokenizer there.
        InvalidOptionError: ``max_length`` is not accepted.
        UnsupportedModelError: the tokenizer has no Rust implementation.
    """

    def __init__(
        self,
        name: str,
        *,
        max_length: int | None,
        capacity: int,
        vocab_size: int,
        pairs: bool,
        spans: bool,
        revision: str | None = None,
        lower: bool = False,
    ) -> None:
        self.name, self.vocab_size, self.spans = name, vocab_size, spans
        loaded = _load(name, revision)
        limit = min(capacity, loaded.model_max_length) if max_length is None else max_length
        least = loaded.num_special_tokens_to_add(pair=pairs) + 1
        if not least <= limit <= capacity:
            raise InvalidOptionError(f"max-length: {limit} is not accepted; accepted: {least} to {capacity}")
        self._with_types = "token_type_ids" in loaded.model_input_names
        self._backend = loaded.backend_tokenizer
        if lower:
            own = self._backend.normalizer
            self._backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if own is None else [own])])
        self._backend.no_padding()
        self._backend.enable_truncation(limit, strategy="longest_first", direction=loaded.truncation_side)

    def window(self, first: int, texts: Sequence[str], pairs: Sequence[str] | None, where: Sequence[str]) -> Window:
        """Tokens of rows ``first``, ``first + 1``, ... of a shard. Runs in Rust on several threads, without the GIL.

        Raises:
            TokenIdError: a token that the model has no embedding for; ``where`` names the row.
        """
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        # Offsets are not free
        encode = self._backend.encode_batch if self.spans else self._backend.encode_batch_fast
        encodings: list[Any] = encode(inputs, add_special_tokens=True)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        order = np.argsort(-lengths, kind="stable")
        empty = [first + int(row) for row in order if not lengths[row]]
        order = order[: len(order) - len(empty)]
        longest_first = [encodings[row] for row in order]
        total = int(lengths.sum())
        ids = _flat((encoding.ids for encoding in longest_first), total)
        self._check(ids, lengths[order], order, where)
        return Window(
            rows=order + first,
            lengths=lengths[order],
            ids=ids,
            types=_flat((encoding.type_ids for encoding in longest_first), total) if self._with_types else None,
            spans=_spans(longest_first, total) if self.spans else None,
            truncated=sum(bool(encoding.overflowing) for encoding in encodings),
            empty=empty,
        )

    def _check(self, ids: np.ndarray, lengths: np.ndarray, order: np.ndarray, where: Sequence[str]) -> None:
        if not ids.size or ids.max() < self.vocab_size:
            return
        at = int(np.argmax(ids >= self.vocab_size))
        row = order[np.searchsorted(np.cumsum(lengths), at, side="right")]
        raise TokenIdError(
            f"tokenizer: {self.name} does not fit the model: {where[row]} has token {ids[at]}; "
            f"the model has tokens 0 to {self.vocab_size - 1}"
        )


def batches(window: Window, budget: int, pad_id: int) -> Iterator[Batch]:
    """Cuts a window into batches of at most ``budget`` tokens, padding not counted, but of one row at least.

    With padding, which outputs have, it is at most ``_PADDED`` times the budget, else a long row and many short ones
    would take gigabytes.
    """
    ends = np.cumsum(window.lengths)
    first, start = 0, 0
    while first < len(window.rows):
        rows = min(
            int(np.searchsorted(ends, start + budget, side="right")) - first,
            _PADDED * budget // int(window.lengths[first]),
        )
        last = first + max(1, rows)
        lengths, end = window.lengths[first:last], int(ends[last - 1])
        real = np.arange(lengths[0]) < lengths[:, None]

        def padded(flat: np.ndarray, value: int, real: np.ndarray = real, cut: slice = slice(start, end)) -> Any:
            values = np.full(real.shape, value, np.int64)
            values[real] = flat[cut]
            return torch.from_numpy(values)

        spans = window.spans
        yield Batch(
            rows=window.rows[first:last],
            lengths=lengths,
            ids=padded(window.ids, pad_id),
            mask=torch.from_numpy(real.astype(np.int64)),
            types=None if window.types is None else padded(window.types, 0),
            spans=spans and Spans(spans.special[start:end], spans.starts[start:end], spans.ends[start:end]),
        )
        first, start = last, end


def _load(name: str, revision: str | None) -> Any:
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(name, **pinned(revision))
    except Exception as error:  # readers of bad files raise whatever they like
        raise DataFileError(f"tokenizer: {name}: {error}") from error
    if len(loaded) <= len(loaded.all_special_ids):  # transformers 5 makes one up where the files are missing
        raise DataFileError(f"tokenizer: {name}: no tokenizer files there")
    if not getattr(loaded, "is_fast", False):
        raise UnsupportedModelError(f"tokenizer: {name}: {type(loaded).__name__} is not a fast tokenizer")
    return loaded


def _flat(values: Iterator[Sequence[int]], total: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(values), np.int64, total)


def _spans(encodings: Sequence[Any], total: int) -> Spans:
    offsets = _flat((bound for encoding in encodings for bound in encoding.offsets), 2 * total).astype(np.int32)
    special = _flat((encoding.special_tokens_mask for encoding in encodings), total).astype(bool)
    return Spans(special, offsets[0::2], offsets[1::2])
