"""Heads: computing only the rows they read changes no bit of them, and heads that read something else stay right."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import (
    ALL_FAMILIES,
    LABELS,
    TOKEN_HEADS,
    arguments,
    at_tokens,
    build,
    engine_outputs,
    error,
    fallbacks,
    labels,
    left_padded,
    make_config,
    outputs_of,
    quick_settings,
    ragged,
)
from torch import nn

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

PRECISIONS = ("fp32", "bf16", "int8")
HIDDEN = 64


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_classification_computes_one_row_and_the_same_bits(family: str, precision: str) -> None:
    model, batch = build(family, "sequence-classification"), ragged(family)
    seen = engine_outputs(xfast.accelerate(model, precision=precision))
    logits = model(**batch).logits
    full = model(**batch, output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in seen] == [(4, HIDDEN), (40, HIDDEN)]
    assert torch.equal(seen[0], seen[1][[0, 9, 10, 27]])
    assert torch.equal(logits, full.logits)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("precision", [*PRECISIONS, "int4"])
def test_an_input_that_is_nan_never_gives_numbers(precision: str) -> None:
    model, batch = build(head="sequence-classification"), ragged()
    embeds = model.base_model.embeddings.word_embeddings(batch["input_ids"])
    embeds[0, 3, 5] = torch.nan  # not in the token that the head reads
    xfast.accelerate(model, precision=precision)
    logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert logits[0].isnan().all() and logits[1:].isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_next_sentence_prediction_reads_one_row(precision: str) -> None:
    model = transformers.BertForNextSentencePrediction(make_config("bert")).eval()
    batch = ragged("bert")
    want = model(**batch).logits
    seen = engine_outputs(xfast.accelerate(model, precision=precision))
    assert error(model(**batch).logits, want) <= {"fp32": 1e-5}.get(precision, 0.05)
    assert [tuple(hidden.shape) for hidden in seen] == [(4, HIDDEN)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_multiple_choice_equals_the_full_run(precision: str) -> None:
    model, batch = build(head="multiple-choice"), arguments("xlm-roberta", "multiple-choice")
    xfast.accelerate(model, precision=precision)
    flat = {name: values.flatten(0, 1) for name, values in batch.items()}
    want = model.classifier(model.base_model(**flat).pooler_output).view(2, 2)
    assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_token_heads_run_on_real_tokens_only(
    family: str, head: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(family, head), ragged(family)
    xfast.accelerate(model, precision=precision)
    padding = batch["attention_mask"] == 0
    rows, linear = [], nn.functional.linear

    def spy(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        rows.append(x.shape[:-1].numel())
        return linear(x, *weights)

    monkeypatch.setattr(nn.functional, "linear", spy)
    got = outputs_of(model(**batch))
    # A masked-LM head's products are native: test_lm_head.py
    assert set(rows) == (set() if head == "masked-lm" else {int(batch["attention_mask"].sum())})
    for values in got.values():
        assert not values[padding].any() and values[~padding].any()


def test_heads_may_be_called_while_their_encoder_is_used_alone() -> None:
    model, batch = build(head="sequence-classification"), ragged()
    want = model.base_model(**batch).last_hidden_state
    xfast.accelerate(model)
    model(**batch)
    got = model.base_model(**batch).last_hidden_state
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def test_a_hook_on_the_encoder_sees_every_row() -> None:
    model, plain, batch = build(head="sequence-classification"), build(head="sequence-classification"), ragged()
    seen: dict[int, torch.Tensor] = {}
    for each in (xfast.accelerate(model), plain):
        each.base_model.register_forward_hook(lambda module, args, out: seen.update({id(module): out[0].clone()}))
        each(**batch)
    got, want = seen[id(model.base_model)], seen[id(plain.base_model)]
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def _mean_forward(model: Any, **batch: torch.Tensor) -> torch.Tensor:
    """A pooling over tokens of what the encoder returns, where the class's own forward would read column 0."""
    hidden, mask = model.base_model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def test_a_forward_put_on_the_instance_sees_every_row() -> None:
    model, batch = build(head="sequence-classification"), ragged()
    want = _mean_forward(model, **batch)
    model.forward = types.MethodType(_mean_forward, model)
    assert error(xfast.accelerate(model)(**batch), want) <= 1e-5 and fallbacks(model) == {}


class _Mean(nn.Module):
    """Reads the first five tokens, as a head with its own pooling does."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(HIDDEN, outputs)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense(hidden[:, :5].mean(1))


class _Recurrent(nn.Module):
    """Mixes the tokens of a row, as an LSTM or CRF tagger on top of an encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(HIDDEN, LABELS, batch_first=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lstm(hidden)[0]


def _mean_classifier() -> tuple[Any, Callable[[Any], None]]:
    return build(head="sequence-classification"), lambda model: setattr(model, "classifier", _Mean(LABELS))


def _mean_pooler() -> tuple[Any, Callable[[Any], None]]:
    return build("bert", "sequence-classification"), lambda model: setattr(model.bert, "pooler", _Mean(HIDDEN))


def _recurrent_classifier() -> tuple[Any, Callable[[Any], None]]:
    return build(head="token-classification"), lambda model: setattr(model, "classifier", _Recurrent())


def _recurrent_decoder() -> tuple[Any, Callable[[Any], None]]:
    return build(head="masked-lm"), lambda model: setattr(model, "lm_head", _Recurrent())


def _no_classifier() -> tuple[Any, Callable[[Any], None]]:
    return build(head="sequence-classification"), lambda model: setattr(model, "classifier", nn.Identity())


def _linear_classifier() -> tuple[Any, Callable[[Any], None]]:
    linear = nn.Linear(HIDDEN, LABELS)
    return build(head="sequence-classification"), lambda model: setattr(model, "classifier", linear)


def _no_pooler() -> tuple[Any, Callable[[Any], None]]:
    return build("bert", "sequence-classification"), lambda model: setattr(model.bert, "pooler", nn.Identity())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        _mean_classifier,
        _mean_pooler,
        _no_classifier,
        _linear_classifier,
        _no_pooler,
        _recurrent_classifier,
        _recurrent_decoder,
    ],
)
def test_replaced_heads_get_what_they_read(make: Callable[[], tuple[Any, Callable[[Any], None]]], when: str) -> None:
    model, replace = make()
    batch = ragged(lengths=(9, 6, 5))
    if when == "before":
        replace(model)
    xfast.accelerate(model)
    if when == "after":
        replace(model)
    model.eval()
    got = model(**batch).logits
    want = xfast.restore(model)(**batch).logits
    tokens = batch["attention_mask"]
    assert error(at_tokens(got, tokens), at_tokens(want, tokens)) <= 1e-5


