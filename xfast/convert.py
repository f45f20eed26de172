"""``xfast convert``: a checkpoint becomes a packed artifact, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from xfast import _C, artifact, packed_model, tokenizer_files
from xfast.architecture import FAMILIES, describe, find_encoders, require_finite, supported_families
from xfast.artifact import Manifest, Staging
from xfast.backends.native import pack_layer
from xfast.checkpoint import Checkpoint, Tensors
from xfast.errors import DataFileError, InvalidOptionError, UnsupportedModelError, require_one_of
from xfast.recipe import CPU_PRECISIONS, DEFAULT_GROUP_SIZE, Recipe
from xfast.tensor_files import DTYPES, Entry, as_array, as_bytes
from xfast.terminal import JsonFlag
from xfast.threads import get_num_threads

Advance = Callable[[str], None]
_FLOATS = ("F32", "BF16", "F16")  # what weights may be
_ROWS = 8192  # of the word table that are in memory at a time


def convert(
    model: str | Tensors,
    folder: Path,
    precision: str = "int8",
    architecture: str | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    advance: Advance = lambda name: None,
    announce: Callable[[int], None] = lambda files: None,
) -> Manifest:
    """Writes a packed artifact from a checkpoint's safetensors, never holding more than one layer unpacked.

    A run that was killed is continued: layers that were finished are not packed again.

    Args:
        model: folder, Hub id whose files are in the cache, or anything else that gives tensors one at a time.
        folder: new or empty, or an artifact, which is replaced once the new one is complete.
        precision: "fp32", "bf16", "int8" or "int4".
        architecture: a class of transformers; None: the one that config.json names.
        group_size: consecutive inputs that share a scale in int4: 32, 64 or 128.
        advance: told each file's name before it is written.
        announce: told once how many files there will be.

    Raises:
        XfastError: no such checkpoint, damaged, not supported, or the folder cannot be written.
    """
    recipe = _recipe(precision, group_size)
    checkpoint = Checkpoint(model) if isinstance(model, str) else model
    if checkpoint.folder is not None and folder.resolve() == checkpoint.folder.resolve():
        raise InvalidOptionError(f"dir: {folder} is the checkpoint itself; expected another folder")
    source = _Source(checkpoint, architecture)
    identity: dict[str, Any] = {
        "checkpoint": checkpoint.identity(),
        "config": hashlib.sha256(packed_model.config_json(source.root)).hexdigest(),
        "class": type(source.root).__name__,
        "precision": precision,
        "group_size": group_size,
        "dtype": str(source.dtype),
        "format": artifact.FORMAT,
        "layout": _C.pack_version,
    }
    announce(source.weights.spec.num_layers + 1 + packed_model.contents_of(source.root, precision).packed_words)
    staging = Staging(folder, identity)
    try:
        embeds = bool(packed_model.arguments_of(source.root))
        tokenizer_files.write(staging, str(checkpoint.folder or ""), embeds=embeds)
        return packed_model.write(
            staging,
            source.root,
            precision,
            None,
            formats=[recipe.stored(layer, precision) for layer in range(source.weights.spec.num_layers)],
            packed_layer=lambda layer: source.packed_layer(layer, precision, recipe),
            packed_words=source.packed_words,
            value=source.value,
            unchanged=lambda: _require_same(checkpoint, identity["checkpoint"]),
            advance=advance,
        )
    except BaseException:
        staging.abandon()
        raise


def _require_same(checkpoint: Tensors, identity: list[list[Any]]) -> None:
    if checkpoint.identity() != identity:
        raise DataFileError(
            f"model: {checkpoint.folder}: was replaced or changed while it was converted; convert it again"
        )


def _recipe(precision: str, group_size: int) -> Recipe:
    require_one_of("precision", precision, CPU_PRECISIONS)
    if group_size != DEFAULT_GROUP_SIZE and precision != "int4":
        raise InvalidOptionError(f"group-size: {group_size} is only accepted with int4, not with {precision}")
    return Recipe(group_size)


class _Source:
    """A model without memory for its weights, and where each of them is in the checkpoint."""

    def __init__(self, checkpoint: Tensors, architecture: str | None) -> None:
        self._checkpoint = checkpoint
        self.root: Any = _skeleton(checkpoint, architecture)
        self._ties: list[list[str]] = []
        # what transformers leaves apart since release 5, whatever the config says; the rest stays tied
        if int(transformers.__version__.split(".")[0]) >= 5 and self._differing():
            self._ties = list(self._groups().values())
            self.root = _skeleton(checkpoint, architecture, tie_word_embeddings=False)
        encoders = find_encoders(self.root)
        if len(encoders) != 1:
            raise UnsupportedModelError(
                f"model: {type(self.root).__name__} holds {len(encoders)} supported encoders, expected one; "
                f"supported: {supported_families()}"
            )
        self._path, self._encoder, self._family = encoders[0]
        self._place()
        self.weights = describe(self._encoder, self._family)
        self._inside = {name for name, _ in self._encoder.named_parameters(self._path, remove_duplicate=False)}

    def _differing(self) -> bool:
        """Whether tensors that the config ties lie in the checkpoint under several names, with other values."""
        for names in self._groups().values():
            stored = dict.fromkeys(filter(None, map(self._stored_name, names)))
            first, *others = [*stored, ""]
            if any(other and not self._equal(first, other) for other in others):
                return True
        return False

    def _equal(self, first: str, second: str) -> bool:
        entries = [self._checkpoint.entry(name) for name in (first, second)]
        if any(entry.dtype not in DTYPES for entry in entries):
            return False
        if entries[0].shape != entries[1].shape or entries[0].dtype != entries[1].dtype:
            return False
        rows = entries[0].shape[0] if entries[0].shape else 0
        if not rows:
            return torch.equal(self._checkpoint.read(first), self._checkpoint.read(second))
        return all(
            torch.equal(self._checkpoint.read(first, row, _ROWS), self._checkpoint.read(second, row, _ROWS))
            for row in range(0, rows, _ROWS)
        )

    def _groups(self) -> dict[int, list[str]]:
        """The names of each tensor."""
        groups: dict[int, list[str]] = {}
        for name, tensor in packed_model.tensors_of(self.root):
            groups.setdefault(id(tensor), []).append(name)
        return groups

    def _place(self) -> None:
        """Finds every tensor in the checkpoint and gives it its type, still without memory."""
        shapes = {name: tuple(tensor.shape) for name, tensor in packed_model.tensors_of(self.root)}
        self._names: dict[str, str] = {}
        missing = []
        found: list[tuple[str, list[str]]] = []
        for names in self._groups().values():  # one tensor under all its names
            stored = next((stored for name in names if (stored := self._stored_name(name)) is not None), None)
            if stored is None:
                missing.append(names[0])
                continue
            entry = self._checkpoint.entry(stored)
            if entry.shape != (shape := shapes[names[0]]):
                raise DataFileError(
                    f"model: {stored} has shape {entry.shape} in the checkpoint; config.json makes it {shape}"
                )
            found.append((stored, names))
        self.dtype = _dtype_of(self._checkpoint, (stored for stored, _ in found))
        for stored, names in found:
            self._put(names, self._checkpoint.entry(stored))
            self._names |= dict.fromkeys(names, stored)
        missing = [name for name in missing if not self._tie(name)]
        if missing:
            raise DataFileError(
                f"model: the checkpoint lacks {len(missing)} tensors of {type(self.root).__name__}: "
                f"{', '.join(sorted(missing)[:4])}; name the class it was saved as with --architecture, or load it "
                "with transformers and use xfast.save"
            )

    def _tie(self, name: str) -> bool:
        """Gives a name that the checkpoint lacks the tensor that it is tied to, if that is there."""
        tied = next((names for names in self._ties if name in names), [])
        other = next((other for other in tied if other in self._names), None)
        if other is not None:
            packed_model.put(self.root, name, dict(packed_model.tensors_of(self.root))[other])
            self._names[name] = self._names[other]
        return other is not None

    def _put(self, names: list[str], entry: Entry) -> None:
        weight = packed_model.is_parameter(self.root, names[0])
        if entry.dtype not in (accepted := _FLOATS if weight else tuple(DTYPES)):
            raise DataFileError(
                f"model: {names[0]} is {entry.dtype} in the checkpoint; accepted: {', '.join(accepted)}"
            )
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        if weight:
            tensor = nn.Parameter(tensor.to(self.dtype), requires_grad=False)
        for name in names:
            packed_model.put(self.root, name, tensor)

    def _stored_name(self, name: str) -> str | None:
        """The name in the checkpoint: with or without the prefix that heads put before their encoder."""
        prefix = f"{self.root.base_model_prefix}."
        candidates = dict.fromkeys((name, name.removeprefix(prefix), prefix + name))
        found = [one for one in candidates if one in self._checkpoint.names()]
        for other in found[1:]:
            if not self._equal(found[0], other):
                raise DataFileError(
                    f"model: the checkpoint has {found[0]} and {other}, with other values: which of the two encoders "
                    "is meant cannot be told; load it with transformers and use xfast.save"
                )
        return found[0] if found else None

    def _read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """A tensor in the type that it has in the model, or ``rows`` of its rows."""
        tensor = self._checkpoint.read(self._names[name], first, rows)
        return tensor.to(self.dtype) if packed_model.is_parameter(self.root, name) else tensor

    def packed_layer(self, layer: int, precision: str, recipe: Recipe) -> dict[str, dict[str, np.ndarray]]:
        """Reads a layer, packs it and lets it go."""
        roles = [key for key in self.weights.modules if key[0] == layer]
        for key in roles:
            for parameter, held in self.weights.modules[key].named_parameters():
                values = self._read(packed_model.full_name(self._path, f"{self.weights.names[key]}.{parameter}"))
                setattr(self.weights.modules[key], parameter, nn.Parameter(values, requires_grad=False))
                del held
        packed = pack_layer(self.weights, layer, precision, recipe)
        for key in roles:
            self.weights.modules[key].to("meta")
        return packed

    def packed_words(self) -> tuple[np.ndarray, np.ndarray]:
        """The word table in 8 bits a value and its scales, read some rows at a time."""
        name = packed_model.full_name(self._path, f"{self.weights.names[-1, 'word']}.weight")
        rows, columns = self._checkpoint.entry(self._names[name]).shape
        values, scales = np.empty((rows, columns), np.int8), np.empty(rows, np.float32)
        for first in range(0, rows, _ROWS):
            table = self._read(name, first, _ROWS)
            require_finite(name, table)
            part = slice(first, first + len(table))
            values[part], scales[part] = _C.quantize_rows(as_array(table), get_num_threads())
        return values, scales

    def value(self, name: str) -> np.ndarray:
        """The bytes of a tensor that is stored as it is."""
        tensor = self._read(name)
        if name in self._inside:
            require_finite(name, tensor)
        return as_bytes(tensor)


def _dtype_of(checkpoint: Tensors, names: Iterable[str]) -> torch.dtype:
    """The one type of a model's parameters: a head in another type could not be run.

    As with ``from_pretrained(dtype="auto")``, transformers 5's default, it is the one that config.json names, else that
    of the tensors, the first by name where they have several.
    """
    accepted = [DTYPES[kind] for kind in _FLOATS]
    types = [DTYPES[kind] for name in sorted(names) if (kind := checkpoint.entry(name).dtype) in _FLOATS]
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if dtype in accepted:
        return dtype
    if named is not None and len(set(types)) > 1:
        raise DataFileError(f"model: dtype {named!r:.50} in config.json; accepted: float32, bfloat16, float16")
    return types[0] if types else torch.float32


def _skeleton(checkpoint: Tensors, architecture: str | None, **changes: Any) -> nn.Module:
    named = checkpoint.config.get("architectures")
    name = architecture or (named[0] if isinstance(named, list) and named else None)
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise InvalidOptionError(
            f"architecture: {name!r} is no model class of transformers {transformers.__version__}; accepted: a class "
            "such as XLMRobertaModel (default: the one that config.json names)"
        )
    where = checkpoint.folder or Path("model")
    shapes = [checkpoint.entry(tensor).shape for tensor in checkpoint.names()]
    longest = max([1 << 20, *(size for shape in shapes for size in shape)])  # 2^20 cost nothing; later errors say more
    artifact.refuse_huge(checkpoint.config, longest, len(shapes), where / artifact.CONFIG)
    try:
        config = packed_model.config_of(cls, {**checkpoint.config, **changes})
        bare = any(cls.__name__ in family.encoder_classes for family in FAMILIES)
        pooled = any("pooler." in tensor for tensor in checkpoint.names())
        return packed_model.skeleton(cls, config, {"add_pooling_layer": pooled} if bare else {})
    except Exception as error:  # whatever transformers raises for a config that is none
        raise DataFileError(f"{where}: {cls.__name__} cannot be built from config.json: {error}") from error


def run(
    model: Annotated[str, typer.Argument(help="Folder or cached Hub id of a checkpoint; with --check an artifact.")],
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="The artifact: a new or empty folder.")] = None,
    precision: Annotated[str | None, typer.Option(help="int8, int4, bf16 or fp32. Default: int8.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help=f"int4: inputs that share a scale: 32, 64 or 128. Default: {DEFAULT_GROUP_SIZE}.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Class of transformers, XLMRobertaModel for example.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Verify the SHA-256 of every file of the artifact.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Convert a checkpoint into a packed artifact for xfast.load, or check one."""
    if folder is None and not check:
        raise InvalidOptionError("dir: expected a folder for the artifact")
    options = {"precision": precision, "group-size": group_size, "architecture": architecture}
    if folder is None and (given := [name for name, value in options.items() if value is not None]):
        raise InvalidOptionError(f"{', '.join(given)}: not accepted with --check alone, which converts nothing")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        if folder is None:
            folder, manifest = Path(model), artifact.read_manifest(Path(model))
        else:
            manifest = convert(
                model,
                folder,
                "int8" if precision is None else precision,
                architecture,
                DEFAULT_GROUP_SIZE if group_size is None else group_size,
                advance=lambda name: bar.update(task, description=name, advance=1),
                announce=lambda files: bar.update(task, total=files),
            )
        if check:
            bar.reset(task, total=len(manifest.files))
            artifact.verify_all(folder, manifest, lambda name: bar.update(task, description=name, advance=1))
    size = sum(record.bytes for record in manifest.files.values())
    if as_json:
        facts = {"path": str(folder), "bytes": size, "files": len(manifest.files), "precision": manifest.precision}
        typer.echo(json.dumps({**facts, "checked": check}, indent=1))
        return
    state = "every file has its SHA-256" if check else "load it with xfast.load"
    Console(width=200).print(
        f"{folder}: {size / 2**20:.1f} MiB, {manifest.precision}; {state}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
