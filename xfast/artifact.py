"""The folder of a packed artifact: its manifest, what its files must be, and how it is written whole or not at all.

docs/artifacts.md describes the format and what it promises. Nothing here knows a model class.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from xfast import _C, locks
from xfast.architecture import EncoderSpec
from xfast.errors import ArtifactError, ArtifactWriteError, DataFileError
from xfast.recipe import CPU_PRECISIONS, GROUP_SIZES, LINEARS, QUANTISED, StoredFormat
from xfast.tensor_files import (
    FileRecord,
    Mapped,
    TensorFile,
    is_file,
    is_folder,
    reading,
    record_of,
    state_of,
    strict_json,
    write_file,
    write_tensors,
    writing,
)

FORMAT = 2  # 1, which is read too, has no recipe
MANIFEST = "xfast.json"
CONFIG = "config.json"
PARAMETERS = "parameters.safetensors"
WORDS = "words.safetensors"
STAGING = ".xfast-partial"

_JOURNAL = "journal.json"
_PLACING = "placing.json"  # the names that a commit moves or removes
_HARMLESS = {".git", ".gitattributes", ".gitignore", "README.md", ".cache", STAGING}
_LAYERS = re.compile(r"num_(\w+_)?layers")
_SIZES = {
    "embedding_size",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_channels",
    "num_labels",
    "patch_size",
    "project_dim",
    "projection_dim",
    "type_vocab_size",
    "vocab_size",
}
_DATA_DTYPE = {"fp32": ("F32", 4), "bf16": ("BF16", 2), "int8": ("I8", 1)}
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def layer_file(layer: int) -> str:
    """The file of one layer's packed products."""
    return f"layer-{layer:03d}.safetensors"


