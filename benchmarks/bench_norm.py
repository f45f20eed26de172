"""LayerNorm of [tokens, hidden] on one thread, beside torch's. xfast's figure includes one copy of its input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xfast import _C

EPS = 1e-5
QUICK = pytest.mark.quick


@pytest.mark.parametrize("rows", [1, pytest.param(32, marks=QUICK), 512, pytest.param(3072, marks=QUICK)])
@pytest.mark.parametrize("hidden", [pytest.param(768, marks=QUICK), 1024])
@pytest.mark.parametrize("engine", ["xfast", "torch"])
def test_layer_norm(benchmark, engine: str, hidden: int, rows: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, hidden), dtype=np.float32)
    gamma, beta = (generator.standard_normal(hidden, dtype=np.float32) for _ in range(2))
    if engine == "xfast":
        benchmark(_C.kernels.layer_norm, "auto", x, gamma, beta, EPS)
    else:
        torch.set_num_threads(1)
        tx, tg, tb = (torch.from_numpy(array) for array in (x, gamma, beta))
        benchmark(torch.nn.functional.layer_norm, tx, (hidden,), tg, tb, EPS)
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = 2 * x.nbytes / benchmark.stats.stats.median / 1e9
