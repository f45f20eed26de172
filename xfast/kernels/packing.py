"""Unpad and pad on the device, and the tile table of attention, without a host value that depends on the lengths.

Conventions as in :mod:`xfast.packing`: sequence ``i`` owns packed rows ``cu_seqlens[i] .. cu_seqlens[i + 1]``. B batch,
L length, T tokens that are not masked. A program owns one row of the batch; offsets are sums over the rows before it,
computed anew by every program, in steps of :data:`SEQUENCES`: it saves a scan with launches of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from xfast.kernels.attention import Tiles
from xfast.kernels.launch import cast, check_device, next_power_of_2, on
from xfast.kernels.tiles import Tile

_SIZES = [
    *("batch", "length", "capacity", "vocab", "table_positions", "type_count"),
    *("id_stride", "position_stride", "type_stride"),
]
FINE = 2**31 - 1
"""Value of an error column when there is no error."""
SEQUENCES = 512
"""Sequences that a program reads at once: one number, so that no batch needs kernels or registers of its own."""


@dataclass(frozen=True)
class PackedRows:
    """What :func:`unpad` leaves on the device. Arrays with room for B * L tokens, of which T are filled.

    Attributes:
        ids, position_ids, type_ids: int32; ids of bad tokens are 0, so that no table is read outside.
        source: int32, ``row * length + column`` of each packed token.
        slot: int32 [B * L], packed row of each place, or -1 where it is masked.
        cu_seqlens: int32 [B + 1].
        row_keys: int32 [2, B * L], begin and end of each packed token's sequence.
        info: int32 [8]: T, longest sequence, sequences whose column 0 is masked, then the first place with a bad
            mask value, token id, token type, position (``FINE`` if none), and 0.
    """

    ids: torch.Tensor
    position_ids: torch.Tensor
    type_ids: torch.Tensor
    source: torch.Tensor
    slot: torch.Tensor
    cu_seqlens: torch.Tensor
    row_keys: torch.Tensor
    info: torch.Tensor


@triton.jit
def _row(
    ids, mask, positions, types, row, length, columns, id_stride, position_stride, type_stride,
    PAD_ID: tl.constexpr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_TYPES: tl.constexpr,
):  # fmt: skip
    """One row of the batch: (in the row, mask is not 0 or 1, kept, ids, positions as given or by rule, types)."""
    here = columns < length
    kept = here
    bad_mask = columns < 0
    if HAS_MASK:
        raw = tl.load(mask + row.to(tl.int64) * length + columns, mask=here, other=0)
        kept = here & (raw != 0)
        bad_mask = here & (raw != 0) & (raw != 1)
    token = columns.to(tl.int64) * 0
    kind = token
    if HAS_IDS:
        token = tl.load(ids + row * id_stride + columns, mask=here, other=0).to(tl.int64)
    if HAS_TYPES:
        kind = tl.load(types + row * type_stride + columns, mask=here, other=0).to(tl.int64)
    if HAS_POSITIONS:
        position = tl.load(positions + row * position_stride + columns, mask=here, other=0).to(tl.int64)
    elif PAD_ID < 0:
        position = columns.to(tl.int64)
    elif HAS_IDS:
        real = (here & (token != PAD_ID)).to(tl.int64)
        position = tl.cumsum(real, 0) * real + PAD_ID
    else:
        position = columns.to(tl.int64) + PAD_ID + 1
    return here, bad_mask, kept, token, position, kind


# Not specialised on any size: servers see every batch shape, and each compilation takes a second.
@triton.jit(do_not_specialize=_SIZES)
def count_kernel(
    ids, mask, positions, types, lengths, errors,  # lengths int32 [B], errors int32 [B, 5]
    length, vocab, table_positions, type_count, id_stride, position_stride, type_stride, PAD_ID: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_TYPES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Length of every sequence, and the first bad place of each kind in its row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    here, wrong_mask, kept, token, position, kind = _row(
        ids, mask, positions, types, row, length, columns, id_stride, position_stride, type_stride,
        PAD_ID, HAS_IDS, HAS_MASK, HAS_POSITIONS, HAS_TYPES,
    )  # fmt: skip
    tl.store(lengths + row, tl.sum(kept.to(tl.int32), 0))
    first_masked = 1 - tl.sum((kept & (columns == 0)).to(tl.int32), 0)
    none = 2147483647
    place = row * length + columns
    bad_mask = tl.min(tl.where(wrong_mask, place, none), 0)
    bad_id = tl.min(tl.where(here & ((token < 0) | (token >= vocab)), place, none), 0)
    bad_type = tl.min(tl.where(here & ((kind < 0) | (kind >= type_count)), place, none), 0)
    bad_position = tl.min(tl.where(here & ((position < 0) | (position >= table_positions)), place, none), 0)
    tl.store(errors + row * 5, first_masked)
    tl.store(errors + row * 5 + 1, bad_mask)
    tl.store(errors + row * 5 + 2, bad_id)
    tl.store(errors + row * 5 + 3, bad_type)
    tl.store(errors + row * 5 + 4, bad_position)


@triton.jit(do_not_specialize=_SIZES)
def fill_kernel(
    ids, mask, positions, types, lengths, errors,
    out_ids, out_positions, out_types, source, slot, cu_seqlens, row_keys, info,
    batch, length, capacity, vocab, table_positions, type_count, id_stride, position_stride, type_stride,
    PAD_ID: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_TYPES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Packs one row; the first program also sums up over all rows."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    here, _, kept, token, position, kind = _row(
        ids, mask, positions, types, row, length, columns, id_stride, position_stride, type_stride,
        PAD_ID, HAS_IDS, HAS_MASK, HAS_POSITIONS, HAS_TYPES,
    )  # fmt: skip
    token = tl.where((token >= 0) & (token < vocab), token, 0)
    kind = tl.where((kind >= 0) & (kind < type_count), kind, 0)
    position = tl.where((position >= 0) & (position < table_positions), position, 0)
    begin = 0
    for first in range(0, row, BLOCK_S):
        others = first + tl.arange(0, BLOCK_S)
        begin += tl.sum(tl.load(lengths + others, mask=others < row, other=0), 0)
    end = begin + tl.load(lengths + row)
    packed = begin + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out_ids + packed, token.to(tl.int32), mask=kept)
    tl.store(out_positions + packed, position.to(tl.int32), mask=kept)
    tl.store(out_types + packed, kind.to(tl.int32), mask=kept)
    tl.store(source + packed, row * length + columns, mask=kept)
    tl.store(row_keys + packed, columns * 0 + begin, mask=kept)
    tl.store(row_keys + capacity + packed, columns * 0 + end, mask=kept)
    tl.store(slot + row * length + columns, tl.where(kept, packed, -1), mask=here)
    tl.store(cu_seqlens + row, begin)
    if row == batch - 1:
        tl.store(cu_seqlens + batch, end)
        tl.store(info, end)
    if row == 0:
        longest, first_masked = 0, 0
        for first in range(0, batch, BLOCK_S):
            others = first + tl.arange(0, BLOCK_S)
            there = others < batch
            longest = tl.maximum(longest, tl.max(tl.load(lengths + others, mask=there, other=0), 0))
            first_masked += tl.sum(tl.load(errors + others * 5, mask=there, other=0), 0)
        tl.store(info + 1, longest)
        tl.store(info + 2, first_masked)
        for kind_of_error in tl.static_range(1, 5):
            bad = 2147483647
            for first in range(0, batch, BLOCK_S):
                others = first + tl.arange(0, BLOCK_S)
                places = errors + others * 5 + kind_of_error
                bad = tl.minimum(bad, tl.min(tl.load(places, mask=others < batch, other=2147483647), 0))
            tl.store(info + 2 + kind_of_error, bad)


def _block(length: int) -> dict[str, int]:
    """Of a row of the batch. With 4 warps alone, 8192 places spill registers and take seconds to compile."""
    block = max(128, next_power_of_2(length))
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def unpad(
    batch: int,
    length: int,
    device: torch.device,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    *,
    pad_id: int,
    vocab: int,
    positions: int,
    types: int,
) -> PackedRows:
    """Packs the tokens that are not masked. Never waits for the device.

    Args:
        batch, length: shape of the padded batch, both at least 1.
        device: where it is.
        ids, position_ids, type_ids: int32 or int64, contiguous [batch or 1, length], or None.
        mask: contiguous [batch, length] of 0 and 1 in any dtype but bool (view it as uint8), or None.
        pad_id: positions count from ``pad_id + 1`` over ids that differ from it; -1: columns 0, 1, ...
        vocab, positions, types: rows of the tables. Values outside are counted in ``info`` and packed as 0.
    """
    room = batch * length
    ints = {"dtype": torch.int32, "device": device}
    lengths, errors = torch.empty(batch, **ints), torch.empty(batch, 5, **ints)
    # rows of 256 bytes: TensorRT wants them, and kernels are compiled anew for pointers that are aligned otherwise
    filled = torch.empty(7, triton.cdiv(room, 64) * 64, **ints)
    rows = PackedRows(
        ids=filled[0],
        position_ids=filled[1],
        type_ids=filled[2],
        source=filled[3],
        slot=filled[4, :room],
        cu_seqlens=torch.empty(batch + 1, **ints),
        row_keys=filled[5:7],
        info=torch.zeros(8, **ints),
    )
    if room == 0:  # no kernel may have an empty grid
        rows.cu_seqlens.zero_()
        rows.info[3:7] = FINE
        return rows
    given = [(t if t is not None else lengths) for t in (ids, mask, position_ids, type_ids)]
    check_device("input_ids", given[0])
    strides = [length if t is not None and t.shape[0] == batch else 0 for t in (ids, position_ids, type_ids)]
    names = ("HAS_IDS", "HAS_MASK", "HAS_POSITIONS", "HAS_TYPES")
    flags: dict[str, Any] = {
        name: t is not None for name, t in zip(names, (ids, mask, position_ids, type_ids), strict=True)
    }
    flags |= {**_block(length), "PAD_ID": pad_id}
    limits = (vocab, positions, types, *strides)
    with on(device):
        count_kernel[(batch,)](*given, lengths, errors, length, *limits, **flags)
        fill_kernel[(batch,)](
            *given, lengths, errors, rows.ids, rows.position_ids, rows.type_ids, rows.source, rows.slot,
            rows.cu_seqlens, rows.row_keys, rows.info, batch, length, filled.shape[1], *limits, **flags,
            BLOCK_S=SEQUENCES,
        )  # fmt: skip
    return rows


@triton.jit
def pad_kernel(packed, slot, out, columns, stride, BLOCK: tl.constexpr):
    """One row of the padded batch: the packed row's values, or zeros."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(slot + place).to(tl.int64)
    filled = tl.where(row >= 0, columns, 0)
    values = tl.load(packed + row * stride + column, mask=column < filled, other=0.0)
    tl.store(out + place * columns + column, cast(values, out.dtype.element_ty), mask=column < columns)


