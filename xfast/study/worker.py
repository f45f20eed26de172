"""One model size on one engine, in a process of its own: so that its memory is its own, and its death costs no other.

The arms live side by side. Each round visits every cell in random order, and in each visit the arms take turns in
random order on the same token ids: a machine that grows slower in the meantime slows all languages and arms alike.
"""

from __future__ import annotations

import gc
import random
import resource
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import fmean
from typing import Any

import torch
from torch import nn

import xfast
from xfast.benchmarks import workloads
from xfast.benchmarks.workloads import Batch
from xfast.errors import XfastError
from xfast.study import accuracy, arms, probes
from xfast.study.document import BASELINE, CONTROL
from xfast.study.factors import CHECKPOINT, STOCK, TYPES, Cell, EngineName, Settings, labels_of
from xfast.study.store import Record, visit_name
from xfast.study.timing import Energy, Runner, seconds_of
from xfast.study.work import Texts, batches_of, facts

Send = Callable[[Record], None]

_MIN_VISIT_S = 0.1
"""The arms take turns until each has run this long, so that one interruption does not make a visit worthless."""


@dataclass(frozen=True)
class Job:
    """What a worker measures.

    Attributes:
        size, engine: the group.
        cells: with their order of importance, low-resource languages first.
        arms: names of the arms to build.
        shared_control: the control runs the baseline's own copy, because a second one does not fit in memory.
        done: visits and jobs that a former run has measured.
        facts: of the model, see ``arms.model_facts``.
    """

    settings: dict[str, Any]
    size: str
    engine: str
    cells: tuple[Cell, ...]
    arms: tuple[str, ...]
    shared_control: bool
    done: frozenset[str]
    facts: dict[str, Any]


