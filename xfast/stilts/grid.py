"""The matrix of the paper: each intermediate task, target and seed; a failed cell does not end the others."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xfast.errors import InvalidOptionError
from xfast.stilts import config as configs
from xfast.stilts.config import RunConfig
from xfast.stilts.data import Source
from xfast.stilts.evaluation import Evaluation, evaluate
from xfast.stilts.task import BITEXT, INTERMEDIATE, MATCHING, TARGET
from xfast.stilts.tasks import INTERMEDIATE_TASKS, XTREME_TARGETS, get
from xfast.stilts.training import Trained, train

BASELINE = "none"
"""Name of the row without an intermediate phase."""

ALL = "all"
"""Name of the row that trains on all intermediate tasks together."""

OWN = ("model", "tasks", "output", "seed", "data", "files", "hub")
"""Options of a run that the grid sets itself."""


@dataclass(frozen=True)
class GridConfig:
    """A grid.

    Attributes:
        model: checkpoint that every row starts from.
        output: folder; holds ``cells.jsonl`` (one line a finished or failed cell) and the runs.
        data, files, hub: where examples come from, see :class:`xfast.stilts.data.Source`.
        intermediates: rows: intermediate tasks, "none" (the baseline) and "all".
        all_tasks: the tasks of the row "all".
        targets: columns.
        seeds: each cell is run once for each.
        benchmark: "xtreme" or "xtreme-r": the languages.
        split: evaluated split; a target without it is evaluated on its other one, and says so.
        languages: these instead of all.
        limit: examples per language.
        intermediate, target: options of :class:`RunConfig` for the two phases.
        precision, backend: of the evaluation, see :func:`xfast.accelerate`.
        keep_models: keep the fine-tuned models (the intermediate encoders always stay).
    """

    model: str
    output: str
    data: str | None = None
    files: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)
    intermediates: tuple[str, ...] = (BASELINE, *INTERMEDIATE_TASKS, ALL)
    all_tasks: tuple[str, ...] = INTERMEDIATE_TASKS
    targets: tuple[str, ...] = XTREME_TARGETS
    seeds: tuple[int, ...] = (0, 1, 2)
    benchmark: str = "xtreme"
    split: str = "dev"
    languages: tuple[str, ...] | None = None
    limit: int | None = None
    intermediate: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    precision: str = "model"
    backend: str = "auto"
    keep_models: bool = False

    def __post_init__(self) -> None:
        for name in ("intermediates", "all_tasks", "targets", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise InvalidOptionError(f"{name}: none given")
        for name in self.intermediates:
            if name not in (BASELINE, ALL) and get(name, "intermediates").role != INTERMEDIATE:
                known = ", ".join((BASELINE, *INTERMEDIATE_TASKS, ALL))
                raise InvalidOptionError(f"intermediates: {name}; accepted: {known}")
        for name in self.targets:
            if get(name, "targets").role != TARGET:
                raise InvalidOptionError(f"targets: {name}; accepted: {', '.join(XTREME_TARGETS)} and XTREME-R's")
        for phase in ("intermediate", "target"):
            if given := [name for name in getattr(self, phase) if name in OWN]:
                raise InvalidOptionError(f"{phase}: {', '.join(given)} is set by the grid itself")
        self._check_phases()

    def _check_phases(self) -> None:
        """Make every run and evaluation once: what a cell would refuse is refused now, not after its training."""
        rows = [task for name in self.intermediates if name != BASELINE for task in _row_tasks(self, name)]
        for phase, tasks in (("intermediate", rows), ("target", self.targets)):
            translated = getattr(self, phase).get("translated")
            if isinstance(translated, dict) and (unused := set(translated) - _origins(tasks)):
                raise InvalidOptionError(f"{phase}: translated: {', '.join(sorted(unused))} is no task of this grid")
        for name in self.intermediates:
            if name != BASELINE:
                run_config(self, self.intermediate, self.model, _row_tasks(self, name), Path("unused"), self.seeds[0])
        for target in self.targets:
            for name in _stages(target) if get(target).train_on else ():
                run_config(self, self.target, self.model, (name,), Path("unused"), self.seeds[0])
            evaluation(self, self.model, target, Path("unused"))

    @property
    def source(self) -> Source:
        """Where examples come from."""
        return Source(Path(self.data) if self.data else None, self.files, self.hub)


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: an intermediate task, a target and a seed."""

    intermediate: str
    target: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.intermediate, self.target, self.seed


