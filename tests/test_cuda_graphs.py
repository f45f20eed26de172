"""Capturing CUDA graphs, with a stand-in for torch's part: what is left behind when a capture fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from xfast.backends import cuda_graphs

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
        try:
            yield
        finally:
            if self.fail:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(made, "current", stream))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda self: None})())
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
    assert replay("second") is None  # for good: it is not memory that is missing
    assert replay("third") is not None and device.current is device.main
    first, second, third = device.pools
    assert first is second and third is not second  # what the broken capture left in use is not used again
