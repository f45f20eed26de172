"""What a study varies: settings, engines, tasks with their heads, and the cells that follow from them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from xfast.benchmarks.models import SIZES
from xfast.errors import InvalidOptionError, require_one_of
from xfast.options import BACKENDS, PRECISIONS
from xfast.stilts.languages import XTREME, XTREME_R
from xfast.stilts.task import CHOICE, CLASSIFICATION, SPAN, TAGGING
from xfast.stilts.tasks import get
from xfast.study.languages import ordered
from xfast.study.profiles import JOSHI_CLASS

EMBEDDING = "embedding"
"""The type of tasks that read the encoder itself: retrieval, mining, plain text."""

ONE_TASK = "one"
"""As a task: for every language one, the first of ``PREFERRED`` that it has, so that all languages are covered once."""

PREFERRED = (
    *("panx", "tatoeba", "udpos", "xnli", "xquad", "tydiqa", "mlqa"),
    *("pawsx", "xcopa", "bucc2018", "lareqa", "mlm", "siqa", "mewslix"),
)

TYPES = {
    task: kind if (kind := get(task).type) in (CLASSIFICATION, CHOICE, SPAN, TAGGING) else EMBEDDING
    for task in PREFERRED
}
"""Type of each task, which says what head the model gets."""

BENCHMARKS = {task: dict.fromkeys((*XTREME.get(task, ()), *XTREME_R.get(task, ()))) for task in (*XTREME, *XTREME_R)}
"""Languages of every task of XTREME and XTREME-R: what a study is expected to have."""

ARRIVAL, SORTED, BUDGET, SINGLE = "arrival", "sorted", "budget", "single"
POLICIES = (ARRIVAL, SORTED, BUDGET)

STOCK = "stock"
"""The engine that is transformers itself, unaccelerated."""

STOCK_PRECISIONS = ("fp32", "fp16", "bf16")
"""What it runs."""

CHECKPOINT = "checkpoint"
"""The size of models that were given as folders."""

QUANTISATION, EARLY = "quantisation", "early"
"""Probes of the timed models: what an engine's arithmetic does to them, and at which layer they know the answer.

