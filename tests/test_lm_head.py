"""The masked-LM head: every target, sizes around panels and passes, what it reads and when it stands aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from models import (
    ALL_FAMILIES,
    at_tokens,
    build,
    error,
    fallbacks,
    labels,
    norm_error,
    peak_growth,
    quick_settings,
    ragged,
)
from reference import assert_same_bits, assert_within
from torch import nn
from torch.nn import functional as F

import xfast
from xfast import _C, lm_head
from xfast.backends.native import requested_isa

_settings = pytest.fixture(autouse=True)(quick_settings)

EPS = 1e-5
# tokens, hidden_size, vocab_size: around one row, a pass of 112 rows, a chunk, a panel, a thread's run of 16 panels
SIZES = [(0, 16, 40), (1, 1, 1), (3, 33, 31), (5, 16, 32), (13, 64, 33), (112, 48, 100), (113, 40, 65), (230, 96, 1100)]
SIZES += [(113, 1040, 130), (115, 3100, 70)]  # more than one pass over `in`; two and one panels together
DTYPES = {"f4": torch.float32, "bf16": torch.bfloat16, "f2": torch.float16}


class Case:
    """Arguments of one call, and its result in plain PyTorch."""

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        tokens, hidden, vocab = size

        def values(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

        self.x = values(tokens, hidden)
        self.dense, self.decoder = ((values(n, hidden) * hidden**-0.5).to(dtype) for n in (hidden, vocab))
        self.dense_bias, self.gamma, self.beta = values(hidden), 1 + 0.2 * values(hidden), values(hidden)
        self.bias: torch.Tensor | None = values(vocab)
        self.slots = tokens + tokens // 3 + 2
        self.indices = np.sort(rng.permutation(self.slots)[:tokens]).astype(np.int32)

    def run(self, isa: str, precision: str, threads: int = 2, out: torch.dtype = torch.float32) -> torch.Tensor:
        result = torch.full((self.slots, len(self.decoder)), float("nan"), dtype=out)
        vectors = [v.numpy() for v in (self.dense_bias, self.gamma, self.beta)]
        bias = None if self.bias is None else self.bias.numpy()
        dense, decoder, target = map(bits, (self.dense, self.decoder, result))
        x = self.x.numpy()
        _C.lm_head(isa, precision, x, dense, *vectors, EPS, decoder, bias, self.indices, target, threads)
        return result

    def plain(self, dtype: torch.dtype = torch.float64, operands: torch.dtype | None = None) -> torch.Tensor:
        """The tokens' logits, computed in ``dtype``, products' inputs rounded to ``operands`` first."""

        def rounded(t: torch.Tensor) -> torch.Tensor:
            return (t if operands is None else t.to(operands)).to(dtype)

        y = F.linear(rounded(self.x), rounded(self.dense), self.dense_bias.to(dtype))
        y = F.layer_norm(F.gelu(y), y.shape[1:], self.gamma.to(dtype), self.beta.to(dtype), EPS)
        return F.linear(rounded(y), rounded(self.decoder), None if self.bias is None else self.bias.to(dtype))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_is_as_accurate_as_torch(
    isa: str, size: tuple[int, int, int], dtype: str, rng: np.random.Generator
) -> None:
    case = Case(rng, size, DTYPES[dtype])
    got = case.run(isa, "fp32")
    floor = max(2.0**-21, 2.0**-23 * size[1] ** 0.5)  # one chain of sums; torch adds several
    assert_within(got[case.indices].numpy(), case.plain(), case.plain(torch.float32), floor=floor, what=str(size))
    rest = np.setdiff1d(np.arange(case.slots), case.indices)
    assert not got[rest].any()


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bf16_rounds_operands_and_nothing_else(
    isa: str, size: tuple[int, int, int], dtype: str, rng: np.random.Generator
) -> None:
    case = Case(rng, size, DTYPES[dtype])
    got, want = case.run(isa, "bf16")[case.indices], case.plain(operands=torch.bfloat16)
    # LayerNorm's output is rounded in both: values near a boundary go to the other side now and then.
    assert error(got, want) < 8e-3 and norm_error(got, want) < 2e-3
    assert norm_error(got, case.plain()) < 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_are_written_in_bf16(isa: str, precision: str, rng: np.random.Generator) -> None:
    for size in SIZES:
        case = Case(rng, size, torch.bfloat16)
        wide, narrow = (case.run(isa, precision, out=dtype) for dtype in (torch.float32, torch.bfloat16))
        assert torch.equal(wide.to(torch.bfloat16), narrow)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(13, 64, 33), (230, 96, 1100)], ids=str)
def test_neither_threads_nor_other_rows_change_a_bit(
    isa: str, precision: str, size: tuple[int, int, int], rng: np.random.Generator
) -> None:
    case = Case(rng, size)
    want = case.run(isa, precision, 1)
    for threads in (2, 3, 7):
        assert_same_bits(case.run(isa, precision, threads).numpy(), want.numpy(), f"{threads} threads")
    rows = want[case.indices]
    case.x, case.indices, case.slots = case.x[4:5], np.array([0], np.int32), 1
    assert_same_bits(case.run(isa, precision)[0].numpy(), rows[4].numpy(), "one row")


def test_a_decoder_may_have_no_bias(isa: str, rng: np.random.Generator) -> None:
    case = Case(rng, (5, 33, 70))
    case.bias = None
    assert_within(case.run(isa, "fp32")[case.indices].numpy(), case.plain(), case.plain(torch.float32))


def test_nan_and_infinity_reach_only_the_logits_that_read_them(isa: str, rng: np.random.Generator) -> None:
    case = Case(rng, (5, 33, 70))
    good = case.run(isa, "fp32")
    case.decoder[7, 3], case.decoder[40] = float("nan"), float("inf")
    case.x[2, 0] = float("nan")
    got = case.run(isa, "fp32")[case.indices]
    assert got[2].isnan().all() and got[:, 7].isnan().all() and not got[:, 40].isfinite().any()
    rest = [i for i in range(70) if i not in (7, 40)]
    assert torch.equal(got[[0, 1, 3, 4]][:, rest], good[case.indices][[0, 1, 3, 4]][:, rest])


BAD = {
    "precision": ("int8", "precision"),
    "x": (np.zeros((3, 5), np.float32), "dense"),
    "dense": (np.zeros((4, 4), np.int32), "dense"),
    "gamma": (np.zeros(3, np.float32), "gamma"),
    "decoder": (np.zeros((0, 4), np.float32), "decoder"),
    "decoder_bias": (np.zeros(6, np.float32), "decoder_bias"),
    "indices": (np.array([0, 2, 2], np.int32), "indices"),
    "out": (np.zeros((4, 7), np.float16), "out"),
    "threads": (0, "threads"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name: str) -> None:
    square, vector = np.zeros((4, 4), np.float32), np.zeros(4, np.float32)
    given: dict[str, Any] = {"isa": "auto", "precision": "fp32", "x": np.zeros((3, 4), np.float32), "dense": square}
    given |= {"dense_bias": vector, "gamma": vector, "beta": vector, "eps": EPS}
    given |= {"decoder": np.zeros((7, 4), np.float32), "decoder_bias": np.zeros(7, np.float32)}
    given |= {"indices": np.array([0, 1, 3], np.int32), "out": np.zeros((4, 7), np.float32), "threads": 1}
    _C.lm_head(*given.values())
    value, named = BAD[name]
    with pytest.raises(ValueError, match=f"^{named}:"):
        _C.lm_head(*{**given, name: value}.values())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of the head's native calls."""
    seen, original = [], lm_head.logits

    def spy(head: Any, hidden: torch.Tensor, packed: Any, engine: Any) -> torch.Tensor:
        seen.append(lm_head.precision_for(engine))
        return original(head, hidden, packed, engine)

    monkeypatch.setattr(lm_head, "logits", spy)
    return seen


