"""What a finished study says, as one JSON document: the contract between measuring (``summary.py``) and reporting.

Everything in it is plain JSON. Times are seconds where the name says nothing else, rates are per second, shares are
0 to 1. ``None`` means "not known here" (no energy counter, a language without word boundaries, no labels), never zero.
Languages come low-resource first: Joshi class, then the order of ``profiles.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from xfast.errors import DataFileError

FORMAT = 2
"""Version of the document; a reader refuses any other."""

BASELINE, INTERMEDIATE, CONTROL = "baseline", "intermediate", "control"
"""The arms: without and with intermediate training, and the baseline a second time (A/A)."""

EQUIVALENT, DIFFERENT, UNDECIDED = "equivalent", "different", "undecided"
"""Verdicts: the 90 % interval lies inside the margin; else the 95 % interval excludes 1; else."""

PERCENTILES = tuple(range(0, 101, 5))
"""Where ``Latency.quantiles_ms`` is sampled, in percent."""

NOTHING_KNOWN = (0.01, 100.0)
"""The interval of a ratio of which there are too few pairs to say anything."""

TEXTS_NEEDED = {"p95_ms": 20, "p99_ms": 100}
"""Texts from which on a quantile of ``Latency`` is given: one of them lies beyond it."""


class Language(TypedDict):
    """A language of the study."""

    name: str
    joshi_class: int
    group: str  # low-resource, mid-resource, high-resource: profiles.GROUPS
    cc100_gb: float  # XLM-R's pretraining text, compressed; one thousandth and less for the smallest
    in_pretraining: bool


class Arm(TypedDict):
    """One set of weights."""

    source: str  # "seeded" or the checkpoint's folder
    description: str


class Size(TypedDict):
    """A model size."""

    parameters: int
    layers: int
    hidden_size: int


class Engine(TypedDict):
    """A backend with a precision; "stock" is transformers itself."""

    backend: str
    precision: str
    device: str
    explain: str


class Throughput(TypedDict):
    """One arm of a throughput cell: medians over the rounds."""

    samples_per_s: float
    tokens_per_s: float
    words_per_s: float | None
    tokens_per_s_interval: list[float]  # 95 %, see statistics.interval
    joules_per_sample: float | None


class Latency(TypedDict):
    """One arm of a latency cell: every response on its own (batch 1).

    Quantiles are over texts, of each text the median of its responses: the same text again says nothing about others.
    """

    p50_ms: float
    p95_ms: float | None  # from TEXTS_NEEDED texts on
    p99_ms: float | None  # likewise
    texts: int
    responses: int  # each text is answered several times
    quantiles_ms: list[float]  # at PERCENTILES
    unknown: dict[str, str]  # why the fields that are null are


class Ratio(TypedDict):
    """Time of one arm over the time of the baseline, from paired visits; above 1 is slower."""

    ratio: float
    interval95: list[float]
    pairs: int


class Cell(TypedDict):
    """One combination of factors. ``throughput`` for batches of ``batch_size``, ``latency`` for single responses."""

    key: str
    kind: str  # throughput, latency
    size: str
    engine: str
    task: str
    language: str
    policy: str  # arrival, sorted, budget; "single" for latency
    batch_size: int
    samples: int
    tokens: int
    words: int | None
    padding: float  # share of padded slots, given to stock engines; xfast does not compute them
    fertility: float | None  # tokens per word
    windows_per_example: float | None  # question answering
    rounds: int
    throughput: dict[str, Throughput]  # by arm; empty for latency cells
    latency: dict[str, Latency]  # by arm; empty for throughput cells
    ratios: dict[str, Ratio]  # by arm other than the baseline


class _Needed(TypedDict, total=False):
    """What older documents have not: theirs have ``pairs_needed`` also where cells are the units."""

    cells_needed: int | None  # likewise, where cells are the units of the test


class Equivalence(_Needed):
    """Two one-sided tests of one ratio against a margin."""

    scope: str  # "all", or "base native int8", "low-resource", "latency", a language
    arm: str  # over the baseline
    ratio: float
    interval90: list[float]  # what the two tests at 5 % compare with the margin
    interval95: list[float]
    p_value: float
    margin: float
    verdict: str  # EQUIVALENT, DIFFERENT, UNDECIDED
    pairs: int
    cells: int  # what the pairs belong to; from three on they are the units of the test
    # Where pairs are the units: how many find equal arms equivalent, with a power of 0.9 at the noise seen. None where
    # that is found, where there are as many, or where no number would do.
    pairs_needed: int | None


class CostModel(TypedDict):
    """Least squares of time on tokens and sequences, over languages, for one size, engine and arm "baseline"."""

    size: str
    engine: str
    task: str
    policy: str
    batch_size: int
    us_per_token: float
    us_per_sequence: float
    r2: float
    languages: int
    # Share of the variance of log samples/s between languages: length (tokens a sample), fertility, padding, ...
    explained: dict[str, float]
    explained_over: dict[str, int]  # languages behind each of these shares
    predicted: dict[str, float]  # samples/s by language
    seen: dict[str, float]


class Accuracy(TypedDict):
    """A score on labelled data."""

    arm: str
    size: str
    engine: str
    task: str
    language: str
    layers: int | None  # None: all
    metric: str
    value: float  # 0 to 100
    examples: int


class ParetoPoint(TypedDict):
    """Accuracy against cost, averaged over the languages of a task (or one of its groups)."""

    arm: str
    size: str
    engine: str
    task: str
    group: str  # "all" or a resource group
    layers: int | None
    accuracy: float
    ms_per_sample: float
    estimated: bool  # the cost of a truncated encoder: the whole one's by its share of the layers
    on_front: bool


class _Own(TypedDict, total=False):
    """What older documents have not: the same two figures of the baseline arm itself, over the same choices."""

    own_accuracy: float
    own_ms: float


class Trade(_Own):
    """What intermediate training buys in one language: accuracy at the baseline's cost, and its accuracy for less.

    The reference is the baseline arm, whole, with the first engine that has scores and times. ``None``: no point of the
    other arm is as cheap, or as accurate. Costs are in ms a sample; "cost" and "time" mean the same here. Other engines
    and fewer layers may save as much without training: what it buys is the difference from the baseline's own best.
    """

    size: str
    task: str
    language: str
    engine: str  # the reference's
    accuracy: float
    ms_per_sample: float
    best_accuracy: float | None  # of the intermediate arm at no more than 1 + margin times the reference's cost
    best_by: str | None  # engine, and the layers where truncated
    least_ms: float | None  # of the intermediate arm at no less than the reference's accuracy
    least_by: str | None


class Probe(TypedDict):
    """One figure that intermediate training could change although the graph is the same."""

    probe: str  # quantisation, layer, answers, early
    arm: str
    size: str
    task: str
    language: str
    x: float | str | None  # the layer, the engine, ...
    what: str  # what the value is, in words: "cosine with fp32, worst sentence"
    value: float


class _Resumed(TypedDict, total=False):
    """What is there only where it is so."""

    resumed: bool  # several runs measured the group: one of them may have been killed at a higher peak


class Memory(_Resumed):
    """Of the process that held the arms of one size and engine."""

    size: str
    engine: str
    arms: int
    peak_bytes: int


class Skipped(TypedDict):
    """What was planned or asked for and not measured."""

    what: str
    why: str


class Scaling(TypedDict):
    """Speed over languages of one resource group on one task, by model size."""

    size: str
    engine: str
    arm: str
    group: str  # "all" or a resource group
    task: str
    parameters: int
    samples_per_s: float  # geometric mean over languages
    tokens_per_s: float
    p50_ms: float | None


class _Held(TypedDict, total=False):
    """What documents have since packed artifacts can be arms; older ones say nothing of it."""

    held: dict[str, dict[str, str]]  # by "size engine" and arm: how the weights were had and kept


class Study(_Held):
    """The whole document."""

    format: int
    title: str
    created: str  # ISO 8601
    seconds: float  # of all runs; of one that was stopped up to the last thing that it stored
    settings: dict[str, Any]
    text: str  # "profiles" or "real text"
    machine: dict[str, Any]
    arms: dict[str, Arm]
    sizes: dict[str, Size]
    engines: dict[str, Engine]
    languages: dict[str, Language]
    cells: list[Cell]
    control: Equivalence
    equivalence: list[Equivalence]
    scaling: list[Scaling]
    cost_models: list[CostModel]
    accuracy: list[Accuracy]
    pareto: list[ParetoPoint]
    trades: list[Trade]
    probes: list[Probe]
    memory: list[Memory]
    skipped: list[Skipped]
    notes: list[str]


def part(kind: Any, record: Mapping[str, Any]) -> Any:
    """A part of the document, from a record that has its fields among others."""
    wanted = [name for name in kind.__annotations__ if name in record or name in kind.__required_keys__]
    return kind(**{name: record[name] for name in wanted})


def passed(control: Equivalence) -> bool:
    """Whether the A/A control came out within the margin, with its 95 % interval."""
    low, high = control["interval95"]
    return 1 / (1 + control["margin"]) <= low and high <= 1 + control["margin"]


def load(path: Path) -> Study:
    """Read a document that ``xfast study run`` wrote.

    Raises:
        DataFileError: it cannot be read, is not JSON, or has another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFileError(f"{path}: cannot read the study: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        given = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise DataFileError(f"{path}: a study of format {FORMAT} is expected, got {given!r}")
    missing = sorted(Study.__required_keys__ - set(found))
    if missing:
        raise DataFileError(f"{path}: not a whole study: {', '.join(missing)} missing")
    if not isinstance(found["settings"], dict):
        raise DataFileError(f"{path}: settings: an object is expected, got {type(found['settings']).__name__}")
    for part in ("sizes", "engines"):  # the order of every table and figure
        asked = list(found["settings"].get(part, ()))
        found[part] = dict(sorted(found[part].items(), key=lambda item: rank(asked, item[0])))
    return cast("Study", found)


def rank(names: Sequence[Any], name: Any) -> int:
    """Place of a name among others; what is not there comes last."""
    return names.index(name) if name in names else len(names)
