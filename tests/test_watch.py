"""Weights changed after ``accelerate`` are noticed whichever way they change; ``keep_weights=False`` gives them up."""

from __future__ import annotations

import copy
import io
import pickle
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
    quick_settings,
    ragged,
)
from torch import nn

import xfast
from xfast import _C

_settings = pytest.fixture(autouse=True)(quick_settings)


# --- changes ---------------------------------------------------------------------------------------------------------


def _weight(model: Any) -> nn.Parameter:
    return model.encoder.layer[1].output.dense.weight


def _load_state_dict(model: Any) -> None:
    model.load_state_dict(build(seed=9).state_dict())


def _load_and_assign(model: Any) -> None:
    model.load_state_dict(build(seed=9).state_dict(), assign=True)


def _inference_mode(model: Any) -> None:
    with torch.inference_mode():
        _weight(model)[3, 4] += 1


def _optimizer(model: Any) -> None:
    with torch.enable_grad():
        loss = model.train()(**ragged(seed=4)).last_hidden_state.square().mean()
        loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.zero_grad()
    model.eval()


def _replace_parameter(model: Any) -> None:
    model.encoder.layer[1].output.dense.weight = nn.Parameter(_weight(model) * 1.5)


def _replace_module(model: Any) -> None:
    model.encoder.layer[1].output.dense = copy.deepcopy(model.encoder.layer[1].output.dense)
    _weight(model).mul_(1.5)


def _replace_encoder_layer(model: Any) -> None:
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[0])


def _drop_layer(model: Any) -> None:
    del model.encoder.layer[1]


def _resize_embeddings(model: Any) -> None:
    model.resize_token_embeddings(120, mean_resizing=False)
    model.embeddings.word_embeddings.weight.add_(0.3)


def _swap_data(model: Any) -> None:
    _weight(model).data = _weight(model).data * 1.5


def _merge_adapter(model: Any) -> None:
    _weight(model).data += torch.full_like(_weight(model), 0.02)  # moves no version counter


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": _load_state_dict,
    "load_state_dict(assign=True)": _load_and_assign,
    "in place": lambda model: _weight(model)[5, 7].add_(1),
    "copy_": lambda model: _weight(model).copy_(_weight(model) * 1.5),
    "in place in inference mode": _inference_mode,
    "optimizer step": _optimizer,
    "data +=": _merge_adapter,
    "data =": _swap_data,
    "parameter replaced": _replace_parameter,
    "module replaced": _replace_module,
    "layer replaced": _replace_encoder_layer,
    "layer dropped": _drop_layer,
    "embeddings resized": _resize_embeddings,
    "bias": lambda model: model.encoder.layer[0].attention.self.value.bias.add_(1),
    "bias removed": lambda model: setattr(model.encoder.layer[0].output.dense, "bias", None),
    "norm": lambda model: model.encoder.layer[2].attention.output.LayerNorm.weight.mul_(1.5),
    "word embeddings": lambda model: model.embeddings.word_embeddings.weight.add_(0.3),
    "position embeddings": lambda model: model.embeddings.position_embeddings.weight.data.mul_(0.5),
    "type embeddings": lambda model: model.embeddings.token_type_embeddings.weight.add_(0.3),
    "embedding norm": lambda model: model.embeddings.LayerNorm.bias.add_(0.3),
}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_weights_are_noticed(change: str, precision: str) -> None:
    model, batch = build(), ragged()
    tokens = batch["attention_mask"]
    xfast.accelerate(model, precision=precision)
    before = model(**batch).last_hidden_state
    CHANGES[change](model)
    counts = fallbacks(model)
    got = model(**batch).last_hidden_state
    assert not torch.equal(got, before)
    assert fallbacks(model) == counts  # repacked, not handed to the original code
    fresh = copy.deepcopy(xfast.restore(model))
    want = fresh(**batch).last_hidden_state
    assert error(at_tokens(got, tokens), at_tokens(want, tokens)) <= {"fp32": 1e-5, "int8": 1e-1}[precision]
    assert torch.equal(xfast.accelerate(fresh, precision=precision)(**batch).last_hidden_state, got)


@pytest.mark.parametrize("change", ["parameter replaced", "in place", "layer dropped"])
def test_unchanged_weights_are_not_packed_again(change: str) -> None:
    model, batch = xfast.accelerate(build()), ragged()
    first = model.forward.plan.engine
    CHANGES[change](model)
    model(**batch)
    second = model.forward.plan.engine
    model(**batch)
    assert second is not None and second is not first
    assert model.forward.plan.engine is second


