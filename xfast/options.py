"""What a user can ask of ``accelerate``: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xfast.architecture import EncoderSpec
from xfast.errors import InvalidOptionError, is_number, require_one_of
from xfast.recipe import Recipe

PRECISIONS = ("model", "fp32", "fp16", "bf16", "int8", "int4", "fp8", "auto")
BACKENDS = ("auto", "native", "triton", "tensorrt")


@dataclass(frozen=True)
class Options:
    """Settings of one accelerated model.

    Attributes:
        backend: ``"auto"`` (first backend that supports the case), ``"native"`` (CPU), ``"triton"`` or ``"tensorrt"``.
        precision: ``"model"`` computes in the weights' own dtype; ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"``
            (weights in 8 or 4 bits; activations in 8 on the CPU and in TensorRT's int8, in bf16 in Triton), ``"fp16"``,
            ``"fp8"`` (GPU) by name; ``"auto"`` takes the first of fp8, int8 (not Triton), bf16, fp16, fp32 whose error
            on ``calibration`` is within ``tolerance``.
        layers: run only the first ``layers`` encoder layers, 0 to all; ``last_hidden_state`` is then
            ``hidden_states[layers]``.
        keep_weights: ``False`` frees the original linear weights after packing: no ``restore``, no ``save_pretrained``.
            With int8 and int4 on the CPU the word embeddings go too, replaced by 8 bits a value with one scale a row
            (which changes results a little), unless a masked-LM head is tied to them.
        calibration: batches for ``precision="auto"``: mappings of keyword arguments of the model's forward, as a
            tokenizer returns with ``return_tensors="pt"`` (int64 [batch, length], on any device).
        tolerance: largest error of the encoder's output for ``"auto"``: the root mean square of ``||y - y_fp32||`` over
            all tokens of ``calibration``, relative to their standard deviation; on a GPU y_fp32 is what the original
            code gives in the weights' dtype.
        training: fine-tune without padding, too (GPU only): calls that need gradients run the model's own modules on
            packed tokens with the varlen attention kernel instead of the original code.
        recipe: how single products differ from ``precision`` (native and Triton): see :class:`xfast.recipe.Recipe` and
            :mod:`xfast.quantization`, which makes them.

    Raises:
        InvalidOptionError: a value is not accepted.
    """

    backend: str = "auto"
    precision: str = "model"
    layers: int | None = None
    keep_weights: bool = True
    calibration: Sequence[dict[str, Any]] | None = None
    tolerance: float | None = None
    training: bool = False
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        require_one_of("backend", self.backend, BACKENDS)
        require_one_of("precision", self.precision, PRECISIONS)
        if self.layers is not None and (isinstance(self.layers, bool) or not isinstance(self.layers, int)):
            raise InvalidOptionError(f"layers: expected an int or None, got {self.layers!r}")
        if not isinstance(self.keep_weights, bool):
            raise InvalidOptionError(f"keep_weights: expected True or False, got {self.keep_weights!r}")
        if not isinstance(self.training, bool):
            raise InvalidOptionError(f"training: expected True or False, got {self.training!r}")
        if self.backend == "tensorrt" and not self.keep_weights:
            raise InvalidOptionError('keep_weights: False is not accepted with backend="tensorrt", which builds later')
        if self.training and not self.keep_weights:
            raise InvalidOptionError("keep_weights: False is not accepted with training=True, which needs the weights")
        if self.training and self.layers is not None:
            raise InvalidOptionError(f"layers: {self.layers} is not accepted with training=True, which runs all layers")
        self._check_recipe()
        self._check_auto()

    def layers_of(self, spec: EncoderSpec) -> int:
        """Number of an encoder's layers that run; some of those that were asked for may have been dropped since."""
        return spec.num_layers if self.layers is None else min(self.layers, spec.num_layers)

    def _check_recipe(self) -> None:
        if self.recipe is None:
            return
        if not isinstance(self.recipe, Recipe):
            raise InvalidOptionError(f"recipe: expected an xfast.recipe.Recipe or None, got {self.recipe!r}")
        if self.backend == "tensorrt":
            raise InvalidOptionError('recipe: is not accepted with backend="tensorrt", which has one precision')
        if self.precision == "auto":
            raise InvalidOptionError('recipe: is not accepted with precision="auto", which chooses itself')

    def _check_auto(self) -> None:
        if self.precision != "auto":
            if self.calibration is not None or self.tolerance is not None:
                raise InvalidOptionError('calibration and tolerance are only used with precision="auto"')
            return
        if self.calibration is not None and not isinstance(self.calibration, Sequence):
            raise InvalidOptionError(f"calibration: expected a sequence of batches, got {self.calibration!r}")
        if not self.calibration:
            raise InvalidOptionError('precision="auto" needs calibration=[batch, ...] to measure errors on')
        if not all(isinstance(batch, Mapping) for batch in self.calibration):
            raise InvalidOptionError("calibration: every batch must be a mapping such as a tokenizer returns")
        # They are measured on again when weights change: what the caller does with the list must not matter
        object.__setattr__(self, "calibration", tuple(dict(batch) for batch in self.calibration))
        if not is_number(self.tolerance) or not self.tolerance > 0:
            raise InvalidOptionError(f'precision="auto" needs tolerance, a finite number > 0, got {self.tolerance!r}')
