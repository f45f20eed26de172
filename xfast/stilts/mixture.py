"""What a run trains on: a set of features for each task (and each text file of masked language modelling)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts import batches
from xfast.stilts.config import RunConfig
from xfast.stilts.data import read_file
from xfast.stilts.examples import Examples, unlabelled
from xfast.stilts.features import Features, encode
from xfast.stilts.rows import load_json
from xfast.stilts.task import TAGGING, Task
from xfast.stilts.tasks import get

MLM_HELD_OUT = 0.05
"""Share of each text file that perplexity is measured on, at most ``dev_examples`` lines."""


UNLABELLED = "dev example without a label: left out"


@dataclass
class TrainingSet:
    """A task's part of a run.

    Attributes:
        task: whose head is trained; its own examples, or those of the task it is fine-tuned on.
        labels: in the order of the head's outputs.
        features: to train on.
        dev: English examples that early stopping looks at; empty where nothing is evaluated.
        dev_features: of these.
    """

    task: Task
    labels: tuple[str, ...]
    features: Features
    dev: Examples[Any]
    dev_features: Features


def examples_task(task: Task) -> Task:
    """The task whose English examples train this one: MNLI's for XNLI, SQuAD v1.1's for XQuAD and MLQA.

    Raises:
        InvalidOptionError: there are several, to be trained on one after another.
    """
    if not task.train_on or task.train_on == (task.name,):
        return task
    if len(task.train_on) > 1:
        raise InvalidOptionError(
            f"tasks: {task.name} is fine-tuned on {' and then '.join(task.train_on)}: one run after another"
        )
    return get(task.train_on[0])


def training_sets(config: RunConfig, tokenizer: Any) -> dict[str, TrainingSet]:
    """Load and encode everything a run trains on.

    Raises:
        DataFileError: a file is missing or malformed, a task has no dev set and nothing is held out, or no example is
            left to train on.
    """
    sets = {task.name: _supervised(config, task, tokenizer) for task in config.supervised}
    for path in map(Path, config.mlm_files):
        name = f"mlm:{path.stem}"
        if name in sets:
            raise InvalidOptionError(f"mlm_files: two files are called {path.stem}")
        sets[name] = _text(config, path, tokenizer)
    for name, found in sets.items():
        if not len(found.features):
            raise DataFileError(f"{name}: no example to train on; left out: {dict(found.features.notes)}")
    return sets


def _supervised(config: RunConfig, task: Task, tokenizer: Any) -> TrainingSet:
    origin, source = examples_task(task), config.source
    examples = source.load(origin, "train")
    dev = _dev(config, origin, examples)  # what it holds out does not count as training examples
    _limit(examples, config.train_examples, origin)
    for name in dict.fromkeys((origin.name, task.name)):
        for path in config.translated.get(name, ()):
            examples.extend(read_file(Path(path), origin, "en"))  # question ids keep the language they came from
    labels = label_set(config, origin, examples)
    own = task.recipe
    recipe = dataclasses.replace(config.recipe, query_length=own.query_length, doc_stride=own.doc_stride)
    encoded = [
        encode(part, origin, tokenizer, recipe, labels=labels, train=train)
        for part, train in ((examples, True), (dev, False))
    ]
    return TrainingSet(task, labels, encoded[0], dev, encoded[1])


def _limit(examples: Examples[Any], count: int | None, task: Task) -> None:
    """Keep the first ``count`` examples; of joined tasks, which lie one after another, some of each by its size."""
    if count is None or count >= len(examples):
        return
    size = len(examples)
    chosen = (i * size // count for i in range(count)) if task.parts else range(count)
    examples.items[:] = [examples.items[i] for i in chosen]


def _dev(config: RunConfig, task: Task, train: Examples[Any]) -> Examples[Any]:
    """English dev examples, or the end of the training set, which loses them."""
    if config.dev_examples == 0:
        return Examples()
    if config.source.has(task, "dev"):
        dev = config.source.load(task, "dev")
    elif holdout := config.holdout or task.recipe.holdout:
        if holdout >= len(train):
            raise InvalidOptionError(f"holdout: {holdout}; {task.name} has {len(train)} training examples")
        dev = Examples(train.items[-holdout:])
        del train.items[-holdout:]
    else:
        raise DataFileError(
            f"{task.name}: no English dev set; give its file, or `holdout` examples of the training set, "
            f"or `dev_examples: 0` for no early stopping. Published at {task.owner}"
        )
    if not len(dev):
        names = " + ".join(map(str, config.source.paths(task, "dev") or ())) or "the English dev set"
        raise DataFileError(
            f"{task.name}: {names}: no example; left out: {dict(dev.skipped)}; give a dev set, or `dev_examples: 0` "
            "for no early stopping"
        )
    if withheld := sum(map(unlabelled, dev.items)):
        if withheld == len(dev):  # now, not at the first evaluation
            raise DataFileError(
                f"{task.name}: none of the {withheld} English dev examples has a label; give a dev set with labels, or "
                "`dev_examples: 0` for no early stopping"
            )
        dev.items[:] = [example for example in dev.items if not unlabelled(example)]
        dev.skipped[UNLABELLED] += withheld
    _limit(dev, config.dev_examples, task)
    return dev


def label_set(config: RunConfig, task: Task, examples: Examples[Any]) -> tuple[str, ...]:
    """The task's labels; for CCG those of ``tags_to_id.json`` beside the training file, else those that occur."""
    if task.labels or task.type != TAGGING:
        return task.labels
    paths = config.source.paths(task, "train") or ()
    for path in (folder.parent / "tags_to_id.json" for folder in paths):
        if path.is_file():
            ids = load_json(path)  # the ids are numbers, or numbers as text
            if not isinstance(ids, dict) or {*map(str, ids.values())} != {*map(str, range(len(ids)))}:
                raise DataFileError(f"{path}: expected the ids 0 to n - 1 by tag")
            return tuple(sorted(ids, key=lambda tag: int(ids[tag])))
    return tuple(sorted({tag for example in examples.items for tag in example.tags or ()}))


