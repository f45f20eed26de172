"""Smoothing, outlier and sensitivity reports, mixed precision: on tiny models, at base size, and on real weights."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from models import ALL_FAMILIES, build, encoder_of, left_padded, quick_settings, ragged, text_tower, token_error
from torch import nn
from torch.nn.functional import cosine_similarity

import xfast
from xfast import calibration, mixed_precision, quantization, trials
from xfast.recipe import LINEARS, LinearFormat, Recipe

_settings = pytest.fixture(autouse=True)(quick_settings)

CHANNELS = (5, 40)
LAYERS = 3


def planted(family: str = "xlm-roberta", head: str = "base", **changes: Any) -> Any:
    """A tiny model with two outlier channels in every LayerNorm, which the products read with small weights."""
    model = build(family, head, **changes)
    for name, parameter in encoder_of(model).named_parameters():
        if "norm.weight" in name.lower():
            parameter[list(CHANNELS)] = 60
        if any(part in name for part in ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            parameter[:, list(CHANNELS)] *= 0.05
    return model


def hidden(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of the real tokens [T, hidden_size]."""
    return encoder_of(model)(**batch).last_hidden_state[batch["attention_mask"].bool()]


def quantised(model: Any, batch: Mapping[str, torch.Tensor], recipe: Recipe, precision: str = "int8") -> torch.Tensor:
    """Hidden states of the accelerated model; the model is left as it was."""
    with xfast.accelerated(model, precision=precision, recipe=recipe):
        return hidden(model, batch)


