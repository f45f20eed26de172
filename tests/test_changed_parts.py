"""Parts of an encoder that users changed without an own class or forward: refused, or the original code runs."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import ALL_FAMILIES, at_tokens, build, encoder_of, error, fallbacks, quick_settings, ragged
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import xfast
from xfast.plan import FreedWeight

_settings = pytest.fixture(autouse=True)(quick_settings)

LIMIT = 2e-5


def _adapter(model: Any) -> None:
    width = model.config.hidden_size
    model.encoder.layer[1].output.dropout = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, width)).eval()


def _linear(model: Any) -> None:
    width = model.config.hidden_size
    model.embeddings.dropout = nn.Linear(width, width)


def _relu(model: Any) -> None:
    old = model.encoder.layer[1].intermediate
    model.encoder.layer[1].intermediate = nn.Sequential(OrderedDict(dense=old.dense, act=nn.ReLU())).eval()


def _unnamed(model: Any) -> None:
    old = model.encoder.layer[1].intermediate
    model.encoder.layer[1].intermediate = nn.Sequential(old.dense, nn.ReLU())


def _causal(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True


def _head_size(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.attention_head_size *= 2


class _Odd:
    act = staticmethod(nn.functional.gelu)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def _odd_activation(model: Any) -> None:
    for layer in model.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = _Odd()


def _chunk(model: Any) -> None:
    layer = model.encoder.layer[0]
    layer.feed_forward_chunk = lambda x: 2 * type(layer).feed_forward_chunk(layer, x)


CHANGES = [_adapter, _linear, _relu, _unnamed, _causal, _head_size, _odd_activation, _chunk]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_before_accelerate_is_refused(change: Callable[[Any], None]) -> None:
    model = build()
    change(model)
    with pytest.raises(xfast.UnsupportedModelError, match="cannot be accelerated"):
        xfast.accelerate(model)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_accelerate_runs_the_original(change: Callable[[Any], None]) -> None:
    model, batch = xfast.accelerate(build()), ragged()
    model(**batch)
    change(model)

    def outcome(called: Any) -> Any:
        try:
            return called(**batch).last_hidden_state
        except (RuntimeError, ValueError) as raised:  # heads of another size do not fit
            return type(raised)

    got, stock = outcome(model), build()
    change(stock)
    stock.load_state_dict(model.state_dict())
    want = outcome(stock)
    assert got is want if isinstance(want, type) else error(got, want) <= LIMIT
    assert fallbacks(model)


def _dense(model: Any) -> Any:
    return model.encoder.layer[1].output.dense


def _doubled(model: Any) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(2 * one, requires_grad=False) for name, one in _dense(model).named_parameters()}


def _other_modules(model: Any) -> None:
    other = copy.deepcopy(_dense(model))
    other._parameters.update(_doubled(model))
    model.encoder.layer[1].output._modules = {**model.encoder.layer[1].output._modules, "dense": other}


def _other_parameters(model: Any) -> None:
    _dense(model)._parameters = _doubled(model)


def _other_state(model: Any) -> None:
    _dense(model).__dict__ = {**_dense(model).__dict__, "_parameters": _doubled(model)}


def _hook_in_a_new_table(model: Any) -> None:
    _dense(model)._forward_hooks = OrderedDict()  # how many clear a module's hooks
    _dense(model).register_forward_hook(lambda _, __, output: output * 2)


def _pre_hook_in_a_new_table(model: Any) -> None:
    _dense(model)._forward_pre_hooks = OrderedDict()
    _dense(model).register_forward_pre_hook(lambda _, args: (args[0] * 2,))


TABLES = [_other_modules, _other_parameters, _other_state, _hook_in_a_new_table, _pre_hook_in_a_new_table]


@pytest.mark.parametrize("change", TABLES)
def test_tables_of_a_module_that_were_replaced(change: Callable[[Any], None]) -> None:
    model, batch = xfast.accelerate(build()), ragged()
    before = model(**batch).last_hidden_state
    change(model)
    got = model(**batch).last_hidden_state
    want = xfast.restore(model)(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert error(got[real], want[real]) <= LIMIT
    assert error(before[real], want[real]) > 1e-3


@pytest.fixture
def restored() -> Iterator[Callable[[Any, str, Any], None]]:
    """Replaces a class's method until the test's end."""
    changed: list[tuple[Any, str, Any]] = []

    def replace(cls: Any, name: str, method: Any) -> None:
        changed.append((cls, name, cls.__dict__[name]))
        setattr(cls, name, method)

    yield replace
    for cls, name, method in changed:
        setattr(cls, name, method)


def test_a_forward_wrapped_by_functools_is_no_stock_forward(restored: Any) -> None:
    model = build()
    cls = type(model.encoder.layer[0])
    own = cls.forward

    @functools.wraps(own)
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs) * 2

    restored(cls, "forward", doubled)
    with pytest.raises(xfast.UnsupportedModelError, match=f"forward of the class {cls.__name__} was replaced"):
        xfast.accelerate(model)


def refused_or_original(change: Callable[[], None], before: bool, match: str) -> None:
    """A change of transformers' own code is refused by ``accelerate``, and after it the original code runs."""
    model, batch = build(), ragged()
    if before:
        change()
        with pytest.raises(xfast.UnsupportedModelError, match=match):
            xfast.accelerate(model)
        return
    xfast.accelerate(model)
    model(**batch)
    change()
    got = model(**batch).last_hidden_state
    assert error(got, xfast.restore(model)(**batch).last_hidden_state) <= LIMIT


