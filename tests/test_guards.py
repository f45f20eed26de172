"""Conditions around an accelerated encoder of which each has one test that notices when it goes: one of these.

Found by leaving them out one at a time.
"""

from __future__ import annotations

import copy
import threading
import types
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import at_tokens, build, encoder_of, error, fallbacks, quick_settings, ragged
from torch import nn
from torch.autograd import forward_ad

import xfast
from xfast.backends.base import CannotRunError
from xfast.patch import HeadContext, _refuse_elsewhere, context_of, current_context, wrapped_since
from xfast.plan import Plan, _common_device
from xfast.truncation import run_layers

_settings = pytest.fixture(autouse=True)(quick_settings)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        return call()
    except Exception as raised:
        return type(raised), str(raised)


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_change_while_the_weights_are_packed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, original = build(), ragged(), Plan._build

    def changed_meanwhile(self: Plan, *args: Any) -> Any:
        made = original(self, *args)
        model.encoder.layer[1].output.dense.weight.mul_(1.5)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(Plan, "_build", changed_meanwhile)
        xfast.accelerate(model)
    got = model(**batch).last_hidden_state
    fresh = xfast.accelerate(copy.deepcopy(xfast.restore(model)))
    assert torch.equal(got, fresh(**batch).last_hidden_state)


@pytest.mark.parametrize("change", ["a norm", "all weights"])
def test_a_copy_of_a_freed_model_that_was_changed_says_so(change: str) -> None:
    model, batch = build(head="masked-lm"), ragged()
    weights = {name: value.clone() for name, value in build(head="masked-lm", seed=9).state_dict().items()}
    xfast.accelerate(model, keep_weights=False)
    if change == "a norm":
        encoder_of(model).encoder.layer[0].output.LayerNorm.weight.mul_(2)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of tensors without values
            model.load_state_dict(weights)
    with pytest.raises(xfast.WeightsFreedError, match="keep_weights=False"):
        copy.deepcopy(model)(**batch)


def test_loading_weights_into_a_copy_of_a_freed_model_never_passes_unnoticed() -> None:
    model = build()
    weights = {name: value.clone() for name, value in build(seed=9).state_dict().items()}
    second = copy.deepcopy(xfast.accelerate(model, keep_weights=False))
    with pytest.warns(UserWarning, match="meta parameter"):
        second.load_state_dict(weights)
    with pytest.raises(xfast.WeightsFreedError):
        second(**ragged())


def test_weights_on_several_devices_have_none_in_common() -> None:
    places = [SimpleNamespace(weight=SimpleNamespace(is_meta=False, device=torch.device("cuda", i))) for i in (0, 1)]
    weights = SimpleNamespace(parameters=lambda: [(str(i), place, "weight") for i, place in enumerate(places)])
    assert _common_device(weights).type == "meta"


def test_a_program_that_captures_a_graph_gets_the_original_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = xfast.accelerate(build()), ragged()
    want = model(**batch).pooler_output
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert error(model(**batch).pooler_output, want) <= 2e-5
    assert "capturing a CUDA graph" in "".join(fallbacks(model))


def test_a_frozen_freed_model_runs_with_gradients_enabled() -> None:
    model, batch = build().requires_grad_(False), ragged()
    xfast.accelerate(model, keep_weights=False)
    want = model(**batch).last_hidden_state
    with torch.enable_grad():
        assert torch.equal(model(**batch).last_hidden_state, want)
    freed = xfast.accelerate(build(), keep_weights=False)
    with torch.enable_grad(), pytest.raises(xfast.WeightsFreedError, match=r"gradients are enabled.*; use torch\.inf"):
        freed(**batch)


# --- calls ----------------------------------------------------------------------------------------------------------


def test_a_forward_bound_as_a_method_runs() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    want = model(**batch)[0]
    model.forward = types.MethodType(model.forward, model)
    assert torch.equal(model(**batch)[0], want) and torch.equal(model(*batch.values())[0], want)


def test_inputs_elsewhere_are_refused() -> None:
    here, elsewhere, cpu = torch.zeros(1, 2), torch.zeros(1, 2, device="meta"), torch.device("cpu")
    with pytest.raises(CannotRunError, match="an input is on meta, the model on cpu"):
        _refuse_elsewhere({"input_ids": here, "attention_mask": elsewhere}, cpu)
    _refuse_elsewhere({"input_ids": here}, cpu)


@pytest.mark.parametrize("head", ["base", "base-no-pooler", "token-classification"])
def test_batches_without_columns_run_the_original_code(head: str) -> None:
    model, ids = build(head=head), torch.zeros(2, 0, dtype=torch.long)
    want = outcome(lambda: model(input_ids=ids)[0].shape)
    xfast.accelerate(model)
    assert outcome(lambda: model(input_ids=ids)[0].shape) == want
    assert fallbacks(model) == {"the batch has no columns": 1}


def test_embeddings_of_a_batch_with_one_masked_token() -> None:
    model, batch = build(), ragged(lengths=(5, 4))
    want = model(**batch).last_hidden_state
    got = xfast.accelerate(model)(
        inputs_embeds=model.embeddings.word_embeddings(batch["input_ids"]),
        attention_mask=batch["attention_mask"],
        position_ids=batch["attention_mask"].cumsum(1) * batch["attention_mask"] + model.config.pad_token_id,
    ).last_hidden_state
    assert not fallbacks(model)
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def test_a_model_made_a_decoder_later_runs_the_original_code() -> None:
    model, batch = xfast.accelerate(build("bert", "base", attention="eager")), ragged("bert")
    model(**batch)
    model.config.is_decoder = True
    got = model(**batch).last_hidden_state
    assert fallbacks(model) == {"decoder mode": 1}
    assert torch.equal(got, xfast.restore(model)(**batch).last_hidden_state)


