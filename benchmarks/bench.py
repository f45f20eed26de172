"""``xfast bench``: from what the user asked for to a document of figures."""

from __future__ import annotations

import datetime
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

import xfast
from xfast import _C
from xfast.benchmarks import harness, metrics, peers, workloads
from xfast.benchmarks.isa import SWITCHES
from xfast.benchmarks.models import SIZES, model_of
from xfast.errors import (
    BackendUnavailableError,
    InvalidInputError,
    InvalidOptionError,
    XfastError,
    require_one_of,
)
from xfast.machine import machine
from xfast.terminal import listed

FORMAT = 1
"""Version of the JSON document."""

_MAX_ROUNDS = 1000


@dataclass(frozen=True)
class Options:
    """What ``xfast bench`` measures.

    Attributes:
        model: a size in ``models.SIZES``, a directory or a Hub id.
        workload: names or sweeps of ``workloads``, separated by commas.
        precision: precisions, separated by commas, or all.
        peers: all, none, or names of engines or families, separated by commas.
        threads: numbers of threads, separated by commas; None for what xfast uses by default.
        rounds: paired rounds.
        data: folder with real text for the tasks; None looks for one.
        zentorch_python: interpreter of the environment that has zentorch.
        isa: instruction set that every engine is held to, one of ``SWITCHES`` that this CPU has.
        seed: of random weights, lengths and ids.

    Raises:
        InvalidOptionError: a value is not accepted.
    """

    model: str = "base"
    workload: str = "mixed,1x32"
    precision: str = "all"
    peers: str = "all"
    threads: str | None = None
    rounds: int = 5
    data: Path | None = None
    zentorch_python: str | None = None
    isa: str | None = None
    seed: int = 0

    works: tuple[str, ...] = field(init=False)
    engines: tuple[str, ...] = field(init=False)
    counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= _MAX_ROUNDS:
            raise InvalidOptionError(f"rounds: {self.rounds} is not accepted; accepted: 1 to {_MAX_ROUNDS}")
        if self.isa is not None:
            require_one_of("isa", self.isa, [isa for isa in SWITCHES if isa in xfast.available_isas()])
        if self.zentorch_python and shutil.which(self.zentorch_python) is None:
            raise InvalidOptionError(f"zentorch-python: {self.zentorch_python} is no program that can be run")
        precisions = peers.PRECISIONS if self.precision == "all" else _parts("precision", self.precision)
        object.__setattr__(self, "works", tuple(workloads.expand(_parts("workload", self.workload))))
        object.__setattr__(self, "engines", tuple(peers.choose(self.peers, precisions)))
        object.__setattr__(self, "counts", _threads(self.threads))


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures and returns the document; ``console`` shows the progress.

    Raises:
        XfastError: a workload or model is not accepted, or no engine could be run.
    """
    for name in options.works:  # what is wrong shows before gigabytes are made
        workloads.workload(name, data_dir=options.data, seed=options.seed)
    _calibration(options)
    settings = harness.Settings(
        options.engines, options.counts, options.rounds, options.isa, options.zentorch_python or None
    )
    runners = len(harness.runners_of(settings))
    steps = runners * (2 + options.rounds * len(options.works))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        harness.temporary_folder() as name,
        Progress(*columns, console=console, transient=True, refresh_per_second=1) as progress,
    ):
        task = progress.add_task("making the model", total=steps)

        def show(description: str, done: int) -> None:
            progress.update(task, description=f"{description:<46}", advance=done)

        works, config, job = _prepare(options, Path(name))
        with harness.Session(settings, Path(name), show) as session:
            session.start(job)
            _require_engines(session.measured)
            reference = None
            if peers.REFERENCE not in (runner.engine for runner in session.measured.runners):
                reference = _reference(job["model"], works)
            slow = session.warm(works, reference)
            _require_engines(session.measured)
            session.measure(works, slow)
            return document(options, works, config, session.measured)


def _require_engines(measured: harness.Measured) -> None:
    if not measured.runners:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in measured.skipped)
        raise BackendUnavailableError(f"no engine could be run: {reasons}")


def _prepare(options: Options, folder: Path) -> tuple[list[workloads.Workload], Any, dict[str, Any]]:
    """Writes weights and batches for the workers; returns workloads, configuration and what all jobs have in common."""
    model = model_of(options.model, options.seed)
    transformers.utils.logging.disable_progress_bar()  # of save_pretrained, in the middle of ours
    model.save_pretrained(folder / "model")
    shape = workloads.Model.of(model.config)
    works = [workloads.workload(name, shape, data_dir=options.data, seed=options.seed) for name in options.works]
    calibration = _calibration(options, shape)
    job = {
        "model": str(folder / "model"),
        "batches": {work.name: harness.save_batches(work, folder / f"{i}.npz") for i, work in enumerate(works)},
        "calibration": None if calibration is None else harness.save_batches(calibration, folder / "calibration.npz"),
        "first": harness.save_batches(workloads.workload("1x32", shape), folder / "first.npz"),
    }
    return works, model.config, job


def _calibration(options: Options, shape: workloads.Model = workloads.XLMR) -> workloads.Workload | None:
    """What engines set their ranges by, or None if none does."""
    names = [name for name in options.engines if peers.ENGINES[name].calibrated and peers.missing(name) is None]
    if not names:
        return None
    try:
        return workloads.workload("xnli", shape, data_dir=options.data, seed=options.seed + 1)
    except XfastError as error:
        raise InvalidInputError(f"{names[0]} is calibrated on xnli: {error}; or leave it out of the peers") from None


def _reference(folder: str, works: Sequence[workloads.Workload]) -> dict[str, np.ndarray]:
    """Real tokens' hidden states of the stock model, when it is not among the engines."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    outputs = {}
    with torch.inference_mode():
        for work in works:
            rows = [model(input_ids=i, attention_mask=m).last_hidden_state[m.bool()] for i, m in work.batches]
            outputs[work.name] = torch.cat(rows).numpy()
    return outputs


