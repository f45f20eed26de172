"""Official scores of both arms on labelled data, by engine, and by layer where retrieval may stop early.

Everything is measured by :mod:`xfast.stilts.evaluation`; here it is asked the study's questions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from xfast.errors import XfastError
from xfast.stilts import scoring
from xfast.stilts.data import Source
from xfast.stilts.evaluation import Evaluation, evaluate
from xfast.stilts.prediction import Progress
from xfast.stilts.task import BITEXT, MATCHING, SPAN
from xfast.stilts.tasks import get
from xfast.study.arms import arms_of, folder_of, has_trained_head, is_task_folder, tokenizer_of
from xfast.study.factors import CHECKPOINT, STOCK, EngineName, Settings
from xfast.study.store import Record

_SPLIT = "test"

LAYERS = 8
"""At so many layers, evenly spaced and the last one among them, retrieval is scored."""


def jobs(settings: Settings, engine: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(name, arm, task) of each evaluation of an engine: tasks that have an official score."""
    if not settings.accuracy or not settings.baseline or settings.data is None:
        return []
    there = [task for task in dict.fromkeys(task for task, _ in pairs) if languages_of(task, pairs)]
    tasks = [task for task in there if get(task).metric in scoring.METRICS]
    return [(_job(engine, arm, task), arm, task) for task in tasks for arm in arms_of(settings)]


def left_out(settings: Settings, pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """What was asked for and has no score with any engine, and why."""
    if not settings.accuracy or not settings.baseline:
        return
    if settings.data is None:
        yield {"what": "accuracy", "why": "there is no data folder, and with it no labels"}
        return
    for task in dict.fromkeys(task for task, _ in pairs):
        if get(task).metric not in scoring.METRICS:
            yield {"what": f"accuracy on {task}", "why": "the task has no official score"}
        elif len(languages_of(task, pairs)) < sum(mine == task for mine, _ in pairs):
            why = "the sentences of each other language are matched with the English ones"
            yield {"what": f"accuracy on {task} in en", "why": why}


def languages_of(task: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Languages of a task that can have a score: not English where sentences are matched with their English ones."""
    found = dict.fromkeys(language for mine, language in pairs if mine == task)
    return [language for language in found if get(task).type != BITEXT or language != "en"]


def _job(engine: str, arm: str, task: str) -> str:
    return f"accuracy {engine} {arm} {task}"


def measure(
    settings: Settings,
    engine: str,
    arm: str,
    task: str,
    languages: Sequence[str],
    layers: int,
    progress: Progress | None = None,
) -> Iterator[Record]:
    """Yields scores by language, and for question answering the length of the answers.

    What is not scored is a record too: "skipped", with the job's name where another run may succeed. What an evaluation
    did to its examples, such as cutting them, is a "note".

    Args:
        settings: with checkpoints and data.
        engine: what computes.
        arm, task, languages: whose scores.
        layers: of the encoder.
        progress: called now and then.
    """
    given = arms_of(settings)[arm]
    missed = {"kind": "skipped", "what": f"accuracy of {arm} on {task} ({engine})"}
    kind = get(task).type
    try:
        model = folder_of(given, task)
        trained = kind == BITEXT or (is_task_folder if kind == MATCHING else has_trained_head)(model, task)
    except XfastError as error:
        yield {**missed, "why": str(error), "job": _job(engine, arm, task)}
        return
    if not trained:
        yield {**missed, "why": f"{model} has no head that was trained for it"}
        return
    steps = sorted({max(1, round(layers * n / LAYERS)) for n in range(1, LAYERS + 1)}) if kind == BITEXT else [None]
    for layer in steps:
        with tempfile.TemporaryDirectory(prefix="xfast-study-") as folder:
            try:
                found = evaluate(_evaluation(settings, engine, model, task, languages, layer, Path(folder)), progress)
            except XfastError as error:
                yield {**missed, "why": str(error), "job": _job(engine, arm, task)}
                return
            if layer == steps[0]:
                yield from _remarks(found, missed["what"])
            where = {"arm": arm, "size": CHECKPOINT, "engine": engine, "task": task, "layers": layer}
            metric = "+".join(scoring.metric_of(task).main)
            for language, value in found["languages"].items():
                figures = {"metric": metric, "value": float(value), "examples": found["examples"][language]}
                yield {"kind": "accuracy", **where, "language": language, **figures}
            if kind == SPAN and settings.limit is not None:
                why = f"with a limit ({settings.limit} examples a language) evaluations write no answers"
                yield {**missed, "what": f"probe answers of {arm} on {task} ({engine})", "why": why}
            elif kind == SPAN:
                yield from _answers(Path(folder), engine, arm, task)


def _remarks(found: Mapping[str, Any], what: str) -> Iterator[Record]:
    """What an evaluation left out or changed."""
    without = {**dict.fromkeys(found["withheld"], "its labels are not in the data"), **found["missing"]}
    for language, why in without.items():
        yield {"kind": "skipped", "what": f"{what} in {language}", "why": why}
    for name, counts in found["notes"].items():  # of a language, or of what its search goes through
        texts = ", ".join(f"{count} times {text}" for text, count in counts.items())
        yield {"kind": "note", "text": f"{what}, {name}: {texts}"}


def _evaluation(
    settings: Settings, engine: str, model: Path, task: str, languages: Sequence[str], layer: int | None, output: Path
) -> Evaluation:
    name = EngineName.parse(engine)
    stock = name.backend == STOCK
    return Evaluation(
        model=str(model),
        task=task,
        output=output,
        source=Source(folder=Path(settings.data or "")),
        split=_SPLIT,
        languages=tuple(languages),
        precision="model" if stock else name.precision,
        backend="none" if stock else name.backend,
        device=settings.device,
        layer=layer,
        limit=settings.limit,
        tokenizer=str(tokenizer_of(settings, task)),
        dtype=name.precision if stock else None,
    )


def _answers(folder: Path, engine: str, arm: str, task: str) -> Iterator[Record]:
    """Mean characters of the predicted answers, by language: the engine's own, whose arithmetic may choose others."""
    for path in sorted(folder.rglob(f"{_SPLIT}-*.{scoring.metric_of(task).suffix}")):
        language = path.stem.removeprefix(f"{_SPLIT}-")
        texts = [text for text in json.loads(path.read_text(encoding="utf-8")).values() if text]
        if texts:
            lengths = [len(text) for text in texts]
            where = {"kind": "probe", "arm": arm, "size": CHECKPOINT, "task": task, "language": language}
            yield {**where, "probe": "answers", "x": engine, "what": "characters of an answer", "value": fmean(lengths)}


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
