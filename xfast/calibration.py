"""What example batches tell about an encoder: the inputs of its products, and what rounding does to them.

The figures of single products are simulated in plain PyTorch; a whole encoder is measured with the engine itself
(quantization.py). T: tokens, I: in_features, O: out_features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from xfast.architecture import (
    EncoderSpec,
    EncoderWeights,
    Family,
    describe,
    find_encoders,
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
from xfast.packing import Packed, PositionOverflowError, unpad
from xfast.recipe import LINEARS, LinearFormat

Product = tuple[int, str]
"""(layer, name): the key of ``Recipe.linears``."""

# Enough for a product's error: tokens differ more than outputs do, and each output has its own scale.
_TOKENS = 256
_OUTPUTS = 256
_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
# Where rounding a zero row or column would divide by zero.
_TINY = 1e-30


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
        BackendUnavailableError: it is elsewhere, or in several places.
        InvalidWeightsError: weights without values, NaN or infinity.
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
        if tensor.is_meta:
            raise InvalidWeightsError(f"model: {name} is on the meta device: it has no values; load the weights first")
        if tensor.device.type != "cpu" and not (gpu and tensor.device == weights.modules[-1, "word"].weight.device):
            places = "on the CPU or with all weights on one GPU" if gpu else "on the CPU only"
            raise BackendUnavailableError(
                f'model: {name} is on {tensor.device}; this runs {places}: use model.to("cpu")'
            )
        if isinstance(owner, nn.LayerNorm) and owner.bias is None:
            raise InvalidWeightsError(f"model: {name.removesuffix('weight')}bias is missing")
        if not isinstance(owner, nn.Embedding) and not bool(torch.isfinite(tensor).all()):
            raise InvalidWeightsError(f"model: {name} holds NaN or infinity")
    return Target(module, family, weights)


@dataclass(frozen=True)
class Batch:
    """One calibration batch: the encoder's arguments, and what is left of them without padding."""

    arguments: dict[str, torch.Tensor]
    packed: Packed


def read_batches(spec: EncoderSpec, calibration: Any) -> list[Batch]:
    """Checks a user's calibration batches, every value included.

    Raises:
        InvalidOptionError: no sequence of mappings, or an empty one.
        InvalidInputError: a batch that the encoder could not run, named by its index, or no token in all of them.
    """
    if not isinstance(calibration, Sequence) or isinstance(calibration, str) or not calibration:
        raise InvalidOptionError(f"calibration: expected a non-empty sequence of batches, got {_brief(calibration)}")
    batches = []
    for index, given in enumerate(calibration):
        if not hasattr(given, "keys"):
            raise InvalidOptionError(
                f"calibration[{index}]: expected a mapping such as a tokenizer returns, got {_brief(given)}"
            )
        arguments = {name: value.to("cpu") for name, value in encoder_arguments(given).items()}
        try:
            batches.append(Batch(arguments, unpad(spec, **{"input_ids": None, **arguments})))
        except (InvalidInputError, PositionOverflowError) as error:
            raise InvalidInputError(f"calibration[{index}]: {error}") from None
    if not sum(batch.packed.total_tokens for batch in batches):
        raise InvalidInputError("calibration: the batches hold no token; at least one must have attention_mask 1")
    return batches


def encoder_arguments(batch: Any) -> dict[str, torch.Tensor]:
    """The encoder's share of a model's batch; multiple choice's (batch, choices, length) is flattened."""
    given = {}
    for name in _ARGUMENTS:
        value = batch.get(name) if hasattr(batch, "get") else None
        if isinstance(value, torch.Tensor):
            given[name] = value.flatten(0, 1) if value.dim() == (4 if name == "inputs_embeds" else 3) else value
    return given


def run_original(module: nn.Module, **arguments: Any) -> Any:
    """What the class's own forward returns, in eval mode and without gradients: the instance's may be accelerated."""
    with evaluated(module), torch.no_grad():
        forward: Any = type(module).forward
        return forward(module, **arguments)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own mode again (dropout may be on in a few)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


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
    states = (run_original(module, **batch, output_hidden_states=True, return_dict=True) for batch in batches)
    return torch.cat([_real(s.hidden_states[layers].float(), b) for s, b in zip(states, batches, strict=True)])


def _real(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; 0 where both are nothing."""
    exact = want.double()
    return float((got.double() - exact).norm() / exact.norm().clamp_min(_TINY))


def _brief(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"


@dataclass(frozen=True)
class Inputs:
    """What one product reads: largest |x| of each channel, over all tokens [I], and a sample of tokens [T, I]; fp32."""

    largest: torch.Tensor
    tokens: torch.Tensor


def product_inputs(target: Target, batches: Sequence[Batch]) -> dict[Product, Inputs]:
    """Runs the original code once over the batches and looks at what its products read at real tokens.

    Raises:
        InvalidInputError: NaN or infinity on the way.
    """
    total = sum(batch.packed.total_tokens for batch in batches)
    # Drawn, since every n-th token could be the first of every sequence
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")
    recorder = _Recorder(order[:_TOKENS].sort().values)
    modules = {key: target.weights.modules[key[0], _role(key)] for key in target.products()}
    hooks = [module.register_forward_pre_hook(partial(recorder.see, key)) for key, module in modules.items()]
    try:
        for batch in batches:
            recorder.start(batch)
            run_original(target.module, **batch.arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: recorder.result(key, target.weights.names[key[0], _role(key)]) for key in modules}


def _role(key: Product) -> str:
    """The first module that reads a product's inputs."""
    return roles_of(key[1])[0]


class _Recorder:
    """Collects maxima and sampled rows, batch by batch, of the calls in one thread."""

    def __init__(self, sample: torch.Tensor) -> None:
        self._sample = sample  # ascending numbers of tokens, counted over all batches
        self._thread = threading.get_ident()
        self._seen = 0
        self._largest: dict[Product, torch.Tensor] = {}
        self._tokens: dict[Product, list[torch.Tensor]] = {}

    def start(self, batch: Batch) -> None:
        first, self._seen = self._seen, self._seen + batch.packed.total_tokens
        self._real = torch.from_numpy(batch.packed.indices).long()
        self._rows = self._sample[(self._sample >= first) & (self._sample < self._seen)] - first

    def see(self, key: Product, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() != self._thread:  # another thread uses the model meanwhile
            return
        x = arguments[0].detach().flatten(0, -2)[self._real].float()
        if len(x):
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
        self._exact = tokens @ self._weight.T
        self.sizes = self._exact.norm(dim=1).clamp_min(_TINY)

    def errors(self, chosen: LinearFormat) -> torch.Tensor:
        """||y_quantised - y|| of every token [T]."""
        x, w = self._tokens, self._weight
        if chosen.divisor is not None:
            divisor = torch.from_numpy(chosen.divisor)
            x, w = x / divisor, w * divisor
        return (_rounded(x) @ _rounded_weight(w, chosen).T - self._exact).norm(dim=1)


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
