"""Plans a study, runs its workers one after another, stores what they send, and writes the document and the report."""

from __future__ import annotations

import datetime
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xfast.benchmarks import workloads
from xfast.errors import BackendUnavailableError
from xfast.machine import ceiling, machine
from xfast.study import accuracy, arms, worker
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import STOCK, Cell, EngineName, Settings, cells_of, pairs_of
from xfast.study.store import Store, visit_name
from xfast.study.work import Texts, batches_of

_SHARE_OF_CEILING = {"native": 0.5, "auto": 0.5, STOCK: 0.25}
"""What an engine is taken to reach of the machine's arithmetic, for the estimate of time."""

_BUILD_S_PER_PARAMETER = 1.2e-8
_SPARE_BYTES = 1_500_000_000
"""Python, torch and the system."""


@dataclass(frozen=True)
class Group:
    """One worker's part of the plan."""

    size: str
    engine: str
    cells: tuple[Cell, ...]
    arms: tuple[str, ...]
    shared_control: bool
    facts: dict[str, Any]
    seconds: float | None
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be measured, what that takes, and what is left out and why."""

    groups: tuple[Group, ...]
    skipped: tuple[dict[str, str], ...]
    languages: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def visits(self) -> int:
        """Visits of one round."""
        return sum(len(group.cells) for group in self.groups)

    @property
    def seconds(self) -> float | None:
        """Estimate, to a factor of two; None where there is none."""
        known = [group.seconds for group in self.groups]
        return None if None in known else sum(second for second in known if second is not None)

    @property
    def memory_bytes(self) -> int:
        """Of the largest worker."""
        return max((group.memory_bytes for group in self.groups), default=0)


def plan(settings: Settings, texts: Texts, available: int | None = None) -> Plan:
    """Cells by size and engine; sizes that do not fit in memory are skipped, not tried.

    Args:
        settings: what to study.
        texts: which tasks and languages there are.
        available: bytes of memory; None: what the machine has free.

    Raises:
        InvalidOptionError: nothing is left to measure, or the checkpoints differ in size.
    """
    pairs, missing = pairs_of(settings, texts.there)
    skipped = [{"what": what, "why": "not in the data"} for what in missing]
    free = available_memory(settings.device) if available is None else available
    wanted = [BASELINE, *([INTERMEDIATE] if settings.intermediate or not settings.baseline else [])]
    groups: list[Group] = []
    notes: list[str] = []
    for size in settings.sizes:
        known = arms.model_facts(settings, size)
        for engine in settings.engines:
            needs = arms.footprint(known["parameters"], known["embedding"], EngineName.parse(engine))
            names = [*wanted, CONTROL]
            shared = False
            if free is not None and needs.of(len(names)) + _SPARE_BYTES > free:
                names, shared = wanted, True
                notes.append(f"{size} {engine}: the control shares the baseline's memory, a second copy does not fit")
            if free is not None and needs.of(len(names)) + _SPARE_BYTES > free:
                needed = needs.of(len(names)) / 1e9
                why = f"{len(names)} arms need about {needed:.1f} GB of memory, {free / 1e9:.1f} GB are free"
                skipped.append({"what": f"{size} {engine}", "why": why})
                continue
            cells = tuple(cells_of(settings, size, engine, pairs))
            seconds = _seconds(settings, texts, known, EngineName.parse(engine), cells, len(names) + shared)
            memory = needs.of(len(names)) + _SPARE_BYTES
            groups.append(Group(size, engine, cells, tuple(names), shared, known, seconds, memory))
    languages = tuple(dict.fromkeys(language for _, language in pairs))
    return Plan(tuple(groups), tuple(skipped), languages, tuple(pairs), tuple(notes))


def available_memory(device: str) -> int | None:
    """Bytes that are free on the device; None where the system does not say."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def _seconds(
    settings: Settings, texts: Texts, known: dict[str, Any], engine: EngineName, cells: Sequence[Cell], runs: int
) -> float | None:
    """Estimated seconds of a group, from the machine's arithmetic and the tokens of its cells."""
    if settings.device != "cpu":
        return None
    kind = engine.precision if engine.precision in ("bf16", "int8") else "fp32"
    share = _SHARE_OF_CEILING.get(engine.backend, 0.5)
    rate = 1e9 * share * ceiling(kind, settings.threads, seconds=0.1)
    operations = 2.0 * (known["parameters"] - known["embedding"])
    model = workloads.Model(known["vocab"], known["pad"], known["limit"])
    tokens = 0
    counted: dict[tuple[str, str, bool], int] = {}
    for cell in cells:
        key = (cell.task, cell.language, cell.is_latency)
        if key not in counted:
            count = settings.responses if cell.is_latency else settings.samples
            work = texts.work(cell.task, cell.language, count, model)
            padded = sum(ids.numel() for ids, _ in batches_of(work, cell.policy, cell.batch_size, model.pad))
            counted[key] = padded if engine.backend == STOCK else work.tokens
        tokens += counted[key]
    compute = 2 * operations * tokens * settings.rounds * runs / rate  # each visit goes forth and back
    return compute + runs * known["parameters"] * _BUILD_S_PER_PARAMETER + 5.0


