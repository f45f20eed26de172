"""Plans a study, runs its workers one after another, stores what they send, and writes the document and the report."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xfast.benchmarks import workloads
from xfast.errors import BackendUnavailableError, InvalidOptionError
from xfast.machine import ceiling, machine
from xfast.stilts.task import BITEXT
from xfast.stilts.tasks import get
from xfast.study import accuracy, announcement, arms, artifacts, probes, summary, worker
from xfast.study.cells import parts
from xfast.study.document import CONTROL, INTERMEDIATE
from xfast.study.factors import EARLY, QUANTISATION, STOCK, Cell, EngineName, Settings, cells_of, pairs_of
from xfast.study.fit import Fit, Room, fit
from xfast.study.store import NAME as STORE
from xfast.study.store import Store, visit_name
from xfast.study.work import Texts, Work, batches_of

_SHARE_OF_CEILING, _STOCK_SHARE = 0.5, 0.25
"""What an engine, and transformers itself, is taken to reach of the machine's arithmetic, for the estimate of time."""

_BUILD_S_PER_PARAMETER = 1.2e-8
_CONVERT_S_PER_PARAMETER = 2e-8

START_METHOD = "spawn"
"""A worker begins with none of this process's memory and threads, which a fork would bring along."""

_PATIENCE_S = 1800.0
"""A worker that says nothing for so long, or for four times the estimate of its whole time, is taken to hang."""

_PATIENCE_WITHOUT_ESTIMATE_S = 4 * 1800.0

Works = dict[tuple[str, str, bool], Work]
"""Examples by task, language and whether they are answered one by one."""


@dataclass(frozen=True)
class Group:
    """One worker's part of the plan."""

    size: str
    engine: str
    cells: tuple[Cell, ...]
    fit: Fit
    facts: dict[str, Any]
    seconds: float | None
    work: Works

    @property
    def shared_control(self) -> bool:
        """Whether the control runs the baseline's own copy."""
        return CONTROL not in self.fit.arms

    @property
    def digests(self) -> dict[str, dict[str, Any]]:
        """What the cells' records must agree in with a former run's."""
        known = {key: work.digest for key, work in self.work.items()}
        return {cell.key: {"digest": known[cell.task, cell.language, cell.is_latency]} for cell in self.cells}

    @property
    def patience(self) -> float:
        """Seconds without a word from the worker after which it is taken to hang."""
        return _PATIENCE_WITHOUT_ESTIMATE_S if self.seconds is None else max(_PATIENCE_S, 4 * self.seconds)


@dataclass(frozen=True)
class Plan:
    """What will be measured, what that takes, and what is left out and why."""

    groups: tuple[Group, ...]
    skipped: tuple[dict[str, str], ...]
    languages: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    sizes: Mapping[str, arms.Resolved]
    notes: tuple[str, ...] = field(default=())
    keep_artifacts: bool = False

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
        return max((group.fit.memory_bytes for group in self.groups), default=0)

    @property
    def disk_bytes(self) -> int:
        """Of packed artifacts that are still to be made, as many as there are at a time."""
        each = [group.fit.disk_bytes for group in self.groups]
        return sum(each) if self.keep_artifacts else max(each, default=0)

    @property
    def converting_s(self) -> float:
        """Estimate of what making packed artifacts takes, part of ``seconds``."""
        return sum(_converting_s(group) for group in self.groups)


def plan(
    settings: Settings,
    texts: Texts,
    available: int | None = None,
    host: int | None = None,
    *,
    disk: int | None = None,
    output: Path | None = None,
    keep_artifacts: bool = False,
) -> Plan:
    """Cells by size and engine; sizes that do not fit in memory or on the disk are skipped, not tried.

    Args:
        settings: what to study.
        texts: which tasks and languages there are.
        available: bytes of memory on the device; None: what is free.
        host: bytes of memory beside a GPU, where models are made; None: what is free.
        disk: bytes of disk for packed artifacts; None: what is free where ``output`` is.
        output: the study's folder, where artifacts of a former run may lie; None: none yet.
        keep_artifacts: they stay, so that all of them need room at once.

    Raises:
        InvalidOptionError: nothing is left to measure, or the checkpoints differ in size.
    """
    pairs, skipped = pairs_of(settings, texts.there, texts.source, texts.unread)
    skipped += accuracy.left_out(settings, pairs)
    room = Room.of(settings.device, available, host, disk, output)
    groups: list[Group] = []
    notes: list[str] = []
    sizes: dict[str, arms.Resolved] = {}
    works: dict[workloads.Model, Works] = {}
    for size in settings.sizes:
        known = sizes[size] = arms.resolve(settings, size, dict.fromkeys(task for task, _ in pairs))
        skipped += known.skipped
        notes += known.notes
        mine = [pair for pair in pairs if pair[0] in known.tasks]
        shape = workloads.Model(known.facts["vocab"], known.facts["pad"], known.facts["limit"])
        if shape not in works:
            works[shape] = _works(settings, texts, mine, shape)
        left = room.without(sum(group.fit.disk_bytes for group in groups)) if keep_artifacts else room
        found, missed = _groups(settings, texts, size, known, mine, works[shape], left, keep_artifacts=keep_artifacts)
        groups += found
        skipped += missed
        shared = [f"{group.size} {group.engine}" for group in found if group.shared_control]
        notes += [f"{where}: the control shares the baseline's memory, a second copy does not fit" for where in shared]
        unprobed = list(_unprobed(settings, found))
        skipped += unprobed
        notes += dict.fromkeys(f"{size}: probes are left out: {one['why']}" for one in unprobed)
    languages = tuple(dict.fromkeys(language for _, language in pairs))
    return Plan(tuple(groups), tuple(skipped), languages, tuple(pairs), sizes, tuple(notes), keep_artifacts)


