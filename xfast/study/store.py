"""Everything a study measured, one JSON object a line, on disk as soon as it is known.

A killed run loses the visit that it was in. ``observations.jsonl`` begins with the settings and the machine; a run that
continues must have the same ones, and the same models and token ids. A last line that was cut off is dropped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xfast import locks
from xfast.errors import DataFileError, InvalidOptionError
from xfast.study.factors import Settings

NAME = "observations.jsonl"
FORMAT = 1

Record = dict[str, Any]

_SAME_MACHINE = ("cpu", "architecture", "cores", "isa", "gpu")
"""Facts in which a machine that continues a study must agree; and its threads, where the settings do not say them."""


class Store:
    """The observations of one study, locked against a second run.

    Args:
        folder: where they lie.
        settings: of the study.
        machine: facts about the machine, see ``xfast.machine.machine``.
        resume: continue what is there; False refuses a folder that holds observations.

    Raises:
        InvalidOptionError: the folder holds observations and ``resume`` is False, another run writes there, or they are
            another study's or another machine's.
        DataFileError: the folder cannot be written, or a line in the middle is damaged.
    """

    def __init__(self, folder: Path, settings: Settings, machine: Record, *, resume: bool) -> None:
        self.path = folder / NAME
        self.settings = settings
        self.records: list[Record] = []
        self._run, self._began = 1, time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise DataFileError(f"output: cannot write {self.path}: {error}") from error
        try:
            self._lock()
            if os.fstat(self._file).st_size == 0:
                self.add({"kind": "study", "format": FORMAT, "settings": settings.as_dict(), "machine": machine})
            elif resume:
                self._continue(machine)
            else:
                raise InvalidOptionError(f"output: {self.path} exists; continue with --resume, or name another folder")
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            alone = locks.lock(self._file)
        except OSError as error:
            raise DataFileError(f"output: cannot lock {self.path}: {error}") from error
        if not alone:
            raise InvalidOptionError(f"output: another run writes {self.path}; name another folder")

    def _continue(self, machine: Record) -> None:
        records, length = read(self.path)
        if not records:
            raise DataFileError(f"{self.path}: holds no whole line; delete it to begin again")
        if settings_of(records, self.path) != self.settings:
            raise InvalidOptionError(f"output: {self.path} is another study's; name another folder, or its settings")
        before = records[0].get("machine", {})
        for name in (*_SAME_MACHINE, *(() if self.settings.threads else ("threads",))):
            if before.get(name) != machine.get(name):
                raise InvalidOptionError(
                    f"output: {self.path} was measured on another machine ({name}: {before.get(name)!r} there, "
                    f"{machine.get(name)!r} here); name another folder"
                )
        os.ftruncate(self._file, length)  # what was cut off
        self.records = records
        self._run = 1 + max(record.get("run", 1) for record in records)
        if before.get("commit") != machine.get("commit"):
            self.note(f"Continued with xfast {machine.get('commit')}; it was begun with {before.get('commit')}.")
        had, has = before.get("versions", {}), machine.get("versions", {})
        for name in (name for name in {**had, **has} if had.get(name) != has.get(name)):
            self.note(f"Continued with {name} {has.get(name)}; it was begun with {had.get(name)}.")

    def match(self, kind: str, name: str, now: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse to continue where what is measured has changed.

        Args:
            kind, name: of records that say what was measured, and their field that names it.
            now: the fields that must agree, by name.

        Raises:
            InvalidOptionError: a stored record differs.
        """
        for record in self.of(kind):
            for field, value in now.get(record[name], {}).items():
                if record.get(field) != value:
                    raise InvalidOptionError(
                        f"output: {self.path}: {record[name]} was measured with other data or checkpoints ({field}: "
                        f"{record.get(field)!r} there, {value!r} now); name another folder"
                    )

    def add(self, record: Record) -> None:
        """Append one observation and push it to the disk. Numbers that are not finite are stored as null, with a note.

        Every record has the number of its run and the seconds since that began: a run that is killed cannot say them.

        Raises:
            DataFileError: it cannot be written, as on a full disk.
        """
        finite = _finite(record)
        if finite != record:
            named = ", ".join(f"{name} {value}" for name, value in record.items() if isinstance(value, str | int))
            self.note(f"Not finite, stored as null: {named}")
        finite |= {"run": self._run, "after": round(time.perf_counter() - self._began, 1)}
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line: reading drops it at the end of the file
                os.ftruncate(self._file, before)
            raise DataFileError(f"output: cannot write {self.path}: {error}; --resume continues") from error
        self.records.append(finite)

    def note(self, text: str) -> None:
        """Store a remark for the report, once."""
        if text not in [record["text"] for record in self.of("note")]:
            self.add({"kind": "note", "text": text})

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
        with contextlib.suppress(OSError):  # every line was synced, or its error has been raised
            os.close(self._file)


def _finite(value: Any) -> Any:
    """The same JSON value with null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finite(one) for one in value)
    return value


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
