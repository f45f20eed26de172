"""What figures are measured on: the machine, its ceilings, and what each backend can do there."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import xfast
from xfast.errors import InvalidOptionError, require_one_of

CEILINGS = ("fp32", "bf16", "int8", "read")
"""What ``ceilings`` measures: multiply-accumulate by precision in GOP/s, and reading memory in GB/s."""

CEILING_SECONDS = 0.5

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

_CGROUP_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Limit and usage by hierarchy: "" is version 2."""


def machine() -> dict[str, Any]:
    """What figures are measured on: CPU, cores this process may use, threads, instruction sets, GPU, versions, commit.

    Raises:
        InvalidOptionError: ``XFAST_ISA`` names an instruction set that this CPU lacks.
    """
    import numpy
    import torch
    import transformers

    from xfast.backends.native import requested_isa

    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": cores(),
        "threads": xfast.get_num_threads(),
        "isa": requested_isa(),
        "isas": xfast.available_isas(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "xfast": xfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "commit": _commit(),
    }


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ceilings(
    threads: int | None = None, *, isa: str | None = None, seconds: float = CEILING_SECONDS
) -> dict[str, float]:
    """The machine's own limits by ``CEILINGS``: what no kernel can exceed on ``threads`` threads.

    fp32, bf16 and int8 are GOP/s of the multiply-accumulate that xfast uses for that precision (a multiplication and an
    addition count as two), in registers only; read is GB/s from memory too large for any cache. Takes about ``seconds``
    for each.

    Args:
        threads: how many threads; None for as many as xfast uses.
        isa: instruction set; None for the one in use.
        seconds: how long each is measured.

    Raises:
        InvalidOptionError: threads out of range, or an instruction set that this CPU lacks.
    """
    return {kind: ceiling(kind, threads, isa=isa, seconds=seconds) for kind in CEILINGS}


def ceiling(
    kind: str, threads: int | None = None, *, isa: str | None = None, seconds: float = CEILING_SECONDS
) -> float:
    """One of the figures of ``ceilings``."""
    from xfast import _C
    from xfast.backends.native import requested_isa

    require_one_of("kind", kind, CEILINGS)
    count = xfast.get_num_threads() if threads is None else threads
    if not 1 <= count <= _C.max_threads:
        raise InvalidOptionError(f"threads: {count} is not accepted; accepted: 1 to {_C.max_threads}")
    if isa is not None:
        require_one_of("isa", isa, xfast.available_isas())
    return _C.ceiling(kind, isa or requested_isa(), count, seconds)


def backends() -> list[dict[str, Any]]:
    """Every backend with its precisions for XLM-R on this machine, or the reason why it is not available."""
    import torch

    from xfast.architecture import EncoderSpec
    from xfast.options import PRECISIONS
    from xfast.plan import BACKENDS

    base = EncoderSpec(
        family="xlm-roberta",
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        head_dim=64,
        intermediate_size=3072,
        vocab_size=250002,
        max_positions=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        activation="gelu",
        norm="post",
        position_rule="padding",
        pad_token_id=1,
    )
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    rows: list[dict[str, Any]] = []
    for backend in BACKENDS:
        reasons = {p: [backend.supports(base, device, p) for device in devices] for p in PRECISIONS[1:-1]}
        precisions = [precision for precision, given in reasons.items() if None in given]
        # each device's own: with a GPU, that a model on the CPU is not for this backend explains nothing
        reason = None if precisions else "; ".join(dict.fromkeys(filter(None, reasons["fp32"])))
        if reason and reason.endswith("this backend runs on cuda"):
            reason = "PyTorch finds no CUDA GPU here"  # whose model there is none to be on
        rows.append({"name": backend.name, "available": bool(precisions), "precisions": precisions, "reason": reason})
    return rows


def cpu_flags() -> frozenset[str]:
    """The feature flags of /proc/cpuinfo; empty where there is none."""
    return frozenset(next((value.split() for name, value in _cpuinfo() if name == "flags"), []))


def peak_memory() -> int:
    """The most memory, in bytes, that this process has had resident.

    Linux's own count where there is one: ``getrusage`` starts from the peak of the process that started this one.
    """
    try:
        lines = (_PROC / "self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def mapped_again() -> int:
    """Resident bytes of files that this process has mapped before: they are counted twice in its resident memory.

    0 where the system does not say.
    """
    try:
        lines = (_PROC / "self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    mappings: dict[tuple[str, ...], list[int]] = {}
    where: tuple[str, ...] = ()
    for line in lines:
        first, *others = line.split(maxsplit=5)
        if not first.endswith(":"):  # addresses, permissions, offset, device, inode, path
            where = (others[1], *others[2:4])
        elif first == "Rss:" and where[-1] != "0":
            mappings.setdefault(where, []).append(1024 * int(others[0]))
    return sum(sum(each) - max(each) for each in mappings.values())


def available_memory() -> int | None:
    """Bytes of memory that this process can still take: what the system has, within the limits of its control groups.

    None where the system does not say.
    """
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        lines = []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return min([*free, *_cgroup_rooms()], default=None)


def _cgroup_rooms() -> list[int]:
    """What each control group that holds this process and has a limit leaves, in bytes."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for _, names, group in (line.split(":", 2) for line in lines):
        for hierarchy in {"", "memory"} & set(names.split(",")):
            root = _CGROUPS / hierarchy
            folder = root / group.lstrip("/")  # it is not there where a container sees its own group as the root
            rooms += [_room(one, hierarchy) for one in (folder, *folder.parents) if one.is_relative_to(root)]
    return [room for room in rooms if room is not None]


def _room(folder: Path, hierarchy: str) -> int | None:
    """Limit minus usage of one control group; pages of files that the kernel can drop are not counted as used."""
    limit, used = _CGROUP_FILES[hierarchy]
    try:
        bound = int((folder / limit).read_text())
        taken = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return max(0, bound - max(0, taken - droppable))


def _cpu_name() -> str:
    return next(
        (value for name, value in _cpuinfo() if name == "model name"), platform.processor() or platform.machine()
    )


def _cpuinfo() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    parts = (line.partition(":") for line in lines)
    return [(name.strip(), value.strip()) for name, _, value in parts]


def _commit() -> str | None:
    """The commit when xfast runs from a checkout, with ``-dirty`` behind it when files differ, else None."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