Report = Callable[[Cell, str], None]
"""Called with a cell and what happens to it: "done", "failed: ..." or the phase that begins."""


def cells(config: GridConfig) -> Iterator[Cell]:
    """Row by row within a seed, so that an intermediate model is used while it is fresh."""
    for seed in config.seeds:
        for intermediate in config.intermediates:
            for target in config.targets:
                yield Cell(intermediate, target, seed)


def done(config: GridConfig) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The last line of each cell in ``cells.jsonl``. A last line cut off by a crash is passed over."""
    path = Path(config.output) / "cells.jsonl"
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["intermediate"], row["target"], row["seed"]] = row
    return found


def run(config: GridConfig, report: Report | None = None, callbacks: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Run every cell that is not done. Failed cells are tried again; what they had trained is kept.

    Returns:
        The rows of all cells, as :func:`xfast.stilts.report.load_cells` reads them.

    Raises:
        InvalidOptionError: the folder holds another grid.
    """
    folder = Path(config.output)
    _same_grid(folder, config)
    say = report or (lambda cell, what: None)
    before = done(config)
    rows = []
    for cell in cells(config):
        row = before.get(cell.key)
        if row is None or row["status"] != "done":
            row = _run(config, cell, say, callbacks)
            _append(folder / "cells.jsonl", row)
        say(cell, row["status"] if row["status"] == "done" else f"failed: {row['error']}")
        rows.append(row)
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    cut_off = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(row, ensure_ascii=False) + "\n")


def _same_grid(folder: Path, config: GridConfig) -> None:
    """Rows, columns and seeds may grow; what a cell means may not change once one is done (a run checks itself)."""
    import dataclasses

    stored = folder / "grid.json"
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if stored.is_file() and any(row["status"] == "done" for row in done(config).values()):
        before = json.loads(stored.read_text(encoding="utf-8"))
        free = ("intermediates", "targets", "seeds", "keep_models", "output")
        if changed := [name for name in now if name not in free and now[name] != before.get(name)]:
            raise InvalidOptionError(f"output: {folder} holds a grid with another {', '.join(changed)}")
    folder.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def _run(config: GridConfig, cell: Cell, say: Report, callbacks: tuple[Any, ...]) -> dict[str, Any]:
    started = time.perf_counter()
    split = split_of(config, cell.target)
    row: dict[str, Any] = {
        "intermediate": cell.intermediate,
        "target": cell.target,
        "seed": cell.seed,
        "split": split,
        "model": config.model,
    }
    try:
        result = _evaluated(config, cell, say, callbacks)
        row.update(
            status="done", error=None, score=result["score"], languages=result["languages"], notes=result["notes"]
        )
        if result["score"] is None:
            row.update(status="failed", error=f"no gold in any language for {cell.target} {split}")
    except Exception as error:  # a cell's failure, whatever it is, must not end the others
        row.update(status="failed", error=f"{type(error).__name__}: {error}", score=None, languages={})
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    row["seconds"] = round(time.perf_counter() - started, 3)
    return row


def split_of(config: GridConfig, target: str) -> str:
    """The split a target is evaluated on: the one asked for, where it is there."""
    task = get(target)
    if target == "bucc2018":
        return config.split
    no_dev = task.type in (BITEXT, MATCHING) or config.split not in task.files  # matching: dev is for training alone
    return "test" if no_dev else config.split


