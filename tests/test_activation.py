"""Exact GELU, run through a 1 x 1 identity product, against fp64 erfc."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import assert_same_bits, gelu
from torch.nn import functional as F

from xfast import _C

IDENTITY = _C.kernels.Linear("fp32", np.ones((1, 1), np.float32), None)
GRID = np.linspace(-12, 12, 60_001, dtype=np.float32)
SIZES = [0.0, 1e-45, 1e-38, 1e-20, 1e-4, 8.999999, 9.0, 9.000001, 20.0, 88.0, 1e4, 1e10, 1e30, 3.4028235e38]
EXTREMES = np.array([sign * size for size in SIZES for sign in (1, -1)], np.float32)


def activate(isa: str, x: np.ndarray) -> np.ndarray:
    """GELU of x [N]; 1 * x + 0 is exact, so nothing else happens to it."""
    return IDENTITY.multiply(isa, np.ascontiguousarray(x[:, None]), "gelu", None)[:, 0]


@pytest.mark.parametrize("x", [GRID, EXTREMES], ids=["grid", "extremes"])
def test_error(isa: str, x: np.ndarray) -> None:
    truth = gelu(torch.from_numpy(x)).numpy()
    error = np.abs(activate(isa, x).astype(np.float64) - truth)
    worst = (error / np.maximum(1, np.abs(x))).argmax()
    assert (error <= 5e-7 * np.maximum(1, np.abs(x))).all(), f"gelu({x[worst]}) is off by {error[worst]:.2e}"


def test_error_is_like_torch(isa: str) -> None:
    truth = gelu(torch.from_numpy(GRID))
    mine = (torch.from_numpy(activate(isa, GRID)).double() - truth).abs()
    torchs = (F.gelu(torch.from_numpy(GRID)).double() - truth).abs()
    assert mine.max() <= 2 * torchs.max()
    assert mine.mean() <= 2 * torchs.mean()


@pytest.mark.parametrize(
    ("x", "limit"),
    [
        (np.linspace(-2, -0.01, 20_001), 1e-6),
        (np.geomspace(1e-30, 1, 2_001), 1e-6),
        (-np.geomspace(1e-30, 1, 2_001), 1e-6),
        (np.linspace(-4, -2, 20_001), 1e-3),
        (np.linspace(-9, -4, 20_001), 2e-2),  # stock torch in fp32 has lost every digit below -5.6
    ],
    ids=["left", "tiny", "tiny negative", "far left", "tail"],
)
def test_relative_error_where_the_result_is_small(isa: str, x: np.ndarray, limit: float) -> None:
    x = x.astype(np.float32)
    truth = gelu(torch.from_numpy(x)).numpy()
    relative = np.abs(activate(isa, x) - truth) / np.abs(truth)
    assert relative.max() <= limit, f"gelu({x[relative.argmax()]}) has relative error {relative.max():.2e}"


def test_tails(isa: str) -> None:
    left, right = np.linspace(-12, -1.0, 2_001, dtype=np.float32), np.linspace(0, 12, 2_001, dtype=np.float32)
    falling = activate(isa, left)
    assert (falling <= 0).all()
    inside = falling[left >= -8.9]
    assert (np.diff(inside) < 0).all(), "from -8.9 to -1 every step goes further below zero"
    assert np.abs(falling[left < -8.9]).max() < 3e-18
    far = -np.geomspace(9, 3e38, 1_001, dtype=np.float32)
    assert (np.abs(activate(isa, far)) <= 1.2e-19 * np.abs(far)).all(), "Phi stays below Phi(-9)"
    rising = activate(isa, right)
    assert (np.diff(rising) >= 0).all()
    beyond = right > 6
    np.testing.assert_array_equal(rising[beyond], right[beyond])


def test_zero_and_signs(isa: str) -> None:
    assert (activate(isa, np.array([0.0, -0.0], np.float32)) == 0).all()
    x = np.concatenate([GRID, EXTREMES])
    y = activate(isa, x)
    assert (y[x > 0] >= 0).all() and (y[x < 0] <= 0).all()
    assert (y <= np.maximum(x, 0)).all()


def test_not_a_number_and_infinity(isa: str) -> None:
    y = activate(isa, np.array([np.nan, np.inf], np.float32))
    assert np.isnan(y[0]) and y[1] == np.inf


def test_has_the_same_bits_on_every_target(isa: str) -> None:
    x = np.concatenate([GRID, EXTREMES])
    assert_same_bits(activate(isa, x), activate("portable", x))


ROUNDED_IDENTITY = _C.kernels.Linear("bf16", np.ones((1, 1), np.float32), None)
BF16_GRID = torch.from_numpy(np.concatenate([GRID, EXTREMES])).bfloat16().float()
BF16_GRID = BF16_GRID[BF16_GRID.isfinite()].numpy()
NORMAL = np.abs(BF16_GRID) >= np.finfo(np.float32).tiny  # the bf16 instruction takes smaller numbers for zero


def activate_rounded(isa: str, x: np.ndarray) -> np.ndarray:
    """The GELU of the bf16 and int8 paths, of x [N] that bf16 can hold."""
    return ROUNDED_IDENTITY.multiply(isa, np.ascontiguousarray(x[:, None]), "gelu", None)[:, 0]


def test_rounded_error(isa: str) -> None:
    truth = gelu(torch.from_numpy(BF16_GRID)).numpy()
    error = np.abs(activate_rounded(isa, BF16_GRID).astype(np.float64) - truth)
    bound = 5.1e-5 * np.maximum(1, np.abs(BF16_GRID) / 8)
    assert (error <= bound).all(), f"gelu({BF16_GRID[(error / bound).argmax()]}) is off by {error.max():.2e}"
    small = (np.abs(BF16_GRID) < 0.05) & NORMAL
    assert (error[small] <= 1e-3 * np.abs(truth[small])).all(), "the error vanishes with x"


def test_rounded_ends(isa: str) -> None:
    y = activate_rounded(isa, np.array([np.nan, np.inf, 0.0, -0.0, 3e38, -3e38, -np.inf], np.float32))
    assert np.isnan(y[0]) and y[1] == np.inf and y[2] == 0 and y[3] == 0
    np.testing.assert_allclose(y[4], np.float32(3e38), rtol=1e-2)
    assert abs(y[5]) <= 1e-6 * 3e38


def test_rounded_has_the_same_bits_on_every_target(isa: str) -> None:
    x = BF16_GRID[NORMAL]
    assert_same_bits(activate_rounded(isa, x), activate_rounded("portable", x))
