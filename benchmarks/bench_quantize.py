"""Quantising activations per token to int8 on one thread, beside the same in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xfast import _C

QUICK = pytest.mark.quick


def _torch_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("rows", [1, pytest.param(32, marks=QUICK), 512])
@pytest.mark.parametrize("features", [pytest.param(768, marks=QUICK), 3072])
@pytest.mark.parametrize("engine", ["xfast", "torch"])
def test_quantize(benchmark, engine: str, features: int, rows: int) -> None:
    x = np.random.default_rng(0).standard_normal((rows, features), dtype=np.float32)
    if engine == "xfast":
        benchmark(_C.kernels.quantize, "auto", x, False)  # left in the layout that products read
    else:
        torch.set_num_threads(1)
        benchmark(_torch_quantize, torch.from_numpy(x))
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = x.nbytes / benchmark.stats.stats.median / 1e9
