"""Zero-shot evaluation: a trained model on a target task in every language, with the accelerated encoder.

Predictions are written in XTREME's submission layout, ``<output>/<task>/<split>-<language>.<suffix>``; where the gold
is at hand they are scored with the official metrics.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import xfast
from xfast import files
from xfast.artifact import manifest_in
from xfast.errors import DataFileError, InvalidInputError, InvalidOptionError, UnsupportedModelError, require_one_of
from xfast.options import BACKENDS, PRECISIONS
from xfast.stilts import prediction, scoring, search
from xfast.stilts.data import Source
from xfast.stilts.examples import Examples
from xfast.stilts.features import encode
from xfast.stilts.folders import Lock
from xfast.stilts.model import DTYPES, load_packed_task_model, load_task_model, usable_positions
from xfast.stilts.prediction import Progress, padding_of
from xfast.stilts.rows import MissingDataError, load_json
from xfast.stilts.search import Found
from xfast.stilts.task import BITEXT, CHOICE, CLASSIFICATION, MATCHING, SPAN, TAGGING, Recipe, Task
from xfast.stilts.tasks import get
from xfast.stilts.tokenizer import load_tokenizer
from xfast.tensor_files import record_of

MADE_BY = "made-by.json"
"""Beside a task's predictions: by split, the model and the options that they come from."""

_DECISIVE = ("precision", "dtype", "layer", "pooling", "tokenizer", "max_length")
"""Options of :class:`Evaluation` that predictions depend on."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        model: folder of a trained task model, or of an encoder for Tatoeba and BUCC; or of a packed artifact of either.
        task: a target task.
        output: folder for predictions; None writes none.
        source: where examples come from.
        split: "test" or "dev".
        benchmark: whose languages: "xtreme" or "xtreme-r".
        languages: these instead.
        precision, backend: of :func:`xfast.accelerate`; backend "none" runs the stock model. An artifact has its own.
        device: "cpu", "cuda", ...; None: a GPU where there is one.
        layer: hidden state that Tatoeba and BUCC use, counted from 1; None: 14 of 24, in proportion.
        pooling: "mean" or "cls", for the same.
        limit: examples per language, for a quick look; a score on fewer examples is marked as such, and nothing is
            written.
        tokenizer: folder or Hub id; None: the model's own.
        dtype: of the weights, "fp32", "bf16" or "fp16"; None: as they are saved.
        max_length: tokens of one sequence; None: the task's recipe. What the model was trained with, if that differs.

    Raises:
        InvalidOptionError: a value is not accepted, or the benchmark does not have the task.
    """

    model: str
    task: str
    output: Path | None = None
    source: Source = field(default_factory=Source)
    split: str = "test"
    benchmark: str = "xtreme"
    languages: tuple[str, ...] | None = None
    precision: str = "model"
    backend: str = "auto"
    device: str | None = None
    layer: int | None = None
    pooling: str = "mean"
    limit: int | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_one_of("pooling", self.pooling, ("mean", "cls"))
        if self.dtype is not None:
            require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("split", self.split, ("dev", "test"))
        require_one_of("benchmark", self.benchmark, scoring.TARGETS)
        if self.limit is not None and self.limit < 1:
            raise InvalidOptionError(f"limit: {self.limit}; accepted: 1 or more")
        require_one_of("backend", self.backend, (*BACKENDS, "none"))
        require_one_of("precision", self.precision, PRECISIONS[:-1])  # auto needs batches to measure on
        if self.backend == "none" and self.precision != "model":
            raise InvalidOptionError(f"precision: {self.precision!r} with backend none, which runs the stock model")
        if self.max_length is not None and self.max_length < 1:
            raise InvalidOptionError(f"max_length: {self.max_length}; accepted: 1 or more")
        self._check_task()

    def _check_task(self) -> None:
        task = get(self.task)
        if self.layer is not None and task.type != BITEXT:
            raise InvalidOptionError(
                f"layer: {self.layer}; {self.task} reads the last one; accepted for tatoeba, bucc2018"
            )
        if self.pooling != "mean" and task.type not in (BITEXT, MATCHING):
            raise InvalidOptionError(f"pooling: {self.pooling}; {self.task} has a head, which decides what it reads")
        if task.metric not in scoring.METRICS:
            known = ", ".join(dict.fromkeys((*scoring.TARGETS["xtreme"], *scoring.TARGETS["xtreme-r"])))
            raise InvalidOptionError(f"task: {self.task}; accepted: {known}")
        if self.split == "dev" and self.task in ("tatoeba", "lareqa"):
            raise InvalidOptionError(f"split: {self.task} has no dev set; accepted: test")
        if not self.wanted:
            has = ", ".join(scoring.TARGETS[self.benchmark])
            raise InvalidOptionError(f"task: {self.task} is not in {self.benchmark}, which has {has}")
        if len(self.wanted) > 1 and self.source.one_language(task, self.split):
            what = "what `files` or `hub` names is one language's"
            raise InvalidOptionError(
                f"languages: {self.task} {self.split}: {what}; name that one, or put {{language}} into the names"
            )

    @property
    def wanted(self) -> tuple[str, ...]:
        """The languages: those named, or the benchmark's; of tasks that XTREME has not, XTREME-R's."""
        task = get(self.task)
        only_later = self.benchmark == "xtreme" and self.task not in scoring.TARGETS["xtreme"]
        return self.languages or task.languages("xtreme-r" if only_later else self.benchmark)


