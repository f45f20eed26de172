"""JSON lines: planned in one pass that parses every line, so that a bad one is known before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from xfast.encode.rows import (
    Rows,
    Shard,
    conform,
    kept_columns,
    refuse_or_skip,
    require_columns,
    text_columns,
    unify,
    with_largest,
    wrong,
)
from xfast.encode.settings import Settings, is_unicode
from xfast.errors import DataFileError

Line = tuple[int, bytes]  # line number from 1, the line


def plan(path: str, settings: Settings) -> tuple[list[Shard], pa.Schema]:
    """The shards of a file, numbered from 0, and the types of the columns to copy.

    Raises:
        DataFileError: no row, no such column, a bad row that is not to be skipped, or values of types that do not go
            together.
    """
    shards: list[Shard] = []
    schemas: list[tuple[str, pa.Schema]] = []
    seen: dict[str, None] = {}
    large: dict[str, tuple[int, int]] = {}
    negative: set[str] = set()
    good = 0
    for lines, offset, size in _groups(path, settings.shard_rows):
        found = _parsed(lines, path, settings)
        seen.update(found.names)
        good += len(found.rows)
        large.update(_beyond_floats(found))
        negative.update({name for row in found.rows for name, value in row.items() if type(value) is int and value < 0})
        schemas.append((f"{path}:{lines[0][0]}", _table(found.rows, list(seen), path, settings).schema))
        shards.append(Shard(len(shards), path, "jsonl", lines[0][0], len(lines), offset, size))
    if settings.on_error == "skip" and not good:
        if seen:  # rows without the column are no bad rows: it is not there
            require_columns(path, list(seen), settings)
        return [], pa.schema([])
    if not shards:
        raise DataFileError(f"{path}: holds no row")
    require_columns(path, list(seen), settings)
    schema = unify(schemas)
    if mixed := [field.name for field in schema if field.type == pa.uint64() and field.name in negative]:
        raise DataFileError(
            f"{path}: column {mixed[0]!r} has numbers below 0 and above 2^63; no integer type holds both"
        )
    for name, (value, line) in large.items():
        if name in schema.names and pa.types.is_floating(schema.field(name).type):
            raise DataFileError(
                f"{path}:{line}: column {name!r} has {value} here and fractions elsewhere; no float holds both"
            )
    return shards, with_largest(schema, {name: value for name, (value, _) in large.items()})


def read(shard: Shard, schema: pa.Schema, settings: Settings) -> Rows:
    """The rows of a shard.

    Raises:
        DataFileError: the file is not the one that was planned, or a bad row is not to be skipped.
    """
    try:
        with open(shard.path, "rb") as file:  # noqa: PTH123  # seeks
            file.seek(shard.offset)
            data = file.read(shard.size)
    except OSError as error:
        raise DataFileError(f"{shard.path}: cannot read it: {error}") from error
    lines = [line for line in enumerate(data.split(b"\n"), shard.first) if line[1].strip()]
    if len(lines) != shard.rows:
        raise DataFileError(
            f"{shard.path}: {shard.rows} rows were planned from line {shard.first}, {len(lines)} are there"
        )
    found = _parsed(lines, shard.path, settings)
    return Rows(
        texts=[row[settings.text_column] for row in found.rows],
        pairs=None if settings.pair_column is None else [row[settings.pair_column] for row in found.rows],
        kept=conform(_table(found.rows, schema.names, shard.path, settings), schema, shard.path),
        where=[shard.where(number) for number in found.numbers],
        skipped=found.skipped,
    )


def _groups(path: str, count: int) -> Iterator[tuple[list[Line], int, int]]:
    """At most ``count`` lines that are not blank, where they begin in the file and how many bytes they are."""
    group: list[Line] = []
    offset = end = 0
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # bytes, whatever the encoding
            for number, line in enumerate(file, 1):
                if line.strip():
                    if len(group) == count:
                        yield group, offset, end - offset
                        group = []
                    if not group:
                        offset = end
                    group.append((number, line))
                end += len(line)
    except OSError as error:
        raise DataFileError(f"{path}: cannot read it: {error}") from error
    if group:
        yield group, offset, end - offset


@dataclass
class _Parsed:
    """Good rows and their line numbers, (name, reason) of the others, and the columns that any of them has."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    names: dict[str, None] = field(default_factory=dict)


def _parsed(lines: list[Line], path: str, settings: Settings) -> _Parsed:
    found = _Parsed()
    for number, line in lines:
        row, reason = _row(line, settings)
        found.names.update(dict.fromkeys(row))
        if reason is None:
            found.rows.append(row)
            found.numbers.append(number)
        else:
            refuse_or_skip(found.skipped, f"{path}:{number}", reason, settings)
    return found


def _beyond_floats(found: _Parsed) -> dict[str, tuple[int, int]]:
    """By column, a whole number that float64 cannot hold, and its line."""
    return {
        name: (value, number)
        for row, number in zip(found.rows, found.numbers, strict=True)
        for name, value in row.items()
        if type(value) is int and abs(value) > 2**53 and (value.bit_length() > 64 or int(float(value)) != value)
    }


def _row(line: bytes, settings: Settings) -> tuple[dict[str, Any], str | None]:
    """One row, empty where there is none, and what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(row, dict):
        return {}, f"a JSON object is expected, got {type(row).__name__}"
    try:
        if b"\\u" in line and not _is_unicode(row):
            return {}, "it holds half of a surrogate pair"
    except RecursionError as error:  # which writing meets earlier than reading
        return {}, f"nested too deeply: {error}"
    for name in text_columns(settings):
        if name not in row:
            return row, f"no column {name!r}; columns there: {', '.join(row) or 'none'}"
        if (reason := wrong(row[name], name)) is not None:
            return row, reason
    return row, None


def _is_unicode(row: dict[str, Any]) -> bool:
    return is_unicode(json.dumps(row, ensure_ascii=False))


def _table(rows: list[dict[str, Any]], there: list[str], path: str, settings: Settings) -> pa.Table:
    """The columns to copy, with the types that the values have."""
    arrays = {name: _array(name, [row.get(name) for row in rows], path) for name in kept_columns(there, settings)}
    if not arrays:  # a table without columns that knows its number of rows
        return pa.table({"": pa.nulls(len(rows))}).select([])
    return pa.table(arrays)


def _array(name: str, values: list[Any], path: str) -> pa.Array:
    try:
        try:
            return pa.array(values)
        except OverflowError:  # hashes of 64 bits
            return pa.array(values, pa.uint64())
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataFileError(f"{path}: column {name!r} has values that do not go together: {error}") from None
