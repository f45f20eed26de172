"""What users run: XLM-R base with what torch computes after the encoder, a task head or mean pooling, on all threads.

Torch's threads spin for milliseconds after each of its operations and want the cores that the encoder needs in the next
call; ``csrc/openmp.h`` has what is done about it. ``extra_info``: ``p95_ms``, and ``borrowed``, the regions that ran
on torch's threads for each call (large batches have more than one a call). ``stock`` is the original model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import xfast
from xfast import _C
from xfast.benchmarks.models import config_of
from xfast.benchmarks.workloads import workload

THREADS = torch.get_num_threads()  # read early: the other stems measure on one thread and leave it at that
LABELS = 9


def _mean(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A normalised mean over tokens, as sentence embedders compute it."""
    states, weights = model(input_ids=ids, attention_mask=mask).last_hidden_state, mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1))


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask).logits


HEADS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "mean": ("XLMRobertaModel", _mean),
    "classes": ("XLMRobertaForSequenceClassification", _logits),
    "tags": ("XLMRobertaForTokenClassification", _logits),
}


CASES = [
    pytest.param(engine, head, name, marks=pytest.mark.quick if (head, name) == ("classes", "1x32") else ())
    for engine in ("stock", "int8", "bf16", "fp32")
    for head in HEADS
    for name in ("1x32", "1x128", "8x64")
]


@pytest.mark.parametrize(("engine", "head", "name"), CASES)
def test_openmp(benchmark, engine: str, head: str, name: str) -> None:
    cls, run = HEADS[head]
    config = config_of("base")
    config.num_labels = LABELS
    model = getattr(transformers, cls)(config).eval()
    ids, mask = workload(name).batches[0]
    torch.set_num_threads(THREADS)
    if engine != "stock":
        xfast.accelerate(model, precision=engine)
    before = _C.borrowed_regions()
    with torch.inference_mode():
        benchmark.pedantic(run, (model, ids, mask), warmup_rounds=10, rounds=100 if engine != "stock" else 20)
    if benchmark.stats is not None:
        times = np.array(benchmark.stats.stats.data)
        share = (_C.borrowed_regions() - before) / (len(times) + 10)
        benchmark.extra_info.update(p95_ms=1000 * float(np.quantile(times, 0.95)), borrowed=share)
