"""How each product of an encoder is stored and computed, where they differ: mixed precision, int4 groups, smoothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from xfast.architecture import EncoderSpec
from xfast.errors import InvalidOptionError, require_one_of

LINEARS = ("qkv", "attention_out", "ffn_in", "ffn_out")
"""The products of a layer; ``qkv``: query, key and value outputs one after another."""

GROUP_SIZES = (32, 64, 128)
"""Consecutive inputs that share one scale in int4."""

DEFAULT_GROUP_SIZE = 64
"""Where nothing is said; artifacts do not name it, so it cannot change within their format."""

QUANTISED = ("int8", "int4")
CPU_PRECISIONS = ("fp32", "bf16", *QUANTISED)
"""What a product can be computed in on the CPU."""

ALL_PRECISIONS = (*CPU_PRECISIONS, "fp16", "fp8")
"""What a product can be computed in by Triton, where int8 and int4 quantise the weights alone."""


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class LinearFormat:
    """One product.

    Attributes:
        precision: "fp32", "bf16", "int8" (weights per output, activations per token) or "int4" (weights per group of
            inputs, activations as in int8); on a GPU also "fp16" and "fp8", and int8 and int4 of weights alone.
        group_size: int4 only, one of 32, 64, 128.
        divisor: fp32 [in_features], positive, or None. The product's inputs are divided by it before they are
            quantised and its weight columns multiplied by it: the same result, spread more evenly (SmoothQuant,
            arXiv 2211.10438). int8 and int4 on the CPU only.
    """

    precision: str
    group_size: int = DEFAULT_GROUP_SIZE
    divisor: np.ndarray | None = None


@dataclass(frozen=True)
class StoredFormat:
    """How a packed product was stored; its divisor, if it had one, lies beside it as ``column_scale`` = 1 / divisor."""

    precision: str
    group_size: int = DEFAULT_GROUP_SIZE
    smoothed: bool = False


@dataclass(frozen=True)
class PackedWeights:
    """Products that are packed already, as csrc/layout.h describes; memory that is read in place where it can be.

    Attributes:
        layers: ``layers[i][product]`` holds uint8 ``data`` and fp32 ``bias``; in int8, fp32 ``scale`` and int32
            ``compensation``; where inputs are divided, fp32 ``column_scale``.
        formats: which is what, likewise.
        words: the int8 word table [vocab, hidden] and its fp32 scales [vocab], or None.
        origin: the artifact that they are mapped from; None: memory.
    """

    layers: Sequence[Mapping[str, Mapping[str, np.ndarray]]]
    formats: Sequence[Mapping[str, StoredFormat]]
    words: tuple[np.ndarray, np.ndarray] | None
    origin: str | None

    def recipe(self) -> Recipe:
        """The formats of all products, but for divisors, which are packed."""
        return Recipe(
            linears={
                (layer, name): LinearFormat(stored.precision, stored.group_size)
                for layer, products in enumerate(self.formats)
                for name, stored in products.items()
            }
        )


@dataclass(frozen=True)
class Recipe:
    """What differs from ``accelerate``'s ``precision``.

    Attributes:
        group_size: of int4 products that ``linears`` does not name.
        linears: by (layer, name of the product, see ``LINEARS``).
        made_for: the encoder that it was made from: accepted by encoders of the same family and sizes only. None: by
            all that it fits.

    Raises:
        InvalidOptionError: a name, size or value is not accepted.
    """

    group_size: int = DEFAULT_GROUP_SIZE
    linears: Mapping[tuple[int, str], LinearFormat] = field(default_factory=dict)
    made_for: EncoderSpec | None = None

    def __post_init__(self) -> None:
        _check_group("recipe.group_size", self.group_size)
        if not isinstance(self.linears, Mapping):
            raise InvalidOptionError(f"recipe.linears: expected a mapping, got {type(self.linears).__name__}")
        for key, chosen in self.linears.items():
            where = f"recipe.linears[{key!r}]"
            if not isinstance(chosen, LinearFormat):
                raise InvalidOptionError(f"{where}: expected a LinearFormat, got {chosen!r}")
            if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], int) and key[1] in LINEARS):
                raise InvalidOptionError(f"{where}: expected (layer, name), names: {', '.join(LINEARS)}")
            require_one_of(f"{where}.precision", chosen.precision, ALL_PRECISIONS)
            _check_group(f"{where}.group_size", chosen.group_size)
            if chosen.divisor is not None:
                _check_divisor(f"{where}.divisor", chosen)

    def of(self, layer: int, name: str, precision: str) -> LinearFormat:
        """The format of one product, ``precision`` being what holds where nothing is said."""
        return self.linears.get((layer, name)) or LinearFormat(precision, self.group_size)

    def stored(self, layer: int, precision: str) -> dict[str, StoredFormat]:
        """The formats of one layer's products by name."""
        chosen = {name: self.of(layer, name, precision) for name in LINEARS}
        return {
            name: StoredFormat(
                f.precision, f.group_size if f.precision == "int4" else DEFAULT_GROUP_SIZE, f.divisor is not None
            )
            for name, f in chosen.items()
        }

    def precisions(self) -> tuple[str, ...]:
        """Those that are named, each once."""
        return tuple(dict.fromkeys(chosen.precision for chosen in self.linears.values()))

    def check(self, spec: EncoderSpec) -> None:
        """Raises InvalidOptionError unless every product that is named exists and every divisor fits its inputs.

        And where it was made for another kind of encoder: there its divisors and precisions mean nothing.
        """
        if self.made_for is not None and _kind(self.made_for) != _kind(spec):
            raise InvalidOptionError(f"recipe: made for {_kind(self.made_for)}; this encoder is {_kind(spec)}")
        for (layer, name), chosen in self.linears.items():
            where = f"recipe.linears[{(layer, name)!r}]"
            if not 0 <= layer < spec.num_layers:
                raise InvalidOptionError(f"{where}: the model has layers 0 to {spec.num_layers - 1}")
            _, inputs = spec.product_shape(name)
            if chosen.divisor is not None and chosen.divisor.shape != (inputs,):
                raise InvalidOptionError(f"{where}.divisor: shape {chosen.divisor.shape}; expected ({inputs},)")


