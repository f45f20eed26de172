"""Accuracy of quantised encoders: smoothing of outlier channels, reports of what hurts, mixed precision to a tolerance.

Every function reads a model and changes nothing in it. What comes out is a :class:`~xfast.recipe.Recipe`, for
``xfast.accelerate(model, precision=..., recipe=recipe)``. CPU only. docs/quantization.md says when to use which.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from xfast.architecture import EncoderSpec
from xfast.backends.native import NativeEngine, PackedWeights, pack_layer, requested_isa
from xfast.calibration import Batch, Inputs, Product, Simulation, Target, find_target, product_inputs, read_batches
from xfast.errors import BackendUnavailableError, InvalidInputError, InvalidOptionError
from xfast.quantization_reports import (
    Measured,
    MixedReport,
    OutlierReport,
    ProductChoice,
    ProductError,
    ProductOutliers,
    SensitivityReport,
)
from xfast.recipe import DEFAULT_GROUP_SIZE, LINEARS, QUANTISED, LinearFormat, Recipe

PRECISIONS = ("int4", "int8", "bf16", "fp32")
GAIN_STRENGTH = 0.3
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""What ``smooth`` tries with calibration batches."""

# A channel counts as an outlier from here on, times the median channel.
_OUTLIER = 6.0
# Smoothing is taken where it removes at least this share of a product's error: less may be the sample's luck.
_WORTHWHILE = 0.05
_NORM_FED = ("qkv", "ffn_in")
# Of a divisor, around its geometric mean; far inside what a recipe accepts.
_SPREAD = 1e4


def smooth(
    model: Any,
    *,
    precision: str = "int8",
    group_size: int = DEFAULT_GROUP_SIZE,
    calibration: Sequence[Any] | None = None,
    strength: float | Sequence[float] | None = None,
) -> Recipe:
    """A recipe that divides large channels of products' inputs before they are quantised.

    Args:
        model: with one supported encoder, accelerated or not, on the CPU.
        precision, group_size: what the products will be quantised to, ``"int8"`` or ``"int4"``.
        calibration: batches as the model takes them. Without: the divisors are (gain / max|w|)^0.3, at the inputs of
            qkv and ffn_in, with the gains of the LayerNorm before. With: SmoothQuant's max|x|^a / max|w|^(1-a) for
            every product, with the ``a`` of least error on a sample of tokens; none where it hardly helps, and none
            for any qkv (attention_out, ...) where the engine then measures no smaller error of the output.
        strength: the exponent, between 0 and 1, or (with calibration) several to choose from.

    The recipe names only products that get a divisor; the others keep ``accelerate``'s precision. Cost: without
    calibration, one look at the weights; with it, one run of the original and seven of the engine, whose products are
    packed in fp32 and twice in ``precision``.

    Raises:
        InvalidOptionError, InvalidInputError, InvalidWeightsError, UnsupportedModelError, BackendUnavailableError:
            see :mod:`xfast.errors`.
    """
    target = find_target(model)
    _one_of("precision", precision, QUANTISED)
    Recipe(group_size)  # checks it
    default = LinearFormat(precision, group_size)
    if calibration is None:
        [exponent] = _strengths(strength, (GAIN_STRENGTH,), single=True)
        return Recipe(group_size, {key: replace(default, divisor=d) for key, d in _gain_divisors(target, exponent)})
    exponents = _strengths(strength, STRENGTHS)
    batches = read_batches(target, calibration)
    inputs = product_inputs(target, batches)
    formats = _calibrated(target, inputs, default, exponents, _Trials(target, batches))
    return Recipe(group_size, {key: each for key, each in formats.items() if each.divisor is not None})


def outliers(model: Any, calibration: Sequence[Any]) -> OutlierReport:
    """How large single channels of products' inputs are, and what they cost in int8.

    Runs the original model once over the batches and each product once in int8 on a sample of tokens.

    Raises:
        As :func:`smooth`.
    """
    target = find_target(model)
    batches = read_batches(target, calibration)
    found = product_inputs(target, batches)
    products = tuple(_product_outliers(key, inputs, target.weight(*key)) for key, inputs in found.items())
    return OutlierReport(_OUTLIER, _tokens(batches), products)


