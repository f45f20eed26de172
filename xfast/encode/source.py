"""The input: which files, which shards of them, and reading one shard."""

from __future__ import annotations

import dataclasses
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from xfast.encode import jsonl, parquet
from xfast.encode.rows import InputFile, Rows, Shard, unify
from xfast.encode.settings import Settings, require_unicode
from xfast.errors import DataFileError, InvalidOptionError
from xfast.tensor_files import reading

KINDS = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""Format by the ending of a file's name."""

_HIDDEN = (".", "_")
_READERS = {"parquet": parquet, "jsonl": jsonl}


def find(source: str, output: Path) -> list[InputFile]:
    """The input files, sorted by path: of a file, a folder (with those in it; hidden ones left out) or a glob.

    A file that is reached over several paths is there once, under the first.

    Raises:
        DataFileError: there is none.
        InvalidOptionError: a file of another format was named, the output lies among the input, or a name is not UTF-8.
    """
    given = Path(source)
    with reading(given):
        if given.is_dir():
            if output.resolve().is_relative_to(given.resolve()):
                raise InvalidOptionError(
                    f"output: {output} lies inside the input {source}; its files would become input"
                )
            paths = [path for path in _walk(given) if path.suffix in KINDS]
        elif given.exists():
            paths = [given]
        else:
            # A pattern that reaches the output must not find the job's own files when it is continued
            paths = [path for path in _matches(source) if not path.resolve().is_relative_to(output.resolve())]
    if not paths:
        raise DataFileError(f"input: {source}: no file ({', '.join(KINDS)}) there")
    once: dict[tuple[int, int], Path] = {}  # links and patterns reach one file often
    for path in sorted(paths):
        found = _state(path)
        if not stat.S_ISREG(found.st_mode):
            raise DataFileError(f"input: {path}: is no file that can be read again; move it away")
        once.setdefault((found.st_dev, found.st_ino), path)
    return [_identified(path, output) for path in once.values()]


def plan(files: Sequence[InputFile], settings: Settings) -> tuple[list[Shard], pa.Schema, list[tuple[str, str]]]:
    """Shards numbered in the files' order, the copied columns' types, and (file, reason) of files that are left out.

    Raises:
        DataFileError: see the readers' ``plan``; a file of 0 bytes; no file is left.
    """
    shards: list[Shard] = []
    schemas: list[tuple[str, pa.Schema]] = []
    left_out: list[tuple[str, str]] = []
    for file in files:
        if file.size == 0:
            if settings.on_error == "fail":
                raise DataFileError(f"{file.path}: the file is empty (--on-error skip leaves it out)")
            left_out.append((file.path, "the file is empty"))
            continue
        found, schema = _READERS[file.kind].plan(file.path, settings)
        if not found:
            left_out.append((file.path, "no row of it can be used"))
            continue
        shards += [dataclasses.replace(shard, number=len(shards) + i) for i, shard in enumerate(found)]
        schemas.append((file.path, schema))
    if not shards:
        raise DataFileError("input: no file has a row that can be used")
    return shards, unify(schemas), left_out


def read(shard: Shard, schema: pa.Schema, settings: Settings) -> Rows:
    """The rows of a shard, see the readers' ``read``."""
    return _READERS[shard.kind].read(shard, schema, settings)


def _walk(folder: Path) -> Iterator[Path]:
    """What lies in a folder and below, behind links to folders too, each folder once; hidden names are left out."""

    def refuse(error: OSError) -> None:  # else what cannot be listed would be no input, silently
        raise DataFileError(f"input: {error.filename}: {error.strerror}") from None

    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(root).resolve()
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        yield from (Path(root) / name for name in files if not name.startswith(_HIDDEN))


def _matches(pattern: str) -> Iterator[Path]:
    """What a pattern matches, but for folders and for what is neither a file nor called like one."""
    parts = Path(pattern).parts
    listed = {
        str(Path(*parts[:i], *["**"] * (part == "**"))) + os.sep for i, part in enumerate(parts) if glob.has_magic(part)
    }
    for folder in (folder for one in listed for folder in glob.iglob(one, recursive=True)):  # noqa: PTH207
        _require_listed(folder)
    for text in glob.iglob(pattern, recursive=True):  # noqa: PTH207
        path = Path(text)
        if path.is_file():
            yield path
        elif path.suffix in KINDS and not (real := path.parent.resolve() / path.name).is_dir():
            yield real  # by its own folder: links that lead round in a circle end in paths that are no file


def _require_listed(folder: str) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:  # which glob passes over
        raise DataFileError(f"input: {folder}: {error.strerror}") from None


def unchanged(files: Sequence[InputFile]) -> None:
    """Looks whether the input is still what it was when the job began.

    Raises:
        DataFileError: a file was changed or is gone.
    """
    for file in files:
        try:
            found = Path(file.path).stat()
            same = (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)
        except OSError:
            same = False
        if not same:
            raise DataFileError(
                f"input: {file.path} changed while it was encoded: some rows may be of the old file, some of the new "
                "one; start again in an empty folder"
            )


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # a link to nowhere, among others
        raise DataFileError(f"input: {path}: {error}") from error


def _identified(path: Path, output: Path) -> InputFile:
    if path.suffix not in KINDS:
        raise InvalidOptionError(f"input: {path} is not accepted; accepted: {', '.join(KINDS)}")
    resolved = path.resolve()
    require_unicode("input", resolved)
    if resolved.is_relative_to(output.resolve()):
        raise InvalidOptionError(f"input: {path} lies inside the output {output}")
    found = _state(resolved)
    return InputFile(str(resolved), KINDS[path.suffix], found.st_size, found.st_mtime_ns)
