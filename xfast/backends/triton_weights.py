"""An encoder's parameters as the Triton backend reads them: QKV fused, e4m3 with scales, the rest in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TypeAlias

import numpy as np
import torch

from xfast.architecture import PRECISION_OF, QKV_ROLES, EncoderWeights, roles_of
from xfast.backends.parameters import ParameterReader
from xfast.kernels.integer_weights import IntegerWeights, to_int4, to_int8
from xfast.kernels.packed_layout import unpack, unpack_int4
from xfast.recipe import QUANTISED, LinearFormat, PackedWeights, Recipe

COMPUTED = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "bf16", "int8": "bf16", "int4": "bf16"}
"""What everything but a product's operands (fp8) or weights (int8, int4) is computed in, by an encoder's precision."""

_DTYPES = {precision: dtype for dtype, precision in PRECISION_OF.items()}

_ROWS = 1 << 14  # of a word table that are expanded at once
_QUANTISED = ("fp8", *QUANTISED)

Weight: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor] | IntegerWeights"
"""[out, in] in the computing dtype; e4m3 with one scale an output; or integers."""


def dtype_of(precision: str) -> torch.dtype:
    """What an encoder of this precision computes in."""
    return _DTYPES[COMPUTED[precision]]


def size_of(weight: Weight) -> int:
    """Bytes of one product's weights."""
    if isinstance(weight, IntegerWeights):
        return weight.bytes
    parts = weight if isinstance(weight, tuple) else (weight,)
    return sum(part.numel() * part.element_size() for part in parts)


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


@dataclass(frozen=True)
class Parameters:
    """An encoder's parameters on the device."""

    word: torch.Tensor
    position: torch.Tensor
    type: torch.Tensor
    outer_norm: tuple[torch.Tensor, torch.Tensor]  # of the embeddings (post-norm), after the last layer (pre-norm)
    layers: tuple[Layer, ...]


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in parameters."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else value
    for part in parts if isinstance(parts, (list, tuple)) else ():
        yield from tensors_of(part)


