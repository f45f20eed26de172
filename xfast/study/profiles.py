"""Token-length profiles: how long real inputs are, per task and language, without shipping any text.

A profile holds quantiles of the token length of one (task, language), measured once with the XLM-R tokenizer, and a
few figures about words. ``sample_lengths`` turns it back into lengths, so that a demo or a benchmark runs on batches
with the length mix of the real data while needing neither the data nor the tokenizer.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from xfast import files
from xfast.errors import InvalidInputError

FORMAT = 1
"""Version of the profile file; a reader refuses any other."""

PERCENTS: tuple[int, ...] = (0, 5, 10, 25, 50, 75, 90, 95, 99, 100)
"""Where the length distribution is sampled, in percent."""

MAX_LENGTH = 512
"""Tokens that XLM-R, RoBERTa and BERT checkpoints accept; longer inputs count as this long."""

LANGUAGES_WITHOUT_SPACES = frozenset({"ja", "my", "th", "zh"})
"""Languages whose words are not separated by whitespace: words per sample and fertility are unknown there."""

GROUPS: tuple[str, ...] = ("low-resource", "mid-resource", "high-resource")
"""Language groups in the order in which tables list them."""

# Joshi et al. 2020 ("The State and Fate of Linguistic Diversity"), the 50 languages of XTREME and XTREME-R.
_LANGUAGES_BY_JOSHI_CLASS: dict[int, str] = {
    1: "az gu jv ml my qu te",
    2: "ht mr pa sw wo yo",
    3: "af bg bn el et he id ka kk lt ms ro ta th tl uk ur",
    4: "eu fa fi hi hu it ko nl pl pt ru tr vi",
    5: "ar de en es fr ja zh",
}
JOSHI_CLASS: dict[str, int] = {
    language: joshi for joshi, languages in _LANGUAGES_BY_JOSHI_CLASS.items() for language in languages.split()
}
"""Joshi class (0 the least labelled and unlabelled data, 5 the most) by two-letter language code."""

_TOKENIZER_BATCH = 1024


class Tokenizer(Protocol):
    """What ``measure`` needs of a transformers tokenizer."""

    def __call__(self, text: list[str], text_pair: list[str] | None = None, /) -> Any:
        """Return a mapping whose ``input_ids`` holds one list of ids per text, special tokens included."""

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens a single text (or a pair) gets."""


@dataclass(frozen=True)
class LengthProfile:
    """Token lengths of one task in one language. Figures only: no text, no file names.

    Attributes:
        task: task name as in XTREME (``tatoeba``, ``xnli``, ...).
        language: two-letter code as in XTREME.
        count: samples measured; a pair is one sample.
        mean: mean length in tokens, special tokens included, each sample cut at the limit it was measured with.
        quantiles: lengths at ``PERCENTS``, in tokens, ascending; cut like ``mean``.
        words_mean: mean words per sample (by whitespace), or None for a language written without spaces.
        fertility: tokens per word over all samples, uncut, special tokens excluded, or None likewise.
        percent_over_limit: percent of the samples that were longer than the limit and therefore cut.
        joshi_class: 0 to 5, how much data the language has (Joshi et al. 2020).
    """

    task: str
    language: str
    count: int
    mean: float
    quantiles: tuple[float, ...]
    words_mean: float | None
    fertility: float | None
    percent_over_limit: float
    joshi_class: int


def group_of(joshi_class: int) -> str:
    """Return the member of ``GROUPS`` that languages of this class are in: 2 or less, 3, 4 or more."""
    return GROUPS[min(max(joshi_class - 2, 0), 2)]


