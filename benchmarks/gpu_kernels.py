"""The kernel part of the GPU battery: attention by length, products on the real shapes, row kernels, ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from xfast.benchmarks.gpu_time import Clock, measured
from xfast.kernels import activation, attention, gemm, norm, quantize
from xfast.kernels.gemm_weight_only import expand, weight_only_gemm
from xfast.kernels.integer_weights import IntegerWeights, to_int4, to_int8
from xfast.kernels.launch import capability_of
from xfast.kernels.packing import attention_tiles
from xfast.kernels.tiles import Tile, attention_tile

Row = dict[str, Any]
SHAPES = {"base": (768, 3072), "large": (1024, 4096), "xl": (2560, 10240)}
LARGER_SHAPES = {"xxl": (4096, 16384)}
HEADS, HEAD_DIM = 16, 64
ATTENTION_TOKENS, ATTENTION_LENGTHS = 32768, (11, 32, 64, 128, 177, 256, 384, 512)
GEMM_ROWS, WEIGHT_ONLY_ROWS, NORM_ROWS = (32, 512, 4096, 32768), (1, 16, 32, 64, 256, 1024, 4096), 32768
CEILING_SIDE, CEILING_BYTES = 8192, 2**31


def mixed_lengths(count: int, mean: float, longest: int) -> list[int]:
    """Lengths from a gamma distribution of shape 2.5, as question-answering contexts have: 3 .. ``longest``."""
    generator = torch.distributions.Gamma(2.5, 2.5 / mean)
    torch.manual_seed(0)
    return [int(x) for x in generator.sample((count,)).round().clamp(3, longest)]


def ceilings() -> Row:
    """What the device does at best: copies, and a large bf16 and e4m3 product on random data."""
    side = CEILING_SIDE
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(CEILING_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    run: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "bf16": lambda: a @ b}
    if capability_of(a.device) >= 89:
        a8, b8 = quantize.quantize(a), quantize.quantize_weight(b)
        run["fp8"] = lambda: gemm.cublas_scaled_gemm(a8, b8, torch.bfloat16)
    times, failed = measured(run)
    copied = {"copy_tb_s": 2 * source.numel() / times.pop("copy") / 1e9} if "copy" in times else {}
    return {**copied, **{f"{name}_tflop_s": 2 * side**3 / ms / 1e9 for name, ms in times.items()}, **failed}


def attention_rows(clock: Clock) -> Iterator[Row]:
    """TFLOP/s of useful scores: 4 L^2 d a head; bf16, 16 heads x 64, about 32k tokens in every batch."""
    for length in ATTENTION_LENGTHS:
        count = ATTENTION_TOKENS // length
        for kind in ("uniform", "mixed"):
            lengths = [length] * count if kind == "uniform" else mixed_lengths(count, length, min(512, 3 * length))
            if clock.left > 0:
                yield {"length": length, "kind": kind, **_attention(lengths)}


def _attention(lengths: list[int]) -> Row:
    tokens, longest = sum(lengths), max(lengths)
    counts = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    cu = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    q, k, v = torch.randn(tokens, 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).unbind(1)
    keys = torch.stack([cu[:-1].repeat_interleave(counts), cu[1:].repeat_interleave(counts)])
    chosen = attention_tile(HEAD_DIM, 2, capability_of(q.device), longest)
    tiles = {
        "chosen": (chosen, False),
        "128x64x8": (Tile(128, 64, HEAD_DIM, 8, 3), False),
        "128x128x8": (Tile(128, 128, HEAD_DIM, 8, 2), False),
        "64x64x4": (Tile(64, 64, HEAD_DIM, 4, 3), False),
    }
    if longest <= 96:
        tiles |= {
            "shared 64x64": (Tile(64, 64, HEAD_DIM, 4, 3), True),
            "shared 128x64": (Tile(128, 64, HEAD_DIM, 4, 3), True),
        }
    run: dict[str, Callable[[], object]] = {}
    out = torch.empty(tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    for name, (tile, shared) in tiles.items():
        work = attention_tiles(cu, cu, tokens, tile, row_keys=keys if shared else None)
        run[name] = lambda work=work: attention.attention(q, k, v, work, out=out)
    work = attention_tiles(cu, cu, tokens, chosen)
    persistent = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    run["chosen, persistent"] = lambda: attention.attention(q, k, v, work, out=out, programs=persistent)
    if len(set(lengths)) == 1:
        padded = [t.contiguous().view(len(lengths), longest, HEADS, HEAD_DIM).transpose(1, 2) for t in (q, k, v)]
        run["torch sdpa"] = lambda: F.scaled_dot_product_attention(*padded)
    try:
        from torch.nn.attention.varlen import varlen_attn

        dense = [t.contiguous() for t in (q, k, v)]
        run["torch varlen"] = lambda: varlen_attn(*dense, cu, cu, longest, longest)
        run["torch varlen"]()
    except Exception as error:  # absent or not for these shapes: a peer less
        run.pop("torch varlen", None)
        print(f"torch varlen: {error}", flush=True)
    operations = 4 * HEADS * HEAD_DIM * sum(n * n for n in lengths)
    times, failed = measured(run)
    return {
        "tflop_s": {name: operations / ms / 1e9 for name, ms in times.items()},
        "us": {n: 1e3 * t for n, t in times.items()},
        **failed,
    }


def gemm_rows(clock: Clock) -> Iterator[Row]:
    """TFLOP/s of each product of base and large: cuBLASLt and the Triton kernel, alone and with what follows it."""
    for name, (hidden, inner) in SHAPES.items():
        roles = {
            "qkv": (hidden, 3 * hidden),
            "out": (hidden, hidden),
            "ffn_in": (hidden, inner),
            "ffn_out": (inner, hidden),
        }
        for role, (depth, columns) in roles.items():
            for rows in GEMM_ROWS:
                if clock.left > 0:
                    yield {"model": name, "role": role, "rows": rows, **_gemm(role, depth, columns, rows)}


def _gemm(role: str, depth: int, columns: int, rows: int) -> Row:
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5
    bias = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    run: dict[str, Callable[[], object]] = {
        "cublas": lambda: torch.addmm(bias, x, w.t()),
        "triton": lambda: gemm.gemm(x, w, bias=bias),
    }
    if role == "ffn_in":
        run["cublas + gelu"] = lambda: activation.bias_gelu(torch.mm(x, w.t()), bias)
        run["triton gelu"] = lambda: gemm.gemm(x, w, bias=bias, activation="gelu")
    if role in ("out", "ffn_out"):
        run["cublas + residual"] = lambda: residual.addmm_(x, w.t())  # in place, as the forward does it
    if capability_of(x.device) >= 89:
        x8, w8 = quantize.quantize(x), quantize.quantize_weight(w)
        run["fp8 cublas"] = lambda: gemm.cublas_scaled_gemm(x8, w8, torch.bfloat16)
        run["fp8 cublas, fp32 sums"] = lambda: gemm.cublas_scaled_gemm(x8, w8, torch.bfloat16, fast=False)
        if role == "qkv":  # with what the forward passes it
            run["fp8 cublas + bias"] = lambda: gemm.cublas_scaled_gemm(x8, w8, torch.bfloat16, bias)
        run["fp8 triton"] = lambda: gemm.gemm(x8, w8, dtype=torch.bfloat16)
    times, failed = measured(run, rounds=9, cold=True)
    return {"tflop_s": {name: 2 * rows * depth * columns / ms / 1e9 for name, ms in times.items()}, **failed}


def weight_only_rows(clock: Clock) -> Iterator[Row]:
    """Products with integer weights beside bf16: TB/s of weights (few rows), TFLOP/s, and expanding them first."""
    shapes = {**SHAPES, **LARGER_SHAPES}
    for name in sorted(shapes, key=lambda one: one not in ("large", "xxl")):  # most telling first: time may run out
        hidden, inner = shapes[name]
        for depth, columns in ((hidden, inner), (inner, hidden)):
            if clock.left <= 0:
                return
            w = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5
            integers = {"int8": to_int8(w), "int4": to_int4(w), "int4 g128": to_int4(w, 128)}
            for rows in WEIGHT_ONLY_ROWS:
                if clock.left > 0:
                    found = _weight_only(w, integers, rows)
                    yield {"model": name, "in": depth, "out": columns, "rows": rows, **found}


def _weight_only(w: torch.Tensor, weights: dict[str, IntegerWeights], rows: int) -> Row:
    columns, depth = w.shape
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    run: dict[str, Callable[[], object]] = {"bf16 cublas": lambda: torch.addmm(bias, x, w.t())}
    sizes = {"bf16 cublas": 2 * w.numel()}
    for kind, integers in weights.items():
        run[kind] = lambda q=integers: weight_only_gemm(x, q, bias=bias)
        run[f"{kind} expanded"] = lambda q=integers: torch.addmm(bias, x, expand(q, x.dtype).t())
        sizes[kind] = sizes[f"{kind} expanded"] = integers.bytes
    times, failed = measured(run, rounds=9, cold=True)
    return {
        **failed,
        "weights_tb_s": {kind: sizes[kind] / ms / 1e9 for kind, ms in times.items()},
        "tflop_s": {kind: 2 * rows * depth * columns / ms / 1e9 for kind, ms in times.items()},
    }


def row_kernels(clock: Clock) -> Iterator[Row]:
    """TB/s of what each row kernel must read and write, 32k rows of XLM-R large."""
    (hidden, inner), rows = SHAPES["large"], NORM_ROWS
    x, residual = (torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wide = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    g, b, bias = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (hidden, hidden, inner))
    small, large = rows * hidden, rows * inner
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "norm": (lambda: norm.add_norm(x, g, b, 1e-5), 4 * small),
        "residual + norm": (lambda: norm.add_norm(x, g, b, 1e-5, bias=g, residual=residual), 6 * small),
        "torch layer_norm": (lambda: F.layer_norm(x, (hidden,), g, b), 4 * small),
        "bias + gelu": (lambda: activation.bias_gelu(wide, bias), 4 * large),
        "torch gelu": (lambda: F.gelu(wide), 4 * large),
    }
    if capability_of(x.device) >= 89:
        cases["residual + norm + fp8"] = (
            lambda: norm.add_norm(x, g, b, 1e-5, residual=residual, quantize=True),
            7 * small,
        )
        cases["bias + gelu + fp8"] = (lambda: activation.bias_gelu_quantize(wide, bias), 3 * large)
        cases["quantise"] = (lambda: quantize.quantize(x), 3 * small)
    if clock.left > 0:
        times, failed = measured({name: function for name, (function, _) in cases.items()}, cold=True)
        yield {**{name: cases[name][1] / ms / 1e9 for name, ms in times.items()}, **failed}
