"""One CUDA graph for each *bucket* of token counts: a packed batch has one dimension, so few graphs serve all batches.

A forward of a few hundred tokens is over sooner than Python can launch its kernels; a graph launches them all at once.
A batch of T tokens runs in the smallest bucket that holds it: its arrays are copied into the bucket's, the graph is
replayed, the result's first rows are copied out. Larger batches keep the device busy without: they run ungraphed, on
exactly T rows. What a bucket is made of, each backend knows: ``triton_graphs.py``, ``tensorrt_graphs.py``.

Graphs are captured when a bucket is met again, share one memory pool, and one that is not used any more goes when there
are many. Replays of one engine take turns (a lock on the host, an event between streams), since they share memory.
"""

from __future__ import annotations

import gc
import math
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from xfast.errors import in_short, require_one_of

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Token counts, in steps of at most 1.5 from 64 on: the rows that a bucket adds to a batch cost products."""

MAX_GRAPHS = 64
"""Each holds its inputs and its output; what lies between is shared."""

QUIET_CALLS = 4 * MAX_GRAPHS
"""A graph makes room for another when so many calls have passed it by. With more shapes than graphs in steady use, new
ones run without: capturing them in turn would stop the device all the time."""

MEETINGS_BEFORE_CAPTURE = 2
"""A shape that comes up once is not worth a capture, which stops the device and takes as long as many launches."""

RETRY_CALLS = 1024
"""A capture for which there was no memory, or that another thread broke off, is tried again after so many calls, and
then each time they have doubled."""

SWITCH = "XFAST_CUDA_GRAPHS"
"""This environment variable says 0 where a program has captures of its own that ours would be in the way of."""

_PASSING = re.compile("out of memory|captur", re.IGNORECASE)
"""In errors that may not come again: another thread that synchronises the device breaks a capture off."""

Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Runs a function once, recording it; returns what repeats it into the same memory, and its result."""


@dataclass
class _Graph:
    """A captured function with its input buffers; the function is kept for what it refers to."""

    buffers: Any
    function: Callable[[], torch.Tensor]
    replay: Replay
    output: torch.Tensor
    used: int = 0
    verified: bool = False


def bucket_for(tokens: int) -> int | None:
    """The smallest bucket that holds ``tokens``, or None when it is larger than all."""
    return next((size for size in BUCKETS if size >= tokens), None)


_capturing = threading.Lock()  # torch allows one capture at a time in a process


def empty_cache() -> None:
    """Hands torch's unused memory back to the device, for libraries that allocate on their own."""
    with _capturing, suppress(RuntimeError):  # torch's own refusal, while the program captures something
        torch.cuda.empty_cache()


def finish(event: torch.cuda.Event | None) -> None:
    """Waits for what an event was recorded after, before its memory goes; not in a capture, which that would end."""
    if event is None:
        return
    try:  # the interpreter may be ending, and suppress() be gone
        if not torch.cuda.is_current_stream_capturing():
            event.synchronize()
    except Exception:
        return


