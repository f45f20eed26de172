"""Notices weights that changed after packing, cheaply enough to ask before every call.

Four signs: a submodule was replaced (LoRA, pruned layers); a parameter object or its memory was replaced (``.to()``,
``module.weight = ...``); its version counter moved (``load_state_dict``, an optimizer step); sampled values differ
(``p.data += delta``, as LoRA merges do, moves no counter). A sparse edit through ``.data`` that misses every sample is
the one change that goes unseen.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from xfast import _C
from xfast.architecture import EncoderWeights


class WeightWatch:
    """A snapshot of an encoder's submodules and parameters.

    Holds the submodules but not the encoder itself, which holds this. The snapshots are flat lists, taken again and
    compared whole: ``map`` keeps the loops in C, which matters for a check that runs before every call.
    """

    def __init__(self, encoder: nn.Module, weights: EncoderWeights) -> None:
        self._modules = list(encoder.modules())[1:]  # without the encoder, whose forward is xfast's
        self._children = [m._modules for m in (encoder, *self._modules) if m._modules]
        self._states = [module.__dict__ for module in self._modules if "forward" not in module.__dict__]
        watched = [(module, getattr(module, name)) for _, module, name in weights.parameters()]
        self._owners = list({id(module): module._parameters for module, _ in watched}.values())
        self._tensors: list[torch.Tensor] = [parameter for _, parameter in watched]
        self._counted = [t for t in self._tensors if not t.is_inference()]  # the others have no version
        self._probe = _C.Probe([_bytes(t) for t in self._tensors if t.device.type == "cpu" and t.numel()])
        self._snapshot = self._take()
        # An id may be given to a new object once its owner is gone: these keep the owners alive.
        self._kept = [list(values.values()) for values in (*self._children, *self._owners)]

    def _take(self) -> tuple[list[Any], ...]:
        flat = chain.from_iterable
        return (
            list(map(id, flat(map(dict.values, self._children)))),
            list(map(id, flat(map(dict.values, self._owners)))),
            list(map(type, self._modules)),
            list(map(_data_ptr, self._tensors)),
            list(map(_version, self._counted)),
        )

    def changed(self) -> bool:
        """True when any submodule or parameter differs from the snapshot."""
        return (
            self._take() != self._snapshot
            or any(map(contains, self._states, repeat("forward")))
            or bool(self._probe.changed())
        )


_data_ptr = torch.Tensor.data_ptr
_version = attrgetter("_version")


def _bytes(parameter: torch.Tensor) -> Any:
    flat = parameter.detach().contiguous()
    return flat.view(torch.uint8 if parameter.dim() else parameter.dtype).numpy()


class InnerWatch:
    """Finds what users did to modules that the accelerated path does not call: hooks, dropout switched on."""

    def __init__(self, encoder: nn.Module) -> None:
        inner = [module for module in encoder.modules() if module is not encoder]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._dropouts = [module.__dict__ for module in inner if isinstance(module, nn.Dropout)]

    def refusal(self, training: bool = False) -> str | None:
        """Why the original code must run, or None. In ``training`` the modules run themselves, dropout included."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "a forward hook is registered for every module"
        if any(self._hooks) and any(not _is_recorder(hook) for hooks in self._hooks for hook in hooks.values()):
            return "a forward hook is registered inside the encoder"
        if not training and any(map(_training, self._dropouts)):
            return "a module inside the encoder is in training mode"
        return None


_training = itemgetter("training")


def _is_recorder(hook: object) -> bool:
    return getattr(hook, "__module__", "").startswith("transformers.")
