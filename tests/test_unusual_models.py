"""Heads, classes and attributes that are not as usual: the original's values, or its code, and never silence."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from models import build, encoder_of, error, fallbacks, left_padded, make_config, quick_settings, ragged, randomise
from torch import nn

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

LIMIT = 1e-5


def made(cls: type, family: str = "xlm-roberta", **changes: Any) -> Any:
    model = cls(make_config(family, **changes))
    randomise(model, 0)
    return model.eval()


def read(output: Any) -> torch.Tensor:
    """The loss, or what the head is for."""
    if output.get("loss") is not None:
        return output.loss
    if "start_logits" in output:
        return output.start_logits.unsqueeze(-1)
    return output.logits if "logits" in output else output[0]


def assert_same(model: Any, call: dict[str, Any], accelerated: bool | None = None) -> None:
    """The model's result is the original's; ``accelerated``: with or without falling back, if that is fixed."""
    xfast.restore(model)
    want = read(model(**call))
    xfast.accelerate(model)
    got = read(model(**call))
    if got.dim() == 3:
        real = call["attention_mask"].bool()
        got, want = got[real], want[real]
    assert error(got, want) <= LIMIT
    if accelerated is not None:
        assert (fallbacks(model) == {}) == accelerated


# --- losses ----------------------------------------------------------------------------------------------------------


class OwnQuestionAnswering(transformers.XLMRobertaForQuestionAnswering):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnTokenClassification(transformers.XLMRobertaForTokenClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnSequenceClassification(transformers.XLMRobertaForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def masked_labels(batch: dict[str, torch.Tensor], limit: int = 101) -> torch.Tensor:
    return torch.where(batch["attention_mask"] == 1, batch["input_ids"] % limit, -100)


@pytest.mark.parametrize("at_padding", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("cls", "family"),
    [
        (transformers.BertForPreTraining, "bert"),
        (transformers.BertLMHeadModel, "bert"),
        (transformers.XLMRobertaForCausalLM, "xlm-roberta"),
        (transformers.XLMRobertaXLForCausalLM, "xlm-roberta-xl"),
        (transformers.CamembertForCausalLM, "camembert"),
        (OwnTokenClassification, "xlm-roberta"),
    ],
)
@pytest.mark.filterwarnings("ignore:If you want to use")
def test_losses_of_tokens(cls: type, family: str, side: str, at_padding: bool) -> None:
    model = made(cls, family)
    batch = ragged(family) if side == "right" else left_padded(ragged(family))
    labels = batch["input_ids"] if at_padding else masked_labels(batch)
    if cls is OwnTokenClassification:
        labels = torch.where(labels < 0, labels, labels % 3)
    more = {"next_sentence_label": torch.tensor([0, 1, 1, 0])} if cls is transformers.BertForPreTraining else {}
    assert_same(model, {**batch, "labels": labels, **more})
    assert_same(model, batch)


def test_losses_of_spans_in_a_subclass() -> None:
    batch = ragged()
    spans = {"start_positions": torch.tensor([1, 0, 2, 3]), "end_positions": torch.tensor([2, 0, 5, 4])}
    assert_same(made(OwnQuestionAnswering, num_labels=2), {**batch, **spans}, accelerated=False)
    assert_same(made(OwnQuestionAnswering, num_labels=2), batch, accelerated=True)


def test_a_subclass_that_reads_a_masked_first_column() -> None:
    assert_same(made(OwnSequenceClassification), left_padded(ragged()), accelerated=False)
    assert_same(made(OwnSequenceClassification), {**ragged(), "labels": torch.tensor([0, 1, 2, 0])}, accelerated=True)


@pytest.mark.parametrize("shape", ["flat", "column"])
@pytest.mark.parametrize("head", ["masked-lm", "token-classification"])
def test_labels_of_another_shape(head: str, shape: str) -> None:
    model, batch = build(head=head), ragged()
    labels = batch["input_ids"] % (101 if head == "masked-lm" else 3)
    labels = labels.view(-1) if shape == "flat" else labels.unsqueeze(-1)
    assert_same(model, {**batch, "labels": labels}, accelerated=False)
    clean = masked_labels(batch, 101 if head == "masked-lm" else 3)
    assert_same(model, {**batch, "labels": clean.view(-1)}, accelerated=True)


# --- heads and classes that change -----------------------------------------------------------------------------------


class MeanPool(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, **call: Any) -> Any:
        call.pop("return_dict", None)
        output = self.encoder(input_ids, **call, return_dict=True)
        mask = call["attention_mask"].unsqueeze(-1)
        mean = (output.last_hidden_state * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        output.last_hidden_state = mean.expand_as(output.last_hidden_state)
        return output


class MeanClassifier(transformers.XLMRobertaForSequenceClassification):
    def forward(self, **call: Any) -> Any:
        output = self.roberta(**call)
        mask = call["attention_mask"].unsqueeze(-1)
        return output.__class__(last_hidden_state=(output[0] * mask).sum(1) / mask.sum(1))


class OwnEncoder(transformers.XLMRobertaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


def wrap_the_encoder(model: Any) -> None:
    model.roberta = MeanPool(model.roberta)


def change_the_class(model: Any) -> None:
    model.__class__ = MeanClassifier


def change_the_encoders_class(model: Any) -> None:
    model.roberta.__class__ = OwnEncoder


def call_it_twice(model: Any) -> None:
    """A hook that runs the encoder for its hidden states, and adds their mean."""
    busy: list[bool] = []

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if busy:
            return None
        busy.append(True)
        states = module(*args, **kwargs)[0]
        busy.pop()
        return (), {**kwargs, "inputs_embeds": states, "input_ids": None}

    model.roberta.register_forward_pre_hook(hook, with_kwargs=True)


def pass_everything_on(model: Any) -> None:
    model.classifier = nn.Identity()


@pytest.mark.parametrize(
    "change", [wrap_the_encoder, change_the_class, change_the_encoders_class, call_it_twice, pass_everything_on]
)
@pytest.mark.parametrize("pooler", [False, True])
def test_changes_after_accelerate(change: Callable[[Any], None], pooler: bool) -> None:
    model, batch = build(head="sequence-classification"), ragged()
    if pooler:
        torch.manual_seed(0)
        model.roberta.pooler = transformers.XLMRobertaModel(make_config("xlm-roberta")).pooler
    xfast.accelerate(model)
    model(**batch)
    change(model)
    got = read(model(**batch))
    for module in model.modules():
        module.__dict__.pop("forward", None)
    want = read(model(**batch))
    assert got.shape == want.shape
    if got.dim() == 3:
        got, want = (one[batch["attention_mask"].bool()] for one in (got, want))
    assert error(got, want) <= LIMIT


@contextmanager
def replaced(cls: type) -> Iterator[None]:
    """The class's forward gives the double, as libraries that patch classes do."""
    own = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output * 2
        if isinstance(output, tuple):
            return (output[0] * 2, *output[1:])
        name = "logits" if "logits" in output else "last_hidden_state"
        output[name] = output[name] * 2
        return output

    cls.forward = forward  # type: ignore[attr-defined]
    try:
        yield
    finally:
        cls.forward = own  # type: ignore[attr-defined]


