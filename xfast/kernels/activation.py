"""Bias and exact GELU, x * Phi(x) with erf (not the tanh form), and its e4m3 form for the next product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xfast.kernels.launch import cast, check_device, next_power_of_2
from xfast.kernels.quantize import fp8_rows, to_fp8
from xfast.kernels.tiles import row_warps

_INV_SQRT2 = tl.constexpr(0.7071067811865476)


@triton.jit
def gelu(x):
    """Exact GELU in fp32."""
    return 0.5 * x * (1.0 + tl.erf(x * _INV_SQRT2))


@triton.jit
def gelu_kernel(
    x, bias, out, q, scale, columns, stride, BIAS: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns ``program_id(1) * BLOCK ...`` of one row; with QUANTIZE the block is the whole row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        values += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    y = gelu(values)
    if QUANTIZE:
        y8, s = to_fp8(y)
        tl.store(q + row * columns + column, y8, mask=inside)
        tl.store(scale + row, s)
    else:
        tl.store(out + row * columns + column, cast(y, out.dtype.element_ty), mask=inside)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """GELU(x + bias): [rows, columns] in x's dtype, written over x, which must be contiguous."""
    check_device("x", x)
    if x.numel():
        block = min(next_power_of_2(x.shape[1]), 2048)
        gelu_kernel[(x.shape[0], triton.cdiv(x.shape[1], block))](
            x, x if bias is None else bias, x, x, x, x.shape[1], x.stride(0), BIAS=bias is not None, QUANTIZE=False,
            BLOCK=block, num_warps=row_warps(block, x.element_size()),
        )  # fmt: skip
    return x


def bias_gelu_quantize(x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU(x + bias) as e4m3 [rows, columns] and scales fp32 [rows, 1]; one rounding, from fp32 to e4m3."""
    check_device("x", x)
    out, scale = fp8_rows(x.shape[0], x.shape[1], x.device)
    if x.numel():
        block = next_power_of_2(x.shape[1])
        gelu_kernel[(x.shape[0], 1)](
            x, x if bias is None else bias, out, out, scale, x.shape[1], x.stride(0), BIAS=bias is not None,
            QUANTIZE=True, BLOCK=block, num_warps=row_warps(block, x.element_size()),
        )  # fmt: skip
    return out, scale
