"""Large models from packed artifacts: memory and time of converting and loading, and the speed of what was loaded.

    python -P -m xfast.benchmarks.packed FOLDER --size 13b --precision int8 --json 13b.json

FOLDER gets an artifact for each precision, made from seeded random bf16 weights that are drawn a tensor at a time.
Every step has a process of its own. Speed: all precisions in one process, in turn, the machine's ceiling timed in every
round; figures are medians over rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xfast
from xfast.benchmarks.metrics import gflop_per_token
from xfast.benchmarks.models import SIZES, SeededTensors, config_of
from xfast.errors import require_one_of
from xfast.machine import ceiling, machine, peak_memory
from xfast.terminal import listed
from xfast.threads import get_num_threads

SHAPES = ((1, 8), (1, 32), (8, 64))
"""(sequences, tokens in each)."""

_CEILING_SECONDS = 0.3


class _Timed(SeededTensors):
    """Counts the seconds that are spent on drawing values, which a real checkpoint has."""

    drawing_s = 0.0

    def read(self, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """See :class:`xfast.checkpoint.Tensors`."""
        started = time.perf_counter()
        values = super().read(name, first, rows)
        self.drawing_s += time.perf_counter() - started
        return values


def convert(size: str, folder: str, precision: str) -> dict[str, float]:
    """Seconds (without those of drawing the values), peak memory and bytes of converting; a child process."""
    from xfast.convert import convert as converted

    shutil.rmtree(folder, ignore_errors=True)
    source = _Timed(size)
    started = time.perf_counter()
    manifest = converted(source, Path(folder), precision)
    seconds = time.perf_counter() - started - source.drawing_s
    packed = sum(record.bytes for record in manifest.files.values())
    drawn = {"drawing_seconds": source.drawing_s, "original_bytes": source.bytes}
    return {"seconds": seconds, "peak_bytes": peak_memory(), "bytes": packed, **drawn}


_held: list[Any] = []


def hold(folder: str) -> None:
    """Loads and runs in a process that stays, so that a second one has something to share."""
    model = xfast.load(Path(folder))
    with torch.no_grad():
        model(**_batch(1, 8))
    _held.append(model)


def load(folder: str) -> dict[str, float]:
    """Seconds to a ready model and to its first result, and the memory that this process shares with no other."""
    batch = _batch(1, 8)
    torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1))  # torch's own first call is not the loader's
    import transformers.models.xlm_roberta.modeling_xlm_roberta
    import transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl  # noqa: F401

    before, started = _private(), time.perf_counter()
    model = xfast.load(Path(folder))
    ready = time.perf_counter() - started
    with torch.no_grad():
        model(**batch)
    first = time.perf_counter() - started
    return {"seconds": ready, "to_the_first_result": first, "private_bytes": _private() - before}


def _private() -> int:
    """Bytes of this process that no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def _batch(sequences: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 250000, (sequences, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def speed(folders: dict[str, str], size: str, rounds: int) -> dict[str, Any]:
    """Seconds by precision and shape in every round, and the int8 ceiling beside them, in operations a second."""
    models = {precision: xfast.load(Path(folder)) for precision, folder in folders.items()}
    seconds: dict[str, dict[str, list[float]]] = {p: {} for p in models}
    ceilings: list[float] = []
    with torch.no_grad():
        for turn in range(rounds + 1):  # the first touches every page
            for rows, length in SHAPES:
                batch = _batch(rows, length)
                order = list(models) if turn % 2 == 0 else list(models)[::-1]
                for precision in order:
                    started = time.perf_counter()
                    models[precision](**batch)
                    took = time.perf_counter() - started
                    if turn > 0:
                        seconds[precision].setdefault(f"{rows}x{length}", []).append(took)
            if turn > 0:
                ceilings.append(ceiling("int8", seconds=_CEILING_SECONDS) * 1e9)
    return {"seconds": seconds, "ceiling": ceilings, "operations_per_token": 1e9 * gflop_per_token(config_of(size))}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """tokens/s, share of the ceiling and the ratio to the first precision, by precision and shape; paired medians."""
    names = list(found["seconds"])
    result: dict[str, Any] = {}
    for shape in found["seconds"][names[0]]:
        tokens = int(shape.split("x")[0]) * int(shape.split("x")[1])
        reference = found["seconds"][names[0]][shape]
        for name in names:
            took = found["seconds"][name][shape]
            rates = [tokens / t for t in took]
            pairs = zip(rates, found["ceiling"], strict=True)
            result.setdefault(name, {})[shape] = {
                "tokens_per_s": statistics.median(rates),
                "share_of_ceiling": statistics.median(r * found["operations_per_token"] / c for r, c in pairs),
                f"speed_over_{names[0]}": statistics.median(a / b for a, b in zip(reference, took, strict=True)),
            }
    return result


def loaded_beside_another(folder: str) -> dict[str, float]:
    """``load`` in a process of its own while another one holds the same model."""
    with multiprocessing.get_context("spawn").Pool(1) as first:
        first.apply(hold, (folder,))
        return _in_a_child(load, folder)


def _in_a_child(step: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(step, arguments)


def main(
    folder: Annotated[Path, typer.Argument(help="For the artifacts.")],
    size: Annotated[str, typer.Option(help=", ".join(SIZES))] = "large",
    precision: Annotated[
        str, typer.Option(help="Comma-separated; the first is what others are compared with.")
    ] = "int8",
    rounds: Annotated[int, typer.Option(help="Of timing.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Convert, load and run a large model."""
    require_one_of("size", size, SIZES)
    precisions = listed(precision)
    document: dict[str, Any] = {**machine(), "threads": get_num_threads(), "size": size}
    artifacts = {name: str(folder / f"{size}-{name}") for name in precisions}
    for name, target in artifacts.items():
        document.setdefault("convert", {})[name] = _in_a_child(convert, size, target, name)
        typer.echo(f"{name}: converted {json.dumps(document['convert'][name])}")
        document.setdefault("load", {})[name] = loaded_beside_another(target)
        typer.echo(f"{name}: loaded {json.dumps(document['load'][name])}")
    document["speed"] = _in_a_child(speed, artifacts, size, rounds)
    document["summary"] = summary(document["speed"])
    typer.echo(json.dumps(document["summary"], indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
