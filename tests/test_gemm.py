"""Matrix products with fused epilogues: every target, precision, epilogue and table type, on awkward shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import assert_same_bits, assert_within, bf16_bits, gelu, linear, linear_bf16, linear_int8
from torch.nn import functional as F

from xfast import _C

PRECISIONS = ("fp32", "bf16", "int8")
EPILOGUES = ("bias", "gelu", "residual")
ROUNDED_GELU = 5.1e-5
"""Error of the GELU whose result is rounded to bf16 or int8 next (csrc/activation.h)."""
# Around every tile height (4, 6, 10, 12, 14 rows, AMX: 16, 32) and its multiples, and beyond the 112 rows of a pass;
# around chunks (16, 32, 64) and panels (32).
ROWS = (1, 2, 3, 7, 13, 14, 15, 17, 28, 29, 31, 33, 50, 56, 57, 64, 97, 130)
FEATURES = (1, 2, 5, 16, 31, 32, 33, 64, 65, 127, 130, 768)
# Each row count with two in/out pairs: 5 and 7 are coprime to 12, so every in and every out occurs at least twice.
SHAPES = [
    (rows, FEATURES[(a * i + b) % 12], FEATURES[(b * i + a) % 12])
    for i, rows in enumerate(ROWS)
    for a, b in ((5, 7), (7, 1))
]
PORTABLE = "portable"


def make(rng: np.random.Generator, rows: int, n_in: int, n_out: int) -> tuple[np.ndarray, ...]:
    """x [rows, in], weight [out, in], bias [out], residual [rows, out], all fp32."""
    shapes = ((rows, n_in), (n_out, n_in), (n_out,), (rows, n_out))
    x, weight, bias, residual = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, weight / np.float32(np.sqrt(n_in)), bias, residual


def chain_floor(n_in: int) -> float:
    """Rounding error of one chain of n_in additions, a random walk. Torch splits narrow products into several chains,
    which is more accurate than twice; the kernels keep one, so that bits do not depend on how work is cut.
    """
    return 2.0**-24 * max(8.0, n_in**0.5)


def finish(y: torch.Tensor, epilogue: str, residual: torch.Tensor) -> torch.Tensor:
    """The epilogue in the dtype of y, the way torch does it (GELU of fp64 by the accurate formula)."""
    if epilogue == "gelu":
        return gelu(y) if y.dtype == torch.float64 else F.gelu(y)
    return y + residual.to(y.dtype) if epilogue == "residual" else y


def product(
    isa: str, linear_: _C.kernels.Linear, x: np.ndarray, epilogue: str = "bias", residual: np.ndarray | None = None
) -> np.ndarray:
    return linear_.multiply(isa, x, epilogue, residual if epilogue == "residual" else None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_fp32_is_as_accurate_as_torch(
    isa: str, epilogue: str, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    x, weight, bias, residual = make(rng, *shape)
    y = product(isa, _C.kernels.Linear("fp32", weight, bias), x, epilogue, residual)
    tx, tw, tb, tr = map(torch.from_numpy, (x, weight, bias, residual))
    truth, same = (finish(linear(tx, tw, tb, dtype), epilogue, tr) for dtype in (torch.float64, torch.float32))
    assert_within(y, truth, same, floor=chain_floor(shape[1]), what=f"{shape}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_bf16_rounds_its_inputs_and_nothing_else(
    isa: str, epilogue: str, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    x, weight, bias, residual = make(rng, *shape)
    y = product(isa, _C.kernels.Linear("bf16", weight, bias), x, epilogue, residual)
    tx, tw, tb, tr = map(torch.from_numpy, (x, weight, bias, residual))
    truth = finish(linear(tx, tw, tb), epilogue, tr)
    assert_within(y, truth, finish(linear_bf16(tx, tw, tb), epilogue, tr), what=f"{shape}")
    # Tighter than stock bf16: with the inputs rounded, only fp32 accumulation error may remain.
    tx, tw = tx.bfloat16(), tw.bfloat16()
    truth, same = (finish(linear(tx, tw, tb, dtype), epilogue, tr) for dtype in (torch.float64, torch.float32))
    gelu_floor = ROUNDED_GELU * max(1.0, float(truth.abs().max()) / 8) if epilogue == "gelu" and truth.numel() else 0.0
    what = f"{shape}, rounded inputs"
    assert_within(y, truth, same, floor=chain_floor(shape[1]), absolute_floor=gelu_floor, what=what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_the_integer_simulation(isa: str, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    x, weight, bias, residual = make(rng, *shape)
    tx, tw, tb = map(torch.from_numpy, (x, weight, bias))
    plain = _C.kernels.Linear("int8", weight, None)
    assert_same_bits(product(isa, plain, x), linear_int8(tx, tw, None).numpy(), f"{shape}, no bias")
    with_bias = _C.kernels.Linear("int8", weight, bias)
    want = linear_int8(tx, tw, tb).numpy()
    got = product(isa, with_bias, x)
    assert np.all(np.abs(got - want) <= np.spacing(np.abs(want))), f"{shape}: more than the last bit differs"
    # The epilogues start from exactly those values.
    np.testing.assert_array_equal(product(isa, with_bias, x, "residual", residual), got + residual)
    activated = gelu(torch.from_numpy(got)).numpy()
    error = np.abs(product(isa, with_bias, x, "gelu") - activated)
    assert np.all(error <= ROUNDED_GELU * np.maximum(1, np.abs(got) / 8)), f"{shape}: GELU error {error.max():.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_int8_has_the_same_bits_on_every_target(
    isa: str, epilogue: str, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    x, weight, bias, residual = make(rng, *shape)
    packed = _C.kernels.Linear("int8", weight, bias)
    want = product(PORTABLE, packed, x, epilogue, residual)
    assert_same_bits(product(isa, packed, x, epilogue, residual), want, f"{shape}")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(7, 65, 33), (3, 1, 1), (15, 130, 64)], ids=str)
def test_weight_tables_of_each_dtype_pack_to_the_same_weights(
    isa: str, precision: str, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    x, weight, bias, _ = make(rng, *shape)
    weight[0, 0] = 2.0**-24  # subnormal as fp16
    half, brain = weight.astype(np.float16), torch.from_numpy(weight).bfloat16()
    for stored, wide in ((half, half.astype(np.float32)), (bf16_bits(brain), brain.float().numpy())):
        got = product(isa, _C.kernels.Linear(precision, stored, bias), x)
        assert_same_bits(got, product(isa, _C.kernels.Linear(precision, wide, bias), x), f"{stored.dtype}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_bias_is_a_bias_of_zeros(isa: str, precision: str, rng: np.random.Generator) -> None:
    x, weight, bias, residual = make(rng, 15, 65, 65)
    without, zeros = (_C.kernels.Linear(precision, weight, b) for b in (None, np.zeros_like(bias)))
    for epilogue in EPILOGUES:
        want = product(isa, zeros, x, epilogue, residual)
        assert_same_bits(product(isa, without, x, epilogue, residual), want, epilogue)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_whatever_rows_surround_it(isa: str, precision: str, rng: np.random.Generator) -> None:
    x, weight, bias, _ = make(rng, 97, 1601, 65)  # `in` takes several passes
    packed = _C.kernels.Linear(precision, weight, bias)
    whole = product(isa, packed, x, "gelu")
    for begin, end in ((0, 1), (96, 97), (3, 17), (11, 68), (40, 41)):
        part = product(isa, packed, np.ascontiguousarray(x[begin:end]), "gelu")
        assert_same_bits(part, whole[begin:end], f"rows {begin}:{end}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_rows(isa: str, precision: str) -> None:
    packed = _C.kernels.Linear(precision, np.ones((33, 5), np.float32), None)
    assert product(isa, packed, np.empty((0, 5), np.float32)).shape == (0, 33)


@pytest.mark.parametrize("signs", ["plus", "minus", "opposite", "alternating", "random"])
def test_int8_does_not_saturate(isa: str, signs: str, rng: np.random.Generator) -> None:
    # 127 * 127 * 3072 overflows 16-bit partial sums (pmaddubsw) at the first pair and 24-bit floats if added as such.
    rows, n_in, n_out = 15, 3072, 33
    choose = {
        "plus": lambda shape: np.ones(shape),
        "minus": lambda shape: -np.ones(shape),
        "opposite": lambda shape: np.full(shape, 1.0 if shape[0] == rows else -1.0),
        "alternating": lambda shape: np.tile([1.0, -1.0], (shape[0], shape[1] // 2)),
        "random": lambda shape: rng.choice([-1.0, 1.0], shape),
    }[signs]
    qx, qw = (127 * choose(shape).astype(np.int64) for shape in ((rows, n_in), (n_out, n_in)))
    packed = _C.kernels.Linear("int8", qw.astype(np.float32), None)
    got = product(isa, packed, qx.astype(np.float32))  # scales are exactly 1
    assert_same_bits(got, (qx @ qw.T).astype(np.float32))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros(isa: str, precision: str, rng: np.random.Generator) -> None:
    x, weight, bias, residual = make(rng, 7, 65, 33)
    for zero_x, zero_w in ((True, False), (False, True), (True, True)):
        packed = _C.kernels.Linear(precision, weight * (not zero_w), bias)
        given = x * np.float32(not zero_x)
        np.testing.assert_array_equal(product(isa, packed, given), np.broadcast_to(bias, (7, 33)))
        np.testing.assert_array_equal(product(isa, packed, given, "residual", residual), bias + residual)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("x_scale", "w_scale"), [(1e30, 1e-3), (1e-3, 1e30), (3e37, 1e-20), (1e-20, 1e-15), (1e-38, 1.0), (1e-41, 1.0)]
)
def test_huge_and_tiny_scales(
    isa: str, precision: str, x_scale: float, w_scale: float, rng: np.random.Generator
) -> None:
    x, weight, _, _ = make(rng, 14, 65, 33)
    x, weight = (x.clip(-3, 3) * x_scale).astype(np.float32), (weight * w_scale).astype(np.float32)
    y = product(isa, _C.kernels.Linear(precision, weight, None), x)
    tx, tw = torch.from_numpy(x), torch.from_numpy(weight)
    if precision == "int8":
        assert_same_bits(y, linear_int8(tx, tw, None).numpy())
        return
    same = linear(tx, tw, None, torch.float32) if precision == "fp32" else linear_bf16(tx, tw, None)
    # bf16 instructions treat subnormal inputs and sums as zero: each of the 65 products may lose what is below 2^-126.
    absolute = 65 * 2.0**-126 if precision == "bf16" else 65 * 2.0**-149
    assert_within(y, linear(tx, tw, None), same, absolute_floor=absolute)


def test_int8_rows_of_very_different_size_keep_their_own_scale(isa: str, rng: np.random.Generator) -> None:
    x, weight, _, _ = make(rng, 13, 64, 32)
    x *= np.logspace(-20, 20, 13, dtype=np.float32)[:, None]
    got = product(isa, _C.kernels.Linear("int8", weight, None), x)
    truth = linear(torch.from_numpy(x), torch.from_numpy(weight), None).numpy()
    error = np.linalg.norm(got - truth, axis=1) / np.linalg.norm(truth, axis=1)
    assert error.max() < 0.03, f"relative error per row {error}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_and_biases_must_be_finite(precision: str, bad: float) -> None:
    weight, bias = np.ones((33, 65), np.float32), np.ones(33, np.float32)
    for array, at in ((weight, (0, 0)), (weight, (32, 64)), (bias, 32)):
        before = array[at]
        array[at] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            _C.kernels.Linear(precision, weight, bias)
        array[at] = before
    assert _C.kernels.Linear(precision, weight, bias) is not None
