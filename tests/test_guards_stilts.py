"""Conditions in metrics, retrieval and the study of which each has one test that notices when it goes.

Found by leaving them out one at a time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from models import make_config

from xfast.stilts import features, metrics, retrieval
from xfast.study import arms, statistics


def test_an_empty_answer_of_squad_2_is_no_answer() -> None:
    scores = metrics.squad_v2({"a": ["cat"], "b": []}, {"a": "cat", "b": ""}, {"a": 1.0, "b": 0.0})
    assert scores["best_exact"] == 100.0


def test_mlqas_chinese_ends_with_its_last_character() -> None:
    assert metrics.normalize_mlqa("乌龟龥", "zh") == "乌 龟 龥"


def test_an_inside_after_an_end_begins_another_chunk() -> None:
    found = metrics.chunks([["B-PER", "E-PER", "I-PER"]])
    assert found == {metrics.Chunk("PER", 0, 1), metrics.Chunk("PER", 2, 2)}


def test_sentences_that_are_opposites_are_mined() -> None:
    found = retrieval.mine(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]]), ["a"], ["b"])
    assert found == [retrieval.Candidate(1.0, 0, 0)]


def test_the_best_score_of_a_pair_counts_in_any_order() -> None:
    source, target = retrieval.Sentences(("s0",), ("a",)), retrieval.Sentences(("t0",), ("u",))
    candidates = [retrieval.Candidate(2.0, 0, 0), retrieval.Candidate(1.0, 0, 0)]
    assert retrieval.bucc_pairs(candidates, source, target) == {("s0", "t0"): 2.0}


def test_a_much_longer_window_is_best_with_a_little_less_context() -> None:
    # 3 tokens of context + 0.01 * 400 against 6 + 0.01 * 30: BERT's rule
    assert features._best_windows([0, 390], 400, 420)[396] == 0


def test_what_is_found_equivalent_needs_no_more_cells() -> None:
    step = np.log1p(0.02) / 3 * 3**0.5
    found = statistics.compare([np.full(5, value) for value in (-step, 0.0, step)], 0.02)
    assert found.verdict == statistics.EQUIVALENT and found.cells_needed is None and found.pairs_needed is None


def test_checkpoints_that_end_otherwise_have_another_stamp(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(3 << 20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = arms.stamp(tmp_path)
    weights[-1] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert arms.stamp(tmp_path) != before


def test_a_head_that_lacks_a_label_of_the_task_is_not_trained_for_it(tmp_path: Path) -> None:
    for labels in (("entailment", "neutral", "contradiction"), ("entailment", "contradiction")):
        config = make_config("xlm-roberta", id2label=dict(enumerate(labels)), num_labels=len(labels))
        config.architectures = ["XLMRobertaForSequenceClassification"]
        config.save_pretrained(tmp_path)
        assert arms.has_trained_head(tmp_path, "xnli") == (len(labels) == 3)
