"""Attention of one sequence: every target, head size and length; extreme scores; bits that depend on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import assert_same_bits, assert_within, attention

from xfast import _C

# (queries, keys, heads, head_dim): lengths around the 16-key chunk, the 32-key panel, the 14-row tile and the 256-key
# block; head sizes around the 16-element chunk and the 32-column panel; fewer queries than keys as in a last layer.
CASES = [
    (1, 1, 1, 1),
    (2, 2, 3, 16),
    (1, 15, 2, 17),
    (15, 15, 2, 32),
    (16, 16, 1, 48),
    (17, 17, 2, 64),
    (31, 31, 1, 80),
    (33, 33, 2, 96),
    (14, 33, 1, 128),
    (3, 255, 2, 64),
    (29, 256, 1, 32),
    (15, 257, 1, 64),
    (257, 257, 1, 17),
    (1, 300, 2, 128),
    (28, 300, 1, 1),
    (13, 513, 2, 48),
    (1, 1000, 1, 80),
    (43, 1000, 1, 64),
]
PORTABLE = "portable"


def make(rng: np.random.Generator, case: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """q [queries, heads, head_dim], k and v [keys, heads, head_dim], and the usual scale."""
    queries, keys, heads, head_dim = case
    q, k, v = (rng.standard_normal((n, heads, head_dim)).astype(np.float32) for n in (queries, keys, keys))
    return q, k, v, 1.0 / head_dim**0.5


def check(isa: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, what: str = "") -> np.ndarray:
    out = _C.kernels.attention(isa, q, k, v, scale)
    tq, tk, tv = map(torch.from_numpy, (q, k, v))
    same = attention(tq, tk, tv, scale, torch.float32)
    assert_within(out, attention(tq, tk, tv, scale), same, what=what)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_accurate_as_torch(isa: str, case: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    check(isa, *make(rng, case), what=f"{case}")


@pytest.mark.parametrize("int16", [False, True], ids=["fp32", "int16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_has_the_same_bits_on_every_target(
    isa: str, case: tuple[int, int, int, int], int16: bool, rng: np.random.Generator
) -> None:
    q, k, v, scale = make(rng, case)
    got = _C.kernels.attention(isa, q[:9], k, v, scale, int16)
    assert_same_bits(got, _C.kernels.attention(PORTABLE, q[:9], k, v, scale, int16), f"{case}")


@pytest.mark.parametrize("int16", [False, True], ids=["fp32", "int16"])
@pytest.mark.parametrize("case", [(29, 33, 2, 17), (43, 300, 2, 64)], ids=str)
def test_a_query_does_not_depend_on_the_other_queries(
    isa: str, case: tuple[int, int, int, int], int16: bool, rng: np.random.Generator
) -> None:
    q, k, v, scale = make(rng, case)
    whole = _C.kernels.attention(isa, q, k, v, scale, int16)
    for rows in ([0], [case[0] - 1], [3, 4, 5], list(range(0, case[0], 2)), list(range(case[0]))[::-1]):
        part = _C.kernels.attention(isa, np.ascontiguousarray(q[rows]), k, v, scale, int16)
        assert_same_bits(part, whole[rows], f"queries {rows}")


@pytest.mark.parametrize("int16", [False, True], ids=["fp32", "int16"])
def test_heads_are_independent(isa: str, int16: bool, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (17, 41, 5, 48))
    whole = _C.kernels.attention(isa, q, k, v, scale, int16)
    for head in range(5):
        one = [np.ascontiguousarray(x[:, head : head + 1]) for x in (q, k, v)]
        assert_same_bits(_C.kernels.attention(isa, *one, scale, int16), whole[:, head : head + 1], f"head {head}")


@pytest.mark.parametrize("keys", [1, 15, 33, 257, 600])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_scores_far_apart(isa: str, keys: int, size: float, rng: np.random.Generator) -> None:
    # Scores of +-size: exp() of them overflows, and their differences exceed what exp() can hold.
    q = np.ones((3, 1, 1), np.float32)
    k = (size * rng.uniform(0.25, 1.0, (keys, 1, 1)) * rng.choice([-1.0, 1.0], (keys, 1, 1))).astype(np.float32)
    v = rng.standard_normal((keys, 1, 1)).astype(np.float32)
    out = check(isa, q, k, v, 1.0)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(v).max() * (1 + 1e-6)


def test_a_maximum_that_grows_and_one_that_shrinks_from_block_to_block(isa: str, rng: np.random.Generator) -> None:
    # The online softmax rescales what it has summed whenever a later block of 256 keys holds a larger score.
    keys = 800
    q, v = np.ones((2, 1, 16), np.float32), rng.standard_normal((keys, 1, 16)).astype(np.float32)
    for ramp in (np.linspace(-60, 60, keys), np.linspace(60, -60, keys)):
        k = np.zeros((keys, 1, 16), np.float32)
        k[:, 0, 0] = ramp
        check(isa, q, k, v, 1.0)


@pytest.mark.parametrize("keys", [1, 16, 31, 256, 300])
def test_equal_keys_give_the_mean_of_the_values(isa: str, keys: int, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (5, keys, 2, 33))
    for constant in (np.zeros_like(k), np.ones_like(k), np.broadcast_to(k[:1], k.shape).copy()):
        out = check(isa, q, constant, v, scale)
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=0), out.shape), rtol=0, atol=2e-6)


def test_equal_values_come_out_unchanged(isa: str, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (5, 300, 2, 33))
    same = np.broadcast_to(v[:1], v.shape).copy()
    out = _C.kernels.attention(isa, q, k, same, scale)
    np.testing.assert_allclose(out, np.broadcast_to(same[:1], out.shape), rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [1e-38, 1e-42, 1e30])
def test_values_of_any_size(isa: str, size: float, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (5, 40, 1, 32))
    out = _C.kernels.attention(isa, q, k, (v * size).astype(np.float32), scale)
    truth = attention(*map(torch.from_numpy, (q, k, (v * size).astype(np.float32))), scale).numpy()
    assert np.abs(out - truth).max() <= 1e-6 * np.abs(truth).max() + 40 * 2.0**-149


def test_no_queries(isa: str) -> None:
    empty, k = np.empty((0, 2, 16), np.float32), np.ones((3, 2, 16), np.float32)
    assert _C.kernels.attention(isa, empty, k, k, 1.0).shape == (0, 2, 16)
