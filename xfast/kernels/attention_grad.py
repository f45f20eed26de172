"""Backward of varlen attention, for training on packed batches, and the autograd function around both.

The scheme of FlashAttention-2: with P the probabilities recomputed from the saved logsumexp, and
delta = rowsum(dO * O), dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q. One kernel owns
keys and walks over queries (dK, dV), one owns queries and walks over keys (dQ): no atomic additions, so gradients are
the same from run to run. Dropout follows FlashAttention: Z = kept / (1 - p), dV = (P Z)^T dO, dP = (dO V^T) Z.

Shapes as in :mod:`xfast.kernels.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from xfast.kernels.attention import attention, keep, kept_share, products, split_head_dim, work_item
from xfast.kernels.launch import accumulator, capability_of, cast, dot, load_rows, next_power_of_2, on
from xfast.kernels.packing import attention_tiles
from xfast.kernels.tiles import attention_backward_tile, attention_tile

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    out, grad, delta, rows, stride_out, stride_grad,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta [H, Q] = sum over columns of grad * out."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = (row[:, None] < rows) & (columns[None, :] < D)
    o = tl.load(out + row[:, None].to(tl.int64) * stride_out + head * D + columns[None, :], mask=mask, other=0.0)
    g = tl.load(grad + row[:, None].to(tl.int64) * stride_grad + head * D + columns[None, :], mask=mask, other=0.0)
    tl.store(delta + head.to(tl.int64) * rows + row, tl.sum(o.to(ACC) * g.to(ACC), 1), mask=row < rows)


@triton.jit
def _rows_of(base, rest_base, rows, stride, mask, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    """Both parts of a head's columns; the second is the first again when there is no rest."""
    main = load_rows(base, rows, stride, tl.arange(0, D_MAIN), mask)
    rest = main
    if D_REST > 0:
        rest = load_rows(rest_base, rows, stride, tl.arange(0, D_REST), mask)
    return main, rest


