"""Engines kept on disk between processes: found by what they were built from, checked byte for byte before use.

A file is ``magic | version | bytes of header | header | engine``: 8 bytes, two little-endian uint32, JSON, the blob.
The header holds nothing but the key, the engine's size and its SHA-256, and is written in one way only, so ``load``
compares it whole: no bit of a file can change unnoticed, and nothing of it is believed before it was compared.
Checksums find damage, not malice: who may write to the folder may replace engines, so it is made for its owner alone.

There is no lock. Files are written under a name of their own, flushed, and renamed over the old one, which is atomic:
readers see the old file or the new one, and of two writers the later one wins, with the same engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from xfast.architecture import EncoderSpec, EncoderWeights, require_values
from xfast.backends.tensorrt_build import NETWORK_VERSION, Profile
from xfast.errors import InvalidInputError, InvalidOptionError

VARIABLE = "XFAST_CACHE"
"""Environment variable with the folder to use instead of the user's cache folder."""

SIZE_VARIABLE, DEFAULT_BYTES = "XFAST_CACHE_BYTES", 32 << 30
"""Environment variable with the most bytes of engines that a folder may hold after a save, and what else it may."""

MAGIC, VERSION = b"xfastTRT", 1
SUFFIX = ".engine"
MAX_HEADER = 1 << 20
STALE_SECONDS = 3600
"""A temporary file that was not written to for so long belongs to a process that died."""

_PREFIX = struct.Struct("<8sII")
_OWN_NAME = re.compile(r".+-[0-9a-f]{32}")
_CHUNK = 16 << 20
_NOTES = 50


def digest(weights: EncoderWeights) -> str:
    """SHA-256, in hexadecimal, of every parameter's name, dtype, shape and bytes, whatever order they are held in.

    Streams: at most 16 MiB, or one row of a parameter that is not contiguous, are copied at a time.

    Raises:
        InvalidWeightsError: a parameter on the ``meta`` device.
    """
    hashed = hashlib.sha256()
    for name, module, parameter in sorted(weights.parameters(), key=lambda each: each[0]):
        tensor = getattr(module, parameter).detach()
        require_values(name, tensor)
        hashed.update(_json([name, str(tensor.dtype), list(tensor.shape)]) + b"\n")
        for chunk in _chunks(tensor):
            hashed.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values in row-major order, as tensors of at least one dimension."""
    rows = tensor.view(-1) if tensor.is_contiguous() else tensor
    row_bytes = max(1, rows.element_size() * (rows.numel() // max(1, rows.shape[0])))
    step = max(1, _CHUNK // row_bytes)
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].contiguous().view(-1)


def _json(value: Any) -> bytes:
    """The one way in which a value is written."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Key:
    """All that decides which engine it is. Two keys that differ anywhere have different names.

    ``weights`` is what :func:`digest` returns, ``target`` names what the engine runs on (a compute capability or the
    GPU), ``runtime`` and ``version`` are those of :class:`xfast.backends.tensorrt_runtime.Runtime`.

    Raises:
        InvalidInputError: ``weights`` is no SHA-256.
    """

    weights: str
    spec: EncoderSpec
    precision: str
    layers: int
    profiles: tuple[Profile, ...]
    runtime: str
    version: str
    target: str
    network: int = NETWORK_VERSION

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.weights):
            raise InvalidInputError(f"weights: {self.weights!r} is no SHA-256 in hexadecimal")
        object.__setattr__(self, "profiles", tuple(self.profiles))

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON's types."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"spec": asdict(self.spec), "profiles": [profile.to_json() for profile in self.profiles]}

    @classmethod
    def from_json(cls, values: Any) -> Key:
        """The inverse of ``to_json``.

        Raises:
            InvalidInputError: not what ``to_json`` writes.
        """
        try:
            spec = EncoderSpec(**values["spec"])
            profiles = tuple(
                Profile(**{name: tuple(sizes) for name, sizes in profile.items()}) for profile in values["profiles"]
            )
            key = cls(**{**values, "spec": spec, "profiles": profiles})
            same = _json(key.to_json()) == _json(values) and all(map(_has_its_types, (key, spec)))
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise InvalidInputError(f"not an engine's key: {type(error).__name__}: {error}") from None
        if not same:
            raise InvalidInputError("not an engine's key: values of other types")
        return key

    @property
    def name(self) -> str:
        """Its file's name without the ending: readable at the beginning, certain at the end; letters, digits, ``-``."""
        what = f"{self.spec.family}-{self.layers}x{self.spec.hidden_size}-{self.precision}-{self.target}"
        readable = re.sub(r"[^0-9a-z]+", "-", what.lower())[:60].strip("-")
        return f"{readable}-{hashlib.sha256(_json(self.to_json())).hexdigest()[:32]}"


def _has_its_types(data: Any) -> bool:
    """Whether the fields of numbers and strings hold what their annotations say."""
    plain = {"int": (int,), "float": (float,), "str": (str,), "bool": (bool,)}
    return all(
        type(getattr(data, each.name)) in plain.get(str(each.type), (tuple, EncoderSpec)) for each in fields(data)
    )


