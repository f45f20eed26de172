"""What an accelerated encoder returns: transformers' output object, made without its constructor's detours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

_FIELDS = tuple(field.name for field in fields(Output))


def encoder_output(
    last: torch.Tensor,
    pooled: torch.Tensor | None,
    hidden_states: tuple[torch.Tensor, ...] | None = None,
    attentions: tuple[torch.Tensor, ...] | None = None,
) -> Output:
    """``BaseModelOutputWithPoolingAndCrossAttentions`` of these values.

    Args:
        last: ``last_hidden_state``.
        pooled: ``pooler_output``, or None.
        hidden_states, attentions: as transformers has them, or None.
    """
    values = {
        "last_hidden_state": last,
        "pooler_output": pooled,
        "hidden_states": hidden_states,
        "attentions": attentions,
    }
    if not _KNOWN or is_dynamo_compiling():  # dynamo knows the constructor
        return Output(**values)
    return _assembled(values)


def _assembled(values: dict[str, Any]) -> Output:
    """The same object. Its constructor makes 30 Python calls, and after a forward their code is in no cache: 65 us."""
    output = Output.__new__(Output)
    state = output.__dict__
    for name in _FIELDS:
        value = state[name] = values.get(name)
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


def _is_known() -> bool:
    """Whether this version of transformers makes what :func:`_assembled` does; also registers the type with pytree."""
    values = {"last_hidden_state": torch.empty(0, device="cpu"), "hidden_states": ()}
    theirs = Output(**values)
    if not isinstance(theirs, OrderedDict):
        return False
    ours = _assembled(values)
    return vars(ours) == vars(theirs) and list(ours.items()) == list(theirs.items())


_KNOWN = _is_known()


@contextmanager
def _counting_changes() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def countable(wanted: bool) -> AbstractContextManager[None]:
    """Tensors count their changes, also in inference mode: a token head must know whether it gets them as they were."""
    return _counting_changes() if wanted and torch.is_inference_mode_enabled() else nullcontext()


def apart(states: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each in memory of its own: whoever keeps one layer's states must not keep all of them."""
    for state in states:
        yield state.clone() if state.untyped_storage().nbytes() > state.nbytes else state
