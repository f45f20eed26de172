"""Where a task's examples come from: a data folder, files named by the user, or the Hugging Face Hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xfast.errors import BackendUnavailableError, DataFileError, InvalidOptionError, require_one_of
from xfast.stilts import folders, readers
from xfast.stilts.examples import Examples, MatchExample, SpanExample, TaggedExample, unlabelled
from xfast.stilts.languages import NAMES, UDPOS_WITHOUT_DEV
from xfast.stilts.retrieval_data import mewslix_pairs
from xfast.stilts.rows import MissingDataError, pick, text
from xfast.stilts.task import BITEXT, CHOICE, CLASSIFICATION, MATCHING, SPAN, TAGGING, Task
from xfast.stilts.tasks import get

SPLITS = ("train", "dev", "test")

Files = Mapping[str, Mapping[str, Sequence[str | Path]]]


@dataclass(frozen=True)
class Source:
    """Everything that says where examples come from.

    Attributes:
        folder: data folder: XTREME's download folder, or one that holds it as ``xtreme/`` beside ``intermediate/``.
        files: by task and split, files to read instead; ``{language}`` in a name is replaced. Their format is one that
            the task's reader knows, told by the suffix (``.conllu`` works for every tagging task). Labels must be in
            them: gold files of the folder belong to the folder's own.
        hub: by task, the name of a Hub dataset (or a folder in its format, ``{language}`` in it replaced) to read
            instead; "" for the task's own. Where ``files`` names files of a split, these are read.

    Raises:
        InvalidOptionError: ``files`` or ``hub`` names what is read from the data folder alone: sentences and rankings.
    """

    folder: Path | None = None
    files: Files = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, of in (("files", self.files), ("hub", self.hub)):
            for task in of:
                kind = get(task, name).type
                if kind == BITEXT or (kind == MATCHING and (name == "hub" or "test" in of[task])):
                    raise InvalidOptionError(f"{name}: {task} is evaluated on files of the data folder alone")

    def find(self, relative: str) -> Path | None:
        """The file of that relative name in the data folder, or None."""
        if self.folder is None:
            return None
        return folders.find(self.folder, relative)

    def paths(self, task: Task, split: str, language: str = "en") -> tuple[Path, ...] | None:
        """The files of one split, the first alternative that is complete; None where there is none."""
        named = self._named(task, split)
        if named is not None:
            return tuple(Path(name.replace("{language}", language)) for name in named)
        for alternative in task.files.get(split, ()):
            found = [self.find(relative.format(language=language)) for relative in alternative]
            if all(found):
                return tuple(path for path in found if path is not None)
        return None

    def _named(self, task: Task, split: str) -> list[str] | None:
        names = self.files.get(task.name, {}).get(split)
        return None if names is None else [str(name) for name in names]

    def given(self, task: Task, split: str) -> bool:
        """Whether ``files`` or ``hub`` names the split: then the data folder's gold files do not belong to it."""
        return self._named(task, split) is not None or task.name in self.hub

    def one_language(self, task: Task, split: str) -> bool:
        """Whether what is named for a split is one language's, and which one is not said.

        TyDiQA's files may hold several: its questions' ids tell the language.
        """
        named = self._named(task, split)
        if task.name == "tydiqa":
            return False
        if named is not None:
            return not any("{language}" in name for name in named)
        name = self.hub.get(task.name, "")
        return bool(name) and Path(name).is_dir() and "{language}" not in name

    def _of_parts(self, task: Task) -> Source:
        """The source of a joined task's parts: its own Hub datasets are theirs."""
        if task.name not in self.hub:
            return self
        if self.hub[task.name]:
            raise InvalidOptionError(f"hub: {task.name} joins {', '.join(task.parts)}: name the datasets of these")
        return replace(self, hub={**dict.fromkeys(task.parts, ""), **self.hub})

    def has(self, task: Task, split: str, language: str = "en") -> bool:
        """Whether the split can be loaded (a Hub dataset counts without being asked)."""
        named = self._named(task, split)
        if named is not None:
            # one language's file may be missing; any other name that is wrong is an error when it is loaded
            paths = self.paths(task, split, language) or ()
            return all(path.is_file() for path, name in zip(paths, named, strict=True) if "{language}" in name)
        if task.parts:
            source = self._of_parts(task)
            return all(source.has(get(part), split, language) for part in task.parts)
        if task.name in self.hub:
            absent = task.name == "udpos" and split == "dev" and language in UDPOS_WITHOUT_DEV
            return task.hub is not None and split in task.hub.splits and not absent
        return self.paths(task, split, language) is not None

    def load(self, task: Task, split: str, language: str = "en") -> Examples[Any]:
        """The examples of one split.

        Raises:
            DataFileError: a file is missing or malformed; says which and where its owner publishes it.
            InvalidOptionError: no such split.
        """
        require_one_of("split", split, SPLITS)
        if task.type == BITEXT:
            raise InvalidOptionError(f"task: {task.name} has sentence files; see xfast.stilts.retrieval")
        named = self._named(task, split) is not None
        if task.parts and not named:
            source = self._of_parts(task)
            return Examples.of(source.load(get(part), split, language) for part in task.parts)
        if task.name in self.hub and not named:
            return load_hub(task, split, language, self.hub[task.name])
        paths = self.paths(task, split, language)
        if paths is None:
            raise DataFileError(self._missing(task, split, language))
        examples = Examples.of(read_file(path, task, language) for path in paths)
        if task.type == SPAN and len(paths) > 1:
            _check_unique(examples, paths)
        if named or split not in task.gold or task.type in (SPAN, MATCHING):
            return examples
        if zeroed(examples, task):
            examples = Examples([replace(example, label=None) for example in examples.items], examples.skipped)
        gold = self.find(task.gold[split].format(language=language))
        if gold is not None and examples and all(map(unlabelled, examples.items)):
            joined = readers.with_gold(examples, gold, task)
            return examples if zeroed(joined, task) else joined
        return examples

    def _missing(self, task: Task, split: str, language: str) -> str:
        names = [
            " + ".join(name.format(language=language) for name in alternative)
            for alternative in task.files.get(split, ())
        ]
        if not names:
            return f"{task.name}: the task has no {split} split; it has {', '.join(task.files) or 'none'}"
        where = self.folder or "no data folder given"
        return f"{task.name} {split} {language}: not found in {where}: {' or '.join(names)}; published at {task.owner}"


