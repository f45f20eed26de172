"""``xfast encode``: the options, a progress bar, a line of summary."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from xfast.encode.settings import Execution, Settings, require
from xfast.terminal import JsonFlag

if TYPE_CHECKING:
    from xfast.encode.job import Summary

Input = Annotated[str, typer.Argument(metavar="INPUT", help="Parquet or JSONL: a file, a folder or a glob.")]
Output = Annotated[Path, typer.Argument(help="Folder of Parquet shards; a job that was stopped is continued.")]
Model = Annotated[str, typer.Option(help="Model folder or Hub id.")]
TokenizerName = Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the model's.")]
Content = Annotated[
    str, typer.Option(help="embeddings, predictions or auto: by the architecture that the checkpoint names.")
]
TextColumn = Annotated[str, typer.Option(help="Column of strings to encode.")]
PairColumn = Annotated[str | None, typer.Option(help="Second column, read with the first as one input.")]
Keep = Annotated[
    str | None, typer.Option(help="Comma-separated columns to copy; '' for none. Default: all but the encoded ones.")
]
Pooling = Annotated[str, typer.Option(help="mean, cls, none (a vector for every token) or auto.")]
Normalize = Annotated[
    bool, typer.Option("--normalize", help="Embeddings of length 1; a reranker's score between 0 and 1.")
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of an input. Default: as many as the model takes.")]
Prefix = Annotated[
    str | None,
    typer.Option(help="Put before every text: 'query: ' for e5. Default: the model's own, if it has one."),
]
Layers = Annotated[int | None, typer.Option(help="Run the first LAYERS layers only.")]
Dtype = Annotated[str, typer.Option(help="Of embeddings: float32 or float16.")]
Backend = Annotated[str, typer.Option(help="auto, native, triton or tensorrt.")]
Precision = Annotated[str, typer.Option(help="model, fp32, bf16, int8, int4, fp16 or fp8.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OnError = Annotated[str, typer.Option(help="At a bad row: fail, or skip it and list it in the manifest.")]
ShardRows = Annotated[int, typer.Option(help="Input rows of an output file, at most.")]
Engine = Annotated[str, typer.Option(help="local or ray.")]
Workers = Annotated[int, typer.Option(help="Ray: processes, each with a model.")]
Address = Annotated[str | None, typer.Option(help="Ray: of the cluster. Default: RAY_ADDRESS, else this machine.")]
Threads = Annotated[int | None, typer.Option(help="Of each encoder. Default: PyTorch's.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens of a batch. Default: 2048, on GPUs 16384.")]
WindowRows = Annotated[int, typer.Option(help="Rows tokenised and sorted by length together.")]
Overlap = Annotated[
    bool | None,
    typer.Option("--overlap/--no-overlap", help="Tokenise beside the encoder. Default: where a core is left for it."),
]


def encode(
    source: Input,
    output: Output,
    model: Model,
    tokenizer: TokenizerName = None,
    content: Content = Settings.content,
    text_column: TextColumn = Settings.text_column,
    pair_column: PairColumn = None,
    keep: Keep = None,
    pooling: Pooling = Settings.pooling,
    normalize: Normalize = False,
    max_length: MaxLength = None,
    prefix: Prefix = None,
    dtype: Dtype = Settings.dtype,
    backend: Backend = Settings.backend,
    precision: Precision = Settings.precision,
    layers: Layers = None,
    device: Device = Settings.device,
    on_error: OnError = Settings.on_error,
    shard_rows: ShardRows = Settings.shard_rows,
    engine: Engine = Execution.engine,
    batch_tokens: BatchTokens = None,
    window: WindowRows = Execution.window,
    threads: Threads = None,
    overlap: Overlap = None,
    workers: Workers = Execution.workers,
    address: Address = None,
    as_json: JsonFlag = False,
) -> None:
    """Embed or label every row of Parquet or JSONL files; the same command continues a job. See docs/encode.md."""
    require("pyarrow", "pyarrow")
    settings = Settings(
        model=model,
        tokenizer=tokenizer,
        content=content,
        text_column=text_column,
        pair_column=pair_column,
        keep=None if keep is None else tuple(part.strip() for part in keep.split(",") if part.strip()),
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        prefix=prefix,
        dtype=dtype,
        backend=backend,
        precision=precision,
        layers=layers,
        device=device,
        on_error=on_error,
        shard_rows=shard_rows,
    )
    execution = Execution(engine, batch_tokens, window, threads, overlap, workers, address)
    _report(*_run(source, output, settings, execution), as_json)


def _run(source: str, output: Path, settings: Settings, execution: Execution) -> tuple[Summary, Bar]:
    from xfast.encode import job
    from xfast.progress import counting_bar

    with counting_bar(Console(stderr=True)) as progress:
        shown = Bar(progress)
        return job.encode(source, output, settings, execution, shown), shown


class Bar:
    """Rows and their rates on a terminal; the time left counts what this run has encoded."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task: Any = None
        self.rows = self.tokens = 0
        self.started = time.perf_counter()

    def begin(self, rows: int, done: int) -> None:
        """As :class:`xfast.encode.job.Watcher` has it."""
        self.task = self.progress.add_task("rows", total=rows, completed=done, note="")
        self.started = time.perf_counter()

    def advance(self, rows: int, tokens: int) -> None:
        """As :class:`xfast.encode.job.Watcher` has it."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.progress.update(self.task, advance=rows, note=self.rates())

    def rates(self) -> str:
        """Rows and tokens a second since the job began or was continued."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return f"{self.rows / seconds:,.0f} rows/s, {self.tokens / seconds:,.0f} tokens/s"


def _report(summary: Summary, shown: Bar, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(summary), "seconds": time.perf_counter() - shown.started}, indent=1))
        return
    totals = summary.totals
    parts = [f"{totals['rows']} rows in {totals['shards']} shards ({summary.encoded} of them new)"]
    parts += [f"{totals[name]} {name}" for name in ("truncated", "skipped") if totals[name]]
    if shown.rows:
        parts.append(shown.rates())
    typer.echo(f"{summary.output}: {', '.join(parts)}")
    for name, reason in summary.left_out:
        typer.echo(f"left out: {name}: {reason}", err=True)
    for reason, count in summary.fallbacks.items():
        typer.echo(f"{count} batches ran the original code: {reason}", err=True)
