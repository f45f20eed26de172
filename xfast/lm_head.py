"""The masked-LM head behind an encoder that runs on the CPU: one native call over real tokens.

Its decoder is by far the largest product of such a model (XLM-R: 768 or 1024 by 250,002, more operations than all
layers of the base encoder) and usually the word embeddings' own table. So its weights are read where torch keeps them
(``csrc/gemm_in_place.h``): no second copy, and a changed weight is seen by the next call. They are never quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import nn

from xfast import _C
from xfast.architecture import PRECISION_OF, is_exact_gelu, is_plain_tensor, is_stock
from xfast.backends.native import NativeEngine
from xfast.packing import Packed
from xfast.tensor_files import as_array
from xfast.threads import get_num_threads


@dataclass(frozen=True)
class _Layout:
    """Classes of a head and the paths of its parts below it. ``activation``: a module, where the class has one."""

    classes: tuple[str, ...]
    dense: str
    norm: str
    decoder: str
    activation: str | None = None


_LAYOUTS = (
    _Layout(
        ("XLMRobertaLMHead", "XLMRobertaXLLMHead", "RobertaLMHead", "CamembertLMHead"), "dense", "layer_norm", "decoder"
    ),
    _Layout(
        ("BertOnlyMLMHead",),
        "predictions.transform.dense",
        "predictions.transform.LayerNorm",
        "predictions.decoder",
        "predictions.transform.transform_act_fn",
    ),
)


@dataclass(frozen=True)
class LmHead:
    """logits = decoder(norm(gelu(dense(x)))): the parts of one head."""

    dense: nn.Linear
    norm: nn.LayerNorm
    decoder: nn.Linear

    def parameters(self) -> Iterator[torch.Tensor]:
        """Everything the head computes with."""
        for part in (self.dense, self.norm, self.decoder):
            yield from (tensor for tensor in (part.weight, part.bias) if tensor is not None)


def find(module: nn.Module) -> LmHead | None:
    """The parts of ``module`` if it is a head of transformers that :func:`logits` can stand in for, else None."""
    cls = type(module)
    layout = next((row for row in _LAYOUTS if cls.__name__ in row.classes), None)
    if layout is None or not is_stock(cls):
        return None
    if layout.activation is not None and not is_exact_gelu(attrgetter(layout.activation)(module)):
        return None
    dense, norm, decoder = (attrgetter(path)(module) for path in (layout.dense, layout.norm, layout.decoder))
    if (type(dense), type(norm), type(decoder)) != (nn.Linear, nn.LayerNorm, nn.Linear):
        return None
    head, hidden = LmHead(dense, norm, decoder), decoder.in_features
    shapes = [tuple(tensor.shape) for tensor in (dense.weight, decoder.weight)]
    fits = shapes == [(hidden, hidden), (decoder.out_features, hidden)] and norm.normalized_shape == (hidden,)
    return head if fits and None not in (dense.bias, norm.weight, norm.bias) else None


def usable(head: LmHead) -> bool:
    """Whether its parameters are plain arrays, and nothing asks for another arithmetic."""
    tensors = list(head.parameters())
    dtype = head.decoder.weight.dtype
    return (
        dtype in PRECISION_OF
        and not torch.is_autocast_enabled("cpu")
        and all(is_plain_tensor(t) and t.device.type == "cpu" for t in tensors)
        and all(t.dtype == dtype and t.is_contiguous() for t in tensors)
    )


def precision_for(engine: NativeEngine) -> str:
    """The precision of the head's products behind an encoder.

    fp32 behind fp32. Otherwise bf16 where the CPU has a fast instruction and fp32 where it has not: eight bits would be
    faster, but logits decide which word is first.
    """
    return "bf16" if engine.precision != "fp32" and _C.bf16_instruction(engine.isa) else "fp32"


def logits(head: LmHead, hidden: torch.Tensor, packed: Packed, engine: NativeEngine) -> torch.Tensor:
    """The head's outputs for packed tokens, padded.

    Args:
        head: from :func:`find`, and :func:`usable`.
        hidden: [total_tokens, hidden_size], the encoder's output.
        packed: which tokens these are.
        engine: the encoder's.

    Returns:
        [batch, length, vocab_size] in the decoder's dtype; zeros at padded positions.
    """
    dtype, outputs = head.decoder.weight.dtype, head.decoder.out_features
    computed = torch.float32 if dtype == torch.float16 else dtype
    out = torch.empty(packed.batch * packed.length, outputs, dtype=computed, device="cpu")
    _C.lm_head(
        engine.isa,
        precision_for(engine),
        hidden.to(torch.float32).contiguous().numpy(),
        as_array(head.dense.weight),
        _vector(head.dense.bias),
        _vector(head.norm.weight),
        _vector(head.norm.bias),
        head.norm.eps,
        as_array(head.decoder.weight),
        None if head.decoder.bias is None else _vector(head.decoder.bias),
        packed.indices,
        as_array(out),
        get_num_threads(),
    )
    return out.view(packed.batch, packed.length, outputs).to(dtype)


def _vector(tensor: torch.Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().to(torch.float32).contiguous().numpy()
    return values
