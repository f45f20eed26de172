"""CUDA graphs around a TensorRT engine: a small batch is enlarged to the next sizes that a graph was captured for.

Not yet run on a GPU: tests capture with a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from xfast.backends.cuda_graphs import Graphs, bucket_for, capture_on
from xfast.backends.tensorrt_build import Profile, choose
from xfast.backends.tensorrt_network import INPUTS

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Steps of B and L: attention alone computes B * L positions, of which those added are wasted."""

MAX_PADDING = 8
"""Times T that B * L may be in a graph: its scratch memory stays as long as graphs do, and is that of its padding."""


class Recordable(Protocol):
    """What runs an engine: :class:`xfast.backends.tensorrt_session.Session`."""

    device: torch.device

    def run(self, inputs: Mapping[str, torch.Tensor], profile: int) -> torch.Tensor:
        """[R, hidden_size]."""
        ...

    def recorded(self, inputs: Mapping[str, torch.Tensor], profile: int) -> Callable[[], torch.Tensor]:
        """What computes from these inputs, again and again, into the same memory."""
        ...


@dataclass(frozen=True)
class Key:
    """What a graph depends on: the sizes of ``INPUTS``' dimensions, and the profile that takes them."""

    tokens: int
    batch: int
    length: int
    rows: int
    profile: int

    def size(self, dimension: str) -> int:
        """Of a dimension by its letter in ``INPUTS``."""
        return {"T": self.tokens, "B": self.batch, "L": self.length, "R": self.rows}[dimension]


class GraphRunner:
    """Runs batches through graphs where they pay, else through the session as they are.

    Attributes:
        bound: how far the engine may be from fp32, once it was checked; until then nothing is captured. The kernels of
            a graph may be compiled for its shapes, others than those that were checked. So its first result may be
            twice as far from what these make of the same batch, or the graph is not used.
    """

    def __init__(self, session: Recordable, profiles: Sequence[Profile]) -> None:
        self._session, self._profiles = session, profiles
        self.bound: float | None = None
        self.graphs = Graphs(session.device, capture_on(session.device))

    def run(self, inputs: Mapping[str, torch.Tensor], profile: int) -> torch.Tensor:
        """[R, hidden_size] on the device; ``profile`` takes the inputs as they are."""
        from xfast.kernels.launch import on  # not before triton is known to be there

        bound, key = self.bound, key_of(inputs, self._profiles)
        if bound is not None and key is not None:

            def verify(found: torch.Tensor) -> str | None:
                return difference(found, self._session.run(inputs, profile), 2 * bound)

            rows = len(inputs["rows"])
            with on(self._session.device):
                out = self.graphs.replay(
                    key, lambda: self._prepared(key), lambda buffers: fill(buffers, inputs), rows, verify
                )
            if out is not None:
                return out
        return self._session.run(inputs, profile)

    def describe(self) -> list[str]:
        """Lines for ``explain``."""
        return self.graphs.describe(lambda key: key.tokens)

    def _prepared(self, key: Key) -> tuple[dict[str, torch.Tensor], Callable[[], torch.Tensor]]:
        buffers = buffers_of(key, self._session.device)
        return buffers, self._session.recorded(buffers, key.profile)


def difference(found: torch.Tensor, wanted: torch.Tensor, limit: float) -> str | None:
    """What is wrong with a graph's result, by relative error, or None; waits for the device."""
    error, scale = float((found.float() - wanted.float()).norm()), float(wanted.float().norm())
    if error <= limit * scale:  # not so with NaN
        return None
    return (
        f"its first result differs from that of the checked kernels by {error / (scale or 1):.1e} (allowed {limit:.1e})"
    )


def key_of(inputs: Mapping[str, torch.Tensor], profiles: Sequence[Profile]) -> Key | None:
    """The smallest sizes that hold a batch, or None: larger than all, mostly padding, or no profile takes them."""
    batch, length = inputs["padded_rows"].shape
    tokens, rows = bucket_for(len(inputs["token_ids"])), bucket_for(len(inputs["rows"]))
    batch = next((step for step in BATCHES if step >= batch), None)
    longest = max(profile.length[2] for profile in profiles)
    length = next((min(step, longest) for step in LENGTHS if step >= length), None)
    if tokens is None or rows is None or batch is None or length is None:
        return None
    if batch * length > MAX_PADDING * tokens:
        return None
    profile = choose(profiles, tokens, batch, length)
    return None if profile is None else Key(tokens, batch, length, rows, profile)


def buffers_of(key: Key, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of a graph, in which every index is 0 and every sequence has one token."""
    made = {
        name: torch.zeros([key.size(dim) for dim in dims], dtype=torch.int32, device=device)
        for name, dims in INPUTS.items()
    }
    made["lengths"].fill_(1)
    return made


def fill(buffers: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
    """Copies a batch in. Beyond it lie indices of an earlier one: within bounds, and for rows that nobody reads."""
    (batch, length), columns = inputs["padded_rows"].shape, inputs["packed_columns"]
    added = buffers["padded_rows"].shape[1] - length
    for name in ("token_ids", "position_ids", "type_ids", "rows"):
        buffers[name][: len(inputs[name])].copy_(inputs[name])
    buffers["padded_rows"][:batch, :length].copy_(inputs["padded_rows"])
    buffers["lengths"].fill_(1)[:batch].copy_(inputs["lengths"])
    # b * length + column, in rows that are longer
    buffers["packed_columns"][: len(columns)].copy_(columns + columns // length * added)
