"""What a data folder holds, what it lacks, and what in it would make a result wrong.

:func:`diagnose` reads every file that the intermediate and target tasks look for. Faults are collected, not raised:
missing files (with their owner's address), files that do not parse, samples in place of full sets, withheld labels,
and texts that occur in a training set and in a set it is evaluated on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from xfast.errors import DataFileError, require_one_of
from xfast.stilts import readers
from xfast.stilts.data import SPLITS, Source, zeroed
from xfast.stilts.examples import (
    ChoiceExample,
    Examples,
    PairExample,
    SpanExample,
    TaggedExample,
    TextExample,
    unlabelled,
)
from xfast.stilts.languages import ISO3, NAMES, UDPOS_WITHOUT_DEV
from xfast.stilts.retrieval_data import bucc, mewslix_mentions, tatoeba
from xfast.stilts.rows import json_rows
from xfast.stilts.scoring import TARGETS, mewslix_gold
from xfast.stilts.task import BITEXT, MATCHING, SPAN, TAGGING, TARGET, Task
from xfast.stilts.tasks import INTERMEDIATE_TASKS, get

OK, MISSING, WARNING, ERROR = "ok", "missing", "warning", "error"
SEVERITIES = (OK, MISSING, WARNING, ERROR)

UNIFORM_SIZES: dict[tuple[str, str], int] = {
    ("xnli", "dev"): 2_490,
    ("xnli", "test"): 5_010,
    ("pawsx", "dev"): 2_000,
    ("pawsx", "test"): 2_000,
    ("xquad", "test"): 1_190,
    ("xcopa", "dev"): 100,
    ("xcopa", "test"): 500,
    ("tatoeba", "test"): 1_000,
    ("squad_v1", "dev"): 10_570,
    ("lareqa", "dev"): 10_570,
}
"""Examples of every language, but for those in :data:`SIZES`. Training sizes: :attr:`Task.train_size`."""


def _sizes(text: str) -> dict[str, int]:
    """``"en,de:100 fr:7"`` as {"en": 100, "de": 100, "fr": 7}."""
    groups = (group.split(":") for group in text.split())
    return {language: int(size) for languages, size in groups for language in languages.split(",")}


_PANX = _sizes(
    "af,bn,hi,kk,ml,mr,ms,sw,ta,te,tl,ur:1000 jv,my,yo:100 "
    "ar,bg,de,el,en,es,et,eu,fa,fi,fr,he,hu,id,it,ja,ka,ko,nl,pt,ru,th,tr,vi,zh:10000"
)
SIZES: dict[tuple[str, str], dict[str, int]] = {
    ("panx", "dev"): _PANX,
    ("panx", "test"): _PANX,
    ("udpos", "dev"): _sizes("en:3974"),
    ("udpos", "test"): _sizes(
        "af:425 ar:1680 bg:1116 el:456 en:5440 es:3147 et:3760 eu:1799 fa:600 fi:4422 fr:5009 he:491 hi:2684 hu:449 "
        "id:1557 it:3518 ja:2372 kk:1047 ko:4276 mr:47 nl:1471 pt:2681 ru:8976 ta:120 te:146 th:1000 tl:55 tr:4785 "
        "ur:535 vi:800 yo:100 zh:3455"
    ),
    ("tydiqa", "test"): _sizes("ar:921 bn:113 en:440 fi:782 id:565 sw:499 te:669"),
    ("tatoeba", "test"): _sizes("jv:205 ka:746 kk:575 ml:687 sw:390 ta:307 te:234 th:548"),
}
"""Examples of single languages, counted in files that the benchmark's own preparation wrote."""

_WITHHELD = "labels withheld: predictions can be written but not scored here"


@dataclass(frozen=True)
class Finding:
    """One observation.

    Attributes:
        severity: "ok"; "missing": files are not there; "warning": usable, but read the message first; "error": what
            is there cannot be used.
        task: name.
        language: codes parted by spaces; "" where no single language is meant.
        split: "train", "dev" or "test"; "" where none is meant.
        message: a sentence without its full stop.
        owner: where the owner of the data publishes it.
    """

    severity: str
    task: str
    language: str
    split: str
    message: str
    owner: str = ""


