"""Every Triton kernel in every form that the backend launches, as data for ahead-of-time compilation.

A case names the kernel, the types of its arguments and its compile-time constants. The types follow from the arguments'
names, which mean the same in every kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl

from xfast.kernels import (
    activation,
    attention,
    attention_grad,
    embedding,
    gemm,
    gemm_weight_only,
    norm,
    packing,
    quantize,
    tiles,
)
from xfast.kernels.launch import next_power_of_2

CAPABILITIES = (80, 89, 90, 100, 120)
TYPES = {"bf16": ("*bf16", 2), "fp16": ("*fp16", 2), "fp32": ("*fp32", 4)}
HIDDEN = {"base": (768, 3072), "large": (1024, 4096), "xl": (2560, 10240), "xxl": (4096, 16384)}
_INT_POINTERS = {
    *("table", "count", "row_lo", "row_hi", "ids", "mask", "positions", "types", "lengths", "errors", "out_ids"),
    *("out_positions", "out_types", "source", "slot", "cu_seqlens", "row_keys", "info", "cu_q", "cu_k"),
}
_FP32_POINTERS = {"lse", "delta", "scale_x", "scale_w"}
_FLOATS = {"eps", "dropout"}
_INTS = {
    *("queries", "heads", "seed", "rows", "columns", "depth", "batch", "length", "capacity", "vocab", "sequences"),
    *("table_positions", "type_count", "id_stride", "position_stride", "type_stride"),
}
_WIDTHS = {"columns", "depth", "residual_stride", "word_stride"}


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        label: kernel, dtype and form.
        kernel: the jitted function.
        pointer: type of pointers to values ("*bf16").
        constants: compile-time arguments.
        tile: warps and stages (and block sizes, for predictions).
        overrides: types of arguments whose name does not say it.
        mma: it must use tensor cores.
        flops, bytes: of one step of the inner loop of one program (attention, gemm), 0 elsewhere.
    """

    label: str
    kernel: Any
    pointer: str
    constants: dict[str, Any]
    tile: tiles.Tile
    overrides: dict[str, str] = field(default_factory=dict)
    mma: bool = False
    flops: int = 0
    bytes: int = 0

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def aligned(self) -> list[int]:
        """Indices of arguments that are multiples of 16, as they are at run time: pointers, row strides, widths."""
        types = self.signature()
        return [
            index
            for index, name in enumerate(self.kernel.arg_names)
            if types[name].startswith("*") or (types[name] == "i32" and (name.startswith("stride") or name in _WIDTHS))
        ]

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in self.overrides:
            return self.overrides[name]
        if name in _INT_POINTERS:
            return "*i32"
        if name in _FP32_POINTERS:
            return "*fp32"
        if name in _FLOATS:
            return "fp32"
        if name in _INTS or "stride" in name:
            return "i32"
        return self.pointer


def cases(capability: int) -> Iterator[Case]:
    """All forms for one compute capability."""
    yield from _attention(capability)
    yield from _backward()
    yield from _rows(capability)
    yield from _gemm(capability)
    yield from _weight_only(capability)
    yield from _packing()


def _attention(capability: int) -> Iterator[Case]:
    lengths = (1, 64, 512)
    for (dtype, (pointer, size)), head_dim, length in itertools.product(TYPES.items(), attention.HEAD_DIMS, lengths):
        main, rest = attention.split_head_dim(head_dim)
        for shared, lse, dropout in ((False, False, False), (True, False, False), (False, True, True)):
            tile = tiles.attention_tile(head_dim, size, capability, length, training=lse)
            if (shared and length != 64) or (lse and length != 512):
                continue
            form = "-shared" if shared else "-training" if lse else ""
            yield Case(
                f"attention{form} {dtype} d{head_dim} L{length}", attention.forward_kernel, pointer,
                {"D_MAIN": main, "D_REST": rest, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SHARED": shared,
                 "LSE": lse, "DROPOUT": dropout, "ACC": tl.float32},
                tile, {"scale": "fp32"}, mma=size == 2,
                flops=4 * tile.block_m * tile.block_n * head_dim, bytes=2 * tile.block_n * head_dim * size,
            )  # fmt: skip


