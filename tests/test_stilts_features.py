"""Features against slow re-derivations, token by token, with XLM-R's own tokenizer and with one token a letter."""

from __future__ import annotations

import dataclasses
import json
import string
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.stilts import features
from xfast.stilts.data import Source
from xfast.stilts.examples import (
    Answer,
    ChoiceExample,
    Examples,
    MatchExample,
    PairExample,
    SpanExample,
    TaggedExample,
    TextExample,
)
from xfast.stilts.features import IGNORED, Encoder, Feature, Features, encode, fitting
from xfast.stilts.task import Recipe
from xfast.stilts.tasks import get

LETTERS = {letter: number for number, letter in enumerate(string.ascii_lowercase, start=10)}


def letter_tokenizer(double: bool) -> Any:
    """One token a letter. Specials as in XLM-R (``<s>`` 0, ``</s>`` 2, two between a pair), or as in BERT (one)."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    for letter, number in LETTERS.items():
        vocabulary |= {letter: number, f"##{letter}": number + 30}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=10_000))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>" if double else "<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": token for name, token in names.items()}
    )


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def letters(request: pytest.FixtureRequest) -> Any:
    return letter_tokenizer(request.param)


@pytest.fixture(scope="module")
def double() -> Any:
    return letter_tokenizer(True)


@pytest.fixture(scope="module")
def xlmr(data_dir: Path) -> Any:
    return transformers.XLMRobertaTokenizer.from_pretrained(data_dir / "tokenizer" / "xlmr")


def pieces(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def middle(tokenizer: Any) -> list[int]:
    return [2, 2] if tokenizer("a", "a")["input_ids"].count(2) == 3 else [2]


def word(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list(string.ascii_lowercase), length))


def encoded(tokenizer: Any, task: str, items: list[Any], recipe: Recipe | None = None, **options: Any) -> Features:
    return encode(Examples(items), get(task), tokenizer, recipe or Recipe(), **options)


def rows(found: Features) -> list[list[list[int]]]:
    return [[row.tolist() for row in feature.rows] for feature in found.items]


# --- the encoder ----------------------------------------------------------------------------------


def test_the_tokenizer_reproduces_the_published_ids(xlmr: Any, data_dir: Path) -> None:
    published = json.loads((data_dir / "tokenizer" / "xlmr" / "reference_ids.json").read_text(encoding="utf-8"))
    assert len(published) == 10
    encoder = Encoder(xlmr, Recipe(max_length=512))
    spelled, special = "4426, 3678, 2740, 4", "3, 6, 4"  # "<unk>": three pieces to fairseq, a special token here
    for given, ids in zip(published, encoder.ids([entry["text"] for entry in published]), strict=True):
        row, length = encoder.single(ids)
        assert str(row.tolist()) == str(given["ids"]).replace(spelled, special), given["text"]
        assert length == len(row)


def test_ids_do_not_depend_on_how_many_texts_go_through_at_once(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["ab", "", "c", "de f", "g", "h", "ij"]
    monkeypatch.setattr(Encoder, "batch", 3)
    assert Encoder(double, Recipe()).ids(texts) == [pieces(double, text) for text in texts]


def test_what_no_encoder_can_work_with_is_a_typed_error(double: Any) -> None:
    with pytest.raises(InvalidOptionError, match="tokenizer: a fast one"):
        Encoder(SimpleNamespace(is_fast=False), Recipe())
    with pytest.raises(InvalidOptionError, match=r"max_length: 5; accepted: 6 or more"):
        Encoder(double, Recipe(max_length=5))
    assert Encoder(double, Recipe(max_length=6)).room == 2
    with pytest.raises(InvalidOptionError, match="doc_stride: 0"):
        Encoder(double, Recipe(doc_stride=0))
    with pytest.raises(InvalidOptionError, match="query_length: 2"):
        Encoder(double, Recipe(query_length=2))


def popped(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


def test_fitting_is_popping_one_token_at_a_time(rng: np.random.Generator) -> None:
    cases = [tuple(rng.integers(0, 40, 3)) for _ in range(3000)] + [(5, 5, 9), (5, 5, 10), (0, 7, 3), (7, 0, 3)]
    for first, second, room in cases:
        left, right = popped([0] * first, [0] * second, room)
        assert fitting(first, second, room) == (len(left), len(right)), (first, second, room)


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_have_the_layout_of_xlmr(xlmr: Any) -> None:
    first, second = "Wiki ni tovuti", "這是一個句子。"
    a, b = pieces(xlmr, first), pieces(xlmr, second)
    found = encoded(xlmr, "xnli", [PairExample("1", first, second, "neutral")], labels=("x", "neutral"))
    (feature,) = found.items
    assert feature.rows[0].tolist() == [0, *a, 2, 2, *b, 2] == xlmr(first, second)["input_ids"]
    assert feature.second == (1 + len(a) + 2,) and feature.length == len(a) + len(b) + 4
    assert feature.label == 1 and feature.example == 0 and not found.notes


def test_pairs_of_bert_have_one_separator_and_token_types(tmp_path: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "##m", "are", "you"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    bert = transformers.BertTokenizer.from_pretrained(tmp_path)
    (feature,) = encoded(bert, "qqp", [PairExample("1", "Whom are", "you", "1")]).items
    whole = bert("Whom are", "you")
    assert feature.rows[0].tolist() == whole["input_ids"] == [2, 5, 6, 7, 3, 8, 3]
    types = [int(position >= feature.second[0]) for position in range(feature.length)]
    assert types == whole["token_type_ids"]


def test_long_pairs_lose_tokens_of_the_longer_text(letters: Any, rng: np.random.Generator) -> None:
    recipe, between = Recipe(max_length=20), middle(letters)
    items = [PairExample("", word(rng, a), word(rng, b), None) for a, b in rng.integers(0, 30, (200, 2))]
    found = encoded(letters, "mnli", items, recipe)
    shortened = 0
    for item, feature in zip(items, found.items, strict=True):
        full = pieces(letters, item.first), pieces(letters, item.second)
        left, right = popped(*full, 20 - 2 - len(between))
        shortened += (left, right) != full
        assert feature.rows[0].tolist() == [0, *left, *between, *right, 2]
        assert feature.second == (1 + len(left) + len(between),) and feature.label is None
    assert 0 < shortened < 200 and found.notes == Counter({features.TRUNCATED: shortened})


def test_a_pair_that_just_fits_is_whole_and_one_more_token_is_not(double: Any) -> None:
    for second, notes in (("abcde", {}), ("abcdef", {features.TRUNCATED: 1})):
        found = encoded(double, "mnli", [PairExample("", "abcde", second, None)], Recipe(max_length=14))
        assert found.items[0].length == 14 and dict(found.notes) == notes


def test_unlabelled_pairs_are_left_out_of_training_alone(double: Any) -> None:
    items = [PairExample("", "a", "b", None), PairExample("", "c", "d", "1")]
    trained = encoded(double, "qqp", items, labels=("0", "1"), train=True)
    assert [(f.example, f.label) for f in trained.items] == [(1, 1)]
    assert trained.notes == Counter({features.UNLABELLED: 1})
    kept = encoded(double, "qqp", items, labels=("0", "1"))
    assert [(f.example, f.label) for f in kept.items] == [(0, None), (1, 1)] and not kept.notes


def test_what_the_readers_left_out_is_among_the_notes(double: Any) -> None:
    examples: Examples[Any] = Examples([PairExample("", "a", "b", None)], Counter({"why": 2, features.UNLABELLED: 1}))
    found = encode(examples, get("qqp"), double, Recipe(), train=True)
    assert found.notes == Counter({"why": 2, features.UNLABELLED: 2}) and not len(found)


# --- multiple choice, matching, text ----------------------------------------------------------------


def test_prompts_lose_their_beginning_and_choices_their_end(letters: Any, rng: np.random.Generator) -> None:
    room, between = 16 - 2 - len(middle(letters)), middle(letters)
    lengths = rng.integers(0, 25, (100, 4))
    items = [
        ChoiceExample("", word(rng, a), tuple(word(rng, b) for b in others), int(rng.integers(3)))
        for a, *others in lengths
    ]
    found = encoded(letters, "copa", items, Recipe(max_length=16), train=True)
    cut = 0
    for item, feature in zip(items, found.items, strict=True):
        prompt, wanted = pieces(letters, item.prompt), []
        for choice in item.choices:
            ids, kept = pieces(letters, choice), list(prompt)
            cut += len(ids) + len(kept) > room
            ids = ids[:room]
            while len(kept) + len(ids) > room:
                kept.pop(0)
            wanted.append([0, *kept, *between, *ids, 2])
            assert feature.second[len(wanted) - 1] == 1 + len(kept) + len(between)
        assert [row.tolist() for row in feature.rows] == wanted and feature.label == item.label
    assert found.notes == Counter({features.TRUNCATED: cut}) and cut > 50


def test_choices_without_a_label_are_left_out_of_training_alone(double: Any) -> None:
    items = [ChoiceExample("", "abcdefghijkl", ("a", "b"), None), ChoiceExample("", "c", ("d", "e"), 1)]
    trained = encoded(double, "copa", items, Recipe(max_length=10), train=True)
    # the first one's prompt is too long, but nothing is said of an example that is not used
    assert trained.notes == Counter({features.UNLABELLED: 1})
    assert rows(trained) == [[[0, 12, 2, 2, 13, 2], [0, 12, 2, 2, 14, 2]]] and trained.items[0].label == 1
    assert [f.label for f in encoded(double, "copa", items).items] == [None, 1]


def test_queries_and_passages_of_a_dual_encoder(letters: Any) -> None:
    recipe, between = Recipe(max_length=12, query_length=5), middle(letters)
    room = 12 - 2 - len(between)
    items = [
        MatchExample("", "abcd", "ab", ""),
        MatchExample("", "abc", "ab", "abcdefghijklm"),
        MatchExample("", "a", "abcdefghijklm", "abc"),
        MatchExample("", "a", "abcdefghijklm", ""),
    ]
    found = encoded(letters, "lareqa", items, recipe)
    full = pieces(letters, "abcdefghijklm")
    wanted = [
        [[0, *full[:3], 2], [0, *full[:2], 2]],
        [[0, *full[:3], 2], [0, *full[:2], *between, *full[: room - 2], 2]],
        [[0, *full[:1], 2], [0, *full[:room], *between, 2]],
        [[0, *full[:1], 2], [0, *full[:10], 2]],
    ]
    assert rows(found) == wanted
    seconds = [feature.second for feature in found.items]
    assert seconds == [(5, 4), (5, 3 + len(between)), (3, 1 + room + len(between)), (3, 12)]
    assert found.notes == Counter({features.TRUNCATED: 4})
    # a query is no longer than the model's inputs may be
    long = [MatchExample("", "abcdefghi", "a")]
    assert encoded(letters, "lareqa", long, Recipe(max_length=8, query_length=64)).items[0].length == 8


def test_text_is_cut_at_its_end_and_text_without_pieces_teaches_nothing(double: Any) -> None:
    items = [TextExample("", "abcdefgh"), TextExample("", "  "), TextExample("", "abcd")]
    trained = encoded(double, "mlm", items, Recipe(max_length=6), train=True)
    assert rows(trained) == [[[0, 10, 41, 42, 43, 2]]] * 2 and [f.example for f in trained.items] == [0, 2]
    assert trained.notes == Counter({features.TRUNCATED: 1, features.EMPTY_TEXT: 1})
    assert rows(encoded(double, "mlm", items[1:2])) == [[[0, 2]]]


# --- tagging --------------------------------------------------------------------------------------


def joined(found: Features, count: int) -> list[list[tuple[int, int]]]:
    """(window, row position) of every word of every sentence, in order."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for number, feature in enumerate(found.items):
        first, starts = feature.extra
        assert first == len(places[feature.example]), "windows follow one another, no word twice or left out"
        places[feature.example] += [(number, int(start)) for start in starts]
    return places


