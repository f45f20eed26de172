"""A job from its input to a complete manifest: plan or continue, encode what is missing, count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xfast.encode import ray_engine, source, store
from xfast.encode.model import State, head_of, state_of, unchanged
from xfast.encode.rows import Shard, refuse_taken
from xfast.encode.settings import Execution, Settings, require
from xfast.encode.store import Plan
from xfast.encode.worker import Progress, Task, Worker
from xfast.threads import num_threads


class Watcher(Protocol):
    """Whoever watches a job."""

    def begin(self, rows: int, done: int) -> None:
        """A job of ``rows`` rows, of which ``done`` are done."""

    def advance(self, rows: int, tokens: int) -> None:
        """Rows and tokens that have been encoded."""


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        output: folder.
        totals: of the whole output: shards, rows, skipped, truncated, tokens.
        encoded: shards that this run made.
        left_out: input files that were left out, as (path, reason).
        fallbacks: calls that ran the original code, by reason (local engine).
    """

    output: str
    totals: dict[str, int]
    encoded: int
    left_out: list[tuple[str, str]]
    fallbacks: dict[str, int]


def encode(given: str, output: Path, settings: Settings, execution: Execution, watcher: Watcher) -> Summary:
    """Encodes the input's rows into the output folder, or what is missing there.

    Args:
        given: file, folder or glob of Parquet and JSONL files.
        output: folder.
        settings, execution: of the job.
        watcher: hears of the progress.

    Raises:
        XfastError: anything about input, output, model or options; what is complete stays, and the same call continues.
    """
    if execution.engine == "ray":
        require("ray.data", "ray[data]")
    state = state_of(settings)  # before its files are hashed: what changes after that is found
    head, identity = head_of(settings)
    files = source.find(given, output)
    record = {**settings.as_dict(), "model_identity": identity, "input": store.identity_of(files)}
    with store.opened(output):
        plan = store.read_plan(output, record)
        with store.swept(output):  # not before it is known to be a job's
            if plan is None:
                shards, schema, left_out = source.plan(files, settings)
                refuse_taken(schema.names, head.columns)
                plan = Plan(record, shards, schema, left_out)
                store.write_plan(output, plan)
            there = store.done(output, plan)
            missing = [shard for shard in plan.shards if shard.number not in there]
            watcher.begin(sum(shard.rows for shard in plan.shards), sum(plan.shards[n].rows for n in there))
            task = Task(settings, execution, head, str(output.resolve()), plan.fingerprint, plan.schema)
            fallbacks = _run(task, state, missing, watcher.advance) if missing else {}
            source.unchanged(files)
            unchanged(settings, state)
            there = store.done(output, plan)
            totals = store.complete(output, plan, [there[number] for number in sorted(there)])
    return Summary(str(output), totals, len(missing), plan.left_out, fallbacks)


def _run(task: Task, state: State, shards: Sequence[Shard], progress: Progress) -> dict[str, int]:
    if task.execution.engine == "ray":
        ray_engine.run(task, shards, progress)
        return {}
    with num_threads(task.execution.threads):
        worker = Worker(task)
        unchanged(task.settings, state)
        worker.run(shards, progress)
        return worker.encoder.fallbacks()