def classes() -> list[type]:
    model = build(head="sequence-classification")
    layer = model.roberta.encoder.layer[0]
    parts = [layer, layer.attention, layer.attention.self, layer.output, layer.intermediate]
    return [type(part) for part in (*parts, model.roberta.embeddings, model.roberta, model.classifier, model)]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_classes_whose_forward_was_replaced(cls: type, before: bool) -> None:
    model, batch = build(head="sequence-classification"), ragged()
    if not before:
        xfast.accelerate(model)
        model(**batch)
    with replaced(cls):
        if before:
            if cls is not type(model) and cls is not type(model.classifier):
                with pytest.raises(
                    xfast.UnsupportedModelError, match=f"forward of the class {cls.__name__} was replaced"
                ):
                    xfast.accelerate(model)
                return
            xfast.accelerate(model)
        got = model(**batch).logits
        want = xfast.restore(model)(**batch).logits
    assert error(got, want) <= LIMIT


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("head", ["token-classification", "masked-lm"])
def test_edits_in_place_between_encoder_and_head(head: str, mode: Any) -> None:
    def double(_: Any, __: Any, output: Any) -> None:
        (output if isinstance(output, torch.Tensor) else output[0]).mul_(2)

    model, batch = build(head=head), ragged()
    watched = model.dropout if head == "token-classification" else model.roberta.embeddings
    real = batch["attention_mask"].bool()
    with mode():
        clean = model(**batch).logits[real]
        xfast.accelerate(model)
        assert error(model(**batch).logits[real], clean) <= LIMIT
        watched.register_forward_hook(double)
        got = model(**batch).logits[real]
        assert error(got, xfast.restore(model)(**batch).logits[real]) <= LIMIT
    assert error(got, clean) > 1e-3


class Doubling(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states.data.mul_(2)  # counted by no version
        return states


def hook_that_doubles(_: Any, __: Any, output: Any) -> None:
    (output if isinstance(output, torch.Tensor) else output[0]).data.mul_(2)


def double_in_a_hook(model: Any) -> None:
    model.dropout.register_forward_hook(hook_that_doubles)


def double_in_a_hook_of_the_encoder(model: Any) -> None:
    model.roberta.register_forward_hook(hook_that_doubles)


def double_in_a_module(model: Any) -> None:
    model.dropout = Doubling()


def double_in_a_wrapper(model: Any) -> None:
    own = model.roberta.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output[0].data.mul_(2)
        return output

    model.roberta.forward = forward


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "change", [double_in_a_hook, double_in_a_hook_of_the_encoder, double_in_a_module, double_in_a_wrapper]
)
def test_edits_without_a_trace_between_encoder_and_head(change: Callable[[Any], None], mode: Any) -> None:
    model, batch = xfast.accelerate(build(head="token-classification")), ragged()
    real = batch["attention_mask"].bool()
    with mode():
        model(**batch)
        change(model)
        got = model(**batch).logits[real]
        stock = build(head="token-classification")
        change(stock)
        assert error(got, stock(**batch).logits[real]) <= LIMIT
    assert not fallbacks(model)


