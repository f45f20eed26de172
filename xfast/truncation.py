"""The original code of an encoder, cut to its first layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from xfast.architecture import layers_of


def run_layers(
    module: nn.Module, layers: int, call: dict[str, Any], run: Callable[..., Any], *, want_states: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
    """State after the first ``layers`` layers, hidden states up to it if wanted, attention weights if asked for.

    A hook hears that state on this thread. Hidden states are asked for only where the caller wants them: transformers 5
    then leaves closures in the layers for good, which cannot be pickled. Checkpointed layers run within functions of
    their own, where what a hook hears has no gradients, and torch.compile does not trace registering one.
    """
    call = {**call, "return_dict": True}
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    if want_states or checkpointed or is_dynamo_compiling():
        full = run(**{**call, "output_hidden_states": True})
        last, states = full.hidden_states[layers], full.hidden_states[: layers + 1] if want_states else None
    else:
        full, last = _heard(layers_of(module)[layers - 1] if layers else module.embeddings, lambda: run(**call))
        states = None
    return last, states, None if full.attentions is None else full.attentions[:layers]


def _heard(part: Any, run: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
    """What ``run`` returns, and what ``part`` gave meanwhile on this thread."""
    thread, heard = threading.get_ident(), []

    def hear(_part: nn.Module, _inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            heard.append(output[0] if isinstance(output, tuple) else output)  # transformers 4 gives tuples

    handle = part.register_forward_hook(hear)
    try:
        output = run()
    finally:
        handle.remove()
    return output, heard[-1]
