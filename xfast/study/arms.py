"""The models of a study: the two arms, the baseline a second time, and the head that a task needs.

Seeded arms differ in every random weight, and in nothing else: that they cost the same is then true by construction,
and what the study shows with them is the method and the speeds. Checkpoints make it a finding.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import xfast
from xfast.artifact import MANIFEST, is_artifact
from xfast.benchmarks import models, workloads
from xfast.errors import DataFileError, InvalidOptionError, UnsupportedModelError, XfastError
from xfast.recipe import QUANTISED
from xfast.stilts.model import AUTO_CLASSES, DTYPES, load_task_model
from xfast.stilts.task import CHOICE, CLASSIFICATION, TAGGING, TARGET
from xfast.stilts.tasks import TASKS, get
from xfast.study import artifacts
from xfast.study.artifacts import Artifact
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import (
    CHECKPOINT,
    EARLY,
    EMBEDDING,
    QUANTISATION,
    STOCK,
    TYPES,
    EngineName,
    Settings,
    labels_of,
)

_LARGE = 2_000_000_000
"""Parameters from which on models are made in bf16 and their original weights are freed after packing."""

_STAMPED_BYTES = 1 << 20
"""So much of a file's beginning and end tells one checkpoint from another."""


@dataclass(frozen=True)
class Build:
    """How the models of a size are made for an engine; planning and measuring both ask here.

    Attributes:
        dtype: of the weights as they are made or loaded.
        keep_weights: whether the originals stay beside the packed ones.
        probes: which of ``QUANTISATION`` and ``EARLY`` are run on the originals, in fp32.
        mapped: packed artifacts are among them.
    """

    dtype: torch.dtype
    keep_weights: bool
    probes: tuple[str, ...]
    mapped: bool = False


def build_of(settings: Settings, parameters: int, engine: EngineName, *, probes: bool = True) -> Build:
    """How models of so many parameters are made for an engine; ``probes`` False leaves out what was asked for."""
    large = parameters > _LARGE
    wanted = probes_of(settings, engine) if probes and not large else ()
    if engine.backend == STOCK and QUANTISATION not in wanted:
        dtype = DTYPES.get(engine.precision, torch.float32)
    else:
        dtype = torch.bfloat16 if large else torch.float32
    return Build(dtype, not large, wanted)


def probes_of(settings: Settings, engine: EngineName) -> tuple[str, ...]:
    """What is asked of the models on an engine, whether or not they can bear it."""
    if not settings.probes:
        return ()
    return (QUANTISATION, EARLY) if engine.quantised else (EARLY,)


def why_unprobed(parameters: int, mapped: bool = False) -> str:
    """Why a model of so many parameters is made, or mapped, without the probes that were asked for."""
    if mapped:
        return "probes run the original weights in fp32, which packed artifacts do not have"
    if parameters > _LARGE:
        return (
            f"probes run the original weights in fp32; above {_LARGE / 1e9:g} billion parameters these are bf16 and "
            "given up for the packed ones"
        )
    return "there is no memory for the weights that probes pack in fp32"


@dataclass(frozen=True)
class Footprint:
    """Bytes that the arms of one size and engine need on their device, and on the host where that is another.

    Attributes:
        held: by each arm.
        building: more, while one arm is built and probed.
        host: of the one model that is made there before it moves to a GPU.
    """

    held: int
    building: int
    host: int

    def of(self, arms: int) -> int:
        """On the device, with so many arms."""
        return self.held * arms + self.building


