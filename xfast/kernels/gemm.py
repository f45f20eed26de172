"""Matrix products: cuBLASLt through torch, or a Triton kernel with bias, exact GELU and residual in its epilogue.

y = epilogue(x W^T): x [rows, in], W [out, in]. Which one runs is a table of measurements (:data:`PINNED`), not a guess
at run time. cuBLASLt's own GELU epilogue is the tanh form, so it cannot be used; its beta = 1 (adding the product to
the residual in fp32 before the only rounding) can, and is.

The Triton kernel is the classic tiled product with programs grouped along the rows for reuse in L2 (Tillet et al.,
2019). e4m3 operands take one scale a row of x and one a row of W, applied to the fp32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xfast.kernels.activation import gelu
from xfast.kernels.launch import FP8, INTERPRETED, capability_of, cast, check_device, dot
from xfast.kernels.tiles import gemm_tile

_GROUP = 8  # row blocks that share the columns of W in L2

PINNED: dict[tuple[str, int, int, int], str] = {}
"""(kind, in, out, rows up to a power of two) -> "cublas" or "triton", from ``benchmarks/gpu_battery.py``.

Empty: nothing has been measured on a GPU yet, and cuBLASLt is the safe choice for what is not listed.
"""


@triton.jit
def finish(acc, bias, residual, at, column, valid, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr):
    """The epilogue on fp32 sums; ``column`` has their shape or broadcasts to it, ``at`` is the residual's place."""
    if BIAS:
        acc += tl.load(bias + column).to(tl.float32)
    if GELU:
        acc = gelu(acc)
    if RESIDUAL:
        acc += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["rows"])
def gemm_kernel(
    x, w, bias, residual, out, scale_x, scale_w,
    rows, columns, depth, stride_x, stride_w, stride_residual, stride_out,
    BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    group, inside = program // (GROUP * blocks_n), program % (GROUP * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    row = (group * GROUP + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Wrapped instead of masked: surplus rows repeat others and are not stored, and loads stay unconditional.
    x_tile = x + (row % rows)[:, None].to(tl.int64) * stride_x + k[None, :]
    w_tile = w + (column % columns)[None, :].to(tl.int64) * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        a = tl.load(x_tile, mask=k[None, :] < left, other=0.0)
        b = tl.load(w_tile, mask=k[:, None] < left, other=0.0)
        acc = dot(a, b, acc)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    if SCALED:
        acc = acc * tl.load(scale_x + row % rows)[:, None] * tl.load(scale_w + column % columns)[None, :]
    place = row[:, None].to(tl.int64)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    at = place * stride_residual + column[None, :]
    acc = finish(acc, bias, residual, at, (column % columns)[None, :], valid, BIAS, GELU, RESIDUAL)
    tl.store(out + place * stride_out + column[None, :], cast(acc, out.dtype.element_ty), mask=valid)


Scaled = tuple[torch.Tensor, torch.Tensor]
"""e4m3 values and their fp32 scales: [rows, 1] for activations, [1, out] for weights."""


def gemm(
    x: torch.Tensor | Scaled,
    w: torch.Tensor | Scaled,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The Triton kernel: activation(x W^T + bias) + residual, [rows, out].

    Args:
        x, w: [rows, in] and [out, in], columns contiguous, of one dtype; or both e4m3 with scales.
        bias: [out]. residual: [rows, out].
        activation: "gelu" (exact) or None.
        dtype: of the result; default x's. Needed for e4m3.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    scaled = isinstance(x, tuple)
    a, scale_a = x if isinstance(x, tuple) else (x, x)
    b, scale_b = w if isinstance(w, tuple) else (w, w)
    check_device("x", a)
    if a.shape[1] != b.shape[1] or a.dtype != b.dtype or (scaled and (a.dtype != FP8 or dtype is None)):
        raise ValueError(f"x, w: {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype} do not multiply")
    rows, columns = a.shape[0], b.shape[0]
    out = torch.empty(rows, columns, dtype=dtype or a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    tile = gemm_tile(rows, a.element_size(), capability_of(a.device))
    grid = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    gemm_kernel[(grid,)](
        a, b, a if bias is None else bias, a if residual is None else residual, out, scale_a, scale_b,
        rows, columns, a.shape[1], a.stride(0), b.stride(0), 0 if residual is None else residual.stride(0),
        out.stride(0), BIAS=bias is not None, GELU=activation == "gelu", RESIDUAL=residual is not None, SCALED=scaled,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=_GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def choose(kind: str, depth: int, columns: int, rows: int) -> str:
    """Which of the two multiplies, by :data:`PINNED`; ``kind`` is the operands' bits and the epilogue ("16-gelu")."""
    return PINNED.get((kind, depth, columns, bucket(rows)), "cublas")


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


_REFUSED: set[tuple[int, int, int]] = set()
"""Scaled products (bucket of rows, out, in) that cuBLASLt does not compute on this device."""


def refused_scaled() -> list[str]:
    """A line for ``explain`` where cuBLASLt did not compute scaled products and :func:`gemm` does."""
    shapes = ", ".join(f"{rows} x {inner} x {out}" for rows, out, inner in sorted(_REFUSED))
    return [f"fp8 products that cuBLASLt refused and Triton computes (rows x in x out): {shapes}"] if shapes else []


def cublas_scaled_gemm(
    x: Scaled, w: Scaled, dtype: torch.dtype, bias: torch.Tensor | None = None, fast: bool = True
) -> torch.Tensor:
    """As :func:`scaled_gemm`, by cuBLASLt or not at all.

    ``fast``: Hopper's tensor cores keep about 14 bits of an e4m3 sum; not promoting it to fp32 in between is what
    inference libraries do, and what :func:`gemm` does: 2^-13 is far below e4m3's own 2^-4.
    """
    return torch._scaled_mm(
        x[0], w[0].T, scale_a=x[1], scale_b=w[1].contiguous(), bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def scaled_gemm(x: Scaled, w: Scaled, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    """e4m3 product through ``torch._scaled_mm`` with one scale a row on both sides: [rows, out] in ``dtype`` (bf16)."""
    shape = (bucket(x[0].shape[0]), *w[0].shape)
    if not INTERPRETED and shape not in _REFUSED:  # torch has no such product on the CPU
        try:
            return cublas_scaled_gemm(x, w, dtype, bias)
        except RuntimeError as error:
            # pytorch/ao#4582: cuBLASLt has no such kernel for few rows of deep products; ao#3788: no such scales
            if not any(status in str(error) for status in ("NOT_SUPPORTED", "INVALID_VALUE")):
                raise
            _REFUSED.add(shape)
    return gemm(x, w, dtype=dtype, bias=bias)