NARROW = "bf16" if _C.bf16_instruction(requested_isa()) else "fp32"


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 5e-6), ("bf16", 3e-2), ("int8", 6e-2)])
def test_models_give_the_same_logits(family: str, precision: str, limit: float, calls: list[str]) -> None:
    model, batch = build(family, "masked-lm"), ragged(family)
    want = model(**batch).logits
    xfast.accelerate(model, precision=precision)
    got = model(**batch).logits
    mask = batch["attention_mask"].bool()
    assert error(got[mask], want[mask]) < limit and not got[~mask].any()
    assert calls == ["fp32" if precision == "fp32" else NARROW] and fallbacks(model) == {}
    with torch.enable_grad():  # explain is asked outside of inference
        assert f"Head: one native call in {calls[0]}" in str(xfast.explain(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_have_the_models_dtype(dtype: torch.dtype, calls: list[str]) -> None:
    model, batch = build(head="masked-lm").to(dtype), ragged()
    want = build(head="masked-lm")(**batch).logits
    xfast.accelerate(model)
    got, mask = model(**batch).logits, batch["attention_mask"].bool()
    assert got.dtype == dtype and calls and error(got[mask].float(), want[mask]) < 4e-2


def test_a_batch_without_padding_runs_natively_too(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged(lengths=(7, 7))
    want = model(**batch).logits
    assert error(xfast.accelerate(model)(**batch).logits, want) < 5e-6 and calls
    nothing = {name: values[:0] for name, values in batch.items()}
    assert model(**nothing).logits.shape == (0, 7, want.shape[-1])


def test_padding_elsewhere_in_the_batch_changes_no_logits(calls: list[str]) -> None:
    # int8 has the same bits in every batch, so the head must be given the same values in every batch
    model = xfast.accelerate(build(head="masked-lm").half(), precision="int8")
    batch = ragged(lengths=(7, 7))
    whole = model(**batch).logits
    padded = {name: F.pad(values, (0, 3), value=name == "input_ids") for name, values in batch.items()}
    assert torch.equal(model(**padded).logits[:, :7], whole) and len(calls) == 2


def test_losses_are_computed_from_its_logits(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged()
    want = model(**batch, **labels("masked-lm", batch)).loss
    xfast.accelerate(model)
    torch.testing.assert_close(model(**batch, **labels("masked-lm", batch)).loss, want, rtol=1e-5, atol=1e-6)
    assert calls


def test_changed_weights_are_seen_by_the_next_call(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged()
    plain = build(head="masked-lm")
    xfast.accelerate(model)
    for change in ("decoder.bias", "dense.weight", "layer_norm.weight", "decoder.weight"):
        for each in (model, plain):
            # Through .data, one value: nothing that a watch could sample
            each.lm_head.get_parameter(change).data.view(-1)[5] += 3
        mask = batch["attention_mask"].bool()
        assert error(model(**batch).logits[mask], plain(**batch).logits[mask]) < 5e-6
    assert len(calls) == 4


def test_weights_are_not_copied() -> None:
    model = build(head="masked-lm", vocab_size=200_000, hidden_size=64)
    batch = {"input_ids": torch.arange(3, 8)[None]}
    _, growth = peak_growth(lambda: xfast.accelerate(model, precision="fp32")(**batch))
    assert growth < 5 * 200_000 * 4 + model.lm_head.decoder.weight.nbytes // 3  # the logits; the table is 51 MB


def test_freed_encoder_weights_leave_the_head_alone(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged()
    want = model(**batch).logits
    xfast.accelerate(model, keep_weights=False)
    mask = batch["attention_mask"].bool()
    assert error(model(**batch).logits[mask], want[mask]) < 5e-6 and calls


def _hooked(model: nn.Module) -> None:
    model.lm_head.dense.register_forward_hook(lambda module, args, output: output * 2)


def _wrapped(model: nn.Module) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model.lm_head.decoder.__class__ = Scaled


def _strided(model: nn.Module) -> None:
    weight = model.lm_head.dense.weight
    model.lm_head.dense.weight = nn.Parameter(weight.t().contiguous().t())


def _forward_of_its_own(model: nn.Module) -> None:
    head = model.lm_head
    head.forward = lambda features: type(head).forward(head, features) / 2


def _sparse(model: nn.Module) -> None:
    model.lm_head.dense.weight = nn.Parameter(model.lm_head.dense.weight.to_sparse_csr())


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change", [_hooked, _wrapped, _strided, _forward_of_its_own, _sparse], ids=lambda f: f.__name__
)
def test_a_changed_head_runs_its_own_code(change: Callable[[nn.Module], None], when: str, calls: list[str]) -> None:
    model, plain, batch = build(head="masked-lm"), build(head="masked-lm"), ragged()
    change(plain)
    if when == "before":
        change(model)
    xfast.accelerate(model)
    if when == "after":
        change(model)
    mask = batch["attention_mask"]
    assert error(at_tokens(model(**batch).logits, mask), at_tokens(plain(**batch).logits, mask)) < 5e-6
    assert not calls


def test_functional_transforms_see_the_models_own_code(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged()
    xfast.accelerate(model)
    weights = torch.stack([model.lm_head.dense.weight.detach(), model.lm_head.dense.weight.detach() * 2])

    def run(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"lm_head.dense.weight": weight}, kwargs=batch).logits

    want = torch.stack([run(weight) for weight in weights])
    assert len(calls) == 2
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.func.vmap(run)(weights)[:, mask], want[:, mask], rtol=1e-5, atol=1e-5)
    _, tangent = torch.func.jvp(run, (weights[0],), (weights[0],))
    assert tangent.abs().max() > 0.1 and len(calls) == 2
    assert sum(fallbacks(model).values()) == 2


def _double(output: Any) -> None:
    output.last_hidden_state.mul_(2)


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3)], ids=str)
def test_an_encoders_output_edited_in_place_is_what_the_head_gets(lengths: tuple[int, int]) -> None:
    model, plain, batch = build(head="masked-lm"), build(head="masked-lm"), ragged(lengths=lengths)
    for each in (model, plain):
        each.roberta.register_forward_hook(lambda module, args, output: _double(output))
    xfast.accelerate(model)
    with torch.inference_mode():
        mask = batch["attention_mask"].bool()
        assert error(model(**batch).logits[mask], plain(**batch).logits[mask]) < 5e-6


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3)], ids=str)
def test_gradients_may_be_asked_of_the_encoders_output(lengths: tuple[int, int]) -> None:
    batch, grads = ragged(lengths=lengths), []
    with torch.enable_grad():
        for model in (xfast.accelerate(build(head="masked-lm")), build(head="masked-lm")):
            model.requires_grad_(False)
            kept: list[torch.Tensor] = []
            model.roberta.register_forward_hook(lambda module, args, out, kept=kept: kept.append(_leaf(out)))
            model(**batch).logits[batch["attention_mask"].bool()].square().sum().backward()
            grads.append(kept[0].grad)
    mask = batch["attention_mask"].bool()
    assert error(grads[0][mask], grads[1][mask]) < 1e-5


