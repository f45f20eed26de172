"""GELU on one thread, beside torch's. In xfast it exists only fused into a product, so its cost is read off as the
difference between ``gelu`` and ``bias`` on a product with a short sum (64 values), where the epilogue weighs most.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xfast import _C

FEATURES, OUTPUTS = 64, 3072
QUICK = pytest.mark.quick


@pytest.mark.parametrize("rows", [32, pytest.param(512, marks=QUICK)])
@pytest.mark.parametrize("engine", ["xfast-gelu", "xfast-bias", "torch-gelu", "torch-linear-gelu"])
def test_gelu(benchmark, engine: str, rows: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, FEATURES), dtype=np.float32)
    weight = generator.standard_normal((OUTPUTS, FEATURES), dtype=np.float32) / 8
    bias = generator.standard_normal(OUTPUTS, dtype=np.float32)
    torch.set_num_threads(1)
    tx, tw, tb = (torch.from_numpy(array) for array in (x, weight, bias))
    gelu, linear = torch.nn.functional.gelu, torch.nn.functional.linear
    if engine.startswith("xfast"):
        benchmark(_C.kernels.Linear("fp32", weight, bias).multiply, "auto", x, engine.removeprefix("xfast-"), None)
    elif engine == "torch-gelu":
        benchmark(gelu, linear(tx, tw, tb))
    else:
        benchmark(lambda: gelu(linear(tx, tw, tb)))
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_value"] = 1e9 * benchmark.stats.stats.median / (rows * OUTPUTS)
