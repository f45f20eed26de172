"""Which engines are used, stored and rebuilt: a stored one that does not load or computes something else never is."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from gpu import NO_NUMPY_WARNINGS
from typer.testing import CliRunner

from xfast import engine as command
from xfast.architecture import describe, find_encoders
from xfast.backends import tensorrt as backend
from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_check as judge
from xfast.backends import tensorrt_runtime as runtimes
from xfast.backends import tensorrt_session
from xfast.backends import tensorrt_store as stores
from xfast.backends.base import CannotRunError, EngineRefusedError
from xfast.errors import BackendUnavailableError, InvalidOptionError

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT: pip install tensorrt-rtx-cu13")
pytestmark = NO_NUMPY_WARNINGS
LOAD = backend.TensorRTEngine._load
GOOD, WRONG, STALE = b"good engine", b"wrong engine", b"stale engine"


class Machine:
    """A GPU and a TensorRT that "build" the word good; an engine is what its bytes say."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.builds, self.loads, self.folder = 0, 0, folder
        self.failure: Exception | None = None  # of a check
        self.load_failure: Exception | None = None
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        patch.setattr(builder, "build", self._build)
        patch.setattr(backend.TensorRTEngine, "_load", self._load)
        patch.setattr(backend.TensorRTEngine, "_check", self._check)

    def _build(self, *_: Any, **__: Any) -> bytes:
        self.builds += 1
        return GOOD

    def _load(self, _: Any, blob: bytes, layers: int) -> Any:
        self.loads += 1
        if self.load_failure is not None:
            raise self.load_failure
        if blob == STALE:
            raise BackendUnavailableError("tensorrt_rtx does not load the engine: built for another driver")
        return blob

    def _check(self, runner: Any, layers: int) -> judge.Report:
        if self.failure is not None:
            raise self.failure
        report = judge.Report(0.5 if runner == WRONG else 0.001, 0.01, 1.0, True)
        if not report.accepted:
            raise judge.EngineRejectedError(report)
        return report

    def engine(self) -> backend.TensorRTEngine:
        model = models.build("xlm-roberta", "base-no-pooler", num_hidden_layers=1)
        return backend.TensorRTEngine(describe(*find_encoders(model)[0][1:]), "bf16", stores.Store(self.folder))

    def keys(self) -> list[stores.Key]:
        return self.engine()._keys(runtimes.find(), 1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path / "engines")


@pytest.mark.parametrize("blob", [WRONG, STALE])
@pytest.mark.parametrize("which", [0, 1])
def test_a_stored_engine_that_is_not_to_be_trusted_is_built_anew(blob: bytes, which: int, machine: Machine) -> None:
    """Of this GPU by name, or of its compute capability."""
    stores.Store(machine.folder).save(machine.keys()[which], blob)
    for builds in (1, 1):  # the second process finds what the first one built
        made = machine.engine()
        assert made._runner(1) == GOOD and machine.builds == builds
    assert stores.Store(machine.folder).load(machine.keys()[0]) == GOOD
    first = "\n".join(machine.engine().describe())
    assert "no engine yet" in first


def test_the_engine_for_the_capability_is_tried_after_a_bad_one_for_the_gpu(machine: Machine) -> None:
    store = stores.Store(machine.folder)
    store.save(machine.keys()[0], STALE)
    store.save(machine.keys()[1], GOOD)
    made = machine.engine()
    assert made._runner(1) == GOOD and machine.builds == 0
    text = "\n".join(made._notes)
    assert (
        "the stored engine for Some GPU was not used: tensorrt_rtx does not load" in text and "from the cache" in text
    )


def test_a_damaged_file_is_said(machine: Machine) -> None:
    store = stores.Store(machine.folder)
    path = store.save(machine.keys()[0], GOOD)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-3])
    made = machine.engine()
    assert made._runner(1) == GOOD and machine.builds == 1
    assert any("a stored engine was not used" in note and path.name in note for note in made._notes)


