"""Which arms of a size and engine there is room for, and how they are held: as models, or as packed artifacts.

Models come first. Where they do not fit, and the engine can, arms are artifacts: these are mapped, the control maps the
baseline's files again, and an intermediate arm that does not fit beside the baseline is left out and said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xfast.machine import available_memory
from xfast.study import arms, artifacts
from xfast.study.arms import Build
from xfast.study.artifacts import Artifact, Seeded
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import CHECKPOINT, STOCK, EngineName, Settings

_SPARE_BYTES = 1_500_000_000
"""Python, torch and the system."""

By = Mapping[str, Mapping[str, Artifact]]
"""Artifacts that were given, by arm, for every task of a group."""


@dataclass(frozen=True)
class Room:
    """Bytes that are free; None: not known, or not needed.

    Attributes:
        memory: on the device.
        host: beside a GPU, where models are made.
        disk: for seeded artifacts.
        output: the study's folder, where these lie; None: nowhere yet.
    """

    memory: int | None
    host: int | None = None
    disk: int | None = None
    output: Path | None = None

    @classmethod
    def of(
        cls, device: str, memory: int | None, host: int | None, disk: int | None, output: Path | None = None
    ) -> Room:
        """What is not given is asked of the system."""
        if host is None and device == "cuda":
            host = available_memory()
        room = disk if output is None and disk is None else artifacts.disk_room(output or Path(), disk)
        return cls(_free(device) if memory is None else memory, host, room, output)

    def without(self, disk_bytes: int) -> Room:
        """What is left when so much has been written."""
        return self if self.disk is None else replace(self, disk=self.disk - disk_bytes)


def _free(device: str) -> int | None:
    """Bytes that are free on the device; None where the system does not say."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return available_memory()


@dataclass(frozen=True)
class Fit:
    """The arms that there is room for.

    Attributes:
        arms: their names; without the control where it shares the baseline's memory.
        build: how their models are made.
        memory_bytes: of the worker.
        held: how, by arm.
        seeded: by arm, the artifact that it maps and that this study makes.
        disk_bytes: that these will take beside what is there.
        models: how many are made in memory.
        to_make: artifacts that are not there yet.
        left_out: why there is no intermediate arm although it was wanted.
    """

    arms: tuple[str, ...]
    build: Build
    memory_bytes: int
    held: dict[str, str]
    seeded: Mapping[str, Seeded]
    disk_bytes: int = 0
    models: int = 0
    to_make: int = 0
    left_out: str = ""


def fit(settings: Settings, size: str, engine: EngineName, facts: dict[str, Any], given: By, room: Room) -> Fit | str:
    """The arms that fit, or why not even the baseline does.

    Args:
        settings, size, engine: the group.
        facts: of the models, see ``arms.size_facts``.
        given: which checkpoints of its tasks are artifacts.
        room: what is free.
    """
    wanted = (BASELINE, *([INTERMEDIATE] if settings.intermediate or not settings.baseline else []))
    if any(given.values()):
        return _given(settings, engine, facts, given, wanted, room)
    found = _models(settings, engine, facts, wanted, room)
    if isinstance(found, str) and size != CHECKPOINT and artifacts.can_be_made(settings, engine):
        return _seeded(settings, size, engine, facts, wanted, room)
    return found


def _models(
    settings: Settings, engine: EngineName, facts: dict[str, Any], wanted: Sequence[str], room: Room
) -> Fit | str:
    """As models in memory: the probes are given up first, then the control's copy."""
    why = ""
    for names, probed in itertools.product(((*wanted, CONTROL), tuple(wanted)), (True, False)):
        build = arms.build_of(settings, facts["parameters"], engine, probes=probed)
        needs = arms.footprint(facts["parameters"], facts["embedding"], engine, build)
        why = _misfit(f"{len(names)} arms need", needs.of(len(names)), needs.host, room)
        if not why:
            held = _with_control(dict.fromkeys(names, _of_a_model(settings, engine, build)))
            return Fit(names, build, needs.of(len(names)) + _SPARE_BYTES, held, {}, models=len(names))
    return why