def _cause(error: BaseException) -> str:
    """What went wrong first, with what came of it: a capture that is broken off ends in an error that names nothing."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return in_short(error) if first is error else f"{in_short(first)}; then: {in_short(error)}"


def _new_graph() -> torch.cuda.CUDAGraph:
    """A CUDA graph whose capture leaves other threads their random numbers.

    Before 2.13 torch marks the device's generator as being captured (``CUDAGeneratorState::capturing_``): whoever draws
    a number in another thread meanwhile gets an error, and where the capture fails, everyone from then on. What is
    captured here draws none: a copy of the generator's state gets the mark, in the state's place for that moment.
    """
    if torch.__version__ >= (2, 13):
        return torch.cuda.CUDAGraph()

    class Graph(torch.cuda.CUDAGraph):
        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            generator: Any = torch.cuda.default_generators[torch.cuda.current_device()]
            own = generator.graphsafe_get_state()
            generator.graphsafe_set_state(generator.clone_state())
            try:
                super().capture_begin(*args, **kwargs)
            finally:
                generator.graphsafe_set_state(own)

    return Graph()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector would destroy a dropped graph on the capturing thread, which ends the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture_cuda() -> Capture:
    """Captures on a side stream, after a run elsewhere that compiles kernels and loads libraries.

    All graphs captured by the returned function share a memory pool: none may run while another does. Here nothing but
    captures uses the side stream: cuBLAS has a workspace for each stream, and so makes this one's inside the pool,
    where it lives as long as the graphs. (Torch hands out 32 streams in turn: with more in a process, one may have a
    workspace already, which is then outside the pool.)
    """

    def new() -> tuple[Any, torch.cuda.Stream]:
        # one stream: torch reuses a pool's memory within a stream only
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    pool, side = new()

    def capture(function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        nonlocal pool, side
        with _capturing:
            function()
            before = torch.cuda.current_stream()
            side.wait_stream(before)
            graph = _new_graph()
            try:
                with (
                    _no_collection(),
                    torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
                ):
                    output = function()
            except BaseException:
                # Where a capture cannot be ended, torch leaves its stream current, its pool in use by no one, and
                # before 2.12 (pytorch/pytorch#180395) its allocator capturing for ever; the call fails if it is not.
                torch.cuda.set_stream(before)
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(before.device_index, pool)
                    torch._C._cuda_releasePool(before.device_index, pool)
                pool, side = new()
                raise
            before.wait_stream(side)
        return graph.replay, output

    return capture


def capture_on(device: torch.device) -> Capture | None:
    """What captures graphs on a device, or None where there are none.

    Raises:
        InvalidOptionError: :data:`SWITCH` is neither 0 nor 1.
    """
    return capture_cuda() if device.type == "cuda" and not _switched_off() else None


def _switched_off() -> bool:
    value = os.environ.get(SWITCH) or "1"
    require_one_of(SWITCH, value, ("0", "1"))
    return value == "0"


class Graphs:
    """The captured graphs of one engine, by a key that names all that a graph depends on; without ``capture`` none."""

    def __init__(self, device: torch.device, capture: Capture | None) -> None:
        self._done: torch.cuda.Event | None = None
        self.device = device
        self.capture = capture
        self.refused: dict[Hashable, str] = {}
        self._again: dict[Hashable, int] = {}  # those of them that may go well: the call that tries once more
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._met: Counter[Hashable] = Counter()
        self._calls = 0
        self._lock = threading.Lock()

    def __del__(self, finish: Callable[..., None] = finish) -> None:  # bound: at exit modules lose their names first
        finish(self._done)  # of replays on other streams than that of whoever lets go

    @property
    def keys(self) -> list[Any]:
        """Of the graphs there are."""
        return list(self._graphs)

    def replay(
        self,
        key: Hashable,
        prepare: Callable[[], tuple[Any, Callable[[], torch.Tensor]]],
        fill: Callable[[Any], object],
        rows: int,
        verify: Callable[[torch.Tensor], str | None] | None = None,
    ) -> torch.Tensor | None:
        """The first ``rows`` rows of what the key's graph computes, or None: there is none (yet), run without.

        Args:
            key: of the graph.
            prepare: makes input buffers, filled with something harmless, and a function that computes from them.
            fill: copies a batch into such buffers.
            rows: of the result.
            verify: says what is wrong with the result of a graph's first replay, if anything: then it is not used.
        """
        if self.capture is None:
            return None
        with self._lock:
            graph = self._graph(key, prepare, self.capture)
            if graph is None:
                return None
            # after the last replay, on whichever stream it was
            cuda = self.device.type == "cuda"
            if cuda and self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            fill(graph.buffers)
            out = torch.empty_like(graph.output[:rows])  # first: nothing may fail between the replay and its event
            graph.replay()
            out.copy_(graph.output[:rows])
            if cuda:
                self._done = torch.cuda.Event()
                self._done.record()
            if verify is not None and not graph.verified:
                reason = verify(out)
                if reason is not None:
                    self.refused[key] = reason
                    self._again.pop(key, None)
                    del self._graphs[key]
                    return None
                graph.verified = True
            return out

    def describe(self, tokens: Callable[[Any], int]) -> list[str]:
        """Lines for ``explain``; ``tokens`` reads the bucket off a key."""
        if self.capture is None:
            return [f"CUDA graphs: off ({SWITCH}=0)"] if self.device.type == "cuda" and _switched_off() else []
        with self._lock:  # a call on another thread may be adding to them
            keys, refused = list(self._graphs), dict(self.refused)
        sizes = sorted({tokens(key) for key in keys})
        lines = [f"CUDA graphs: {len(keys)} captured, token buckets {', '.join(map(str, sizes)) or 'none yet'}"]
        return lines + [f"no graph for {tokens(key)} tokens: {reason}" for key, reason in refused.items()]

    def _graph(
        self, key: Hashable, prepare: Callable[[], tuple[Any, Callable[[], torch.Tensor]]], capture: Capture
    ) -> _Graph | None:
        """The graph for a key, captured if need be; None when it could not be."""
        self._calls += 1
        if key in self.refused and self._calls < self._again.get(key, math.inf):
            return None
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].used = self._calls
            return self._graphs[key]
        self._met[key] += 1
        if self._met[key] <= MEETINGS_BEFORE_CAPTURE or not self._has_room():
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():  # buffers are written to in later calls, in any mode
                buffers, function = prepare()
                replay, output = capture(function)
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the batch itself may still fit, launch by launch
            self.refused[key] = _cause(error)
            if isinstance(error, torch.OutOfMemoryError) or _PASSING.search(str(error)):
                self._again[key] = RETRY_CALLS + 2 * self._calls
                self.refused[key] += "; tried again later"
            else:
                self._again.pop(key, None)
            return None
        self.refused.pop(key, None)
        self._graphs[key] = graph = _Graph(buffers, function, replay, output, self._calls)
        return graph

    def _has_room(self) -> bool:
        """Whether another graph may be kept; one that has not been used for long makes room."""
        if len(self._graphs) < MAX_GRAPHS:
            return True
        key, oldest = next(iter(self._graphs.items()))
        if self._calls - oldest.used < QUIET_CALLS:
            return False
        finish(self._done)
        del self._graphs[key], self._met[key]  # to be captured again it has to come up again as often
        return True
