"""Embedding gather: word + type + position from tables of every dtype, exact to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import build
from reference import assert_same_bits, bf16_bits, embed

import xfast
from xfast import _C

DTYPES = ("fp32", "fp16", "bf16")
COLS = (1, 2, 5, 15, 16, 17, 31, 33, 64, 65, 130, 768)


def random_table(rng: np.random.Generator, dtype: str, rows: int, cols: int) -> tuple[np.ndarray, torch.Tensor]:
    """Random finite bit patterns, subnormals among them: (array as it crosses to C++, the same values in torch)."""
    if dtype == "fp32":
        values = (rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-44, 30, (rows, cols))).astype(np.float32)
        return values, torch.from_numpy(values)
    bits = rng.integers(0, 2**16, (rows, cols)).astype(np.uint16)
    infinite = 0x7C00 if dtype == "fp16" else 0x7F80
    bits[(bits & infinite) == infinite] &= 0x80FF  # inf and NaN patterns become small numbers
    bits[rng.random((rows, cols)) < 0.1] &= 0x807F  # about a tenth: zeros and subnormals (fp16: only subnormals)
    if dtype == "bf16":
        bits[(bits & 0x7F80) >= 0x7E80] &= 0x80FF  # leaves room for sums of three
        return bits, torch.from_numpy(bits).view(torch.bfloat16)
    return bits.view(np.float16), torch.from_numpy(bits.view(np.float16))


def ids_of(rng: np.random.Generator, tokens: int, size: int) -> np.ndarray:
    ids = rng.integers(0, size, tokens).astype(np.int32)
    ids[:1], ids[-1:] = 0, size - 1  # first and last row of the table
    return ids


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtypes", [*((d, d, d) for d in DTYPES), ("fp32", "bf16", "fp16"), ("bf16", "fp16", "fp32")])
def test_equals_the_reference(isa: str, cols: int, dtypes: tuple[str, str, str], rng: np.random.Generator) -> None:
    sizes, tokens = (50, 20, 2), 29
    arrays, tensors = zip(*(random_table(rng, d, n, cols) for d, n in zip(dtypes, sizes, strict=True)), strict=True)
    ids = [ids_of(rng, tokens, size) for size in sizes]
    want = embed(*tensors, *map(torch.from_numpy, ids)).numpy()
    assert np.isfinite(want).all()
    assert_same_bits(_C.kernels.embed(isa, *arrays, *ids), want, f"{dtypes}, {cols} columns")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_finite_bit_pattern(isa: str, dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    infinite = 0x7C00 if dtype == "fp16" else 0x7F80
    bits = bits[(bits & infinite) != infinite].reshape(-1, 16)
    table = bits.view(np.float16) if dtype == "fp16" else bits
    truth = torch.from_numpy(table) if dtype == "fp16" else torch.from_numpy(bits).view(torch.bfloat16)
    ids, zeros = np.arange(len(bits), dtype=np.int32), np.zeros(len(bits), np.int32)
    nothing = np.zeros((1, 16), np.float32)
    got = _C.kernels.embed(isa, table, nothing, nothing, ids, zeros, zeros)
    assert_same_bits(got, truth.float().numpy() + np.float32(0))


def test_no_tokens(isa: str) -> None:
    table, none = np.ones((3, 17), np.float32), np.empty(0, np.int32)
    assert _C.kernels.embed(isa, table, table, table, none, none, none).shape == (0, 17)


@pytest.mark.parametrize("which", ["ids", "position_ids", "type_ids"])
@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1, -(2**31)])
def test_ids_outside_the_table_are_refused(isa: str, which: str, bad: int) -> None:
    table = bf16_bits(torch.ones(3, 17))
    ids = {name: np.array([0, 2, 1], np.int32) for name in ("ids", "position_ids", "type_ids")}
    ids[which][1] = bad
    with pytest.raises(ValueError, match=rf"^{which}: value out of range"):
        _C.kernels.embed(isa, table, table, table, *ids.values())


def test_unknown_table_dtypes_are_refused(isa: str) -> None:
    good, ids = np.ones((3, 17), np.float32), np.zeros(3, np.int32)
    for dtype in (np.float64, np.int16, np.int32, np.uint8, np.complex64, bool):
        with pytest.raises(ValueError, match=r"^word: expected"):
            _C.kernels.embed(isa, good.astype(dtype), good, good, ids, ids, ids)


def small_words() -> torch.nn.Module:
    """One layer, 97 words of very different sizes."""
    model = build(vocab_size=97, hidden_size=72, num_attention_heads=3, intermediate_size=96, num_hidden_layers=1)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] = 0.0
        model.embeddings.word_embeddings.weight[7] *= 1e-3
    return model


@torch.no_grad()
def test_word_table_in_8_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``keep_weights=False`` and int8 each row is rounded to 255 steps of its own scale, alike on every target."""
    rounded, ids = small_words(), torch.arange(2, 97).reshape(5, 19)
    table = rounded.embeddings.word_embeddings.weight
    scale = table.abs().amax(1, keepdim=True) / 127
    table.copy_(torch.where(scale > 0, (table / scale).round() * scale, table))
    want = xfast.accelerate(rounded, precision="int8", layers=0)(ids)[0]
    results = []
    for target in (isa, "portable"):
        monkeypatch.setenv("XFAST_ISA", target)
        model = xfast.accelerate(small_words(), precision="int8", layers=0, keep_weights=False)
        assert model.embeddings.word_embeddings.weight.is_meta
        results.append(model(ids)[0])
    torch.testing.assert_close(results[0], want, rtol=0, atol=2e-5)
    assert torch.equal(*results)
    both = copy.deepcopy(model)(ids)[0]
    assert torch.equal(both, results[1]), "a copy shares the packed table"