def test_parametrized_weights_are_right_and_not_packed_at_every_call() -> None:
    # Their `weight` is computed anew whenever it is read: comparing it by identity would never find it unchanged.
    model, batch = xfast.accelerate(build()), ragged()
    dense = model.encoder.layer[1].output.dense
    nn.utils.parametrizations.weight_norm(dense)
    model.eval()
    model(**batch)
    dense.parametrizations.weight.original0.mul_(1.5)
    got = model(**batch).last_hidden_state
    engine = model.forward.plan.engine
    model(**batch)
    assert model.forward.plan.engine is engine
    want = xfast.restore(model)(**batch).last_hidden_state
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def test_dtype_changed_and_back() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    tokens = batch["attention_mask"]
    assert xfast.explain(model).encoders[0].precision == "fp32"
    model.to(torch.bfloat16)
    got = model(**batch).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert xfast.explain(model).encoders[0].precision == "bf16"
    model.float()  # the weights are rounded now
    got = model(**batch).last_hidden_state
    assert got.dtype == torch.float32
    assert xfast.explain(model).encoders[0].precision == "fp32"
    assert fallbacks(model) == {}
    want = xfast.restore(model)(**batch).last_hidden_state
    assert error(at_tokens(got, tokens), at_tokens(want, tokens)) <= 1e-5


@pytest.mark.parametrize("precision", ["model", "fp32", "int8"])
def test_double_precision_runs_the_original_code_and_says_why(precision: str) -> None:
    model, batch = xfast.accelerate(build(), precision=precision), ragged()
    model.double()
    got = model(**batch).last_hidden_state
    explained = xfast.explain(model)
    ((reason, count),) = fallbacks(model).items()
    assert count == 1
    assert "float64" in reason or "dtype" in reason or "backend" in reason  # not a reason of another kind
    assert "float64" in str(explained) and explained.encoders[0].precision == "original"
    model.float()
    model(**batch)
    assert sum(fallbacks(model).values()) == 1  # fast again
    want = xfast.restore(model).double()(**batch).last_hidden_state
    assert got.dtype == torch.float64 and torch.equal(got, want)


def test_double_precision_from_the_start_is_warned_of() -> None:
    model, batch = build().double(), ragged()
    want = model(**batch).last_hidden_state
    with pytest.warns(UserWarning, match=r"original code runs.*float64"):
        xfast.accelerate(model)
    assert torch.equal(model(**batch).last_hidden_state, want)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_double_precision_with_a_precision_by_name_is_refused(precision: str) -> None:
    model, batch = build().double(), ragged()
    with pytest.raises(xfast.XfastError, match="float64"):
        xfast.accelerate(model, precision=precision)
    assert "forward" not in model.__dict__
    assert model(**batch).last_hidden_state.dtype == torch.float64


def test_functional_call_uses_the_weights_it_is_given() -> None:
    model, batch = build(), ragged()
    other = {name: value * 1.1 for name, value in model.named_parameters()}
    want = torch.func.functional_call(model, other, (), batch).last_hidden_state
    plain = xfast.accelerate(model)(**batch).last_hidden_state
    got = torch.func.functional_call(model, other, (), batch).last_hidden_state
    tokens = batch["attention_mask"]
    assert error(at_tokens(got, tokens), at_tokens(want, tokens)) <= 1e-5
    assert torch.equal(model(**batch).last_hidden_state, plain)


def test_weights_made_in_inference_mode_are_watched() -> None:
    batch = ragged()
    with torch.inference_mode():  # such tensors have no version counter
        model = xfast.accelerate(build())
        before = model(**batch).last_hidden_state
        _weight(model).mul_(1.5)
        assert not torch.equal(model(**batch).last_hidden_state, before)