def query_inputs(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """What qkv and ffn_in of each layer read, at every position: found by hooks on the modules' names."""
    seen: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for name, module in encoder_of(model).named_modules():
        product = {"query": "qkv", "dense": "ffn_in"}.get(name.split(".")[-1])
        if product is None or (product == "ffn_in" and "intermediate" not in name):
            continue
        key = (int(name.split(".")[2]), product)
        hooks.append(module.register_forward_pre_hook(lambda _, given, key=key: seen.update({key: given[0].clone()})))
    hidden(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


# --- smoothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ALL_FAMILIES, "altclip"])
def test_gains_are_those_of_the_norm_that_feeds_the_product(family: str) -> None:
    model = text_tower() if family == "altclip" else build(family)
    batch = ragged("xlm-roberta" if family == "altclip" else family)
    norms = [m for m in encoder_of(model).modules() if isinstance(m, nn.LayerNorm) and m.weight.shape == (64,)]
    for product in (m for m in encoder_of(model).modules() if isinstance(m, nn.Linear)):
        product.weight.copy_(product.weight.sign() / 8)  # no column is larger than another
    for channel, norm in enumerate(norms):  # each has its own outlier
        norm.weight.fill_(1)
        norm.bias.fill_(0)
        norm.weight[channel] = 1000
    inputs = query_inputs(model, batch)
    recipe = quantization.smooth(model)
    assert set(recipe.linears) == set(inputs) == {(i, n) for i in range(LAYERS) for n in ("qkv", "ffn_in")}
    for key, x in inputs.items():
        divisor = recipe.linears[key].divisor
        assert divisor is not None
        assert int(divisor.argmax()) == int(x.abs().mean((0, 1)).argmax())
        assert np.isclose(divisor.max() / np.median(divisor), 1000**0.3, rtol=1e-5)


def test_strength_is_the_exponent_of_the_gains() -> None:
    model = build()
    strengths = (0, np.float32(0.25), 0.5)
    divisors = {s: quantization.smooth(model, strength=s).linears[1, "ffn_in"].divisor for s in strengths}
    assert np.allclose(divisors[0], 1)
    assert np.allclose(divisors[0.25] ** 2, divisors[0.5], rtol=1e-5)
    assert not np.allclose(divisors[0.25], 1, atol=0.1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_zero_and_negative_gains(calibrated: bool) -> None:
    model = build()
    batch = ragged()
    norm = encoder_of(model).encoder.layer[0].attention.output.LayerNorm
    norm.weight[:20], norm.bias[:20] = 0, 0
    norm.weight[20:30] *= -50
    recipe = quantization.smooth(model, calibration=[batch] if calibrated else None)
    for chosen in recipe.linears.values():
        assert chosen.divisor is not None and np.isfinite(chosen.divisor).all() and (chosen.divisor > 0).all()
    assert recipe.linears
    if not calibrated:  # else it is left out where the output of these few tokens happens to be no better for it
        divisor = recipe.linears[0, "ffn_in"].divisor
        assert divisor is not None and divisor[20:30].min() > divisor[30:].max()
    norm.weight.zero_()
    norm.bias.zero_()
    quantization.smooth(model, calibration=[batch] if calibrated else None)  # nothing to divide by is no error
    assert torch.isfinite(quantised(model, batch, quantization.smooth(model))).all()


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_smoothing_lowers_the_error_of_outliers(family: str, precision: str) -> None:
    model, batch, calibration = planted(family), ragged(family), [ragged(family, seed=s) for s in (1, 2)]
    want = hidden(model, batch)
    plain = token_error(quantised(model, batch, Recipe(), precision), want)
    free = quantization.smooth(model, precision=precision)
    measured = quantization.smooth(model, precision=precision, calibration=calibration)
    assert {chosen.precision for chosen in free.linears.values()} == {precision}
    assert {chosen.precision for chosen in measured.linears.values()} == {precision}
    errors = [token_error(quantised(model, batch, recipe, precision), want) for recipe in (free, measured)]
    assert errors[0] < 0.8 * plain
    assert errors[1] < 0.6 * plain


def test_smoothing_is_left_out_where_it_does_not_help() -> None:
    model = build()
    for norm in encoder_of(model).modules():
        if isinstance(norm, nn.LayerNorm):
            norm.weight.fill_(1)
            norm.bias.fill_(0)
    recipe = quantization.smooth(model, calibration=[ragged(seed=1)], strength=(0.0, 1.0))
    assert len(recipe.linears) < 4 * LAYERS
    batch = ragged()
    want = hidden(model, batch)
    assert token_error(quantised(model, batch, recipe), want) <= 1.1 * token_error(
        quantised(model, batch, Recipe()), want
    )


def test_group_size_reaches_the_recipe() -> None:
    recipe = quantization.smooth(build(), precision="int4", group_size=32)
    assert recipe.group_size == 32
    assert {chosen.group_size for chosen in recipe.linears.values()} == {32}


# --- the model and the batches ---------------------------------------------------------------------------------------


def test_nothing_in_the_model_changes() -> None:
    model = planted(head="sequence-classification").train()
    before = copy.deepcopy(model.state_dict())
    batch = {**ragged(), "labels": torch.zeros(4, dtype=torch.long)}
    quantization.smooth(model, calibration=[batch])
    quantization.mixed(model, [batch], tolerance=0.05)
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_accelerated_model_gives_the_same_and_stays_accelerated() -> None:
    model, batch = planted(), ragged()
    want = quantization.outliers(model, [batch]), quantization.sensitivity(model, [batch])
    xfast.accelerate(model, precision="int8")
    int8 = hidden(model, batch)
    assert (quantization.outliers(model, [batch]), quantization.sensitivity(model, [batch])) == want
    assert torch.equal(hidden(model, batch), int8)


def test_padding_and_its_contents_count_for_nothing() -> None:
    model, batch = planted(), ragged()
    wide = {name: nn.functional.pad(values, (0, 5), value=0) for name, values in batch.items()}
    wide["input_ids"][:, 17:] = 1
    report = quantization.outliers(model, [batch])
    assert report.tokens == int(batch["attention_mask"].sum())
    assert_close(report.to_dict(), quantization.outliers(model, [wide]).to_dict())
    rolled = left_padded(batch)
    assert quantization.outliers(model, [rolled]).tokens == report.tokens
    assert_close(report.to_dict(), quantization.outliers(model, [rolled]).to_dict())


def assert_close(got: Any, want: Any) -> None:
    """The same structure and whole numbers; floats nearly."""
    if isinstance(want, dict):
        assert list(got) == list(want)
        got, want = list(got.values()), list(want.values())
    if isinstance(want, list | tuple):
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs)
    elif isinstance(want, float):
        assert math.isclose(got, want, rel_tol=1e-3, abs_tol=1e-6)
    else:
        assert got == want


def test_batches_of_a_head_with_choices() -> None:
    model, batch = planted(head="multiple-choice"), ragged()
    choices = {name: values.view(2, 2, -1) for name, values in batch.items()}
    assert quantization.outliers(model, [choices]) == quantization.outliers(model, [batch])


def test_bf16_weights() -> None:
    model, batch = planted().to(torch.bfloat16), ragged()
    exact = copy.deepcopy(model).float()
    recipe = quantization.smooth(model, calibration=[batch])
    assert set(recipe.linears)
    assert quantization.sensitivity(model, [batch]) == quantization.sensitivity(exact, [batch])


# --- reports ---------------------------------------------------------------------------------------------------------


def test_outliers_names_the_planted_channels() -> None:
    model, batch = planted(), ragged()
    report = quantization.outliers(model, [batch])
    assert [(p.layer, p.name) for p in report.products] == [(i, name) for i in range(LAYERS) for name in LINEARS]
    assert report.channels() == dict.fromkeys(CHANNELS, 2 * LAYERS) or set(report.channels()) == set(CHANNELS)
    for product in report.products:
        if product.name in ("qkv", "ffn_in"):
            assert set(product.outliers) == set(CHANNELS)
            assert product.channel in CHANNELS and product.ratio > 10 and product.kurtosis > 10
            assert product.worst_error >= product.error > 0
            assert product.from_outliers > 0.5
    text = str(report)
    assert "qkv" in text and "channel" in text and all(str(channel) in text for channel in CHANNELS)
    assert json.loads(json.dumps(report.to_dict()))["products"][0]["name"] == "qkv"


def test_outliers_finds_none_where_there_are_none() -> None:
    model = build(seed=3)
    for norm in encoder_of(model).modules():
        if isinstance(norm, nn.LayerNorm):
            norm.weight.fill_(1)
            norm.bias.fill_(0)
    report = quantization.outliers(model, [ragged()])
    assert report.channels() == {}
    assert all(p.from_outliers == 0 and p.ratio < 6 for p in report.products if p.name in ("qkv", "ffn_in"))


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
def test_sensitivity_is_what_a_recipe_of_one_product_gives(precision: str) -> None:
    model, batches = build(), [ragged(), ragged(lengths=(3, 11), seed=1)]
    report = quantization.sensitivity(model, batches, precision)
    want = torch.cat([hidden(model, batch) for batch in batches])

    def measured(linears: dict[tuple[int, str], LinearFormat]) -> float:
        recipe = Recipe(linears=linears)
        return token_error(torch.cat([quantised(model, batch, recipe, "fp32") for batch in batches]), want)

    chosen = LinearFormat(precision)
    for product in report.products[::3]:
        assert math.isclose(product.error, measured({(product.layer, product.name): chosen}), rel_tol=1e-3)
    assert math.isclose(report.layers[1], measured({(1, name): chosen for name in LINEARS}), rel_tol=1e-3)
    keys = itertools.product(range(LAYERS), LINEARS)
    assert math.isclose(report.everything, measured(dict.fromkeys(keys, chosen)), rel_tol=1e-3)
    assert report.tokens == len(want)
    text = str(report)
    assert f"{report.everything:.2e}" in text and f"{report.layers[2]:.2e}" in text
    assert json.loads(json.dumps(report.to_dict()))["precision"] == precision


def test_sensitivity_finds_the_worst_product_and_what_smoothing_does_for_it() -> None:
    model, batch = build("xlm-roberta-xl"), ragged()
    layer = encoder_of(model).encoder.layer[1]
    layer.LayerNorm.weight[7] = 300  # read by ffn_in alone
    layer.intermediate.dense.weight[:, 7] = 0.001  # where it matters little: the other channels' steps are what is lost
    report = quantization.sensitivity(model, [batch])
    assert [(p.layer, p.name) for p in report.worst(1)] == [(1, "ffn_in")]
    smoothed = quantization.sensitivity(model, [batch], recipe=quantization.smooth(model, calibration=[batch]))
    before, after = ({(p.layer, p.name): p.error for p in each.products} for each in (report, smoothed))
    assert after[1, "ffn_in"] < 0.3 * before[1, "ffn_in"]


# --- mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 0.003, 1e-5])
def test_mixed_stays_within_the_tolerance(family: str, tolerance: float) -> None:
    model, batches = planted(family), [ragged(family), ragged(family, lengths=(3, 11), seed=1)]
    recipe, report = quantization.mixed(model, batches, tolerance=tolerance)
    want = torch.cat([hidden(model, batch) for batch in batches])
    got = torch.cat([quantised(model, batch, recipe, "int8") for batch in batches])
    assert token_error(got, want) <= tolerance
    assert abs(token_error(got, want) - report.result.error) <= 1e-6
    assert math.isclose(report.result.worst_cosine, float(cosine_similarity(got, want).min()), abs_tol=1e-6)
    assert set(recipe.linears) == set(itertools.product(range(LAYERS), LINEARS))
    assert report.result.bytes == sum(p.bytes for p in report.products)
    within = [m.bytes for m in report.uniform.values() if m.error <= tolerance]
    assert report.result.bytes <= min(within)
    for p in report.products:
        chosen = recipe.linears[p.layer, p.name]
        assert (chosen.precision, chosen.divisor is not None) == (p.precision, p.smoothed)


def test_mixed_gives_bytes_where_they_matter() -> None:
    model, batch = planted(), ragged()
    uniform = quantization.mixed(model, [batch], tolerance=10.0)[1].uniform
    int4, int8 = uniform["int4"].error, uniform["int8"].error
    tolerances = (10.0, (int4 * int8) ** 0.5, int8, int8 / 3, 1e-7)
    reports = [quantization.mixed(model, [batch], tolerance=tolerance)[1] for tolerance in tolerances]
    sizes = [report.result.bytes for report in reports]
    assert sizes == sorted(sizes) and len(set(sizes)) >= 4
    assert {p.precision for p in reports[0].products} == {"int4"}
    assert {p.precision for p in reports[-1].products} == {"fp32"}
    assert any(len({p.precision for p in report.products}) > 1 for report in reports)


def test_mixed_is_near_the_best_of_all_choices() -> None:
    model, batch = planted(num_hidden_layers=1), ragged()
    want = hidden(model, batch)
    precisions = ("int4", "int8", "fp32")
    sizes, errors = [], []
    _, everything = quantization.mixed(model, [batch], tolerance=10.0, precisions=precisions, smoothing=False)
    each = {name: {p.name: p.bytes for p in _uniform(model, batch, name).products} for name in precisions}
    for choice in itertools.product(precisions, repeat=4):
        linears = {(0, name): LinearFormat(p) for name, p in zip(LINEARS, choice, strict=True)}
        errors.append(token_error(quantised(model, batch, Recipe(linears=linears), "fp32"), want))
        sizes.append(sum(each[p][name] for name, p in zip(LINEARS, choice, strict=True)))
    assert everything.result.bytes == min(sizes)
    for tolerance in (0.05, 0.02, 0.01, 0.005):
        best = min(size for size, error in zip(sizes, errors, strict=True) if error <= tolerance)
        _, report = quantization.mixed(model, [batch], tolerance=tolerance, precisions=precisions, smoothing=False)
        assert best <= report.result.bytes <= 1.4 * best


def _uniform(model: Any, batch: Any, precision: str) -> Any:
    return quantization.mixed(model, [batch], tolerance=10.0, precisions=[precision], smoothing=False)[1]


def test_mixed_without_smoothing_has_no_divisors_and_is_no_smaller() -> None:
    model, batch = planted(), ragged()
    recipe, plain = quantization.mixed(model, [batch], tolerance=0.02, smoothing=False)
    assert all(chosen.divisor is None for chosen in recipe.linears.values())
    _, smoothed = quantization.mixed(model, [batch], tolerance=0.02)
    assert any(p.smoothed for p in smoothed.products)
    assert smoothed.result.bytes <= plain.result.bytes


def test_mixed_report_prints_and_dumps() -> None:
    _, report = quantization.mixed(planted(), [ragged()], tolerance=0.02)
    text = str(report)
    assert f"{report.result.error:.2e}" in text and f"{report.result.worst_cosine:.5f}" in text
    assert "all int8" in text and "2.00e-02" in text
    assert json.loads(json.dumps(report.to_dict()))["result"]["bytes"] == report.result.bytes


def test_mixed_uses_bf16_only_where_the_cpu_has_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(num_hidden_layers=1), ragged()
    for isa in xfast.available_isas():
        monkeypatch.setattr(quantization, "requested_isa", lambda isa=isa: isa)
        _, report = quantization.mixed(model, [batch], tolerance=1.0)
        assert ("bf16" in report.uniform) == (isa in ("avx512_bf16", "amx"))
    _, report = quantization.mixed(model, [batch], tolerance=0.01, precisions=("int8", "bf16"))
    assert set(report.uniform) == {"int8", "bf16"}


def test_mixed_says_so_when_nothing_meets_the_tolerance() -> None:
    with pytest.raises(xfast.BackendUnavailableError, match=r"tolerance: no choice of int4, int8 .* least error"):
        quantization.mixed(planted(), [ragged()], tolerance=1e-6, precisions=("int4", "int8"))


# --- bad input -------------------------------------------------------------------------------------------------------

IDS = {"input_ids": torch.tensor([[5, 6]])}
CALIBRATIONS: list[tuple[Any, type[Exception], str]] = [
    ([], xfast.InvalidOptionError, "calibration: expected a non-empty sequence"),
    ({}, xfast.InvalidOptionError, "calibration"),
    (IDS, xfast.InvalidOptionError, "calibration: expected a non-empty sequence"),
    ("text", xfast.InvalidOptionError, "calibration"),
    (iter([IDS]), xfast.InvalidOptionError, "calibration"),
    ([IDS, "text"], xfast.InvalidOptionError, r"calibration\[1\]: expected a mapping"),
    ([IDS, {}], xfast.InvalidInputError, r"calibration\[1\]: give exactly one of"),
    ([{"input_ids": [[5, 6]]}], xfast.InvalidInputError, r"calibration\[0\]: input_ids is a list; expected a tensor"),
    ([{"input_ids": torch.tensor([5, 6])}], xfast.InvalidInputError, r"calibration\[0\]: input_ids"),
    ([{"input_ids": torch.tensor([[5.0, 6.0]])}], xfast.InvalidInputError, r"calibration\[0\]: input_ids"),
    ([{"input_ids": torch.tensor([[5, 101]])}], xfast.InvalidInputError, r"calibration\[0\]: input_ids\[0, 1\] is 101"),
    ([{"input_ids": torch.full((1, 60), 5)}], xfast.InvalidInputError, r"calibration\[0\]: position"),
    ([{**IDS, "attention_mask": torch.tensor([[1, 2]])}], xfast.InvalidInputError, r"calibration\[0\]: attention_mask"),
    ([{**IDS, "attention_mask": torch.ones(1, 1, 2, 2)}], xfast.InvalidInputError, r"calibration\[0\]: attention_mask"),
    ([{**IDS, "attention_mask": torch.tensor([[0, 0]])}], xfast.InvalidInputError, "calibration: .* no token"),
    ([{"inputs_embeds": torch.full((1, 2, 64), math.nan)}], xfast.InvalidInputError, "calibration: .* NaN"),
]


@pytest.mark.parametrize(("calibration", "kind", "message"), CALIBRATIONS, ids=range(len(CALIBRATIONS)))
@pytest.mark.parametrize("call", ["smooth", "outliers", "mixed"])
def test_bad_calibration(call: str, calibration: Any, kind: type[Exception], message: str) -> None:
    if isinstance(calibration, type(iter([]))):
        calibration = iter([IDS])
    calls = {
        "smooth": lambda model: quantization.smooth(model, calibration=calibration),
        "outliers": lambda model: quantization.outliers(model, calibration),
        "mixed": lambda model: quantization.mixed(model, calibration, tolerance=0.1),
    }
    with pytest.raises(kind, match=message):
        calls[call](build(num_hidden_layers=1))


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("smooth", {"precision": "bf16"}, "precision: 'bf16' .* int8, int4"),
    ("smooth", {"precision": None}, "precision: None"),
    ("smooth", {"group_size": 48}, "group_size: 48 .* 32, 64, 128"),
    *(("smooth", {"strength": value}, "strength") for value in (-0.1, 1.1, math.nan, "0.3", True, (0.3, 0.4), [])),
    *(("smooth", {"strength": value, "calibration": [IDS]}, "strength") for value in ((), [2.0], "0.3", (None,))),
    ("sensitivity", {"precision": "fp32"}, "precision: 'fp32' .* int4, int8, bf16"),
    ("sensitivity", {"precision": 8}, "precision: 8"),
    ("sensitivity", {"recipe": {}}, "recipe: expected"),
    ("sensitivity", {"recipe": Recipe(linears={(9, "qkv"): LinearFormat("int8")})}, "layers 0 to 0"),
    *(("mixed", {"tolerance": value}, "tolerance") for value in (0, -1.0, math.nan, math.inf, "0.1", None, True)),
    ("mixed", {"tolerance": 0.1, "group_size": 16}, "group_size: 16"),
    *(
        ("mixed", {"tolerance": 0.1, "precisions": value}, "precisions")
        for value in ("int8", (), ("int8", "int8"), ("fp16",), (8,), 3)
    ),
]


@pytest.mark.parametrize(("call", "options", "message"), OPTIONS, ids=lambda value: str(value)[:50])
def test_bad_options(call: str, options: dict[str, Any], message: str) -> None:
    model = build(num_hidden_layers=1)
    batches = () if call == "smooth" else ([IDS],)
    with pytest.raises(xfast.InvalidOptionError, match=message):
        getattr(quantization, call)(model, *batches, **options)


@pytest.mark.parametrize("call", ["smooth", "outliers"])
def test_bad_models(call: str) -> None:
    def run(model: Any) -> None:
        quantization.smooth(model) if call == "smooth" else quantization.outliers(model, [ragged()])

    for nothing in (nn.Linear(3, 3), "model", None):
        with pytest.raises(xfast.UnsupportedModelError, match="no encoder"):
            run(nothing)
    with pytest.raises(xfast.UnsupportedModelError, match="2 encoder"):
        run(nn.ModuleList([build(), build()]))
    with pytest.raises(xfast.InvalidWeightsError, match="meta device"):
        run(build().to("meta"))
    with pytest.raises(xfast.InvalidWeightsError, match="meta device"):
        run(xfast.accelerate(build(), precision="int8", keep_weights=False))
    for name in ("encoder.layer.1.output.dense.weight", "embeddings.LayerNorm.weight"):
        broken = build()
        broken.get_parameter(name).view(-1)[3] = math.nan
        with pytest.raises(xfast.InvalidWeightsError, match=f"{name} holds NaN"):
            run(broken)


def test_models_on_other_devices() -> None:
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:0")  # what a model on a GPU says, where there is none

    model = build()
    model.encoder.layer[0].output.dense.weight = Elsewhere(model.encoder.layer[0].output.dense.weight)
    with pytest.raises(xfast.BackendUnavailableError, match="cuda:0; this runs on the CPU only"):
        quantization.smooth(model)
    for backend, place in (("native", "on the CPU only"), ("auto", "with all weights on one GPU")):
        with pytest.raises(xfast.BackendUnavailableError, match=f"cuda:0; this runs .*{place}"):
            quantization.mixed(model, [ragged()], tolerance=0.1, backend=backend)


def test_formats_of_one_size_are_one_step() -> None:
    """fp8 and int8 take the same bytes: only the more exact is a step, in whichever order they were measured."""
    rungs = [mixed_precision.Rung(LinearFormat(p), error, size) for p, error, size in
             (("fp8", 0.2, 10), ("int8", 0.1, 10), ("bf16", 0.01, 20))]  # fmt: skip
    for order in itertools.permutations(rungs):
        path = mixed_precision._path({(0, "qkv"): list(order)})
        assert [step[0, "qkv"].chosen.precision for step in path] == ["int8", "bf16"]


def test_packed_weights_wait_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried is mapped, not held: formats of a large model do not fit in memory together."""
    target = calibration.find_target(build())
    run = trials.NativeTrials(target.weights, calibration.read_batches(target.weights.spec, [ragged()]))
    run.pack(dict.fromkeys(target.products(), LinearFormat("int8")))
    arrays = [array for packed in run._packed.values() for array in packed.values()]
    assert len(arrays) > 2 * len(target.products())
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trials.tempfile, "TemporaryFile", full)
    with pytest.raises(xfast.BackendUnavailableError, match=r"No space left on device; set TMPDIR"):
        quantization.sensitivity(build(), [ragged()])
