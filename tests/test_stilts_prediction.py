"""From logits back to labels, tags, answers and vectors: against brute force, with forwards that compute little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import build, make_config, one_thread

from xfast.stilts import prediction
from xfast.stilts.batches import Padding
from xfast.stilts.examples import SpanExample
from xfast.stilts.features import Feature, Features, Window
from xfast.stilts.prediction import Answered, answers, best_span, classes, padding_of, tags, vectors
from xfast.stilts.task import CHOICE, CLASSIFICATION

CPU = torch.device("cpu")
PAD = Padding(1)


_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few examples make several batches."""
    monkeypatch.setattr(prediction, "TOKENS_PER_BATCH", 64)


def random_rows(rng: np.random.Generator, count: int, longest: int = 40) -> list[Any]:
    return [rng.integers(2, 90, n).astype(np.int32) for n in rng.integers(1, longest, count)]


def single(row: Any, number: int = 0, extra: Any = None) -> Feature:
    return Feature((row,), (len(row),), None, number, extra)


class Fake:
    """A model's forward: ``score(ids, position)`` at every seen position; records what it was given."""

    def __init__(self, output: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        self.output = output
        self.calls: list[Mapping[str, torch.Tensor]] = []

    def __call__(self, **inputs: torch.Tensor) -> Any:
        assert not torch.is_grad_enabled()
        self.calls.append(inputs)
        return SimpleNamespace(**self.output(inputs["input_ids"], inputs["attention_mask"]))


# --- classes --------------------------------------------------------------------------------------


def totals(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of classification: sum, last and number of the seen ids."""
    total = (ids * mask).sum(-1)
    last = ids.gather(-1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)
    return {"logits": torch.stack([total, last, mask.sum(-1)], -1).float()}


def test_classes_come_in_the_features_order(rng: np.random.Generator) -> None:
    rows, forward, done = random_rows(rng, 70), Fake(totals), []
    found = classes(forward, Features([single(row) for row in rows]), CLASSIFICATION, PAD, CPU, done.append)
    assert found.tolist() == [[row.sum(), row[-1], len(row)] for row in rows] and found.dtype == np.float32
    sizes = [tuple(call["input_ids"].shape) for call in forward.calls]
    assert len(sizes) > 10 and all(count == 1 or count * length <= 64 for count, length in sizes)
    assert done == [count for count, _ in sizes] and sum(done) == 70
    assert all("labels" not in call for call in forward.calls)


def test_choices_are_scored_together(rng: np.random.Generator) -> None:
    groups = [random_rows(rng, 4, 30) for _ in range(25)]
    items = [Feature(tuple(rows), tuple(map(len, rows)), 0, i) for i, rows in enumerate(groups)]
    forward = Fake(lambda ids, mask: {"logits": (ids * mask).sum(-1).float()})
    found = classes(forward, Features(items), CHOICE, PAD, CPU)
    assert found.tolist() == [[row.sum() for row in rows] for rows in groups]
    assert all(call["input_ids"].shape[1] == 4 for call in forward.calls) and len(forward.calls) > 10


def test_half_precision_logits_become_single(rng: np.random.Generator) -> None:
    rows = random_rows(rng, 9)
    forward = Fake(lambda ids, mask: {"logits": totals(ids, mask)["logits"].bfloat16() / 256})
    found = classes(forward, Features([single(row) for row in rows]), CLASSIFICATION, PAD, CPU)
    assert found.dtype == np.float32
    assert found[:, 2] == pytest.approx([len(row) / 256 for row in rows], abs=0)  # exact in bf16


def test_nothing_to_predict() -> None:
    forward = Fake(totals)
    assert len(classes(forward, Features(), CLASSIFICATION, PAD, CPU)) == 0
    assert tags(forward, Features(), [0, 2], ["A"], PAD, CPU) == [[], ["", ""]]
    assert answers(forward, Features(), [], PAD, CPU) == [] and len(vectors(forward, [], PAD, CPU)) == 0
    assert not forward.calls


# --- tags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tags_are_those_of_the_first_pieces_and_windows_are_joined(rng: np.random.Generator, dtype: Any) -> None:
    names = ["A", "B", "C", "D", "E"]
    items, wanted = [], []
    for number in range(30):
        sentence: list[str] = []
        for _ in range(int(rng.integers(0, 4))):
            count = int(rng.integers(1, 6))
            row = random_rows(rng, 1, 3)[0]
            starts = []
            for _ in range(count):  # words of one to three pieces
                starts.append(len(row))
                row = np.concatenate([row, rng.integers(2, 90, int(rng.integers(1, 4))).astype(np.int32)])
            items.append(single(row, number, (len(sentence), np.asarray(starts))))
            sentence += [names[row[start] % 5] for start in starts]
        wanted.append(sentence)
    forward = Fake(lambda ids, mask: {"logits": torch.nn.functional.one_hot(ids % 5, 5).to(dtype)})
    shuffled = [items[i] for i in rng.permutation(len(items))]
    found = tags(forward, Features(shuffled), [len(sentence) for sentence in wanted], names, PAD, CPU)
    assert found == wanted and [] in wanted and any(len(sentence) > 8 for sentence in wanted)


# --- answers --------------------------------------------------------------------------------------


def brute_force(start: Any, end: Any, window: Window) -> tuple[float, int, int] | None:
    """Every pair of the 20 best starts (of tokens that are best here) and the 20 best ends."""
    tokens = range(len(window.offsets))
    first, last = ([float(x[window.first + t]) for t in tokens] for x in (start, end))
    starts = sorted((t for t in tokens if window.best[t]), key=lambda t: -first[t])[:20]
    ends = sorted(tokens, key=lambda t: -last[t])[:20]
    pairs = [(first[s] + last[e], s, e) for s in starts for e in ends if s <= e < s + 30]
    return max(pairs, default=None)


def window_of(rng: np.random.Generator, count: int, shown: float = 0.8) -> Window:
    offsets = np.stack([np.arange(count), np.arange(1, count + 1)], 1) if count else np.zeros((0, 2), np.int64)
    return Window(int(rng.integers(1, 9)), offsets, rng.random(count) < shown)


def test_the_best_span_is_that_of_brute_force(rng: np.random.Generator) -> None:
    none = cut = 0
    for _ in range(600):
        window = window_of(rng, int(rng.integers(0, 90)), float(rng.random()))
        length = window.first + len(window.offsets) + 1
        start, end = rng.normal(size=(2, length)).astype(np.float32) * 5
        feature = single(np.zeros(length, np.int32), extra=window)
        found, wanted = best_span(start, end, feature), brute_force(start, end, window)
        assert (found is None) == (wanted is None)
        if wanted is None:
            none += 1
            continue
        assert found == pytest.approx(wanted)
        anything = max(float(start[window.first + s]) for s in range(len(window.offsets)) if window.best[s])
        cut += wanted[0] < anything + float(end[window.first : -1].max())
    assert none > 10 and cut > 100  # the constraints mattered


def test_answers_have_at_most_thirty_tokens_and_do_not_end_before_they_start() -> None:
    window = Window(2, np.stack([np.arange(60), np.arange(1, 61)], 1), np.ones(60, bool))
    feature = single(np.zeros(63, np.int32), extra=window)
    for distance, allowed in ((29, True), (30, False), (-1, False), (0, True)):
        start, end = np.zeros((2, 63), np.float32)
        start[2 + 20], end[2 + 20 + distance] = 10, 10
        score, first, last = best_span(start, end, feature)
        assert ((first, last) == (20, 20 + distance)) == allowed == (score == 20)
        assert score == (brute_force(start, end, window) or [None])[0] and 0 <= last - first < 30


def test_only_the_twenty_best_starts_and_ends_are_looked_at() -> None:
    window = Window(0, np.zeros((45, 2), np.int64), np.ones(45, bool))
    start, end = np.zeros((2, 45), np.float32)
    start[25:45], end[:20] = 9, 9  # all starts lie behind all ends
    assert best_span(start, end, single(np.zeros(45, np.int32), extra=window)) is None
    start[25] = 0  # the twentieth start is now a tie of zeros: the first token
    assert best_span(start, end, single(np.zeros(45, np.int32), extra=window)) == (9, 0, 0)


def test_special_positions_and_the_question_are_no_answer() -> None:
    window = Window(4, np.asarray([[0, 3], [4, 7]]), np.ones(2, bool))
    start, end = np.full((2, 7), 50.0, np.float32)
    start[4:6], end[4:6] = (1, 2), (3, 1)
    assert best_span(start, end, single(np.zeros(7, np.int32), extra=window)) == (4.0, 0, 0)


def spread(ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Logits that look random and depend on nothing but the id and its place in the row."""
    place = torch.arange(ids.shape[-1])
    return torch.sin((ids * 37 + place * 101 + seed).double() * 12.9898).float() * 6


def test_windows_of_a_context_are_joined(rng: np.random.Generator) -> None:
    context = "".join(rng.choice(list("ab  cde"), 400))
    examples, items = [], []
    for number in range(40):
        examples.append(SpanExample(str(number), "", context[: int(rng.integers(1, 400))], ()))
        for _ in range(int(rng.integers(1, 5))):
            window = window_of(rng, int(rng.integers(0, 40)), 0.5)
            window.offsets = window.offsets * 2
            items.append(single(random_rows(rng, 1)[0], number, window))
            row = rng.integers(2, 90, window.first + len(window.offsets) + 1).astype(np.int32)
            items[-1].rows, items[-1].second = (row,), (len(row),)
    forward = Fake(lambda ids, mask: {"start_logits": spread(ids, 1), "end_logits": spread(ids, 2)})
    found = answers(forward, Features(items), examples, PAD, CPU)
    empty = 0
    for number, (example, answered) in enumerate(zip(examples, found, strict=True)):
        best, null = None, np.inf
        for item in (item for item in items if item.example == number):
            ids = torch.from_numpy(item.rows[0].astype(np.int64))
            start, end = spread(ids, 1).numpy(), spread(ids, 2).numpy()
            null = min(null, float(start[0]) + float(end[0]))
            span = brute_force(start, end, item.extra)
            if span is not None and (best is None or span[0] > best[0]):
                offsets = item.extra.offsets
                best = (span[0], example.context[offsets[span[1], 0] : offsets[span[2], 1]].strip())
        if best is None:
            empty += 1
            assert answered == Answered("", np.inf)
        else:
            assert answered.text == best[1] and answered.no_answer == pytest.approx(null - best[0], abs=1e-5)
    assert 0 < empty < 20 and len(forward.calls) > 10


def test_no_answer_is_what_the_first_token_says_minus_the_best_span(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [Window(1, np.asarray([[0, 4], [5, 9]]), np.ones(2, bool)) for _ in range(2)]
    logits = {4: ([1, 3, 0, 0], [2, 5, 7, 0]), 5: ([-4, 1, 1, 0, 0], [1, 1, 2, 0, 0])}

    def output(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        assert ids.shape[0] == 1
        start, end = logits[ids.shape[1]]
        return {"start_logits": torch.tensor([start]).half(), "end_logits": torch.tensor([end]).half()}

    items = [single(np.full(n, 9, np.int32), 0, window) for n, window in zip((4, 5), windows, strict=True)]
    monkeypatch.setattr(prediction, "TOKENS_PER_BATCH", 5)
    (found,) = answers(Fake(output), Features(items), [SpanExample("", "", "some text", ())], PAD, CPU)
    # nulls 1 + 2 and -4 + 1; spans 3 + 7 and 1 + 2
    assert found == Answered("some text", -3.0 - 10.0)


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_pool_the_seen_tokens(pooling: str, dtype: Any, rng: np.random.Generator) -> None:
    table = torch.from_numpy(rng.normal(size=(90, 6))).to(dtype)
    table[1] = 1e4  # what padding would add
    rows = random_rows(rng, 50)
    forward = Fake(lambda ids, mask: {"last_hidden_state": table[ids]})
    found = vectors(forward, rows, PAD, CPU, pooling=pooling)
    numbers = table.double().numpy()
    wanted = [numbers[row].mean(0) if pooling == "mean" else numbers[row[0]] for row in rows]
    assert found == pytest.approx(np.stack(wanted), abs=1e-6) and found.dtype == np.float32
    assert len(forward.calls) > 10 and any((call["input_ids"] == 1).any() for call in forward.calls)


def test_vectors_of_a_model_with_token_types(rng: np.random.Generator) -> None:
    rows = random_rows(rng, 12)
    second = [int(rng.integers(0, len(row) + 1)) for row in rows]

    class Types(Fake):
        def __call__(self, **inputs: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=inputs["token_type_ids"][..., None].bfloat16())

    typed = Padding(0, token_types=True)
    found = vectors(Types(totals), rows, typed, CPU, second=second)
    assert found[:, 0] == pytest.approx([1 - s / len(row) for row, s in zip(rows, second, strict=True)], abs=1e-6)
    assert not vectors(Types(totals), rows, typed, CPU).any()


# --- real models ----------------------------------------------------------------------------------


def test_padding_is_the_tokenizers_and_token_types_are_the_models() -> None:
    tokenizer = SimpleNamespace(pad_token_id=7)
    for family, types in (("xlm-roberta", False), ("bert", True)):
        model = SimpleNamespace(config=make_config(family))
        assert padding_of(model, tokenizer) == Padding(7, token_types=types)
    assert padding_of(SimpleNamespace(config=SimpleNamespace()), tokenizer) == Padding(7, token_types=False)


@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_a_model_gives_batches_what_it_gives_each_row_alone(family: str, rng: np.random.Generator) -> None:
    model = build(family, "question-answering", seed=5)
    padding = padding_of(model, SimpleNamespace(pad_token_id=model.config.pad_token_id))
    context = "some words that are cut into pieces of five letters each"
    offsets = np.stack([np.arange(0, 50, 5), np.arange(5, 55, 5)], 1)
    items = []
    for number in range(12):
        count = int(rng.integers(1, 11))
        row = rng.integers(3, 100, count + 5).astype(np.int32)
        items.append(Feature((row,), (3,), None, number, Window(4, offsets[:count], np.ones(count, bool))))
    examples = [SpanExample("", "", context, ())] * len(items)
    found = answers(model, Features(items), examples, padding, CPU)
    for item, answered in zip(items, found, strict=True):
        inputs = {"input_ids": torch.from_numpy(item.rows[0].astype(np.int64))[None]}
        if family == "bert":
            inputs["token_type_ids"] = torch.tensor([[0] * 3 + [1] * (item.length - 3)])
        with torch.no_grad():
            alone = model(**inputs)
        start, end = alone.start_logits[0].numpy(), alone.end_logits[0].numpy()
        score, first, last = brute_force(start, end, item.extra) or (np.nan, 0, 0)
        assert answered.text == context[offsets[first, 0] : offsets[last, 1]].strip()
        assert answered.no_answer == pytest.approx(float(start[0] + end[0]) - score, abs=1e-4)
