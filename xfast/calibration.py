"""What example batches tell about an encoder: the inputs of its products, and what rounding does to them.

The figures of single products are simulated in plain PyTorch; a whole encoder is measured with the engine itself
(quantization.py). T: tokens, I: in_features, O: out_features.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from xfast.architecture import (
    PRECISION_OF,
    EncoderSpec,
    EncoderWeights,
    Family,
    describe,
    find_encoders,
    layers_of,
    require_finite,
    require_values,
    roles_of,
    supported_families,
)
from xfast.backends.base import Engine
from xfast.errors import (
    BackendUnavailableError,
    InvalidInputError,
    InvalidOptionError,
    InvalidWeightsError,
    UnsupportedModelError,
)
from xfast.locks import ThreadLock
from xfast.packing import ARGUMENTS, Packed, PositionOverflowError, unpad
from xfast.recipe import LINEARS, LinearFormat

Product = tuple[int, str]
"""(layer, name): the key of ``Recipe.linears``."""

# Enough for a product's error: tokens differ more than outputs do, and each output has its own scale.
_TOKENS = 256
_OUTPUTS = 256
# Where rounding a zero row or column would divide by zero.
_TINY = 1e-30
_SAME = 1e-3  # of their norm: tokens that differ by less are the same but for rounding


@dataclass(frozen=True)
class Target:
    """The encoder that is looked at."""

    module: nn.Module
    family: Family
    weights: EncoderWeights

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        device: torch.device = self.weights.modules[-1, "word"].weight.device
        return device

    def products(self) -> list[Product]:
        """All of them, in the order in which they run."""
        return products_of(self.weights.spec.num_layers)

    def weight(self, layer: int, name: str) -> torch.Tensor:
        """fp32 [O, I] of one product, whatever the model's dtype."""
        parts = [self.weights.modules[layer, role].weight.detach() for role in roles_of(name)]
        return torch.cat([part.float() for part in parts])


def products_of(layers: int) -> list[Product]:
    """All products of so many layers, in the order in which they run."""
    return [(layer, name) for layer in range(layers) for name in LINEARS]


def find_target(model: Any, *, gpu: bool = False) -> Target:
    """The one encoder inside ``model``, on the CPU (or on one ``gpu``), with finite weights in products and LayerNorms.

    Raises:
        UnsupportedModelError: none, several, or one that differs from its family.
        BackendUnavailableError: it is elsewhere, in several places, or neither in fp32, bf16 nor fp16.
        InvalidWeightsError: weights without values, NaN or infinity, or LayerNorms without gains or biases.
    """
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    found = find_encoders(root) if isinstance(root, nn.Module) else []
    if len(found) != 1:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} holds {len(found) or 'no'} encoder(s) that xfast accelerates; expected 1; "
            f"supported: {supported_families()}"
        )
    _, module, family = found[0]
    weights = describe(module, family)
    for name, owner, parameter in weights.parameters():
        tensor = getattr(owner, parameter)
        require_values(f"model: {name}", tensor)
        if tensor.device.type != "cpu" and not (gpu and tensor.device == weights.modules[-1, "word"].weight.device):
            places = "on the CPU or with all weights on one GPU" if gpu else "on the CPU only"
            raise BackendUnavailableError(
                f'model: {name} is on {tensor.device}; this runs {places}: use model.to("cpu")'
            )
        if tensor.dtype not in PRECISION_OF:
            raise BackendUnavailableError(
                f"model: {name} is {tensor.dtype}; supported: float32, bfloat16, float16: use model.float()"
            )
        if not isinstance(owner, nn.Embedding):
            require_finite(f"model: {name}", tensor)
    for key, norm in weights.modules.items():
        missing = [
            name for name in ("weight", "bias") if isinstance(norm, nn.LayerNorm) and getattr(norm, name) is None
        ]
        if missing:
            raise InvalidWeightsError(f"model: {weights.names[key]}.{missing[0]} is missing")
    return Target(module, family, weights)


@dataclass(frozen=True)
class Batch:
    """One calibration batch: the encoder's arguments, and what is left of them without padding."""

    arguments: dict[str, torch.Tensor]
    packed: Packed


