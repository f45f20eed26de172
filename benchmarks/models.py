"""Models to measure: XLM-R at its real sizes with seeded random weights, or a checkpoint.

Random weights take as long as trained ones; only the errors of a trained model differ.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from xfast.architecture import family_of, supported_families
from xfast.errors import InvalidInputError, InvalidOptionError, UnsupportedModelError
from xfast.tensor_files import NAMES, Entry


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``family`` is the prefix of its transformers classes."""

    layers: int
    hidden: int
    heads: int
    inner: int
    family: str = "XLMRoberta"
    vocab: int = 250002

    def parameters(self) -> int:
        """Of the encoder without pooler: embeddings, then per layer four attention matrices, two of the FFN, norms."""
        h, f = self.hidden, self.inner
        layer = 4 * (h * h + h) + 2 * h * f + f + h + 4 * h
        return (self.vocab + 514 + 1) * h + 2 * h + self.layers * layer


SIZES = {
    "tiny": Shape(2, 128, 4, 256),
    "base": Shape(12, 768, 12, 3072),
    "large": Shape(24, 1024, 16, 4096),
    "altclip": Shape(24, 1024, 16, 4096, "AltCLIPText"),
    "xl": Shape(36, 2560, 32, 10240, "XLMRobertaXL", 250880),
    "xxl": Shape(48, 4096, 32, 16384, "XLMRobertaXL", 250880),
    "13b": Shape(60, 4096, 32, 16384, "XLMRobertaXL", 250880),
}
"""Sizes by name. altclip is AltCLIP's text tower, XLM-R large with a projection on top; 13b is XXL's layer 60 times."""

_CHUNK = 1 << 22


def random_model(size: str = "base", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of a size in ``SIZES``, without pooler; its random weights depend on ``seed`` and ``dtype`` alone."""
    before = torch.get_default_dtype()
    with _NoRandomInit():
        torch.set_default_dtype(dtype)
        try:
            model = construct(size)
        finally:
            torch.set_default_dtype(before)
    fill(model, seed, model.config.initializer_range)
    return model


def construct(size: str) -> Any:
    """The transformers model of a size in ``SIZES``, without pooler, in eval mode; torch decides about its weights."""
    import transformers

    family = SIZES[size].family
    # AltCLIP's tower has no pooler to leave out.
    arguments = {} if family == "AltCLIPText" else {"add_pooling_layer": False}
    return getattr(transformers, f"{family}Model")(config_of(size), **arguments).eval()


def config_of(size: str) -> Any:
    """The transformers configuration of a size in ``SIZES``."""
    import transformers

    shape = SIZES[size]
    return getattr(transformers, f"{shape.family}Config")(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def model_of(name: str, seed: int = 0) -> nn.Module:
    """The model of this name: a size in ``SIZES``, a directory or a Hub id.

    Raises:
        InvalidOptionError, InvalidInputError, UnsupportedModelError: see ``load_model``.
    """
    return random_model(name, seed) if name in SIZES else load_model(name)


class _NoRandomInit(TorchFunctionMode):
    """Skips random initialisation: drawing 278 million numbers twice on one thread would take several seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def fill(model: nn.Module, seed: int, std: float) -> None:
    """Matrices normal with ``std``, biases 0, gains 1. Drawn in chunks, one seed each, so on any number of threads."""
    chunks: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            chunks += parameter.detach().view(-1).split(_CHUNK)
        else:
            parameter.detach().fill_(_constant(name))
    _draw(chunks, 0, seed, std)


def _constant(name: str) -> float:
    return 0.0 if name.endswith("bias") else 1.0


def _draw(chunks: Sequence[torch.Tensor], first: int, seed: int, std: float) -> None:
    """Fills consecutive chunks of a model; ``first``: the number of the first among all."""

    def draw(index: int) -> None:
        chunks[index].normal_(0.0, std, generator=torch.Generator().manual_seed(seed * 1000 + first + index))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(len(chunks))))