def main(job: Job, connection: Connection) -> None:
    """Measure and send every observation; the last record says "end", or "failed" and why."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    try:
        _Group(job, connection.send).run()
    except (BrokenPipeError, ConnectionError):  # the parent is gone: nobody wants to know
        return
    except Exception as error:
        if not isinstance(error, XfastError):
            traceback.print_exc()
        reason = str(error) if isinstance(error, XfastError) else f"{type(error).__name__}: {error}"
        connection.send({"kind": "failed", "size": job.size, "engine": job.engine, "why": reason})
        return
    connection.send({"kind": "end"})


class _Group:
    """The models of one size on one engine, and the cells to visit."""

    def __init__(self, job: Job, send: Send) -> None:
        self.job, self.send = job, send
        self.settings = Settings.from_dict(job.settings)
        self.engine = EngineName.parse(job.engine)
        self.energy = Energy(self.settings.device)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
            xfast.set_num_threads(self.settings.threads)
        self.texts = Texts(self.settings)
        known = job.facts
        self.shape = workloads.Model(known["vocab"], known["pad"], known["limit"])
        self.encoders: dict[str, nn.Module] = {}

    def run(self) -> None:
        blocks: dict[tuple[str, int], list[Cell]] = {}
        for cell in self.job.cells:
            blocks.setdefault(self._block(cell.task), []).append(cell)
        for cells in blocks.values():
            todo = [cell for cell in cells if not self._is_done(cell)]
            if todo or not self._probed(cells):
                self._run_block(cells)
        self.send(self._memory())
        self.encoders.clear()
        gc.collect()
        self._scores()

    def _scores(self) -> None:
        """Official scores, after the models that were timed are gone."""
        pairs = [(cell.task, cell.language) for cell in self.job.cells]
        for name, arm, task in accuracy.jobs(self.settings, self.job.engine, pairs):
            if name in self.job.done:
                continue
            languages = list(dict.fromkeys(language for mine, language in pairs if mine == task))
            layers = self.job.facts["layers"]
            for record in accuracy.measure(self.settings, self.job.engine, arm, task, languages, layers):
                self.send(record)
            self.send({"kind": "done", "job": name})

    def _block(self, task: str) -> tuple[str, int]:
        """Tasks that share a model: the same head, or with checkpoints nothing."""
        if self.job.size == CHECKPOINT:
            return task, 0
        return TYPES[task], labels_of(task) if TYPES[task] in ("classification", "tagging") else 0

    def _is_done(self, cell: Cell) -> bool:
        return all(visit_name(cell.key, number) in self.job.done for number in range(self.settings.rounds))

    def _probe_name(self, cells: Sequence[Cell]) -> str:
        return f"probes {self.job.size} {self.job.engine} {cells[0].task}"

    def _probed(self, cells: Sequence[Cell]) -> bool:
        wanted = self.settings.probes and self.engine.quantised and not arms.is_large(self.job.size)
        return not wanted or self._probe_name(cells) in self.job.done

    def _run_block(self, cells: Sequence[Cell]) -> None:
        models = {arm: self._model(arm, cells[0].task) for arm in self.job.arms}
        work = {cell.key: self._work(cell) for cell in cells}
        if not self._probed(cells):
            self._probe(cells, models)
        for model in models.values():
            arms.accelerate(model, self.engine)
        runners = {arm: Runner(model, self.settings.device) for arm, model in models.items()}
        if self.job.shared_control:
            runners[CONTROL] = runners[BASELINE]
        for batches in work.values():
            for runner in runners.values():
                for batch in batches:
                    runner(batch)  # packs, compiles, captures: whatever happens when a shape comes first
        explain = "transformers" if self.engine.backend == STOCK else str(xfast.explain(models[BASELINE]))
        self.send({"kind": "engine", "engine": self.job.engine, "size": self.job.size, "explain": explain})
        for number in range(self.settings.rounds):
            order = list(cells)
            random.Random(f"{self.settings.seed} {number}").shuffle(order)
            for cell in order:
                if visit_name(cell.key, number) not in self.job.done:
                    self._visit(cell, number, runners, work[cell.key])
        self._take_out(models)

    def _model(self, arm: str, task: str) -> nn.Module:
        model = arms.model_of(self.settings, self.job.size, arm, task, self.encoders.pop(arm, None))
        return model.to(self.settings.device)

    def _take_out(self, models: dict[str, nn.Module]) -> None:
        """Keep the encoders for the next head, where their weights are still there."""
        rounded = self.engine.backend == STOCK and self.engine.quantised  # its weights were converted in place
        if self.job.size == CHECKPOINT or arms.is_large(self.job.size) or rounded:
            return
        for arm, model in models.items():
            xfast.restore(model)
            self.encoders[arm] = arms.without_head(model)

    def _work(self, cell: Cell) -> list[Batch]:
        count = self.settings.responses if cell.is_latency else self.settings.samples
        work = self.texts.work(cell.task, cell.language, count, self.shape)
        batches = batches_of(work, cell.policy, cell.batch_size, self.shape.pad)
        self.send({"kind": "cell", "cell": cell.key, **facts(work, batches)})
        device = self.settings.device
        return [(ids.to(device), mask.to(device)) for ids, mask in batches]

    def _visit(self, cell: Cell, number: int, runners: dict[str, Runner], batches: Sequence[Batch]) -> None:
        """The arms in random order and then in the reverse: a steady drift of the machine cancels out."""
        names = list(runners)
        random.Random(f"{self.settings.seed} {cell.key} {number}").shuffle(names)
        runs: dict[str, list[list[float]]] = {arm: [] for arm in names}
        joules: dict[str, list[float]] = {arm: [] for arm in names}
        while min(sum(map(sum, done)) for done in runs.values()) < _MIN_VISIT_S or len(runs[names[0]]) < 2:
            for arm in names:
                runner = runners[arm]
                runner((batches[0][0][:1], batches[0][1][:1]))  # wakes the threads, fetches what the last arm left cold
                before = self.energy.read()
                runs[arm].append(seconds_of(runner, batches))
                used = self.energy.since(before)
                joules[arm] += [] if used is None else [used]
            names.reverse()
        self.send(
            {
                "kind": "visit",
                "cell": cell.key,
                "round": number,
                "seconds": {
                    arm: [second for one in done for second in one]
                    if cell.is_latency
                    else [fmean(sum(one) for one in done)]
                    for arm, done in runs.items()
                },
                "joules": {arm: fmean(each) if each else None for arm, each in joules.items()},
            }
        )

    def _probe(self, cells: Sequence[Cell], models: dict[str, nn.Module]) -> None:
        """What the engine's arithmetic does to each arm, in each language."""
        inputs = {}
        for cell in cells:
            if not cell.is_latency and (cell.task, cell.language) not in inputs:
                work = self.texts.work(cell.task, cell.language, probes.EXAMPLES, self.shape)
                ((ids, mask),) = batches_of(work, "arrival", len(work.examples), self.shape.pad)
                inputs[cell.task, cell.language] = (ids.to(self.settings.device), mask.to(self.settings.device))
        for arm, model in models.items():
            if arm != CONTROL:
                for record in probes.compare(model, self.engine, inputs):
                    self.send({"kind": "probe", "arm": arm, "size": self.job.size, **record})
        self.send({"kind": "done", "job": self._probe_name(cells)})

    def _memory(self) -> Record:
        if self.settings.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {"kind": "memory", "size": self.job.size, "engine": self.job.engine}
        return {**record, "arms": len(self.job.arms), "peak_bytes": peak}
