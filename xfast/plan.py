"""Decides how one encoder runs: backend, precision, packed engine; and says why."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from xfast.architecture import (
    PRECISION_OF,
    EncoderWeights,
    Family,
    describe,
    is_plain_tensor,
    parameter_dtype,
    require_values,
)
from xfast.backends.base import CannotRunError, Engine, choose
from xfast.backends.native import NativeBackend, NativeEngine
from xfast.backends.tensorrt import TensorRTBackend
from xfast.backends.triton import TritonBackend
from xfast.calibration import Product, engine_output, original_output, read_batches, relative_error
from xfast.errors import (
    BackendUnavailableError,
    InvalidInputError,
    InvalidOptionError,
    UnsupportedModelError,
    WeightsFreedError,
)
from xfast.locks import ThreadLock
from xfast.mixed_precision import Ladders, cheapest, climb, formats_of
from xfast.options import Options
from xfast.recipe import QUANTISED, LinearFormat, Recipe
from xfast.trials import NativeTrials, TritonTrials
from xfast.watch import InnerWatch, WeightWatch, version_of

BACKENDS = (NativeBackend(), TritonBackend(), TensorRTBackend())

# What a change by the user may bring: their code must still run
CHANGED = (UnsupportedModelError, BackendUnavailableError, InvalidInputError)
FREED = "the original weights were given up with keep_weights=False"
# Fastest first. bf16 stands behind int8 even where it is native; fp32 always meets a tolerance above rounding.
_AUTO_ORDER = ("fp8", "int8", "bf16", "fp16", "fp32")


class Plan:
    """The compiled form of one encoder, kept in step with its weights."""

    def __init__(self, module: nn.Module, family: Family, options: Options) -> None:
        self.options = options
        self._family = family
        self.weights: EncoderWeights = describe(module, family)
        self.engine: Engine | None = None
        self.backend_name = "none"
        self.notes: list[str] = []
        self.shared: Collection[int] = ()  # ids of weights that must stay, as modules outside the encoder use them
        self.freed = ""  # why the original weights are gone
        self._mixture: dict[Product, LinearFormat] | None = None  # that "auto" found last
        self._lock = ThreadLock()
        self._watch: WeightWatch | None = None
        self._left: list[tuple[Any, ...]] = []  # of given-up weights: every tensor and its state
        self.inner = InnerWatch(module)

    def require_layers(self) -> None:
        """Raises InvalidOptionError where more layers are asked for than there are. Later a user may drop some."""
        layers = self.options.layers
        if layers is not None and not 0 <= layers <= self.weights.spec.num_layers:
            raise InvalidOptionError(
                f"layers: {layers} is not accepted; accepted: 0 to {self.weights.spec.num_layers} (or None for all)"
            )

    @property
    def layers(self) -> int:
        """Number of encoder layers that run."""
        return self.options.layers_of(self.weights.spec)

    def stale(self) -> bool:
        """Whether the weights were changed since they were packed."""
        return self._watch is not None and self._watch.changed()

    def alert(self) -> None:
        """Says that a call is on its way, before the weights are looked at."""
        if isinstance(self.engine, NativeEngine):
            self.engine.alert()

    def current_engine(self, module: nn.Module) -> Engine | None:
        """The engine for the weights as they are now, repacked if they changed; None when no backend supports them.

        Raises:
            InvalidWeightsError: the weights changed to something unusable.
            WeightsFreedError: the weights changed but their originals are gone.
        """
        watch = self._watch
        if watch is not None and not watch.changed():
            return self.engine
        with self._lock.held():
            if self._watch is None or self._watch.changed():
                self._compile(module)
            return self.engine

    def free_weights(self, module: nn.Module) -> None:
        """Gives up the original weights that the engine holds itself; they become ``meta`` tensors.

        These are the linear weights and, where the engine has a smaller copy, the word embeddings, unless they are
        ``shared`` with modules outside the encoder (a masked-LM decoder tied to them).
        """
        assert self.engine is not None
        for (layer, _), leaf in self.weights.modules.items():
            if layer >= 0 and isinstance(leaf, nn.Linear):
                _free(leaf)
        words = self.weights.modules[-1, "word"]
        if id(words.weight) not in self.shared and self.engine.own_word_table():
            _free(words)
        self.freed = FREED
        self._look_after(module)

    def adopt(self, engine: Engine | None, backend_name: str, notes: list[str], freed: str, module: nn.Module) -> None:
        """Takes over an engine that holds the only weights; ``freed`` says why."""
        self.engine, self.backend_name, self.notes, self.freed = engine, backend_name, notes, freed
        self._look_after(module)

    def _look_after(self, module: nn.Module) -> None:
        self._left = [(t, *_state(t)) for t in _tensors(self.weights)]
        self._watch = WeightWatch(module, self.weights)

    def adopt_copy(self, copied: FreedCopy, module: nn.Module) -> None:
        """Takes over what a deep copy's original has packed; what its engine reads in place is read from the copy.

        Raises:
            WeightsFreedError: the copy was moved, cast or changed since, or the original before.
            InvalidWeightsError: it was changed to something unusable.
        """
        source = copied.source
        engine = source.engine
        if not copied.fits(self.weights):
            raise WeightsFreedError(_changed(source.freed))
        if engine is not None:
            left = [tensor for tensor in _tensors(self.weights) if not tensor.is_meta]
            if any(tensor.device != engine.device or tensor.dtype not in PRECISION_OF for tensor in left):
                raise WeightsFreedError(_changed(source.freed))
            engine = engine.for_copy(self.weights)
        self.adopt(engine, source.backend_name, source.notes, source.freed, module)

    def _compile(self, module: nn.Module) -> None:
        """Packs anew. Everything is published at the end, the watch last: other threads wait or see it whole."""
        if self.freed:
            self._follow(module)
            return
        first = self._watch is None
        weights, watch = self.weights, WeightWatch(module, self.weights)
        self.notes = []
        backend_name, engine = "none", None
        try:
            weights = describe(module, self._family)
            watch = WeightWatch(module, weights)  # before packing: a change during it is seen at the next call
            backend_name, engine = self._build(module, weights)
        except CHANGED as error:
            if first:
                raise
            # after accelerate, to what overflows on the batches for example
            self.notes.append(f"the original code runs: {error}")
        self.weights, self.backend_name, self.engine = weights, backend_name, engine
        self.inner = InnerWatch(module)
        self._watch = watch

    def _follow(self, module: nn.Module) -> None:
        """Reads what is left of given-up weights where it lies now: pickling for another process moves it, say.

        Raises:
            WeightsFreedError: more was changed than that.
        """
        try:
            weights = describe(module, self._family)
        except CHANGED:
            raise WeightsFreedError(_changed(self.freed)) from None
        now, before = _tensors(weights), self._left
        if (
            weights.spec != self.weights.spec
            or len(now) != len(before)
            or any(t is not kept or _state(t) != tuple(state) for t, (kept, *state) in zip(now, before, strict=True))
            or self.engine is None
        ):
            raise WeightsFreedError(_changed(self.freed))
        watch = WeightWatch(module, weights)
        self.engine = self.engine.for_copy(weights)
        self.weights, self.inner = weights, InnerWatch(module)  # the same values may be in other modules now
        self._watch = watch

    def _build(self, module: nn.Module, weights: EncoderWeights) -> tuple[str, Engine | None]:
        device = _common_device(weights)
        wrong = {str(t.dtype) for t in _tensors(weights)} - {str(dtype) for dtype in PRECISION_OF}
        asked = self.options.precision
        if wrong:
            reasons = [f"weights are {', '.join(sorted(wrong))}; supported: float32, bfloat16, float16"]
        elif asked == "auto":
            return self._choose_precision(module, weights, device)
        else:
            precision = self._resolve(weights, device)
            recipe = self.options.recipe
            backend, reasons = choose(BACKENDS, self.options.backend, weights.spec, device, precision, recipe)
            if backend is not None:
                return backend.name, backend.compile(weights, precision, recipe)
        if asked != "model" or self.options.recipe is not None:
            raise BackendUnavailableError(f"precision={asked!r}: " + "; ".join(reasons))
        self.notes += [f"the original code runs: {reason}" for reason in reasons]
        return "none", None

    def _resolve(self, weights: EncoderWeights, device: torch.device) -> str:
        if self.options.precision != "model":
            return self.options.precision
        resolved = PRECISION_OF[parameter_dtype(weights)]
        if resolved == "fp16" and device.type == "cpu":
            self.notes.append("fp16 weights are computed in fp32: CPUs have no fast fp16 products")
            return "fp32"
        return resolved

    def _choose_precision(
        self, module: nn.Module, weights: EncoderWeights, device: torch.device
    ) -> tuple[str, Engine | None]:
        checked = read_batches(weights.spec, self.options.calibration)
        batches = [{name: value.to(device) for name, value in batch.arguments.items()} for batch in checked]
        tolerance = self.options.tolerance or 0.0
        layers = self.options.layers_of(weights.spec)  # not of self.weights, which are those of the last plan
        # An original in 16 bits is no measure for others: it rounds more than they do, and may overflow
        coarse = device.type == "cpu" and parameter_dtype(weights) is not torch.float32
        reference: torch.Tensor | None = None
        refused: list[str] = []
        reasons: list[str] = []
        for precision in _AUTO_ORDER:
            try:
                backend, _ = choose(BACKENDS, self.options.backend, weights.spec, device, precision)
            except BackendUnavailableError as unavailable:
                reasons.append(str(unavailable))
                continue
            # There integers are for memory and small batches: more exact than fp8, slower than bf16
            if backend is None or (backend.name == TritonBackend.name and precision in QUANTISED):
                continue
            engine = backend.compile(weights, precision)
            # the error is to be that of the word table that is kept
            if not self.options.keep_weights and id(weights.modules[-1, "word"].weight) not in self.shared:
                engine.own_word_table()
            try:
                output = engine_output(engine, batches, layers)
            except CannotRunError as refusal:
                self.notes.append(f"auto: {precision} cannot run the calibration batches: {refusal}")
                continue
            if reference is None:
                reference = (
                    NativeTrials(weights, checked, layers).exact if coarse else original_output(module, batches, layers)
                )
            if not self._within(precision, relative_error(output, reference), tolerance):
                refused.append(precision)
                continue
            if backend.name == TritonBackend.name and (precision, refused) == ("bf16", ["fp8"]):
                engine = self._fp8_where_possible(weights, batches, reference, tolerance) or engine
            return backend.name, engine
        raise BackendUnavailableError(
            f"no precision stays within tolerance={tolerance} on the calibration batches: "
            + "; ".join(self.notes or reasons)
        )

    def _within(self, what: str, error: float, tolerance: float) -> bool:
        verdict = "chosen" if error <= tolerance else "refused"
        self.notes.append(f"auto: {what} error {error:.2e}, tolerance {tolerance:.2e}: {verdict}")
        return error <= tolerance

    def _fp8_where_possible(
        self, weights: EncoderWeights, batches: list[dict[str, torch.Tensor]], reference: torch.Tensor, tolerance: float
    ) -> Engine | None:
        """As many products in fp8 as the tolerance allows, the others in bf16; None: too few to be worth it.

        What was found for former weights is tried first: fine-tuning changes them at every step.
        """

        layers = self.options.layers_of(weights.spec)

        def run(engine: Engine) -> torch.Tensor:
            return engine_output(engine, batches, layers)

        try:
            if self._mixture is not None:
                former = TritonBackend().compile(weights, "bf16", Recipe(linears=self._mixture))
                if (error := relative_error(run(former), reference)) <= tolerance:
                    self._note_mixture(self._mixture, error)
                    return former
            trials = TritonTrials(weights, "bf16", run, reference, layers)
            ladders: Ladders = {}
            climb(ladders, trials, dict.fromkeys(trials.products, LinearFormat("fp8")))
            climb(ladders, trials, dict.fromkeys(trials.products, trials.plain))
            found, _, result = cheapest(trials, ladders, tolerance)
        except (torch.OutOfMemoryError, BackendUnavailableError) as error:
            self.notes.append(f"auto: fp8 in some products was not tried: {error}")
            return None
        formats = formats_of(found)
        if 2 * sum(chosen.precision == "fp8" for chosen in formats.values()) < len(formats):
            return None
        self._mixture = formats
        self._note_mixture(formats, result.error)
        del trials  # whose weights are as large as the engine's
        return TritonBackend().compile(weights, "bf16", Recipe(linears=formats))

    def _note_mixture(self, formats: dict[Product, LinearFormat], error: float) -> None:
        count = sum(chosen.precision == "fp8" for chosen in formats.values())
        self.notes.append(
            f"auto: fp8 in {count} of {len(formats)} products, the others bf16, instead: error {error:.2e}"
        )


class FreedCopy:
    """What a deep copy of an encoder was when it was made, whose weights are the original's packed ones alone.

    Its own plan is made at its first call, and until then nothing watches it.
    """

    def __init__(self, source: Plan, places: dict[tuple[int, str], tuple[Any, int | None]], whole: bool) -> None:
        self.source = source
        self._places = places
        self._whole = whole

    @classmethod
    def of(cls, source: Plan, memo: Mapping[int, Any]) -> FreedCopy:
        """Of a copy whose modules ``memo`` has by the ids of the original's, as ``copy.deepcopy`` keeps them."""
        freed = {place: leaf for place, leaf in source.weights.modules.items() if leaf.weight.is_meta}
        copies = {place: memo.get(id(leaf)) for place, leaf in freed.items()}
        places = {at: (weakref.ref(leaf), version_of(leaf.weight)) for at, leaf in copies.items() if leaf is not None}
        return cls(source, places, len(places) == len(freed) and not source.stale())

    def fits(self, weights: EncoderWeights) -> bool:
        """Whether what was packed is still where it was in the copy, and nothing was loaded there or is new."""
        if not self._whole or weights.spec != self.source.weights.spec:
            return False
        return all(
            weights.modules[at] is leaf() and leaf().weight.is_meta and version_of(leaf().weight) == version
            for at, (leaf, version) in self._places.items()
        )


