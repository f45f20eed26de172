"""``xfast engine``: TensorRT engines built, read and judged; with ``tensorrt_rtx`` building needs no GPU."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from xfast.architecture import EncoderWeights, describe, find_encoders, supported_families
from xfast.backends import tensorrt as backend
from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_check as judge
from xfast.backends import tensorrt_network as networks
from xfast.backends import tensorrt_runtime as runtimes
from xfast.backends import tensorrt_store as stores
from xfast.checkpoint import loading, require_whole
from xfast.errors import (
    BackendUnavailableError,
    DataFileError,
    InvalidOptionError,
    UnsupportedModelError,
    XfastError,
    require_one_of,
)
from xfast.pages import printable
from xfast.tensor_files import is_folder
from xfast.terminal import JsonFlag

app = typer.Typer(no_args_is_help=True, help="TensorRT engines: build, inspect, verify, prune. Not yet run on a GPU.")

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a transformers model.")]
Folder = Annotated[Path, typer.Argument(help="Folder of engines; XFAST_CACHE=FOLDER makes accelerate use it.")]
PrecisionOption = Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or fp8 (8.9 or later).")]
LayersOption = Annotated[int | None, typer.Option(help="Run the first LAYERS layers only.")]


def load_weights(model: str, layers: int | None = None) -> EncoderWeights:
    """The encoder's weights of a checkpoint, on the CPU; ``layers``: how many will be asked for, checked first.

    Raises:
        DataFileError: there is no such checkpoint, or it lacks weights.
        InvalidOptionError: so many layers it has not.
        UnsupportedModelError: it is none of the supported families.
    """
    with loading(model):
        config = transformers.AutoConfig.from_pretrained(model)
    there_are = getattr(getattr(config, "text_config", config), "num_hidden_layers", None)
    if layers is not None and there_are is not None and not 0 <= layers <= there_are:
        raise InvalidOptionError(f"layers: {layers} is not accepted; accepted: 0 to {there_are}")
    with loading(model):
        if config.model_type == "altclip_text_model":  # in no table of the Auto classes
            loaded, facts = transformers.AltCLIPTextModel.from_pretrained(model, output_loading_info=True)
        elif config.model_type == "altclip":  # no pooler to leave out
            loaded, facts = transformers.AltCLIPModel.from_pretrained(model, output_loading_info=True)
        else:
            options = {"add_pooling_layer": False, "output_loading_info": True}
            loaded, facts = transformers.AutoModel.from_pretrained(model, **options)
    found = find_encoders(loaded)
    if not found:
        raise UnsupportedModelError(f"model: {config.model_type} is not supported; supported: {supported_families()}")
    _, module, family = found[0]
    weights = describe(module, family)  # first: a checkpoint of another class lacks weights, too, and this names it
    require_whole(model, facts)
    return weights


def _targets(runtime: runtimes.Runtime, target: str | None) -> tuple[str | None, str]:
    """What TensorRT is told to build for, and the name that ``accelerate`` finds the engine by."""
    if target not in (None, "CURRENT"):
        (name,) = runtime.check_target(target)
        return name, name
    if not torch.cuda.is_available():
        known = ", ".join(runtime.targets()[:-1]) or "none: this runtime builds on the GPU only"
        raise InvalidOptionError(f"target: there is no GPU here, so one must be named; accepted: {known}")
    return "CURRENT" if "CURRENT" in runtime.targets() else None, torch.cuda.get_device_name()


def build_engine(
    model: str,
    folder: Path,
    precision: str = "bf16",
    layers: int | None = None,
    target: str | None = None,
    progress: builder.Progress | None = None,
) -> dict[str, Any]:
    """Build an engine and put it into a store. What can be checked is checked before the weights are read.

    Args:
        model: folder or Hub id.
        folder: of the store.
        precision: one of ``tensorrt_network.PRECISIONS``.
        layers: None for all.
        target: a compute capability such as "SM89" (``tensorrt_rtx`` only); None or "CURRENT": the GPU that is there.
        progress: called by TensorRT's builder.

    Returns:
        ``path``, ``bytes``, ``seconds``, ``target``, ``runtime``.

    Raises:
        XfastError: no TensorRT, no such model, not supported, not built, or the folder cannot be written.
    """
    runtime = runtimes.find()
    require_one_of("precision", precision, networks.PRECISIONS)
    chosen, name = _targets(runtime, target)
    store = stores.Store(folder)
    if (refusal := store.refusal()) is not None:
        raise DataFileError(f"{folder}: engines could not be written: {refusal}")
    weights = load_weights(model, layers)
    profiles = backend.default_profiles(weights.spec, precision, runtime)
    started = time.perf_counter()
    blob = builder.build(weights, precision, layers, profiles, chosen, progress, runtime=runtime)
    seconds = time.perf_counter() - started
    count = weights.spec.num_layers if layers is None else layers
    key = backend.key_of(stores.digest(weights), weights.spec, precision, count, runtime, name)
    path = store.save(key, blob)
    if path is None:
        raise DataFileError(f"{folder}: the engine could not be written: {store.notes[-1]}")
    return {
        "path": str(path),
        "bytes": len(blob),
        "seconds": round(seconds, 2),
        "target": name,
        "runtime": f"{runtime.name} {runtime.version_text}",
    }


def _console() -> Console:
    return Console(stderr=True)


def _say(text: str, width: int) -> None:
    """On stdout, as it is: names of folders may look like markup."""
    Console(width=width).print(printable(text), markup=False, highlight=False, soft_wrap=True)


@app.command()
def build(
    model: Model,
    folder: Folder,
    precision: PrecisionOption = "bf16",
    layers: LayersOption = None,
    target: Annotated[
        str | None, typer.Option(help="Compute capability, SM89 for example; default: the GPU that is there.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Build an engine into a folder, for the GPU that is there or a named compute capability."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = _console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        phases: dict[str, Any] = {}

        def report(phase: str, step: int, total: int) -> bool:
            if phase not in phases:
                phases[phase] = bar.add_task(phase, total=total)
            bar.update(phases[phase], completed=step, total=total)
            return True

        made = build_engine(model, folder, precision, layers, target, report)
    if as_json:
        typer.echo(json.dumps(made, indent=1))
        return
    size = made["bytes"] / 2**20
    _say(f"{made['path']}: {size:.1f} MiB for {made['target']} by {made['runtime']} in {made['seconds']:.1f} s", 200)


@app.command()
def inspect(folder: Folder, as_json: JsonFlag = False) -> None:
    """List the engines of a folder and what can be read of them here; their layers need a GPU."""
    if not is_folder(folder):
        raise DataFileError(f"{folder}: no such folder")
    store = stores.Store(folder)
    rows = [_entry(store, entry) for entry in store.entries()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("engine", "MiB", "family", "layers", "precision", "for", "by", "state"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        names = ("family", "layers", "precision", "target", "runtime", "state")
        cells = (row["file"], f"{row['bytes'] / 2**20:.1f}", *(str(row.get(name, "-")) for name in names))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(width=140).print(table, highlight=False)


def _entry(store: stores.Store, entry: stores.Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"file": entry.path.name, "bytes": entry.bytes}
    key = entry.key
    if key is None:
        return {**row, "state": f"unusable: {entry.reason}"}
    row |= {
        "family": key.spec.family,
        "layers": key.layers,
        "precision": key.precision,
        "target": key.target,
        "runtime": f"{key.runtime} {key.version}",
        "profiles": [profile.to_json() for profile in key.profiles],
    }
    blob = store.load(key, use=False)
    if blob is None:
        return {**row, "state": f"damaged: {store.notes[-1]}"}
    try:
        facts = builder.inspect(runtimes.find(key.runtime), blob)
    except XfastError as error:  # not installed, or another release's
        return {**row, "state": f"intact; not read: {error}"}
    state = "intact, read by this GPU" if facts["engine"] else f"intact; layers not read: {facts['reason']}"
    return {**row, "state": state, "header": facts["header"], "engine": facts["engine"]}


@app.command()
def verify(
    model: Model,
    folder: Folder,
    precision: PrecisionOption = "bf16",
    layers: LayersOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare the folder's engine for this model and GPU with PyTorch: finite, within its precision, same labels.

    Exit status 2 where the engine is refused.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("verify runs the engine, and there is no GPU here")
    require_one_of("precision", precision, networks.PRECISIONS)
    weights = load_weights(model, layers)
    for module in weights.modules.values():
        module.to("cuda")
    engine = backend.TensorRTEngine(weights, precision, stores.Store(folder))
    count = weights.spec.num_layers if layers is None else layers
    try:
        report: judge.Report = engine.verify(count)
    except judge.EngineRejectedError as rejected:
        report = rejected.report
    if as_json:
        error = report.error if math.isfinite(report.error) else None  # for which JSON has no word
        facts = {"error": error, "bound": report.bound, "agreement": report.agreement, "finite": report.finite}
        typer.echo(json.dumps({**facts, "accepted": report.accepted}, indent=1))
    else:
        _say(f"{'accepted' if report.accepted else 'refused'}: {report}", 140)
    if not report.accepted:
        raise typer.Exit(2)


@app.command()
def prune(
    folder: Annotated[Path | None, typer.Argument(help="Folder of engines. Default: the cache.")] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            help=f"Bytes that may stay. Default: {stores.SIZE_VARIABLE}, else {stores.DEFAULT_BYTES >> 30} GiB."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove the least recently used engines until the others are small enough together."""
    limit = stores.size_limit() if max_bytes is None else max_bytes
    store = stores.Store(folder)
    if folder is not None and not is_folder(store.folder):  # a cache that is not there is an empty one
        raise DataFileError(f"{store.folder}: no such folder")
    removed = store.prune(limit) if is_folder(store.folder) else []
    if store.reasons["unwritable"]:
        raise DataFileError(f"{store.folder}: {store.notes[-1]}")
    if as_json:
        typer.echo(json.dumps({"folder": str(store.folder), "max_bytes": limit, "removed": removed}, indent=1))
        return
    for name in removed:
        _say(f"removed {name}", 200)
    _say(f"{store.folder}: {len(removed)} engines removed, {len(store.entries())} left", 200)