def read_file(path: Path, task: Task, language: str) -> Examples[Any]:
    """One file with the reader that its task and suffix call for."""
    if task.type == TAGGING and path.suffix == ".conllu":
        return readers.read_conllu(path, task, language)
    if task.name == "lareqa":
        return _question_pairs(readers.read_squad(path, task, language))
    if task.name == "mewslix":
        return mewslix_pairs(path)
    return readers.READERS[task.reader](path, task, language)


def _check_unique(examples: Examples[Any], paths: Sequence[Path]) -> None:
    """A question's id is what its answer is written under."""
    twice = [identity for identity, count in Counter(example.id for example in examples.items).items() if count > 1]
    if twice:
        names = " and ".join(map(str, paths))
        raise DataFileError(f"{names}: question {twice[0]!r} is in more than one ({len(twice)} questions are)")


def zeroed(examples: Examples[Any], task: Task) -> bool:
    """Whether a benchmark wrote 0 over the labels that it withholds, as XTREME does for XCOPA's test sets."""
    return task.type == CHOICE and all_zero([str(example.label) for example in examples.items])


def all_zero(labels: Sequence[str]) -> bool:
    """Whether so many labels are all the first of two that it is no chance."""
    return len(labels) >= _FEWEST_ZEROS and set(labels) == {"0"}


_FEWEST_ZEROS = 20
_SENTENCE_ENDS = (". ", "? ", "! ", "\n")


def _question_pairs(examples: Examples[SpanExample]) -> Examples[MatchExample]:
    """LAReQA trains on SQuAD: a question finds the sentence that holds its answer, in its paragraph.

    Sentences end at ``. ``, ``? ``, ``! `` or a line's end: simpler than the sentence breaker of the paper's authors,
    and used for English training alone (the evaluation's sentences are given).
    """
    pairs: Examples[MatchExample] = Examples(skipped=examples.skipped)
    for example in examples.items:
        places = [(answer.start, len(answer.text)) for answer in example.answers if answer.start is not None]
        if not places:
            pairs.skipped["a question without an answer in its context"] += 1
            continue
        context, (at, length) = example.context, places[0]
        last_character = at + length - 1
        first = max((context.rfind(end, 0, at) + len(end) for end in _SENTENCE_ENDS if end in context[:at]), default=0)
        ends = [context.find(end, last_character) for end in _SENTENCE_ENDS]
        last = min((end + 1 for end in ends if end >= 0), default=len(context))
        pairs.items.append(MatchExample(example.id, example.question, context[first:last].strip(), context))
    return pairs


# --- the Hub -----------------------------------------------------------------------------------------


