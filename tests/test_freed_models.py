"""Models without original weights (``keep_weights=False``, ``xfast.load``): right numbers or a typed error."""

from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing  # how processes get tensors
from models import at_tokens, build, encoder_of, norm_error, quick_settings, ragged
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import xfast
from xfast.plan import FreedWeight

_settings = pytest.fixture(autouse=True)(quick_settings)


def freed(head: str = "base", precision: str = "fp32") -> Any:
    return xfast.accelerate(build(head=head), precision=precision, keep_weights=False)


def first_weight(model: Any) -> nn.Parameter:
    return encoder_of(model).encoder.layer[0].attention.self.query.weight


@pytest.mark.parametrize("call", ["states", "embeddings", "frozen"])
def test_compiled_calls_beside_the_operator(call: str) -> None:
    """What eager calls can do without the originals, compiled ones can."""
    torch.compiler.reset()
    model, batch = freed(), ragged()
    options: dict[str, Any] = {"output_hidden_states": True} if call == "states" else {}
    if call == "embeddings":
        embeddings = build().embeddings.word_embeddings(batch.pop("input_ids"))
        options["inputs_embeds"] = embeddings
    stock = build()
    want = at_tokens(stock(**batch, **options).last_hidden_state, batch["attention_mask"])
    model.requires_grad_(False)
    with torch.set_grad_enabled(call == "frozen"):
        got = torch.compile(model, backend="eager")(**batch, **options).last_hidden_state
    assert norm_error(at_tokens(got, batch["attention_mask"]), want) <= 1e-5


