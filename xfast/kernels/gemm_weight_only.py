"""Products with int8 or int4 weights, which become floats on their way to the tensor cores; activations stay floats.

y = epilogue(x W^T): x [rows, in], W [out, in] in int8 with one scale an output, or int4 with one for each group of
inputs. A half or a quarter of bf16's bytes: for memory, and for few tokens, whose time goes into reading weights.

* Integers are multiplied as integers (exact in bf16 and fp16) and fp32 sums are scaled: int4's after every group, where
  scaling 16-bit weights would round each of them once more.
* The product is computed transposed, W x^T: Hopper's wgmma takes its left operand from registers, where the weights are
  once they are expanded, and its right one may be narrow. Up to 16 rows fit the older mma, which needs fewer
  instructions around it; only there rows are on the left.
* A byte of int4 holds one value of the first half of a block of inputs and its counterpart of the second, so that a
  tile of bytes is two tiles of weights and no lane has to move.
* Few tokens and outputs do not fill the machine: the inputs are divided among programs, whose fp32 sums a second kernel
  adds in their order. Same bits every time.
* Many tokens are bound by arithmetic: the weights are expanded once, for cuBLASLt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xfast.kernels.gemm import finish
from xfast.kernels.integer_weights import IntegerWeights
from xfast.kernels.launch import _INTERPRETED, INTERPRETED, capability_of, cast, check_device, dot, multiprocessors_of
from xfast.kernels.tiles import WEIGHT_ONLY_EXPAND_ROWS, weight_only_half, weight_only_splits, weight_only_tile

_BLOCK = 1024


# Integers become floats by their bits: put into the mantissa of a power of two, which is then subtracted, both exact.
# Four bytes a register in, two 16-bit floats a register out; Triton's own conversions take two to three times as many
# instructions, more than there is time for while the weights come from memory. tests/test_gemm_weight_only_triton.py
# executes these texts.
INT8_TO_BF16 = tl.constexpr("""{
    .reg .b32 u, a, b, c, d;
    .reg .f32 fa, fb, fc, fd;
    xor.b32 u, $2, 0x80808080;
    prmt.b32 a, u, 0x4B000000, 0x7440;
    prmt.b32 b, u, 0x4B000000, 0x7441;
    prmt.b32 c, u, 0x4B000000, 0x7442;
    prmt.b32 d, u, 0x4B000000, 0x7443;
    mov.b32 fa, a;
    mov.b32 fb, b;
    mov.b32 fc, c;
    mov.b32 fd, d;
    sub.rn.f32 fa, fa, 0f4B000080;
    sub.rn.f32 fb, fb, 0f4B000080;
    sub.rn.f32 fc, fc, 0f4B000080;
    sub.rn.f32 fd, fd, 0f4B000080;
    cvt.rn.bf16x2.f32 $0, fb, fa;
    cvt.rn.bf16x2.f32 $1, fd, fc;
}""")
INT8_TO_FP16 = tl.constexpr("""{
    .reg .b32 u, a, b, m;
    mov.b32 m, 0x64806480;
    xor.b32 u, $2, 0x80808080;
    prmt.b32 a, u, 0x64646464, 0x4140;
    prmt.b32 b, u, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, a, m;
    sub.rn.f16x2 $1, b, m;
}""")
_INT4 = """{
    .reg .b32 a, b, c, d, one, m;
    mov.b32 one, %(one)s;
    mov.b32 m, %(minus)s;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shr.u32 c, a, 4;
    shr.u32 d, b, 4;
    lop3.b32 a, a, 0x000F000F, %(power)s, 0xEA;
    lop3.b32 b, b, 0x000F000F, %(power)s, 0xEA;
    lop3.b32 c, c, 0x000F000F, %(power)s, 0xEA;
    lop3.b32 d, d, 0x000F000F, %(power)s, 0xEA;
    fma.rn.%(type)s $0, a, one, m;
    fma.rn.%(type)s $1, b, one, m;
    fma.rn.%(type)s $2, c, one, m;
    fma.rn.%(type)s $3, d, one, m;
}"""
INT4_TO_BF16 = tl.constexpr(  # 128 + q + 8, then - 136; bf16 has no subtraction before 9.0
    _INT4 % {"type": "bf16x2", "power": "0x43004300", "one": "0x3F803F80", "minus": "0xC308C308"}
)
INT4_TO_FP16 = tl.constexpr(  # 1024 + q + 8, then - 1032
    _INT4 % {"type": "f16x2", "power": "0x64006400", "one": "0x3C003C00", "minus": "0xE408E408"}
)


@triton.jit
def from_int8(q, dtype: tl.constexpr):
    """int8 as floats of a dtype, exact."""
    if _INTERPRETED or dtype == tl.float32:
        out = cast(q.to(tl.float32), dtype)
    elif dtype == tl.bfloat16:
        out = tl.inline_asm_elementwise(INT8_TO_BF16, "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        out = tl.inline_asm_elementwise(INT8_TO_FP16, "=r,=r,r", [q], dtype=tl.float16, is_pure=True, pack=4)
    return out


@triton.jit
def from_int4(pairs, dtype: tl.constexpr):
    """Bytes of two int4 values plus 8: the low and the high values as floats of a dtype, exact."""
    if _INTERPRETED or dtype == tl.float32:
        wide = pairs.to(tl.int32)
        low = cast(((wide & 15) - 8).to(tl.float32), dtype)
        high = cast((((wide >> 4) & 15) - 8).to(tl.float32), dtype)
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            INT4_TO_BF16, "=r,=r,=r,=r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            INT4_TO_FP16, "=r,=r,=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _multiply(weights, x, acc):
    """acc + weights x: [outputs, inputs], [inputs, rows], [outputs, rows]. wgmma's left side is 64 or more."""
    return dot(weights, x, acc) if x.shape[1] >= 32 else tl.trans(dot(tl.trans(x), tl.trans(weights), tl.trans(acc)))


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """Zero where the mask is not set; EVEN: it is everywhere."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0)


@triton.jit
def _group_scale(scale, column, stride, first, GROUP: tl.constexpr):
    """The scales of the group that the input ``first`` lies in, [outputs, 1]."""
    return tl.load(scale + column * stride + first // GROUP).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "steps"])
def weight_only_kernel(
    x, w, scale, bias, residual, out,
    rows, columns, depth, steps, stride_x, stride_w, stride_scale, stride_residual, stride_out,
    GROUP: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the result, BLOCK_M rows of x by BLOCK_N outputs, or (SPLIT) its sum over ``steps`` steps.

    A step is BLOCK_K bytes of each output's weights: as many inputs of int8 (GROUP 0), twice as many of int4. EVEN:
    ``depth`` is a whole number of steps.
    """
    blocks_n = tl.cdiv(columns, BLOCK_N)
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * steps * BLOCK_K  # byte
    # Wrapped instead of masked, as in gemm_kernel.
    safe = (column % columns).to(tl.int64)
    x_row = x + (row % rows)[None, :].to(tl.int64) * stride_x
    w_tile = w + safe[:, None] * stride_w + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GROUP == 0:
        for start in range(first, tl.minimum(first + steps * BLOCK_K, depth), BLOCK_K):
            b = _load(x_row + (start + k)[:, None], (start + k < depth)[:, None], EVEN)
            q = _load(w_tile + start, (start + k < depth)[None, :], EVEN)
            acc = _multiply(from_int8(q, x.dtype.element_ty), b, acc)
        acc = acc * tl.load(scale + safe)[:, None]
    else:
        for start in range(first, tl.minimum(first + steps * BLOCK_K, tl.cdiv(depth, 2 * BLOCK_K) * BLOCK_K), BLOCK_K):
            inputs = 2 * start + k
            b0 = _load(x_row + inputs[:, None], (inputs < depth)[:, None], EVEN)
            b1 = _load(x_row + (inputs + BLOCK_K)[:, None], (inputs + BLOCK_K < depth)[:, None], EVEN)
            pairs = tl.load(w_tile + start)
            zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            s0 = _group_scale(scale, safe, stride_scale, 2 * start, GROUP)
            s1 = _group_scale(scale, safe, stride_scale, 2 * start + BLOCK_K, GROUP)
            low, high = from_int4(pairs, x.dtype.element_ty)
            acc += _multiply(low, b0, zero) * s0
            acc += _multiply(high, b1, zero) * s1
    place = row[None, :].to(tl.int64)
    valid = (row < rows)[None, :] & (column < columns)[:, None]
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * rows * columns
    else:
        at = place * stride_residual + column[:, None]
        acc = finish(acc, bias, residual, at, safe[:, None], valid, BIAS, GELU, RESIDUAL)
    tl.store(out + place * stride_out + column[:, None], cast(acc, out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    sums, bias, residual, out, rows, columns, splits, stride_residual, stride_out,
    BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up fp32 [splits, rows, columns] in order, and the epilogue: BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < columns
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(sums + (split * rows + row).to(tl.int64) * columns + column, mask=valid, other=0.0)
    acc = finish(acc, bias, residual, row * stride_residual + column, column % columns, valid, BIAS, GELU, RESIDUAL)
    tl.store(out + row * stride_out + column, cast(acc, out.dtype.element_ty), mask=valid)


@triton.jit
def expand_kernel(
    w, scale, out, depth, size, stride_w, stride_scale, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK of the ``size`` bytes of one output's weights as floats [out, in]."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < size
    if GROUP == 0:
        values = tl.load(w + row * stride_w + byte, mask=inside, other=0).to(tl.float32) * tl.load(scale + row)
        tl.store(out + row * depth + byte, cast(values, out.dtype.element_ty), mask=inside)
    else:
        first = byte // HALF * 2 * HALF + byte % HALF
        low, high = from_int4(tl.load(w + row * stride_w + byte, mask=inside, other=0), tl.float32)
        scales = scale + row * stride_scale
        low *= tl.load(scales + first // GROUP, mask=inside, other=0.0).to(tl.float32)
        high *= tl.load(scales + (first + HALF) // GROUP, mask=inside, other=0.0).to(tl.float32)
        at = out + row * depth + first
        tl.store(at, cast(low, out.dtype.element_ty), mask=inside & (first < depth))
        tl.store(at + HALF, cast(high, out.dtype.element_ty), mask=inside & (first + HALF < depth))


def expand(w: IntegerWeights, dtype: torch.dtype) -> torch.Tensor:
    """The weights as floats, [out, in]."""
    check_device("w", w.values)
    out = torch.empty(w.shape, dtype=dtype, device=w.values.device)
    size = w.values.shape[1]
    if out.numel():
        expand_kernel[(w.shape[0], triton.cdiv(size, _BLOCK))](
            w.values, w.scale, out, w.depth, size, w.values.stride(0), w.scale.stride(0), GROUP=w.group_size,
            HALF=weight_only_half(w.group_size or 64), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def weight_only_gemm(
    x: torch.Tensor,
    w: IntegerWeights,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x W^T + bias) + residual, [rows, out] in x's dtype.

    Args:
        x: [rows, in], columns contiguous.
        w: of as many inputs.
        bias: [out]. residual: [rows, out].
        activation: "gelu" (exact) or None.
        out: where the result goes; may be ``residual``.

    Raises:
        ValueError: shapes that do not go together.
    """
    check_device("x", x)
    if x.shape[1] != w.depth or x.stride(1) != 1:
        raise ValueError(f"x, w: {tuple(x.shape)}, strides {x.stride()}, and {w.shape} do not multiply")
    rows, columns = x.shape[0], w.shape[0]
    if out is None:
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    stride = 0 if residual is None else residual.stride(0)
    tile = weight_only_tile(rows, x.element_size(), capability_of(x.device), w.group_size)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    step = tile.block_k * (2 if w.group_size else 1)
    steps = triton.cdiv(w.depth, step)
    splits = weight_only_splits(tiles, steps, multiprocessors_of(x.device))
    each = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, each)
    flags = {"GROUP": w.group_size, "EVEN": w.depth % step == 0}
    epilogue = {"BIAS": bias is not None, "GELU": activation == "gelu", "RESIDUAL": residual is not None}
    target = out if splits == 1 else torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    addends = x if bias is None else bias, x if residual is None else residual
    weight_only_kernel[(tiles, splits)](
        x, w.values, w.scale, *addends, target, rows, columns, w.depth, each, x.stride(0), w.values.stride(0),
        w.scale.stride(0), stride, target.stride(-2), **flags, **epilogue, SPLIT=splits > 1,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            target, *addends, out, rows, columns, splits, stride, out.stride(0), **epilogue, BLOCK=_BLOCK, num_warps=4
        )
    return out


def expands(rows: int) -> bool:
    """Whether a product of so many rows expands the weights first. Never in the interpreter, but for tests of it."""
    return not INTERPRETED and rows >= WEIGHT_ONLY_EXPAND_ROWS
