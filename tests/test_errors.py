"""Bad input: a typed error that names the argument, what was given and what is accepted; nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import BOS, EOS, PAD, VOCAB, build, encoder_of, quick_settings, ragged
from torch import nn

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

FAMILY_NAMES = ("xlm-roberta", "roberta", "camembert", "bert")


def assert_message(error: BaseException, *parts: str) -> None:
    """Every part is in the message."""
    assert all(part in str(error) for part in parts), str(error)


# --- options ---------------------------------------------------------------------------------------------------------

BATCH = [{"input_ids": torch.tensor([[5, 6]])}]
OPTIONS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"precision": "int2"}, xfast.InvalidOptionError, ("precision", "'int2'", "model", "fp32", "bf16", "int8", "auto")),
    ({"precision": None}, xfast.InvalidOptionError, ("precision", "None", "fp32")),
    ({"precision": ["int8"]}, xfast.InvalidOptionError, ("precision", "['int8']", "fp32")),
    ({"backend": "cuda"}, xfast.InvalidOptionError, ("backend", "'cuda'", "auto", "native")),
    ({"precision": "fp8"}, xfast.BackendUnavailableError, ("fp8", "CPU", "fp32, bf16, int8")),
    ({"precision": "fp16"}, xfast.BackendUnavailableError, ("fp16", "CPU", "fp32, bf16, int8")),
    ({"precision": "fp8", "backend": "native"}, xfast.BackendUnavailableError, ("native", "fp8", "fp32, bf16, int8")),
    ({"layers": 4}, xfast.InvalidOptionError, ("layers", "4", "0 to 3")),
    ({"layers": -1}, xfast.InvalidOptionError, ("layers", "-1", "0 to 3")),
    ({"layers": 2.0}, xfast.InvalidOptionError, ("layers", "2.0", "int")),
    ({"layers": True}, xfast.InvalidOptionError, ("layers", "True", "int")),
    ({"keep_weights": 1}, xfast.InvalidOptionError, ("keep_weights", "1", "True or False")),
    ({"tolerance": 0.1}, xfast.InvalidOptionError, ("tolerance", '"auto"')),
    ({"calibration": BATCH}, xfast.InvalidOptionError, ("calibration", '"auto"')),
    ({"precision": "auto"}, xfast.InvalidOptionError, ("calibration",)),
    ({"precision": "auto", "calibration": []}, xfast.InvalidOptionError, ("calibration",)),
    ({"precision": "auto", "calibration": BATCH}, xfast.InvalidOptionError, ("tolerance", "None")),
    *(
        (
            {"precision": "auto", "calibration": BATCH, "tolerance": value},
            xfast.InvalidOptionError,
            ("tolerance", repr(value)),
        )
        for value in (0, -1.0, math.nan, math.inf, "0.1")
    ),
    ({"precision": "auto", "calibration": [3], "tolerance": 1.0}, xfast.InvalidOptionError, ("calibration", "mapping")),
    ({"precision": "auto", "calibration": BATCH[0], "tolerance": 1.0}, xfast.InvalidOptionError, ("calibration",)),
    ({"precision": "auto", "calibration": 3, "tolerance": 1.0}, xfast.InvalidOptionError, ("calibration",)),
]


@pytest.mark.parametrize(("options", "kind", "parts"), OPTIONS, ids=lambda value: str(value)[:60])
def test_bad_options(options: dict[str, Any], kind: type[Exception], parts: tuple[str, ...]) -> None:
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    with pytest.raises(kind) as caught:
        xfast.accelerate(model, **options)
    assert type(caught.value) is kind and issubclass(kind, xfast.XfastError)
    assert_message(caught.value, *parts)
    assert "forward" not in model.__dict__
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_options_are_checked_when_made() -> None:
    with pytest.raises(xfast.InvalidOptionError, match="precision"):
        xfast.Options(precision="int2")
    with pytest.raises(ValueError, match="backend"):  # so that `except ValueError` works, too
        xfast.Options(backend="cuda")


@pytest.mark.parametrize("name", ["sse9", "AVX-512", "avx512_fp16"])
def test_unknown_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(), ragged()
    want = model(**batch).last_hidden_state
    monkeypatch.setenv("XFAST_ISA", name)
    with pytest.raises(xfast.InvalidOptionError) as caught:
        xfast.accelerate(model)
    assert_message(caught.value, "XFAST_ISA", name.lower(), "auto", *xfast.available_isas())
    monkeypatch.delenv("XFAST_ISA")
    assert torch.equal(model(**batch).last_hidden_state, want)


def test_instruction_set_that_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    built = set(xfast._C.built_isas()) - set(xfast.available_isas())
    if not built:
        pytest.skip("this CPU has every instruction set that xfast is built for")
    for name in built:
        monkeypatch.setenv("XFAST_ISA", name)
        with pytest.raises(xfast.InvalidOptionError) as caught:
            xfast.accelerate(build())
        assert_message(caught.value, "XFAST_ISA", name, "not supported by this CPU", *xfast.available_isas())


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 10**6])
def test_bad_thread_counts(threads: Any) -> None:
    before = xfast.get_num_threads()
    with pytest.raises(xfast.InvalidOptionError) as caught:
        xfast.set_num_threads(threads)
    assert_message(caught.value, "threads", repr(threads))
    assert xfast.get_num_threads() == before


# --- objects ---------------------------------------------------------------------------------------------------------


class _Wrapper:
    model = "a name, not a module"

    def __str__(self) -> str:  # the same in every process: test ids are made of it
        return "wrapper"


@pytest.mark.parametrize("thing", [3, None, "xlm-roberta-base", [1], transformers.XLMRobertaModel, _Wrapper()], ids=str)
@pytest.mark.parametrize("call", [xfast.accelerate, xfast.restore, xfast.explain])
def test_things_that_are_no_model(call: Callable[[Any], Any], thing: Any) -> None:
    with pytest.raises(xfast.UnsupportedModelError) as caught:
        call(thing)
    assert_message(caught.value, type(thing).__name__, "torch.nn.Module", *FAMILY_NAMES)
    assert isinstance(caught.value, TypeError)


def test_models_of_other_families() -> None:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 1, "num_attention_heads": 2}
    electra = transformers.ElectraConfig(
        **sizes, hidden_size=32, embedding_size=32, intermediate_size=32, pad_token_id=PAD, max_position_embeddings=40
    )
    distil = transformers.DistilBertConfig(
        vocab_size=VOCAB, n_layers=1, n_heads=2, dim=32, hidden_dim=32, pad_token_id=PAD
    )
    for model in (transformers.ElectraModel(electra), transformers.DistilBertModel(distil), nn.Linear(2, 2)):
        with pytest.raises(xfast.UnsupportedModelError) as caught:
            xfast.accelerate(model)
        assert_message(caught.value, type(model).__name__, *FAMILY_NAMES)
        assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_class_that_only_shares_the_name_is_not_taken() -> None:
    class BertModel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(xfast.UnsupportedModelError, match="BertModel holds no encoder"):
        xfast.accelerate(BertModel())


# --- weights ---------------------------------------------------------------------------------------------------------

LAYER = "encoder.layer.1."
PARAMETERS = [
    *("embeddings." + name + "_embeddings.weight" for name in ("word", "position", "token_type")),
    *("embeddings.LayerNorm." + kind for kind in ("weight", "bias")),
    *(
        f"{LAYER}{path}.{kind}"
        for path in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        )
        for kind in ("weight", "bias")
    ),
]


PACKED = [name for name in PARAMETERS if name.endswith(("dense.weight", "query.weight"))]  # by a kernel per precision


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in PARAMETERS),
        *((name, precision) for name in PACKED for precision in ("bf16", "int8")),
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, precision: str) -> None:
    model, batch = build(head="token-classification"), ragged()
    parameter = encoder_of(model).get_parameter(name)
    good = parameter.view(-1)[-1].item()
    for value in (math.nan, math.inf, -math.inf):
        parameter.view(-1)[-1] = value
        with pytest.raises(xfast.InvalidWeightsError) as caught:
            xfast.accelerate(model, precision=precision)
        assert_message(caught.value, name, "NaN or infinity")
    assert not [path for path, module in model.named_modules() if "forward" in module.__dict__]
    parameter.view(-1)[-1] = good
    assert model(**batch).logits.isfinite().all()
    xfast.accelerate(model, precision=precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_that_are_not_finite_are_named(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    model.encoder.layer[2].intermediate.dense.weight[3, 7] = math.inf
    with pytest.raises(xfast.InvalidWeightsError, match=r"encoder\.layer\.2\.intermediate\.dense\.weight"):
        xfast.accelerate(model)


def test_models_without_values() -> None:
    with torch.device("meta"):
        model = build()
    with pytest.raises(xfast.InvalidWeightsError, match=r"embeddings\.word_embeddings\.weight.*meta"):
        xfast.accelerate(model)
    partly = build()
    partly.encoder.layer[1].output.dense.to("meta")
    with pytest.raises(xfast.InvalidWeightsError, match=r"encoder\.layer\.1\.output\.dense\.weight.*meta"):
        xfast.accelerate(partly)
    assert "forward" not in model.__dict__ and "forward" not in partly.__dict__


# --- calls -----------------------------------------------------------------------------------------------------------


def _with(tensor: torch.Tensor, at: tuple[int, int], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[at] = value
    return changed


BadCalls = dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]]
IDS, MASK = ragged()["input_ids"], ragged()["attention_mask"]
ZEROS = torch.zeros_like(IDS)


def _bad_ids() -> BadCalls:
    wrong, error = xfast.TokenIdError, xfast.InvalidInputError
    first = int(IDS[0, 0])
    return {
        "id too large": ({"input_ids": _with(IDS, (2, 3), VOCAB)}, wrong, ("input_ids[2, 3]", "101", "0 to 100")),
        "id negative": ({"input_ids": _with(IDS, (0, 0), -1)}, wrong, ("input_ids[0, 0]", "-1", "0 to 100")),
        "id of a label": ({"input_ids": _with(IDS, (3, 16), -100)}, wrong, ("input_ids[3, 16]", "-100")),
        "id over 32 bits": ({"input_ids": IDS + 2**32}, wrong, ("input_ids[0, 0]", str(first + 2**32))),
        "masked id": ({"input_ids": _with(IDS, (1, 5), 999), "attention_mask": MASK}, wrong, ("[1, 5]", "999")),
        "float ids": ({"input_ids": IDS.float()}, error, ("input_ids", "torch.float32", "int64")),
        "1-D ids": ({"input_ids": IDS[0]}, error, ("input_ids", "(batch, length)", "(17,)")),
        "3-D ids": ({"input_ids": IDS[None]}, error, ("input_ids", "(batch, length)", "(1, 4, 17)")),
        "type too large": (
            {"input_ids": IDS, "token_type_ids": _with(ZEROS, (1, 2), 1)},
            wrong,
            ("token_type_ids[1, 2]", "1", "0 to 0"),
        ),
        "type negative": (
            {"input_ids": IDS, "token_type_ids": _with(ZEROS, (1, 2), -1)},
            wrong,
            ("token_type_ids[1, 2]", "-1", "0 to 0"),
        ),
    }


def _bad_tensors() -> BadCalls:
    error = xfast.InvalidInputError
    return {
        "types of another shape": (
            {"input_ids": IDS, "token_type_ids": ZEROS[:, :3]},
            error,
            ("token_type_ids", "(4, 17)", "(4, 3)"),
        ),
        "float types": (
            {"input_ids": IDS, "token_type_ids": ZEROS.float()},
            error,
            ("token_type_ids", "torch.float32"),
        ),
        "float positions": ({"input_ids": IDS, "position_ids": IDS * 1.0}, error, ("position_ids", "torch.float32")),
        "positions of another shape": (
            {"input_ids": IDS, "position_ids": torch.ones(3, 17, dtype=torch.long)},
            error,
            ("position_ids", "(4, 17)", "(3, 17)"),
        ),
        "embeddings of another width": (
            {"inputs_embeds": torch.zeros(2, 3, 63)},
            error,
            ("inputs_embeds", "(batch, length, 64)", "(2, 3, 63)"),
        ),
        "2-D embeddings": ({"inputs_embeds": torch.zeros(3, 64)}, error, ("inputs_embeds", "(3, 64)")),
        "integer embeddings": (
            {"inputs_embeds": torch.zeros(2, 3, 64, dtype=torch.long)},
            error,
            ("inputs_embeds", "torch.int64", "floating"),
        ),
    }


def _bad_masks() -> BadCalls:
    error, calls = xfast.InvalidInputError, {}
    for shape in ((4, 16), (4, 18), (3, 17), (1, 17), (17,)):
        mask = torch.ones(shape, dtype=torch.long)
        mask.view(-1)[-1] = 0  # transformers accepts any shape of ones
        parts = ("attention_mask", "(4, 17)", str(shape))
        calls[f"mask of shape {shape}"] = ({"input_ids": IDS, "attention_mask": mask}, error, parts)
    for value in (2, -1, 0.5, math.nan, math.inf, -math.inf):
        mask = _with(MASK.float(), (1, 0), value)
        parts = ("attention_mask[1, 0]", str(value), "0", "1")
        calls[f"mask with {value}"] = ({"input_ids": IDS, "attention_mask": mask}, error, parts)
    integers = {"input_ids": IDS, "attention_mask": MASK * 2}
    calls["integer mask with 2"] = (integers, error, ("attention_mask[0, 0]", "2"))
    return calls


BAD_CALLS = {**_bad_ids(), **_bad_tensors(), **_bad_masks()}


@pytest.mark.parametrize("head", ["base", "sequence-classification", "token-classification"])
@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_calls(name: str, head: str) -> None:
    call, kind, parts = BAD_CALLS[name]
    model, batch = xfast.accelerate(build(head=head)), ragged()
    want = model(**batch)[0]
    with pytest.raises(kind) as caught:
        model(**call)
    assert type(caught.value) is kind and isinstance(caught.value, ValueError)
    assert_message(caught.value, *parts)
    assert isinstance(caught.value, IndexError) == (kind is xfast.TokenIdError)
    assert torch.equal(model(**batch)[0], want)


def test_empty_sequences_get_the_error_of_the_original() -> None:
    for head in ("base", "sequence-classification"):
        model, empty = build(head=head), {"input_ids": torch.zeros(3, 0, dtype=torch.long)}
        with pytest.raises(Exception) as original:
            model(**empty)
        xfast.accelerate(model)
        with pytest.raises(type(original.value)) as ours:
            model(**empty)
        assert str(ours.value) == str(original.value)


def test_tensors_need_not_be_contiguous() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want = model(ids, mask).last_hidden_state
    wide = torch.stack([ids, ids], dim=2)[:, :, 0]
    turned = mask.t().contiguous().t()
    assert not wide.is_contiguous() and not turned.is_contiguous()
    assert torch.equal(model(wide, turned).last_hidden_state, want)
    every_second = torch.zeros(8, 17, dtype=torch.int32)
    every_second[::2] = ids.int()
    assert torch.equal(model(every_second[::2], turned.bool()).last_hidden_state, want)
    embeds = model.embeddings.word_embeddings(ids)
    swapped = embeds.transpose(0, 1).contiguous().transpose(0, 1)
    assert not swapped.is_contiguous()
    got = model(inputs_embeds=swapped, attention_mask=mask).last_hidden_state
    assert torch.equal(got, model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)
    one_row = torch.tensor([BOS, 5, 6, EOS])
    want = model(one_row.repeat(3, 1)).last_hidden_state
    assert torch.equal(model(one_row.expand(3, 4)).last_hidden_state, want)
