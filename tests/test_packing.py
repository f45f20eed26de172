"""unpad and pad against the plain-torch reference: every kind of mask, both position rules, every typed error."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch

import xfast
from xfast.architecture import EncoderSpec
from xfast.errors import InvalidInputError, TokenIdError
from xfast.packing import Packed, PositionOverflowError, unpad

PAD = 1
SPEC = EncoderSpec(
    family="xlm-roberta",
    num_layers=1,
    hidden_size=6,
    num_heads=2,
    head_dim=3,
    intermediate_size=8,
    vocab_size=50,
    max_positions=40,
    type_vocab_size=3,
    layer_norm_eps=1e-5,
    activation="gelu",
    norm="post",
    position_rule="padding",
    pad_token_id=PAD,
)
RULES = ("padding", "columns")
LENGTHS = [5, 0, 9, 1, 3]


def spec_of(rule: str) -> EncoderSpec:
    return replace(SPEC, position_rule=rule)


def batch_of(lengths: list[int], length: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, L] as a tokenizer pads them, with pad ids and zeros on one side."""
    ids, mask = torch.full((len(lengths), length), PAD), torch.zeros(len(lengths), length, dtype=torch.int64)
    for row, n in enumerate(lengths):
        columns = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, columns] = torch.randint(2, SPEC.vocab_size, (n,))
        mask[row, columns] = 1
    return ids, mask


def check(rule: str, ids: torch.Tensor | None, mask: torch.Tensor | None = None, **more: torch.Tensor) -> Packed:
    """unpad equals the reference in every field; returns the result."""
    embeds = more.get("inputs_embeds")
    shape = tuple(ids.shape) if ids is not None else tuple(embeds.shape[:2])
    packed = unpad(spec_of(rule), ids, mask, **more)
    pad_id = PAD if rule == "padding" else None
    want = reference.unpad(shape, ids, mask, more.get("position_ids"), more.get("token_type_ids"), pad_id)
    assert (packed.batch, packed.length) == shape
    assert (packed.ids is None) == (ids is None)
    for name in ("ids", "position_ids", "type_ids", "indices", "cu_seqlens"):
        got, expected = getattr(packed, name), getattr(want, name)
        if got is not None:
            assert got.dtype == np.int32 and got.flags.c_contiguous, name
            assert got.tolist() == expected.tolist(), name
    assert packed.first_masked == want.first_masked
    assert packed.total_tokens == len(want.indices)
    if embeds is not None:
        expected = embeds.detach().float().reshape(-1, SPEC.hidden_size)[want.indices]
        assert packed.embeds.dtype == np.float32 and packed.embeds.flags.c_contiguous
        np.testing.assert_array_equal(packed.embeds, expected.numpy())
    return packed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches(rule: str, side: str) -> None:
    for lengths, length in ((LENGTHS, 9), (LENGTHS, 12), ([0, 0], 4), ([7], 7), ([1], 1), ([0], 1), ([1, 0, 1], 1)):
        ids, mask = batch_of(lengths, length, side)
        packed = check(rule, ids, mask)
        assert np.diff(packed.cu_seqlens).tolist() == lengths


@pytest.mark.parametrize("rule", RULES)
def test_random_masks_with_holes(rule: str, rng: np.random.Generator) -> None:
    for _ in range(50):
        shape = tuple(rng.integers(1, 13, 2))
        ids = torch.from_numpy(rng.integers(0, 4, shape))  # pad ids anywhere, masked or not
        mask = torch.from_numpy((rng.random(shape) < rng.random()).astype(np.int64))
        check(rule, ids, mask)


@pytest.mark.parametrize("rule", RULES)
def test_pad_ids_and_mask_disagree(rule: str) -> None:
    ids = torch.tensor([[5, PAD, 6, PAD, 7], [PAD, 5, PAD, 6, 7], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 1, 1]])
    packed = check(rule, ids, mask)
    if rule == "padding":  # spelt out: pad ids keep the padding position and masked tokens still count
        assert packed.position_ids.tolist() == [2, 1, 3, 1, 4, 2, 1, 4, 2, 5, 6]
    assert packed.first_masked == 1


@pytest.mark.parametrize("rule", RULES)
def test_no_mask_keeps_pad_ids(rule: str) -> None:
    ids, _ = batch_of(LENGTHS, 9)
    assert check(rule, ids).total_tokens == ids.numel()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)], ids=str)
def test_empty_batches(rule: str, shape: tuple[int, int]) -> None:
    ids = torch.full(shape, 7)
    for mask in (None, torch.ones(shape)):
        packed = check(rule, ids, mask)
        padded = packed.pad(torch.ones(packed.total_tokens, 6), torch.float32)
        assert tuple(padded.shape) == (*shape, 6)