The first depends on the engine; the second on the weights alone, so that each size has it once, in fp32.
"""


@dataclass(frozen=True)
class EngineName:
    """``BACKEND:PRECISION``, such as ``native:int8``."""

    backend: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> EngineName:
        """Read ``BACKEND:PRECISION``.

        Raises:
            InvalidOptionError: either is unknown.
        """
        backend, _, precision = text.partition(":")
        precisions = PRECISIONS[1:-1]
        if backend not in (*BACKENDS, STOCK) or precision not in precisions:
            raise InvalidOptionError(
                f"engine: {text!r}; accepted: {'|'.join((*BACKENDS, STOCK))}:{'|'.join(precisions)}, as native:int8"
            )
        if backend == STOCK and precision not in STOCK_PRECISIONS:
            raise InvalidOptionError(f"engine: {text!r}; transformers itself runs {', '.join(STOCK_PRECISIONS)}")
        return cls(backend, precision)

    def __str__(self) -> str:
        return f"{self.backend}:{self.precision}"

    @property
    def quantised(self) -> bool:
        """Whether its arithmetic is coarser than fp32, so that the weights may matter to its error."""
        return self.precision != "fp32"


@dataclass(frozen=True)
class Settings:
    """What to study.

    Attributes:
        sizes: names in ``xfast.benchmarks.models.SIZES``; with checkpoints this is ``("checkpoint",)``.
        engines: ``BACKEND:PRECISION``.
        tasks: names in ``TYPES``, or ``("one",)``: one task for every language.
        languages: two-letter codes; None: all that the tasks have.
        policies: how examples become batches: as they arrive, sorted by length, or sorted and cut at ``token_budget``.
        batch_sizes: examples in a batch (arrival and sorted).
        token_budget: padded tokens in a batch (budget).
        samples: examples of a throughput cell.
        responses: texts of a latency cell, answered one by one; a p95 takes 20, a p99 100, and 0 leaves latency out.
        rounds: visits to each cell.
        margin: of equivalence.
        data: folder in XTREME's layout; None: lengths from profiles.
        profiles: a file that ``xfast study profile`` wrote; None: the shipped ones.
        tokenizer: folder; None: the baseline checkpoint's own, else ``tokenizer/xlmr`` in ``data``.
        baseline, intermediate: checkpoints by task, "" for all others: folders of STILTs runs or of transformers
            models. Empty: seeded weights.
        probes: also measure what intermediate training could change although the graph is the same.
        accuracy: also evaluate where checkpoints and labels are given.
        limit: examples per language in evaluations; None: all.
        threads: None: as many as xfast uses.
        device: "cpu" or "cuda".
        seed: of weights, lengths, samples and orders.

    Raises:
        InvalidOptionError: a value is not accepted.
    """

    sizes: tuple[str, ...] = ("base",)
    engines: tuple[str, ...] = ("native:fp32", "native:int8")
    tasks: tuple[str, ...] = (ONE_TASK,)
    languages: tuple[str, ...] | None = None
    policies: tuple[str, ...] = (SORTED,)
    batch_sizes: tuple[int, ...] = (16,)
    token_budget: int = 2048
    samples: int = 64
    responses: int = 20
    rounds: int = 5
    margin: float = 0.02
    data: str | None = None
    profiles: str | None = None
    tokenizer: str | None = None
    baseline: Mapping[str, str] = field(default_factory=dict)
    intermediate: Mapping[str, str] = field(default_factory=dict)
    probes: bool = True
    accuracy: bool = True
    limit: int | None = None
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for engine in self.engines:
            EngineName.parse(engine)
        _members("policy", self.policies, POLICIES)
        _members("task", self.tasks, (*TYPES, ONE_TASK))
        _members("language", self.languages or (), ordered(JOSHI_CLASS))
        _members("size", self.sizes, (CHECKPOINT,) if self.baseline else tuple(SIZES))
        _members("device", (self.device,), ("cpu", "cuda"))
        for name in ("sizes", "engines", "tasks", "policies", "batch_sizes"):
            values = getattr(self, name)
            if not values:
                raise InvalidOptionError(f"{name}: at least one is needed")
            if twice := [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]:
                raise InvalidOptionError(f"{name}: {', '.join(twice)} given more than once; name each once")
        if self.languages is not None and not self.languages:
            raise InvalidOptionError("languages: at least one is needed; leave the option out for all")
        if ONE_TASK in self.tasks and len(self.tasks) > 1:
            raise InvalidOptionError(f"tasks: {ONE_TASK!r} stands for a choice of its own; name tasks or {ONE_TASK!r}")
        counts = {"token_budget": self.token_budget, "samples": self.samples, "rounds": self.rounds, "seed": self.seed}
        counts |= {
            "responses": self.responses,
            "batch_sizes": min(self.batch_sizes),
            "limit": 1 if self.limit is None else self.limit,
        }
        for name, value in counts.items():
            least = 0 if name in ("seed", "responses") else 1
            if value < least:
                raise InvalidOptionError(f"{name}: {value}; accepted: {least} or more")
        if not 0 < self.margin < 1:
            raise InvalidOptionError(f"margin: {self.margin}; accepted: between 0 and 1, such as 0.02")
        if self.data is not None and self.profiles is not None:
            raise InvalidOptionError("profiles: not accepted with data, whose own lengths are used; give one of them")
        if self.data is None:
            for name in ("tokenizer", "limit"):
                if getattr(self, name) is not None:
                    raise InvalidOptionError(f"{name}: only accepted with data, whose texts it is for")
        if self.intermediate and not self.baseline:
            raise InvalidOptionError("intermediate: a checkpoint is given and none for the baseline; give both or none")
        _members("checkpoint's task", filter(None, (*self.baseline, *self.intermediate)), TYPES)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of ``as_dict``."""
        given: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**given)


QUICK: dict[str, Any] = {
    "samples": 12,
    "responses": 4,
    "rounds": 3,
    "tasks": (ONE_TASK,),
    "policies": (SORTED,),
    "batch_sizes": (16,),
}
"""What a quick study sets."""


def quick(settings: Settings) -> Settings:
    """A study of all languages that ends within ten minutes on two cores, with enough pairs for its A/A control."""
    return replace(settings, **QUICK)


def _members(name: str, values: Iterable[str], accepted: Collection[str]) -> None:
    for value in values:
        require_one_of(name, value, accepted)


