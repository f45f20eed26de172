"""One training run as data: read from YAML, TOML or JSON, checked, and stored beside its results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from xfast import files
from xfast.errors import DataFileError, InvalidOptionError, require_one_of
from xfast.stilts.data import SPLITS, Source
from xfast.stilts.task import BITEXT, MATCHING, MLM, Recipe, Task
from xfast.stilts.tasks import get

BATCHING = ("length", "random", "packed")
PRECISIONS = ("fp32", "bf16", "fp16")

_POSITIVE = (
    *("epochs", "batch_size", "learning_rate", "max_length", "max_steps", "device_batch_size", "cap", "temperature"),
    *("train_examples", "eval_steps", "patience", "adam_epsilon"),
)
_NOT_NEGATIVE = ("seed", "mlm_smoothing", "dev_examples", "holdout", "weight_decay", "max_grad_norm")
_SHARES = ("mlm_share", "warmup_share")


@dataclass(frozen=True)
class RunConfig:
    """A training run: one checkpoint, one task or several together, one seed.

    Defaults are the recipe of the paper's authors (linear decay, 10 % warm-up, AdamW with weight decay 0.01, evaluation
    every 1000 steps on 500 English dev examples, patience 30). None means: as the task's own recipe says.

    Attributes:
        model: checkpoint to start from, a folder or Hub id; its encoder is used, heads are new but for mlm's.
        tasks: trained together; one name is single-task training. ``["mlm"]`` continues masked language modelling.
        output: folder for checkpoints, logs and the trained model.
        data: data folder, see :class:`xfast.stilts.data.Source`.
        tokenizer: folder or Hub id, by default ``model``.
        seed: of new weights, order and dropout.
        epochs, batch_size, learning_rate, max_length: None: the recipe of the (first) task; of several tasks' lengths
            the largest. ``batch_size`` counts examples of one optimizer step over all devices.
        max_steps: ends training early, whatever ``epochs`` says.
        device_batch_size: examples of one forward; the rest is gradient accumulation. For dual encoders (LAReQA,
            Mewsli-X) it is also the number of targets that a query is compared with.
        cap, temperature: several tasks are drawn with probability proportional to min(examples, cap)^(1/temperature).
        mlm_files: text files, one sentence a line; their batches are interleaved with the tasks'.
        mlm_share: share of the steps that are masked language modelling (the paper's 20 % is recalled, not confirmed).
        mlm_smoothing: files are drawn with probability proportional to lines^mlm_smoothing.
        files, hub: see :class:`xfast.stilts.data.Source`. What this run does not read may be named, too: a grid's runs
            and its evaluations share them. XNLI, say, is trained and stopped on MNLI's files; its own are evaluated.
        translated: by task (a target or the task it is fine-tuned on), files of machine-translated training data, added
            to the English ones.
        train_examples, dev_examples: at most so many, of joined tasks (ANLI+) some of each; ``dev_examples`` is what
            early stopping looks at.
        holdout: examples taken from the end of the training set for a task whose English dev set is missing.
        eval_steps, patience: evaluate every so many steps; stop after so many evaluations without a better score.
        weight_decay, adam_epsilon, max_grad_norm, warmup_share: of AdamW and the linear schedule.
        batching: "length" groups examples of like length, "random" does not, "packed" trains without padding (GPU).
        precision: of training: "fp32", or mixed "bf16" or "fp16".
        heads: "new", or "checkpoint" to continue the head that a trained task model brings.
        gradient_checkpointing: less memory, more time.
        keep_checkpoints: leave the checkpoints in place when the run has finished.
        tensorboard: write TensorBoard logs into ``output/logs``.
        trainer: further arguments of ``transformers.TrainingArguments`` (``fsdp``, ``optim``, ...).
    """

    model: str
    tasks: tuple[str, ...]
    output: str
    data: str | None = None
    tokenizer: str | None = None
    seed: int = 0
    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    max_steps: int | None = None
    device_batch_size: int = 8
    cap: int | None = None
    temperature: float = 1.0
    mlm_files: tuple[str, ...] = ()
    mlm_share: float = 0.2
    mlm_smoothing: float = 0.7
    files: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)
    translated: dict[str, list[str]] = field(default_factory=dict)
    train_examples: int | None = None
    dev_examples: int | None = 500
    holdout: int = 0
    eval_steps: int = 1000
    patience: int = 30
    weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_share: float = 0.1
    batching: str = "length"
    precision: str = "fp32"
    heads: str = "new"
    gradient_checkpointing: bool = False
    keep_checkpoints: bool = False
    tensorboard: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "mlm_files", tuple(self.mlm_files))
        if not self.tasks:
            raise InvalidOptionError("tasks: none given; accepted: one task or several")
        if len(set(self.tasks)) != len(self.tasks):
            raise InvalidOptionError(f"tasks: {', '.join(self.tasks)} names a task twice")
        for name in self.tasks:
            if get(name, "tasks").type == BITEXT:
                raise InvalidOptionError(f"tasks: {name} is evaluated without training; see `xfast stilts evaluate`")
        matching = [name for name in self.tasks if get(name).type == MATCHING]
        if matching and min(self.device_batch_size, self.recipe.batch_size) < 2:
            raise InvalidOptionError(
                f"device_batch_size: {matching[0]} learns from the other examples of a batch; accepted: 2 or more"
            )
        if "mlm" in self.tasks and not self.mlm_files:
            raise InvalidOptionError("mlm_files: masked language modelling needs text files")
        require_one_of("batching", self.batching, BATCHING)
        require_one_of("precision", self.precision, PRECISIONS)
        require_one_of("heads", self.heads, ("new", "checkpoint"))
        for name in _POSITIVE:
            _within(name, getattr(self, name), lambda value: 0 < value < math.inf, "more than 0")
        for name in _NOT_NEGATIVE:
            _within(name, getattr(self, name), lambda value: 0 <= value < math.inf, "0 or more")
        for name in _SHARES:
            _within(name, getattr(self, name), lambda value: 0 <= value <= 1, "0 to 1")
        _within("seed", self.seed, lambda value: value < 2**32, "less than 2**32")  # what NumPy takes
        _check_sources(self)

    @property
    def supervised(self) -> tuple[Task, ...]:
        """The tasks apart from masked language modelling."""
        return tuple(get(name) for name in self.tasks if get(name).type != MLM)

    @property
    def recipe(self) -> Recipe:
        """The task's recipe with what this run changes."""
        base = (self.supervised or (get("mlm"),))[0].recipe
        return dataclasses.replace(
            base,
            max_length=self.max_length or max(t.recipe.max_length for t in (self.supervised or (get("mlm"),))),
            batch_size=self.batch_size or base.batch_size,
            learning_rate=self.learning_rate or base.learning_rate,
        )

    @property
    def passes(self) -> float:
        """Epochs."""
        return self.epochs or float(self.recipe.epochs)

    @property
    def source(self) -> Source:
        """Where the examples come from."""
        return Source(Path(self.data) if self.data else None, self.files, self.hub)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def save(self, path: Path) -> None:
        """Write as YAML."""
        import yaml

        files.write_text(path, yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True))


