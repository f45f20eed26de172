"""The plain-PyTorch truth of every operation, and the error criterion that kernels are held to.

Nothing here is fast and nothing here uses xfast. Shapes: R rows, I in_features, O out_features, T total_tokens,
B batch, L length, H heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

QUANT_MAX = 127.0
# Below this a row counts as zero: 127 / absmax would overflow fp32.
TINY_ABSMAX = 1e-30


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """x [R, I] . weight [O, I]^T + bias [O] -> [R, O], inputs, products and result in ``dtype``."""
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What stock torch does in bf16: rounded inputs, one rounding of the result. [R, I] -> bf16 [R, O]."""
    return linear(x, weight, bias, torch.bfloat16)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per row: fp32 [R, I] -> (q [R, I] in [-127, 127], scale fp32 [R]).

    scale = absmax / 127; q = x * (127 / absmax), rounded half to even. Each step is one fp32 operation (torch divides a
    number by a tensor in two: it multiplies by the reciprocal).
    """
    x = x.to(torch.float32)
    absmax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    inverse = torch.where(absmax > TINY_ABSMAX, torch.full_like(absmax, QUANT_MAX) / absmax, 0.0)
    q = torch.round(x * inverse[:, None]).clamp(-QUANT_MAX, QUANT_MAX)
    return q.to(torch.int8), absmax / QUANT_MAX


def linear_int8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Exact simulation of dynamic int8: rows of x and of weight are quantised alike, the sum is an exact integer.

    x [R, I], weight [O, I], bias [O] -> fp32 [R, O] = round(sum * (scale_w * scale_x) + bias). The product of the
    integer (as fp32) and the scale is exact in fp64; with a bias the last bit may differ by double rounding.
    """
    qx, sx = quantize_rows(x)
    qw, sw = quantize_rows(weight)
    total = qx.double() @ qw.double().T  # exact: |sum| <= I * 127^2 < 2^53
    y = total.float().double() * (sw[None, :] * sx[:, None]).double()
    return (y if bias is None else y + bias.double()).float()


INT4_STEPS = (8.0, 8.4, 8.8, 9.3, 9.9, 10.6, 7.5)
"""Steps between zero and a group's largest value that are tried, in that order (csrc/weights.cpp)."""


def bf16_round(x: np.ndarray) -> np.ndarray:
    """fp32 -> the nearest bf16, ties to even, as fp32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def quantize_groups(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int4 per group of inputs: fp32 [O, I] -> (q int64 [O, G, group] in [-8, 7], scale fp32 [O, G]).

    The largest value of a group lies on the side of -8; of the sizes in ``INT4_STEPS`` the first with the least squared
    error, summed in fp32 in 8 lanes, is taken. Every step is one fp32 operation. Inputs are padded with zeros.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // group)
    w = np.zeros((outputs, groups, group), np.float32)
    w.reshape(outputs, -1)[:, :inputs] = weight
    low, high = np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)
    extreme = np.where(-low >= high, low, high)
    usable = np.abs(extreme) > TINY_ABSMAX
    best = np.full(extreme.shape, np.inf, np.float32)
    scale, q = np.zeros_like(extreme), np.zeros(w.shape, np.int64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for i, steps in enumerate(INT4_STEPS):
            tried = bf16_round(-extreme / np.float32(steps))
            inverse = np.float32(1.0) / tried
            rounded = np.rint(np.clip(w * inverse[..., None], np.float32(-8), np.float32(7)))
            squares = np.square(w - tried[..., None] * rounded).reshape(outputs, groups, -1, 8)
            lanes = np.zeros((outputs, groups, 8), np.float32)
            for step in range(squares.shape[2]):
                lanes = lanes + squares[:, :, step]
            error = np.zeros_like(extreme)
            for lane in range(8):
                error = error + lanes[..., lane]
            better = usable & ((error < best) | (i == 0))
            best, scale = np.where(better, error, best), np.where(better, tried, scale)
            q = np.where(better[..., None], rounded, q).astype(np.int64)
    return q, scale


def linear_int4(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, group: int) -> np.ndarray:
    """int4 weights per group, int8 activations per row: [R, I], [O, I], [O] -> fp32 [R, O].

    Exact integer sums within a group, then one fused multiply-add a group in their order (in fp64, rounded once: exact
    but for double rounding), and one with the row's scale and the bias.
    """
    qx, sx = (t.numpy() for t in quantize_rows(torch.from_numpy(x)))
    qw, sw = quantize_groups(weight, group)
    padded = np.zeros((len(x), qw.shape[1] * group), np.int64)
    padded[:, : x.shape[1]] = qx
    y = np.zeros((len(x), len(weight)), np.float32)
    for g in range(qw.shape[1]):
        total = padded[:, g * group : (g + 1) * group] @ qw[:, g].T
        y = (total * sw[None, :, g].astype(np.float64) + y).astype(np.float32)
    return (y * sx[:, None].astype(np.float64) + (0.0 if bias is None else bias)).astype(np.float32)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Exact GELU, x * Phi(x), in fp64. erfc keeps the negative tail accurate where 1 + erf would cancel."""
    x = x.double()
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2.0))


