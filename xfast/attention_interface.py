"""``attn_implementation="xfast"``: the varlen attention kernel alone, for any transformers encoder, with gradients.

Registered with transformers when xfast is imported: the attention *and* the mask function, because a name without a
mask function is handed no mask at all and would silently attend to padding (huggingface/transformers PR 45811).

Padded batches are packed for the kernel and padded again after it in every layer; ``xfast.accelerate`` does so once for
the whole encoder and is what inference should use. Where the kernel cannot run (CPU, an odd head_dim), torch's own
attention runs with the same mask: the same results, without the speed.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from xfast.backends.triton import MIN_CAPABILITY
from xfast.errors import InvalidInputError, UnsupportedModelError

NAME = "xfast"
_HARMLESS = frozenset(
    (
        *("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
        *("num_items_in_batch", "deterministic", "output_router_logits", "return_loss", "labels"),
    )
)
"""Arguments that do not change what attention computes; any other that is given is refused."""
_recent = threading.local()  # .packing: the last mask (weakly), its version and its packing; all layers share a mask


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function, from [batch, heads, length, head_dim] to [batch, length, heads, head_dim].

    Padded rows of the result are zeros.

    Raises:
        UnsupportedModelError: causal attention, queries and keys of different lengths, or an argument that may change
            the result (biases, windows, ...).
        InvalidInputError: a mask that is not [batch, length].
    """
    if others.get("is_causal") or getattr(module, "is_causal", False):
        raise UnsupportedModelError(f"{type(module).__name__} is causal; attn_implementation='xfast' is for encoders")
    given = (name for name, value in others.items() if name not in _HARMLESS)
    if unknown := [name for name in given if others[name] is not None and others[name] is not False]:
        name = type(module).__name__
        raise UnsupportedModelError(f"{name} gives {unknown[0]}, which attn_implementation='xfast' does not know")
    if query.shape != key.shape:
        raise UnsupportedModelError(
            "attn_implementation='xfast' is self-attention with as many key heads as query heads; "
            f"got queries {tuple(query.shape)} and keys {tuple(key.shape)}"
        )
    batch, _heads, length, head_dim = query.shape
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        raise InvalidInputError(
            f"attention_mask: expected shape ({batch}, {length}), got {tuple(attention_mask.shape)}; "
            "attn_implementation='xfast' takes 2-D masks only"
        )
    scale = head_dim**-0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may have left them in different types
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if not _kernel_runs(query):
        return _torch_attention(query, key, value, attention_mask, dropout, scale), None
    return _varlen(query, key, value, attention_mask, dropout, scale), None


def dropout_seed(dropout: float) -> int:
    """Which probabilities are dropped: drawn from torch's CPU generator, so ``torch.manual_seed`` repeats it."""
    return int(torch.randint(0, 2**31 - 1, (), device="cpu")) if dropout > 0.0 else 0


def _kernel_runs(query: torch.Tensor) -> bool:
    try:
        from xfast.kernels.attention import HEAD_DIMS
        from xfast.kernels.launch import FLOATS, INTERPRETED, capability_of
    except ImportError:
        return False
    return (
        query.device.type == ("cpu" if INTERPRETED else "cuda")
        and capability_of(query.device) >= MIN_CAPABILITY
        and query.shape[-1] in HEAD_DIMS
        and query.dtype in FLOATS
    )


def _torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float, scale: float
) -> torch.Tensor:
    keep = None if mask is None else mask.bool()[:, None, None, :]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout, scale=scale)
    if mask is not None:
        out = torch.where(mask.bool()[:, None, :, None], out, 0.0)
    return out.transpose(1, 2)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float, scale: float
) -> torch.Tensor:
    from xfast.kernels.attention_grad import VarlenAttention

    batch, heads, length, head_dim = q.shape
    rows = [t.transpose(1, 2).reshape(batch * length, heads, head_dim) for t in (q, k, v)]
    # heads and columns must lie together, which a batch of one may not show
    rows = [t if t.stride()[1:] == (head_dim, 1) else t.contiguous() for t in rows]
    if rows[1].stride() != rows[2].stride():
        rows[1:] = [t.contiguous() for t in rows[1:]]
    seed = dropout_seed(dropout)
    if mask is None:
        cu_seqlens = torch.arange(0, (batch + 1) * length, max(length, 1), dtype=torch.int32, device=q.device)
        cu_seqlens = cu_seqlens[: batch + 1]
        out = VarlenAttention.apply(*rows, cu_seqlens, cu_seqlens, length, scale, dropout, seed)
        return out.view(batch, length, heads, head_dim)
    source, slot, real, cu_seqlens = _packing(mask)
    packed = [t[source] for t in rows]
    out = VarlenAttention.apply(*packed, cu_seqlens, cu_seqlens, length, scale, dropout, seed)
    padded = torch.where(real[:, None, None], out[slot], 0.0)
    return padded.view(batch, length, heads, head_dim)


_Packing = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _packing(mask: torch.Tensor) -> _Packing:
    """Of a mask, kept for the next layer: source of each packed row, packed row of each place, is a token, cu_seqlens.

    Rows without a token point to themselves: backward would serialise tens of thousands that all point to one.
    """
    from xfast.kernels.packing import unpad

    recent = getattr(_recent, "packing", None)
    if recent is not None and recent[0]() is mask and recent[1] == mask._version:
        kept: _Packing = recent[2]
        return kept
    batch, length = mask.shape
    dense = mask.contiguous()
    view = dense.view(torch.uint8) if dense.dtype == torch.bool else dense
    rows = unpad(batch, length, mask.device, None, view, None, None, pad_id=-1, vocab=1, positions=length, types=1)
    places = torch.arange(batch * length, device=mask.device)
    real = rows.slot >= 0
    # Past the last token ``source`` is undefined; how many there are is known to the device alone.
    source = torch.where(places < rows.info[0], rows.source[: batch * length], places)
    packing = (source.long(), torch.where(real, rows.slot, places).long(), real, rows.cu_seqlens)
    if not mask.is_inference():
        _recent.packing = (weakref.ref(mask), mask._version, packing)
    return packing


def attention_mask_of(*_: Any, kv_length: int, **others: Any) -> torch.Tensor | None:
    """transformers' mask function: the [batch, length] mask as it is, or None.

    It never asks whether anything is masked, which would wait for the device.

    Raises:
        UnsupportedModelError: some tokens may not see others: causal, windowed or otherwise restricted attention.
    """
    from transformers import masking_utils

    everyone = getattr(masking_utils, "bidirectional_mask_function", None)  # transformers 4 has causal ones alone
    if everyone is None or others.get("mask_function") is not everyone:
        raise UnsupportedModelError(
            "attn_implementation='xfast' is for encoders in which every token sees every other; this one restricts that"
        )
    mask: torch.Tensor | None = others.get("attention_mask")
    return None if mask is None else mask[:, -kv_length:]


def register() -> None:
    """Makes the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_of)
