"""Notices weights that changed after packing, cheaply enough to ask before every call.

Four signs: a submodule was replaced (LoRA, pruned layers); a parameter object or its memory was replaced (``.to()``,
``module.weight = ...``); its version counter moved (``load_state_dict``, an optimizer step); sampled values differ
(``p.data += delta``, as LoRA merges do, moves no counter). A sparse edit through ``.data`` that misses every sample is
the one change that goes unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from xfast import _C
from xfast.architecture import EncoderWeights


class WeightWatch:
    """A snapshot of an encoder's submodules and parameters.

    Holds the submodules but not the encoder itself, which holds this.
    """

    def __init__(self, encoder: nn.Module, weights: EncoderWeights) -> None:
        inner = list(encoder.modules())
        self._children = [(m._modules, tuple(m._modules.values())) for m in inner if m._modules]
        self._types = [(module, type(module)) for module in inner[1:]]
        # (the first module is the encoder, whose forward is xfast's)
        self._states = [module.__dict__ for module in inner[1:] if "forward" not in module.__dict__]
        self._entries: list[tuple[dict[str, Any], str, torch.Tensor, int, int]] = []
        arrays = []
        for _, module, name in weights.parameters():
            parameter: torch.Tensor = getattr(module, name)
            self._entries.append((module._parameters, name, parameter, _version(parameter), parameter.data_ptr()))
            if parameter.device.type == "cpu" and parameter.numel():
                flat = parameter.detach().contiguous().view(torch.uint8 if parameter.dim() else parameter.dtype)
                arrays.append(flat.numpy())
        self._probe = _C.Probe(arrays)

    def changed(self) -> bool:
        """True when any submodule or parameter differs from the snapshot."""
        for modules, children in self._children:
            if tuple(modules.values()) != children:
                return True
        if any("forward" in state for state in self._states):
            return True
        if any(type(module) is not cls for module, cls in self._types):
            return True
        for parameters, name, parameter, version, pointer in self._entries:
            if id(parameters.get(name)) != id(parameter):
                return True
            if parameter.data_ptr() != pointer or _version(parameter) != version:
                return True
        return bool(self._probe.changed())


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


class InnerWatch:
    """Finds what users did to modules that the accelerated path does not call: hooks, dropout switched on."""

    def __init__(self, encoder: nn.Module) -> None:
        inner = [module for module in encoder.modules() if module is not encoder]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._dropouts = [module for module in inner if isinstance(module, nn.Dropout)]

    def refusal(self) -> str | None:
        """Why the original code must run, or None."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "a forward hook is registered for every module"
        if any(self._hooks) and any(not _is_recorder(hook) for hooks in self._hooks for hook in hooks.values()):
            return "a forward hook is registered inside the encoder"
        if any(dropout.training for dropout in self._dropouts):
            return "a module inside the encoder is in training mode"
        return None


def _is_recorder(hook: object) -> bool:
    return getattr(hook, "__module__", "").startswith("transformers.")
