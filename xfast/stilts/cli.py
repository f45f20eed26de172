"""``xfast stilts``: tasks, train, evaluate, predict, score, grid, report, doctor. Heavy imports wait for a command."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xfast.errors import InvalidOptionError
from xfast.logs import quiet_transformers
from xfast.progress import counting_bar
from xfast.terminal import JsonFlag, listed

app = typer.Typer(no_args_is_help=True, help="English intermediate-task training, zero-shot transfer, official scores.")

WIDTH = 120
"""Columns of tables that do not go to a terminal."""

Data = Annotated[Path | None, typer.Option(help="Data folder: XTREME's download folder, or one with xtreme/ in it.")]
Benchmark = Annotated[str, typer.Option(help="xtreme or xtreme-r.")]
Languages = Annotated[str | None, typer.Option(help="Comma-separated; default: all of the benchmark.")]
Config = Annotated[Path | None, typer.Option(help="YAML, TOML or JSON file with options.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, any option of the file; may be repeated.")]
Precision = Annotated[str, typer.Option(help="Of the evaluation: model, fp32, bf16, int8, ...; see xfast.accelerate.")]
Layer = Annotated[int | None, typer.Option(help="Hidden state for Tatoeba and BUCC; default: 14 of 24.")]
Pooling = Annotated[str, typer.Option(help="mean or cls, for Tatoeba and BUCC.")]
Backend = Annotated[str, typer.Option(help="auto, native, triton, tensorrt, or none for stock transformers.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of one sequence, as in training; default: the recipe's.")]


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1))


def _options(config: Path | None, given: dict[str, Any], changes: Iterable[str] | None) -> dict[str, Any]:
    """Options of the file, then of the command line, then of ``--set``."""
    import yaml

    from xfast.stilts import config as configs

    values = configs.load(config) if config else {}
    values.update({name: value for name, value in given.items() if value is not None})
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals:
            raise InvalidOptionError(f"set: {change!r}; accepted: KEY=VALUE")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidOptionError(f"set: {change!r}: {error}") from None
    return values


@app.command("tasks")
def tasks_(as_json: JsonFlag = False) -> None:
    """List the tasks: type, metric, size of the training set, languages, where the owner publishes them."""
    from dataclasses import asdict

    from xfast.stilts.tasks import TASKS

    if as_json:
        _print_json({name: asdict(task) for name, task in TASKS.items()})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "role", "type", "metric", "train", "languages", "trained on", "published at"):
        table.add_column(heading, overflow="fold")
    for task in TASKS.values():
        size = f"{task.train_size:,}{' (recalled)' if task.recall else ''}" if task.train_size else "-"
        languages = len(task.languages()) or len(task.languages("xtreme-r"))
        table.add_row(
            task.name, task.role, task.type, task.metric, size, str(languages), ", ".join(task.train_on), task.owner
        )
    _console().print(table, highlight=False)
    _console().print("(recalled): not confirmed at a source", style="dim")


@app.command()
def train(
    config: Config = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint: a folder or Hub id.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated: one task, or several together.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run; a run in it is continued.")] = None,
    data: Data = None,
    seed: Annotated[int | None, typer.Option(help="Of new weights, order and dropout.")] = None,
    changes: Set = None,
    anew: Annotated[bool, typer.Option("--anew", help="Delete the run in the folder and start again.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train on one task or several: an intermediate phase, a target, or continued masked language modelling."""
    from xfast.stilts import config as configs
    from xfast.stilts import progress, training

    named = None if tasks is None else list(listed(tasks))
    given = {"model": model, "tasks": named, "output": output, "data": data and str(data), "seed": seed}
    run = configs.from_dict(_options(config, given, changes), str(config or "options"))
    console = _console(stderr=True)
    with quiet_transformers(), counting_bar(console) as bar:
        trained = training.train(
            run,
            resume=not anew,
            callbacks=[progress.TrainingBar(bar)],
            announce=lambda estimate: console.print(progress.cost(estimate), highlight=False),
        )
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first process speaks for all
        return
    if as_json:
        result = {"score": trained.score, "metrics": trained.metrics, "steps": trained.steps, "notes": trained.notes}
        _print_json({"output": str(trained.folder), **result})
        return
    _show_notes(trained.notes, console)
    score = "not evaluated" if trained.score is None else f"dev score {trained.score:.2f}"
    _console().print(f"{trained.folder}: {trained.steps} steps, {score}", highlight=False)


