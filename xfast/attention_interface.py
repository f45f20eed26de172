"""``attn_implementation="xfast"``: the varlen attention kernel alone, for any transformers encoder, with gradients.

Registered with transformers when xfast is imported: the attention *and* the mask function, because a name without a
mask function is handed no mask at all and would silently attend to padding (huggingface/transformers PR 45811).

Keys and values are packed for the kernel in every layer, queries stay where they are: some models read rows of padding
(SigLIP's text model its last), and in cross-attention the mask says nothing of queries. ``xfast.accelerate`` packs once
for the whole encoder and is what inference should use. Where the kernel cannot run (CPU, an odd head_dim), torch's own
attention runs with the same mask: the same results, without the speed.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from xfast.backends.triton import MIN_CAPABILITY
from xfast.errors import InvalidInputError, UnsupportedModelError
from xfast.watch import version_of

NAME = "xfast"
_HARMLESS = frozenset(
    (
        *("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
        *("num_items_in_batch", "deterministic", "output_router_logits", "return_loss", "labels"),
    )
)
"""Arguments that do not change what attention computes; any other that is given is refused."""
# .packing: the last mask (weakly), its version and its packing, as all layers share a mask; .own: see attention_mask_of
_recent = threading.local()


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

    Rows of a sequence without any token are zeros.

    Raises:
        UnsupportedModelError: causal attention, queries and keys of different lengths, an argument that may change
            the result (biases, windows, ...), or dropout inside somebody's CUDA graph.
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
    """Which probabilities are dropped: drawn from torch's CPU generator, so ``torch.manual_seed`` repeats it.

    Raises:
        UnsupportedModelError: a CUDA graph is being captured, which would drop the same ones for ever.
    """
    if dropout > 0.0 and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModelError(
            "attn_implementation='xfast' draws its dropout on the host: it cannot be part of a CUDA graph; set "
            "attention_probs_dropout_prob to 0"
        )
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
    keep, some = None, None
    if mask is not None:
        some = mask.bool().any(1)[:, None, None, None]  # where there is no key, softmax has nothing to divide by
        keep = mask.bool()[:, None, None, :] | ~some
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout, scale=scale)
    if some is not None:
        out = torch.where(some, out, 0.0)
    return out.transpose(1, 2)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float, scale: float
) -> torch.Tensor:
    from xfast.kernels.attention_grad import VarlenAttention

    batch, heads, length, head_dim = q.shape
    rows = [t.transpose(1, 2).reshape(batch * length, heads, head_dim) for t in (q, k, v)]
    # heads and columns must lie together, which a batch of one may not show
    rows = [t if t.stride()[1:] == (head_dim, 1) else t.contiguous() for t in rows]
    cu_seqlens = torch.arange(0, (batch + 1) * length, max(length, 1), dtype=torch.int32, device=q.device)
    cu_q = cu_k = cu_seqlens[: batch + 1]
    if mask is not None:
        source, cu_k = _packing(mask)
        rows[1:] = [t[source] for t in rows[1:]]
    if rows[1].stride() != rows[2].stride():
        rows[1:] = [t.contiguous() for t in rows[1:]]
    out = VarlenAttention.apply(*rows, cu_q, cu_k, length, scale, dropout, dropout_seed(dropout))
    return out.view(batch, length, heads, head_dim)


_Packing = tuple[torch.Tensor, torch.Tensor]


def _packing(mask: torch.Tensor) -> _Packing:
    """Of a mask, kept for the next layer: source of each packed row, cu_seqlens.

    Rows without a token point to themselves: backward would serialise tens of thousands that all point to one.
    """
    from xfast.kernels.packing import unpad

    # torch.compile would take a mask of the same shape for the same mask
    keeps = not is_dynamo_compiling() and (not mask.is_inference() or _own() is mask)
    recent = getattr(_recent, "packing", None) if keeps else None
    if recent is not None and recent[0]() is mask and recent[1] == version_of(mask):
        kept: _Packing = recent[2]
        if torch.is_inference_mode_enabled() or not kept[0].is_inference():  # else backward could not save it
            return kept
    batch, length = mask.shape
    dense = mask.contiguous()
    view = dense.view(torch.uint8) if dense.dtype == torch.bool else dense
    rows = unpad(batch, length, mask.device, None, view, None, None, pad_id=-1, vocab=1, positions=length, types=1)
    places = torch.arange(batch * length, device=mask.device)
    # Past the last token ``source`` is undefined; how many there are is known to the device alone.
    source = torch.where(places < rows.info[0], rows.source[: batch * length], places)
    packing = (source.long(), rows.cu_seqlens)
    if keeps:
        _recent.packing = (weakref.ref(mask), version_of(mask), packing)
    return packing


def _own() -> torch.Tensor | None:
    own = getattr(_recent, "own", None)
    return None if own is None else own()


def attention_mask_of(*_: Any, kv_length: int, **others: Any) -> torch.Tensor | None:
    """transformers' mask function: the [batch, length] mask as it is, or None.

    It never asks whether anything is masked, which would wait for the device.

    Raises:
        UnsupportedModelError: some tokens may not see others: causal, windowed or otherwise restricted attention; or
            a mask for other queries than the keys, whose shape its user (SigLIP 2's pooling head) reckons with.
    """
    from transformers import masking_utils

    everyone = getattr(masking_utils, "bidirectional_mask_function", None)  # transformers 4 has causal ones alone
    if everyone is None or others.get("mask_function") is not everyone:
        raise UnsupportedModelError(
            "attn_implementation='xfast' is for encoders in which every token sees every other; this one restricts that"
        )
    steps = others.get("cache_position")  # what stands for q_length before transformers 5
    queries = others.get("q_length") if steps is None else len(steps)
    if queries is not None and int(queries) != kv_length:
        raise UnsupportedModelError(
            f"attn_implementation='xfast' is self-attention; got a mask for {int(queries)} queries and {kv_length} keys"
        )
    mask: torch.Tensor | None = others.get("attention_mask")
    if mask is None:
        return None
    mask = mask[:, -kv_length:]
    if not is_dynamo_compiling() and mask.is_inference():
        mask = mask.clone()  # it does not count its changes: a copy for this forward alone will see none
        _recent.own = weakref.ref(mask)
    return mask


def register() -> None:
    """Makes the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_of)