@triton.jit
def _store_rows(base, main, rest, rows, stride, mask, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    place = base + rows[:, None].to(tl.int64) * stride
    tl.store(place + tl.arange(0, D_MAIN)[None, :], cast(main, base.dtype.element_ty), mask=mask[:, None])
    if D_REST > 0:
        tl.store(place + D_MAIN + tl.arange(0, D_REST)[None, :], cast(rest, base.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["queries", "seed"])
def keys_kernel(
    q, k, v, grad, lse, delta, dk, dv, table, count,
    stride_q, stride_kv, stride_grad, stride_out, queries, heads, scale, seed, dropout,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_M keys of one sequence and head; ``table`` holds (keys, their queries)."""
    item = tl.program_id(0)
    if item >= tl.load(count) * heads:
        return
    head, first, rows_here, begin, end = work_item(table, item, heads)
    offset = head * (D_MAIN + D_REST)
    keys = first + tl.arange(0, BLOCK_M)
    valid = tl.arange(0, BLOCK_M) < rows_here
    k_main, k_rest = _rows_of(k + offset, k + offset + D_MAIN, keys, stride_kv, valid, D_MAIN, D_REST)
    v_main, v_rest = _rows_of(v + offset, v + offset + D_MAIN, keys, stride_kv, valid, D_MAIN, D_REST)
    REST: tl.constexpr = D_REST if D_REST > 0 else 16
    dk_main, dv_main = tl.zeros([BLOCK_M, D_MAIN], ACC), tl.zeros([BLOCK_M, D_MAIN], ACC)
    dk_rest, dv_rest = tl.zeros([BLOCK_M, REST], ACC), tl.zeros([BLOCK_M, REST], ACC)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < end
        q_main, q_rest = _rows_of(q + offset, q + offset + D_MAIN, rows, stride_q, inside, D_MAIN, D_REST)
        g_main, g_rest = _rows_of(grad + offset, grad + offset + D_MAIN, rows, stride_grad, inside, D_MAIN, D_REST)
        level = tl.load(lse + head.to(tl.int64) * queries + rows, mask=inside, other=float("inf"))
        d = tl.load(delta + head.to(tl.int64) * queries + rows, mask=inside, other=0.0)
        p = tl.exp2(products(q_main, q_rest, k_main, k_rest, BLOCK_M, D_REST, ACC) * (scale * _LOG2E) - level[:, None])
        dp = products(g_main, g_rest, v_main, v_rest, BLOCK_M, D_REST, ACC)
        kept = p
        if DROPOUT:
            mask = keep(seed, rows, head, keys, dropout)
            kept = tl.where(mask, p / kept_share(dropout), 0.0)
            dp = tl.where(mask, dp / kept_share(dropout), 0.0)
        ds = cast(p * (dp - d[:, None]), q.dtype.element_ty)
        kept = cast(kept, q.dtype.element_ty)
        dv_main = dot(tl.trans(kept), g_main, dv_main)
        dk_main = dot(tl.trans(ds), q_main, dk_main)
        if D_REST > 0:
            dv_rest = dot(tl.trans(kept), g_rest, dv_rest)
            dk_rest = dot(tl.trans(ds), q_rest, dk_rest)
    _store_rows(dk + offset, dk_main * scale, dk_rest * scale, keys, stride_out, valid, D_MAIN, D_REST)
    _store_rows(dv + offset, dv_main, dv_rest, keys, stride_out, valid, D_MAIN, D_REST)


@triton.jit(do_not_specialize=["queries", "seed"])
def queries_kernel(
    q, k, v, grad, lse, delta, dq, table, count,
    stride_q, stride_kv, stride_grad, stride_out, queries, heads, scale, seed, dropout,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one sequence and head; ``table`` holds (queries, their keys)."""
    item = tl.program_id(0)
    if item >= tl.load(count) * heads:
        return
    head, first, rows_here, begin, end = work_item(table, item, heads)
    offset = head * (D_MAIN + D_REST)
    rows = first + tl.arange(0, BLOCK_M)
    valid = tl.arange(0, BLOCK_M) < rows_here
    q_main, q_rest = _rows_of(q + offset, q + offset + D_MAIN, rows, stride_q, valid, D_MAIN, D_REST)
    g_main, g_rest = _rows_of(grad + offset, grad + offset + D_MAIN, rows, stride_grad, valid, D_MAIN, D_REST)
    level = tl.load(lse + head.to(tl.int64) * queries + rows, mask=valid, other=float("inf"))
    d = tl.load(delta + head.to(tl.int64) * queries + rows, mask=valid, other=0.0)
    dq_main = tl.zeros([BLOCK_M, D_MAIN], ACC)
    dq_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 16], ACC)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        k_main, k_rest = _rows_of(k + offset, k + offset + D_MAIN, keys, stride_kv, inside, D_MAIN, D_REST)
        v_main, v_rest = _rows_of(v + offset, v + offset + D_MAIN, keys, stride_kv, inside, D_MAIN, D_REST)
        s = products(q_main, q_rest, k_main, k_rest, BLOCK_N, D_REST, ACC) * (scale * _LOG2E)
        p = tl.where(inside[None, :], tl.exp2(s - level[:, None]), 0.0)
        dp = products(g_main, g_rest, v_main, v_rest, BLOCK_N, D_REST, ACC)
        if DROPOUT:
            dp = tl.where(keep(seed, rows, head, keys, dropout), dp / kept_share(dropout), 0.0)
        ds = cast(p * (dp - d[:, None]), q.dtype.element_ty)
        dq_main = dot(ds, k_main, dq_main)
        if D_REST > 0:
            dq_rest = dot(ds, k_rest, dq_rest)
    _store_rows(dq + offset, dq_main * scale, dq_rest * scale, rows, stride_out, valid, D_MAIN, D_REST)


class VarlenAttention(torch.autograd.Function):
    """``apply(q, k, v, cu_q, cu_k, max_q, scale, dropout, seed)``: attention [Q, H, D] with gradients for q, k, v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        scale: float,
        dropout: float,
        seed: int,
    ) -> torch.Tensor:
        """Runs the forward kernel and keeps the logsumexp."""
        with on(q.device):
            capability = capability_of(q.device)
            tile = attention_tile(q.shape[2], q.element_size(), capability, max_q, training=True)
            tiles = attention_tiles(cu_q, cu_k, q.shape[0], tile)
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
            # Rows without keys are in no tile of the backward; zeros keep their delta finite.
            out = attention(q, k, v, tiles, scale=scale, lse=lse, out=torch.zeros_like(q), dropout=dropout, seed=seed)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.settings = (scale, dropout, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        dq, dk, dv = attention_backward(q, k, v, out, lse, grad, cu_q, cu_k, *ctx.settings)
        return dq, dk, dv, None, None, None, None, None, None


def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ [Q, H, D], dK and dV [K, H, D] from the forward's inputs and results (lse in base 2, [H, Q])."""
    queries, heads, head_dim = q.shape
    grad = grad.contiguous()
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if queries == 0 or k.shape[0] == 0:
        return dq, dk, dv
    tile = attention_backward_tile(head_dim, q.element_size(), dropout > 0.0)
    main, rest = split_head_dim(head_dim)
    sizes = {"D_MAIN": main, "D_REST": rest, "DROPOUT": dropout > 0.0, "ACC": accumulator(q.dtype)}
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.warps, "num_stages": tile.stages}
    delta = _delta(out, grad, lse)
    numbers = (q.stride(0), k.stride(0), grad.stride(0))
    rules = (queries, heads, scale, seed, dropout)
    by_keys = attention_tiles(cu_k, cu_q, k.shape[0], tile)
    given = (q, k, v, grad, lse, delta)
    keys_kernel[(by_keys.table.shape[0] * heads,)](
        *given, dk, dv, by_keys.table, by_keys.count, *numbers, dk.stride(0), *rules, **sizes, **blocks
    )
    by_queries = attention_tiles(cu_q, cu_k, queries, tile)
    queries_kernel[(by_queries.table.shape[0] * heads,)](
        *given, dq, by_queries.table, by_queries.count, *numbers, dq.stride(0), *rules, **sizes, **blocks
    )
    return dq, dk, dv


def _delta(out: torch.Tensor, grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """rowsum(dO * O) [H, Q]."""
    queries, heads, head_dim = out.shape
    delta = torch.empty_like(like)
    delta_kernel[(triton.cdiv(queries, 16), heads)](
        out, grad, delta, queries, out.stride(0), grad.stride(0), D=head_dim, BLOCK=next_power_of_2(head_dim),
        ROWS=16, ACC=accumulator(out.dtype),
    )  # fmt: skip
    return delta
