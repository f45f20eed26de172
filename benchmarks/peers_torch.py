"""PyTorch's own ways to run an encoder: eager and fused attention, compiled, and quantised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]


def build(model: nn.Module, precision: str, *, method: str = "sdpa", **_: Any) -> Run:
    """``method``: ``sdpa`` or ``eager`` attention of the stock model, ``compile``, ``dynamic`` or ``torchao``."""
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    if method in ("sdpa", "eager"):
        model.set_attn_implementation(method)
        return run_of(model)
    if method == "compile":
        return run_of(_compiled(model))
    if method == "dynamic":
        return run_of(_quantized(model))
    if method == "torchao":
        return run_of(_torchao(model))
    raise ValueError(f"unknown method {method!r}")


class Encoder(nn.Module):
    """The encoder with tensors in and one tensor out, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def run_of(model: nn.Module) -> Run:
    """A transformers encoder as ``run(input_ids, attention_mask) -> last hidden state``."""

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).last_hidden_state.float().numpy()

    return run


def _compiled(model: nn.Module) -> nn.Module:
    """Inductor with weights as constants, packed for oneDNN; one graph for all shapes."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    model.set_attn_implementation("sdpa")
    return torch.compile(model, dynamic=True)  # type: ignore[return-value]


def _quantized(model: nn.Module) -> nn.Module:
    """Linear layers with int8 weights per channel, activations quantised per call, on torch's x86 engine."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, and still what many people run
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8, inplace=True)


def _torchao(model: nn.Module) -> nn.Module:
    """int8 weights per channel, activations per token; only the compiler makes integer products of it."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _compiled(model)
