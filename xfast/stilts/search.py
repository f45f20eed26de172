"""The retrieval tasks of the benchmarks: texts through the encoder, neighbours, pairs and rankings.

Tatoeba and BUCC use one hidden state of an encoder that was trained on no pairs (the paper's authors: state 14 of 24,
mean over all tokens). LAReQA and Mewsli-X use a dual encoder's first token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfast.errors import InvalidOptionError
from xfast.stilts import retrieval, retrieval_data, scoring
from xfast.stilts.batches import Padding
from xfast.stilts.data import Source
from xfast.stilts.features import Encoder, Ids, passage
from xfast.stilts.folders import find
from xfast.stilts.languages import ISO3, XTREME_R
from xfast.stilts.prediction import Progress, counter, vectors
from xfast.stilts.task import Recipe

Vectors = npt.NDArray[np.float32]

CANDIDATES = "candidates"
"""What stands in a language's place where all languages' candidates are meant."""

DEFAULT_LAYER = 14 / 24
"""Depth of the hidden state for Tatoeba and BUCC: state 14 of XLM-R large (jiant); 7 of base in proportion."""


def layer_of(config: Any, layer: int | None) -> int:
    """The hidden state to use.

    Raises:
        InvalidOptionError: the model has no such layer.
    """
    layers = config.num_hidden_layers
    if layer is None:
        return max(1, round(DEFAULT_LAYER * layers))
    if not 1 <= layer <= layers:
        raise InvalidOptionError(f"layer: {layer}; the model has 1 to {layers}")
    return layer


class StateOf:
    """One hidden state of an encoder that cannot be truncated, in place of its last one; all its layers run."""

    def __init__(self, model: Any, layer: int) -> None:
        self.model, self.layer = model, layer

    def __call__(self, **inputs: Any) -> Any:
        """An output whose ``last_hidden_state`` is the wanted state."""
        states = self.model(**inputs, output_hidden_states=True).hidden_states
        return SimpleNamespace(last_hidden_state=states[self.layer])


@dataclass
class Found:
    """Predictions of one language, in the form that the metric takes, and gold likewise (None: withheld)."""

    predicted: Any
    gold: Any
    examples: int
    notes: Counter[str] = field(default_factory=Counter)


@dataclass
class Engine:
    """Texts to vectors.

    Attributes:
        forward: the encoder, accelerated or not.
        recipe: length limits.
        pooling: for Tatoeba and BUCC; rankings use the first token.
        cache: vectors of candidates that several languages share.
        shared: what was cut in these, which is no single language's.
    """

    forward: Any
    tokenizer: Any
    padding: Padding
    device: torch.device
    recipe: Recipe
    pooling: str
    progress: Progress | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    shared: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer, self.recipe)

    def candidates(self, name: str, make: Callable[[], Any]) -> Any:
        """Candidates that several languages share, made for the first of them."""
        if name not in self.cache:
            self.cache[name] = make()
            self.shared.update(self.encoder.notes)
            self.encoder.notes.clear()
        return self.cache[name]

    def embed(self, rows: Sequence[tuple[Ids, int]], language: str, pooling: str) -> Vectors:
        """[rows, hidden_size]."""
        return vectors(
            self.forward,
            [ids for ids, _ in rows],
            self.padding,
            self.device,
            pooling=pooling,
            second=[start for _, start in rows],
            progress=counter(self.progress, language, len(rows)),
        )

    def texts(
        self, texts: Sequence[str], language: str, pooling: str | None = None, limit: int | None = None
    ) -> Vectors:
        """[texts, hidden_size] of single texts, cut at ``limit`` tokens."""
        rows = [self.encoder.single(ids, limit) for ids in self.encoder.ids(texts)]
        return self.embed(rows, language, pooling or self.pooling)


def run(engine: Engine, task: str, source: Source, language: str, split: str, limit: int | None) -> Found:
    """One language of a retrieval task.

    Raises:
        FileNotFoundError: the language has no data, or nothing in it (the caller reports it as missing).
        DataFileError: a file is malformed.
    """
    folder = source.folder
    if folder is None:
        raise InvalidOptionError(f"data: {task} needs a data folder")
    engine.encoder.notes.clear()
    found = _RUNS[task](engine, folder, language, split, limit)
    found.notes.update(engine.encoder.notes)
    return found


def _require(folder: Path, *alternatives: str) -> Path:
    found = next(filter(None, (find(folder, name) for name in alternatives)), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(alternatives)}")
    return found


def _some(path: Path, count: int, what: str) -> None:
    """Nothing to search with, or in, is as good as no file."""
    if not count:
        raise FileNotFoundError(f"{path}: no {what}")


def _tatoeba(engine: Engine, folder: Path, language: str, split: str, limit: int | None) -> Found:
    code = ISO3.get(language, language)
    path = _require(folder, f"tatoeba/{language}-en.{language}", f"tatoeba/tatoeba.{code}-eng.{code}")
    data = retrieval_data.tatoeba(folder, language)
    _some(path, len(data.foreign), "sentence")
    english = data.english if limit is None else data.english[:limit]
    foreign = engine.texts(data.foreign, language)
    rows = retrieval.nearest(engine.texts(english, language), foreign, 1)[1][:, 0]
    # as strings: the benchmark compares the lines of two files
    gold = None if data.gold is None else [str(row) for row in data.gold[: len(english)]]
    return Found([str(row) for row in rows], gold, len(english))


def _bucc(engine: Engine, folder: Path, language: str, split: str, limit: int | None) -> Found:
    """Mine, and take the threshold that is best on the dev set; on the dev set itself that is optimistic."""
    dev = data = _bucc_sentences(folder, language, "dev")  # the threshold is chosen on it
    if dev.gold is None:
        raise FileNotFoundError(
            f"{folder}: neither bucc2018/{language}-en.dev.gold nor labels/bucc2018/dev-{language}.tsv"
        )
    if split == "test":
        data = _bucc_sentences(folder, language, "test")
    notes: Counter[str] = Counter()
    if limit is not None:
        notes["the limit is not applied: mining needs all sentences"] += 1
    scores = _mined(engine, dev, language, notes)
    threshold = retrieval.best_threshold(scores, dev.gold)
    if split == "test":
        scores = _mined(engine, data, language, notes)
    else:
        notes["threshold chosen on the data it is scored on"] += 1
    return Found(retrieval.apply_threshold(scores, threshold), data.gold, len(data.source), notes)


def _bucc_sentences(folder: Path, language: str, split: str) -> retrieval_data.Bucc:
    paths = [_require(folder, f"bucc2018/{language}-en.{split}.{side}") for side in (language, "en")]
    data = retrieval_data.bucc(folder, language, split)
    for path, side in zip(paths, (data.source, data.target), strict=True):
        _some(path, len(side), "sentence")
    return data


def _mined(
    engine: Engine, data: retrieval_data.Bucc, language: str, notes: Counter[str]
) -> dict[tuple[str, str], float]:
    source, target = engine.texts(data.source.texts, language), engine.texts(data.target.texts, language)
    pairs = retrieval.mine(source, target, data.source.texts, data.target.texts)
    return retrieval.bucc_pairs(pairs, data.source, data.target, notes)


def _lareqa(engine: Engine, folder: Path, language: str, split: str, limit: int | None) -> Found:
    path = _require(folder, f"lareqa/xquad-r/{language}.json")
    official = XTREME_R["lareqa"]

    def made() -> tuple[retrieval_data.Ranking, Vectors]:
        present = [name for name in official if find(folder, f"lareqa/xquad-r/{name}.json")]
        data = retrieval_data.lareqa(folder, present)
        encoder = engine.encoder
        passages = zip(encoder.ids(data.candidates.sentences), encoder.ids(data.candidates.contexts), strict=True)
        rows = [passage(encoder, sentence, context) for sentence, context in passages]
        return data, engine.embed(rows, CANDIDATES, "cls")

    data, candidates = engine.candidates("lareqa", made)
    which = [i for i, name in enumerate(data.queries.languages) if name == language][:limit]
    _some(path, len(which), f"question with a sentence that answers it; left out: {dict(data.skipped[language])}")
    texts = [data.queries.texts[i] for i in which]
    ids = [data.queries.ids[i] for i in which]
    queries = engine.texts(texts, language, "cls", engine.recipe.query_length)
    ranked = dict(zip(ids, retrieval.rank(queries, candidates, data.candidates.ids), strict=True))
    notes = Counter(data.skipped[language])
    if absent := [name for name in official if name not in data.queries.languages]:
        notes[f"no candidates in {', '.join(absent)}: not the official score, which searches all {len(official)}"] += 1
    return Found(ranked, {name: sorted(data.gold[name]) for name in ids}, len(ids), notes)


def _mewslix(engine: Engine, folder: Path, language: str, split: str, limit: int | None) -> Found:
    places = f"mewslix/wikinews_mentions/{split}-{language}.jsonl", f"mewslix/wikinews_mentions-{split}.jsonl"
    mentions = _require(folder, *places)
    entities = _require(folder, "mewslix/candidate_set_entities.jsonl")

    def made() -> tuple[tuple[str, ...], Vectors]:
        known = retrieval_data.mewslix_entities(entities)
        _some(entities, len(known), "entity")
        return known.ids, engine.texts(known.texts, CANDIDATES, "cls")

    data = retrieval_data.mewslix_mentions(mentions, language)
    _some(mentions, len(data.queries), f"mention in {language}")
    ids, candidates = engine.candidates("mewslix", made)
    names = data.queries.ids[:limit]
    queries = engine.texts(data.queries.texts[:limit], language, "cls", engine.recipe.query_length)
    ranked = dict(zip(names, retrieval.rank(queries, candidates, ids), strict=True))
    known = scoring.mewslix_gold(folder, data, split, language)
    gold = None if known is None else {name: sorted(known[name]) for name in names}
    return Found(ranked, gold, len(names), Counter(data.skipped))


_RUNS: dict[str, Callable[[Engine, Path, str, str, int | None], Found]] = {
    "tatoeba": _tatoeba,
    "bucc2018": _bucc,
    "lareqa": _lareqa,
    "mewslix": _mewslix,
}
