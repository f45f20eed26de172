"""Retrieval over sentence embeddings: nearest neighbours, bitext mining, rankings. Exact, and the same in every run.

Sources: XTREME's ``utils_retrieve.py``, which is LASER's mining code (Artetxe and Schwenk 2019, arXiv 1811.01136), and
its Tatoeba evaluation. The readers of the benchmarks' files are in :mod:`xfast.stilts.retrieval_data`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from xfast.errors import BackendUnavailableError, InvalidInputError, InvalidOptionError
from xfast.stilts.retrieval_data import Sentences

AMBIGUOUS = "a mined pair whose text occurs more than once in its file"

_BLOCK = 4096
"""Rows that are worked on at once."""

_DENSE = 1 << 25
"""Similarities that are held at once (4 bytes each) where a whole row of them is needed."""

_SPARE = 8
"""Neighbours searched for beyond k, so that k of them can be told apart from the rest."""

_NOISE = 1e-5
"""Bound of the rounding error of a float32 inner product of unit vectors of a few thousand dimensions."""


class Candidate(NamedTuple):
    """A mined pair.

    Attributes:
        score: ratio margin, above 0.
        source_index: row of the first source sentence with the pair's text.
        target_index: likewise for the target.
    """

    score: float
    source_index: int
    target_index: int


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise BackendUnavailableError("faiss is not installed: pip install faiss-cpu") from None
    return faiss


# --- nearest neighbours ---------------------------------------------------------------------------


def _unit(embeddings: np.ndarray, name: str, rows: np.ndarray | None = None) -> np.ndarray:
    """L2-normalised float32 copy of the rows (all: None); rows of zeros stay zeros."""
    if not isinstance(embeddings, np.ndarray) or embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        kind = f"{embeddings.dtype} {embeddings.shape}" if isinstance(embeddings, np.ndarray) else type(embeddings)
        raise InvalidInputError(f"{name}: {kind}; expected a float array [rows, hidden size]")
    if not embeddings.size:
        raise InvalidInputError(f"{name}: {embeddings.shape}; expected at least one row and one column")
    rows = np.arange(len(embeddings)) if rows is None else rows
    unit = np.empty((len(rows), embeddings.shape[1]), np.float32)
    for first in range(0, len(rows), _BLOCK):
        numbers = rows[first : first + _BLOCK]
        block = embeddings[numbers].astype(np.float64)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise InvalidInputError(f"{name}: NaN or infinity in row {numbers[~finite][0]}")
        # By the largest value first, so that no square overflows or vanishes.
        largest = np.abs(block).max(axis=1, keepdims=True)
        block /= np.where(largest > 0, largest, 1)
        length = np.sqrt(np.square(block).sum(axis=1, keepdims=True))
        unit[first : first + _BLOCK] = block / np.where(length > 0, length, 1)
    return unit


def _neighbours(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InvalidOptionError(f"k: {value!r}; accepted: whole numbers from 1")
    return int(value)


def _same_width(a: np.ndarray, b: np.ndarray, names: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise InvalidInputError(f"{names}: hidden sizes {a.shape[1]} and {b.shape[1]}; expected the same")


def nearest(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k candidates of the largest cosine similarity to each query, best first.

    The search is exhaustive. Candidates of equal similarity come in the order of their rows, whatever the sizes of the
    arrays or the number of threads. A row of zeros is similar to nothing: 0. The arguments are not changed.

    Args:
        queries: [Q, H] float.
        candidates: [C, H] float.
        k: neighbours wanted; at most C are given.

    Returns:
        Similarities [Q, k] float32 and rows of the candidates [Q, k] int64.

    Raises:
        InvalidInputError: an argument is no two-dimensional float array, is empty, holds NaN or infinity, or the hidden
            sizes differ.
        InvalidOptionError: ``k`` is below 1.
        BackendUnavailableError: faiss is not installed.
    """
    k = _neighbours(k)
    unit_queries, unit_candidates = _unit(queries, "queries"), _unit(candidates, "candidates")
    _same_width(queries, candidates, "queries and candidates")
    return _search(unit_queries, unit_candidates, k)