MASK_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
MASK_DTYPES += [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    ids, mask = batch_of(LENGTHS, 10, "left")
    mask[2, 4] = 0
    check("padding", ids, mask.to(dtype))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_given_types_and_positions(rule: str, dtype: torch.dtype) -> None:
    ids, mask = batch_of(LENGTHS, 9)
    shape = ids.shape
    types, positions = torch.randint(0, 3, shape, dtype=dtype), torch.randint(0, 40, shape, dtype=dtype)
    check(rule, ids.to(dtype), mask, token_type_ids=types)
    check(rule, ids.to(dtype), mask, position_ids=positions)
    check(rule, ids.to(dtype), mask, position_ids=positions[:1], token_type_ids=types[:1])
    check(rule, ids.to(dtype), mask, position_ids=positions[0])
    check(rule, ids[:1].to(dtype), mask[:1], position_ids=positions[:1], token_type_ids=types[:1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inputs_embeds(rule: str, dtype: torch.dtype) -> None:
    _, mask = batch_of(LENGTHS, 9, "left")
    embeds = torch.randn(5, 9, 6, dtype=dtype)
    check(rule, None, mask, inputs_embeds=embeds)
    check(rule, None, inputs_embeds=embeds)
    check(rule, None, mask, inputs_embeds=embeds.clone().requires_grad_())
    check(rule, None, mask.T[:5, :5].contiguous(), inputs_embeds=embeds.transpose(0, 1)[:5, :5])
    check(rule, None, torch.zeros(5, 9), inputs_embeds=embeds)
    check(rule, None, inputs_embeds=embeds[:0])


def test_tensors_that_are_not_contiguous() -> None:
    ids, mask = batch_of([5, 9, 3, 9, 1, 9], 9)
    types, positions = torch.randint(0, 3, ids.shape), torch.randint(0, 40, ids.shape)
    views = (lambda t: t[::2], lambda t: t[:, ::2], lambda t: t.T, lambda t: t[:1].expand(4, 9), lambda t: t.flip(0))
    for view in views:
        check("padding", view(ids), view(mask), token_type_ids=view(types), position_ids=view(positions))


def test_results_are_copies() -> None:
    # The caller may overwrite its tensors as soon as the call is over.
    ids, mask = batch_of([4, 4], 4)
    packed = unpad(SPEC, ids, mask)
    before = packed.ids.tolist()
    ids.zero_()
    assert packed.ids.tolist() == before


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_pad_puts_rows_back_and_zeros_elsewhere(threads: int) -> None:
    for lengths, length, cols in ((LENGTHS, 9, 6), ([0, 0], 3, 5), ([300, 1, 0, 17], 300, 33), ([2], 5, 1)):
        ids, mask = batch_of(lengths, length)
        packed = unpad(replace(SPEC, max_positions=400), ids, mask)
        rows = torch.randn(packed.total_tokens, cols)
        xfast.set_num_threads(threads)
        got = packed.pad(rows, torch.float32)
        xfast.set_num_threads(None)
        want = reference.pad((len(lengths), length), torch.from_numpy(packed.indices), rows)
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_pad_overwrites_whatever_the_output_held() -> None:
    from xfast import _C

    out = np.full((7, 3), np.nan, np.float32)
    _C.pad(np.ones((2, 3), np.float32), np.array([1, 5], np.int32), out, 2)
    assert out.sum(axis=1).tolist() == [0, 3, 0, 0, 0, 3, 0]


def test_first_rows() -> None:
    ids, mask = batch_of([3, 1, 4], 4)
    packed = unpad(SPEC, ids, mask)
    rows = packed.first_rows()
    assert packed.first_masked == 0 and rows.dtype == np.int32
    assert packed.indices[rows].tolist() == [0, 4, 8]


IDS, MASK = torch.full((2, 5), 7), torch.ones(2, 5, dtype=torch.int64)


def changed(tensor: torch.Tensor, value: float, at: tuple[int, int] = (1, 3)) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize("value", [-1, 50, 2**31, 2**32 + 7, -(2**40), 2**63 - 1])
@pytest.mark.parametrize("masked", [False, True])
def test_a_token_outside_the_vocabulary_is_named(value: int, masked: bool) -> None:
    # Masked tokens too: the original looks them up as well and fails.
    mask = changed(MASK, 0) if masked else MASK
    with pytest.raises(TokenIdError, match=rf"^input_ids\[1, 3\] is {value if value < 2**53 else ''}.*: 0 to 49$"):
        unpad(SPEC, changed(IDS, value), mask)


@pytest.mark.parametrize("value", [-1, 3, 2**32])
def test_a_type_outside_its_table_is_named(value: int) -> None:
    types = torch.zeros_like(IDS)
    with pytest.raises(TokenIdError, match=rf"^token_type_ids\[1, 3\] is {value}; accepted: 0 to 2$"):
        unpad(SPEC, IDS, MASK, changed(types, value))
    with pytest.raises(TokenIdError, match=rf"^token_type_ids\[0, 4\] is {value}; accepted: 0 to 2$"):
        unpad(SPEC, IDS, MASK, changed(types, value, (0, 4))[:1])


@pytest.mark.parametrize("value", [2, -1, 2**40, 0.5, -10000.0, float("nan"), float("inf"), float("-inf")])
def test_a_mask_value_other_than_0_and_1_is_named(value: float) -> None:
    dtypes = (torch.int64,) if isinstance(value, int) else (torch.float32, torch.float64)
    text = re.escape(f"attention_mask[1, 3] is {float(value)}; accepted: 0 (padding) and 1 (token)")
    for dtype in dtypes:
        with pytest.raises(InvalidInputError, match=f"^{text}$"):
            unpad(SPEC, IDS, changed(MASK.to(dtype), value))


def test_a_double_mask_is_not_rounded_before_it_is_checked() -> None:
    # 1 + 1e-12 is 1 and 1e-50 is 0 in fp32.
    for value in (1 + 1e-12, 1e-50):
        with pytest.raises(InvalidInputError, match=r"^attention_mask\[1, 3\]"):
            unpad(SPEC, IDS, changed(MASK.double(), value))


@pytest.mark.parametrize(("value", "at"), [(40, (1, 3)), (-1, (0, 0)), (2**33, (1, 4))])
def test_a_position_outside_its_table(value: int, at: tuple[int, int]) -> None:
    positions = changed(torch.zeros_like(IDS), value, at)
    with pytest.raises(PositionOverflowError, match=rf"position {value}(\.0)? at \({at[0]}, {at[1]}\).*40 positions"):
        unpad(SPEC, IDS, MASK, position_ids=positions)


@pytest.mark.parametrize(("rule", "longest"), [("padding", 38), ("columns", 40)])
def test_the_longest_sequence(rule: str, longest: int) -> None:
    # RoBERTa's positions start at pad_token_id + 1 = 2, so two rows of the table are lost.
    for rows in (1, 3):
        check(rule, torch.full((rows, longest), 7))
        with pytest.raises(PositionOverflowError):
            unpad(spec_of(rule), torch.full((rows, longest + 1), 7))
        check(rule, None, inputs_embeds=torch.zeros(rows, longest, 6))
        with pytest.raises(PositionOverflowError):
            unpad(spec_of(rule), None, inputs_embeds=torch.zeros(rows, longest + 1, 6))


def test_a_long_row_of_padding_is_not_a_long_sequence() -> None:
    ids, mask = batch_of([38, 2], 60)
    check("padding", ids, mask)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    "both": ({"inputs_embeds": torch.zeros(2, 5, 6)}, "exactly one of input_ids and inputs_embeds"),
    "ids 1-D": ({"input_ids": torch.zeros(5, dtype=torch.int64)}, r"^input_ids: .*\(5,\)"),
    "ids 3-D": ({"input_ids": torch.zeros(2, 5, 1, dtype=torch.int64)}, r"^input_ids: .*\(2, 5, 1\)"),
    "ids float": ({"input_ids": torch.zeros(2, 5)}, "^input_ids: .*int64 or int32.*float32"),
    "ids bool": ({"input_ids": torch.zeros(2, 5, dtype=torch.bool)}, "^input_ids: .*torch.bool"),
    "mask shape": ({"attention_mask": torch.ones(2, 4)}, r"^attention_mask: .*\(2, 5\), got \(2, 4\)"),
    "ids sparse": ({"input_ids": IDS.to_sparse()}, "^input_ids: expected a dense tensor, got a torch.sparse_coo"),
    "mask sparse": ({"attention_mask": MASK.to_sparse()}, "^attention_mask: expected a dense tensor"),
    "types sparse": ({"token_type_ids": IDS.to_sparse()}, "^token_type_ids: expected a dense tensor"),
    "mask 1-D": ({"attention_mask": torch.ones(5)}, r"^attention_mask: .*\(2, 5\), got \(5,\)"),
    "types shape": ({"token_type_ids": IDS[:, :4]}, r"^token_type_ids: .*\(2, 5\), got \(2, 4\)"),
    "types batch": ({"token_type_ids": IDS.repeat(2, 1)}, r"^token_type_ids: .*\(2, 5\), got \(4, 5\)"),
    "types dtype": ({"token_type_ids": MASK.double()}, "^token_type_ids: .*float64"),
    "positions shape": ({"position_ids": IDS[:, :4]}, r"^position_ids: .*\(2, 5\), got \(2, 4\)"),
    "positions 1-D": ({"position_ids": IDS[0, :4]}, r"^position_ids: .*\(2, 5\), got \(1, 4\)"),
    "positions dtype": ({"position_ids": MASK.bool()}, "^position_ids: .*torch.bool"),
    "embeds 2-D": ({"input_ids": None, "inputs_embeds": torch.zeros(5, 6)}, r"^inputs_embeds: .*\(5, 6\)"),
    "embeds width": ({"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 7)}, r"^inputs_embeds: .*6\), got"),
    "embeds dtype": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 6, dtype=torch.int64)},
        "^inputs_embeds: .*int64",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(InvalidInputError, match=message):
        unpad(SPEC, **{"input_ids": IDS, **arguments})