def sensitivity(
    model: Any, calibration: Sequence[Any], precision: str = "int8", *, recipe: Recipe | None = None
) -> SensitivityReport:
    """Relative error of the encoder's output with one product, one layer, and everything quantised.

    Args:
        model: with one supported encoder, accelerated or not, on the CPU.
        calibration: batches as the model takes them.
        precision: what to quantise to: ``"int4"``, ``"int8"`` or ``"bf16"``.
        recipe: where divisors and group sizes come from, as :func:`smooth` makes them.

    Cost: five engine runs a layer over the batches, and each product is packed once.

    Raises:
        As :func:`smooth`.
    """
    target = find_target(model)
    _one_of("precision", precision, PRECISIONS[:-1])
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise InvalidOptionError(f"recipe: expected an xfast.recipe.Recipe, got {type(recipe).__name__}")
    recipe.check(target.weights.spec)
    batches = read_batches(target, calibration)
    formats = {key: _in_precision(recipe.of(*key, precision), precision) for key in target.products()}
    trials = _Trials(target, batches)
    trials.pack(formats)
    products = tuple(ProductError(*key, trials.error({key: formats[key]})) for key in formats)
    layers = tuple(
        trials.error({(layer, name): formats[layer, name] for name in LINEARS})
        for layer in range(target.weights.spec.num_layers)
    )
    return SensitivityReport(precision, _tokens(batches), products, layers, trials.error(formats))


def mixed(
    model: Any,
    calibration: Sequence[Any],
    *,
    tolerance: float,
    precisions: Sequence[str] | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    smoothing: bool = True,
) -> tuple[Recipe, MixedReport]:
    """The smallest recipe found whose relative error on the calibration batches is within ``tolerance``.

    Args:
        model: with one supported encoder, accelerated or not, on the CPU.
        calibration: batches as the model takes them.
        tolerance: largest ||y - y_fp32|| / ||y_fp32|| of the encoder's output, as in :class:`xfast.Options`.
        precisions: to choose from, of ``PRECISIONS``; None: all, bf16 only where the CPU has the instruction.
        group_size: of int4.
        smoothing: also let products have divisors, where those help.

    Every product is measured alone in every precision; those that lose most per byte saved are given more. The error
    of the result is measured, not predicted. It names every product, so ``accelerate``'s ``precision`` decides about
    none. Cost: one engine run a product and precision over the batches.

    Raises:
        BackendUnavailableError: no choice stays within ``tolerance``; and as :func:`smooth`.
    """
    target = find_target(model)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf:
        raise InvalidOptionError(f"tolerance: expected a number > 0, got {tolerance!r}")
    names = _precisions(precisions)
    Recipe(group_size)  # checks it
    batches = read_batches(target, calibration)
    inputs = product_inputs(target, batches) if smoothing else {}
    trials = _Trials(target, batches)
    ladders: dict[Product, list[_Rung]] = {key: [] for key in target.products()}
    for precision in names:
        plain = LinearFormat(precision, group_size)
        if smoothing and precision in QUANTISED:
            formats = _calibrated(target, inputs, plain, STRENGTHS, trials)
        else:
            formats = dict.fromkeys(ladders, plain)
            trials.pack(formats)
        for key, chosen in formats.items():
            ladders[key].append(_Rung(chosen, trials.error({key: chosen}), trials.bytes({key: chosen})))
    found, uniform, result = _cheapest(trials, ladders, float(tolerance))
    products = tuple(
        ProductChoice(*key, rung.chosen.precision, rung.chosen.divisor is not None, rung.error, rung.bytes)
        for key, rung in found.items()
    )
    report = MixedReport(float(tolerance), _tokens(batches), result, products, uniform, trials.runs)
    return Recipe(group_size, _formats(found)), report


# --- smoothing -------------------------------------------------------------------------------------------------------


