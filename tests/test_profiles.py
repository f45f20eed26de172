"""Length profiles: the shipped figures, sampling from them, and measuring new ones."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xfast.errors import InvalidInputError
from xfast.study.profiles import (
    GROUPS,
    JOSHI_CLASS,
    LANGUAGES_WITHOUT_SPACES,
    MAX_LENGTH,
    PERCENTS,
    LengthProfile,
    group_of,
    load_profiles,
    measure,
    sample_lengths,
    save_profiles,
)

REPOSITORY = Path(__file__).resolve().parents[1]
LOW_RESOURCE = {"jv", "my", "ml", "te", "sw", "yo", "mr"}
TASKS = {
    *("bucc2018", "lareqa", "mlm", "mlqa", "panx", "pawsx", "siqa"),
    *("tatoeba", "tydiqa", "udpos", "xcopa", "xnli", "xquad"),
}


@pytest.fixture(scope="module")
def shipped() -> list[LengthProfile]:
    return load_profiles()


@pytest.fixture(scope="module")
def toy_tokenizer() -> Any:
    """A real transformers tokenizer with one token per whitespace-separated word and XLM-R's pair template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class SentencePieceTokenizer:
    """XLM-R's lengths straight from SentencePiece, not through transformers as the shipped ones were measured."""

    def __init__(self, model: Path) -> None:
        self.processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(model))

    def __call__(self, text: list[str], text_pair: list[str] | None = None, /) -> dict[str, list[list[int]]]:
        assert text_pair is None, "only single texts are re-measured"
        return {"input_ids": [[0, *(piece + 1 for piece in ids), 2] for ids in self.processor.encode(text)]}

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 4 if pair else 2


def profile_of(profiles: list[LengthProfile], task: str, language: str) -> LengthProfile:
    (found,) = (profile for profile in profiles if (profile.task, profile.language) == (task, language))
    return found


def make_profile(**changes: Any) -> LengthProfile:
    fields: dict[str, Any] = {
        "task": "tatoeba",
        "language": "sw",
        "count": 10,
        "mean": 9.5,
        "quantiles": (3.0, 4.0, 5.0, 7.0, 9.0, 11.0, 14.0, 17.0, 25.0, 40.0),
        "words_mean": 4.0,
        "fertility": 1.9,
        "percent_over_limit": 0.0,
        "joshi_class": 2,
    }
    return LengthProfile(**{**fields, **changes})


# --- the shipped profiles


def test_shipped_profiles_cover_the_benchmark(shipped: list[LengthProfile]) -> None:
    languages = {profile.language for profile in shipped}
    assert len(languages) >= 40
    assert languages >= LOW_RESOURCE
    assert {profile.task for profile in shipped} == TASKS
    assert len({(profile.task, profile.language) for profile in shipped}) == len(shipped)


def test_shipped_profiles_are_consistent(shipped: list[LengthProfile]) -> None:
    for profile in shipped:
        quantiles = np.asarray(profile.quantiles)
        assert quantiles.shape == (len(PERCENTS),)
        assert np.all(np.diff(quantiles) >= 0), profile
        assert 3 <= quantiles[0] <= profile.mean <= quantiles[-1] <= MAX_LENGTH, profile
        assert profile.count >= 40, profile
        assert profile.joshi_class == JOSHI_CLASS[profile.language]
        spaceless = profile.language in LANGUAGES_WITHOUT_SPACES
        assert (profile.words_mean is None) == (profile.fertility is None) == spaceless, profile
        assert profile.fertility is None or 1.0 <= profile.fertility <= 4.0, profile
        assert (profile.percent_over_limit > 0) <= (quantiles[-1] == MAX_LENGTH), profile


