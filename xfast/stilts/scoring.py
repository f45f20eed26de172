"""Official scores of a folder of predictions: XTREME's and XTREME-R's tasks, groups and overall figures.

The folders have XTREME's submission layout: ``<task>/test-<language>.tsv`` (``.json`` for question answering and
rankings, ``.jsonl`` for XCOPA), predictions and labels alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from xfast.errors import DataFileError, InvalidInputError, require_one_of
from xfast.stilts import metrics
from xfast.stilts.data import all_zero
from xfast.stilts.folders import find
from xfast.stilts.languages import XTREME, XTREME_R
from xfast.stilts.readers import read_gold
from xfast.stilts.retrieval_data import Mentions
from xfast.stilts.rows import json_rows, lines, load_json, pick
from xfast.stilts.tasks import XTREME_R_TARGETS, XTREME_TARGETS, get

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "xtreme": {
        "classification": ("pawsx", "xnli"),
        "tagging": ("udpos", "panx"),
        "qa": ("xquad", "mlqa", "tydiqa"),
        "retrieval": ("bucc2018", "tatoeba"),
    },
    "xtreme-r": {
        "classification": ("xnli", "xcopa"),
        "tagging": ("udpos", "panx"),
        "qa": ("xquad", "mlqa", "tydiqa"),
        "retrieval": ("tatoeba", "mewslix", "lareqa"),
    },
}
"""Groups by benchmark. XTREME's own script has no LAReQA and puts XCOPA into two groups; here each task counts once."""

TARGETS = {"xtreme": XTREME_TARGETS, "xtreme-r": XTREME_R_TARGETS}
LANGUAGES = {"xtreme": XTREME, "xtreme-r": XTREME_R}


@dataclass(frozen=True)
class Metric:
    """How a target task is read and scored.

    Attributes:
        suffix: of its files.
        read: reader of a prediction or label file.
        score: (gold, predictions, language) to scores in percent.
        main: of those, the ones whose mean is the task's score.
    """

    suffix: str
    read: Callable[[Path, bool], Any]
    score: Callable[[Any, Any, str], metrics.Scores]
    main: tuple[str, ...]


def _read_labels(path: Path, gold: bool) -> list[str]:
    labels = read_gold(path)
    if gold and "" in labels:
        raise DataFileError(f"{path}:{labels.index('') + 1}: no label; is the gold withheld?")
    return labels


def _read_tags(path: Path, gold: bool) -> list[list[str]]:
    # As the official reader: every empty line ends a sentence, also an empty one.
    sentences: list[list[str]] = []
    sentence: list[str] = []
    for _, line in lines(path):
        if line.strip():
            sentence.append(line.strip())
        else:
            sentences.append(sentence)
            sentence = []
    return [*sentences, sentence] if sentence else sentences


def _read_pairs(path: Path, gold: bool) -> set[tuple[str, ...]]:
    pairs = set()
    for number, line in lines(path):
        if line.strip():  # the official reader takes an empty line for a pair, right where both files end with one
            pairs.add(tuple(line.strip().split("\t")))
            if line.strip().count("\t") != 1:
                raise DataFileError(f"{path}:{number}: expected two ids parted by a tab, got {line!r}")
    return pairs


def _read_answers(path: Path, gold: bool) -> Mapping[str, Any]:
    document = load_json(path)
    if not gold:
        return _mapping(document, path, lambda value: isinstance(value, str), "a text")
    articles = document.get("data", document) if isinstance(document, dict) else document
    answers: dict[str, list[str]] = {}
    try:
        for qa in (qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]):
            if str(qa["id"]) in answers:
                raise DataFileError(f"{path}: question {qa['id']} occurs twice")
            answers[str(qa["id"])] = [_text_of(answer) for answer in qa["answers"]]
    except (TypeError, KeyError) as error:
        raise DataFileError(f"{path}: not SQuAD's format: {error!r}") from None
    return answers


def _text_of(answer: Mapping[str, Any]) -> str:
    if not isinstance(answer["text"], str):
        raise TypeError(f"the answer {answer['text']!r} is no text")
    return answer["text"]


def _read_ranking(path: Path, gold: bool) -> Mapping[str, Any]:
    document = _mapping(load_json(path), path, _is_list_of_ids, "a list of ids")
    if gold and (blank := next((name for name, ids in document.items() if "" in ids), None)) is not None:
        raise DataFileError(f"{path}: {blank}: an empty id; is the gold withheld?")
    return document


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _mapping(document: Any, path: Path, accepts: Callable[[Any], bool], expected: str) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise DataFileError(f"{path}: expected a JSON object by id, got {type(document).__name__}")
    for identity, value in document.items():
        if not accepts(value):
            raise DataFileError(f"{path}: {identity}: expected {expected}, got {value!r}")
    return document