def _gain_divisors(target: Target, exponent: float) -> list[tuple[Product, np.ndarray]]:
    keys = [key for key in target.products() if key[1] in _NORM_FED]
    return [(key, _gain_divisor(target, key, target.weight(*key), exponent)) for key in keys]


def _gain_divisor(target: Target, key: Product, weight: torch.Tensor, exponent: float) -> np.ndarray:
    # The weights' share matters in trained models, which give small weights to large channels
    return _divisor((_gains(target, key) / _columns(weight)) ** exponent)


def _gains(target: Target, key: Product) -> torch.Tensor:
    """How large each channel of a LayerNorm's output is, from its parameters alone: fp32 [I], positive.

    Before gain and bias a channel has about mean 0 and deviation 1.
    """
    norm = target.weights.modules[_norm_before(target.weights.spec, *key)]
    size = torch.hypot(norm.weight.detach().float(), norm.bias.detach().float())
    return _positive(size)


def _norm_before(spec: EncoderSpec, layer: int, name: str) -> Product:
    """The LayerNorm whose output feeds qkv or ffn_in."""
    if spec.norm == "pre":
        return layer, "attention_norm" if name == "qkv" else "ffn_norm"
    if name == "ffn_in":
        return layer, "attention_norm"
    return (layer - 1, "ffn_norm") if layer else (-1, "embedding_norm")


def _calibrated(
    target: Target, found: dict[Product, Inputs], default: LinearFormat, exponents: Sequence[float], trials: _Trials
) -> dict[Product, LinearFormat]:
    """Formats of all products, ready to be run, with divisors where those help."""
    formats = dict.fromkeys(found, default)
    trials.pack(formats)
    smoothed = {key: _best(target, key, inputs, default, exponents) for key, inputs in found.items()}
    trials.pack(smoothed)
    # What helps a product need not help the output: outputs of ffn_out differ in size more than they matter
    least = trials.error(formats)
    for name in ("qkv", "ffn_in", "attention_out", "ffn_out"):
        tried = {key: smoothed[key] if key[1] == name else each for key, each in formats.items()}
        error = trials.error(tried)
        if error < least:
            formats, least = tried, error
    return formats


def _best(
    target: Target, key: Product, inputs: Inputs, default: LinearFormat, exponents: Sequence[float]
) -> LinearFormat:
    """The format of one product with the least error of its own outputs."""
    weight = target.weight(*key)
    columns, largest = _columns(weight), _positive(inputs.largest)
    divisors = [_divisor(largest**exponent / columns ** (1 - exponent)) for exponent in exponents]
    if key[1] in _NORM_FED:  # what holds for all text, should the calibration batches be few
        divisors.append(_gain_divisor(target, key, weight, GAIN_STRENGTH))
    formats = [default, *(replace(default, divisor=divisor) for divisor in divisors)]
    simulation = Simulation(inputs.tokens, weight)
    errors = [float(simulation.errors(each).norm()) for each in formats]
    best = min(range(len(errors)), key=errors.__getitem__)
    return formats[best] if errors[best] < (1 - _WORTHWHILE) * errors[0] else default


def _columns(weight: torch.Tensor) -> torch.Tensor:
    """Largest weight of each input [I]."""
    return _positive(weight.abs().amax(0))


def _positive(size: torch.Tensor) -> torch.Tensor:
    """Channels that are (nearly) zero get a size that divides: they need no steps, so any will do."""
    return size.clamp_min(max(1e-3 * float(size.median()), 1e-6 * float(size.max()), 1e-30))


def _divisor(size: torch.Tensor) -> np.ndarray:
    """Around 1: a common factor changes nothing."""
    scaled = size.double() / size.double().log().mean().exp()
    divisor: np.ndarray = scaled.clamp(1 / _SPREAD, _SPREAD).float().numpy()
    return divisor


# --- reports ---------------------------------------------------------------------------------------------------------


