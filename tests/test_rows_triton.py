"""Kernels that own a row: LayerNorm, embedding, GELU, e4m3 quantisation; alone and fused."""

from __future__ import annotations

import pytest
import reference
import torch
from gpu import DEVICE, DTYPES, FP8, randn
from reference import assert_within
from torch.nn import functional as F

from xfast.kernels.activation import bias_gelu, bias_gelu_quantize
from xfast.kernels.embedding import embed
from xfast.kernels.norm import add_norm
from xfast.kernels.quantize import quantize, quantize_weight

COLUMNS = (1, 7, 64, 100, 768, 1024)
EPS = 1e-5


def dequantised(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[0].cpu().double() * pair[1].cpu().double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_norm(columns: int, dtype: torch.dtype) -> None:
    x, residual = (randn(5, columns, dtype=dtype, scale=3.0) + 1 for _ in range(2))
    bias, gamma, beta = (randn(columns, dtype=dtype) for _ in range(3))
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        got, none = add_norm(x, gamma, beta, EPS, bias=b, residual=r)
        assert none is None
        total = sum((t.cpu().double() for t in (b, r) if t is not None), x.cpu().double())
        rounded = x.cpu()
        for t in (b, r):
            rounded = rounded if t is None else rounded + t.cpu()
        truth = reference.layer_norm(total, gamma.cpu(), beta.cpu(), EPS)
        same = F.layer_norm(rounded, (columns,), gamma.cpu(), beta.cpu(), EPS)
        assert_within(got.cpu(), truth, same, floor=2.0**-20, what=f"{dtype} {columns}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 100, 4096])
@pytest.mark.parametrize("place", ["x", "residual", "elsewhere"])
def test_norm_keeps_the_sum_beside_it(place: str, columns: int, dtype: torch.dtype) -> None:
    x, residual, elsewhere = (randn(5, columns, dtype=dtype) for _ in range(3))
    bias, gamma, beta = (randn(columns, dtype=dtype) for _ in range(3))
    want, _ = add_norm(x, gamma, beta, EPS, bias=bias, residual=residual)
    rounded = (x.cpu().float() + bias.cpu().float() + residual.cpu().float()).to(dtype)
    total = {"x": x, "residual": residual, "elsewhere": elsewhere}[place]
    got, _ = add_norm(x, gamma, beta, EPS, bias=bias, residual=residual, total=total)
    assert torch.equal(got, want) and torch.equal(total.cpu(), rounded)


@FP8
def test_norm_beside_the_sum_quantises_the_same() -> None:
    x, bias, gamma, beta = randn(5, 100, dtype=torch.bfloat16), *(randn(100, dtype=torch.bfloat16) for _ in range(3))
    want = add_norm(x, gamma, beta, EPS, bias=bias, quantize=True)[1]
    got = add_norm(x, gamma, beta, EPS, bias=bias, total=x, quantize=True)[1]
    assert want is not None and got is not None
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


def test_norm_of_rows_far_from_zero_does_not_cancel() -> None:
    x = randn(4, 256) + 4096
    ones, zeros = torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE)
    truth = reference.layer_norm(x.cpu(), ones.cpu(), zeros.cpu(), EPS)
    assert reference.max_error(add_norm(x, ones, zeros, EPS)[0].cpu(), truth) < 1e-3


def test_norm_of_equal_values_is_beta() -> None:
    x = torch.full((3, 100), 7.0, device=DEVICE)
    gamma, beta = randn(100), randn(100)
    torch.testing.assert_close(add_norm(x, gamma, beta, EPS)[0], beta.expand(3, 100), rtol=0, atol=1e-3)


@FP8
@pytest.mark.parametrize("columns", COLUMNS)
def test_norm_quantises_its_rounded_result(columns: int) -> None:
    x, gamma, beta = randn(5, columns, dtype=torch.bfloat16), *(randn(columns, dtype=torch.bfloat16) for _ in range(2))
    values, quantised = add_norm(x, gamma, beta, EPS, quantize=True)
    assert quantised is not None
    alone = quantize(values)
    assert torch.equal(quantised[0].view(torch.uint8), alone[0].view(torch.uint8)) and torch.equal(
        quantised[1], alone[1]
    )


@FP8
def test_quantise_has_the_values_of_torchs_conversion() -> None:
    x = randn(6, 100, scale=100.0) * torch.tensor([1.0, 1e-20, 1e20, 0.0, 1e-3, 1.0], device=DEVICE)[:, None]
    q, scale = quantize(x)
    absmax = x.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scale, absmax / 448, rtol=1e-6, atol=0)
    inverse = torch.where(absmax > 1e-30, 448 / absmax.clamp_min(1e-30), 0.0)
    want = (x * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.float(), want.float())  # but for the sign of zero
    assert float((dequantised((q, scale)) - x.cpu().double()).abs().max() / x.abs().max()) <= 2.0**-4


