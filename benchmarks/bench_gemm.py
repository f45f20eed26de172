"""Matrix products on the shapes of XLM-R base and large, beside torch (oneDNN) on one thread.

    pytest benchmarks/bench_gemm.py --benchmark-only --benchmark-group-by=param:shape,param:rows

``extra_info.gops`` is 2 * rows * in * out operations over the median time, in 1e9/s.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xfast import _C

SHAPES = {  # (in, out): QKV, attention output, FFN in, FFN out
    "base-qkv": (768, 2304),
    "base-out": (768, 768),
    "base-ffn-in": (768, 3072),
    "base-ffn-out": (3072, 768),
    "large-qkv": (1024, 3072),
    "large-out": (1024, 1024),
    "large-ffn-in": (1024, 4096),
    "large-ffn-out": (4096, 1024),
}


@pytest.mark.parametrize("rows", [1, 8, 32, 128, 512])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["xfast-fp32", "xfast-bf16", "xfast-int8", "torch-fp32"])
def test_gemm(benchmark, engine: str, shape: str, rows: int) -> None:
    features, outputs = SHAPES[shape]
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, features), dtype=np.float32)
    weight = generator.standard_normal((outputs, features), dtype=np.float32)
    if engine == "torch-fp32":
        torch.set_num_threads(1)
        tx, tw = torch.from_numpy(x), torch.from_numpy(weight)
        benchmark(torch.nn.functional.linear, tx, tw)
    else:
        linear = _C.kernels.Linear(engine.removeprefix("xfast-"), weight, None)
        benchmark(linear.multiply, "auto", x, "bias", None)
    if benchmark.stats is not None:
        benchmark.extra_info["gops"] = 2 * rows * features * outputs / benchmark.stats.stats.median / 1e9
