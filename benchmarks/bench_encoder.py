"""Whole forward passes of XLM-R base through ``accelerate``: one benchmark per precision and workload.

For comparisons with other engines use ``xfast bench``, which gives each engine a process of its own.
"""

from __future__ import annotations

import pytest
import torch

import xfast
from xfast.benchmarks.metrics import gflop_per_token
from xfast.benchmarks.models import random_model
from xfast.benchmarks.workloads import workload

QUICK = pytest.mark.quick
THREADS = torch.get_num_threads()  # read early: the other stems measure on one thread and leave it at that


@pytest.fixture(scope="module")
def base_model() -> torch.nn.Module:
    return random_model("base")


@pytest.mark.parametrize(
    "name", ["1x8", pytest.param("1x32", marks=QUICK), "1x128", pytest.param("mixed", marks=QUICK)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_encoder(benchmark, base_model: torch.nn.Module, precision: str, name: str) -> None:
    work = workload(name)
    torch.set_num_threads(THREADS)

    def run() -> None:
        with torch.inference_mode():
            for ids, mask in work.batches:
                base_model(input_ids=ids, attention_mask=mask)

    with xfast.accelerated(base_model, precision=precision):
        benchmark(run)
    if benchmark.stats is not None:
        rate = work.tokens / benchmark.stats.stats.median
        benchmark.extra_info.update(
            tokens_per_s=rate, gops=rate * gflop_per_token(base_model.config), padding=work.padding
        )
