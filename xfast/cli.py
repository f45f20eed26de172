"""The ``xfast`` command: a few subcommands, groups of others, and what an error or Ctrl-C becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import xfast
from xfast import figures, files
from xfast.convert import run as convert
from xfast.encode.cli import encode
from xfast.engine import app as engine_app
from xfast.errors import XfastError
from xfast.export import app as export_app
from xfast.machine import backends, ceilings, machine
from xfast.stilts.cli import app as stilts_app
from xfast.study.cli import app as study_app
from xfast.terminal import JsonFlag
from xfast.threads import num_threads

if TYPE_CHECKING:
    from xfast.demo import DemoReport

BAD_INPUT = 2
"""Exit code for everything xfast refuses on purpose."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


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
app.add_typer(stilts_app, name="stilts")
app.add_typer(engine_app, name="engine")
app.add_typer(study_app, name="study")
app.add_typer(export_app, name="export")
app.command()(encode)
app.command("convert")(convert)


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
    with num_threads(threads):
        report = demo.run(options, Console(stderr=True))
        if as_json:
            facts = {**machine(), "run": report.run, "notes": report.notes}
            typer.echo(json.dumps({"machine": facts, "results": report.results}, indent=1))
        else:
            _print_report(report, Console())


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="base, large or tiny with random weights, a directory or a Hub id.")
    ] = "base",
    workload: Annotated[
        str,
        typer.Option(
            help="Comma-separated: mixed, sorted, full, BxL (1x32), alpha=0.5, length=128, the sweeps alpha and "
            "length, or an XTREME task such as xnli or tatoeba:sw."
        ),
    ] = "mixed,1x32",
    precision: Annotated[str, typer.Option(help="Comma-separated fp32, bf16, int8, or all.")] = "all",
    peers: Annotated[str, typer.Option(help="all, none, or comma-separated engines or families (openvino).")] = "all",
    threads: Annotated[str | None, typer.Option(help="Threads of every engine; several (1,2) to compare.")] = None,
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 5,
    data: Annotated[
        Path | None, typer.Option(help="Folder with xtreme/ and tokenizer/, for tasks. Default: XFAST_TEST_DATA.")
    ] = None,
    zentorch_python: Annotated[
        str | None,
        typer.Option(help="Python of the environment that has zentorch.", envvar="XFAST_ZENTORCH_PYTHON"),
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Hold every engine to an instruction set: avx2 or avx2_vnni.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, lengths and token ids.", min=0, max=2**32 - 2)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens per second into this PNG file.")] = None,
) -> None:
    """Measure xfast beside other engines, each in its own process, in alternating order; see docs/performance.md."""
    from xfast.benchmarks import bench, report
    from xfast.benchmarks import plot as drawing

    for option, path in (("json", json_file), ("plot", plot)):
        if path is not None:
            files.require_place(option, path)
    if plot is not None:
        figures.require("plot")
    options = bench.Options(model, workload, precision, peers, threads, rounds, data, zentorch_python, isa, seed)
    document = bench.run(options, Console(stderr=True))
    report.show(document, Console(width=None if Console().is_terminal else report.WIDTH))
    if json_file is not None:
        files.save("json", json_file, (json.dumps(document, indent=1) + "\n").encode())
    if plot is not None:
        drawing.save(document, plot)


@app.command()
def info(
    as_json: JsonFlag = False,
    with_ceilings: Annotated[
        bool, typer.Option("--ceilings", help="Also measure the machine's own limits, in about two seconds.")
    ] = False,
) -> None:
    """Show versions, CPU, instruction sets, threads and backends."""
    facts = {**machine(), "backends": backends()}
    if with_ceilings:
        facts["ceilings"] = ceilings()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    rows = dict(facts["versions"])
    if facts["commit"]:
        rows["commit"] = facts["commit"]
    rows["cpu"] = f"{facts['cpu']} ({facts['architecture']}), {facts['cores']} usable cores"
    rows["threads"] = str(facts["threads"])
    rows["instruction set"] = f"{facts['isa']} (available: {', '.join(facts['isas'])})"
    for backend in facts["backends"]:
        state = f"available: {', '.join(backend['precisions'])}" if backend["available"] else backend["reason"]
        rows[f"backend {backend['name']}"] = state
    for kind, rate in facts.get("ceilings", {}).items():
        rows[f"ceiling {kind}"] = f"{rate:.0f} {'GB/s' if kind == 'read' else 'GOP/s'}"
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, Text(text))  # drivers' and libraries' words may look like markup
    Console().print(table, highlight=False)


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
    from xfast.demo import REFERENCE

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
            "-" if row["p95_ms"] is None else f"{row['p95_ms']:.1f}",
            f"{row['padding']:.0%}",
            f"{row['speedup']:.2f}x",
            "-" if row["engine"] == REFERENCE else f"{row['error']:.1e}",
        )
    return table
