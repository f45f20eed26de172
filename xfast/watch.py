"""Notices weights that changed after packing, cheaply enough to ask before every call.

Five signs: a submodule was replaced (LoRA, pruned layers); a parameter object or its memory was replaced (``.to()``,
``module.weight = ...``); its version counter moved (``load_state_dict``, an optimizer step); sampled values differ
(``p.data += delta``, as LoRA merges do, moves no counter); and off the CPU, where sampling would wait for the device,
an optimizer stepped over their memory (fused optimizers move no counter). On the CPU a sparse edit that moves no
counter and misses every sample is the one change that goes unseen: through ``.data``, or of tensors that were made in
inference mode, which have no counter.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from operator import itemgetter
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from xfast import _C
from xfast.architecture import HELPERS, EncoderWeights, is_plain_tensor, layers_of, position_buffers
from xfast.locks import ThreadLock


class WeightWatch:
    """A snapshot of an encoder's submodules and parameters.

    Holds the submodules but not the encoder itself, which holds this.
    """

    def __init__(self, encoder: nn.Module, weights: EncoderWeights) -> None:
        modules = list(encoder.modules())[1:]  # without the encoder, whose forward is xfast's
        children = [m._modules for m in (encoder, *modules) if m._modules]
        states = [module.__dict__ for module in modules if "forward" not in module.__dict__]
        watched = [(module, getattr(module, name)) for _, module, name in weights.parameters()]
        owners = list({id(module): module._parameters for module, _ in watched}.values())
        tensors: list[torch.Tensor] = [parameter for _, parameter in watched]
        if buffers := position_buffers(encoder):
            tensors += [table for _, table in buffers]
            owners.append(cast("Any", encoder).embeddings._buffers)
        plain = [tensor for tensor in tensors if is_plain_tensor(tensor)]  # the others are told by their identity
        dicts = [*children, *owners]
        scalars = [(m.__dict__, name) for m in modules for name in (*_SCALARS, *_TABLES) if name in m.__dict__]
        scalars += [(m.__dict__, name) for m in modules for name in HELPERS if hasattr(type(m), name)]
        scalars += [(m.__dict__, name) for m, name in weights.loose()]
        held = [state.get(name) for state, name in scalars]
        # An id may be given to a new object once its owner is gone: these keep everything that is compared alive.
        self._kept = (modules, dicts, states, tensors, [list(values.values()) for values in dicts], scalars, held)
        self._watch = _C.Watch(
            dicts,
            modules,
            states,
            plain,
            [t for t in plain if version_of(t) is not None],
            [_bytes(t) for t in plain if _sampled(t) and t.numel()],
            [*_objects(modules, dicts, states), *_tensor_objects(plain)],
            scalars,
        )
        self._stepped = False
        self._storages = frozenset(t.untyped_storage().data_ptr() for t in plain if not _sampled(t) and not t.is_meta)
        if self._storages:
            _watch_optimizers(self)

    def changed(self) -> bool:
        """True when any submodule or parameter differs from the snapshot."""
        if self._stepped:
            return True
        with torch._C.DisableTorchFunctionSubclass():  # given-up weights answer in Python: a millisecond a call
            return self._watch.changed()

    def stepped(self, storages: set[int]) -> None:
        """An optimizer has changed tensors in these storages."""
        self._stepped = self._stepped or not self._storages.isdisjoint(storages)


def version_of(tensor: torch.Tensor) -> int | None:
    """How often it was changed in place; None: it does not count, as what was made in inference mode does not.

    Where ``.data`` was put into such a tensor, it says that it is none and still has no counter.
    """
    try:
        return tensor._version
    except RuntimeError:
        return None


def _sampled(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu" and not tensor.is_meta


_watching: weakref.WeakSet[WeightWatch] = weakref.WeakSet()
_hooked, _lock = threading.Lock(), ThreadLock()


def _watch_optimizers(watch: WeightWatch) -> None:
    """Tell this watch of every optimizer's step."""
    if _hooked.acquire(blocking=False):  # once in a process, and never let go
        register_optimizer_step_post_hook(_after_step)
    with _lock.held():
        _watching.add(watch)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    with _lock.held():
        watches = list(_watching)
    if watches:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        storages = {p.untyped_storage().data_ptr() for p in parameters if is_plain_tensor(p) and not p.is_meta}
        for watch in watches:
            watch.stepped(storages)


def _objects(
    modules: list[nn.Module], dicts: list[dict[str, Any]], states: list[dict[str, Any]]
) -> Iterator[tuple[int, int, int]]:
    """What will be read: addresses (CPython's ids), bytes, and bytes behind the pointers there."""
    for each in (*modules, *states):
        yield id(each), _HEADER, 0
    for table in dicts:
        yield id(table), dict.__basicsize__, _TABLE


def _tensor_objects(tensors: list[torch.Tensor]) -> Iterator[tuple[int, int, int]]:
    for tensor in tensors:
        yield id(tensor), _HEADER, 0
        yield tensor._cdata, _IMPL, 0
        yield tensor._cdata, _LINE, _LINE  # its storage and its version lie behind the first pointers


