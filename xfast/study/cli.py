"""``xfast study``: measure speed and accuracy by language, report them, profile a tokenizer on a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from xfast.errors import InvalidOptionError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Throughput, latency and accuracy by language, with and without intermediate training.",
)


@app.command()
def run(
    output: Annotated[Path, typer.Argument(help="Folder for observations, document and report.", file_okay=False)],
    quick: Annotated[
        bool, typer.Option("--quick", help="Every language once, 12 samples, 3 rounds: under ten minutes on two cores.")
    ] = False,
    sizes: Annotated[str, typer.Option(help="Comma-separated: tiny, base, large, altclip, xl, xxl, 13b.")] = "base",
    engines: Annotated[
        str, typer.Option(help="Comma-separated BACKEND:PRECISION; backend stock is transformers itself.")
    ] = "native:fp32,native:int8",
    tasks: Annotated[
        str, typer.Option(help="Comma-separated XTREME tasks, or one: for every language the first that it has.")
    ] = "one",
    languages: Annotated[str | None, typer.Option(help="Comma-separated two-letter codes. Default: all.")] = None,
    policies: Annotated[str, typer.Option(help="Comma-separated: arrival, sorted, budget.")] = "sorted",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated examples in a batch.")] = "16",
    token_budget: Annotated[int, typer.Option(help="Padded tokens in a batch of policy budget.")] = 2048,
    samples: Annotated[int, typer.Option(help="Examples of a language in a throughput cell.")] = 64,
    responses: Annotated[int, typer.Option(help="Single responses in a latency cell; 0: no latency.")] = 16,
    rounds: Annotated[int, typer.Option(help="Visits to each cell.")] = 5,
    margin: Annotated[float, typer.Option(help="Of equivalence: 0.02 is 2 %.")] = 0.02,
    data: Annotated[
        Path | None, typer.Option(help="Folder in XTREME's layout. Default: the shipped length profiles.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: DATA/tokenizer/xlmr.")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Checkpoint or STILTs run without intermediate training, or TASK=FOLDER.")
    ] = None,
    intermediate: Annotated[
        list[str] | None, typer.Option(help="The same with intermediate training. Default of both: seeded weights.")
    ] = None,
    probes: Annotated[bool, typer.Option(help="Tolerance to coarse arithmetic, early layers.")] = True,
    accuracy: Annotated[bool, typer.Option(help="Official scores, where checkpoints and labels are given.")] = True,
    limit: Annotated[int | None, typer.Option(help="Examples per language in evaluations.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: as many as xfast uses.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of weights, lengths, samples and orders.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
) -> None:
    """Measure; every visit is stored at once, and the report is written at the end."""
    from xfast.study import factors
    from xfast.study.run import start

    settings = factors.Settings(
        sizes=_sizes(sizes, baseline),
        engines=_list(engines),
        tasks=_list(tasks),
        languages=None if languages is None else _list(languages),
        policies=_list(policies),
        batch_sizes=_numbers("batch-sizes", batch_sizes),
        token_budget=token_budget,
        samples=samples,
        responses=responses,
        rounds=rounds,
        margin=margin,
        data=None if data is None else str(data),
        tokenizer=None if tokenizer is None else str(tokenizer),
        baseline=_checkpoints("baseline", baseline),
        intermediate=_checkpoints("intermediate", intermediate),
        probes=probes,
        accuracy=accuracy,
        limit=limit,
        threads=threads,
        device=device,
        seed=seed,
    )
    console = Console(stderr=True)
    document = start(factors.quick(settings) if quick else settings, output, resume=resume, console=console)
    _write(document, output, console)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder, also of a run that was stopped.", file_okay=False)],
) -> None:
    """Write the report of what has been measured so far."""
    from xfast.study import store, summary

    records, _ = store.read(folder / store.NAME)
    _write(dict(summary.document_of(records, folder / store.NAME)), folder, Console(stderr=True))


@app.command()
def profile(
    data: Annotated[Path, typer.Argument(help="Folder with xtreme/ and optionally mlm/.", file_okay=False)],
    out: Annotated[Path, typer.Option(help="JSON file to write.", dir_okay=False)],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: DATA/tokenizer/xlmr.")] = None,
) -> None:
    """Measure token lengths by task and language: quantiles, words, fertility; figures only, no text."""
    from xfast.study.corpus import measure_profiles

    console = Console(stderr=True)
    found = measure_profiles(
        data,
        tokenizer or data / "tokenizer" / "xlmr",
        out,
        lambda items: track(items, description="Tokenising", console=console, disable=not console.is_terminal),
    )
    typer.echo(f"{len(found)} profiles, {len({one.language for one in found})} languages -> {out}")


def _write(document: dict[str, Any], folder: Path, console: Console) -> None:
    from xfast.study.report import write

    paths = write(document, folder)  # type: ignore[arg-type]
    typer.echo(f"report: {paths['index.html']}")
    for note in document["notes"]:
        console.print(note, style="yellow", markup=False, highlight=False)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _list(text))
    except ValueError:
        raise InvalidOptionError(f"{option}: {text!r}; accepted: numbers parted by commas") from None


def _sizes(text: str, baseline: list[str] | None) -> tuple[str, ...]:
    from xfast.study.factors import CHECKPOINT

    if not baseline:
        return _list(text)
    if text != "base":
        raise InvalidOptionError(f"sizes: {text!r} is not accepted with checkpoints, which have a size of their own")
    return (CHECKPOINT,)


def _checkpoints(option: str, given: list[str] | None) -> dict[str, str]:
    """``FOLDER`` and ``TASK=FOLDER`` by task, "" for all tasks."""
    found: dict[str, str] = {}
    for text in given or ():
        task, separator, folder = text.partition("=")
        key, path = (task, folder) if separator and not Path(text).exists() else ("", text)
        if key in found:
            raise InvalidOptionError(f"{option}: two checkpoints for {key or 'all tasks'}")
        if not Path(path).is_dir():
            raise InvalidOptionError(f"{option}: {path} is no folder")
        found[key] = path
    return found
