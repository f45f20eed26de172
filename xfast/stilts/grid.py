"""The matrix of the paper: each intermediate task, target and seed; a failed cell does not end the others."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xfast import files
from xfast.errors import InvalidOptionError, XfastError
from xfast.stilts import config as configs
from xfast.stilts.config import RunConfig
from xfast.stilts.data import Source
from xfast.stilts.estimate import Estimate
from xfast.stilts.evaluation import Evaluation, evaluate
from xfast.stilts.folders import Lock
from xfast.stilts.grid_checks import check_acceleration, check_languages, check_run
from xfast.stilts.rows import load_json
from xfast.stilts.scoring import TARGETS
from xfast.stilts.task import BITEXT, INTERMEDIATE, MATCHING, TARGET
from xfast.stilts.tasks import ALL, BASELINE, INTERMEDIATE_TASKS, XTREME_TARGETS, get
from xfast.stilts.training import Trained, train

FINAL = ("done", "unscored")
"""How a cell ends that is not tried again. Unscored: predicted, but the gold is withheld, as of most test sets."""

OUTCOMES = (*FINAL, "failed")
"""How what :func:`run` reports of a cell at its end begins."""

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
        splits: evaluated splits, "dev", "test" or both: the best row of a target is picked on dev and told on test. A
            target without one of them is evaluated on its other one, and says so.
        languages: these instead of all; every target has at least one of them.
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
    splits: tuple[str, ...] = ("dev",)
    languages: tuple[str, ...] | None = None
    limit: int | None = None
    intermediate: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    precision: str = "model"
    backend: str = "auto"
    keep_models: bool = False

    def __post_init__(self) -> None:
        for name in ("intermediates", "all_tasks", "targets", "seeds", "splits"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values:
                raise InvalidOptionError(f"{name}: none given")
            if twice := [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]:
                raise InvalidOptionError(f"{name}: {', '.join(twice)} given more than once")
        if wrong := [str(split) for split in self.splits if split not in ("dev", "test")]:
            raise InvalidOptionError(f"splits: {', '.join(wrong)}; accepted: dev, test")
        if unfit := [str(seed) for seed in self.seeds if type(seed) is not int or not 0 <= seed < 2**32]:
            raise InvalidOptionError(f"seeds: {', '.join(unfit)}; accepted: whole numbers from 0 to 2**32 - 1")
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
        """Make every run and evaluation once: what a cell would refuse is refused now, not after its training.

        What needs the model's files or the machine is checked by :func:`run`.
        """
        rows = [task for name in self.intermediates if name != BASELINE for task in _row_tasks(self, name)]
        for phase, tasks in (("intermediate", rows), ("target", self.targets)):
            translated = getattr(self, phase).get("translated")
            if isinstance(translated, dict) and (unused := set(translated) - _origins(tasks)):
                raise InvalidOptionError(f"{phase}: translated: {', '.join(sorted(unused))} is no task of this grid")
        _runs(self, self.intermediates, self.targets)
        check_languages(self.languages, self.targets, self.source)
        for target in self.targets:
            for split in self.splits:
                evaluation(self, self.model, target, split, Path("unused"))

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


Rows = dict[tuple[str, str, int, str], dict[str, Any]]
"""By intermediate task, target, seed and split."""


def done(config: GridConfig) -> Rows:
    """The last row of each cell and split in ``cells.jsonl``. A last line cut off by a crash is passed over."""
    found: Rows = {}
    for line in _lines(Path(config.output) / "cells.jsonl"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["intermediate"], row["target"], row["seed"], row["split"]] = row
    return found


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.is_file() else []


def run(
    config: GridConfig,
    report: Report | None = None,
    callbacks: tuple[Any, ...] = (),
    announce: Callable[[Estimate], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every cell that is not done. Failed cells are tried again; what they had trained is kept.

    Args:
        config: the grid.
        report: called with a cell and what happens to it.
        callbacks: ``TrainerCallback`` objects for every training run.
        announce: called with what a training run will cost, before it begins.

    Returns:
        The rows of all cells and splits, as :func:`xfast.stilts.report.load_cells` reads them.

    Raises:
        InvalidOptionError: the folder holds another grid or cannot be made, another process runs it, several processes
            would run it, or a run would be refused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidOptionError("grid: one process runs it; use torchrun for single runs, `xfast stilts train`")
    folder = Path(config.output)
    with Lock("output", folder) as lock:
        lock.make()
        _same_grid(folder, config)
        return _run_cells(config, folder, report or (lambda cell, what: None), _Training(callbacks, announce))


def _run_cells(config: GridConfig, folder: Path, say: Report, training: _Training) -> list[dict[str, Any]]:
    before = done(config)
    _check_runs(config, before)
    rows: list[dict[str, Any]] = []
    for cell in cells(config):
        had = _had(config, cell, before)
        if missing := _missing(had):
            for row in _run(config, cell, missing, say, training):
                _append(folder / "cells.jsonl", row)
                had[row["split"]] = row
        # after its rows are on disk: a cell that is killed in between would be trained again
        if not config.keep_models and not _missing(had):
            _drop_models(_folder(config, cell))
        failed = [row for row in had.values() if row["status"] != "done"]
        first = next((row for row in failed if row["status"] == "failed"), failed[0] if failed else None)
        say(cell, "done" if first is None else f"{first['status']}: {first['error']}")
        rows += had.values()
    return rows


def _had(config: GridConfig, cell: Cell, before: Rows) -> dict[str, dict[str, Any]]:
    """A cell's rows by the splits that it is to have."""
    splits = dict.fromkeys(split_of(cell.target, split) for split in config.splits)
    return {split: before.get((*cell.key, split), {}) for split in splits}