def _changed(freed: str) -> str:
    return f"the weights were changed or moved, but {freed}; load the model again"


class FreedWeight(nn.Parameter):
    """A parameter without values (``is_meta``) that says it is where its values were.

    Libraries take a model's device from its first parameter, and call ``model.to`` with it before each batch.
    """

    _home: torch.device
    freed: str
    """Why its values are gone."""

    def __new__(cls, like: torch.Tensor, home: torch.device, freed: str, *, requires_grad: bool) -> FreedWeight:
        with torch.inference_mode(False):  # else nobody could ask for its gradients later
            values = torch.empty(like.shape, dtype=like.dtype, device="meta")  # of a meta tensor .to is itself
            made: FreedWeight = super().__new__(cls, values, requires_grad)
        made._home, made.freed = home, freed
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What asks for no values works. Anything else would compute with memory that is nobody's, as it says "cpu".

        Raises:
            WeightsFreedError: values are needed.
        """
        name, cause = getattr(function, "__name__", ""), None
        with torch._C.DisableTorchFunctionSubclass():
            if name in _VALUELESS:
                return function(*args, **(kwargs or {}))
            everything = [*_tensors_in(args), *_tensors_in((kwargs or {}).values())]
            # copy_ and the like change nothing; x in weight is true of meta tensors
            own = args and isinstance(args[0], FreedWeight) and _in_place(name)
            if name != "__contains__" and (own or all(one.is_meta for one in everything)):
                try:
                    result = function(*args, **(kwargs or {}))
                    if all(one.is_meta for one in _tensors_in((result,))):
                        return result
                except RuntimeError as error:  # torch's own word for it
                    cause = error
        freed = next((one.freed for one in everything if isinstance(one, FreedWeight)), FREED)
        raise WeightsFreedError(f"{name or function}: {freed}") from cause

    @property
    def device(self) -> torch.device:
        return self._home

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Itself where nothing would change. Another type, or the meta device, can be had without values.

        Raises:
            WeightsFreedError: it would have to move.
        """
        wanted = torch.empty(0, dtype=self.dtype, device=self._home).to(*args, **kwargs)
        if (wanted.device, wanted.dtype) == (self._home, self.dtype):
            return self
        if wanted.device not in (self._home, torch.device("meta")):
            raise WeightsFreedError(
                f"to: the model cannot move to {wanted.device}: it has no original weights; load it there"
            )
        return self.data.to(wanted.dtype)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As :meth:`to`."""
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As :meth:`to`."""
        return self.to(torch.device("cuda" if device is None else device))

    def __deepcopy__(self, memo: dict[int, Any]) -> FreedWeight:
        return memo.setdefault(id(self), FreedWeight(self, self._home, self.freed, requires_grad=self.requires_grad))