def _works(settings: Settings, texts: Texts, pairs: Sequence[tuple[str, str]], shape: workloads.Model) -> Works:
    counts = {False: settings.samples, **({True: settings.responses} if settings.responses else {})}
    return {
        (task, language, single): texts.work(task, language, count, shape)
        for task, language in pairs
        for single, count in counts.items()
    }


def _groups(
    settings: Settings,
    texts: Texts,
    size: str,
    resolved: arms.Resolved,
    pairs: Sequence[tuple[str, str]],
    work: Works,
    room: Room,
    *,
    keep_artifacts: bool,
) -> tuple[list[Group], list[dict[str, str]]]:
    """The workers of a size, and what of it is left out and why."""
    groups: list[Group] = []
    skipped: list[dict[str, str]] = []
    for engine in settings.engines:
        refused = _refused(settings, size, engine, resolved, pairs)
        left = [pair for pair in pairs if pair[0] not in refused]
        if not left:
            skipped.append({"what": f"{size} {engine}", "why": next(iter(refused.values()))["why"]})
            continue
        skipped += refused.values()
        group = _group(settings, texts, size, engine, resolved, left, work, room)
        if isinstance(group, str):
            skipped.append({"what": f"{size} {engine}", "why": group})
            continue
        groups.append(group)
        if group.fit.left_out:
            skipped.append({"what": f"{INTERMEDIATE} arm of {size} {engine}", "why": group.fit.left_out})
        if keep_artifacts:
            room = room.without(group.fit.disk_bytes)
    return groups, skipped


def _group(
    settings: Settings,
    texts: Texts,
    size: str,
    engine: str,
    resolved: arms.Resolved,
    pairs: Sequence[tuple[str, str]],
    work: Works,
    room: Room,
) -> Group | str:
    """One worker's part, or why there is no room for it."""
    given = {task: resolved.artifacts.get(task, {}) for task, _ in pairs}
    found = fit(settings, size, EngineName.parse(engine), resolved.facts, given, room)
    if isinstance(found, str):
        return found
    cells = tuple(cells_of(settings, size, engine, pairs))
    group = Group(size, engine, cells, found, resolved.facts, None, work)
    return replace(group, seconds=_seconds(settings, texts, group)) if settings.device == "cpu" else group


def _refused(
    settings: Settings, size: str, engine: str, resolved: arms.Resolved, pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, str]]:
    """By task, what of it an engine cannot run because it was given as a packed artifact, and why."""
    found = {}
    for task in dict.fromkeys(task for task, _ in pairs):
        for one in resolved.artifacts.get(task, {}).values():
            if why := artifacts.refusal(one, EngineName.parse(engine), settings.device):
                found[task] = {"what": f"{size} {engine} {task}", "why": why}
    return found


def _unprobed(settings: Settings, groups: Sequence[Group]) -> Iterator[dict[str, str]]:
    """The probes that were asked for of one size and that none of its groups runs, and why."""
    for group in groups:
        wanted = arms.probes_of(settings, EngineName.parse(group.engine))
        if QUANTISATION in wanted and QUANTISATION not in group.fit.build.probes:
            why = _why_unprobed(group)
            yield {"what": f"probe {QUANTISATION} of {group.size} {group.engine}", "why": why}
    if settings.probes and groups and not any(EARLY in group.fit.build.probes for group in groups):
        yield {"what": f"probe {EARLY} of {groups[0].size}", "why": _why_unprobed(groups[0])}