def _missing(had: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [split for split, row in had.items() if row.get("status") not in FINAL]


def _check_runs(config: GridConfig, before: Rows) -> None:
    """Refuse what a run or an evaluation would refuse, before the first is trained: theirs come hours later."""
    left = [cell for cell in cells(config) if _missing(_had(config, cell, before))]
    rows, columns = dict.fromkeys(cell.intermediate for cell in left), dict.fromkeys(cell.target for cell in left)
    for phase, wanted in _runs(config, rows, columns):
        check_run(phase, wanted)
    if left:
        check_acceleration(config.model, config.backend, config.precision)


class IntermediateError(XfastError, RuntimeError):
    """An intermediate phase that failed for one target is not tried for the next one."""


@dataclass(frozen=True)
class _Training:
    """How one call of :func:`run` trains.

    Attributes:
        callbacks, announce: see there.
        failed: by intermediate task and seed, why there is no encoder.
    """

    callbacks: tuple[Any, ...]
    announce: Callable[[Estimate], None] | None
    failed: dict[tuple[str, int], str] = field(default_factory=dict)

    def __call__(self, run: RunConfig, config: GridConfig) -> Trained:
        return train(run, callbacks=self.callbacks, announce=self.announce, root=Path(config.output))


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row; what a crash has cut off before it goes."""
    kept = path.read_bytes() if path.is_file() else b""
    kept = kept[: kept.rfind(b"\n") + 1]
    line = json.dumps(row, ensure_ascii=False) + "\n"
    files.write_bytes(path, kept + line.encode())


def _same_grid(folder: Path, config: GridConfig) -> None:
    """Rows, columns, seeds and splits may grow; what a cell means may not change once one has ended."""
    stored = folder / "grid.json"
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if stored.is_file() and any(row["status"] in FINAL for row in done(config).values()):
        before = load_json(stored)
        free = ("intermediates", "targets", "seeds", "splits", "keep_models", "output")
        if changed := [name for name in now if name not in free and now[name] != before.get(name)]:
            raise InvalidOptionError(f"output: {folder} holds a grid with another {', '.join(changed)}")
    files.save("output", stored, (json.dumps(now, indent=1) + "\n").encode())


def _run(
    config: GridConfig, cell: Cell, splits: Sequence[str], say: Report, training: _Training
) -> Iterator[dict[str, Any]]:
    """A row for each split. A cell's failure, whatever it is, must not end the others."""
    started = time.perf_counter()
    try:
        model, trained = _trained(config, cell, say, training)
    except Exception as error:
        for split in splits:
            yield _row(config, cell, split, started, error)
        return
    finally:
        _free_memory()
    for split in splits:
        say(cell, f"evaluating on {split}")
        try:
            found: Any = evaluate(evaluation(config, model, cell.target, split, _folder(config, cell)))
            text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
            files.save("output", _folder(config, cell) / f"evaluation-{split}.json", text.encode())
        except Exception as error:
            found = error
        finally:
            _free_memory()
        yield _row(config, cell, split, started, found, trained)
        started = time.perf_counter()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(
    config: GridConfig, cell: Cell, split: str, started: float, found: Any, trained: Trained | None = None
) -> dict[str, Any]:
    """What ``cells.jsonl`` has of one evaluation: ``found`` is its result or what was raised."""
    row: dict[str, Any] = {**dataclasses.asdict(cell), "split": split, "model": config.model}
    if cell.intermediate == ALL and set(config.all_tasks) != set(INTERMEDIATE_TASKS):
        row["together"] = list(config.all_tasks)  # so that no report puts the figure for all nine beside it
    if trained is not None:
        row["training"] = {"dev_score": trained.score, "steps": trained.steps, "notes": trained.notes}
    row["seconds"] = round(time.perf_counter() - started, 3)
    if isinstance(found, Exception):
        return {**row, "status": "failed", "error": _said(found), "score": None, "languages": {}}
    if found["score"] is None:
        error = f"no gold in any language for {cell.target} {split}"
        error += "" if config.limit else "; its predictions are written"
        return {**row, "status": "unscored", "error": error, "score": None, "languages": {}}
    kept = {name: found[name] for name in ("score", "languages", "notes", "missing", "withheld", "limit")}
    task = get(cell.target)
    # of a target that the benchmark has not, those of the one that has it
    every = next(filter(None, map(task.languages, (config.benchmark, *TARGETS))), ())
    return {**row, "status": "done", "error": None, **kept, "partial": _partial(found, every)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _partial(found: Mapping[str, Any], every: Sequence[str]) -> str | None:
    """What a score does not cover of the benchmark's languages: "3 of 15 languages, at most 5 examples a language"."""
    scored = [language for language in every if language in found["languages"]]
    parts = [f"{len(scored)} of {len(every)} languages"] if len(scored) < len(every) else []
    parts += [f"at most {found['limit']} examples a language"] if found["limit"] else []
    return ", ".join(parts) or None


def split_of(target: str, split: str) -> str:
    """The split a target is evaluated on: the one asked for, where it is there."""
    task = get(target)
    if target == "bucc2018":
        return split
    no_dev = task.type in (BITEXT, MATCHING) or split not in task.files  # matching: dev is for training alone
    return "test" if no_dev else split


def evaluation(config: GridConfig, model: str, target: str, split: str, folder: Path) -> Evaluation:
    """The evaluation of one cell on the split, or on the one that the target has."""
    return Evaluation(
        model,
        target,
        folder / "predictions",
        config.source,
        split=split_of(target, split),
        benchmark=config.benchmark,
        languages=config.languages,
        tokenizer=config.target.get("tokenizer", config.model),
        precision=config.precision,
        backend=config.backend,
        limit=config.limit,
        max_length=config.target.get("max_length") if get(target).train_on else None,
    )


def _folder(config: GridConfig, cell: Cell) -> Path:
    return Path(config.output) / "targets" / cell.intermediate / cell.target / f"seed{cell.seed}"


def _trained(config: GridConfig, cell: Cell, say: Report, training: _Training) -> tuple[str, Trained | None]:
    """The model of a cell, and of its fine-tuning what is worth keeping."""
    encoder = _intermediate(config, cell, say, training)
    if not get(cell.target).train_on:
        return encoder, None
    say(cell, "fine-tuning")
    trained = _fine_tuned(config, cell, encoder, training)
    return str(trained.folder / "tasks" / _last_stage(cell.target)), trained


def _drop_models(folder: Path) -> None:
    for stage in folder.glob("stage*"):
        if (stage / "result.json").is_file():  # first: without its models it must not count as trained
            (stage / "result.json").replace(stage / "trained.json")
        for part in ("encoder", "tasks"):
            shutil.rmtree(stage / part, ignore_errors=True)


def _intermediate(config: GridConfig, cell: Cell, say: Report, training: _Training) -> str:
    """Phase 2: the encoder that the row starts from."""
    if cell.intermediate == BASELINE:
        return config.model
    phase = cell.intermediate, cell.seed
    if phase in training.failed:
        raise IntermediateError(f"{cell.intermediate}, seed {cell.seed}, failed before: {training.failed[phase]}")
    say(cell, "intermediate training")
    tasks = _row_tasks(config, cell.intermediate)
    folder = Path(config.output) / "intermediate" / cell.intermediate / f"seed{cell.seed}"
    try:
        trained = training(run_config(config, config.intermediate, config.model, tasks, folder, cell.seed), config)
    except Exception as error:
        training.failed[phase] = _said(error)  # not the error itself, which holds the model in its traceback
        raise
    return str(trained.folder / "encoder")


def _runs(config: GridConfig, intermediates: Iterable[str], targets: Iterable[str]) -> list[tuple[str, RunConfig]]:
    """(phase, run) of the rows and columns, as they are for the first seed and from the untouched model."""
    rows = [_row_tasks(config, name) for name in intermediates if name != BASELINE]
    columns = [(stage,) for target in targets if get(target).train_on for stage in _stages(target)]
    return [
        (phase, run_config(config, options, config.model, tasks, Path(config.output), config.seeds[0]))
        for phase, options, of in (
            ("intermediate", config.intermediate, rows),
            ("target", config.target, columns),
        )
        for tasks in of
    ]


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


def _fine_tuned(config: GridConfig, cell: Cell, encoder: str, training: _Training) -> Trained:
    model, options, folder = encoder, config.target, _folder(config, cell)
    for number, name in enumerate(_stages(cell.target)):
        run = run_config(config, options, model, (name,), folder / f"stage{number}", cell.seed)
        trained = training(run, config)
        # a second stage continues the first one's head, too: COPA alone is too small for a new one
        model, options = str(trained.folder / "tasks" / name), {**config.target, "heads": "checkpoint"}
    return trained


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
