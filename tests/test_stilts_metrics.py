"""The metrics against values worked out by hand, other packages, and plainer re-derivations."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

import numpy as np
import pytest

from xfast.errors import InvalidInputError
from xfast.stilts import metrics
from xfast.stilts.metrics import Chunk, chunks, normalize_mlqa, normalize_squad

# --- labels ---------------------------------------------------------------------------------------


def test_accuracy_is_the_percentage_of_equal_pairs() -> None:
    assert metrics.accuracy(["a", "b", "c", "a"], ["a", "c", "c", "b"]) == {"accuracy": 50.0}
    assert metrics.accuracy([0, 1, 2], [0, 1, 1])["accuracy"] == pytest.approx(200 / 3, abs=1e-12)


def test_accuracy_and_f1_agree_with_scikit_learn(rng: np.random.Generator) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: nothing to compare with")
    gold, predicted = (rng.choice(["0", "1"], size=301, p=[0.7, 0.3]).tolist() for _ in range(2))
    scores = metrics.accuracy_f1(gold, predicted)
    f1 = 100 * sklearn.f1_score(gold, predicted, pos_label="1")
    assert scores["accuracy"] == pytest.approx(100 * sklearn.accuracy_score(gold, predicted), abs=1e-9)
    assert scores["f1"] == pytest.approx(f1, abs=1e-9)
    assert scores["accuracy_f1"] == pytest.approx((scores["accuracy"] + f1) / 2, abs=1e-9)


def test_f1_is_of_the_positive_class_alone() -> None:
    # One of two positives found, one false alarm: precision and recall 1/2. Three of five labels are right.
    scores = metrics.accuracy_f1(["1", "1", "0", "0", "0"], ["1", "0", "1", "0", "0"])
    assert scores == {"accuracy": 60.0, "f1": 50.0, "accuracy_f1": 55.0}
    assert metrics.accuracy_f1(["0", "0"], ["0", "0"])["f1"] == 0.0  # no positive at all, as in scikit-learn


@pytest.mark.parametrize("score", [metrics.accuracy, metrics.accuracy_f1, metrics.tag_f1])
def test_label_metrics_refuse_unequal_lengths_and_emptiness(score: Callable[..., object]) -> None:
    with pytest.raises(InvalidInputError, match="1 for 2 examples"):
        score([["A"], ["B"]], [["A"]])
    with pytest.raises(InvalidInputError, match="gold: no "):
        score([], [])


# --- chunks of tags -------------------------------------------------------------------------------


def _random_bio(rng: np.random.Generator, length: int) -> list[str]:
    tags: list[str] = []
    while len(tags) < length:
        if rng.random() < 0.5:
            tags.append("O")
        else:
            kind = rng.choice(["PER", "ORG", "LOC"])
            tags += [f"B-{kind}"] + [f"I-{kind}"] * int(rng.integers(0, 3))
    return tags[:length]


def test_span_f1_agrees_with_seqeval_on_bio(rng: np.random.Generator) -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed: nothing to compare with")
    for _ in range(25):
        lengths = rng.integers(1, 12, size=20)
        gold, predicted = ([_random_bio(rng, int(n)) for n in lengths] for _ in range(2))
        # Half of the sentences right, so that the scores are not near 0.
        predicted = [g if rng.random() < 0.5 else p for g, p in zip(gold, predicted, strict=True)]
        scores = metrics.tag_f1(gold, predicted)
        assert scores["f1"] == pytest.approx(100 * seqeval.f1_score(gold, predicted), abs=1e-9)
        assert scores["precision"] == pytest.approx(100 * seqeval.precision_score(gold, predicted), abs=1e-9)
        assert scores["recall"] == pytest.approx(100 * seqeval.recall_score(gold, predicted), abs=1e-9)
        assert scores["token_accuracy"] == pytest.approx(100 * seqeval.accuracy_score(gold, predicted), abs=1e-9)


def test_chunks_of_bio_tags() -> None:
    assert chunks([["O", "B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-ORG"]]) == {
        Chunk("PER", 1, 2),
        Chunk("PER", 3, 3),
        Chunk("LOC", 5, 5),  # I without B opens a chunk
        Chunk("ORG", 6, 6),  # another type opens one, too
    }


def test_a_run_of_one_part_of_speech_is_one_chunk() -> None:
    assert chunks([["NOUN", "NOUN", "VERB", "NOUN"]]) == {
        Chunk("NOUN", 0, 1),
        Chunk("VERB", 2, 2),
        Chunk("NOUN", 3, 3),
    }


def test_tags_that_begin_with_s_are_chunks_of_one_word() -> None:
    assert chunks([["SCONJ", "SCONJ", "SYM"]]) == {
        Chunk("SCONJ", 0, 0),
        Chunk("SCONJ", 1, 1),
        Chunk("SYM", 2, 2),
    }


def test_tags_that_begin_with_i_merge() -> None:
    assert chunks([["ADV", "INTJ", "INTJ"]]) == {Chunk("ADV", 0, 0), Chunk("INTJ", 1, 2)}


def test_cconj_and_sconj_differ() -> None:
    # Later versions of the official package cut the first letter off and see one type.
    scores = metrics.tag_f1([["CCONJ", "NOUN"]], [["SCONJ", "NOUN"]])
    assert scores["f1"] == 50.0 and scores["token_accuracy"] == 50.0


def test_a_sentence_boundary_splits_a_run() -> None:
    assert chunks([["NOUN"], ["NOUN"]]) == {Chunk("NOUN", 0, 0), Chunk("NOUN", 2, 2)}
    assert chunks([["NOUN", "NOUN"]]) == {Chunk("NOUN", 0, 1)}
    assert chunks([["NOUN"], [], ["NOUN"]]) == {Chunk("NOUN", 0, 0), Chunk("NOUN", 3, 3)}


def test_one_wrong_word_costs_the_whole_run() -> None:
    # Gold: chunks N(0-2), V(3). Predicted: N(0-1), V(2-3): nothing matches although 3 of 4 words are right.
    scores = metrics.tag_f1([["NOUN", "NOUN", "NOUN", "VERB"]], [["NOUN", "NOUN", "VERB", "VERB"]])
    assert scores == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "token_accuracy": 75.0}


def test_precision_and_recall_of_chunks() -> None:
    # Gold: PER(0), LOC(2). Predicted: PER(0), ORG(1), LOC(2), PER(3): 2 right of 4 given and of 2 wanted.
    scores = metrics.tag_f1([["B-PER", "O", "B-LOC", "O"]], [["B-PER", "B-ORG", "B-LOC", "B-PER"]])
    assert scores["precision"] == 50.0 and scores["recall"] == 100.0
    assert scores["f1"] == pytest.approx(200 / 3, abs=1e-9)


def test_tag_f1_names_the_sentence_whose_length_differs() -> None:
    with pytest.raises(InvalidInputError, match=r"sentence 2 has 1 tags for 2 words"):
        metrics.tag_f1([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(InvalidInputError, match="no words"):
        metrics.tag_f1([[], []], [[], []])


# --- SQuAD v1.1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("a an the", ""),
        ("Theatre another", "theatre another"),  # articles are whole words
        ("It's", "its"),  # punctuation vanishes and leaves no space
        ("the-end", "theend"),  # so that no article is left to remove
        ("«Москва» – 2014", "«москва» – 2014"),  # only ASCII punctuation goes
        ("北京、上海。", "北京、上海。"),
        ("الكتاب", "الكتاب"),  # no article of another language
        ("İ a\u00a0b", "i̇ b"),
    ],
)
def test_squad_normal_form(text: str, normal: str) -> None:
    assert normalize_squad(text) == normal


def _squad_again(gold: list[str], predicted: str) -> tuple[float, float]:
    """Another derivation: words by regular expressions, overlap by crossing out."""

    def words(text: str) -> list[str]:
        text = re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower())
        return [word for word in re.sub(r"(?<!\w)(?:an?|the)(?!\w)", " ", text).split() if word]

    best = [0.0, 0.0]
    guess = words(predicted)
    for reference in map(words, gold):
        left = list(reference)
        common = 0
        for word in guess:
            if word in left:
                left.remove(word)
                common += 1
        f1 = 0.0
        if common:
            precision, recall = common / len(guess), common / len(reference)
            f1 = 2 * precision * recall / (precision + recall)
        best = [max(best[0], float(reference == guess)), max(best[1], f1)]
    return best[0], best[1]


def test_the_other_derivation_itself() -> None:
    assert _squad_again(["w x y z", "the Q"], "x y q") == (0.0, pytest.approx(4 / 7, abs=1e-12))
    assert _squad_again(["w x y z", "the Q."], "q") == (1.0, 1.0)


def test_squad_agrees_with_another_derivation(rng: np.random.Generator) -> None:
    vocabulary = ["the", "a", "An", "cat", "Cat.", "dog,", "dog", "don't", "—", "über", "1990", "(1990)", "北京"]

    def text() -> str:
        return " ".join(rng.choice(vocabulary, size=int(rng.integers(1, 3))))

    gold = {str(i): [text() for _ in range(int(rng.integers(1, 4)))] for i in range(200)}
    predicted = {str(i): text() for i in range(200) if i % 7}
    pairs = [_squad_again(answers, predicted[i]) for i, answers in gold.items() if i in predicted]
    scores = metrics.squad(gold, predicted)
    assert 5 < scores["exact_match"] < scores["f1"] < 95  # else the comparison would say little
    assert scores["exact_match"] == pytest.approx(100 * sum(em for em, _ in pairs) / 200, abs=1e-9)
    assert scores["f1"] == pytest.approx(100 * sum(f1 for _, f1 in pairs) / 200, abs=1e-9)
    assert scores["squad"] == pytest.approx((scores["exact_match"] + scores["f1"]) / 2, abs=1e-12)


def test_squad_by_hand() -> None:
    gold = {
        "exact": ["Denver Broncos"],
        "article": ["the Broncos"],
        "half": ["Denver Broncos 1990"],  # 1 common word; precision 1/2, recall 1/3, F1 0.4
        "best": ["nothing", "Broncos won"],  # the better reference: precision 1, recall 1/2, F1 2/3
        "missing": ["Denver"],
        "empty": ["Denver"],
        "repeated": ["to to be"],  # 2 of 3 words each way
    }
    predicted = {
        "exact": "denver broncos.",
        "article": "Broncos!",
        "half": "Denver Vikings",
        "best": "Broncos",
        "empty": "",
        "repeated": "to to to",
        "unasked": "not a question of the gold",
    }
    scores = metrics.squad(gold, predicted)
    assert scores["exact_match"] == pytest.approx(100 * 2 / 7, abs=1e-9)
    assert scores["f1"] == pytest.approx(100 * (1 + 1 + 0.4 + 2 / 3 + 0 + 0 + 2 / 3) / 7, abs=1e-9)


def test_an_answer_of_articles_matches_exactly_and_shares_no_word() -> None:
    for guess in ("a", ""):
        assert metrics.squad({"q": ["The"]}, {"q": guess}) == {"exact_match": 100.0, "f1": 0.0, "squad": 50.0}
    assert metrics.squad({"q": ["The"]}, {})["exact_match"] == 0.0


def test_withheld_gold_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="question q2 has no answer"):
        metrics.squad({"q1": ["x"], "q2": []}, {"q1": "x"})
    with pytest.raises(InvalidInputError, match="question q1 has no answer"):  # as XTREME blanks answers
        metrics.squad({"q1": [""]}, {"q1": ""})
    with pytest.raises(InvalidInputError, match="no questions"):
        metrics.squad({}, {})


# --- MLQA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "text", "normal"),
    [
        ("en", "The «Cat» – a dog…", "cat dog"),  # all of Unicode's punctuation
        ("en", "die Katze", "die katze"),
        ("de", "Der Hund, die Katze und ein Haus", "hund katze und haus"),
        ("de", "Dem the derer", "the derer"),
        ("de", "einer eines einem einen eine ein des das den", ""),
        ("es", "¿El gato? unas y LOS", "gato y"),
        ("vi", "Những con mèo của cái là chiếc tôi", "con mèo tôi"),
        ("ar", "الكتاب", "كتاب"),
        ("ar", "في الكتاب؟", "في كتاب"),
        ("ar", "سؤال", "سؤ"),  # the script's regular expression takes every occurrence, also inside words
        ("hi", "यह एक the घर है।", "यह एक the घर है"),
        ("zh", "北京abc市，2008 年", "北 京 abc 市 2008 年"),
        ("zh", "the 㐀㐁", "the 㐀㐁"),  # outside U+4E00 to U+9FA5, and no articles
    ],
)
def test_mlqa_normal_form(language: str, text: str, normal: str) -> None:
    assert normalize_mlqa(text, language) == normal


def test_mlqa_scores_follow_the_language() -> None:
    # Characters as words: 2 of the 3 predicted are among the 4 of the gold, F1 = 2·2/(3+4).
    assert metrics.mlqa({"q": ["北京大学"]}, {"q": "北京市"}, "zh")["f1"] == pytest.approx(100 * 4 / 7, abs=1e-9)
    assert metrics.mlqa({"q": ["北京大学"]}, {"q": "北京市"}, "en")["f1"] == 0.0
    german = metrics.mlqa({"q": ["der Hund"]}, {"q": "den Hund"}, "de")
    assert german == {"exact_match": 100.0, "f1": 100.0, "mlqa": 100.0}
    assert metrics.mlqa({"q": ["der Hund"]}, {"q": "den Hund"}, "en")["mlqa"] == 25.0  # (0 + 50) / 2


def test_mlqa_has_seven_languages() -> None:
    with pytest.raises(InvalidInputError, match="language: 'fr'; MLQA has en, es, de, vi, ar, hi, zh"):
        metrics.mlqa({"q": ["x"]}, {"q": "x"}, "fr")


# --- SQuAD v2.0 -----------------------------------------------------------------------------------


def _best_by_trying(
    gold: dict[str, list[str]], predicted: dict[str, str], no_answer: dict[str, float], index: int, threshold: float
) -> float:
    """The score at one threshold: exact match (index 0) or F1 (1) with "" for what stays unanswered."""
    total = 0.0
    for identity, answers in gold.items():
        guess = predicted[identity] if no_answer[identity] <= threshold else ""
        if not answers:
            total += not guess
        elif guess:
            total += _squad_again(answers, guess)[index]
    return 100 * total / len(gold)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_squad_v2_finds_the_best_threshold(rng: np.random.Generator, ties: bool, shift: float) -> None:
    words = ["cat", "dog", "red", "blue"]
    for _ in range(20):
        gold, predicted, no_answer = {}, {}, {}
        for i in range(15):
            answer = " ".join(rng.choice(words, size=2))
            gold[str(i)] = [answer] if rng.random() < 0.6 else []
            predicted[str(i)] = answer if rng.random() < 0.5 else " ".join(rng.choice(words, size=2))
            score = float(rng.normal()) + shift
            no_answer[str(i)] = float(round(score)) if ties else score
        tried = [min(no_answer.values()) - 1, *no_answer.values()]
        scores = metrics.squad_v2(gold, predicted, no_answer)
        for index, name in enumerate(("exact", "f1")):
            best = max(_best_by_trying(gold, predicted, no_answer, index, threshold) for threshold in tried)
            assert scores[f"best_{name}"] == pytest.approx(best, abs=1e-9)
            threshold = scores[f"best_{name}_threshold"]
            assert _best_by_trying(gold, predicted, no_answer, index, threshold) == pytest.approx(best, abs=1e-9)
        assert scores["squad_v2"] == pytest.approx((scores["best_exact"] + scores["best_f1"]) / 2, abs=1e-12)


def test_squad_v2_by_hand() -> None:
    gold = {"a": ["cat"], "b": [], "c": ["red dog"], "d": []}
    predicted = {"a": "cat", "b": "dog", "c": "dog", "d": "cat"}
    # Nothing answered: b and d right, 50. Up to -1 (a): 75. Up to 0 (a, b): 50. Up to 1 (a, b, c): exact 50, F1 66.7.
    scores = metrics.squad_v2(gold, predicted, {"a": -1.0, "b": 0.0, "c": 1.0, "d": 2.0})
    assert (scores["best_exact"], scores["best_exact_threshold"]) == (75.0, -1.0)
    assert (scores["best_f1"], scores["best_f1_threshold"]) == (75.0, -1.0)
    # With c the surest: answering it alone adds 0 to the exact matches and 2/3 to F1.
    scores = metrics.squad_v2(gold, predicted, {"a": 5.0, "b": 4.0, "c": -3.0, "d": 3.0})
    assert (scores["best_exact"], scores["best_exact_threshold"]) == (50.0, -4.0)  # below all: nothing answered
    assert scores["best_f1"] == pytest.approx(100 * (2 + 2 / 3) / 4, abs=1e-9)
    assert scores["best_f1_threshold"] == -3.0


def test_squad_v2_without_a_prediction_leaves_the_question_unanswered() -> None:
    scores = metrics.squad_v2({"a": [], "b": ["cat"]}, {}, {})
    assert (scores["best_exact"], scores["best_f1"], scores["best_exact_threshold"]) == (50.0, 50.0, 0.0)
    with pytest.raises(InvalidInputError, match="no_answer: no score of question b"):
        metrics.squad_v2({"b": ["cat"]}, {"b": "cat"}, {})
    with pytest.raises(InvalidInputError, match="no questions"):
        metrics.squad_v2({}, {}, {})


def test_squad_v2_counts_two_texts_without_words_as_equal() -> None:
    scores = metrics.squad_v2({"a": ["the"]}, {"a": "A"}, {"a": 0.0})
    assert scores["best_exact"] == scores["best_f1"] == 100.0


# --- retrieval ------------------------------------------------------------------------------------


def test_bucc_f1() -> None:
    gold = [("de-1", "en-1"), ("de-2", "en-2"), ("de-3", "en-3"), ("de-4", "en-4")]
    scores = metrics.bucc_f1(gold, [("de-1", "en-1"), ("de-1", "en-1"), ("de-2", "en-3")])
    assert scores["precision"] == 50.0 and scores["recall"] == 25.0  # repetitions count once
    assert scores["f1"] == pytest.approx(100 / 3, abs=1e-9)
    assert metrics.bucc_f1(gold, []) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert metrics.bucc_f1(gold, [("en-1", "de-1")])["f1"] == 0.0  # pairs are ordered
    with pytest.raises(InvalidInputError, match="no pairs"):
        metrics.bucc_f1([], gold)


def test_map_20_by_hand() -> None:
    gold = {"one": ["x"], "two": ["x", "y"], "none": ["x"], "asked for nothing": ["x"], "late": ["x"]}
    ranked = {
        "one": ["a", "b", "x"],  # 1/3
        "two": ["x", "a", "y"],  # (1/1 + 2/3) / 2
        "none": ["a", "b"],
        "late": [*map(str, range(20)), "x"],  # rank 21
        "unasked": ["x"],
    }
    expected = 100 * (1 / 3 + (1 + 2 / 3) / 2) / 5
    assert metrics.map_20(gold, ranked)["map@20"] == pytest.approx(expected, abs=1e-9)


def test_a_repeated_item_counts_once_and_keeps_its_rank() -> None:
    assert metrics.average_precision(["x", "y"], ["x", "x", "y"]) == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


def test_more_gold_than_places_can_be_found_fully() -> None:
    gold = [str(i) for i in range(30)]
    assert metrics.average_precision(gold, gold) == pytest.approx(1.0, abs=1e-12)
    assert metrics.average_precision(gold, ["no", *gold[:19]]) == pytest.approx(
        sum((rank - 1) / rank for rank in range(2, 21)) / 20, abs=1e-12
    )


def test_map_20_of_one_gold_item_is_the_mean_reciprocal_rank(rng: np.random.Generator) -> None:
    ranks = rng.integers(1, 26, size=50)
    gold = {str(i): ["x"] for i in range(50)}
    ranked = {str(i): [*(["o"] * (int(rank) - 1)), "x"] for i, rank in enumerate(ranks)}
    expected = 100 * float(np.mean([1 / rank if rank <= 20 else 0.0 for rank in ranks]))
    assert metrics.map_20(gold, ranked)["map@20"] == pytest.approx(expected, abs=1e-9)


def test_map_20_refuses_queries_without_gold() -> None:
    with pytest.raises(InvalidInputError, match="without a right answer"):
        metrics.map_20({"q": []}, {"q": ["x"]})
    with pytest.raises(InvalidInputError, match="no queries"):
        metrics.map_20({}, {})
