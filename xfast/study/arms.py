"""The models of a study: the two arms, the baseline a second time, and the head that a task needs.

Seeded arms differ in every random weight, and in nothing else: that they cost the same is then true by construction,
and what the study shows with them is the method and the speeds. Checkpoints make it a finding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import xfast
from xfast.benchmarks import models, workloads
from xfast.errors import InvalidOptionError, UnsupportedModelError
from xfast.stilts.model import AUTO_CLASSES, load_task_model
from xfast.stilts.task import CHOICE
from xfast.stilts.tasks import get
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import CHECKPOINT, EMBEDDING, STOCK, TYPES, EngineName, Settings, labels_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGE = 2_000_000_000
"""Parameters from which on models are made in bf16 and their original weights are freed after packing."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that the arms of one size and engine need: ``held`` by each arm, ``peak`` more while one is being built."""

    held: int
    building: int

    def of(self, arms: int) -> int:
        """With so many arms."""
        return self.held * arms + self.building


def footprint(parameters: int, embedding: int, engine: EngineName) -> Footprint:
    """What an arm will need, from sizes alone.

    Args:
        parameters: of the encoder.
        embedding: parameters of its tables among them.
        engine: what will run it.
    """
    large = parameters > _LARGE
    original = parameters * (2 if large or engine.precision in _DTYPES else 4)
    if engine.backend == STOCK:
        return Footprint(original, original // 10)
    width = {"int8": 1.1, "fp8": 1.1, "fp32": 4.0}.get(engine.precision, 2.0)
    packed = int((parameters - embedding) * width)
    if large:  # keep_weights=False
        kept = embedding * (1 if engine.precision == "int8" else 2)
        return Footprint(packed + kept, original)
    return Footprint(original + packed, packed // 4)


def model_facts(settings: Settings, size: str) -> dict[str, Any]:
    """Parameters, layers, hidden size, ids and usable length of a size, before anything is built.

    Raises:
        InvalidOptionError: the two checkpoints are not of the same size.
    """
    if size != CHECKPOINT:
        shape = models.SIZES[size]
        return {
            "parameters": shape.parameters(),
            "embedding": shape.vocab * shape.hidden,
            "layers": shape.layers,
            "hidden_size": shape.hidden,
            "inner": shape.inner,
            "vocab": shape.vocab,
            "pad": 1,
            "limit": workloads.LIMIT,
        }
    from transformers import AutoConfig

    found = []
    for given in (settings.baseline, settings.intermediate or settings.baseline):
        for task in given:
            config = AutoConfig.from_pretrained(str(folder_of(given, task, encoder=True)))
            found.append(_facts(config))
    if any(one != found[0] for one in found):
        raise InvalidOptionError(f"baseline, intermediate: the checkpoints differ in size: {found}")
    return found[0]


def _facts(config: Any) -> dict[str, Any]:
    shape = models.Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        vocab=config.vocab_size,
    )
    model = workloads.Model.of(config)
    return {
        "parameters": shape.parameters(),
        "embedding": shape.vocab * shape.hidden,
        "layers": shape.layers,
        "hidden_size": shape.hidden,
        "inner": shape.inner,
        "vocab": model.vocab,
        "pad": model.pad,
        "limit": model.limit,
    }


def folder_of(checkpoints: Any, task: str, *, encoder: bool = False) -> Path:
    """The folder of the model for a task: the task's own checkpoint, else the one given for all.

    In a STILTs run's folder that is ``tasks/<task>``, or ``encoder/`` where the run has no head for the task or the
    encoder alone is wanted.

    Raises:
        InvalidOptionError: nothing is given for the task, or the folder is none.
    """
    given = checkpoints.get(task, checkpoints.get(""))
    if given is None:
        raise InvalidOptionError(f"checkpoints: none for {task}; name one for all tasks, or TASK=FOLDER for this one")
    folder = Path(given)
    with_head = folder / "tasks" / task
    if not encoder and task and (with_head / "config.json").is_file():
        return with_head
    if (folder / "encoder" / "config.json").is_file():
        return folder / "encoder"
    if not (folder / "config.json").is_file():
        raise InvalidOptionError(f"checkpoints: {folder} holds neither config.json nor encoder/ of a STILTs run")
    return folder


def describe(settings: Settings) -> dict[str, dict[str, str]]:
    """The document's ``arms``."""
    if not settings.baseline:
        text = "random weights, seed {}: the speed of trained ones, no accuracy"
        return {
            BASELINE: {"source": "seeded", "description": text.format(settings.seed)},
            INTERMEDIATE: {"source": "seeded", "description": text.format(settings.seed + 1)},
            CONTROL: {"source": "seeded", "description": "the baseline's weights in a second copy (A/A)"},
        }
    found = {BASELINE: {"source": _names(settings.baseline), "description": "without intermediate training"}}
    if settings.intermediate:
        text = "after English intermediate training"
        found[INTERMEDIATE] = {"source": _names(settings.intermediate), "description": text}
    text = "the baseline's weights in a second copy (A/A)"
    return {**found, CONTROL: {"source": _names(settings.baseline), "description": text}}


def _names(checkpoints: Any) -> str:
    return ", ".join(f"{task}={folder}" if task else str(folder) for task, folder in checkpoints.items())


def model_of(settings: Settings, size: str, arm: str, task: str, encoder: nn.Module | None = None) -> nn.Module:
    """The model of an arm for a task: the checkpoint's own, else an encoder under a head with random weights.

    Args:
        encoder: one that :func:`without_head` took out of the model for another task; None makes or loads one.

    Raises:
        InvalidOptionError, InvalidInputError, UnsupportedModelError: a checkpoint cannot be used.
    """
    if size != CHECKPOINT:
        if encoder is None:
            dtype = torch.bfloat16 if is_large(size) else torch.float32
            encoder = models.random_model(size, settings.seed + (arm == INTERMEDIATE), dtype)
        return with_head(encoder, task, settings.seed)
    given = settings.intermediate if arm == INTERMEDIATE else settings.baseline
    folder = folder_of(given, task)
    if folder.parent.name == "tasks":
        return load_task_model(str(folder), get(task)).eval()
    return with_head(models.load_model(str(folder)), task, settings.seed)


def is_large(size: str) -> bool:
    """Whether models of this size are made in bf16 and give up their weights when they are packed."""
    return size != CHECKPOINT and models.SIZES[size].parameters() > _LARGE


def with_head(encoder: nn.Module, task: str, seed: int) -> nn.Module:
    """The encoder inside transformers' class for the task's type, the head's weights random but the same for a seed.

    The encoder itself is shared, not copied; take it out again with :func:`without_head`.

    Raises:
        UnsupportedModelError: a text tower that has no heads.
    """
    kind = TYPES[task]
    if kind == EMBEDDING or type(encoder).__name__.startswith("AltCLIP"):
        return encoder
    config: Any = copy.deepcopy(encoder.config)
    if kind != CHOICE:
        config.num_labels = max(2, labels_of(task))
    with torch.device("meta"):
        try:
            model = AUTO_CLASSES[kind].from_config(config)
        except ValueError as error:
            raise UnsupportedModelError(f"model: {type(encoder).__name__} has no head for {task}: {error}") from error
    prefix = model.base_model_prefix
    pooler = getattr(getattr(model, prefix), "pooler", None)
    if pooler is not None and getattr(encoder, "pooler", None) is None:
        _materialise(pooler, encoder, seed)
        encoder.pooler = pooler
    del model._modules[prefix]
    _materialise(model, encoder, seed)
    setattr(model, prefix, encoder)
    return model.eval()


def without_head(model: nn.Module) -> nn.Module:
    """The encoder inside."""
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, model) if prefix else model


def _materialise(module: nn.Module, encoder: nn.Module, seed: int) -> None:
    one = next(encoder.parameters())
    module.to_empty(device=one.device)
    module.to(one.dtype)
    models.fill(module, seed, 0.02)


def accelerate(model: nn.Module, engine: EngineName, *, layers: int | None = None) -> nn.Module:
    """Put an engine into the model; the stock engine changes nothing but the dtype.

    Raises:
        BackendUnavailableError, UnsupportedModelError: the engine cannot run it here.
    """
    dtype = _DTYPES.get(engine.precision)
    if engine.backend == STOCK:
        if engine.precision not in ("fp32", *_DTYPES):
            raise InvalidOptionError(f"engine: {engine}; transformers itself runs fp32, fp16 and bf16")
        return model.to(dtype or torch.float32)
    large = sum(parameter.numel() for parameter in model.parameters()) > _LARGE
    return xfast.accelerate(
        model, backend=engine.backend, precision=engine.precision, layers=layers, keep_weights=not large
    )
