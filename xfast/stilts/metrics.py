"""The benchmarks' metrics, exactly as their official scripts compute them. All scores are percentages.

Sources: XTREME's ``evaluate.py`` and its copies of the SQuAD v1.1 and MLQA scripts; seqeval 0.0.12, which XTREME used.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

from xfast.errors import InvalidInputError

Scores = dict[str, float]


def _same_length(gold: Sequence[object], predicted: Sequence[object]) -> None:
    if len(gold) != len(predicted):
        raise InvalidInputError(f"predictions: {len(predicted)} for {len(gold)} examples")


def _f1(correct: float, predicted: int, gold: int) -> Scores:
    precision = correct / predicted if predicted else 0.0
    recall = correct / gold if gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"f1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall}


def accuracy(gold: Sequence[object], predicted: Sequence[object]) -> Scores:
    """Percentage of equal pairs.

    Raises:
        InvalidInputError: the lengths differ, or there is nothing to score.
    """
    _same_length(gold, predicted)
    if not gold:
        raise InvalidInputError("gold: no examples")
    return {"accuracy": 100 * sum(map(_equal, gold, predicted)) / len(gold)}


def _equal(a: object, b: object) -> bool:
    return a == b


def accuracy_f1(gold: Sequence[str], predicted: Sequence[str], positive: str = "1") -> Scores:
    """QQP's metric: accuracy, F1 of the positive class, and their mean as ``accuracy_f1``."""
    scores = accuracy(gold, predicted)
    correct = sum(g == p == positive for g, p in zip(gold, predicted, strict=True))
    f1 = _f1(correct, list(predicted).count(positive), list(gold).count(positive))["f1"]
    return {**scores, "f1": f1, "accuracy_f1": (scores["accuracy"] + f1) / 2}


# --- tagging --------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Tags ``first`` to ``last`` of one type, positions counted over all sentences with a gap between two."""

    type: str
    first: int
    last: int


def chunks(sentences: Iterable[Sequence[str]]) -> set[Chunk]:
    """The chunks that seqeval 0.0.12 sees, whatever the tags are.

    A tag's prefix is its *first letter*, its type everything after its *last hyphen*. For BIO tags that is what it
    seems. On bare part-of-speech tags, which XTREME scores with it, a run of one tag is one chunk, and tags that begin
    with S (SCONJ, SYM) are single-token chunks. Later versions cut the first letter off the type, so that CCONJ and
    SCONJ become one.
    """
    found: set[Chunk] = set()
    start = 0
    previous, previous_type = "O", ""
    for position, tag in enumerate(_flattened(sentences)):
        prefix, kind = tag[:1], tag.split("-")[-1]
        if _ends(previous, prefix, previous_type, kind):
            found.add(Chunk(previous_type, start, position - 1))
        if _starts(previous, prefix, previous_type, kind):
            start = position
        previous, previous_type = prefix, kind
    return found


def _flattened(sentences: Iterable[Sequence[str]]) -> Iterator[str]:
    for sentence in sentences:
        yield from sentence
        yield "O"


def _ends(previous: str, prefix: str, previous_type: str, kind: str) -> bool:
    if previous in ("E", "S"):
        return True
    if previous in ("B", "I") and prefix in ("B", "S", "O"):
        return True
    return previous not in ("O", ".") and previous_type != kind


def _starts(previous: str, prefix: str, previous_type: str, kind: str) -> bool:
    if prefix in ("B", "S"):
        return True
    if previous in ("E", "S", "O") and prefix in ("E", "I"):
        return True
    return prefix not in ("O", ".") and previous_type != kind


def tag_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Scores:
    """Micro-averaged F1 of chunks (PANX, UD-POS) and ``token_accuracy`` beside it.

    Raises:
        InvalidInputError: the numbers of sentences differ, or the lengths of two sentences, or there is no word.
    """
    _same_length(gold, predicted)
    if not any(gold):
        raise InvalidInputError("gold: no words")
    for index, (a, b) in enumerate(zip(gold, predicted, strict=True)):
        if len(a) != len(b):
            raise InvalidInputError(f"predictions: sentence {index + 1} has {len(b)} tags for {len(a)} words")
    right, guessed = chunks(gold), chunks(predicted)
    tokens = [(a, b) for x, y in zip(gold, predicted, strict=True) for a, b in zip(x, y, strict=True)]
    share = 100 * sum(a == b for a, b in tokens) / len(tokens)
    return {**_f1(len(right & guessed), len(guessed), len(right)), "token_accuracy": share}


