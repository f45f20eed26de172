"""Products with int8 and int4 weights: the packed forms, every shape and epilogue, split and not, expanded and not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from gpu import DEVICE, DTYPES, randn
from reference import assert_within
from torch.nn import functional as F

from xfast.kernels import gemm_weight_only as kernels
from xfast.kernels.gemm_weight_only import expand, weight_only_gemm
from xfast.kernels.integer_weights import IntegerWeights, to_int4, to_int8

GROUPS = (0, 32, 64, 128)
SHAPES = [(1, 1, 1), (3, 31, 5), (5, 100, 70), (17, 129, 65), (66, 160, 130)]


def packed(weight: torch.Tensor, group: int) -> IntegerWeights:
    return to_int4(weight, group) if group else to_int8(weight)


def values(w: IntegerWeights) -> torch.Tensor:
    """The weights that are meant, fp64 [out, in], unpacked without any kernel."""
    if w.group_size == 0:
        return w.values.cpu().double() * w.scale.cpu().double()
    half = min(w.group_size, 64)
    unsigned = w.values.cpu().view(torch.uint8).int().unflatten(1, (-1, half))
    pairs = torch.stack([unsigned & 15, unsigned >> 4], 2).flatten(1)
    signed = (pairs - 8).unflatten(1, (-1, w.group_size))
    return (signed.double() * w.scale.cpu().double().unsqueeze(2)).flatten(1)[:, : w.depth]


@pytest.mark.parametrize("columns", [1, 32, 100, 256, 333])
def test_int4_weights_are_those_of_the_cpu(columns: int) -> None:
    weight = randn(9, columns)
    for group in GROUPS[1:]:
        q, scale = reference.quantize_groups(weight.cpu().numpy(), group)
        want = (q * scale[..., None].astype(np.float64)).reshape(9, -1)[:, :columns]
        torch.testing.assert_close(values(to_int4(weight, group)), torch.from_numpy(want), rtol=0, atol=0)


def test_transposed_weights_are_packed_as_they_read() -> None:
    weight = randn(32, 9)
    for group in GROUPS:
        assert torch.equal(values(packed(weight.t(), group)), values(packed(weight.t().contiguous(), group)))


def test_int8_weights_are_those_of_the_cpu() -> None:
    weight = randn(9, 100)
    q, scale = reference.quantize_rows(weight.cpu())
    got = to_int8(weight)
    assert torch.equal(got.values.cpu().double(), q.double())
    torch.testing.assert_close(got.scale[:, 0].cpu(), scale.float().flatten())


def test_zeros_and_one_large_value() -> None:
    weight = torch.zeros(3, 70, device=DEVICE)
    weight[1, 3], weight[2, 69] = 1e-38, -3e4
    for group in GROUPS:
        found = values(packed(weight, group))
        assert torch.isfinite(found).all() and not found[0].any()
        assert abs(float(found[2, 69]) + 3e4) <= 0.01 * 3e4
        assert not torch.isnan(weight_only_gemm(randn(2, 70), packed(weight, group))).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_torch(shape: tuple[int, int, int], group: int, dtype: torch.dtype) -> None:
    """Torch multiplies by the same weights, rounded to its dtype; ours are never rounded."""
    rows, depth, columns = shape
    x, w = randn(rows, depth, dtype=dtype), packed(randn(columns, depth), group)
    bias, residual = randn(columns, dtype=dtype), randn(rows, columns, dtype=dtype)
    same = values(w).to(dtype)
    got = weight_only_gemm(x, w, bias=bias, activation="gelu", residual=residual).cpu()
    truth = reference.gelu(reference.linear(x.cpu(), values(w), bias.cpu())) + residual.cpu().double()
    stock = F.gelu(F.linear(x.cpu(), same, bias.cpu())) + residual.cpu()
    assert_within(got, truth, stock, floor=2.0**-20, what=f"{dtype} {shape} {group}")
    plain = weight_only_gemm(x, w).cpu()
    assert_within(plain, reference.linear(x.cpu(), values(w), None), F.linear(x.cpu(), same), floor=2.0**-20)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [1, 20])
def test_split_sums_are_exact_and_the_same_every_time(rows: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers in all operands: nothing is rounded, however the sum is divided."""
    weight = torch.randint(-7, 8, (70, 1100), device=DEVICE).float()
    weight[:, ::32] = -8  # int4's scale is then 1
    if group == 0:
        weight[:, 0] = 127
    x, residual = torch.randint(-3, 4, (rows, 1100), device=DEVICE).float(), randn(rows, 70).round()
    bias = randn(70).round()
    want = x.double() @ weight.double().T + bias.double() + residual.double()
    for splits in (1, 2, 3, 7):
        monkeypatch.setattr(kernels, "weight_only_splits", lambda tiles, steps, sms, n=splits: min(n, steps))
        got = weight_only_gemm(x, packed(weight, group), bias=bias, residual=residual)
        assert torch.equal(got.double(), want), splits


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("rows", [1, 17, 33, 130])
def test_deep_products_as_models_have_them(rows: int, group: int, dtype: torch.dtype) -> None:
    """Whole steps, more of them than a pipeline's stages, divided among programs; bias, and a residual in place."""
    x, w = randn(rows, 1024, dtype=dtype), packed(randn(70, 1024), group)
    bias, residual = randn(70, dtype=dtype), randn(rows, 70, dtype=dtype)
    truth = reference.linear(x.cpu(), values(w), bias.cpu()) + residual.cpu().double()
    stock = F.linear(x.cpu(), values(w).to(dtype), bias.cpu()) + residual.cpu()
    got = weight_only_gemm(x, w, bias=bias, residual=residual, out=residual).cpu()
    assert_within(got, truth, stock, floor=2.0**-20, what=f"{dtype} {rows} {group}")


