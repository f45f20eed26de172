"""Whole models against transformers' own forward: every family, head and precision, and what can vary in a call."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ALL_FAMILIES,
    CHOICES,
    FIRST_HEADS,
    HEADS,
    LABELS,
    PAD,
    TASK_HEADS,
    TOKEN_HEADS,
    VOCAB,
    arguments,
    at_tokens,
    build,
    encoder_of,
    error,
    fallbacks,
    labels,
    left_padded,
    norm_error,
    outputs_of,
    peak_growth,
    quick_settings,
    ragged,
    resident,
    simulated,
)

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

PRECISIONS = ("fp32", "bf16", "int8", "int4")
FP32_ERROR = 1e-5  # ten times tighter than promised; about 1e-6 is what it is
FLOOR = 2e-3  # of bf16, whose unit of rounding is 4e-3
# (hidden size, heads, intermediate size): head dims 1 to 256, none or all of the sizes multiples of the tile
SIZES = (
    (7, 1, 5),
    (12, 3, 1),
    (60, 3, 37),
    (96, 4, 7),
    (80, 1, 80),
    (144, 2, 40),
    (256, 2, 33),
    (320, 2, 64),
    (256, 1, 96),
)


@dataclass(frozen=True)
class Case:
    """A model that tests share (they restore it), a batch, and what the untouched model gives."""

    model: Any
    batch: dict[str, torch.Tensor]
    want: dict[str, torch.Tensor]

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Values at real tokens."""
        return at_tokens(values, self.batch["attention_mask"])


@functools.cache
def case(family: str, head: str, attention: str = "sdpa") -> Case:
    """One shared model per case: building it is most of a test's time."""
    with torch.no_grad():
        model, batch = build(family, head, attention=attention), arguments(family, head)
        return Case(model, batch, outputs_of(model(**batch)))


def assert_outputs(c: Case, got: dict[str, torch.Tensor], limit: float = FP32_ERROR) -> None:
    """Every output is within ``limit`` of the original's at real tokens."""
    assert got.keys() == c.want.keys()
    for name, want in c.want.items():
        assert error(c.tokens(got[name]), c.tokens(want)) <= limit, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_fp32_equals_the_original(family: str, head: str, attention: str) -> None:
    c = case(family, head, attention)
    with xfast.accelerated(c.model) as model:
        assert_outputs(c, outputs_of(model(**c.batch)))
        assert fallbacks(model) == {}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_bf16_errs_no_more_than_twice_the_stock_model(family: str, head: str) -> None:
    c = case(family, head)
    stock = outputs_of(copy.deepcopy(c.model).to(torch.bfloat16)(**c.batch))
    with xfast.accelerated(c.model, precision="bf16") as model:
        got = outputs_of(model(**c.batch))
    for name, want in c.want.items():
        ours, theirs = (error(c.tokens(values[name]), c.tokens(want)) for values in (got, stock))
        assert 1e-5 < ours <= 2 * theirs + FLOOR, name  # below 1e-5 it was not computed in bf16


