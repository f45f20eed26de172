"""Which TensorRT is there, and in what the two differ: one table, and a log that keeps what TensorRT has to say.

``tensorrt`` is the data-centre library, whose builder times kernels on a GPU of the kind that will run them.
``tensorrt_rtx`` builds without any GPU for compute capabilities named beforehand, and compiles its kernels on the
user's GPU when an engine is loaded. Their Python interfaces are the same but for the rows of ``KINDS``. Neither is
imported before ``find`` is called.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from xfast.errors import BackendUnavailableError, InvalidOptionError

VARIABLE = "XFAST_TENSORRT"
"""Environment variable that names the runtime to use."""

MAX_MESSAGES, MAX_VERBOSE_MESSAGES = 200, 200_000
_NO_MEMORY = re.compile(r"out ?of ?memory|no memory left|MemoryAllocation|bad_alloc", re.IGNORECASE)
_REQUESTED = re.compile(r"requested size was (\d+) bytes", re.IGNORECASE)
_SEVERE = ("INTERNAL_ERROR", "ERROR")
_LOUD = (*_SEVERE, "WARNING")


class DeviceMemoryError(BackendUnavailableError):
    """TensorRT found no memory on the device: no fault of an engine's, and it passes."""


def wants_memory(messages: Iterable[str], there_is: int | None = None) -> bool:
    """Whether TensorRT's errors say that memory is missing, and not more than all the bytes that ``there_is``."""
    text = "\n".join(messages)
    if there_is is not None and any(int(size) > there_is for size in _REQUESTED.findall(text)):
        return False
    return _NO_MEMORY.search(text) is not None


def unavailable(text: str, log: Log) -> BackendUnavailableError:
    """What TensorRT refused, with the errors that it logged; of its own type where these say that memory is missing."""
    kind = DeviceMemoryError if wants_memory(log.errors()) else BackendUnavailableError
    return kind(f"{text}: {'; '.join(log.errors()) or 'TensorRT gives no reason'}")


@dataclass(frozen=True)
class Kind:
    """One row of the table: a TensorRT as its users install and import it."""

    name: str  # of the Python module
    install: str
    accepted: tuple[tuple[int, ...], tuple[int, ...] | None]  # first version, first one that is too new
    needs_gpu_to_build: bool
    names_targets: bool  # compute capabilities are named at build time

    def refusal(self, version: tuple[int, ...]) -> str | None:
        """Why this version is not accepted, or None."""
        first, end = self.accepted
        if version >= first and (end is None or version < end):
            return None
        accepted = f"{_dotted(first)} or later" + ("" if end is None else f", before {_dotted(end)}")
        return f"version {_dotted(version)} is not accepted; accepted: {accepted} ({self.install})"


# Preferred first. 1.7 is the first TensorRT for RTX that this was tried with.
KINDS = (
    Kind("tensorrt", "pip install tensorrt", ((10, 0), None), needs_gpu_to_build=True, names_targets=False),
    Kind(
        "tensorrt_rtx",
        "pip install tensorrt-rtx-cu13",
        ((1, 7), None),
        needs_gpu_to_build=False,
        names_targets=True,
    ),
)
NAMES = tuple(kind.name for kind in KINDS)


