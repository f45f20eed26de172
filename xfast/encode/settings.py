"""What a job computes and how: two frozen dataclasses, checked when they are made."""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xfast.errors import BackendUnavailableError, InvalidOptionError, require_one_of
from xfast.options import BACKENDS, PRECISIONS
from xfast.tensor_files import is_folder

CONTENTS = ("auto", "embeddings", "predictions")
POOLINGS = ("auto", "mean", "cls", "none")
DTYPES = ("float32", "float16")
ON_ERROR = ("fail", "skip")
ENGINES = ("local", "ray")
DEVICES = ("auto", "cpu", "cuda")

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a batch by kind of device."""


@dataclass(frozen=True)
class Settings:
    """What decides the values in the output: a folder holds the shards of one such object.

    Attributes:
        model, tokenizer: folder or Hub id; tokenizer None: the model's.
        content: "embeddings", "predictions" or "auto" (by the architecture that the checkpoint names).
        text_column, pair_column: columns of strings; with a pair column both are one input, as rerankers read them.
        keep: columns copied to the output; None: all but text and pair.
        pooling: "mean" over all tokens, "cls" (the first) or "none" (a vector for every token); "auto": what a
            sentence-transformers model says, else "mean". Embeddings only.
        normalize: embeddings of length 1, as a sentence-transformers model may ask for by itself; for a head with one
            score, its sigmoid.
        max_length: tokens, special ones included; longer inputs are truncated. None: as many as the model takes.
        prefix: put before every text (not before the pair). None: the default prompt of a sentence-transformers
            model, if it has one.
        dtype: of the embeddings.
        backend, precision, layers: see :class:`xfast.Options`; ``precision="auto"`` is not accepted.
        device: "cpu", "cuda" or "auto" (a GPU if there is one); resolved when the object is made.
        on_error: "fail" at a row that is null, no string or no JSON, or "skip" and list it in the manifest.
        shard_rows: at most so many input rows make one output file.

    Raises:
        InvalidOptionError: a value is not accepted.
        DataFileError: the system refuses to look at the model's or the tokenizer's folder.
    """

    model: str
    tokenizer: str | None = None
    content: str = "auto"
    text_column: str = "text"
    pair_column: str | None = None
    keep: tuple[str, ...] | None = None
    pooling: str = "auto"
    normalize: bool = False
    max_length: int | None = None
    prefix: str | None = None
    dtype: str = "float32"
    backend: str = "auto"
    precision: str = "model"
    layers: int | None = None
    device: str = "auto"
    on_error: str = "fail"
    shard_rows: int = 10_000

    def __post_init__(self) -> None:
        require_one_of("content", self.content, CONTENTS)
        require_one_of("pooling", self.pooling, POOLINGS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("backend", self.backend, BACKENDS)
        require_one_of("precision", self.precision, tuple(name for name in PRECISIONS if name != "auto"))
        require_one_of("device", self.device, DEVICES)
        require_one_of("on-error", self.on_error, ON_ERROR)
        _at_least_one("max-length", self.max_length)
        _at_least_one("shard-rows", self.shard_rows)
        if self.prefix is not None and not is_unicode(self.prefix):
            raise InvalidOptionError(f"prefix: {self.prefix!r:.100} is not accepted: it holds half of a surrogate pair")
        if self.pair_column == self.text_column:
            raise InvalidOptionError(f"pair-column: {self.pair_column!r} is the text column, too")
        if self.normalize and self.pooling == "none" and self.content != "predictions":
            raise InvalidOptionError('normalize: not accepted with pooling "none", whose vectors are tokens')
        if self.keep is not None and len(set(self.keep)) != len(self.keep):
            raise InvalidOptionError(f"keep: a column is named twice in {', '.join(self.keep)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InvalidOptionError("device: 'cuda' is not accepted: PyTorch finds no GPU")
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        for name in ("model", "tokenizer"):  # as the workers of a cluster find a folder, wherever they run
            if (value := getattr(self, name)) is not None and is_folder(Path(value)):
                object.__setattr__(self, name, str(Path(value).resolve()))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        record = asdict(self)
        return {**record, "keep": None if self.keep is None else list(self.keep)}


@dataclass(frozen=True)
class Execution:
    """How a job runs; values in the output depend on it by rounding at most (sums over other batch shapes).

    Attributes:
        engine: "local" or "ray".
        batch_tokens: tokens of a batch, padding not counted; None: ``BATCH_TOKENS``.
        window: rows that are tokenised and sorted by length together.
        threads: of each encoder; None: as PyTorch has it.
        overlap: tokenise, and write, while the encoder computes; None: where a core or a GPU is left for it.
        workers: processes of the Ray engine, each with a model.
        address: of a Ray cluster; None: the one named by RAY_ADDRESS, else a cluster of this machine for this job.

    Raises:
        InvalidOptionError: a value is not accepted.
    """

    engine: str = "local"
    batch_tokens: int | None = None
    window: int = 4096
    threads: int | None = None
    overlap: bool | None = None
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        require_one_of("engine", self.engine, ENGINES)
        for name in ("batch_tokens", "window", "threads", "workers"):
            _at_least_one(name.replace("_", "-"), getattr(self, name))
        if self.engine != "ray" and (self.workers != 1 or self.address is not None):
            raise InvalidOptionError("workers, address: only accepted with engine ray")


def require(module: str, package: str) -> None:
    """Asked before anything is read. ``package`` is what pip calls it.

    Raises:
        BackendUnavailableError: the library is not installed.
    """
    try:
        importlib.import_module(module)
    except ImportError:
        raise BackendUnavailableError(f"encode: needs {module}; pip install '{package}'") from None


def is_unicode(text: str) -> bool:
    """Whether UTF-8 has it: a shell's bytes that are no text, and JSON's escapes, leave halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_unicode(option: str, path: Path) -> None:
    """Manifests and Parquet's library take names that are text.

    Raises:
        InvalidOptionError: a part of the path is none.
    """
    if not is_unicode(str(path.absolute())):
        raise InvalidOptionError(f"{option}: {os.fsencode(path)!r} is not UTF-8; rename it")


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InvalidOptionError(f"{name}: {value} is not accepted; accepted: 1 or more")