def test_sentences_are_split_into_windows_that_hold_every_word_once(double: Any, rng: np.random.Generator) -> None:
    limit, labels = 10, ("A", "B", "C")
    sentences = [[word(rng, n) for n in rng.integers(1, 13, size)] for size in (0, 1, 2, 5, 9, 30, 60)]
    items = [TaggedExample("", tuple(words), tuple(rng.choice(labels, len(words)))) for words in sentences]
    found = encoded(double, "ccg", items, Recipe(max_length=limit), labels=labels, train=True)
    places = joined(found, len(items))
    assert [len(words) for words in places] == [len(item.words) for item in items]
    too_long = 0
    for item, where in zip(items, places, strict=True):
        for name, tag, (number, position) in zip(item.words, item.tags or (), where, strict=True):
            row, label = found.items[number].rows[0].tolist(), found.items[number].label
            long = len(name) > limit - 2
            too_long += long
            own = [3] if long else pieces(double, name)
            assert row[position : position + len(own)] == own and label[position] == labels.index(tag)
    for number, feature in enumerate(found.items):
        row, label = feature.rows[0].tolist(), feature.label
        starts = [p for words in places for n, p in words if n == number]
        assert [p for p, value in enumerate(label) if value != IGNORED] == starts
        assert row[0] == 0 and row[-1] == 2 and len(row) == len(label) <= limit
        after = found.items[number + 1 :][:1]
        if after and after[0].example == feature.example:  # a window ends where the next word does not fit
            next_word = items[feature.example].words[after[0].extra[0]]
            assert len(row) + (1 if len(next_word) > limit - 2 else len(next_word)) > limit
    split = sum(len({number for number, _ in where}) > 1 for where in places)
    assert found.notes == Counter({features.LONG_WORD: too_long, features.SPLIT_SENTENCE: split})
    assert too_long > 5 and split >= 3


