"""Signatures of csrc/bindings*.cpp. bf16 arrays cross as uint16, which NumPy has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

pack_version: int
panel_outputs: int
chunk_bytes: int
max_threads: int

def available_isas() -> list[str]: ...
def built_isas() -> list[str]: ...
def check_isa(name: str) -> str: ...
def ceiling(kind: str, isa: str, threads: int, seconds: float) -> float: ...
def all_finite(values: NDArray[Any], threads: int) -> bool: ...
def quantize_rows(table: NDArray[Any], threads: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]: ...
def checksum(bytes: NDArray[np.uint8], threads: int) -> int: ...
def unpad(
    batch: int,
    length: int,
    ids: NDArray[np.int64] | None,
    mask: NDArray[Any] | None,
    position_ids: NDArray[np.int64] | None,
    type_ids: NDArray[np.int64] | None,
    vocab: int,
    positions: int,
    types: int,
    padding_idx: int,
) -> dict[str, Any]: ...
def pad(packed: NDArray[np.float32], indices: NDArray[np.int32], out: NDArray[np.float32], threads: int) -> None: ...
def lm_head(
    isa: str,
    precision: str,
    x: NDArray[np.float32],
    dense: NDArray[Any],
    dense_bias: NDArray[np.float32],
    gamma: NDArray[np.float32],
    beta: NDArray[np.float32],
    eps: float,
    decoder: NDArray[Any],
    decoder_bias: NDArray[np.float32] | None,
    indices: NDArray[np.int32],
    out: NDArray[Any],
    threads: int,
) -> None: ...
def bf16_instruction(isa: str) -> bool: ...
def alert_workers(threads: int) -> None: ...
def borrowed_regions() -> int: ...
def borrow_threads(policy: str) -> None: ...

class Watch:
    def __init__(
        self,
        dicts: list[dict[str, Any]],
        modules: list[Any],
        states: list[dict[str, Any]],
        tensors: list[Any],
        counted: list[Any],
        samples: Sequence[NDArray[Any]],
        objects: Sequence[tuple[int, int, int]],
        scalars: list[tuple[dict[str, Any], str]] = ...,
    ) -> None: ...
    def changed(self) -> bool: ...

class Encoder:
    def __init__(self, shape: Mapping[str, float], precision: str, isa: str) -> None: ...
    def set_tables(
        self,
        word: NDArray[Any],
        position: NDArray[Any],
        type: NDArray[Any] | None,
        word_scale: NDArray[np.float32] | None = None,
    ) -> None: ...
    def use_linear(
        self,
        layer: int,
        name: str,
        data: NDArray[np.uint8],
        bias: NDArray[np.float32],
        scale: NDArray[np.float32] | None = None,
        compensation: NDArray[np.int32] | None = None,
        column_scale: NDArray[np.float32] | None = None,
    ) -> None: ...
    def choose(
        self, layer: int, name: str, precision: str, group: int, divisor: NDArray[np.float32] | None
    ) -> None: ...
    def linear(self, layer: int, name: str) -> dict[str, NDArray[Any]]: ...
    def word_table(self) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None: ...
    def quantize_word_table(self, threads: int) -> None: ...
    def set_linear(
        self,
        layer: int,
        name: str,
        first: int,
        weight: NDArray[Any],
        bias: NDArray[np.float32] | None,
        threads: int,
    ) -> bool: ...
    def set_norm(self, layer: int, name: str, gamma: NDArray[np.float32], beta: NDArray[np.float32]) -> None: ...
    def forward(
        self,
        ids: NDArray[np.int32] | None,
        embeds: NDArray[np.float32] | None,
        position_ids: NDArray[np.int32],
        type_ids: NDArray[np.int32] | None,
        cu_seqlens: NDArray[np.int32],
        rows: NDArray[np.int32] | None,
        layers: int,
        out: NDArray[np.float32],
        hidden_states: NDArray[np.float32] | None,
        threads: int,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def bf16_note(self) -> str: ...
    @property
    def packed_bytes(self) -> int: ...