class SeededTensors:
    """The tensors of ``random_model(size, seed, dtype)``, drawn one at a time: what ``xfast.convert`` reads.

    A model of 13 billion parameters has no place in memory, and its artifact needs none of it on disk.
    """

    folder = None

    def __init__(self, size: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        with _NoRandomInit(), torch.device("meta"):
            model = construct(size)
        self.config: dict[str, Any] = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        self._size, self._seed, self._dtype = size, seed, dtype
        self._std = float(model.config.initializer_range)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._first: dict[str, int] = {}  # number of each matrix's first chunk
        count = 0
        for name, shape in self._shapes.items():
            self._first[name] = count
            count += -(-math.prod(shape) // _CHUNK) if len(shape) > 1 else 0

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(map(math.prod, self._shapes.values())) * self._dtype.itemsize

    def identity(self) -> list[list[Any]]:
        """See :class:`xfast.checkpoint.Tensors`."""
        return [["seeded", self._size, self._seed, str(self._dtype)]]

    def names(self) -> set[str]:
        """See :class:`xfast.checkpoint.Tensors`."""
        return set(self._shapes)

    def entry(self, name: str) -> Entry:
        """See :class:`xfast.checkpoint.Tensors`."""
        shape = self._shapes[name]
        return Entry(NAMES[self._dtype], shape, 0, math.prod(shape) * self._dtype.itemsize)

    def read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """See :class:`xfast.checkpoint.Tensors`. Draws the whole chunks that the rows lie in."""
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.full(shape, _constant(name), dtype=self._dtype)
        columns, size = math.prod(shape[1:]), math.prod(shape)
        last = shape[0] if rows is None else min(first + rows, shape[0])
        begin = first * columns // _CHUNK
        end = min(-(-last * columns // _CHUNK) * _CHUNK, size)
        # Not from the heap, which keeps what is freed in pieces: memory would grow from layer to layer.
        memory = mmap.mmap(-1, (end - begin * _CHUNK) * self._dtype.itemsize)
        values = torch.frombuffer(memory, dtype=self._dtype)
        _draw(values.split(_CHUNK), self._first[name] + begin, self._seed, self._std)
        at = first * columns - begin * _CHUNK
        return values[at : at + (last - first) * columns].view(last - first, *shape[1:])


def load_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads the encoder of a local checkpoint or of one on the Hub, in ``dtype``, in evaluation mode.

    Without a pooler where the checkpoint has none.

    Raises:
        InvalidOptionError: ``name`` is a path that does not lead to a directory.
        InvalidInputError: the checkpoint cannot be loaded or lacks weights of the encoder.
        UnsupportedModelError: it is not an encoder of a supported family.
    """
    from transformers import AutoConfig, AutoModel

    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):  # which class this is, before gigabytes of weights are read
            kind = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers, the Hub client and readers of bad files raise whatever they like
        raise InvalidInputError(f"model: {name}: cannot load it: {_first_line(error)}") from error
    if family_of(kind) is None:
        raise UnsupportedModelError(
            f"model: {name} is a {type(kind).__name__}; xfast accelerates {supported_families()}"
        )
    try:
        model, loaded = AutoModel.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # as above
        raise InvalidInputError(f"model: {name}: cannot load its weights: {_first_line(error)}") from error
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InvalidInputError(f"model: {name}: {len(missing)} weights are missing, {missing[0]} among them")
    if loaded["missing_keys"]:
        model.pooler = None  # transformers would draw another one in every process
    return model.eval()


def _source(name: str) -> str:
    """The directory that ``name`` leads to, or ``name`` itself when it reads like a Hub id."""
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long for the file system, ~nobody
        raise InvalidOptionError(f"model: {name!r}: {error}; accepted: a model directory or a Hub id") from None
    if is_folder and name.strip():
        return str(path)
    looks_like_path = name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1
    if exists or looks_like_path or not name.strip():
        raise InvalidOptionError(f"model: {name!r} is no directory; accepted: a model directory or a Hub id")
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