def measure(
    texts_or_pairs: Sequence[str] | Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    task: str,
    language: str,
    max_length: int | None = MAX_LENGTH,
) -> LengthProfile:
    """Tokenise samples and return the profile of their lengths, rounded to two decimals.

    Args:
        texts_or_pairs: the samples: all single texts, or all (first, second) pairs.
        tokenizer: a transformers tokenizer (or anything with its call) that adds the special tokens.
        task: task name, stored as given.
        language: two-letter code, one of ``JOSHI_CLASS``.
        max_length: samples longer than this many tokens count as this long; None for no limit.

    Raises:
        InvalidInputError: no samples, texts and pairs mixed, an unknown language, a limit below 2.
    """
    if language not in JOSHI_CLASS:
        known = " ".join(sorted(JOSHI_CLASS))
        raise InvalidInputError(f"language {language!r} has no Joshi class here; known: {known}")
    if max_length is not None and max_length < 2:
        raise InvalidInputError(f"max_length must be at least 2 tokens or None, got {max_length}")
    first, second = _split_pairs(texts_or_pairs)
    lengths = np.fromiter(_token_lengths(first, second, tokenizer), dtype=np.int64, count=len(first))
    specials = tokenizer.num_special_tokens_to_add(pair=second is not None)
    words = 0
    if language not in LANGUAGES_WITHOUT_SPACES:
        words = sum(len(text.split()) for text in (*first, *(second or ())))
    cut = lengths if max_length is None else np.minimum(lengths, max_length)
    return LengthProfile(
        task=task,
        language=language,
        count=len(first),
        mean=_rounded(cut.mean()),
        quantiles=tuple(_rounded(value) for value in np.percentile(cut, PERCENTS)),
        words_mean=_rounded(words / len(first)) if words else None,
        fertility=_rounded((int(lengths.sum()) - specials * len(first)) / words) if words else None,
        percent_over_limit=_rounded(100.0 * float((lengths > cut).mean())),
        joshi_class=JOSHI_CLASS[language],
    )


