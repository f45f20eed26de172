"""Varlen attention: softmax(scale q k^T) v for sequences that lie one after another, without padding or causal mask.

Follows FlashAttention-2 (Dao, 2023): one pass over the keys with a running maximum and sum, scores in base 2, backward
from the saved logsumexp. What differs, because encoders see many short sequences:

- The grid is a list of tiles made on the device (``kernels/packing.py``), longest sequences first, so that the last
  programs to start are the short ones; no host value depends on the lengths.
- *Aligned* tiles hold queries of one sequence. *Shared* tiles hold ``block_m`` consecutive rows of several short
  sequences and mask scores that cross from one to another: eleven-token sentences would leave 90 % of an aligned tile
  empty. (A non-finite value in one of these sequences then spreads to its tile: 0 x infinity.)
- head_dim 80 (XLM-R XL) is 64 + 16, not padded to 128: 37 % fewer operations.

Shapes: Q query rows, K key rows, H heads, D head_dim, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from xfast.kernels.launch import accumulator, cast, check_device, dot, load_rows
from xfast.kernels.tiles import Tile

HEAD_DIMS = (16, 32, 64, 80, 128)
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Work of one attention call, see :func:`xfast.kernels.packing.attention_tiles`.

    Attributes:
        table: int32 [capacity, 4], (first query row, query rows, first key row, end of key rows) of each tile.
        count: int32 [1], how many of them there are.
        row_keys: int32 [2, Q], first and end key row of every query row; None for aligned tiles.
        tile: sizes that the table was made for.
    """

    table: torch.Tensor
    count: torch.Tensor
    row_keys: torch.Tensor | None
    tile: Tile


@triton.jit
def keep(seed, row, head, columns, dropout):
    """Which probabilities of a [rows, columns] tile survive dropout: a function of place alone, so backward agrees."""
    c0 = row[:, None] + tl.zeros_like(columns)[None, :]
    c1 = columns[None, :] + tl.zeros_like(row)[:, None]
    zero = (c0 * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), zero + head.to(tl.uint32), zero)
    return tl.uint_to_uniform_float(bits) >= dropout


@triton.jit
def kept_share(dropout):
    """What survivors of dropout are divided by. Where none survive it is no zero: 0 / 0 would be NaN."""
    return tl.maximum(1.0 - dropout, 1e-30)


@triton.jit
def products(a, a_rest, b, b_rest, COLUMNS: tl.constexpr, D_REST: tl.constexpr, ACC: tl.constexpr):
    """a b^T over all of head_dim: [rows of a, rows of b]."""
    out = dot(a, tl.trans(b), tl.zeros([a.shape[0], COLUMNS], ACC))
    if D_REST > 0:
        out = dot(a_rest, tl.trans(b_rest), out)
    return out


