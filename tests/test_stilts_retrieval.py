"""Nearest neighbours, bitext mining, thresholds and rankings against brute force in plain Python."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import xfast
from xfast.errors import BackendUnavailableError, InvalidInputError, InvalidOptionError
from xfast.stilts import metrics
from xfast.stilts.retrieval import (
    AMBIGUOUS,
    Candidate,
    apply_threshold,
    best_threshold,
    bucc_pairs,
    mine,
    nearest,
    rank,
)
from xfast.stilts.retrieval_data import Sentences, bucc, tatoeba


@pytest.fixture
def faiss() -> ModuleType:
    """One thread: the machine's other cores belong to other tests."""
    module = pytest.importorskip("faiss")
    module.omp_set_num_threads(1)
    return module


needs_faiss = pytest.mark.usefixtures("faiss")


def made_up(rng: np.random.Generator, rows: int, width: int = 24) -> np.ndarray:
    return rng.standard_normal((rows, width)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = [float(v) for v in a], [float(v) for v in b]
    length = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return sum(v * w for v, w in zip(x, y, strict=True)) / length if length else 0.0


def brute_nearest(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[list[list[float]], list[list[int]]]:
    similarities, indices = [], []
    for query in queries:
        row = [cosine(query, candidate) for candidate in candidates]
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        similarities.append([row[i] for i in best])
        indices.append(best)
    return similarities, indices


# --- nearest --------------------------------------------------------------------------------------


@needs_faiss
@pytest.mark.parametrize(("queries", "candidates", "k"), [(1, 1, 1), (1, 1, 7), (3, 2, 4), (19, 31, 5), (40, 67, 20)])
def test_nearest_is_brute_force(rng: np.random.Generator, queries: int, candidates: int, k: int) -> None:
    x, y = made_up(rng, queries), made_up(rng, candidates)
    similarities, indices = nearest(x, y, k)
    expected_similarities, expected_indices = brute_nearest(x, y, k)
    assert indices.dtype == np.int64 and similarities.dtype == np.float32
    assert indices.tolist() == expected_indices
    np.testing.assert_allclose(similarities, expected_similarities, atol=1e-6)


@needs_faiss
def test_nearest_of_many_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = made_up(rng, 23), made_up(rng, 57)
    expected = nearest(x, y, 3)
    monkeypatch.setattr("xfast.stilts.retrieval._BLOCK", 5)
    for found, wanted in zip(nearest(x, y, 3), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@needs_faiss
@pytest.mark.parametrize("seed", range(6))
def test_ties_come_by_row(seed: int) -> None:
    # Vectors of ±1: similarities are exact, and most of them tie.
    rng = np.random.default_rng(seed)
    x, y = (rng.choice([-1.0, 1.0], (rows, 4)).astype(np.float32) for rows in (50, 200))
    products = (x @ y.T).astype(int)
    for k in (1, 4, 20, 150, 200, 300):
        similarities, indices = nearest(x, y, k)
        wanted = np.argsort(-products, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(indices, wanted)
        np.testing.assert_array_equal(similarities, np.take_along_axis(products, wanted, 1) / 4)


@needs_faiss
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_rows_tie_wherever_they_are(rng: np.random.Generator, faiss: ModuleType, threads: int) -> None:
    # 40 different rows among 3,000: a matrix product may round equal rows differently.
    faiss.omp_set_num_threads(threads)
    base = made_up(rng, 40, 96)
    kind = rng.integers(0, len(base), 3000)
    x = made_up(rng, 64, 96)
    order = brute_nearest(x, base, len(base))[1]
    _, indices = nearest(x, base[kind], 100)
    rows_of = [np.flatnonzero(kind == i) for i in range(len(base))]
    for row, best in zip(indices, order, strict=True):
        np.testing.assert_array_equal(row, np.concatenate([rows_of[i] for i in best])[:100])


@needs_faiss
def test_collapsed_embeddings(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xfast.stilts.retrieval._DENSE", 700)  # two rows at a time
    x = np.broadcast_to(made_up(rng, 1), (300, 24)) * rng.uniform(0.5, 2, (300, 1)).astype(np.float32)
    similarities, indices = nearest(x[:9], np.repeat(x[:1], 300, axis=0), 5)
    assert indices.tolist() == [list(range(5))] * 9
    np.testing.assert_allclose(similarities, 1, atol=1e-6)


@needs_faiss
def test_zeros_are_similar_to_nothing(rng: np.random.Generator) -> None:
    x, y = made_up(rng, 3), made_up(rng, 30)
    x[1], y[4] = 0, 0
    similarities, indices = nearest(x, y, 30)
    assert indices[1].tolist() == list(range(30)) and not similarities[1].any()
    assert similarities[0][indices[0] == 4] == [0.0]


@needs_faiss
@pytest.mark.parametrize(
    "scale", [np.float32(1e-44), np.float32(3e38), np.float64(1e-300), np.float64(1e300)], ids=lambda scale: str(scale)
)
def test_length_does_not_matter(rng: np.random.Generator, scale: np.floating) -> None:
    x, y = np.sign(made_up(rng, 6)), made_up(rng, 9)
    expected = nearest(x, y, 3)
    for found, wanted in zip(nearest(x * scale, y, 3), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@needs_faiss
def test_arguments_are_left_alone_and_may_be_strided(rng: np.random.Generator) -> None:
    x, y = made_up(rng, 12), made_up(rng, 15)
    expected = nearest(x, y, 4)
    wide = np.repeat(x, 2, axis=1)
    kept = wide.copy(), y.copy()
    wide.flags.writeable = y.flags.writeable = False
    for a, b in [(wide[:, ::2], y), (np.asfortranarray(x), y.astype(np.float64))]:
        for found, wanted in zip(nearest(a, b, 4), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(wide, kept[0])
    np.testing.assert_array_equal(y, kept[1])
    assert nearest(x.astype(np.float16), y.astype(np.float16), 4)[1].shape == (12, 4)


@needs_faiss
@pytest.mark.parametrize("k", [0, -1, 2.0, True, None])
def test_k_is_a_positive_whole_number(rng: np.random.Generator, k: object) -> None:
    with pytest.raises(InvalidOptionError, match="k: "):
        nearest(made_up(rng, 2), made_up(rng, 2), k)  # type: ignore[arg-type]


@needs_faiss
def test_bad_arrays_are_named(rng: np.random.Generator) -> None:
    good, nan, infinite = made_up(rng, 5), made_up(rng, 5), made_up(rng, 5)
    nan[3, 1], infinite[2, 0] = np.nan, np.inf
    bad = {
        "float array": [good[0], good[None], good.astype(int), good.tolist(), None],
        "at least one": [good[:0], good[:, :0]],
        "row 3": [nan],
        "row 2": [infinite],
    }
    for message, arrays in bad.items():
        for array in arrays:
            with pytest.raises(InvalidInputError, match=f"candidates: .*{message}"):
                nearest(good, array, 1)
            with pytest.raises(InvalidInputError, match=f"queries: .*{message}"):
                nearest(array, good, 1)
    with pytest.raises(InvalidInputError, match="hidden sizes 24 and 23"):
        nearest(good, good[:, 1:], 1)
    with pytest.raises(InvalidInputError, match="candidate_ids: 1 for 5"):
        rank(good, good, ["a"])
    with pytest.raises(InvalidInputError, match="source_texts: 1 for 5"):
        mine(good, good, ["a"], list("abcde"))
    with pytest.raises(InvalidInputError, match=r"target: .*row 3"):
        mine(good, nan, list("abcde"), list("abcde"))
    with pytest.raises(InvalidInputError, match=r"source: .*at least one"):
        mine(good[:0], good, [], list("abcde"))


def test_missing_faiss_is_said(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BackendUnavailableError, match="pip install faiss-cpu") as caught:
        nearest(made_up(rng, 2), made_up(rng, 2), 1)
    assert isinstance(caught.value, xfast.XfastError)


@needs_faiss
def test_rank(rng: np.random.Generator) -> None:
    x, y = made_up(rng, 7), made_up(rng, 33)
    ids = [f"Q{i}" for i in range(33)]
    expected = brute_nearest(x, y, 20)[1]
    assert rank(x, y, ids) == [[ids[i] for i in row] for row in expected]
    assert rank(x, y[:3], ids[:3], 5) == [[ids[i] for i in row] for row in brute_nearest(x, y[:3], 3)[1]]


# --- Tatoeba --------------------------------------------------------------------------------------


@needs_faiss
@pytest.mark.parametrize("noise", [0.0, 2.0, 4.0])
def test_tatoeba_accuracy(rng: np.random.Generator, noise: float) -> None:
    gold = rng.permutation(90).tolist()
    foreign = made_up(rng, 90)
    english = foreign[gold] + noise * made_up(rng, 90)
    predicted = nearest(english, foreign, 1)[1][:, 0].tolist()
    assert predicted == [row[0] for row in brute_nearest(english, foreign, 1)[1]]
    accuracy = metrics.accuracy(gold, predicted)["accuracy"]
    assert (accuracy == 100) is (noise == 0)


@needs_faiss
def test_tatoeba_is_the_nearest_by_l2(rng: np.random.Generator, faiss: ModuleType) -> None:
    # XTREME's search: an L2 index of normalised foreign embeddings, asked for the English ones.
    foreign, english = made_up(rng, 300, 64), made_up(rng, 300, 64)
    index = faiss.IndexFlatL2(64)
    index.add(foreign / np.linalg.norm(foreign, axis=1, keepdims=True))
    expected = index.search(english / np.linalg.norm(english, axis=1, keepdims=True), 1)[1][:, 0]
    assert nearest(english, foreign, 1)[1][:, 0].tolist() == expected.tolist()


@needs_faiss
@pytest.mark.parametrize("language", ["jv", "te", "ta"])
def test_tatoeba_with_the_real_labels(data_dir: Path, rng: np.random.Generator, language: str) -> None:
    data = tatoeba(data_dir / "xtreme", language)
    assert data.gold is not None
    foreign = made_up(rng, len(data.foreign), 32)
    predicted = nearest(foreign[list(data.gold)], foreign, 1)[1][:, 0].tolist()
    assert metrics.accuracy(data.gold, predicted) == {"accuracy": 100.0}


# --- mining ---------------------------------------------------------------------------------------


def brute_mine(
    x: np.ndarray, y: np.ndarray, x_texts: list[str], y_texts: list[str], k: int
) -> list[tuple[float, str, str]]:
    """(score, source text, target text), O(S * T) in plain Python."""
    a, b = dict(zip(x_texts, x, strict=True)), dict(zip(y_texts, y, strict=True))  # the last of equal texts
    cosines = {(s, t): cosine(a[s], b[t]) for s in a for t in b}
    ahead = {s: sorted(b, key=lambda t: -cosines[s, t])[:k] for s in a}
    back = {t: sorted(a, key=lambda s: -cosines[s, t])[:k] for t in b}
    mean_ahead = {s: sum(cosines[s, t] for t in near) / len(near) for s, near in ahead.items()}
    mean_back = {t: sum(cosines[s, t] for s in near) / len(near) for t, near in back.items()}

    def margin(s: str, t: str) -> float:
        return cosines[s, t] / ((mean_ahead[s] + mean_back[t]) / 2)

    proposals = [max((margin(s, t), s, t) for t in near) for s, near in ahead.items()]
    proposals += [max((margin(s, t), s, t) for s in near) for t, near in back.items()]
    pairs, used_x, used_y = [], set(), set()
    for score, s, t in sorted(proposals, key=lambda proposal: -proposal[0]):
        if s not in used_x and t not in used_y:
            used_x.add(s)
            used_y.add(t)
            if score > 0:
                pairs.append((score, s, t))
    return pairs


@needs_faiss
@pytest.mark.parametrize("seed", range(8))
def test_mine_is_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 45, 2)
    k = int(rng.integers(1, 7))
    common = made_up(rng, 60, 12) + 1
    x, y = (common[rng.permutation(60)[:size]] + 0.3 * made_up(rng, size, 12) for size in sizes)
    # Texts repeat now and then, also the empty one: of theirs the last embedding counts.
    x_texts, y_texts = ([("" if i % 9 == 0 else f"{side}{i}") for i in rng.integers(0, 40, size)] for side, size in
                        zip("xy", sizes, strict=True))  # fmt: skip
    found = mine(x, y, x_texts, y_texts, k)
    expected = brute_mine(x, y, x_texts, y_texts, k)
    assert [(x_texts[c.source_index], y_texts[c.target_index]) for c in found] == [pair[1:] for pair in expected]
    np.testing.assert_allclose([c.score for c in found], [pair[0] for pair in expected], rtol=1e-5)
    assert all(x_texts.index(x_texts[c.source_index]) == c.source_index for c in found)
    assert all(y_texts.index(y_texts[c.target_index]) == c.target_index for c in found)


@needs_faiss
def test_mine_takes_the_last_of_equal_texts() -> None:
    x = np.eye(4, dtype=np.float32)[[0, 1, 2]]
    y = np.eye(4, dtype=np.float32)[[2, 1]]
    found = mine(x, y, ["a", "b", "a"], ["u", "v"], k=1)
    assert found == [Candidate(1.0, 0, 0), Candidate(1.0, 1, 1)]


@needs_faiss
def test_mine_of_one_sentence_and_of_zeros() -> None:
    one = np.ones((1, 3), np.float32)
    assert mine(one, one, ["a"], ["b"]) == [Candidate(1.0, 0, 0)]
    assert mine(0 * one, one, ["a"], ["b"]) == []
    assert mine(0 * one, 0 * one, ["a"], ["b"]) == []


@needs_faiss
def test_mine_is_the_same_every_time_with_ties() -> None:
    ones = np.ones((30, 8), np.float32)
    names = [str(i) for i in range(30)]
    found = mine(ones, ones, names, names)
    # All scores are 1, and every sentence's best is the first of the other side.
    assert found[0] == Candidate(1.0, 0, 0) and len(found) == 1


@needs_faiss
@pytest.mark.parametrize(("noise", "size"), [(0.0, 200), (0.9, 120), (1.3, 120)])
def test_mining_end_to_end(rng: np.random.Generator, noise: float, size: int) -> None:
    gold_size = size // 4
    x, y = made_up(rng, size, 32) + 0.5, made_up(rng, size + 40, 32) + 0.5
    rows = rng.permutation(size + 40)[:gold_size]
    y[rows] = x[:gold_size] + noise * made_up(rng, gold_size, 32)
    source = Sentences(tuple(f"zh-{i}" for i in range(len(x))), tuple(f"字{i}" for i in range(len(x))))
    target = Sentences(tuple(f"en-{i}" for i in range(len(y))), tuple(f"word {i}" for i in range(len(y))))
    gold = {(f"zh-{i}", f"en-{j}") for i, j in enumerate(rows)}

    scores = bucc_pairs(mine(x, y, source.texts, target.texts), source, target)
    f1 = metrics.bucc_f1(gold, apply_threshold(scores, best_threshold(scores, gold)))["f1"]

    mined = brute_mine(x, y, list(source.texts), list(target.texts), 4)
    right = [(s.replace("字", "zh-"), t.replace("word ", "en-")) in gold for _, s, t in mined]
    best = max(2 * sum(right[: n + 1]) / (n + 1 + len(gold)) for n in range(len(right)))
    assert f1 == pytest.approx(100 * best)
    assert (f1 == 100) is (noise == 0)


@needs_faiss
def test_mining_bucc(data_dir: Path, rng: np.random.Generator) -> None:
    data = bucc(data_dir / "xtreme", "zh", "dev")
    assert data.gold
    x, y = made_up(rng, len(data.source), 32), made_up(rng, len(data.target), 32)
    row = {identity: i for i, identity in enumerate(data.target.ids)}
    other = dict(data.gold)
    for i, identity in enumerate(data.source.ids):
        if identity in other:
            y[row[other[identity]]] = x[i]
    skipped: Counter[str] = Counter()
    scores = bucc_pairs(mine(x, y, data.source.texts, data.target.texts), data.source, data.target, skipped)
    assert 0 < skipped[AMBIGUOUS] < 20 and len(scores) > 2000
    assert metrics.bucc_f1(data.gold, apply_threshold(scores, best_threshold(scores, data.gold)))["f1"] == 100


def test_ambiguous_texts_name_no_sentence() -> None:
    source = Sentences(("s0", "s1", "s2", "s3"), ("a", "b", " a ", ""))
    target = Sentences(("t0", "t1", "t2"), ("u", "v", "v\u3000"))
    candidates = [Candidate(4.0, 0, 0), Candidate(3.0, 1, 1), Candidate(2.0, 1, 0), Candidate(1.0, 3, 0)]
    skipped: Counter[str] = Counter()
    assert bucc_pairs(candidates, source, target, skipped) == {("s1", "t0"): 2.0, ("s3", "t0"): 1.0}
    assert skipped == {AMBIGUOUS: 2}
    assert bucc_pairs([Candidate(1.0, 1, 0), Candidate(2.0, 1, 0)], source, target) == {("s1", "t0"): 2.0}
    for bad in (Candidate(1.0, 4, 0), Candidate(1.0, 0, 3), Candidate(1.0, -1, 0)):
        with pytest.raises(InvalidInputError, match="candidates: rows"):
            bucc_pairs([bad], source, target)


# --- threshold ------------------------------------------------------------------------------------


def pairs(*names: str) -> list[tuple[str, str]]:
    return [(name, name.upper()) for name in names]


def test_threshold_lies_in_the_middle() -> None:
    scores = dict(zip(pairs("a", "b", "c", "d"), (1.0, 3.0, 2.0, 0.5), strict=True))
    assert best_threshold(scores, pairs("b", "c")) == 1.5
    assert apply_threshold(scores, 1.5) == set(pairs("b", "c"))
    assert best_threshold(scores, pairs("b")) == 2.5
    assert apply_threshold(scores, 2.0) == set(pairs("b", "c"))


def test_threshold_after_the_last_pair_is_its_score() -> None:
    scores = dict(zip(pairs("a", "b"), (1.5, 1.25), strict=True))
    assert best_threshold(scores, pairs("a", "b")) == 1.25
    assert apply_threshold(scores, 1.25) == set(scores)


def test_threshold_without_a_right_pair_is_zero() -> None:
    scores = dict(zip(pairs("a", "b"), (1.5, 1.25), strict=True))
    assert best_threshold(scores, pairs("c")) == best_threshold(scores, []) == best_threshold({}, pairs("a")) == 0


def test_threshold_of_equal_f1_is_the_highest() -> None:
    scores = dict(zip(pairs("a", "x", "y", "b"), (4.0, 3.0, 2.0, 1.0), strict=True))
    assert best_threshold(scores, pairs("a", "b")) == 3.5  # F1 2/3, as after all four


def test_threshold_takes_equal_scores_together() -> None:
    scores = dict(zip(pairs("a", "b", "c"), (1.0, 1.0, 0.5), strict=True))
    assert best_threshold(scores, pairs("a")) == 0.75
    assert apply_threshold(scores, 0.75) == set(pairs("a", "b"))


def test_threshold_between_neighbouring_floats() -> None:
    scores = dict(zip(pairs("a", "b"), (math.nextafter(1.0, 2.0), 1.0), strict=True))
    assert apply_threshold(scores, best_threshold(scores, pairs("a"))) == set(pairs("a"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_threshold_needs_finite_scores(bad: float) -> None:
    with pytest.raises(InvalidInputError, match=r"scores: .* for a A"):
        best_threshold({("a", "A"): bad, ("b", "B"): 1.0}, [])


@pytest.mark.parametrize("seed", range(30))
def test_no_threshold_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = pairs(*(f"p{i}" for i in range(int(rng.integers(1, 40)))))
    scores = {name: float(score) for name, score in zip(names, rng.integers(1, 30, len(names)) / 8, strict=True)}
    gold = [name for name in names if rng.random() < scores[name] / 4] + pairs("unfound")
    tuned = metrics.bucc_f1(gold, apply_threshold(scores, best_threshold(scores, gold)))["f1"]
    every = [metrics.bucc_f1(gold, apply_threshold(scores, value))["f1"] for value in scores.values()]
    assert tuned == max(every) or not any(every)
