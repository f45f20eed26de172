"""The same job on Ray Data: shards are the rows of the dataset, an actor with a model turns each into its file.

Ray may run a shard twice (a worker died, or was taken for dead). Its own writers name files by task, so that a second
run can leave two; here the actor writes the file by the shard's number, whole or not at all, so it is there once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xfast
from xfast import errors
from xfast.encode import store
from xfast.encode.model import same_files, state_of, unchanged
from xfast.encode.rows import Shard
from xfast.encode.worker import Progress, Task, Worker
from xfast.errors import BackendUnavailableError, XfastError
from xfast.logs import errors_only

DEATHS = 5
"""Workers that a shard may cost. Ray itself starts a worker that died again for ever, which a shard too large for the
memory would kill for ever."""

Columns = dict[str, Any]


class ShardActor:
    """One process of the cluster. Its model is loaded for the first shard, so that errors have a way back."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.worker: Worker | None = None
        if (threads := task.execution.threads) is not None:
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # the tokenizer's, which takes every core it sees
            torch.set_num_threads(threads)
            xfast.set_num_threads(threads)

    def __call__(self, batch: Columns) -> Columns:
        """``shard`` (JSON) to ``rows`` and ``tokens`` of its file, or ``error`` (a class's name), ``message``."""
        answers = [self._answer(Shard(**json.loads(text))) for text in batch["shard"]]
        return {name: np.array([answer[name] for answer in answers]) for name in answers[0]}

    def _answer(self, shard: Shard) -> dict[str, Any]:
        try:
            facts = self._encoded(shard)
        except XfastError as error:
            return {"rows": 0, "tokens": 0, "error": type(error).__name__, "message": str(error)}
        return {"rows": facts.rows, "tokens": facts.tokens, "error": "", "message": ""}

    def _encoded(self, shard: Shard) -> store.Facts:
        folder = Path(self.task.output)
        path = store.shard_path(folder, shard.number)
        if not path.exists():  # else a worker that died after this file was whole
            with store.attempt(folder, shard.number) as before:
                if before >= DEATHS:
                    raise BackendUnavailableError(f"engine: ray: {before} workers died on shard {shard.number}")
                if self.worker is None:
                    self.worker = self._loaded()
                self.worker.run([shard], lambda rows, tokens: None)
        return store.read_facts(path)

    def _loaded(self) -> Worker:
        """The model that the job began with: on another machine, or after a restart, there may be another one."""
        settings, head = self.task.settings, self.task.head
        state = state_of(settings)
        same_files(settings, head)
        worker = Worker(self.task)
        unchanged(settings, state)
        return worker


def run(task: Task, shards: Sequence[Shard], progress: Progress) -> None:
    """Writes the files of the shards. Output, input and a model's folder must be the same paths on every machine.

    Raises:
        BackendUnavailableError: no cluster there, it is too small, or a shard's workers die again and again.
        XfastError: what :meth:`xfast.encode.worker.Worker.run` raises.
    """
    import ray.data

    workers = min(task.execution.workers, len(shards))
    needs = {"CPU": task.execution.threads or 1, "GPU": 1 if task.settings.device == "cuda" else 0}
    with redirect_stdout(sys.stderr), _cluster(task.execution.address):  # where Ray reports that a worker died
        _require([node["Resources"] for node in ray.nodes() if node["Alive"]], workers, needs)
        rows = [{"shard": json.dumps(asdict(shard))} for shard in shards]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardActor,
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=1,
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
        )
        for row in results.iter_rows():
            if row["error"]:
                raise getattr(errors, str(row["error"]), errors.XfastError)(str(row["message"]))
            progress(int(row["rows"]), int(row["tokens"]))


def _require(machines: Sequence[dict[str, float]], workers: int, needs: dict[str, int]) -> None:
    """Ray itself would wait for ever. A worker runs on one machine: what two have together is no room for it."""
    needed = {kind: count for kind, count in needs.items() if count}
    room = sum(int(min(one.get(kind, 0) // count for kind, count in needed.items())) for one in machines)
    if workers > room:
        each = " and ".join(f"{count} {kind}" for kind, count in needed.items())
        have = "; ".join(", ".join(f"{one.get(kind, 0):.0f} {kind}" for kind in needed) for one in machines)
        raise BackendUnavailableError(
            f"workers: {workers} of {each} each do not fit the cluster: {room} do; its machines have "
            f"{have or 'nothing'}"
        )


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """The cluster that is there, or one of this machine's for the time of the job; without Ray Data's own messages."""
    import ray.data

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, OSError, RuntimeError) as error:
            raise BackendUnavailableError(f"address: {address}: no Ray cluster: {error}") from error
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        with errors_only("ray.data"):
            yield
    finally:
        context.enable_progress_bars = shown
        if ours:
            ray.shutdown()