def read_batches(spec: EncoderSpec, calibration: Any) -> list[Batch]:
    """Checks a user's calibration batches, every value included; those without a token are left out.

    Raises:
        InvalidOptionError: no sequence of mappings, or an empty one.
        InvalidInputError: a batch that the encoder could not run, named by its index, or no token in all of them.
    """
    if not isinstance(calibration, Sequence) or isinstance(calibration, str) or not calibration:
        raise InvalidOptionError(f"calibration: expected a non-empty sequence of batches, got {_brief(calibration)}")
    batches = []
    for index, given in enumerate(calibration):
        if not isinstance(given, Mapping):
            raise InvalidOptionError(
                f"calibration[{index}]: expected a mapping such as a tokenizer returns, got {_brief(given)}"
            )
        for name in ARGUMENTS:
            if not isinstance(given.get(name), torch.Tensor | None):
                raise InvalidInputError(
                    f"calibration[{index}]: {name} is a {type(given[name]).__name__}; expected a tensor: call the "
                    'tokenizer with return_tensors="pt"'
                )
            if isinstance(given.get(name), torch.Tensor) and given[name].is_meta:
                raise InvalidInputError(f"calibration[{index}]: {name} is on the meta device: it has no values")
        try:
            arguments = {name: value.to("cpu") for name, value in encoder_arguments(given).items()}
            batches.append(Batch(arguments, unpad(spec, **{"input_ids": None, **arguments})))
        except (InvalidInputError, PositionOverflowError) as error:
            raise InvalidInputError(f"calibration[{index}]: {error}") from None
    batches = [batch for batch in batches if batch.packed.total_tokens]
    if not batches:
        raise InvalidInputError("calibration: the batches hold no token; at least one must have attention_mask 1")
    return batches


def encoder_arguments(batch: Any) -> dict[str, torch.Tensor]:
    """The encoder's share of a model's batch; multiple choice's (batch, choices, length) is flattened."""
    given = {}
    for name in ARGUMENTS:
        value = batch.get(name)
        if isinstance(value, torch.Tensor):
            given[name] = value.flatten(0, 1) if value.dim() == (4 if name == "inputs_embeds" else 3) else value
    return given


def run_original(module: nn.Module, **arguments: Any) -> Any:
    """What the class's own forward returns, in eval mode, without gradients and outside autocast.

    The class's: the instance's may be accelerated.
    """
    first = next(module.parameters())
    if (embeds := arguments.get("inputs_embeds")) is not None:
        arguments["inputs_embeds"] = embeds.to(first.dtype)
    with evaluated(module), torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        forward: Any = type(module).forward
        return forward(module, **arguments)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own mode again (dropout may be on in a few).

    One thread at a time: another would take the first one's eval mode for the user's.
    """
    with _registering.held():
        turn = _turns.setdefault(module, ThreadLock())
    with turn.held():
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


_turns: WeakKeyDictionary[nn.Module, ThreadLock] = WeakKeyDictionary()
_registering = ThreadLock()


def engine_output(engine: Engine, batches: Sequence[dict[str, torch.Tensor]], layers: int) -> torch.Tensor:
    """Hidden states after ``layers`` layers at all real tokens of the batches, fp32 [T, hidden_size].

    Raises:
        InvalidInputError: a batch is too long for the model.
        CannotRunError: the engine cannot run one.
    """
    found = []
    for index, batch in enumerate(batches):
        try:
            packed = engine.unpad(**{"input_ids": None, **batch})
        except PositionOverflowError as error:
            raise InvalidInputError(f"calibration[{index}] is too long: {error}") from None
        found.append(_real(packed.pad(engine.run(packed, layers=layers)[0], torch.float32), batch))
    return torch.cat(found)


def original_output(module: nn.Module, batches: Sequence[dict[str, torch.Tensor]], layers: int) -> torch.Tensor:
    """The original code's, likewise."""
    return torch.cat([_real(_after_layers(module, batch, layers).float(), batch) for batch in batches])


def _after_layers(module: nn.Module, batch: dict[str, torch.Tensor], layers: int) -> torch.Tensor:
    """``hidden_states[layers]``. Not by ``output_hidden_states``, for which transformers leaves hooks in the model."""
    stack = layers_of(module)
    if layers == len(stack):
        last: torch.Tensor = run_original(module, **batch, return_dict=True).last_hidden_state
        return last
    found: list[torch.Tensor] = []
    with _inputs_seen([stack[layers]], lambda _, x: found.append(x)):
        run_original(module, **batch)
    return found[0]