def test_a_head_that_attends_is_given_whole_sequences() -> None:
    model, batch = build(head="token-classification"), ragged()
    model.classifier = copy.deepcopy(model.roberta.encoder.layer[0])
    xfast.accelerate(model)
    assert error(model(**batch).logits, model.classifier(model.roberta(**batch).last_hidden_state)) <= LIMIT


def test_gradients_of_a_weight_that_is_no_parameter() -> None:
    model, batch = xfast.accelerate(build()).requires_grad_(False), ragged()
    dense = model.encoder.layer[1].output.dense
    weight = dense.weight.clone().requires_grad_()
    del dense.weight
    dense.weight = weight
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradients are enabled"):
        model(**batch).last_hidden_state.sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


@pytest.mark.parametrize("given", [{}, {"return_dict": None}, {"return_dict": True}, {"return_dict": False}])
@pytest.mark.parametrize("configured", [True, False, None])
def test_the_kind_of_output_is_the_originals(configured: bool | None, given: dict[str, Any]) -> None:
    model, batch = build(), ragged()
    model.config.return_dict = configured
    want = type(model(**batch, **given))
    assert type(xfast.accelerate(model)(**batch, **given)) is want


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", ["positions", "other positions", "types", "padding", "activation"])
def test_attributes_that_decide_values(change: str, before: bool) -> None:
    family = "xlm-roberta" if change in ("padding", "activation") else "bert"
    model, batch = build(family), {name: v for name, v in ragged(family).items() if name != "token_type_ids"}
    real = batch["attention_mask"].bool()
    xfast.accelerate(model)
    plain = model(**batch)[0][real]
    if before:
        xfast.restore(model)
    if change == "positions":
        model.embeddings.position_ids.add_(3).clamp_(max=39)
    elif change == "other positions":
        model.embeddings.position_ids = torch.arange(40).flip(0)[None]
    elif change == "types":
        model.embeddings.token_type_ids.fill_(1)
    elif change == "padding":
        model.embeddings.padding_idx = 5
    else:
        model.encoder.layer[1].intermediate.intermediate_act_fn = transformers.activations.ACT2FN["relu"]
    try:
        got = model(**batch)[0][real] if not before else xfast.accelerate(model)(**batch)[0][real]
    except xfast.UnsupportedModelError:
        assert before
        return
    want = xfast.restore(model)(**batch)[0][real]
    assert error(got, want) <= LIMIT and error(plain, want) > 1e-3


def test_dpr_reads_column_0_of_an_encoder_without_a_pooler() -> None:
    config = transformers.DPRConfig(**{**make_config("bert").to_dict(), "projection_dim": 0})
    model = transformers.DPRContextEncoder(config).eval()
    for batch, accelerated in ((ragged("bert"), True), (left_padded(ragged("bert")), False)):
        xfast.restore(model)
        want = model(**batch).pooler_output
        assert error(xfast.accelerate(model)(**batch).pooler_output, want) <= LIMIT
        assert (fallbacks(model) == {}) == accelerated


# --- sharing, blocks, forks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["encoder", "embeddings"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_encoders_that_share_modules_give_their_weights_up(shared: str, precision: str) -> None:
    both, batch = nn.ModuleList([build(), build()]), ragged()
    setattr(both[1], shared, getattr(both[0], shared))
    real = batch["attention_mask"].bool()
    wants = [model(**batch)[0][real] for model in both]
    xfast.accelerate(both, precision=precision, keep_weights=False)
    for model, want in zip(both, wants, strict=True):
        assert error(model(**batch)[0][real], want) <= (LIMIT if precision == "fp32" else 0.2)


@pytest.mark.parametrize("block", [xfast.restored, xfast.accelerated])
@pytest.mark.parametrize("part", ["classifier", "roberta"])
def test_parts_that_are_replaced_in_a_block(block: Any, part: str) -> None:
    model, batch = xfast.accelerate(build(head="token-classification")), ragged()
    with block(model):
        setattr(model, part, nn.Linear(64, 3) if part == "classifier" else build(head="base-no-pooler"))
        model(**batch)
    got = model(**batch).logits
    xfast.restore(model)
    real = batch["attention_mask"].bool()
    assert error(got[real], model(**batch).logits[real]) <= LIMIT


def test_an_error_in_a_block_is_what_is_seen() -> None:
    def fail(model: Any) -> None:
        with xfast.accelerated(model):
            inner = model.forward
            model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail(build())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_child_that_is_forked_while_another_thread_packs() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    model(**batch)
    plan = model.__dict__["forward"].plan
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with plan._lock.held():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    encoder_of(model).encoder.layer[0].output.dense.weight.mul_(1.5)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits
        try:
            with torch.no_grad():
                model(**batch)
        except BaseException:
            os._exit(1)
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
