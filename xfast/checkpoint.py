"""Transformers checkpoints: their safetensors files, one tensor at a time, and their faults as one error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from xfast import tokenizer_files
from xfast.errors import DataFileError, XfastError
from xfast.tensor_files import Entry, TensorFile, reading, strict_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Inside the block whatever goes wrong is a DataFileError that names the checkpoint, but for xfast's own errors.

    transformers lets through what its readers raise: OSError, ValueError, and a type that safetensors has for itself.
    """
    try:
        yield
    except XfastError:
        raise
    except Exception as error:
        raise DataFileError(f"model: {model}: {type(error).__name__}: {error}") from error


def require_whole(model: str, facts: Mapping[str, Any]) -> None:
    """Raises DataFileError where the checkpoint lacks weights: transformers makes them up and goes on.

    Args:
        model: what was loaded.
        facts: that ``from_pretrained(model, output_loading_info=True)`` returned.
    """
    if missing := sorted(facts["missing_keys"]):
        raise DataFileError(
            f"model: {model} lacks {', '.join(missing[:5])}{', ...' if missing[5:] else ''}; "
            "was it saved in part, or without its head?"
        )


class Tensors(Protocol):
    """What can be converted: the tensors of a transformers model, one at a time. :class:`Checkpoint` has them in files.

    config: what its config.json says. folder: where its files lie, a tokenizer's among them; None: nowhere.
    """

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def folder(self) -> Path | None: ...
    def identity(self) -> list[list[Any]]:
        """Plain values that differ where the tensors do."""

    def names(self) -> set[str]:
        """Of all tensors, as transformers calls them."""

    def entry(self, name: str) -> Entry:
        """Type and shape of a tensor."""

    def read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """A tensor of one's own, or ``rows`` of its rows."""


class Checkpoint:
    """The tensors of a folder or of a Hub id in the cache, in one file or in shards. Nothing is unpickled.

    Raises:
        DataFileError: nothing there, a pickle, a missing shard, or a file that is damaged.
    """

    def __init__(self, model: str) -> None:
        config = tokenizer_files.find(model, "config.json")
        if config is None:
            raise DataFileError(
                f"model: {model}: expected a folder with a config.json, or a Hub id whose files are in the cache "
                f"(fetch them with: hf download {model})"
            )
        self.folder = config.parent
        self.config = _json_object(config)
        self.files = [TensorFile(path, foreign=True) for path in self._paths()]
        self._where: dict[str, tuple[TensorFile, str]] = {}
        for file in self.files:
            for stored in file.entries:
                name = _modern(stored)
                if name in self._where:
                    raise DataFileError(f"{file.path}: {stored} is also in {self._where[name][0].path}")
                self._where[name] = (file, stored)

    def _paths(self) -> list[Path]:
        if (self.folder / _SINGLE).is_file():  # before an index, which may be an older save's: as transformers does
            return [self.folder / _SINGLE]
        if (self.folder / _INDEX).is_file():
            shards = _json_object(self.folder / _INDEX).get("weight_map")
            good = isinstance(shards, dict) and all(
                isinstance(name, str) and Path(name).name == name for name in shards.values()
            )
            if not good or not shards:
                raise DataFileError(f"{self.folder / _INDEX}: expected weight_map, from tensor names to file names")
            paths = [self.folder / name for name in sorted(set(shards.values()))]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise DataFileError(f"{self.folder}: shards are missing that {_INDEX} names: {', '.join(missing)}")
            return paths
        if pickles := [name for name in _PICKLES if (self.folder / name).is_file()]:
            raise DataFileError(
                f"{self.folder}: {pickles[0]} is a pickle, which can run code when it is read, and xfast reads none; "
                "convert it where you trust it: AutoModel...from_pretrained(MODEL).save_pretrained(FOLDER)"
            )
        raise DataFileError(f"{self.folder}: has neither {_SINGLE} nor {_INDEX}")

    def identity(self) -> list[list[Any]]:
        """Changes when a file is replaced: names, sizes, times of modification, and samples of every tensor.

        Times alone do not tell: archives and images set them all alike.
        """
        return [[file.path.name, file.bytes, file.mtime_ns, file.sample()] for file in self.files]

    def names(self) -> set[str]:
        """Of all tensors, as transformers calls them today."""
        return set(self._where)

    def entry(self, name: str) -> Entry:
        """Type and shape of a tensor."""
        file, stored = self._where[name]
        return file.entries[stored]

    def read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """A copy of a tensor, or of ``rows`` of its rows."""
        file, stored = self._where[name]
        return file.read(stored, first, rows)


def _modern(name: str) -> str:
    for old, new in _OLD_NAMES:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _json_object(path: Path) -> dict[str, Any]:
    with reading(path):
        content = strict_json(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise DataFileError(f"{path}: expected a JSON object")
    return content
