"""Arms as packed artifacts: checkpoints that were converted before, and seeded weights that are converted here.

An artifact is mapped: an arm takes the memory of its packed weights, and none where another arm maps the same files. So
models are measured of which one copy of the original weights would not fit. Seeded ones are made a layer at a time, in
the study's folder, from the values that the model in memory would have; they go when what needs them has been measured.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xfast.artifact import manifest_in
from xfast.benchmarks.models import SeededTensors
from xfast.convert import convert
from xfast.errors import ArtifactError, ArtifactWriteError
from xfast.recipe import CPU_PRECISIONS, DEFAULT_GROUP_SIZE, QUANTISED
from xfast.study.factors import EngineName, Settings

FOLDER = "artifacts"
"""Of seeded artifacts, in the study's."""

_NATIVE = "native"
_WIDTH = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / DEFAULT_GROUP_SIZE}
"""Bytes of a packed weight."""

_SPARE_DISK_BYTES = 500_000_000
"""Left for what else is written meanwhile."""


@dataclass(frozen=True)
class Artifact:
    """A packed artifact that is there.

    Attributes:
        folder: where.
        precision: of its products.
        dtype: of the weights that it was made from.
        model_class: name of its transformers class.
        bytes: of all its files.
    """

    folder: Path
    precision: str
    dtype: torch.dtype
    model_class: str
    bytes: int


def find(folder: Path) -> Artifact | None:
    """The artifact in a folder; None where it holds something else.

    Raises:
        ArtifactError: damaged, not finished, of another format, or one that does not run all layers.
    """
    manifest = manifest_in(folder)
    if manifest is None:
        return None
    if manifest.layers is not None:
        raise ArtifactError(f"{folder}: runs {manifest.layers} layers only; expected one that runs all")
    dtype = getattr(torch, manifest.linear_dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"{folder}: its weights were of type {manifest.linear_dtype!r:.50}, which torch has not")
    size = sum(record.bytes for record in manifest.files.values())
    return Artifact(folder, manifest.precision, dtype, manifest.model_class.rpartition(":")[2], size)


def refusal(found: Artifact, engine: EngineName, device: str) -> str:
    """Why an engine cannot run an artifact; empty where it can."""
    if (engine.backend, engine.precision, device) == (_NATIVE, found.precision, "cpu"):
        return ""
    runs = f"{_NATIVE}:{found.precision}"
    return f"{found.folder} is a packed artifact; accepted: the engine {runs} on the CPU, or the unpacked checkpoint"


# --- seeded weights


def can_be_made(settings: Settings, engine: EngineName) -> bool:
    """Whether arms of seeded weights can be artifacts for an engine."""
    native = engine.backend == _NATIVE and engine.precision in CPU_PRECISIONS
    return native and settings.device == "cpu" and not settings.baseline


@dataclass(frozen=True)
class Seeded:
    """The artifact of seeded weights: what it is, not where."""

    size: str
    precision: str
    seed: int
    dtype: torch.dtype

    def folder(self, output: Path) -> Path:
        """Where it lies in a study's folder."""
        return output / FOLDER / f"{self.size}-{self.precision}-seed{self.seed}"

    def ready(self, output: Path) -> bool:
        """Whether it is there and finished."""
        with contextlib.suppress(ArtifactError):
            return find(self.folder(output)) is not None
        return False

    def make(self, output: Path, advance: Callable[[str], None]) -> Artifact:
        """Convert it unless it is finished; what a killed run has begun is continued.

        Raises:
            ArtifactWriteError: the disk is full, or the folder holds something else.
        """
        folder = self.folder(output)
        if not self.ready(output):
            tensors = SeededTensors(self.size, self.seed, self.dtype)
            convert(tensors, folder, self.precision, advance=advance)
        found = find(folder)
        if found is None:
            raise ArtifactWriteError(f"{folder}: was removed while it was made")
        return found

    def remove(self, output: Path) -> None:
        """Delete it, finished or not."""
        shutil.rmtree(self.folder(output), ignore_errors=True)
        with contextlib.suppress(OSError):  # others are in it, or it was never made
            (output / FOLDER).rmdir()


def bytes_of(facts: Mapping[str, Any], precision: str, dtype: torch.dtype) -> int:
    """What an artifact of an encoder will take, on disk and mapped, from sizes alone.

    Args:
        facts: see ``arms.size_facts``.
        precision: of its products.
        dtype: of what is not packed.
    """
    hidden, layers, embedding = facts["hidden_size"], facts["layers"], facts["embedding"]
    outputs = layers * (5 * hidden + facts["inner"])
    weights = layers * (4 * hidden * hidden + 2 * hidden * facts["inner"])
    vectors = outputs * (12 if precision == "int8" else 4)  # bias, and in int8 scale and compensation
    words = embedding + 4 * embedding // hidden if precision in QUANTISED else embedding * dtype.itemsize
    others = facts["parameters"] - embedding - weights - outputs
    return int(weights * _WIDTH[precision] + vectors + words + others * dtype.itemsize)


def disk_room(output: Path, free: int | None) -> int | None:
    """Bytes that artifacts may take on the disk of a folder that may not be there yet; None where nobody says.

    Args:
        output: the study's folder.
        free: bytes; None: what the system says.
    """
    if free is None:
        there = next((one for one in (output, *output.absolute().parents) if one.is_dir()), None)
        try:
            free = None if there is None else shutil.disk_usage(there).free
        except OSError:
            return None
    return None if free is None else free - _SPARE_DISK_BYTES


def held_bytes(folder: Path) -> int:
    """Bytes of the files that are in an artifact's folder, finished or not."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            found += path.stat().st_size
    return found
