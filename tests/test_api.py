"""``accelerate``, ``restore``, ``accelerated``, ``explain``: in place, exactly undone, and honest about what runs."""

from __future__ import annotations

import dataclasses
import inspect
import types
from typing import Any

import pytest
import torch
from models import (
    ALL_FAMILIES,
    HEADS,
    TOKEN_HEADS,
    arguments,
    at_tokens,
    build,
    encoder_of,
    error,
    fallbacks,
    outputs_of,
    quick_settings,
    ragged,
)
from torch import nn

import xfast
from xfast.backends.native import requested_isa

_settings = pytest.fixture(autouse=True)(quick_settings)

LINEARS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
LINEARS += ("intermediate.dense", "output.dense")


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module by identity: what an exact undo must bring back."""
    return {name: {key: id(value) for key, value in module.__dict__.items()} for name, module in model.named_modules()}


def assert_untouched(model: nn.Module) -> None:
    """Nothing of xfast is left in any module."""
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__, name


# --- accelerate and restore ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_accelerate_is_in_place_and_restore_undoes_it_exactly(family: str, head: str) -> None:
    model, batch = build(family, head), arguments(family, head)
    want = outputs_of(model(**batch, output_hidden_states=True))  # also installs transformers' own recorders
    before, weights = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert xfast.accelerate(model) is model
    assert "forward" in encoder_of(model).__dict__
    model(**batch, output_hidden_states=True)
    model(**batch)
    assert xfast.restore(model) is model
    assert snapshot(model) == before
    assert_untouched(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    got = outputs_of(model(**batch, output_hidden_states=True))
    assert all(torch.equal(got[name], values) for name, values in want.items())


def test_only_the_instance_is_patched() -> None:
    first, second, batch = build(seed=1), build(seed=1), ragged()
    cls = type(first)
    forward, attributes = cls.forward, set(vars(cls))
    want = second(**batch).last_hidden_state
    xfast.accelerate(first, precision="int8")
    assert cls.forward is forward and set(vars(cls)) == attributes
    assert_untouched(second)
    assert torch.equal(second(**batch).last_hidden_state, want)
    assert not torch.equal(first(**batch).last_hidden_state, want)


def test_restore_leaves_other_models_alone() -> None:
    model = build()
    assert xfast.restore(model) is model
    linear = nn.Linear(2, 2)
    assert xfast.restore(linear) is linear


def test_restore_brings_back_a_forward_of_the_users() -> None:
    model, batch = build(head="sequence-classification"), ragged()
    calls = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    model.forward = mine = types.MethodType(forward, model)
    want = model(**batch).logits
    xfast.accelerate(model)
    assert error(model(**batch).logits, want) <= 1e-5
    assert len(calls) == 2  # what the user put around the model still runs
    xfast.restore(model)
    assert model.__dict__["forward"] is mine
    assert torch.equal(model(**batch).logits, want)


def test_accelerating_twice_keeps_the_last_options_and_one_undo() -> None:
    model, batch = build(head="token-classification"), ragged()
    want = model(**batch).logits
    xfast.accelerate(model, precision="int8")
    eight_bits = model(**batch).logits
    xfast.accelerate(model, precision="fp32")
    assert xfast.explain(model).encoders[0].precision == "fp32"
    tokens = batch["attention_mask"]
    assert error(at_tokens(model(**batch).logits, tokens), at_tokens(want, tokens)) <= 1e-5
    assert error(at_tokens(eight_bits, tokens), at_tokens(want, tokens)) > 1e-3
    xfast.restore(model)
    assert_untouched(model)
    assert torch.equal(model(**batch).logits, want)


def test_a_refused_accelerate_keeps_the_previous_one() -> None:
    model, batch = xfast.accelerate(build(), precision="int8"), ragged()
    want = model(**batch).last_hidden_state
    for options in ({"precision": "fp8"}, {"precision": "int2"}, {"layers": 9}):
        with pytest.raises(xfast.XfastError):
            xfast.accelerate(model, **options)
    assert [encoder.precision for encoder in xfast.explain(model).encoders] == ["int8"]
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_two_models_with_different_options() -> None:
    batch, models = ragged(), {}
    for precision in ("fp32", "bf16", "int8"):
        models[precision] = xfast.accelerate(build(seed=5), precision=precision)
    shallow = xfast.accelerate(build(seed=5), layers=1)
    want = build(seed=5)(**batch, output_hidden_states=True)
    tokens = batch["attention_mask"]
    errors = {
        precision: error(at_tokens(model(**batch)[0], tokens), at_tokens(want[0], tokens))
        for precision, model in models.items()
    }
    assert errors["fp32"] <= 1e-5 < errors["bf16"] < errors["int8"] <= 5e-2
    assert error(at_tokens(shallow(**batch)[0], tokens), at_tokens(want.hidden_states[1], tokens)) <= 1e-5
    assert [xfast.explain(model).encoders[0].precision for model in models.values()] == list(models)


@pytest.mark.parametrize("head", ["base", "masked-lm"])
def test_signature_stays_the_originals(head: str) -> None:
    # Trainer keeps the columns of a data set that it finds in the signature of model.forward.
    model = build(head=head)
    want = inspect.signature(model.forward)
    assert inspect.signature(xfast.accelerate(model).forward) == want


# --- with xfast.accelerated ------------------------------------------------------------------------------------------


def test_accelerated_holds_inside_the_block_only() -> None:
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    with xfast.accelerated(model, precision="int8") as inside:
        assert inside is model
        assert not torch.equal(model(**batch).last_hidden_state, want)
        assert xfast.explain(model).encoders[0].precision == "int8"
    assert_untouched(model)
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_accelerated_restores_after_an_exception() -> None:
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    with pytest.raises(KeyError, match="mine"), xfast.accelerated(model):
        raise KeyError("mine")
    assert_untouched(model)
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_accelerated_gives_back_an_outer_acceleration() -> None:
    model, batch = xfast.accelerate(build(), precision="int8"), ragged()
    want = model(**batch).last_hidden_state
    with xfast.accelerated(model, precision="fp32"):
        assert not torch.equal(model(**batch).last_hidden_state, want)
    assert [encoder.precision for encoder in xfast.explain(model).encoders] == ["int8"]
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_accelerated_does_not_hide_an_exception_behind_freed_weights() -> None:
    # The block cannot be undone: better to refuse at once than to raise at its end, over the user's exception.
    with pytest.raises((xfast.InvalidOptionError, KeyError)), xfast.accelerated(build(), keep_weights=False):
        raise KeyError("mine")


def test_restored_runs_the_original_inside_the_block_only() -> None:
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    fast = xfast.accelerate(model, precision="int8")(**batch).last_hidden_state
    with xfast.restored(model) as inside:
        assert inside is model
        assert_untouched(model)
        assert torch.equal(model(**batch).last_hidden_state, want)
    with pytest.raises(KeyError, match="mine"), xfast.restored(model):
        raise KeyError("mine")
    assert torch.equal(model(**batch).last_hidden_state, fast)
    with xfast.restored(build()) as plain:
        assert_untouched(plain)
    xfast.accelerate(model, keep_weights=False)
    with pytest.raises(xfast.WeightsFreedError, match="restored"), xfast.restored(model):
        pass


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_of_an_untouched_model() -> None:
    explained = xfast.explain(build())
    assert explained == xfast.Explanation((), ())
    assert str(explained) == "not accelerated by xfast: the original code runs"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_explain_names_what_runs(precision: str) -> None:
    model = xfast.accelerate(build("camembert", "sequence-classification"), precision=precision)
    (encoder,) = xfast.explain(model).encoders
    assert (encoder.name, encoder.family, encoder.backend) == ("CamembertModel", "camembert", "native")
    assert (encoder.precision, encoder.layers, encoder.num_layers) == (precision, 3, 3)
    assert encoder.keep_weights and encoder.fallbacks == {}
    text = str(xfast.explain(model))
    assert "CamembertModel (camembert): backend native" in text and f"precision {precision}" in text
    assert f"instruction set: {requested_isa()}" in text
    assert "threads: 2" in text and "fused: QKV" in text and "packed weights" in text
    assert "head: CamembertForSequenceClassification reads token 0" in text
    assert ("bf16:" in text) == (precision == "bf16")
    assert str(xfast.explain(xfast.restore(model))).startswith("not accelerated")


def test_explain_counts_fallbacks_by_reason() -> None:
    model, batch = xfast.accelerate(build(attention="eager")), ragged()
    for _ in range(3):
        model(**batch, output_attentions=True)
    model.train()
    model(**batch)
    model.eval()
    model(**batch)
    counts = xfast.explain(model).encoders[0].fallbacks
    assert sorted(counts.values()) == [1, 3]
    assert {reason: count for reason, count in counts.items() if "attention weights" in reason}.popitem()[1] == 3
    assert {reason: count for reason, count in counts.items() if "training" in reason}.popitem()[1] == 1
    text = str(xfast.explain(model))
    assert "3 call(s) ran the original code: attention weights are asked for" in text
    assert "1 call(s) ran the original code: the model is in training mode" in text
    assert sum(fallbacks(xfast.accelerate(model)).values()) == 0  # a new plan counts from 0


@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_explain_says_once_what_a_head_reads(head: str) -> None:
    model = xfast.accelerate(build(head=head))
    read, *rest = xfast.explain(model).heads
    assert read == f"{type(model).__name__} reads every token: it runs on real tokens, padding is added after it"
    native = "XLMRobertaLMHead: one native call in fp32, its weights read in place"
    assert rest == ([native] if head == "masked-lm" else [])


def test_explanation_is_a_snapshot() -> None:
    model, batch = xfast.accelerate(build(attention="eager")), ragged()
    before = xfast.explain(model)
    model(**batch, output_attentions=True)
    assert before.encoders[0].fallbacks == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.encoders[0].precision = "int8"  # type: ignore[misc]


# --- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8)])
def test_packed_weights_cost_what_they_must(precision: str, bits: int) -> None:
    model = build(hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    layers = encoder_of(model).encoder.layer
    weights = sum(layer.get_submodule(path).weight.numel() for layer in layers for path in LINEARS)
    xfast.accelerate(model, precision=precision)
    packed = model.forward.plan.engine._encoder.packed_bytes
    assert weights * bits / 8 <= packed <= 1.1 * weights * bits / 8
    assert f"packed weights: {packed / 2**20:.1f} MiB" in str(xfast.explain(model))


def test_num_threads_follow_torch_unless_set() -> None:
    xfast.set_num_threads(None)
    assert xfast.get_num_threads() == torch.get_num_threads() == 1
    xfast.set_num_threads(3)
    assert xfast.get_num_threads() == 3 and torch.get_num_threads() == 1
    assert "threads: 3" in str(xfast.explain(xfast.accelerate(build())))


def test_everything_public_exists() -> None:
    assert sorted(xfast.__all__) == xfast.__all__
    assert all(hasattr(xfast, name) for name in xfast.__all__)
    assert "portable" in xfast.available_isas()
    errors = [value for name, value in vars(xfast).items() if name.endswith("Error")]
    assert len(errors) >= 9 and all(issubclass(error_type, xfast.XfastError) for error_type in errors)
