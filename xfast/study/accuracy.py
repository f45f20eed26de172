"""Official scores of both arms on labelled data, by engine, and by layer where retrieval may stop early.

Everything is measured by :mod:`xfast.stilts.evaluation`; here it is asked the study's questions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from xfast.errors import DataFileError, XfastError
from xfast.stilts import scoring
from xfast.stilts.data import Source
from xfast.stilts.evaluation import Evaluation, evaluate
from xfast.stilts.task import BITEXT, SPAN
from xfast.stilts.tasks import get
from xfast.study.arms import folder_of
from xfast.study.document import BASELINE, INTERMEDIATE
from xfast.study.factors import CHECKPOINT, STOCK, EngineName, Settings
from xfast.study.store import Record

LAYERS = 8
"""At so many layers, evenly spaced and the last one among them, retrieval is scored."""


def jobs(settings: Settings, engine: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(name, arm, task) of each evaluation of an engine: tasks that have an official score."""
    if not settings.accuracy or not settings.baseline or settings.data is None:
        return []
    tasks = [task for task in dict.fromkeys(task for task, _ in pairs) if get(task).metric in scoring.METRICS]
    names = (BASELINE, INTERMEDIATE) if settings.intermediate else (BASELINE,)
    return [(f"accuracy {engine} {arm} {task}", arm, task) for task in tasks for arm in names]


def measure(
    settings: Settings, engine: str, arm: str, task: str, languages: Sequence[str], layers: int
) -> Iterator[Record]:
    """Yields scores by language, and for question answering the length of the answers.

    Args:
        settings: with checkpoints and data.
        engine: what computes.
        arm, task, languages: whose scores.
        layers: of the encoder.
    """
    given = settings.intermediate if arm == INTERMEDIATE else settings.baseline
    try:
        model = folder_of(given, task)
    except XfastError as error:
        yield {"kind": "skipped", "what": f"accuracy of {arm} on {task}", "why": str(error)}
        return
    kind = get(task).type
    if kind != BITEXT and model.parent.name != "tasks" and not _has_head(model):
        why = f"{model} has no head that was trained for it"
        yield {"kind": "skipped", "what": f"accuracy of {arm} on {task}", "why": why}
        return
    spaced = sorted({max(1, round(layers * step / LAYERS)) for step in range(1, LAYERS + 1)})
    steps: list[int | None] = [*spaced] if kind == BITEXT else [None]
    for layer in steps:
        with tempfile.TemporaryDirectory(prefix="xfast-study-") as folder:
            found = _evaluate(settings, engine, model, task, languages, layer, Path(folder))
            if isinstance(found, str):
                yield {"kind": "skipped", "what": f"accuracy of {arm} on {task} ({engine})", "why": found}
                return
            metric = "+".join(scoring.metric_of(task).main)
            for language, value in found["languages"].items():
                yield {
                    "kind": "accuracy",
                    "arm": arm,
                    "size": CHECKPOINT,
                    "engine": engine,
                    "task": task,
                    "language": language,
                    "layers": layer,
                    "metric": metric,
                    "value": float(value),
                    "examples": found["examples"][language],
                }
            if kind == SPAN:
                yield from _answers(Path(folder), arm, task)


def _has_head(model: Path) -> bool:
    try:
        architectures = json.loads((model / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError) as error:
        raise DataFileError(f"{model}/config.json: {error}") from error
    return "For" in architectures[0] and "MaskedLM" not in architectures[0]


def _evaluate(
    settings: Settings, engine: str, model: Path, task: str, languages: Sequence[str], layer: int | None, output: Path
) -> dict[str, Any] | str:
    """The evaluation's result, or why there is none."""
    name = EngineName.parse(engine)
    data = Path(settings.data or "")
    bare = data / "tokenizer" / "xlmr"
    own = any((model / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    try:
        return evaluate(
            Evaluation(
                model=str(model),
                task=task,
                output=output,
                source=Source(folder=data),
                languages=tuple(languages),
                precision="model" if name.backend == STOCK else name.precision,
                backend="none" if name.backend == STOCK else name.backend,
                device=settings.device,
                layer=layer,
                limit=settings.limit,
                tokenizer=settings.tokenizer or (None if own else str(bare)),
            )
        )
    except XfastError as error:
        return str(error)


def _answers(folder: Path, arm: str, task: str) -> Iterator[Record]:
    """Mean characters of the predicted answers, by language."""
    for path in sorted(folder.rglob(f"*.{scoring.metric_of(task).suffix}")):
        language = path.stem.partition("-")[2]
        texts = [text for text in json.loads(path.read_text(encoding="utf-8")).values() if text]
        if texts:
            lengths = [len(text) for text in texts]
            where = {"kind": "probe", "arm": arm, "size": CHECKPOINT, "task": task, "language": language}
            yield {**where, "probe": "answers", "x": None, "what": "characters of an answer", "value": fmean(lengths)}


def best_layers(records: Sequence[Record]) -> Iterator[Record]:
    """Yields the layer with the best score, by arm, engine, task and language, as probes."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record["layers"] is not None:
            key = tuple(str(record[name]) for name in ("arm", "size", "engine", "task", "language"))
            groups.setdefault(key, []).append(record)
    for (arm, size, engine, task, language), mine in groups.items():
        best = mine[int(np.argmax([one["value"] for one in mine]))]
        where = {"probe": "layer", "arm": arm, "size": size, "task": task, "language": language}
        yield {**where, "x": engine, "what": "layer with the best score", "value": float(best["layers"])}
