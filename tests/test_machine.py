"""What figures are measured on: the machine's description and its ceilings."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import xfast
from xfast import _C, machine, plan
from xfast.errors import InvalidOptionError


def test_commit_only_from_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "xfast" / "machine.py"))
    assert machine._commit() is None
    (tmp_path / ".git").mkdir()  # not a repository: git fails, and that is no error
    assert machine._commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._commit() is None


def test_no_cpuinfo_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any, **__: Any) -> str:
        raise OSError("no /proc")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert machine._cpu_name()
    assert machine.cpu_flags() == frozenset()


def test_cpu_flags_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert machine.cpu_flags() == {"fpu", "avx2"}
    assert machine._cpu_name() == "A CPU"


@pytest.mark.parametrize("name", xfast.available_isas())
def test_ceilings_are_positive_on_every_instruction_set(name: str) -> None:
    rates = machine.ceilings(1, isa=name, seconds=0.01)
    assert tuple(rates) == machine.CEILINGS
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())


def test_ceilings_pass_on_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def ceiling(*arguments: Any) -> float:
        calls.append(arguments)
        return 1.0

    monkeypatch.setattr(_C, "ceiling", ceiling)
    assert machine.ceiling("int8", 3, isa="portable", seconds=0.25) == 1.0
    machine.ceilings()
    assert calls[0] == ("int8", "portable", 3, 0.25)
    assert [call[0] for call in calls[1:]] == list(machine.CEILINGS)
    assert all(call[2] == xfast.get_num_threads() for call in calls[1:])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [({"kind": "int3"}, "kind"), ({"threads": 0}, "threads"), ({"threads": 10**6}, "threads"), ({"isa": "sse"}, "isa")],
)
def test_bad_arguments(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidOptionError, match=part) as caught:
        machine.ceiling(**{"kind": "fp32", **arguments})
    assert "accepted" in str(caught.value)


class _OnlyOnGpus:
    """A backend that no machine can run."""

    name = "other"

    def supports(self, spec: Any, device: torch.device, precision: str) -> str:
        return "not for CPUs" if device.type == "cpu" else "its library is not installed"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_backend_that_is_missing_says_why_on_every_device(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BACKENDS", (_OnlyOnGpus(),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    reason = "not for CPUs" + "; its library is not installed" * gpu
    assert machine.backends() == [{"name": "other", "available": False, "precisions": [], "reason": reason}]


def test_peak_memory_is_this_process_s_own(tmp_path: Path) -> None:
    script = (
        "from xfast.machine import peak_memory\n"
        "before = peak_memory()\n"
        "bytearray(b'1' * 2**28)\n"
        "print(before, peak_memory())\n"
    )
    ballast = bytearray(b"1" * 2**30)  # what ``getrusage`` of a child begins with
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path)
    before, after = map(int, printed.split())
    assert before < len(ballast)
    assert 2**28 <= after - before < 1.2 * 2**29


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    assert 2**24 < machine.peak_memory() < 2**40


def test_files_that_are_mapped_twice_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "with spaces: 1"
    path.write_bytes(bytes(8 << 20))
    before = machine.mapped_again()
    with path.open("rb") as file:
        maps = [mmap.mmap(file.fileno(), 0, access=access) for access in (mmap.ACCESS_READ, mmap.ACCESS_COPY)]
    assert maps[0][::4096] == bytes(2048) and abs(machine.mapped_again() - before) < 1 << 20
    assert maps[1][::4096] == bytes(2048)
    assert abs(machine.mapped_again() - before - (8 << 20)) < 1 << 20
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    assert machine.mapped_again() == 0


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {one["name"]: one["reason"] for one in machine.backends()}
    assert found["tensorrt"] == "PyTorch finds no CUDA GPU here"
