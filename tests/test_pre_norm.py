"""Pre-norm encoders (XLM-R-XL and XXL): x = x + f(LN(x)), a LayerNorm after the last layer. What is theirs alone.

What they share with the others - every head, loss, mask and output - is in the files that run every family.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    at_tokens,
    build,
    encoder_of,
    engine_outputs,
    error,
    fallbacks,
    left_padded,
    norm_error,
    outputs_of,
    peak_growth,
    quick_settings,
    ragged,
    simulated,
)

import xfast
from xfast import architecture
from xfast.stilts import model as stilts
from xfast.stilts.tasks import TASKS

_settings = pytest.fixture(autouse=True)(quick_settings)

XL = "xlm-roberta-xl"
PRECISIONS = ("fp32", "bf16", "int8", "int4")
FP32_ERROR = 1e-5
# (hidden size, heads, intermediate size): head dims 16, 80 (XL's) and 128 (XXL's), then sizes that fit no tile
SIZES = ((32, 2, 64), (160, 2, 640), (80, 1, 33), (256, 2, 1024), (7, 1, 5), (60, 3, 37), (144, 2, 40))
LENGTHS = (38, 3, 1, 37, 25, 38, 17)  # more rows than one block of any kernel
SELECTED = {"sequence-classification": 1, "base-no-pooler": 17}


def sized(sizes: tuple[int, int, int], **changes: Any) -> Any:
    """A bare XL of two layers."""
    hidden, heads, inner = sizes
    names = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
    return build(XL, "base-no-pooler", **{"num_hidden_layers": 2, **names, **changes})


def masks() -> dict[str, dict[str, torch.Tensor]]:
    """Batches with padding right and left, holes, rows without a token, and single tokens."""
    holes, empty = ragged(lengths=(9, 17, 13, 5)), ragged(lengths=(9, 17, 13, 5))
    holes["attention_mask"][1, 6:9] = 0
    holes["attention_mask"][:, 3] = 0
    empty["attention_mask"][2] = 0
    return {
        "right": ragged(lengths=LENGTHS),
        "left": left_padded(ragged()),
        "holes": holes,
        "row without tokens": empty,
        "single tokens": ragged(lengths=(1, 1)),
    }


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_on_every_instruction_set_equals_the_original(
    sizes: tuple[int, int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sized(sizes)
    plain = simulated(model, precision) if precision in ("int8", "int4") else copy.deepcopy(model)
    plain = plain.to(torch.bfloat16) if precision == "bf16" else plain
    wants = {name: model(**batch)[0] for name, batch in masks().items()}
    roundings = {name: plain(**batch)[0] for name, batch in masks().items()}
    results = []
    for isa in xfast.available_isas():
        monkeypatch.setenv("XFAST_ISA", isa)
        xfast.accelerate(model, precision=precision)
        assert f"instruction set: {isa}\n" in str(xfast.explain(model))
        got = {name: model(**batch)[0] for name, batch in masks().items()}
        assert fallbacks(model) == {}
        tokens = {name: batch["attention_mask"] for name, batch in masks().items()}
        all_got, all_want, all_plain = (
            torch.cat([at_tokens(values[name], tokens[name]) for name in tokens]) for values in (got, wants, roundings)
        )
        theirs = norm_error(all_plain, all_want)
        limit = {"fp32": FP32_ERROR, "bf16": 2 * theirs, "int8": 1.2 * theirs, "int4": 1.2 * theirs}[precision]
        assert norm_error(all_got, all_want) <= limit, isa
        assert not any(got[name][tokens[name] == 0].any() for name in tokens), isa
        results.append(all_got)
    assert precision not in ("int8", "int4") or all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [(160, 2, 640), (96, 3, 40), (40, 5, 70)], ids=str)
def test_threads_change_no_bit(sizes: tuple[int, int, int], precision: str, isa: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("XFAST_ISA", isa)
    model = xfast.accelerate(sized(sizes, num_hidden_layers=3), precision=precision)
    for lengths in (LENGTHS, (5, 2)):  # rows and columns are split
        results = []
        for threads in (1, 2, 3, 7):
            xfast.set_num_threads(threads)
            results.append(model(**ragged(lengths=lengths), output_hidden_states=True).hidden_states)
        for result in results[1:]:
            assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lengths", [(9, 1, 17, 13), LENGTHS], ids=["columns", "rows"])
def test_selected_rows_are_the_bits_of_the_full_run(lengths: tuple[int, ...], precision: str) -> None:
    model, batch = build(XL, "sequence-classification", seed=3), ragged(lengths=lengths)
    seen = engine_outputs(xfast.accelerate(model, precision=precision))
    logits = model(**batch).logits
    full = model(**batch, output_hidden_states=True)
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert [len(hidden) for hidden in seen] == [len(lengths), sum(lengths)]
    assert torch.equal(seen[0], seen[1][firsts]) and torch.equal(logits, full.logits)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sixty_layers(precision: str) -> None:
    # what is called 13B: XXL's layers, sixty of them
    model, batch = sized((32, 2, 64), num_hidden_layers=60), ragged()
    tokens = batch["attention_mask"]
    want = at_tokens(model(**batch)[0], tokens)
    plain = simulated(model, precision) if precision in ("int8", "int4") else copy.deepcopy(model)
    plain = plain.to(torch.bfloat16) if precision == "bf16" else plain
    theirs = norm_error(at_tokens(plain(**batch)[0], tokens), want)
    got = at_tokens(xfast.accelerate(model, precision=precision)(**batch)[0], tokens)
    assert fallbacks(model) == {}
    assert (
        norm_error(got, want)
        <= {"fp32": 1e-5, "bf16": 2 * theirs, "int8": 1.2 * theirs, "int4": 1.2 * theirs}[precision]
    )


# --- layers and hidden states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["base", "sequence-classification", "token-classification"])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_fewer_layers_give_the_originals_hidden_state(layers: int, head: str) -> None:
    # hidden_states[k] before the last is the residual stream; the LayerNorm after the last layer belongs to that one
    model, batch = build(XL, head), ragged()
    tokens = batch["attention_mask"]
    states = model(**batch, output_hidden_states=True).hidden_states
    xfast.accelerate(model, layers=layers)
    encoder = encoder_of(model)
    got = encoder(**batch, output_hidden_states=True)
    assert len(got.hidden_states) == layers + 1
    for index, state in enumerate(got.hidden_states):
        assert error(at_tokens(state, tokens), at_tokens(states[index], tokens)) <= FP32_ERROR, index
    assert torch.equal(got.last_hidden_state, got.hidden_states[-1])
    ours = outputs_of(model(**batch))
    assert fallbacks(model) == {}
    encoder.embeddings.register_forward_hook(lambda *_: None)
    theirs = outputs_of(model(**batch))  # because of the hook: the original code, cut to as many layers
    assert sum(fallbacks(model).values()) == 1
    for name, want in theirs.items():
        assert error(at_tokens(ours[name], tokens), at_tokens(want, tokens)) <= FP32_ERROR, name


def test_the_last_hidden_state_is_behind_the_final_norm() -> None:
    model, batch = xfast.accelerate(build(XL, "base-no-pooler")), ragged()
    before = model(**batch, output_hidden_states=True).hidden_states
    model.encoder.LayerNorm.weight.zero_()
    model.encoder.LayerNorm.bias.fill_(0.5)
    after = model(**batch, output_hidden_states=True).hidden_states
    assert fallbacks(model) == {}
    assert all(torch.equal(one, other) for one, other in zip(before[:-1], after[:-1], strict=True))
    assert (at_tokens(after[-1], batch["attention_mask"]) == 0.5).all()


def test_an_encoder_without_layers_is_its_embeddings_and_the_final_norm() -> None:
    model, batch = build(XL, "base-no-pooler", num_hidden_layers=0), ragged()
    want = at_tokens(model(**batch)[0], batch["attention_mask"])
    got = at_tokens(xfast.accelerate(model)(**batch)[0], batch["attention_mask"])
    assert fallbacks(model) == {} and error(got, want) <= FP32_ERROR


# --- weights ---------------------------------------------------------------------------------------------------------

CHANGES = {
    "norm before attention": lambda m: m.encoder.layer[1].attention.self_attn_layer_norm.weight.mul_(1.5),
    "norm before the FFN": lambda m: m.encoder.layer[2].LayerNorm.bias.add_(0.3),
    "final norm": lambda m: m.encoder.LayerNorm.weight.mul_(1.5),
    "final norm through data": lambda m: m.encoder.LayerNorm.bias.data.add_(0.3),
    "linear": lambda m: m.encoder.layer[0].intermediate.dense.weight.mul_(1.5),
    "layer dropped": lambda m: m.encoder.layer.__delitem__(1),
}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: str, precision: str) -> None:
    model, batch = xfast.accelerate(build(XL, "base-no-pooler"), precision=precision), ragged()
    before = model(**batch)[0]
    CHANGES[change](model)
    got = model(**batch)[0]
    assert fallbacks(model) == {} and not torch.equal(got, before)
    fresh = copy.deepcopy(xfast.restore(model))
    assert torch.equal(xfast.accelerate(fresh, precision=precision)(**batch)[0], got)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_given_up_weights_are_not_needed(precision: str) -> None:
    kept, freed = build(XL, "token-classification"), build(XL, "token-classification")
    want = xfast.accelerate(kept, precision=precision)(**ragged()).logits
    xfast.accelerate(freed, precision=precision, keep_weights=False)
    assert all(freed.base_model.encoder.layer[i].output.dense.weight.is_meta for i in range(3))
    if precision in ("int8", "int4"):  # words in 8 bits from here on
        assert freed.base_model.embeddings.word_embeddings.weight.is_meta
        assert norm_error(freed(**ragged()).logits, want) <= 2e-2
    else:
        assert torch.equal(freed(**ragged()).logits, want)
    with pytest.raises(xfast.WeightsFreedError):
        xfast.restore(freed)


@pytest.mark.parametrize("path", ["encoder.LayerNorm", "encoder.layer.1.LayerNorm"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_unusable_norms_are_named(path: str, parameter: str) -> None:
    model = build(XL)
    getattr(model.get_submodule(path), parameter)[3] = torch.nan
    with pytest.raises(xfast.InvalidWeightsError, match=f"{path}.{parameter} holds NaN or infinity"):
        xfast.accelerate(model)


@pytest.mark.parametrize("path", ["encoder", "encoder.layer.1", "encoder.layer.1.attention"])
def test_another_epsilon_is_refused(path: str) -> None:
    model = build(XL)
    owner = model.get_submodule(path)
    norm = getattr(owner, "LayerNorm", None) or owner.self_attn_layer_norm
    norm.eps = 0.1
    with pytest.raises(xfast.UnsupportedModelError, match=r"eps is 0\.1"):
        xfast.accelerate(model)


@pytest.mark.parametrize("asked", ["model", "int8"])
def test_bf16_weights_are_read_as_they_are(asked: str) -> None:
    model, batch = build(XL, "sequence-classification"), ragged()
    want = model(**batch).logits
    model.to(torch.bfloat16)
    stock = norm_error(model(**batch).logits, want)
    got = xfast.accelerate(model, precision=asked)(**batch).logits
    assert got.dtype == torch.bfloat16 and fallbacks(model) == {}
    assert f"precision {'bf16' if asked == 'model' else asked}" in str(xfast.explain(model))
    assert norm_error(got, want) <= 2 * stock + (2e-2 if asked == "int8" else 5e-3)


# --- real widths -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("precision", ["model", "int8"])
@pytest.mark.parametrize(("hidden", "inner"), [(2560, 10240), (4096, 16384)], ids=["XL", "XXL"])
def test_two_layers_of_real_width_need_no_copy_beside_the_packed_one(hidden: int, inner: int, precision: str) -> None:
    sizes = {"hidden_size": hidden, "num_attention_heads": 32, "intermediate_size": inner, "num_hidden_layers": 2}
    model, batch = build(XL, "sequence-classification", **sizes).to(torch.bfloat16), ragged(lengths=(38, 5, 20, 33))
    want = model(**batch).logits
    _, growth = peak_growth(lambda: xfast.accelerate(model, precision=precision))
    packed = 2 * (4 * hidden * hidden + 2 * hidden * inner) * (1 if precision == "int8" else 2)
    assert growth < 1.05 * packed + 2**26, f"{growth / 2**20:.0f} MiB for {packed / 2**20:.0f} MiB of weights"
    got = model(**batch).logits
    assert fallbacks(model) == {}
    assert norm_error(got, want) <= 6e-2  # of bf16 in the original, too


# --- a checkpoint that says it is another class ----------------------------------------------------------------------


def _saved_as(model: Any, model_type: str, folder: Path) -> Path:
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "model_type": model_type}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize(("family", "claimed"), [(XL, "xlm-roberta"), ("xlm-roberta", XL)])
def test_a_checkpoint_whose_model_type_is_wrong_is_refused(
    family: str, claimed: str, auto: str, tmp_path: Path
) -> None:
    # as one published config.json of XLM-R-XXL
    folder = _saved_as(build(family, "masked-lm"), claimed, tmp_path)
    model = getattr(transformers, auto).from_pretrained(folder)
    right = {XL: "XLMRobertaXLForMaskedLM", "xlm-roberta": "XLMRobertaForMaskedLM"}[family]
    with pytest.raises(xfast.UnsupportedModelError, match=rf"holds a {right} .*load it with transformers.{right}"):
        xfast.accelerate(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_wrong_model_type_stops_training_and_evaluation(tmp_path: Path) -> None:
    folder = str(_saved_as(build(XL, "sequence-classification"), "xlm-roberta", tmp_path))
    for load in (lambda: stilts.build(folder, {}, 0), lambda: stilts.load_task_model(folder, TASKS["xnli"])):
        with pytest.raises(xfast.UnsupportedModelError, match=r"load it with transformers\.XLMRobertaXL"):
            load()


def test_the_named_class_loads_that_checkpoint(tmp_path: Path) -> None:
    original, batch = build(XL, "masked-lm"), ragged()
    want = original(**batch).logits
    model = transformers.XLMRobertaXLForMaskedLM.from_pretrained(_saved_as(original, "xlm-roberta", tmp_path)).eval()
    got = xfast.accelerate(model)(**batch).logits
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= FP32_ERROR


@pytest.mark.parametrize("names", [None, [], ["XLMRobertaForMaskedLM"], ["SomethingElse"], ["BertModel"]], ids=str)
def test_other_architectures_are_no_reason(names: list[str] | None) -> None:
    # RoBERTa checkpoints are loaded as XLM-R, and the other way round, with good results
    model = build("roberta")
    model.config.architectures = names
    architecture.check_class(model)
