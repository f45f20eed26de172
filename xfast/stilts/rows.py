"""Lines, rows and columns of text files (JSON, JSON lines, CSV, TSV), with errors that name file and line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xfast.errors import DataFileError


class MissingDataError(DataFileError):
    """What holds several languages does not have this one, or not this split of it."""


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

csv.field_size_limit(2**24)  # a paragraph is longer than the csv module's 128 KiB in a few languages' files


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text without its line end) of a UTF-8 file; an error where it is missing or not UTF-8."""
    number = 0
    try:
        with path.open("rb") as file:  # decoded line by line, so that an error can name the line
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of it)") from None
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from None


def load_json(path: Path) -> Any:
    """The file's JSON value, with typed errors."""
    return _parsed("\n".join(line for _, line in lines(path)), path, 1)


def _parsed(text: str, path: Path, number: int) -> Any:
    """The JSON value that begins on a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}:{number + getattr(error, 'lineno', 1) - 1}"
        raise DataFileError(f"{where}: not JSON, perhaps truncated: {error}") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            what = "half of a surrogate pair, which is no character: a text that was cut off there?"
            raise DataFileError(f"{path}:{number}: {what}") from None
    return value


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file; empty lines are passed over."""
    for number, line in lines(path):
        if line.strip():
            row = _parsed(line, path, number)
            if not isinstance(row, dict):
                raise DataFileError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def csv_rows(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line number where the row ends, fields) of a CSV or TSV file with the csv module's quoting."""
    texts = (line + "\n" for _, line in lines(path))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)  # else a stray quote swallows the rows after it
    start = 1
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataFileError(f"{path}:{start}: the row that begins here: {error}") from None


def headed_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields by column name) of a CSV file whose first row names the columns."""
    header: list[str] = []
    for number, row in csv_rows(path, ","):
        if not header:
            header = row
        elif len(row) != len(header):
            raise DataFileError(f"{path}:{number}: {len(row)} columns, expected {len(header)}: {', '.join(header)}")
        else:
            yield number, dict(zip(header, row, strict=True))


def pick(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The value of the first of these columns that the row has, an error where it has none."""
    for name in names:
        if name in row:
            return row[name]
    raise DataFileError(f"{where}: no column {' or '.join(names)}; the row has {', '.join(map(str, row))}")


def text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """:func:`pick` for a column that must hold text: null or a number there is an error."""
    value = pick(row, names, where)
    if not isinstance(value, str):
        raise DataFileError(f"{where}: {' or '.join(names)} is {value!r}, expected text")
    return value
