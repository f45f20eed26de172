"""``accelerate(model, backend="tensorrt")`` without a GPU: everything but the device's own run is the real thing.

The network is the one that would be built; in place of an engine, the tests' interpreter evaluates it. Padding is
dropped by the Triton kernels in their interpreter.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import DEVICE, NO_NUMPY_WARNINGS, Captures
from models import (
    FAMILIES,
    HEADS,
    alt_clip,
    arguments,
    at_tokens,
    build,
    fallbacks,
    left_padded,
    norm_error,
    quick_settings,
    ragged,
)

import xfast
from xfast.architecture import describe, find_encoders
from xfast.backends import cuda_graphs, tensorrt_graphs
from xfast.backends import tensorrt as backend
from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_check as judge
from xfast.backends import tensorrt_network as networks
from xfast.backends.tensorrt_graphs import GraphRunner
from xfast.backends.tensorrt_inputs import places
from xfast.errors import BackendUnavailableError, InvalidOptionError, InvalidWeightsError

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT: pip install tensorrt-rtx-cu13")
pytestmark = NO_NUMPY_WARNINGS
_settings = pytest.fixture(autouse=True)(quick_settings)

LAYERS = 2


class Simulated:
    """Stands in for a loaded engine."""

    device = DEVICE

    def __init__(self, weights: Any, precision: str, layers: int) -> None:
        from tensorrt_interpreter import Interpreter

        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.kept = builder, network, networks.build_network(trt, network, weights, precision, layers)
        self.interpreter = Interpreter(trt, network, self.kept[2])

    def run(self, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in inputs.values())
        assert inputs.keys() == networks.INPUTS.keys() and profile >= 0
        outputs = self.interpreter({name: value.cpu() for name, value in inputs.items()})
        return outputs[networks.OUTPUT].to(DEVICE)

    def recorded(self, inputs: dict[str, torch.Tensor], profile: int) -> Callable[[], torch.Tensor]:
        return lambda: self.run(inputs, profile)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Engines that were made, as (precision, layers)."""
    made: list[tuple[str, int]] = []

    def make(self: backend.TensorRTEngine, layers: int) -> Any:
        made.append((self.precision, layers))
        runner = GraphRunner(Simulated(self._weights, self.precision, layers), self.profiles)
        self._notes.append(f"simulated, {self._check(runner, layers)}")
        return runner

    monkeypatch.setattr(backend.TensorRTEngine, "_made", make)
    monkeypatch.setattr(
        backend.TensorRTBackend,
        "supports",
        lambda self, spec, device, precision, recipe=None: networks.refusal(spec, precision),
    )
    return made


def _model(family: str = "xlm-roberta", head: str = "base", **changes: Any) -> Any:
    return build(family, head, **{"num_hidden_layers": LAYERS, **changes}).to(DEVICE)


def _moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def _same(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor, limit: float = 1e-5) -> None:
    if got.shape[: mask.dim()] == mask.shape:
        got, want = at_tokens(got, mask), at_tokens(want, mask)
    assert norm_error(got, want) <= limit


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *((family, head) for family in ("xlm-roberta", "xlm-roberta-xl") for head in HEADS),
        *((family, "base") for family in FAMILIES[1:]),
    ],
)
def test_every_head_and_family(family: str, head: str, simulated: list[tuple[str, int]]) -> None:
    model = _model(family, head)
    batch = _moved(arguments(family, head))
    want = model(**batch)[0]
    fast = xfast.accelerate(model, backend="tensorrt")
    got = fast(**batch)[0]
    _same(got, want, batch["attention_mask"])
    assert simulated == [("fp32", LAYERS)]
    text = str(xfast.explain(fast))
    assert "tensorrt" in text and "relative error" in text
    xfast.restore(fast)
    assert torch.equal(fast(**batch)[0], want)


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_holes_left_padding_and_empty_sequences(family: str, simulated: list[tuple[str, int]]) -> None:
    model = _model(family, "base-no-pooler")
    batch = _moved(ragged("xlm-roberta"))
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][0, 3:5] = 0
    empty = {**batch, "attention_mask": batch["attention_mask"].clone()}
    empty["attention_mask"][1] = 0
    for case in (holes, empty, left_padded(batch)):
        xfast.restore(model)
        want = model(**case)[0]
        got = xfast.accelerate(model, backend="tensorrt")(**case)[0]
        _same(got, want, case["attention_mask"])
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_layers_rows_and_precisions(family: str, simulated: list[tuple[str, int]]) -> None:
    model = _model(family, "sequence-classification")
    batch = _moved(ragged("xlm-roberta"))
    want = model(**batch).logits
    for precision, limit in (("fp16", 5e-3), ("bf16", 5e-2), ("int8", 5e-2), ("fp8", 0.12)):
        got = xfast.accelerate(model, backend="tensorrt", precision=precision)(**batch).logits
        assert got.dtype == want.dtype and norm_error(got, want) < limit
    bare = _model(family, "base-no-pooler")
    states = bare(**batch, output_hidden_states=True).hidden_states
    got = xfast.accelerate(bare, backend="tensorrt", layers=1)(**batch).last_hidden_state
    _same(got, states[1], batch["attention_mask"])
    assert simulated == [*((precision, LAYERS) for precision in ("fp16", "bf16", "int8", "fp8")), ("fp32", 1)]


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 4e-2)])
def test_altclips_text_tower(precision: str, limit: float, simulated: list[tuple[str, int]]) -> None:
    model, batch = alt_clip().to(DEVICE), _moved(ragged("xlm-roberta"))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    want = model(**batch, pixel_values=pixels)
    got = xfast.accelerate(model, backend="tensorrt", precision=precision)(**batch, pixel_values=pixels)
    for name in ("logits_per_text", "logits_per_image", "text_embeds"):
        assert norm_error(got[name], want[name]) <= limit
    assert torch.equal(got.image_embeds, want.image_embeds)
    assert simulated == [(precision, 3)] and fallbacks(model) == {}
    xfast.restore(model)
    assert torch.equal(model(**batch, pixel_values=pixels).logits_per_text, want.logits_per_text)


