"""The GPU kernels compiled ahead of time, which needs no GPU: no spills, shared memory fits, tensor cores are used.

Here the forms that XLM-R runs in, for two architectures; all forms for all architectures: ``make static-gpu``.
In a process of its own: in this one Triton interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="not installed: pip install triton")

from xfast.benchmarks.gpu_cases import cases
from xfast.kernels.tiles import shared_memory_limit

# bf16 and fp16 compile to the same code but for the instructions' type
FORMS = ("attention", "norm-bias", "embedding", "activation", "gemm", "weight-only", "packing")


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("codegen") / "kernels.json"
    command = [
        sys.executable,
        "-m",
        "xfast.benchmarks.static_gpu",
        "--capability",
        str(request.param),
        "--json",
        str(out),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [*command, "--model-forms"], env=environment, cwd=out.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    kernels: list[dict[str, object]] = json.loads(Path(out).read_text())["kernels"]
    return kernels


def test_every_kernel_compiles(compiled: list[dict[str, object]]) -> None:
    labels = [str(kernel["label"]) for kernel in compiled]
    for form in FORMS:
        assert any(label.startswith(form) for label in labels), form


def test_nothing_spills_and_shared_memory_fits(compiled: list[dict[str, object]]) -> None:
    for kernel in compiled:
        assert kernel["spills"] == 0, kernel
        assert int(str(kernel["shared"])) <= shared_memory_limit(int(str(kernel["capability"]))), kernel


def test_products_run_on_tensor_cores(compiled: list[dict[str, object]]) -> None:
    capability = int(str(compiled[0]["capability"]))
    must = {case.label for case in cases(capability) if case.mma}
    for kernel in compiled:
        label = str(kernel["label"])
        if label not in must:
            continue
        tensor = kernel["tensor"]
        assert isinstance(tensor, dict)
        if (
            capability == 90
            and label.startswith(("attention bf16", "gemm", "weight-only"))
            and "L1" not in label.split()
            and "M16" not in label
        ):
            assert tensor.keys() & {"HGMMA", "QGMMA"}, kernel  # Hopper's own
        assert tensor, kernel