def test_words_that_the_tokenizer_drops_are_unknown_but_have_their_tag(xlmr: Any) -> None:
    words, tags = ("Ninakupenda", "\u200b", "日本語", "\u200c", "😀"), ("VERB", "X", "NOUN", "PUNCT", "SYM")
    labels = get("udpos").labels
    found = encoded(xlmr, "udpos", [TaggedExample("", words, tags)], labels=labels, train=True)
    own = [pieces(xlmr, name) or [3] for name in words]
    assert own[1] == own[3] == [3] and len(own[0]) > 1
    (feature,) = found.items
    assert feature.rows[0].tolist() == [0, *(piece for ids in own for piece in ids), 2]
    label = [IGNORED]
    for ids, tag in zip(own, tags, strict=True):
        label += [labels.index(tag)] + [IGNORED] * (len(ids) - 1)
    assert feature.label.tolist() == [*label, IGNORED]
    assert found.notes == Counter({features.UNKNOWN_WORD: 2})


def test_tags_that_are_no_label_are_not_learned_from_and_counted(double: Any) -> None:
    items = [TaggedExample("", ("ab", "c", "d"), ("N", "?", "V")), TaggedExample("", ("a",), None)]
    found = encoded(double, "ccg", items, labels=("N", "V"), train=True)
    assert [f.label.tolist() for f in found.items] == [[IGNORED, 0, IGNORED, IGNORED, 1, IGNORED]]
    assert found.notes == Counter({features.UNKNOWN_TAG: 1, features.UNLABELLED: 1})
    without = encoded(double, "ccg", items)
    assert [f.label for f in without.items] == [None, None] and not without.notes