def _leaf(output: Any) -> torch.Tensor:
    return output.last_hidden_state.requires_grad_()


def test_another_activation_runs_its_own_code(calls: list[str]) -> None:
    model, batch = build("bert", "masked-lm"), ragged("bert")
    for each in (model, plain := build("bert", "masked-lm")):
        each.cls.predictions.transform.transform_act_fn = nn.ReLU()
    xfast.accelerate(model)
    mask = batch["attention_mask"].bool()
    assert error(model(**batch).logits[mask], plain(**batch).logits[mask]) < 5e-6 and not calls


def test_a_head_in_training_has_gradients(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged()
    plain = build(head="masked-lm")
    with torch.enable_grad():
        grads = []
        for each in (xfast.accelerate(model), plain):
            each.requires_grad_(False)
            each.lm_head.dense.requires_grad_(True)
            each(**batch, **labels("masked-lm", batch)).loss.backward()
            grads.append(each.lm_head.dense.weight.grad)
    assert norm_error(*grads) < 1e-5 and not calls and fallbacks(model) == {}


def test_autocast_computes_the_head_as_it_says(calls: list[str]) -> None:
    model, batch = build(head="masked-lm"), ragged()
    xfast.accelerate(model, precision="fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**batch).logits.dtype == torch.bfloat16
    assert not calls


def test_reference_agrees_with_the_module(rng: np.random.Generator) -> None:
    # What the kernel tests compare with is what transformers computes.
    model = build(head="masked-lm").double()
    case, head = Case(rng, (4, 64, 101)), model.lm_head
    case.dense, case.decoder, case.dense_bias = head.dense.weight, head.decoder.weight, head.dense.bias
    case.gamma, case.beta, case.bias = head.layer_norm.weight, head.layer_norm.bias, head.decoder.bias
    assert error(case.plain(), head(case.x.double())) < 1e-12
    assert error(F.gelu(case.x.double()), reference.gelu(case.x)) < 1e-12
