"""Precisions of the Triton backend: of all products, of each, in integers, and those that are chosen by measuring."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from gpu import DEVICE, FP8, NO_NUMPY_WARNINGS
from models import at_tokens, build, fallbacks, norm_error, quick_settings, ragged, token_error
from triton_models import PRE_NORM, fast, first_output, model_of, moved, same_at_tokens

import xfast
from xfast import quantization, trials
from xfast.kernels.gemm_weight_only import expand
from xfast.kernels.integer_weights import to_int4, to_int8
from xfast.recipe import LinearFormat, Recipe

pytestmark = NO_NUMPY_WARNINGS
_settings = pytest.fixture(autouse=True)(quick_settings)


@pytest.mark.parametrize(
    ("precision", "limit"),
    [("fp16", 3e-3), ("bf16", 2e-2), ("int8", 2.5e-2), ("int4", 0.15), pytest.param("fp8", 0.12, marks=FP8)],
)
@pytest.mark.parametrize("family", ["xlm-roberta", PRE_NORM])
def test_precisions(family: str, precision: str, limit: float) -> None:
    model, batch = model_of(family), moved(ragged())
    want = first_output(model, batch)
    got = first_output(fast(model, precision=precision), batch)
    same_at_tokens(got, want, batch, limit)
    assert norm_error(got, want) > 0


MIXED = {
    (0, "qkv"): "fp8", (0, "attention_out"): "bf16", (0, "ffn_in"): "int8", (0, "ffn_out"): "fp8",
    (1, "qkv"): "int4", (1, "attention_out"): "fp8", (1, "ffn_in"): "fp8", (1, "ffn_out"): "bf16",
    (2, "qkv"): "bf16", (2, "attention_out"): "int4", (2, "ffn_in"): "bf16", (2, "ffn_out"): "int8",
}  # fmt: skip


@FP8
@pytest.mark.parametrize("precision", ["bf16", "int4"])
@pytest.mark.parametrize("family", ["xlm-roberta", PRE_NORM])
def test_every_product_may_have_its_own_precision(family: str, precision: str) -> None:
    """All rows, and one row of any layer: no mixture of neighbours goes wrong."""
    recipe = Recipe(32, {key: LinearFormat(name, 32) for key, name in MIXED.items()})
    model, batch = model_of(family, "base-no-pooler", num_hidden_layers=4), moved(ragged(lengths=(6, 2)))
    want = first_output(model, batch)
    fast(model, precision=precision, recipe=recipe)
    same_at_tokens(first_output(model, batch), want, batch, 0.15)
    for layers in (1, 2, 3):  # each of them as the one whose rows are selected
        one = model_of(family, "sequence-classification", num_hidden_layers=4)
        fast(one, precision=precision, recipe=recipe, layers=layers)
        rows, full = (one(**batch, output_hidden_states=hidden).logits.float() for hidden in (False, True))
        assert float((rows - full).abs().max()) <= 0.02
    assert fallbacks(model) == fallbacks(one) == {}
    counted = {name: [*MIXED.values()].count(name) for name in ("fp8", "bf16", "int8", "int4")}
    counted[precision] += 4
    text = str(xfast.explain(model))
    for name, count in counted.items():
        assert f"{count} in {name}" in text
    assert "weights only" in text


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ["xlm-roberta", PRE_NORM])
def test_integers_cost_nothing_but_the_rounding_of_weights(family: str, precision: str) -> None:
    """The original in fp32, on the weights that the integers stand for: what differs is bf16."""
    model, batch = model_of(family, "base-no-pooler"), moved(ragged())
    rounded = copy.deepcopy(model)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and "layer." in name:
            weight = to_int8(module.weight) if precision == "int8" else to_int4(module.weight, 32)
            module.weight.data = expand(weight, torch.float32)
    want = first_output(rounded, batch)
    got = first_output(fast(model, precision=precision, recipe=Recipe(32)), batch)
    same_at_tokens(got, want, batch, 1.5e-2)


def test_integer_weights_are_expanded_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfast.backends import triton_forward

    batch = moved(ragged())
    for precision in ("int8", "int4"):
        model = fast(model_of(head="base-no-pooler", num_hidden_layers=1), precision=precision)
        few = first_output(model, batch)
        expanded: list[object] = []

        def counted(weight: Any, dtype: torch.dtype, seen: list[object] = expanded) -> torch.Tensor:
            seen.append(weight)
            return expand(weight, dtype)

        monkeypatch.setattr(triton_forward, "expands", lambda rows: True)
        monkeypatch.setattr(triton_forward, "expand", counted)
        many = first_output(model, batch)
        monkeypatch.undo()
        assert len(expanded) == 4  # each product once
        assert 0 < norm_error(at_tokens(many, batch["attention_mask"]), at_tokens(few, batch["attention_mask"])) <= 2e-2


def test_int4_takes_less_memory() -> None:
    sizes = {}
    for precision in ("bf16", "int8", "int4"):
        model = fast(model_of(head="base-no-pooler", hidden_size=128, intermediate_size=256), precision=precision)
        engine = model.__dict__["forward"].plan.current_engine(model)
        sizes[precision] = engine._copied_bytes
    weights = sum(p.numel() for n, p in model.named_parameters() if "layer" in n and n.endswith("dense.weight"))
    assert sizes["int8"] < 0.55 * sizes["bf16"] and sizes["int4"] < 0.3 * sizes["bf16"]
    assert sizes["int4"] >= weights // 2


def test_mixtures_that_cannot_be() -> None:
    for precision, linears, part in (
        ("fp16", {(0, "qkv"): LinearFormat("fp8")}, "products in fp8 do not go with precision fp16"),
        ("bf16", {(0, "qkv"): LinearFormat("fp32")}, "accepted: bf16, int8, int4, fp8"),
        ("int8", {(0, "qkv"): LinearFormat("int8", 64, np.ones(64, np.float32))}, "divisors are for"),
    ):
        with pytest.raises(xfast.BackendUnavailableError, match=part):
            fast(model_of(), precision=precision, recipe=Recipe(linears=linears))
    with pytest.raises(xfast.InvalidOptionError, match="layers 0 to 1"):
        fast(model_of(), precision="bf16", recipe=Recipe(linears={(2, "qkv"): LinearFormat("int8")}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_models_own_dtype_is_kept_and_no_less_accurate(dtype: torch.dtype) -> None:
    batch = moved(ragged())
    mask = batch["attention_mask"].cpu()
    truth = at_tokens(first_output(model_of(), batch), mask)
    model = model_of().to(dtype)
    stock = norm_error(at_tokens(first_output(model, batch), mask), truth)
    output = fast(model)(**batch)[0]
    assert output.dtype == dtype
    assert norm_error(at_tokens(output.float().cpu(), mask), truth) <= 2 * stock


@FP8
@pytest.mark.parametrize("precision", ["model", "int8"])
def test_a_pre_norm_stream_keeps_small_biases(precision: str) -> None:
    """Beside a large stream a bias is less than half of its last place, and is the same in every layer."""
    model, batch = build(PRE_NORM, "base-no-pooler", num_hidden_layers=12), moved(ragged(PRE_NORM, lengths=(9, 7)))
    model.embeddings.word_embeddings.weight.mul_(10)
    bias = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(5))
    for layer in model.encoder.layer:
        layer.attention.output.dense.bias.copy_(bias)
        layer.output.dense.bias.copy_(bias)
    model = model.bfloat16().float().to(DEVICE)
    rounded = copy.deepcopy(model).bfloat16()

    def states(one: Any) -> torch.Tensor:
        return at_tokens(one(**batch)[0].float(), batch["attention_mask"])

    want = states(model)
    own = norm_error(states(rounded), want)
    got = norm_error(states(fast(rounded if precision == "model" else model, precision=precision)), want)
    assert got <= 1.3 * own, (got, own)


def test_auto_takes_the_fastest_within_the_tolerance() -> None:
    batch = moved(ragged(lengths=(5, 2)))
    loose = fast(model_of(num_hidden_layers=1), precision="auto", calibration=[batch], tolerance=0.5)
    tight = fast(model_of(num_hidden_layers=1), precision="auto", calibration=[batch], tolerance=1e-4)
    assert xfast.explain(loose).encoders[0].precision == "fp8"
    assert xfast.explain(tight).encoders[0].precision == "fp32"
    assert "auto: fp8 error" in str(xfast.explain(tight))


@FP8
def test_auto_takes_fp8_where_the_tolerance_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's products lose more in fp8 than the tolerance; the others stay there."""
    batch = moved(ragged(lengths=(5, 2)))
    uniform = [
        token_error(at_tokens(first_output(fast(model_of(), precision=p), batch), batch["attention_mask"].cpu()), want)
        for want in [at_tokens(first_output(model_of(), batch), batch["attention_mask"].cpu())]
        for p in ("fp8", "bf16")
    ]
    tolerance = 0.85 * uniform[0] + 0.15 * uniform[1]
    model = fast(model_of(), precision="auto", calibration=[batch], tolerance=tolerance)
    text = str(xfast.explain(model))
    assert xfast.explain(model).encoders[0].precision == "bf16"
    assert re.search(r"auto: fp8 in [4-7] of 8 products, the others bf16, instead: error", text), text
    want = at_tokens(first_output(model_of(), batch), batch["attention_mask"].cpu())
    got = at_tokens(first_output(model, batch), batch["attention_mask"].cpu())
    assert uniform[1] < token_error(got, want) <= tolerance
    searched = trials.TritonTrials
    monkeypatch.setattr(trials.TritonTrials, "__init__", None)  # what was found is tried first, and does
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.mul_(1.0001)
    assert token_error(at_tokens(first_output(model, batch), batch["attention_mask"].cpu()), want) <= 1.1 * tolerance
    assert "of 8 products" in str(xfast.explain(model)) and searched is trials.TritonTrials