def _read_xcopa(path: Path, gold: bool) -> list[str]:
    labels = []
    for number, row in json_rows(path):
        label = str(pick(row, ("label",), f"{path}:{number}"))
        if gold and label not in ("0", "1"):
            raise DataFileError(f"{path}:{number}: label {label}; accepted: 0, 1; is the gold withheld?")
        labels.append(label)
    if gold and all_zero(labels):
        raise DataFileError(f"{path}: every label is 0, which XTREME writes over those that it withholds")
    return labels


def _plain(score: Callable[[Any, Any], metrics.Scores]) -> Callable[[Any, Any, str], metrics.Scores]:
    return lambda gold, predicted, language: score(gold, predicted)


METRICS: dict[str, Metric] = {
    "accuracy": Metric("tsv", _read_labels, _plain(metrics.accuracy), ("accuracy",)),
    "tag_f1": Metric("tsv", _read_tags, _plain(metrics.tag_f1), ("f1",)),
    "bucc_f1": Metric("tsv", _read_pairs, _plain(metrics.bucc_f1), ("f1",)),
    "squad": Metric("json", _read_answers, _plain(metrics.squad), ("exact_match", "f1")),
    "mlqa": Metric("json", _read_answers, metrics.mlqa, ("exact_match", "f1")),
    "map_20": Metric("json", _read_ranking, _plain(metrics.map_20), ("map@20",)),
    "xcopa": Metric("jsonl", _read_xcopa, _plain(metrics.accuracy), ("accuracy",)),
}
"""By :attr:`Task.metric`; XCOPA's files differ from other accuracies'."""


def metric_of(task: str) -> Metric:
    """How the target task of that name is scored."""
    return METRICS["xcopa" if task == "xcopa" else get(task).metric]


UNANSWERED = "queries without a prediction: they score 0"
UNKNOWN = "predictions of ids that the labels do not have: passed over"


def mewslix_gold(folder: Path, mentions: Mentions, split: str, language: str) -> dict[str, frozenset[str]] | None:
    """The entities of mentions: their own, or where those are withheld the ones that label files have.

    These are ``labels/mewslix/{split}-{language}.json`` and, as XTREME-R's preparation leaves them,
    ``mewslix/wikinews_labels/{split}-{language}.json``.

    Returns:
        By query id, as :attr:`Mentions.gold` has them; None where they are withheld.

    Raises:
        DataFileError: a label file is malformed or holds the entities of a part of the mentions.
    """
    ids = mentions.queries.ids
    if all(name in mentions.gold for name in ids):
        return mentions.gold
    for place in ("labels/mewslix", "mewslix/wikinews_labels"):
        path = find(folder, f"{place}/{split}-{language}.json")
        if path is None:
            continue
        labels = _read_ranking(path, False)  # read as gold, blank ids would be an error
        given = {name: frozenset(filter(None, labels.get(name, ()))) for name in ids}
        known = {name: entities for name, entities in given.items() if entities}
        if known and len(known) < len(ids):
            raise DataFileError(f"{path}: the entities of {len(known)} of the {len(ids)} mentions in {language}")
        if known:
            return known
    return None


def score_file(
    task: str, language: str, predictions: Path, labels: Path, notes: Counter[str] | None = None
) -> metrics.Scores:
    """Scores of one file, in percent.

    Args:
        task, language: whose.
        predictions, labels: files.
        notes: counts :data:`UNANSWERED` and :data:`UNKNOWN`, of files that name what they answer.

    Raises:
        DataFileError: a file is missing or malformed, or the two do not fit together.
    """
    metric = metric_of(task)
    gold, predicted = metric.read(labels, True), metric.read(predictions, False)
    try:
        scores = metric.score(gold, predicted, language)
    except InvalidInputError as error:
        raise DataFileError(f"{predictions} against {labels}: {error}") from None
    if isinstance(gold, Mapping):
        if not gold.keys() & predicted.keys():
            raise DataFileError(f"{predictions}: has none of the {len(gold)} ids of {labels}")
        if notes is not None:
            notes[UNANSWERED] += len(gold.keys() - predicted.keys())
            notes[UNKNOWN] += len(predicted.keys() - gold.keys())
    return without_mean(task, scores)


