"""How much of the encoder's own speed ``xfast encode`` keeps when it reads, tokenises and writes as well.

    python -P -m xfast.benchmarks.encode --data DATA --sentences 20000 --precision int8 --json encode.json

One process, one model in the sizes of XLM-R base with random weights, sentences of Tatoeba in all its languages. Each
round measures, in an order that alternates: the encoder alone on batches that were tokenised before ("encoder"); the
job with tokenising in line and beside the encoder. Loading the model is part of none. The figure is the median over
rounds of encoder / job.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from xfast.benchmarks.models import random_model
from xfast.encode import source, store
from xfast.encode.model import head_of
from xfast.encode.rows import Shard
from xfast.encode.settings import Execution, Settings
from xfast.encode.tokens import Batch, batches
from xfast.encode.worker import Task, Worker
from xfast.errors import DataFileError
from xfast.machine import machine
from xfast.study.corpus import load_tokenizer
from xfast.threads import num_threads

ENCODER, IN_LINE, BESIDE = "encoder", "in line", "beside"


def prepare(data: Path, sentences: int, size: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint with XLM-R's tokenizer, and ``sentences`` lines of Tatoeba, every language in turn, as JSONL.

    Raises:
        DataFileError: fewer sentences are there.
    """
    random_model(size).save_pretrained(folder / "model")
    load_tokenizer(data / "tokenizer" / "xlmr").save_pretrained(folder / "model")
    files = [path.read_text(encoding="utf-8").splitlines() for path in sorted((data / "xtreme" / "tatoeba").iterdir())]
    turns = range(max(map(len, files), default=0))
    lines = [file[turn] for turn in turns for file in files if turn < len(file)][:sentences]
    if len(lines) < sentences:
        raise DataFileError(f"{data}: {sentences} sentences of Tatoeba were asked for, {len(lines)} are there")
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": line}) + "\n" for i, line in enumerate(lines)), "utf-8")
    return folder / "model", path


class Arms:
    """The three measurements on one accelerated model."""

    def __init__(self, settings: Settings, execution: Execution, path: Path, folder: Path) -> None:
        files = source.find(str(path), folder / "out")
        self.shards, schema, _ = source.plan(files, settings)
        self.folder = folder / "out"
        self.worker = Worker(Task(settings, execution, head_of(settings)[0], str(self.folder), "", schema))
        self.batches = [batch for shard in self.shards for batch in self._tokenised(shard)]
        self.tokens = sum(int(batch.lengths.sum()) for batch in self.batches)

    def _tokenised(self, shard: Shard) -> list[Batch]:
        encoder, task = self.worker.encoder, self.worker.task
        rows = source.read(shard, task.schema, task.settings)
        size, found = task.execution.window, []
        for start in range(0, len(rows.texts), size):
            cut = slice(start, start + size)
            window = encoder.tokenizer.window(start, rows.texts[cut], None, rows.where[cut])
            found += batches(window, encoder.budget, encoder.pad_id)
        return found

    def encoder(self) -> None:
        """The forward passes alone."""
        for batch in self.batches:
            self.worker.encoder(batch)

    def job(self, overlap: bool) -> None:
        """Reading, tokenising, encoding, pooling, writing."""
        self.worker.overlap = overlap
        with store.opened(self.folder):
            self.worker.run(self.shards, lambda rows, tokens: None)
        for shard in self.shards:
            store.shard_path(self.folder, shard.number).unlink()


def measure(arms: Arms, rounds: int) -> dict[str, Any]:
    """Seconds by arm and round, and the medians of encoder / job."""
    calls: dict[str, Callable[[], None]] = {
        ENCODER: arms.encoder,
        IN_LINE: lambda: arms.job(False),
        BESIDE: lambda: arms.job(True),
    }
    arms.worker.encoder(arms.batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    shares = {
        name: statistics.median(alone / whole for alone, whole in zip(seconds[ENCODER], seconds[name], strict=True))
        for name in (IN_LINE, BESIDE)
    }
    return {"seconds": seconds, "share_of_the_encoder": shares}


def main(
    data: Annotated[Path, typer.Option(help="Folder with xtreme/tatoeba and tokenizer/xlmr.")],
    sentences: Annotated[int, typer.Option(help="Of all languages in turn.")] = 20_000,
    model: Annotated[str, typer.Option(help="tiny, base or large, with random weights.")] = "base",
    precision: Annotated[str, typer.Option(help="fp32, bf16, int8 or int4.")] = "int8",
    threads: Annotated[int | None, typer.Option(help="Of the encoder.")] = None,
    rounds: Annotated[int, typer.Option(help="Of all three arms.")] = 3,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch.")] = None,
    window: Annotated[int, typer.Option(help="Rows tokenised together.")] = Execution.window,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measure end to end against the encoder alone."""
    with tempfile.TemporaryDirectory() as folder, num_threads(threads):
        checkpoint, path = prepare(data, sentences, model, Path(folder))
        settings = Settings(model=str(checkpoint), precision=precision, device="cpu")
        arms = Arms(settings, Execution(batch_tokens=batch_tokens, window=window), path, Path(folder))
        found = measure(arms, rounds)
        document = {**machine(), "model": model, "precision": precision, "sentences": sentences, **found}
    for name, seconds in found["seconds"].items():
        median = statistics.median(seconds)
        typer.echo(f"{name}: {median:.2f} s, {sentences / median:.0f} rows/s, {arms.tokens / median:.0f} tokens/s")
    for name, share in found["share_of_the_encoder"].items():
        typer.echo(f"{name}: {share:.1%} of the encoder's own speed")
    if json_file is not None:
        json_file.write_text(json.dumps({**document, "tokens": arms.tokens}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
