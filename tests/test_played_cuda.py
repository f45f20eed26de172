"""The whole GPU path on a GPU that is played on the CPU: host code, graphs, and every launch compiled for a real one.

Here with a few tests in one process; with all GPU tests: ``make play-gpu``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="not installed: pip install triton")

HERE = Path(__file__).resolve().parent
PLAYED = "played_cuda" in sys.modules
on_played = pytest.mark.skipif(not PLAYED, reason="for pytest -p played_cuda")
FEW = ("test_real_graphs_are_captured_and_right", "test_holes_left_padding_pad_ids_inside_and_no_mask", "on_the_device")


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE), **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.skipif(PLAYED or shutil.which("c++") is None, reason="starts the played GPU, which needs a C++ compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_few_gpu_tests_and_their_launches_compiled(tmp_path: Path) -> None:
    forms = tmp_path / "forms.jsonl"
    files = [str(HERE / f"test_{name}.py") for name in ("played_cuda", "triton_backend", "packing_triton")]
    options = ["-c", str(HERE.parent / "pyproject.toml"), "-p", "played_cuda", "-p", "no:cacheprovider", "-q"]
    tests = run(
        [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main())", *options, "-k", " or ".join(FEW), *files],
        tmp_path, XFAST_LAUNCH_FORMS=str(forms),
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr[-3000:]
    compiled = run([sys.executable, str(HERE / "launch_forms.py"), str(forms), "90"], tmp_path, TRITON_INTERPRET="0")
    rows = [json.loads(line) for line in compiled.stdout.splitlines()]
    assert {row["form"]["name"] for row in rows} >= {"fill_kernel", "forward_kernel", "norm_kernel", "gelu_kernel"}
    assert not [row for row in rows if row.get("error") or row["spills"]], compiled.stderr[-2000:]


@on_played
def test_operands_on_two_devices_are_refused_on_the_device() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == torch.device("cuda", 0) and there.cpu().tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="at least two devices"):
        here + there
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]  # a number may come from the host


@on_played
def test_kernels_do_not_read_host_memory_on_the_device() -> None:
    from xfast.kernels.norm import add_norm

    x, scale = torch.ones(2, 16, device="cuda"), torch.ones(16)
    with pytest.raises(ValueError, match="cannot be accessed"):
        add_norm(x, scale, scale, 1e-5)


@on_played
def test_a_graph_repeats_what_it_recorded_and_never_waits_on_the_device() -> None:
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2).add_(1)
    x.fill_(5)
    graph.replay()
    assert y.cpu().tolist() == [11, 11, 11]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
        x.sum().item()


@on_played
def test_gradients_and_parameters_are_on_the_device() -> None:
    layer = torch.nn.Linear(3, 2).to("cuda")
    with torch.enable_grad():
        layer(torch.ones(4, 3, device="cuda")).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.device.type == "cuda"
    assert layer.weight.grad.cpu().tolist() == [[4.0] * 3] * 2
