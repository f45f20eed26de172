"""xfast itself, as a user would call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]


def build(model: nn.Module, precision: str, *, threads: int, **_: Any) -> Run:
    """``keep_weights=False`` frees the linear layers' original weights, as the other engines' conversions do."""
    import xfast
    from xfast.benchmarks.peers_torch import run_of

    xfast.set_num_threads(threads)
    return run_of(xfast.accelerate(model, precision=precision, keep_weights=False))