@pytest.mark.parametrize("before", [True, False])
def test_helpers_of_a_class_that_were_replaced(restored: Any, before: bool) -> None:
    cls = type(build().encoder.layer[0])
    own = cls.feed_forward_chunk

    def change() -> None:
        restored(cls, "feed_forward_chunk", lambda self, x: 2 * own(self, x))

    refused_or_original(change, before, "feed_forward_chunk of its own")


def test_masks_of_the_users_own() -> None:
    model = build()
    name = next((one for one in ("_create_attention_masks", "get_extended_attention_mask") if hasattr(model, one)), "")
    setattr(model, name, MethodType(getattr(type(model), name), model))
    with pytest.raises(xfast.UnsupportedModelError, match=f"{name} of its own"):
        xfast.accelerate(model)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_models_as_transformers_makes_them_pass(family: str) -> None:
    model = xfast.accelerate(build(family))
    model(**ragged())
    assert not fallbacks(model)
    assert encoder_of(model) is model


@pytest.mark.parametrize("before", [True, False])
def test_a_standard_attention_that_was_registered_anew(before: bool) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def doubled(module: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = own(module, *args, **kwargs)
        return out * 2, weights

    try:
        refused_or_original(
            lambda: AttentionInterface.register("sdpa", doubled), before, "attention is the user's own, 'sdpa'"
        )
    finally:
        AttentionInterface.register("sdpa", own)


def test_a_hook_without_a_module_is_a_hook() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    seen: dict[Any, Any] = {}
    want = model(**batch).pooler_output
    model.encoder.layer[0].register_forward_pre_hook(seen.setdefault)
    assert error(model(**batch).pooler_output, want) <= LIMIT
    assert seen and fallbacks(model)


def test_inputs_that_shall_require_gradients_do() -> None:
    model, batch = build().requires_grad_(False), ragged()
    model.enable_input_require_grads()
    xfast.accelerate(model)
    with torch.enable_grad():
        assert model(**batch).last_hidden_state.requires_grad
    assert fallbacks(model)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("head", [None, "sequence-classification"])
def test_a_freed_model_has_a_device_and_may_be_sent_there(precision: str, head: Any, tmp_path: Any) -> None:
    freed = build(head=head) if head else build()
    freed = xfast.accelerate(freed, precision=precision, keep_weights=False)
    want = freed(**ragged())[0]
    xfast.save(freed, tmp_path / "a")
    for model in (freed, xfast.load(tmp_path / "a")):
        assert model.device.type == "cpu" and {p.device.type for p in model.parameters()} == {"cpu"}
        assert model.to(model.device) is model.cpu() is model.float() is model.to("cpu", torch.float32)
        assert torch.equal(model(**{name: value.to(model.device) for name, value in ragged().items()})[0], want)
        with pytest.raises(xfast.WeightsFreedError, match="an input is on meta"):
            model(input_ids=ragged()["input_ids"].to("meta"))
        model.half()
        with pytest.raises(xfast.WeightsFreedError):
            model(**ragged())


def test_a_freed_weight_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = FreedWeight(torch.zeros(2), torch.device("cpu"), "gone", requires_grad=True)
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)  # where no GPU is
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(to=lambda *_, **__: elsewhere))
    with pytest.raises(xfast.WeightsFreedError, match="cannot move to cuda:0"):
        weight.cuda()


