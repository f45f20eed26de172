"""Calibration: what errors are held against, what batches are taken, and that the model stays as it was."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from models import ALL_FAMILIES, at_tokens, build, encoder_of, fallbacks, quick_settings, ragged, token_error
from torch import nn

import xfast
from xfast import calibration, quantization
from xfast.recipe import LinearFormat, Recipe

_settings = pytest.fixture(autouse=True)(quick_settings)


def auto_errors(model: Any) -> dict[str, float]:
    """By precision, as ``explain`` tells them."""
    notes = [note.split() for note in xfast.explain(model).encoders[0].notes if note.startswith("auto: ")]
    return {words[1]: float(words[3].rstrip(",")) for words in notes}


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what errors are held against ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_of_16_bit_weights_is_held_against_fp32(dtype: torch.dtype, layers: int | None) -> None:
    model, batch = build().to(dtype), ragged()
    exact = copy.deepcopy(model).float()
    want = at_tokens(exact(**batch, output_hidden_states=True).hidden_states[layers or 3], batch["attention_mask"])
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=1e-5, layers=layers)
    errors = auto_errors(model)
    assert list(errors) == ["int8", "bf16", "fp32"] and errors["fp32"] <= 1e-6
    for precision in ("int8", "bf16"):
        with xfast.accelerated(exact, precision=precision, layers=layers):
            got = at_tokens(exact(**batch).last_hidden_state, batch["attention_mask"])
        assert errors[precision] == pytest.approx(token_error(got, want), rel=0.02)


def test_auto_where_the_original_overflows() -> None:
    model, batch = build(), ragged()
    layer = encoder_of(model).encoder.layer[1]
    layer.intermediate.dense.weight.mul_(1e4)
    layer.output.dense.weight.mul_(1e3)
    model.half()
    assert not torch.isfinite(model(**batch).last_hidden_state).all()
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.1)
    assert xfast.explain(model).encoders[0].precision == "int8"


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_original_after_some_layers(family: str, layers: int) -> None:
    model, batch = build(family), ragged(family)
    mask = batch["attention_mask"].bool()
    want = model(**batch, output_hidden_states=True).hidden_states[layers][mask]
    assert torch.equal(calibration.original_output(encoder_of(model), [batch], layers), want)


def test_autocast_changes_no_figure() -> None:
    model, batch = build(), ragged()
    before = quantization.outliers(model, [batch])
    recipe = quantization.smooth(model, calibration=[batch])
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantization.outliers(model, [batch]) == before
        again = quantization.smooth(model, calibration=[batch])
        encoder_of(model).encoder.layer[0].output.dense.weight.mul_(1.5)
        model(**batch)
    for key, chosen in recipe.linears.items():
        assert np.array_equal(chosen.divisor, again.linears[key].divisor)
    model(**batch)
    assert xfast.explain(model).encoders[0].precision == "fp32"
    assert fallbacks(model) == {}


def test_auto_measures_the_word_table_that_is_kept() -> None:
    batch = ragged()
    kept, freed = (
        xfast.accelerate(build(), precision="auto", calibration=[batch], tolerance=0.5, keep_weights=keep)
        for keep in (True, False)
    )
    want = at_tokens(build()(**batch).last_hidden_state, batch["attention_mask"])
    for model in (kept, freed):
        got = at_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
        assert auto_errors(model)["int8"] == pytest.approx(token_error(got, want), rel=0.01)
    assert auto_errors(kept) != auto_errors(freed)


def test_auto_leaves_a_word_table_alone_that_a_head_is_tied_to() -> None:
    model, batch = build(head="masked-lm"), ragged()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.5, keep_weights=False)
    uniform = build(head="masked-lm")
    uniform.tie_weights()
    xfast.accelerate(uniform, precision="int8", keep_weights=False)
    assert not encoder_of(model).embeddings.word_embeddings.weight.is_meta
    assert torch.equal(model(**batch).logits, uniform(**batch).logits)


def test_mixed_recipes_keep_their_error_with_fp32_beside_them(tmp_path: Any) -> None:
    model, batch = build(), ragged()
    want = at_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
    recipe, report = quantization.mixed(model, [batch], tolerance=1e-2)
    assert report.result.error > 1e-3
    xfast.save(xfast.accelerate(model, precision="fp32", recipe=recipe), tmp_path)
    for one in (model, xfast.load(tmp_path)):
        got = at_tokens(one(**batch).last_hidden_state, batch["attention_mask"])
        assert token_error(got, want) == pytest.approx(report.result.error, rel=1e-3)


@pytest.mark.parametrize("shared", [0.0, 1e3])
def test_what_all_tokens_share_makes_no_tolerance_laxer(shared: float) -> None:
    """Trained encoders hold nearly the same large value in a few channels of every token."""
    model, batch = build(), ragged()
    with torch.no_grad():
        encoder_of(model).encoder.layer[-1].output.LayerNorm.bias[:2] = shared
    with xfast.accelerated(model, precision="int8"):
        got = at_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
    want = at_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
    seen = token_error(got[:, 2:], want[:, 2:])
    report = quantization.mixed(model, [batch], tolerance=1e-3, smoothing=False)[1]
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=1e-3)
    for int8 in (auto_errors(model)["int8"], report.uniform["int8"].error):
        assert int8 == pytest.approx(seen, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_calibration_on_embeddings_of_any_type(dtype: torch.dtype) -> None:
    """As calls take them; the original alone would refuse float64."""
    model, batch = build(), ragged()
    given = {**batch, "inputs_embeds": model.embeddings.word_embeddings(batch["input_ids"])}
    del given["input_ids"]
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.1)
    want = auto_errors(model)
    given["inputs_embeds"] = given["inputs_embeds"].to(dtype)
    xfast.accelerate(model, precision="auto", calibration=[given], tolerance=0.1)
    assert auto_errors(model) == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_calibration_on_tensors_that_hold_nothing_to_read(name: str, kind: str) -> None:
    model, batch = build(), ragged()
    odd = batch[name].to("meta") if kind == "meta" else batch[name].to_sparse()
    for call in (xfast.accelerate, quantization.mixed):
        options = {"precision": "auto"} if call is xfast.accelerate else {}
        with pytest.raises(xfast.InvalidInputError, match=rf"calibration\[1\]: {name}.*(meta|dense)"):
            call(model, calibration=[batch, {**batch, name: odd}], tolerance=0.1, **options)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_auto_measures_the_layers_that_run_now(before: int, after: int) -> None:
    model, other, batch = build(num_hidden_layers=before), build(num_hidden_layers=after), ragged()
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.5)
    model.encoder.layer = copy.deepcopy(other.encoder.layer)
    model.config.num_hidden_layers = after
    model(**batch)
    stock = copy.deepcopy(model)
    xfast.accelerate(stock, precision="auto", calibration=[batch], tolerance=0.5)
    assert auto_errors(model) == auto_errors(stock)


def test_the_error_of_tokens() -> None:
    want = torch.tensor([[100.0, 1.0], [100.0, -1.0], [100.0, 3.0]])
    off = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, -0.1]])
    assert calibration.relative_error(want + off, want) == pytest.approx(0.1 / 2, rel=1e-4)  # their deviation is 2
    assert calibration.relative_error(want[:1] + 1, want[:1]) == pytest.approx(2**0.5 / 10001**0.5)
    assert calibration.relative_error(want[:1].repeat(3, 1) + 1, want[:1].repeat(3, 1)) == pytest.approx(
        2**0.5 / 10001**0.5
    )
    nothing = torch.zeros(3, 2)
    assert calibration.relative_error(nothing, nothing) == calibration.relative_error(want[:0], want[:0]) == 0


# --- what is taken as a batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids"])
@pytest.mark.parametrize("kind", ["list", "ndarray"])
def test_values_that_are_no_tensors_are_refused(name: str, kind: str) -> None:
    values = ragged()["attention_mask"]
    batch = {**ragged(), name: values.tolist() if kind == "list" else values.numpy()}
    for call in (
        lambda: quantization.outliers(build(), [ragged(), batch]),
        lambda: xfast.accelerate(build(), precision="auto", calibration=[ragged(), batch], tolerance=0.1),
    ):
        with pytest.raises(
            xfast.InvalidInputError, match=rf'calibration\[1\]: {name} is a {kind};.*return_tensors="pt"'
        ):
            call()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_batches_without_tokens_change_nothing(shape: tuple[int, int]) -> None:
    model, batch = build(), ragged()
    nothing = dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(shape, dtype=torch.long))
    masked = {"input_ids": batch["input_ids"], "attention_mask": torch.zeros_like(batch["attention_mask"])}
    assert quantization.outliers(model, [nothing, batch, masked]) == quantization.outliers(model, [batch])
    xfast.accelerate(model, precision="auto", calibration=[nothing, batch, masked], tolerance=0.5)
    assert xfast.explain(model).encoders[0].precision == "int8"


def test_the_callers_list_is_not_kept() -> None:
    model, batch = build(), ragged()
    batches, given = [dict(batch)], OrderedDict(batch)
    xfast.accelerate(model, precision="auto", calibration=batches, tolerance=0.5)
    batches.clear()
    encoder_of(model).encoder.layer[0].output.dense.weight.mul_(1.5)
    model(**batch)
    xfast.accelerate(model, precision="auto", calibration=[given], tolerance=0.5)
    given.clear()
    encoder_of(model).encoder.layer[0].output.dense.weight.mul_(1.5)
    model(**batch)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("chunk", [3, 8])
def test_feed_forward_in_chunks(chunk: int) -> None:
    whole, batch = build(), ragged(lengths=(16, 8, 11, 16))
    chunked = build(chunk_size_feed_forward=chunk)
    chunked.load_state_dict(whole.state_dict())
    batch = {name: values[:, : values.shape[1] // chunk * chunk] for name, values in batch.items()}  # as it asks
    want = {one.layer: one for one in quantization.outliers(whole, [batch]).products if one.name == "ffn_in"}
    for one in quantization.outliers(chunked, [batch]).products:
        if one.name == "ffn_in":
            assert one.ratio == pytest.approx(want[one.layer].ratio, rel=1e-5)
    assert {layer.chunk_size_feed_forward for layer in encoder_of(chunked).encoder.layer} == {chunk}
    quantization.mixed(chunked, [batch], tolerance=0.5)


# --- the model stays as it was ---------------------------------------------------------------------------------------


def test_no_hooks_stay_and_models_can_be_pickled() -> None:
    model, batch = build(), ragged()
    xfast.accelerate(model, precision="auto", calibration=[batch], tolerance=0.1, layers=2)
    quantization.smooth(model, calibration=[batch])
    assert hooks_in(model) == 0
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - its own
    assert torch.equal(again(**batch)[0], model(**batch)[0])
    pickle.dumps(xfast.restore(model))


def test_threads_that_calibrate_at_once_leave_the_mode_alone() -> None:
    model, batch = build().train(), ragged()
    threads = [threading.Thread(target=quantization.outliers, args=(model, [batch])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(module.training for module in model.modules())


def test_calls_meanwhile_are_accelerated() -> None:
    model, batch = xfast.accelerate(build(), precision="int8"), ragged()
    want = model(**batch).last_hidden_state
    encoder, seen = encoder_of(model), []
    reader = encoder.encoder.layer[1].attention.self.query

    def call() -> None:
        with torch.no_grad():
            seen.append(model(**batch).last_hidden_state)

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with calibration._inputs_seen([reader], meanwhile):
        calibration.run_original(encoder, **batch)
    assert torch.equal(seen[0], want) and fallbacks(model) == {}


def test_weights_stay_where_one_of_several_encoders_cannot_run() -> None:
    models = nn.ModuleList([build(), build().double()])
    with pytest.raises(xfast.BackendUnavailableError, match="keep_weights=False needs a backend"), pytest.warns():
        xfast.accelerate(models, keep_weights=False)
    assert not any(parameter.is_meta for parameter in models.parameters())
    models[0].state_dict()
    assert xfast.explain(models).encoders == ()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"num_attention_heads": 4}, {"family": "roberta"}],
    ids=str,
)
def test_recipes_of_another_kind_of_model_are_refused(other: dict[str, Any]) -> None:
    recipe, _ = quantization.mixed(build(), [ragged()], tolerance=0.5)
    for made in (recipe, quantization.smooth(build()), quantization.smooth(build(), calibration=[ragged()])):
        with pytest.raises(
            xfast.InvalidOptionError, match="recipe: made for xlm-roberta of 3 layers, 2 heads, 64 x 100"
        ):
            xfast.accelerate(build(**other), precision="int8", recipe=made)
    xfast.accelerate(build(vocab_size=120), precision="int8", recipe=recipe)


def test_an_exponent_that_is_named_is_the_only_one() -> None:
    model, batch = build(), ragged()
    for name, parameter in encoder_of(model).named_parameters():  # outlier channels
        if "LayerNorm.weight" in name:
            parameter[[5, 40]] = 60
        if any(part in name for part in ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            parameter[:, [5, 40]] *= 0.05
    recipe = quantization.smooth(model, calibration=[batch], strength=0.0)
    gains = quantization.smooth(model).linears
    assert recipe.linears
    for key, chosen in recipe.linears.items():
        assert key not in gains or not np.array_equal(chosen.divisor, gains[key].divisor)


def test_divisors_that_are_views() -> None:
    model, batch = build(), ragged()
    table = np.stack([np.linspace(0.5, 2, 64, dtype=np.float32)] * 2, axis=1)
    outputs = []
    for divisor in (table[:, 0], table[:, 0].copy()):
        recipe = Recipe(linears={(0, "qkv"): LinearFormat("int8", divisor=divisor)})
        outputs.append(xfast.accelerate(model, precision="int8", recipe=recipe)(**batch).last_hidden_state)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("call", [lambda: Recipe(64.0), lambda: quantization.smooth(build(), group_size=64.0)])
def test_sizes_that_are_no_ints_are_refused(call: Any) -> None:
    with pytest.raises(xfast.InvalidOptionError, match=r"group_size: 64\.0 is not accepted"):
        call()


def test_numbers_of_numpy_are_numbers() -> None:
    tolerance = np.float32(0.5)
    quantization.mixed(build(), [ragged()], tolerance=tolerance)
    xfast.accelerate(build(), precision="auto", calibration=[ragged()], tolerance=tolerance)
    with pytest.raises(xfast.InvalidOptionError, match="smoothing: expected True or False, got 'no'"):
        quantization.mixed(build(), [ragged()], tolerance=0.5, smoothing="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [quantization.smooth, lambda m: quantization.mixed(m, [ragged()], tolerance=0.5)])
def test_models_in_float64_are_refused_by_name(call: Any) -> None:
    with pytest.raises(xfast.BackendUnavailableError, match=r"is torch\.float64; supported: float32"):
        call(build().double())


def test_norms_without_gains_are_refused_by_name() -> None:
    model = build()
    encoder_of(model).encoder.layer[1].output.LayerNorm = nn.LayerNorm(64, elementwise_affine=False, eps=1e-5)
    with pytest.raises(xfast.XfastError, match=r"encoder\.layer\.1\.output\.LayerNorm\.weight"):
        quantization.smooth(model)


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Any) -> None:
    with pytest.raises(xfast.InvalidOptionError, match="tokenizer: expected a tokenizer"):
        xfast.save(xfast.accelerate(build()), tmp_path, tokenizer="some/path")
    assert not list(tmp_path.iterdir())


def test_no_layers() -> None:
    model = build(num_hidden_layers=0)
    xfast.accelerate(model, precision="auto", calibration=[ragged()], tolerance=0.5)
    assert xfast.explain(model).encoders[0].precision == "int8"