def evaluate(run: Evaluation, progress: Progress | None = None) -> dict[str, Any]:
    """Predict, write, score.

    Returns:
        ``score`` (None where no gold is at hand), ``languages``, ``metrics`` as :func:`scoring.summarize_task` has
        them; ``withheld`` (languages without gold), ``missing`` (languages without data), ``notes`` by language,
        ``explain`` (what the accelerated model ran), ``seconds`` and ``examples``. What was left out or cut in
        candidates that all languages share is noted under "candidates".

    Raises:
        DataFileError: no language has data, or a file is malformed.
        InvalidOptionError: the model does not take such sequences, or predictions cannot be written, or not beside
            another model's.
        InvalidInputError: the model gives NaN.
    """
    task, wanted = get(run.task), run.wanted
    started = time.perf_counter()
    found: dict[str, Found] = {}
    missing: dict[str, str] = {}
    with _Written(run, task) as written:
        written.check()
        predictor = _Predictor(run, task)
        for language in wanted:
            outcome = predictor(language, progress)
            if not isinstance(outcome, Found):
                missing[language] = outcome
                continue
            found[language] = outcome
            written.add(language, outcome.predicted)  # at once: a later language's failure loses nothing
    if not found:
        first = next(iter(missing.values()))
        raise DataFileError(f"{run.task} {run.split}: no data in any of {', '.join(wanted)}: {first}")
    notes = {language: dict(part.notes) for language, part in found.items()}
    return {
        **_scores(run, task, found),
        "task": run.task,
        "split": run.split,
        "missing": missing,
        "notes": {name: said for name, said in {**notes, search.CANDIDATES: predictor.shared()}.items() if said},
        "examples": {language: part.examples for language, part in found.items()},
        "limit": None if run.task == "bucc2018" else run.limit,  # mining needs all sentences
        "model": run.model,
        "explain": predictor.explain(),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _scores(run: Evaluation, task: Task, found: Mapping[str, Found]) -> dict[str, Any]:
    metric = scoring.metric_of(task.name)
    by_language = {}
    for language, part in found.items():
        if part.gold is not None:
            try:
                scores = metric.score(part.gold, part.predicted, language)
            except InvalidInputError as error:
                raise DataFileError(f"{task.name} {run.split} {language}: {error}") from None
            by_language[language] = scoring.without_mean(task.name, scores)
    withheld = [language for language, part in found.items() if part.gold is None]
    if not by_language:
        return {"score": None, "languages": {}, "metrics": {}, "withheld": withheld}
    return {**scoring.summarize_task(task.name, by_language), "withheld": withheld}


class _Predictor:
    """A loaded, accelerated model of one task."""

    def __init__(self, run: Evaluation, task: Task) -> None:
        self.run, self.task = run, task
        manifest = manifest_in(Path(run.model))
        self.packed = None if manifest is None else manifest.precision
        gpu = torch.cuda.is_available() and self.packed is None
        self.device = torch.device(run.device or ("cuda" if gpu else "cpu"))
        self.model = self._load()
        self.tokenizer = load_tokenizer(run.tokenizer or run.model)
        self.padding = padding_of(self.model, self.tokenizer)
        self.recipe = self._recipe(task)
        self._check_labels()
        self.layer = search.layer_of(self.model.config, run.layer) if task.type == BITEXT else None
        self.forward: Any = self.model
        self.stock = "stock transformers" if run.backend == "none" else self._accelerate()
        if self.layer is not None and (self.stock or self.packed):
            self.forward = search.StateOf(self.model, self.layer)
        self._engine: search.Engine | None = None

    def _recipe(self, task: Task) -> Recipe:
        wanted, room = self.run.max_length, usable_positions(self.model.config)
        if wanted is None:
            return task.recipe.within(room)
        if room is not None and wanted > room:
            raise InvalidOptionError(f"max_length: {wanted}; {self.run.model} has positions for {room}")
        return dataclasses.replace(task.recipe, max_length=wanted)

    def _load(self) -> Any:
        run, packed = self.run, self.packed
        if packed is None:
            dtype = None if run.dtype is None else DTYPES[run.dtype]
            return load_task_model(run.model, self.task, dtype).to(self.device)
        there = run.backend in ("auto", "native") and run.precision in ("model", packed) and run.dtype is None
        if not there or self.device.type != "cpu":
            raise InvalidOptionError(
                f"model: {run.model} is a packed artifact; accepted: precision {packed} or model, backend auto or "
                f"native, on the CPU; got {run.precision}, {run.backend}, {self.device}"
            )
        return load_packed_task_model(run.model, self.task)

    def _accelerate(self) -> str:
        """Returns "", or why the model runs as it is."""
        run = self.run
        if self.packed:
            return ""
        try:
            xfast.accelerate(self.model, backend=run.backend, precision=run.precision, layers=self.layer)
        except UnsupportedModelError as error:
            if run.backend != "auto":
                raise
            return f"stock transformers: {error}"
        return ""

    def explain(self) -> str:
        return self.stock or str(xfast.explain(self.model))

    def shared(self) -> dict[str, int]:
        """Notes on candidates that all languages share."""
        return {} if self._engine is None else dict(self._engine.shared)

    def __call__(self, language: str, progress: Progress | None) -> Found | str:
        """The language's predictions, or why there is nothing to predict."""
        run = self.run
        if self.task.type in (BITEXT, MATCHING):
            return self._search(language, progress)
        if not run.source.has(self.task, run.split, language):
            return f"{self.task.name} {run.split} {language}: no file; published at {self.task.owner}"
        try:
            examples = run.source.load(self.task, run.split, language)
        except MissingDataError as error:
            return str(error)
        if run.limit is not None:
            del examples.items[run.limit :]
        return self._predict(language, examples, progress)

    def _predict(self, language: str, examples: Examples[Any], progress: Progress | None) -> Found | str:
        recipe, items = self.recipe, examples.items
        if not items:
            return f"{self.task.name} {self.run.split} {language}: no examples"
        names = [self.model.config.id2label[i] for i in range(len(self.model.config.id2label))]
        features = encode(examples, self.task, self.tokenizer, recipe)
        report = prediction.counter(progress, language, len(features))
        common = (self.padding, self.device, report)
        predicted: Any
        gold: Any
        if self.task.type in (CLASSIFICATION, CHOICE):
            best = prediction.classes(self.forward, features, self.task.type, *common).argmax(-1).tolist()
            predicted = [names[i] for i in best] if self.task.type == CLASSIFICATION else best
            gold = _all_or_none([item.label for item in items])
        elif self.task.type == SPAN:
            answered = prediction.answers(self.forward, features, items, *common)
            predicted = {item.id: best.text for item, best in zip(items, answered, strict=True)}
            gold = self._answers(language, examples)
        else:
            predicted = prediction.tags(self.forward, features, [len(item.words) for item in items], names, *common)
            gold = _all_or_none([item.tags for item in items])
        return Found(predicted, gold, len(items), features.notes)

    def _check_labels(self) -> None:
        names = list(self.model.config.id2label.values())
        wrong = self.task.type == CLASSIFICATION and set(names) != set(self.task.labels)
        if wrong or (self.task.type == TAGGING and not set(names) <= set(self.task.labels)):
            raise DataFileError(
                f"model: {self.run.model} has the labels {', '.join(names)}; {self.task.name} has "
                f"{', '.join(self.task.labels)}"
            )

    def _answers(self, language: str, examples: Examples[Any]) -> dict[str, list[str]] | None:
        """Accepted answers by question; from the label folder where the data folder's file has them blanked."""
        source, split = self.run.source, self.run.split
        gold = {item.id: [answer.text for answer in item.answers] for item in examples.items}
        if all(gold.values()):
            return gold
        given = source.given(self.task, split) or split not in self.task.gold
        path = None if given else source.find(self.task.gold[split].format(language=language))
        if path is None:
            return None
        labels = scoring.metric_of(self.task.name).read(path, True)
        known = {identity: labels[identity] for identity in gold if any(labels.get(identity, ()))}
        if known and len(known) < len(gold):
            raise DataFileError(f"{path}: answers to {len(known)} of the {len(gold)} questions of {language}")
        return known or None

    def _search(self, language: str, progress: Progress | None) -> Found | str:
        if self._engine is None:  # one for all languages: they share candidates
            self._engine = search.Engine(
                self.forward, self.tokenizer, self.padding, self.device, self.recipe, self.run.pooling, progress
            )
        try:
            return search.run(self._engine, self.task.name, self.run.source, language, self.run.split, self.run.limit)
        except FileNotFoundError as error:
            return str(error)


def _all_or_none(values: Sequence[Any]) -> list[Any] | None:
    return None if any(value is None for value in values) else list(values)


# --- files -------------------------------------------------------------------------------------------


class _Written:
    """The predictions of one split of a task, in a folder that no other process writes them to meanwhile.

    A model and options are refused where the split has predictions of others. A second process is, too, from the first
    language on, or at once where the folder is there; without an output, or with a limit, nothing is written.
    """

    def __init__(self, run: Evaluation, task: Task) -> None:
        self.run, self.task = run, task
        self.output = run.output if run.limit is None else None
        self.folder = (self.output or Path()) / task.name
        self.lock = Lock("output", self.folder, f".{run.split}.lock")

    def __enter__(self) -> _Written:
        if self.output is not None:
            self.lock.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raises InvalidOptionError: there are predictions of another model or of other options."""
        if self.output is not None:
            self._mine()

    def add(self, language: str, predicted: Any) -> None:
        if self.output is not None:
            self.lock.make()
            self._note(self._mine())  # again: where there was no folder, another process may have come first
            write_predictions(self.output, self.task, self.run.split, language, predicted)

    def _mine(self) -> dict[str, Any]:
        """What :data:`MADE_BY` is to say of this split; an error where its predictions would be two models'."""
        run, path = self.run, self.folder / MADE_BY
        stored = load_json(path) if path.is_file() else {}
        mine = {"model": run.model, "weights": _weights(run.model), **{name: getattr(run, name) for name in _DECISIVE}}
        before = stored.get(run.split, {}) if isinstance(stored, dict) else None
        if not isinstance(before, dict):
            raise DataFileError(f"{path}: expected a model and options by split")
        other = [name for name in mine if name != "model" and before.get(name) != mine[name]]
        if before and other and any(self.folder.glob(f"{run.split}-*")):
            what = f"another model, {before.get('model')}" if "weights" in other else f"another {', '.join(other)}"
            raise InvalidOptionError(
                f"output: {self.folder} holds {run.split} predictions of {what}; remove them, or choose another folder"
            )
        return mine

    def _note(self, mine: dict[str, Any]) -> None:
        """Beside what the file says of the other split, which another process may evaluate meanwhile."""
        path = self.folder / MADE_BY
        with Lock("output", self.folder, ".made-by.lock", wait=True):
            stored = load_json(path) if path.is_file() else {}
            if stored.get(self.run.split) != mine:
                text = json.dumps({**stored, self.run.split: mine}, indent=1) + "\n"
                files.save("output", path, text.encode())


def _weights(model: str) -> str:
    """Tells models apart wherever their folders lie: a hash of the weights; of a model on the Hub, its name."""
    folder = Path(model)
    parts = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return _hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in parts)) if parts else model


@functools.lru_cache(maxsize=8)
def _hash(parts: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files as they are: one model is evaluated on many tasks."""
    return hashlib.sha256("".join(record_of(path).sha256 for path, _, _ in parts).encode()).hexdigest()


def write_predictions(folder: Path, task: Task, split: str, language: str, predicted: Any) -> Path:
    """Write one language's predictions as XTREME's evaluation reads them. The file appears whole or not at all."""
    path = folder / task.name / f"{split}-{language}.{scoring.metric_of(task.name).suffix}"
    files.save("output", path, _text(task, predicted).encode())
    return path


def _text(task: Task, predicted: Any) -> str:
    if task.type in (SPAN, MATCHING):
        return json.dumps(predicted, ensure_ascii=False, indent=1) + "\n"
    if task.type == TAGGING:
        return "\n".join("".join(f"{tag}\n" for tag in sentence) for sentence in predicted)
    if task.type == CHOICE:
        return "".join(json.dumps({"idx": i, "label": label}) + "\n" for i, label in enumerate(predicted))
    if task.name == "bucc2018":
        return "".join(f"{source}\t{target}\n" for source, target in sorted(predicted))
    return "".join(f"{value}\n" for value in predicted)
