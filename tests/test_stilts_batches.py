"""Batches: what is in the tensors, which pieces are masked, and which examples come in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.stilts import batches
from xfast.stilts.batches import Key, Masking, Padding, Schedule, by_length, collate, shares, stream
from xfast.stilts.features import IGNORED, Feature
from xfast.stilts.task import CHOICE, CLASSIFICATION, MATCHING, MLM, SPAN, TAGGING

PAD = 1


def feature(rows: Sequence[Sequence[int]], label: Any = None, second: Sequence[int] | None = None) -> Feature:
    arrays = tuple(np.asarray(row, np.int32) for row in rows)
    return Feature(arrays, tuple(second or map(len, rows)), label, 0)


# --- tensors --------------------------------------------------------------------------------------


def test_classification_is_padded_to_the_longest_row() -> None:
    given = [feature([[0, 7, 2, 2, 8, 2]], 2, [4]), feature([[0, 2]], 0), feature([[0, 9, 2, 1, 2]], 1, [3])]
    batch = collate(given, CLASSIFICATION, Padding(PAD))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[0, 7, 2, 2, 8, 2], [0, 2, 1, 1, 1, 1], [0, 9, 2, 1, 2, 1]]
    # by length, not by id: a padding id inside a text is seen
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [2, 0, 1]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_token_types_are_for_models_that_have_them() -> None:
    given = [feature([[5, 6, 7, 8]], 0, [2]), feature([[5, 6]], 0)]
    batch = collate(given, CLASSIFICATION, Padding(0, token_types=True))
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]


def test_choices_keep_their_order_in_a_third_dimension() -> None:
    given = [feature([[0, 3], [0, 4, 5]], 1), feature([[0], [0, 6]], 0)]
    batch = collate(given, CHOICE, Padding(PAD, token_types=True))
    assert batch["input_ids"].tolist() == [[[0, 3, 1], [0, 4, 5]], [[0, 1, 1], [0, 6, 1]]]
    assert batch["attention_mask"].tolist() == [[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]]
    assert batch["token_type_ids"].shape == (2, 2, 3) and batch["labels"].tolist() == [1, 0]


def test_choices_of_unequal_number_are_an_error_even_where_the_rows_could_be_divided() -> None:
    with pytest.raises(InvalidInputError, match=r"choices: \[1, 3\] in one batch"):
        collate([feature([[0]] * 3, 0), feature([[0]], 0)], CHOICE, Padding(PAD))


def test_spans_and_tags_have_their_labels() -> None:
    batch = collate([feature([[0, 1, 2]], (1, 2)), feature([[0]], (0, 0))], SPAN, Padding(PAD))
    assert batch["start_positions"].tolist() == [1, 0] and batch["end_positions"].tolist() == [2, 0]
    tags = [np.asarray([IGNORED, 4, IGNORED, 5]), np.asarray([IGNORED, 0])]
    batch = collate([feature([[0, 1, 2, 3]], tags[0]), feature([[0, 1]], tags[1])], TAGGING, Padding(PAD))
    assert batch["labels"].tolist() == [[-100, 4, -100, 5], [-100, 0, -100, -100]]
    assert batch["labels"].dtype == torch.int64


def test_both_sides_of_a_match_are_padded_apart() -> None:
    given = [feature([[0, 2], [0, 5, 6, 2]], None, [2, 3]), feature([[0, 3, 2], [0]], None, [3, 1])]
    batch = collate(given, MATCHING, Padding(PAD, token_types=True))
    assert batch.keys() == {"query", "target"}
    assert batch["query"]["input_ids"].tolist() == [[0, 2, 1], [0, 3, 2]]
    assert batch["target"]["input_ids"].tolist() == [[0, 5, 6, 2], [0, 1, 1, 1]]
    assert batch["target"]["token_type_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", [CLASSIFICATION, CHOICE, SPAN, TAGGING, MLM])
def test_labels_come_only_where_all_have_one_and_they_are_asked_for(kind: str) -> None:
    label = {SPAN: (0, 0), TAGGING: np.zeros(2, np.int64)}.get(kind, 0)
    inputs = {"input_ids", "attention_mask"}
    labels = {SPAN: {"start_positions", "end_positions"}, MLM: set()}.get(kind, {"labels"})
    both = [feature([[0, 2]], label), feature([[0, 2]], label)]
    assert collate(both, kind, Padding(PAD)).keys() == inputs | labels
    assert collate(both, kind, Padding(PAD), labels=False).keys() == inputs
    assert collate([both[0], feature([[0, 2]])], kind, Padding(PAD)).keys() == inputs


# --- masking --------------------------------------------------------------------------------------

SPECIAL = frozenset({0, 1, 2, 3, 999})
MASKING = Masking(mask_id=999, vocabulary=1000, special=SPECIAL, seed=3)


def masked_rows(rng: np.random.Generator, rows: int, length: int) -> list[tuple[Any, Any, Any]]:
    found = []
    for serial in range(rows):
        row = rng.integers(0, 999, length).astype(np.int32)
        before = row.copy()
        ids, labels = MASKING(row, serial)
        assert (row == before).all() and ids.dtype == row.dtype
        found.append((row, ids, labels))
    return found


def test_masking_is_the_same_for_the_same_serial_and_seed(rng: np.random.Generator) -> None:
    row = rng.integers(4, 999, 200).astype(np.int32)
    first, again, other = MASKING(row, 7), MASKING(row, 7), MASKING(row, 8)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()
    assert (first[1] != Masking(999, 1000, SPECIAL, seed=4)(row, 7)[1]).any()


def test_special_ids_are_never_chosen_and_what_is_not_chosen_stays(rng: np.random.Generator) -> None:
    specials = 0
    for row, ids, labels in masked_rows(rng, 300, 50):
        chosen = labels != IGNORED
        special = np.isin(row, list(SPECIAL))
        specials += special.sum()
        assert not (chosen & special).any()
        assert (labels[chosen] == row[chosen]).all() and (ids[~chosen] == row[~chosen]).all()
    assert specials > 30


def test_masking_rates(rng: np.random.Generator) -> None:
    counts: Counter[str] = Counter()
    drawn = []
    for row, ids, labels in masked_rows(rng, 300, 1000):
        chosen = labels != IGNORED
        counts["candidates"] += int((~np.isin(row, list(SPECIAL))).sum())
        counts["chosen"] += int(chosen.sum())
        counts["mask"] += int((chosen & (ids == 999)).sum())
        counts["kept"] += int((chosen & (ids == row)).sum())
        drawn += ids[chosen & (ids != 999) & (ids != row)].tolist()
    assert counts["chosen"] / counts["candidates"] == pytest.approx(0.15, abs=0.003)  # 4 standard errors
    assert counts["mask"] / counts["chosen"] == pytest.approx(0.8, abs=0.008)
    assert counts["kept"] / counts["chosen"] == pytest.approx(0.1, abs=0.006)
    assert len(drawn) / counts["chosen"] == pytest.approx(0.1, abs=0.006)
    # drawn from the whole vocabulary alike
    assert np.histogram(drawn, bins=4, range=(0, 1000))[0] / len(drawn) == pytest.approx([0.25] * 4, abs=0.03)


def test_at_least_one_piece_is_masked_where_there_is_one() -> None:
    for serial in range(100):
        ids, labels = MASKING(np.asarray([0, 500, 2], np.int32), serial)
        assert labels.tolist() == [IGNORED, 500, IGNORED] and ids[[0, 2]].tolist() == [0, 2]
    assert MASKING(np.asarray([0, 2], np.int32), 0)[1].tolist() == [IGNORED, IGNORED]


# --- order ----------------------------------------------------------------------------------------

Lengths = npt.NDArray[np.int64]


def padding_share(given: Sequence[Sequence[int]], lengths: Lengths) -> float:
    padded = sum(len(batch) * max(lengths[batch]) for batch in given)
    return 1 - sum(lengths[batch].sum() for batch in given) / padded


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("size", "count"), [(1, 5), (8, 1), (8, 2), (8, 50), (8, 51), (4, 130)])
def test_each_example_comes_once_an_epoch_in_full_batches(
    size: int, count: int, grouped: bool, rng: np.random.Generator
) -> None:
    lengths = rng.integers(3, 60, size * count)
    found = stream(lengths, np.random.default_rng(1), size, grouped)
    epochs = [list(islice(found, count)) for _ in range(3)]
    for epoch in epochs:
        assert all(len(batch) == size for batch in epoch)
        assert sorted(i for batch in epoch for i in batch) == list(range(len(lengths)))
    assert size * count < 9 or epochs[0] != epochs[1]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("examples", "size"), [(3, 8), (37, 8), (401, 16)])
def test_sizes_that_do_not_divide_lose_nothing(examples: int, size: int, grouped: bool) -> None:
    found = stream(np.arange(examples), np.random.default_rng(2), size, grouped)
    given = list(islice(found, examples))  # as many batches as examples: each has come `size` times
    assert all(len(batch) == size for batch in given)
    assert Counter(i for batch in given for i in batch) == dict.fromkeys(range(examples), size)


def test_copies_of_a_small_sets_examples_do_not_share_a_batch(rng: np.random.Generator) -> None:
    found = stream(rng.integers(3, 60, 96), np.random.default_rng(3), 32, True)
    assert all(len(set(batch)) == 32 for batch in islice(found, 60))


def test_grouped_batches_have_less_padding_than_random_ones(rng: np.random.Generator) -> None:
    lengths = np.clip(rng.lognormal(3.5, 0.6, 4000), 5, 256).astype(np.int64)
    grouped, random = (
        padding_share(list(islice(stream(lengths, np.random.default_rng(4), 16, how), 250)), lengths)
        for how in (True, False)
    )
    assert random > 0.4 and grouped < 0.1


def test_long_and_short_batches_are_mixed_and_equal_lengths_keep_no_order() -> None:
    found = list(islice(stream(np.arange(800), np.random.default_rng(5), 8, True), 100))
    means = [np.mean(batch) for batch in found]
    ups = sum(after > before for before, after in pairwise(means))
    assert 30 < ups < 70
    same = stream(np.full(16, 9), np.random.default_rng(5), 8, True)
    assert len({tuple(sorted(next(same))) for _ in range(20)}) > 10


def test_shares_by_hand() -> None:
    assert shares({"a": 100, "b": 300}) == pytest.approx({"a": 0.25, "b": 0.75})
    assert shares({"a": 100, "b": 300}, cap=150) == pytest.approx({"a": 0.4, "b": 0.6})
    assert shares({"a": 100, "b": 400}, temperature=2) == pytest.approx({"a": 1 / 3, "b": 2 / 3})  # roots: 10, 20
    assert shares({"a": 8, "b": 125, "c": 1000}, 27, 3) == pytest.approx({"a": 0.25, "b": 0.375, "c": 0.375})
    for cold in (1e-3, 1e-12, 5e-324):  # the largest alone, however large
        assert shares({"a": 100, "b": 400, "c": 400}, temperature=cold) == {"a": 0, "b": 0.5, "c": 0.5}
    assert shares({"a": 100, "b": 400}, temperature=1e300) == {"a": 0.5, "b": 0.5}
    with pytest.raises(InvalidOptionError, match="no training examples for b, d"):
        shares({"a": 1, "b": 0, "c": 2, "d": 0})


def schedule(**changes: Any) -> Schedule:
    draw = np.random.default_rng(9)
    lengths = {name: draw.integers(3, 90, count) for name, count in (("mnli", 400), ("squad", 90), ("mlm:sw", 130))}
    given = {"lengths": lengths, "probabilities": {"mnli": 0.5, "squad": 0.2, "mlm:sw": 0.3}}
    return Schedule(**{**given, "steps": 600, "micro": 3, "batch_size": 4, "seed": 11, "grouped": True, **changes})


def test_a_step_has_one_task_across_its_full_micro_batches() -> None:
    plan = schedule()
    given = list(plan)
    assert len(given) == len(plan) == 1800 and all(len(batch) == 4 for batch in given)
    keys = [key for batch in given for key in batch]
    assert all(isinstance(key, Key) for key in keys) and [key.serial for key in keys] == list(range(7200))
    steps = [{key.task for batch in given[i : i + 3] for key in batch} for i in range(0, 1800, 3)]
    assert all(len(tasks) == 1 for tasks in steps)
    assert all(0 <= key.example < len(plan.lengths[key.task]) for key in keys)


def test_tasks_follow_their_probabilities_and_examples_their_epochs() -> None:
    plan = schedule()
    drawn = Counter(batch[0].task for batch in list(plan)[::3])
    for name, share in plan.probabilities.items():
        assert drawn[name] / 600 == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)
    alone = schedule(lengths={"mnli": np.arange(5, 245)}, probabilities={"mnli": 1.0}, steps=60)
    keys = [key.example for batch in alone for key in batch]
    assert [sorted(keys[i : i + 240]) for i in range(0, 720, 240)] == [list(range(240))] * 3
    never = schedule(probabilities={"mnli": 0.0, "squad": 1.0, "mlm:sw": 0.0})
    assert {batch[0].task for batch in never} == {"squad"}


def test_micro_batches_of_a_step_are_of_like_length_too() -> None:
    lengths = {"mnli": np.random.default_rng(1).permutation(np.arange(1200))}
    given = [[key.example for key in batch] for batch in schedule(lengths=lengths, probabilities={"mnli": 1.0})]
    spread = [np.ptp(lengths["mnli"][batch]) for batch in given[:300]]
    assert max(spread) <= 30  # neighbours among 600 of 1200 lengths


def test_the_same_twice_and_another_order_with_another_seed() -> None:
    plan = schedule()
    first = list(plan)
    assert list(plan) == first == list(schedule())
    other = list(schedule(seed=12))
    assert [batch[0].task for batch in other] != [batch[0].task for batch in first]
    assert len(other) == len(first)


def test_a_run_that_was_cut_goes_on_with_the_batches_it_would_have_seen() -> None:
    class Keys(torch.utils.data.Dataset[Key]):
        def __getitem__(self, key: Any) -> Key:
            return key

    whole = list(schedule(steps=40))
    for done in (0, 1, 7, 119):
        loader = DataLoader(Keys(), batch_sampler=schedule(steps=40), collate_fn=list)  # type: ignore[arg-type]
        assert list(skip_first_batches(loader, done)) == whole[done:]


@pytest.mark.parametrize("budget", [1, 64, 500, 10**9])
def test_by_length_covers_every_index_once_within_the_budget(budget: int, rng: np.random.Generator) -> None:
    lengths = rng.integers(0, 130, 300).tolist()
    given = list(by_length(lengths, budget))
    assert sorted(i for batch in given for i in batch) == list(range(300))
    flat = [lengths[i] for batch in given for i in batch]
    assert flat == sorted(flat, reverse=True)
    longest = [max(lengths[i] for i in batch) for batch in given]
    for batch, long, after in zip(given, longest, [*given[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * long <= budget
        assert after is None or (len(batch) + 1) * max(1, long) > budget, "one more would have fitted"
    assert list(by_length([], budget)) == []


def test_the_group_is_the_documented_one(rng: np.random.Generator) -> None:
    lengths = rng.integers(0, 10**6, 8 * 3 * batches.GROUPED_BATCHES)
    found = stream(lengths, np.random.default_rng(6), 8, True)
    for _ in range(3):  # every group is some examples sorted and cut: its batches do not overlap in length
        group = [sorted(lengths[batch]) for batch in islice(found, batches.GROUPED_BATCHES)]
        group.sort()
        flat = [length for batch in group for length in batch]
        assert flat == sorted(flat)
