"""Attention with 16-bit integer products (all encoders but fp32 ones): definition, error, and what must not overflow.

That its bits depend on nothing else is tested with the fp32 form, in test_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import assert_same_bits, attention
from test_attention import CASES, PORTABLE, make

from xfast import _C

LARGEST_HEAD = 128  # beyond it 32-bit sums could overflow: fp32 products


def rounded(x: np.ndarray, limit: int, axis: int) -> np.ndarray:
    """x as integers of at most `limit` along `axis`, times their scale again."""
    size = np.maximum(np.abs(x).max(axis=axis, keepdims=True), 1e-30)
    return np.rint(x * (limit / size)) * (size / limit)


def defined(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """What the kernel computes, in fp64: rounded operands, values less their mean, an online softmax over 256 keys."""
    q, k, v = (x.astype(np.float64).transpose(1, 0, 2) for x in (q, k, v))
    scores = rounded(q, 4095, 2) @ rounded(k, 4095, 2).transpose(0, 2, 1) * scale
    out, total = np.zeros_like(q), np.zeros((*q.shape[:2], 1))
    largest = np.full_like(total, -np.inf)
    for block in range(0, k.shape[1], 256):
        part, values = scores[:, :, block : block + 256], v[:, block : block + 256]
        here, mean = part.max(axis=2, keepdims=True), values.mean(axis=1, keepdims=True)
        before, largest = largest, np.maximum(largest, here)
        earlier, grow, p = np.exp(before - largest), np.exp(here - largest), 8191 * np.exp(part - here)
        weight = p.sum(axis=2, keepdims=True)
        out = out * earlier + grow * (np.rint(p) @ rounded(values - mean, 1023, 1) + weight * mean)
        total = total * earlier + grow * weight
    return (out / total).transpose(1, 0, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_what_it_is_defined_to_be(isa: str, case: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, case)
    out, size = _C.kernels.attention(isa, q, k, v, scale, True), np.abs(v).max()
    # A probability that lies between two integers may go to the other one: a few times 1 / 8191 of a value.
    assert np.abs(out - defined(q, k, v, scale)).max() <= 2e-4 * size
    truth = attention(*map(torch.from_numpy, (q, k, v)), scale).numpy()
    assert np.abs(out - truth).max() <= 1e-3 * size


@pytest.mark.parametrize("place", ["first", "last", "middle"])
@pytest.mark.parametrize(
    ("keys", "mass"), [(100, 0.97), (512, 0.97), (2048, 0.9), (8192, 0.7), (8192, 0.9), (8192, 0.99)]
)
def test_keys_beside_a_sink_count(isa: str, keys: int, mass: float, place: str, rng: np.random.Generator) -> None:
    """One key takes most of the attention: the 13 bits of the others are few or none. Its own value is next to zero."""
    q = np.ones((3, 1, 64), np.float32)
    q[:, :, 1:] = rng.standard_normal((3, 1, 63))
    k = (0.5 * rng.standard_normal((keys, 1, 64))).astype(np.float32)
    v = (0.5 * rng.standard_normal(64) + 0.3 * rng.standard_normal((keys, 1, 64))).astype(np.float32)
    sink = {"first": 0, "last": keys - 1, "middle": keys // 2}[place]
    k[:, 0, 0] = k[sink] = 0
    others = np.exp(np.delete(q[:, 0] @ k[:, 0].T, sink, 1) / 8).sum(1).mean()
    k[sink, 0, 0], v[sink] = 8 * np.log(mass / (1 - mass) * others), 0.05 * v[sink]
    out = _C.kernels.attention(isa, q, k, v, 1 / 8, True)
    truth = attention(*(torch.from_numpy(x).double() for x in (q, k, v)), 1 / 8).numpy()
    assert np.linalg.norm(out - truth) <= 0.012 * np.linalg.norm(truth)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("keys", [256, 512])
def test_the_largest_sums_do_not_overflow(isa: str, keys: int, sign: float) -> None:
    q, k = np.ones((15, 1, LARGEST_HEAD), np.float32), np.full((keys, 1, LARGEST_HEAD), sign, np.float32)
    for v in (np.ones_like(k), -np.ones_like(k)):
        out = _C.kernels.attention(isa, q, k, v, 1.0, True)
        np.testing.assert_allclose(out, np.broadcast_to(v[:1], out.shape), rtol=1e-6)


def test_wider_heads_take_fp32(isa: str, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (5, 40, 1, LARGEST_HEAD + 32))
    int16, fp32 = (_C.kernels.attention(isa, q, k, v, scale, kind) for kind in (True, False))
    assert_same_bits(int16, fp32)


@pytest.mark.parametrize("size", [1e-38, 1e-42, 0.0, 1e30])
def test_values_of_any_size(isa: str, size: float, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (5, 40, 1, 32))
    v = (v * size).astype(np.float32)
    out = _C.kernels.attention(isa, q, k, v, scale, True)
    truth = attention(*map(torch.from_numpy, (q, k, v)), scale).numpy()
    # Below 1e-30 the scale stays where it is.
    assert np.abs(out - truth).max() <= 1e-3 * max(np.abs(v).max(), 1e-30)


@pytest.mark.parametrize("keys", [1, 33, 600])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e18, -1e18])
def test_scores_far_apart_stay_between_the_values(isa: str, keys: int, size: float, rng: np.random.Generator) -> None:
    q, k, v, _ = make(rng, (3, keys, 1, 8))
    out = _C.kernels.attention(isa, q, (k * size).astype(np.float32), v, 1.0, True)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(v).max() * (1 + 1e-6)


def test_keys_large_and_queries_small(isa: str, rng: np.random.Generator) -> None:
    # The scores are of ordinary size; sums times the keys' scale alone would be infinite.
    q, k, v, scale = make(rng, (5, 40, 1, LARGEST_HEAD))
    far = _C.kernels.attention(isa, q * np.float32(2.0**-100), k * np.float32(2.0**100), v, scale, True)
    np.testing.assert_allclose(far, _C.kernels.attention(isa, q, k, v, scale, True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e20, 1e-42])
@pytest.mark.parametrize("name", ["q", "k", "v", "all"])
def test_extreme_numbers_are_the_same_on_every_target(
    isa: str, name: str, value: float, rng: np.random.Generator
) -> None:
    q, k, v, scale = make(rng, (15, 45, 1, 48))
    for key, x in (("q", q), ("k", k), ("v", v)):
        if name in (key, "all"):
            x[3] = value
    got = _C.kernels.attention(isa, q, k, v, scale, True)
    np.testing.assert_array_equal(got, _C.kernels.attention(PORTABLE, q, k, v, scale, True))  # NaN equals NaN


@pytest.mark.parametrize("int16", [False, True])
@pytest.mark.parametrize("keys", [40, 300])
def test_nan_is_never_made_a_number(isa: str, keys: int, int16: bool, rng: np.random.Generator) -> None:
    for name in ("q", "k", "v"):
        q, k, v, scale = make(rng, (15, keys, 1, 32))
        {"q": q, "k": k, "v": v}[name][3, 0, 5] = np.nan
        want = np.isnan(attention(*map(torch.from_numpy, (q, k, v)), scale).numpy())
        got = np.isnan(_C.kernels.attention(isa, q, k, v, scale, int16))
        assert want.any() and got[want].all(), name
    q, k, v, scale = make(rng, (15, keys, 1, 32))
    k[3, 0, 5] = np.inf  # in integers its sign is lost: whether a score is inf or -inf cannot be told
    want = np.isnan(attention(*map(torch.from_numpy, (q, k, v)), scale).numpy())
    assert want.any() and np.isnan(_C.kernels.attention(isa, q, k, v, scale, int16))[want].all()
    q, k, v, scale = make(rng, (15, keys, 1, 32))
    q[:, 0, 0] = k[2, 0, 0] = 3e38  # whose product is infinite
    assert np.isnan(_C.kernels.attention(isa, q, k, v, scale, int16)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numbers_that_are_none_stay_in_their_head(isa: str, name: str, value: float, rng: np.random.Generator) -> None:
    q, k, v, scale = make(rng, (15, 40, 2, 32))
    want = _C.kernels.attention(isa, q, k, v, scale, True)
    {"q": q, "k": k, "v": v}[name][3, 0, 5] = value
    got = _C.kernels.attention(isa, q, k, v, scale, True)
    assert_same_bits(np.ascontiguousarray(got[:, 1]), np.ascontiguousarray(want[:, 1]))
    if name == "q":
        rest = np.arange(15) != 3
        assert_same_bits(got[rest], want[rest])