_VALUELESS = {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn")}
_VALUELESS |= {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")}
_VALUELESS |= {"view_as", "expand_as", "reshape_as", "is_same_size", "result_type", "can_cast", "size", "numel"}
_VALUELESS |= {"__get__", "dim", "ndimension", "stride", "storage_offset", "element_size", "nelement", "data_ptr"}
_VALUELESS |= {"is_contiguous", "is_floating_point", "is_complex", "__hash__", "__len__", "requires_grad_"}
"""Of a given-up weight and others: only its type and shape are asked for."""


def _in_place(name: str) -> bool:
    return name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Also those in lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _free(leaf: nn.Module) -> None:
    weight = leaf.weight
    if weight.is_meta:  # of a module that two encoders share: the first one's watch has seen it
        return
    leaf.weight = FreedWeight(weight, weight.device, FREED, requires_grad=weight.requires_grad)
    refuse_state_dict(leaf, FREED)


def refuse_state_dict(leaf: nn.Module, freed: str) -> None:
    """Makes ``state_dict``, and so ``save_pretrained``, say why a module's weight is gone."""
    leaf.register_state_dict_pre_hook(functools.partial(_refuse_state_dict, freed))


def _refuse_state_dict(freed: str, *_: Any) -> None:
    raise WeightsFreedError(f"state_dict: {freed}")


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What changes with values, type or device, but not with the place in memory."""
    state = version_of(tensor), tensor.dtype, tensor.device, tuple(tensor.shape)
    if tensor.is_meta or tensor.device.type != "cpu" or not is_plain_tensor(tensor):
        return *state, b""
    flat = tensor.detach().flatten()
    return *state, flat[:: max(1, flat.numel() // 256)].contiguous().view(torch.uint8).numpy().tobytes()


def _tensors(weights: EncoderWeights) -> list[torch.Tensor]:
    return [getattr(module, parameter) for _, module, parameter in weights.parameters()]


def _common_device(weights: EncoderWeights) -> torch.device:
    devices = set()
    for name, module, parameter in weights.parameters():
        tensor = getattr(module, parameter)
        require_values(name, tensor)
        devices.add(tensor.device)
    if len(devices) > 1:
        return torch.device("meta")  # spread over several devices: no backend takes it
    return next(iter(devices))
