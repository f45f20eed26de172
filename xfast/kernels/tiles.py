"""Which tile each kernel uses where: pure functions of shapes, dtype and compute capability.

Chosen from ahead-of-time compilation (no spills, shared memory within the limit; ``benchmarks/static_gpu.py``), not by
autotuning at run time: the first call on a new shape must not cost seconds. ``docs/gpu-tuning.md`` has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may use, by compute capability (CUDA programming guide, table 24)."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one program: ``block_m`` x ``block_n`` results at a time, ``block_k`` deep, on ``warps`` warps."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def shared_memory_limit(capability: int) -> int:
    """Bytes for one block on a capability (90 for 9.0); that of the closest one below for those not listed."""
    known = [c for c in SHARED_MEMORY_LIMIT if c <= capability]
    return SHARED_MEMORY_LIMIT[max(known, default=80)]


def attention_tile(head_dim: int, itemsize: int, capability: int, max_queries: int, *, training: bool = False) -> Tile:
    """Tile of the attention forward: block_m queries, block_n keys.

    Few queries a sequence (a last layer that computes one row, short sentences) take the smallest tile that tensor
    cores accept; block_k is head_dim and only informative. ``training`` leaves
    registers for dropout.
    """
    small = shared_memory_limit(capability) < 128 * 1024
    if itemsize >= 4:  # no tensor cores: registers bound the tile
        rows = 16 if max_queries <= 16 or head_dim >= 64 else 32
        return Tile(rows, 16, head_dim, 8 if head_dim >= 64 else 4, 1)
    if max_queries <= 16:
        return Tile(16, 64, head_dim, 4, 2)
    if head_dim > 80 and (capability < 90 or capability >= 120):  # on four warps it would spill hundreds of bytes
        return Tile(128, 32, head_dim, 8, 2) if training else Tile(64, 32 if capability >= 120 else 64, head_dim, 8, 2)
    if head_dim > 80 and capability >= 100 and max_queries <= 64:
        return Tile(64, 64, head_dim, 8, 2)
    if max_queries <= 64:
        return Tile(64, 64, head_dim, 4, 2 if small or head_dim > 64 else 3)
    if head_dim > 64 and training:
        return Tile(64, 32, head_dim, 4, 2)
    if head_dim > 64:
        return Tile(64, 64, head_dim, 4, 2) if small else Tile(128, 64, head_dim, 8, 2)
    # One warpgroup with 250 registers a thread on Hopper; elsewhere, and with dropout, that many would spill.
    return Tile(128, 64, head_dim, 4 if capability == 90 and not training else 8, 2 if small else 3)


def attention_backward_tile(head_dim: int, itemsize: int, dropout: bool) -> Tile:
    """Tile of the attention backward: block_m rows that a program owns, block_n rows that it walks over."""
    if itemsize >= 4:
        return Tile(32, 16, head_dim, 4, 1)
    if head_dim >= 64:
        return Tile(32, 32, head_dim, 4, 2) if dropout else Tile(64, 32, head_dim, 8, 2)
    return Tile(64, 32, head_dim, 4, 2)


def gemm_tile(rows: int, itemsize: int, capability: int) -> Tile:
    """Tile of the Triton matrix product: tall and wide enough to fill the tensor cores, small for few rows."""
    small = shared_memory_limit(capability) < 128 * 1024
    if itemsize >= 4:
        return Tile(32, 64, 32, 4, 2)
    depth = 128 if itemsize == 1 else 64
    if rows <= 16:
        return Tile(16, 64, depth, 4, 4 if not small else 3)
    if rows <= 64:
        return Tile(64, 64, depth, 4, 4 if not small else 3)
    # Not 128 x 256: its fp32 sums and the epilogue's operands would not fit 255 registers.
    return Tile(128, 128, depth // 2 if small else depth, 8, 3)


def weight_only_half(group_size: int) -> int:
    """Of int4 weights: inputs between the two that share a byte, which is also the deepest product with one scale."""
    return min(group_size, 64)


def weight_only_tile(rows: int, itemsize: int, capability: int, group_size: int) -> Tile:
    """Tile of a product with integer weights: block_m rows, block_n outputs, block_k *bytes* of each output's weights.

    Outputs are the tensor cores' tall side (64 on Hopper), so few rows take the smallest tile without waste.
    ``group_size`` is 0 for int8.
    """
    small = shared_memory_limit(capability) < 128 * 1024
    depth = weight_only_half(group_size) if group_size else 64
    if itemsize >= 4:  # no tensor cores
        return Tile(16, 32, min(depth, 32) if not group_size else depth, 4, 2)
    if rows <= 16:
        return Tile(16, 64, depth if group_size else 128, 4, 4)
    if rows <= 32:
        return Tile(32, 64, depth if group_size else 128, 4, 3)
    if rows <= 64 or capability < 90:
        return Tile(64, 64, depth, 4, 3 if small else 4)
    return Tile(128, 128, depth, 8, 2 if small else 3)


def weight_only_splits(tiles: int, steps: int, multiprocessors: int) -> int:
    """Programs that share a tile's inputs: enough to give every multiprocessor two, of four steps or more each."""
    if tiles >= multiprocessors:
        return 1
    return max(1, min(steps // 4, -(-2 * multiprocessors // tiles)))


WEIGHT_ONLY_EXPAND_ROWS = 1024
"""From so many rows on, integer weights are expanded first: reading and writing them once is then small beside the
product, which cuBLASLt does faster than any kernel that expands weights again for every block of rows. Predicted."""


def row_warps(columns: int, itemsize: int = 2) -> int:
    """Warps for a program that owns one row: each thread should hold about 16 bytes of loads, twice over."""
    return min(16, max(1, columns * itemsize // (32 * 32)))


SHARED_TILE_LENGTH = 48
"""Up to this longest length, sequences share attention tiles: an aligned tile of 64 rows would be mostly empty."""


def attention_plan(head_dim: int, itemsize: int, capability: int, max_seqlen: int, sequences: int) -> tuple[Tile, bool]:
    """Tile of an encoder's attention over all rows, and whether short sequences share tiles."""
    if sequences > 1 and max_seqlen <= SHARED_TILE_LENGTH:
        return attention_tile(head_dim, itemsize, capability, 64), True
    return attention_tile(head_dim, itemsize, capability, max_seqlen), False
