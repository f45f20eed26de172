"""Unpad and pad on a GPU: :mod:`xfast.packing`'s contract with tensors that stay on the device.

A forward must know the number of tokens T on the host once: buffers and products have T rows. That number is the only
thing that ever crosses: two small kernels count and check the batch, 32 bytes are copied to pinned memory, and the host
waits for *their* event, not for the stream to drain behind them. Everything that needs the count but not on the host
(positions, offsets, attention's tiles) reads it on the device.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from xfast.architecture import EncoderSpec
from xfast.errors import InvalidInputError
from xfast.kernels import packing as kernels
from xfast.packing import batch_shape, check_ids, check_mask, raise_bad_value

_pinned = threading.local()


@dataclass(frozen=True)
class DevicePacked:
    """A batch without its padding, on the device. See :class:`xfast.packing.Packed`.

    Attributes:
        batch, length: shape of the padded batch.
        total_tokens: T.
        max_seqlen: tokens of the longest sequence.
        first_masked: number of sequences whose column 0 is masked.
        rows: the device's arrays, with room for batch * length tokens.
        embeds: [batch * length, hidden_size] if embeddings were given, else None.
    """

    batch: int
    length: int
    total_tokens: int
    max_seqlen: int
    first_masked: int
    rows: kernels.PackedRows
    embeds: torch.Tensor | None

    def first_rows(self) -> torch.Tensor:
        """int32 [batch], packed rows of the tokens in column 0; only when ``first_masked`` is 0."""
        return self.rows.cu_seqlens[:-1]

    def pad(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T, columns] -> [batch, length, columns] in ``dtype``, zeros at padded positions."""
        if self.total_tokens == self.batch * self.length:
            return packed.to(dtype).view(self.batch, self.length, packed.shape[1])
        return kernels.pad(packed, self.rows.slot, dtype).view(self.batch, self.length, packed.shape[1])


def unpad(
    spec: EncoderSpec,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
) -> DevicePacked:
    """As :func:`xfast.packing.unpad`, on the inputs' device.

    A position outside the table is an InvalidInputError here: the original would poison the CUDA context with a device
    assertion.
    """
    batch, length = batch_shape(spec, input_ids, inputs_embeds)
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    ids = check_ids("input_ids", input_ids, batch, length)
    types = check_ids("token_type_ids", token_type_ids, batch, length)
    positions = check_ids("position_ids", position_ids, batch, length)
    mask = check_mask(attention_mask, batch, length)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    rows = kernels.unpad(
        batch,
        length,
        given.device,
        ids,
        mask,
        positions,
        types,
        pad_id=spec.pad_token_id if spec.position_rule == "padding" else -1,
        vocab=spec.vocab_size,
        positions=spec.max_positions,
        types=spec.type_vocab_size,
    )
    total, longest, first_masked, *places, _ = _read(rows.info)
    for kind, place in zip(("mask", "token", "type", "position"), places, strict=True):
        if place != kernels.FINE:
            at = [place // length, place % length]
            _raise(spec, kind, at, {"mask": mask, "token": ids, "type": types, "position": positions}[kind])
    embeds = (
        None if inputs_embeds is None else inputs_embeds.detach().reshape(batch * length, spec.hidden_size).contiguous()
    )
    return DevicePacked(batch, length, total, longest, first_masked, rows, embeds)


def _read(info: torch.Tensor) -> list[int]:
    """The one wait: for the counts, not for the device."""
    if info.device.type == "cpu":
        return [int(value) for value in info]
    if not hasattr(_pinned, "buffer"):
        with torch.inference_mode(False):  # it is written to in later calls, whatever mode these are in
            _pinned.buffer = torch.empty(info.shape, dtype=info.dtype, device="cpu", pin_memory=True)
    _pinned.buffer.copy_(info, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(info.device))
    done.synchronize()
    return [int(value) for value in _pinned.buffer]


def _raise(spec: EncoderSpec, kind: str, at: list[int], values: torch.Tensor | None) -> None:
    value = None if values is None else values[min(at[0], values.shape[0] - 1), at[1]].item()
    if kind == "position":
        which = f"position {value}" if values is not None else "a position"
        raise InvalidInputError(
            f"{which} at {tuple(at)} lies outside the table; the model has {spec.max_positions} positions"
        )
    raise_bad_value(spec, kind, at, value)
