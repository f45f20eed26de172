"""Capturing CUDA graphs, with a stand-in for torch's part: what is left behind when a capture fails."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from xfast.backends import cuda_graphs
from xfast.errors import InvalidOptionError

CPU = torch.device("cpu")


class Stream:
    """Remembers nothing; streams are told apart by being others."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Device:
    """The current stream, and the pools that captures went to."""

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.pools: list[object] = []
        self.fail = False

    @contextmanager
    def graph(self, graph: Any, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As torch 2.11: the capture is ended before the stream is given back, and where it fails it is not."""
        self.pools.append(pool)
        before, self.current = self.current, stream
        graph.capture_begin(pool, capture_error_mode=capture_error_mode)
        try:
            yield
        finally:
            if self.fail:
                raise RuntimeError("operation failed due to a previous error during capture")
            graph.capture_end()
            self.current = before


class Generator:
    """As torch 2.11's: a state, which other generators may have, too, and which a capture marks."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state or {"offset": 8, "capturing": False}

    def clone_state(self) -> Generator:
        return Generator(dict(self.state))

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Graph:
    """As torch 2.11's: it marks the state that the default generator has when the capture begins, and unmarks that."""

    def capture_begin(self, *pool: object, capture_error_mode: str) -> None:
        self.state = torch.cuda.default_generators[0].state
        assert not self.state["capturing"]
        self.state["capturing"] = True

    def capture_end(self) -> None:
        self.state["capturing"] = False

    def replay(self) -> None: ...


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(made, "current", stream))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(cuda_graphs, "MEETINGS_BEFORE_CAPTURE", 0)
    return made


def test_a_capture_that_fails_gives_the_stream_back(device: Device) -> None:
    graphs, calls = cuda_graphs.Graphs(CPU, cuda_graphs.capture_cuda()), [0]

    def compute() -> torch.Tensor:
        calls[0] += 1
        if device.fail and device.current is not device.main:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(2, 2)

    def replay(key: str) -> torch.Tensor | None:
        return graphs.replay(key, lambda: (None, compute), lambda _: None, 2)

    assert replay("first") is not None
    device.fail = True
    assert replay("second") is None
    assert device.current is device.main
    said = graphs.refused["second"]
    assert said.startswith("operation not permitted") and "; then: operation failed due to a previous error" in said
    device.fail = False
    assert replay("second") is None  # not again at once
    assert replay("third") is not None and device.current is device.main
    first, second, third = device.pools
    assert first is second and third is not second  # what the broken capture left in use is not used again


def test_a_capture_that_another_thread_breaks_off_is_tried_again(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "RETRY_CALLS", 2)
    graphs, reason = cuda_graphs.Graphs(CPU, cuda_graphs.capture_cuda()), [""]

    def compute() -> torch.Tensor:
        if reason[0]:
            raise RuntimeError(reason[0])
        return torch.ones(2, 2)

    def replay(key: str) -> torch.Tensor | None:
        return graphs.replay(key, lambda: (None, compute), lambda _: None, 2)

    reason[0] = "operation failed due to a previous error during capture"
    assert replay("broken") is None and graphs.refused["broken"].endswith("tried again later")
    attempts = len(device.pools)
    assert [replay("broken") for _ in range(2)] == [None] * 2 and len(device.pools) == attempts
    reason[0] = ""
    assert replay("broken") is not None and not graphs.refused
    reason[0] = "no kernel image is available"
    assert replay("wrong") is None and graphs.refused["wrong"] == "no kernel image is available"
    reason[0] = ""
    assert [replay("wrong") for _ in range(9)] == [None] * 9  # for good


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("torch_version", ["2.11.0+cu130", "2.12.1", "2.13.0"])
def test_the_generator_is_not_marked_by_captures(
    device: Device, monkeypatch: pytest.MonkeyPatch, torch_version: str, fails: bool
) -> None:
    """Before 2.13 a mark would make every random number that is drawn meanwhile, or after a failure, an error."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(torch_version))
    (generator,) = torch.cuda.default_generators
    own, seen = generator.state, []

    def compute() -> torch.Tensor:
        seen.append((generator.state is own, own["capturing"], gc.isenabled(), device.current is device.main))
        own["offset"] += 4  # what another thread draws
        return torch.ones(2, 2)

    capture, device.fail = cuda_graphs.capture_cuda(), fails
    if fails:
        with pytest.raises(RuntimeError, match="previous error"):
            capture(compute)
    else:
        capture(compute)
    old = torch_version != "2.13.0"  # of 2.13, whose graphs have states of their own, the stand-in is none
    assert seen == [(True, False, True, True), (True, not old, False, False)]
    assert generator.state is own and own["offset"] == 16 and gc.isenabled()
    assert own["capturing"] == (fails and not old)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(device: Device, enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        cuda_graphs.capture_cuda()(lambda: torch.ones(2, 2))
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_graphs_can_be_switched_off(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for value, captures in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("XFAST_CUDA_GRAPHS", value)
        capture = cuda_graphs.capture_on(cuda)
        assert (capture is not None) == captures and cuda_graphs.capture_on(CPU) is None
        said = "0 captured, token buckets none yet" if captures else "off (XFAST_CUDA_GRAPHS=0)"
        assert cuda_graphs.Graphs(cuda, capture).describe(int) == [f"CUDA graphs: {said}"]
    monkeypatch.setenv("XFAST_CUDA_GRAPHS", "no")
    with pytest.raises(InvalidOptionError, match="XFAST_CUDA_GRAPHS: 'no' is not accepted; accepted: 0, 1"):
        cuda_graphs.capture_on(cuda)
