"""Parquet input, read by pyarrow: only the columns that are needed, only the row groups that a shard touches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xfast.encode.rows import (
    Rows,
    Shard,
    conform,
    kept_columns,
    refuse_or_skip,
    require_columns,
    text_columns,
    with_largest,
    wrong,
)
from xfast.encode.settings import Settings
from xfast.errors import DataFileError

# pyarrow cannot choose rows of these
_VIEWS = (
    {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()} if hasattr(pa, "string_view") else {}
)


def plan(path: str, settings: Settings) -> tuple[list[Shard], pa.Schema]:
    """The shards of a file, numbered from 0, and the types of the columns to copy. A file of 0 rows is one shard.

    Raises:
        DataFileError: not a whole Parquet file, no such column, or a text column of another type.
    """
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        names, largest = schema.names, _largest(file.metadata)
    require_columns(path, names, settings)
    if len(set(names)) != len(names):
        raise DataFileError(f"{path}: two columns have the same name: {', '.join(names)}")
    for name in text_columns(settings):
        if not _is_text(schema.field(name).type):
            raise DataFileError(f"{path}: column {name!r} is {schema.field(name).type}, not string")
    starts = range(0, max(rows, 1), settings.shard_rows)
    shards = [
        Shard(number, path, "parquet", first, min(settings.shard_rows, rows - first))
        for number, first in enumerate(starts)
    ]
    kept = [schema.field(name) for name in kept_columns(names, settings)]
    fields = [field.with_type(_without_views(field.type, f"{path}: column {field.name!r}")) for field in kept]
    whole = {field.name for field in fields if pa.types.is_integer(field.type)}
    return shards, with_largest(pa.schema(fields), {name: largest[name] for name in whole & largest.keys()})


def _without_views(kind: pa.DataType, where: str) -> pa.DataType:
    """The type with plain strings and bytes in the place of views, inside others too."""
    if kind in _VIEWS:
        return _VIEWS[kind]
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _without_views(kind.value_type, where), kind.ordered)
    inner = [kind.field(i) for i in range(kind.num_fields)]
    fields = [field.with_type(_without_views(field.type, where)) for field in inner]
    if fields == inner:
        return kind
    if pa.types.is_struct(kind):
        return pa.struct(fields)
    if pa.types.is_map(kind):
        return pa.map_(*(fields[0].type.field(i) for i in range(2)), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(fields[0], kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(fields[0])
    if pa.types.is_list(kind):
        return pa.list_(fields[0])
    raise DataFileError(f"{where} is {kind}, of which pyarrow cannot choose rows; name the columns to copy with --keep")


def _largest(metadata: Any) -> dict[str, int]:
    """By column, the whole number that is farthest from 0, where the file says that."""
    found: dict[str, int] = {}
    # of these alone: a date's or a time's ends need not be any that Python has
    whole = {field.name for field in metadata.schema.to_arrow_schema() if pa.types.is_integer(field.type)}
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            name, known = column.path_in_schema, column.statistics
            if name not in whole or known is None or not known.has_min_max:
                continue
            if isinstance(known.min, int) and isinstance(known.max, int):  # "a.b" may also be the b of a struct a
                found[name] = max(found.get(name, 0), known.min, known.max, key=abs)
    return found


def read(shard: Shard, schema: pa.Schema, settings: Settings) -> Rows:
    """The rows of a shard.

    Raises:
        DataFileError: the file is damaged or not the one that was planned, or a bad row is not to be skipped.
    """
    table = _slice(shard, settings)
    columns = [_values(table.column(name)) for name in text_columns(settings)]
    good: list[int] = []
    skipped: list[tuple[str, str]] = []
    for row, values in enumerate(zip(*columns, strict=True)):
        named = zip(values, text_columns(settings), strict=True)
        reason = next((found for value, name in named if (found := _wrong(value, name)) is not None), None)
        if reason is None:
            good.append(row)
        else:
            refuse_or_skip(skipped, shard.where(shard.first + row), reason, settings)
    kept = conform(table.select([name for name in schema.names if name in table.column_names]), schema, shard.path)
    if skipped:
        kept = kept.take(pa.array(good, pa.int64())) if kept.num_columns else kept.slice(0, len(good))
    return Rows(
        texts=[columns[0][row] for row in good],
        pairs=None if settings.pair_column is None else [columns[1][row] for row in good],
        kept=kept,
        where=[shard.where(shard.first + row) for row in good],
        skipped=skipped,
    )


class _NotText:
    """In the place of bytes that are no UTF-8, though the file calls them a string."""


def _wrong(value: Any, column: str) -> str | None:
    return f"{column!r} is not UTF-8" if isinstance(value, _NotText) else wrong(value, column)


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NotText()


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(inner)
        or pa.types.is_large_string(inner)
        or pa.types.is_string_view(inner)
        or pa.types.is_null(inner)
    )


def _slice(shard: Shard, settings: Settings) -> pa.Table:
    """The shard's rows of the columns that are needed."""
    with _opened(shard.path) as file:
        names = file.schema_arrow.names
        require_columns(shard.path, names, settings)
        columns = [*dict.fromkeys((*text_columns(settings), *kept_columns(names, settings)))]
        groups, skip = _groups_of(file.metadata, shard)
        parts, wanted = [], shard.rows
        for batch in file.iter_batches(batch_size=settings.shard_rows, row_groups=groups, columns=columns):
            part = batch.slice(skip, wanted)
            skip, wanted = max(0, skip - batch.num_rows), wanted - part.num_rows
            parts.append(part)
            if not wanted:
                break
        schema = file.schema_arrow
    if wanted:
        raise DataFileError(f"{shard.path}: {shard.rows} rows were planned at row {shard.first}, {wanted} are missing")
    return pa.Table.from_batches(parts, parts[0].schema if parts else pa.schema([schema.field(n) for n in columns]))


def _groups_of(metadata: Any, shard: Shard) -> tuple[list[int], int]:
    """The row groups that hold the shard, and how many rows of the first come before it."""
    groups: list[int] = []
    skip = start = 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        if start < shard.first + shard.rows and end > shard.first:
            if not groups:
                skip = shard.first - start
            groups.append(group)
        start = end
    return groups, skip


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: a column's name
        raise DataFileError(f"{path}: cannot read it as Parquet: {error}") from error
