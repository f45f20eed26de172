"""zentorch, AMD's PyTorch extension. Imports nothing of xfast: it runs in a Python environment of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]


def build(model: nn.Module, precision: str, **_: Any) -> Run:
    """Compiled with weights as constants, one graph for all shapes.

    Raises:
        RuntimeError: zentorch replaces no operator on this CPU, so that its figures would be plain torch.compile's.
    """
    import torch._inductor.config as inductor
    import zentorch

    if not zentorch._C.is_avx512_supported():
        raise RuntimeError("zentorch finds this CPU unsuitable (is_avx512_supported() is false) and optimises nothing")
    inductor.freezing = True
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    compiled = torch.compile(model, backend="zentorch", dynamic=True)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return compiled(input_ids=ids, attention_mask=mask).last_hidden_state.float().numpy()

    return run
