"""The protocol every backend implements, and the ordered registry that ``backend="auto"`` walks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from xfast.architecture import EncoderSpec, EncoderWeights
from xfast.errors import BackendUnavailableError
from xfast.packing import Packed


class Engine(Protocol):
    """A compiled encoder. Thread-safe."""

    precision: str

    def run(
        self,
        packed: Packed,
        *,
        rows: np.ndarray | None = None,
        layers: int | None = None,
        hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs ``layers`` layers (None: all) over packed tokens.

        Args:
            packed: the batch, T tokens.
            rows: int32, ascending packed rows wanted from the last layer, or None for all T.
            layers: number of layers to run.
            hidden_states: also return every layer's output (then ``rows`` must be None).

        Returns:
            fp32 [len(rows) or T, hidden_size], and fp32 [layers + 1, T, hidden_size] or None.
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

    def supports(self, spec: EncoderSpec, device: torch.device, precision: str) -> str | None:
        """None when the case is supported, else the reason why not."""
        ...

    def compile(self, weights: EncoderWeights, precision: str) -> Engine:
        """Packs the weights. Raises InvalidWeightsError naming the first unusable parameter."""
        ...


def choose(
    backends: Sequence[Backend], name: str, spec: EncoderSpec, device: torch.device, precision: str
) -> tuple[Backend | None, list[str]]:
    """The first backend (of that name, unless ``"auto"``) that supports the case, and the others' reasons.

    Raises:
        BackendUnavailableError: a backend asked for by name does not support the case.
    """
    reasons: list[str] = []
    for backend in backends:
        if name not in ("auto", backend.name):
            continue
        reason = backend.supports(spec, device, precision)
        if reason is None:
            return backend, reasons
        reasons.append(f"{backend.name}: {reason}")
    if name != "auto":
        raise BackendUnavailableError("; ".join(reasons) or f"there is no backend named {name!r}")
    return None, reasons