def test_shipped_file_holds_figures_only() -> None:
    text = (REPOSITORY / "xfast" / "study" / "profiles.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert text.isascii()
    assert len(text) < 200_000
    assert set(document) == {"format", "tokenizer", "measured", "date", "percents", "profiles"}
    assert re.search(r"(?<!<)/|\\", text) is None  # no path: a slash stands in </s> alone
    for row in document["profiles"]:
        strings = {name: value for name, value in row.items() if isinstance(value, str)}
        assert set(strings) == {"task", "language"}
        assert strings["task"] in TASKS
        assert strings["language"] in JOSHI_CLASS


def test_groups_follow_the_joshi_class(shipped: list[LengthProfile]) -> None:
    assert [group_of(joshi) for joshi in range(6)] == [
        *("low-resource", "low-resource", "low-resource", "mid-resource", "high-resource", "high-resource")
    ]
    assert {group_of(profile.joshi_class) for profile in shipped} == set(GROUPS)
    low = {profile.language for profile in shipped if group_of(profile.joshi_class) == GROUPS[0]}
    assert low == LOW_RESOURCE | {"qu"}  # qu is XTREME-R's


# --- sampling


def test_samples_follow_every_shipped_profile(shipped: list[LengthProfile]) -> None:
    errors = []
    for profile in shipped:
        lengths = sample_lengths(profile, 20_000, seed=7)
        assert lengths.shape == (20_000,)
        assert lengths.dtype == np.int64
        assert max(2, round(profile.quantiles[0])) <= lengths.min()
        assert lengths.max() <= round(profile.quantiles[-1])
        # A stored quantile is off by one token at most where the sampled length is rounded, plus sampling noise.
        np.testing.assert_allclose(np.percentile(lengths, [25, 50, 75]), profile.quantiles[3:6], rtol=0.06, atol=1.0)
        errors.append(abs(lengths.mean() / profile.mean - 1))
    # The line between the 99 % quantile and the maximum overstates the tail; 9 % in the most skewed profile.
    assert max(errors) < 0.10
    assert np.mean(errors) < 0.03


def test_sampling_is_deterministic_by_seed() -> None:
    profile = make_profile()
    np.testing.assert_array_equal(sample_lengths(profile, 100, seed=3), sample_lengths(profile, 100, seed=3))
    assert (sample_lengths(profile, 100, seed=3) != sample_lengths(profile, 100, seed=4)).any()
    np.testing.assert_array_equal(sample_lengths(profile, 5, seed=0), [10, 7, 4, 3, 12])


def test_sampled_lengths_are_at_least_two() -> None:
    assert (sample_lengths(make_profile(quantiles=(0.0,) * 10, mean=0.0), 50, seed=0) == 2).all()
    assert sample_lengths(make_profile(), 0, seed=0).shape == (0,)


@pytest.mark.parametrize(("n", "seed", "name"), [(-1, 0, "n must"), (1, -1, "seed must")])
def test_negative_sampling_arguments_are_refused(n: int, seed: int, name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        sample_lengths(make_profile(), n, seed)


# --- measuring


def test_measure_agrees_with_hand_counts(toy_tokenizer: Any) -> None:
    texts = [" ".join(["w"] * words) for words in (1, 2, 3, 10)]
    profile = measure(texts, toy_tokenizer, task="toy", language="sw")
    assert (profile.task, profile.language, profile.count) == ("toy", "sw", 4)
    assert profile.mean == 6.0  # 3, 4, 5, 12
    assert profile.quantiles[0] == 3.0
    assert profile.quantiles[4] == 4.5
    assert profile.quantiles[-1] == 12.0
    assert (profile.words_mean, profile.fertility) == (4.0, 1.0)
    assert (profile.percent_over_limit, profile.joshi_class) == (0.0, 2)


def test_measure_counts_four_special_tokens_in_a_pair(toy_tokenizer: Any) -> None:
    profile = measure([("a b", "c"), ("a", "")], toy_tokenizer, task="toy", language="en")
    assert profile.quantiles[0] == 5.0
    assert profile.quantiles[-1] == 7.0
    assert (profile.mean, profile.words_mean, profile.fertility) == (6.0, 2.0, 1.0)


def test_measure_cuts_at_the_limit_but_not_the_fertility(toy_tokenizer: Any) -> None:
    texts = ["a b", "a b c d e f g h"]
    profile = measure(texts, toy_tokenizer, task="toy", language="en", max_length=6)
    assert (profile.quantiles[-1], profile.mean, profile.percent_over_limit) == (6.0, 5.0, 50.0)
    assert (profile.words_mean, profile.fertility) == (5.0, 1.0)
    assert measure(texts, toy_tokenizer, task="toy", language="en", max_length=None).quantiles[-1] == 10.0


def test_measure_gives_no_word_figures_without_spaces_or_words(toy_tokenizer: Any) -> None:
    for texts, language in ((["a b"], "th"), (["", " "], "en")):
        profile = measure(texts, toy_tokenizer, task="toy", language=language)
        assert profile.words_mean is None
        assert profile.fertility is None


def test_measure_does_not_depend_on_its_batches(toy_tokenizer: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 2500)
    profile = measure(["w " * int(n) for n in lengths], toy_tokenizer, task="toy", language="en")
    assert profile.mean == round(float(lengths.mean()) + 2, 2)
    np.testing.assert_allclose(profile.quantiles, np.percentile(lengths + 2, PERCENTS), atol=0.005)


@pytest.mark.parametrize(
    ("samples", "arguments", "message"),
    [
        ([], {}, "non-empty"),
        ("one text", {}, "non-empty"),
        (["a", ("b", "c")], {}, "sample 0"),
        ([("a", "b"), ("b", "c", "d")], {}, "sample 1"),
        ([("a", 1)], {}, "sample 0"),
        (["a"], {"language": "xx"}, "'xx'"),
        (["a"], {"max_length": 1}, "max_length"),
    ],
)
def test_measure_refuses_bad_input(toy_tokenizer: Any, samples: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        measure(samples, toy_tokenizer, **{"task": "toy", "language": "en", **arguments})


# --- the file


def save(path: Path, profiles: list[LengthProfile]) -> None:
    save_profiles(profiles, path, tokenizer="toy", measured="by hand", date="2026-01-01")


def test_saved_profiles_are_loaded_again_low_resource_first(tmp_path: Path) -> None:
    low = make_profile()
    high = make_profile(language="zh", joshi_class=5, words_mean=None, fertility=None)
    save(tmp_path / "p.json", [high, low])
    assert load_profiles(tmp_path / "p.json") == [low, high]
    assert load_profiles(str(tmp_path / "p.json")) == [low, high]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_files_that_hold_no_profiles_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"bad\.json"):
        load_profiles(tmp_path / "bad.json")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(InvalidInputError, match=re.escape(path.name)):
            load_profiles(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", 3),
        ("language", ""),
        *(("count", value) for value in (0, -1, 1.5, True, "9", None)),
        *(("mean", value) for value in (float("nan"), float("inf"), "9", None, -1.0, 1e6, True)),
        *(("quantiles", value) for value in (None, [], [1.0] * 9, ["1"] * 10, [9.0] * 9 + [1.0], [10**400] * 10)),
        *(("words_mean", value) for value in (-1.0, "4", float("nan"))),
        ("fertility", [1.0]),
        ("percent_over_limit", 101.0),
        *(("joshi_class", value) for value in (-1, 6, 2.0)),
    ],
)
def test_malformed_entries_are_refused(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "bad.json"
    save(path, [make_profile()])
    document = json.loads(path.read_text(encoding="utf-8"))
    document["profiles"][0][name] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InvalidInputError, match=f"profile 0: {name}"):
        load_profiles(path)


def test_malformed_documents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    save(path, [make_profile()])
    good = json.loads(path.read_text(encoding="utf-8"))
    row = good["profiles"][0]
    missing = {name: value for name, value in row.items() if name != "mean"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format": 2}, "format must be 1"),
        ({"percents": [0, 100]}, "percents"),
        ({"profiles": []}, "non-empty"),
        ({"profiles": {}}, "non-empty"),
        ({"profiles": [row, row]}, "profile 1: second profile of tatoeba sw"),
        ({"profiles": ["text"]}, "profile 0: expected an object"),
        ({"profiles": [missing]}, "exactly the fields"),
        ({"profiles": [{**row, "text": "x"}]}, "exactly the fields"),
    ]
    for change, message in changes:
        path.write_text(json.dumps({**copy.deepcopy(good), **change}), encoding="utf-8")
        with pytest.raises(InvalidInputError, match=message):
            load_profiles(path)


# --- against the real data


@pytest.mark.parametrize(("language", "mean", "p95"), [("sw", 9.3, 21), ("te", 10.6, 17)])
def test_shipped_tatoeba_figures_are_measured_again(
    shipped: list[LengthProfile], data_dir: Path, language: str, mean: float, p95: int
) -> None:
    tokenizer = SentencePieceTokenizer(data_dir / "tokenizer" / "xlmr" / "sentencepiece.bpe.model")
    text = (data_dir / "xtreme" / "tatoeba" / f"{language}-en.{language}").read_text(encoding="utf-8")
    measured = measure(text.removesuffix("\n").split("\n"), tokenizer, task="tatoeba", language=language)
    assert measured == profile_of(shipped, "tatoeba", language)
    assert round(measured.mean, 1) == mean
    assert measured.quantiles[PERCENTS.index(95)] == pytest.approx(p95, abs=1)


def test_shipped_tatoeba_figures_agree_with_the_table_of_the_data(shipped: list[LengthProfile], data_dir: Path) -> None:
    """The data's README gives sentences, mean, p95 and max per language, counted by others."""
    readme = (data_dir / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z]{2}) \| (\d+) \| ([\d.]+) \| (\d+) \| (\d+) \| [\d.]+ \|$", readme, re.MULTILINE)
    if not rows:
        pytest.skip("the data's README has no table of Tatoeba lengths")
    assert len(rows) == 36
    for language, count, mean, p95, longest in rows:
        profile = profile_of(shipped, "tatoeba", language)
        assert profile.count == int(count)
        assert profile.mean == pytest.approx(float(mean), abs=0.06), language
        assert profile.quantiles[PERCENTS.index(95)] == pytest.approx(int(p95), abs=1), language
        assert profile.quantiles[-1] == int(longest), language
