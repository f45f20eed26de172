"""Per-token e4m3: value = q * scale with scale = absmax / 448 of the row (Micikevicius et al., 2022).

The conversion itself lives in :func:`to_fp8` so that kernels which have the row in registers (norm, activation) use the
same arithmetic as the stand-alone kernel, which the attention output needs: its heads come from different programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xfast.kernels.launch import _INTERPRETED, FP8, FP8_MAX, check_device, next_power_of_2
from xfast.kernels.tiles import row_warps

_MAX = tl.constexpr(FP8_MAX)
# Below this a row counts as zero: 448 / absmax would overflow fp32.
_TINY = tl.constexpr(1e-30)


@triton.jit
def _nearest_e4m3(values):
    """The e4m3 value nearest to each fp32 value, ties to even. GPUs convert so; Triton's interpreter cuts bits off."""
    exponent = ((values.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    step = tl.exp2((tl.maximum(exponent, -6) - 3).to(tl.float32))
    shift = 12582912.0  # 1.5 * 2^23: adding it leaves an integer in the mantissa
    return ((values / step + shift) - shift) * step


@triton.jit
def to_fp8(values):
    """fp32 [columns] -> (e4m3 [columns], fp32 scale). Clamped: 448 * (1 + rounding) would be NaN in e4m3.

    A GPU's maximum and minimum pass NaN by, so one NaN in a row makes the scale NaN: the row stays what it was.
    """
    broken = tl.max((values != values).to(tl.int32), 0) > 0
    absmax = tl.max(tl.abs(values), 0)
    inverse = tl.where(absmax > _TINY, _MAX / tl.maximum(absmax, _TINY), 0.0)
    scaled = tl.minimum(tl.maximum(values * inverse, -_MAX), _MAX)
    if _INTERPRETED:
        scaled = _nearest_e4m3(scaled)
    return scaled.to(tl.float8e4nv), tl.where(broken, float("nan"), absmax / _MAX)


@triton.jit
def quantize_kernel(x, out, scale, columns, stride, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    q, s = to_fp8(tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + row * columns + column, q, mask=inside)
    tl.store(scale + row, s)


def fp8_rows(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for quantised rows: e4m3 [rows, columns] and fp32 [rows, 1]."""
    return (
        torch.empty(rows, columns, dtype=FP8, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> e4m3 [rows, columns] and the rows' scales, fp32 [rows, 1]."""
    check_device("x", x)
    out, scale = fp8_rows(x.shape[0], x.shape[1], x.device)
    if x.numel():
        block = next_power_of_2(x.shape[1])
        quantize_kernel[(x.shape[0],)](
            x, out, scale, x.shape[1], x.stride(0), BLOCK=block, num_warps=row_warps(block, x.element_size())
        )
    return out, scale


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [out, in] -> e4m3 [out, in] and fp32 [1, out], one scale for each output. Runs once, in torch."""
    values = weight.detach().float()
    absmax = values.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(absmax > 1e-30, FP8_MAX / absmax.clamp_min(1e-30), 0.0)
    quantised = (values * inverse).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantised, (absmax / FP8_MAX).reshape(1, -1)
