"""Unpad and pad on the device against the plain-torch reference, errors by kind, and attention's tile tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from gpu import DEVICE, cu_seqlens, randn
from test_packing import PAD, SPEC

from xfast import device_packing
from xfast.errors import InvalidInputError, TokenIdError
from xfast.kernels import packing
from xfast.kernels.packing import attention_tiles
from xfast.kernels.tiles import Tile

RULES = ("padding", "columns")
LENGTHS = (9, 1, 17, 0, 13)


def batch_of(
    lengths: tuple[int, ...], width: int, dtype: torch.dtype = torch.int64
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 50, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[~mask] = PAD
    return ids.to(dtype).to(DEVICE), mask.long().to(DEVICE)


Given = torch.Tensor | None


def check(
    rule: str, ids: Given, mask: Given, positions: Given = None, types: Given = None, embeds: Given = None
) -> device_packing.DevicePacked:
    spec = replace(SPEC, position_rule=rule, pad_token_id=PAD)
    packed = device_packing.unpad(spec, ids, mask, types, positions, embeds)
    shape = tuple((ids if ids is not None else embeds).shape[:2])  # type: ignore[union-attr]
    given = [None if t is None else t.cpu() for t in (ids, mask, positions, types)]
    want = reference.unpad(shape, *given, PAD if rule == "padding" else None)  # type: ignore[arg-type]
    total = len(want.indices)
    assert (packed.total_tokens, packed.max_seqlen, packed.first_masked) == (total, want.max_seqlen, want.first_masked)
    rows = packed.rows
    if ids is not None:
        assert want.ids is not None
        np.testing.assert_array_equal(rows.ids[:total].cpu(), want.ids)
    for got, expected in (
        (rows.position_ids[:total], want.position_ids),
        (rows.type_ids[:total], want.type_ids),
        (rows.source[:total], want.indices),
        (rows.cu_seqlens, want.cu_seqlens),
    ):
        np.testing.assert_array_equal(got.cpu(), expected)
    lengths = want.cu_seqlens.diff()
    np.testing.assert_array_equal(rows.row_keys[0, :total].cpu(), want.cu_seqlens[:-1].repeat_interleave(lengths))
    np.testing.assert_array_equal(rows.row_keys[1, :total].cpu(), want.cu_seqlens[1:].repeat_interleave(lengths))
    values = randn(total, 5)
    padded = reference.pad(shape, want.indices, values.cpu())  # type: ignore[arg-type]
    np.testing.assert_array_equal(packed.pad(values, torch.float32).cpu(), padded)
    return packed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ragged_batches(rule: str, dtype: torch.dtype) -> None:
    check(rule, *batch_of(LENGTHS, 17, dtype))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16]
)
def test_masks_of_every_dtype(rule: str, dtype: torch.dtype) -> None:
    ids, mask = batch_of((3, 0, 5), 7)
    check(rule, ids, mask.to(dtype))


@pytest.mark.parametrize("rule", RULES)
def test_holes_left_padding_pad_ids_inside_and_no_mask(rule: str) -> None:
    ids, mask = batch_of((8, 8, 8), 8)
    ids[1, 3] = PAD
    check(rule, ids, None)
    mask[0, 2] = mask[0, 5] = mask[2, 0] = 0
    mask[1, :4] = 0
    assert check(rule, ids, mask).first_masked == 2


@pytest.mark.parametrize("rule", RULES)
def test_given_positions_types_and_embeddings(rule: str) -> None:
    ids, mask = batch_of((4, 6), 6)
    positions = torch.randint(0, 40, (1, 6)).to(DEVICE)
    types = torch.randint(0, 3, (2, 6)).to(DEVICE)
    check(rule, ids, mask, positions, types)
    packed = check(rule, None, mask, embeds=randn(2, 6, SPEC.hidden_size))
    assert packed.embeds is not None and packed.embeds.shape == (12, SPEC.hidden_size)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_batches(shape: tuple[int, int]) -> None:
    packed = device_packing.unpad(SPEC, torch.ones(shape, dtype=torch.long, device=DEVICE))
    assert packed.total_tokens == 0
    assert packed.pad(randn(0, 6), torch.float16).shape == (*shape, 6)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SEQUENCES", 8)


@pytest.mark.parametrize("batch", [7, 8, 9, 21])
def test_more_sequences_than_a_step_takes(small_steps: None, batch: int) -> None:
    lengths = tuple(int(n) for n in torch.randint(0, 8, (batch,)))
    assert check("padding", *batch_of((*lengths[:-1], 7), 7)).max_seqlen == 7
    assert check("padding", *batch_of((7, *lengths[1:]), 7)).max_seqlen == 7


def test_bad_values_and_masked_rows_in_later_steps(small_steps: None) -> None:
    ids, mask = batch_of((4,) * 20, 4)
    mask[[3, 9, 19], 0] = 0
    assert check("padding", ids, mask).first_masked == 3
    ids[[17, 11], 2] = 50
    with pytest.raises(TokenIdError, match=r"input_ids\[11, 2\] is 50"):  # the first of them
        device_packing.unpad(SPEC, ids, mask)


def test_bad_values_are_named_with_their_place() -> None:
    ids, mask = batch_of((5, 5), 5)
    bad = ids.clone()
    bad[1, 2] = 50
    with pytest.raises(TokenIdError, match=r"input_ids\[1, 2\] is 50; accepted: 0 to 49"):
        device_packing.unpad(SPEC, bad, mask)
    bad[1, 2] = -1
    with pytest.raises(TokenIdError, match=r"input_ids\[1, 2\] is -1"):
        device_packing.unpad(SPEC, bad, mask)
    with pytest.raises(TokenIdError, match=r"token_type_ids\[0, 1\] is 3"):
        device_packing.unpad(SPEC, ids, mask, torch.tensor([[0, 3, 0, 0, 0]], device=DEVICE))
    wrong = mask.float()
    wrong[1, 4] = 0.5
    with pytest.raises(InvalidInputError, match=r"attention_mask\[1, 4\] is 0.5"):
        device_packing.unpad(SPEC, ids, wrong)
    long, _ = batch_of((60,), 60)
    with pytest.raises(InvalidInputError, match="outside the table; the model has 40 positions"):
        device_packing.unpad(SPEC, long)


def test_bad_shapes_are_refused_before_a_kernel_runs() -> None:
    ids, mask = batch_of((5, 5), 5)
    for arguments in ((ids.float(), mask), (ids, mask[:1]), (ids, mask[:, :4]), (ids[0], None)):
        with pytest.raises(InvalidInputError):
            device_packing.unpad(SPEC, *arguments)


@pytest.mark.parametrize(
    "lengths", [(70, 0, 3, 130, 64, 1), (5, 40, 3, 0, 17, 17, 90, 64, 1, 33, 17, 2, 0, 70, 8, 66, 5)]
)
@pytest.mark.parametrize("block", [16, 64])
def test_tiles_cover_every_query_once_longest_first(small_steps: None, block: int, lengths: tuple[int, ...]) -> None:
    cu = cu_seqlens(lengths)
    tiles = attention_tiles(cu, cu, sum(lengths), Tile(block, 32, 64, 4, 1))
    table = tiles.table[: int(tiles.count)].cpu()
    rows = sorted(row for first, count, _, _ in table.tolist() for row in range(first, first + count))
    assert rows == list(range(sum(lengths)))
    keys = (table[:, 3] - table[:, 2]).tolist()
    assert keys == sorted(keys, reverse=True)
    for first, count, begin, end in table.tolist():
        assert begin <= first and first + count <= end and count <= block


def test_shared_tiles_hold_consecutive_rows() -> None:
    lengths = (5, 9, 1, 30, 2)
    cu, counts = cu_seqlens(lengths), torch.tensor(lengths, device=DEVICE)
    keys = torch.stack([cu[:-1].repeat_interleave(counts), cu[1:].repeat_interleave(counts)])
    tiles = attention_tiles(cu, cu, sum(lengths), Tile(16, 16, 64, 4, 1), row_keys=keys)
    table = tiles.table[: int(tiles.count)].tolist()
    assert table == [[0, 16, 0, 45], [16, 16, 15, 45], [32, 15, 15, 47]]
