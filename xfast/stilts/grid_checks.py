"""What is checked before a grid trains anything: an evaluation's options would be refused hours later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
import transformers

import xfast
from xfast.errors import InvalidOptionError, UnsupportedModelError, XfastError
from xfast.stilts.config import RunConfig
from xfast.stilts.data import Source
from xfast.stilts.model import load_config
from xfast.stilts.scoring import TARGETS
from xfast.stilts.task import BITEXT, MATCHING
from xfast.stilts.tasks import get
from xfast.stilts.training import check

_WORDS = 64
"""Vocabulary of the model that is tried; a padding token beyond it makes it larger."""


def check_languages(languages: Sequence[str] | None, targets: Sequence[str], source: Source) -> None:
    """Refuse codes that no target has, and targets that have none of the languages.

    Args:
        languages: that are evaluated; None: each target's own.
        targets: columns of the grid.
        source: a target has the languages of the benchmarks, and those that files are there for.

    Raises:
        InvalidOptionError: names them, and what they have.
    """
    if languages is None:
        return
    if not languages:
        raise InvalidOptionError("languages: none given; leave the option out for all of a benchmark's")
    known = {target: _benchmarks(target) for target in targets}
    has = {target: [code for code in languages if _has(target, code, source)] for target in targets}
    if unknown := [code for code in languages if not any(code in codes for codes in has.values())]:
        accepted = " ".join(sorted({code for codes in known.values() for code in codes}))
        raise InvalidOptionError(f"languages: no target has {', '.join(unknown)}; accepted: {accepted}")
    if without := [f"{target} ({' '.join(known[target])})" for target in targets if not has[target]]:
        raise InvalidOptionError(
            f"languages: {' '.join(languages)}: leave out of `targets` what has none of these: {', '.join(without)}"
        )


def _benchmarks(target: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(code for name in TARGETS for code in get(target).languages(name)))


def _has(target: str, language: str, source: Source) -> bool:
    task = get(target)
    if language in _benchmarks(target):
        return True
    if task.type in (BITEXT, MATCHING):
        return False
    if target in source.hub:
        return bool(source.hub[target])  # a user's own dataset may have any
    return any(source.has(task, split, language) for split in ("dev", "test") if split in task.files)


def check_run(phase: str, wanted: RunConfig) -> None:
    """Refuse what training would refuse before it reads data; the message names the phase and its tasks."""
    try:
        check(wanted)
    except XfastError as error:
        raise type(error)(f"{phase}: {', '.join(wanted.tasks)}: {error}") from None


def check_acceleration(model: str, backend: str, precision: str) -> None:
    """Accelerate one untrained layer of the model's shape, on the device that evaluations run on.

    Raises:
        InvalidOptionError, BackendUnavailableError, UnsupportedModelError: what :func:`xfast.accelerate` refuses.
    """
    if backend == "none" or (backend, precision) == ("auto", "model"):  # stock transformers runs what nothing else does
        return
    config = copy.deepcopy(load_config(model))
    config.vocab_size = min(config.vocab_size, max(_WORDS, (config.pad_token_id or 0) + 1))
    config.num_hidden_layers = 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluation says it again
        tried = transformers.AutoModel.from_config(config).float().eval().to(device)
        try:
            xfast.accelerate(tried, backend=backend, precision=precision)
        except UnsupportedModelError:
            if backend != "auto":
                raise
