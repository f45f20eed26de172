"""The languages of every XTREME and XTREME-R task (Hu et al. 2020; Ruder et al. 2021), in the benchmarks' order."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _table(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


XTREME: dict[str, tuple[str, ...]] = {
    task: _words(languages)
    for task, languages in {
        "xnli": "ar bg de el en es fr hi ru sw th tr ur vi zh",
        "pawsx": "de en es fr ja ko zh",
        "udpos": "af ar bg de el en es et eu fa fi fr he hi hu id it ja kk ko mr nl pt ru ta te th tl tr ur vi yo zh",
        "panx": "ar he vi id jv ms tl eu ml ta te af nl en de el bn hi mr ur fa fr it pt es bg ru ja ka ko th sw yo my "
        "zh kk tr et fi hu",
        "xquad": "en es de el ru tr ar vi th zh hi",
        "mlqa": "en es de ar hi vi zh",
        "tydiqa": "en ar bn fi id ko ru sw te",
        "bucc2018": "de fr ru zh",
        "tatoeba": "ar he vi id jv tl eu ml ta te af nl de el bn hi mr ur fa fr it pt es bg ru ja ka ko th sw zh kk tr "
        "et fi hu",
    }.items()
}
"""Languages by task. BUCC and Tatoeba name the other side of each pair with English."""

_EXTRA = {"panx": "qu pl uk az lt pa gu ro", "udpos": "lt pl uk wo ro", "tatoeba": "az lt pl uk ro", "xquad": "ro"}

XTREME_R: dict[str, tuple[str, ...]] = {
    **{
        task: (*XTREME[task], *_words(_EXTRA.get(task, "")))
        for task in ("xnli", "udpos", "panx", "xquad", "mlqa", "tydiqa", "tatoeba")
    },
    "xcopa": _words("et ht id it qu sw ta th tr vi zh"),
    "lareqa": _words("ar de el en es hi ru th tr vi zh"),
    "mewslix": _words("ar de en es fa ja pl ro ta tr uk"),
}
"""Languages by task. PAWS-X and BUCC are retired there; LAReQA's are XQuAD-R's eleven."""

UDPOS_WITHOUT_DEV = ("kk", "th", "tl", "yo")
"""Languages whose treebanks of UD v2.5 hold a test set only."""

NAMES = _table(
    "af:Afrikaans ar:Arabic az:Azerbaijani bg:Bulgarian bn:Bengali de:German el:Greek en:English es:Spanish "
    "et:Estonian eu:Basque fa:Persian fi:Finnish fr:French gu:Gujarati he:Hebrew hi:Hindi ht:Haitian hu:Hungarian "
    "id:Indonesian it:Italian ja:Japanese jv:Javanese ka:Georgian kk:Kazakh ko:Korean lt:Lithuanian ml:Malayalam "
    "mr:Marathi ms:Malay my:Burmese nl:Dutch pa:Punjabi pl:Polish pt:Portuguese qu:Quechua ro:Romanian ru:Russian "
    "sw:Swahili ta:Tamil te:Telugu th:Thai tl:Tagalog tr:Turkish uk:Ukrainian ur:Urdu vi:Vietnamese wo:Wolof "
    "yo:Yoruba zh:Chinese"
)
"""English names. In lower case they begin the question ids of TyDiQA-GoldP."""

ISO3 = _table(
    "af:afr ar:ara az:aze bg:bul bn:ben de:deu el:ell es:spa et:est eu:eus fa:pes fi:fin fr:fra he:heb hi:hin hu:hun "
    "id:ind it:ita ja:jpn jv:jav ka:kat kk:kaz ko:kor lt:lit ml:mal mr:mar nl:nld pl:pol pt:por ro:ron ru:rus sw:swh "
    "ta:tam te:tel th:tha tl:tgl tr:tur uk:ukr ur:urd vi:vie zh:cmn"
)
"""Three-letter codes, which Tatoeba's own file names use."""