def _kind(spec: EncoderSpec) -> str:
    sizes = f"{spec.num_layers} layers, {spec.num_heads} heads, {spec.hidden_size} x {spec.intermediate_size}"
    return f"{spec.family} of {sizes}"


def summary(formats: Sequence[Mapping[str, StoredFormat]], precision: str) -> list[str]:
    """What ``explain`` says of all layers' products in an engine of this precision, where there is anything to say."""
    every = [stored for layer in formats for stored in layer.values()]
    counts = Counter(
        f"int4, groups of {stored.group_size}" if stored.precision == "int4" else stored.precision for stored in every
    )
    smoothed = sum(stored.smoothed for stored in every)
    lines = []
    if any(stored.precision != precision or precision == "int4" for stored in every):
        lines.append("products: " + "; ".join(f"{count} in {name}" for name, count in counts.most_common()))
    if smoothed:
        lines.append(f"products with smoothed inputs: {smoothed} of {len(every)}")
    return lines


def _check_group(where: str, size: object) -> None:
    if not isinstance(size, int) or size not in GROUP_SIZES:
        raise InvalidOptionError(f"{where}: {size!r} is not accepted; accepted: {', '.join(map(str, GROUP_SIZES))}")


def _check_divisor(where: str, chosen: LinearFormat) -> None:
    divisor = chosen.divisor
    if chosen.precision not in QUANTISED:
        raise InvalidOptionError(f"{where}: only int8 and int4 products take one, this one is {chosen.precision}")
    if not isinstance(divisor, np.ndarray) or divisor.dtype != np.float32 or divisor.ndim != 1:
        raise InvalidOptionError(f"{where}: expected a 1-D float32 array")
    # Its inverse and its products with weights must stay finite.
    if not (np.isfinite(divisor).all() and (divisor >= 1e-6).all() and (divisor <= 1e6).all()):
        raise InvalidOptionError(f"{where}: values must lie between 1e-6 and 1e6")
