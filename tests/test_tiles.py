"""Tile choice: pure functions that never ask for more than an architecture has."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton", reason="not installed: pip install triton")

from xfast.kernels import tiles
from xfast.kernels.attention import HEAD_DIMS, split_head_dim

CAPABILITIES = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_operands_fit_shared_memory(capability: int) -> None:
    for head_dim, itemsize, queries in itertools.product(HEAD_DIMS, (2, 4), (1, 16, 17, 64, 65, 512)):
        tile = tiles.attention_tile(head_dim, itemsize, capability, queries)
        keys_and_values = 2 * tile.stages * tile.block_n * head_dim * itemsize
        queries_and_probabilities = tile.block_m * (head_dim + tile.block_n) * itemsize
        assert keys_and_values + queries_and_probabilities <= tiles.shared_memory_limit(capability)
        assert tile.block_m >= 16 and tile.block_n >= 16  # what tensor cores multiply at least


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gemm_operands_fit_shared_memory(capability: int) -> None:
    for rows, itemsize in itertools.product((1, 16, 17, 64, 65, 10**6), (1, 2, 4)):
        tile = tiles.gemm_tile(rows, itemsize, capability)
        assert tile.stages * (tile.block_m + tile.block_n) * tile.block_k * itemsize <= tiles.shared_memory_limit(
            capability
        )
        assert tile.block_m >= 16 and (rows > 16 or itemsize == 4 or tile.block_m == 16)


def test_few_queries_take_small_tiles() -> None:
    heights = [tiles.attention_tile(64, 2, 90, queries).block_m for queries in (1, 16, 40, 64, 100, 512)]
    assert heights == [16, 16, 64, 64, 128, 128]


def test_short_sequences_share_tiles_and_long_ones_do_not() -> None:
    assert tiles.attention_plan(64, 2, 90, 30, 16)[1]
    assert not tiles.attention_plan(64, 2, 90, 30, 1)[1]
    assert not tiles.attention_plan(64, 2, 90, 200, 16)[1]


def test_head_dims_split_into_powers_of_two() -> None:
    assert [split_head_dim(d) for d in HEAD_DIMS] == [(16, 0), (32, 0), (64, 0), (64, 16), (128, 0)]


def test_capabilities_not_listed_take_the_limit_below() -> None:
    assert tiles.shared_memory_limit(87) == tiles.SHARED_MEMORY_LIMIT[86]
    assert tiles.shared_memory_limit(103) == tiles.SHARED_MEMORY_LIMIT[100]


def test_rows_take_warps_by_their_size() -> None:
    assert [tiles.row_warps(n) for n in (64, 1024, 4096, 65536)] == [1, 2, 8, 16]
