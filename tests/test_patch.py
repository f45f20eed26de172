"""Calls and models that cannot be accelerated run the original code; copies, threads, forks and freed models."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
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
    outputs_of,
    quick_settings,
    ragged,
)
from torch import nn

import xfast
from xfast import patch

_settings = pytest.fixture(autouse=True)(quick_settings)


def assert_same_at_tokens(got: torch.Tensor, want: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    """Equal within fp32's rounding at real tokens."""
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


# --- calls that run the original code --------------------------------------------------------------------------------


def _autocast(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch)


def _training(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    torch.manual_seed(0)
    try:
        return model.train()(**batch)
    finally:
        model.eval()


CALLS: dict[str, Callable[[Any, dict[str, torch.Tensor]], Any]] = {
    "training mode": _training,
    "attention weights": lambda model, batch: model(**batch, output_attentions=True),
    "selected hidden states": lambda model, batch: model(**batch, output_hidden_states=[0, 2]),
    "autocast": _autocast,
}


@pytest.mark.parametrize("reason", list(CALLS))
@pytest.mark.parametrize("head", ["base", "sequence-classification", "token-classification"])
def test_calls_that_run_the_original_code(head: str, reason: str) -> None:
    model, batch, call = build(head=head, attention="eager"), ragged(), CALLS[reason]
    want = outputs_of(call(model, batch))
    xfast.accelerate(model)
    got = outputs_of(call(model, batch))
    assert got.keys() == want.keys()
    assert all(torch.equal(values, want[name]) for name, values in got.items())  # the very same computation
    ((given, count),) = fallbacks(model).items()
    assert count == 1 and reason in given
    model(**batch)
    assert sum(fallbacks(model).values()) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(4, 1, 17), (4, 17, 17), (4, 1, 17, 17)], ids=str)
def test_masks_of_more_dimensions_run_the_original_code(shape: tuple[int, ...], attention: str) -> None:
    # What the original makes of them depends on its version: an error, numbers to be added, or ones and zeros.
    def outcome() -> tuple[str, torch.Tensor]:
        try:
            return "", model(batch["input_ids"], mask).last_hidden_state
        except Exception as error:
            return repr(error), torch.empty(0)

    model, batch, mask = build(attention=attention), ragged(), torch.ones(shape)
    mask[..., -1] = 0
    want_error, want = outcome()
    xfast.accelerate(model)
    error, got = outcome()
    assert error == want_error and torch.equal(got, want)
    assert fallbacks(model) == {"the attention mask has more than 2 dimensions": 1}


def test_one_module_in_training_mode_is_enough() -> None:
    # Monte-Carlo dropout: the model is in eval mode, its dropout layers are not.
    model, batch = xfast.accelerate(build()), ragged()
    for module in encoder_of(model).modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert sum(fallbacks(model).values()) == 2
    model.eval()
    assert torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert sum(fallbacks(model).values()) == 2


def test_gradients_flow_and_are_warned_of_once() -> None:
    model, batch = xfast.accelerate(build(head="sequence-classification")), ragged()
    with torch.enable_grad():
        with pytest.warns(UserWarning, match="gradients are enabled"):
            output = model(**batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch)
        assert output.logits.grad_fn is not None
        output.logits.sum().backward()
    assert model.base_model.embeddings.word_embeddings.weight.grad is not None
    assert fallbacks(model) == {"gradients are enabled": 2}


def test_frozen_models_stay_fast_with_gradients_enabled() -> None:
    model, batch = build().requires_grad_(False), ragged()
    want = model(**batch).last_hidden_state
    xfast.accelerate(model)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model(**batch).last_hidden_state
    assert_same_at_tokens(got, want, batch)
    assert fallbacks(model) == {}
    embeds = model.embeddings.word_embeddings(batch["input_ids"]).requires_grad_()
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradients are enabled"):
        got = model(inputs_embeds=embeds).last_hidden_state
    assert got.grad_fn is not None


