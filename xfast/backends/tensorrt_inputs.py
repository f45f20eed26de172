"""What goes into a TensorRT network: a packed batch, or a part of one that is larger than every profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from xfast.device_packing import DevicePacked

Fits: TypeAlias = Callable[[int, int, int], bool]
"""``fits(tokens, batch, longest)``: whether a batch of these sizes may run in one go."""


@dataclass(frozen=True)
class Sequences:
    """Whole sequences, one after another, on a device.

    Attributes:
        ids, positions, types: int32 [T].
        offsets: int32 [B + 1], ``cu_seqlens``.
        longest: L, tokens of the longest sequence.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    offsets: torch.Tensor
    longest: int

    @classmethod
    def of(cls, packed: DevicePacked) -> Sequences:
        """A batch without its padding."""
        rows, tokens = packed.rows, packed.total_tokens
        ids, positions, types = (values[:tokens] for values in (rows.ids, rows.position_ids, rows.type_ids))
        return cls(ids, positions, types, rows.cu_seqlens, packed.max_seqlen)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.offsets) - 1

    def inputs(self, rows: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The network's inputs, made on the device without waiting for it; ``rows`` as for ``Engine.run``."""
        wanted = torch.arange(self.tokens, dtype=torch.int32, device=self.ids.device) if rows is None else rows
        return {
            "token_ids": self.ids.contiguous(),
            "position_ids": self.positions.contiguous(),
            "type_ids": self.types.contiguous(),
            **places(self.offsets, self.tokens, self.longest),
            "rows": wanted.to(torch.int32).contiguous(),
        }

    def parts(self, rows: torch.Tensor | None, fits: Fits) -> Iterator[tuple[Sequences, torch.Tensor | None]]:
        """Yields parts as large as they may be, with the rows wanted of each; waits for the device.

        Args:
            rows: int32, ascending packed rows that are wanted, or None for all.
            fits: what may run in one go: any single sequence, and with a batch all parts of it.
        """
        offsets = self.offsets.tolist()
        ends = list(_ends(offsets, fits))
        bounds = [0, *(offsets[end] for end in ends)]
        cuts = [0] * len(bounds)
        if rows is not None:
            wanted = torch.tensor(bounds, dtype=rows.dtype, device=rows.device)
            cuts = torch.searchsorted(rows.contiguous(), wanted).tolist()
        first = 0
        for number, last in enumerate(ends):
            tokens = slice(bounds[number], bounds[number + 1])
            longest = max(offsets[i + 1] - offsets[i] for i in range(first, last))
            part = Sequences(
                self.ids[tokens],
                self.positions[tokens],
                self.types[tokens],
                self.offsets[first : last + 1] - bounds[number],
                max(longest, 1),
            )
            yield part, None if rows is None else rows[cuts[number] : cuts[number + 1]] - bounds[number]
            first = last


def _ends(offsets: list[int], fits: Fits) -> Iterator[int]:
    """Index after the last sequence of each part: as many sequences as fit, padded to the longest of them."""
    first, longest = 0, 1
    for index in range(1, len(offsets)):
        length = offsets[index] - offsets[index - 1]
        longest = max(longest, length)
        if index - first > 1 and not fits(max(1, offsets[index] - offsets[first]), index - first, longest):
            yield index - 1
            first, longest = index - 1, max(1, length)
    yield len(offsets) - 1


def places(offsets: torch.Tensor, tokens: int, longest: int) -> dict[str, torch.Tensor]:
    """Where attention's padded batch takes each place from, and where each token finds its result again.

    Args:
        offsets: int32 [B + 1], ``cu_seqlens``.
        tokens: T.
        longest: L, tokens of the longest sequence.
    """
    begin, end = offsets[:-1, None], offsets[1:, None]
    columns = torch.arange(longest, dtype=torch.int32, device=offsets.device)[None]
    rows = begin + columns
    packed = torch.arange(tokens, dtype=torch.int32, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), packed, right=True, out_int32=True)
    return {
        "padded_rows": torch.where(rows < end, rows, 0).contiguous(),
        # an empty sequence counts as one token, which nobody reads
        "lengths": (offsets[1:] - offsets[:-1]).clamp(min=1).contiguous(),
        "packed_columns": (sequence * longest + packed - offsets[sequence]).to(torch.int32).contiguous(),
    }