def _within(name: str, value: Any, holds: Callable[[Any], bool], accepted: str) -> None:
    if value is not None and not holds(value):
        raise InvalidOptionError(f"{name}: {value}; accepted: {accepted}")


def _check_sources(config: RunConfig) -> None:
    """Names of tasks, splits and files in ``files``, ``hub`` and ``translated``: a slip there would go unnoticed."""
    for task, splits in config.files.items():
        origin = get(task, "files").train_on or (task,)
        if not isinstance(splits, Mapping):
            raise InvalidOptionError(f"files: {task}: {splits!r}; accepted: files by split")
        for split, paths in splits.items():
            require_one_of(f"files: {task}", split, SPLITS)
            _check_paths(f"files: {task}: {split}", paths)
            if split == "train" and task not in origin:
                raise InvalidOptionError(f"files: {task}: fine-tuned on {', '.join(origin)}; name training files there")
    origins = {name for task in config.supervised for name in (task.name, *task.train_on)}
    for task, paths in config.translated.items():
        if get(task, "translated").name not in origins:
            raise InvalidOptionError(
                f"translated: {task} is no task of this run; accepted: {', '.join(sorted(origins))}"
            )
        _check_paths(f"translated: {task}", paths)
    for task, dataset in config.hub.items():
        get(task, "hub")
        if not isinstance(dataset, str):
            raise InvalidOptionError(f"hub: {task}: {dataset!r}; accepted: a dataset's name, or '' for the task's own")
    _ = config.source  # which says what cannot be named


def _check_paths(name: str, paths: Any) -> None:
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str) for path in paths):
        raise InvalidOptionError(f"{name}: {paths!r}; accepted: a list of files")


def from_dict(values: Mapping[str, Any], where: str = "config", kind: Any = RunConfig) -> Any:
    """A run (or another configuration class) from plain values.

    Raises:
        InvalidOptionError: an unknown key (the message lists all), a missing one or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := [name for name in values if name not in known]:
        raise InvalidOptionError(f"{where}: no option {', '.join(map(str, unknown))}; accepted: {', '.join(known)}")
    required = [name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise InvalidOptionError(f"{where}: {', '.join(missing)} missing")
    hints = get_type_hints(kind)
    return kind(**{name: _typed(name, value, hints[name], where) for name, value in values.items()})


def _typed(name: str, value: Any, hint: Any, where: str) -> Any:
    alternatives = get_args(hint) if _is_optional(hint) else (hint,)
    kinds = tuple(getattr(kind, "__origin__", kind) for kind in alternatives)
    if value is None and type(None) in kinds:
        return None
    if tuple in kinds:
        item = next(get_args(kind)[0] for kind in (hint, *get_args(hint)) if getattr(kind, "__origin__", None) is tuple)
        if not isinstance(value, list | tuple) or not all(type(each) is item for each in value):
            raise InvalidOptionError(f"{where}: {name}: {value!r}; accepted: a list of {item.__name__}")
        return tuple(value)
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as a string
        except ValueError:
            pass
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return value
    accepted = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
    raise InvalidOptionError(f"{where}: {name}: {value!r}; accepted: {accepted}")


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def load(path: Path) -> dict[str, Any]:
    """The mapping in a YAML, TOML or JSON file, told by its suffix.

    Raises:
        DataFileError: missing, malformed, or no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            import tomllib  # Python 3.11

            values = tomllib.loads(text)
        else:
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except ImportError:
        raise DataFileError(f"{path}: TOML needs Python 3.11; use YAML") from None
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataFileError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise DataFileError(f"{path}: expected options by name, got {type(values).__name__}")
    return values