def _seeded(
    settings: Settings, size: str, engine: EngineName, facts: dict[str, Any], wanted: Sequence[str], room: Room
) -> Fit | str:
    """As artifacts that are made here."""
    plain = arms.build_of(settings, facts["parameters"], engine, probes=False)
    build = replace(plain, keep_weights=False, mapped=True)
    each = artifacts.bytes_of(facts, engine.precision, build.dtype)

    def of(arm: str) -> Seeded:
        return Seeded(size, engine.precision, settings.seed + (arm == INTERMEDIATE), build.dtype)

    def misfit(names: Sequence[str]) -> str:
        kinds = {of(arm) for arm in names}
        what = f"{len(kinds)} packed artifact{'s' if len(kinds) > 1 else ''} "
        why = _misfit(f"{what}need" if len(kinds) > 1 else f"{what}needs", each * len(kinds), 0, room)
        missing = each * len(kinds) - _there(kinds, room)
        if not why and room.disk is not None and missing > room.disk:
            why = (
                f"{what}would take {missing / 1e9:.1f} GB of the study's disk, "
                f"{max(0, room.disk) / 1e9:.1f} GB can be used"
            )
        return why

    names, left_out = _first_that_fits(wanted, misfit)
    if not names:
        return left_out
    seeded = {arm: of(arm) for arm in names}
    kinds = set(seeded.values())
    text = f"packed artifact of seeded weights ({str(build.dtype).removeprefix('torch.')}), mapped"
    return Fit(
        names,
        build,
        each * len(kinds) + _SPARE_BYTES,
        {arm: text + (", the baseline's files" if arm == CONTROL else "") for arm in names},
        seeded,
        disk_bytes=max(0, each * len(kinds) - _there(kinds, room)),
        to_make=len(kinds) if room.output is None else sum(not one.ready(room.output) for one in kinds),
        left_out=left_out,
    )


def _there(kinds: set[Seeded], room: Room) -> int:
    """Bytes that a former run has written of artifacts."""
    output = room.output
    return 0 if output is None else sum(artifacts.held_bytes(one.folder(output)) for one in kinds)


def _given(
    settings: Settings, engine: EngineName, facts: dict[str, Any], given: By, wanted: Sequence[str], room: Room
) -> Fit | str:
    """As artifacts that were given; what is none, of some tasks or arms, is a model beside them."""
    build = replace(arms.build_of(settings, facts["parameters"], engine, probes=False), mapped=True)
    needs = arms.footprint(facts["parameters"], facts["embedding"], engine, build)

    def of(arm: str, mine: Mapping[str, Artifact]) -> Artifact | None:
        return mine.get(BASELINE if arm == CONTROL else arm)

    def most(names: Sequence[str]) -> int:
        """Bytes of the task that takes the most."""
        found = []
        for mine in given.values():
            ones = [of(arm, mine) for arm in names]
            mapped = {one.folder: one.bytes for one in ones if one is not None}
            models = ones.count(None)
            found.append(sum(mapped.values()) + (needs.of(models) if models else 0))
        return max(found)

    def misfit(names: Sequence[str]) -> str:
        return _misfit(f"{len(names)} arms, packed artifacts among them, need", most(names), 0, room)

    names, left_out = _first_that_fits(wanted, misfit)
    if not names:
        return left_out
    model = _of_a_model(settings, engine, build)
    held = {}
    for arm in names:
        by_task = [model if of(arm, mine) is None else "packed artifact, mapped" for mine in given.values()]
        held[arm] = " or ".join(dict.fromkeys(by_task))
    models = max(sum(of(arm, mine) is None for arm in names) for mine in given.values())
    memory = most(names) + _SPARE_BYTES
    return Fit(names, build, memory, _with_control(held), {}, models=models, left_out=left_out)


def _first_that_fits(wanted: Sequence[str], misfit: Callable[[Sequence[str]], str]) -> tuple[tuple[str, ...], str]:
    """The most arms that fit, and why the intermediate one is not among them; none, and why."""
    why = ""
    for names in dict.fromkeys(((*wanted, CONTROL), tuple(wanted), (BASELINE, CONTROL), (BASELINE,))):
        refused = misfit(names)
        if not refused:
            return names, "" if set(wanted) <= set(names) else why
        why = refused
    return (), why


def _with_control(held: Mapping[str, str]) -> dict[str, str]:
    return {**held, CONTROL: held.get(CONTROL, "runs the baseline's copy")}


def _of_a_model(settings: Settings, engine: EngineName, build: Build) -> str:
    name = str(build.dtype).removeprefix("torch.")
    made = f"{'checkpoint' if settings.baseline else 'seeded weights'} in {name}"
    if engine.backend == STOCK:
        return made
    return f"{made}, packed beside them" if build.keep_weights else f"{made}, given up once packed"


def _misfit(what: str, needed: int, host: int, room: Room) -> str:
    """Why there is no memory for so many bytes, and for ``host`` more of them beside a GPU; empty where there is."""
    if room.host is not None and host + _SPARE_BYTES > room.host:
        return _too_much("a model is made in host memory, which takes", host, room.host)
    if room.memory is not None and needed + _SPARE_BYTES > room.memory:
        return _too_much(what, needed, room.memory)
    return ""


def _too_much(what: str, needed: int, free: int) -> str:
    spare = f"{_SPARE_BYTES / 1e9:.1f} GB for Python and torch"
    return f"{what} about {needed / 1e9:.1f} GB of memory and {spare}, {free / 1e9:.1f} GB are free"