def sample_lengths(profile: LengthProfile, n: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw ``n`` token lengths that follow the profile.

    Inverse-transform sampling: uniform numbers through the quantile function, linear between the stored quantiles.
    The same arguments give the same lengths on every machine.

    Args:
        profile: where the lengths come from.
        n: how many, 0 or more.
        seed: seed of the generator, 0 or more.

    Returns:
        int64 array (n,), every length >= 2 (``<s>`` and ``</s>``) and within the profile's minimum and maximum.

    Raises:
        InvalidInputError: ``n`` or ``seed`` negative.
    """
    if n < 0:
        raise InvalidInputError(f"n must be 0 or more, got {n}")
    if seed < 0:
        raise InvalidInputError(f"seed must be 0 or more, got {seed}")
    uniform = np.random.default_rng(seed).random(n)
    lengths = np.rint(np.interp(uniform, np.asarray(PERCENTS) / 100.0, np.asarray(profile.quantiles)))
    return np.asarray(np.maximum(lengths, 2.0), dtype=np.int64)


def load_profiles(path: str | Path | None = None) -> list[LengthProfile]:
    """Read length profiles: the shipped ones, or those in ``path`` (written by ``save_profiles``).

    Raises:
        InvalidInputError: the file cannot be read, is not JSON, or holds an entry that is not a valid profile; the
            message names the file, the entry and what is wrong with it.
    """
    source = importlib.resources.files("xfast.study") / "profiles.json" if path is None else Path(path)
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"profiles: {source}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested absurdly deep
        raise InvalidInputError(f"profiles: {source}: not a JSON file of length profiles: {error}") from error
    try:
        return _parse_document(document)
    except InvalidInputError as error:
        raise InvalidInputError(f"profiles: {source}: {error}") from error


def save_profiles(
    profiles: Sequence[LengthProfile], path: str | Path, *, tokenizer: str, measured: str, date: str
) -> None:
    """Write profiles as JSON, one per line, low-resource languages first.

    Args:
        profiles: what to write.
        path: the file.
        tokenizer: name of the tokenizer that measured them.
        measured: how they were measured, in words.
        date: ISO date of the measurement.

    Raises:
        InvalidOptionError: the file cannot be written.
    """
    header = {"format": FORMAT, "tokenizer": tokenizer, "measured": measured, "date": date, "percents": list(PERCENTS)}
    rows = sorted(profiles, key=lambda profile: (profile.joshi_class, profile.language, profile.task))
    lines = [json.dumps(asdict(profile), separators=(",", ":")) for profile in rows]
    opening = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items())
    text = "{" + opening + ',\n"profiles": [\n' + ",\n".join(lines) + "\n]}\n"
    files.save("path", Path(path), text.encode())


def _rounded(value: float) -> float:
    return round(float(value), 2)


def _split_pairs(samples: Sequence[str] | Sequence[tuple[str, str]]) -> tuple[list[str], list[str] | None]:
    """Return (first texts, second texts), the latter None when the samples are single texts."""
    if isinstance(samples, str) or len(samples) == 0:
        raise InvalidInputError("texts_or_pairs must be a non-empty sequence of texts or of (first, second) pairs")
    if all(isinstance(sample, str) for sample in samples):
        return list(cast("Sequence[str]", samples)), None
    for index, sample in enumerate(samples):
        is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2
        if not (is_pair and all(isinstance(side, str) for side in sample)):
            raise InvalidInputError(f"texts_or_pairs must be all texts or all pairs; see sample {index}")
    pairs = cast("Sequence[tuple[str, str]]", samples)
    return [first for first, _ in pairs], [second for _, second in pairs]


def _token_lengths(first: list[str], second: list[str] | None, tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the token length of each sample, special tokens included."""
    for start in range(0, len(first), _TOKENIZER_BATCH):  # in batches: the ids of a whole corpus need not fit in memory
        window = slice(start, start + _TOKENIZER_BATCH)
        encoded = tokenizer(first[window]) if second is None else tokenizer(first[window], second[window])
        yield from (len(ids) for ids in encoded["input_ids"])


def _parse_document(document: object) -> list[LengthProfile]:
    """Check a decoded profile file and return its profiles."""
    if not isinstance(document, dict):
        raise InvalidInputError("expected a JSON object")
    if document.get("format") != FORMAT:
        raise InvalidInputError(f"format must be {FORMAT}, got {document.get('format')!r}")
    if document.get("percents") != list(PERCENTS):
        raise InvalidInputError(f"percents must be {list(PERCENTS)}, got {document.get('percents')!r}")
    rows = document.get("profiles")
    if not isinstance(rows, list) or not rows:
        raise InvalidInputError("profiles must be a non-empty list")
    profiles: list[LengthProfile] = []
    seen: set[tuple[str, str]] = set()
    for index, row in enumerate(rows):
        profile = _parse_profile(row, f"profile {index}")
        if (profile.task, profile.language) in seen:
            raise InvalidInputError(f"profile {index}: second profile of {profile.task} {profile.language}")
        seen.add((profile.task, profile.language))
        profiles.append(profile)
    return profiles


def _parse_profile(row: object, where: str) -> LengthProfile:
    """Check one entry and return it as a profile; ``where`` begins every error message."""
    fields = LengthProfile.__dataclass_fields__
    if not isinstance(row, dict) or set(row) != set(fields):
        raise InvalidInputError(f"{where}: expected an object with exactly the fields {', '.join(fields)}")
    for name in ("task", "language"):
        if not isinstance(row[name], str) or not row[name]:
            raise InvalidInputError(f"{where}: {name} must be a non-empty string, got {row[name]!r}")
    if row["language"] not in JOSHI_CLASS:
        accepted = ", ".join(JOSHI_CLASS)
        raise InvalidInputError(f"{where}: language {row['language']!r} is not accepted; accepted: {accepted}")
    for name, low, high in (("count", 1, math.inf), ("joshi_class", 0, 5)):
        if type(row[name]) is not int or not low <= row[name] <= high:
            raise InvalidInputError(f"{where}: {name} must be an integer in [{low}, {high}], got {row[name]!r}")
    quantiles = row["quantiles"]
    if not isinstance(quantiles, list) or len(quantiles) != len(PERCENTS):
        raise InvalidInputError(f"{where}: quantiles must be a list of {len(PERCENTS)} numbers")
    lengths = tuple(_number(value, f"{where}: quantiles", low=0.0) for value in quantiles)
    if any(after < before for before, after in itertools.pairwise(lengths)):
        raise InvalidInputError(f"{where}: quantiles must ascend, got {quantiles}")
    mean = _number(row["mean"], f"{where}: mean", low=lengths[0], high=lengths[-1])
    words, fertility = (
        None if row[name] is None else _number(row[name], f"{where}: {name}", low=0.0)
        for name in ("words_mean", "fertility")
    )
    over = _number(row["percent_over_limit"], f"{where}: percent_over_limit", low=0.0, high=100.0)
    return LengthProfile(
        row["task"], row["language"], row["count"], mean, lengths, words, fertility, over, row["joshi_class"]
    )


def _number(value: object, where: str, *, low: float, high: float = math.inf) -> float:
    """Return a finite JSON number in [low, high] as float; ``where`` begins the error message."""
    # bool is an int in Python, and the JSON reader accepts NaN and Infinity: neither is a length.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInputError(f"{where} must be a number, got {value!r}")
    # The bounds first: an integer too large for a float would overflow in isfinite.
    if not low <= value <= min(high, 1e300) or not math.isfinite(value):
        raise InvalidInputError(f"{where} must be a finite number in [{low}, {high}], got {value!r}")
    return float(value)
