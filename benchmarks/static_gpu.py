"""What can be known of the GPU kernels without a GPU: registers, spills, shared memory, occupancy, instructions, time.

``python -m xfast.benchmarks.static_gpu [--capability 90] [--match attention]`` compiles every kernel in every form for
NVIDIA GPUs with Triton's own compiler and disassembler, none of which need one, and prints a table. The predicted time
of a step is the larger of its operations at the matrix rate and its bytes at the copy rate *measured on an H200*, with
the tile's share of a multiprocessor; it is a floor, to be held against measurements in ``docs/gpu-tuning.md``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xfast.benchmarks.gpu_cases import CAPABILITIES, Case, cases
from xfast.kernels.tiles import shared_memory_limit

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
H200_FLOPS, H200_BYTES, H200_SMS = 790e12, 4.3e12, 132
"""Dense bf16 products and device-to-device copies (read + written) as measured on an H200."""

_REGISTERS_PER_SM, _THREADS_PER_SM = 65536, 2048
_TENSOR = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")


@dataclass(frozen=True)
class Compiled:
    """What one compilation tells.

    Attributes:
        label, capability: which.
        registers: a thread. spills: bytes of stack a thread, all of it spilled registers.
        shared: bytes of shared memory a block; blocks: that fit on a multiprocessor.
        tensor: tensor-core instructions in the whole program, by name.
        loop: instructions of its longest inner loop, by kind.
        step_us: predicted time of one step of the inner loop of one program, 0 where that has no meaning.
        bound: "matrix" or "memory".
    """

    label: str
    capability: int
    registers: int
    spills: int
    shared: int
    blocks: int
    tensor: dict[str, int]
    loop: dict[str, int]
    step_us: float
    bound: str


def compile_case(case: Case, capability: int) -> Any:
    """Triton's compilation of a case, as the launcher would do it."""
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        case.signature(),
        {(names.index(name),): value for name, value in case.constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in case.aligned()},
    )
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def analyse(case: Case, capability: int) -> Compiled:
    """Compiles a case and reads registers, spills and instructions off the result."""
    compiled = compile_case(case, capability)
    registers, spills = resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    by_registers = _REGISTERS_PER_SM // max(registers * 32 * case.tile.warps, 1)
    by_shared = shared_memory_limit(capability) // shared if shared else 32
    blocks = min(by_registers, by_shared, _THREADS_PER_SM // (32 * case.tile.warps), 32)
    lines = _tool(compiled.asm["cubin"], "nvdisasm", "-c").splitlines()
    tensor = Counter(op for op in (_opcode(line) for line in lines) if op in _TENSOR)
    matrix = case.flops / (H200_FLOPS / H200_SMS)
    memory = case.bytes / (H200_BYTES / H200_SMS)
    return Compiled(
        case.label, capability, registers, spills, shared, blocks, dict(tensor), dict(_inner_loop(lines)),
        1e6 * max(matrix, memory), "matrix" if matrix >= memory else "memory",
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread. No kernel has arrays or calls, so what is on the stack was spilled."""
    used = re.search(r"REG:(\d+) STACK:(\d+)", _tool(cubin, "cuobjdump", "--dump-resource-usage"))
    assert used is not None
    return int(used[1]), int(used[2])


def _tool(cubin: bytes, tool: str, flag: str) -> str:
    """Output of one of the tools that triton brings along."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([TOOLS / tool, flag, path], capture_output=True, text=True, check=True).stdout


def _opcode(line: str) -> str:
    found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line)
    return found[1] if found else ""


def _inner_loop(lines: list[str]) -> Counter[str]:
    """Instructions of the loop (a label to a branch back to it) with most tensor instructions, else the longest."""
    labels: dict[str, int] = {}
    loops = []
    for index, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = index
        elif (target := re.search(r"BRA.*`\((\.L_\w+)\)", line)) and labels.get(target[1], index) < index:
            body = Counter(op for op in map(_opcode, lines[labels[target[1]] : index + 1]) if op)
            loops.append(body)
    inner = [b for b in loops if not any(o is not b and sum(o.values()) < sum(b.values()) and _mma(o) for o in loops)]
    return max(inner or loops, key=lambda body: (_mma(body), sum(body.values())), default=Counter())


def _mma(body: Counter[str]) -> int:
    return sum(body[op] for op in _TENSOR)


def _other_form(label: str) -> bool:
    """Whether a case is of another dtype, head size or model than XLM-R large in bf16 and fp8, or XXL's attention."""
    words = {*label.split(), *label.split()[0].split("-")}
    if label.split()[0] in ("attention", "attention-shared", "attention-training"):
        words -= {"d128"}
    other = {"fp16", "fp32", "d16", "d32", "d128", "base", "xl", "int4g32", "int4g128"}
    same = label.startswith(("weight-only-bias", "weight-only-residual"))  # the loop of GELU's form
    return same or (bool(words & other) and "packing" not in label)


@cache
def _console() -> Console:
    return Console(width=int(os.environ.get("COLUMNS", "160")))


def main(
    capability: Annotated[
        list[int] | None, typer.Option(help="Compute capability, 90 for 9.0; all if not given.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only cases whose label contains this.")] = "",
    model_forms: Annotated[
        bool,
        typer.Option("--model-forms", help="Only the forms that XLM-R large runs in (bf16, fp8), and XXL's attention."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Compiles every kernel for NVIDIA GPUs, without one, and prints what the code says."""
    results = []
    table = Table("kernel", "sm", "regs", "spill", "shared", "blocks/SM", "tensor", "inner loop", "step µs", "bound")
    for target in capability or CAPABILITIES:
        for case in cases(target):
            if match not in case.label or (model_forms and _other_form(case.label)):
                continue
            r = analyse(case, target)
            results.append(r)
            loop = " ".join(f"{op} {n}" for op, n in Counter(r.loop).most_common(6))
            tensor = " ".join(f"{op} {n}" for op, n in r.tensor.items())
            step = f"{r.step_us:.3f}" if r.step_us else ""
            bound = r.bound if r.step_us else ""
            table.add_row(
                r.label, str(target), str(r.registers), str(r.spills or ""), str(r.shared), str(r.blocks), tensor, loop,
                step, bound,
            )  # fmt: skip
    _console().print(table)
    if json_file is not None:
        facts = {"triton": triton.__version__, "kernels": [asdict(r) for r in results]}
        json_file.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    typer.run(main)