def _why_unprobed(group: Group) -> str:
    return arms.why_unprobed(group.facts["parameters"], mapped=group.fit.build.mapped)


def _seconds(settings: Settings, texts: Texts, group: Group) -> float:
    """Estimated seconds of a group, from the machine's arithmetic and the tokens of its cells, probes and scores."""
    engine, known = EngineName.parse(group.engine), group.facts
    kind = {"bf16": "bf16", "int8": "int8", "int4": "int8"}.get(engine.precision, "fp32")
    share = _STOCK_SHARE if engine.backend == STOCK else _SHARE_OF_CEILING
    rate = 1e9 * share * ceiling(kind, settings.threads, seconds=0.1)
    token_s = 2.0 * (known["parameters"] - known["embedding"]) / rate
    runs = len(group.fit.arms) + group.shared_control
    made = group.fit.models + (group.shared_control and group.fit.models > 0)
    seconds = made * known["parameters"] * _BUILD_S_PER_PARAMETER + 5.0 + _converting_s(group)
    for cell in group.cells:
        work = group.work[cell.task, cell.language, cell.is_latency]
        tokens = work.tokens
        if engine.backend == STOCK:  # it computes the padding
            tokens = sum(ids.numel() for ids, _ in batches_of(work, cell.policy, cell.batch_size, known["pad"]))
        visit = max(2 * tokens * token_s, worker.MIN_VISIT_S)  # forth and back
        seconds += runs * (settings.rounds * visit + tokens * token_s)
    pairs = dict.fromkeys((cell.task, cell.language) for cell in group.cells)
    if group.fit.build.probes:  # in fp32 and, for its error, in the engine's arithmetic, in all arms but the control
        tokens = sum(group.work[task, language, False].first(probes.EXAMPLES).tokens for task, language in pairs)
        seconds += 2 * (1 + (QUANTISATION in group.fit.build.probes)) * tokens * token_s
    for _, _, task in accuracy.jobs(settings, group.engine, list(pairs)):
        passes = accuracy.LAYERS + 1 if get(task).type == BITEXT else 1  # both sides at half the layers on average
        for language in accuracy.languages_of(task, list(pairs)):
            work = group.work[task, language, False]
            examples = min(texts.labelled(task, language), settings.limit or texts.labelled(task, language))
            seconds += passes * examples * work.tokens / len(work.examples) * token_s
    return seconds


def _converting_s(group: Group) -> float:
    return float(group.fit.to_make * group.facts["parameters"] * _CONVERT_S_PER_PARAMETER)


def execute(plan: Plan, store: Store, console: Console) -> None:
    """Run every worker and store what it sends; a worker that fails is written down and the others go on.

    Packed artifacts that a group has made go when it has been measured; of one that failed they stay for another run.

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
            if not plan.keep_artifacts and _ended(group, store):
                for one in set(group.fit.seeded.values()):
                    one.remove(store.path.parent)
    if not any(True for _ in store.of("visit")):
        failed = [f"{record['size']} {record['engine']}: {record['why']}" for record in store.of("failed")]
        reasons = failed + [f"{record['what']}: {record['why']}" for record in (*plan.skipped, *store.of("skipped"))]
        raise BackendUnavailableError(f"engines: nothing could be measured: {'; '.join(reasons) or 'no cells'}")


def _work(group: Group, store: Store, advance: Any) -> None:
    """One worker's life."""
    done = store.done
    settings = store.settings
    names = [visit_name(cell.key, number) for cell in group.cells for number in range(settings.rounds)]
    scores = accuracy.jobs(settings, group.engine, [(cell.task, cell.language) for cell in group.cells])
    if all(name in done for name in names) and all(name in done for name, _, _ in scores) and _ended(group, store):
        return
    context: Any = multiprocessing.get_context(START_METHOD)
    connection, other = context.Pipe()
    job = worker.Job(
        settings,
        group.size,
        group.engine,
        group.cells,
        group.fit,
        frozenset(done),
        group.facts,
        group.work,
        store.path.parent,
    )
    process = context.Process(target=worker.main, args=(job, other), daemon=True)
    process.start()
    other.close()
    try:
        why = _receive(connection, store, advance, group.patience)
        if why is not None:
            store.add({"kind": "failed", "size": group.size, "engine": group.engine, "why": why or _end_of(process)})
    finally:
        connection.close()
        process.kill()  # a stopped process does not see a request to end
        process.join()


def _end_of(process: Any) -> str:
    process.join()
    if process.exitcode == -9:
        return "its process was killed, as the system does when memory runs out"
    return f"its process ended with code {process.exitcode}"


def _ended(group: Group, store: Store) -> bool:
    """Whether a former run's worker got as far as its last record."""
    return any((one["size"], one["engine"]) == (group.size, group.engine) for one in store.of("ended_group"))


