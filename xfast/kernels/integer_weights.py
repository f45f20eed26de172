"""Weights in int8 or int4 as ``gemm_weight_only`` reads them. Made once, in torch: nothing here needs triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from xfast.kernels.tiles import weight_only_half

_TINY = 1e-30
_STEPS = (8.0, 8.4, 8.8, 9.3, 9.9, 10.6, 7.5)  # as csrc/weights.cpp: between zero and a group's largest value


@dataclass(frozen=True)
class IntegerWeights:
    """Weights [out, in] in integers.

    Attributes:
        values: int8 [out, in], or bytes of two int4 values plus 8, as int8 [out, padded in / 2].
        scale: fp32 [out, 1], or bf16 [out, groups]; a group past the end is zero.
        depth: in.
        group_size: inputs that share a scale; 0 for int8.
    """

    values: torch.Tensor
    scale: torch.Tensor
    depth: int
    group_size: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.depth

    @property
    def bytes(self) -> int:
        """Of values and scales."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.scale))

    def part(self, begin: int, end: int) -> IntegerWeights:
        """Some of its outputs, in place."""
        return IntegerWeights(self.values[begin:end], self.scale[begin:end], self.depth, self.group_size)


def to_int8(weight: torch.Tensor) -> IntegerWeights:
    """[out, in] -> int8 with scale absmax / 127 an output, by the CPU's rule. In torch, once."""
    values = weight.detach().float().contiguous()
    largest = values.abs().amax(1, keepdim=True)
    steps = torch.full_like(largest, 127)  # a tensor: by a number, CUDA multiplies by its rounded inverse
    inverse = torch.where(largest > _TINY, steps / largest.clamp_min(_TINY), 0.0)
    quantised = (values * inverse).round_().clamp_(-127, 127).to(torch.int8)
    return IntegerWeights(quantised, largest / steps, weight.shape[1])


def to_int4(weight: torch.Tensor, group_size: int = 64) -> IntegerWeights:
    """[out, in] -> int4 in groups of 32, 64 or 128 inputs. In torch, once.

    The CPU's rule: a group's largest value lies on the side of -8, and of some sizes of steps the one with the least
    squared error is taken.
    """
    if group_size not in (32, 64, 128):
        raise ValueError(f"group_size: expected 32, 64 or 128, got {group_size}")
    columns = weight.shape[1]
    padded = pad(weight.detach().float(), (0, -columns % _columns(group_size)))
    groups = padded.unflatten(1, (-1, group_size))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    extreme = torch.where(-low >= high, low, high)
    best = torch.full_like(extreme, torch.inf)
    scale, q = torch.zeros_like(extreme), torch.zeros_like(groups)
    for steps in _STEPS:
        tried = (extreme / torch.full_like(extreme, -steps)).bfloat16().float()
        inverse = torch.where(tried.abs() > _TINY, 1 / tried, 0.0)
        rounded = (groups * inverse).round_().clamp_(-8, 7)
        error = (groups - tried * rounded).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, q = torch.where(better, tried, scale), torch.where(better, rounded, q)
    return int4_weights((q + 8).flatten(1).to(torch.uint8), scale.squeeze(2).bfloat16(), columns, group_size)


def int4_weights(values: torch.Tensor, scale: torch.Tensor, depth: int, group_size: int) -> IntegerWeights:
    """What is in int4 already, two values a byte.

    Args:
        values: uint8 [out, columns], int4 values plus 8; ``columns`` at least ``depth``.
        scale: bf16 [out, groups].
        depth, group_size: see :class:`IntegerWeights`.
    """
    half = weight_only_half(group_size)
    columns = -(-depth // _columns(group_size)) * _columns(group_size)
    padded = pad(values, (0, columns - values.shape[1]), value=8)
    pairs = padded.unflatten(1, (-1, 2, half))
    joined = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1).contiguous().view(torch.int8)
    return IntegerWeights(joined, pad(scale, (0, columns // group_size - scale.shape[1])), depth, group_size)


def _columns(group_size: int) -> int:
    """Inputs are filled up to a multiple of so many."""
    return max(group_size, 2 * weight_only_half(group_size))
