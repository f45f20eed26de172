"""An encoder's parameters as the Triton backend reads them: QKV fused, e4m3 with scales, the rest in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from xfast.architecture import EncoderWeights
from xfast.backends.parameters import ParameterReader

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""What each precision computes in; fp8 is that of the products' operands only."""

_QKV = ("query", "key", "value")

Weight: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
"""[out, in] in the computing dtype, or e4m3 with one scale an output."""


@dataclass(frozen=True)
class Layer:
    """One layer's parameters on the device. Biases and LayerNorm parameters in the computing dtype."""

    qkv: Weight
    attention_out: Weight
    ffn_in: Weight
    ffn_out: Weight
    qkv_bias: torch.Tensor
    attention_out_bias: torch.Tensor | None
    ffn_in_bias: torch.Tensor | None
    ffn_out_bias: torch.Tensor | None
    attention_norm: tuple[torch.Tensor, torch.Tensor]
    ffn_norm: tuple[torch.Tensor, torch.Tensor]

    @property
    def fp8(self) -> bool:
        """Whether its products are e4m3."""
        return isinstance(self.qkv, tuple)


@dataclass(frozen=True)
class Parameters:
    """An encoder's parameters on the device."""

    word: torch.Tensor
    position: torch.Tensor
    type: torch.Tensor
    outer_norm: tuple[torch.Tensor, torch.Tensor]  # of the embeddings (post-norm), after the last layer (pre-norm)
    layers: tuple[Layer, ...]


class Packer:
    """Brings parameters into the form kernels read: fused QKV, e4m3 with scales; in place where nothing changes."""

    def __init__(self, weights: EncoderWeights, precision: str) -> None:
        self._weights, self._reader = weights, ParameterReader(weights)
        self._fp8 = precision == "fp8"
        self._dtype = DTYPES[precision]
        self.copied_bytes = 0

    def pack(self) -> Parameters:
        layers = tuple(self._layer(layer) for layer in range(self._weights.spec.num_layers))
        word, position, kind = (self._read(-1, role, "weight", keep=True) for role in ("word", "position", "type"))
        outer = self._norm(-1, "final_norm" if self._weights.spec.norm == "pre" else "embedding_norm")
        return Parameters(word, position, kind, outer, layers)

    def _layer(self, layer: int) -> Layer:
        spec = self._weights.spec
        roles = ("query", "key", "value")
        biases = []
        for role in roles:
            bias = self._bias(layer, role)
            biases.append(torch.zeros_like(self._norm(layer, "ffn_norm")[0]) if bias is None else bias)
        qkv = torch.cat([self._read(layer, role, "weight") for role in roles])
        self.copied_bytes += qkv.numel() * qkv.element_size() if not self._fp8 else 0
        assert qkv.shape == (3 * spec.hidden_size, spec.hidden_size)
        return Layer(
            qkv=self._weight(qkv),
            attention_out=self._weight(self._read(layer, "attention_out", "weight")),
            ffn_in=self._weight(self._read(layer, "ffn_in", "weight")),
            ffn_out=self._weight(self._read(layer, "ffn_out", "weight")),
            qkv_bias=torch.cat(biases),
            attention_out_bias=self._bias(layer, "attention_out"),
            ffn_in_bias=self._bias(layer, "ffn_in"),
            ffn_out_bias=self._bias(layer, "ffn_out"),
            attention_norm=self._norm(layer, "attention_norm"),
            ffn_norm=self._norm(layer, "ffn_norm"),
        )

    def _weight(self, weight: torch.Tensor) -> Weight:
        if not self._fp8:
            return weight
        from xfast.kernels.quantize import quantize_weight

        quantised = quantize_weight(weight)
        self.copied_bytes += weight.numel() + 4 * weight.shape[0]
        return quantised

    def _norm(self, layer: int, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read(layer, role, "weight"), self._read(layer, role, "bias")

    def _bias(self, layer: int, role: str) -> torch.Tensor | None:
        return self._read(layer, role, "bias") if self._reader.has(layer, role, "bias") else None

    def _read(self, layer: int, role: str, parameter: str, *, keep: bool = False) -> torch.Tensor:
        """The parameter in the computing dtype (``keep``: its own), contiguous; the original itself where possible."""
        tensor = self._reader.read(layer, role, parameter)
        dtype = tensor.dtype if keep else self._dtype
        out = self._reader.rounded(tensor, dtype, layer, role, parameter).contiguous()
        if out.data_ptr() != tensor.data_ptr() and parameter == "weight" and not self._fp8 and role not in _QKV:
            self.copied_bytes += out.numel() * out.element_size()
        return out