def test_graphs_of_enlarged_batches(simulated: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The network on padding of every kind that a graph's sizes add, tokens, sequences, columns and rows."""
    monkeypatch.setattr(cuda_graphs, "MEETINGS_BEFORE_CAPTURE", 0)
    monkeypatch.setattr(tensorrt_graphs, "capture_on", lambda _: Captures())
    for head in ("base-no-pooler", "sequence-classification"):
        model, stock = _model(head=head), _model(head=head)
        fast = xfast.accelerate(model, backend="tensorrt")
        for seed, lengths in enumerate([(9, 1, 17), (17, 2, 16), (3,), (12, 11, 13), (38, 1)]):
            batch = _moved(ragged("xlm-roberta", lengths, seed=seed))
            _same(fast(**batch)[0], stock(**batch)[0], batch["attention_mask"])
        text = str(xfast.explain(fast))
        assert "captured, token buckets 16, 32, 64" in text and "no graph" not in text


def test_what_an_engine_cannot_do_runs_the_original(simulated: list[tuple[str, int]]) -> None:
    model = _model(head="base-no-pooler")
    batch = _moved(ragged("xlm-roberta"))
    states = model(**batch, output_hidden_states=True).hidden_states
    embeds = model.embeddings.word_embeddings(batch["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    want = model(**given)[0]
    fast = xfast.accelerate(model, backend="tensorrt")
    assert all(
        torch.equal(a, b) for a, b in zip(fast(**batch, output_hidden_states=True).hidden_states, states, strict=True)
    )
    assert torch.equal(fast(**given)[0], want)
    text = str(xfast.explain(fast))
    assert "hidden states were asked for" in text and "inputs_embeds were given" in text and not simulated


@pytest.mark.parametrize("head", ["base-no-pooler", "sequence-classification", "token-classification"])
@pytest.mark.parametrize("limits", [(2, 38), (3, 50), (256, 40)])
def test_a_batch_larger_than_the_profiles_runs_in_parts(
    limits: tuple[int, int], head: str, simulated: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MAX_BATCH", limits[0])
    monkeypatch.setattr(backend, "MAX_TOKENS", limits[1])
    model = _model(head=head)
    batch = _moved(ragged("xlm-roberta", (9, 1, 17, 33, 2, 38, 5)))
    if head != "sequence-classification":  # whose first token has to be there
        batch["attention_mask"][4] = 0
    want = model(**batch)[0]
    fast = xfast.accelerate(model, backend="tensorrt")
    got = fast(**batch)[0]
    _same(got, want, batch["attention_mask"])
    assert fallbacks(fast) == {} and simulated


def test_a_long_text_does_not_pad_many_short_ones(
    simulated: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MAX_PADDED_AREA", 76)
    areas, run = [], Simulated.run

    def measured(self: Simulated, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        areas.append(inputs["padded_rows"].numel())
        return run(self, inputs, profile)

    monkeypatch.setattr(Simulated, "run", measured)
    model = _model(head="base-no-pooler")
    batch = _moved(ragged("xlm-roberta", (38, 3, 2, 5, 1, 4)))
    want = model(**batch)[0]
    fast = xfast.accelerate(model, backend="tensorrt")
    _same(fast(**batch)[0], want, batch["attention_mask"])
    assert fallbacks(fast) == {} and max(areas) <= 76 and areas[-3:] == [2 * 38, 2 * 5, 2 * 4]


def test_what_fails_while_it_runs_is_left_to_the_original(
    simulated: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(head="base-no-pooler")
    batch = _moved(ragged("xlm-roberta"))
    want = model(**batch)[0]
    fast = xfast.accelerate(model, backend="tensorrt")
    fast(**batch)
    for error in (BackendUnavailableError("no memory for a context"), torch.OutOfMemoryError("CUDA out of memory")):
        with monkeypatch.context() as patch:
            patch.setattr(GraphRunner, "run", lambda *_, error=error: _raise(error))
            assert torch.equal(fast(**batch)[0], want)
        assert f"TensorRT: {error}" in str(xfast.explain(fast))
    assert len(simulated) == 1


def _raise(error: Exception) -> Any:
    raise error


def test_weights_without_values_are_refused_at_once(simulated: list[tuple[str, int]]) -> None:
    model = _model(head="base-no-pooler")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(InvalidWeightsError, match=r"layer\.1\.output\.dense\.weight holds NaN"):
        xfast.accelerate(model, backend="tensorrt")


def test_a_refused_engine_is_not_built_again(simulated: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(*_: Any) -> None:
        tries.append(1)
        raise judge.EngineRejectedError(judge.Report(0.5, 0.01, 0.3, True))

    monkeypatch.setattr(backend.TensorRTEngine, "_check", refuse)
    model = _model(head="base-no-pooler")
    batch = _moved(ragged("xlm-roberta"))
    want = model(**batch)[0]
    fast = xfast.accelerate(model, backend="tensorrt")
    with pytest.warns(UserWarning, match=r"TensorRT: the engine was refused: .*; the original code runs"):
        assert torch.equal(fast(**batch)[0], want)
    for _ in range(2):  # said once: another warning would be an error here
        assert torch.equal(fast(**batch)[0], want)
    assert len(tries) == 1 and "relative error 5.00e-01 (allowed 1.00e-02)" in str(xfast.explain(fast))


def test_changed_weights_make_another_engine(simulated: list[tuple[str, int]]) -> None:
    model = _model(head="base-no-pooler")
    batch = _moved(ragged("xlm-roberta"))
    fast = xfast.accelerate(model, backend="tensorrt")
    before = fast(**batch)[0]
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    after = fast(**batch)[0]
    xfast.restore(model)
    _same(after, model(**batch)[0], batch["attention_mask"])
    assert norm_error(before, after) > 1e-3 and len(simulated) == 2


def test_auto_goes_on_where_a_precision_cannot_run(
    simulated: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = backend.TensorRTEngine._made

    def failing(self: backend.TensorRTEngine, layers: int) -> Any:
        if self.precision == "fp8":
            raise builder.EngineBuildError("no engine was built", ["HW-specific datatypes: fp8_e4m3"])
        return make(self, layers)

    monkeypatch.setattr(backend.TensorRTEngine, "_made", failing)
    batch = _moved(ragged("xlm-roberta"))
    model = _model(head="base-no-pooler")
    fast = xfast.accelerate(model, backend="tensorrt", precision="auto", calibration=[batch], tolerance=0.1)
    text = str(xfast.explain(fast))
    assert "auto: fp8 cannot run the calibration batches: TensorRT: no engine was built" in text
    assert xfast.explain(fast).encoders[0].precision == "int8" and [made for made, _ in simulated] == ["int8"]


@pytest.mark.parametrize(("capability", "precision", "fine"), [(86, "fp8", 0), (86, "int8", 1), (89, "fp8", 1)])
def test_fp8_needs_a_gpu_that_has_it(
    capability: int, precision: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    spec = describe(*find_encoders(_model())[0][1:]).spec
    reason = backend.TensorRTBackend().supports(spec, torch.device("cuda"), precision)
    assert reason == (None if fine else "Some GPU has compute capability 8.6; fp8 needs 8.9 or later")


def test_places_by_brute_force() -> None:
    for lengths in ((1,), (3, 1, 4), (2, 0, 5), (7, 7)):
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        total, longest = sum(lengths), max(lengths)
        made = places(offsets, total, longest)
        token = 0
        for row, count in enumerate(lengths):
            for column in range(longest):
                inside = column < count
                assert made["padded_rows"][row, column] == (token if inside else 0)
                if inside:
                    assert made["packed_columns"][token] == row * longest + column
                    token += 1
            assert made["lengths"][row] == max(count, 1)
        assert {value.dtype for value in made.values()} == {torch.int32}


@pytest.mark.skipif(
    not torch.cuda.is_available() or "played_cuda" in sys.modules, reason="needs a GPU; none has run an engine yet"
)
@pytest.mark.parametrize(
    ("precision", "limit"), [("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 5e-2), ("int8", 5e-2), ("fp8", 0.12)]
)
@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_a_real_engine_on_a_gpu(
    family: str, precision: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, checked, run, stored; then found in the store."""
    monkeypatch.setenv("XFAST_CACHE", str(tmp_path))
    batch = _moved(ragged("xlm-roberta"))
    for origin in ("built", "from the cache"):
        model = _model(family, "base-no-pooler")
        want = model(**batch)[0]
        got = xfast.accelerate(model, backend="tensorrt", precision=precision)(**batch)[0]
        _same(got.float(), want, batch["attention_mask"], limit)
        assert f"engine of {LAYERS} layers: {origin}" in str(xfast.explain(model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_reasons_without_a_gpu() -> None:
    model = build("xlm-roberta", "base")
    with pytest.raises(BackendUnavailableError, match=r"tensorrt: the model is on cpu"):
        xfast.accelerate(model, backend="tensorrt")
    with pytest.raises(InvalidOptionError, match=r"keep_weights: False is not accepted with backend"):
        xfast.accelerate(model, backend="tensorrt", keep_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xfast.accelerate(model)  # auto takes the native backend and says nothing
    assert "native" in str(xfast.explain(model))