def test_writes_over_the_residual_and_reads_strided_rows() -> None:
    x, w, residual = randn(9, 200)[:, :100], to_int4(randn(40, 100)), randn(9, 40)
    want = weight_only_gemm(x.contiguous(), w, residual=residual)
    got = weight_only_gemm(x, w, residual=residual, out=residual)
    assert got is residual and torch.equal(got, want)


@pytest.mark.parametrize("group", GROUPS)
def test_a_part_of_the_outputs(group: int) -> None:
    x, w = randn(5, 96), packed(randn(48, 96), group)
    assert w.part(16, 40).shape == (24, 96)
    got, want = weight_only_gemm(x, w.part(16, 40)), weight_only_gemm(x, w)[:, 16:40]
    # The interpreter's products are NumPy's, whose sums depend on the shape on some CPUs
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("depth", [1, 100, 1300])
def test_expanded_weights_are_rounded_once(depth: int, group: int, dtype: torch.dtype) -> None:
    w = packed(randn(5, depth), group)
    assert torch.equal(expand(w, dtype).cpu(), values(w).float().to(dtype))


# --- conversions as PTX, which the interpreter does not run ----------------------------------------------------------


def _half(bits: int, dtype: torch.dtype) -> float:
    return float(torch.tensor([bits], dtype=torch.uint16).view(dtype))


def _bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor([value], dtype=dtype).view(torch.uint16))


def _lanes(function: Callable[..., float], dtype: torch.dtype, *registers: int) -> int:
    """One instruction on both 16-bit halves, its result rounded once."""
    halves = [_bits(function(*(_half(r >> s & 0xFFFF, dtype) for r in registers)), dtype) for s in (0, 16)]
    return halves[0] | halves[1] << 16


def _prmt(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    assert not selector & 0x8888  # sign replication is not used
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> index & 1) << i for i, index in enumerate(bits))


def _float32(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _float32_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


_BF16, _FP16 = torch.bfloat16, torch.float16
_INSTRUCTIONS: dict[str, Callable[..., int]] = {  # PTX ISA 8, semantics of each
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "sub.rn.f32": lambda a, b: _float32_bits(_float32(a) - _float32(b)),
    "sub.rn.f16x2": lambda a, b: _lanes(lambda x, y: x - y, _FP16, a, b),
    "fma.rn.bf16x2": lambda a, b, c: _lanes(lambda x, y, z: x * y + z, _BF16, a, b, c),
    "fma.rn.f16x2": lambda a, b, c: _lanes(lambda x, y, z: x * y + z, _FP16, a, b, c),
    "cvt.rn.bf16x2.f32": lambda high, low: _bits(_float32(high), _BF16) << 16 | _bits(_float32(low), _BF16),
}


def execute(text: str, given: int, outputs: int) -> list[int]:
    """Runs a PTX block on one input register; its output registers."""
    registers = {f"${outputs}": given}
    for line in text.strip("{}\n ").replace("\n", " ").split(";"):
        name, *rest = line.split(maxsplit=1)[:2] or [""]
        if not name or name == ".reg":
            continue
        target, *sources = (word.strip() for word in rest[0].split(","))
        values_ = [registers[s] if s in registers else int(s.replace("0f", "0x"), 0) for s in sources]
        registers[target] = _INSTRUCTIONS[name](*values_)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)], ids=["bf16", "fp16"])
def test_the_ptx_converts_every_byte(name: str, dtype: torch.dtype) -> None:
    for first in range(256):
        four = [first, (first + 101) % 256, 255 - first, (first * 7) % 256]
        register = int.from_bytes(bytes(four), "little")
        eight = execute(getattr(kernels, f"INT8_TO_{name}").value, register, 2)
        got = [_half(r >> s & 0xFFFF, dtype) for r in eight for s in (0, 16)]
        assert got == [b - 256 if b > 127 else b for b in four]
        pairs = execute(getattr(kernels, f"INT4_TO_{name}").value, register, 4)
        got = [_half(r >> s & 0xFFFF, dtype) for r in pairs for s in (0, 16)]
        assert got == [(b & 15) - 8 for b in four] + [(b >> 4) - 8 for b in four]


def test_bytes() -> None:
    weight = randn(64, 256)
    assert to_int8(weight).bytes == 64 * 256 + 64 * 4
    assert to_int4(weight, 128).bytes == 64 * 128 + 64 * 2 * 2


def test_no_rows() -> None:
    assert weight_only_gemm(randn(0, 16), to_int8(randn(8, 16))).shape == (0, 8)


def test_refuses_what_does_not_multiply() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        weight_only_gemm(randn(3, 16), to_int8(randn(8, 15)))
    with pytest.raises(ValueError, match=r"strides \(1, 3\)"):
        weight_only_gemm(randn(16, 3).t(), to_int8(randn(8, 16)))
    with pytest.raises(ValueError, match="expected a tensor on"):
        weight_only_gemm(randn(3, 16).to("meta"), to_int8(randn(8, 16)))
    with pytest.raises(ValueError, match="group_size: expected 32, 64 or 128, got 16"):
        to_int4(randn(8, 16), 16)