@FP8
def test_auto_keeps_bf16_where_the_search_cannot_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trials.TritonTrials, "pack", full)
    batch = moved(ragged(lengths=(5, 2)))
    model = fast(model_of(num_hidden_layers=1), precision="auto", calibration=[batch], tolerance=2.5e-2)
    assert xfast.explain(model).encoders[0].precision == "bf16"
    assert "fp8 in some products was not tried: CUDA out of memory" in str(xfast.explain(model))


@FP8
def test_mixed_precision_chooses_for_the_gpu() -> None:
    model, batch = model_of(num_hidden_layers=1, hidden_size=128, intermediate_size=256), moved(ragged(lengths=(5, 2)))
    recipe, report = quantization.mixed(
        model, [batch], tolerance=0.06, precisions=["int4", "int8", "bf16"], backend="triton"
    )
    assert report.result.error <= 0.06 < report.uniform["int4"].error
    assert report.uniform["int4"].bytes < report.result.bytes < report.uniform["bf16"].bytes
    mask = batch["attention_mask"].cpu()
    want = at_tokens(first_output(model, batch), mask)
    got = at_tokens(first_output(fast(model, precision="bf16", recipe=recipe), batch), mask)
    assert token_error(got, want) == pytest.approx(report.result.error, rel=1e-3)
    with pytest.raises(xfast.BackendUnavailableError, match="products in fp8 do not go with precision fp32"):
        quantization.mixed(model, [batch], tolerance=0.1, precisions=["fp8", "fp32"], backend="triton")
    with pytest.raises(xfast.InvalidOptionError, match="backend: 'tensorrt' is not accepted"):
        quantization.mixed(model, [batch], tolerance=0.1, backend="tensorrt")
