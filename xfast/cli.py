"""The ``xfast`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich import box
from rich.console import Console
from rich.table import Table

import xfast
from xfast.errors import XfastError

if TYPE_CHECKING:
    from xfast.demo import DemoReport

BAD_INPUT = 2
"""Exit code for everything xfast refuses on purpose."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

PLANNED_BACKENDS = ("triton", "tensorrt")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


class Commands(typer.core.TyperGroup):
    """Turns xfast's own errors and Ctrl-C into one line on stderr and an exit code, for every subcommand."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's Context is click's or its own copy
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except XfastError as error:
            _complain(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Fast inference for XLM-RoBERTa-family encoders.",
)


def _complain(text: str) -> None:
    # soft_wrap: one line however narrow the terminal is, so that it can be searched for
    Console(stderr=True).print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or Hub id. Default: XLM-R base at its real size with random weights."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every engine. Default: PyTorch's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sentences per batch.")] = 16,
    sentences: Annotated[
        int | None, typer.Option(help="Sentences per language group. Default: up to 64, as time allows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, lengths and token ids.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Run the stock model and xfast fp32, bf16 and int8 side by side, in about a minute; nothing is downloaded."""
    from xfast import demo

    options = demo.DemoOptions(model=model, batch_size=batch_size, sentences=sentences, seed=seed)
    with demo.num_threads(threads):
        report = demo.run(options, Console(stderr=True))
        if as_json:
            facts = {**machine(), "run": report.run, "notes": report.notes}
            typer.echo(json.dumps({"machine": facts, "results": report.results}, indent=1))
        else:
            _print_report(report, Console())


@app.command()
def info(as_json: JsonFlag = False) -> None:
    """Show versions, CPU, instruction sets, threads and backends."""
    facts = {**machine(), "backends": backends()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    if facts["commit"]:
        table.add_row("commit", facts["commit"])
    table.add_row("cpu", f"{facts['cpu']} ({facts['architecture']}), {facts['cores']} usable cores")
    table.add_row("threads", str(facts["threads"]))
    table.add_row("instruction set", f"{facts['isa']} (available: {', '.join(facts['isas'])})")
    for backend in facts["backends"]:
        state = f"available: {', '.join(backend['precisions'])}" if backend["available"] else backend["reason"]
        table.add_row(f"backend {backend['name']}", state)
    Console().print(table, highlight=False)


def machine() -> dict[str, Any]:
    """What figures are measured on: CPU, cores this process may use, threads, instruction sets, versions, commit.

    Raises:
        InvalidOptionError: ``XFAST_ISA`` names an instruction set that this CPU lacks.
    """
    import numpy
    import torch
    import transformers

    from xfast.backends.native import requested_isa

    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": xfast.get_num_threads(),
        "isa": requested_isa(),
        "isas": xfast.available_isas(),
        "versions": {
            "xfast": xfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "commit": _commit(),
    }


def backends() -> list[dict[str, Any]]:
    """Every backend with its precisions for XLM-R on this machine, or the reason why it is not available."""
    import torch

    from xfast.architecture import EncoderSpec
    from xfast.options import PRECISIONS
    from xfast.plan import BACKENDS

    base = EncoderSpec(
        family="xlm-roberta",
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        head_dim=64,
        intermediate_size=3072,
        vocab_size=250002,
        max_positions=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        activation="gelu",
        norm="post",
        position_rule="padding",
        pad_token_id=1,
    )
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    rows: list[dict[str, Any]] = []
    for backend in BACKENDS:
        reasons = {p: [backend.supports(base, device, p) for device in devices] for p in PRECISIONS[1:-1]}
        precisions = [precision for precision, given in reasons.items() if None in given]
        reason = None if precisions else reasons["fp32"][0]
        rows.append({"name": backend.name, "available": bool(precisions), "precisions": precisions, "reason": reason})
    known = {row["name"] for row in rows}
    planned = {"available": False, "precisions": [], "reason": "planned, not in this version"}
    return rows + [{"name": name, **planned} for name in PLANNED_BACKENDS if name not in known]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit when xfast runs from a checkout, with ``-dirty`` behind it when files differ, else None."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _print_report(report: DemoReport, console: Console) -> None:
    """One table per workload, the remarks, two lines of summary and what to do next. Fits 80 columns."""
    console.print(
        f"\n{report.run['model']}, {xfast.get_num_threads()} threads, batches of {report.run['batch_size']}\n",
        markup=False,
        highlight=False,
    )
    for workload in dict.fromkeys(row["workload"] for row in report.results):
        console.print(_table(workload, [row for row in report.results if row["workload"] == workload]), "")
    for note in report.notes:
        console.print(f"note: {note}", style="dim", markup=False, highlight=False)
    for engine in ("xfast-fp32", "xfast-int8"):
        rows = [row for row in report.results if row["engine"] == engine]
        speedups = [row["speedup"] for row in rows]
        console.print(
            f"[bold]{engine}[/bold]: {min(speedups):.1f} to {max(speedups):.1f} times as fast; "
            f"error up to {max(row['error'] for row in rows):.0e}, cosine {min(row['cosine'] for row in rows):.4f}",
            highlight=False,
        )
    console.print('Next: [bold]model = xfast.accelerate(model, precision="int8")[/bold]', highlight=False)
    if report.run["random_weights"]:
        console.print("Errors of real weights differ from these: [bold]xfast demo --model DIR_OR_HUB_ID[/bold]")


def _table(workload: str, rows: list[dict[str, Any]]) -> Table:
    samples, tokens = rows[0]["samples"], rows[0]["tokens"]
    what = f"{samples} sentences, {tokens} tokens"
    if workload == "latency":
        what = f"one sentence of {tokens // samples} tokens per call"
    table = Table(
        title=f"[bold]{workload}[/bold]: {what}",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("engine", no_wrap=True)
    for heading in ("samples/s", "tokens/s", "p50 ms", "p95 ms", "padding", "speed-up", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["engine"],
            f"{row['samples_per_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['padding']:.0%}",
            f"{row['speedup']:.2f}x",
            "-" if row["engine"] == "transformers-fp32" else f"{row['error']:.1e}",
        )
    return table