@dataclass(frozen=True)
class Entry:
    """A file of the store: ``bytes`` on disk, ``used`` in seconds since 1970, the key or why it has none.

    Its engine was not checked: only ``load`` does.
    """

    name: str
    path: Path
    bytes: int
    used: float
    key: Key | None
    reason: str | None


def default_folder() -> Path:
    """``$XFAST_CACHE``, else ``xfast/tensorrt`` in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``).

    Raises:
        InvalidOptionError: the user has no home; names the variable to set.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():  # a relative one is to be ignored, says its specification
        return Path(xdg) / "xfast" / "tensorrt"
    try:
        home = Path.home()
    except RuntimeError:
        raise InvalidOptionError(f"there is no home folder to keep engines in: set {VARIABLE}") from None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return base / "xfast" / "tensorrt"


def size_limit() -> int:
    """``$XFAST_CACHE_BYTES``, else ``DEFAULT_BYTES``.

    Raises:
        InvalidOptionError: the variable holds no size.
    """
    given = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_BYTES)
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise InvalidOptionError(f"{SIZE_VARIABLE}: {given!r} is not accepted; accepted: a number of bytes, 0 or more")
    return int(given)


_held: set[Path] = set()
"""Files whose engines this process has loaded or saved."""


class _Refusal(Exception):
    """Why a file is not used; ``kind`` is the key in ``Store.reasons``."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Store:
    """Engines in a folder, None for ``default_folder()``; it is made when the first one is saved.

    Nothing is raised because of what the disk holds or refuses. ``reasons`` counts what went wrong by kind: ``absent``,
    ``unreadable``, ``truncated``, ``version``, ``foreign``, ``corrupt`` (load), ``unwritable`` (save, prune);
    ``notes`` are the last explanations, with the file's name.

    Raises:
        InvalidOptionError: the folder cannot be a path (NUL inside), or there is no home folder.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        try:
            possible = b"\0" not in os.fsencode(self.folder)
        except UnicodeError:
            possible = False
        if not possible:
            raise InvalidOptionError(f"folder: {str(self.folder)!r} cannot be a path")
        self.reasons: Counter[str] = Counter()
        self.notes: deque[str] = deque(maxlen=_NOTES)

    def path(self, key: Key) -> Path:
        """Where the key's engine is or would be."""
        return self.folder / (key.name + SUFFIX)

    def load(self, key: Key, *, use: bool = True) -> bytes | None:
        """The key's engine, exactly as it was saved, or None; ``reasons`` and ``notes`` say why.

        Args:
            key: of the engine.
            use: whether it counts as used now.
        """
        path = self.path(key)
        try:
            blob = _read(path, key)
        except FileNotFoundError:
            self._note("absent", f"{path.name}: not there")
            return None
        except _Refusal as refusal:
            self._note(refusal.kind, f"{path.name}: {refusal}")
            return None
        except (OSError, MemoryError) as error:
            self._note("unreadable", f"{path.name}: {type(error).__name__}: {error}")
            return None
        if use:
            with suppress(OSError):  # a folder that is only read has no least recently used file
                os.utime(path)
            _held.add(path.absolute())
        return blob

    def refusal(self) -> str | None:
        """Why nothing can be saved, as far as the folder, or the nearest one above it that exists, tells; or None."""
        place = next((each for each in (self.folder, *self.folder.parents) if os.path.lexists(each)), self.folder)
        probe = place / f".xfast.{os.getpid()}.{os.urandom(8).hex()}.tmp"
        try:
            os.close(os.open(probe, _WRITE, 0o600))
            probe.unlink()
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def save(self, key: Key, blob: bytes | memoryview) -> Path | None:
        """Writes the key's engine, in place of whatever lies there, whole or not at all.

        Returns:
            Its path; None when the disk refused (full, read-only, no permission): ``notes`` say why.

        Raises:
            InvalidInputError: an empty engine.
        """
        view = memoryview(blob).cast("B")
        if not view:
            raise InvalidInputError("an engine has at least one byte")
        path = self.path(key)
        temporary = self.folder / f".{key.name[-32:]}.{os.getpid()}.{os.urandom(8).hex()}.tmp"
        header = _header(key, view)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            try:
                with os.fdopen(os.open(temporary, _WRITE, 0o600), "wb", buffering=0) as file:
                    for part in (_PREFIX.pack(MAGIC, VERSION, len(header)), header, view):
                        _write(file, part)
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            self._note("unwritable", f"{path.name} was not saved: {type(error).__name__}: {error}")
            return None
        _sync_folder(self.folder)
        _held.add(path.absolute())
        return path

    def entries(self) -> tuple[Entry, ...]:
        """The files of the store by name, also those that ``load`` would refuse."""
        found = []
        for path in self._files():
            key, reason = None, None
            try:
                status = path.stat()
                key = _read_key(path)
            except FileNotFoundError:  # removed meanwhile
                continue
            except (_Refusal, InvalidInputError, OSError) as error:
                reason = str(error)
            found.append(Entry(path.stem, path, status.st_size, status.st_mtime, key, reason))
        return tuple(found)

    def prune(self, max_bytes: int, *, held: bool = True) -> tuple[str, ...]:
        """Removes the least recently used files until at most ``max_bytes`` are left, and what dead processes left.

        Files that are not named as the store names them stay, and count for nothing.

        Args:
            max_bytes: 0 or more.
            held: whether engines that this process has loaded or saved may go, too.

        Returns:
            Names of the files that were removed.

        Raises:
            InvalidOptionError: a negative size.
        """
        if max_bytes < 0:
            raise InvalidOptionError(f"max_bytes: {max_bytes} is not accepted; accepted: 0 or more")
        self._sweep()
        own = [entry for entry in self.entries() if _OWN_NAME.fullmatch(entry.name)]
        total, removed = sum(entry.bytes for entry in own), []
        for entry in sorted(own, key=lambda entry: (entry.used, entry.name)):
            if total <= max_bytes:
                break
            if (held or entry.path.absolute() not in _held) and self._unlink(entry.path):
                total -= entry.bytes
                removed.append(entry.name)
        return tuple(removed)

    def _files(self) -> Sequence[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == SUFFIX and path.is_file())
        except FileNotFoundError:
            return ()
        except OSError as error:
            self._note("unreadable", f"{self.folder}: {type(error).__name__}: {error}")
            return ()

    def _unlink(self, path: Path) -> bool:
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._note("unwritable", f"{path.name} was not removed: {type(error).__name__}: {error}")
            return False
        return True

    def _sweep(self) -> None:
        """Removes temporary files of processes that died."""
        with suppress(OSError):
            for path in self.folder.glob(".*.tmp"):
                with suppress(OSError):
                    if path.stat().st_mtime < time.time() - STALE_SECONDS:
                        path.unlink()

    def _note(self, kind: str, text: str) -> None:
        self.reasons[kind] += 1
        self.notes.append(text)


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
# a named pipe in a file's place must not make us wait for a writer
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _header(key: Key, blob: bytes | memoryview) -> bytes:
    return _json({"bytes": len(blob), "key": key.to_json(), "sha256": hashlib.sha256(blob).hexdigest()})


