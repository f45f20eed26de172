"""The adapters: which engines there are, what a missing one needs, and that each computes what transformers does."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import make_config

from xfast.benchmarks import peers
from xfast.benchmarks.workloads import Model, batches_of, workload
from xfast.errors import InvalidOptionError

# Largest difference over the largest value: what 8 bits of mantissa and int8 ranges cost on a small model.
BOUNDS = {"fp32": 1e-5, "bf16": 3e-2, "int8": 6e-2}
COMPILED = {"torch-compile-fp32", "torchao-int8"}
SAME_CODE = {"torch-compile-bf16"}  # as torch-compile-fp32 but for the dtype, and slow


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 34}
    config = make_config("xlm-roberta", vocab_size=100, **sizes)  # eps 1e-5, which CTranslate2 takes for granted
    return transformers.XLMRobertaModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ())
        for name in peers.ENGINES
        if name not in SAME_CODE
    ],
)
@pytest.mark.filterwarnings("ignore")  # other people's packages
def test_an_engine_computes_what_transformers_computes(engine: str) -> None:
    if (pip_name := peers.missing(engine)) is not None:
        pytest.skip(f"not installed: pip install {pip_name}")
    row, model = peers.ENGINES[engine], small_model()
    if row.own_python:
        pytest.skip("runs in a Python environment of its own")
    batches = batches_of([9, 20, 3, 32, 1, 17], 3, Model.of(model.config))
    with torch.inference_mode():
        wanted = [model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy() for ids, mask in batches]
    torch.set_num_threads(1)
    adapter = importlib.import_module(f"xfast.benchmarks.{row.module}")
    calibration = workload("mixed", Model.of(model.config), seed=1).batches
    run = adapter.build(model, row.precision, threads=1, calibration=calibration, **row.options)
    for (ids, mask), want in zip(batches, wanted, strict=True):
        got = run(ids, mask)
        real = mask.numpy().astype(bool)
        assert got.dtype == np.float32 and got.shape == want.shape
        assert np.abs(got[real] - want[real]).max() <= BOUNDS[row.precision] * np.abs(want[real]).max()


def test_a_missing_engine_is_named_by_its_pip_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = {"openvino", "nncf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    assert peers.missing("openvino-int8") == "openvino nncf"
    assert peers.missing("openvino-fp32") == "openvino"
    assert peers.missing("transformers-fp32") is None


def test_every_engine_has_a_precision_and_a_builder() -> None:
    assert peers.REFERENCE in peers.ENGINES
    for name, engine in peers.ENGINES.items():
        assert name == f"{engine.family}-{engine.precision}"
        assert engine.precision in peers.PRECISIONS
        assert importlib.util.find_spec(f"xfast.benchmarks.{engine.module}") is not None
        assert engine.packages


@pytest.mark.parametrize(
    ("wanted", "precisions", "found"),
    [
        ("none", ["int8", "fp32"], ["xfast-fp32", "xfast-int8"]),
        ("ctranslate2", ["int8"], ["xfast-int8", "ctranslate2-int8"]),
        ("openvino, ctranslate2", ["fp32"], ["xfast-fp32", "openvino-fp32", "ctranslate2-fp32"]),
        ("transformers-fp32", ["int8"], ["xfast-int8", "transformers-fp32"]),
        ("all", ["bf16"], [n for n in peers.ENGINES if n.endswith("bf16")]),
        ("all", peers.PRECISIONS, list(peers.ENGINES)),
    ],
)
def test_choose(wanted: str, precisions: Any, found: list[str]) -> None:
    assert peers.choose(wanted, precisions) == found


@pytest.mark.parametrize(
    ("wanted", "precision"),
    [
        *[("tensorrt", "int8"), ("", "int8"), ("all", "int4"), ("all", "")],
        *[("transformers", "int8"), ("openvino,ctranslate2", "bf16")],
    ],
)
def test_names_that_are_not_accepted(wanted: str, precision: str) -> None:
    with pytest.raises(InvalidOptionError, match="accepted: "):
        peers.choose(wanted, [precision])
