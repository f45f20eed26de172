"""safetensors files: written as a stream, read or mapped with every number of the header checked.

A file is 8 bytes (length of the header, little-endian), the header (JSON, padded with spaces) and the tensors one after
another. xfast pads headers to whole pages, so that mapped tensors keep the alignment that the kernels expect.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfast import _C
from xfast.errors import ArtifactWriteError, DataFileError, XfastError
from xfast.threads import get_num_threads

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""safetensors' names of the types that xfast reads and writes, widest first."""

_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "BOOL": 8,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
}
"""Bits of a value, for every type that safetensors has."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = 4096
_SAMPLE = 4096  # bytes
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """One tensor: type, shape, and its bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FileRecord:
    """What a whole file must be: bytes, SHA-256 (hex), and the 64-bit checksum of ``_C.checksum`` (16 hex digits)."""

    bytes: int
    sha256: str
    checksum: str


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the operating system's errors into DataFileError."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, an empty file to map
        if isinstance(error, XfastError):
            raise
        raise DataFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def is_folder(path: Path) -> bool:
    """Whether there is such a folder. Raises DataFileError where the system does not tell: closed, or too long."""
    with reading(path):
        return path.is_dir()


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises like :func:`is_folder`."""
    with reading(path):
        return path.is_file()


def exists(path: Path) -> bool:
    """Whether there is anything of that name. Raises like :func:`is_folder`."""
    with reading(path):
        return path.exists()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's errors (disk full, read-only folder) into ArtifactWriteError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, XfastError):  # of whatever makes the pieces
            raise
        raise ArtifactWriteError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


class TensorFile:
    """A safetensors file. Raises DataFileError for a file that is not one, to the last byte.

    With ``foreign`` tensors of types that are not read here may lie among those that are.
    """

    def __init__(self, path: Path, *, foreign: bool = False) -> None:
        self.path = path
        with reading(path), path.open("rb") as file:
            self._state = state_of(os.fstat(file.fileno()))
            self.bytes = self._state[2]
            length = int.from_bytes(file.read(8), "little")
            if self.bytes < 8 or not 0 < length <= min(self.bytes - 8, _LONGEST_HEADER):
                raise DataFileError(f"{path}: not a safetensors file: its header does not fit into {self.bytes} bytes")
            raw = file.read(length)
        self._start = 8 + length
        self._header = hashlib.sha256(raw).digest()
        self.entries = _parse(raw, self.bytes - self._start, path, _BITS if foreign else DTYPES)

    @property
    def mtime_ns(self) -> int:
        """When the file was changed last."""
        return self._state[3]

    def sample(self) -> str:
        """Hash of the header and of the first, middle and last bytes of every tensor."""
        digest = hashlib.blake2b(self._header, digest_size=16)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            self._require_same(os.fstat(file.fileno()))
            for entry in self.entries.values():
                for at in (entry.begin, (entry.begin + entry.end) // 2, max(entry.begin, entry.end - _SAMPLE)):
                    file.seek(self._start + at)
                    digest.update(file.read(min(_SAMPLE, entry.end - at)))
        return digest.hexdigest()

    def _require_same(self, found: os.stat_result) -> None:
        if state_of(found) != self._state:
            raise DataFileError(f"{self.path}: was replaced or changed while it was read; start again")

    def read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """A copy of a tensor, or of ``rows`` of its rows."""
        entry = self.entries[name]
        shape = entry.shape
        if rows is not None:
            shape = (min(rows, entry.shape[0] - first), *entry.shape[1:])
        size = math.prod(shape) * DTYPES[entry.dtype].itemsize
        if size == 0:
            return torch.empty(shape, dtype=DTYPES[entry.dtype], device="cpu")
        # Not from the heap, which keeps what is freed in pieces: memory would grow from layer to layer.
        memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            self._require_same(os.fstat(file.fileno()))
            file.seek(self._start + entry.begin + (size // max(shape[0], 1) * first if rows is not None else 0))
            view, done = memory.data, 0
            while done < size:
                count = file.readinto(view[done:])
                if not count:
                    raise DataFileError(f"{self.path}: ended while {name} was read")
                done += count
        return torch.from_numpy(memory).view(DTYPES[entry.dtype]).view(shape)

    def map(self, record: FileRecord | None = None, *, copy_on_write: bool = False) -> Mapped:
        """Maps the file; see :class:`Mapped`. With a ``record`` the bytes must have its checksum."""
        mapped = Mapped(self, _memory(self.path, self.bytes, copy_on_write), self._start)
        with reading(self.path):  # else the header may be one file's and the bytes another's
            self._require_same(self.path.stat())
        if record is not None and checksum(mapped.memory) != record.checksum:
            raise DataFileError(f"{self.path}: damaged: its checksum is not the one in the manifest")
        return mapped


class Mapped:
    """The tensors of a mapped file, which are read in place and shared with other processes.

    With ``copy_on_write`` writing to one changes this process's pages only; without, arrays are read-only.
    """

    def __init__(self, file: TensorFile, memory: np.ndarray, start: int) -> None:
        self.memory = memory
        self._file, self._start = file, start

    def bytes_of(self, name: str) -> np.ndarray:
        """uint8 [bytes]."""
        entry = self._file.entries[name]
        return self.memory[self._start + entry.begin : self._start + entry.end]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, which keeps the mapping alive."""
        entry = self._file.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
        return torch.from_numpy(self.bytes_of(name)).view(DTYPES[entry.dtype]).view(entry.shape)


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], pieces: Iterable[Any]) -> FileRecord:
    """Writes a safetensors file from (dtype, shape) by name, and the tensors' bytes in that order, in any pieces.

    Raises:
        ArtifactWriteError: the operating system refuses.
    """
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % _PAGE)

    def whole() -> Iterator[Any]:
        yield len(raw).to_bytes(8, "little") + raw
        yield from pieces

    return write_file(path, whole())