@contextmanager
def _inputs_seen(modules: Sequence[nn.Module], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls ``see(i, x)`` with what ``modules[i]`` reads in this thread.

    The hooks are functions of this file, which xfast.watch lets pass: calls of an accelerated model in other threads
    need not run the original code for them.
    """
    thread = threading.get_ident()

    def hook_of(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                see(i, arguments[0].detach())

        return hook

    hooks = [module.register_forward_pre_hook(hook_of(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _real(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square over tokens [T, hidden_size] of ||got - want||, relative to their standard deviation.

    The deviation is that from the mean of all tokens. What they share tells nothing apart, and is large: a few channels
    of trained encoders hold nearly the same value in every token, of most of a token's norm. A single token, or copies
    of one, have no deviation: there it is ||got - want|| / ||want||; 0 where both are nothing.
    """
    exact = want.double()
    size, deviation = exact.norm(), (exact - exact.mean(0)).norm()
    if deviation > _SAME * size:
        size = deviation * math.sqrt(len(exact) / (len(exact) - 1))
    return float((got.double() - exact).norm() / size.clamp_min(_TINY))


def _brief(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


@dataclass(frozen=True)
class Inputs:
    """What one product reads: largest |x| of each channel, over all tokens [I], and a sample of tokens [T, I]; fp32."""

    largest: torch.Tensor
    tokens: torch.Tensor


def product_inputs(target: Target, batches: Sequence[Batch]) -> dict[Product, Inputs]:
    """Runs the original code once over the batches and looks at what its products read at real tokens.

    Meanwhile the encoder is in eval mode, for other threads, too.

    Raises:
        InvalidInputError: NaN or infinity on the way.
    """
    total = sum(batch.packed.total_tokens for batch in batches)
    # Drawn, since every n-th token could be the first of every sequence
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")
    recorder = _Recorder(order[:_TOKENS].sort().values)
    keys = target.products()
    readers = [target.weights.modules[key[0], _role(key)] for key in keys]
    look = _inputs_seen(readers, lambda i, x: recorder.see(keys[i], x))
    with evaluated(target.module), _whole(target.module), look:
        for batch in batches:
            recorder.start(batch)
            run_original(target.module, **batch.arguments)
    return {key: recorder.result(key, target.weights.names[key[0], _role(key)]) for key in keys}


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Feed-forward products read whole batches inside, also where the config has them in chunks: the same results.

    Inside ``evaluated``, whose turns it needs.
    """
    chunked = [(layer, layer.chunk_size_feed_forward) for layer in layers_of(module)]
    for layer, _ in chunked:
        layer.chunk_size_feed_forward = 0
    try:
        yield
    finally:
        for layer, size in chunked:
            layer.chunk_size_feed_forward = size


def _role(key: Product) -> str:
    """The first module that reads a product's inputs."""
    return roles_of(key[1])[0]


class _Recorder:
    """Collects maxima and sampled rows, batch by batch."""

    def __init__(self, sample: torch.Tensor) -> None:
        self._sample = sample  # ascending numbers of tokens, counted over all batches
        self._seen = 0
        self._largest: dict[Product, torch.Tensor] = {}
        self._tokens: dict[Product, list[torch.Tensor]] = {}

    def start(self, batch: Batch) -> None:
        first, self._seen = self._seen, self._seen + batch.packed.total_tokens
        self._real = torch.from_numpy(batch.packed.indices).long()
        self._rows = self._sample[(self._sample >= first) & (self._sample < self._seen)] - first

    def see(self, key: Product, inputs: torch.Tensor) -> None:
        x = inputs.flatten(0, -2)[self._real].float()
        largest = x.abs().amax(0)
        self._largest[key] = torch.maximum(self._largest.get(key, largest), largest)
        self._tokens.setdefault(key, []).append(x[self._rows])

    def result(self, key: Product, name: str) -> Inputs:
        if not bool(torch.isfinite(self._largest[key]).all()):
            raise InvalidInputError(f"calibration: the inputs of {name} hold NaN or infinity")
        return Inputs(self._largest[key], torch.cat(self._tokens[key]))


class Simulation:
    """One product on sampled tokens, in plain PyTorch.

    Attributes:
        sizes: ||y|| of every token [T], y (a sample of) the product's outputs without bias.
    """

    def __init__(self, tokens: torch.Tensor, weight: torch.Tensor) -> None:
        self._tokens = tokens
        # A sample over all outputs (query, key and value alike): each has its own scale
        self._weight = weight[:: max(1, weight.shape[0] // _OUTPUTS)]
        self._exact = _product(tokens, self._weight)
        self.sizes = self._exact.norm(dim=1).clamp_min(_TINY)

    def errors(self, chosen: LinearFormat) -> torch.Tensor:
        """||y_quantised - y|| of every token [T]."""
        x, w = self._tokens, self._weight
        if chosen.divisor is not None:
            divisor = torch.from_numpy(chosen.divisor)
            x, w = x / divisor, w * divisor
        return (_product(_rounded(x), _rounded_weight(w, chosen)) - self._exact).norm(dim=1)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):  # the caller's would round both
        return x @ weight.T


def _rounded_weight(weight: torch.Tensor, chosen: LinearFormat) -> torch.Tensor:
    if chosen.precision == "int8":
        return _rounded(weight)
    # As csrc/weights.cpp packs int4 but for its search of better steps: a group's largest value becomes -8
    columns = weight.shape[1]
    groups = nn.functional.pad(weight, (0, -columns % chosen.group_size)).unflatten(1, (-1, chosen.group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = torch.where(-low >= high, low, high) / -8
    step = torch.where(step.abs() < _TINY, _TINY, step)
    return (groups / step).round_().clamp_(-8, 7).mul_(step).flatten(1)[:, :columns]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """``x`` in 127 steps either way, one size of step for everything along the last dimension."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 127
    return (x / step).round_().mul_(step)
