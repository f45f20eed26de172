"""Runs of an encoder on calibration batches with single products in other formats, on the CPU and on GPUs.

What chooses among formats (``mixed_precision.py``, ``quantization.py``) sees no backend.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from xfast import _C
from xfast.architecture import EncoderWeights
from xfast.backends.base import Engine
from xfast.backends.native import NativeEngine, pack_layer
from xfast.backends.triton import TritonEngine
from xfast.backends.triton_weights import Packer, Parameters, Weight, size_of
from xfast.calibration import Batch, Product, products_of, relative_error
from xfast.errors import BackendUnavailableError, InvalidInputError
from xfast.quantization_reports import Measured
from xfast.recipe import LINEARS, LinearFormat, PackedWeights, Recipe


class Trials(ABC):
    """Formats of products, each packed once, in any combination.

    Args:
        weights: of the encoder.
        plain: the format of products that are not named.
        layers: that run.

    Attributes:
        exact: what outputs are held against, [T, hidden_size].
        products: of these layers.
        plain: as given: formats are told apart by what they are, not by what they say.
        runs: of the engine so far, over all batches.
    """

    def __init__(self, weights: EncoderWeights, plain: LinearFormat, layers: int) -> None:
        self.weights = weights
        self.products = products_of(layers)
        self.runs = 0
        self.plain = plain
        self._plain = dict.fromkeys(self.products, plain)
        self._plain_error: float | None = None
        self.pack(self._plain)
        self.exact = self._reference()
        if not bool(torch.isfinite(self.exact).all()):
            raise InvalidInputError("calibration: the encoder's output holds NaN or infinity")

    @abstractmethod
    def pack(self, formats: Mapping[Product, LinearFormat]) -> None:
        """Makes formats ready to be run; ``formats`` names every one of ``products``."""

    @abstractmethod
    def bytes(self, formats: Mapping[Product, LinearFormat]) -> int:
        """Of these products, packed."""

    @abstractmethod
    def _reference(self) -> torch.Tensor:
        """For ``exact``."""

    @abstractmethod
    def _run(self, formats: Mapping[Product, LinearFormat]) -> torch.Tensor:
        """Hidden states of all tokens [T, hidden_size]; ``formats`` names every product."""

    def error(self, formats: Mapping[Product, LinearFormat]) -> float:
        """Of all tokens, as in :func:`relative_error`."""
        chosen = {**self._plain, **formats}
        if chosen != self._plain:
            return relative_error(self._outputs(chosen), self.exact)
        if self._plain_error is None:  # asked for as often as there are products
            self._plain_error = relative_error(self._outputs(chosen), self.exact)
        return self._plain_error

    def measure(self, formats: Mapping[Product, LinearFormat]) -> Measured:
        """Everything that is reported of a recipe; ``formats`` names every product."""
        got = self._outputs(formats)
        cosines = torch.nn.functional.cosine_similarity(got.double(), self.exact.double())
        return Measured(
            relative_error(got, self.exact), float(cosines.min()), float(cosines.mean()), self.bytes(formats)
        )

    def _outputs(self, formats: Mapping[Product, LinearFormat]) -> torch.Tensor:
        self.runs += 1
        return self._run(formats)


class NativeTrials(Trials):
    """On the CPU, against fp32, whatever the weights' dtype.

    Packed weights wait in unnamed temporary files (TMPDIR), mapped: several formats of a large model do not fit in
    memory, and those that a run reads come from there.

    Raises:
        BackendUnavailableError: the temporary files cannot be written.
    """

    def __init__(self, weights: EncoderWeights, batches: Sequence[Batch], layers: int | None = None) -> None:
        self._batches = batches
        self._layers = weights.spec.num_layers if layers is None else layers
        self._packed: dict[tuple[Product, LinearFormat], Mapping[str, np.ndarray]] = {}
        super().__init__(weights, LinearFormat("fp32"), self._layers)

    def pack(self, formats: Mapping[Product, LinearFormat]) -> None:
        """See :class:`Trials`."""
        for layer in range(self.weights.spec.num_layers):
            chosen = {name: formats.get((layer, name), self.plain) for name in LINEARS}
            if all(((layer, name), each) in self._packed for name, each in chosen.items()):
                continue
            recipe = Recipe(linears={(layer, name): each for name, each in chosen.items()})
            for name, arrays in _mapped(pack_layer(self.weights, layer, "fp32", recipe)).items():
                self._packed[(layer, name), chosen[name]] = arrays

    def bytes(self, formats: Mapping[Product, LinearFormat]) -> int:
        """See :class:`Trials`."""
        return sum(array.nbytes for each in formats.items() for array in self._packed[each].values())

    def _reference(self) -> torch.Tensor:
        return self._outputs(self._plain)

    def _run(self, formats: Mapping[Product, LinearFormat]) -> torch.Tensor:
        recipe, layers = Recipe(linears=formats), range(self.weights.spec.num_layers)
        every = {**dict.fromkeys(products_of(len(layers)), self.plain), **formats}  # also of layers that do not run
        packed = PackedWeights(
            layers=[{name: self._packed[(i, name), every[i, name]] for name in LINEARS} for i in layers],
            formats=[recipe.stored(i, "fp32") for i in layers],
            words=None,
            origin=None,
        )
        engine = NativeEngine(self.weights, "fp32", packed)
        return torch.cat([engine.run(batch.packed, layers=self._layers)[0] for batch in self._batches])


def _mapped(layer: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The same arrays, read-only, in a file that is gone when they are."""
    try:
        with tempfile.TemporaryFile() as file:
            places = {}
            for name, arrays in layer.items():
                for key, array in arrays.items():
                    file.seek(-file.tell() % _C.chunk_bytes, 1)  # the kernels read packed arrays by chunks
                    places[name, key] = file.tell(), array
                    file.write(np.ascontiguousarray(array).data)
            file.flush()
            mapped = np.memmap(file, np.uint8, "r")
    except OSError as error:
        raise BackendUnavailableError(
            f"packed weights wait in temporary files, which cannot be written: {error}; set TMPDIR to another folder"
        ) from error
    out: dict[str, dict[str, np.ndarray]] = {name: {} for name in layer}
    for (name, key), (begin, array) in places.items():
        out[name][key] = mapped[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    return out


class TritonTrials(Trials):
    """With the Triton backend, against what the original code gives.

    Args:
        weights: of the encoder.
        plain: "bf16", "fp16" or "fp32": what everything is computed in, and products that are not named.
        run: hidden states of all tokens [T, hidden_size] from an engine, after ``layers`` layers.
        reference: the original's, likewise.
        layers: that run.
    """

    def __init__(
        self,
        weights: EncoderWeights,
        plain: str,
        run: Callable[[Engine], torch.Tensor],
        reference: torch.Tensor,
        layers: int,
    ) -> None:
        self._precision, self._engine_outputs, self._given = plain, run, reference
        self._held: dict[tuple[Product, LinearFormat], Weight] = {}
        self._parameters: Parameters | None = None
        super().__init__(weights, LinearFormat(plain), layers)

    def pack(self, formats: Mapping[Product, LinearFormat]) -> None:
        """See :class:`Trials`."""
        packer = Packer(self.weights, self._precision, Recipe(linears=formats))
        if self._parameters is None:  # the plain formats, first
            self._parameters = packer.pack()
            plain = self._parameters.layers
            self._held = {((i, name), each): getattr(plain[i], name) for (i, name), each in formats.items()}
        for key, chosen in formats.items():
            if (key, chosen) not in self._held:
                self._held[key, chosen] = packer.product(*key)

    def bytes(self, formats: Mapping[Product, LinearFormat]) -> int:
        """See :class:`Trials`."""
        return sum(size_of(self._held[each]) for each in formats.items())

    def _reference(self) -> torch.Tensor:
        return self._given

    def _run(self, formats: Mapping[Product, LinearFormat]) -> torch.Tensor:
        assert self._parameters is not None
        layers = list(self._parameters.layers)
        for (i, name), chosen in formats.items():
            layers[i] = replace(layers[i], **cast("Any", {name: self._held[(i, name), chosen]}))
        parameters = replace(self._parameters, layers=tuple(layers))
        device = self._parameters.word.device
        packer = Packer(self.weights, self._precision, Recipe(linears=formats))
        return self._engine_outputs(TritonEngine(self.weights.spec, device, packer, parameters))
