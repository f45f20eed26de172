"""The Triton matrix product and its epilogues, and the choice between it and cuBLASLt."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import reference
import torch
from gpu import DTYPES, FP8, INTERPRETED, randn
from reference import assert_within
from torch.nn import functional as F

import xfast.kernels
from xfast.kernels import gemm as kernels
from xfast.kernels.quantize import quantize, quantize_weight

SHAPES = [(1, 1, 1), (5, 100, 70), (17, 64, 129), (33, 31, 16), (130, 128, 257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, columns = shape
    x, w = randn(rows, depth, dtype=dtype), randn(columns, depth, dtype=dtype)
    bias, residual = randn(columns, dtype=dtype), randn(rows, columns, dtype=dtype)
    got = kernels.gemm(x, w, bias=bias, activation="gelu", residual=residual).cpu()
    truth = reference.gelu(reference.linear(x.cpu(), w.cpu(), bias.cpu())) + residual.cpu().double()
    same = F.gelu(F.linear(x.cpu(), w.cpu(), bias.cpu())) + residual.cpu()
    assert_within(got, truth, same, floor=2.0**-20, what=f"{dtype} {shape}")
    plain = kernels.gemm(x, w).cpu()
    assert_within(plain, reference.linear(x.cpu(), w.cpu(), None), F.linear(x.cpu(), w.cpu()), floor=2.0**-20)


def test_reads_strided_rows() -> None:
    x, w = randn(9, 200)[:, :100], randn(40, 200)[:, 100:]
    torch.testing.assert_close(kernels.gemm(x, w), kernels.gemm(x.contiguous(), w.contiguous()), rtol=0, atol=0)


@FP8
@pytest.mark.parametrize("shape", [(5, 96, 64), (33, 64, 128)], ids=str)
def test_e4m3_is_exact_but_for_quantisation(shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    x, w, bias = randn(rows, depth), randn(columns, depth), randn(columns, dtype=torch.bfloat16)
    x8, w8 = quantize(x), quantize_weight(w)
    a, b = (t[0].cpu().double() * s.cpu().double() for t, s in ((x8, x8[1]), (w8, w8[1].T)))
    truth = a @ b.T + bias.cpu().double()
    got = kernels.scaled_gemm(x8, w8, torch.bfloat16, bias).cpu()
    assert reference.max_error(got, truth) <= 2.0**-8 * float(truth.abs().max())
    alone = kernels.gemm(x8, w8, bias=bias, dtype=torch.float32).cpu()
    bound = 1e-5 if INTERPRETED else 2.0**-9  # tensor cores keep about 14 bits of an e4m3 sum
    assert reference.max_error(alone, truth) <= bound * float(truth.abs().max())


def test_a_scaled_product_that_cublas_has_not_is_computed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: object, **__: object) -> torch.Tensor:
        asked.append(True)
        raise RuntimeError(f"CUDA error: {wrong} when calling `cublasLtMatmulAlgoGetHeuristic`")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "_REFUSED", set())
    x, w, wrong = quantize(randn(5, 32)), quantize_weight(randn(16, 32)), "CUBLAS_STATUS_NOT_SUPPORTED"
    want = kernels.gemm(x, w, dtype=torch.bfloat16)
    for _ in range(3):
        assert torch.equal(kernels.scaled_gemm(x, w, torch.bfloat16), want)
    assert len(asked) == 1
    wrong = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory"):
        kernels.scaled_gemm(quantize(randn(50, 32)), w, torch.bfloat16)


def test_no_rows() -> None:
    assert kernels.gemm(randn(0, 16), randn(8, 16)).shape == (0, 8)


def test_refuses_shapes_that_do_not_multiply() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        kernels.gemm(randn(3, 16), randn(8, 15))
    with pytest.raises(ValueError, match="do not multiply"):
        kernels.gemm(randn(3, 16), randn(8, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected a tensor on"):
        kernels.gemm(randn(3, 16).to("meta"), randn(8, 16))


def test_the_pinned_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.PINNED, ("16-gelu", 1024, 4096, 512), "triton")
    assert kernels.choose("16-gelu", 1024, 4096, 300) == "triton"
    assert kernels.choose("16-gelu", 1024, 4096, 513) == "cublas"
    assert kernels.choose("16-gelu", 768, 3072, 300) == "cublas"
    assert all(choice in ("cublas", "triton") for choice in kernels.PINNED.values())


def test_no_kernel_is_compiled_anew_for_another_number_of_rows() -> None:
    """Servers see every batch shape, and a compilation takes a second: Triton would tell 1, multiples of 16, others."""
    sizes = {"rows", "steps", "splits", "queries", "sequences", "capacity", "batch", "length", "seed"}
    seen = set()
    for module in pkgutil.iter_modules(xfast.kernels.__path__):
        for name, kernel in vars(importlib.import_module(f"xfast.kernels.{module.name}")).items():
            if not (name.endswith("kernel") and hasattr(kernel, "arg_names")):
                continue
            interpreted = not hasattr(kernel, "do_not_specialize")
            left = kernel.kwargs.get("do_not_specialize") if interpreted else kernel.do_not_specialize
            assert sizes & set(kernel.arg_names) <= set(left or ()), f"{module.name}.{name}"
            seen |= sizes & set(kernel.arg_names)
    assert {"rows", "steps", "splits", "queries", "sequences"} <= seen
