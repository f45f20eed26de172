"""Shards of input, the rows read from one, and what is wrong with a row: shared by the readers of both formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from xfast.encode.settings import Settings
from xfast.errors import DataFileError, InvalidOptionError


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the job was planned; ``kind`` is "parquet" or "jsonl"."""

    path: str
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one input file, which become one output file.

    Attributes:
        number: of the output file.
        path, kind: of the input file.
        first: number of the first row (Parquet, from 0) or line (JSONL, from 1).
        rows: how many; blank lines of JSONL are no rows.
        offset, size: bytes of the lines in the file (JSONL).
    """

    number: int
    path: str
    kind: str
    first: int
    rows: int
    offset: int = 0
    size: int = 0

    def where(self, row: int) -> str:
        """Names a row by its number in the file."""
        return f"{self.path}:{row}" if self.kind == "jsonl" else f"{self.path}, row {row}"


@dataclass
class Rows:
    """What a shard holds. n = rows that can be encoded.

    Attributes:
        texts, pairs: n strings each; pairs None without a pair column.
        kept: table of n rows, the columns to copy.
        where: n names of rows, for messages.
        skipped: rows that were left out, as (name, reason).
    """

    texts: list[str]
    pairs: list[str] | None
    kept: pa.Table
    where: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)


def text_columns(settings: Settings) -> tuple[str, ...]:
    """The columns that are encoded."""
    return (settings.text_column,) if settings.pair_column is None else (settings.text_column, settings.pair_column)


def require_columns(path: str, there: Sequence[str], settings: Settings) -> None:
    """Checks that a file has the columns that were asked for.

    Raises:
        DataFileError: one is missing.
    """
    for name in (*text_columns(settings), *(settings.keep or ())):
        if name not in there:
            raise DataFileError(f"{path}: no column {name!r}; columns there: {', '.join(there) or 'none'}")


def kept_columns(there: Sequence[str], settings: Settings) -> list[str]:
    """Names of the columns to copy."""
    if settings.keep is not None:
        return list(settings.keep)
    return [name for name in there if name not in text_columns(settings)]


def refuse_taken(names: Sequence[str], produced: Sequence[str]) -> None:
    """Checks that no copied column has the name of a column that the job makes.

    Raises:
        InvalidOptionError: one has.
    """
    if taken := [name for name in names if name in produced]:
        raise InvalidOptionError(
            f"keep: the input has a column {taken[0]!r}, which is the name of a column of the output; "
            "name the columns to copy with --keep"
        )


def wrong(value: Any, column: str) -> str | None:
    """What is wrong with a text, or None."""
    if value is None:
        return f"{column!r} is null"
    if not isinstance(value, str):
        return f"{column!r} is {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{column!r} holds half of a surrogate pair"
    return None


def refuse_or_skip(skipped: list[tuple[str, str]], where: str, reason: str, settings: Settings) -> None:
    """Lists a row that is left out.

    Raises:
        DataFileError: bad rows are not to be left out.
    """
    if settings.on_error == "fail":
        raise DataFileError(f"{where}: {reason} (--on-error skip leaves such rows out)")
    skipped.append((where, reason))


_LARGEST = b"xfast.largest"  # in the metadata of a field of whole numbers
_HELD = 2**53  # up to here a double, which Arrow takes for whole numbers and fractions, holds every whole number


def with_largest(schema: pa.Schema, largest: Mapping[str, int]) -> pa.Schema:
    """A file's schema for :func:`unify` that says how far from 0 its whole numbers lie, by column."""
    return pa.schema(
        [f.with_metadata({_LARGEST: str(largest[f.name])}) if f.name in largest else f for f in schema],
    )


def unify(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema for the copied columns of all (file, schema), without metadata; int becomes float where one is float.

    Raises:
        DataFileError: a column has types that do not go together, or numbers that the common type would round.
    """
    result, path = pa.schema([]), ""
    try:
        for path, schema in schemas:  # noqa: B007  # the message names where it stopped
            plain = pa.schema([field.remove_metadata() for field in schema])
            result = pa.unify_schemas([result, plain], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataFileError(f"{path}: {error}; what comes before has another type there") from None
    for path, schema in schemas:
        for column in schema:
            if _has_twins(column.type):
                raise DataFileError(
                    f"{path}: column {column.name!r} is {column.type}, with two fields of one name; name the columns "
                    "to copy with --keep"
                )
            _refuse_rounding(path, column, result.field(column.name).type)
    unsigned = {field.name for _, schema in schemas for field in schema if field.type == pa.uint64()}
    result = pa.schema(  # Arrow takes int64 for both, which the larger half of uint64 does not fit
        [f.with_type(pa.uint64()) if f.name in unsigned and f.type == pa.int64() else f for f in result]
    )
    for column in result:
        if _is_empty(column.type):
            raise DataFileError(
                f"column {column.name!r} is {column.type}, of which Parquet can write none; name the columns to copy "
                "with --keep"
            )
    return pa.schema([column.with_nullable(True) for column in result])  # another file may lack it


def _refuse_rounding(path: str, column: pa.Field, common: pa.DataType) -> None:
    """Checks that a column's values fit the type that it has over all files, as far as that is known already."""
    if _rounds(column.type, common):
        raise DataFileError(
            f"{path}: column {column.name!r} is {column.type} here, and {common} over all files does not hold all its "
            "values; give it one type, or name the columns to copy with --keep"
        )
    largest = int((column.metadata or {}).get(_LARGEST, 0))
    if pa.types.is_floating(common) and abs(largest) > _HELD:
        raise DataFileError(
            f"{path}: column {column.name!r} has {largest} here and fractions elsewhere; no {common} holds both"
        )


def _rounds(kind: pa.DataType, common: pa.DataType) -> bool:
    """Whether decimals become floats, or integers decimals of fewer digits; inside lists and structs too."""
    if pa.types.is_decimal(kind):
        return bool(pa.types.is_floating(common))
    if pa.types.is_integer(kind) and pa.types.is_decimal(common):
        digits = len(str(2 ** (kind.bit_width - pa.types.is_signed_integer(kind))))
        return bool(common.precision - common.scale < digits)
    inner = [kind.field(i) for i in range(kind.num_fields)]
    if pa.types.is_struct(kind):
        return any(_rounds(one.type, common.field(one.name).type) for one in inner)
    return any(_rounds(one.type, common.field(i).type) for i, one in enumerate(inner[: common.num_fields]))


def _has_twins(kind: pa.DataType) -> bool:
    """Whether a type holds a struct with two fields of one name, which can only be told apart by their places."""
    inner = [kind.field(i) for i in range(kind.num_fields)]
    twins = pa.types.is_struct(kind) and len({one.name for one in inner}) != len(inner)
    return twins or any(_has_twins(one.type) for one in inner)


def _is_empty(kind: pa.DataType) -> bool:
    """Whether a type holds a struct without fields."""
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_is_empty(kind.field(i).type) for i in range(kind.num_fields))


def conform(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    """The table with the schema's columns and types; columns that are missing become nulls.

    Raises:
        DataFileError: a value does not fit the type.
    """
    columns = []
    for column in schema:
        if column.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, column.type)]))
            continue
        try:
            found = table.column(column.name)  # a cast makes nulls inside others invalid, even one to their own type
            columns.append(found if found.type == column.type else found.cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataFileError(f"{path}: column {column.name!r} is no {column.type}: {error}") from None
    if not len(schema):
        return table.select([])
    return pa.Table.from_arrays(columns, schema=schema)