def _text(config: RunConfig, path: Path, tokenizer: Any) -> TrainingSet:
    task = get("mlm")
    examples = read_file(path, task, path.stem)
    held_out = math.ceil(MLM_HELD_OUT * len(examples))
    if config.dev_examples is not None:
        held_out = min(held_out, config.dev_examples)
    dev = Examples(examples.items[len(examples) - held_out :])
    del examples.items[len(examples) - held_out :]
    _limit(examples, config.train_examples, task)
    encoded = [encode(part, task, tokenizer, config.recipe, train=True) for part in (examples, dev)]
    dev.skipped += encoded[1].notes
    if held_out and not len(encoded[1]):
        raise DataFileError(
            f"{path}: none of the last {held_out} lines, held out for perplexity, has a piece to mask; left out: "
            f"{dict(dev.skipped)}; give other text, or `dev_examples: 0` for no early stopping"
        )
    return TrainingSet(task, (), encoded[0], dev, encoded[1])


# --- how much of each --------------------------------------------------------------------------------


def _sizes(sets: Mapping[str, TrainingSet], mlm: bool) -> dict[str, int]:
    return {name: len(s.features) for name, s in sets.items() if name.startswith("mlm:") == mlm}


def probabilities(config: RunConfig, sets: Mapping[str, TrainingSet]) -> dict[str, float]:
    """Share of the steps that each training set gets."""
    tasks, texts = _sizes(sets, False), _sizes(sets, True)
    share = mlm_share(config, tasks, texts)
    found = dict.fromkeys(sets, 0.0)
    if tasks:
        found.update({n: p * (1 - share) for n, p in batches.shares(tasks, config.cap, config.temperature).items()})
    if texts:
        smoothed = batches.shares(texts, temperature=1 / config.mlm_smoothing) if config.mlm_smoothing else None
        found.update({n: share * (smoothed[n] if smoothed else 1 / len(texts)) for n in texts})
    return found


def mlm_share(config: RunConfig, tasks: Sequence[str] | Mapping[str, int], texts: Mapping[str, int]) -> float:
    """Share of the steps that are masked language modelling: all without tasks, none without texts."""
    if not texts:
        return 0.0
    return config.mlm_share if tasks else 1.0


def steps(config: RunConfig, sets: Mapping[str, TrainingSet]) -> int:
    """Optimizer steps of a run: all epochs of the (capped) tasks, with masked language modelling on top of them."""
    tasks, texts = _sizes(sets, False), _sizes(sets, True)
    share = mlm_share(config, tasks, texts)
    counted = [min(size, config.cap or size) for size in tasks.values()] or list(texts.values())
    wanted = math.ceil(sum(counted) * config.passes / config.recipe.batch_size)
    if tasks and share:
        if share >= 1:
            raise InvalidOptionError("mlm_share: 1 leaves no step for the tasks; leave the tasks out instead")
        wanted = math.ceil(wanted / (1 - share))
    return max(1, min(wanted, config.max_steps or wanted))