def layer_tensors(spec: EncoderSpec, formats: Mapping[str, StoredFormat]) -> Shapes:
    """(dtype, shape) by name of a layer's file, large blocks first: each then starts at a whole 64 bytes."""
    panel, chunk = _C.panel_outputs, _C.chunk_bytes
    data: Shapes = {}
    others: Shapes = {}
    for name in LINEARS:
        stored, (outputs, inputs) = formats[name], spec.product_shape(name)
        panels = -(-outputs // panel)
        if stored.precision == "int4":  # 4 bits a value and 16 a group's scale, in one stream
            padded = -(-inputs // chunk) * chunk
            data[f"{name}.data"] = ("U8", (panels, panel * (padded // 2 + 2 * -(-padded // stored.group_size))))
        else:
            dtype, width = _DATA_DTYPE[stored.precision]
            data[f"{name}.data"] = (dtype, (panels, -(-inputs * width // chunk), chunk // 4, panel, 4 // width))
        for part in ("bias", "scale", "compensation") if stored.precision == "int8" else ("bias",):
            others[f"{name}.{part}"] = ("I32" if part == "compensation" else "F32", (panels * panel,))
        if stored.smoothed:
            others[f"{name}.column_scale"] = ("F32", (inputs,))
    return {**data, **others}


def recipe_content(precision: str, formats: Sequence[Mapping[str, StoredFormat]]) -> dict[str, dict[str, Any]]:
    """What a manifest says of the products that differ from ``precision`` alone, by "layer.name"."""
    plain = StoredFormat(precision)
    return {
        f"{layer}.{name}": asdict(stored)
        for layer, products in enumerate(formats)
        for name, stored in products.items()
        if stored != plain
    }


def formats_of(manifest: Manifest, layers: int) -> list[dict[str, StoredFormat]]:
    """The formats of every layer's products. Raises ArtifactError: the recipe names something that cannot be."""
    formats = [dict.fromkeys(LINEARS, StoredFormat(manifest.precision)) for _ in range(layers)]
    for key, value in manifest.recipe.items():
        layer, _, name = key.partition(".")
        good = layer.isascii() and layer.isdigit() and int(layer) < layers and name in LINEARS
        good = good and isinstance(value, dict) and value.keys() == {"precision", "group_size", "smoothed"}
        good = good and value["precision"] in CPU_PRECISIONS and type(value["smoothed"]) is bool
        good = good and type(value["group_size"]) is int and value["group_size"] in GROUP_SIZES
        if not good or (value["smoothed"] and value["precision"] not in QUANTISED):
            raise ArtifactError(f"{MANIFEST}: recipe: {key!r:.100}: {value!r:.100} is not accepted")
        formats[int(layer)][name] = StoredFormat(**value)
    return formats


def word_tensors(spec: EncoderSpec) -> Shapes:
    """(dtype, shape) by name of the word table in 8 bits a value."""
    return {"scale": ("F32", (spec.vocab_size,)), "data": ("I8", (spec.vocab_size, spec.hidden_size))}


@dataclass(frozen=True)
class Manifest:
    """What ``xfast.json`` says. ``layout``: the version of csrc/layout.h that the packed files are in.

    model_class: "package.module:Class"; arguments: of its constructor beside the config; encoder: the dotted path of
    the encoder inside it. layers: how many run, None = all. linear_dtype, word_dtype: what the original weights were.
    aliases: parameters that are others under a second name. files: what each file must be. recipe: the products that
    differ from ``precision``, see ``recipe_content``.
    """

    layout: int
    model_class: str
    arguments: dict[str, bool]
    encoder: str
    precision: str
    layers: int | None
    spec: dict[str, Any]
    linear_dtype: str
    word_dtype: str
    packed_words: bool
    aliases: dict[str, str]
    files: dict[str, FileRecord]
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """With a hash over everything else in it."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, "sha256": digest(content)}, indent=1, sort_keys=True).encode() + b"\n"


def is_artifact(folder: Path) -> bool:
    """Whether a folder is a packed artifact, finished or not."""
    return is_file(folder / MANIFEST) or is_folder(folder / STAGING)


def manifest_in(folder: Path) -> Manifest | None:
    """The manifest of a packed artifact; None where there is anything else. Raises like :func:`read_manifest`."""
    return read_manifest(folder) if is_artifact(folder) else None


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactError: no artifact, an unfinished one, another format, or a changed manifest."""
    path = folder / MANIFEST
    with _as_artifact_error():
        there, begun = is_file(path), is_folder(folder / STAGING)
    if not there:
        if begun:
            raise ArtifactError(f"{folder}: is not finished: run the same command again to continue it")
        raise ArtifactError(f"{folder}: is no packed artifact: it has no {MANIFEST}; make one with xfast.save")
    with _as_artifact_error(), reading(path):
        content = strict_json(path.read_bytes(), path)
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise ArtifactError(f"{path}: is not the manifest of a packed artifact: it names no format")
    if content["format"] not in (1, FORMAT):
        raise ArtifactError(f"{path}: format {content['format']}; this version reads 1 and {FORMAT}: upgrade xfast")
    if content.pop("sha256", None) != digest(content):
        raise ArtifactError(f"{path}: was changed: it does not have the hash that it names")
    version = content.pop("format")
    if version == 1:
        content.setdefault("recipe", {})
    if content.keys() != {one.name for one in fields(Manifest)}:
        raise ArtifactError(f"{path}: has the fields {sorted(content)}, which are not those of format {version}")
    manifest = Manifest(**{**content, "files": _records(content["files"], path)})
    _check(manifest, path)
    return manifest


def _check(manifest: Manifest, path: Path) -> None:
    """Types and values; that the spec is the model's is checked when the model has been built."""
    m = manifest
    strings = (m.model_class, m.encoder, m.linear_dtype, m.word_dtype)
    good = (
        all(isinstance(text, str) for text in strings)
        and isinstance(m.spec, dict)
        and type(m.packed_words) is bool
        and (m.layers is None or type(m.layers) is int)
        and isinstance(m.arguments, dict)
        and all(type(value) is bool for value in m.arguments.values())
        and isinstance(m.recipe, dict)
        and isinstance(m.aliases, dict)
        and all(isinstance(name, str) for name in m.aliases.values())
    )
    if not good or m.precision not in CPU_PRECISIONS:
        raise ArtifactError(f"{path}: a field has a value that format {FORMAT} does not accept")
    if m.layout != _C.pack_version:
        raise ArtifactError(f"{path}: packed in layout {m.layout!r}; this version reads layout {_C.pack_version}")


def _records(files: Any, path: Path) -> dict[str, FileRecord]:
    if not isinstance(files, dict):
        raise ArtifactError(f"{path}: files: expected an object")
    records = {}
    for name, value in files.items():
        known = isinstance(value, dict) and value.keys() == {"bytes", "sha256", "checksum"}
        hexadecimal = known and all(isinstance(value[key], str) for key in ("sha256", "checksum"))
        if not hexadecimal or type(value["bytes"]) is not int or value["bytes"] < 0 or not _plain_name(name):
            raise ArtifactError(f"{path}: files: {name!r:.100}: expected a file's name, bytes, sha256 and checksum")
        records[name] = FileRecord(**value)
    return records


def _plain_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*", name) is not None and name != MANIFEST


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its hash, whatever its white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_huge(config: Any, largest: int, layers: int, path: Path) -> None:
    """Refuses sizes for which an artifact cannot hold tensors, before memory and time are spent on them.

    Only the fields that size tensors in the supported classes: a config may have any others.

    Args:
        config: what config.json says, or one inside it.
        largest: bytes that are there, or rows or columns of the largest tensor.
        layers: tensors that are there.
        path: of config.json.

    Raises:
        ArtifactError: names the field.
    """
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict) and name.endswith("_config"):
            refuse_huge(value, largest, layers, path)
            continue
        limit = layers if _LAYERS.fullmatch(name) else largest if name in _SIZES else None
        if limit is not None and isinstance(value, (int, float)) and value > limit:
            raise ArtifactError(f"{path}: {name} is {value}, more than the tensors beside it can have")


class Reader:
    """The files of an artifact. ``verify``: "size", "checksum" (all bytes that are used), "full" (SHA-256, all files).

    Raises:
        ArtifactError: a file is missing, damaged, or not what the manifest and the model need.
    """

    def __init__(self, folder: Path, verify: str) -> None:
        self.folder = folder
        self._found = self._state()
        self.manifest = read_manifest(folder)
        self._verify = verify
        if verify == "full":
            verify_all(folder, self.manifest)

    @contextlib.contextmanager
    def one_artifact(self) -> Iterator[None]:
        """What is read within belongs together. Raises ArtifactError: meanwhile another took the artifact's place."""
        try:
            yield
        except ArtifactError:
            self._refuse_another()
            raise
        self._refuse_another()

    def _refuse_another(self) -> None:
        if self._state() != self._found:
            raise ArtifactError(f"{self.folder}: was replaced while it was read; load it again") from None

    def _state(self) -> tuple[int, ...] | None:
        with contextlib.suppress(OSError, ValueError):  # a name that cannot be
            return state_of((self.folder / MANIFEST).stat())  # moved into its place last, taken away first
        return None

    def content(self, name: str) -> bytes:
        """A small file, its hash verified whatever ``verify`` is."""
        record, path = self._record(name), self.folder / name
        with _as_artifact_error(), reading(path):
            content = path.read_bytes()
        if len(content) != record.bytes or hashlib.sha256(content).hexdigest() != record.sha256:
            raise ArtifactError(f"{path}: damaged or changed: it does not have the hash that {MANIFEST} names")
        return content

    def tensors(self, name: str, expected: Shapes | None, *, copy_on_write: bool = False) -> tuple[Mapped, Shapes]:
        """Maps a file, which must hold the ``expected`` tensors in that order (None: any)."""
        record, path = self._record(name), self.folder / name
        with _as_artifact_error():
            file = TensorFile(path)
            if file.bytes != record.bytes:
                raise ArtifactError(f"{path}: has {file.bytes} bytes, {MANIFEST} names {record.bytes}")
            shapes = {key: (entry.dtype, entry.shape) for key, entry in file.entries.items()}
            if expected is not None and list(shapes.items()) != list(expected.items()):
                raise ArtifactError(f"{path}: holds other tensors than {self.manifest.spec} needs: {shapes}"[:1000])
            return file.map(record if self._verify == "checksum" else None, copy_on_write=copy_on_write), shapes

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder / MANIFEST}: does not list {name}")
        return self.manifest.files[name]


def verify_all(folder: Path, manifest: Manifest, advance: Callable[[str], None] = lambda name: None) -> None:
    """Hashes every file. ``advance`` is told each file's name before. Raises ArtifactError naming the first bad one."""
    for name, record in manifest.files.items():
        advance(name)
        with _as_artifact_error():
            found = record_of(folder / name)
        if found != record:
            raise ArtifactError(f"{folder / name}: damaged or changed: it does not have the hash that {MANIFEST} names")


@contextlib.contextmanager
def _as_artifact_error() -> Any:
    try:
        yield
    except ArtifactError:
        raise
    except DataFileError as error:
        raise ArtifactError(str(error)) from None


class Staging:
    """Files of an artifact to be, in a subfolder until ``commit`` moves them into place, the manifest last.

    What was there before stays readable until then. With an ``identity`` (what is being converted, how), files that an
    earlier, killed run with the same identity finished are kept: ``finished``.

    Raises:
        ArtifactWriteError: the folder holds something else, another process writes to it, or the system refuses.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder, self._staging = folder, folder / STAGING
        self._identity = identity
        self.finished: dict[str, FileRecord] = {}
        self._records: dict[str, FileRecord] = {}
        with writing(folder):
            begun = self._staging.exists()
        if not begun:  # before anything is made there
            self._refuse_foreign()
        with writing(folder):
            self._made = not folder.exists()
            self._lock = self._locked()
        with contextlib.ExitStack() as refused:
            refused.callback(self._lock.close)
            self._refuse_foreign()  # again: who wrote there until now may have been about to finish
            refused.pop_all()
        self._moving = bool(self._placed())
        if identity is not None:
            self._resume()
        with writing(folder):
            for path in self._staging.iterdir():
                if path.name not in {*self.finished, "lock", _JOURNAL, _PLACING}:
                    path.unlink()

    def _locked(self) -> IO[str]:
        """The lock. Who had it before removes the file, which may be the one that was opened here: then once more."""
        path = self._staging / "lock"
        for _ in range(100):
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as refused:
                with contextlib.suppress(FileExistsError):  # and gone when mkdir looks what it is
                    self._staging.mkdir(parents=True, exist_ok=True)
                file = refused.enter_context(path.open("w"))
                if not locks.lock(file):
                    break
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    refused.pop_all()
                    return file
        raise ArtifactWriteError(f"{self.folder}: another process is writing an artifact there")

    def _refuse_foreign(self) -> None:
        with writing(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise ArtifactWriteError(
                    f"{self.folder}: is a file; expected a folder, or a path where one can be made"
                )
            names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if names - _HARMLESS - self._placed() and self._listed() is None:
            damaged = f", whose {MANIFEST} is damaged or another program's" if MANIFEST in names else ""
            raise ArtifactWriteError(
                f"{self.folder}: holds something else than a packed artifact ({', '.join(sorted(names)[:3])}, ...)"
                f"{damaged}; accepted: a new or empty folder, or an artifact, which is replaced"
            )

    def _listed(self) -> set[str] | None:
        """The files of an artifact of any format and layout; None: there is none, or not a whole manifest of one."""
        path = self.folder / MANIFEST
        with contextlib.suppress(OSError, DataFileError):
            content = strict_json(path.read_bytes(), path)
            if isinstance(content, dict) and content.pop("sha256", None) == digest(content):
                names = content.get("files")
                return {name for name in names if _plain_name(name)} if isinstance(names, dict) else None
        return None

    def _placed(self) -> set[str]:
        """What a commit that was killed has left beside the staging folder; only that is known to be xfast's."""
        path = self._staging / _PLACING
        with contextlib.suppress(OSError, DataFileError):
            content = strict_json(path.read_bytes(), path)
            if isinstance(content, list):
                return {name for name in content if isinstance(name, str) and _plain_name(name)}
        return set()

    def _resume(self) -> None:
        journal = self._staging / _JOURNAL
        if not journal.is_file():
            return
        # a journal that cannot be read: start anew
        with contextlib.suppress(DataFileError, KeyError, TypeError, AttributeError):
            content = strict_json(journal.read_bytes(), journal)
            if content["identity"] == self._identity:
                for name, record in _records(content["files"], journal).items():
                    path = self._staging / name
                    if path.is_file() and record_of(path) == record:
                        self.finished[name] = record

    def tensors(self, name: str, shapes: Shapes, pieces: Callable[[], Iterable[Any]]) -> None:
        """Writes a safetensors file unless it is finished; ``pieces`` is called only then."""
        if name in self.finished:
            self._records[name] = self.finished[name]
        else:
            self._done(name, write_tensors(self._staging / name, shapes, pieces()))

    def content(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        self._done(name, write_file(self._staging / name, [content]))

    def _done(self, name: str, record: FileRecord) -> None:
        self._records[name] = record
        if self._identity is not None:
            files = {key: asdict(value) for key, value in self._records.items()}
            content = json.dumps({"identity": self._identity, "files": files}).encode()
            partial = self._staging / "journal.partial"
            write_file(partial, [content])
            with writing(partial):
                partial.replace(self._staging / _JOURNAL)

    def commit(self, manifest_of: Callable[[dict[str, FileRecord]], Manifest]) -> Manifest:
        """Moves everything into place."""
        manifest = manifest_of(self._records)
        write_file(self._staging / MANIFEST, [manifest.to_json()])
        old = self._placed() | (self._listed() or set())
        write_file(self._staging / _PLACING, [json.dumps(sorted(old | self._records.keys())).encode()])
        self._moving = True
        with writing(self.folder):
            (self.folder / MANIFEST).unlink(missing_ok=True)  # from here to the end it is no artifact
            for name in sorted(old - self._records.keys()):
                (self.folder / name).unlink(missing_ok=True)
            for name in (*self._records, MANIFEST):
                (self._staging / name).replace(self.folder / name)
            (self._staging / _PLACING).unlink()
        self._clear()
        self._lock.close()
        return manifest

    def _clear(self) -> None:
        """Removes the staging folder, the lock last: the next writer may come as soon as that is gone."""
        with contextlib.suppress(OSError):
            for path in self._staging.iterdir():
                if path.name != "lock":
                    path.unlink()
            (self._staging / "lock").unlink()
            self._staging.rmdir()

    def abandon(self) -> None:
        """After a failure: removes what was begun, or keeps what a later run with the same identity continues.

        Once files are moved into place nothing is: it tells that the artifact is not finished, and which files are its.
        """
        if self._identity is None and not self._moving:
            self._clear()
            if self._made:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
        self._lock.close()