# --- spans ----------------------------------------------------------------------------------------


def sliding(tokens: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(first, end) of the windows that the SQuAD scripts take."""
    found, start = [], 0
    while True:
        found.append((start, min(start + size, tokens)))
        if start + size >= tokens:
            return found
        start += min(size, stride)


def most_context(windows: list[tuple[int, int]], token: int) -> int:
    """The window that shows the token with most context, as the SQuAD scripts define it."""
    best, best_score = -1, -1.0
    for number, (first, end) in enumerate(windows):
        if first <= token < end:
            score = min(token - first, end - 1 - token) + 0.01 * (end - first)
            if score > best_score:
                best, best_score = number, score
    return best


def by_example(found: Features) -> dict[int, list[Feature]]:
    grouped: dict[int, list[Feature]] = {}
    for feature in found.items:
        grouped.setdefault(feature.example, []).append(feature)
    return grouped


def test_windows_cover_the_context_and_each_token_is_best_in_one(letters: Any, rng: np.random.Generator) -> None:
    between = middle(letters)
    for tokens, asked, stride in [*rng.integers(1, (70, 9, 12), (60, 3)), (20, 4, 99), (14, 4, 7)]:
        recipe = Recipe(max_length=24, query_length=64, doc_stride=int(stride))
        size = 24 - 2 - len(between) - asked
        context, question = word(rng, tokens), word(rng, asked)
        start = int(rng.integers(0, tokens))
        answer = context[start : start + int(rng.integers(1, 12))]
        item = SpanExample("", question, context, (Answer(answer, start),))
        found = encoded(letters, "squad_v1", [item], recipe, train=True)
        windows = sliding(tokens, size, stride)
        ids, last = pieces(letters, context), start + len(answer) - 1
        for (first, end), feature in zip(windows, found.items, strict=True):
            head = [0, *pieces(letters, question), *between]
            window = feature.extra
            assert feature.rows[0].tolist() == [*head, *ids[first:end], 2]
            assert feature.second == (len(head),) and window.first == len(head)
            assert window.offsets.tolist() == [[i, i + 1] for i in range(first, end)]
            inside = first <= start and last < end
            assert feature.label == ((len(head) + start - first, len(head) + last - first) if inside else (0, 0))
        best = [
            [first + i for i, chosen in enumerate(feature.extra.best) if chosen]
            for (first, _), feature in zip(windows, found.items, strict=True)
        ]
        assert sorted(token for own in best for token in own) == list(range(tokens))
        assert all(most_context(windows, token) == n for n, own in enumerate(best) for token in own)
        assert found.notes == (Counter({features.LONG_CONTEXT: 1}) if len(windows) > 1 else Counter())


def test_questions_about_one_context_or_several_are_told_apart(double: Any) -> None:
    items = [
        SpanExample("", "a", "abc de", (Answer("de", 4),)),
        SpanExample("", "b", "abc de", (Answer("abc", 0), Answer("de", 4))),
        SpanExample("", " c ", "de", (Answer("e", 1),)),
        SpanExample("", "d", "abc de", (Answer("c d", 2),)),
    ]
    found = encoded(double, "squad_v1", items, train=True)
    assert [f.rows[0][1] for f in found.items] == [LETTERS[letter] for letter in "abcd"]
    assert [(f.label[0] - 4, f.label[1] - 4) for f in found.items] == [(3, 4), (0, 2), (1, 1), (2, 3)]


def test_questions_without_an_answer(double: Any) -> None:
    items = [
        SpanExample("", "a", "abc", (), impossible=True),
        SpanExample("", "a", "abc", ()),
        SpanExample("", "a", "ab  c", (Answer(" ", 3),)),  # no token touches it
        SpanExample("", "a", "", (), impossible=True),
        SpanExample("", "a", "abc", (Answer("x", None), Answer("y", None))),  # it has no place in the context
        SpanExample("", "a", "abc", (Answer("x", None), Answer("b", 1))),
    ]
    trained = encoded(double, "squad_v2", items, train=True)
    assert [(f.example, f.label != (0, 0)) for f in trained.items] == [(0, False), (3, False), (5, True)]
    dropped = (features.UNANSWERED, features.UNTOUCHED_ANSWER, features.EMPTY_CONTEXT, features.MISPLACED_ANSWER)
    assert trained.notes == Counter(dropped)
    kept = encoded(double, "squad_v2", items)
    assert [f.example for f in kept.items] == list(range(6))
    assert all(f.label == (0, 0) for f in kept.items[:5])
    assert kept.notes == Counter({features.EMPTY_CONTEXT: 1})
    empty = kept.items[3]
    assert empty.rows[0].tolist() == [0, 10, 2, 2, 2] and len(empty.extra.offsets) == len(empty.extra.best) == 0


def test_long_questions_are_cut_and_need_room(double: Any, rng: np.random.Generator) -> None:
    question = word(rng, 70)
    item = SpanExample("", question, "abc", (Answer("b", 1),))
    found = encoded(double, "squad_v1", [item], Recipe(max_length=384))
    row = found.items[0].rows[0].tolist()
    assert row[1:65] == pieces(double, question)[:64] and row[65:67] == [2, 2]
    assert found.notes == Counter({features.TRUNCATED: 1})
    assert encoded(double, "squad_v1", [dataclasses.replace(item, question=question[:64])]).notes == Counter()
    with pytest.raises(InvalidInputError, match="max_length: 68 leaves no room beside a question"):
        encoded(double, "squad_v1", [item], Recipe(max_length=68))
    assert len(encoded(double, "squad_v1", [item], Recipe(max_length=69)).items) == 3


def decoded(context: str, feature: Feature) -> str:
    first, last = (position - feature.extra.first for position in feature.label)
    offsets = feature.extra.offsets
    return context[offsets[first, 0] : offsets[last, 1]].strip()


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        (unicodedata.normalize("NFD", "Tại thành phố Huế năm 1802"), unicodedata.normalize("NFD", "Huế")),
        (unicodedata.normalize("NFD", "le café"), unicodedata.normalize("NFD", "café")),  # the last of the text
        ("రాజధాని హైదరాబాద్\u200c నగరం", "హైదరాబాద్\u200c"),
        ("en Norfolk,\u200b\u200e y luego", "Norfolk,\u200b\u200e"),
        ("en Norfolk, \u200by luego", "Norfolk,"),  # a space comes first
    ],
)
def test_answers_keep_the_characters_that_are_in_no_token(xlmr: Any, context: str, answer: str) -> None:
    example = SpanExample("q", "?", context, (Answer(answer, context.index(answer)),))
    (feature,) = encode(Examples([example]), get("xquad"), xlmr, get("xquad").recipe, train=True).items
    assert decoded(context, feature) == answer


# Share of the windows whose label decodes to the very answer: elsewhere a token holds more than the answer.
EXACT = (0.967, 0.956, 0.970, 0.946, 0.960, 0.989, 0.974, 0.953, 0.996, 0.978, 0.989)


@pytest.mark.parametrize(("language", "share"), list(zip(get("xquad").languages(), EXACT, strict=True)))
def test_xquad_labels_decode_to_the_answer(xlmr: Any, data_dir: Path, language: str, share: float) -> None:
    task = get("xquad")
    examples = Source(data_dir).load(task, "test", language)
    grouped = by_example(encode(examples, task, xlmr, task.recipe, train=True))
    assert len(grouped) == len(examples) > 200
    exact = total = 0
    for number, windows in grouped.items():
        item = examples.items[number]
        answer, context = item.answers[0], item.context
        found = [feature for feature in windows if feature.label != (0, 0)]
        assert found, f"{item.id}: no window holds the answer"
        for feature in found:
            text = decoded(context, feature)
            assert answer.text.strip() in text, item.id
            # no token more than needed: the first and the last one hold a letter of the answer
            first, last = (feature.extra.offsets[position - feature.extra.first] for position in feature.label)
            assert first[1] > answer.start and last[0] < answer.start + len(answer.text), item.id
            exact, total = exact + (text == answer.text), total + 1
    assert exact / total == pytest.approx(share, abs=0.001)
    assert max(len(f.rows[0]) for windows in grouped.values() for f in windows) <= 384
