"""Everything a study measured, one JSON object a line, on disk as soon as it is known.

A killed run loses the visit that it was in. ``observations.jsonl`` begins with the settings; a run that continues must
have the same ones. A last line that was cut off is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xfast.errors import DataFileError, InvalidOptionError
from xfast.study.factors import Settings

NAME = "observations.jsonl"
FORMAT = 1

Record = dict[str, Any]


class Store:
    """The observations of one study.

    Args:
        folder: where they lie.
        settings: of the study.
        machine: facts about the machine, see ``xfast.machine.machine``.
        resume: continue what is there; False refuses a folder that holds observations.

    Raises:
        InvalidOptionError: the folder holds observations and ``resume`` is False, or another study's.
        DataFileError: the folder cannot be written, or a line in the middle is damaged.
    """

    def __init__(self, folder: Path, settings: Settings, machine: Record, *, resume: bool) -> None:
        self.path = folder / NAME
        self.settings = settings
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = self.path.exists() and self.path.stat().st_size > 0
            if there and not resume:
                raise InvalidOptionError(f"output: {self.path} exists; continue with --resume, or name another folder")
            if there:
                self.records = self._continued()
            else:
                self.records = []
                self._file = self.path.open("w", encoding="utf-8")
                self.add({"kind": "study", "format": FORMAT, "settings": settings.as_dict(), "machine": machine})
        except OSError as error:
            raise DataFileError(f"output: cannot write {self.path}: {error}") from error

    def _continued(self) -> list[Record]:
        records, length = read(self.path)
        if not records:
            raise DataFileError(f"{self.path}: holds no whole line; delete it to begin again")
        if settings_of(records, self.path) != self.settings:
            raise InvalidOptionError(f"output: {self.path} is another study's; name another folder, or its settings")
        os.truncate(self.path, length)  # what was cut off
        self._file = self.path.open("a", encoding="utf-8")
        return records

    def add(self, record: Record) -> None:
        """Append one observation and push it to the disk.

        Raises:
            DataFileError: it cannot be written, as on a full disk.
        """
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataFileError(f"output: cannot write {self.path}: {error}; --resume continues") from error
        self.records.append(record)

    def of(self, kind: str) -> Iterator[Record]:
        """Observations of a kind."""
        return (record for record in self.records if record["kind"] == kind)

    @property
    def done(self) -> set[str]:
        """What need not be measured again: ``CELL#ROUND`` of visits, names of jobs that ended."""
        return {visit_name(record["cell"], record["round"]) for record in self.of("visit")} | {
            record["job"] for record in self.of("done")
        }

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def visit_name(cell: str, number: int) -> str:
    """Names one visit."""
    return f"{cell}#{number}"


def read(path: Path) -> tuple[list[Record], int]:
    """The whole lines of a file of observations, and how many bytes they are.

    Raises:
        DataFileError: it cannot be read, a line that is not the last is damaged, or it is of another format.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataFileError(f"{path}: cannot read the observations: {error}") from error
    records: list[Record] = []
    length = 0
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            record["kind"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataFileError(f"{path}:{number}: not an observation: {error!r}") from error
        records.append(record)
        length += len(line) + 1
    if records and (records[0]["kind"] != "study" or records[0].get("format") != FORMAT):
        raise DataFileError(f"{path}:1: observations of format {FORMAT} are expected, got {records[0].get('format')!r}")
    return records, length


def settings_of(records: list[Record], path: Path) -> Settings:
    """The settings in the first line.

    Raises:
        DataFileError: there is none, or it is damaged.
    """
    try:
        return Settings.from_dict(records[0]["settings"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataFileError(f"{path}:1: no settings of a study: {error!r}") from error