def _backward() -> Iterator[Case]:
    for (dtype, (pointer, size)), head_dim in itertools.product(TYPES.items(), attention.HEAD_DIMS):
        main, rest = attention.split_head_dim(head_dim)
        for dropout in (False, True):
            tile = tiles.attention_backward_tile(head_dim, size, dropout)
            sizes = {"D_MAIN": main, "D_REST": rest, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            sizes |= {"ACC": tl.float32, "DROPOUT": dropout}
            for name, kernel in (("dkdv", attention_grad.keys_kernel), ("dq", attention_grad.queries_kernel)):
                label = f"attention-{name}{'-dropout' if dropout else ''} {dtype} d{head_dim}"
                yield Case(label, kernel, pointer, sizes, tile, {"scale": "fp32"}, mma=size == 2)
        block = main * (2 if rest else 1)
        yield Case(
            f"attention-delta {dtype} d{head_dim}", attention_grad.delta_kernel, pointer,
            {"D": head_dim, "BLOCK": block, "ROWS": 16, "ACC": tl.float32}, tiles.Tile(16, block, 0, 4, 3),
        )  # fmt: skip


def _rows(capability: int) -> Iterator[Case]:
    """Kernels with a row a program."""
    for (dtype, (pointer, size)), (name, (hidden, inner)) in itertools.product(TYPES.items(), HIDDEN.items()):
        block, wide = next_power_of_2(hidden), next_power_of_2(inner)
        rows = tiles.Tile(1, block, 0, tiles.row_warps(block, size), 3)
        for fp8 in (False, True):
            if fp8 and (capability < 89 or dtype != "bf16"):
                continue
            q = {"q": "*fp8e4nv" if fp8 else pointer, "scale": "*fp32" if fp8 else pointer}
            form = f"{'-fp8' if fp8 else ''} {dtype} {name}"
            for bias, residual, total in itertools.product((True, False), (True, False), (True, False)):
                if not bias and (residual or total):
                    continue  # no forward asks for it
                flags = {"BIAS": bias, "RESIDUAL": residual, "TOTAL": total, "QUANTIZE": fp8, "BLOCK": block}
                label = f"norm{'-bias' * bias}{'-residual' * residual}{'-total' * total}{form}"
                yield Case(label, norm.norm_kernel, pointer, flags, rows, q)
            embed_rows = tiles.Tile(1, block, 0, tiles.row_warps(block), 3)
            for total in (False, True):
                flags = {"TOTAL": total, "QUANTIZE": fp8, "BLOCK": block}
                label = f"embedding{'-total' * total}{form}"
                yield Case(label, embedding.embedding_kernel, pointer, flags, embed_rows, q)
            part = wide if fp8 else min(wide, 2048)
            yield Case(
                f"activation{form}", activation.gelu_kernel, pointer, {"BIAS": True, "QUANTIZE": fp8, "BLOCK": part},
                tiles.Tile(1, part, 0, tiles.row_warps(part, size), 3), {**q, **({"out": "*fp8e4nv"} if fp8 else {})},
            )  # fmt: skip
            if fp8:
                yield Case(
                    f"quantize{form}", quantize.quantize_kernel, pointer, {"BLOCK": block}, rows,
                    {"out": "*fp8e4nv", "scale": "*fp32"},
                )  # fmt: skip


def _gemm(capability: int) -> Iterator[Case]:
    kinds = [*TYPES.items(), *([("fp8", ("*fp8e4nv", 1))] if capability >= 89 else [])]
    for (dtype, (pointer, size)), rows in itertools.product(kinds, (16, 64, 4096)):
        tile = tiles.gemm_tile(rows, size, capability)
        out = dict.fromkeys(("out", "bias", "residual"), "*bf16" if size == 1 else pointer)
        for activated, residual in ((True, False), (False, True)):
            yield Case(
                f"gemm{'-gelu' if activated else '-residual'} {dtype} M{rows}", gemm.gemm_kernel, pointer,
                {"BIAS": True, "GELU": activated, "RESIDUAL": residual, "SCALED": size == 1, "BLOCK_M": tile.block_m,
                 "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": 8},
                tile, out, mma=size <= 2,
                flops=2 * tile.block_m * tile.block_n * tile.block_k,
                bytes=(tile.block_m + tile.block_n) * tile.block_k * size,
            )  # fmt: skip


def _weight_only(capability: int) -> Iterator[Case]:
    integers = {"w": "*i8", "steps": "i32"}
    forms = (("split", False, False), ("gelu", True, False), ("bias", False, False), ("residual", False, True))
    for (dtype, (pointer, size)), group, rows in itertools.product(TYPES.items(), (0, 32, 64, 128), (16, 32, 64, 4096)):
        kind = f"{f'int4g{group}' if group else 'int8'} {dtype}"
        scale = "*bf16" if group else "*fp32"
        tile = tiles.weight_only_tile(rows, size, capability, group)
        inputs = tile.block_k * (2 if group else 1)
        # The loop is the same in all; GELU needs most registers after it. EVEN: as in every published size
        for form, activated, residual in forms if rows == 16 else forms[1:2]:
            split = form == "split"
            yield Case(
                f"weight-only-{form} {kind} M{rows}", gemm_weight_only.weight_only_kernel, pointer,
                {"GROUP": group, "EVEN": True, "BIAS": not split, "GELU": activated, "RESIDUAL": residual,
                 "SPLIT": split, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
                tile, {**integers, "scale": scale, **({"out": "*fp32"} if split else {})}, mma=size <= 2,
                flops=2 * tile.block_m * tile.block_n * inputs,
                bytes=tile.block_m * inputs * size + tile.block_n * tile.block_k,
            )  # fmt: skip
        if rows == 16:
            yield Case(
                f"weight-only-expand {kind}", gemm_weight_only.expand_kernel, pointer,
                {"GROUP": group, "HALF": tiles.weight_only_half(group or 64), "BLOCK": 1024},
                tiles.Tile(1, 1024, 0, 4, 3), {**integers, "scale": scale, "size": "i32"},
            )  # fmt: skip
    for dtype, (pointer, _) in TYPES.items():
        flags = {"BIAS": True, "GELU": True, "RESIDUAL": False, "BLOCK": 1024}
        yield Case(
            f"weight-only-combine {dtype}", gemm_weight_only.combine_kernel, pointer, flags,
            tiles.Tile(1, 1024, 0, 4, 3), {"sums": "*fp32", "splits": "i32"},
        )  # fmt: skip


def _packing() -> Iterator[Case]:
    one = tiles.Tile(1, 512, 0, 4, 3)
    for given in ((True, True, False, False), (False, False, True, True)):
        flags = dict(zip(("HAS_IDS", "HAS_MASK", "HAS_POSITIONS", "HAS_TYPES"), given, strict=True))
        long = dict.fromkeys(("ids", "mask", "positions", "types"), "*i64")
        sizes = {**flags, "PAD_ID": 1, "BLOCK": 512}
        form = "ids" if given[0] else "embeds"
        yield Case(f"packing-count {form}", packing.count_kernel, "*i64", sizes, one, long)
        yield Case(
            f"packing-fill {form}", packing.fill_kernel, "*i64", {**sizes, "BLOCK_S": packing.SEQUENCES}, one, long
        )
    for dtype, (pointer, _) in TYPES.items():
        yield Case(f"packing-pad {dtype}", packing.pad_kernel, pointer, {"BLOCK": 1024}, one, {"stride": "i32"})
    narrow = tiles.Tile(64, 0, 0, 2, 3)
    yield Case("packing-tiles", packing.tiles_kernel, "*i32", {"BLOCK_M": 64, "BLOCK_S": packing.SEQUENCES}, narrow)
    yield Case("packing-shared-tiles", packing.shared_tiles_kernel, "*i32", {"BLOCK_M": 64}, narrow)
