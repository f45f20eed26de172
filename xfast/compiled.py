"""What torch.compile sees in place of an accelerated encoder: one custom operator, ``xfast::encode``."""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import Any, Protocol

import torch

from xfast.errors import ModelFreedError


class Encoder(Protocol):
    """What the operator runs: an ``EncoderPatch``."""

    def encode(self, call: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """``last_hidden_state`` [batch, length, hidden_size]."""
        ...


_handles = itertools.count()
_encoders: weakref.WeakValueDictionary[int, Encoder] = weakref.WeakValueDictionary()


def register(patch: Encoder) -> int:
    """The number by which graphs name an encoder. It is held weakly."""
    handle = next(_handles)
    _encoders[handle] = patch
    return handle


def registered() -> list[Any]:
    """All that are alive."""
    references = _encoders.valuerefs()  # a list, whatever other threads do
    return [patch for reference in references if (patch := reference()) is not None]


def _tags() -> dict[str, Any]:
    """It waits for the device and replays graphs of its own: no part of somebody else's CUDA graph."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    known = "tags" in inspect.signature(torch.library.custom_op).parameters  # both newer than torch 2.6
    return {"tags": (tag,)} if tag is not None and known else {}


@torch.library.custom_op("xfast::encode", mutates_args=(), **_tags())
def _encode(
    handle: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    patch = _encoders.get(handle)
    if patch is None:
        raise ModelFreedError("the accelerated model behind this compiled graph has been freed")
    call = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
    }
    return patch.encode(call).to(dtype).clone()


@_encode.register_fake
def _(
    handle: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return input_ids.new_empty((*input_ids.shape, hidden_size), dtype=dtype)
