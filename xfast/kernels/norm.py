"""LayerNorm of (x + bias + residual), that sum, and the e4m3 form for the next product, in one pass over the row.

Statistics in fp32 from the row in registers (two passes over registers, none over memory): mean first, then the sum of
squared differences, which does not cancel. One rounding, at the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xfast.kernels.launch import cast, check_device, next_power_of_2
from xfast.kernels.quantize import fp8_rows, to_fp8
from xfast.kernels.tiles import row_warps


@triton.jit
def normalize(values, gamma, beta, inside, columns, eps):
    """LayerNorm of one row in fp32; columns that are not ``inside`` hold zeros and come out as zeros."""
    mean = tl.sum(values, 0) / columns
    centred = tl.where(inside, values - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / columns
    return centred / tl.sqrt(variance + eps) * gamma + beta


@triton.jit
def store_normalized(
    values, gamma, beta, out, total, q, scale, row, columns, eps,
    TOTAL: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes LayerNorm of one row [BLOCK] and its e4m3 form; with TOTAL the row too, and only one form of LayerNorm."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    if TOTAL:
        tl.store(total + row * columns + column, cast(values, total.dtype.element_ty), mask=inside)
    g = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(beta + column, mask=inside, other=0.0).to(tl.float32)
    y = cast(normalize(values, g, b, inside, columns, eps), out.dtype.element_ty)
    if not (TOTAL and QUANTIZE):
        tl.store(out + row * columns + column, y, mask=inside)
    if QUANTIZE:
        # From the rounded value, which is what an unfused pass would read.
        y8, s = to_fp8(y.to(tl.float32))
        tl.store(q + row * columns + column, y8, mask=inside)
        tl.store(scale + row, s)


@triton.jit
def norm_kernel(
    x, bias, residual, gamma, beta,  # x, residual [rows, columns]; bias, gamma, beta [columns]
    out, total, q, scale,  # out, total, q [rows, columns]; scale [rows]; total may be x or residual
    columns, stride, residual_stride, eps,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        values += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        values += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    store_normalized(values, gamma, beta, out, total, q, scale, row, columns, eps, TOTAL, QUANTIZE, BLOCK)


def add_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    quantize: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """LayerNorm(x + bias + residual): [rows, columns] in x's dtype, and with ``quantize`` its e4m3 rows and scales.

    ``total``, contiguous [rows, columns] and possibly x or residual, receives x + bias + residual. With ``quantize``
    the first result is then not written: its memory holds whatever it did.
    """
    check_device("x", x)
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    quantised = fp8_rows(rows, columns, x.device) if quantize else None
    if rows:
        block = next_power_of_2(columns)
        norm_kernel[(rows,)](
            x, x if bias is None else bias, x if residual is None else residual, gamma, beta, out,
            out if total is None else total, *(quantised or (out, out)), columns, x.stride(0),
            x.stride(0) if residual is None else residual.stride(0), eps, BIAS=bias is not None,
            RESIDUAL=residual is not None, TOTAL=total is not None, QUANTIZE=quantize, BLOCK=block,
            num_warps=row_warps(block, x.element_size()),
        )  # fmt: skip
    return out, quantised