@dataclass(frozen=True)
class SplitFound:
    """A split of one language that is there and parses.

    Attributes:
        rows: examples (questions, sentences, pairs); sentences of the other language where the task pairs two.
        labelled: of those, the ones with a label, tags or an answer in the file itself.
    """

    task: str
    split: str
    language: str
    rows: int
    labelled: int


@dataclass(frozen=True)
class Diagnosis:
    """The state of a data folder.

    Attributes:
        folder: that was examined.
        benchmark: "xtreme" or "xtreme-r".
        tasks: names of the tasks examined, in order.
        found: every split of every language that could be read.
        findings: in the order of the tasks; those that differ by nothing but the language are one.
    """

    folder: str
    benchmark: str
    tasks: tuple[str, ...]
    found: tuple[SplitFound, ...]
    findings: tuple[Finding, ...]

    def counts(self) -> dict[str, int]:
        """Number of findings by severity."""
        return {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "counts": self.counts()}


class Row(NamedTuple):
    """A task's line of the overview.

    Attributes:
        splits: those found, parted by spaces.
        languages: "found/expected": those of the test sets of a target task, of the training set of any other.
        rows: examples found, of all splits and languages.
        problems: number of findings by severity, "" where all is well.
    """

    task: str
    splits: str
    languages: str
    rows: int
    problems: str


def table_rows(diagnosis: Diagnosis) -> list[Row]:
    """One row per task, in the order of :attr:`Diagnosis.tasks`. A task of parts has the splits that all parts have."""
    rows = []
    for name in diagnosis.tasks:
        task = get(name)
        members = task.parts or (name,)
        by_member = [[f for f in diagnosis.found if f.task == member] for member in members]
        splits = [s for s in SPLITS if all(any(f.split == s for f in found) for found in by_member)]
        counted = "test" if task.role == TARGET else "train"
        expected = set(_languages(task, counted, diagnosis.benchmark))
        there = [{f.language for f in found if f.split == counted} & expected for found in by_member]
        problems = Counter(f.severity for f in diagnosis.findings if f.task == name and f.severity != OK)
        rows.append(
            Row(
                name,
                " ".join(splits),
                f"{len(set.intersection(*there))}/{len(expected)}",
                sum(f.rows for found in by_member for f in found),
                ", ".join(f"{problems[severity]} {severity}" for severity in SEVERITIES if problems[severity]),
            )
        )
    return rows


def diagnose(data_dir: Path | str, benchmark: str = "xtreme") -> Diagnosis:
    """Examine a data folder: XTREME's download folder, or one that holds it as ``xtreme/`` beside ``intermediate/``.

    Args:
        data_dir: that folder.
        benchmark: "xtreme" or "xtreme-r": whose target tasks and languages are expected.

    Raises:
        InvalidOptionError: ``benchmark`` is neither.
        DataFileError: there is no such folder. Faults of the files in it are findings.
    """
    require_one_of("benchmark", benchmark, TARGETS)
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataFileError(f"{folder}: no such folder")
    examination = _Examination(Source(folder), benchmark)
    tasks = _tasks(benchmark)
    for task in tasks:
        examination.examine(task)
    examination.compare()
    order = {task.name: index for index, task in enumerate(tasks)}
    findings = sorted(_merged(examination.findings), key=lambda finding: order[finding.task])
    return Diagnosis(str(folder), benchmark, tuple(order), tuple(examination.found), tuple(findings))


def _tasks(benchmark: str) -> list[Task]:
    """The intermediate tasks, their parts, what else the targets are trained on, and the targets."""
    intermediate = [get(name) for name in INTERMEDIATE_TASKS]
    targets = [get(name) for name in TARGETS[benchmark]]
    parts = [get(part) for task in intermediate for part in task.parts]
    sources = [get(name) for task in targets for name in task.train_on]
    first = dict.fromkeys(task.name for task in (*intermediate, *parts, *sources) if task.role != TARGET)
    return [get(name) for name in (*first, *(task.name for task in targets))]


