"""Conditions in artifacts, quantisation and the GPU backends of which each has one test that notices when it goes.

Found by leaving them out one at a time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import build, quick_settings, ragged

import xfast
from xfast import artifact, plan, quantization
from xfast.architecture import describe, find_encoders
from xfast.backends import tensorrt, tensorrt_check, tensorrt_graphs, tensorrt_inputs, tensorrt_store
from xfast.backends.tensorrt_build import Profile
from xfast.backends.triton_graphs import GraphCache
from xfast.calibration import Inputs
from xfast.recipe import LINEARS, LinearFormat

_settings = pytest.fixture(autouse=True)(quick_settings)


# --- artifacts and quantisation -------------------------------------------------------------------------------------


def test_a_recipe_that_smooths_floats_is_refused() -> None:
    chosen = {"precision": "fp32", "group_size": 64, "smoothed": True}
    with pytest.raises(xfast.ArtifactError, match="is not accepted"):
        artifact.formats_of(SimpleNamespace(precision="fp32", recipe={"0.qkv": chosen}), 1)


def test_tensors_in_another_order_are_refused(tmp_path: Path) -> None:
    xfast.save(xfast.accelerate(build(), precision="int8"), tmp_path / "a")
    reader, name = artifact.Reader(tmp_path / "a", "size"), artifact.layer_file(0)
    _, shapes = reader.tensors(name, None)
    with pytest.raises(xfast.ArtifactError, match="holds other tensors"):
        reader.tensors(name, dict(reversed(shapes.items())))


def test_strengths_that_are_named_are_all_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def calibrated(*_: Any, gains: bool) -> dict[Any, Any]:
        seen.append(gains)
        return {}

    monkeypatch.setattr(quantization, "_calibrated", calibrated)
    for strength in (None, 0.5):
        quantization.smooth(build(), calibration=[ragged()], strength=strength)
    assert seen == [True, False]


def test_divisors_that_hardly_help_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = SimpleNamespace(weight=lambda *_: torch.ones(4, 4)), Inputs(torch.ones(4), torch.ones(2, 4))
    for divided, chosen in ((1.02, False), (0.97, False), (0.9, True)):

        class Fixed:
            error = divided

            def __init__(self, *_: Any) -> None:
                pass

            def errors(self, each: LinearFormat) -> torch.Tensor:
                return torch.tensor([1.0 if each.divisor is None else self.error])

        monkeypatch.setattr(quantization, "Simulation", Fixed)
        best = quantization._best(target, (0, "ffn_out"), inputs, LinearFormat("int8"), [0.5], False)
        assert (best.divisor is not None) == chosen


def test_each_kind_of_product_must_improve_on_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1.0, 0.5, 0.8, 0.8, 0.8])
    trials = SimpleNamespace(pack=lambda formats: None, error=lambda formats: next(errors))
    divided = LinearFormat("int8", divisor=np.ones(4, np.float32))
    monkeypatch.setattr(quantization, "_best", lambda *_: divided)
    found = dict.fromkeys((0, name) for name in LINEARS)
    formats = quantization._calibrated(None, found, LinearFormat("int8"), [0.5], trials)
    assert [key for key, each in formats.items() if each.divisor is not None] == [(0, "qkv")]


# --- TensorRT -------------------------------------------------------------------------------------------------------


def test_a_single_row_may_be_wanted_of_a_profile_of_many() -> None:
    assert Profile((4, 8, 16), (1, 2, 4), (4, 4, 4)).sizes("R") == (1, 8, 16)


def test_a_smaller_batch_leaves_no_lengths_of_a_larger_one() -> None:
    buffers = tensorrt_graphs.buffers_of(tensorrt_graphs.Key(16, 4, 8, 16, 0), torch.device("cpu"))

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        names = ("token_ids", "position_ids", "type_ids", "rows", "packed_columns")
        ones = dict.fromkeys(names, torch.ones(batch * length, dtype=torch.int32))
        padded = torch.zeros(batch, length, dtype=torch.int32)
        return {**ones, "padded_rows": padded, "lengths": torch.full((batch,), length, dtype=torch.int32)}

    tensorrt_graphs.fill(buffers, inputs(4, 4))
    tensorrt_graphs.fill(buffers, inputs(2, 3))
    assert buffers["lengths"].tolist() == [3, 3, 1, 1]


def test_parts_after_a_long_sequence_are_as_large_as_they_may_be() -> None:
    def fits(tokens: int, batch: int, longest: int) -> bool:
        return batch * longest <= 150

    assert list(tensorrt_inputs._ends([0, 100, 101, 102, 103], fits)) == [1, 4]


def test_engines_are_checked_outside_the_callers_autocast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build("xlm-roberta", "base-no-pooler", num_hidden_layers=1)
    _, *encoder = find_encoders(model)[0]
    made = tensorrt.TensorRTEngine(describe(*encoder), "bf16", tensorrt_store.Store(tmp_path))
    seen = []

    def check(*_: Any) -> tensorrt_check.Report:
        seen.append(torch.is_autocast_enabled("cpu"))
        return tensorrt_check.Report(0.0, 0.01, 1.0, True)

    monkeypatch.setattr(tensorrt_check, "check", check)
    with torch.autocast("cpu", torch.bfloat16):
        made._check(SimpleNamespace(bound=None), 1)
    assert seen == [False]


def test_a_batch_beyond_its_own_bound_counts_whatever_others_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    own, found = {(4,): 0.1, (8,): 0.0}, {(4,): 1.05, (8,): 1.02}

    def reference(_: Any, case: tensorrt_check.Case, precision: str, layers: int) -> torch.Tensor:
        return torch.ones(sum(case.lengths), 16) * (1 if precision == "fp32" else 1 + own[case.lengths])

    def engine(case: tensorrt_check.Case) -> torch.Tensor:
        return torch.ones(sum(case.lengths), 16) * found[case.lengths]

    monkeypatch.setattr(tensorrt_check, "reference", reference)
    samples = [tensorrt_check.Case(*[torch.zeros(sum(each), dtype=torch.int32)] * 3, each) for each in own]
    weights = SimpleNamespace(spec=SimpleNamespace(hidden_size=16))
    with pytest.raises(tensorrt_check.EngineRejectedError):
        tensorrt_check.check(engine, weights, "bf16", 1, samples)


# --- Triton ---------------------------------------------------------------------------------------------------------


def test_more_sequences_than_a_buckets_tokens_have_no_graph() -> None:
    cache = GraphCache.__new__(GraphCache)
    cache._forward = SimpleNamespace(plan=lambda longest, batch: (None, False))
    packed = SimpleNamespace(total_tokens=2, batch=600, max_seqlen=1)
    assert cache._key(packed, None, 1) is None


def test_a_copy_of_a_freed_model_reads_its_own_words() -> None:
    models = pytest.importorskip("triton_models", exc_type=ImportError)
    model = models.fast(models.model_of(num_hidden_layers=1), keep_weights=False)
    batch = models.moved(ragged(lengths=(3, 2)))
    want, twin = models.first_output(model, batch), copy.deepcopy(model)
    assert torch.equal(models.first_output(twin, batch), want)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(3)
    assert torch.equal(models.first_output(twin, batch), want)


def test_auto_keeps_bf16_where_few_products_can_be_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("triton_models", exc_type=ImportError)

    def one_alone(found: Any) -> dict[Any, LinearFormat]:
        return {key: LinearFormat("bf16" if i else "fp8") for i, key in enumerate(found)}

    monkeypatch.setattr(plan, "formats_of", one_alone)
    batch = models.moved(ragged(lengths=(5, 2)))
    model = models.fast(models.model_of(num_hidden_layers=1), precision="auto", calibration=[batch], tolerance=2.5e-2)
    text = str(xfast.explain(model))
    assert "auto: bf16 error" in text and "instead" not in text


def test_a_mixture_that_no_longer_does_is_searched_again() -> None:
    models = pytest.importorskip("triton_models", exc_type=ImportError)
    batch = models.moved(ragged(lengths=(5, 2)))
    model = models.fast(models.model_of(num_hidden_layers=1), precision="auto", calibration=[batch], tolerance=2.5e-2)
    model.__dict__["forward"].plan._mixture = {(0, name): LinearFormat("fp8") for name in LINEARS}
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.mul_(1.0001)
    models.first_output(model, batch)
    assert "fp8 in 4 of 4" not in str(xfast.explain(model))
