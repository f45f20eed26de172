"""What the kernels and their launchers share: devices and what they can do, dtypes, loads and products."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")
"""Whether kernels run in Triton's interpreter, on CPU tensors. Fixed when triton is imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite e4m3 value (Micikevicius et al., 2022, "FP8 Formats for Deep Learning")."""


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums are kept in: fp32, but fp64 for fp64 inputs, which only gradient checks use."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def check_device(name: str, tensor: torch.Tensor) -> None:
    """Kernels read raw pointers: a tensor elsewhere would be a crash of the whole process.

    Raises:
        ValueError: the tensor is not where kernels run.
    """
    expected = "cpu" if INTERPRETED else "cuda"
    if tensor.device.type != expected:
        raise ValueError(f"{name}: expected a tensor on {expected}, got {tensor.device}")


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which must be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability_of(device: torch.device) -> int:
    """Compute capability of a GPU, 90 for 9.0; the interpreter plays a Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors_of(device: torch.device) -> int:
    """Of a GPU; the interpreter plays an H200."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (1 for 0)."""
    return int(triton.next_power_of_2(max(n, 1)))


@triton.jit
def dot(a, b, acc):
    """a b + acc in acc's dtype, operands as they are: no TF32. Triton's interpreter multiplies the *bits* of bf16."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to the nearest value of ``dtype``, ties to even: as GPUs do. Triton's interpreter cuts bf16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def load_rows(base, rows, stride, columns, row_mask):
    """[rows, columns] of a row-major matrix; zeros in rows whose mask is not set."""
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=row_mask[:, None], other=0.0)