def _languages(task: Task, split: str, benchmark: str) -> tuple[str, ...]:
    """The languages whose files a complete folder has: English alone for training and for files that name none."""
    if task.type == BITEXT:
        return task.languages(benchmark)
    if split == "train" or not any("{language}" in path for paths in task.files.get(split, ()) for path in paths):
        return ("en",)
    languages = task.languages(benchmark)
    if task.name == "udpos" and split == "dev":
        return tuple(language for language in languages if language not in UDPOS_WITHOUT_DEV)
    return languages


def _merged(findings: Iterable[Finding]) -> Iterator[Finding]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for f in findings:
        groups.setdefault((f.severity, f.task, f.split, f.message, f.owner), []).append(f.language)
    for (severity, task, split, message, owner), languages in groups.items():
        yield Finding(severity, task, " ".join(dict.fromkeys(languages)), split, message, owner)


def _key(example: Any) -> int | None:
    """Hash of an example's text without regard to case and spacing; equal texts of one type have equal keys."""
    if isinstance(example, PairExample):
        texts: Sequence[str] = (example.first, example.second)
    elif isinstance(example, SpanExample):
        texts = (example.question, example.context)
    elif isinstance(example, ChoiceExample):
        texts = (example.prompt, *example.choices)
    elif isinstance(example, TaggedExample):
        texts = (" ".join(example.words),)
    else:
        return None
    return hash((type(example).__name__, *(" ".join(text.casefold().split()) for text in texts)))


@dataclass
class _Texts:
    """The keys of an English set, one per example."""

    task: Task
    split: str
    paths: tuple[Path, ...]
    keys: list[int]


