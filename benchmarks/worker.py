"""One engine in a process of its own: builds it, then times batches whenever asked.

A script that ``harness.Worker`` starts, with the job as a JSON argument. Each line on stdin is a request, each line on
the original stdout its answer, both JSON; whatever libraries print goes to stderr. Imports nothing of xfast by itself,
so that an engine may live in another Python environment that has torch and transformers.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this folder: its modules belong to xfast.benchmarks

import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import time
import traceback
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

_PR_SET_PDEATHSIG = 1
_MADV_DONTNEED = 4
_SLOW_PASS_S = 4.0
_WARM_PASSES = 3


def main() -> None:
    """Answers requests until stdin ends."""
    job = json.loads(sys.argv[1])
    answers = _private_stdout()
    _die_with_parent()
    try:
        engine = _Engine(job)
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    answers.write(json.dumps(engine.facts) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(engine, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class _Engine:
    """The engine, its batches and what was measured while it was built."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self._weights = str(Path(job["model"], "model.safetensors").resolve())
        self._batches = {name: _read_batches(path) for name, path in job["batches"].items()}
        before = _memory(self._weights)["resident"]
        model = _load(job["model"])
        self._tensors = [weakref.ref(tensor) for tensor in model.parameters()]
        module = _by_file(job["module"])
        calibration = _read_batches(job["calibration"]) if job["calibration"] else []
        first = _read_batches(job["first"])[0]
        start = time.perf_counter()
        self._run = module.build(
            model, job["precision"], threads=job["threads"], calibration=calibration, **job["options"]
        )
        build = time.perf_counter() - start
        self._run(*first)
        first_result = time.perf_counter() - start
        del model
        _trim()  # a conversion's leftovers would leave too little memory for the engines that are built next
        self.facts = {
            "build_s": build,
            "first_result_s": first_result,
            "process_gb": before / 1e9,
            "versions": _versions(job["packages"]),
        }

    def warm(self, workload: str, output: str, slowest_s: float) -> dict[str, Any]:
        """Runs a workload until it is warm and saves the real tokens' hidden states [tokens, hidden]."""
        rows = [self._run(ids, mask)[mask.numpy().astype(bool)] for ids, mask in self._batches[workload]]
        np.save(output, np.concatenate(rows).astype(np.float32))
        seconds = 0.0
        for _ in range(_WARM_PASSES):  # not judged by the pass above, of which compilation may be a part
            start = time.perf_counter()
            for ids, mask in self._batches[workload]:
                self._run(ids, mask)
            seconds = time.perf_counter() - start
            if seconds > min(slowest_s, _SLOW_PASS_S):
                break
        return {"too_slow_s": seconds if seconds > slowest_s else None}

    def time(self, workload: str, min_s: float) -> dict[str, Any]:
        """Seconds of each batch of each pass; as many passes as fill ``min_s``, at least one."""
        batches = self._batches[workload]
        self._run(*batches[0])  # wakes the threads and warms the caches after the others' turns
        passes, start = [], time.perf_counter()
        while not passes or time.perf_counter() - start < min_s:
            seconds = []
            for ids, mask in batches:
                begin = time.perf_counter()
                self._run(ids, mask)
                seconds.append(time.perf_counter() - begin)
            passes.append(seconds)
        return {"passes": passes}

    def memory(self) -> dict[str, Any]:
        """Gigabytes that this process needs: its own pages, and of the shared weights file those it still uses."""
        _trim()
        _forget(self._weights)
        for reference in self._tensors:  # weights that the engine kept count in full, touched by a batch or not
            if (tensor := reference()) is not None:
                tensor.detach().sum()
        for ids, mask in next(iter(self._batches.values())):
            self._run(ids, mask)
        return {name: value / 1e9 for name, value in _memory(self._weights).items()}


def _load(folder: str) -> nn.Module:
    """The model; transformers maps its parameters from the file, so that all workers share those pages."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def _read_batches(path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    arrays = np.load(path)
    count = len(arrays.files) // 2
    return [(torch.from_numpy(arrays[f"ids{i}"]), torch.from_numpy(arrays[f"mask{i}"])) for i in range(count)]


def _by_file(module: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"xfast_{module}", Path(__file__).with_name(f"{module}.py"))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _versions(packages: list[str]) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def _private_stdout() -> IO[str]:
    """The pipe to the harness; whatever else writes to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _trim() -> None:
    """Gives freed memory back to the system."""
    gc.collect()
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def _die_with_parent() -> None:
    """A worker spends its life stopped; nobody could wake it when the harness is gone."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # if memory runs out, a worker goes and not the harness
            Path("/proc/self/oom_score_adj").write_text("1000")


def _mappings() -> list[tuple[int, int, str, dict[str, int]]]:
    """(start, end, file, bytes by smaps field) of every mapping of this process; empty where there is no smaps."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int, str, dict[str, int]]] = []
    for line in lines:
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line):
            found.append((int(match[1], 16), int(match[2], 16), match[3], {}))
        elif match := re.match(r"(\w+): +(\d+) kB", line):
            found[-1][3][match[1]] = 1024 * int(match[2])
    return found


def _memory(weights: str) -> dict[str, int]:
    """Bytes: ``resident`` are private pages (USS) and those of the weights file; ``rss`` all, libraries included."""
    private = weights_pages = rss = 0
    for _, _, file, fields in _mappings():
        rss += fields.get("Rss", 0)
        private += fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)
        if file == weights:
            weights_pages += fields.get("Shared_Clean", 0) + fields.get("Shared_Dirty", 0)
    return {"resident": private + weights_pages, "rss": rss}


def _forget(weights: str) -> None:
    """Unmaps the pages of the weights file for now; reading them again brings them back from the page cache."""
    for start, end, file, _ in _mappings():
        if file == weights:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


if __name__ == "__main__":
    main()
