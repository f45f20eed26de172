"""The model part of the GPU battery: full encoders on batches of real-world lengths, beside what people use today."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import xfast
from xfast.backends.tensorrt_runtime import find
from xfast.benchmarks.gpu_kernels import Row, mixed_lengths
from xfast.benchmarks.gpu_time import Clock, alternate, wall
from xfast.benchmarks.models import random_model

WORKLOADS = {"squad-like": (256, 177, 384), "tatoeba-like": (1024, 11, 40)}
"""Name -> sequences, mean and greatest length. MLPerf's BERT has 177 and 384 on SQuAD."""

Batch = dict[str, torch.Tensor]
COMPILE_SECONDS = 150
BUILD_SECONDS = 60


def models(clock: Clock) -> Iterator[Row]:
    """Real tokens a second, latency of one 1 x 32 batch, memory and error, by size and engine."""
    for size in ("large", "base"):
        stock: Any = random_model(size).to("cuda", torch.bfloat16)
        batches = {name: _batch(*shape) for name, shape in WORKLOADS.items()}
        engines, absent = _engines(stock)
        if absent:
            yield {"model": size, "not available": absent}
        for name, batch in batches.items():
            if clock.left > 0:
                yield {"model": size, "workload": name, **_throughput(stock, engines, batch)}
        if clock.left > 0:
            yield {"model": size, "workload": "1x32", **_latency(stock, engines)}
        del stock, engines
        torch.cuda.empty_cache()


def compiled(clock: Clock) -> Iterator[Row]:
    """XLM-R large under torch.compile beside xfast. Last, since compiling may take what time is left."""
    if clock.left < COMPILE_SECONDS:
        yield f"less than {COMPILE_SECONDS} s left"
        return
    stock: Any = random_model("large").to("cuda", torch.bfloat16)
    engines = {
        "xfast bf16": xfast.accelerate(copy.deepcopy(stock), backend="triton", precision="bf16"),
        "torch.compile bf16": torch.compile(copy.deepcopy(stock), mode="max-autotune-no-cudagraphs", dynamic=True),
    }
    for name, shape in WORKLOADS.items():
        yield {"model": "large", "workload": name, **_throughput(stock, engines, _batch(*shape))}


def tensorrt(clock: Clock) -> Iterator[Row]:
    """TensorRT beside Triton: time to build, what its check found, speed. Where it is missing, a row that says why."""
    try:
        runtime = find()
    except xfast.XfastError as error:
        yield str(error)
        return
    yield {"runtime": runtime.name, "version": runtime.version_text, "targets": list(runtime.targets())}
    for size in ("base", "large"):
        stock: Any = random_model(size).to("cuda", torch.bfloat16)
        engines = {"xfast bf16": xfast.accelerate(copy.deepcopy(stock), backend="triton", precision="bf16")}
        for precision in ("bf16", "fp8", "int8", "fp16"):
            if clock.left < BUILD_SECONDS:
                break
            model = xfast.accelerate(copy.deepcopy(stock), backend="tensorrt", precision=precision)
            started = time.perf_counter()
            _runner(model, _batch(4, 20, 32))()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            yield {"model": size, "precision": precision, "first_call_s": seconds, "explain": str(xfast.explain(model))}
            engines[f"tensorrt {precision}"] = model
        for name, shape in WORKLOADS.items():
            if clock.left > 0:
                yield {"model": size, "workload": name, **_throughput(stock, engines, _batch(*shape))}
        if clock.left > 0:
            yield {"model": size, "workload": "1x32", **_latency(stock, engines)}
        del stock, engines
        torch.cuda.empty_cache()


def _engines(stock: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Name -> model, each with its own copy of the weights, so that all live side by side; and why others are not."""
    engines, absent = {}, {}
    for precision in ("bf16", "fp16", "fp8", "int8", "int4"):
        model = copy.deepcopy(stock)
        try:
            engines[f"xfast {precision}"] = xfast.accelerate(model, backend="triton", precision=precision)
        except xfast.XfastError as error:
            absent[f"xfast {precision}"] = str(error)
    only_attention = copy.deepcopy(stock)
    only_attention.set_attn_implementation("xfast")
    engines["stock + xfast attention"] = only_attention
    return engines, absent


def _batch(sequences: int, mean: float, longest: int) -> Batch:
    lengths = torch.tensor(mixed_lengths(sequences, mean, longest), device="cuda")
    mask = torch.arange(int(lengths.max()), device="cuda") < lengths[:, None]
    ids = torch.randint(5, 250000, mask.shape, device="cuda")
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}


def _runner(model: Any, batch: Batch) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            hidden: torch.Tensor = model(**batch).last_hidden_state
            return hidden

    return run


def _that_run(
    engines: dict[str, Callable[[], torch.Tensor]],
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str]]:
    """Those that do, and what the others raised: one broken engine must not cost the others their figures."""
    good, failed = {}, {}
    for name, function in engines.items():
        try:
            for _ in range(4):  # graphs are captured when a shape comes again
                function()
            torch.cuda.synchronize()
            good[name] = function
        except Exception as error:  # noqa: PERF203
            failed[name] = f"{type(error).__name__}: {error}"[:1000]
    return good, failed


def _throughput(stock: Any, engines: dict[str, Any], batch: Batch) -> Row:
    tokens = int(batch["attention_mask"].sum())
    named = {"stock sdpa bf16": stock, **engines}
    run, failed = _that_run({name: _runner(model, batch) for name, model in named.items()})
    mask = batch["attention_mask"].bool()
    want = run["stock sdpa bf16"]()[mask].float()
    errors = {name: float((f()[mask].float() - want).norm() / want.norm()) for name, f in run.items()}
    peaks = {}
    for name, function in run.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    times = alternate(run, rounds=9)
    return {
        "tokens": tokens,
        "padding": 1 - tokens / mask.numel(),
        "tokens_s": {name: 1e3 * tokens / ms for name, ms in times.items()},
        "relative_difference_from_stock": errors,
        "activations_gib": peaks,
        "failed": failed,
    }


def _latency(stock: Any, engines: dict[str, Any]) -> Row:
    ids = torch.randint(5, 250000, (1, 32), device="cuda")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    run, failed = _that_run({n: _runner(m, batch) for n, m in {"stock sdpa bf16": stock, **engines}.items()})
    times = {name: wall(function) for name, function in run.items()}
    graphs = {n: str(xfast.explain(m)) for n, m in engines.items() if n.startswith("xfast")}
    return {
        "explain": graphs,
        "ms": {name: {"p50": t[len(t) // 2], "p95": t[int(0.95 * len(t))]} for name, t in times.items()},
        "failed": failed,
    }