def layer_norm(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension in fp64: x [R, C], gamma and beta [C] -> [R, C]."""
    x = x.double()
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * gamma.double() + beta.double()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Softmax(scale q k^T) v of one sequence: q [Q, H, D], k and v [K, H, D] -> [Q, H, D], all in ``dtype``."""
    q, k, v = (t.to(dtype).transpose(0, 1) for t in (q, k, v))
    scores = q @ k.transpose(1, 2) * scale
    return (torch.softmax(scores, dim=-1) @ v).transpose(0, 1)


def embed(
    word: torch.Tensor,
    position: torch.Tensor,
    type_table: torch.Tensor,
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    type_ids: torch.Tensor,
) -> torch.Tensor:
    """(word[ids] + type[type_ids]) + position[position_ids] in fp32: tables [*, C], ids [T] -> [T, C]."""
    return word.float()[ids.long()] + type_table.float()[type_ids.long()] + position.float()[position_ids.long()]


@dataclass(frozen=True)
class Unpadded:
    """Packed tokens: every array is [T] int64, except ``cu_seqlens`` [B + 1]."""

    ids: torch.Tensor | None
    position_ids: torch.Tensor
    type_ids: torch.Tensor
    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    first_masked: int


def position_rule(shape: tuple[int, int], ids: torch.Tensor | None, pad_token_id: int | None) -> torch.Tensor:
    """Positions [B, L] as transformers numbers them.

    ``pad_token_id`` None: columns 0, 1, ... (BERT). Otherwise ids other than it count from ``pad_token_id + 1`` and
    padding ids keep ``pad_token_id`` (RoBERTa); without ids every column counts.
    """
    batch, length = shape
    columns = torch.arange(length).expand(batch, length)
    if pad_token_id is None:
        return columns
    if ids is None:
        return columns + pad_token_id + 1
    real = (ids != pad_token_id).long()
    return torch.cumsum(real, dim=1) * real + pad_token_id


def unpad(
    shape: tuple[int, int],
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    pad_token_id: int | None,
) -> Unpadded:
    """Drops the tokens whose mask is 0. All given tensors are [B, L] (ids also [1, L] or, for positions, [L])."""
    batch, length = shape
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    positions = position_rule(shape, ids, pad_token_id) if position_ids is None else position_ids.expand(shape)
    types = torch.zeros(shape, dtype=torch.int64) if type_ids is None else type_ids.expand(shape)
    lengths = keep.sum(dim=1)
    return Unpadded(
        ids=None if ids is None else ids.long()[keep],
        position_ids=positions.long()[keep],
        type_ids=types.long()[keep],
        indices=torch.arange(batch * length).view(shape)[keep],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, dim=0)]),
        max_seqlen=int(lengths.max()) if batch else 0,
        first_masked=int((~keep[:, 0]).sum()) if length else 0,
    )


def pad(shape: tuple[int, int], indices: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """packed [T, C] -> [B, L, C], zeros where no index points."""
    out = packed.new_zeros(shape[0] * shape[1], packed.shape[1])
    out[indices.long()] = packed
    return out.view(*shape, packed.shape[1])


def max_error(got: Any, truth: torch.Tensor) -> float:
    """Largest |got - truth| in fp64; infinite when ``got`` is not finite."""
    difference = torch.as_tensor(got).double() - truth.double()
    if difference.numel() == 0:
        return 0.0
    return float(difference.abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


def assert_within(
    kernel: Any,
    truth_fp64: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    factor: float = 2.0,
    floor: float = 2.0**-21,
    absolute_floor: float = 0.0,
    what: str = "",
) -> None:
    """error(kernel) <= factor * error(PyTorch in the same dtype) + a tiny floor, errors against the fp64 truth.

    ``floor`` is relative to the largest truth value: a few fp32 roundings, for cases in which PyTorch happens to be
    exact. ``absolute_floor`` is for results so small that one step of the number format is larger than that.
    """
    assert tuple(np.shape(kernel)) == tuple(truth_fp64.shape), f"{what}: {np.shape(kernel)} is not {truth_fp64.shape}"
    kernel_error, torch_error = max_error(kernel, truth_fp64), max_error(torch_same_dtype, truth_fp64)
    size = float(truth_fp64.abs().max()) if truth_fp64.numel() else 0.0
    limit = factor * torch_error + floor * size + absolute_floor
    assert kernel_error <= limit, (
        f"{what}: error of the kernel {kernel_error:.3e} > {limit:.3e} = {factor} x error of PyTorch {torch_error:.3e} "
        f"+ {floor:.1e} x largest value {size:.3e} + {absolute_floor:.1e}"
    )


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Same shape, dtype and bytes; names the first difference."""
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.dtype} {got.shape}, not {want.dtype} {want.shape}"
    )
    raw = np.uint8 if got.dtype.itemsize == 1 else np.dtype(f"u{got.dtype.itemsize}")
    different = np.argwhere(np.ascontiguousarray(got).view(raw) != np.ascontiguousarray(want).view(raw))
    if len(different):
        at = tuple(int(i) for i in different[0])
        raise AssertionError(
            f"{what}: {len(different)} of {got.size} differ, first at {at}: {got[at]!r} != {want[at]!r}"
        )


def bf16_bits(x: torch.Tensor) -> np.ndarray:
    """A bf16 tensor as the uint16 array in which its bits cross to C++."""
    return x.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
