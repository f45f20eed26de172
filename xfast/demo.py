"""``xfast demo``: the stock model and xfast side by side on batches with the lengths of real multilingual data.

Nothing is downloaded: XLM-R base gets its real size and seeded random weights (unless a real model is named), and the
batches follow the shipped length profiles. Random weights and ids take as long as trained ones; only the errors of a
trained model differ, which is why ``--model`` exists.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import xfast
from xfast.benchmarks.metrics import distance
from xfast.benchmarks.models import load_model, random_model
from xfast.benchmarks.peers import REFERENCE
from xfast.benchmarks.workloads import Model, Workload, batches_of
from xfast.errors import InvalidOptionError
from xfast.study.profiles import GROUPS, LengthProfile, group_of, load_profiles, sample_lengths

ENGINES = (REFERENCE, "xfast-fp32", "xfast-bf16", "xfast-int8")

TASKS = ("tatoeba", "panx", "xnli")
"""The mix behind every group: short sentences, entity-tagged sentences and sentence pairs, a third each."""

LATENCY = "latency"
LATENCY_LENGTH = 32
"""Tokens of the single sequence in each call of the ``latency`` workload."""

LATENCY_CALLS = 10
ROUNDS = 2
DEFAULT_SENTENCES = 64
PLAN_SECONDS = 60.0
"""When a run that chooses its own number of sentences should end, from its start; imports come on top."""

LIMIT_SECONDS = 68.0
"""When such a run starts nothing of the second round any more, because the machine became busy."""

_MAX_BATCH_SIZE = 4096
_MAX_SENTENCES = 100_000
_MAX_SEED = 2**32 - 1
# Long enough for idle OpenMP threads to stop spinning before the next engine needs the cores.
_SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class DemoOptions:
    """What ``xfast demo`` runs.

    Attributes:
        model: local directory or Hub id, or None for XLM-R base at its real size with random weights.
        batch_size: sentences per batch.
        sentences: sentences per language group; None takes up to ``DEFAULT_SENTENCES``, fewer on a slow machine.
        seed: seed of weights, lengths and token ids.

    Raises:
        InvalidOptionError: a value is not accepted.
    """

    model: str | None = None
    batch_size: int = 16
    sentences: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _in_range("batch-size", self.batch_size, 1, _MAX_BATCH_SIZE)
        if self.sentences is not None:
            _in_range("sentences", self.sentences, 1, _MAX_SENTENCES)
        _in_range("seed", self.seed, 0, _MAX_SEED)


@dataclass
class Tally:
    """What was measured of one engine on one workload: ``seconds[round][batch]``, and the distance to the reference.

    ``error`` is max |y - y_ref| / max |y_ref| over the real tokens' hidden states, ``cosine`` the mean over tokens.
    """

    seconds: list[list[float]] = field(default_factory=list)
    error: float = 0.0
    cosine: float = 1.0


@dataclass(frozen=True)
class DemoReport:
    """``results``: one row per workload and engine; ``run``: the settings behind them; ``notes``: remarks."""

    results: list[dict[str, Any]]
    run: dict[str, Any]
    notes: list[str]


def run(options: DemoOptions, console: Console) -> DemoReport:
    """Builds, measures and returns the figures; ``console`` shows the progress.

    Raises:
        InvalidInputError, UnsupportedModelError: the model cannot be loaded, or is not of a supported family.
    """
    start = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("building the model", total=None)
        model = random_model(seed=options.seed) if options.model is None else load_model(options.model)
        progress.update(task, description="packing xfast fp32, bf16, int8")
        engines = build_engines(model)
        progress.update(task, description="warming up")
        samples = DEFAULT_SENTENCES if options.sentences is None else options.sentences
        lengths = {group: group_lengths(group, samples, options.seed) for group in GROUPS}
        workloads = make_workloads(model, lengths, options)
        rates = _probe(engines, workloads)
        if options.sentences is None:
            left = max(start + PLAN_SECONDS - time.perf_counter(), 10.0)
            samples = _affordable(left, lengths, workloads[-1], rates, options.batch_size)
            workloads = make_workloads(model, {group: drawn[:samples] for group, drawn in lengths.items()}, options)
        deadline = start + LIMIT_SECONDS if options.sentences is None else math.inf
        tallies = _measure(engines, workloads, rates, partial(progress.update, task), deadline)
    rounds = [len(tallies[REFERENCE, workload.name].seconds) for workload in workloads]
    facts = {
        "model": options.model or "XLM-R base at its real size, seeded random weights",
        "random_weights": options.model is None,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "sentences": samples,
        "rounds": min(rounds),
        "wall_s": time.perf_counter() - start,
    }
    notes = _notes(engines)
    if options.sentences is None and samples < min(options.batch_size, DEFAULT_SENTENCES):
        notes.append(f"the machine is slow or busy: {samples} sentences per group, less than a batch; expect noise")
    if min(rounds) < ROUNDS:
        notes.append(f"the machine became busy: {rounds.count(1)} workloads were measured once only, so expect noise")
    return DemoReport(_rows(workloads, tallies), facts, notes)


def build_engines(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself, and one accelerated twin per precision that shares its parameters."""
    engines = {REFERENCE: model}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name in ENGINES[1:]:
        twin = copy.deepcopy(model, dict(shared))  # modules are copied, tensors are not
        engines[name] = xfast.accelerate(twin, precision=name.split("-")[1])
    return engines


