"""Weights out of the CPU's packed layout (csrc/layout.h), in torch, on the device where they lie."""

from __future__ import annotations

import torch

from xfast import _C
from xfast.kernels.integer_weights import IntegerWeights, int4_weights

_PANEL = _C.panel_outputs
_CHUNK = _C.chunk_bytes
_INT4_SCALES = 2 * _PANEL  # bytes of a group's scales, bf16


def unpack(data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix [out, in] from its panels.

    Args:
        data: uint8, all panels.
        dtype: fp32, bf16 or int8: of the values in them.
        shape: (out, in); what fills the last panel and chunk is left out.
    """
    outputs, inputs = shape
    panels = data.view(dtype).view(-(-outputs // _PANEL), -1, _CHUNK // 4, _PANEL, 4 // dtype.itemsize)
    return panels.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:outputs, :inputs].contiguous()


def unpack_int4(data: torch.Tensor, shape: tuple[int, int], group_size: int) -> IntegerWeights:
    """int4 weights from their records; see :func:`unpack`."""
    outputs, inputs = shape
    panels = data.view(-(-outputs // _PANEL), -1)
    padded = -(-inputs // _CHUNK) * _CHUNK
    whole = padded // group_size
    end = whole * _record_bytes(group_size)
    parts = [_records(panels[:, :end], whole, group_size)]
    if padded % group_size:  # the last group ends early
        parts.append(_records(panels[:, end:], 1, padded % group_size))
    values, scale = (torch.cat([part[i] for part in parts], 1)[:outputs] for i in (0, 1))
    return int4_weights(values, scale, inputs, group_size)


def _record_bytes(values: int) -> int:
    return _INT4_SCALES + _PANEL * values // 2


def _records(data: torch.Tensor, count: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 values plus 8 [out, count * group] and bf16 scales [out, count] of records with ``group`` values each."""
    records = data.reshape(len(data), count, _record_bytes(group))
    scales = records[:, :, :_INT4_SCALES].contiguous().view(torch.bfloat16)
    pairs = records[:, :, _INT4_SCALES:].unflatten(2, (group // 8, _PANEL, 4))
    halves = torch.stack((pairs & 15, pairs >> 4), 4)  # of 8 consecutive inputs, the first and the last four
    values = halves.permute(0, 3, 1, 2, 4, 5).flatten(2).flatten(0, 1)
    return values, scales.permute(0, 2, 1).flatten(0, 1)
