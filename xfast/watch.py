"""Notices weights that changed after packing, cheaply enough to ask before every call.

Four signs: a submodule was replaced (LoRA, pruned layers); a parameter object or its memory was replaced (``.to()``,
``module.weight = ...``); its version counter moved (``load_state_dict``, an optimizer step); sampled values differ
(``p.data += delta``, as LoRA merges do, moves no counter). A sparse edit through ``.data`` that misses every sample is
the one change that goes unseen.
"""

from __future__ import annotations

import torch
from torch import nn

from xfast import _C
from xfast.architecture import EncoderWeights


class WeightWatch:
    """A snapshot of an encoder's submodules and parameters."""

    def __init__(self, encoder: nn.Module, weights: EncoderWeights) -> None:
        self._children = [(m._modules, tuple(m._modules.values())) for m in encoder.modules() if m._modules]
        self._entries = []
        arrays = []
        for _, module, name in weights.parameters():
            parameter = getattr(module, name)
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
        for parameters, name, parameter, version, pointer in self._entries:
            if parameters.get(name) is not parameter or parameter.data_ptr() != pointer:
                return True
            if _version(parameter) != version:
                return True
        return bool(self._probe.changed())


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


class HookWatch:
    """Finds hooks that users put on modules which the accelerated path does not call."""

    def __init__(self, encoder: nn.Module) -> None:
        self._dicts = []
        for module in encoder.modules():
            if module is not encoder:
                self._dicts += [module._forward_hooks, module._forward_pre_hooks]

    def found(self) -> bool:
        """True when a hook other than transformers' own output recorders is registered."""
        if not any(self._dicts):
            return False
        return any(not _is_recorder(hook) for hooks in self._dicts for hook in hooks.values())


def _is_recorder(hook: object) -> bool:
    return getattr(hook, "__module__", "").startswith("transformers.")
