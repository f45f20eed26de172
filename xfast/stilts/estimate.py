"""What a training run will cost, before it begins: steps, tokens, memory, and time from a short measurement."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xfast.stilts.config import RunConfig
from xfast.stilts.mixture import TrainingSet, probabilities

EFFICIENCY = 0.5
"""Share of a large matrix product's rate that training is taken to reach: the estimate is good to a factor of 2."""

OPTIMIZER_BYTES = 16
"""Bytes a parameter: fp32 weight, gradient and AdamW's two moments."""

ACTIVATIONS_PER_LAYER = 34
"""Bytes of half-precision activations a token and hidden unit that one layer keeps (Korthikanti et al. 2022)."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a run.

    Attributes:
        steps: optimizer steps.
        examples: seen, repetitions included.
        tokens: seen, without padding.
        parameters: of the encoder and the heads.
        memory_bytes: weights, gradients, optimizer and activations of one device.
        seconds: of training, evaluation not included.
        device: that was measured.
    """

    steps: int
    examples: int
    tokens: int
    parameters: int
    memory_bytes: int
    seconds: float
    device: str


def estimate(
    config: RunConfig, model: Any, sets: Mapping[str, TrainingSet], steps: int, device: str, processes: int = 1
) -> Estimate:
    """Estimate a run: 6 operations a parameter and token (8 with checkpointing), embeddings left out.

    Args:
        config: the run.
        model: the model with its heads.
        sets: training sets.
        steps: optimizer steps.
        device: where it will run; its rate is measured there in about a tenth of a second.
        processes: that train together, a device each; FSDP shards weights and optimizer over them.
    """
    shares = probabilities(config, sets)
    batch = config.recipe.batch_size
    per_example = sum(shares[name] * _mean_tokens(part) for name, part in sets.items())
    tokens = round(steps * batch * per_example)
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for p in model.encoder.get_input_embeddings().parameters())
    operations = (8 if config.gradient_checkpointing else 6) * (parameters - embeddings) * tokens
    widest = max(max(sum(len(row) for row in f.rows) for f in part.features.items) for part in sets.values())
    size = model.config
    half = 1 if config.precision != "fp32" else 2
    layers = 2 if config.gradient_checkpointing else size.num_hidden_layers
    activations = (
        ACTIVATIONS_PER_LAYER * half * layers * size.hidden_size * widest * min(config.device_batch_size, batch)
    )
    shards = processes if config.trainer.get("fsdp") else 1
    memory = OPTIMIZER_BYTES * parameters // shards + activations
    seconds = operations / (EFFICIENCY * rate(config, device) * processes)
    return Estimate(steps, steps * batch, tokens, parameters, memory, seconds, device)


def _mean_tokens(part: TrainingSet) -> float:
    items = part.features.items
    return sum(len(row) for feature in items for row in feature.rows) / len(items)


def rate(config: RunConfig, device: str) -> float:
    """Operations a second of a matrix product in the run's precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    size = 8192 if device.startswith("cuda") else 768
    a = torch.ones(size, size, device=device, dtype=dtype)  # random numbers would be the training's
    torch.matmul(a, a)
    _wait(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        torch.matmul(a, a)
        count += 1
        _wait(device)
    return 2 * size**3 * count / (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
