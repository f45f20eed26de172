"""XLM-R base with its masked-LM head: ``stock`` is torch, the others are xfast.

The decoder, 250,002 x 768 floats that are also the word embeddings, is read where it lies. Batches without padding, so
that all do the same work. ``head_ms``: what the call takes longer than its encoder alone (medians).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
import transformers

import xfast
from xfast.benchmarks.models import config_of
from xfast.benchmarks.workloads import workload

THREADS = torch.get_num_threads()  # read early: the other stems measure on one thread and leave it at that
CASES = [
    pytest.param(engine, name, marks=pytest.mark.quick if (engine, name) == ("bf16", "1x32") else ())
    for engine in ("stock", "fp32", "bf16", "int8")
    for name in ("1x8", "1x32", "1x128", "8x64")
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """One model for each engine, made when it is first asked for."""
    return {}


def _model(models: dict[str, Any], engine: str) -> Any:
    if engine not in models:
        torch.manual_seed(0)
        models[engine] = transformers.XLMRobertaForMaskedLM(config_of("base")).eval()
        if engine != "stock":
            xfast.accelerate(models[engine], precision=engine)
    return models[engine]


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_lm_head(benchmark, models: dict[str, Any], engine: str, name: str) -> None:
    model = _model(models, engine)
    ids, mask = workload(name).batches[0]
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        benchmark.pedantic(lambda: model(input_ids=ids, attention_mask=mask), warmup_rounds=2, rounds=7)
        if benchmark.stats is None:
            return
        encoded = []
        for _ in range(5):
            start = time.perf_counter()
            model.base_model(input_ids=ids, attention_mask=mask)
            encoded.append(time.perf_counter() - start)
    alone = benchmark.stats.stats.median - statistics.median(encoded)
    benchmark.extra_info.update(head_ms=1000 * alone)
