"""What one process does: shards in, files out. Reading and tokenising run ahead of the encoder, writing behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

import xfast
from xfast.encode import source, store
from xfast.encode.ahead import Behind, ahead
from xfast.encode.model import Encoder, Head
from xfast.encode.outputs import EMBEDDING, Collector
from xfast.encode.rows import Rows, Shard, refuse_or_skip
from xfast.encode.settings import Execution, Settings
from xfast.encode.store import Facts
from xfast.encode.tokens import Window, batches
from xfast.errors import DataFileError
from xfast.machine import cores

DEPTH = 2
"""Windows that wait, tokenised, for the encoder."""

WINDOW_CHARACTERS = 1 << 23
"""Characters of a window: tokens beyond the longest input, which are dropped, take 75 bytes each until it ends."""

Progress = Callable[[int, int], None]
"""Called with the rows and tokens that have been encoded since the last call."""


@dataclass(frozen=True)
class Task:
    """All that a process needs to know of a job.

    Attributes:
        output: folder.
        fingerprint, schema: of the plan.
    """

    settings: Settings
    execution: Execution
    head: Head
    output: str
    fingerprint: str
    schema: pa.Schema


@dataclass(frozen=True)
class _Piece:
    """A window of a shard; ``first`` and ``last`` of its shard."""

    shard: Shard
    rows: Rows
    window: Window
    first: bool
    last: bool


class Worker:
    """Holds the model of one process. Raises what :class:`xfast.encode.model.Encoder` raises."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.encoder = Encoder(task.settings, task.execution, task.head)
        self.overlap = _overlaps(task)

    def run(self, shards: Sequence[Shard], progress: Progress) -> None:
        """Writes the files of the shards.

        Raises:
            DataFileError: input that cannot be read, a bad row, or output that cannot be written.
            TokenIdError: the tokenizer does not fit the model.
        """
        pieces = self._pieces(shards)
        with (
            ahead(pieces, DEPTH) if self.overlap else nullcontext(pieces) as stream,
            Behind(self.overlap) as behind,
        ):
            for piece in stream:
                if piece.first:
                    collector = self.encoder.collector(len(piece.rows.texts))
                    facts = Facts(self.task.fingerprint, piece.shard.number)
                    dropped: list[int] = []
                self._compute(piece.window, collector, progress)
                facts.tokens += len(piece.window.ids)
                facts.truncated += piece.window.truncated
                dropped += piece.window.empty
                if piece.last:
                    behind(self._writing(piece, collector, facts, dropped))

    def _pieces(self, shards: Sequence[Shard]) -> Iterator[_Piece]:
        """Every shard's windows, of one at least."""
        size, prefix = self.task.execution.window, self.task.head.prefix
        for shard in shards:
            rows = source.read(shard, self.task.schema, self.task.settings)
            texts = [prefix + text for text in rows.texts] if prefix else rows.texts
            start = 0
            while True:
                end = _window_end(texts, rows.pairs, start, size)
                pairs = None if rows.pairs is None else rows.pairs[start:end]
                window = self.encoder.tokenizer.window(start, texts[start:end], pairs, rows.where[start:end])
                yield _Piece(shard, rows, window, start == 0, end >= len(texts))
                if end >= len(texts):
                    break
                start = end

    def _compute(self, window: Window, collector: Collector, progress: Progress) -> None:
        for batch in batches(window, self.encoder.budget, self.encoder.pad_id):
            collector.add(batch, self.encoder(batch))
            progress(len(batch.rows), int(batch.lengths.sum()))

    def _writing(self, piece: _Piece, collector: Collector, facts: Facts, dropped: list[int]) -> Callable[[], None]:
        def write() -> None:
            rows, table = piece.rows, piece.rows.kept
            for name, values in collector.columns().items():
                table = table.append_column(name, values)
            facts.skipped = list(rows.skipped)
            for row in dropped:
                refuse_or_skip(facts.skipped, rows.where[row], "has no tokens", self.task.settings)
            if dropped:
                gone = set(dropped)
                table = table.filter(pa.array([row not in gone for row in range(table.num_rows)]))
            facts.rows = table.num_rows
            if facts.rows + len(facts.skipped) != piece.shard.rows:
                raise DataFileError(f"{piece.shard.path}: {piece.shard.rows} rows were planned, {facts.rows} encoded")
            store.write_shard(Path(self.task.output), table, facts, (EMBEDDING,))

        return write


def _window_end(texts: Sequence[str], pairs: Sequence[str] | None, start: int, size: int) -> int:
    """Where a window ends: after ``size`` rows, or when their characters are too many, but after one row at least."""
    characters = 0
    for end in range(start, min(start + size, len(texts))):
        characters += len(texts[end]) + (len(pairs[end]) if pairs is not None else 0)
        if characters > WINDOW_CHARACTERS and end > start:
            return end
    return min(start + size, len(texts))


def _overlaps(task: Task) -> bool:
    """Whether tokenising runs beside the encoder.

    On a CPU whose cores all belong to the encoder it does not: its threads wait for one another, so a core that is
    shared holds up all of them, while the tokenizer, alone, has every core for itself.
    """
    if task.execution.overlap is not None:
        return task.execution.overlap
    return task.settings.device != "cpu" or xfast.get_num_threads() < cores()
