"""Decides how one encoder runs: backend, precision, packed engine; and says why."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xfast.architecture import EncoderWeights, Family, describe, parameter_dtype
from xfast.backends.base import Engine, choose
from xfast.backends.native import NativeBackend
from xfast.errors import (
    BackendUnavailableError,
    InvalidOptionError,
    InvalidWeightsError,
    UnsupportedModelError,
    WeightsFreedError,
)
from xfast.options import Options
from xfast.packing import unpad
from xfast.watch import WeightWatch

BACKENDS = (NativeBackend(),)

_DTYPE_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Fastest first. bf16 stands behind int8 even where it is native; fp32 always meets a tolerance above rounding.
_AUTO_ORDER = ("int8", "bf16", "fp32")


class Plan:
    """The compiled form of one encoder, kept in step with its weights."""

    def __init__(self, module: nn.Module, family: Family, options: Options) -> None:
        self.options = options
        self._family = family
        self.weights: EncoderWeights = describe(module, family)
        self.engine: Engine | None = None
        self.backend_name = "none"
        self.notes: list[str] = []
        self.freed = False
        self._lock = threading.Lock()
        self._watch: WeightWatch | None = None
        layers = options.layers
        if layers is not None and not 0 <= layers <= self.weights.spec.num_layers:
            raise InvalidOptionError(
                f"layers: {layers} is not accepted; accepted: 0 to {self.weights.spec.num_layers} (or None for all)"
            )

    @property
    def layers(self) -> int:
        """Number of encoder layers that run."""
        return self.weights.spec.num_layers if self.options.layers is None else self.options.layers

    def current_engine(self, module: nn.Module) -> Engine | None:
        """The engine for the weights as they are now, repacked if they changed; None when no backend supports them.

        Raises:
            InvalidWeightsError: the weights changed to something unusable.
            WeightsFreedError: the weights changed but their originals are gone.
        """
        watch = self._watch
        if watch is not None and not watch.changed():
            return self.engine
        with self._lock:
            if self._watch is None or self._watch.changed():
                self._compile(module)
            return self.engine

    def free_weights(self, module: nn.Module) -> None:
        """Gives up the original linear weights (they become ``meta`` tensors); the packed ones remain."""
        if self.engine is None:
            raise BackendUnavailableError("keep_weights=False needs a backend that runs this model; see xfast.explain")
        for (layer, _), leaf in self.weights.modules.items():
            if layer >= 0 and isinstance(leaf, nn.Linear):
                leaf.weight = nn.Parameter(leaf.weight.to("meta"), requires_grad=leaf.weight.requires_grad)
        self.freed = True
        self._watch = WeightWatch(module, self.weights)
        module.register_state_dict_pre_hook(_refuse_state_dict)

    def _compile(self, module: nn.Module) -> None:
        if self.freed:
            raise WeightsFreedError(
                "the weights were changed or moved, but keep_weights=False gave up the originals; load the model again"
            )
        first = self._watch is None
        self.engine, self.backend_name, self.notes = None, "none", []
        try:
            self.weights = describe(module, self._family)
        except UnsupportedModelError as error:  # changed by the user after accelerate: their code must still run
            if first:
                raise
            self.notes.append(f"the original code runs: {error}")
            self._watch = WeightWatch(module, self.weights)
            return
        self._watch = WeightWatch(module, self.weights)  # before packing: a change during it is seen at the next call
        device = _common_device(self.weights)
        precision = self.options.precision
        try:
            if precision == "auto":
                self.backend_name, self.engine = self._choose_precision(device)
            else:
                self.backend_name, self.engine = self._build(device, self._resolve(precision, device))
        except Exception:
            self._watch = None  # ask again at the next call
            raise

    def _resolve(self, precision: str, device: torch.device) -> str:
        if precision != "model":
            return precision
        dtype = parameter_dtype(self.weights)
        resolved = _DTYPE_PRECISION.get(dtype, str(dtype))
        if resolved == "fp16" and device.type == "cpu":
            self.notes.append("fp16 weights are computed in fp32: CPUs have no fast fp16 products")
            return "fp32"
        return resolved

    def _build(self, device: torch.device, precision: str) -> tuple[str, Engine | None]:
        spec = self.weights.spec
        backend, reasons = choose(BACKENDS, self.options.backend, spec, device, precision)
        if backend is not None:
            return backend.name, backend.compile(self.weights, precision)
        if self.options.precision not in ("model", "auto"):
            raise BackendUnavailableError(f"precision={precision!r}: " + "; ".join(reasons))
        self.notes += [f"the original code runs: {reason}" for reason in reasons]
        return "none", None

    def _choose_precision(self, device: torch.device) -> tuple[str, Engine | None]:
        batches, tolerance = self.options.calibration or (), self.options.tolerance or 0.0
        reference = None
        for precision in _AUTO_ORDER:
            backend, _ = choose(BACKENDS, self.options.backend, self.weights.spec, device, precision)
            if backend is None:
                continue
            if reference is None:
                reference = _outputs(backend.compile(self.weights, "fp32"), self.weights, batches, self.layers)
            engine = backend.compile(self.weights, precision)
            error = _relative_error(_outputs(engine, self.weights, batches, self.layers), reference)
            verdict = "chosen" if error <= tolerance else "refused"
            self.notes.append(f"auto: {precision} error {error:.2e}, tolerance {tolerance:.2e}: {verdict}")
            if error <= tolerance:
                return backend.name, engine
        raise BackendUnavailableError(
            f"no precision stays within tolerance={tolerance} on the calibration batches: " + "; ".join(self.notes)
        )


def _refuse_state_dict(*_: Any) -> None:
    raise WeightsFreedError("state_dict: the original weights were given up with keep_weights=False")


def _common_device(weights: EncoderWeights) -> torch.device:
    devices = set()
    for name, module, parameter in weights.parameters():
        tensor = getattr(module, parameter)
        if tensor.is_meta:
            raise InvalidWeightsError(f"{name} is on the meta device: it has no values; load the weights first")
        devices.add(tensor.device)
    if len(devices) > 1:
        return torch.device("meta")  # spread over several devices: no backend takes it
    return next(iter(devices))


def _outputs(
    engine: Engine, weights: EncoderWeights, batches: Sequence[dict[str, Any]], layers: int
) -> list[torch.Tensor]:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    results = []
    for batch in batches:
        given = {name: batch[name] for name in names if name in batch}
        packed = unpad(weights.spec, given.pop("input_ids", None), **given)
        results.append(engine.run(packed, layers=layers)[0])
    return results


def _relative_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    difference = sum(float((g - w).double().square().sum()) for g, w in zip(got, want, strict=True))
    size = sum(float(w.double().square().sum()) for w in want)
    return (difference / size) ** 0.5 if size else 0.0