def footprint(parameters: int, embedding: int, engine: EngineName, build: Build) -> Footprint:
    """What an arm will need, from sizes alone.

    Args:
        parameters: of the encoder.
        embedding: parameters of its tables among them.
        engine: what will run it.
        build: how it is made.
    """
    original = parameters * build.dtype.itemsize
    exact = 4 * (parameters - embedding) if build.probes else 0  # packed once more, in fp32
    if engine.backend == STOCK:
        held = parameters * DTYPES.get(engine.precision, torch.float32).itemsize
        return Footprint(held, original // 10 + original - held + exact, original)
    width = {"int4": 0.6, "int8": 1.1, "fp8": 1.1, "fp32": 4.0}.get(engine.precision, 2.0)
    packed = int((parameters - embedding) * width)
    if not build.keep_weights:
        kept = embedding * (1 if engine.precision in QUANTISED else 2)
        return Footprint(packed + kept, original, original)
    return Footprint(original + packed, max(packed // 4, exact - packed), original)


def size_facts(size: str) -> dict[str, Any]:
    """Parameters, layers, hidden size, ids and usable length of a size in ``SIZES``, before anything is built."""
    shape = models.SIZES[size]
    # XL has a few ids more than the others; all get XLM-R's, so that every size is measured on the same ids.
    return _facts_of(shape, workloads.Model(min(shape.vocab, workloads.VOCAB)))


def _facts_of(shape: models.Shape, model: workloads.Model) -> dict[str, Any]:
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


def _checkpoint_facts(folder: Path) -> dict[str, Any]:
    config = _config(folder)
    try:
        shape = models.Shape(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            vocab=config.vocab_size,
        )
        return _facts_of(shape, workloads.Model.of(config))
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"checkpoints: {folder}: not the configuration of an encoder: {error}") from None


def _config(folder: Path) -> Any:
    """Raises DataFileError where transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers and readers of bad files raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataFileError(f"checkpoints: {folder}/config.json: {reason}") from None


@dataclass(frozen=True)
class Resolved:
    """The models of one size before any is built.

    Attributes:
        facts: see :func:`size_facts`.
        tasks: those that every arm has a usable model for.
        stamps: what tells each checkpoint from another, by arm and task; empty for seeded weights.
        skipped: tasks without a usable checkpoint, and why.
        notes: heads that are random although a checkpoint is given, and retrieval from encoders tuned on others.
        artifacts: checkpoints that are packed artifacts, by task and arm; no other task is in it.
    """

    facts: dict[str, Any]
    tasks: tuple[str, ...]
    stamps: dict[str, str]
    skipped: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    artifacts: Mapping[str, Mapping[str, Artifact]] = field(default_factory=dict)


def arms_of(settings: Settings) -> dict[str, Mapping[str, str]]:
    """The arms that have checkpoints of their own, which the control has not."""
    return {BASELINE: settings.baseline, **({INTERMEDIATE: settings.intermediate} if settings.intermediate else {})}


def resolve(settings: Settings, size: str, tasks: Iterable[str]) -> Resolved:
    """Find the models of a size for each task.

    Raises:
        InvalidOptionError: no task has usable checkpoints, or the checkpoints differ in size.
    """
    if size != CHECKPOINT:
        return Resolved(size_facts(size), tuple(tasks), {}, (), ())
    arms = arms_of(settings)
    found: dict[Path, dict[str, Any]] = {}
    usable: list[str] = []
    stamps: dict[str, str] = {}
    skipped: list[dict[str, str]] = []
    notes: list[str] = []
    packed: dict[str, dict[str, Artifact]] = {}
    for task in tasks:
        try:
            folders = {arm: folder_of(given, task) for arm, given in arms.items()}
            mapped = {arm: one for arm, folder in folders.items() if (one := artifacts.find(folder)) is not None}
            facts = {folder: _checkpoint_facts(folder) for folder in folders.values()}
            heads = {arm: has_trained_head(folder, task) for arm, folder in folders.items()}
            marks = {f"{arm} {task}": stamp(folder) for arm, folder in folders.items()}
        except XfastError as error:
            skipped.append({"what": f"{size} {task}", "why": str(error)})
            continue
        found |= facts
        stamps |= marks
        packed |= {task: mapped} if mapped else {}
        usable.append(task)
        for arm, folder in folders.items():
            if TYPES[task] != EMBEDDING and not heads[arm]:
                notes.append(f"random head for {task} in {arm}: {folder} has none")
            elif TYPES[task] == EMBEDDING and (tuned := _tuned_on(folder)):
                what = f"{folder} has been fine-tuned on {', '.join(tuned)}"
                notes.append(f"{task} in {arm}: {what}; for the encoder as it was before, name {task}=FOLDER")
    if not usable:
        raise InvalidOptionError("; ".join(dict.fromkeys(one["why"] for one in skipped)))
    if any(one != next(iter(found.values())) for one in found.values()):
        listed = {str(folder): facts for folder, facts in found.items()}
        raise InvalidOptionError(f"baseline, intermediate: the checkpoints differ in size: {listed}")
    return Resolved(next(iter(found.values())), tuple(usable), stamps, tuple(skipped), tuple(notes), packed)


def _tuned_on(folder: Path) -> list[str]:
    """The target tasks of the STILTs run whose ``encoder/`` this is; retrieval comes before any of them."""
    trained = sorted(path.name for path in folder.parent.glob("tasks/*")) if folder.name == "encoder" else []
    return [name for name in trained if name in TASKS and TASKS[name].role == TARGET]


def stamp(folder: Path) -> str:
    """A digest of a checkpoint's files: their names, sizes, beginnings and ends.

    Raises:
        DataFileError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob(MANIFEST)]
        for path in sorted(files):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{path.name} {size} ".encode())
                for start in (0, max(0, size - _STAMPED_BYTES)):
                    file.seek(start)
                    digest.update(file.read(_STAMPED_BYTES))
    except OSError as error:
        raise DataFileError(f"checkpoints: {folder}: {error}") from error
    return digest.hexdigest()[:16]


def folder_of(checkpoints: Mapping[str, str], task: str) -> Path:
    """The folder of the model for a task: the task's own checkpoint, else the one given for all.

    In a STILTs run's folder that is ``tasks/<task>``, or ``encoder/`` where the run has no head for the task.

    Raises:
        InvalidOptionError: nothing is given for the task, or the folder is none.
    """
    given = checkpoints.get(task, checkpoints.get(""))
    if given is None:
        raise InvalidOptionError(f"checkpoints: none for {task}; name one for all tasks, or TASK=FOLDER for this one")
    folder = Path(given)
    for one in (folder / "tasks" / task, folder / "encoder"):
        if (one / "config.json").is_file():
            return one
    if not (folder / "config.json").is_file() and not is_artifact(folder):
        raise InvalidOptionError(f"checkpoints: {folder} holds neither config.json nor encoder/ of a STILTs run")
    return folder


def tokenizer_of(settings: Settings, task: str) -> Path:
    """The folder of a task's tokenizer, in timing and in scores: the one named, else the checkpoint's, else the data's.

    The intermediate arm reads the baseline's ids: all arms get the same.
    """
    if settings.tokenizer is not None:
        return Path(settings.tokenizer)
    with contextlib.suppress(InvalidOptionError):  # a task without a checkpoint, which is skipped
        folder = folder_of(settings.baseline, task)
        if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            return folder
    return Path(settings.data or "") / "tokenizer" / "xlmr"


def is_task_folder(folder: Path, task: str) -> bool:
    """Whether a STILTs run left this folder for this task."""
    return folder.parent.name == "tasks" and folder.name == task


def has_trained_head(folder: Path, task: str) -> bool:
    """Whether a checkpoint has a head of the task's type that knows the task's labels.

    Raises:
        DataFileError: its configuration cannot be read.
    """
    kind = TYPES[task]
    if kind == EMBEDDING:
        return False
    config = _config(folder)
    head = AUTO_CLASSES[kind].__name__.removeprefix("AutoModel")
    if not (config.architectures or [""])[0].endswith(head):
        return False
    names, labels = set(config.id2label.values()), set(get(task).labels)
    if kind == CLASSIFICATION:
        return names == labels
    return kind != TAGGING or names <= labels


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


def model_of(
    settings: Settings, size: str, arm: str, task: str, dtype: torch.dtype, encoder: nn.Module | None = None
) -> nn.Module:
    """The model of an arm for a task: the checkpoint's own, else an encoder under a head with random weights.

    Args:
        settings, size, arm, task: which model.
        dtype: of its weights, see :func:`build_of`.
        encoder: one that :func:`detach_head` took out of the model for another task; None makes or loads one.

    Raises:
        InvalidOptionError, InvalidInputError, UnsupportedModelError: a checkpoint cannot be used.
    """
    if size != CHECKPOINT:
        if encoder is None:
            encoder = models.random_model(size, settings.seed + (arm == INTERMEDIATE), dtype)
        return with_head(encoder, task, settings.seed)
    folder = folder_of(settings.intermediate if arm == INTERMEDIATE else settings.baseline, task)
    if (found := artifacts.find(folder)) is not None:
        return mapped_model(found, task, settings.seed)
    if has_trained_head(folder, task):
        return load_task_model(str(folder), get(task), dtype)
    return with_head(models.load_model(str(folder), dtype), task, settings.seed)


def with_head(encoder: nn.Module, task: str, seed: int) -> nn.Module:
    """The encoder inside transformers' class for the task's type, the head's weights random but the same for a seed.

    The encoder itself is shared, not copied; take it out again with :func:`detach_head`.

    Raises:
        UnsupportedModelError: a text tower that has no heads.
    """
    if TYPES[task] == EMBEDDING or type(encoder).__name__.startswith("AltCLIP"):
        return encoder
    one = next(encoder.parameters())
    model, empty = _new_head(encoder.config, task, seed, one.dtype, one.device)
    pooler = getattr(empty, "pooler", None)
    if pooler is not None and getattr(encoder, "pooler", None) is None:
        encoder.pooler = pooler
        model.lent_pooler = True
    setattr(model, model.base_model_prefix, encoder)
    return model.eval()


def mapped_model(found: Artifact, task: str, seed: int) -> nn.Module:
    """An artifact as it is where its head is the task's, else its encoder under a head as :func:`with_head` makes it.

    Raises:
        ArtifactError: damaged.
        UnsupportedModelError: there is no such head.
    """
    kind = TYPES[task]
    whole = found.model_class.startswith("AltCLIP") or has_trained_head(found.folder, task)
    if whole or kind == EMBEDDING:
        model: nn.Module = xfast.load(found.folder)
        model = model if whole else without_head(model)
    else:
        model, empty = _new_head(_config(found.folder), task, seed, found.dtype, torch.device("cpu"))
        setattr(model, model.base_model_prefix, empty)
        model = xfast.load(found.folder, head=model)
    model.mapped = True
    return model


def is_mapped(model: nn.Module) -> bool:
    """Whether :func:`mapped_model` made it."""
    return bool(model.__dict__.get("mapped", False))


def _new_head(config: Any, task: str, seed: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, nn.Module]:
    """A model without its encoder, and that encoder, which has no weights but its pooler's.

    Raises:
        UnsupportedModelError: transformers has no such head for the configuration.
    """
    config = copy.deepcopy(config)
    if TYPES[task] != CHOICE:
        config.num_labels = max(2, labels_of(task))
    with torch.device("meta"):
        try:
            model = AUTO_CLASSES[TYPES[task]].from_config(config)
        except ValueError as error:
            raise UnsupportedModelError(f"model: {config.model_type} has no head for {task}: {error}") from error
    empty: nn.Module = model._modules.pop(model.base_model_prefix)
    for part in (model, getattr(empty, "pooler", None)):
        if part is not None:
            _materialise(part, seed, dtype, device)
    return model, empty


def has_head(model: nn.Module) -> bool:
    """Whether it is one of transformers' classes with a head; AltCLIP's tower has an encoder inside, too."""
    return re.search("For[A-Z]", type(model).__name__) is not None


def without_head(model: nn.Module) -> nn.Module:
    """The encoder inside a model with a head; any other model itself."""
    inner: nn.Module = getattr(model, str(model.base_model_prefix)) if has_head(model) else model
    return inner


def detach_head(model: nn.Module) -> nn.Module:
    """The encoder as :func:`with_head` was given it: without the pooler that the head brought."""
    encoder = without_head(model)
    if model.__dict__.get("lent_pooler", False):
        encoder.pooler = None
    return encoder


def _materialise(module: nn.Module, seed: int, dtype: torch.dtype, device: torch.device) -> None:
    module.to_empty(device="cpu").to(dtype)
    models.fill(module, seed, 0.02)  # on the CPU, whose generator gives the same weights for every device
    module.to(device)


def accelerate(model: nn.Module, engine: EngineName, *, keep_weights: bool = True) -> nn.Module:
    """Put an engine into the model; the stock engine changes nothing but the dtype, and a mapped model has its own.

    Raises:
        BackendUnavailableError, UnsupportedModelError: the engine cannot run it here.
    """
    if is_mapped(model):
        return model
    if engine.backend == STOCK:
        return model.to(DTYPES[engine.precision])
    return xfast.accelerate(model, backend=engine.backend, precision=engine.precision, keep_weights=keep_weights)