# Of LayerNorms, of attention, of embeddings and of activations
_SCALARS: tuple[str, ...] = ("eps", "scaling", "max_norm", "padding_idx", "act", "approximate")
_SCALARS += ("is_causal", "attention_head_size", "num_attention_heads", "intermediate_act_fn")
_TABLES = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
_LINE = 64
_HEADER, _IMPL, _TABLE = 48, 3 * _LINE, 3 * _LINE


def _bytes(parameter: torch.Tensor) -> Any:
    flat = parameter.detach()
    if not flat.is_contiguous():  # a copy would never change: all that lies where it lies
        flat = flat.as_strided((flat.untyped_storage().nbytes() // flat.element_size(),), (1,), 0)
    return flat.view(torch.uint8 if parameter.dim() else parameter.dtype).numpy()


class InnerWatch:
    """Finds what users did to modules that the accelerated path does not call: hooks, dropout switched on."""

    def __init__(self, encoder: nn.Module) -> None:
        inner = [module for module in encoder.modules() if module is not encoder]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        # Modules that train on packed tokens are passed by, or see packed shapes
        self._backward_hooks = [hooks for m in inner for hooks in (m._backward_hooks, m._backward_pre_hooks)]
        self._bypassed = _bypassed(encoder)
        # attention drops probabilities by its own mode
        dropping = [module for module in inner if isinstance(module, nn.Dropout)] + self._bypassed[3::3]
        self._dropouts = [module.__dict__ for module in dropping]
        self._watch = self._quiet()
        self._type = type(encoder)
        kinds = {type(module) for module in encoder.modules()}
        names = ("forward", *HELPERS)
        self._methods = [(kind, name, getattr(kind, name)) for kind in kinds for name in names if hasattr(kind, name)]

    def refusal(self, encoder: nn.Module, training: bool = False) -> str | None:
        """Why the original code must run, or None.

        Args:
            encoder: that this was made of.
            training: it trains on packed tokens: then its parts run themselves, dropout included, but not the modules
                that hold them.
        """
        if type(encoder) is not self._type:
            return "the forward of a class was replaced since the weights were packed"
        for kind, name, method in self._methods:
            if getattr(kind, name, None) is not method:
                return f"the {name} of a class was replaced since the weights were packed"
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "a forward hook is registered for every module"
        watch = self._watch
        if (watch is None or watch.changed()) and (reason := self._inner_refusal(training)) is not None:
            return reason
        if training and (any(self._backward_hooks) or any(_global_backward_hooks())):
            return "a backward hook is registered"
        if training and self._wrapped(encoder):
            return "layers were wrapped or replaced since xfast.accelerate"
        return None

    def _inner_refusal(self, training: bool) -> str | None:
        if any(self._hooks) and any(not _is_recorder(hook) for hooks in self._hooks for hook in hooks.values()):
            return "a forward hook is registered inside the encoder"
        if not training and any(map(_training, self._dropouts)):
            return "a module inside the encoder is in training mode"
        self._watch = self._quiet()
        return None

    def _quiet(self) -> _C.Watch | None:
        """What tells in a tenth of the time that there are still no hooks and no dropout; None: there are some now."""
        if any(self._hooks) or any(map(_training, self._dropouts)):
            return None
        objects = [(id(table), dict.__basicsize__, 0) for table in self._hooks]
        objects += [(id(state), dict.__basicsize__, _TABLE) for state in self._dropouts]
        scalars = [(state, "training") for state in self._dropouts]
        return _C.Watch(self._hooks, [], [], [], [], [], objects, scalars)

    def _wrapped(self, encoder: nn.Module) -> bool:
        now = _bypassed(encoder)
        same = len(now) == len(self._bypassed) and all(a is b for a, b in zip(now, self._bypassed, strict=True))
        return not now or not same or any("forward" in module.__dict__ for module in now)


def _bypassed(encoder: Any) -> list[nn.Module]:
    """Modules whose parts are called in their place when the encoder trains on packed tokens; none: it lacks some."""
    try:
        parts = [(layer, layer.attention, layer.attention.self) for layer in layers_of(encoder)]
        return [encoder.encoder, *(module for part in parts for module in part)]
    except AttributeError:
        return []


def _global_backward_hooks() -> tuple[Any, ...]:
    return nn_module._global_backward_hooks, nn_module._global_backward_pre_hooks


_training = itemgetter("training")


def _is_recorder(hook: object) -> bool:
    """Whether it only looks: transformers' own, and calibration's, while another thread calibrates.

    But for the hook of ``enable_input_require_grads``, which is the one of transformers.modeling_utils.
    """
    place = getattr(hook, "__module__", None) or ""
    return place != "transformers.modeling_utils" and place.startswith(
        ("transformers.", "xfast.calibration", "xfast.truncation")
    )