def _show_notes(notes: dict[str, dict[str, int]], console: Console) -> None:
    for name, counts in notes.items():
        for reason, count in counts.items():
            console.print(f"note: {name}: {count} x {reason}", style="dim", markup=False, highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a trained model (OUTPUT/tasks/NAME) or encoder.")],
    task: Annotated[str, typer.Argument(help="Target task.")],
    data: Data = None,
    output: Annotated[Path | None, typer.Option(help="Folder for predictions in XTREME's layout.")] = None,
    split: Annotated[str, typer.Option(help="test or dev.")] = "test",
    benchmark: Benchmark = "xtreme",
    languages: Languages = None,
    precision: Precision = "model",
    backend: Backend = "auto",
    layer: Layer = None,
    pooling: Pooling = "mean",
    limit: Annotated[int | None, typer.Option(help="Examples per language; then nothing is written.")] = None,
    max_length: MaxLength = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate zero-shot in every language, on the accelerated encoder."""
    options = {"split": split, "benchmark": benchmark, "precision": precision, "backend": backend}
    more = {"layer": layer, "pooling": pooling, "limit": limit, "max_length": max_length}
    result = _evaluated(model, task, output, data, languages, _console(stderr=True), **options, **more)
    if as_json:
        _print_json(result)
        return
    _show_evaluation(result)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Folder of a trained model (OUTPUT/tasks/NAME) or encoder.")],
    task: Annotated[str, typer.Argument(help="Target task.")],
    output: Annotated[Path, typer.Argument(help="Folder for predictions in XTREME's layout.")],
    data: Data = None,
    split: Annotated[str, typer.Option(help="test or dev.")] = "test",
    benchmark: Benchmark = "xtreme",
    languages: Languages = None,
    precision: Precision = "model",
    backend: Backend = "auto",
    layer: Layer = None,
    pooling: Pooling = "mean",
    max_length: MaxLength = None,
    as_json: JsonFlag = False,
) -> None:
    """Write predictions in XTREME's submission layout; no score is shown."""
    console = _console(stderr=True)
    options = {"split": split, "benchmark": benchmark, "precision": precision, "backend": backend}
    more = {"layer": layer, "pooling": pooling, "max_length": max_length}
    result = _evaluated(model, task, output, data, languages, console, **options, **more)
    if as_json:
        _print_json({name: result[name] for name in ("task", "split", "examples", "missing", "notes")})
        return
    written = sum(result["examples"].values())
    _console().print(f"{output / task}: {written} predictions in {len(result['examples'])} languages", highlight=False)
    _show_missing(result, console)


def _evaluated(
    model: str,
    task: str,
    output: Path | None,
    data: Path | None,
    languages: str | None,
    console: Console,
    **options: Any,
) -> dict[str, Any]:
    from xfast.stilts import evaluation, progress
    from xfast.stilts.data import Source

    chosen = listed(languages or "")
    run = evaluation.Evaluation(model, task, output, Source(data), languages=chosen or None, **options)
    with quiet_transformers(), counting_bar(console) as bar:
        return evaluation.evaluate(run, progress.EvaluationBar(bar))


def _show_evaluation(result: dict[str, Any]) -> None:
    console = _console()
    names = list(result["metrics"])
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{result['task']} {result['split']}")
    for heading in ("examples", *names):
        table.add_column(heading, justify="right")
    for language, count in result["examples"].items():
        scores = (result["metrics"][name]["languages"].get(language) for name in names)
        table.add_row(language, str(count), *("-" if score is None else f"{score:.2f}" for score in scores))
    if names:
        averages = (f"{result['metrics'][name]['average']:.2f}" for name in names)
        table.add_row("average", str(sum(result["examples"].values())), *averages, style="bold")
    console.print(table, highlight=False)
    if result["score"] is not None:
        part = f", on at most {result['limit']} examples a language" if result["limit"] else ""
        console.print(f"score {result['score']:.2f} in {result['seconds']:.1f} s{part}", highlight=False)
    _show_missing(result, console)
    _show_notes(result["notes"], console)


def _show_missing(result: dict[str, Any], console: Console) -> None:
    if result["withheld"]:
        console.print(f"gold withheld, not scored: {', '.join(result['withheld'])}", highlight=False)
    if result["missing"]:
        console.print(f"no data: {', '.join(result['missing'])}", highlight=False)


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="Folder of predictions in XTREME's submission layout.")],
    labels: Annotated[Path, typer.Argument(help="Folder of labels in the same layout.")],
    benchmark: Benchmark = "xtreme",
    allow_missing: Annotated[bool, typer.Option(help="Score a task on the languages that are there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Score predictions as the benchmarks' official scripts do."""
    from xfast.stilts.scoring import score as official

    result = official(predictions, labels, benchmark, allow_missing=allow_missing)
    if as_json:
        _print_json(result)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("score", justify="right")
    table.add_column("metrics (means over languages)")
    for name, block in result["tasks"].items():
        parts = (f"{metric} {value['average']:.2f}" for metric, value in block["metrics"].items())
        table.add_row(name, f"{block['score']:.2f}", ", ".join(parts))
    for name, value in result["groups"].items():
        table.add_row(f"({name})", "-" if value is None else f"{value:.2f}", "mean of its tasks", style="dim")
    overall = result["overall"]
    table.add_row("overall", "-" if overall is None else f"{overall:.2f}", "mean of all tasks", style="bold")
    console = _console()
    console.print(table, highlight=False)
    if result["missing_tasks"]:
        console.print(f"missing tasks: {', '.join(result['missing_tasks'])}", highlight=False)
    for name, absent in result["missing_languages"].items():
        console.print(f"missing languages: {name}: {', '.join(absent)}", highlight=False)
    for name, languages in result["notes"].items():
        _show_notes({f"{name} {language}": counts for language, counts in languages.items()}, console)


@app.command()
def grid(
    config: Annotated[
        Path, typer.Argument(help="YAML, TOML or JSON file: model, data, intermediates, targets, seeds.")
    ],
    output: Annotated[str | None, typer.Option(help="Folder of the grid; what is done in it is not run again.")] = None,
    changes: Set = None,
) -> None:
    """Run every intermediate task against every target, several seeds; resumable. Then `xfast stilts report`."""
    from xfast.stilts import config as configs
    from xfast.stilts import grid as grids
    from xfast.stilts import progress

    run = configs.from_dict(_options(config, {"output": output}, changes), str(config), grids.GridConfig)
    console = _console(stderr=True)
    total = len(list(grids.cells(run)))
    with quiet_transformers(), counting_bar(console) as bar:
        whole = bar.add_task("cells", total=total, note="")

        def report(cell: Any, what: str) -> None:
            name = f"{cell.intermediate} > {cell.target}, seed {cell.seed}"
            bar.update(whole, note=f"{name}: {what}")
            if what.startswith(grids.OUTCOMES):
                bar.advance(whole)
                console.print(f"{name}: {what}", markup=False, highlight=False, soft_wrap=True)

        rows = grids.run(
            run,
            report,
            (progress.TrainingBar(bar),),
            lambda estimate: console.print(progress.cost(estimate), highlight=False),
        )
    count = Counter(row["status"] for row in rows)
    without = f", {count['unscored']} predicted without gold to score" if count["unscored"] else ""
    said = f"{run.output}/cells.jsonl: {count['done']} cells done, {count['failed']} failed{without}"
    _console().print(said, highlight=False)
    if count["failed"]:
        raise typer.Exit(1)


@app.command()
def report(
    cells: Annotated[Path, typer.Argument(help="cells.jsonl of a grid, or its folder.")],
    output: Annotated[Path | None, typer.Option(help="Folder for report.html, .md, .json and heatmap.png.")] = None,
    split: Annotated[str, typer.Option(help="Split to prefer where a target has cells of both.")] = "dev",
    as_json: JsonFlag = False,
) -> None:
    """Show the gains of a grid beside the published ones; with --output write tables and a heat map."""
    from xfast.stilts import report as reports

    path = cells / "cells.jsonl" if cells.is_dir() else cells
    summary = reports.summarize(reports.load_cells(path), split)
    if output is not None:
        reports.write_report(path, output, split=split)
    if as_json:
        _print_json(reports.as_dict(summary))
        return
    reports.print_tables(summary, _console())
    if output is not None:
        _console().print(f"{output}: report.html, report.md, report.json, heatmap.png", highlight=False)


@app.command()
def doctor(
    data: Annotated[Path, typer.Argument(help="Data folder.")],
    benchmark: Benchmark = "xtreme",
    as_json: JsonFlag = False,
) -> None:
    """Check a data folder: what is there, what is missing and who publishes it, sizes, withheld labels, leaks."""
    from xfast.stilts import doctor as doctors

    diagnosis = doctors.diagnose(data, benchmark)
    if as_json:
        _print_json(diagnosis.as_dict())
        return
    _show_diagnosis(doctors.table_rows(diagnosis), diagnosis, _console())


def _show_diagnosis(rows: list[Any], diagnosis: Any, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "splits", "languages", "rows", "problems"):
        table.add_column(heading, justify="right" if heading == "rows" else "left", overflow="fold")
    for row in rows:
        table.add_row(row.task, row.splits or "-", row.languages, f"{row.rows:,}", row.problems or "none")
    console.print(table, highlight=False)
    for finding in diagnosis.findings:
        if finding.severity != "ok":
            where = " ".join(filter(None, (finding.task, finding.split, finding.language)))
            owner = f" (published at {finding.owner})" if finding.severity == "missing" and finding.owner else ""
            console.print(f"{finding.severity}: {where}: {finding.message}{owner}", markup=False, highlight=False)
