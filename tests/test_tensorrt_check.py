"""The judge of TensorRT engines: it accepts rounding and refuses everything else. Needs neither TensorRT nor a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch

from xfast.architecture import EncoderWeights, describe, family_of
from xfast.backends import tensorrt as backend
from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_check as judge
from xfast.backends.tensorrt_quantize import TOPS

CPU = torch.device("cpu")
SHAPES = ((1,), (9, 1, 17, 30, 2), (30,))
# all that profiles depend on: a TensorRT with an attention layer
FUSED: Any = SimpleNamespace(
    module=SimpleNamespace(
        INetworkDefinition=SimpleNamespace(add_attention_v2=None), IAttention=SimpleNamespace(key_value_lengths=None)
    )
)
WITHOUT: Any = SimpleNamespace(module=SimpleNamespace(INetworkDefinition=SimpleNamespace()))


def _weights(family: str, **changes: object) -> tuple[torch.nn.Module, EncoderWeights]:
    model = models.build(family, "base-no-pooler", **changes)
    found = family_of(model)
    assert found is not None
    return model, describe(model, found)


@pytest.mark.parametrize(
    ("family", "layers"), [*((family, 3) for family in models.ALL_FAMILIES), ("xlm-roberta-xl", 2), ("bert", 0)]
)
def test_the_reference_is_the_model(family: str, layers: int) -> None:
    model, weights = _weights(family)
    for case in judge.cases(weights.spec, SHAPES, CPU):
        ours = judge.reference(weights, case, "fp32", layers)
        parts = []
        for ids, types in zip(case.ids.split(case.lengths), case.types.split(case.lengths), strict=True):
            # positions as the family counts them: ids that happen to be the padding id must not shift them
            start = weights.spec.first_position
            positions = torch.arange(start, start + len(ids))[None]
            with torch.no_grad():
                places = {"token_type_ids": types[None].long(), "position_ids": positions}
                states = model(ids[None].long(), **places, output_hidden_states=True).hidden_states
            parts.append(states[layers][0])
        want = torch.cat(parts)
        assert torch.allclose(ours, want if case.rows is None else want[case.rows.long()], atol=4e-6)


@pytest.mark.parametrize("precision", list(judge.DTYPES))
@pytest.mark.parametrize(("family", "layers"), [("xlm-roberta", 3), ("xlm-roberta-xl", 3), ("xlm-roberta-xl", 2)])
def test_rounding_is_accepted(family: str, layers: int, precision: str) -> None:
    _, weights = _weights(family)
    report = judge.check(
        lambda case: judge.reference(weights, case, precision, layers),
        weights,
        precision,
        layers,
        judge.cases(weights.spec, SHAPES, CPU),
    )
    assert report.accepted and report.error <= report.bound and report.agreement == 1


def _swapped(x: torch.Tensor, amount: float) -> torch.Tensor:
    count = round(40 * amount)
    return torch.cat([x[:, :count].flip(1), x[:, count:]], 1)


def _nan(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(x))[:, None] == len(x) - 1, torch.nan, x)


WRONG: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "channels swapped": _swapped,
    "one token is NaN": lambda x, _: _nan(x),
    "rows shifted": lambda x, _: x.roll(1, 0),
    "scaled": lambda x, amount: (1 + amount) * x,
    "noise": lambda x, amount: x + amount * torch.randn_like(x),
}


@pytest.mark.parametrize("precision", list(judge.DTYPES))
@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_anything_else_is_refused(family: str, wrong: str, precision: str) -> None:
    _, weights = _weights(family)
    layers = weights.spec.num_layers
    amount = 0.2 if precision in TOPS else 0.05  # of what rounding 8 bits explains there is more
    with pytest.raises(judge.EngineRejectedError, match=r"refused: (NaN|relative error)") as caught:
        judge.check(
            lambda case: WRONG[wrong](judge.reference(weights, case, "fp32", layers), amount),
            weights,
            precision,
            layers,
            judge.cases(weights.spec, SHAPES, CPU),
        )
    assert not caught.value.report.accepted and caught.value.report.finite == (wrong != "one token is NaN")


@pytest.mark.parametrize("family", ["bert", "xlm-roberta-xl"])
def test_an_engine_with_a_layer_too_few_is_refused(family: str) -> None:
    _, weights = _weights(family)
    with pytest.raises(judge.EngineRejectedError):
        judge.check(
            lambda case: judge.reference(weights, case, "fp32", 2),
            weights,
            "bf16",
            3,
            judge.cases(weights.spec, SHAPES, CPU),
        )


@torch.no_grad()
@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_where_pytorch_overflows_nothing_is_allowed(family: str) -> None:
    """A product beyond fp16: PyTorch's own error there is not finite, which must not excuse an engine's."""
    model, weights = _weights(family)
    model.encoder.layer[1].output.dense.weight.mul_(1e6)
    samples = judge.cases(weights.spec, SHAPES, CPU)
    assert not all(torch.isfinite(judge.reference(weights, case, "fp16", 3)).all() for case in samples)
    with pytest.raises(judge.EngineRejectedError, match=r"relative error .* \(allowed 1.00e-03\)"):
        judge.check(lambda case: torch.ones(len(_wanted(case)), 64), weights, "fp16", 3, samples)


@torch.no_grad()
def test_a_deep_pre_norm_stream_may_exceed_fp16() -> None:
    model, weights = _weights("xlm-roberta-xl")
    for layer in model.encoder.layer:
        layer.output.dense.bias[3] = 5e4
    samples = judge.cases(weights.spec, SHAPES, CPU)
    for layers in (2, 3):
        report = judge.check(
            lambda case, layers=layers: judge.reference(weights, case, "fp16", layers), weights, "fp16", layers, samples
        )
        assert report.finite and report.bound < 5e-3
    assert float(judge.reference(weights, samples[0], "fp16", 2).abs().max()) > torch.finfo(torch.float16).max


def _wanted(case: judge.Case) -> torch.Tensor:
    return case.ids if case.rows is None else case.rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("positions", [40, 514, 8194, 32770])
def test_every_profile_is_checked_and_a_choice_of_rows(positions: int, precision: str) -> None:
    _, weights = _weights("xlm-roberta", max_position_embeddings=positions)
    profiles = backend.default_profiles(weights.spec, precision, FUSED)
    cases = judge.cases(weights.spec, backend.checked_shapes(profiles), CPU)
    sizes = [(len(case.ids), len(case.lengths), max(case.lengths)) for case in cases]
    assert {builder.choose(profiles, *size) for size in sizes} == set(range(len(profiles)))
    assert max(length for *_, length in sizes) == weights.spec.usable_positions == positions - 2
    for case in cases:
        assert int(case.positions.max()) < weights.spec.max_positions and int(case.ids.max()) < weights.spec.vocab_size
    (chosen,) = [case for case in cases if case.rows is not None]
    assert 1 < len(_wanted(chosen)) < len(chosen.ids) and sum(chosen.lengths) == len(chosen.ids)


def _largest(spec: Any, precision: str, runtime: Any) -> list[tuple[int, int]]:
    return [(each.batch[2], each.length[2]) for each in backend.default_profiles(spec, precision, runtime)]


def test_long_sequences_come_in_small_batches() -> None:
    """Attention is padded: 256 sequences of 8192 tokens would be 2 million rows, and in fp32 a terabyte of scores."""
    spec = _weights("xlm-roberta")[1].spec  # heads of 16, which the fused kernels take
    usual, long = (replace(spec, num_heads=16, head_dim=64, max_positions=positions) for positions in (514, 8194))
    everywhere = [(1, 512), (256, 32), (256, 128), (256, 512)]
    assert _largest(usual, "bf16", FUSED) == _largest(usual, "fp32", FUSED) == everywhere
    fused = [(1, 8192), (256, 32), (256, 128), (256, 512), (64, 2048), (16, 8192)]
    decomposed = [(1, 8192), (256, 32), (256, 128), (256, 512), (32, 2048), (2, 8192)]
    assert _largest(long, "bf16", FUSED) == _largest(long, "int8", FUSED) == fused
    assert _largest(long, "fp32", FUSED) == _largest(long, "bf16", WITHOUT) == decomposed
    assert _largest(replace(long, head_dim=65), "bf16", FUSED) == decomposed  # no fused kernel
    # one sequence alone has a profile already
    assert _largest(replace(long, num_heads=32), "fp32", FUSED)[-1] == (16, 2048)


def test_an_engine_that_ignores_the_rows_is_refused() -> None:
    _, weights = _weights("xlm-roberta")
    samples = judge.cases(weights.spec, SHAPES, CPU)
    with pytest.raises(judge.EngineRejectedError):
        judge.check(
            lambda case: judge.reference(weights, replace(case, rows=None), "fp32", 3)[: len(_wanted(case))],
            weights, "fp32", 3, samples,
        )  # fmt: skip


def test_settings_of_the_program_do_not_matter() -> None:
    """Its default dtype and device, and TF32 asked for in torch's newer words."""
    _, weights = _weights("xlm-roberta")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        torch.set_default_dtype(torch.bfloat16)
        matmul.fp32_precision = "tf32"
        with torch.device("meta"), judge.true_fp32():
            assert matmul.fp32_precision == "ieee"
            samples = judge.cases(weights.spec, SHAPES, CPU)
            report = judge.check(lambda c: judge.reference(weights, c, "fp32", 3), weights, "fp32", 3, samples)
        assert report.accepted and matmul.fp32_precision == "tf32"
    finally:
        torch.set_default_dtype(torch.float32)
        matmul.fp32_precision = before


def test_checks_on_several_threads_keep_the_setting() -> None:
    """It is the process's: while one compares nobody else may put it back, and in the end it is what it was."""
    matmul = torch.backends.cuda.matmul
    before, seen, entered, leave = matmul.fp32_precision, [], threading.Event(), threading.Event()

    def first() -> None:
        with judge.true_fp32():
            entered.set()
            leave.wait(10)

    def second() -> None:
        with judge.true_fp32(), judge.true_fp32():  # one inside another, too
            seen.append(first_one.is_alive() and not leave.is_set())
            first_one.join(10)
            seen.append(matmul.fp32_precision == "ieee")

    first_one, second_one = threading.Thread(target=first), threading.Thread(target=second)
    try:
        matmul.fp32_precision = "tf32"
        first_one.start()
        assert entered.wait(10)
        second_one.start()
        second_one.join(0.3)
        leave.set()
        second_one.join(10)
        assert seen == [False, True] and matmul.fp32_precision == "tf32"
    finally:
        leave.set()
        matmul.fp32_precision = before
