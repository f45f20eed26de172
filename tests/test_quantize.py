"""Per-row int8: scale = absmax / 127, round half to even, the same integers on every target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import QUANT_MAX, assert_same_bits, quantize_rows

from xfast import _C

SHAPES = [(1, 1), (3, 2), (2, 5), (7, 15), (1, 16), (13, 17), (14, 63), (2, 64), (3, 65), (15, 127), (28, 768)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-29, 1e-31, 1e-40, 1e20, 1e37])
def test_equals_the_reference(isa: str, shape: tuple[int, int], size: float, rng: np.random.Generator) -> None:
    x = (rng.standard_normal(shape) * size).astype(np.float32)
    q, scale = _C.kernels.quantize(isa, x)
    want_q, want_scale = quantize_rows(torch.from_numpy(x))
    assert_same_bits(q, want_q.numpy(), f"{shape}")
    assert_same_bits(scale, want_scale.numpy(), f"{shape}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_half_a_step(isa: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    q, scale = _C.kernels.quantize(isa, x)
    exact_scale = np.abs(x).max(axis=1).astype(np.float64) / QUANT_MAX
    np.testing.assert_allclose(scale, exact_scale, rtol=2.0**-23)
    steps = np.abs(x / exact_scale[:, None] - q)
    assert steps.max() <= 0.5 + 1e-5
    largest = np.abs(q).max(axis=1)
    assert (largest == 127).all(), "the largest value of each row uses the whole range"


def test_ties_go_to_even(isa: str) -> None:
    # 127 in the row makes the scale exactly 1.
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5, 0.49999997, -0.50000006]
    q, scale = _C.kernels.quantize(isa, np.array([row], np.float32))
    assert scale[0] == 1
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126, -126, 0, -1]]


@pytest.mark.parametrize("absmax", [127.0, 1.0, 0.1, 3.0, 1e-29, 1e30, 3.4028235e38])
def test_range_is_symmetric(isa: str, absmax: float, rng: np.random.Generator) -> None:
    x = rng.uniform(-absmax, absmax, (5, 70)).astype(np.float32)
    x[:, 0], x[:, 69] = absmax, -absmax
    q, _ = _C.kernels.quantize(isa, x)
    assert (q[:, 0] == 127).all() and (q[:, 69] == -127).all()
    assert q.min() == -127
    mirrored, _ = _C.kernels.quantize(isa, -x)
    np.testing.assert_array_equal(mirrored, -q)


def test_rows_without_values_are_zero(isa: str) -> None:
    x = np.zeros((4, 65), np.float32)
    x[1] = -0.0
    x[2] = 1e-31  # too small for a reciprocal
    x[3] = 1e-45
    q, scale = _C.kernels.quantize(isa, x)
    assert not q.any()
    np.testing.assert_allclose(scale, [0, 0, 1e-31 / 127, 0], rtol=1e-6)


def test_nan_and_infinity_stay_in_range(isa: str) -> None:
    # -128 would break the exactness of pairwise products; C leaves the conversion of NaN to integers undefined.
    x = np.array([[np.nan, 1.0, -2.0], [np.inf, 1.0, -1.0], [-np.inf, np.nan, np.inf], [np.nan] * 3], np.float32)
    q, scale = _C.kernels.quantize(isa, x)
    assert q.min() >= -127
    assert np.isnan(scale[[0, 2, 3]]).all() and np.isinf(scale[1])  # so that no product of such a row is a number
    want, want_scale = _C.kernels.quantize("portable", x)
    assert_same_bits(q, want)
    assert_same_bits(scale, want_scale)


def test_rows_are_independent(isa: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 130)).astype(np.float32) * np.logspace(-10, 10, 9, dtype=np.float32)[:, None]
    q, scale = _C.kernels.quantize(isa, x)
    for row in range(9):
        one, one_scale = _C.kernels.quantize(isa, np.ascontiguousarray(x[row : row + 1]))
        assert_same_bits(one, q[row : row + 1], f"row {row}")
        assert one_scale[0] == scale[row]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(isa: str, shape: tuple[int, int]) -> None:
    q, scale = _C.kernels.quantize(isa, np.empty(shape, np.float32))
    assert q.shape == shape and scale.tolist() == [0.0] * shape[0]
