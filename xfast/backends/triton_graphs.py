"""The Triton backend's CUDA graphs: what a bucket's buffers are, and how a batch gets into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from xfast.backends.cuda_graphs import Graphs, bucket_for, capture_on
from xfast.backends.triton_forward import DeviceBatch, TritonForward
from xfast.kernels.tiles import Tile

if TYPE_CHECKING:
    from xfast.device_packing import DevicePacked

_SEQUENCE_STEPS = (1, 8, 64, 512, 4096)


@dataclass(frozen=True)
class Key:
    """What a graph depends on: sizes of buffers and grids, attention's plan, torch's switches."""

    tokens: int
    sequences: int
    selected: int | None
    tile: Tile
    shared: bool
    layers: int
    switches: tuple[Any, ...] = ()


def tf32() -> bool:
    """Whether torch multiplies fp32 matrices in TF32. It may refuse to tell in its older words, so newer come first."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        return bool(matmul.allow_tf32)
    own = matmul.fp32_precision
    return (own if own != "none" else getattr(torch.backends, "fp32_precision", "none")) == "tf32"


def _switches() -> tuple[Any, ...]:
    """What a program sets for torch's products at any time; a graph keeps what held when it was captured."""
    matmul = torch.backends.cuda.matmul
    sums = (f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16"))
    return tf32(), *(getattr(matmul, name, None) for name in (*sums, "allow_fp16_accumulation"))


class GraphCache:
    """Runs forwards, through graphs where they pay; never with ``capture`` False."""

    def __init__(self, forward: TritonForward, capture: bool = True) -> None:
        self._forward = forward
        self.graphs = Graphs(forward.device, capture_on(forward.device) if capture else None)

    def run(
        self, packed: DevicePacked, selected: torch.Tensor | None, layers: int, hidden_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states of T tokens or of the ``selected`` rows; see :class:`xfast.backends.base.Engine`."""
        tokens = packed.total_tokens
        if tokens == 0:
            return self._empty(layers, hidden_states)
        key = self._key(packed, selected, layers)
        if key is not None and not hidden_states and packed.embeds is None:
            rows = tokens if selected is None else selected.shape[0]
            out = self.graphs.replay(
                key, lambda: self._prepared(key), lambda buffers: _fill(buffers, packed, selected), rows
            )
            if out is not None:
                return out, None
        return self._forward(self._batch(packed, selected), layers, hidden_states)

    def describe(self) -> list[str]:
        """Lines for ``explain``."""
        return self.graphs.describe(lambda key: key.tokens)

    def _empty(self, layers: int, hidden_states: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        options: dict[str, Any] = {"dtype": self._forward.dtype, "device": self._forward.device}
        hidden = self._forward.spec.hidden_size
        states = torch.empty(layers + 1, 0, hidden, **options) if hidden_states else None
        return torch.empty(0, hidden, **options), states

    def _key(self, packed: DevicePacked, selected: torch.Tensor | None, layers: int) -> Key | None:
        tokens = bucket_for(packed.total_tokens)
        if tokens is None or packed.batch > tokens:
            return None
        # Room for sequences and selected rows in coarse steps: empty sequences cost next to nothing.
        sequences = min(next(step for step in _SEQUENCE_STEPS if step >= packed.batch), tokens)
        rows = None if selected is None else sequences
        return Key(tokens, sequences, rows, *self._forward.plan(packed.max_seqlen, packed.batch), layers, _switches())

    def _batch(self, packed: DevicePacked, selected: torch.Tensor | None) -> DeviceBatch:
        """The batch as it is, for a run without a graph."""
        rows, tokens = packed.rows, packed.total_tokens
        tile, shared = self._forward.plan(packed.max_seqlen, packed.batch)
        return DeviceBatch(
            ids=(rows.ids if packed.embeds is None else rows.source)[:tokens],
            positions=rows.position_ids[:tokens],
            types=rows.type_ids[:tokens],
            cu_seqlens=rows.cu_seqlens,
            row_keys=rows.row_keys,
            count=rows.info[:1],
            tile=tile,
            shared=shared,
            embeds=packed.embeds,
            selected=selected,
        )

    def _prepared(self, key: Key) -> tuple[DeviceBatch, Any]:
        buffers, forward = self._buffers(key), self._forward
        return buffers, lambda: forward(buffers, key.layers)[0]  # not self: graphs would wait for the cycle collector

    def _buffers(self, key: Key) -> DeviceBatch:
        """Input buffers of a bucket, filled with one token so that the first run reads nothing undefined."""
        ints: dict[str, Any] = {"dtype": torch.int32, "device": self._forward.device}
        filled = torch.zeros(5, key.tokens, **ints)
        filled[4] = 1
        cu_seqlens = torch.ones(key.sequences + 1, **ints)
        cu_seqlens[0] = 0
        return DeviceBatch(
            ids=filled[0],
            positions=filled[1],
            types=filled[2],
            cu_seqlens=cu_seqlens,
            row_keys=filled[3:5],
            count=torch.ones(1, **ints),
            tile=key.tile,
            shared=key.shared,
            selected=None if key.selected is None else torch.zeros(key.selected, **ints),
        )


def _fill(buffers: DeviceBatch, packed: DevicePacked, selected: torch.Tensor | None) -> None:
    rows, tokens = packed.rows, packed.total_tokens
    buffers.ids[:tokens].copy_(rows.ids[:tokens])
    buffers.positions[:tokens].copy_(rows.position_ids[:tokens])
    buffers.types[:tokens].copy_(rows.type_ids[:tokens])
    if buffers.shared:
        buffers.row_keys[:, :tokens].copy_(rows.row_keys[:, :tokens])
    buffers.cu_seqlens.fill_(tokens)[: packed.batch + 1].copy_(rows.cu_seqlens)
    buffers.count.copy_(rows.info[:1])
    if selected is not None:
        assert buffers.selected is not None
        # Surplus rows repeat the last token: ascending, and in no sequence of their own.
        buffers.selected.fill_(tokens - 1)[: selected.shape[0]].copy_(selected)
