"""Unpad once before the embeddings, pad once after the last layer.

Everything between works on ``(total_tokens, hidden_size)`` plus ``cu_seqlens``, the convention of FlashAttention's
varlen interface: sequence ``i`` owns packed rows ``cu_seqlens[i] .. cu_seqlens[i + 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from xfast import _C
from xfast.architecture import EncoderSpec
from xfast.errors import InvalidInputError, TokenIdError
from xfast.threads import get_num_threads


class PositionOverflowError(IndexError):
    """A position lies outside the position table; the caller lets the original model raise its own error."""


@dataclass(frozen=True)
class Packed:
    """A batch without its padding. T = total_tokens.

    Attributes:
        batch, length: shape of the padded batch.
        ids: int32 [T], or None when ``embeds`` is given.
        embeds: float32 [T, hidden_size] or None.
        position_ids, type_ids: int32 [T].
        indices: int32 [T], ``row * length + column`` of each packed token.
        cu_seqlens: int32 [batch + 1].
        first_masked: number of sequences whose column 0 is masked.
    """

    batch: int
    length: int
    ids: np.ndarray | None
    embeds: np.ndarray | None
    position_ids: np.ndarray
    type_ids: np.ndarray
    indices: np.ndarray
    cu_seqlens: np.ndarray
    first_masked: int

    @property
    def total_tokens(self) -> int:
        """Number of real tokens."""
        return int(self.indices.shape[0])

    def first_rows(self) -> np.ndarray:
        """int32 packed rows of the tokens in column 0; only when ``first_masked`` is 0."""
        return self.cu_seqlens[:-1]

    def pad(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T, columns] -> [batch, length, columns] in ``dtype``, zeros at padded positions."""
        cols = packed.shape[1]
        if self.total_tokens == self.batch * self.length:
            return packed.to(dtype).view(self.batch, self.length, cols)
        out = torch.empty(self.batch * self.length, cols, dtype=torch.float32, device="cpu")
        _C.pad(packed.float().contiguous().numpy(), self.indices, out.numpy(), get_num_threads())
        return out.view(self.batch, self.length, cols).to(dtype)


ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
"""What an encoder is called with, in the order of :func:`unpad`."""


def unpad(
    spec: EncoderSpec,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
) -> Packed:
    """Drops masked tokens and works out positions, checking every value before a kernel reads it.

    Args:
        spec: sizes and position rule.
        input_ids: integer [batch, length]; exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        attention_mask: [batch, length] of 0 and 1 in any dtype, or None (all real). Zeros may be anywhere.
        token_type_ids, position_ids: integer [batch or 1, length] or None (by the family's rule).
        inputs_embeds: floating [batch, length, hidden_size].

    Raises:
        InvalidInputError: wrong shape or dtype, or mask values other than 0 and 1.
        TokenIdError: a token or type id outside its table, named with its index.
        PositionOverflowError: a sequence longer than the position table.
    """
    batch, length = batch_shape(spec, input_ids, inputs_embeds)
    result = _C.unpad(
        batch,
        length,
        _ids(check_ids("input_ids", input_ids, batch, length)),
        _mask(check_mask(attention_mask, batch, length)),
        _ids(check_ids("position_ids", position_ids, batch, length)),
        _ids(check_ids("token_type_ids", token_type_ids, batch, length)),
        spec.vocab_size,
        spec.max_positions,
        spec.type_vocab_size,
        spec.pad_token_id if spec.position_rule == "padding" else -1,
    )
    if result["error"]:
        raise_bad_value(spec, result["error"], list(result["at"]), result["value"])
    embeds = None
    if inputs_embeds is not None:
        rows = inputs_embeds.detach().reshape(batch * length, spec.hidden_size)
        if result["indices"].shape[0] != batch * length:
            rows = rows[torch.from_numpy(result["indices"]).long()]
        embeds = rows.to(torch.float32).contiguous().numpy()
    return Packed(
        batch=batch,
        length=length,
        ids=result.get("ids"),
        embeds=embeds,
        position_ids=result["position_ids"],
        type_ids=result["type_ids"],
        indices=result["indices"],
        cu_seqlens=result["cu_seqlens"],
        first_masked=result["first_masked"],
    )


def batch_shape(
    spec: EncoderSpec, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[int, int]:
    """(batch, length) of what was given. Raises InvalidInputError on shapes and dtypes that are not accepted."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InvalidInputError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        _check_dense("input_ids", input_ids)
        if input_ids.dim() != 2:
            raise InvalidInputError(f"input_ids: expected shape (batch, length), got {tuple(input_ids.shape)}")
        return input_ids.shape[0], input_ids.shape[1]
    assert inputs_embeds is not None
    _check_dense("inputs_embeds", inputs_embeds)
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != spec.hidden_size or not inputs_embeds.is_floating_point():
        raise InvalidInputError(
            f"inputs_embeds: expected floating values of shape (batch, length, {spec.hidden_size}), "
            f"got {inputs_embeds.dtype} {tuple(inputs_embeds.shape)}"
        )
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def check_ids(name: str, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Integers as contiguous [batch or 1, length]. Raises InvalidInputError on another shape or dtype."""
    if ids is None:
        return None
    if ids.dtype not in (torch.int64, torch.int32):
        raise InvalidInputError(f"{name}: expected int64 or int32 values, got {ids.dtype}")
    _check_dense(name, ids)
    if ids.dim() == 1:  # for every row: only token types and positions come so far
        ids = ids.unsqueeze(0)
    if ids.dim() != 2 or ids.shape[1] != length or ids.shape[0] not in (1, batch):
        raise InvalidInputError(f"{name}: expected shape ({batch}, {length}), got {tuple(ids.shape)}")
    return ids.detach().contiguous()


def check_mask(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """The mask as contiguous [batch, length], its values not looked at. Raises InvalidInputError on another shape."""
    if mask is None:
        return None
    _check_dense("attention_mask", mask)
    if tuple(mask.shape) != (batch, length):
        raise InvalidInputError(f"attention_mask: expected shape ({batch}, {length}), got {tuple(mask.shape)}")
    return mask.detach().contiguous()


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise InvalidInputError(f"{name}: expected a dense tensor, got a {kind} one")


def _ids(ids: torch.Tensor | None) -> np.ndarray | None:
    return None if ids is None else ids.to(torch.int64).numpy()


def _mask(mask: torch.Tensor | None) -> np.ndarray | None:
    if mask is None:
        return None
    if mask.dtype not in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32):
        # Other dtypes: compared as they are, since a conversion could round a wrong value to 0 or 1
        wrong = (mask != 0) & (mask != 1)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise InvalidInputError(_mask_message(at, mask[tuple(at)].item()))
        mask = mask != 0
    return mask.numpy()


def _mask_message(at: list[int], value: object) -> str:
    return f"attention_mask{at} is {value}; accepted: 0 (padding) and 1 (token)"


def raise_bad_value(spec: EncoderSpec, kind: str, at: list[int], value: Any) -> NoReturn:
    """Raises the error for a bad ``value`` at [row, column] ``at`` of the mask, token ids, type ids or positions."""
    if kind == "token":
        raise TokenIdError(f"input_ids{at} is {value:.0f}; accepted: 0 to {spec.vocab_size - 1}")
    if kind == "type":
        raise TokenIdError(f"token_type_ids{at} is {value:.0f}; accepted: 0 to {spec.type_vocab_size - 1}")
    if kind == "mask":
        raise InvalidInputError(_mask_message(at, value))
    raise PositionOverflowError(f"position {value} at {tuple(at)}; the model has {spec.max_positions} positions")