def without_mean(task: str, scores: metrics.Scores) -> metrics.Scores:
    """Without the mean of exact match and F1: the official scripts report no such figure by language."""
    mean = get(task).metric
    return scores if mean in metric_of(task).main else {name: x for name, x in scores.items() if name != mean}


def main_score(metric: Metric, scores: Mapping[str, float]) -> float:
    """The one figure of a language or task: the mean of the main metrics (exact match and F1 for questions)."""
    return fmean(scores[name] for name in metric.main)


def summarize_task(task: str, by_language: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A task's block of the result: its score, the mean of each metric, and both by language."""
    metric = metric_of(task)
    names = list(next(iter(by_language.values())))
    return {
        "score": main_score(metric, {name: fmean(s[name] for s in by_language.values()) for name in metric.main}),
        "languages": {language: main_score(metric, scores) for language, scores in by_language.items()},
        "metrics": {
            name: {
                "average": fmean(scores[name] for scores in by_language.values()),
                "languages": {language: scores[name] for language, scores in by_language.items()},
            }
            for name in names
        },
    }


def aggregate(tasks: Mapping[str, Mapping[str, Any]], benchmark: str) -> dict[str, Any]:
    """The whole result from the tasks' blocks.

    A group's score needs all its tasks, the overall score all of the benchmark's: None otherwise. Both are unweighted
    means over tasks, English included, as the leaderboards have them.
    """

    def mean(names: tuple[str, ...]) -> float | None:
        return fmean(tasks[name]["score"] for name in names) if all(name in tasks for name in names) else None

    return {
        "benchmark": benchmark,
        "overall": mean(TARGETS[benchmark]),
        "groups": {group: mean(names) for group, names in GROUPS[benchmark].items()},
        "tasks": {name: tasks[name] for name in TARGETS[benchmark] if name in tasks},
        "missing_tasks": [name for name in TARGETS[benchmark] if name not in tasks],
    }


def score(
    predictions: Path | str, labels: Path | str, benchmark: str = "xtreme", *, allow_missing: bool = False
) -> dict[str, Any]:
    """Scores of a folder of predictions against a folder of labels, both in XTREME's submission layout.

    Args:
        predictions: ``<task>/test-<language>.<suffix>`` below it.
        labels: likewise.
        benchmark: "xtreme" or "xtreme-r".
        allow_missing: score a task on the languages it has both files for, and list the others; by default a language's
            missing file is an error, as in the official script, because a mean over fewer languages is another figure.

    Returns:
        ``{"overall": x, "groups": {...}, "tasks": {"xnli": {"score": x, "languages": {...}, "metrics": {...}}}}``.
        Tasks that only one of the folders has are listed in ``missing_tasks``; ``notes`` counts, by task and language,
        what has no prediction and predictions of nothing that is asked.

    Raises:
        InvalidOptionError: ``benchmark`` is none.
        DataFileError: a folder or file is missing or malformed.
    """
    require_one_of("benchmark", benchmark, TARGETS)
    predictions, labels = Path(predictions), Path(labels)
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise DataFileError(f"{folder}: no such folder")
    tasks, missing, notes = {}, {}, {}
    for task in TARGETS[benchmark]:
        if (predictions / task).is_dir() and (labels / task).is_dir():
            scores, absent, said = _score_task(task, predictions, labels, benchmark, allow_missing)
            if said:
                notes[task] = said
            if scores:
                tasks[task] = summarize_task(task, scores)
            if absent:
                missing[task] = absent
    if not tasks:
        known = ", ".join(TARGETS[benchmark])
        raise DataFileError(f"{predictions} and {labels} have no task in common; {benchmark} has {known}")
    return {**aggregate(tasks, benchmark), "missing_languages": missing, "notes": notes}


def _score_task(
    task: str, predictions: Path, labels: Path, benchmark: str, allow_missing: bool
) -> tuple[dict[str, metrics.Scores], list[str], dict[str, dict[str, int]]]:
    suffix = metric_of(task).suffix
    scores: dict[str, metrics.Scores] = {}
    notes: dict[str, dict[str, int]] = {}
    absent: list[str] = []
    for language in LANGUAGES[benchmark][task]:
        files = [folder / task / f"test-{language}.{suffix}" for folder in (predictions, labels)]
        if gone := [str(file) for file in files if not file.is_file()]:
            absent.append(language)
            if not allow_missing:
                raise DataFileError(f"{' and '.join(gone)}: missing; allow_missing scores the other languages")
            continue
        counts: Counter[str] = Counter()
        scores[language] = score_file(task, language, files[0], files[1], counts)
        if said := dict(+counts):
            notes[language] = said
    return scores, absent, notes
