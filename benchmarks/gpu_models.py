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
from xfast.benchmarks.gpu_time import Clock, alternate, attempt, that_run, wall
from xfast.benchmarks.models import random_model

WORKLOADS = {"squad-like": (256, 177, 384), "tatoeba-like": (1024, 11, 40)}
"""Name -> sequences, mean and greatest length. MLPerf's BERT has 177 and 384 on SQuAD."""

Batch = dict[str, torch.Tensor]
STOCK = "stock sdpa bf16"
LIMITS = {"bf16": 0.05, "fp16": 0.05, "int8": 0.3, "fp8": 0.3, "int4": 0.5}
"""Largest relative difference from stock in bf16, by the end of an engine's name: of random weights, and far from the
1.4 of numbers that have nothing to do with it. How exact each precision is, the tests say."""
VOCABULARY, ROUNDS = 250000, 9
COMPILE_SECONDS = 150
BUILD_SECONDS = 60


def models(clock: Clock, size: str) -> Iterator[Row]:
    """Real tokens a second, latency of one 1 x 32 batch, memory and error, by engine."""
    stock: Any = random_model(size).to("cuda", torch.bfloat16)
    engines, absent = _engines(stock)
    if absent:
        yield {"model": size, "not available": absent}
    if clock.left > 0:
        yield _latency(size, stock, engines)
    for name in WORKLOADS:
        if clock.left > 0:
            yield _throughput(size, name, stock, engines)


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
    for name in WORKLOADS:
        yield _throughput("large", name, stock, engines)


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
            try:
                model = xfast.accelerate(copy.deepcopy(stock), backend="tensorrt", precision=precision)
            except xfast.XfastError as error:  # fp8 on a card without: the others are measured all the same
                yield {"model": size, "precision": precision, "failed": {f"tensorrt {precision}": str(error)}}
                continue
            name = f"tensorrt {precision}"
            row = attempt({"model": size, "precision": precision}, lambda: _first_call(name, model))  # noqa: B023
            yield row
            if not row["failed"]:
                engines[name] = model
        for name in WORKLOADS:
            if clock.left > 0:
                yield _throughput(size, name, stock, engines)
        if clock.left > 0:
            yield _latency(size, stock, engines)
        del stock, engines
        torch.cuda.empty_cache()


def _first_call(name: str, model: Any) -> Row:
    """Builds the engine, or finds it."""
    started = time.perf_counter()
    _runner(model, _batch(4, 20, 32))()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    explained = xfast.explain(model)
    failed = dict.fromkeys([name] if explained.fallbacks else [], "; ".join(explained.fallbacks))
    return {"first_call_s": seconds, "explain": str(explained), "failed": failed}


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
    ids = torch.randint(5, VOCABULARY, mask.shape, device="cuda")
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}


def _runner(model: Any, batch: Batch) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            hidden: torch.Tensor = model(**batch).last_hidden_state
            return hidden

    return run


def _that_run(
    stock: Any, engines: dict[str, Any], batch: Batch
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str]]:
    """Runners of stock and the engines that run, and why others do not, or ran the original code in their place."""
    named = {STOCK: stock, **engines}
    run, failed = that_run({name: _runner(model, batch) for name, model in named.items()})
    return run, failed | {name: reason for name in run for reason in xfast.explain(named[name]).fallbacks}


def _without_graphs(engines: dict[str, Any]) -> dict[str, str]:
    """Engines that could not capture a shape, and why: their time is that of launches."""
    said = {name: str(xfast.explain(model)).splitlines() for name, model in engines.items()}
    return {f"{name}, graph": line.strip() for name, lines in said.items() for line in lines if "no graph for" in line}


def _wrong(errors: dict[str, float]) -> dict[str, str]:
    """Engines that differ from stock by more than their precision explains."""
    limits = {
        name: next((limit for key, limit in LIMITS.items() if name.endswith(key)), LIMITS["bf16"]) for name in errors
    }
    return {
        name: f"relative difference from stock {error:.2g}, limit {limits[name]}"
        for name, error in errors.items()
        if not error <= limits[name]
    }


def _throughput(size: str, workload: str, stock: Any, engines: dict[str, Any]) -> Row:
    about = {"model": size, "workload": workload}
    return attempt(about, lambda: _tokens_a_second(stock, engines, _batch(*WORKLOADS[workload])))


def _tokens_a_second(stock: Any, engines: dict[str, Any], batch: Batch) -> Row:
    tokens = int(batch["attention_mask"].sum())
    run, failed = _that_run(stock, engines, batch)
    if STOCK not in run:
        return {"tokens": tokens, "failed": failed}
    mask = batch["attention_mask"].bool()
    errors = _differences(run, mask)
    peaks = {}
    for name, function in run.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    times = alternate(run, rounds=ROUNDS)
    return {
        "tokens": tokens,
        "padding": 1 - tokens / mask.numel(),
        "tokens_s": {name: 1e3 * tokens / ms for name, ms in times.items()},
        "relative_difference_from_stock": errors,
        "activations_gib": peaks,
        "failed": {**failed, **_wrong(errors), **_without_graphs(engines)},
    }


def _differences(run: dict[str, Callable[[], torch.Tensor]], mask: torch.Tensor) -> dict[str, float]:
    """Relative difference of each one's hidden states at real tokens from stock's."""
    want = run[STOCK]()[mask].float()
    return {name: float((function()[mask].float() - want).norm() / want.norm()) for name, function in run.items()}


def _latency(size: str, stock: Any, engines: dict[str, Any]) -> Row:
    return attempt({"model": size, "workload": "1x32"}, lambda: _one_by_32(stock, engines))


def _one_by_32(stock: Any, engines: dict[str, Any]) -> Row:
    """1 x 32 as a user sees it. Ids change between calls: a graph that replays old ones is found by its values."""
    ids = torch.randint(5, VOCABULARY, (1, 32), device="cuda")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    run, failed = _that_run(stock, engines, batch)
    if STOCK not in run:
        return {"failed": failed}
    errors: dict[str, float] = dict.fromkeys(run, 0.0)
    for _ in range(3):
        ids.copy_(torch.randint(5, VOCABULARY, (1, 32), device="cuda"))
        for name, found in _differences(run, batch["attention_mask"].bool()).items():
            errors[name] = found if not found <= errors[name] else errors[name]  # NaN stays
    times = {name: wall(function, 5 * ROUNDS) for name, function in run.items()}
    return {
        "explain": _explained(engines),
        "ms": {name: {"p50": t[len(t) // 2], "p95": t[int(0.95 * len(t))]} for name, t in times.items()},
        "relative_difference_from_stock": errors,
        "failed": {**failed, **_wrong(errors), **_without_graphs(engines)},
    }


def _explained(engines: dict[str, Any]) -> dict[str, str]:
    """What xfast says of its own engines after a run: graphs among it."""
    return {
        name: str(xfast.explain(model)) for name, model in engines.items() if name.startswith(("xfast", "tensorrt"))
    }
