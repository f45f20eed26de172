"""LayerNorm: every target, widths around the 16 lanes, rows whose statistics are hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import assert_same_bits, assert_within, layer_norm
from torch.nn import functional as F

from xfast import _C

SHAPES = [(1, 1), (3, 2), (1, 5), (7, 15), (2, 16), (5, 17), (3, 31), (2, 32), (13, 33), (1, 127), (3, 768), (2, 4099)]
EPS = 1e-5


def make(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [rows, cols], gamma and beta [cols]."""
    x, gamma, beta = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, cols), (cols,), (cols,)))
    return x, gamma, beta


def check(isa: str, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float = EPS, what: str = "") -> np.ndarray:
    before = x.copy()
    y = _C.kernels.layer_norm(isa, x, gamma, beta, eps)
    assert_same_bits(x, before, "the input")
    tx, tg, tb = map(torch.from_numpy, (x, gamma, beta))
    assert_within(y, layer_norm(tx, tg, tb, eps), F.layer_norm(tx, (x.shape[1],), tg, tb, eps), what=what)
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_is_as_accurate_as_torch(isa: str, shape: tuple[int, int], eps: float, rng: np.random.Generator) -> None:
    check(isa, *make(rng, *shape), eps, f"{shape}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_has_the_same_bits_on_every_target(isa: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    x, gamma, beta = make(rng, *shape)
    for given in (x, x * np.float32(1e4), x + np.float32(100)):
        want = _C.kernels.layer_norm("portable", given, gamma, beta, EPS)
        assert_same_bits(_C.kernels.layer_norm(isa, given, gamma, beta, EPS), want, f"{shape}")


@pytest.mark.parametrize("cols", [17, 768])
@pytest.mark.parametrize("offset", [10.0, 1e3, -1e5])
def test_a_mean_far_from_zero(isa: str, cols: int, offset: float, rng: np.random.Generator) -> None:
    # One pass over x and x^2 would lose everything here.
    # 64 rows: with few, luck in the rounding of one mean decides which of two equally good results is closer.
    x, gamma, beta = make(rng, 64, cols)
    check(isa, x + np.float32(offset), gamma, beta)


@pytest.mark.parametrize("cols", [1, 16, 33, 768])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 0.1, 1e3])
def test_constant_rows_give_beta(isa: str, cols: int, value: float, rng: np.random.Generator) -> None:
    _, gamma, beta = make(rng, 1, cols)
    y = _C.kernels.layer_norm(isa, np.full((2, cols), value, np.float32), gamma, beta, EPS)
    # 16 lanes of cols / 16 additions may each round, so the mean may miss the value; 1 / sqrt(eps) magnifies that.
    missed = 0.0 if value in (0.0, 1.0) else (cols / 16 + 5) * 2.0**-24 * abs(value)
    assert np.abs(y - beta).max() <= missed / EPS**0.5 * np.abs(gamma).max()


def test_outlier_channels(isa: str, rng: np.random.Generator) -> None:
    # Four channels 50 times larger than the others, as real XLM-R has.
    x, gamma, beta = make(rng, 5, 768)
    x[:, [3, 200, 511, 767]] *= 50
    check(isa, x, gamma, beta)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e17])
def test_rows_of_any_size(isa: str, size: float, rng: np.random.Generator) -> None:
    x, gamma, beta = make(rng, 3, 65)
    check(isa, (x * size).astype(np.float32), gamma, beta)


def test_zero_gamma_gives_beta(isa: str, rng: np.random.Generator) -> None:
    x, gamma, beta = make(rng, 3, 65)
    y = _C.kernels.layer_norm(isa, x, np.zeros_like(gamma), beta, EPS)
    np.testing.assert_array_equal(y, np.broadcast_to(beta, x.shape))


def test_rows_are_independent(isa: str, rng: np.random.Generator) -> None:
    x, gamma, beta = make(rng, 9, 130)
    whole = _C.kernels.layer_norm(isa, x, gamma, beta, EPS)
    for row in range(9):
        one = _C.kernels.layer_norm(isa, np.ascontiguousarray(x[row : row + 1]), gamma, beta, EPS)
        assert_same_bits(one, whole[row : row + 1], f"row {row}")


def test_no_rows(isa: str) -> None:
    ones = np.ones(33, np.float32)
    assert _C.kernels.layer_norm(isa, np.empty((0, 33), np.float32), ones, ones, EPS).shape == (0, 33)