def load_hub(task: Task, split: str, language: str, name: str = "") -> Examples[Any]:
    """The split of a Hub dataset, converted row by row with the converters that the file readers use.

    Args:
        name: another dataset (or a folder of parquet files) with the same columns; "" for the task's own.

    Raises:
        BackendUnavailableError: ``datasets`` is not installed.
        MissingDataError: the dataset has not this language or split.
        DataFileError: the task has no Hub dataset, or its columns are not what is expected.
    """
    hub = task.hub
    if hub is None or split not in hub.splits:
        raise DataFileError(f"{task.name} {split}: known to no Hub dataset; give the data folder or files")
    try:
        import datasets
    except ImportError:
        raise BackendUnavailableError("datasets is not installed: pip install datasets") from None
    spelled = {**NAMES, **hub.spelled}.get(language, language)
    config = hub.config and hub.config.format(language=language, name=spelled)
    name = name.replace("{language}", language)
    if name and Path(name).is_dir():
        config = None  # a folder holds one configuration
    where = f"{name or hub.name}{':' + config if config else ''}:{hub.splits[split]}"
    try:
        rows = datasets.load_dataset(name or hub.name, config, split=hub.splits[split])
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # a RuntimeError: the dataset needs a script, which datasets 4 and later do not run
        absent = isinstance(error, ValueError) and re.search("Unknown split|BuilderConfig .* not found", str(error))
        kind = MissingDataError if absent else DataFileError
        raise kind(f"{where}: {error}; a copy as parquet can be named instead") from None
    names = _label_names(rows, hub.labels)
    converted: Examples[Any] = Examples()
    for index, row in enumerate(rows):
        example = _hub_row(row, task, language, f"{where}[{index}]", names)
        if isinstance(example, Examples):
            converted.extend(example)
        elif isinstance(example, str):
            converted.skipped[example] += 1
        else:
            converted.items.append(example)
    return converted


_SAME_LABEL = {"not_duplicate": "0", "duplicate": "1"}
"""Names that a Hub dataset gives to a task's labels (QQP)."""


def _label_names(rows: Any, given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the integer labels: those of the dataset's features, whatever their order; ours where it has none."""
    for column in ("label", "ner_tags", "pos_tags"):
        feature = rows.features.get(column)
        feature = getattr(feature, "feature", feature)
        if hasattr(feature, "names"):
            return tuple(_SAME_LABEL.get(name, name) for name in feature.names)
    return given


def _hub_row(row: Mapping[str, Any], task: Task, language: str, where: str, names: tuple[str, ...]) -> Any:
    if task.type == SPAN:
        return _hub_question(row, task, language, where)
    if task.type == TAGGING:
        return _hub_sentence(row, task, where, names)
    label = row.get("label")
    if label == -1 and task.name == "snli":
        return readers.UNLABELLED
    if task.type == CLASSIFICATION and isinstance(label, int) and label >= 0:
        if label >= len(names):
            raise DataFileError(f"{where}: label {label}; accepted: 0 to {len(names) - 1}: {', '.join(names)}")
        row = {**row, "label": names[label]}
    return readers.ROWS[task.reader](row, task, where)


def _hub_question(row: Mapping[str, Any], task: Task, language: str, where: str) -> Examples[SpanExample]:
    """None, one, and what was left out: as the reader of SQuAD's format has it."""
    answers = pick(row, ("answers",), where)
    try:
        if isinstance(answers, Mapping):
            pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in answers]
    except (KeyError, TypeError, ValueError):
        raise DataFileError(f"{where}: answers {answers!r}; expected a text and an answer_start for each") from None
    question = {
        "id": pick(row, ("id",), where),
        "question": text(row, ("question",), where),
        "answers": [{"text": text, "answer_start": start} for text, start in pairs],
        "is_impossible": task.name == "squad_v2" and not pairs,
    }
    found: Examples[SpanExample] = Examples()
    readers.add_question(found, text(row, ("context",), where), question, task, language)
    return found


def _hub_sentence(row: Mapping[str, Any], task: Task, where: str, names: tuple[str, ...]) -> TaggedExample:
    words = pick(row, ("tokens",), where)
    given = pick(row, ("ner_tags", "pos_tags"), where)
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise DataFileError(f"{where}: tokens {words!r}; expected a list of words")
    if given is None:  # withheld
        return TaggedExample(where, tuple(words), None)
    tags = tuple(names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag for tag in given)
    if len(words) != len(tags) or not set(tags) <= set(task.labels):
        raise DataFileError(
            f"{where}: {len(words)} words, tags {tags}; expected one each, accepted: {', '.join(task.labels)}"
        )
    return TaggedExample(where, tuple(words), tags)