def _search(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`nearest` of unit rows."""
    faiss = _faiss()
    k = min(k, len(candidates))
    fetched = min(len(candidates), k + _SPARE)
    similarities = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    for first in range(0, len(queries), _BLOCK):
        block = queries[first : first + _BLOCK]
        # What IndexFlatIP does, without its copy of the candidates. Equal similarities come out in no useful order, and
        # of equal rows one may differ from the other in the last bit, by its place in a matrix product. So the
        # similarities are computed anew, each alike, and sorted; where that leaves open whether a candidate that was
        # not fetched is as good as the k-th, all are looked at.
        found, rows = faiss.knn(block, candidates, fetched, metric=faiss.METRIC_INNER_PRODUCT)
        exact = np.empty(rows.shape, np.float32)
        for column in range(fetched):
            exact[:, column] = np.multiply(block, candidates[rows[:, column]], dtype=np.float64).sum(axis=1)
        order = np.lexsort((rows, -exact), axis=-1)[:, :k]
        exact, rows = np.take_along_axis(exact, order, 1), np.take_along_axis(rows, order, 1)
        if fetched < len(candidates):
            open_ = np.flatnonzero(exact[:, -1] - found[:, -1] <= _NOISE)
            if len(open_):
                exact[open_], rows[open_] = _dense_search(block[open_], candidates, k)
        similarities[first : first + _BLOCK], indices[first : first + _BLOCK] = exact, rows
    return similarities, indices


def _dense_search(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`_search` through whole rows of similarities, for queries with more ties than ``_SPARE``."""
    count = len(candidates)
    similarities = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    step = max(1, _DENSE // count)
    for first in range(0, len(queries), step):
        block = queries[first : first + step].astype(np.float64)
        values = np.empty((len(block), count), np.float32)  # rounded, so that equal candidates are equal here
        for start in range(0, count, _BLOCK):
            values[:, start : start + _BLOCK] = block @ candidates[start : start + _BLOCK].T
        for row, line in enumerate(values, start=first):
            kth = np.partition(line, count - k)[count - k]
            above = np.flatnonzero(line > kth)
            chosen = np.concatenate([above, np.flatnonzero(line == kth)[: k - len(above)]])
            chosen = chosen[np.lexsort((chosen, -line[chosen]))]
            similarities[row], indices[row] = line[chosen], chosen
    return similarities, indices


def rank(queries: np.ndarray, candidates: np.ndarray, candidate_ids: Sequence[str], k: int = 20) -> list[list[str]]:
    """The ids of the k candidates nearest to each query, best first (LAReQA, Mewsli-X).

    Args:
        queries: [Q, H] float.
        candidates: [C, H] float.
        candidate_ids: C ids.
        k: length of a ranking; at most C.

    Raises:
        InvalidInputError: as for :func:`nearest`, or the number of ids is not C.
        InvalidOptionError: ``k`` is below 1.
        BackendUnavailableError: faiss is not installed.
    """
    indices = nearest(queries, candidates, k)[1]
    if len(candidate_ids) != len(candidates):
        raise InvalidInputError(f"candidate_ids: {len(candidate_ids)} for {len(candidates)} candidates")
    return [[candidate_ids[index] for index in row] for row in indices]


# --- mining ---------------------------------------------------------------------------------------


def mine(
    source: np.ndarray, target: np.ndarray, source_texts: Sequence[str], target_texts: Sequence[str], k: int = 4
) -> list[Candidate]:
    """Pairs of sentences that may translate each other: XTREME's and LASER's mining by ratio margin, mode ``max``.

    Sentences of equal text count once, with the embedding of the last of them. The score of a pair is its cosine,
    divided by the mean of two means: that of the source sentence's cosines with its k nearest targets, and that of the
    target sentence's with its k nearest sources. Each source sentence proposes the best of its k targets and each
    target sentence the best of its k sources; of these, by descending score, a pair is taken if neither of its
    sentences is yet. Of equal scores the source sentences' proposals come first, in the order of the texts. A score
    whose divisor is 0 is 0.

    Args:
        source: [S, H] float embeddings.
        target: [T, H] float.
        source_texts: S texts.
        target_texts: T texts.
        k: neighbours; at most the number of different texts on the other side count.

    Returns:
        The pairs with a score above 0, best first.

    Raises:
        InvalidInputError: as for :func:`nearest`, or the numbers of texts and embeddings differ.
        InvalidOptionError: ``k`` is below 1.
        BackendUnavailableError: faiss is not installed.
    """
    k = _neighbours(k)
    x, x_rows = _deduplicated(source, source_texts, "source")
    y, y_rows = _deduplicated(target, target_texts, "target")
    _same_width(x, y, "source and target")
    forward_cosines, forward = _search(x, y, k)
    backward_cosines, backward = _search(y, x, k)
    x_mean, y_mean = forward_cosines.mean(axis=1, dtype=np.float64), backward_cosines.mean(axis=1, dtype=np.float64)
    forward_scores, targets = _best(forward_cosines, forward, x_mean, y_mean)
    backward_scores, sources = _best(backward_cosines, backward, y_mean, x_mean)
    scores = np.concatenate([forward_scores, backward_scores])
    proposed_x = np.concatenate([np.arange(len(x)), sources])
    proposed_y = np.concatenate([targets, np.arange(len(y))])

    free_x, free_y = [True] * len(x), [True] * len(y)
    pairs = []
    for index in np.argsort(-scores, kind="stable").tolist():
        score, i, j = float(scores[index]), int(proposed_x[index]), int(proposed_y[index])
        if score <= 0:
            break
        if free_x[i] and free_y[j]:
            free_x[i] = free_y[j] = False
            pairs.append(Candidate(score, x_rows[i], y_rows[j]))
    return pairs


def _deduplicated(embeddings: np.ndarray, texts: Sequence[str], name: str) -> tuple[np.ndarray, list[int]]:
    """Unit embeddings of the different texts, in the order of their first rows, and these rows."""
    if isinstance(embeddings, np.ndarray) and embeddings.ndim and len(texts) != len(embeddings):
        raise InvalidInputError(f"{name}_texts: {len(texts)} for {len(embeddings)} embeddings")
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
        last[text] = row  # keeps the place of the first
    return _unit(embeddings, name, np.fromiter(last.values(), np.int64, len(last))), list(first.values())


def _best(
    cosines: np.ndarray, neighbours: np.ndarray, own_mean: np.ndarray, other_mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score and index of each row's best neighbour: cosines and neighbours [N, k], means [N] and [M]."""
    divisor = (own_mean[:, None] + other_mean[neighbours]) / 2
    scores = np.divide(cosines, divisor, out=np.zeros(cosines.shape), where=divisor != 0)
    rows, columns = np.arange(len(scores)), scores.argmax(axis=1)
    return scores[rows, columns], neighbours[rows, columns]


def bucc_pairs(
    candidates: Sequence[Candidate], source: Sentences, target: Sentences, skipped: Counter[str] | None = None
) -> dict[tuple[str, str], float]:
    """Scores of the mined pairs by (source id, target id).

    As in XTREME, a text that occurs more than once in its file, leading and trailing white space aside, names no
    sentence: its pairs are left out.

    Args:
        candidates: what :func:`mine` found among the two files' sentences.
        source: the sentences that were mined.
        target: likewise.
        skipped: counts the pairs left out, under :data:`AMBIGUOUS`.

    Raises:
        InvalidInputError: a candidate's index is no row of its file.
    """
    source_counts, target_counts = (Counter(text.strip() for text in side.texts) for side in (source, target))
    scores: dict[tuple[str, str], float] = {}
    for score, i, j in candidates:
        if not (0 <= i < len(source) and 0 <= j < len(target)):
            raise InvalidInputError(f"candidates: rows {i} and {j}, of {len(source)} and {len(target)} sentences")
        if source_counts[source.texts[i].strip()] > 1 or target_counts[target.texts[j].strip()] > 1:
            if skipped is not None:
                skipped[AMBIGUOUS] += 1
            continue
        pair = source.ids[i], target.ids[j]
        scores[pair] = max(score, scores.get(pair, score))
    return scores


# --- threshold ------------------------------------------------------------------------------------


def best_threshold(scores: Mapping[tuple[str, str], float], gold: Collection[tuple[str, str]]) -> float:
    """The threshold of the best F1 on these pairs: what XTREME tunes on BUCC's dev set and applies to its test set.

    It lies in the middle between the worst score that is taken and the next one. After the last pair there is no next
    one (XTREME's script fails there): its own score, which is the highest threshold that still takes all. Of equal
    F1 the highest threshold counts. Where XTREME may cut between pairs of equal score, which no threshold can, they are
    taken together.

    Args:
        scores: as :func:`bucc_pairs` gives them.
        gold: the right pairs.

    Returns:
        The threshold; 0 if no pair is right.

    Raises:
        InvalidInputError: a score is NaN or infinite.
    """
    right = frozenset(gold)
    items = sorted(scores.items(), key=lambda item: -item[1])
    if bad := next((item for item in items if not math.isfinite(item[1])), None):
        raise InvalidInputError(f"scores: {bad[1]} for {' '.join(bad[0])}; expected finite numbers")
    correct, best, threshold = 0, 0.0, 0.0
    for taken, (pair, score) in enumerate(items, start=1):
        correct += pair in right
        following = items[taken][1] if taken < len(items) else None
        if not correct or following == score:
            continue
        precision, recall = correct / taken, correct / len(right)
        f1 = 2 * precision * recall / (precision + recall)
        if f1 > best:
            best, threshold = f1, score
            if following is not None:
                middle = (score + following) / 2
                threshold = middle if middle > following else score  # neighbouring floats have no middle
    return threshold


def apply_threshold(scores: Mapping[tuple[str, str], float], threshold: float) -> set[tuple[str, str]]:
    """The pairs whose score is at least the threshold."""
    return {pair for pair, score in scores.items() if score >= threshold}