class Log:
    """Messages of TensorRT in their order, as (severity, text); severities are its own names, ``"ERROR"`` and so on.

    Keeps warnings and errors, or with ``verbose`` everything: some thousand messages for a build.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._messages: deque[tuple[str, str]] = deque(maxlen=MAX_VERBOSE_MESSAGES if verbose else MAX_MESSAGES)

    def add(self, severity: str, text: str) -> None:
        """Called by TensorRT, from any thread."""
        if self.verbose or severity in _LOUD:
            self._messages.append((severity, text))

    @property
    def messages(self) -> list[tuple[str, str]]:
        """All that was kept so far."""
        return list(self._messages)

    def errors(self) -> list[str]:
        """The texts of errors, each once."""
        return list(dict.fromkeys(text for severity, text in self.messages if severity in _SEVERE))


@dataclass(frozen=True)
class Runtime:
    """An imported TensorRT. Two are equal when kind and version are."""

    kind: Kind
    version: tuple[int, ...]
    module: ModuleType = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The Python module's name, ``"tensorrt"`` or ``"tensorrt_rtx"``."""
        return self.kind.name

    @property
    def version_text(self) -> str:
        """The version with dots."""
        return _dotted(self.version)

    @property
    def needs_gpu_to_build(self) -> bool:
        """Whether its builder only works where a GPU is."""
        return self.kind.needs_gpu_to_build

    @property
    def logger(self) -> Any:
        """The one ``ILogger`` to give to everything of this module: a process has one, later ones are ignored."""
        return _sink_of(self.module)

    def targets(self) -> tuple[str, ...]:
        """Names of compute capabilities that can be built for, ``"SM89"`` and so on; ``"CURRENT"`` needs the GPU.

        Empty where engines are always for the GPU they are built on.
        """
        if not self.kind.names_targets:
            return ()
        names = self.module.ComputeCapability.__members__.keys() - {"NONE", "CURRENT"}
        return (*sorted(names, key=lambda name: (len(name), name)), "CURRENT")

    def set_target(self, config: Any, target: str | Sequence[str] | None) -> None:
        """Sets what the builder config's engine will run on.

        Args:
            config: the ``IBuilderConfig``.
            target: one of ``targets()`` or several; None for the runtime's own choice: the GPU that is there, or for
                ``tensorrt_rtx`` one engine for every compute capability from 8.0 that it knows.

        Raises:
            InvalidOptionError: a name that is not among ``targets()``, none, one twice, or CURRENT among others.
        """
        names = self.check_target(target)
        if not names:
            return
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(self.module.ComputeCapability, name), index):
                raise InvalidOptionError(f"target: {self.name} {self.version_text} refuses {name}")

    def check_target(self, target: str | Sequence[str] | None) -> tuple[str, ...]:
        """The target's names, sorted as in ``targets()``; empty for None. Raises as ``set_target`` does."""
        if target is None:
            return ()
        names = (target,) if isinstance(target, str) else tuple(target)
        known = self.targets()
        if not known:
            raise InvalidOptionError(
                f"target: {', '.join(names)} is not accepted; {self.name} builds for the GPU that is there (None)"
            )
        wrong = [str(name) for name in names if name not in known]
        if wrong or not names:
            raise InvalidOptionError(
                f"target: {', '.join(wrong) or 'nothing'} is not accepted; accepted: {', '.join(known)}"
            )
        if len(set(names)) < len(names) or ("CURRENT" in names and len(names) > 1):
            raise InvalidOptionError(f"target: {', '.join(names)}; name each once, and CURRENT only alone")
        return tuple(sorted(names, key=known.index))

    @contextmanager
    def collecting(self, log: Log | None = None) -> Iterator[Log]:
        """What TensorRT says meanwhile, of all threads, goes to ``log`` (None: a new one) too."""
        log = Log() if log is None else log
        sink = self.logger
        sink.add(log)
        try:
            yield log
        finally:
            sink.remove(log)


def find(name: str | None = None) -> Runtime:
    """The TensorRT of that name; else the one that ``XFAST_TENSORRT`` names; else the first of ``NAMES`` that works.

    Raises:
        InvalidOptionError: the argument or the variable is none of ``NAMES``.
        BackendUnavailableError: not installed, cannot be imported, or of a version that is not accepted.
    """
    asked, origin = (name, "runtime") if name is not None else (os.environ.get(VARIABLE) or None, VARIABLE)
    if asked is not None and asked not in NAMES:
        raise InvalidOptionError(f"{origin}: {asked!r} is not accepted; accepted: {', '.join(NAMES)}")
    reasons = []
    for kind in KINDS:
        if asked is None or asked == kind.name:
            found = _load(kind)
            if isinstance(found, Runtime):
                return found
            reasons.append(f"{kind.name}: {found}")
    raise BackendUnavailableError("; ".join(reasons))


def _load(kind: Kind) -> Runtime | str:
    """The runtime, or why there is none."""
    try:
        module = importlib.import_module(kind.name)
    except ModuleNotFoundError as error:
        if error.name == kind.name:
            return f"not installed: {kind.install}"
        return _broken(kind, error)
    except Exception as error:  # a broken installation may raise anything: ImportError, OSError, AttributeError
        return _broken(kind, error)
    text = getattr(module, "__version__", None)
    if not isinstance(text, str) or not hasattr(module, "Builder"):  # an empty folder of that name imports, too
        return f"the module {module.__name__!r} is no TensorRT: it has no Builder or no version; {kind.install}"
    version = tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:4])
    return kind.refusal(version) or Runtime(kind, version, module)


def _broken(kind: Kind, error: Exception) -> str:
    return f"cannot be imported: {type(error).__name__}: {error}; install it again: {kind.install}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


_sinks: dict[str, Any] = {}
_sinks_lock = threading.Lock()


def _sink_of(module: ModuleType) -> Any:
    """The process's logger for that module; it is never freed, because TensorRT keeps the first it is given."""
    with _sinks_lock:
        if module.__name__ not in _sinks:
            _sinks[module.__name__] = _make_sink(module)
        return _sinks[module.__name__]


def _make_sink(module: ModuleType) -> Any:
    class Sink(module.ILogger):  # type: ignore[name-defined]
        """Hands every message to the logs that are being collected; prints nothing."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._logs: tuple[Log, ...] = ()  # replaced, never changed: other threads may be reading it
            self._lock = threading.Lock()
            self.raised: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                for log in self._logs:
                    log.add(severity.name, message)
            except BaseException as error:  # Ctrl-C, while Python code runs; nothing may be raised through TensorRT
                self.raised = error

        def add(self, log: Log) -> None:
            with self._lock:
                self._logs = (*self._logs, log)

        def remove(self, log: Log) -> None:
            with self._lock:
                # the last of them by identity: one log may be collecting twice
                index = max(index for index, each in enumerate(self._logs) if each is log)
                self._logs = self._logs[:index] + self._logs[index + 1 :]

    return Sink()