@FP8
def test_a_row_with_a_nan_is_none_of_numbers() -> None:
    """A GPU's maximum passes NaN by: it would come out as -448 times the scale of the others."""
    x = randn(3, 100)
    x[1, 70] = float("nan")
    out = dequantised(quantize(x))
    assert torch.isfinite(out[[0, 2]]).all() and not torch.isfinite(out[1]).any()


@FP8
def test_quantise_of_zeros_and_extremes_is_finite() -> None:
    x = torch.tensor([[0.0] * 4, [1e-38] * 4, [3e38, -3e38, 0, 1.0], [448.0, -448.0, 0.001, 1]], device=DEVICE)
    q, scale = quantize(x)
    assert torch.isfinite(q.float()).all() and torch.isfinite(scale).all()
    assert torch.equal(dequantised((q, scale))[0], torch.zeros(4, dtype=torch.float64))


@FP8
def test_weights_take_one_scale_an_output() -> None:
    weight = randn(70, 33, scale=0.02) * torch.logspace(-6, 6, 70, device=DEVICE)[:, None]
    q, scale = quantize_weight(weight)
    assert scale.shape == (1, 70)
    error = (dequantised((q, scale.T)) - weight.cpu().double()).abs().amax(1) / weight.cpu().double().abs().amax(1)
    assert float(error.max()) <= 2.0**-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 100, 3072, 4100])
def test_gelu(columns: int, dtype: torch.dtype) -> None:
    x, bias = randn(3, columns, dtype=dtype, scale=3.0), randn(columns, dtype=dtype)
    for b in (None, bias):
        total = x.cpu().double() + (0 if b is None else b.cpu().double())
        same = F.gelu(x.cpu() if b is None else x.cpu() + b.cpu())
        got = bias_gelu(x.clone(), b)
        assert_within(got.cpu(), reference.gelu(total), same, floor=2.0**-20, what=f"{dtype} {columns}")


@FP8
def test_gelu_quantises_with_one_rounding() -> None:
    x, bias = randn(4, 100, dtype=torch.bfloat16), randn(100, dtype=torch.bfloat16)
    got = dequantised(bias_gelu_quantize(x, bias))
    truth = reference.gelu(x.cpu().double() + bias.cpu().double())
    assert (
        float(((got - truth).abs() / truth.abs().amax(1, keepdim=True)).max()) <= 16.1 / 448
    )  # half of the largest step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 100, 768])
def test_embedding(columns: int, dtype: torch.dtype) -> None:
    rows, count = 9, 7
    word, positions, types = (randn(n, columns, dtype=dtype) for n in (50, 20, 3))
    gamma, beta = randn(columns, dtype=dtype), randn(columns, dtype=dtype)
    ids, pos, kind = (torch.randint(0, n, (rows,), dtype=torch.int32, device=DEVICE) for n in (50, 20, 3))
    ids[count:] = 2**30  # past the count: must not be read
    tokens = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    got, _ = embed(ids, pos, kind, tokens, word, positions, types, gamma, beta, EPS, rows=rows, dtype=dtype)
    here = [t[:count].long().cpu() for t in (ids, pos, kind)]
    w, p, t = (table.cpu() for table in (word, positions, types))
    truth = reference.layer_norm(
        w.double()[here[0]] + t.double()[here[2]] + p.double()[here[1]], gamma.cpu(), beta.cpu(), EPS
    )
    same = F.layer_norm(w[here[0]] + t[here[2]] + p[here[1]], (columns,), gamma.cpu(), beta.cpu(), EPS)
    assert_within(got[:count].cpu(), truth, same, floor=2.0**-20, what=f"{dtype} {columns}")
    assert torch.isfinite(got).all()
    total = torch.full_like(got, torch.nan)
    beside, _ = embed(
        ids, pos, kind, tokens, word, positions, types, gamma, beta, EPS, rows=rows, dtype=dtype, total=total
    )
    rounded = (w.float()[here[0]] + t.float()[here[2]] + p.float()[here[1]]).to(dtype)
    assert torch.equal(beside, got) and torch.equal(total[:count].cpu(), rounded)
    assert not total[count:].any()