def group_lengths(group: str, count: int, seed: int) -> list[int]:
    """Token lengths of ``count`` sentences in arrival order: the tasks take turns, and a task's languages within it.

    Every group uses the same random numbers, so that groups differ by their languages and not by luck.
    """
    members = [profile for profile in load_profiles() if group_of(profile.joshi_class) == group]
    tasks: list[list[LengthProfile]] = [[p for p in members if p.task == task] for task in TASKS]
    lengths = []
    for index in range(count):
        profiles = tasks[index % len(tasks)]
        profile = profiles[index // len(tasks) % len(profiles)]
        lengths.append(int(sample_lengths(profile, 1, seed * _MAX_SENTENCES + index)[0]))
    return lengths


def make_workloads(model: nn.Module, lengths: dict[str, list[int]], options: DemoOptions) -> list[Workload]:
    """One workload per group, and the single-sequence ``latency`` workload last."""
    shape = Model.of(model.config)

    def made(name: str, drawn: Sequence[int], batch_size: int, index: int) -> Workload:
        return Workload(name, batches_of(drawn, batch_size, shape, seed=options.seed + index), "profiles")

    workloads = [made(*group, options.batch_size, index) for index, group in enumerate(lengths.items())]
    workloads.append(made(LATENCY, [LATENCY_LENGTH] * LATENCY_CALLS, 1, len(workloads)))
    return workloads


def _probe(engines: dict[str, nn.Module], workloads: list[Workload]) -> dict[str, float]:
    """Seconds per unit of work (see ``_work``) of each engine, from one batch after a warm-up call."""
    warm = Workload("warm-up", workloads[-1].batches[:1])
    first = Workload("probe", workloads[0].batches[:1])
    rates = {}
    for name, engine in engines.items():
        _pass(engine, warm)
        seconds, _ = _pass(engine, first)
        rates[name] = sum(seconds) / _work(name, *first.batches[0])
    return rates


def _work(engine: str, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """What an engine's time is proportional to: slots for the stock model, real tokens for xfast."""
    return ids.numel() if engine == REFERENCE else int(mask.sum())


def _affordable(
    seconds: float, lengths: dict[str, list[int]], latency: Workload, rates: dict[str, float], batch_size: int
) -> int:
    """The most sentences per group, whole batches if possible, that can be measured in ``seconds``."""
    fixed = sum(rate * _work(name, *batch) for name, rate in rates.items() for batch in latency.batches)

    def predicted(count: int) -> float:
        total = fixed
        for drawn in lengths.values():
            for start in range(0, count, batch_size):
                chunk = drawn[start : min(start + batch_size, count)]
                for name, rate in rates.items():
                    total += rate * (max(chunk) * len(chunk) if name == REFERENCE else sum(chunk))
        return ROUNDS * total

    counts = [DEFAULT_SENTENCES, *range(DEFAULT_SENTENCES // batch_size * batch_size, 0, -batch_size)]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return next((count for count in counts if predicted(count) <= seconds), 1)


def _measure(
    engines: dict[str, nn.Module],
    workloads: list[Workload],
    rates: dict[str, float],
    show: Callable[..., None],
    deadline: float,
) -> dict[tuple[str, str], Tally]:
    """Runs every engine on every workload, in turns, in alternating order. Returns tallies by (engine, workload).

    ``show`` updates the progress bar, which moves by predicted seconds so that slow and fast engines advance it evenly.
    Past ``deadline`` (on the clock of ``time.perf_counter``) no workload is measured a second time.
    """
    predicted = sum(rates[n] * _work(n, *batch) for n in engines for w in workloads for batch in w.batches)
    show(total=ROUNDS * predicted, completed=0)
    tallies = {(name, workload.name): Tally() for workload in workloads for name in engines}
    for turn, workload in itertools.product(range(ROUNDS), workloads):
        if turn and time.perf_counter() > deadline:
            break
        reference: list[torch.Tensor] = []
        for name in list(engines) if turn % 2 == 0 else reversed(engines):
            show(description=f"round {turn + 1}/{ROUNDS}  {workload.name:<13}  {name:<17}")
            time.sleep(_SETTLE_SECONDS)
            seconds, outputs = _pass(engines[name], workload, partial(_advance, show, rates[name], name))
            tally = tallies[name, workload.name]
            tally.seconds.append(seconds)
            if turn == 0 and name == REFERENCE:
                reference = outputs
            elif turn == 0:
                away = distance(torch.cat(outputs).numpy(), torch.cat(reference).numpy())
                tally.error, tally.cosine = away["max_rel"], away["cosine_mean"]
    return tallies


def _advance(show: Callable[..., None], rate: float, engine: str, ids: torch.Tensor, mask: torch.Tensor) -> None:
    show(advance=rate * _work(engine, ids, mask))


def _pass(
    model: nn.Module, workload: Workload, done: Callable[[torch.Tensor, torch.Tensor], None] | None = None
) -> tuple[list[float], list[torch.Tensor]]:
    """Seconds of each batch, and the real tokens' hidden states [tokens, hidden_size] of each batch."""
    seconds, outputs = [], []
    with torch.inference_mode():
        for ids, mask in workload.batches:
            start = time.perf_counter()
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            seconds.append(time.perf_counter() - start)
            outputs.append(hidden)
            if done is not None:
                done(ids, mask)
        packed = [hidden[mask.bool()] for hidden, (_, mask) in zip(outputs, workload.batches, strict=True)]
    return seconds, packed


def _rows(workloads: list[Workload], tallies: dict[tuple[str, str], Tally]) -> list[dict[str, Any]]:
    """The ``results`` of the JSON document: rates from the median round, latencies from every batch of every round.

    p95 from 20 batches on: of fewer none lies beyond it.
    """
    rows = []
    for workload in workloads:
        totals = {n: statistics.median(sum(r) for r in tallies[n, workload.name].seconds) for n in ENGINES}
        for name in ENGINES:
            tally = tallies[name, workload.name]
            batch_ms = [1e3 * seconds for one in tally.seconds for seconds in one]
            rows.append(
                {
                    "engine": name,
                    "workload": workload.name,
                    "samples_per_s": workload.samples / totals[name],
                    "tokens_per_s": workload.tokens / totals[name],
                    "p50_ms": float(np.percentile(batch_ms, 50)),
                    "p95_ms": float(np.percentile(batch_ms, 95)) if len(batch_ms) >= 20 else None,
                    "padding": workload.padding,
                    "speedup": totals[REFERENCE] / totals[name],
                    "error": tally.error,
                    "cosine": tally.cosine,
                    "samples": workload.samples,
                    "tokens": workload.tokens,
                }
            )
    return rows


def _notes(engines: dict[str, nn.Module]) -> list[str]:
    """Remarks that belong under the tables: how bf16 is computed, and calls that did not run accelerated code."""
    notes = []
    for name in ENGINES[1:]:
        for encoder in xfast.explain(engines[name]).encoders:
            notes += [f"{name}: {text.removeprefix('bf16: ')}" for text in encoder.details if text.startswith("bf16: ")]
            notes += [f"{name}: {count} calls ran the original code: {why}" for why, count in encoder.fallbacks.items()]
    return notes


def _in_range(option: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidOptionError(f"{option}: {value!r} is not accepted; accepted: {low} to {high}")
