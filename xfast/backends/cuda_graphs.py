"""One CUDA graph for each *bucket* of token counts: a packed batch has one dimension, so few graphs serve all batches.

A forward of a few hundred tokens is over sooner than Python can launch its kernels; a graph launches them all at once.
A batch of T tokens runs in the smallest bucket that holds it: its arrays are copied into the bucket's, the graph is
replayed, the result's first T rows are copied out. Larger batches keep the device busy without: they run ungraphed, on
exactly T rows.

Graphs are captured when a bucket is met again, share one memory pool, and the least recently used one goes when there
are too many. Replays of one engine take turns (a lock on the host, an event between streams), since they share memory.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from xfast.backends.triton_forward import DeviceBatch, TritonForward
from xfast.kernels.tiles import Tile

if TYPE_CHECKING:
    from xfast.device_packing import DevicePacked

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Token counts, in steps of at most 1.5 from 64 on: the rows that a bucket adds to a batch cost products."""

MAX_GRAPHS = 32
MEETINGS_BEFORE_CAPTURE = 2
"""A shape that comes up once is not worth a capture, which stops the device and takes as long as many launches."""

_SEQUENCE_STEPS = (1, 8, 64, 512, 4096)

Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Runs a function once, recording it; returns what repeats it into the same memory, and its result."""


@dataclass(frozen=True)
class Key:
    """What a graph depends on: sizes of buffers and grids, and the attention plan. S sequences, N selected rows."""

    tokens: int
    sequences: int
    selected: int | None
    tile: Tile
    shared: bool
    layers: int


@dataclass
class _Graph:
    """A captured forward with its input buffers."""

    batch: DeviceBatch
    replay: Replay
    output: torch.Tensor


def bucket_for(tokens: int) -> int | None:
    """The smallest bucket that holds ``tokens``, or None when it is larger than all."""
    return next((size for size in BUCKETS if size >= tokens), None)


_capturing = threading.Lock()  # torch allows one capture at a time in a process


def capture_cuda() -> Capture:
    """Captures on a side stream, after a run that compiles kernels and makes library workspaces.

    All graphs captured by the returned function share a memory pool: none may run while another does.
    """
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()  # one: torch reuses a pool's memory within a stream only

    def capture(function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        with _capturing:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
                graph = torch.cuda.CUDAGraph()
                _forget_workspaces()
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    output = function()
                _forget_workspaces()
            torch.cuda.current_stream().wait_stream(side)
        return graph.replay, output

    return capture


def _forget_workspaces() -> None:
    """Makes cuBLAS take its workspace from the graph's pool: one that lives outside may be freed under the graph."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


