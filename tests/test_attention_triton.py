"""Varlen attention: values in every dtype, head size and tile form, isolation of sequences, gradients, dropout."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from gpu import CAPABILITY, DEVICE, DTYPES, INTERPRETED, NO_NUMPY_WARNINGS, cu_seqlens, poisoned, randn
from reference import assert_within, attention

from xfast.kernels import attention as kernels
from xfast.kernels.attention_grad import VarlenAttention
from xfast.kernels.packing import attention_tiles
from xfast.kernels.tiles import Tile, attention_tile

pytestmark = NO_NUMPY_WARNINGS
LENGTHS = (70, 1, 0, 33, 64, 5, 17)
SHORT = (11, 1, 0, 7, 16, 29, 2, 13)


def row_keys(lengths: tuple[int, ...]) -> torch.Tensor:
    cu = cu_seqlens(lengths)
    counts = torch.tensor(lengths, device=DEVICE)
    return torch.stack([cu[:-1].repeat_interleave(counts), cu[1:].repeat_interleave(counts)])


QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run(qkv: QKV, lengths: tuple[int, ...], tile: Tile, shared: bool = False, **options: object) -> torch.Tensor:
    q, k, v = qkv
    cu = cu_seqlens(lengths)
    tiles = attention_tiles(cu, cu, q.shape[0], tile, row_keys=row_keys(lengths) if shared else None)
    return kernels.attention(q, k, v, tiles, out=poisoned(*q.shape, dtype=q.dtype), **options)  # type: ignore[arg-type]


def by_sequence(qkv: Iterable[torch.Tensor], lengths: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    parts = zip(*(t.cpu().split(lengths) for t in qkv), strict=True)
    return torch.cat([attention(*part, part[0].shape[2] ** -0.5, dtype) for part in parts])


def check(qkv: QKV, lengths: tuple[int, ...], tile: Tile, shared: bool = False) -> None:
    got = run(qkv, lengths, tile, shared).cpu()
    same = by_sequence(qkv, lengths, got.dtype)
    assert_within(got, by_sequence(qkv, lengths, torch.float64), same, what=f"{got.dtype} {tuple(got.shape)}")


def made(lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> QKV:
    q, k, v = (randn(sum(lengths), heads, head_dim, dtype=dtype) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_is_as_accurate_as_torch(head_dim: int, dtype: torch.dtype) -> None:
    check(
        made(LENGTHS, 2, head_dim, dtype), LENGTHS, attention_tile(head_dim, dtype.itemsize, CAPABILITY, max(LENGTHS))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("block_m", [16, 64])
def test_short_sequences_share_tiles(block_m: int, head_dim: int, dtype: torch.dtype) -> None:
    check(made(SHORT, 2, head_dim, dtype), SHORT, Tile(block_m, 32, head_dim, 4, 2), shared=True)


@pytest.mark.parametrize("max_queries", [1, 40, 512])
def test_every_tile_that_is_chosen(max_queries: int) -> None:
    for dtype in DTYPES:
        check(made((129, 1), 1, 64, dtype), (129, 1), attention_tile(64, dtype.itemsize, CAPABILITY, max_queries))


def test_reads_slices_of_a_fused_product() -> None:
    fused = randn(sum(SHORT), 3, 2, 32)
    q, k, v = fused.unbind(1)
    check((q, k, v), SHORT, Tile(16, 16, 32, 4, 1))


def test_selected_queries_see_their_whole_sequence() -> None:
    lengths = (70, 3, 33)
    q, k, v = (randn(106, 2, 64) for _ in range(3))
    rows = torch.tensor([0, 69, 73, 80, 105], device=DEVICE)
    cu_q = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
    tiles = attention_tiles(cu_q, cu_seqlens(lengths), 5, Tile(16, 32, 64, 4, 1))
    part = kernels.attention(q[rows], k, v, tiles, out=poisoned(5, 2, 64, dtype=torch.float32))
    whole = run((q, k, v), lengths, Tile(16, 32, 64, 4, 1))
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=2e-6)


def test_any_number_of_programs_gives_the_same_bits() -> None:
    q, k, v = (randn(sum(LENGTHS), 2, 32, dtype=torch.bfloat16) for _ in range(3))
    tile = Tile(16, 32, 32, 4, 1)
    assert torch.equal(run((q, k, v), LENGTHS, tile, programs=3), run((q, k, v), LENGTHS, tile))


def test_a_sequence_depends_on_no_other_one() -> None:
    q, k, v = (randn(sum(LENGTHS), 2, 64) for _ in range(3))
    tile = Tile(32, 16, 64, 4, 1)
    before = run((q, k, v), LENGTHS, tile)
    for tensor in (q, k, v):
        tensor[:70] = torch.inf  # the longest: its neighbours' last tiles end where its rows begin
    after = run((q, k, v), LENGTHS, tile)
    assert torch.equal(before[70:], after[70:])


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_scores_far_apart(size: float) -> None:
    for shared in (False, True):
        q = torch.ones(40, 1, 16, device=DEVICE)
        k = size * torch.rand(40, 1, 16, device=DEVICE)
        v = randn(40, 1, 16)
        out = run((q, k, v), (30, 10), Tile(16, 16, 16, 4, 1), shared)
        assert torch.isfinite(out).all() and out.abs().max() <= v.abs().max() * (1 + 1e-5)


def test_no_rows() -> None:
    q = randn(0, 2, 64)
    assert run((q, q, q), (0, 0), Tile(64, 64, 64, 4, 1)).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: (q.cpu().to("meta"), q, q), "expected a tensor on"),
        (lambda q: (q[..., :24], q[..., :24], q[..., :24]), "contiguous|head_dim 24"),
        (lambda q: (q, q[:, :1], q), "k: expected"),
        (lambda q: (q, q.half(), q), "k: expected"),
        (lambda q: (q, q[::2], q), "same row stride|same number"),
        (lambda q: (q.transpose(0, 1), q.transpose(0, 1), q.transpose(0, 1)), "contiguous"),
    ],
)
def test_refuses_what_it_cannot_read(change: object, message: str) -> None:
    q = randn(8, 2, 32)
    tiles = attention_tiles(cu_seqlens([8]), cu_seqlens([8]), 8, Tile(16, 16, 32, 4, 1))
    with pytest.raises(ValueError, match=message):
        kernels.attention(*change(q), tiles)  # type: ignore[operator]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.skipif(not INTERPRETED, reason="fp64 products exist in the interpreter only")
def test_gradients_are_those_of_the_forward(head_dim: int, dropout: float) -> None:
    lengths = (17, 1, 0, 5)
    cu = cu_seqlens(lengths)
    inputs = [torch.randn(23, 2, head_dim, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        return VarlenAttention.apply(*qkv, cu, cu, 17, head_dim**-0.5, dropout, 7)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_gradients_are_as_accurate_as_torchs(head_dim: int, dtype: torch.dtype) -> None:
    lengths, cu = (40, 1, 21), cu_seqlens((40, 1, 21))
    q, k, v, grad = (randn(62, 2, head_dim, dtype=dtype) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    VarlenAttention.apply(*leaves, cu, cu, 40, head_dim**-0.5, 0.0, 0).backward(grad)

    def torch_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        mine = [t.cpu().to(dtype).requires_grad_() for t in (q, k, v)]
        by_sequence(mine, lengths, dtype).backward(grad.cpu().to(dtype))
        return [t.grad for t in mine]  # type: ignore[misc]

    for name, leaf, truth, same in zip(
        "qkv", leaves, torch_gradients(torch.float64), torch_gradients(dtype), strict=True
    ):
        assert_within(leaf.grad.cpu(), truth, same, floor=2.0**-19, what=f"d{name} {dtype}")  # type: ignore[union-attr]


def test_dropout_drops_the_asked_share_and_keeps_the_mean() -> None:
    q = torch.zeros(128, 2, 16, device=DEVICE, dtype=torch.float16)  # uniform probabilities
    v = torch.ones_like(q)
    cu = cu_seqlens([128])
    out = VarlenAttention.apply(q, q, v, cu, cu, 128, 1.0, 0.25, 11)
    kept = out[..., 0].float() * 0.75  # the share of keys that a row kept
    assert abs(float(kept.mean()) - 0.75) < 0.012
    assert 0.028 < float(kept.std()) < 0.049  # sqrt(0.25 * 0.75 / 128) = 0.038
    again = VarlenAttention.apply(q, q, v, cu, cu, 128, 1.0, 0.25, 11)
    other = VarlenAttention.apply(q, q, v, cu, cu, 128, 1.0, 0.25, 12)
    assert torch.equal(out, again) and not torch.equal(out, other)
    assert not torch.equal(out[:, 0], out[:, 1])
