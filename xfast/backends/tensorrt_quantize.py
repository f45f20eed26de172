"""Products of 8-bit operands in a TensorRT network: int8 or e4m3, one scale a token and one an output channel.

TensorRT's own scales of activations are constants, one for a tensor; with a scale of the moment it computes the product
in 16 bits. So rows are scaled by hand: x * (top / max|x|) is quantised with the constant 1, and the product's rows are
multiplied by max|x| / top. The builder makes of it what one would write: release 1.7.1 takes its 8-bit kernels for the
products, and the scaling is part of the LayerNorm or GELU before them and of the bias after. No calibration, and the
same rule as on the CPU and in Triton. (Read off the builder's log for 8.0, 8.9 and 12.0; see docs/gpu-tuning.md.)

Products are handed on in bfloat16, which holds any sum of 8-bit products; float16 ends at 65504.
"""

from __future__ import annotations

from typing import Any

import torch

TOPS = {"int8": 127.0, "fp8": 448.0}
"""The quantised precisions, and the largest magnitude of each; int8 is symmetric, -128 is not used."""

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_TINY = 1e-30
"""Stands for the largest magnitude of a row of zeros, which then stays one."""


def quantize_weight(weight: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 or e4m3 [out, in], and bfloat16 scales [out], for float32 [out, in]."""
    top = TOPS[precision]
    # rounded before it is used, so that the values are quantised with the very scale that they are multiplied by
    scale = (weight.abs().amax(1).clamp(min=_TINY) / top).bfloat16()
    scaled = (weight / scale.float()[:, None]).clamp(-top, top)
    return (scaled.round() if precision == "int8" else scaled).to(TYPES[precision]), scale


def linear(graph: Any, x: Any, weight: torch.Tensor, bias: torch.Tensor | None, name: str, precision: str) -> Any:
    """x W^T + b in float32, [rows, out], from 8-bit operands.

    Args:
        graph: a ``tensorrt_network._Graph`` that computes in bfloat16.
        x: [rows, in].
        weight: float32 [out, in].
        bias: float32 [out], or None.
        name: of the product.
        precision: one of ``TOPS``.
    """
    top = TOPS[precision]
    values, scales = quantize_weight(weight, precision)
    # TensorRT takes the type of the scale for that of the values it is applied to
    one, rounded_one = (
        graph.constant(torch.ones((), dtype=d, device="cpu"), f"{name}.one.{d}") for d in (torch.float32, graph.dtype)
    )
    weights = graph.dequantize(
        graph.constant(values, f"{name}.weight"), graph.constant(scales, f"{name}.weight.scale"), f"{name}.weight.real"
    )
    x = graph.cast(x, torch.float32, f"{name}.input")
    largest = graph.largest(x, f"{name}.largest")  # [rows, 1]
    largest = graph.elementwise(largest, _constant(graph, _TINY, f"{name}.tiny"), "MAX", f"{name}.nonzero")
    factor = graph.elementwise(_constant(graph, top, f"{name}.top"), largest, "DIV", f"{name}.factor")
    x = graph.elementwise(x, factor, "PROD", f"{name}.scaled")
    x = graph.quantize(x, one, TYPES[precision], f"{name}.quantized")
    y = graph.matmul(graph.dequantize(x, rounded_one, f"{name}.dequantized"), weights, name, transposed=True)
    y = graph.cast(y, torch.float32, f"{name}.float")
    back = graph.elementwise(largest, _constant(graph, 1 / top, f"{name}.unit"), "PROD", f"{name}.scale")
    y = graph.elementwise(y, back, "PROD", f"{name}.descaled")
    if bias is None:
        return y
    return graph.elementwise(y, graph.constant(bias[None], f"{name}.bias"), "SUM", f"{name}.with_bias")


def _constant(graph: Any, value: float, name: str) -> Any:
    return graph.constant(torch.full((1, 1), value, device="cpu"), name)
