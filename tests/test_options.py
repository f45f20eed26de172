"""Options that choose what runs: ``layers``, the model's own dtype, named precisions, ``precision="auto"``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    arguments,
    at_tokens,
    build,
    encoder_of,
    error,
    fallbacks,
    norm_error,
    outputs_of,
    quick_settings,
    ragged,
    simulated_int8,
    token_error,
)

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_layers_k_gives_hidden_state_k(layers: int, precision: str) -> None:
    model, batch = build(), ragged()
    tokens = batch["attention_mask"]
    want = model(**batch, output_hidden_states=True).hidden_states[layers]
    states = xfast.accelerate(model, precision=precision)(**batch, output_hidden_states=True).hidden_states
    xfast.accelerate(model, precision=precision, layers=layers)
    got = model(**batch, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, states[layers])
    assert len(got.hidden_states) == layers + 1
    assert all(torch.equal(ours, full) for ours, full in zip(got.hidden_states, states, strict=False))
    limit = {"fp32": 1e-5, "bf16": 1e-2, "int8": 5e-2}[precision]
    assert norm_error(at_tokens(got.last_hidden_state, tokens), at_tokens(want, tokens)) <= limit
    assert xfast.explain(model).encoders[0].layers == layers
    assert f"layers: {layers} of 3" in str(xfast.explain(model))


def test_heads_read_layer_k() -> None:
    model, batch = build(head="sequence-classification"), ragged()
    hidden = model.base_model(**batch, output_hidden_states=True).hidden_states[2]
    want = model.classifier(hidden)
    assert error(xfast.accelerate(model, layers=2)(**batch).logits, want) <= 1e-5
    assert fallbacks(model) == {}


def test_fewer_layers_and_a_call_for_the_original_code() -> None:
    # The original code runs every layer: a call that needs it must not quietly return the last layer for layer 1.
    model, batch = build(attention="eager"), ragged()
    tokens = batch["attention_mask"]
    want = model(**batch, output_hidden_states=True).hidden_states[1]
    xfast.accelerate(model, layers=1)
    try:
        got = model(**batch, output_attentions=True).last_hidden_state
    except xfast.XfastError:
        return
    assert error(at_tokens(got, tokens), at_tokens(want, tokens)) <= 1e-5


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_half_precision_models_keep_their_dtype(dtype: str, head: str) -> None:
    batch = arguments("xlm-roberta", head)
    model = build(head=head)
    tokens = batch["attention_mask"]
    exact = outputs_of(model(**batch, output_hidden_states=True))
    model.to(DTYPES[dtype])
    stock = outputs_of(model(**batch, output_hidden_states=True))
    xfast.accelerate(model)
    got = outputs_of(model(**batch, output_hidden_states=True))
    assert got.keys() == stock.keys()
    rows = tokens.view(-1, tokens.shape[-1])
    for name, values in got.items():
        mask = rows if name.startswith("hidden") else tokens
        ours, theirs = (error(at_tokens(v, mask), at_tokens(exact[name], mask)) for v in (values, stock[name]))
        assert values.dtype == DTYPES[dtype]
        assert ours <= 2 * theirs + {"bf16": 2e-3, "fp16": 3e-4}[dtype], name
    explained = xfast.explain(model).encoders[0]
    assert explained.precision == {"bf16": "bf16", "fp16": "fp32"}[dtype]
    assert any("fp16" in note for note in explained.notes) == (dtype == "fp16")
    assert fallbacks(model) == {}


@pytest.mark.parametrize("weights", ["fp32", *DTYPES])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_any_precision_on_any_weights(weights: str, precision: str) -> None:
    model, batch = build().to(DTYPES.get(weights, torch.float32)), ragged()
    tokens = batch["attention_mask"]
    exact = copy.deepcopy(model).float()  # the same, already rounded, weights
    want = at_tokens(exact(**batch).last_hidden_state, tokens)
    plain = {"bf16": copy.deepcopy(exact).to(torch.bfloat16), "int8": simulated_int8(exact)}.get(precision, exact)
    theirs = norm_error(at_tokens(plain(**batch).last_hidden_state, tokens), want)
    got = at_tokens(xfast.accelerate(model, precision=precision)(**batch).last_hidden_state, tokens)
    rounding = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 5e-4}[weights]  # of the result, which has the weights' dtype
    assert got.dtype == DTYPES.get(weights, torch.float32)
    assert norm_error(got, want) <= 1.2 * theirs + rounding
    assert xfast.explain(model).encoders[0].precision == precision


def test_embeddings_of_another_dtype_than_the_layers() -> None:
    model, batch = build(), ragged()
    want = model(**batch)
    model.embeddings.word_embeddings.to(torch.bfloat16)  # as offloading tools keep the big table
    stock = model(**batch)
    got = xfast.accelerate(model)(**batch)
    tokens = batch["attention_mask"]
    assert got.last_hidden_state.dtype == stock.last_hidden_state.dtype
    assert error(at_tokens(got[0], tokens), at_tokens(stock[0], tokens)) <= 1e-5
    assert error(at_tokens(got[0], tokens), at_tokens(want[0], tokens)) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_of_torch_does_not_matter(dtype: torch.dtype) -> None:
    model, batch = build(), ragged()
    want = xfast.accelerate(model)(**batch, output_hidden_states=True)
    torch.set_default_dtype(dtype)
    try:
        got = model(**batch, output_hidden_states=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, values in outputs_of(want).items():
        assert torch.equal(outputs_of(got)[name], values), name


def test_default_device_of_torch_does_not_matter() -> None:
    model, batch = build(), ragged()
    want = xfast.accelerate(model)(**batch).last_hidden_state
    with torch.device("meta"):  # stands for a GPU: whatever is made without a device lands elsewhere
        got = model(**batch).last_hidden_state
    assert torch.equal(got, want)


# --- precision="auto" ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tolerance", "chosen"), [(0.5, "int8"), (2.5e-2, "bf16"), (1e-4, "fp32")])
def test_auto_takes_the_fastest_within_the_tolerance(tolerance: float, chosen: str) -> None:
    model, batch = build(), ragged()
    tokens = batch["attention_mask"]
    want = at_tokens(model(**batch).last_hidden_state, tokens)
    xfast.accelerate(model, precision="auto", calibration=[batch, ragged(lengths=(5, 8), seed=3)], tolerance=tolerance)
    explained = xfast.explain(model).encoders[0]
    assert explained.precision == chosen
    assert any(chosen in note and "chosen" in note for note in explained.notes)
    assert "auto: int8 error" in str(xfast.explain(model))
    assert token_error(at_tokens(model(**batch).last_hidden_state, tokens), want) <= tolerance
    named = xfast.accelerate(model, precision=chosen)(**batch).last_hidden_state
    auto = xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=tolerance)(**batch)
    assert torch.equal(auto.last_hidden_state, named)


def test_auto_with_an_impossible_tolerance_says_so() -> None:
    # fp32 differs from the original by rounding: no precision can keep 1e-12.
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    with pytest.raises(xfast.BackendUnavailableError, match=r"tolerance.*1e-12"):
        xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=1e-12)
    assert "forward" not in model.__dict__
    assert torch.equal(model(**batch).last_hidden_state, want)


@pytest.mark.parametrize("head", HEADS)
def test_auto_takes_the_batches_that_the_model_takes(head: str) -> None:
    model, batch = build(head=head), arguments("xlm-roberta", head)
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.1)
    assert xfast.explain(model).encoders[0].precision == "int8"


def test_auto_measures_again_after_weights_changed() -> None:
    model, batch = build(), ragged()
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.1)
    first = xfast.explain(model).encoders[0].notes
    encoder_of(model).encoder.layer[0].output.dense.weight.mul_(10)
    model(**batch)
    again = xfast.explain(model).encoders[0].notes
    assert len(again) == len(first) and again != first


def test_calibration_that_is_too_long_is_refused() -> None:
    model = build()
    long = {"input_ids": torch.full((2, 100), 7)}
    with pytest.raises(xfast.InvalidInputError, match="40 positions"):
        xfast.accelerate(model, precision="auto", calibration=[long], tolerance=0.1)
    assert "forward" not in model.__dict__


def test_choosing_a_precision_leaves_every_modules_mode_alone() -> None:
    # Monte Carlo dropout: everything evaluates but the dropouts
    model = build()
    for module in model.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    modes = [module.training for module in model.modules()]
    xfast.quantization.outliers(model, [ragged()])
    xfast.accelerate(model, precision="auto", calibration=[ragged()], tolerance=0.1)
    assert [module.training for module in model.modules()] == modes and any(modes)


@pytest.mark.parametrize(
    ("calibration", "error"),
    [
        ([{"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.zeros(1, 2)}], "no token"),
        ([{"input_ids": torch.full((1, 2), 10**6)}], r"calibration\[0\]: input_ids"),
        ([], "needs calibration"),
    ],
    ids=["masked", "bad id", "empty"],
)
def test_calibration_batches_that_say_nothing_are_refused(calibration: Any, error: str) -> None:
    with pytest.raises(xfast.XfastError, match=error):
        xfast.accelerate(build(), precision="auto", calibration=calibration, tolerance=0.1)