def evaluation(config: GridConfig, model: str, target: str, folder: Path) -> Evaluation:
    """The evaluation of one cell."""
    return Evaluation(
        model,
        target,
        folder / "predictions",
        config.source,
        split=split_of(config, target),
        benchmark=config.benchmark,
        languages=config.languages,
        tokenizer=config.target.get("tokenizer", config.model),
        precision=config.precision,
        backend=config.backend,
        limit=config.limit,
    )


def _evaluated(config: GridConfig, cell: Cell, say: Report, callbacks: tuple[Any, ...]) -> dict[str, Any]:
    encoder = _intermediate(config, cell, say, callbacks)
    folder = Path(config.output) / "targets" / cell.intermediate / cell.target / f"seed{cell.seed}"
    model = encoder
    if get(cell.target).train_on:
        say(cell, "fine-tuning")
        model = str(_fine_tuned(config, cell, encoder, folder, callbacks) / "tasks" / _last_stage(cell.target))
    say(cell, "evaluating")
    result = evaluate(evaluation(config, model, cell.target, folder))
    (folder / "evaluation.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if not config.keep_models and result["score"] is not None:
        for stage in folder.glob("stage*"):
            (stage / "result.json").unlink(missing_ok=True)  # first: without its models it must not count as trained
            for part in ("encoder", "tasks"):
                shutil.rmtree(stage / part, ignore_errors=True)
    return result


def _intermediate(config: GridConfig, cell: Cell, say: Report, callbacks: tuple[Any, ...]) -> str:
    """Phase 2: the encoder that the row starts from."""
    if cell.intermediate == BASELINE:
        return config.model
    say(cell, "intermediate training")
    tasks = _row_tasks(config, cell.intermediate)
    folder = Path(config.output) / "intermediate" / cell.intermediate / f"seed{cell.seed}"
    trained = _train(config, config.intermediate, config.model, tasks, folder, cell.seed, callbacks)
    return str(trained.folder / "encoder")


def _row_tasks(config: GridConfig, intermediate: str) -> tuple[str, ...]:
    return config.all_tasks if intermediate == ALL else (intermediate,)


def _origins(tasks: Iterable[str]) -> set[str]:
    """The tasks and those whose examples train them."""
    return {name for task in tasks for name in (task, *get(task).train_on)}


def _stages(target: str) -> tuple[str, ...]:
    """Phase 3: one run, or for XCOPA two, one from the other."""
    task = get(target)
    return task.train_on if len(task.train_on) > 1 else (target,)


def _last_stage(target: str) -> str:
    return _stages(target)[-1]


def _fine_tuned(config: GridConfig, cell: Cell, encoder: str, folder: Path, callbacks: tuple[Any, ...]) -> Path:
    model, options = encoder, config.target
    for number, name in enumerate(_stages(cell.target)):
        stage = folder / f"stage{number}"
        _train(config, options, model, (name,), stage, cell.seed, callbacks)
        # a second stage continues the first one's head, too: COPA alone is too small for a new one
        model, options = str(stage / "tasks" / name), {**config.target, "heads": "checkpoint"}
    return stage


def _train(
    config: GridConfig,
    options: dict[str, Any],
    model: str,
    tasks: tuple[str, ...],
    folder: Path,
    seed: int,
    callbacks: tuple[Any, ...],
) -> Trained:
    return train(run_config(config, options, model, tasks, folder, seed), callbacks=callbacks)


def run_config(
    config: GridConfig, options: dict[str, Any], model: str, tasks: tuple[str, ...], folder: Path, seed: int
) -> RunConfig:
    """One training run of the grid; of the phase's translated files it has those of its own tasks."""
    if isinstance(translated := options.get("translated"), dict):
        own = _origins(tasks)
        options = {**options, "translated": {task: paths for task, paths in translated.items() if task in own}}
    values = {
        "tokenizer": config.model,
        **options,
        "model": model,
        "tasks": list(tasks),
        "output": str(folder),
        "seed": seed,
        "data": config.data,
        "files": config.files,
        "hub": config.hub,
    }
    run: RunConfig = configs.from_dict(values, "grid")
    return run
