"""Encoders whose modules, weights, forward or attention a user changed: refused, or run by their own code."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import at_tokens, build, error, fallbacks, quick_settings, ragged
from torch import nn

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)


class Adapter(nn.Module):
    """As LoRA does it: the original layer plus a low-rank term."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def _subclass(module: nn.Module, scale: float = 2.0) -> None:
    base = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale

    module.__class__ = type("Custom" + base.__name__, (base,), {"forward": forward})


def _instance_forward(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), module)


def _sparse(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter((linear.weight * 2).to_sparse_csr(), requires_grad=False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "adapter": lambda m: setattr(m.encoder.layer[1].output, "dense", Adapter(m.encoder.layer[1].output.dense)),
    "linear of another class": lambda m: _subclass(m.encoder.layer[1].output.dense),
    "linear with a forward of its own": lambda m: _instance_forward(m.encoder.layer[1].output.dense),
    "attention of another class": lambda m: _subclass(m.encoder.layer[1].attention.self),
    "layer of another class": lambda m: _subclass(m.encoder.layer[1]),
    "embeddings of another class": lambda m: _subclass(m.embeddings),
    "layer with a forward of its own": lambda m: _instance_forward(m.encoder.layer[1].intermediate),
    "another epsilon": lambda m: setattr(m.encoder.layer[1].output.LayerNorm, "eps", 1.0),
    "another attention scale": lambda m: setattr(m.encoder.layer[1].attention.self, "scaling", 1.0),
    "a sparse weight": lambda m: _sparse(m.encoder.layer[1].output.dense),
    "another activation": lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()),
}


def _changed(model: Any, change: str, batch: dict[str, torch.Tensor]) -> None:
    before = model(**batch).last_hidden_state
    CHANGES[change](model)
    model.eval()
    after = model(**batch).last_hidden_state
    assert error(after[:, 0], before[:, 0]) > 1e-2, "the change changes nothing: the test tests nothing"


pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")


@pytest.mark.parametrize("change", CHANGES)
def test_changed_encoders_are_refused(change: str) -> None:
    model, batch = build(attention="eager"), ragged()
    _changed(model, change, batch)
    want = model(**batch).last_hidden_state
    with pytest.raises(xfast.UnsupportedModelError, match=r"encoder\.layer\.1|embeddings"):
        xfast.accelerate(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(**batch).last_hidden_state, want)


@pytest.mark.parametrize("change", list(CHANGES))
def test_encoders_changed_later_run_the_original_code(change: str) -> None:
    model, batch = xfast.accelerate(build()), ragged()
    model(**batch)
    CHANGES[change](model)
    model.eval()
    got = model(**batch).last_hidden_state
    assert sum(fallbacks(model).values()) == 1
    assert "the original code runs" in str(xfast.explain(model))
    assert torch.equal(got, xfast.restore(model)(**batch).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "decoder"),
        ({"hidden_act": "relu"}, "relu.*'gelu'"),
        ({"hidden_act": "gelu_new"}, "gelu_new"),
    ],
)
@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_unsupported_configurations_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    model, batch = build(family, **changes), ragged(family)
    want = model(**batch, use_cache=False).last_hidden_state
    with pytest.raises(xfast.UnsupportedModelError, match=message):
        xfast.accelerate(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(**batch, use_cache=False).last_hidden_state, want)


@pytest.mark.parametrize("change", list(CHANGES))
def test_copies_changed_before_their_first_call_run_the_original_code(change: str) -> None:
    # deepcopy, then LoRA or dynamic quantisation: the copy has never packed anything
    model, batch = xfast.accelerate(build()), ragged()
    model(**batch)
    copied = copy.deepcopy(model)
    CHANGES[change](copied)
    with pytest.warns(UserWarning, match="this copy cannot be accelerated"):
        got = copied.eval()(**batch).last_hidden_state
    assert "the original code runs" in str(xfast.explain(copied)) and sum(fallbacks(copied).values()) == 1
    if change != "a sparse weight":  # which torch itself cannot copy
        with pytest.warns(UserWarning, match="this copy cannot be accelerated"):
            assert torch.equal(copy.deepcopy(copied)(**batch).last_hidden_state, got)
    copied.train()(**batch)
    assert torch.equal(xfast.restore(copied).eval()(**batch).last_hidden_state, got)
    assert fallbacks(model) == {}


