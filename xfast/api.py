"""The public calls: ``accelerate``, ``restore``, ``explain`` and friends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from xfast import attention_interface
from xfast.architecture import find_encoders, supported_families
from xfast.errors import BackendUnavailableError, InvalidOptionError, UnsupportedModelError, WeightsFreedError
from xfast.explain import Explanation, explain_patches
from xfast.heads import head_module, rule_for
from xfast.options import Options
from xfast.patch import EncoderPatch, HeadPatch, Patch, TokenHeadPatch

T = TypeVar("T")

attention_interface.register()


def accelerate(
    model: T,
    *,
    backend: str = "auto",
    precision: str = "model",
    layers: int | None = None,
    keep_weights: bool = True,
    calibration: Sequence[dict[str, Any]] | None = None,
    tolerance: float | None = None,
    training: bool = False,
) -> T:
    """Makes every supported encoder inside ``model`` fast, in place, and returns the same object.

    Args:
        model: a transformers model with or without a task head, a pipeline, a SentenceTransformer or CrossEncoder, or
            any ``nn.Module`` that holds a supported encoder.
        backend, precision, layers, keep_weights, calibration, tolerance, training: see :class:`xfast.Options`.

    Calls that cannot be accelerated (gradients without ``training=True``, attention weights, 4-D masks, ...) run the
    original code; ``explain(model)`` counts them. Hidden states at padded positions are zeros, the only difference in
    outputs.

    Raises:
        UnsupportedModelError: no supported encoder inside, or one that differs from its family.
        InvalidOptionError, InvalidWeightsError, BackendUnavailableError: see :mod:`xfast.errors`.
    """
    options = Options(backend, precision, layers, keep_weights, calibration, tolerance, training)
    root = _module_of(model)
    before = _patches(root)
    _refuse_freed("accelerate", before)
    encoders = [module for _, module, _ in find_encoders(root)]
    if not encoders:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no encoder that xfast accelerates; supported: {supported_families()}"
        )
    patches = [EncoderPatch(module, options, _unpatched(module)) for module in encoders]
    for patch in patches:  # everything that can fail comes before the model is touched
        if patch.plan.current_engine(patch.module) is None:
            warnings.warn("xfast: " + "; ".join(patch.plan.notes), stacklevel=2)
        if training and (reason := patch.training_unavailable()) is not None:
            raise BackendUnavailableError(f"training=True: {reason}")
    heads = _head_patches(root, encoders)
    if not keep_weights:  # before anyone can call the engines
        for patch in patches:
            patch.plan.free_weights(patch.module, _parameters_outside(root, patch.module))
    _uninstall(before)
    for installed in (*patches, *heads):
        installed.install()
    return model


def restore(model: T) -> T:
    """Undoes :func:`accelerate` exactly and returns the same object. A model that is not accelerated is left alone.

    Raises:
        WeightsFreedError: ``keep_weights=False`` gave up the originals.
    """
    patches = _patches(_module_of(model))
    _refuse_freed("restore", patches)
    _uninstall(patches)
    return model


@contextmanager
def accelerated(model: T, **options: Any) -> Iterator[T]:
    """``with xfast.accelerated(model, precision="int8"): ...`` accelerates inside the block only.

    A model that was accelerated before gets that acceleration back after the block.

    Raises:
        InvalidOptionError: ``keep_weights=False``, which could not be undone.
    """
    if not options.get("keep_weights", True):
        raise InvalidOptionError("keep_weights: False cannot be undone at the end of a block; use xfast.accelerate")
    before = _patches(_module_of(model))
    accelerate(model, **options)
    try:
        yield model
    finally:
        restore(model)
        for patch in before:
            patch.install()


@contextmanager
def restored(model: T) -> Iterator[T]:
    """``with xfast.restored(model): ...`` runs the original code inside the block, to export it or to compare with it.

    Acceleration is back, engines and all, after the block. A model that is not accelerated is left alone.

    Raises:
        WeightsFreedError: ``keep_weights=False`` gave up the originals.
    """
    patches = _patches(_module_of(model))
    _refuse_freed("restored", patches)
    _uninstall(patches)
    try:
        yield model
    finally:
        for patch in patches:
            patch.install()


def explain(model: Any) -> Explanation:
    """What runs and why: print it. See :class:`xfast.Explanation`."""
    patches = _patches(_module_of(model))
    encoders = [patch for patch in patches if isinstance(patch, EncoderPatch)]
    heads = [patch for patch in patches if isinstance(patch, HeadPatch)]
    return explain_patches(encoders, heads)


def _parameters_outside(root: nn.Module, encoder: nn.Module) -> set[int]:
    inside = set(encoder.modules())
    return {id(p) for m in root.modules() if m not in inside for p in m.parameters(recurse=False)}


def _refuse_freed(call: str, patches: Sequence[Patch]) -> None:
    if any(isinstance(patch, EncoderPatch) and patch.plan.freed for patch in patches):
        raise WeightsFreedError(f"{call}: the original weights were given up with keep_weights=False")


def _uninstall(patches: Sequence[Patch]) -> None:
    for patch in patches:
        patch.undo()


def _unpatched(module: nn.Module) -> Any:
    """The instance-level ``forward`` that is not xfast's, or None."""
    forward = module.__dict__.get("forward")
    return forward.previous if isinstance(forward, Patch) else forward


def _module_of(model: Any) -> nn.Module:
    """The ``nn.Module`` inside ``model``: itself, or the ``.model`` of a pipeline or wrapper."""
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        return inner
    raise UnsupportedModelError(
        f"expected a torch.nn.Module or an object with one as .model, got {type(model).__name__}; "
        f"supported encoders: {supported_families()}"
    )


def _patches(root: nn.Module) -> list[Patch]:
    found = []
    for module in root.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Patch):
            found.append(forward)
    return found


def _head_patches(root: nn.Module, encoders: list[nn.Module]) -> list[HeadPatch]:
    patches: list[HeadPatch] = []
    for module in root.modules():
        rule = rule_for(module)
        # AltCLIP's text model is its own base_model in transformers 4
        read = (getattr(module, "base_model", None), *module.children())
        encoder = next((e for e in encoders if any(e is candidate for candidate in read)), None)
        if rule is None or encoder is None:
            continue
        patches.append(HeadPatch(module, encoder, rule, _unpatched(module)))
        token_head = head_module(module, rule) if rule.rows == "all" else None
        if token_head is not None:
            patches.append(TokenHeadPatch(token_head, encoder, rule, _unpatched(token_head)))
    return patches