def test_named_precision_runs_under_autocast() -> None:
    model, batch = xfast.accelerate(build(), precision="int8"), ragged()
    want = model(**batch).last_hidden_state
    assert torch.equal(_autocast(model, batch).last_hidden_state, want)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("path", ["encoder.layer.1", "encoder.layer.0.attention.self.query", "embeddings", "pooler"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_inside_the_encoder_fire(path: str, kind: str) -> None:
    model, batch, seen = xfast.accelerate(build()), ragged(), []
    handle = getattr(model.get_submodule(path), kind)(lambda *args: seen.append(path))
    model(**batch)
    assert seen == [path]
    assert list(fallbacks(model)) == ["a forward hook is registered inside the encoder"]
    handle.remove()
    model(**batch)
    assert len(seen) == 1 and sum(fallbacks(model).values()) == 1


def test_hooks_on_modules_added_later_fire() -> None:
    model, batch, seen = xfast.accelerate(build()), ragged(), []
    model(**batch)
    layer = model.encoder.layer[0]
    layer.output.dense = copy.deepcopy(layer.output.dense)
    layer.output.dense.register_forward_hook(lambda *args: seen.append(1))
    model(**batch)
    assert seen == [1]


def test_hooks_on_every_module_fire() -> None:
    # What profilers and debuggers register: they expect the layers to be seen.
    model, batch, seen = xfast.accelerate(build()), ragged(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        model(**batch)
    finally:
        hook.remove()
    assert type(model.encoder.layer[0]) in seen


def test_hooks_on_the_encoder_itself_keep_it_fast() -> None:
    model, batch, seen = xfast.accelerate(build()), ragged(), []
    model.register_forward_hook(lambda module, args, output: seen.append(tuple(output[0].shape)))
    model(**batch)
    assert seen == [(4, 17, 64)]
    assert fallbacks(model) == {}


def test_meaningless_calls_get_the_error_of_the_original() -> None:
    model, batch = build(), ragged()
    ids = batch["input_ids"]
    embeds = model.embeddings.word_embeddings(ids)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((ids,), {"inputs_embeds": embeds}),
        ((ids,), {"attention_mask": batch["attention_mask"].tolist()}),
        ((ids,), {"position_ids": torch.full_like(ids, -1)}),
        ((ids,), {"input_ids": ids}),
    ]
    for args, kwargs in calls:
        with pytest.raises(Exception) as original:
            model(*args, **kwargs)
        with xfast.accelerated(model), pytest.raises(type(original.value)) as ours:
            model(*args, **kwargs)
        assert str(ours.value) == str(original.value)


# --- models that are refused -----------------------------------------------------------------------------------------


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301 - our own bytes
    "torch.save": _saved,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("how", list(COPIES))
def test_copies_are_accelerated_and_independent(how: str, head: str) -> None:
    model, batch = build(head=head), arguments("xlm-roberta", head)
    xfast.accelerate(model, precision="int8", layers=2)
    want = model(**batch)[0]
    clone = COPIES[how](model)
    assert torch.equal(clone(**batch)[0], want)
    explained = xfast.explain(clone).encoders[0]
    assert (explained.precision, explained.layers, explained.fallbacks) == ("int8", 2, {})
    encoder_of(clone).encoder.layer[0].output.dense.weight.zero_()
    assert not torch.equal(clone(**batch)[0], want)
    assert torch.equal(model(**batch)[0], want)
    xfast.restore(model)
    del model
    gc.collect()
    assert xfast.explain(clone).encoders[0].precision == "int8"
    restored = xfast.restore(clone)(**batch)[0]
    assert restored.shape == want.shape and "forward" not in encoder_of(clone).__dict__


@pytest.mark.parametrize("head", ["base", "masked-lm"])
def test_save_pretrained_writes_the_original_weights(tmp_path: Path, head: str) -> None:
    model, batch = build(head=head), ragged()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    want = model(**batch)[0]
    xfast.accelerate(model, precision="int8")
    model(**batch)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(**batch)[0], want)


def test_copies_of_a_part_of_a_model() -> None:
    model, batch = build(head="token-classification"), ragged()
    hidden = model.base_model(**batch).last_hidden_state
    want = model.classifier(hidden)
    xfast.accelerate(model)
    encoder, classifier = copy.deepcopy(model.base_model), copy.deepcopy(model.classifier)
    del model
    gc.collect()
    assert_same_at_tokens(encoder(**batch).last_hidden_state, hidden, batch)
    assert torch.equal(classifier(hidden), want)


# --- lifetime --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_deleting_a_model_frees_it(head: str) -> None:
    model, batch = build(head=head), arguments("xlm-roberta", head)
    xfast.accelerate(model)
    model(**batch, output_hidden_states=True)
    engine, forward = weakref.ref(encoder_of(model).forward.plan.engine), encoder_of(model).forward
    alive = weakref.ref(model)
    gc.disable()  # no cycle may be needed to be found: packed weights are big
    try:
        del model
        assert alive() is None
        with pytest.raises(xfast.ModelFreedError, match="freed"):
            forward(**batch)
        del forward
        assert engine() is None
    finally:
        gc.enable()


def test_restoring_frees_the_packed_weights() -> None:
    model = xfast.accelerate(build())
    engine = weakref.ref(model.forward.plan.engine)
    assert engine() is not None
    xfast.restore(model)
    gc.collect()
    assert engine() is None


# --- threads and processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["base", "sequence-classification", "masked-lm"])
@pytest.mark.parametrize("fresh", [False, True], ids=["packed", "packs on the first call"])
def test_many_threads_may_call_one_model(head: str, fresh: bool) -> None:
    model = xfast.accelerate(build(head=head, hidden_size=256, num_attention_heads=4), precision="int8")
    batches = [ragged(lengths=lengths, seed=i) for i, lengths in enumerate([(9, 3), (1,), (30, 38, 2), (17,) * 8])]
    want = [model(**batch)[0] for batch in batches]
    if fresh:
        model = copy.deepcopy(model)
    start, wrong = threading.Barrier(6), []

    def work(first: int) -> None:
        start.wait()
        with torch.inference_mode():
            numbers = [i % 4 for i in range(first, first + 20)]
            wrong.extend(i for i in numbers if not torch.equal(model(**batches[i])[0], want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fallbacks(model) == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_can_go_on() -> None:
    model, batch = xfast.accelerate(build(head="base-no-pooler")), ragged()
    want = model(**batch).last_hidden_state
    assert _forked(lambda: torch.equal(model(**batch).last_hidden_state, want))
    assert torch.equal(model(**batch).last_hidden_state, want)


def _forked(good: Callable[[], bool]) -> bool:
    """What a forked child answers; one that does not is killed."""
    child = os.fork()
    if child == 0:
        os._exit(0 if good() else 3)
    deadline = time.monotonic() + 20
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return bool(done) and os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_fork_while_another_thread_begins_with_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one copy the plan is being made: nothing that is locked then is needed for another."""
    model, batch = xfast.accelerate(build(head="base-no-pooler"), keep_weights=False), ragged()
    want = model(**batch).last_hidden_state
    begun, other = copy.deepcopy(model), copy.deepcopy(model)
    making, forked = threading.Event(), threading.Event()
    real = patch.family_of

    def slow(module: nn.Module) -> Any:
        making.set()
        forked.wait(60)
        return real(module)

    monkeypatch.setattr(patch, "family_of", slow)
    thread = threading.Thread(target=torch.inference_mode()(lambda: begun(**batch)))
    thread.start()
    assert making.wait(20)
    monkeypatch.setattr(patch, "family_of", real)
    answers = _forked(lambda: torch.equal(other(**batch).last_hidden_state, want))
    forked.set()
    thread.join()
    assert answers
    assert torch.equal(begun(**batch).last_hidden_state, want)


def test_threads_that_begin_with_one_copy_pack_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, made = xfast.accelerate(build()), ragged(), []
    want, real = model(**batch)[0], patch.Plan
    monkeypatch.setattr(patch, "Plan", lambda *given: made.append(given) or time.sleep(0.05) or real(*given))
    copied, start, same = copy.deepcopy(model), threading.Barrier(4), []

    @torch.inference_mode()
    def work() -> None:
        start.wait()
        same.append(torch.equal(copied(**batch)[0], want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4 and len(made) == 1


@pytest.mark.parametrize("keep_weights", [True, False])
def test_threads_that_accelerate_one_model(keep_weights: bool) -> None:
    """A pipeline each, over one model: the last one stays, and no module is left with half of two."""
    stock, batch = build(head="sequence-classification"), ragged()
    want = stock(**batch).logits
    for _ in range(5):
        model = copy.deepcopy(stock)
        start, refused, wrong = threading.Barrier(4), [], []

        @torch.inference_mode()
        def work(model: Any = model, start: Any = start, refused: Any = refused, wrong: Any = wrong) -> None:
            start.wait()
            try:
                xfast.accelerate(model, keep_weights=keep_weights)
            except xfast.WeightsFreedError as problem:
                refused.append(problem)
            except BaseException as problem:
                wrong.append(problem)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[0]
        assert len(refused) == (0 if keep_weights else 3)  # the first one gave up the others' weights
        assert error(model(**batch).logits, want) <= 1e-5
        assert fallbacks(model) == {}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_mode_and_no_grad(mode: Callable[[], Any]) -> None:
    model, batch = build(head="token-classification"), ragged()
    want = model(**batch).logits
    with torch.enable_grad():
        xfast.accelerate(model)
        with mode():
            got = model(**batch).logits
    assert got.is_inference() == (mode is torch.inference_mode)
    assert_same_at_tokens(got, want, batch)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"precision": "auto", "tolerance": 0.1}], ids=str)
def test_another_default_device_is_for_what_users_make(options: dict[str, Any], tmp_path: Path) -> None:
    model, batch = build(head="sequence-classification"), ragged()
    want = model(**batch).logits
    given = {**options, "calibration": [batch]} if "tolerance" in options else options
    with torch.device("meta"):
        got = xfast.accelerate(model, **given)(**batch).logits
        xfast.save(model, tmp_path)
        loaded = xfast.load(tmp_path)(**batch).logits
    assert error(got, want) <= 0.1 and error(loaded, want) <= 0.1
    assert fallbacks(model) == {}
