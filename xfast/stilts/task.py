"""What a task is: the records that :mod:`xfast.stilts.tasks` fills in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from xfast.stilts import languages

CLASSIFICATION, CHOICE, SPAN, TAGGING = "classification", "choice", "span", "tagging"
MATCHING, BITEXT, MLM = "matching", "bitext", "mlm"

INTERMEDIATE, TARGET, PART = "intermediate", "target", "part"


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of fine-tuning on a task.

    Attributes:
        max_length: tokens of one sequence, special tokens included.
        epochs: passes over the training set.
        batch_size: examples of one optimizer step, over all devices and accumulation.
        learning_rate: peak of the linear schedule.
        query_length: tokens of a question (span tasks), or of a query with its special tokens (matching tasks).
        doc_stride: tokens between the starts of two windows over a long context.
        holdout: training examples to hold out where there is no English dev set; a run may say otherwise.
    """

    max_length: int = 256
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-5
    query_length: int = 64
    doc_stride: int = 128
    holdout: int = 0

    def within(self, positions: int | None) -> Recipe:
        """The recipe for a model that takes sequences of so many tokens; None: any length."""
        return replace(self, max_length=min(positions or self.max_length, self.max_length))


@dataclass(frozen=True)
class Hub:
    """The task on the Hugging Face Hub.

    Attributes:
        name: dataset.
        config: configuration; ``{language}`` is replaced by the two-letter code, ``{name}`` by the English name.
        splits: Hub split (or several, joined by ``+``) of our "train", "dev" and "test".
        labels: our names of the integer labels, in the Hub's order; empty: the names the dataset itself gives.
        spelled: by two-letter code, the dataset's English names that differ from :data:`xfast.stilts.languages.NAMES`.
    """

    name: str
    config: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "dev": "validation", "test": "test"})
    labels: tuple[str, ...] = ()
    spelled: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as on the command line and in XTREME's folders.
        type: what an example is, and with it the head and the inputs.
        role: intermediate, target, or part of another task.
        title: as in the papers.
        metric: key of :data:`xfast.stilts.scoring.METRICS` for targets, of the dev evaluation for training tasks.
        labels: class names; empty for types without classes and where a file lists them (CCG).
        reader: key of :data:`xfast.stilts.readers.READERS`.
        files: by split, the alternatives in order of preference, each a tuple of paths that are read one after another.
            Relative to the data folder; ``{language}`` is replaced.
        gold: label files by split, where the gold lies apart.
        parts: tasks whose examples this one joins under one head.
        train_on: for a target, the tasks that fine-tune it, one after another; empty: none is needed.
        recipe: hyper-parameters of training on this task.
        train_size: examples of the English training set, 0 where the task has none.
        recall: ``train_size`` was not confirmed at a source.
        owner: where the owner publishes the data.
        hub: the task on the Hugging Face Hub.
    """

    name: str
    type: str
    role: str
    title: str
    metric: str
    reader: str
    files: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    gold: dict[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    train_on: tuple[str, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    train_size: int = 0
    recall: bool = False
    owner: str = ""
    hub: Hub | None = None

    def languages(self, benchmark: str = "xtreme") -> tuple[str, ...]:
        """Languages of a target task in ``"xtreme"`` or ``"xtreme-r"``; English alone for a training task."""
        table = languages.XTREME if benchmark == "xtreme" else languages.XTREME_R
        return table.get(self.name, () if self.role == TARGET else ("en",))