class GraphCache:
    """Runs forwards, through graphs where they pay."""

    def __init__(self, forward: TritonForward, capture: Capture | None = None) -> None:
        self._forward = forward
        if capture is None and forward.device.type == "cuda":
            capture = capture_cuda()
        self._capture = capture
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._refused: dict[Key, str] = {}
        self._met: Counter[Key] = Counter()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def run(
        self, packed: DevicePacked, selected: torch.Tensor | None, layers: int, hidden_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states of T tokens or of the ``selected`` rows; see :class:`xfast.backends.base.Engine`."""
        tokens = packed.total_tokens
        if tokens == 0:
            return self._empty(layers, hidden_states)
        key = self._key(packed, selected, layers)
        if key is None or hidden_states or packed.embeds is not None or self._capture is None:
            return self._forward(self._batch(packed, selected), layers, hidden_states)
        with self._lock:
            graph = self._graph(key)
            if graph is not None:
                return self._replay(graph, packed, selected), None
        return self._forward(self._batch(packed, selected), layers, hidden_states)

    def describe(self) -> list[str]:
        """Lines for ``explain``."""
        if self._capture is None:
            return []
        sizes = sorted({key.tokens for key in self._graphs})
        lines = [f"CUDA graphs: {len(self._graphs)} captured, token buckets {', '.join(map(str, sizes)) or 'none yet'}"]
        return lines + [f"no graph for {key.tokens} tokens: {reason}" for key, reason in self._refused.items()]

    def _empty(self, layers: int, hidden_states: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        options: dict[str, Any] = {"dtype": self._forward.dtype, "device": self._forward.device}
        hidden = self._forward.spec.hidden_size
        states = torch.empty(layers + 1, 0, hidden, **options) if hidden_states else None
        return torch.empty(0, hidden, **options), states

    def _key(self, packed: DevicePacked, selected: torch.Tensor | None, layers: int) -> Key | None:
        tokens = bucket_for(packed.total_tokens)
        if tokens is None or packed.batch > tokens:
            return None
        # Room for sequences and selected rows in coarse steps: empty sequences cost next to nothing.
        sequences = min(next(step for step in _SEQUENCE_STEPS if step >= packed.batch), tokens)
        rows = None if selected is None else sequences
        return Key(tokens, sequences, rows, *self._forward.plan(packed.max_seqlen, packed.batch), layers)

    def _batch(self, packed: DevicePacked, selected: torch.Tensor | None) -> DeviceBatch:
        """The batch as it is, for a run without a graph."""
        rows, tokens = packed.rows, packed.total_tokens
        tile, shared = self._forward.plan(packed.max_seqlen, packed.batch)
        return DeviceBatch(
            ids=(rows.ids if packed.embeds is None else rows.source)[:tokens],
            positions=rows.position_ids[:tokens],
            types=rows.type_ids[:tokens],
            cu_seqlens=rows.cu_seqlens,
            row_keys=rows.row_keys,
            count=rows.info[:1],
            tile=tile,
            shared=shared,
            embeds=packed.embeds,
            selected=selected,
        )

    def _graph(self, key: Key) -> _Graph | None:
        """The graph for a key, captured if need be; None when it could not be."""
        assert self._capture is not None
        if key in self._refused:
            return None
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._met[key] += 1
        if self._met[key] <= MEETINGS_BEFORE_CAPTURE:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():  # buffers are written to in later calls, in any mode
                batch = self._buffers(key)
                replay, output = self._capture(lambda: self._forward(batch, key.layers)[0])
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the batch itself may still fit, launch by launch
            self._refused[key] = " ".join(str(error).split())[:200]
            return None
        self._graphs[key] = graph = _Graph(batch, replay, output)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _buffers(self, key: Key) -> DeviceBatch:
        """Input buffers of a bucket, filled with one token so that the first run reads nothing undefined."""
        ints: dict[str, Any] = {"dtype": torch.int32, "device": self._forward.device}
        filled = torch.zeros(5, key.tokens, **ints)
        filled[4] = 1
        cu_seqlens = torch.ones(key.sequences + 1, **ints)
        cu_seqlens[0] = 0
        return DeviceBatch(
            ids=filled[0],
            positions=filled[1],
            types=filled[2],
            cu_seqlens=cu_seqlens,
            row_keys=filled[3:5],
            count=torch.ones(1, **ints),
            tile=key.tile,
            shared=key.shared,
            selected=None if key.selected is None else torch.zeros(key.selected, **ints),
        )

    def _replay(self, graph: _Graph, packed: DevicePacked, selected: torch.Tensor | None) -> torch.Tensor:
        """Copies in, replays, copies out, after the last replay on whichever stream it was."""
        cuda = self._forward.device.type == "cuda"
        if cuda and self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        rows, buffers, tokens = packed.rows, graph.batch, packed.total_tokens
        buffers.ids[:tokens].copy_(rows.ids[:tokens])
        buffers.positions[:tokens].copy_(rows.position_ids[:tokens])
        buffers.types[:tokens].copy_(rows.type_ids[:tokens])
        if buffers.shared:
            buffers.row_keys[:, :tokens].copy_(rows.row_keys[:, :tokens])
        buffers.cu_seqlens.fill_(tokens)[: packed.batch + 1].copy_(rows.cu_seqlens)
        buffers.count.copy_(rows.info[:1])
        wanted = tokens
        if selected is not None:
            assert buffers.selected is not None
            wanted = selected.shape[0]
            # Surplus rows repeat the last token: ascending, and in no sequence of their own.
            buffers.selected.fill_(tokens - 1)[:wanted].copy_(selected)
        graph.replay()
        out = graph.output[:wanted].clone()
        if cuda:
            self._done = torch.cuda.Event()
            self._done.record()
        return out
