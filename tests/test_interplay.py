"""Several changes one after another: copies of freed models, replaced encoders, dropped layers, modes of a part."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build, error, fallbacks, left_padded, quick_settings, ragged
from torch import nn

import xfast
from xfast.errors import InvalidOptionError, WeightsFreedError

_settings = pytest.fixture(autouse=True)(quick_settings)


def at_tokens(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = output[0][batch["attention_mask"].bool()]
    return found


# --- copies of models whose weights were given up ---------------------------------------------------


def _load_assigned(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(build(seed=7).state_dict()), assign=True)


def _load(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(build(seed=7).state_dict()))


def _reverse(model: Any) -> None:
    model.encoder.layer = nn.ModuleList(reversed(model.encoder.layer))


def _repeat(model: Any) -> None:
    model.encoder.layer[2] = model.encoder.layer[0]


def _drop(model: Any) -> None:
    del model.encoder.layer[0]


def _append(model: Any) -> None:
    model.encoder.layer.append(model.encoder.layer[0])


def _swap(model: Any) -> None:
    own = model.encoder.layer[0].attention.self
    own.query, own.key = own.key, own.query


def _replace(model: Any) -> None:
    model.encoder.layer[0].output.dense = build(seed=7).encoder.layer[0].output.dense


def _new_words(model: Any) -> None:
    words = model.embeddings.word_embeddings
    model.embeddings.word_embeddings = nn.Embedding(words.num_embeddings + 8, words.embedding_dim)


CHANGES = (_load_assigned, _load, _reverse, _repeat, _drop, _append, _swap, _replace, _new_words)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_copy_of_a_freed_model_notices_changes(change: Callable[[Any], None], before: bool) -> None:
    model = xfast.accelerate(build(), precision="int8", keep_weights=False)
    batch = ragged()
    if before:
        change(model)
        twin = copy.deepcopy(model)
    else:
        twin = copy.deepcopy(model)
        change(twin)
    for _ in range(2):
        with pytest.raises(WeightsFreedError, match="the weights were changed or moved"):
            twin(**batch)
    assert "the weights were changed or moved" in str(xfast.explain(twin))


def test_copies_of_copies_of_freed_models_still_run() -> None:
    model = xfast.accelerate(build(), keep_weights=False)
    batch = ragged()
    want = at_tokens(model(**batch), batch)
    first = copy.deepcopy(model)
    second = copy.deepcopy(first)  # which has not been called
    for twin in (second, first):
        assert torch.equal(at_tokens(twin(**batch), batch), want)
    with torch.no_grad():
        third = copy.deepcopy(second)
        third.encoder.layer[0].output.LayerNorm.bias += 1  # its own, which its engine reads where it is
    assert error(at_tokens(third(**batch), batch), want) > 0.01
    assert torch.equal(at_tokens(second(**batch), batch), want)


def test_explain_says_what_a_freed_model_lacks() -> None:
    model = xfast.accelerate(build(), keep_weights=False)
    model.encoder.layer[0].output.dense.weight = nn.Parameter(torch.ones(64, 128))
    with pytest.raises(WeightsFreedError):
        model(**ragged())
    text = str(xfast.explain(model))
    assert "the weights were changed or moved" in text and "given up with keep_weights=False" in text


def test_freed_in_inference_mode_is_no_trap() -> None:
    model = build()
    with torch.inference_mode():
        xfast.accelerate(model, keep_weights=False)
    model.requires_grad_(True).requires_grad_(False)
    with torch.inference_mode():
        assert torch.isfinite(model(**ragged())[0]).all()


# --- encoders and parts that were replaced ----------------------------------------------------------


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification"])
def test_an_encoder_put_into_a_head_keeps_the_heads_protection(head: str) -> None:
    stock = build(head=head)
    model = xfast.accelerate(copy.deepcopy(stock))
    batch = left_padded(ragged())
    if head == "token-classification":
        batch["labels"] = torch.ones_like(batch["input_ids"])  # at padding, too
    held = model.roberta
    for kept in (None, held):  # the one before may be gone, or still be there
        model.roberta = copy.deepcopy(held)
        got, want = model(**batch), stock(**batch)
        assert error(got[0], want[0]) < 1e-5
        assert fallbacks(model)
        del kept


def test_a_head_that_got_other_strides_runs_itself() -> None:
    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1)

    stock = build(head="token-classification")
    stock.dropout = Turned()
    batch = ragged(lengths=(4, 2, 3, 1))
    model = xfast.accelerate(copy.deepcopy(stock))
    keep = batch["attention_mask"].bool().T  # as many rows as columns
    assert error(model(**batch).logits[keep], stock(**batch).logits[keep]) < 1e-5


def test_attention_that_trains_by_itself_runs_the_original() -> None:
    model = xfast.accelerate(build(attention_probs_dropout_prob=0.9))
    model(**ragged())
    model.encoder.layer[1].attention.self.training = True
    model(**ragged())
    assert fallbacks(model) == {"a module inside the encoder is in training mode": 1}


@pytest.mark.parametrize("begins", ["quiet", "in training mode", "with a hook"])
def test_hooks_and_dropout_are_seen_each_time_they_come_back(begins: str) -> None:
    model, batch = build(), ragged()
    layer = model.encoder.layer[1]
    hook = layer.register_forward_hook(lambda *args: None) if begins == "with a hook" else None
    xfast.accelerate(model.train(begins == "in training mode"))
    model(**batch)
    model.eval()
    if hook is not None:
        hook.remove()
    before = sum(fallbacks(model).values())
    for count in (1, 2):
        model(**batch)
        with layer.register_forward_hook(lambda *args: None):
            model(**batch)
        model(**batch)
        layer.output.dropout.train()
        model(**batch)
        layer.output.dropout.eval()
        model(**batch)
        assert sum(fallbacks(model).values()) == before + 2 * count


# --- fewer layers -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:xfast. gradients are enabled")
def test_layers_that_were_dropped_leave_all_there_are() -> None:
    stock = build()
    model = xfast.accelerate(copy.deepcopy(stock), layers=3)
    batch = ragged()
    model(**batch)
    twin = copy.deepcopy(model)  # not called before it is cut
    for each in (stock, model, twin):
        each.encoder.layer = each.encoder.layer[:2]
    for each in (model, twin):
        assert error(at_tokens(each(**batch), batch), at_tokens(stock(**batch), batch)) < 1e-5
        with torch.enable_grad():
            assert error(at_tokens(each(**batch), batch).detach(), at_tokens(stock(**batch), batch).detach()) < 1e-5
    with pytest.raises(InvalidOptionError, match="accepted: 0 to 2"):
        xfast.accelerate(build(num_hidden_layers=2), layers=3)


@pytest.mark.filterwarnings("ignore:xfast. gradients are enabled")
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("head", ["base", "sequence-classification"])
def test_the_original_code_of_fewer_layers_leaves_nothing_behind(head: str, layers: int) -> None:
    model = build(head=head)
    batch = ragged()
    states = model.base_model(**batch, output_hidden_states=True).hidden_states  # leaves transformers' own hooks
    fresh = build(head=head)
    xfast.accelerate(fresh, layers=layers)
    with torch.enable_grad():
        last = fresh.base_model(**batch).last_hidden_state
        fresh(**batch)
    assert last.requires_grad and error(last.detach(), states[layers]) < 1e-5
    assert any("gradients" in reason for reason in fallbacks(fresh))
    xfast.restore(fresh)
    pickle.dumps(fresh)
    assert not any(part._forward_hooks for part in fresh.modules())


# --- flags and memory without counters --------------------------------------------------------------


@pytest.mark.parametrize("flag", ["return_dict", "output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("head", ["base", "sequence-classification"])
def test_flags_that_are_none_mean_what_they_do_in_transformers(head: str, flag: str, configured: bool) -> None:
    stock = build(head=head)
    model = xfast.accelerate(copy.deepcopy(stock))
    for each in (stock, model):
        for config in {id(part.config): part.config for part in (each, each.base_model)}.values():
            config._attn_implementation = "eager"
            setattr(config, flag, configured)
    got, want = (each(**ragged(), **{flag: None}) for each in (model, stock))
    assert type(got) is type(want) and len(got) == len(want)
    if not isinstance(want, tuple):
        assert list(got) == list(want)


def test_the_tuple_of_transformers_4_has_attentions() -> None:
    model = xfast.accelerate(build(attention="eager"), layers=2)
    patch = model.__dict__["forward"]
    patch._names = tuple(dict.fromkeys((*patch._names, "return_dict")))  # an argument of the encoder's own there
    flags = {"output_attentions": True, "output_hidden_states": True}
    want = model(**ragged(), **flags)
    got = model(**ragged(), **flags, return_dict=False)
    assert [len(part) for part in got[2:]] == [3, 2] and torch.equal(got[3][1], want.attentions[1])


def test_weights_made_in_inference_mode_and_cast_outside() -> None:
    """They say that they are no inference tensors and have no counter; stock's own code ends in torch's error."""
    batch = ragged()
    with torch.inference_mode():
        want = at_tokens(build(head="base-no-pooler")(**batch), batch)
        model, second = build(head="base-no-pooler"), xfast.accelerate(build(head="base-no-pooler"))
        second(**batch)
    for each in (model, second):
        each.double()
        each.float()
    xfast.accelerate(model)
    with torch.inference_mode():
        for each in (model, second):
            assert error(at_tokens(each(**batch), batch), want) < 1e-5
