"""Accuracy of quantised encoders: smoothing of outlier channels, reports of what hurts, mixed precision to a tolerance.

Every function reads a model and changes nothing in it. What comes out is a :class:`~xfast.recipe.Recipe`, for
``xfast.accelerate(model, precision=..., recipe=recipe)``. ``mixed`` chooses on GPUs, too; the rest is for the CPU.
docs/quantization.md says when to use which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xfast import _C
from xfast.architecture import EncoderSpec
from xfast.backends.base import choose
from xfast.backends.native import requested_isa
from xfast.backends.triton import TritonBackend
from xfast.calibration import (
    Batch,
    Inputs,
    Product,
    Simulation,
    Target,
    engine_output,
    find_target,
    original_output,
    product_inputs,
    read_batches,
)
from xfast.errors import InvalidOptionError, is_number, require_one_of
from xfast.mixed_precision import Ladders, cheapest, climb, formats_of
from xfast.quantization_reports import (
    MixedReport,
    OutlierReport,
    ProductChoice,
    ProductError,
    ProductOutliers,
    SensitivityReport,
)
from xfast.recipe import ALL_PRECISIONS, DEFAULT_GROUP_SIZE, LINEARS, QUANTISED, LinearFormat, Recipe
from xfast.trials import NativeTrials, Trials, TritonTrials

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
        strength: the exponent, between 0 and 1, or (with calibration) several to choose from. None: 0.3 without
            calibration; with it 0.3 to 0.8 and the divisors of the first kind.

    The recipe names only products that get a divisor; the others keep ``accelerate``'s precision. Cost: without
    calibration, one look at the weights; with it, one run of the original and six of the engine, whose products are
    packed in fp32 and twice in ``precision``.

    Raises:
        InvalidOptionError, InvalidInputError, InvalidWeightsError, UnsupportedModelError, BackendUnavailableError:
            see :mod:`xfast.errors`.
    """
    target = find_target(model)
    require_one_of("precision", precision, QUANTISED)
    Recipe(group_size)  # checks it
    default = LinearFormat(precision, group_size)
    if calibration is None:
        [exponent] = _strengths(strength, (GAIN_STRENGTH,), single=True)
        divided = {key: replace(default, divisor=divisor) for key, divisor in _gain_divisors(target, exponent)}
        return Recipe(group_size, divided, target.weights.spec)
    exponents = _strengths(strength, STRENGTHS)
    batches = read_batches(target.weights.spec, calibration)
    inputs = product_inputs(target, batches)
    gains = strength is None  # who names exponents wants those
    formats = _calibrated(target, inputs, default, exponents, NativeTrials(target.weights, batches), gains=gains)
    divided = {key: each for key, each in formats.items() if each.divisor is not None}
    return Recipe(group_size, divided, target.weights.spec)


def outliers(model: Any, calibration: Sequence[Any]) -> OutlierReport:
    """How large single channels of products' inputs are, and what they cost in int8.

    Runs the original model once over the batches and each product once in int8 on a sample of tokens.

    Raises:
        As :func:`smooth`.
    """
    target = find_target(model)
    batches = read_batches(target.weights.spec, calibration)
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
    require_one_of("precision", precision, PRECISIONS[:-1])
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise InvalidOptionError(f"recipe: expected an xfast.recipe.Recipe or None, got {recipe!r:.80}")
    recipe.check(target.weights.spec)
    batches = read_batches(target.weights.spec, calibration)
    formats = {key: _in_precision(recipe.of(*key, precision), precision) for key in target.products()}
    trials = NativeTrials(target.weights, batches)
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
    backend: str = "auto",
) -> tuple[Recipe, MixedReport]:
    """The smallest recipe found whose relative error on the calibration batches is within ``tolerance``.

    Args:
        model: with one supported encoder, accelerated or not.
        calibration: batches as the model takes them.
        tolerance: largest error of the encoder's output, as in :class:`xfast.Options`.
        precisions: to choose from, of ``PRECISIONS`` or on a GPU ``ALL_PRECISIONS``; None: on the CPU all, bf16 only
            where it has a fast instruction; on a GPU fp8 (where it has none: int8) and bf16, which are about speed (for
            memory: int4, int8, bf16).
        group_size: of int4.
        smoothing: also let products have divisors, where those help (CPU).
        backend: "auto" (where the model is), "native" or "triton".

    Every product is measured alone in every precision; those that lose most per byte saved are given more. The error
    of the result is measured, not predicted. It names every product; ``accelerate``'s ``precision`` says what
    everything else is in. The error holds for ``"fp32"`` on the CPU (with int8 and int4, ``keep_weights=False`` and
    artifacts have word embeddings in 8 bits), on a GPU for bf16, or another float that ``precisions`` has. Cost: one
    engine run a product and precision over the batches.

    Raises:
        BackendUnavailableError: no choice stays within ``tolerance``; and as :func:`smooth`.
    """
    require_one_of("backend", backend, ("auto", "native", "triton"))
    target = find_target(model, gpu=backend != "native")
    if not isinstance(smoothing, bool):
        raise InvalidOptionError(f"smoothing: expected True or False, got {smoothing!r}")
    if not is_number(tolerance) or not tolerance > 0:
        raise InvalidOptionError(f"tolerance: expected a finite number > 0, got {tolerance!r}")
    Recipe(group_size)  # checks it
    batches = read_batches(target.weights.spec, calibration)
    on_gpu = backend == "triton" or (backend == "auto" and target.device.type == "cuda")
    names = _precisions(precisions, target if on_gpu else None)
    inputs = product_inputs(target, batches) if smoothing and not on_gpu else {}
    trials: Trials = _on_gpu(target, batches, names) if on_gpu else NativeTrials(target.weights, batches)
    ladders: Ladders = {}
    for precision in names:
        default = trials.plain if precision == trials.plain.precision else LinearFormat(precision, group_size)
        if inputs and precision in QUANTISED:
            climb(ladders, trials, _calibrated(target, inputs, default, STRENGTHS, trials))
        else:
            climb(ladders, trials, dict.fromkeys(target.products(), default))
    found, uniform, result = cheapest(trials, ladders, float(tolerance))
    products = tuple(
        ProductChoice(*key, rung.chosen.precision, rung.chosen.divisor is not None, rung.error, rung.bytes)
        for key, rung in found.items()
    )
    report = MixedReport(float(tolerance), _tokens(batches), result, products, uniform, trials.runs)
    return Recipe(group_size, formats_of(found), target.weights.spec), report