@triton.jit
def work_item(table, item, heads):
    """What the ``item``-th (tile, head) is: head, first row, rows, begin and end of the rows to walk over."""
    entry = table + item // heads * 4
    return item % heads, tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _forward_step(
    q, q_rest, acc, acc_rest, m, total, k, v, start, end, stride_kv, scale, lo, hi, query_rows, head, seed, dropout,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SHARED: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One block of keys: new running maximum, sum and weighted values."""
    rows = start + tl.arange(0, BLOCK_N)
    inside = rows < end
    columns = tl.arange(0, D_MAIN)
    if MASKED:
        keys = load_rows(k, rows, stride_kv, columns, inside)
        values = load_rows(v, rows, stride_kv, columns, inside)
    else:
        offsets = rows[:, None].to(tl.int64) * stride_kv + columns[None, :]
        keys = tl.load(k + offsets)
        values = tl.load(v + offsets)
    keys_rest, values_rest = keys, values
    if D_REST > 0:
        rest_columns = D_MAIN + tl.arange(0, D_REST)
        keys_rest = load_rows(k, rows, stride_kv, rest_columns, inside)
        values_rest = load_rows(v, rows, stride_kv, rest_columns, inside)
    s = products(q, q_rest, keys, keys_rest, BLOCK_N, D_REST, ACC) * scale
    if SHARED:
        s = tl.where((rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None]), s, float("-inf"))
    elif MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    # A row of a shared tile may see no key of its own yet: (-inf) - (-inf) must not become NaN.
    base = tl.where(new_m == float("-inf"), 0.0, new_m) if SHARED else new_m
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(m - base)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep(seed, query_rows, head, rows, dropout), p, 0.0)
    p = cast(p, values.dtype)
    acc = dot(p, values, acc * fade[:, None])
    if D_REST > 0:
        acc_rest = dot(p, values_rest, acc_rest * fade[:, None])
    return acc, acc_rest, new_m, total


@triton.jit(do_not_specialize=["queries", "seed"])
def forward_kernel(
    q, k, v, out, lse, table, count, row_lo, row_hi,  # q/out [Q, H, D], k/v [K, H, D], lse [H, Q], table [*, 4]
    stride_q, stride_kv, stride_out, queries, heads, scale, seed, dropout,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARED: tl.constexpr, LSE: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Programs walk over (tile, head) items: heads of a tile are neighbours, since they are in memory."""
    items = tl.load(count) * heads
    columns = tl.arange(0, D_MAIN)
    rest_columns = tl.arange(0, D_REST if D_REST > 0 else 16)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head, first, rows_here, k_begin, k_end = work_item(table, item, heads)
        offset = head * (D_MAIN + D_REST)
        rows = first + tl.arange(0, BLOCK_M)
        valid = tl.arange(0, BLOCK_M) < rows_here
        q_tile = load_rows(q + offset, rows, stride_q, columns, valid)
        q_rest = q_tile
        if D_REST > 0:
            q_rest = load_rows(q + offset + D_MAIN, rows, stride_q, rest_columns, valid)
        lo = tl.load(row_lo + rows, mask=valid, other=0) if SHARED else rows
        hi = tl.load(row_hi + rows, mask=valid, other=0) if SHARED else rows
        m = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        acc = tl.zeros([BLOCK_M, D_MAIN], ACC)
        acc_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 16], ACC)
        whole = k_begin + (k_end - k_begin) // BLOCK_N * BLOCK_N
        for start in range(k_begin, whole, BLOCK_N):
            acc, acc_rest, m, total = _forward_step(
                q_tile, q_rest, acc, acc_rest, m, total, k + offset, v + offset, start, k_end, stride_kv, scale, lo, hi,
                rows, head, seed, dropout, D_MAIN, D_REST, BLOCK_N, False, SHARED, DROPOUT, ACC,
            )  # fmt: skip
        if whole < k_end:
            acc, acc_rest, m, total = _forward_step(
                q_tile, q_rest, acc, acc_rest, m, total, k + offset, v + offset, whole, k_end, stride_kv, scale, lo, hi,
                rows, head, seed, dropout, D_MAIN, D_REST, BLOCK_N, True, SHARED, DROPOUT, ACC,
            )  # fmt: skip
        # No key at all: the row is zero, as in FlashAttention.
        divisor = tl.where(total == 0.0, 1.0, total)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / divisor)
        if DROPOUT:
            inverse = inverse / kept_share(dropout)
        place = rows[:, None].to(tl.int64) * stride_out + offset
        dtype = out.dtype.element_ty
        tl.store(out + place + columns[None, :], cast(acc * inverse[:, None], dtype), mask=valid[:, None])
        if D_REST > 0:
            rest_place = out + place + D_MAIN + rest_columns[None, :]
            tl.store(rest_place, cast(acc_rest * inverse[:, None], dtype), mask=valid[:, None])
        if LSE:
            tl.store(lse + head.to(tl.int64) * queries + rows, m + tl.log2(divisor), mask=valid)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """The power of two and the rest that a head's columns are computed as: 80 = 64 + 16."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, head_dim - main


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Tiles,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    programs: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Attention of every query row over the keys of its sequence.

    Args:
        q: [Q, H, D]; heads and columns contiguous, rows at any stride (a slice of a fused QKV product). fp16, bf16,
            fp32 (products in full fp32, no TF32) or, in the interpreter, fp64.
        k, v: [K, H, D] alike, with the same row stride.
        tiles: the work, made by :func:`xfast.kernels.packing.attention_tiles`.
        scale: of the scores; default ``D ** -0.5``.
        out: [Q, H, D] to write to, in q's dtype; rows that no tile holds stay as they are.
        lse: fp32 [H, Q] for the logsumexp of the scores in base 2, which backward needs; None: not written.
        programs: grid size; None: one program for every tile and head that there can be.
        dropout: probability with which a probability is dropped, as ``nn.Dropout`` does; ``seed`` says which.

    Raises:
        ValueError: a shape, stride or device that the kernel cannot read.
    """
    _check(q, k, v)
    queries, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check_rows("out", out, head_dim)
    if queries == 0:
        return out
    main, rest = split_head_dim(head_dim)
    tile, rows = tiles.tile, tiles.row_keys
    grid = tiles.table.shape[0] * heads if programs is None else programs
    forward_kernel[(grid,)](
        q, k, v, out, q if lse is None else lse, tiles.table, tiles.count,
        tiles.count if rows is None else rows[0], tiles.count if rows is None else rows[1],
        q.stride(0), k.stride(0), out.stride(0), queries, heads,
        (head_dim**-0.5 if scale is None else scale) * _LOG2E, seed, dropout,
        D_MAIN=main, D_REST=rest, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SHARED=rows is not None,
        LSE=lse is not None, DROPOUT=dropout > 0.0, ACC=accumulator(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_device("q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.shape[1:] != q.shape[1:] or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: expected [rows, heads, head_dim] like q's {tuple(q.shape)} {q.dtype} on {q.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        _check_rows(name, tensor, q.shape[2])
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q: head_dim {q.shape[2]} is not accepted; accepted: {', '.join(map(str, HEAD_DIMS))}")
    if k.shape[0] != v.shape[0] or k.stride(0) != v.stride(0):
        raise ValueError("k, v: expected the same number of rows and the same row stride")


def _check_rows(name: str, tensor: torch.Tensor, head_dim: int) -> None:
    if tensor.numel() and (tensor.stride(2) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != head_dim)):
        raise ValueError(f"{name}: heads and columns must be contiguous, got strides {tensor.stride()}")