class Packer:
    """Brings parameters into the form kernels read: fused QKV, quantised weights; in place where nothing changes."""

    def __init__(self, weights: EncoderWeights, precision: str, recipe: Recipe) -> None:
        self._weights, self._reader = weights, ParameterReader(weights)
        self.precision, self.recipe = precision, recipe
        self._dtype = dtype_of(precision)
        self.copied_bytes = 0

    def pack(self) -> Parameters:
        layers = tuple(self._layer(layer) for layer in range(self._weights.spec.num_layers))
        word = self._words()
        position, kind = (self._read(-1, role, "weight", keep=True) for role in ("position", "type"))
        outer = self._norm(-1, "final_norm" if self._weights.spec.norm == "pre" else "embedding_norm")
        return Parameters(word, position, kind, outer, layers)

    def _words(self) -> torch.Tensor:
        return self._read(-1, "word", "weight", keep=True)

    def _layer(self, layer: int) -> Layer:
        return Layer(
            qkv=self.product(layer, "qkv"),
            attention_out=self.product(layer, "attention_out"),
            ffn_in=self.product(layer, "ffn_in"),
            ffn_out=self.product(layer, "ffn_out"),
            qkv_bias=self._qkv_bias(layer),
            attention_out_bias=self._bias(layer, "attention_out"),
            ffn_in_bias=self._bias(layer, "ffn_in"),
            ffn_out_bias=self._bias(layer, "ffn_out"),
            attention_norm=self._norm(layer, "attention_norm"),
            ffn_norm=self._norm(layer, "ffn_norm"),
        )

    def product(self, layer: int, name: str) -> Weight:
        """The weights of one product."""
        roles = roles_of(name)
        chosen = self.recipe.of(layer, name, self.precision)
        # Weights that are quantised are rounded once, from what they are
        parts = [self._read(layer, role, "weight", keep=chosen.precision in _QUANTISED) for role in roles]
        weight = self._quantised(torch.cat(parts) if len(parts) > 1 else parts[0], chosen)
        original: torch.Tensor = self._weights.modules[layer, roles[0]].weight
        if not isinstance(weight, torch.Tensor) or weight.data_ptr() != original.data_ptr():
            self.copied_bytes += size_of(weight)
        return weight

    def _quantised(self, weight: torch.Tensor, chosen: LinearFormat) -> Weight:
        if chosen.precision == "fp8":
            from xfast.kernels.quantize import quantize_weight  # not before triton is known to be there

            return quantize_weight(weight)
        if chosen.precision == "int8":
            return to_int8(weight)
        return to_int4(weight, chosen.group_size) if chosen.precision == "int4" else weight

    def _norm(self, layer: int, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read(layer, role, "weight"), self._read(layer, role, "bias")

    def _qkv_bias(self, layer: int) -> torch.Tensor:
        biases = []
        for role in QKV_ROLES:
            bias = self._bias(layer, role)
            biases.append(torch.zeros_like(self._norm(layer, "ffn_norm")[0]) if bias is None else bias)
        return torch.cat(biases)

    def _bias(self, layer: int, role: str) -> torch.Tensor | None:
        return self._read(layer, role, "bias") if self._reader.has(layer, role, "bias") else None

    def _read(self, layer: int, role: str, parameter: str, *, keep: bool = False) -> torch.Tensor:
        """The parameter in the computing dtype (``keep``: its own), contiguous; the original itself where possible."""
        tensor = self._reader.read(layer, role, parameter)
        dtype = tensor.dtype if keep else self._dtype
        return self._reader.rounded(tensor, dtype, layer, role, parameter).contiguous()


class Unpacker(Packer):
    """The same parameters from products that the CPU packed: unpacked one at a time, on the device.

    So a model may be one that the device could not hold in its own type, and the host holds one product at a time
    beside mapped files. Products that are not in integers must be stored in the computing dtype.
    """

    def __init__(self, weights: EncoderWeights, precision: str, packed: PackedWeights, device: torch.device) -> None:
        super().__init__(weights, precision, packed.recipe())
        self._packed, self._device = packed, device

    def product(self, layer: int, name: str) -> Weight:
        """The weights of one product."""
        arrays, stored = self._packed.layers[layer][name], self._packed.formats[layer][name]
        shape, data = self._weights.spec.product_shape(name), self._moved(arrays["data"])
        weight: Weight
        if stored.precision == "int4":
            weight = unpack_int4(data, shape, stored.group_size)
        elif stored.precision == "int8":
            scale = self._moved(arrays["scale"][: shape[0]])[:, None]
            weight = IntegerWeights(unpack(data, torch.int8, shape), scale, shape[1])
        else:
            weight = unpack(data, _DTYPES[stored.precision], shape)
        self.copied_bytes += size_of(weight)
        return weight

    def _words(self) -> torch.Tensor:
        if self._packed.words is None:
            return super()._words()
        values, scale = self._packed.words
        table = torch.empty(values.shape, dtype=self._dtype, device=self._device)
        for begin in range(0, len(values), _ROWS):
            part = slice(begin, begin + _ROWS)
            table[part] = self._moved(values[part]) * self._moved(scale[part])[:, None]
        self.copied_bytes += table.numel() * table.element_size()
        return table

    def _qkv_bias(self, layer: int) -> torch.Tensor:
        return self._packed_bias(layer, "qkv")

    def _bias(self, layer: int, role: str) -> torch.Tensor | None:
        return self._packed_bias(layer, role)

    def _packed_bias(self, layer: int, name: str) -> torch.Tensor:
        outputs, _ = self._weights.spec.product_shape(name)
        return self._moved(self._packed.layers[layer][name]["bias"][:outputs]).to(self._dtype)

    def _moved(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)  # a copy: mapped memory is read-only


class Rebinder(Packer):
    """Products that are packed already, and everything else from the modules of a copy of their model."""

    def __init__(self, weights: EncoderWeights, precision: str, recipe: Recipe, made: Parameters) -> None:
        super().__init__(weights, precision, recipe)
        self._made = made

    def product(self, layer: int, name: str) -> Weight:
        """The weights of one product."""
        weight: Weight = getattr(self._made.layers[layer], name)
        self.copied_bytes += size_of(weight)
        return weight

    def _words(self) -> torch.Tensor:
        return self._made.word if self._weights.modules[-1, "word"].weight.is_meta else super()._words()

    def _qkv_bias(self, layer: int) -> torch.Tensor:
        there = all(self._has_bias(layer, role) for role in QKV_ROLES)
        return super()._qkv_bias(layer) if there else self._made.layers[layer].qkv_bias

    def _bias(self, layer: int, role: str) -> torch.Tensor | None:
        if self._has_bias(layer, role):
            return super()._bias(layer, role)
        packed: torch.Tensor | None = getattr(self._made.layers[layer], f"{role}_bias")
        return packed

    def _has_bias(self, layer: int, role: str) -> bool:
        bias = getattr(self._weights.modules[layer, role], "bias", None)
        return bias is not None and not bias.is_meta
