"""``xfast study``: measure speed and accuracy by language, report them, profile a tokenizer on a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from xfast import figures
from xfast.errors import InvalidOptionError
from xfast.terminal import listed

app = typer.Typer(
    no_args_is_help=True,
    help="Throughput, latency and accuracy by language, with and without intermediate training.",
)


Output = Annotated[Path, typer.Argument(help="Folder for observations, document and report.", file_okay=False)]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Every language once, 12 samples, 3 rounds: 41 languages in under ten minutes on two cores."
    ),
]
Sizes = Annotated[str, typer.Option(help="Comma-separated: tiny, base, large, altclip, xl, xxl, 13b.")]
Engines = Annotated[str, typer.Option(help="Comma-separated BACKEND:PRECISION; backend stock is transformers itself.")]
Tasks = Annotated[
    str, typer.Option(help="Comma-separated XTREME tasks, or one: for every language the first that it has.")
]
Languages = Annotated[str | None, typer.Option(help="Comma-separated two-letter codes. Default: all.")]
Policies = Annotated[str, typer.Option(help="Comma-separated: arrival, sorted, budget.")]
BatchSizes = Annotated[str, typer.Option(help="Comma-separated examples in a batch.")]
TokenBudget = Annotated[int, typer.Option(help="Padded tokens in a batch of policy budget.")]
Samples = Annotated[int, typer.Option(help="Examples of a language in a throughput cell.")]
Responses = Annotated[int, typer.Option(help="Texts of a latency cell, one at a time; p95 takes 20, p99 100; 0: none.")]
Rounds = Annotated[int, typer.Option(help="Visits to each cell.")]
Margin = Annotated[float, typer.Option(help="Of equivalence: 0.02 is 2 %.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder that holds XTREME's download as xtreme/. Default: the shipped length profiles."),
]
Profiles = Annotated[
    Path | None, typer.Option(help="Length profiles in place of the shipped ones, from `xfast study profile`.")
]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option(help="Tokenizer folder. Default: the baseline checkpoint's own, else DATA/tokenizer/xlmr."),
]
Baseline = Annotated[
    list[str] | None, typer.Option(help="Checkpoint or STILTs run without intermediate training, or TASK=FOLDER.")
]
Intermediate = Annotated[
    list[str] | None, typer.Option(help="The same with intermediate training. Default of both: seeded weights.")
]
Probes = Annotated[bool, typer.Option(help="Tolerance to coarse arithmetic, early layers.")]
Accuracy = Annotated[bool, typer.Option(help="Official scores, where checkpoints and labels are given.")]
Limit = Annotated[int | None, typer.Option(help="Examples per language in evaluations.")]
Threads = Annotated[int | None, typer.Option(help="Default: as many as xfast uses.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Of weights, lengths, samples and orders.", min=0)]
KeepArtifacts = Annotated[
    bool, typer.Option("--keep-artifacts", help="Leave packed artifacts of large seeded sizes in OUTPUT/artifacts.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]


@app.command()
def run(
    context: typer.Context,
    output: Output,
    quick: Quick = False,
    sizes: Sizes = "base",
    engines: Engines = "native:fp32,native:int8",
    tasks: Tasks = "one",
    languages: Languages = None,
    policies: Policies = "sorted",
    batch_sizes: BatchSizes = "16",
    token_budget: TokenBudget = 2048,
    samples: Samples = 64,
    responses: Responses = 20,
    rounds: Rounds = 5,
    margin: Margin = 0.02,
    data: Data = None,
    profiles: Profiles = None,
    tokenizer: TokenizerFolder = None,
    baseline: Baseline = None,
    intermediate: Intermediate = None,
    probes: Probes = True,
    accuracy: Accuracy = True,
    limit: Limit = None,
    threads: Threads = None,
    device: Device = "cpu",
    seed: Seed = 0,
    keep_artifacts: KeepArtifacts = False,
    resume: Resume = False,
) -> None:
    """Measure; every visit is stored at once, and the report is written at the end."""
    figures.require("study", "scipy")
    from xfast.study.factors import Settings
    from xfast.study.run import start

    settings = Settings(
        sizes=_sizes(context, sizes, baseline),
        engines=listed(engines),
        tasks=listed(tasks),
        languages=None if languages is None else listed(languages),
        policies=listed(policies),
        batch_sizes=_numbers("batch-sizes", batch_sizes),
        token_budget=token_budget,
        samples=samples,
        responses=responses,
        rounds=rounds,
        margin=margin,
        data=None if data is None else str(data),
        profiles=None if profiles is None else str(profiles),
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
    settings = _quickened(context, settings) if quick else settings
    _write(start(settings, output, resume=resume, console=Console(stderr=True), keep_artifacts=keep_artifacts), output)


def _quickened(context: typer.Context, settings: Any) -> Any:
    """Raises InvalidOptionError for an option that --quick sets and the user gave."""
    from xfast.study.factors import QUICK
    from xfast.study.factors import quick as quickened

    for name in QUICK:
        if _given(context, name):
            option = name.replace("_", "-")
            raise InvalidOptionError(f"quick: it sets --{option} itself; leave out --quick or --{option}")
    return quickened(settings)


def _given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder, also of a run that was stopped.", file_okay=False)],
) -> None:
    """Write the report of what has been measured so far."""
    figures.require("study", "scipy")
    from xfast.study import store, summary

    records, _ = store.read(folder / store.NAME)
    _write(dict(summary.document_of(records, folder / store.NAME)), folder)


@app.command()
def profile(
    data: Annotated[Path, typer.Argument(help="Folder with xtreme/ and optionally mlm/.", file_okay=False)],
    output: Annotated[Path, typer.Option(help="JSON file to write.", dir_okay=False)],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: DATA/tokenizer/xlmr.")] = None,
) -> None:
    """Measure token lengths by task and language: quantiles, words, fertility; figures only, no text."""
    from xfast.study.corpus import measure_profiles

    console = Console(stderr=True)
    found = measure_profiles(
        data,
        tokenizer or data / "tokenizer" / "xlmr",
        output,
        lambda items: track(items, description="Tokenising", console=console, disable=not console.is_terminal),
    )
    typer.echo(f"{len(found)} profiles, {len({one.language for one in found})} languages -> {output}")


def _write(document: dict[str, Any], folder: Path) -> None:
    from xfast.study.report import write

    paths = write(document, folder)  # type: ignore[arg-type]
    typer.echo(f"report: {paths['index.html']}")
    console = Console(stderr=True)
    for note in document["notes"]:
        console.print(note, style="yellow", markup=False, highlight=False)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in listed(text))
    except ValueError:
        raise InvalidOptionError(f"{option}: {text!r}; accepted: numbers parted by commas") from None


def _sizes(context: typer.Context, text: str, baseline: list[str] | None) -> tuple[str, ...]:
    from xfast.study.factors import CHECKPOINT

    if not baseline:
        return listed(text)
    if _given(context, "sizes"):
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
