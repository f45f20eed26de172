"""Word + type + position embeddings and their LayerNorm in one pass: nothing but what is read again is written.

Rows from ``count`` on (a bucket that is not full) become LayerNorm's image of zeros: ids past the count, which may be
anything, are never looked up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xfast.kernels.launch import check_device, next_power_of_2
from xfast.kernels.norm import store_normalized
from xfast.kernels.quantize import fp8_rows
from xfast.kernels.tiles import row_warps


@triton.jit
def embedding_kernel(
    ids, positions, types, count,  # int32 [T]; count int32 [1]
    word, position_table, type_table, gamma, beta, out, total, q, scale, columns, word_stride, eps,
    TOTAL: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = row < tl.load(count)
    real = column < tl.where(there, columns, 0)
    token = tl.load(ids + row, mask=there, other=0).to(tl.int64)
    position = tl.load(positions + row, mask=there, other=0).to(tl.int64)
    kind = tl.load(types + row, mask=there, other=0).to(tl.int64)
    # The original's order: (word + type) + position
    values = tl.load(word + token * word_stride + column, mask=real, other=0.0).to(tl.float32)
    values += tl.load(type_table + kind * columns + column, mask=real, other=0.0).to(tl.float32)
    values += tl.load(position_table + position * columns + column, mask=real, other=0.0).to(tl.float32)
    store_normalized(values, gamma, beta, out, total, q, scale, row, columns, eps, TOTAL, QUANTIZE, BLOCK)


def embed(
    ids: torch.Tensor,
    positions: torch.Tensor,
    types: torch.Tensor,
    count: torch.Tensor,
    word: torch.Tensor,
    position_table: torch.Tensor,
    type_table: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    *,
    rows: int,
    dtype: torch.dtype,
    total: torch.Tensor | None = None,
    quantize: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """LayerNorm(word[ids] + types + positions): [rows, columns] in ``dtype``, and its e4m3 form.

    Args:
        ids, positions, types: int32 with at least ``rows`` values; those before ``count`` lie inside their tables.
        count: int32 [1] on the device, how many of the rows are tokens.
        word: [*, columns] to look ``ids`` up in: the word embeddings, or given embeddings with ``ids`` their rows.
        position_table, type_table: contiguous [*, columns]. Tables may be of any floating dtype.
        gamma, beta, eps: of the LayerNorm.
        rows: rows to write.
        dtype: of the result.
        total: contiguous [rows, columns] that receives the sum itself, or None; see
            :func:`xfast.kernels.norm.add_norm`.
        quantize: also return e4m3 rows and scales.
    """
    check_device("ids", ids)
    columns = word.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=ids.device)
    quantised = fp8_rows(rows, columns, ids.device) if quantize else None
    if rows:
        block = next_power_of_2(columns)
        embedding_kernel[(rows,)](
            ids, positions, types, count, word, position_table, type_table, gamma, beta, out,
            out if total is None else total, *(quantised or (out, out)), columns, word.stride(0), eps,
            TOTAL=total is not None, QUANTIZE=quantize, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return out, quantised