@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 1e-3, 8e-2), ("int4", 1e-2, 1.0)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_integers_err_no_more_than_their_simulation(
    family: str, head: str, precision: str, least: float, most: float
) -> None:
    c = case(family, head)
    plain = outputs_of(simulated(c.model, precision)(**c.batch))
    with xfast.accelerated(c.model, precision=precision) as model:
        got = outputs_of(model(**c.batch))
    for name, want in c.want.items():
        ours, theirs = (norm_error(c.tokens(values[name]), c.tokens(want)) for values in (got, plain))
        # of a handful of logits, luck decides which of two equally good roundings is closer
        slack = 1.1 if want.numel() > 4 else 1.5
        assert least < ours <= slack * theirs + 1e-3, name  # below that it was not computed in that precision
        assert ours <= most, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size_is_computed(sizes: tuple[int, int, int], precision: str) -> None:
    hidden, heads, inner = sizes
    sizes_of = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
    model, batch = build(head="base-no-pooler", num_hidden_layers=2, **sizes_of), ragged()
    mask = batch["attention_mask"]
    want = at_tokens(model(**batch)[0], mask)
    plain = simulated(model, precision) if precision in ("int8", "int4") else copy.deepcopy(model)
    plain = plain.to(torch.bfloat16) if precision == "bf16" else plain
    theirs = norm_error(at_tokens(plain(**batch)[0], mask), want)
    got = xfast.accelerate(model, precision=precision)(**batch)[0]
    limit = {"fp32": FP32_ERROR, "bf16": 2 * theirs, "int8": 1.2 * theirs, "int4": 1.2 * theirs}[precision]
    assert norm_error(at_tokens(got, mask), want) <= limit


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_threads(precision: str) -> None:
    lengths = (38, 3, 1, 37, 25, 38, 17)  # more rows than one block of any kernel
    model, batch = xfast.accelerate(build(), precision=precision), ragged(lengths=lengths)
    results = []
    for threads in (1, 2, 3, 7):
        xfast.set_num_threads(threads)
        results.append(model(**batch).last_hidden_state)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_bits_do_not_depend_on_the_instruction_set(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (300, 3, 1, 37)  # more keys than one block of attention
    model, batch, results = build(max_position_embeddings=310), ragged(lengths=lengths), []
    for isa in xfast.available_isas():
        monkeypatch.setenv("XFAST_ISA", isa)
        xfast.accelerate(model, precision=precision)
        assert f"instruction set: {isa}\n" in str(xfast.explain(model))
        results.append(model(**batch).last_hidden_state)
    assert all(torch.equal(result, results[0]) for result in results)


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_all_hidden_states_equal_the_original(family: str, head: str) -> None:
    c = case(family, head)
    mask = c.batch["attention_mask"].view(-1, c.batch["attention_mask"].shape[-1])
    want = c.model(**c.batch, output_hidden_states=True).hidden_states
    with xfast.accelerated(c.model) as model:
        got = model(**c.batch, output_hidden_states=True)
        assert fallbacks(model) == {}
    assert len(got.hidden_states) == len(want) == 4
    for layer, states in enumerate(want):
        assert error(at_tokens(got.hidden_states[layer], mask), at_tokens(states, mask)) <= FP32_ERROR, layer
        assert not got.hidden_states[layer][mask == 0].any(), layer
    assert_outputs(c, {name: value for name, value in outputs_of(got).items() if name in c.want})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padded_positions_are_zeros(precision: str) -> None:
    c = case("xlm-roberta", "base")
    padding = c.batch["attention_mask"] == 0
    with xfast.accelerated(c.model, precision=precision) as model:
        hidden = model(**c.batch).last_hidden_state
    assert padding.any() and not hidden[padding].any()
    assert hidden[~padding].any(-1).all()


def _structure(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple):
        return tuple(_structure(item) for item in value)
    return None if value is None else {name: _structure(item) for name, item in value.items()}


@pytest.mark.parametrize("states", [False, True], ids=["last", "states"])
@pytest.mark.parametrize("as_dict", [False, True], ids=["tuple", "dict"])
@pytest.mark.parametrize("head", HEADS)
def test_output_has_the_structure_of_the_original(head: str, as_dict: bool, states: bool) -> None:
    c = case("bert", head)
    flags = {"return_dict": as_dict, "output_hidden_states": states}
    want = c.model(**c.batch, **flags)
    with xfast.accelerated(c.model) as model:
        got = model(**c.batch, **flags)
    assert type(got) is type(want)
    assert _structure(got) == _structure(want)
    assert error(c.tokens(got[0]), c.tokens(want[0])) <= FP32_ERROR


@pytest.mark.parametrize("name", ["return_dict", "output_hidden_states"])
def test_flags_of_the_configuration_are_honoured(name: str) -> None:
    model = build(**{name: name == "output_hidden_states"})
    want = model(**ragged())
    got = xfast.accelerate(model)(**ragged())
    assert _structure(got) == _structure(want)


@pytest.mark.parametrize("head", TASK_HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_loss_equals_the_original(family: str, head: str) -> None:
    # Without padding: a span's loss sums over every position of the row, see the next test.
    model, batch = build(family, head), arguments(family, head, (9, 9, 9, 9))
    given = labels(head, batch)
    want = model(**batch, **given)
    got = xfast.accelerate(model)(**batch, **given)
    assert float(want.loss) > 0
    assert abs(float(got.loss) - float(want.loss)) <= 1e-5 * float(want.loss)


@pytest.mark.parametrize("head", TASK_HEADS)
def test_loss_of_a_padded_batch_equals_the_original(head: str) -> None:
    c = case("xlm-roberta", head)
    given = labels(head, c.batch)
    want = float(c.model(**c.batch, **given).loss)
    with xfast.accelerated(c.model) as model:
        got = float(model(**c.batch, **given).loss)
    assert abs(got - want) <= 1e-5 * want


# --- inputs ----------------------------------------------------------------------------------------------------------


def _positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    rows, width = batch["input_ids"].shape
    return torch.stack([torch.randperm(36)[:width] for _ in range(rows)])


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(
    "change", ["embeds", "positions", "one row of positions", "types", "types of a row", "pads inside", "no mask"]
)
def test_call_arguments_are_honoured(family: str, change: str) -> None:
    model, batch = build(family, type_vocab_size=2), ragged(family)
    call = dict(batch)
    if change == "embeds":
        call["inputs_embeds"] = encoder_of(model).embeddings.word_embeddings(call.pop("input_ids"))
    elif change == "positions":
        call["position_ids"] = _positions(batch)
    elif change == "one row of positions":
        call["position_ids"] = _positions(batch)[:1].to(torch.int32)
    elif change == "types":
        call["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    elif change == "types of a row":
        call["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape[1:])
    elif change == "pads inside":  # the RoBERTa family counts positions over ids, whatever the mask says
        call["input_ids"] = batch["input_ids"].clone()
        call["input_ids"][2, 5], call["input_ids"][3, 0] = PAD, PAD
    else:
        del call["attention_mask"]
    mask = call.get("attention_mask", torch.ones_like(batch["attention_mask"]))
    plain, want = model(**batch), model(**call)
    got = xfast.accelerate(model)(**call)
    assert fallbacks(model) == {}
    assert error(at_tokens(got[0], mask), at_tokens(want[0], mask)) <= FP32_ERROR
    assert error(got[1], want[1]) <= FP32_ERROR
    if change != "embeds":  # the same embeddings, given directly
        tokens = batch["attention_mask"]
        assert error(at_tokens(plain[0], tokens), at_tokens(want[0], tokens)) > 1e-2, "the argument changes nothing"


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_masks_may_have_any_dtype(dtype: torch.dtype) -> None:
    c = case("xlm-roberta", "base")
    with xfast.accelerated(c.model) as model:
        want = model(**c.batch)
        got = model(c.batch["input_ids"], c.batch["attention_mask"].to(dtype))
        assert fallbacks(model) == {}
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_masks_may_have_holes_and_rows_without_tokens(family: str, head: str) -> None:
    model, batch = build(family, head), arguments(family, head)
    rows = batch["attention_mask"].view(-1, batch["attention_mask"].shape[-1])
    rows[:, 3] = 0
    rows[2, 6:9] = 0
    rows[0] = 0  # a view: this row of the batch has no token at all
    want = outputs_of(model(**batch))
    got = outputs_of(xfast.accelerate(model)(**batch))
    assert_outputs(Case(model, batch, want), got)
    # What reads column 0 of a masked row needs the original's arbitrary value there.
    assert bool(fallbacks(model)) == (head in FIRST_HEADS or head == "base")


@pytest.mark.parametrize("head", ["base", "sequence-classification"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_left_padding_equals_the_original(family: str, head: str) -> None:
    model, batch = build(family, head), left_padded(arguments(family, head))
    want = outputs_of(model(**batch))
    got = outputs_of(xfast.accelerate(model)(**batch))
    assert sum(fallbacks(model).values()) == 1
    assert_outputs(Case(model, batch, want), got)


@pytest.mark.parametrize("head", ["base-no-pooler", *TOKEN_HEADS])
def test_left_padding_is_fast_where_column_0_is_not_read(head: str) -> None:
    model, batch = build("bert", head), left_padded(ragged("bert"))
    want = outputs_of(model(**batch))
    got = outputs_of(xfast.accelerate(model)(**batch))
    assert fallbacks(model) == {}
    assert_outputs(Case(model, batch, want), got)


@pytest.mark.parametrize("head", HEADS)
def test_empty_batch_gives_empty_outputs(head: str) -> None:
    # transformers 5 cannot reshape an empty batch; the shapes are those of any other batch with 0 rows.
    batch = {name: values[:0] for name, values in arguments("xlm-roberta", head).items()}
    got = outputs_of(xfast.accelerate(build(head=head))(**batch))
    widths = {
        "base": {"last_hidden_state": (0, 17, 64), "pooler_output": (0, 64)},
        "base-no-pooler": {"last_hidden_state": (0, 17, 64)},
        "sequence-classification": {"logits": (0, LABELS)},
        "token-classification": {"logits": (0, 17, LABELS)},
        "question-answering": {"start_logits": (0, 17), "end_logits": (0, 17)},
        "multiple-choice": {"logits": (0, CHOICES)},
        "masked-lm": {"logits": (0, 17, VOCAB)},
    }
    assert {name: tuple(values.shape) for name, values in got.items()} == widths[head]


@pytest.mark.parametrize("head", HEADS)
def test_batches_of_single_tokens_equal_the_original(head: str) -> None:
    model, batch = build("bert", head), arguments("bert", head, (1, 1))
    want = outputs_of(model(**batch))
    assert_outputs(Case(model, batch, want), outputs_of(xfast.accelerate(model)(**batch)))
    assert fallbacks(model) == {}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("family", "positions"), [("xlm-roberta", 514), ("bert", 512)])
def test_longest_sequence_equals_the_original(family: str, positions: int, precision: str) -> None:
    model, batch = build(family, max_position_embeddings=positions, num_hidden_layers=1), ragged(family, (512, 5, 511))
    want = at_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
    got = at_tokens(xfast.accelerate(model, precision=precision)(**batch).last_hidden_state, batch["attention_mask"])
    assert norm_error(got, want) <= {"fp32": FP32_ERROR, "bf16": 5e-3, "int8": 2e-2, "int4": 0.2}[precision]
    assert fallbacks(model) == {}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "positions"), [("xlm-roberta", 514), ("camembert", 514), ("bert", 512)])
def test_too_long_sequence_gets_the_error_of_the_original(family: str, positions: int, attention: str) -> None:
    model = build(family, attention=attention, max_position_embeddings=positions, num_hidden_layers=1)
    short, long = ragged(family, (3, 2)), ragged(family, (513, 5))
    with pytest.raises(Exception) as original:
        model(**long)
    want = model(**short)
    xfast.accelerate(model)
    with pytest.raises(type(original.value)) as ours:
        model(**long)
    assert type(ours.value) is type(original.value) and str(ours.value) == str(original.value)
    assert error(model(**short)[1], want[1]) <= FP32_ERROR


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_memory_is_linear_in_length(precision: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    model = build("xlm-roberta", "base-no-pooler", max_position_embeddings=8194, **sizes)
    batch = ragged(lengths=(8192, 77))
    want = model(**batch).last_hidden_state
    xfast.accelerate(model, precision=precision)
    model(**ragged(lengths=(9,)))  # packs the weights, starts the threads
    got, growth = peak_growth(lambda: model(**batch).last_hidden_state)
    assert growth < 64 * 2**20, f"{growth / 2**20:.0f} MiB"  # one head's scores alone would be 256 MiB
    tokens = batch["attention_mask"]
    limit = {"fp32": FP32_ERROR, "bf16": 5e-3, "int8": 2e-2, "int4": 0.2}[precision]
    assert norm_error(at_tokens(got, tokens), at_tokens(want, tokens)) <= limit


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_of_one_giant_batch_goes_back() -> None:
    model, small = xfast.accelerate(build("xlm-roberta", "base-no-pooler"), precision="int8"), ragged(lengths=(9,))
    giant = ragged(lengths=(30,) * 8192)

    def calls() -> None:
        for _ in range(60):
            model(**small)

    calls()
    before = resident()
    growth = peak_growth(lambda: len(model(**giant)))[1]
    calls()
    assert resident() - before < growth / 4, f"{(resident() - before) >> 20} of {growth >> 20} MiB are kept"