def test_an_encoder_with_a_forward_of_its_own_is_refused() -> None:
    model = build()
    model.forward = functools.partial(model.forward, output_hidden_states=True)
    with pytest.raises(xfast.UnsupportedModelError, match="forward of its own"):
        xfast.accelerate(model)
    assert model(**ragged()).hidden_states is not None


def test_a_forward_wrapped_after_accelerate_stays_accelerated_and_is_not_forgotten() -> None:
    model, batch = xfast.accelerate(build(), precision="int8"), ragged()
    ours = model.forward
    model.forward = functools.partial(ours, output_hidden_states=True)
    assert len(model(**batch).hidden_states) == 4
    assert xfast.explain(model).encoders[0].precision == "int8"
    for undo in (xfast.restore, lambda model: xfast.restored(model).__enter__()):
        with pytest.raises(xfast.UnsupportedModelError, match="wrapped after"):
            undo(model)
    with pytest.raises(xfast.UnsupportedModelError, match="forward of its own"):
        xfast.accelerate(model)
    model.forward = ours
    assert "forward" not in xfast.restore(model).__dict__
    assert not xfast.explain(model).encoders


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_of_the_users_runs_in_the_original_code(when: str) -> None:
    def doubled(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        output, _ = transformers.AttentionInterface()["sdpa"](module, *args, **kwargs)
        return 2 * output, None

    if not hasattr(transformers, "AttentionInterface"):
        pytest.skip("this transformers has no AttentionInterface")
    transformers.AttentionInterface.register("doubled", doubled)
    model, plain, batch = build(), build(), ragged()
    if when == "before":
        model.set_attn_implementation("doubled")
        with pytest.raises(xfast.UnsupportedModelError, match="attention is the user's own, 'doubled'"):
            xfast.accelerate(model)
        return
    xfast.accelerate(model)
    model.set_attn_implementation("doubled")
    plain.set_attn_implementation("doubled")
    assert torch.equal(model(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert any("attention" in reason for reason in fallbacks(model))


def test_one_layers_states_do_not_keep_the_others() -> None:
    model = xfast.accelerate(build())
    states = model(**ragged(lengths=(9, 9)), output_hidden_states=True).hidden_states
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in states)


def test_encoder_subclass_that_overrides_forward_is_refused() -> None:
    model = build()
    model.__class__ = type("Mine", (type(model),), {"forward": lambda self, **inputs: None})
    with pytest.raises(xfast.UnsupportedModelError, match="Mine overrides forward"):
        xfast.accelerate(model)


def test_encoder_subclass_without_a_forward_is_accelerated() -> None:
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    model.__class__ = type("Mine", (type(model),), {"extra": 1})
    got, tokens = xfast.accelerate(model)(**batch).last_hidden_state, batch["attention_mask"]
    assert error(at_tokens(got, tokens), at_tokens(want, tokens)) <= 1e-5
    assert fallbacks(model) == {}


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["masked-lm", "token-classification", "sequence-classification"])
def test_changed_copies_with_a_head_can_be_explained(head: str) -> None:
    copied = copy.deepcopy(xfast.accelerate(build(head=head)))
    CHANGES["adapter"](copied.base_model)
    assert "the original code runs" in str(xfast.explain(copied))


def test_a_copy_that_cannot_run_the_calibration_batches_runs_the_original_code() -> None:
    model, batch = build(head="masked-lm"), ragged()
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.5)
    copied = copy.deepcopy(model)
    copied.resize_token_embeddings(int(batch["input_ids"].max()))  # the batch's largest id is none of its own now
    few = {name: values[:1, :1] for name, values in batch.items()}
    assert "the original code runs: calibration" in str(xfast.explain(copied))
    with pytest.warns(UserWarning, match="this copy cannot be accelerated: calibration"):
        got = copied(**few).logits
    assert torch.equal(got, xfast.restore(copied)(**few).logits) and fallbacks(model) == {}


def test_weights_that_became_nan_are_explained() -> None:
    model = xfast.accelerate(build())
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    said = str(xfast.explain(model))
    assert "accelerated calls raise InvalidWeightsError" in said and "layer.0.output.dense" in said
    with pytest.raises(xfast.InvalidWeightsError):
        model(**ragged())
