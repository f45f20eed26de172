"""Matrix products on the shapes of XLM-R base and large on one thread, beside torch (oneDNN).

    pytest benchmarks/bench_gemm.py --benchmark-only --benchmark-group-by=param:shape,param:rows

``extra_info``: ``gops`` (2 * rows * in * out operations over the median time, in 1e9/s), ``ceiling_percent`` (of the
register-only loop of the same instruction, timed right before), and for xfast ``x_torch`` (torch's time over ours, on
the same operands; int8 is compared with torch's bf16).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from xfast import _C
from xfast.machine import ceiling

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
ROWS = (1, 8, 32, 128, 512, 3072)
CEILING_SECONDS = 0.05
QUICK_SHAPES, QUICK_ROWS = ("base-ffn-in", "base-ffn-out"), (1, 32, 512)
CASES = [
    pytest.param(
        shape,
        rows,
        marks=pytest.mark.quick if shape in QUICK_SHAPES and rows in QUICK_ROWS else (),
        id=f"{shape}-{rows}",
    )
    for shape in SHAPES
    for rows in ROWS
]


def _torch(x: np.ndarray, weight: np.ndarray, precision: str) -> Callable[[], torch.Tensor]:
    torch.set_num_threads(1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tx, tw = torch.from_numpy(x).to(dtype), torch.from_numpy(weight).to(dtype)
    return lambda: torch.nn.functional.linear(tx, tw)


def _median(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


@pytest.mark.parametrize(("shape", "rows"), CASES)
@pytest.mark.parametrize("engine", ["xfast-fp32", "xfast-bf16", "xfast-int8", "torch-fp32", "torch-bf16"])
def test_gemm(benchmark, engine: str, shape: str, rows: int) -> None:
    features, outputs = SHAPES[shape]
    library, precision = engine.split("-")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, features), dtype=np.float32)
    weight = generator.standard_normal((outputs, features), dtype=np.float32)
    top = ceiling(precision, 1, seconds=CEILING_SECONDS)
    rival = _torch(x, weight, precision)
    if library == "torch":
        benchmark(rival)
    else:
        linear = _C.kernels.Linear(precision, weight, None)
        benchmark(linear.multiply, "auto", x, "bias", None)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        gops = 2 * rows * features * outputs / median / 1e9
        benchmark.extra_info.update(gops=gops, ceiling_percent=100 * gops / top)
        if library == "xfast":
            rival()
            benchmark.extra_info["x_torch"] = _median(rival) / median