def test_a_full_disk_is_said_and_costs_nothing_else(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        made = machine.engine()
        with pytest.warns(RuntimeWarning, match="not in the cache, so every process builds it: .*No space left"):
            assert made._runner(1) == GOOD
    assert any("No space left" in note for note in made._notes)


def test_torchs_unused_memory_is_there_for_tensorrt(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which allocates on its own, and cannot have what torch keeps for later."""
    happened: list[str] = []

    def note(what: str) -> Any:
        return lambda *_, **__: (happened.append(what), GOOD)[1]

    monkeypatch.setattr(torch.cuda, "empty_cache", note("emptied"))
    monkeypatch.setattr(builder, "build", note("built"))
    monkeypatch.setattr(tensorrt_session, "Session", note("loaded"))
    monkeypatch.setattr(backend, "GraphRunner", lambda session, profiles: session)
    monkeypatch.setattr(backend.TensorRTEngine, "_load", LOAD)
    assert machine.engine()._runner(1) == GOOD
    assert happened == ["emptied", "built", "emptied", "loaded"]

    def capturing() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", capturing)  # the program's own capture, on another thread
    assert machine.engine()._runner(1) == GOOD


def test_an_engine_keeps_its_runtime(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine.engine()
    monkeypatch.setenv(runtimes.VARIABLE, "none of them")  # of which later engines are
    assert made._runner(1) == GOOD and made.verify(1).accepted
    with pytest.raises(InvalidOptionError, match="XFAST_TENSORRT"):
        machine.engine()


@pytest.mark.parametrize("blob", [GOOD, WRONG])
def test_the_verdict_of_verify(blob: bytes, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.Store(machine.folder).save(machine.keys()[0], blob)
    weights = machine.engine()._weights
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(command, "load_weights", lambda *_: weights)
    for options in ([], ["--json"]):
        done = CliRunner().invoke(command.app, ["verify", "model", str(machine.folder), *options])
        assert done.exit_code == (0 if blob == GOOD else 2), done.output
        if options:
            assert json.loads(done.stdout)["accepted"] == (blob == GOOD)
        else:
            assert done.stdout.startswith("accepted: " if blob == GOOD else "refused: relative error 5.00e-01")


def test_an_engine_is_described_while_another_is_made(machine: Machine) -> None:
    """explain on one thread, and the first call of other layers on another."""
    made = machine.engine()

    class Telling:
        def __init__(self, layers: int) -> None:
            self.layers = layers

        def describe(self) -> list[str]:
            made._runners[self.layers + 10] = Telling(self.layers + 10)  # type: ignore[assignment]
            return [f"{self.layers} layers"]

    made._runners.update({1: Telling(1), 2: Telling(2)})  # type: ignore[dict-item]
    assert [line for line in made.describe() if line.endswith(" layers")] == ["1 layers", "2 layers"]


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    runtimes.DeviceMemoryError("tensorrt_rtx does not load the engine: CUDA out of memory"),
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is, in one element."""
    now = [1000.0]
    monkeypatch.setattr(backend.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("failure", NO_MEMORY, ids=["torch", "tensorrt"])
@pytest.mark.parametrize("while_it", ["loading", "checked"])
def test_a_failure_that_is_not_the_engines_does_not_lose_it(
    while_it: str, failure: Exception, machine: Machine, clock: list[float]
) -> None:
    setattr(machine, {"loading": "load_failure", "checked": "failure"}[while_it], failure)
    made = machine.engine()
    for number in range(3):  # it passes: tried again, but what was built (minutes) is kept
        warned = pytest.warns(
            RuntimeWarning, match="CUDA out of memory; the original code runs; tried again after 30 s"
        )
        with contextlib.nullcontext() if number else warned, pytest.raises(CannotRunError, match="CUDA out of memory"):
            made._runner(1)
        clock[0] += backend.MIN_PAUSE * 2**number
    assert machine.builds == 1 and any("CUDA out of memory" in line for line in made.describe())
    machine.failure = machine.load_failure = None
    assert made._runner(1) == machine.engine()._runner(1) == GOOD and machine.builds == 1
    assert made._pauses == {}


@pytest.mark.filterwarnings("ignore:TensorRT. .* out of memory:RuntimeWarning")
@pytest.mark.parametrize("failure", NO_MEMORY, ids=["torch", "tensorrt"])
def test_want_of_memory_is_no_reason_to_build(failure: Exception, machine: Machine, clock: list[float]) -> None:
    """A stored engine stays, and is tried when some time has passed: longer each time, and not at every call."""
    stores.Store(machine.folder).save(machine.keys()[0], GOOD)
    machine.load_failure = failure
    made, tries = machine.engine(), []
    for _ in range(4000):
        before = machine.loads
        with pytest.raises(CannotRunError) as caught:
            made._runner(1)
        assert not isinstance(caught.value, EngineRefusedError)
        if machine.loads > before:
            tries.append(clock[0] - 1000)
        clock[0] += 1
    assert tries == [0, 30, 90, 210, 450, 930, 1890, 3690] and machine.builds == 0
    machine.load_failure = None
    clock[0] += backend.MAX_PAUSE
    assert made._runner(1) == GOOD and machine.builds == 0


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (("no engine was built", ["OutOfMemory (Requested size was 1000000000 bytes.)"]), True),
        (("no engine was built", ["OutOfMemory (Requested size was 1000000000000000 bytes.)"]), False),
        (("OutOfMemoryError: CUDA out of memory", []), True),
        (("no engine was built", ["no kernel for this OutOfBounds layer"]), False),
    ],
)
def test_a_build_without_memory_is_tried_again_where_memory_can_be_enough(
    error: tuple[str, list[str]], passes: bool, machine: Machine, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise builder.EngineBuildError(*error)

    made = machine.engine()
    made.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**12))
    with monkeypatch.context() as patch:
        patch.setattr(builder, "build", fail)
        for warned in (passes, False):
            said = pytest.warns(RuntimeWarning, match="tried again after") if warned else contextlib.nullcontext()
            with said, pytest.raises(CannotRunError, match="OutOf") as caught:
                made._runner(1)
            assert isinstance(caught.value, EngineRefusedError) is not passes
    clock[0] += backend.MIN_PAUSE
    if passes:
        assert made._runner(1) == GOOD
    else:
        with pytest.raises(EngineRefusedError):
            made._runner(1)


