"""``accelerate(training=True)`` where models change, are hooked, wrapped or moved: the original's values or code."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from gpu import DEVICE
from models import build, fallbacks, labels, left_padded, norm_error, one_thread, ragged, text_tower
from triton_models import moved

import xfast
from xfast import training
from xfast.attention_interface import dropout_seed

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}


_one_thread = pytest.fixture(autouse=True)(one_thread)


def model_of(head: str = "base-no-pooler", **changes: Any) -> Any:
    return build("xlm-roberta", head, **{**NO_DROPOUT, "classifier_dropout": 0.0, **changes}).to(DEVICE).train()


def training_on(model: Any) -> Any:
    return xfast.accelerate(model, backend="triton", training=True)


def hooked_classifier() -> Any:
    model = model_of("sequence-classification")
    model.classifier.register_forward_hook(lambda *_: None)
    return model


def classifier_of_its_own() -> Any:
    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(64, 3)

        def forward(self, states: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.out(states[:, 0])

    model = model_of("sequence-classification")
    model.classifier = First().to(DEVICE)
    return model


def tower() -> Any:
    return text_tower(**NO_DROPOUT).to(DEVICE).train()


@pytest.mark.parametrize("make", [hooked_classifier, classifier_of_its_own, tower])
def test_a_masked_first_column_that_is_read(make: Any) -> None:
    model = make()
    batch = moved(left_padded(ragged()))

    def read() -> torch.Tensor:
        found = model(**batch)
        return (found.logits if "logits" in found else found.pooler_output).detach()

    want = read()
    training_on(model)
    assert norm_error(read(), want) <= 1e-5
    assert list(fallbacks(model)) == ["column 0 is masked in a row whose first token is read"]


def test_tables_that_were_resized() -> None:
    model = training_on(model_of("token-classification"))
    model.resize_token_embeddings(110)
    batch = moved(ragged())
    batch["input_ids"][0, 1] = 105
    got = model(**batch).logits
    want = xfast.restore(model)(**batch).logits
    real = batch["attention_mask"].bool()
    assert norm_error(got[real].detach(), want[real].detach()) <= 1e-5


def test_scales_that_were_changed() -> None:
    model, batch = model_of(), moved(ragged())
    if not hasattr(model.encoder.layer[0].attention.self, "scaling"):
        pytest.skip("this version of transformers has the scale in its code")
    training_on(model)
    model.encoder.layer[0].attention.self.scaling = 0.5
    got = model(**batch)[0]
    assert fallbacks(model) == {}
    want, real = xfast.restore(model)(**batch)[0], batch["attention_mask"].bool()
    assert norm_error(got[real].detach(), want[real].detach()) <= 1e-5


def test_weights_of_another_type_run_the_original_code() -> None:
    model = training_on(model_of()).double()
    model(**moved(ragged()))
    assert list(fallbacks(model)) == ["parameters are torch.float64"]


def test_a_device_without_the_kernels_runs_the_original_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = training_on(model_of()), moved(ragged())
    monkeypatch.setattr(training, "unavailable", lambda *_: "the model is on cpu, this backend runs on cuda")
    model(**batch)[0].sum().backward()
    model.eval()(**batch)
    assert fallbacks(model) == {"the model is on cpu, this backend runs on cuda": 2}


@pytest.mark.filterwarnings("ignore:For backward hooks", "ignore:Full backward hook")  # of inputs that are no tensors
@pytest.mark.parametrize("place", ["layer", "attention", "query", "everywhere"])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_are_called(kind: str, place: str) -> None:
    model, batch = training_on(model_of()), moved(ragged())
    layer, shapes = model.encoder.layer[1], []

    def hook(module: Any, *gradients: Any) -> None:
        if module is layer.attention.self.query or place != "query":
            shapes.append([tuple(t.shape) for t in gradients[-1] if t is not None])

    parts = {"layer": layer, "attention": layer.attention.self, "query": layer.attention.self.query}
    if place == "everywhere":
        handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(hook)
    else:
        handle = getattr(parts[place], f"register_{kind}")(hook)
    try:
        model(**batch)[0].sum().backward()
    finally:
        handle.remove()
    assert shapes and all(shape[:2] == (4, 17) for found in shapes for shape in found if len(shape) == 3)
    assert list(fallbacks(model)) == ["a backward hook is registered"]
    model(**batch)
    assert len(fallbacks(model)) == 1


@pytest.mark.parametrize("head", ["base", "sequence-classification", "token-classification"])
def test_a_forward_that_was_bound_as_a_method(head: str) -> None:
    """As accelerate's ``unwrap_model(keep_fp32_wrapper=False)`` does."""
    model, batch = model_of(head).eval(), moved(ragged())
    with torch.no_grad():
        want = model(**batch)[0]
        training_on(model)
        inner = model if head == "base" else model.base_model
        for module in {id(one): one for one in (model, inner)}.values():
            module.forward = MethodType(module.forward, module)
        got = model(**batch)[0]
        by_position = model(batch["input_ids"], batch["attention_mask"])[0]
    real = batch["attention_mask"].bool() if got.dim() == 3 else slice(None)
    assert norm_error(got[real], want[real]) <= 1e-5 and torch.equal(got, by_position)


def test_dropout_in_somebody_elses_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(xfast.UnsupportedModelError, match="cannot be part of a CUDA graph"):
        dropout_seed(0.1)
    assert dropout_seed(0.0) == 0


def test_copies_train_on_their_own() -> None:
    model, batch = training_on(model_of("sequence-classification")), moved(ragged())
    twin = copy.deepcopy(model)
    twin(**batch, **moved(labels("sequence-classification", batch))).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.grad is not None for parameter in twin.parameters()) and fallbacks(twin) == {}