def _on_gpu(target: Target, batches: Sequence[Batch], names: Sequence[str]) -> TritonTrials:
    """Everything else in the first of bf16, fp16 and fp32 that is among ``names``, or bf16."""
    plain = next((name for name in ("bf16", "fp16", "fp32") if name in names), "bf16")
    for name in names:  # the call says what cannot be
        wanted = Recipe(linears={(0, "qkv"): LinearFormat(name)})
        choose([TritonBackend()], "triton", target.weights.spec, target.device, plain, wanted)
    layers = target.weights.spec.num_layers
    given = [{key: value.to(target.device) for key, value in batch.arguments.items()} for batch in batches]
    reference = original_output(target.module, given, layers)
    return TritonTrials(target.weights, plain, lambda engine: engine_output(engine, given, layers), reference, layers)


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
    target: Target,
    found: dict[Product, Inputs],
    default: LinearFormat,
    exponents: Sequence[float],
    trials: Trials,
    *,
    gains: bool = True,
) -> dict[Product, LinearFormat]:
    """Formats of all products, ready to be run, with divisors where those help; ``gains``: those of gains, too."""
    formats = dict.fromkeys(found, default)
    trials.pack(formats)
    smoothed = {key: _best(target, key, inputs, default, exponents, gains) for key, inputs in found.items()}
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
    target: Target, key: Product, inputs: Inputs, default: LinearFormat, exponents: Sequence[float], gains: bool
) -> LinearFormat:
    """The format of one product with the least error of its own outputs."""
    weight = target.weight(*key)
    columns, largest = _columns(weight), _positive(inputs.largest)
    divisors = [_divisor(largest**exponent / columns ** (1 - exponent)) for exponent in exponents]
    if key[1] == "ffn_out":  # neurons that this text never fires, multiplied up, would be another text's outliers
        divisors = [np.maximum(divisor, np.median(divisor)) for divisor in divisors]
    if gains and key[1] in _NORM_FED:  # what holds for all text, should the calibration batches be few
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


# --- arguments -------------------------------------------------------------------------------------------------------


def _in_precision(chosen: LinearFormat, precision: str) -> LinearFormat:
    return replace(chosen, precision=precision, divisor=chosen.divisor if precision in QUANTISED else None)


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.packed.total_tokens for batch in batches)


def _strengths(given: Any, default: Sequence[float], single: bool = False) -> list[float]:
    if given is None:
        return list(default)
    values = [given] if single or not isinstance(given, Sequence) or isinstance(given, str) else list(given)
    real = all(is_number(value) and 0 <= value <= 1 for value in values)
    if not values or not real:
        some = "a number" if single else "a number, or several,"
        raise InvalidOptionError(f"strength: expected {some} from 0 to 1, got {given!r}")
    return [float(value) for value in values]


def _precisions(given: Sequence[str] | None, on_gpu: Target | None) -> tuple[str, ...]:
    accepted = PRECISIONS if on_gpu is None else ALL_PRECISIONS
    if given is None:
        # Without a fast instruction bf16 takes the time of fp32
        if on_gpu is not None:
            no_fp8 = TritonBackend().supports(on_gpu.weights.spec, on_gpu.device, "fp8")
            return ("int8" if no_fp8 else "fp8", "bf16")
        native = _C.bf16_instruction(requested_isa())
        return tuple(name for name in PRECISIONS if name != "bf16" or native)
    if isinstance(given, str) or not isinstance(given, Sequence) or not given or len(set(map(str, given))) < len(given):
        raise InvalidOptionError(f"precisions: expected some of {', '.join(accepted)}, got {given!r}")
    for name in given:
        require_one_of("precisions", name, accepted)
    return tuple(given)
