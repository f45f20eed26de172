"""The output folder: files that appear whole or not at all, a manifest, and what is already done.

A shard's file is its own checkpoint: its footer says what it is. It is written under a temporary name, its footer read
back, flushed to the disk and renamed; so after a crash at any point each shard is there once and whole, or not at all,
and writing one twice (a worker that was taken for dead) puts the same rows in the same place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xfast import locks
from xfast.encode.rows import InputFile, Shard
from xfast.encode.settings import require_unicode
from xfast.errors import DataFileError, InvalidOptionError

MANIFEST = "_manifest.json"  # readers of a folder of Parquet pass over names that begin so
FORMAT = 1
_LOCK = ".lock"
_PARTIAL = ".partial"
_OURS = re.compile(rf"\.(shard-\d+\.parquet|attempt-\d+|{re.escape(MANIFEST)})\.[0-9a-f]+\{_PARTIAL}")
_GROUP_BYTES = 1 << 28  # of a row group: a shard of tokens' vectors is too large to be read at once
_KEY = b"xfast.encode"  # of the facts, in the metadata of a shard's schema


@dataclass
class Facts:
    """About one shard: of which job it is, rows in the file, rows left out as (name, reason), what was encoded."""

    fingerprint: str
    shard: int
    rows: int = 0
    truncated: int = 0
    tokens: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a folder's manifest says before anything is computed.

    Attributes:
        settings: of the job, with what identifies model and input; the fingerprint is its hash.
        shards: all of them.
        schema: of the copied columns.
        left_out: files that were left out, as (path, reason).
    """

    settings: dict[str, Any]
    shards: list[Shard]
    schema: pa.Schema
    left_out: list[tuple[str, str]]

    @property
    def fingerprint(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard's file lies."""
    return folder / f"shard-{number:06d}.parquet"


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other jobs out of it.

    Raises:
        DataFileError: it cannot be written.
        InvalidOptionError: a job is running in it, or its name is not UTF-8.
    """
    require_unicode("output", folder.resolve())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a", encoding="utf-8")  # which may be somebody else's
    except OSError as error:
        raise DataFileError(f"output: cannot write {folder}: {error}") from error
    with lock:
        try:
            alone = locks.lock(lock)
        except OSError as error:
            raise DataFileError(f"output: cannot lock {folder}: {error}") from error
        if not alone:
            raise InvalidOptionError(f"output: another job is writing {folder}")
        yield


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Removes what killed processes left half written, before and after the block; only names that are made here.

    Raises:
        DataFileError: the system refuses.
    """
    _remove_partial(folder)
    try:
        yield
    finally:
        _remove_partial(folder)  # a worker that was killed leaves some, too


def _remove_partial(folder: Path) -> None:
    try:
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
    except OSError as error:
        raise DataFileError(f"output: cannot write {folder}: {error}") from error


def read_plan(folder: Path, settings: dict[str, Any]) -> Plan | None:
    """The plan of a job that was begun in the folder; None: the folder holds nothing, or another job's plan alone.

    Raises:
        InvalidOptionError: another job's, which differs in settings, model or input; or files that are no job's.
        DataFileError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        try:
            other = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise DataFileError(f"output: cannot read {folder}: {error}") from error
        if other:
            raise InvalidOptionError(f"output: {folder} holds {other[0]} and no manifest; name a folder that is empty")
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["settings"]
        plan = Plan(
            settings=known,
            shards=[Shard(**shard) for shard in record["shards"]],
            schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["schema"]))),
            left_out=[(name, reason) for name, reason in record["left_out"]],
        )
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}; known: {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataFileError(f"{path}: no manifest of an encode job: {error!r}") from error
    if known == settings:
        return plan
    if not any(folder.glob("*.parquet")):  # a job that failed at once, tried again with other settings
        return None
    raise InvalidOptionError(f"output: {folder} is another job's: {_difference(known, settings)}")


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes the manifest of a job that begins.

    Raises:
        DataFileError: it cannot be written, or Parquet cannot hold the copied columns.
    """
    with _holding():
        _leaves(plan.schema)
    _write_manifest(folder, _record(plan))


def complete(folder: Path, plan: Plan, facts: Sequence[Facts]) -> dict[str, Any]:
    """Writes the manifest of a job that has ended, and returns its totals: rows, skipped, truncated, tokens.

    Raises:
        DataFileError: it cannot be written, or the rows of input and output are not equally many.
    """
    totals = {
        "shards": len(facts),
        "rows": sum(one.rows for one in facts),
        "skipped": sum(len(one.skipped) for one in facts),
        "truncated": sum(one.truncated for one in facts),
        "tokens": sum(one.tokens for one in facts),
    }
    planned = sum(shard.rows for shard in plan.shards)
    if [one.shard for one in facts] != [shard.number for shard in plan.shards]:
        raise DataFileError(f"output: {folder}: {len(plan.shards)} shards were planned, {len(facts)} are there")
    if totals["rows"] + totals["skipped"] != planned:
        raise DataFileError(f"output: {folder}: {planned} rows were planned, {totals['rows']} are there")
    outputs = [{"file": shard_path(folder, one.shard).name, **asdict(one)} for one in facts]
    _write_manifest(folder, {**_record(plan), "complete": True, "totals": totals, "outputs": outputs})
    return totals


def done(folder: Path, plan: Plan) -> dict[int, Facts]:
    """The shards that are there, by number.

    Raises:
        DataFileError: a file is not of this job.
    """
    found, fingerprint = {}, plan.fingerprint
    for path in sorted(folder.glob("*.parquet")):
        facts = read_facts(path)
        number = facts.shard
        if facts.fingerprint != fingerprint or path != shard_path(folder, number) or number >= len(plan.shards):
            raise DataFileError(f"{path}: is not of this job; move it away")
        if facts.rows + len(facts.skipped) != plan.shards[number].rows:
            raise DataFileError(f"{path}: {plan.shards[number].rows} rows were planned, {facts.rows} are there")
        found[number] = facts
    return found


def read_facts(path: Path) -> Facts:
    """What a shard's file says of itself.

    Raises:
        DataFileError: it is no shard, or its rows are not as many as it says.
    """
    try:
        metadata = pq.read_metadata(path)
        facts = Facts(**json.loads(metadata.schema.to_arrow_schema().metadata[_KEY]))
        facts.skipped = [(name, reason) for name, reason in facts.skipped]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise DataFileError(f"{path}: no shard of an encode job: {error!r}") from error
    if metadata.num_rows != facts.rows:
        raise DataFileError(f"{path}: {facts.rows} rows were written, {metadata.num_rows} are there")
    return facts


def write_shard(folder: Path, table: pa.Table, facts: Facts, plain: Sequence[str]) -> None:
    """Puts a shard into place.

    Args:
        folder: the output.
        table: its rows.
        facts: what the file says of itself.
        plain: columns of floats, which no compression makes smaller.

    Raises:
        DataFileError: it cannot be written, as on a full disk; nothing is left behind.
    """
    marked = table.replace_schema_metadata({_KEY: json.dumps(asdict(facts))})
    leaves = _leaves(marked.schema)
    worth = [path for path in leaves if path.split(".")[0] not in plain]
    compression = {path: "zstd" if path in worth else "none" for path in leaves}
    groups = max(1, -(-marked.nbytes // _GROUP_BYTES))
    rows = max(1, -(-marked.num_rows // groups))
    with _appearing(shard_path(folder, facts.shard)) as partial:
        with _holding():
            pq.write_table(marked, partial, rows, compression=compression, use_dictionary=worth or False)
        if read_facts(partial) != facts:
            raise DataFileError(f"{partial}: what was written is not what is read")


@contextmanager
def _holding() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's
            raise
        raise DataFileError(f"output: Parquet cannot hold these rows: {error}; see --keep") from error


@contextmanager
def attempt(folder: Path, number: int) -> Iterator[int]:
    """Marks that a process works on a shard; gives how many did that have died, or still do.

    Raises:
        DataFileError: the mark cannot be written.
    """
    name = f".attempt-{number:06d}"
    before = len(list(folder.glob(f"{name}.*{_PARTIAL}")))
    mark = folder / f"{name}.{uuid.uuid4().hex}{_PARTIAL}"
    try:
        mark.touch()
    except OSError as error:
        raise DataFileError(f"output: cannot write {mark}: {error}") from error
    try:
        yield before
    finally:
        mark.unlink(missing_ok=True)


def _leaves(schema: pa.Schema) -> list[str]:
    """Paths of the columns as Parquet has them: a list's is not its name alone."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    leaves = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [leaves.column(i).path for i in range(len(leaves))]


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed at the end, once the disk has it, or removed."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise DataFileError(f"output: cannot write {path}: {error}; the same command continues the job") from error
    finally:
        partial.unlink(missing_ok=True)


def _record(plan: Plan) -> dict[str, Any]:
    from xfast import __version__

    return {
        "format": FORMAT,
        "xfast": __version__,
        "fingerprint": plan.fingerprint,
        "complete": False,
        "settings": plan.settings,
        "schema": base64.b64encode(plan.schema.serialize()).decode(),
        "left_out": plan.left_out,
        "shards": [asdict(shard) for shard in plan.shards],
    }


def _write_manifest(folder: Path, record: dict[str, Any]) -> None:
    with _appearing(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _difference(known: dict[str, Any], given: dict[str, Any]) -> str:
    names = [name for name in {**known, **given} if known.get(name) != given.get(name)]
    parts = [f"{name} was {_short(known.get(name))}, now {_short(given.get(name))}" for name in names]
    return f"{'; '.join(parts)} (name another folder)"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def identity_of(files: Sequence[InputFile]) -> list[list[Any]]:
    """What identifies the input in the settings."""
    return [[file.path, file.size, file.mtime_ns] for file in files]
