"""One model size on one engine, in a process of its own: so that its memory is its own, and its death costs no other.

The arms live side by side. Each round visits every cell in random order, and in each visit the arms take turns in
random order on the same token ids: a machine that grows slower in the meantime slows all languages and arms alike.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import xfast
from xfast.benchmarks import workloads
from xfast.benchmarks.workloads import Batch
from xfast.errors import ArtifactError, XfastError
from xfast.machine import mapped_again, peak_memory
from xfast.stilts.task import CLASSIFICATION, TAGGING
from xfast.study import accuracy, arms, probes
from xfast.study.document import BASELINE, CONTROL
from xfast.study.factors import (
    ARRIVAL,
    CHECKPOINT,
    EARLY,
    QUANTISATION,
    STOCK,
    TYPES,
    Cell,
    EngineName,
    Settings,
    labels_of,
)
from xfast.study.fit import Fit
from xfast.study.store import Record, visit_name
from xfast.study.timing import Energy, Runner, seconds_of
from xfast.study.work import Work, batches_of, facts

Send = Callable[[Record], None]

_PAGE_FAULTS = 100
"""Reads of mapped files from disk in all visits of a block from which on their times are doubted."""

_SHORT = "other processes left too little memory for them, so that its times are not the machine's"

MIN_VISIT_S = 0.1
"""The arms take turns until each has run this long, so that one interruption does not make a visit worthless."""


@dataclass(frozen=True)
class Job:
    """What a worker measures.

    Attributes:
        size, engine: the group.
        cells: with their order of importance, low-resource languages first.
        fit: the arms to build, and how.
        done: visits and jobs that a former run has measured.
        facts: of the model, see ``arms.size_facts``.
        work: examples by task, language and whether they are answered one by one.
        output: the study's folder, where seeded artifacts lie.
    """

    settings: Settings
    size: str
    engine: str
    cells: tuple[Cell, ...]
    fit: Fit
    done: frozenset[str]
    facts: dict[str, Any]
    work: Mapping[tuple[str, str, bool], Work]
    output: Path


ALIVE: Record = {"kind": "alive"}
"""Sent where nothing can be stored for long, and not stored: a worker that says nothing is taken to hang."""


def main(job: Job, connection: Connection) -> None:
    """Measure and send every observation; the last record says "end", or "failed" and why.

    Each observation is answered when it is on disk, and not before is anything else measured.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def send(record: Record) -> None:
        connection.send(record)
        connection.recv()

    try:
        _Group(job, send).run()
    except (EOFError, ConnectionError):  # the parent is gone: nobody wants to know
        return
    except Exception as error:
        if not isinstance(error, XfastError):
            traceback.print_exc()
        reason = str(error) if isinstance(error, XfastError) else f"{type(error).__name__}: {error}"
        connection.send({"kind": "failed", "size": job.size, "engine": job.engine, "why": reason})
        return
    connection.send({"kind": "end"})


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Group:
    """The models of one size on one engine, and the cells to visit."""

    def __init__(self, job: Job, send: Send) -> None:
        self.job, self.send = job, send
        self.settings = job.settings
        self.engine = EngineName.parse(job.engine)
        self.energy = Energy(self.settings.device)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
            xfast.set_num_threads(self.settings.threads)
        known = job.facts
        self.shape = workloads.Model(known["vocab"], known["pad"], known["limit"])
        self.build = job.fit.build
        self.encoders: dict[str, nn.Module] = {}
        self.mapped_again = 0

    def run(self) -> None:
        blocks: dict[tuple[str, int], list[Cell]] = {}
        for cell in self.job.cells:
            blocks.setdefault(self._block(cell.task), []).append(cell)
        todo = [
            cells for cells in blocks.values() if not all(self._is_done(cell) for cell in cells) or self._probes(cells)
        ]
        for cells in todo:
            self._run_block(cells)
        self.encoders.clear()
        gc.collect()
        self._scores()
        self.send({"kind": "ended_group", "size": self.job.size, "engine": self.job.engine})

    def _scores(self) -> None:
        """Official scores, after the models that were timed are gone."""
        pairs = [(cell.task, cell.language) for cell in self.job.cells]
        for name, arm, task in accuracy.jobs(self.settings, self.job.engine, pairs):
            if name in self.job.done:
                continue
            languages = accuracy.languages_of(task, pairs)
            layers = self.job.facts["layers"]
            measured = accuracy.measure(
                self.settings, self.job.engine, arm, task, languages, layers, lambda *_: self.send(ALIVE)
            )
            failed = False
            for record in measured:
                failed |= record["kind"] == "skipped" and "job" in record
                self.send(record)
            if not failed:  # else the next run tries again
                self.send({"kind": "done", "job": name})

    def _block(self, task: str) -> tuple[str, int]:
        """Tasks that share a model: the same head, or with checkpoints nothing."""
        if self.job.size == CHECKPOINT:
            return task, 0
        return TYPES[task], labels_of(task) if TYPES[task] in (CLASSIFICATION, TAGGING) else 0

    def _is_done(self, cell: Cell) -> bool:
        return all(visit_name(cell.key, number) in self.job.done for number in range(self.settings.rounds))

    def _probes(self, cells: Sequence[Cell]) -> dict[str, str]:
        """The jobs of the probes that are still to be run on a block, by probe.

        What does not depend on the engine's arithmetic is one job for all engines: the first that can does it.
        """
        where = {QUANTISATION: f"{self.job.size} {self.job.engine}", EARLY: self.job.size}
        names = {probe: f"probe {probe} {where[probe]} {cells[0].task}" for probe in self.build.probes}
        return {probe: name for probe, name in names.items() if name not in self.job.done}

    def _run_block(self, cells: Sequence[Cell]) -> None:
        models = self._models(cells)
        if not models:
            return
        work = {cell.key: self._work(cell) for cell in cells}
        runners = {arm: Runner(model, self.settings.device) for arm, model in models.items()}
        if CONTROL not in models:  # a copy of its own does not fit
            runners[CONTROL] = runners[BASELINE]
        for batches in work.values():
            for runner in runners.values():
                for batch in batches:
                    runner(batch)  # packs, compiles, captures: whatever happens when a shape comes first
        explain = "transformers" if self.engine.backend == STOCK else str(xfast.explain(models[BASELINE]))
        engine = {"kind": "engine", "engine": self.job.engine, "size": self.job.size, "head": self._head(cells)}
        self.send({**engine, "explain": explain, "energy": self.energy.source, "held": self.job.fit.held})
        said = self._say_fallbacks(models, cells, set())
        self._tell_memory()  # a process that is killed from here on has said how much it holds
        faults = _page_faults()
        for number in range(self.settings.rounds):
            order = list(cells)
            random.Random(f"{self.settings.seed} {number}").shuffle(order)
            for cell in order:
                if visit_name(cell.key, number) not in self.job.done:
                    self._visit(cell, number, runners, work[cell.key])
        if self.build.mapped and _page_faults() - faults > _PAGE_FAULTS:
            where = f"{self.job.size} {self.job.engine}"
            self.send({"kind": "note", "text": f"{where}: weights were read from disk while they were timed; {_SHORT}"})
        self._say_fallbacks(models, cells, said)
        self._tell_memory()
        self._take_out(models)

    def _head(self, cells: Sequence[Cell]) -> str:
        """What the models of a block have in common, in a word."""
        return cells[0].task if self.job.size == CHECKPOINT else TYPES[cells[0].task]

    def _say_fallbacks(self, models: Mapping[str, nn.Module], cells: Sequence[Cell], said: set[str]) -> set[str]:
        """Send a note for each arm whose calls ran the original code, whose times are then not the engine's.

        Args:
            models: the arms.
            cells: what they run.
            said: notes that were sent.

        Returns:
            All notes that have been sent.
        """
        where = f"{self.job.size} {self.job.engine}, {self._head(cells)}"
        for arm, model in models.items():
            for reason in xfast.explain(model).fallbacks:
                text = f"{where}: calls of {arm} ran the original code, and their times are not the engine's: {reason}"
                if text not in said:
                    self.send({"kind": "note", "text": text})
                    said = {*said, text}
        return said

    def _models(self, cells: Sequence[Cell]) -> dict[str, nn.Module]:
        """The arms; of checkpoints that cannot be loaded or run none, and the reason is sent."""
        try:
            return self._made(cells)
        except XfastError as error:
            if self.job.size != CHECKPOINT:
                raise
            what = f"{self.job.size} {self.job.engine} {cells[0].task}"
            self.send({"kind": "skipped", "what": what, "why": str(error)})
            return {}

    def _made(self, cells: Sequence[Cell]) -> dict[str, nn.Module]:
        """The arms, each accelerated before the next is made, so that only one has weights to give up."""
        task = cells[0].task
        wanted = self._probes(cells)
        inputs = self._probe_inputs(cells) if wanted else {}
        models = {}
        for one in dict.fromkeys(self.job.fit.seeded.values()):  # before any is mapped, which needs the memory
            one.make(self.job.output, lambda _: self.send(ALIVE))
        for arm in self.job.fit.arms:
            model = self._model(arm, task)
            if not arms.is_mapped(model):
                model = model.to(self.settings.device)
            if inputs and arm != CONTROL:
                for record in probes.compare(model, self.engine, inputs, wanted):
                    self.send({"kind": "probe", "arm": arm, "size": self.job.size, **record})
            models[arm] = arms.accelerate(model, self.engine, keep_weights=self.build.keep_weights)
        for name in wanted.values():
            self.send({"kind": "done", "job": name})
        return models

    def _model(self, arm: str, task: str) -> nn.Module:
        """One arm, on the CPU."""
        seeded = self.job.fit.seeded.get(arm)
        if seeded is None:
            before = self.encoders.pop(arm, None)
            return arms.model_of(self.settings, self.job.size, arm, task, self.build.dtype, before)
        try:
            return arms.mapped_model(seeded.make(self.job.output, lambda _: None), task, self.settings.seed)
        except ArtifactError:  # damaged since a former run: its values can be had again
            seeded.remove(self.job.output)
            found = seeded.make(self.job.output, lambda _: self.send(ALIVE))
            return arms.mapped_model(found, task, self.settings.seed)

    def _take_out(self, models: dict[str, nn.Module]) -> None:
        """Keep the encoders for the next head, where their weights are still there."""
        rounded = self.engine.backend == STOCK and self.engine.quantised  # its weights were converted in place
        if self.job.size == CHECKPOINT or not self.build.keep_weights or rounded:
            return
        for arm, model in models.items():
            xfast.restore(model)
            self.encoders[arm] = arms.detach_head(model)

    def _work(self, cell: Cell) -> list[Batch]:
        work = self.job.work[cell.task, cell.language, cell.is_latency]
        batches = batches_of(work, cell.policy, cell.batch_size, self.shape.pad)
        self.send({"kind": "cell", "cell": cell.key, "digest": work.digest, **facts(work, batches)})
        device = self.settings.device
        return [(ids.to(device), mask.to(device)) for ids, mask in batches]

    def _visit(self, cell: Cell, number: int, runners: dict[str, Runner], batches: Sequence[Batch]) -> None:
        """The arms in random order and then in the reverse: a steady drift of the machine cancels out."""
        names = list(runners)
        random.Random(f"{self.settings.seed} {cell.key} {number}").shuffle(names)
        runs: dict[str, list[list[float]]] = {arm: [] for arm in names}
        joules: dict[str, list[float]] = {arm: [] for arm in names}
        while min(sum(map(sum, done)) for done in runs.values()) < MIN_VISIT_S or len(runs[names[0]]) < 2:
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
                "ticks": {
                    arm: self.energy.ticks(sum(map(sum, runs[arm]))) if each else None for arm, each in joules.items()
                },
            }
        )

    def _probe_inputs(self, cells: Sequence[Cell]) -> dict[tuple[str, str], Batch]:
        """A batch of each language."""
        inputs = {}
        for cell in cells:
            if not cell.is_latency and (cell.task, cell.language) not in inputs:
                work = self.job.work[cell.task, cell.language, False].first(probes.EXAMPLES)
                ((ids, mask),) = batches_of(work, ARRIVAL, len(work.examples), self.shape.pad)
                inputs[cell.task, cell.language] = (ids.to(self.settings.device), mask.to(self.settings.device))
        return inputs

    def _tell_memory(self) -> None:
        """Send the peak so far; of what a study has of a group the largest counts."""
        # The control's second mapping of the baseline's files is the same memory.
        self.mapped_again = max(self.mapped_again, mapped_again())
        peak = torch.cuda.max_memory_allocated() if self.settings.device == "cuda" else peak_memory()
        record = {"kind": "memory", "size": self.job.size, "engine": self.job.engine}
        self.send({**record, "arms": len(self.job.fit.arms), "peak_bytes": peak - self.mapped_again})