@pytest.mark.parametrize("how", ["gradients", "autocast", "training"])
def test_compiled_calls_that_need_the_originals(how: str) -> None:
    torch.compiler.reset()
    model, batch = freed(precision="model"), ragged()
    fast = torch.compile(model.train(how == "training"), backend="eager")
    with (
        torch.set_grad_enabled(how == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        pytest.raises(xfast.WeightsFreedError, match="the original code is needed"),
    ):
        fast(**batch)


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_exported_from_weights_that_are_not_there(strict: bool) -> None:
    with pytest.raises(Exception, match=r"given up|torch.compiler.disable"):
        torch.export.export(freed(), (), ragged(), strict=strict)


def test_nothing_is_computed_with_weights_that_are_not_there() -> None:
    model = freed()
    weight = first_weight(model)
    x = torch.ones(2, 64)
    for compute in (
        weight.sum,
        lambda: weight + 1,
        lambda: x @ weight,
        lambda: nn.functional.linear(x, weight),
        lambda: encoder_of(model).encoder.layer[0].attention.self.query(x),
        lambda: torch.nn.utils.get_total_norm(model.parameters()),
        weight.tolist,
        weight.share_memory_,
    ):
        with pytest.raises(xfast.WeightsFreedError, match="given up"):
            compute()
    assert torch.equal(x, torch.ones(2, 64))


@pytest.mark.parametrize(
    ("head", "extra"),
    [
        ("question-answering", {"start_positions": torch.zeros(4, dtype=torch.long)}),
        ("token-classification", {}),
        ("masked-lm", {}),
    ],
)
@pytest.mark.parametrize("at_padding", [True, False])
def test_compiled_losses_read_no_padding_that_is_not_there(head: str, extra: dict[str, Any], at_padding: bool) -> None:
    """Eager calls look at the labels; compiled ones leave the graph for that."""
    torch.compiler.reset()
    stock, batch = build(head=head), ragged()
    given = {**batch, **extra}
    if extra:
        given["end_positions"] = extra["start_positions"]
    else:
        given["labels"] = torch.ones_like(batch["input_ids"])
    if not at_padding:
        if extra:
            given["attention_mask"] = torch.ones_like(batch["attention_mask"])
        else:
            given["labels"][batch["attention_mask"] == 0] = -100
    fast = torch.compile(freed(head), backend="eager")
    if at_padding:
        with pytest.raises(xfast.WeightsFreedError, match=r"loss|labels at padded"):
            fast(**given)
    else:
        assert float(fast(**given).loss) == pytest.approx(float(stock(**given).loss), rel=1e-4)


def test_calls_ask_no_given_up_weight_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer costs microseconds, and a call asks all weights whether they changed."""
    model, batch, asked = freed(), ragged(), []
    model(**batch)

    def answer(cls: Any, function: Any, *_: Any) -> None:
        asked.append(function)

    monkeypatch.setattr(FreedWeight, "__torch_function__", classmethod(answer))
    model(**batch)
    assert not asked


@pytest.mark.parametrize("change", ["dropout", "norm"])
def test_modules_that_hold_the_same_values_are_looked_at(change: str) -> None:
    model, batch = freed(), ragged()
    model(**batch)
    output = model.encoder.layer[0].output
    if change == "dropout":
        output.dropout = nn.Dropout(0.5).train()
    else:
        norm = nn.LayerNorm(64, eps=output.LayerNorm.eps)
        norm.weight, norm.bias = output.LayerNorm.weight, output.LayerNorm.bias
        output.LayerNorm = norm
        model(**batch)
        norm.register_forward_hook(lambda module, given, made: made * 2)
    with pytest.raises(xfast.WeightsFreedError):
        model(**batch)


def test_what_is_missing_is_told_as_it_went(tmp_path: Path) -> None:
    xfast.save(freed(precision="int8"), tmp_path)
    with pytest.raises(xfast.WeightsFreedError, match=f"sum: .*packed artifact {tmp_path}"):
        first_weight(xfast.load(tmp_path)).sum()


def test_tracers_of_torchs_operations_see_the_original() -> None:
    model, batch = xfast.accelerate(build(), precision="fp32"), ragged(lengths=(9, 9))
    want = model(**batch)[0]
    with torch.no_grad():
        graph = make_fx(lambda ids: model(input_ids=ids)[0])(batch["input_ids"])
    assert norm_error(graph(batch["input_ids"]), want) <= 1e-5


def test_what_asks_for_no_values_works() -> None:
    model = freed()
    weight = first_weight(model)
    assert weight.shape == (64, 64) and weight.dtype == torch.float32 and weight.numel() == 64**2
    assert weight.device == torch.device("cpu") and weight.is_meta and weight.grad is None and weight.requires_grad
    assert weight.detach().is_meta and weight.data.is_meta and repr(weight)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build().parameters())
    assert torch.equal(weight.new_zeros(2, device="cpu"), torch.zeros(2)) and torch.zeros_like(weight).shape == (64, 64)
    assert torch.arange(64**2).view_as(weight).shape == (64, 64) and weight in [weight]
    with pytest.raises(xfast.WeightsFreedError, match="__contains__"):
        assert 1.0 in weight
    model.requires_grad_(False).zero_grad()
    assert not weight.requires_grad and model.dtype == torch.float32
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**ragged())[0], model(**ragged())[0])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_refused_pickle_leaves_the_model_as_it_was(precision: str) -> None:
    """A process's arguments are shared before the whole is refused: embeddings and biases lie elsewhere then."""
    model, batch = freed("sequence-classification", precision), ragged()
    want = model(**batch).logits
    for _ in range(2):
        with pytest.raises(xfast.WeightsFreedError, match="pickle"):
            ForkingPickler.dumps(model)
        assert torch.equal(model(**batch).logits, want)
    with torch.no_grad():
        encoder_of(model).embeddings.LayerNorm.bias.add_(1)
    with pytest.raises(xfast.WeightsFreedError, match="changed or moved"):
        model(**batch)


@pytest.mark.parametrize("precision", ["model", "int8"])
def test_loaded_in_inference_mode(tmp_path: Path, precision: str) -> None:
    model, batch = xfast.accelerate(build(), precision=precision), ragged()
    want = model(**batch).last_hidden_state
    xfast.save(model, tmp_path)
    with torch.inference_mode():
        got = xfast.load(tmp_path)(**batch).last_hidden_state
    assert norm_error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 2e-2
