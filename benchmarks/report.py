"""The document of ``xfast bench`` for people: tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 100

Row = dict[str, Any]


def show(document: Row, console: Console) -> None:
    """Prints one table per workload, one of the engines, the sweeps' summaries and what was skipped."""
    run, machine, model = document["run"], document["machine"], document["model"]
    threads = "/".join(str(count) for count in run["threads"])
    held = f", everything held to {run['isa']}" if run["isa"] else ""
    console.print(
        f"\n{model['name']}, {threads} threads on {machine['cpu']}{held}; median of {run['rounds']} paired rounds",
        markup=False,
        highlight=False,
    )
    for work in document["workloads"]:
        rows = [row for row in document["results"] if row["workload"] == work["name"]]
        if rows:
            console.print(_workload(work, rows), "")
    console.print(_engines(document), "")
    for line in summary_lines(document["summaries"]):
        console.print(line, markup=False, highlight=False)
    for skipped in document["skipped"]:
        text = f"skipped {skipped['label']}: {skipped['reason']}"
        console.print(text, style="dim", markup=False, highlight=False)


def _workload(work: Row, rows: Sequence[Row]) -> Table:
    source = {"random": "", "profiles": ", lengths as in real text", "text": ", real text"}[work["source"]]
    title = (
        f"[bold]{work['name']}[/bold]: {work['samples']} sequences, {work['tokens']} tokens, "
        f"{work['padding']:.0%} padding{source}"
    )
    headings = ("tokens/s", "±", "samples/s", "p50 ms", "p95", "p99", "GOP/s", "% max", "x same", "x best", "error")
    table = _table(title, ("engine", *headings))
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        low, high = row["tokens_per_s_quartiles"]
        table.add_row(
            row["label"],
            f"{row['tokens_per_s']:.0f}",
            f"{(high - low) / 2 / row['tokens_per_s']:.0%}",
            f"{row['samples_per_s']:.1f}",
            *(_ms(row[name]) for name in ("p50_ms", "p95_ms", "p99_ms")),
            f"{row['gops']:.0f}",
            "" if row["ceiling_percent"] is None else f"{row['ceiling_percent']:.0f}",
            *("" if row[name] is None else f"{row[name]['median']:.2f}" for name in ("same_precision", "best_peer")),
            "" if row["error"] is None else f"{row['error']['max_rel']:.0e}",
            style="bold" if row["engine"].startswith("xfast-") else None,
        )
    return table


def _engines(document: Row) -> Table:
    """Memory, time to the first result, and the worst cosine with the reference over all workloads."""
    table = _table(
        "[bold]engines[/bold]", ("engine", "memory GB", "first result s", "cosine", "least cosine", "versions")
    )
    for engine in document["engines"]:
        rows = [row for row in document["results"] if row["label"] == engine["label"] and row["error"]]
        cosines = [(row["error"]["cosine_mean"], row["error"]["cosine_min"]) for row in rows]
        table.add_row(
            engine["label"],
            f"{engine['resident_gb']:.2f}" if "resident_gb" in engine else "",
            f"{engine['first_result_s']:.1f}",
            *((f"{min(column):.5f}" for column in zip(*cosines, strict=True)) if cosines else ("", "")),
            ", ".join(f"{name} {version}" for name, version in engine["versions"].items()),
        )
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        left = heading in ("engine", "versions")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "versions")
    return table


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def summary_lines(summaries: Row) -> list[str]:
    """One line per engine and sweep."""
    lines = []
    for sweep in ("alpha", "length"):
        flatness = summaries[f"{sweep}_flatness"]
        lines += [
            f"{label}: most over least tokens/s along {sweep}: {value:.2f}"
            for label, value in flatness.items()
            if label.startswith("xfast-")
        ]
    for label, workloads in summaries["thread_scaling"].items():
        lines += [f"{label}: {value['median']:.2f} x one thread on {name}" for name, value in workloads.items()]
    return lines
