"""How backends read an encoder's parameters: each is looked at before it is handed on, and named if it is no good."""

from __future__ import annotations

import torch

from xfast.architecture import EncoderWeights, require_finite, require_values
from xfast.errors import InvalidWeightsError


class ParameterReader:
    """Reads parameters by layer (-1: embeddings), role and name ("weight", "bias").

    Args:
        weights: the encoder.
        device: where to bring them; None leaves them where they are.
    """

    def __init__(self, weights: EncoderWeights, device: torch.device | None = None) -> None:
        self._weights, self._device = weights, device

    def has(self, layer: int, role: str, parameter: str) -> bool:
        """Whether the module has it: biases may be absent."""
        return getattr(self._weights.modules[layer, role], parameter, None) is not None

    def read(self, layer: int, role: str, parameter: str) -> torch.Tensor:
        """The parameter in its own dtype; itself where it can be, not a copy.

        Raises:
            InvalidWeightsError: it is missing, has no values, or holds NaN or infinity.
        """
        name = self._name(layer, role, parameter)
        if not self.has(layer, role, parameter):
            raise InvalidWeightsError(f"{name} is missing")
        tensor: torch.Tensor = getattr(self._weights.modules[layer, role], parameter).detach()
        require_values(name, tensor)
        require_finite(name, tensor)
        return tensor if self._device is None else tensor.to(self._device)

    def rounded(self, tensor: torch.Tensor, dtype: torch.dtype, layer: int, role: str, parameter: str) -> torch.Tensor:
        """Values made from that parameter, in ``dtype``.

        Raises:
            InvalidWeightsError: they are too large for it.
        """
        out = tensor.to(dtype)
        if out is not tensor and not bool(torch.isfinite(out).all()):
            name = self._name(layer, role, parameter)
            raise InvalidWeightsError(f"{name} holds values too large for {dtype}; use bf16 or fp32")
        return out

    def _name(self, layer: int, role: str, parameter: str) -> str:
        return f"{self._weights.names[layer, role]}.{parameter}"