def test_weights_that_become_unusable_are_named_and_forgiven() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    want = model(**batch).last_hidden_state
    good = _weight(model)[2, 3].item()
    _weight(model)[2, 3] = float("nan")
    for _ in range(2):
        with pytest.raises(xfast.InvalidWeightsError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
            model(**batch)
    _weight(model)[2, 3] = good
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_training_between_calls() -> None:
    model, batch = xfast.accelerate(build(head="sequence-classification")), ragged()
    before = model(**batch).logits
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1, 2, 0])
    with torch.enable_grad():
        losses = []
        for _ in range(5):
            loss = model.train()(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    after = model.eval()(**batch, labels=labels)
    assert float(after.loss) < losses[0]
    assert not torch.equal(after.logits, before)
    assert error(after.logits, xfast.restore(model)(**batch).logits) <= 1e-5


# --- keep_weights=False ----------------------------------------------------------------------------------------------


def _linears(model: Any) -> list[nn.Linear]:
    return [module for module in encoder_of(model).encoder.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_freed_models_give_the_same_results(head: str, precision: str) -> None:
    model, batch = build(head=head), arguments("xlm-roberta", head)
    kept = xfast.accelerate(copy.deepcopy(model), precision=precision)
    want = kept(**batch)[0]
    xfast.accelerate(model, precision=precision, keep_weights=False)
    assert len(_linears(model)) == 18 and all(linear.weight.is_meta for linear in _linears(model))
    words = encoder_of(model).embeddings.word_embeddings.weight
    assert words.is_meta == (precision == "int8" and head != "masked-lm"), "a tied decoder still reads them"
    got = model(**batch)[0]
    if words.is_meta:  # word embeddings in 8 bits
        error = (got - want).norm() / want.norm()
        assert 0 < error < 0.03
    else:
        assert torch.equal(got, want)
    assert not xfast.explain(model).encoders[0].keep_weights
    assert "keep_weights=False" in str(xfast.explain(model))
    clone = copy.deepcopy(model)
    del model
    assert torch.equal(clone(**batch)[0], got)
    assert all(linear.weight.is_meta for linear in _linears(clone))
    assert fallbacks(clone) == {}


def test_freed_weights_leave_memory() -> None:
    model = build(hidden_size=512, num_attention_heads=8, intermediate_size=2048)
    sizes = {id(linear): linear.weight.untyped_storage().nbytes() for linear in _linears(model)}
    xfast.accelerate(model, precision="int8", keep_weights=False)
    held = {tensor.untyped_storage().data_ptr() for tensor in model.parameters() if not tensor.is_meta}
    assert sum(sizes.values()) > 30 * 2**20
    assert sum(linear.weight.untyped_storage().data_ptr() in held for linear in _linears(model)) == 0
    on_cpu = sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta)
    assert on_cpu + model.forward.plan.engine._encoder.packed_bytes < 0.35 * sum(sizes.values())


LOSSES: dict[str, Callable[[Any, Path], Any]] = {
    "state_dict": lambda model, folder: model.state_dict(),
    "state_dict of the encoder": lambda model, folder: encoder_of(model).state_dict(),
    "state_dict of a layer": lambda model, folder: encoder_of(model).encoder.layer[0].state_dict(),
    "restore": lambda model, folder: xfast.restore(model),
    "accelerate again": lambda model, folder: xfast.accelerate(model),
    "pickle": lambda model, folder: pickle.dumps(model),
    "torch.save": lambda model, folder: torch.save(model, io.BytesIO()),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "attention weights": lambda model, folder: model(**ragged(), output_attentions=True),
}


@pytest.mark.parametrize("action", list(LOSSES))
@pytest.mark.parametrize("head", ["base", "masked-lm"])
def test_what_needs_freed_weights_says_so(head: str, action: str, tmp_path: Path) -> None:
    model, batch = build(head=head), ragged()
    xfast.accelerate(model, keep_weights=False)
    want = model(**batch)[0]
    with pytest.raises(xfast.WeightsFreedError, match="keep_weights=False"):
        LOSSES[action](model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert torch.equal(model(**batch)[0], want)


def _touch(model: Any) -> None:
    encoder_of(model).encoder.layer[0].output.LayerNorm.weight.mul_(2)


def _touch_table(model: Any) -> None:
    encoder_of(model).embeddings.position_embeddings.weight.mul_(2)


TOUCHES = {"norm": _touch, "table": _touch_table, "dtype": lambda model: model.to(torch.bfloat16)}


@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
@pytest.mark.parametrize("change", TOUCHES.values(), ids=TOUCHES)
def test_changing_what_is_left_of_a_freed_model_says_so(change: Callable[[Any], None], copied: bool) -> None:
    first, batch = xfast.accelerate(build(head="masked-lm"), keep_weights=False), ragged()
    want = first(**batch).logits
    second = copy.deepcopy(first)
    assert torch.equal(second(**batch).logits, want)
    changed, other = (second, first) if copied else (first, second)
    change(changed)
    with pytest.raises(xfast.WeightsFreedError, match="keep_weights=False"):
        changed(**batch)
    assert torch.equal(other(**batch).logits, want)  # they share packed weights, not their fate


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_copy_of_a_freed_model_reads_its_own_tables(precision: str) -> None:
    first, batch = xfast.accelerate(build(head="masked-lm"), precision=precision, keep_weights=False), ragged()
    want = first(**batch).logits
    second = copy.deepcopy(first)
    third = copy.deepcopy(second)  # of a copy that was never called
    for name in ("word_embeddings", "position_embeddings"):
        getattr(encoder_of(first).embeddings, name).weight.mul_(3)
    encoder_of(first).embeddings.share_memory()  # the old memory goes
    assert torch.equal(second(**batch).logits, want) and torch.equal(third(**batch).logits, want)
    fifth = copy.deepcopy(third)
    encoder_of(fifth).encoder.layer[0].output.dense.bias[::2].add_(1)  # before its first call
    assert not torch.equal(fifth(**batch).logits, want) and torch.equal(third(**batch).logits, want)
    fourth = copy.deepcopy(third).double()
    with pytest.raises(xfast.WeightsFreedError, match="keep_weights=False"):
        fourth(**batch)


def test_weights_that_are_not_contiguous_or_no_parameters_are_watched() -> None:
    batch = ragged()
    for make in (lambda w: nn.Parameter(w.t().contiguous().t()), lambda w: w.detach().clone()):
        model = build()
        query = encoder_of(model).encoder.layer[0].attention.self.query
        weight = query.weight
        del query.weight
        query.weight = make(weight)
        xfast.accelerate(model)
        before = model(**batch)[0]
        if isinstance(query.weight, nn.Parameter):
            query.weight.data.add_(0.5)
        else:
            query.weight = query.weight + 0.5
        assert not torch.equal(model(**batch)[0], before)


def test_embeddings_that_change_themselves_are_refused() -> None:
    model = build()
    encoder_of(model).embeddings.word_embeddings.max_norm = 0.05
    with pytest.raises(xfast.UnsupportedModelError, match=r"word_embeddings.max_norm is 0.05"):
        xfast.accelerate(model)


def test_loading_weights_into_a_freed_model_never_passes_unnoticed() -> None:
    model = build()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    xfast.accelerate(model, keep_weights=False)
    with pytest.warns(UserWarning, match="meta parameter"):  # torch's own: loading into meta does nothing
        model.load_state_dict(weights)
    with pytest.raises(xfast.WeightsFreedError):
        model(**ragged())


def test_training_a_freed_model_says_so() -> None:
    model = xfast.accelerate(build(), keep_weights=False)
    with pytest.raises(xfast.WeightsFreedError, match="training mode"):
        model.train()(**ragged())
    with torch.enable_grad(), pytest.raises(xfast.WeightsFreedError, match="gradients"):
        model.eval()(**ragged())


@pytest.mark.parametrize("place", range(3))
def test_the_watch_takes_only_what_it_can_compare(place: int) -> None:
    lists: list[list[Any]] = [[{}], [nn.Linear(1, 1)], [{}], [torch.ones(1)], [torch.ones(1)]]
    assert not _C.Watch(*lists, [], []).changed()
    lists[2 * (place // 2)] = [[1]]  # no dictionary
    if place == 1:
        lists[0], lists[3] = [{}], [object()]  # nothing that has memory
    with pytest.raises((ValueError, AttributeError)):
        _C.Watch(*lists, [], [])


def test_memory_whose_address_is_no_number_is_an_error() -> None:
    class Strange:
        _version = 0

        def data_ptr(self) -> str:
            return "somewhere"

    with pytest.raises(TypeError, match="int"):
        _C.Watch([{}], [nn.Linear(1, 1)], [{}], [Strange()], [], [], []).changed()


def test_every_sign_of_a_change_counts() -> None:
    child, tensor = nn.Linear(2, 2), torch.zeros(40)
    values, state = {"a": child}, dict(child.__dict__)
    objects = [(id(values), dict.__basicsize__, 192), (tensor._cdata, 64, 64)]

    def watch() -> _C.Watch:
        return _C.Watch([values], [child], [state], [tensor], [tensor], [tensor.numpy()], objects)

    changes: dict[str, Callable[[], Any]] = {
        "another object": lambda: values.update(a=nn.Linear(2, 2)),
        "one more": lambda: values.update(b=child),
        "one less": lambda: values.pop("b"),
        "another class": lambda: setattr(child, "__class__", nn.Bilinear),
        "a forward": lambda: state.update(forward=None),
        "a version": lambda: tensor.add_(0),
        "a value": lambda: tensor.numpy().__setitem__(0, 1.0),
    }
    for name, change in changes.items():
        state.pop("forward", None)
        watched = watch()
        assert not watched.changed(), name
        kept = dict(values)  # what is compared by its address must stay alive
        change()
        assert watched.changed(), name
        del kept