# --- tables and vectors of other sizes ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["weight", "data"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("table", "rows"), [("word", 90), ("word", 130), ("position", 30), ("position", 99), ("token_type", 4)]
)
def test_tables_of_another_size_than_their_module_says(table: str, rows: int, before: bool, how: str) -> None:
    """A trimmed vocabulary, positions that were grown: often only the tensor is replaced, num_embeddings stays."""
    model, batch = build(), ragged(lengths=(9, 26))
    batch["input_ids"] = batch["input_ids"].clamp(max=89)
    if not before:
        xfast.accelerate(model)(**batch)
    part = getattr(model.embeddings, f"{table}_embeddings")
    old = part.weight.detach()
    grown = torch.cat([old, torch.randn(max(0, rows - len(old)), old.shape[1])])[:rows].clone()
    if how == "weight":
        part.weight = nn.Parameter(grown)
    else:
        part.weight.data = grown
    want = xfast.restore(copy.deepcopy(model))(**batch)[0]
    got = xfast.accelerate(model)(**batch)[0] if before else model(**batch)[0]
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5
    assert fallbacks(model) == {}
    if table == "word":
        batch["input_ids"][1, 4] = rows
        with pytest.raises(xfast.TokenIdError, match=rf"input_ids\[1, 4\] is {rows}; accepted: 0 to {rows - 1}"):
            model(**batch)


def test_parameters_that_are_not_there_are_refused() -> None:
    for path in ("embeddings.word_embeddings", "encoder.layer.1.output.LayerNorm", "encoder.layer.0.output.dense"):
        for value in (None, nn.parameter.UninitializedParameter()):
            model = build()
            model.get_submodule(path).weight = value
            with pytest.raises(xfast.UnsupportedModelError, match=rf"{path}\.weight has shape \(\), expected"):
                xfast.accelerate(model)


@pytest.mark.parametrize(
    ("path", "parameter", "shape"),
    [
        ("embeddings.LayerNorm", "weight", (1,)),
        ("encoder.layer.0.attention.output.LayerNorm", "bias", (1,)),
        ("encoder.layer.0.output.dense", "bias", (1,)),
        ("embeddings.word_embeddings", "weight", (7,)),
        ("embeddings.position_embeddings", "weight", ()),
        ("embeddings.token_type_embeddings", "weight", (0, 64)),
        ("embeddings.word_embeddings", "weight", (120, 32)),
    ],
)
def test_parameters_of_another_shape_are_refused(path: str, parameter: str, shape: tuple[int, ...]) -> None:
    model = build()
    setattr(model.get_submodule(path), parameter, nn.Parameter(torch.ones(shape)))
    with pytest.raises(xfast.UnsupportedModelError, match=rf"{path}\.{parameter} has shape .*expected"):
        xfast.accelerate(model)