def test_forward_mode_differentiation_runs_the_original_code() -> None:
    model, mask = build(attention="eager"), ragged(lengths=(5, 5))["attention_mask"]
    embeds = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))

    def tangent() -> torch.Tensor | None:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeds, torch.ones_like(embeds))
            return forward_ad.unpack_dual(model(inputs_embeds=dual, attention_mask=mask)[0]).tangent

    want = tangent()
    xfast.accelerate(model)
    got = tangent()
    assert want is not None and got is not None and error(got, want) <= 1e-5 and fallbacks(model)


def test_all_layers_by_number_end_in_the_final_norm() -> None:
    model, batch = build("xlm-roberta-xl", "base-no-pooler", attention="eager"), ragged()
    want = at_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
    xfast.accelerate(model, layers=3)
    got = at_tokens(model(**batch, output_attentions=True).last_hidden_state, batch["attention_mask"])
    assert fallbacks(model) and error(got, want) <= 1e-5


def test_fewer_layers_in_the_original_code_give_the_states_the_config_asks_for() -> None:
    model, batch = build(attention="eager", output_hidden_states=True), ragged()
    want = model(**batch).hidden_states
    xfast.accelerate(model, layers=2)
    got = model(**batch, output_attentions=True)
    assert fallbacks(model) and len(got.hidden_states) == 3
    assert all(error(a, b) <= 1e-6 for a, b in zip(got.hidden_states, want[:3], strict=True))


def test_states_of_other_threads_are_not_heard() -> None:
    model, mine, other = build(), ragged(seed=1), ragged(seed=2)
    want = model(**mine, output_hidden_states=True).hidden_states[1]

    def run(**call: Any) -> Any:
        out = model(**call)
        thread = threading.Thread(target=torch.no_grad()(model), kwargs=other)
        thread.start()
        thread.join()
        return out

    last, _, _ = run_layers(model, 1, mine, run, want_states=False)
    assert torch.equal(last, want)


# --- heads and wrappers ---------------------------------------------------------------------------------------------


def test_an_inner_heads_context_gives_way_to_the_outer_ones() -> None:
    patch, outer, inner = xfast.accelerate(build()).forward, HeadContext("first"), HeadContext("all")
    with context_of(patch, outer):
        with context_of(patch, inner):
            assert current_context(patch) is inner
        assert current_context(patch) is outer
    assert current_context(patch) is None


def test_a_restored_model_is_found_behind_no_wrapper() -> None:
    model = xfast.accelerate(build())
    patch = model.forward
    xfast.restore(model)
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    assert wrapped_since([model]) == [] and patch.alive


def test_a_pooler_of_the_users_own_sees_every_row() -> None:
    class MeanPooler(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.mean(1)

    model, batch = build("bert", "sequence-classification"), ragged("bert", (9, 9))
    model.bert.pooler = MeanPooler()
    want = model(**batch).logits
    assert error(xfast.accelerate(model)(**batch).logits, want) <= 1e-5


def test_a_wrapper_around_the_encoder_sees_every_row() -> None:
    def wrapped(model: Any) -> Any:
        inner = model.base_model.forward

        def with_mean(*args: Any, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
            return out

        model.base_model.forward = with_mean
        return model

    batch = ragged(lengths=(9, 9))
    want = wrapped(build(head="sequence-classification"))(**batch).logits
    got = wrapped(xfast.accelerate(build(head="sequence-classification")))(**batch).logits
    assert error(got, want) <= 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_that_are_changed_in_place_before_the_head_are_read(mode: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    model, batch = build(head="token-classification"), ragged()
    model.dropout = Doubled()
    want = at_tokens(model(**batch).logits, batch["attention_mask"])
    xfast.accelerate(model)
    with mode():
        got = model(**batch).logits
    assert error(at_tokens(got, batch["attention_mask"]), want) <= 1e-5


def test_a_head_module_with_a_forward_of_the_users_gets_the_padded_batch() -> None:
    model, batch = build(head="token-classification"), ragged()
    inner = model.classifier

    def beside_the_first(x: torch.Tensor) -> torch.Tensor:
        out = type(inner).forward(inner, x)
        return out - out[:, :1]

    inner.forward = beside_the_first
    want = at_tokens(model(**batch).logits, batch["attention_mask"])
    assert error(at_tokens(xfast.accelerate(model)(**batch).logits, batch["attention_mask"]), want) <= 1e-5


def test_a_head_in_another_type_gives_the_originals_error() -> None:
    model, batch = build(head="masked-lm", tie_word_embeddings=False), ragged()
    model.lm_head.to(torch.bfloat16)
    want = outcome(lambda: model(**batch).logits.dtype)
    xfast.accelerate(model)
    assert outcome(lambda: model(**batch).logits.dtype)[0] is want[0] is RuntimeError


def test_an_encoder_put_into_anothers_place_is_the_heads() -> None:
    model = xfast.accelerate(build(head="token-classification"))
    other, first = xfast.accelerate(build(head="base-no-pooler", seed=3)), model.roberta
    model.roberta = other
    assert model.forward.encoder_patch is other.forward and model.forward.encoder_patch is not first.forward