def execute(plan: Plan, store: Store, console: Console) -> None:
    """Run every worker and store what it sends; a worker that fails is written down and the others go on.

    Raises:
        KeyboardInterrupt: the run was stopped; what was measured is in the store.
        DataFileError: the store cannot be written.
        BackendUnavailableError: no worker measured anything.
    """
    settings = store.settings
    total = plan.visits * settings.rounds
    planned = {visit_name(cell.key, n) for group in plan.groups for cell in group.cells for n in range(settings.rounds)}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar as progress:
        shown = progress.add_task("", total=total, completed=len(planned & store.done))
        for group in plan.groups:
            progress.update(shown, description=f"{group.size} {group.engine}")
            _work(group, store, lambda: progress.advance(shown))
    if not any(True for _ in store.of("visit")):
        reasons = "; ".join(f"{record['size']} {record['engine']}: {record['why']}" for record in store.of("failed"))
        raise BackendUnavailableError(f"engines: nothing could be measured: {reasons or 'no cells'}")


def _work(group: Group, store: Store, advance: Any) -> None:
    """One worker's life."""
    done = store.done
    settings = store.settings
    names = [visit_name(cell.key, number) for cell in group.cells for number in range(settings.rounds)]
    scores = accuracy.jobs(settings, group.engine, [(cell.task, cell.language) for cell in group.cells])
    if all(name in done for name in names) and all(name in done for name, _, _ in scores) and _ended(group, store):
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    job = worker.Job(
        settings.as_dict(),
        group.size,
        group.engine,
        group.cells,
        group.arms,
        group.shared_control,
        frozenset(done),
        group.facts,
    )
    process = context.Process(target=worker.main, args=(job, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not _receive(receiver, store, advance):
            process.join()
            why = f"its process ended with code {process.exitcode}"
            if process.exitcode == -9:
                why = "its process was killed, as the system does when memory runs out"
            store.add({"kind": "failed", "size": group.size, "engine": group.engine, "why": why})
    finally:
        receiver.close()
        process.terminate()
        process.join()


def _ended(group: Group, store: Store) -> bool:
    """Whether a former run's worker got as far as its last record."""
    return any((one["size"], one["engine"]) == (group.size, group.engine) for one in store.of("memory"))


def _receive(receiver: Connection, store: Store, advance: Any) -> bool:
    """Store what a worker sends until it has ended, and say whether it ended by itself."""
    while True:
        try:
            record = receiver.recv()
        except EOFError:
            return False
        if record["kind"] == "end":
            return True
        store.add(record)
        if record["kind"] == "visit":
            advance()
        if record["kind"] == "failed":
            return True


def start(settings: Settings, folder: Path, *, resume: bool, console: Console) -> dict[str, Any]:
    """Plan, say so, measure, and return the document; see ``summary.document``.

    Raises:
        XfastError: whatever planning, storing or measuring refuses.
    """
    from xfast.study import summary

    if settings.device == "cuda":
        _require_gpu()
    texts = Texts(settings)
    made = plan(settings, texts)
    if not made.groups:
        reasons = "; ".join(f"{one['what']}: {one['why']}" for one in made.skipped)
        raise BackendUnavailableError(f"sizes, engines: nothing fits on this machine: {reasons}")
    announce(settings, made, console)
    store = Store(folder, settings, machine(), resume=resume)
    began = time.perf_counter()
    try:
        for one in made.skipped:
            if one not in [{"what": r["what"], "why": r["why"]} for r in store.of("skipped")]:
                store.add({"kind": "skipped", **one})
        for note in made.notes:
            if note not in [record["text"] for record in store.of("note")]:
                store.add({"kind": "note", "text": note})
        execute(made, store, console)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        store.add({"kind": "ended", "at": now, "seconds": round(time.perf_counter() - began, 1)})
        return dict(summary.document_of(store.records, store.path))
    finally:
        store.close()


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailableError("device: cuda was asked for and torch sees no GPU")


def announce(settings: Settings, made: Plan, console: Console) -> None:
    """Say what will be measured, how long that takes, and what is left out."""
    total = made.visits * settings.rounds
    time_ = "unknown on this device" if made.seconds is None else f"about {_duration(made.seconds)}, to a factor of 2"
    console.print(
        f"{len(made.pairs)} task-language pairs, {len(made.languages)} languages, {len(made.groups)} model-engine "
        f"groups, {total} visits; time {time_}; memory about {made.memory_bytes / 1e9:.1f} GB",
        highlight=False,
    )
    for line in _left_out(made):
        console.print(line, style="yellow", markup=False, highlight=False)


def _left_out(made: Plan) -> Iterable[str]:
    yield from (f"skipped: {one['what']}: {one['why']}" for one in made.skipped)
    yield from made.notes


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
