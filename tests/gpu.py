"""Where Triton kernels are tested: on a GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

pytest.importorskip("triton", reason="not installed: pip install triton")

from xfast.kernels.launch import INTERPRETED, capability_of

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
CAPABILITY = capability_of(DEVICE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# NumPy, in which the interpreter computes, warns where a GPU silently gives inf or NaN
NO_NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
FP8 = pytest.mark.skipif(CAPABILITY < 89, reason="this GPU has no e4m3 products")


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Seeded by the test's name (conftest), the same on every device."""
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def cu_seqlens(lengths: Sequence[int]) -> torch.Tensor:
    """int32 [len(lengths) + 1] on the device."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output that is wrong wherever a kernel forgets to write."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


class Captures:
    """In place of capturing CUDA graphs: records what was captured; ``fail`` makes the next ones run out of memory."""

    def __init__(self) -> None:
        self.count, self.replays, self.fail = 0, 0, False

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        if self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.count += 1
        output = function()

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return replay, output