def test_a_wrong_engine_that_was_just_built_is_refused_and_not_stored(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "build", lambda *_, **__: WRONG)
    with pytest.raises(CannotRunError, match=r"TensorRT: the engine was refused: relative error 5\.00e-01"):
        machine.engine()._runner(1)
    assert stores.Store(machine.folder).load(machine.keys()[0]) is None


@pytest.mark.parametrize("failure", [None, torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.filterwarnings("ignore:TensorRT. CUDA out of memory:RuntimeWarning")
def test_an_engine_of_weights_that_changed_is_not_stored(
    failure: Exception | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the digest of the old ones it would be found, and refused, wherever these are used."""
    model = models.build("xlm-roberta", "base-no-pooler", num_hidden_layers=1)
    weights = describe(*find_encoders(model)[0][1:])
    made = backend.TensorRTEngine(weights, "bf16", stores.Store(machine.folder))

    def build(*_: Any, **__: Any) -> bytes:
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight[0, 0] += 1
        return GOOD

    monkeypatch.setattr(builder, "build", build)
    machine.failure = failure
    if failure is None:
        with pytest.warns(RuntimeWarning, match="not in the cache.*: the weights changed while it was built"):
            assert made._runner(1) == GOOD
    else:
        with pytest.raises(CannotRunError):
            made._runner(1)
    assert stores.Store(machine.folder).entries() == ()


def test_the_cache_is_kept_within_its_size(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store, old = stores.Store(machine.folder), machine.keys()[0]
    ours = dataclasses.replace(old, weights="cd" * 32)
    other = dataclasses.replace(old, weights="ab" * 32)
    for key in (ours, other):
        assert store.save(key, bytes(1000)) is not None
    monkeypatch.setattr(stores, "_held", set())
    assert store.load(ours) is not None  # in use by this process, however long ago
    for age, key in enumerate((ours, other)):
        os.utime(store.path(key), (1e9 + age, 1e9 + age))
    monkeypatch.setenv("XFAST_CACHE_BYTES", "1500")
    made = machine.engine()
    assert made._runner(1) == GOOD
    assert store.load(old) == GOOD and store.path(ours).exists() and not store.path(other).exists()
    assert any("may hold 1500 bytes (XFAST_CACHE_BYTES)" in note and other.name in note for note in made._notes)
    monkeypatch.setenv("XFAST_CACHE_BYTES", "much")
    with pytest.raises(InvalidOptionError, match="XFAST_CACHE_BYTES: 'much'"):  # before anything is built
        machine.engine()


@pytest.mark.parametrize("target", ["SM90", "sm89", "A100", "SM86,SM89"])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_target_is_one_that_is_known(target: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    models.build("xlm-roberta", "base-no-pooler", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    with pytest.raises(InvalidOptionError, match=f"target: {target} is not accepted"):
        command.build_engine(str(tmp_path / "m"), tmp_path / "e", target=target)


@pytest.mark.parametrize("target", [None, "CURRENT"])
def test_the_gpu_that_is_there_is_found_by_its_name(
    target: str | None, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(builder, "build", lambda *given, **__: (asked.append(given[4]), GOOD)[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    models.build("xlm-roberta", "base-no-pooler", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    made = command.build_engine(str(tmp_path / "m"), machine.folder, target=target)
    assert asked == ["CURRENT"] and made["target"] == "Some GPU"


@pytest.mark.parametrize("target", [None, "CURRENT"])
def test_the_data_centre_runtime_builds_for_the_gpu_that_is_there(
    target: str | None, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    kind, module = runtimes.KINDS[0], SimpleNamespace(INetworkDefinition=SimpleNamespace())
    monkeypatch.setattr(runtimes, "find", lambda: runtimes.Runtime(kind, (10, 9), module))  # type: ignore[arg-type]
    monkeypatch.setattr(builder, "build", lambda *given, **__: (asked.append(given[4]), GOOD)[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    models.build("xlm-roberta", "base-no-pooler", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    made = command.build_engine(str(tmp_path / "m"), machine.folder, target=target)
    assert asked == [None] and made["target"] == "Some GPU"  # it names no targets: there is no other
    with pytest.raises(InvalidOptionError, match="target: SM89 is not accepted; tensorrt builds for the GPU"):
        command.build_engine(str(tmp_path / "m"), machine.folder, target="SM89")


def test_engines_of_another_release_are_listed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.Store(machine.folder).save(machine.keys()[0], GOOD)

    def refuse(*_: Any) -> None:
        raise InvalidOptionError("the engine was built by 1.7.0.5, this is 1.7.1.116")

    monkeypatch.setattr(builder, "inspect", refuse)
    done = CliRunner().invoke(command.app, ["inspect", str(machine.folder), "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["state"] == "intact; not read: the engine was built by 1.7.0.5, this is 1.7.1.116"


def test_an_interrupt_in_the_logger_ends_the_build() -> None:
    sink = runtimes.find().logger

    class Interrupted(runtimes.Log):
        def add(self, severity: str, text: str) -> None:
            raise KeyboardInterrupt

    log = Interrupted()
    monitor = builder._monitor(trt, None, sink)
    sink.add(log)
    try:
        sink.log(trt.ILogger.Severity.ERROR, "anything")  # nothing is raised through TensorRT
    finally:
        sink.remove(log)
    assert monitor.step_complete("phase", 0) is False and isinstance(monitor.raised, KeyboardInterrupt)
    assert builder._monitor(trt, None, sink).step_complete("phase", 0) is True


def test_constants_are_on_the_cpu_whatever_the_default_device() -> None:
    """TensorRT is given their addresses: a pointer into a GPU's memory would end the process."""
    model = models.build("xlm-roberta", "base-no-pooler", num_hidden_layers=1)
    weights = describe(*find_encoders(model)[0][1:])
    from tensorrt_built import Built

    with torch.device("meta"), warnings.catch_warnings():
        for precision in ("fp32", "bf16", "int8"):
            Built(weights, precision)
