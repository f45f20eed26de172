"""Whole forward passes of XLM-R base through ``accelerate``: one benchmark per precision and workload.

For comparisons with other engines use ``benchmarks/compare.py``, which gives each engine a process of its own.
"""

from __future__ import annotations

import peers
import pytest
import torch
import workloads

import xfast


@pytest.fixture(scope="module")
def base_model() -> torch.nn.Module:
    return peers.make_model("base")


@pytest.mark.parametrize("workload", ["1x8", "1x32", "1x128", "mixed"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_encoder(benchmark, base_model: torch.nn.Module, precision: str, workload: str) -> None:
    work = workloads.workload(workload)

    def run() -> None:
        with torch.inference_mode():
            for ids, mask in work.batches:
                base_model(input_ids=ids, attention_mask=mask)

    with xfast.accelerated(base_model, precision=precision):
        benchmark(run)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_s"] = work.tokens / benchmark.stats.stats.median
        benchmark.extra_info["padding"] = work.padding