def _product_outliers(key: Product, inputs: Inputs, weight: torch.Tensor) -> ProductOutliers:
    largest, tokens, int8 = inputs.largest, inputs.tokens, LinearFormat("int8")
    median = float(_positive(largest).median())
    channels = [int(c) for c in largest.argsort(descending=True) if largest[c] > _OUTLIER * median]
    others = tokens.clone()
    others[:, channels] = 0
    simulation = Simulation(tokens, weight)
    errors = simulation.errors(int8) / simulation.sizes
    remaining = Simulation(others, weight).errors(int8) / simulation.sizes
    total = float(errors.square().sum())
    centred = tokens - tokens.mean(1, keepdim=True)
    kurtosis = centred.pow(4).mean(1) / centred.square().mean(1).square().clamp_min(1e-30)
    return ProductOutliers(
        *key,
        ratio=float(largest.max()) / median,
        channel=int(largest.argmax()),
        outliers=tuple(channels),
        kurtosis=float(kurtosis.mean()),
        error=float(errors.median()),
        worst_error=float(errors.max()),
        from_outliers=max(0.0, 1 - float(remaining.square().sum()) / total) if channels and total else 0.0,
    )


# --- runs of the engine ----------------------------------------------------------------------------------------------


_FP32 = LinearFormat("fp32")


class _Trials:
    """Runs formats of products on the calibration batches, what is not named in fp32. Each is packed once."""

    def __init__(self, target: Target, batches: Sequence[Batch]) -> None:
        self._weights = target.weights
        self._batches = batches
        self._packed: dict[tuple[Product, LinearFormat], Mapping[str, np.ndarray]] = {}
        self._plain = dict.fromkeys(target.products(), _FP32)
        self.pack(self._plain)
        self.runs = 0
        self._exact = self._outputs({})
        if not bool(torch.isfinite(self._exact).all()):
            raise InvalidInputError("calibration: the encoder's output holds NaN or infinity")

    def pack(self, formats: Mapping[Product, LinearFormat]) -> None:
        """Makes formats ready to be run; ``formats`` names every product of the encoder."""
        for layer in range(self._weights.spec.num_layers):
            recipe = Recipe(linears={(layer, name): formats[layer, name] for name in LINEARS})
            for name, arrays in pack_layer(self._weights, layer, _FP32.precision, recipe).items():
                self._packed[(layer, name), formats[layer, name]] = arrays

    def bytes(self, formats: Mapping[Product, LinearFormat]) -> int:
        """Of these products, packed."""
        return sum(array.nbytes for each in formats.items() for array in self._packed[each].values())

    def error(self, formats: Mapping[Product, LinearFormat]) -> float:
        """||y - y_fp32|| / ||y_fp32|| over all tokens."""
        return self._relative(self._outputs(formats))

    def measure(self, formats: Mapping[Product, LinearFormat]) -> Measured:
        """Everything that is reported of a recipe; ``formats`` names every product."""
        got = self._outputs(formats)
        cosines = torch.nn.functional.cosine_similarity(got.double(), self._exact.double())
        return Measured(self._relative(got), float(cosines.min()), float(cosines.mean()), self.bytes(formats))

    def _relative(self, got: torch.Tensor) -> float:
        exact = self._exact.double()
        return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))

    def _outputs(self, formats: Mapping[Product, LinearFormat]) -> torch.Tensor:
        """Hidden states of all tokens [T, hidden_size]."""
        self.runs += 1
        recipe = Recipe(linears={**self._plain, **formats})
        layers = range(self._weights.spec.num_layers)
        packed = PackedWeights(
            layers=[{name: self._packed[(i, name), recipe.linears[i, name]] for name in LINEARS} for i in layers],
            formats=[recipe.stored(i, _FP32.precision) for i in layers],
            words=None,
            origin="memory",
        )
        engine = NativeEngine(self._weights, _FP32.precision, packed)
        return torch.cat([engine.run(batch.packed)[0] for batch in self._batches])


# --- search ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rung:
    """One way to hold a product: the error of the encoder's output that it causes alone."""

    chosen: LinearFormat
    error: float
    bytes: int


