"""Compares engines in alternating, paired rounds, each engine in a process of its own.

    python benchmarks/compare.py --engines xfast-int8,ctranslate2-int8 --workloads mixed,1x32 --rounds 7 --json out.json

The engines take turns: while one runs the others sleep, so that no idle thread pool slows it down. Ratios are taken
round by round and their median is reported, so that a drift of the machine's speed cancels.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def _serve(pipe: Connection, engine: str, size: str, threads: int, names: list[str]) -> None:
    """Worker process: builds one engine, then times a workload whenever asked."""
    os.environ.update(OMP_NUM_THREADS=str(threads), CT2_USE_EXPERIMENTAL_PACKED_GEMM="1")
    import peers
    import workloads

    work = {name: workloads.workload(name) for name in names}
    run = peers.build(engine, peers.make_model(size), threads)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        name, want_output = request
        times, outputs = [], []
        for ids, mask in work[name].batches:
            start = time.perf_counter()
            output = run(ids, mask)
            times.append(time.perf_counter() - start)
            if want_output:
                outputs.append(output[mask.numpy().astype(bool)])
        pipe.send((times, np.concatenate(outputs) if want_output else None))


class Engine:
    """Handle of one worker process."""

    def __init__(self, name: str, size: str, threads: int, workloads: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, size, threads, workloads), daemon=True)
        self._process.start()
        if self._pipe.recv() != "ready":
            raise RuntimeError(f"{name} did not start")

    def time(self, workload: str, want_output: bool = False) -> tuple[list[float], np.ndarray | None]:
        """Seconds of each batch, and the real tokens' hidden states if wanted."""
        self._pipe.send((workload, want_output))
        return self._pipe.recv()

    def stop(self) -> None:
        """Ends the worker."""
        self._pipe.send(None)
        self._process.join()


def machine(engines: list[str], threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    import peers
    import torch
    import transformers

    import xfast

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "isas": xfast.available_isas(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "xfast": xfast.__version__,
        "engines": {name: peers.version(name) for name in engines},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _measure(engines: list[Engine], workload: str, rounds: int, progress: Progress, task: Any) -> list[dict[str, Any]]:
    import workloads

    work = workloads.workload(workload)
    outputs = {engine.name: engine.time(workload, want_output=True)[1] for engine in engines}  # also warms up
    seconds: dict[str, list[list[float]]] = {engine.name: [] for engine in engines}
    for index in range(rounds):
        order = engines if index % 2 == 0 else engines[::-1]
        for engine in order:
            seconds[engine.name].append(engine.time(workload)[0])
            progress.advance(task)
    reference = next((n for n in outputs if n.endswith("transformers-fp32")), None)
    rows = []
    for engine in engines:
        totals = [sum(times) for times in seconds[engine.name]]
        batch_ms = [1e3 * t for times in seconds[engine.name] for t in times]
        row = {
            "engine": engine.name,
            "workload": workload,
            "samples_per_s": work.samples / statistics.median(totals),
            "tokens_per_s": work.tokens / statistics.median(totals),
            "p50_ms": float(np.percentile(batch_ms, 50)),
            "p95_ms": float(np.percentile(batch_ms, 95)),
            "padding": work.padding,
            "seconds": totals,
            "ratio_of_first": {
                other.name: statistics.median(
                    o / t for o, t in zip((sum(x) for x in seconds[other.name]), totals, strict=True)
                )
                for other in engines
                if other is not engine
            },
        }
        if reference:
            want, got = outputs[reference], outputs[engine.name]
            row["error"] = float(np.abs(got - want).max() / np.abs(want).max())
            cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
            row["cosine_min"], row["cosine_mean"] = float(cosines.min()), float(cosines.mean())
        rows.append(row)
    return rows


def main(
    engines: Annotated[str, typer.Option(help="comma-separated; see peers.ENGINES")] = "xfast-int8,transformers-fp32",
    workloads: Annotated[str, typer.Option(help="comma-separated: mixed, sorted, full, 1x32, ...")] = "mixed",
    model: Annotated[str, typer.Option(help="base, large or tiny")] = "base",
    threads: Annotated[int, typer.Option(help="threads of every engine")] = os.cpu_count() or 1,
    rounds: Annotated[int, typer.Option(help="paired rounds")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write results here")] = None,
) -> None:
    """Times engines on workloads in alternating rounds and prints medians and paired ratios."""
    import peers

    console = Console()
    names = []
    for name in engines.split(","):
        if (package := peers.missing(name)) is None:
            names.append(name)
        else:
            console.print(f"{name} skipped: pip install {package}")
    wanted = workloads.split(",")
    measured_on = machine(names, threads)  # first: what is missing shows before the long part
    results: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("building engines", total=len(names) * (1 + rounds * len(wanted)))
        workers = []
        for name in names:
            workers.append(Engine(name, model, threads, wanted))
            progress.advance(task)
        for workload in wanted:
            progress.update(task, description=workload)
            results += _measure(workers, workload, rounds, progress, task)
        for worker in workers:
            worker.stop()
    _print(console, results)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": measured_on, "model": model, "results": results}, indent=1))


def _print(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table("workload", "engine", "tokens/s", "samples/s", "p50 ms", "p95 ms", "padding", "error", "x others")
    for row in results:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio_of_first"].items())
        table.add_row(
            row["workload"],
            row["engine"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['samples_per_s']:.1f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['padding']:.0%}",
            f"{row['error']:.1e}" if "error" in row else "",
            ratios,
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