def pad(packed: torch.Tensor, slot: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Packed rows [*, columns] -> [len(slot), columns] in ``dtype``, zeros where ``slot`` is -1."""
    check_device("packed", packed)
    columns = packed.shape[1]
    out = torch.empty(slot.shape[0], columns, dtype=dtype or packed.dtype, device=packed.device)
    if out.numel():
        block = min(next_power_of_2(columns), 2048)
        with on(packed.device):
            pad_kernel[(slot.shape[0], triton.cdiv(columns, block))](
                packed, slot, out, columns, packed.stride(0), BLOCK=block, num_warps=4 if block >= 512 else 1
            )
    return out


@triton.jit(do_not_specialize=["sequences"])
def tiles_kernel(cu_q, cu_k, table, count, sequences, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """Tiles of one sequence, at the place after those of all sequences with more keys."""
    sequence = tl.program_id(0)
    k_begin, k_end = tl.load(cu_k + sequence), tl.load(cu_k + sequence + 1)
    q_begin, q_end = tl.load(cu_q + sequence), tl.load(cu_q + sequence + 1)
    mine = k_end - k_begin
    at, total = 0, 0
    for step in range(0, sequences, BLOCK_S):
        others = step + tl.arange(0, BLOCK_S)
        there = others < sequences
        keys = tl.load(cu_k + others + 1, mask=there, other=0) - tl.load(cu_k + others, mask=there, other=0)
        queries = tl.load(cu_q + others + 1, mask=there, other=0) - tl.load(cu_q + others, mask=there, other=0)
        tiles = (queries + BLOCK_M - 1) // BLOCK_M
        before = (keys > mine) | ((keys == mine) & (others < sequence))
        at += tl.sum(tl.where(before, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    for first in range(q_begin, q_end, BLOCK_M):
        entry = table + at * 4
        tl.store(entry, first)
        tl.store(entry + 1, tl.minimum(BLOCK_M, q_end - first))
        tl.store(entry + 2, k_begin)
        tl.store(entry + 3, k_end)
        at += 1
    if sequence == 0:
        tl.store(count, total)


@triton.jit(do_not_specialize=["sequences", "capacity"])
def shared_tiles_kernel(cu_seqlens, row_keys, table, count, sequences, capacity, BLOCK_M: tl.constexpr):
    """Tile ``i`` holds rows ``i * BLOCK_M ...`` and the keys of every sequence that these belong to."""
    total = tl.load(cu_seqlens + sequences)
    first = tl.program_id(0) * BLOCK_M
    if tl.program_id(0) == 0:
        tl.store(count, (total + BLOCK_M - 1) // BLOCK_M)
    if first < total:
        entry = table + tl.program_id(0) * 4
        rows = tl.minimum(BLOCK_M, total - first)
        tl.store(entry, first)
        tl.store(entry + 1, rows)
        tl.store(entry + 2, tl.load(row_keys + first))
        tl.store(entry + 3, tl.load(row_keys + capacity + first + rows - 1))


def attention_tiles(
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    queries: int,
    tile: Tile,
    *,
    row_keys: torch.Tensor | None = None,
) -> Tiles:
    """The work of one attention call as a table on the device.

    Args:
        cu_q, cu_k: int32 [S + 1], the packed query and key rows of each sequence.
        queries: upper bound of the query rows, known to the host.
        tile: sizes.
        row_keys: int32 [2, queries], begin and end of every row's keys, for tiles shared between short sequences (then
            cu_q and cu_k are the same); None for tiles of one sequence each.
    """
    check_device("cu_q", cu_q)
    sequences = cu_q.shape[0] - 1
    room = triton.cdiv(queries, tile.block_m) + (0 if row_keys is not None else min(sequences, queries))
    ints = {"dtype": torch.int32, "device": cu_q.device}
    table, count = torch.empty(max(room, 1), 4, **ints), torch.zeros(1, **ints)
    if sequences and queries and row_keys is None:
        tiles_kernel[(sequences,)](
            cu_q, cu_k, table, count, sequences, BLOCK_M=tile.block_m, BLOCK_S=SEQUENCES, num_warps=2
        )
    elif sequences and queries:
        assert row_keys is not None
        shared_tiles_kernel[(room,)](
            cu_q, row_keys, table, count, sequences, row_keys.stride(0), BLOCK_M=tile.block_m, num_warps=1
        )
    return Tiles(table, count, row_keys, tile)
