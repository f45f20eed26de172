"""Measures engines beside each other: each in its own process, asked in turn while the others are stopped.

Idle thread pools spin and slow each other down, so a worker that is not asked gets SIGSTOP. The order alternates from
round to round, and the machine's ceilings are measured in every round: ratios and shares come from paired figures, so
that a drift of the machine's speed cancels.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xfast.benchmarks import isa as isas
from xfast.benchmarks import metrics, peers
from xfast.benchmarks.metrics import Round, Runner
from xfast.benchmarks.workloads import Workload
from xfast.machine import available_memory, ceiling, cpu_flags

WORKER = Path(__file__).with_name("worker.py")
BUILD_LIMIT_S = 1200.0
TURN_SECONDS = 0.3
"""Passes over a short workload are repeated until a turn takes this long."""

SLOWEST_PASS_S = 60.0
"""An engine that needs longer for one pass over a workload is left out there."""

CEILING_SECONDS = 0.1
# Peak memory while an engine is built, in sizes of the fp32 weights: conversions hold several copies at once.
_BUILD_COPIES = {"peers_onnx": 4.0, "peers_openvino": 3.0, "peers_ctranslate2": 2.5, "peers_xfast": 1.2}
_OTHER_BUILD_COPIES = 2.0
_SPARE_BYTES = 1.5e9

Show = Callable[[str, int], None]
"""Called with what happens next and how many steps are done since the last call."""


class WorkerError(Exception):
    """An engine could not be built or did not answer; the message is the reason."""


@dataclass(frozen=True)
class Settings:
    """What to run: engine names, threads of each, rounds, and how."""

    engines: Sequence[str]
    threads: Sequence[int]
    rounds: int
    isa: str | None = None
    zentorch_python: str | None = None
    slowest_pass_s: float = SLOWEST_PASS_S


@dataclass
class Measured:
    """Raw figures of a session. ``facts`` by label: build time, memory, versions; ``skipped``: (label, reason)."""

    runners: list[Runner] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


class Worker:
    """Handle of the process of one engine."""

    def __init__(self, runner: Runner, job: Mapping[str, Any], python: str, env: Mapping[str, str], log: Path) -> None:
        self.runner, self._log = runner, log
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                [python, str(WORKER), json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env={**os.environ, **env},
                text=True,
            )

    def read(self, limit_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            WorkerError: it says so, ended, or took longer than ``limit_s``.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            raise WorkerError(f"no answer within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(" ".join(str(answer["error"]).split())[:300])
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Wakes the worker, asks, and stops it again once it has answered."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._end()) from None
        answer = self.read(BUILD_LIMIT_S)
        self.stop()
        return answer

    def stop(self) -> None:
        """Suspends it: its threads use no CPU until the next question."""
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _end(self) -> str:
        """Why the process ended: its last line of stderr, or the signal."""
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "was killed, probably because memory ran out"
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended with status {status}: {lines[-1][:300] if lines else 'no message'}"


class Session:
    """Workers of all engines, and what they measured."""

    def __init__(self, settings: Settings, folder: Path, show: Show) -> None:
        self._settings, self._folder, self._show = settings, folder, show
        self._workers: list[Worker] = []
        self.measured = Measured()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def start(self, job: Mapping[str, Any]) -> None:
        """Builds every engine, one after another, those that need most memory for it first.

        ``job`` holds what all have in common: model folder, files of the workloads.
        """
        settings = self._settings
        mask, refusal = isas.build_mask(self._folder, settings.isa) if settings.isa else (None, None)
        environment = isas.environment(settings.isa, mask)
        runners = runners_of(settings)
        weights = Path(job["model"], "model.safetensors").stat().st_size
        order = sorted(runners, key=lambda runner: -_copies(runner.engine))
        for runner in order:
            self._show(f"building {runner.label}", 1)
            reason = self._obstacle(runner, mask, refusal) or _memory_obstacle(runner.engine, weights)
            if reason is None:
                reason = self._build(runner, job, environment)
            if reason is not None:
                self.measured.skipped.append((runner.label, reason))
        self._workers.sort(key=lambda worker: runners.index(worker.runner))
        self.measured.runners = [worker.runner for worker in self._workers]

    def _obstacle(self, runner: Runner, mask: Path | None, refusal: str | None) -> str | None:
        """Why an engine cannot be started, or None."""
        engine = peers.ENGINES[runner.engine]
        if engine.own_python:
            if not self._settings.zentorch_python:
                pip = " ".join(engine.packages.values())
                return f"pip install {pip} in a Python environment of its own, and name it with --zentorch-python"
        elif (pip_name := peers.missing(engine.name)) is not None:
            return f"pip install {pip_name}"
        if engine.needs_flags and not cpu_flags() & set(engine.needs_flags):
            return f"this CPU has none of {', '.join(engine.needs_flags)}"
        reason = isas.unforceable(engine.name, self._settings.isa, mask)
        return f"{reason} ({refusal})" if reason else None

    def _build(self, runner: Runner, job: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
        engine = peers.ENGINES[runner.engine]
        python = self._settings.zentorch_python if engine.own_python else None
        full_range = self._settings.isa != "avx2" and bool(cpu_flags() & {"avx512_vnni", "avx_vnni"})
        options = {**engine.options, **({"full_range": full_range} if engine.family == "onnxruntime" else {})}
        mine = {
            "module": engine.module,
            "precision": runner.precision,
            "threads": runner.threads,
            "options": options,
            "packages": list(engine.packages.values()),
        }
        count = str(runner.threads)
        env = {**environment, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _python_path(engine.own_python)}
        log = self._folder / f"{runner.label}.log"
        worker = Worker(runner, {**job, **mine}, python or sys.executable, env, log)
        try:
            self.measured.facts[runner.label] = worker.read(BUILD_LIMIT_S)
        except (WorkerError, OSError) as error:
            worker.close()
            return str(error)
        worker.stop()
        self._workers.append(worker)
        return None

    def warm(
        self, works: Sequence[Workload], reference: Mapping[str, np.ndarray] | None = None
    ) -> set[tuple[str, str]]:
        """Warms every engine up on every workload, compares outputs, and returns (workload, label) of the too slow.

        ``reference`` are the outputs to compare with; None takes those of ``peers.REFERENCE``, which must be running.
        """
        slow: set[tuple[str, str]] = set()
        outputs: dict[tuple[str, str], Path] = {}
        for worker in list(self._workers):
            label = worker.runner.label
            self._show(f"warming up {label}", 1)
            try:
                for work in works:
                    outputs[work.name, label] = path = self._folder / f"{label}-{len(outputs)}.npy"
                    slowest = self._settings.slowest_pass_s
                    answer = worker.ask("warm", workload=work.name, output=str(path), slowest_s=slowest)
                    if answer["too_slow_s"] is not None:
                        slow.add((work.name, label))
                        reason = f"{work.name}: one pass takes {answer['too_slow_s']:.0f} s, not measured there"
                        self.measured.skipped.append((label, reason))
                self.measured.facts[label] |= {f"{k}_gb": v for k, v in worker.ask("memory").items()}
            except WorkerError as error:
                self._drop(worker, str(error))
        self._compare(works, outputs, reference)
        return slow

    def _compare(
        self,
        works: Sequence[Workload],
        outputs: Mapping[tuple[str, str], Path],
        reference: Mapping[str, np.ndarray] | None,
    ) -> None:
        truth = next((r.label for r in self.measured.runners if r.engine == peers.REFERENCE), None)
        for work in works:
            if reference is not None:
                want = reference[work.name]
            elif truth is not None and (work.name, truth) in outputs:
                want = np.load(outputs[work.name, truth])
            else:
                continue
            for runner in self.measured.runners:
                got = np.load(outputs[work.name, runner.label])
                if not np.isfinite(got).all():  # no distance: what it is timed at is no answer
                    self.measured.skipped.append((runner.label, f"{work.name}: hidden states are not finite"))
                    continue
                self.measured.errors[work.name, runner.label] = metrics.distance(got, want)

    def measure(self, works: Sequence[Workload], slow: set[tuple[str, str]]) -> None:
        """The rounds: ceilings, then every engine once, in an order that alternates."""
        for work in works:
            for index in range(self._settings.rounds):
                turn = Round(work.name, ceilings=self._ceilings())
                for worker in self._workers[:: 1 if index % 2 == 0 else -1]:
                    label = worker.runner.label
                    if (work.name, label) in slow:
                        continue
                    self._show(f"{work.name}  round {index + 1}/{self._settings.rounds}  {label}", 1)
                    try:
                        answer = worker.ask("time", workload=work.name, min_s=TURN_SECONDS)
                        turn.passes[label] = answer["passes"]
                    except WorkerError as error:
                        self._drop(worker, str(error))
                self.measured.rounds.append(turn)

    def _ceilings(self) -> dict[int, dict[str, float]]:
        runners = self.measured.runners
        return {
            threads: {
                kind: ceiling(kind, threads, isa=self._settings.isa, seconds=CEILING_SECONDS)
                for kind in (*dict.fromkeys(r.precision for r in runners if r.threads == threads), "read")
            }
            for threads in dict.fromkeys(runner.threads for runner in runners)
        }

    def _drop(self, worker: Worker, reason: str) -> None:
        worker.close()
        self._workers.remove(worker)
        self.measured.runners.remove(worker.runner)
        self.measured.skipped.append((worker.runner.label, reason))


def runners_of(settings: Settings) -> list[Runner]:
    """Every engine on every number of threads; the number is part of the label when there are several."""
    several = len(settings.threads) > 1
    return [
        Runner(f"{name}@{threads}" if several else name, name, peers.ENGINES[name].precision, threads)
        for threads in settings.threads
        for name in settings.engines
    ]


def save_batches(work: Workload, path: Path) -> str:
    """Writes a workload for the workers."""
    arrays = {}
    for index, (ids, mask) in enumerate(work.batches):
        arrays[f"ids{index}"], arrays[f"mask{index}"] = ids.numpy(), mask.numpy()
    np.savez(path, **arrays)
    return str(path)


def _copies(engine: str) -> float:
    return _BUILD_COPIES.get(peers.ENGINES[engine].module, _OTHER_BUILD_COPIES)


def _memory_obstacle(engine: str, weights: int) -> str | None:
    """Why there is too little memory to build an engine, or None."""
    available = available_memory()
    needed = _copies(engine) * weights + _SPARE_BYTES
    if available is None or available >= needed:
        return None
    return f"needs about {needed / 1e9:.1f} GB of memory to build, {available / 1e9:.1f} GB are available"


def _python_path(own_python: bool) -> str:
    """Workers see the packages that this process sees; an environment of its own sees only itself."""
    return "" if own_python else os.pathsep.join(path for path in sys.path if path)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Where weights, batches, outputs and logs of a session go."""
    return tempfile.TemporaryDirectory(prefix="xfast-bench-")