def _write(file: Any, part: bytes | memoryview) -> None:
    rest = memoryview(part)
    while rest:  # a nearly full disk takes part of it, then refuses
        rest = rest[file.write(rest[:_CHUNK]) :]


def _sync_folder(folder: Path) -> None:
    """So that the new name is there after a power failure, too; where folders cannot be synced it may not be."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open(path: Path) -> tuple[BinaryIO, int]:
    """The file and its size."""
    descriptor = os.open(path, _READ)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _Refusal("unreadable", "not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def _read_header(file: BinaryIO, size: int) -> bytes:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise _Refusal("truncated", f"{size} bytes are less than the beginning of a header")
    magic, version, length = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise _Refusal("foreign", "no engine that xfast saved")
    if version != VERSION:
        raise _Refusal("version", f"written in format {version}, this is format {VERSION}")
    if length > MAX_HEADER:
        raise _Refusal("corrupt", f"a header of {length} bytes")
    header = file.read(length)
    if len(header) < length:
        raise _Refusal("truncated", f"it ends within the header, at {size} bytes")
    return header


def _parse(header: bytes) -> dict[str, Any]:
    try:
        values = json.loads(header)
    except (ValueError, RecursionError):
        raise _Refusal("corrupt", "its header is no JSON") from None
    if not isinstance(values, dict) or values.keys() != {"bytes", "key", "sha256"}:
        raise _Refusal("corrupt", "its header lacks fields or has unknown ones")
    return values


def _read_key(path: Path) -> Key:
    file, size = _open(path)
    with file:
        header = _read_header(file, size)
    values = _parse(header)
    expected = _PREFIX.size + len(header)
    if type(values["bytes"]) is not int or size != expected + values["bytes"]:
        raise _Refusal("truncated", f"{size - expected} bytes follow its header, which says {values['bytes']!r}"[:200])
    return Key.from_json(values["key"])


def _read(path: Path, key: Key) -> bytes:
    """The engine. Raises OSError or _Refusal."""
    file, size = _open(path)
    with file:
        header = _read_header(file, size)
        values = _parse(header)
        if values["key"] != json.loads(_json(key.to_json())):
            raise _Refusal("foreign", "it holds the engine of another key")
        count = size - _PREFIX.size - len(header)
        if values["bytes"] != count:
            kind = "truncated" if isinstance(values["bytes"], int) and count < values["bytes"] else "corrupt"
            raise _Refusal(kind, f"{count} bytes follow its header, which says {values['bytes']!r}"[:200])
        blob = file.read(count)
    if header != _header(key, blob):  # its checksum, and every byte of the header itself
        raise _Refusal("corrupt", "its checksum is wrong")
    return blob