def write_file(path: Path, pieces: Iterable[Any]) -> FileRecord:
    """Writes bytes-like pieces (arrays included), to the disk itself, and says what the file now must be."""
    digest, total = hashlib.sha256(), 0
    with writing(path), path.open("wb", buffering=0) as file:
        for piece in pieces:
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8) if isinstance(piece, np.ndarray) else None
            view = memoryview(piece) if flat is None else flat.data
            digest.update(view)
            total += len(view)
            while len(view):
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return FileRecord(total, digest.hexdigest(), checksum(_memory(path, total)))


def record_of(path: Path) -> FileRecord:
    """Reads the whole file."""
    with reading(path):
        size = path.stat().st_size
        memory = _memory(path, size)
        return FileRecord(size, hashlib.sha256(memory.data).hexdigest(), checksum(memory))


def checksum(memory: np.ndarray) -> str:
    """``_C.checksum`` as 16 hex digits."""
    return f"{_C.checksum(memory, get_num_threads()):016x}"


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """uint8 [bytes] of a tensor in host memory, without a copy where it is contiguous."""
    flat: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor in host memory as an array, without a copy where it is contiguous; NumPy has no bf16: bits as uint16."""
    plain = tensor.detach().contiguous()
    array: np.ndarray = (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()
    return array


def state_of(found: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file from one that took its place, and from itself after a change."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _memory(path: Path, size: int, copy_on_write: bool = False) -> np.ndarray:
    if size == 0:
        return np.zeros(0, np.uint8)
    with reading(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < size:  # reading a mapped page behind the end would end the process
            raise DataFileError(f"{path}: became shorter while it was read")
        access = mmap.ACCESS_COPY if copy_on_write else mmap.ACCESS_READ
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=access), np.uint8)


def _parse(raw: bytes, data_bytes: int, path: Path, accepted: Collection[str]) -> dict[str, Entry]:
    """Entries of a header; together they must cover the data exactly, without overlap."""
    header = strict_json(raw, path)
    if not isinstance(header, dict):
        raise DataFileError(f"{path}: not a safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, fields, path, accepted) for name, fields in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise DataFileError(f"{path}: tensor {name} begins at byte {entry.begin}, expected {at}")
        at = entry.end
    if at != data_bytes:
        raise DataFileError(f"{path}: holds {data_bytes} bytes of tensors, its header names {at}: truncated or damaged")
    return entries


def _entry(name: str, fields: Any, path: Path, accepted: Collection[str]) -> Entry:
    known = isinstance(fields, dict) and fields.keys() == {"dtype", "shape", "data_offsets"}
    if not known or not _sizes(fields["shape"]) or not _sizes(fields["data_offsets"]):
        raise DataFileError(f"{path}: tensor {name}: expected dtype, shape and data_offsets, got {fields!r:.200}")
    dtype, shape, offsets = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in accepted:
        raise DataFileError(f"{path}: tensor {name} is {dtype!r:.50}; accepted: {', '.join(accepted)}")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _BITS[dtype]:
        raise DataFileError(f"{path}: tensor {name}: {offsets!r:.100} are not the bytes of {dtype} {shape!r:.100}")
    return Entry(dtype, shape, offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)  # not bool
    )


def strict_json(raw: bytes, path: Path) -> Any:
    """Parses JSON, refusing names that occur twice, NaN and infinity.

    Raises:
        DataFileError: it is not JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(raw.decode(), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"{path}: not JSON: {error}") from None