def test_subclass_that_overrides_the_head_sees_every_row() -> None:
    base = build(head="sequence-classification")

    class AverageHead(type(base)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> torch.Tensor:
            hidden = self.base_model(**inputs).last_hidden_state
            return hidden[inputs["attention_mask"].bool()].mean(0)

    base.__class__ = AverageHead
    want = base(**ragged())
    got = xfast.accelerate(base)(**ragged())
    assert error(got, want) <= 1e-5
    assert fallbacks(base) == {}


def test_classifier_changed_in_place_is_used_at_once() -> None:
    model, batch = build(head="token-classification"), ragged()
    xfast.accelerate(model)
    before = model(**batch).logits
    model.classifier.weight.mul_(2)
    after = model(**batch).logits
    assert not torch.equal(before, after)
    want = xfast.restore(model)(**batch).logits
    assert error(at_tokens(after, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def test_encoder_inside_any_module_is_found() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = build("bert", seed=1)
            self.right = build("xlm-roberta", "token-classification", seed=2)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            mask = batch["attention_mask"].bool()
            return self.left(**batch)[0][mask].sum(0) + self.right(**batch).logits[mask].sum()

    model = Siamese().eval()
    want = model(ragged())
    assert xfast.accelerate(model) is model
    assert [encoder.family for encoder in xfast.explain(model).encoders] == ["bert", "xlm-roberta"]
    assert error(model(ragged()), want) <= 1e-5
    assert fallbacks(model) == {}
    assert xfast.restore(model).right.base_model.__dict__.get("forward") is None


@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_a_head_behind_a_frozen_encoder_can_be_trained(head: str) -> None:
    # In eval mode the encoder stays accelerated, gradients flow through the head alone
    model, plain, batch = build(head=head), build(head=head), ragged(lengths=(9, 9, 4))
    if head == "question-answering":
        batch = ragged(lengths=(9, 9, 9))  # its loss over a padded batch reads padding: the original code's part
    grads = []
    with torch.enable_grad():
        for each in (xfast.accelerate(model), plain):
            each.base_model.requires_grad_(False)
            each(**batch, **labels(head, batch)).loss.backward()
            grads.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and fallbacks(model) == {}
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-4, atol=1e-6)


def _encoder_watched(model: Any) -> Any:
    model.base_model.register_forward_hook(lambda module, args, output: None)
    return xfast.accelerate(model)


def _head_wrapped(model: Any) -> Any:
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return xfast.accelerate(model)


def _encoder_wrapped(model: Any) -> Any:
    ours = xfast.accelerate(model).base_model.forward
    model.base_model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    return model


@pytest.mark.parametrize("how", [_encoder_watched, _head_wrapped, _encoder_wrapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("head", ["sequence-classification", *TOKEN_HEADS])
@pytest.mark.parametrize("positional", [False, True])
def test_watched_and_wrapped_models_keep_the_originals_results(
    how: Callable[[Any], Any], head: str, positional: bool
) -> None:
    model, plain, batch = how(build(head=head)), build(head=head), left_padded(ragged())
    given: tuple[Any, ...] = ((*batch.values(),), {}) if positional else ((), batch)
    tokens = batch["attention_mask"]
    for asked in ({}, {name: values.clamp_min(0) for name, values in labels(head, batch).items()}):
        got, want = (outputs_of(each(*given[0], **given[1], **asked)) for each in (model, plain))
        for name, values in want.items():
            assert error(at_tokens(got[name], tokens), at_tokens(values, tokens)) <= 1e-5, name


def _lstm(module: nn.Module) -> None:
    lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
    module.lstm = lstm
    module.forward = lambda hidden: type(module).forward(module, lstm(hidden)[0])


@pytest.mark.parametrize("head", ["token-classification", "masked-lm"])
def test_a_forward_put_on_the_reader_gets_padded_rows(head: str) -> None:
    model, batch = build(head=head), ragged(lengths=(9, 6, 5))
    _lstm(model.classifier if head == "token-classification" else model.lm_head)
    tokens, want = batch["attention_mask"], model(**batch).logits
    assert error(at_tokens(xfast.accelerate(model)(**batch).logits, tokens), at_tokens(want, tokens)) <= 1e-5


def test_an_encoder_compiled_alone_keeps_losses_over_padding() -> None:
    model, batch = build(head="question-answering"), ragged()
    want = model(**batch, **labels("question-answering", batch)).loss
    xfast.accelerate(model)
    model.base_model.compile(backend="eager")
    torch.testing.assert_close(model(**batch, **labels("question-answering", batch)).loss, want, rtol=1e-5, atol=1e-6)