def _cheapest(
    trials: _Trials, ladders: dict[Product, list[_Rung]], tolerance: float
) -> tuple[dict[Product, _Rung], dict[str, Measured], Measured]:
    """The smallest assignment that is measured to be within ``tolerance``, all uniform ones, and its own figures.

    Candidates are the uniform assignments and those on the way up the ladders.
    """
    names = [rung.chosen.precision for rung in next(iter(ladders.values()), [])]
    same = [{key: rungs[i] for key, rungs in ladders.items()} for i in range(len(names))]
    uniform = [trials.measure(_formats(each)) for each in same]
    path = _path(ladders)
    measured = functools.cache(lambda step: trials.measure(_formats(path[step])))
    # Errors fall along the path, nearly always. Whatever is taken was measured itself.
    step = bisect.bisect_left(range(len(path)), True, key=lambda i: measured(i).error <= tolerance)
    step = min(step, len(path) - 1)
    tried = [*zip(same, uniform, strict=True), (path[step], measured(step))]
    within = [each for each in tried if each[1].error <= tolerance]
    if not within:
        least = min(m.error for _, m in tried)
        raise BackendUnavailableError(
            f"tolerance: no choice of {', '.join(names)} stays within {tolerance:g} on the calibration batches; the "
            f"least error was {least:.2e}; raise it, or add fp32 to precisions"
        )
    chosen, result = min(within, key=lambda each: each[1].bytes)
    return chosen, dict(zip(names, uniform, strict=True)), result


def _path(ladders: dict[Product, list[_Rung]]) -> list[dict[Product, _Rung]]:
    """Assignments from the smallest to the most exact, one product more exact in each.

    The next is the one that removes most squared error per byte: errors of different products add up like
    independent noise.
    """
    climbable = {key: _climbable(rungs) for key, rungs in ladders.items()}
    path = [{key: rungs[0] for key, rungs in climbable.items()}]
    while True:
        now, steps = path[-1], []
        for key, rungs in climbable.items():
            for rung in rungs[rungs.index(now[key]) + 1 :]:
                gain = (now[key].error ** 2 - rung.error**2) / (rung.bytes - now[key].bytes)
                steps.append((gain, key, rung))
        if not steps:
            return path
        _, key, rung = max(steps, key=lambda step: step[0])
        path.append({**now, key: rung})


def _climbable(rungs: list[_Rung]) -> list[_Rung]:
    """From small to large, without those that are larger but not more exact."""
    kept: list[_Rung] = []
    for rung in sorted(rungs, key=lambda rung: rung.bytes):
        if not kept or rung.error < kept[-1].error:
            kept.append(rung)
    return kept


def _formats(assignment: dict[Product, _Rung]) -> dict[Product, LinearFormat]:
    return {key: rung.chosen for key, rung in assignment.items()}


# --- arguments -------------------------------------------------------------------------------------------------------


def _in_precision(chosen: LinearFormat, precision: str) -> LinearFormat:
    return replace(chosen, precision=precision, divisor=chosen.divisor if precision in QUANTISED else None)


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.packed.total_tokens for batch in batches)


def _one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise InvalidOptionError(f"{name}: {value!r} is not accepted; accepted: {', '.join(accepted)}")


def _strengths(given: Any, default: Sequence[float], single: bool = False) -> list[float]:
    if given is None:
        return list(default)
    values = [given] if single or not isinstance(given, Sequence) or isinstance(given, str) else list(given)
    real = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 1 for v in values)
    if not values or not real:
        some = "a number" if single else "a number, or several,"
        raise InvalidOptionError(f"strength: expected {some} from 0 to 1, got {given!r}")
    return [float(value) for value in values]


def _precisions(given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        # Without the instruction bf16 takes the time of fp32
        native = "bf16" in requested_isa()
        return tuple(name for name in PRECISIONS if name != "bf16" or native)
    if isinstance(given, str) or not isinstance(given, Sequence) or not given or len(set(map(str, given))) < len(given):
        raise InvalidOptionError(f"precisions: expected some of {', '.join(PRECISIONS)}, got {given!r}")
    for name in given:
        _one_of("precisions", name, PRECISIONS)
    return tuple(given)
