"""The CPU backend: the compiled extension ``xfast._C``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from xfast import _C
from xfast.architecture import EncoderSpec, EncoderWeights, roles_of
from xfast.backends.base import unusual_norms
from xfast.errors import InvalidOptionError, InvalidWeightsError
from xfast.packing import Packed, unpad
from xfast.recipe import CPU_PRECISIONS, LINEARS, QUANTISED, LinearFormat, PackedWeights, Recipe, StoredFormat, summary
from xfast.tensor_files import as_array
from xfast.threads import get_num_threads


def requested_isa() -> str:
    """The instruction set that ``XFAST_ISA`` asks for, or the fastest one of this CPU.

    Raises:
        InvalidOptionError: unknown name, or this CPU lacks it.
    """
    try:
        return str(_C.check_isa(os.environ.get("XFAST_ISA", "auto").lower()))
    except ValueError as error:
        raise InvalidOptionError(f"XFAST_ISA: {error}") from None


class NativeEngine:
    """A packed encoder on the CPU. With ``packed`` only norms and tables are read from the modules."""

    def __init__(
        self,
        weights: EncoderWeights,
        precision: str,
        packed: PackedWeights | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        spec, recipe = weights.spec, recipe or Recipe()
        recipe.check(spec)
        self.formats: Sequence[Mapping[str, StoredFormat]] = (
            [recipe.stored(layer, precision) for layer in range(spec.num_layers)] if packed is None else packed.formats
        )
        self.precision = precision
        self.device = torch.device("cpu")
        self.spec = spec
        self._encoder = _C.Encoder(_shape(spec, spec.num_layers), precision, requested_isa())
        self._owns_words = packed is not None and packed.words is not None
        self._origin = None if packed is None else packed.origin
        _Packer(self._encoder, weights, precision, recipe).pack(packed)

    def unpad(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Packed:
        """See :class:`xfast.backends.base.Engine`."""
        return unpad(self.spec, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)

    def run(
        self,
        packed: Packed,
        *,
        rows: np.ndarray | None = None,
        layers: int | None = None,
        hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`xfast.backends.base.Engine`."""
        layers = self.spec.num_layers if layers is None else layers
        hidden = self.spec.hidden_size
        plain = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are set to
        out = torch.empty(packed.total_tokens if rows is None else len(rows), hidden, **plain)
        states = torch.empty(layers + 1, packed.total_tokens, hidden, **plain) if hidden_states else None
        self._encoder.forward(
            packed.ids,
            packed.embeds,
            packed.position_ids,
            packed.type_ids,
            packed.cu_seqlens,
            rows,
            layers,
            out.numpy(),
            None if states is None else states.numpy(),
            get_num_threads(),
        )
        return out, states

    @property
    def isa(self) -> str:
        """The instruction set that was chosen when the weights were packed."""
        return self._encoder.isa

    def alert(self) -> None:
        """Wakes sleeping threads, which takes as long as everything else before ``run``. A call is on its way."""
        _C.alert_workers(get_num_threads())

    def own_word_table(self) -> bool:
        """See :class:`xfast.backends.base.Engine`. Quantised: one byte a value, one scale a row."""
        if self.precision in QUANTISED and not self._owns_words:
            self._encoder.quantize_word_table(get_num_threads())
            self._owns_words = True
        return self._owns_words

    def for_copy(self, weights: EncoderWeights) -> NativeEngine:
        """See :class:`xfast.backends.base.Engine`."""
        packer = _Packer(self._encoder, weights, self.precision, Recipe())
        layers = [packer.with_biases(layer, self.packed_layer(layer)) for layer in range(self.spec.num_layers)]
        packed = PackedWeights(layers, self.formats, self.packed_words(), self._origin)
        return NativeEngine(weights, self.precision, packed)

    def packed_layer(self, layer: int) -> dict[str, dict[str, np.ndarray]]:
        """The packed memory of one layer by linear, as :class:`PackedWeights` has it; read-only."""
        return {name: self._encoder.linear(layer, name) for name in LINEARS}

    def packed_words(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The word table in 8 bits a value and its scales, where the engine holds it so."""
        return self._encoder.word_table()

    def describe(self) -> list[str]:
        """See :class:`xfast.backends.base.Engine`."""
        lines = [
            f"instruction set: {self.isa}",
            f"threads: {get_num_threads()}",
            f"packed weights: {self._encoder.packed_bytes / 2**20:.1f} MiB "
            + ("(with the word embeddings, 8 bits a value)" if self._owns_words else "(embeddings are read in place)"),
            "fused: QKV in one product; bias + GELU, bias + residual, LayerNorm and "
            + ("per-token int8 quantisation" if self.precision in QUANTISED else "operand conversion")
            + " where the product leaves its tile; attention over real tokens only",
            *summary(self.formats, self.precision),
        ]
        if self._origin is not None:
            lines.append(
                f"packed weights are mapped from {self._origin}; their layout ({_C.pack_version}) is every target's"
            )
        if any(stored.precision == "bf16" for layer in self.formats for stored in layer.values()):
            lines.append(f"bf16: {self._encoder.bf16_note}")
        return lines


def pack_layer(weights: EncoderWeights, layer: int, precision: str, recipe: Recipe) -> dict[str, dict[str, np.ndarray]]:
    """Packs one layer alone, as :class:`PackedWeights` has it. Raises InvalidWeightsError naming an unusable one."""
    encoder = _C.Encoder(_shape(weights.spec, 1), precision, requested_isa())
    _Packer(encoder, weights, precision, recipe).pack_linears(layer, 0)
    return {name: encoder.linear(0, name) for name in LINEARS}


def _shape(spec: EncoderSpec, layers: int) -> dict[str, float]:
    return {
        "layers": layers,
        "hidden": spec.hidden_size,
        "heads": spec.num_heads,
        "head_dim": spec.head_dim,
        "intermediate": spec.intermediate_size,
        "vocab": spec.vocab_size,
        "positions": spec.max_positions,
        "types": spec.type_vocab_size,
        "eps": spec.layer_norm_eps,
        "pre_norm": spec.norm == "pre",
    }


class NativeBackend:
    """Runs encoders on the CPU."""

    name = "native"

    def supports(
        self, spec: EncoderSpec, device: torch.device, precision: str, recipe: Recipe | None = None
    ) -> str | None:
        """See :class:`xfast.backends.base.Backend`."""
        if device.type != "cpu":
            return f"the model is on {device}, this backend runs on cpu"
        for wanted in (precision, *(recipe.precisions() if recipe else ())):
            if wanted not in CPU_PRECISIONS:
                return f"precision {wanted} is not available on the CPU; available: {', '.join(CPU_PRECISIONS)}"
        return unusual_norms(spec)

    def automatic(self, device: torch.device) -> bool:
        """See :class:`xfast.backends.base.Backend`."""
        return True

    def compile(self, weights: EncoderWeights, precision: str, recipe: Recipe | None = None) -> NativeEngine:
        """See :class:`xfast.backends.base.Backend`."""
        return NativeEngine(weights, precision, recipe=recipe)

    def adopt(
        self, weights: EncoderWeights, precision: str, packed: PackedWeights, device: torch.device
    ) -> NativeEngine:
        """See :class:`xfast.backends.base.Backend`."""
        return NativeEngine(weights, precision, packed)


class _Packer:
    """Copies an encoder's parameters into the packed layout, refusing unusable values by name."""

    def __init__(self, encoder: _C.Encoder, weights: EncoderWeights, precision: str, recipe: Recipe) -> None:
        self._encoder = encoder
        self._weights = weights
        self._precision = precision
        self._recipe = recipe

    def pack(self, packed: PackedWeights | None) -> None:
        spec = self._weights.spec
        self._tables(packed)
        self._norm(-1, "final_norm" if spec.norm == "pre" else "embedding_norm")
        for layer in range(spec.num_layers):
            if packed is None:
                self.pack_linears(layer, layer)
            else:
                for name, arrays in packed.layers[layer].items():
                    stored = packed.formats[layer][name]
                    self._choose(layer, name, LinearFormat(stored.precision, stored.group_size))
                    self._encoder.use_linear(layer, name, **arrays)
            for role in ("attention_norm", "ffn_norm"):
                self._norm(layer, role)

    def pack_linears(self, layer: int, into: int) -> None:
        """Packs the products of ``layer`` as the encoder's layer ``into``."""
        for name in LINEARS:
            self._choose(into, name, self._recipe.of(layer, name, self._precision))
            for i, role in enumerate(roles_of(name)):
                self._linear(layer, role, name, i * self._weights.spec.hidden_size, into)

    def with_biases(self, layer: int, products: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
        """A layer's packed products with the biases that the modules have now."""
        found = {}
        for name, arrays in products.items():
            biases = arrays["bias"].copy()
            for i, role in enumerate(roles_of(name)):
                bias = self._vector(layer, role, "bias")
                if bias is not None:
                    biases[i * len(bias) : (i + 1) * len(bias)] = bias
            found[name] = {**arrays, "bias": biases}
        return found

    def _choose(self, into: int, name: str, chosen: LinearFormat) -> None:
        divisor = None if chosen.divisor is None else np.ascontiguousarray(chosen.divisor)
        self._encoder.choose(into, name, chosen.precision, chosen.group_size, divisor)

    def _array(self, layer: int, role: str) -> np.ndarray:
        return as_array(self._weights.modules[layer, role].weight)

    def _bad(self, layer: int, role: str, parameter: str) -> InvalidWeightsError:
        return InvalidWeightsError(f"{self._weights.names[layer, role]}.{parameter} holds NaN or infinity")

    def _tables(self, packed: PackedWeights | None) -> None:
        words, scale = (None, None) if packed is None or packed.words is None else packed.words
        tables = []
        for role in ("word", "position", "type"):
            if role == "word" and words is not None:
                tables.append(words)
                continue
            table = self._array(-1, role)
            if packed is None and not _C.all_finite(table, get_num_threads()):
                raise self._bad(-1, role, "weight")
            tables.append(table)
        word, position, types = tables
        self._encoder.set_tables(word, position, types, scale)

    def _norm(self, layer: int, role: str) -> None:
        arrays = []
        for parameter in ("weight", "bias"):
            array = self._vector(layer, role, parameter)
            if array is None:
                raise InvalidWeightsError(f"{self._weights.names[layer, role]}.{parameter} is missing")
            arrays.append(array)
        self._encoder.set_norm(layer, role, *arrays)

    def _vector(self, layer: int, role: str, parameter: str) -> np.ndarray | None:
        tensor = getattr(self._weights.modules[layer, role], parameter)
        if tensor is None:
            return None
        values: np.ndarray = tensor.detach().to(torch.float32).contiguous().numpy()
        if not np.isfinite(values).all():
            raise self._bad(layer, role, parameter)
        return values

    def _linear(self, layer: int, role: str, name: str, first: int, into: int) -> None:
        weight = self._array(layer, role)
        bias = self._vector(layer, role, "bias")
        if not self._encoder.set_linear(into, name, first, weight, bias, get_num_threads()):
            raise self._bad(layer, role, "weight")
