"""What is known about each language of XTREME and XTREME-R beside its texts: resources, pretraining, benchmarks."""

from __future__ import annotations

from collections.abc import Iterable

from xfast.errors import require_one_of
from xfast.stilts.languages import NAMES
from xfast.study.document import Language
from xfast.study.profiles import JOSHI_CLASS, group_of

# Compressed size of each language's file in the CC-100 listing (statmt.org/cc-100), in GB: the public rebuild of
# XLM-R's pretraining corpus. Quechua, Yoruba, Haitian and Wolof are in CC-100 but not in XLM-R's own list.
_CC100_GB = {
    "jv": 0.037,
    "my": 0.046,
    "ml": 0.831,
    "te": 0.536,
    "az": 1.3,
    "gu": 0.242,
    "qu": 0.0015,
    "sw": 0.332,
    "yo": 0.0011,
    "mr": 0.334,
    "ht": 0.0091,
    "pa": 0.09,
    "wo": 0.0036,
    "af": 0.305,
    "bg": 9.3,
    "bn": 0.86,
    "el": 7.4,
    "et": 1.7,
    "he": 6.1,
    "id": 36,
    "ka": 1.1,
    "kk": 0.889,
    "ms": 2.1,
    "ta": 1.3,
    "th": 8.7,
    "tl": 0.701,
    "ur": 0.884,
    "lt": 3.4,
    "ro": 16,
    "uk": 14,
    "eu": 0.488,
    "nl": 7.9,
    "fi": 15,
    "hi": 2.5,
    "hu": 15,
    "it": 7.8,
    "ko": 14,
    "fa": 20,
    "pt": 13,
    "ru": 46,
    "tr": 5.4,
    "vi": 28,
    "pl": 12,
    "ar": 5.4,
    "de": 18,
    "en": 82,
    "fr": 14,
    "ja": 15,
    "es": 14,
    "zh": 14,
}
_NOT_IN_PRETRAINING = frozenset({"qu", "yo", "ht", "wo"})  # fairseq, examples/xlmr/README

LOW_RESOURCE = ("jv", "my", "ml", "te", "sw", "yo", "mr")
"""XTREME's languages of Joshi class 2 or less: they lead every table."""


def language(code: str) -> Language:
    """What is known about a language.

    Raises:
        InvalidOptionError: it is none of XTREME's or XTREME-R's.
    """
    require_one_of("language", code, ordered(JOSHI_CLASS))
    joshi = JOSHI_CLASS[code]
    return Language(
        name=NAMES[code],
        joshi_class=joshi,
        group=group_of(joshi),
        cc100_gb=_CC100_GB[code],
        in_pretraining=code not in _NOT_IN_PRETRAINING,
    )


def ordered(codes: Iterable[str]) -> list[str]:
    """Languages in the order of every table: XTREME's low-resource ones first, then by Joshi class, then by code."""
    given = set(codes)
    first = [code for code in LOW_RESOURCE if code in given]
    return first + sorted(given - set(first), key=lambda code: (JOSHI_CLASS.get(code, 9), code))