@dataclass(frozen=True)
class Cell:
    """One combination of factors; the policy "single" is a latency cell."""

    size: str
    engine: str
    task: str
    language: str
    policy: str
    batch_size: int

    @property
    def key(self) -> str:
        """Names the cell in files."""
        return "/".join((self.size, self.engine, self.task, self.language, self.policy, str(self.batch_size)))

    @property
    def is_latency(self) -> bool:
        """Whether single responses are timed, not batches."""
        return self.policy == SINGLE


def cells_of(settings: Settings, size: str, engine: str, pairs: Sequence[tuple[str, str]]) -> list[Cell]:
    """The cells of one size and engine for (task, language) pairs; low-resource languages first."""
    found = []
    for task, language in pairs:
        for policy in settings.policies:
            sizes = batch_sizes(settings, policy)
            found += [Cell(size, engine, task, language, policy, batch) for batch in sizes]
        if settings.responses:
            found.append(Cell(size, engine, task, language, SINGLE, 1))
    return found


def batch_sizes(settings: Settings, policy: str) -> tuple[int, ...]:
    """Examples in a batch, or for "budget" its padded tokens."""
    return (settings.token_budget,) if policy == BUDGET else settings.batch_sizes


def pairs_of(
    settings: Settings, there: Iterable[tuple[str, str]], source: str = "data", unread: Mapping[str, str] | None = None
) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
    """Which (task, language) pairs are studied, and what of XTREME, XTREME-R and the question is not, and why.

    Args:
        settings: the question.
        there: the pairs that data or profiles have.
        source: which of these, in words.
        unread: tasks whose files cannot be read, and why.

    Raises:
        InvalidOptionError: nothing is left.
    """
    known = set(there)
    languages = ordered(settings.languages or {language for _, language in known})
    tasks = PREFERRED if settings.tasks == (ONE_TASK,) else settings.tasks
    pairs: list[tuple[str, str]] = []
    for language in languages:
        mine = [(task, language) for task in tasks if (task, language) in known]
        pairs += mine[:1] if settings.tasks == (ONE_TASK,) else mine
    if not pairs:
        wanted = f"{', '.join(settings.tasks)} in {', '.join(settings.languages or ('any language',))}"
        has = ", ".join(sorted({task for task, _ in known})) or "nothing"
        raise InvalidOptionError(f"tasks, languages: there is no data for {wanted}; it has {has}")
    left_out = _not_chosen(settings, known, pairs, source) if tasks is PREFERRED else _absent(settings, known, source)
    missing = [(what, why) for what, why in left_out if what not in (unread or {})]
    return pairs, [{"what": what, "why": why} for what, why in (*missing, *(unread or {}).items())]


def _absent(settings: Settings, known: set[tuple[str, str]], source: str) -> Iterator[tuple[str, str]]:
    """Of tasks that were named: the languages, asked for or the benchmarks', that are not there."""
    for task in settings.tasks:
        theirs = BENCHMARKS.get(task, {})
        wanted = ordered(settings.languages or theirs)
        gone = [language for language in wanted if (task, language) not in known]
        foreign = [language for language in gone if theirs and language not in theirs]
        if missed := [language for language in gone if language not in foreign]:
            yield f"{task} in {', '.join(missed)}", f"not in the {source}"
        if foreign:
            yield f"{task} in {', '.join(foreign)}", "no language of the task in XTREME or XTREME-R"
        if not wanted and not any(mine == task for mine, _ in known):
            yield task, f"not in the {source}"


def _not_chosen(
    settings: Settings, known: set[tuple[str, str]], pairs: Sequence[tuple[str, str]], source: str
) -> Iterator[tuple[str, str]]:
    """Where one task stands for a language: languages without any, tasks that are not there, tasks that stand back."""
    spoken = {language for languages in BENCHMARKS.values() for language in languages}
    wanted = ordered(settings.languages or spoken)
    if missed := [language for language in wanted if language not in {language for _, language in pairs}]:
        yield f"any task in {', '.join(missed)}", f"not in the {source}"
    left = [task for task in BENCHMARKS if task not in {task for task, _ in pairs}]
    left = [task for task in left if any(language in BENCHMARKS[task] for language in wanted)]
    here = [task for task in left if any((task, language) in known for language in wanted)]
    where = " in these languages" if settings.languages else ""
    yield from ((task, f"not in the {source}{where}") for task in left if task not in here)
    if here:
        yield ", ".join(here), "one task stands for each language; --tasks names others"


def labels_of(task: str) -> int:
    """How many labels the head of a classifying or tagging task has."""
    return len(get(task).labels)
