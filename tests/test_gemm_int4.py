"""Products with int4 weights: every target, group size and awkward shape against the simulation, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from reference import assert_same_bits, linear_int4, quantize_groups

from xfast import _C

GROUPS = (32, 64, 128)
# Around tile heights (3, 4, 12 rows), chunks (64) and groups (32, 64, 128), panels (32), a pass (48 chunks = 3072).
SHAPES = [(1, 1, 1), (2, 31, 33), (3, 33, 32), (4, 64, 31), (5, 65, 64), (12, 96, 65), (13, 127, 5), (24, 128, 96)]
SHAPES += [(25, 129, 7), (36, 160, 32), (37, 192, 40), (113, 200, 34), (2, 3136, 33), (13, 3200, 64)]


def make(rng: np.random.Generator, rows: int, n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [rows, in], weight [out, in], bias [out]."""
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, n_in), (n_out, n_in), n_out))
    return x, weight / np.float32(np.sqrt(n_in)), bias


def close_to_the_last_bit(got: np.ndarray, want: np.ndarray, size: np.ndarray) -> bool:
    """Within a few units in the last place of the terms that were added: the simulation may round twice."""
    return bool(np.all(np.abs(got - want) <= 4 * np.spacing(np.maximum(np.abs(want), size))))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_simulation(isa: str, shape: tuple[int, int, int], group: int, rng: np.random.Generator) -> None:
    x, weight, bias = make(rng, *shape)
    for given in (None, bias):
        got = _C.kernels.Linear("int4", weight, given, group).multiply(isa, x, "bias", None)
        want = linear_int4(x, weight, given, group)
        assert close_to_the_last_bit(got, want, np.abs(x).max(1, keepdims=True))
    assert_same_bits(got, _C.kernels.Linear("int4", weight, bias, group).multiply("portable", x, "bias", None))


def test_weights_that_int4_can_hold_are_exact(isa: str, rng: np.random.Generator) -> None:
    """Integers whose scales are powers of two: nothing is rounded anywhere."""
    x = rng.integers(-127, 128, (29, 384)).astype(np.float32)
    x[:, 0] = 127  # the row's scale is then 1
    weight = rng.integers(-8, 8, (70, 384)).astype(np.float32)
    weight[:, ::32] = -8
    for group in GROUPS:
        got = _C.kernels.Linear("int4", weight, None, group).multiply(isa, x, "bias", None)
        np.testing.assert_array_equal(got, x @ weight.T)


def test_largest_values_do_not_saturate(isa: str) -> None:
    for x_sign, w in ((1, -8), (-1, -8), (1, 7), (-1, 7)):
        x = np.full((5, 640), 127.0 * x_sign, np.float32)
        weight = np.full((33, 640), float(w), np.float32)
        weight[:, ::32] = -8  # the scale is 1 whatever the others are
        for group in GROUPS:
            got = _C.kernels.Linear("int4", weight, None, group).multiply(isa, x, "bias", None)
            np.testing.assert_array_equal(got, x @ weight.T)


@pytest.mark.parametrize("epilogue", ["gelu", "residual"])
def test_epilogues_have_the_same_bits_on_every_target(isa: str, epilogue: str, rng: np.random.Generator) -> None:
    x, weight, bias = make(rng, 27, 200, 65)
    residual = rng.standard_normal((27, 65)).astype(np.float32) if epilogue == "residual" else None
    packed = _C.kernels.Linear("int4", weight, bias)
    want = packed.multiply("portable", x, epilogue, residual)
    assert_same_bits(packed.multiply(isa, x, epilogue, residual), want)
    if residual is not None:
        np.testing.assert_array_equal(want, packed.multiply("portable", x, "bias", None) + residual)


def test_rows_do_not_depend_on_their_neighbours(isa: str, rng: np.random.Generator) -> None:
    x, weight, bias = make(rng, 40, 320, 64)
    packed = _C.kernels.Linear("int4", weight, bias, 32)
    whole = packed.multiply(isa, x, "bias", None)
    for row in (0, 11, 12, 39):
        assert_same_bits(packed.multiply(isa, x[row : row + 1], "bias", None), whole[row : row + 1])


def test_smaller_groups_err_less(rng: np.random.Generator) -> None:
    weight = rng.standard_t(4, (64, 1024)).astype(np.float32)
    errors = []
    for group in GROUPS:
        q, scale = quantize_groups(weight, group)
        errors.append(float(np.linalg.norm((q * scale[..., None]).reshape(64, -1) - weight) / np.linalg.norm(weight)))
    assert errors == sorted(errors)
    plain = np.abs(weight.reshape(64, -1, 64)).max(2, keepdims=True) / 7  # the textbook's scale
    textbook = np.rint(weight.reshape(64, -1, 64) / plain) * plain
    assert errors[1] < 0.9 * np.linalg.norm(textbook.reshape(64, -1) - weight) / np.linalg.norm(weight)


def test_groups_of_zeros_and_tiny_values(isa: str) -> None:
    x = np.ones((2, 128), np.float32)
    weight = np.zeros((3, 128), np.float32)
    weight[1, 64:] = 1e-38
    weight[2, :64] = 2.0**-90
    got = _C.kernels.Linear("int4", weight, None, 64).multiply(isa, x, "bias", None)
    assert np.all(got[:, :2] == 0.0)
    np.testing.assert_allclose(got[:, 2], 64 * 2.0**-90, rtol=0.02)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_divisor_changes_rounding_only(isa: str, precision: str, rng: np.random.Generator) -> None:
    """One channel 100 times the others: divided away, the others keep their precision."""
    x, weight, bias = make(rng, 30, 192, 64)
    x[:, 7] *= 100
    divisor = np.ones(192, np.float32)
    divisor[7] = 8  # a power of two, so that the product itself is the same in fp32
    want = x.astype(np.float64) @ weight.T.astype(np.float64) + bias

    def error(divided: np.ndarray | None) -> float:
        packed = _C.kernels.Linear(precision, weight, bias, 32, divided)
        got = packed.multiply(isa, x, "bias", None)
        assert_same_bits(got, packed.multiply("portable", x, "bias", None))
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    plain, smoothed = error(None), error(divisor)
    assert smoothed < plain
    if precision == "int8":
        assert smoothed < 0.6 * plain
        by_hand = _C.kernels.Linear("int8", weight * divisor, bias).multiply(isa, x / divisor, "bias", None)
        assert_same_bits(_C.kernels.Linear("int8", weight, bias, 64, divisor).multiply(isa, x, "bias", None), by_hand)


@pytest.mark.parametrize("group", [0, 1, 16, 48, 256, -64])
def test_group_sizes_that_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="group"):
        _C.kernels.Linear("int4", np.ones((4, 4), np.float32), None, group)


def test_weights_that_are_refused() -> None:
    weight = np.ones((4, 70), np.float32)
    weight[3, 69] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        _C.kernels.Linear("int4", weight, None)
    with pytest.raises(ValueError, match="NaN or infinity"):  # finite until it is multiplied
        _C.kernels.Linear("int4", np.full((4, 70), 1e38, np.float32), None, 64, np.full(70, 100, np.float32))
    with pytest.raises(ValueError, match="divisor"):
        _C.kernels.Linear("bf16", np.ones((4, 70), np.float32), None, 64, np.ones(70, np.float32))
    with pytest.raises(ValueError, match="divisor"):
        _C.kernels.Linear("int8", np.ones((4, 70), np.float32), None, 64, np.ones(69, np.float32))