# --- question answering ---------------------------------------------------------------------------

_ASCII_PUNCTUATION = frozenset(string.punctuation)
_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MLQA_ARTICLES = {
    "en": _ENGLISH_ARTICLES,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "ar": re.compile(r"\sال^|ال"),
    "hi": None,
    "zh": None,
}
_CHINESE = re.compile(r"[\u4e00-\u9fa5]")


def normalize_squad(text: str) -> str:
    """SQuAD v1.1's normal form, which XQuAD and TyDiQA use in *every* language: English rules and ASCII punctuation."""
    text = "".join(character for character in text.lower() if character not in _ASCII_PUNCTUATION)
    return " ".join(_ENGLISH_ARTICLES.sub(" ", text).split())


@cache
def _punctuation() -> frozenset[str]:
    unicode = {chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")}
    return frozenset(unicode | _ASCII_PUNCTUATION)


def normalize_mlqa(text: str, language: str) -> str:
    """MLQA's normal form: all of Unicode's punctuation, the language's own articles; each Chinese character is a word.

    Raises:
        InvalidInputError: MLQA has no such language.
    """
    if language not in _MLQA_ARTICLES:
        raise InvalidInputError(f"language: {language!r}; MLQA has {', '.join(_MLQA_ARTICLES)}")
    text = "".join(character for character in text.lower() if character not in _punctuation())
    articles = _MLQA_ARTICLES[language]
    if articles is not None:
        text = articles.sub(" ", text)
    if language == "zh":
        text = _CHINESE.sub(r" \g<0> ", text)
    return " ".join(text.split())


def _overlap_f1(gold: str, predicted: str) -> float:
    a, b = gold.split(), predicted.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def answer_scores(gold: Sequence[str], predicted: str, normalize: Callable[[str], str]) -> tuple[float, float]:
    """(exact match, F1) of one answer, each 0 to 1 and the best over the references."""
    guess = normalize(predicted)
    references = [normalize(text) for text in gold]
    return max(float(r == guess) for r in references), max(_overlap_f1(r, guess) for r in references)


def squad(gold: Mapping[str, Sequence[str]], predicted: Mapping[str, str]) -> Scores:
    """Exact match and F1 by SQuAD v1.1's script, ``squad`` their mean. An unanswered question scores 0.

    Args:
        gold: the accepted answers by question id.
        predicted: the answer by question id.

    Raises:
        InvalidInputError: a question has no accepted answer (the gold is withheld), or there is no question.
    """
    return _qa(gold, predicted, normalize_squad, "squad")


def mlqa(gold: Mapping[str, Sequence[str]], predicted: Mapping[str, str], language: str) -> Scores:
    """Exact match and F1 by MLQA's script for the language of the *context*, ``mlqa`` their mean."""
    return _qa(gold, predicted, lambda text: normalize_mlqa(text, language), "mlqa")


def _qa(
    gold: Mapping[str, Sequence[str]], predicted: Mapping[str, str], normalize: Callable[[str], str], name: str
) -> Scores:
    if not gold:
        raise InvalidInputError("gold: no questions")
    exact = f1 = 0.0
    for identity, answers in gold.items():
        if not any(answers):  # XTREME blanks withheld answers, and empty predictions would match those
            raise InvalidInputError(f"gold: question {identity} has no answer; is the gold withheld?")
        if identity in predicted:
            both = answer_scores(answers, predicted[identity], normalize)
            exact, f1 = exact + both[0], f1 + both[1]
    em, f1 = 100 * exact / len(gold), 100 * f1 / len(gold)
    return {"exact_match": em, "f1": f1, name: (em + f1) / 2}


def squad_v2(gold: Mapping[str, Sequence[str]], predicted: Mapping[str, str], no_answer: Mapping[str, float]) -> Scores:
    """SQuAD v2.0's best exact match and best F1 over all thresholds on the no-answer score, ``squad_v2`` their mean.

    Args:
        gold: accepted answers by question id; none where the question has no answer.
        predicted: the best *non-empty* answer by question id; a question without one is left unanswered.
        no_answer: how much better "no answer" is than it; where this exceeds the threshold, the question is left
            unanswered.

    Raises:
        InvalidInputError: there is no question, or a prediction without its no-answer score.
    """
    if not gold:
        raise InvalidInputError("gold: no questions")
    if lacking := [identity for identity in gold if identity in predicted and identity not in no_answer]:
        raise InvalidInputError(f"no_answer: no score of question {lacking[0]}")
    exact, f1 = {}, {}
    for identity, answers in gold.items():
        references = [text for text in answers if normalize_squad(text)] or [""]
        exact[identity], f1[identity] = answer_scores(references, predicted.get(identity, ""), normalize_squad)
        if exact[identity]:  # v2.0's F1 of two texts without words is 1, v1.1's is 0
            f1[identity] = 1.0
    answerable = {identity for identity, answers in gold.items() if answers}
    best_em, em_threshold = _best_threshold(exact, predicted, no_answer, answerable)
    best_f1, f1_threshold = _best_threshold(f1, predicted, no_answer, answerable)
    return {
        "best_exact": best_em,
        "best_f1": best_f1,
        "best_exact_threshold": em_threshold,
        "best_f1_threshold": f1_threshold,
        "squad_v2": (best_em + best_f1) / 2,
    }


def _best_threshold(
    scores: Mapping[str, float],
    predicted: Mapping[str, str],
    no_answer: Mapping[str, float],
    answerable: Collection[str],
) -> tuple[float, float]:
    # From "answer nothing" upwards: each question that comes to be answered changes the total by its score, or by -1
    # where it has no answer and the prediction gives one. Questions of one no-answer score come together, as no
    # threshold parts them (the official script passes them one by one, so that there the order of ties counts).
    def score_of(identity: str) -> float:
        return no_answer[identity]

    given = sorted((identity for identity in scores if identity in predicted), key=score_of)
    current = best = float(len(scores) - len(answerable))
    threshold = 0.0 if not given or no_answer[given[0]] > 0 else no_answer[given[0]] - 1  # answers nothing
    for value, group in groupby(given, key=score_of):
        for identity in group:
            guess = -1.0 if predicted[identity] else 0.0
            current += scores[identity] if identity in answerable else guess
        if current > best:
            best, threshold = current, value
    return 100 * best / len(scores), threshold


# --- retrieval ------------------------------------------------------------------------------------


def bucc_f1(gold: Collection[tuple[str, str]], predicted: Collection[tuple[str, str]]) -> Scores:
    """F1 of the set of mined id pairs.

    Raises:
        InvalidInputError: there is no gold pair.
    """
    if not gold:
        raise InvalidInputError("gold: no pairs")
    right, guessed = set(gold), set(predicted)
    return _f1(len(right & guessed), len(guessed), len(right))


def average_precision(gold: Collection[str], ranked: Sequence[str]) -> float:
    """Average precision of the first 20 of a ranking, 0 to 1; the divisor is min(number of gold items, 20)."""
    if not gold:
        raise InvalidInputError("gold: a query without a right answer")
    gold = set(gold)  # an answer counts once, also where a file names it twice
    hits, total, seen = 0, 0.0, set()
    for rank, item in enumerate(ranked[:20], start=1):
        if item in gold and item not in seen:
            hits += 1
            total += hits / rank
        seen.add(item)
    return total / min(len(gold), 20)


def map_20(gold: Mapping[str, Collection[str]], predicted: Mapping[str, Sequence[str]]) -> Scores:
    """Mean average precision at 20 (LAReQA; Mewsli-X, whose one gold entity makes it the mean reciprocal rank).

    A query without predictions scores 0.
    """
    if not gold:
        raise InvalidInputError("gold: no queries")
    values = [average_precision(answers, predicted.get(query, ())) for query, answers in gold.items()]
    return {"map@20": 100 * sum(values) / len(values)}
