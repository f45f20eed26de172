"""Processes of the study's tests, forked from one that has imported torch and transformers and done nothing with them.

Importing them again in every process takes longer than what most tests measure. The functions that run there are here,
because a process of its own imports them by the name of their module.
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xfast.errors import DataFileError
from xfast.machine import machine, peak_memory
from xfast.study import arms, fit, run
from xfast.study.document import BASELINE
from xfast.study.factors import EngineName, Settings
from xfast.study.store import Store

_IMPORTED = ["xfast.study.worker", "transformers.models.xlm_roberta.modeling_xlm_roberta"]


def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For ``pytest.fixture(scope="module", autouse=True)(forked)``: studies fork their workers.

    What a worker gets and how it ends is the same as where it is spawned. Spawned it is, as a user's, in
    :func:`begin` of a process of its own.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())  # its path begins with this folder: not with the checkout
        forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "START_METHOD", "forkserver")
        yield


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *arguments).result()


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def begin(settings: Settings, folder: Path, memory: int | None = None) -> None:
    """A study from its beginning, with so many bytes of memory or what is free."""
    if memory is not None:
        fit.available_memory = lambda: memory
    run.start(settings, folder, resume=False, console=quiet())


def footprint(engine: str) -> float:
    """Memory that a base model takes, over what it is planned with."""
    name, facts = EngineName.parse(engine), arms.size_facts("base")
    settings = Settings(probes=False)
    build = arms.build_of(settings, facts["parameters"], name)
    arms.accelerate(arms.model_of(settings, "tiny", BASELINE, "panx", build.dtype), name)  # imports it all
    before = peak_memory()
    made = arms.model_of(settings, "base", BASELINE, "panx", build.dtype)
    arms.accelerate(made, name)
    needs = arms.footprint(facts["parameters"], facts["embedding"], name, build)
    return (peak_memory() - before) / needs.of(1)


def fill_up(folder: Path) -> str:
    """Two notes that there is room for and one between them that is too long; returns what its error says."""
    made = Store(folder, Settings(), machine(), resume=False)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    room = made.path.stat().st_size + 200
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    made.add({"kind": "note", "text": "a"})
    try:
        made.add({"kind": "note", "text": 200 * "b"})
    except DataFileError as error:
        said = str(error)
    made.add({"kind": "note", "text": "c"})
    made.close()
    return said
