"""Attention of one sequence by length, 12 heads of 64, beside torch's scaled_dot_product_attention on one thread."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xfast import _C

HEADS, HEAD_DIM = 12, 64
LENGTHS = (8, 16, 32, 64, 128, 256, 384, 512)
QUICK = pytest.mark.quick


@pytest.mark.parametrize("length", [pytest.param(n, marks=QUICK if n in (32, 384) else ()) for n in LENGTHS])
@pytest.mark.parametrize("engine", ["xfast", "xfast-int16", "torch-sdpa"])
def test_attention(benchmark, engine: str, length: int) -> None:
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((length, HEADS, HEAD_DIM), dtype=np.float32) for _ in range(3))
    if engine.startswith("xfast"):
        benchmark(_C.kernels.attention, "auto", q, k, v, HEAD_DIM**-0.5, engine == "xfast-int16")
    else:
        torch.set_num_threads(1)
        tensors = [torch.from_numpy(x).transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        benchmark(torch.nn.functional.scaled_dot_product_attention, *tensors)
    if benchmark.stats is not None:
        operations = 4 * length * length * HEADS * HEAD_DIM
        benchmark.extra_info["gflops"] = operations / benchmark.stats.stats.median / 1e9