@dataclass
class _Examination:
    source: Source
    benchmark: str
    findings: list[Finding] = field(default_factory=list)
    found: list[SplitFound] = field(default_factory=list)
    texts: list[_Texts] = field(default_factory=list)

    def say(self, severity: str, task: Task, split: str, language: str, message: str) -> None:
        owner = task.owner if severity == MISSING else ""
        self.findings.append(Finding(severity, task.name, language, split, message, owner))

    def examine(self, task: Task) -> None:
        if task.parts:  # each is examined under its own name
            for split in ("train", "dev"):
                absent = [part for part in task.parts if not self.source.has(get(part), split)]
                what = f"of its parts {', '.join(task.parts)} not there: {', '.join(absent)}"
                self.say(MISSING if absent else OK, task, split, "", what if absent else "all its parts are there")
        splits = {"tatoeba": ("test",), "bucc2018": ("dev", "test")}.get(task.name, tuple(task.files))
        for split in splits:
            self._split(task, split)

    def _split(self, task: Task, split: str) -> None:
        expected = _languages(task, split, self.benchmark)
        named = any("{language}" in name for names in _alternatives(task, split) for name in names)
        # Training sets of other languages are looked at where they are, but not missed.
        others = [x for x in task.languages(self.benchmark) if x not in expected] if named else []
        absent: dict[str, list[str]] = {}
        for language in (*expected, *others):
            try:
                there = self._files(task, split, language)
            except DataFileError as error:
                self.say(ERROR, task, split, language, str(error))
                continue
            if not there and language in expected:
                absent.setdefault(self._lacking(task, split, language), []).append(language)
        for names, languages in absent.items():
            count = f" in {len(languages)} of {len(expected)} languages" if len(expected) > 1 else ""
            self.say(MISSING, task, split, " ".join(languages) if named else "", f"not there{count}: {names}")
        found = [f for f in self.found if (f.task, f.split) == (task.name, split) and f.language in expected]
        if found:
            self._size(task, split, found)
            count = f"{len(found)} of {len(expected)} languages, " if len(expected) > 1 else ""
            self.say(OK, task, split, "", f"{count}{sum(f.rows for f in found):,} rows")

    def _lacking(self, task: Task, split: str, language: str) -> str:
        """The files to look for: of a set of several, those that the others lack."""
        alternatives = _alternatives(task, split)
        for names in alternatives:
            gone = [name for name in names if self.source.find(name.format(language=language)) is None]
            if len(gone) < len(names):
                return " + ".join(gone)
        return " or ".join(" + ".join(names) for names in alternatives)

    def _files(self, task: Task, split: str, language: str) -> bool:
        """Examine the split of one language; False where its files are not there."""
        if task.type == BITEXT:
            return self._tatoeba(task, language) if task.name == "tatoeba" else self._bucc(task, split, language)
        paths = self.source.paths(task, split, language)
        if paths is None:
            return False
        if task.name == "mewslix" and split == "test":
            return self._mewslix(task, paths[0], language)
        examples = Examples.of(_read(path, task, language) for path in paths)
        items = examples.items
        if not items:
            raise DataFileError(f"{', '.join(map(str, paths))}: no examples; was the download interrupted?")
        withheld = 0 if task.type == MATCHING else sum(map(unlabelled, items))
        self.found.append(SplitFound(task.name, split, language, len(items), len(items) - withheld))
        for reason, count in examples.skipped.items():
            self.say(WARNING, task, split, language, f"{count:,} × {reason}")
        if task.name == "tydiqa" and (split, language) == ("train", "en") and len(items) != task.train_size:
            telling = any(NAMES["en"].lower() in example.id.lower() for example in items)
            if not telling:
                self.say(WARNING, task, split, language, "the ids do not tell the language: are all questions English?")
        if language == "en":
            keys = [key for key in map(_key, items) if key is not None]
            self.texts.append(_Texts(task, split, paths, keys))
        self._labels(task, split, language, examples, withheld)
        return True

    def _size(self, task: Task, split: str, found: list[SplitFound]) -> None:
        """Compare the rows with those of the full sets, all languages in one finding."""
        recalled = " (a number that could not be confirmed)" if split == "train" and task.recall else ""
        short: list[tuple[str, int, int]] = []
        long: list[tuple[str, int, int]] = []
        for f in found:
            size = SIZES.get((task.name, split), {}).get(f.language, UNIFORM_SIZES.get((task.name, split), 0))
            size = task.train_size if split == "train" else size
            if size and f.rows != size:
                (short if f.rows < size else long).append((f.language, f.rows, size))
        for those, message in (
            (short, "{:,} of {:,} rows{}: a sample?"),
            (long, "{:,} rows, more than the {:,} expected{}"),
        ):
            if those:
                rows, sizes = sum(row for _, row, _ in those), sum(size for _, _, size in those)
                languages = " ".join(language for language, _, _ in those)
                self.say(WARNING, task, split, languages, message.format(rows, sizes, recalled))

    def _labels(self, task: Task, split: str, language: str, examples: Examples[Any], unlabelled: int) -> None:
        rows = len(examples)
        if 0 < unlabelled < rows or (unlabelled and split == "train"):
            missing = {TAGGING: "tags", SPAN: "answers"}.get(task.type, "label")
            self.say(ERROR, task, split, language, f"{unlabelled:,} of {rows:,} rows lack their {missing}")
            return
        zeros = zeroed(examples, task)
        if not unlabelled and not zeros:
            return
        path = self.source.find(task.gold[split].format(language=language)) if split in task.gold else None
        if path is None:
            self.say(WARNING, task, split, language, f"every label is 0: {_WITHHELD}" if zeros else _WITHHELD)
            return
        if task.type == SPAN:
            answered = {example.id for example in readers.read_squad(path, task, language).items if example.answers}
            lacking = [example.id for example in examples.items if example.id not in answered]
            if lacking:
                raise DataFileError(f"{path}: no answer to {len(lacking):,} questions, as {lacking[0]}")
        else:
            readers.with_gold(examples, path, task)
        self.say(OK, task, split, language, "labels lie apart and fit")

    def _tatoeba(self, task: Task, language: str) -> bool:
        code = ISO3.get(language, language)
        stems = (f"{language}-en", language, "en"), (f"tatoeba.{code}-eng", code, "eng")  # the benchmark's, the owner's
        sides = [[self.source.find(f"tatoeba/{stem}.{side}") for side in both] for stem, *both in stems]
        there = next((pair for pair in sides if pair[0]), [None])  # what is evaluated: the first that has one side
        if self.source.folder is None or None in there:
            return False
        data = tatoeba(self.source.folder, language)
        self.found.append(SplitFound(task.name, "test", language, len(data.foreign), len(data.gold or ())))
        if data.gold is None:
            self.say(WARNING, task, "test", language, _WITHHELD)
        return True

    def _bucc(self, task: Task, split: str, language: str) -> bool:
        sides = [self.source.find(f"bucc2018/{language}-en.{split}.{side}") for side in (language, "en")]
        if self.source.folder is None or None in sides:
            return False
        data = bucc(self.source.folder, language, split)
        self.found.append(SplitFound(task.name, split, language, len(data.source), len(data.gold or ())))
        if data.gold is None:
            self.say(WARNING, task, split, language, _WITHHELD)
        return True

    def _mewslix(self, task: Task, path: Path, language: str) -> bool:
        data = mewslix_mentions(path, language)
        if not data.queries:
            raise DataFileError(f"{path}: no mention in this language; was the download interrupted?")
        gold = None if self.source.folder is None else mewslix_gold(self.source.folder, data, "test", language)
        self.found.append(SplitFound(task.name, "test", language, len(data.queries), len(gold or ())))
        for reason, count in data.skipped.items():
            self.say(WARNING, task, "test", language, f"{count:,} × {reason}")
        if gold is None:
            self.say(WARNING, task, "test", language, _WITHHELD)
        return True

    def compare(self) -> None:
        """Find English texts of a training set again in the sets that models trained on it are evaluated on."""
        training = [(texts, set(texts.keys)) for texts in self.texts if texts.split == "train"]
        for texts in self.texts:
            task = texts.task
            compared: set[tuple[Path, ...]] = {texts.paths}
            for other, seen in sorted(training, key=lambda pair: pair[0].task.name != task.name):  # its own first
                related = task.role == TARGET or other.task.name == task.name
                if texts.split == "train" or not related or other.paths in compared:
                    continue
                if _kind(other.task) == _kind(task) and (count := sum(key in seen for key in texts.keys)):
                    whose = "its own" if other.task.name == task.name else f"{other.task.name}'s"
                    share = f"{count:,} of {len(texts.keys):,} rows are in {whose} training set, too"
                    self.say(WARNING, task, texts.split, "en", share)
                compared.add(other.paths)


def _kind(task: Task) -> str:
    """Tasks of one kind may hold equal texts: questions about a paragraph are matched with it, too."""
    return SPAN if task.type == MATCHING else task.type


def _alternatives(task: Task, split: str) -> tuple[tuple[str, ...], ...]:
    """:attr:`Task.files` of a split, sentence files of bitext included."""
    if task.name == "tatoeba":
        return (("tatoeba/{language}-en.{language}", "tatoeba/{language}-en.en"),)
    if task.name == "bucc2018":
        stem = f"bucc2018/{{language}}-en.{split}"
        return ((f"{stem}.{{language}}", f"{stem}.en"),)
    return task.files[split]


def _read(path: Path, task: Task, language: str) -> Examples[Any]:
    if task.reader == "mewslix":  # a line is a pair; only its form matters here
        return Examples([TextExample(str(number), "") for number, _ in json_rows(path)])
    if task.type == MATCHING:
        return readers.READERS["squad"](path, task, language)
    return readers.READERS[task.reader](path, task, language)
