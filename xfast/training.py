"""``accelerate(model, training=True)``: fine-tuning without padding.

The encoder's own modules run on packed tokens (every one of them but attention treats each row alone), so gradients,
optimizers, mixed precision and dropout work as they always do; attention is the varlen kernel, forward and backward.
Attention dropout is the original's: probabilities are dropped after the softmax and the rest scaled by 1 / (1 - p),
from a random stream of its own (seeded by torch's, so ``torch.manual_seed`` repeats a run).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xfast.architecture import PRECISION_OF, EncoderSpec, layers_of
from xfast.attention_interface import dropout_seed
from xfast.backends.triton import TritonBackend

if TYPE_CHECKING:
    from xfast.device_packing import DevicePacked


def refusal(module: nn.Module, spec: EncoderSpec, device: torch.device) -> str | None:
    """Why this encoder cannot train on packed tokens as it is now, or None."""
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        return "gradient checkpointing is on"
    if any(parameter.device != device for parameter in module.parameters()):
        return f"the inputs are on {device}, not all parameters are"
    if wrong := {parameter.dtype for parameter in module.parameters()} - PRECISION_OF.keys():
        return f"parameters are {', '.join(sorted(map(str, wrong)))}"
    return unavailable(spec, device)


def current(module: Any, spec: EncoderSpec) -> EncoderSpec:
    """The spec with the tables that the encoder has now: resize_token_embeddings replaces them."""
    tables = module.embeddings
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    vocab, positions, types = (getattr(tables, name).weight.shape[0] for name in names)
    if (vocab, positions, types) == (spec.vocab_size, spec.max_positions, spec.type_vocab_size):
        return spec
    return replace(spec, vocab_size=vocab, max_positions=positions, type_vocab_size=types)


def unavailable(spec: EncoderSpec, device: torch.device) -> str | None:
    """Why ``training=True`` cannot work here, or None."""
    return TritonBackend().supports(spec, device, "fp32")


def pack(spec: EncoderSpec, *inputs: torch.Tensor | None) -> DevicePacked:
    """The batch without its padding; see :func:`xfast.device_packing.unpad`."""
    from xfast.device_packing import unpad

    return unpad(spec, *inputs)


def run(
    module: Any, spec: EncoderSpec, packed: DevicePacked, embeds: torch.Tensor | None, hidden_states: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The encoder's forward on packed tokens, differentiable.

    Args:
        module: the encoder.
        packed: its batch.
        embeds: the batch's ``inputs_embeds``, if it was given these.
        hidden_states: whether the states before each layer are wanted; padded, they are gigabytes.

    Returns:
        [batch, length, hidden_size] with zeros at padded positions, and the hidden states before each layer, alike.
    """
    tokens = packed.total_tokens
    rows = packed.rows
    source = rows.source[:tokens].long()
    x = module.embeddings(
        input_ids=None if embeds is not None else rows.ids[:tokens].long().unsqueeze(0),
        inputs_embeds=None if embeds is None else embeds.reshape(-1, embeds.shape[-1])[source].unsqueeze(0),
        position_ids=rows.position_ids[:tokens].long().unsqueeze(0),
        token_type_ids=rows.type_ids[:tokens].long().unsqueeze(0),
    )[0]

    def padded(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(packed.batch * packed.length, values.shape[1]).index_copy(0, source, values)
        return out.view(packed.batch, packed.length, -1)

    states = []
    for layer in layers_of(module):
        if hidden_states:
            states.append(padded(x))
        x = _layer(layer, x, spec, rows.cu_seqlens, packed.max_seqlen)
    return padded(module.encoder.LayerNorm(x) if spec.final_norm else x), states


def _layer(layer: Any, x: torch.Tensor, spec: EncoderSpec, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """One layer on packed rows [T, hidden_size], by its own modules."""
    from xfast.kernels.attention_grad import VarlenAttention

    attention = layer.attention.self
    shape = (x.shape[0], spec.num_heads, spec.head_dim)
    pre_norm = spec.norm == "pre"
    normed = layer.attention.self_attn_layer_norm(x) if pre_norm else x
    q, k, v = (getattr(attention, name)(normed).view(shape) for name in ("query", "key", "value"))
    dropout = attention.dropout.p if attention.training else 0.0  # as the original asks
    scale = getattr(attention, "scaling", spec.head_dim**-0.5)  # transformers 4 has none in some families
    context = VarlenAttention.apply(q, k, v, cu_seqlens, cu_seqlens, longest, scale, dropout, dropout_seed(dropout))
    middle = layer.attention.output(context.reshape(x.shape), x)
    out: torch.Tensor = layer.output(layer.intermediate(layer.LayerNorm(middle) if pre_norm else middle), middle)
    return out