def document(
    options: Options, works: Sequence[workloads.Workload], config: Any, measured: harness.Measured
) -> dict[str, Any]:
    """Everything that was measured, and the figures that follow from it, ready for JSON."""
    gflop = metrics.gflop_per_token(config)
    sizes = {work.name: metrics.Size(work.tokens, work.samples, work.padding) for work in works}
    table = metrics.rows(measured.runners, sizes, measured.rounds, gflop, measured.errors)
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine(), "kernel": platform.release()},
        "model": {
            "name": options.model,
            "random_weights": options.model in SIZES,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "gflop_per_token": gflop,
        },
        "run": {
            "threads": list(options.counts),
            "rounds": options.rounds,
            "isa": options.isa,
            "seed": options.seed,
            "turn_s": harness.TURN_SECONDS,
        },
        "workloads": [
            {
                "name": work.name,
                "source": work.source,
                "batches": [list(ids.shape) for ids, _ in work.batches],
                "samples": work.samples,
                "tokens": work.tokens,
                "padding": work.padding,
            }
            for work in works
        ],
        "engines": [
            {"label": r.label, "engine": r.engine, "threads": r.threads, **measured.facts[r.label]}
            for r in measured.runners
        ],
        "skipped": [{"label": label, "reason": reason} for label, reason in measured.skipped],
        "results": table,
        "summaries": metrics.summaries(measured.runners, table, measured.rounds),
        "rounds": [
            {
                "workload": one.workload,
                "ceilings": one.ceilings,
                "seconds": {label: [[round(t, 7) for t in p] for p in passes] for label, passes in one.passes.items()},
            }
            for one in measured.rounds
        ],
    }


def _parts(option: str, text: str) -> tuple[str, ...]:
    if not (parts := listed(text)):
        raise InvalidOptionError(f"{option}: {text!r} is not accepted; at least one is needed")
    return parts


def _threads(text: str | None) -> tuple[int, ...]:
    if text is None:
        return (xfast.get_num_threads(),)
    counts = []
    for part in _parts("threads", text):
        if not part.isdecimal() or not 1 <= int(part) <= _C.max_threads:
            raise InvalidOptionError(
                f"threads: {part!r} is not accepted; accepted: 1 to {_C.max_threads}, separated by commas"
            )
        counts.append(int(part))
    return tuple(dict.fromkeys(counts))