def _receive(connection: Connection, store: Store, advance: Any, patience: float) -> str | None:
    """Store what a worker sends, and let it go on when that is on disk.

    Returns:
        None when it has ended by itself, "" when its process is gone, else why it is given up.
    """
    while True:
        try:
            if not connection.poll(patience):
                return f"its process said nothing for {patience / 60:.0f} minutes"
            record = connection.recv()
        except (EOFError, OSError):  # OSError: killed in the middle of a record
            return ""
        if record["kind"] == "end":
            return None
        if record != worker.ALIVE:
            store.add(record)
        if record["kind"] == "visit":
            advance()
        if record["kind"] == "failed":
            return None
        with contextlib.suppress(OSError):  # it is gone: the next read says so
            connection.send(None)


def start(
    settings: Settings, folder: Path, *, resume: bool, console: Console, keep_artifacts: bool = False
) -> dict[str, Any]:
    """Plan, say so, measure, and return the document; see ``summary.document``.

    ``keep_artifacts``: packed artifacts of seeded weights stay in the folder, for ``xfast.load``.

    Raises:
        XfastError: whatever planning, storing or measuring refuses.
    """
    if settings.device == "cuda":
        _require_gpu()
    texts = Texts(settings)
    made = plan(settings, texts, output=folder, keep_artifacts=keep_artifacts)
    if not made.groups:
        reasons = "; ".join(f"{one['what']}: {one['why']}" for one in made.skipped)
        raise BackendUnavailableError(f"sizes, engines: nothing fits on this machine: {reasons}")
    announcement.say(settings, made, console)
    here = machine() if settings.threads is None else {**machine(), "threads": settings.threads}
    if resume and not (folder / STORE).exists():
        console.print(f"nothing to continue in {folder}: this is a new study", style="yellow", markup=False)
    store = Store(folder, settings, here, resume=resume)
    try:
        _prepare(made, store)
        execute(made, store, console)
        store.add({"kind": "ended", "at": _now()})
        return dict(summary.document_of(store.records, store.path))
    finally:
        store.close()


def _prepare(made: Plan, store: Store) -> None:
    """Store what the plan knows, after what a former run stored of it has been found to be the same.

    The plan itself is stored by every run: what it leaves out may be another time, with other memory.

    Raises:
        InvalidOptionError: the data or the checkpoints have changed, or there is other room for the weights.
    """
    known: dict[str, dict[str, dict[str, Any]]] = {"size": {}, "checkpoint": {}}
    for size, resolved in made.sizes.items():
        known["size"][size] = resolved.facts
        known["checkpoint"] |= {name: {"digest": stamp} for name, stamp in resolved.stamps.items()}
    for kind, records in known.items():
        store.match(kind, kind, records)
    for group in made.groups:
        store.match("cell", "cell", group.digests)
        _require_same_holding(group, store)
    cells = [cell.key for group in made.groups for cell in group.cells]
    _require_no_more_languages(cells, store)
    for kind, records in known.items():
        there = [record[kind] for record in store.of(kind)]
        for name, fields in records.items():
            if name not in there:
                store.add({"kind": kind, kind: name, **fields})
    store.add({"kind": "plan", "at": _now(), "cells": cells, "skipped": made.skipped, "notes": made.notes})


def _require_same_holding(group: Group, store: Store) -> None:
    """Free memory decides how a group's weights are held: the same way for all visits, which are compared."""
    keys = {cell.key for cell in group.cells}
    if _ended(group, store) or not any(visit["cell"] in keys for visit in store.of("visit")):
        return
    now = group.fit.held
    for one in store.of("engine"):
        if (one["size"], one["engine"]) == (group.size, group.engine) and one.get("held", now) != now:
            raise InvalidOptionError(
                f"output: {store.path}: the weights of {group.size} {group.engine} were held in another way, since "
                f"other memory was free ({one['held']} there, {now} now); free as much as then, or name another folder"
            )


def _require_no_more_languages(cells: Sequence[str], store: Store) -> None:
    """Probes and scores are of all languages of a task at once: of those found since, only speeds would be measured."""
    before = {_pair(key) for plan in store.of("plan") for key in plan["cells"]}
    if before and (new := sorted({_pair(key) for key in cells} - before)):
        task, language = new[0]
        raise InvalidOptionError(
            f"output: {store.path}: {task} in {language} was not in the data or profiles when it was begun; "
            "name another folder"
        )


def _pair(key: str) -> tuple[str, str]:
    mine = parts(key)
    return mine["task"], mine["language"]


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailableError("device: cuda was asked for and torch sees no GPU")
