"""The protocol every backend implements, and the ordered registry that ``backend="auto"`` walks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from xfast.architecture import EncoderSpec, EncoderWeights
from xfast.errors import BackendUnavailableError
from xfast.recipe import PackedWeights, Recipe


class CannotRunError(Exception):
    """Not an error to the user: an engine cannot run this one call, so the original code does. The message says why."""


class EngineRefusedError(CannotRunError):
    """No call will run on the engine that was asked for by name; the user is told once."""


class Batch(Protocol):
    """A batch without its padding, T tokens: :class:`xfast.packing.Packed` or its twin on a device."""

    @property
    def batch(self) -> int:
        """Sequences."""
        ...

    @property
    def length(self) -> int:
        """Columns of the padded batch."""
        ...

    @property
    def total_tokens(self) -> int:
        """T."""
        ...

    @property
    def first_masked(self) -> int:
        """Sequences whose column 0 is masked."""
        ...

    def first_rows(self) -> Any:
        """int32 packed rows of the tokens in column 0, as the engine's ``run`` takes them."""
        ...

    def pad(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T, columns] -> [batch, length, columns] in ``dtype``, zeros at padded positions."""
        ...


class Engine(Protocol):
    """A compiled encoder. Thread-safe."""

    precision: str
    device: torch.device
    spec: EncoderSpec

    def unpad(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Drops a batch's padding on the engine's device, checking every value. See :func:`xfast.packing.unpad`."""
        ...

    def run(
        self,
        packed: Any,
        *,
        rows: Any = None,
        layers: int | None = None,
        hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs ``layers`` layers (None: all) over packed tokens.

        Args:
            packed: what ``unpad`` made, T tokens.
            rows: int32, ascending packed rows wanted from the last layer, or None for all T.
            layers: number of layers to run.
            hidden_states: also return every layer's output (then ``rows`` must be None).

        Raises:
            CannotRunError: the original code must run this call.

        Returns:
            [len(rows) or T, hidden_size], and [layers + 1, T, hidden_size] or None, in the dtype it computes in.
        """
        ...

    def for_copy(self, weights: EncoderWeights) -> Engine:
        """An engine on the same packed products for a copy of the model; the rest is read from the copy's modules.

        Raises:
            InvalidWeightsError: these hold something unusable.
        """
        ...

    def own_word_table(self) -> bool:
        """Copies the word embeddings if it holds them in a smaller form, so that the originals can go.

        Returns False when it goes on reading the originals. Not while another thread runs the engine.
        """
        ...

    def describe(self) -> list[str]:
        """Lines for ``explain``: hardware, precision, what is fused, memory, remarks."""
        ...


class Backend(Protocol):
    """A way to run encoders on one kind of hardware."""

    name: str

    def supports(
        self, spec: EncoderSpec, device: torch.device, precision: str, recipe: Recipe | None = None
    ) -> str | None:
        """None when the case is supported, else the reason why not."""
        ...

    def automatic(self, device: torch.device) -> bool:
        """Whether ``backend="auto"`` may choose it there; by name it can be had wherever it is supported."""
        ...

    def compile(self, weights: EncoderWeights, precision: str, recipe: Recipe | None = None) -> Engine:
        """Packs the weights, single products as the recipe says.

        Raises:
            InvalidWeightsError: names the first unusable parameter.
            InvalidOptionError: the recipe does not fit the model.
        """
        ...


class PackedBackend(Backend, Protocol):
    """A backend that can start from products that are packed already."""

    def adopt(self, weights: EncoderWeights, precision: str, packed: PackedWeights, device: torch.device) -> Engine:
        """An engine on ``device`` around packed products; everything else is read from the modules of ``weights``.

        Raises:
            BackendUnavailableError: it cannot compute products that are stored like this.
            InvalidWeightsError: names the first unusable parameter.
        """
        ...


def unusual_norms(spec: EncoderSpec) -> str | None:
    """Why LayerNorms sit where no backend expects them, or None."""
    places = (spec.norm, spec.embedding_norm, spec.final_norm)
    if places in (("post", True, False), ("pre", False, True)):
        return None
    return f"LayerNorms {places} (norm, embedding_norm, final_norm) are neither BERT's nor XLM-R-XL's"


_Backend = TypeVar("_Backend", bound=Backend)


def choose(
    backends: Sequence[_Backend],
    name: str,
    spec: EncoderSpec,
    device: torch.device,
    precision: str,
    recipe: Recipe | None = None,
) -> tuple[_Backend | None, list[str]]:
    """The first backend (of that name, unless ``"auto"``) that supports the case, and the others' reasons.

    Raises:
        BackendUnavailableError: a backend asked for by name does not support the case.
    """
    reasons: list[str] = []
    for backend in backends:
        if name not in ("auto", backend.name):
            continue
        reason = backend.supports(spec, device, precision, recipe)
        if reason is None and name == "auto" and not backend.automatic(device):
            reason = f"on {device} it runs only when it is asked for by name"
        if reason is None:
            return backend, reasons
        reasons.append(f"{backend.name}: {reason}")
    if name != "auto":
        raise BackendUnavailableError("; ".join(reasons) or f"there is no backend named {name!r}")
    return None, reasons
