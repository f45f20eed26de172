"""The public calls: ``accelerate``, ``restore``, ``explain`` and friends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from xfast import attention_interface
from xfast.architecture import find_encoders, supported_families
from xfast.backends.native import NativeEngine
from xfast.errors import (
    BackendUnavailableError,
    InvalidOptionError,
    UnsupportedModelError,
    WeightsFreedError,
    XfastError,
    require_one_of,
)
from xfast.explain import Explanation, explain_patches
from xfast.head_patch import HeadPatch, TokenHeadPatch
from xfast.heads import head_module, places_of_encoder, rule_for
from xfast.locks import ThreadLock
from xfast.options import Options
from xfast.packed_model import BACKENDS as PACKED_BACKENDS
from xfast.packed_model import check_saveable, parameters_outside, put_under
from xfast.packed_model import load as load_model
from xfast.packed_model import save as save_model
from xfast.patch import EncoderPatch, Patch, wrapped_since
from xfast.recipe import Recipe

T = TypeVar("T")

attention_interface.register()


# Models may share encoders: one thread at a time puts patches in or takes them out. Over packing and calibration too,
# which read weights that another thread's keep_weights=False would take away.
_changing = ThreadLock()


@_changing.held()
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
    recipe: Recipe | None = None,
) -> T:
    """Makes every supported encoder inside ``model`` fast, in place, and returns the same object.

    Args:
        model: a transformers model with or without a task head, a pipeline, a SentenceTransformer or CrossEncoder, or
            any ``nn.Module`` that holds a supported encoder.
        backend, precision, layers, keep_weights, calibration, tolerance, training, recipe: see :class:`xfast.Options`,
            whose attributes they are.

    The model should be in eval mode and called under ``torch.inference_mode()``. Calls that cannot be accelerated
    (gradients without ``training=True``, attention weights, 4-D masks, ...) run the original code, and raise
    ``WeightsFreedError`` where ``keep_weights=False`` gave its weights up; ``explain(model)`` counts them. Hidden
    states and token-level logits at padded positions are zeros, the only difference in outputs. Threads that
    accelerate models at the same time wait for each other.

    Raises:
        UnsupportedModelError: no supported encoder inside, or one that differs from its family.
        WeightsFreedError: it was accelerated with ``keep_weights=False``, or loaded packed.
        InvalidOptionError, InvalidWeightsError, BackendUnavailableError: see :mod:`xfast.errors`.
    """
    options = Options(backend, precision, layers, keep_weights, calibration, tolerance, training, recipe)
    root = _module_of(model)
    before = _patches(root)
    _refuse_freed("accelerate", before)
    encoders = [module for _, module, _ in find_encoders(root)]
    if not encoders:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no encoder that xfast accelerates; supported: {supported_families()}"
        )
    _refuse_own_forward(encoders)
    patches = [EncoderPatch(module, options) for module in encoders]
    for patch in patches:  # everything that can fail comes before the model is touched
        patch.plan.require_layers()
        if not keep_weights:
            patch.plan.shared = parameters_outside(root, patch.module)
        if patch.plan.current_engine(patch.module) is None:
            warnings.warn("xfast: " + "; ".join(patch.plan.notes), stacklevel=3)  # 2 is the lock's
        if training and (reason := patch.training_unavailable()) is not None:
            raise BackendUnavailableError(f"training=True: {reason}")
    heads = _head_patches(root, encoders)
    if not keep_weights:  # before anyone can call the engines
        if any(patch.plan.engine is None for patch in patches):  # of several encoders, before the first loses its own
            raise BackendUnavailableError("keep_weights=False needs a backend that runs this model; see xfast.explain")
        for patch in patches:
            patch.plan.free_weights(patch.module)
    _uninstall(before)
    for installed in (*patches, *heads):
        installed.install()
    return model


def _refuse_own_forward(encoders: Sequence[nn.Module]) -> None:
    for module in encoders:
        if _unpatched(module) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} cannot be accelerated: it has a forward of its own (model.forward = ...), "
                "which would be passed by; call xfast.accelerate first and wrap its forward afterwards"
            )


@_changing.held()
def restore(model: T) -> T:
    """Undoes :func:`accelerate` exactly and returns the same object. A model that is not accelerated is left alone.

    Raises:
        WeightsFreedError: ``keep_weights=False`` gave up the originals.
        UnsupportedModelError: an encoder's ``forward`` was wrapped since, so that it cannot be reached.
    """
    root = _module_of(model)
    patches = _patches(root)
    _refuse_wrapped("restore", root)
    _refuse_freed("restore", patches)
    _uninstall(patches)
    return model


@contextmanager
def accelerated(model: T, **options: Any) -> Iterator[T]:
    """``with xfast.accelerated(model, precision="int8"): ...`` accelerates inside the block only.

    Options are those of :func:`accelerate`. A model that was accelerated before gets that acceleration back afterwards.
    For one thread at a time: blocks that overlap put back what each found.

    Raises:
        InvalidOptionError: ``keep_weights=False``, which could not be undone; and as :func:`accelerate`.
    """
    if not options.get("keep_weights", True):
        raise InvalidOptionError("keep_weights: False cannot be undone at the end of a block; use xfast.accelerate")
    before = _patches(_module_of(model))
    accelerate(model, **options)

    def undo() -> None:
        restore(model)
        _install(before)

    with _then(undo):
        yield model


@contextmanager
def restored(model: T) -> Iterator[T]:
    """``with xfast.restored(model): ...`` runs the original code inside the block, to export it or to compare with it.

    Acceleration is back, engines and all, after the block. A model that is not accelerated is left alone.

    Raises:
        WeightsFreedError: ``keep_weights=False`` gave up the originals.
        UnsupportedModelError: an encoder's ``forward`` was wrapped since, so that it cannot be reached.
    """
    root = _module_of(model)
    patches = _patches(root)
    _refuse_wrapped("restored", root)
    _refuse_freed("restored", patches)
    _uninstall(patches)
    with _then(lambda: _install(patches)):
        yield model


@contextmanager
def _then(undo: Callable[[], None]) -> Iterator[None]:
    """Runs ``undo`` after a block; an error of the block's own is what its user must see."""
    try:
        yield
    except BaseException:
        with suppress(XfastError):
            undo()
        raise
    undo()


@_changing.held()
def _install(patches: Sequence[Patch]) -> None:
    """Puts patches back, but those of modules that were replaced and are gone."""
    for patch in patches:
        if patch.alive:
            patch.install()


def explain(model: Any) -> Explanation:
    """What runs and why: print it. See :class:`xfast.Explanation`, which is empty for a model that is not accelerated.

    Raises:
        UnsupportedModelError: ``model`` is no module and holds none.
    """
    root = _module_of(model)
    patches = _patches(root)
    encoders = [patch for patch in patches if isinstance(patch, EncoderPatch)] + wrapped_since(root.modules())
    heads = [patch for patch in patches if isinstance(patch, HeadPatch)]
    return explain_patches(encoders, heads)


def save(model: Any, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Writes an accelerated model as a packed artifact, for :func:`load`; see docs/artifacts.md.

    Args:
        model: accelerated on the CPU; a model of one of transformers' own classes, or a pipeline with one.
        folder: new or empty, or an artifact, which is replaced once the new one is complete.
        tokenizer: saved beside it. Without one, the tokenizer's files are copied from where the model came from, if
            that is a folder or in the hub's cache.

    The model stays as it is, and in use. Weights that it still holds are not written, packed ones only.

    Raises:
        InvalidOptionError: the model is not accelerated, not on the CPU, or has several encoders; ``folder`` or
            ``tokenizer`` is something else.
        UnsupportedModelError: loading could not build it again (its own class, replaced modules).
        ArtifactWriteError: disk full, read-only, or the folder holds something else.
        DataFileError: a Hub model's tokenizer differs between the revisions in the cache, and none was given.
    """
    path = _path_of(folder)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise InvalidOptionError(f"tokenizer: expected a tokenizer of transformers or None, got {tokenizer!r:.80}")
    root = _module_of(model)
    patches = [patch for patch in _patches(root) if isinstance(patch, EncoderPatch)]
    engines = [patch.plan.current_engine(patch.module) for patch in patches]
    check_saveable(root, next((engine.precision for engine in engines if engine is not None), "fp32"))
    if len(engines) != 1 or not isinstance(engines[0], NativeEngine):
        raise InvalidOptionError(
            "model: expected one with an encoder that xfast.accelerate made fast on the CPU; see xfast.explain"
        )
    save_model(root, patches[0].plan, engines[0], path, tokenizer)


def load(
    folder: str | os.PathLike[str],
    *,
    verify: bool | None = None,
    head: nn.Module | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> Any:
    """Loads a packed artifact: a transformers model in eval mode, accelerated.

    Args:
        folder: what :func:`save` or ``xfast convert`` wrote.
        verify: None: every byte that is used must have its 64-bit checksum. True: all files must have their SHA-256.
            False: sizes, headers and the small files' hashes only; damaged weights then give wrong results.
        head: a transformers model with a task head, which gets the artifact's encoder in place of its own (that one may
            be on the meta device) and is returned; a pooler that only it has stays. None: the model that was saved.
        device: on the CPU packed weights are mapped, not copied; on a GPU each product is unpacked there by itself, so
            that the model need not fit there, nor into the host's memory, in the type that it had.
        backend: "native" (CPU), "triton" (GPU) or "auto", the one of the device.

    The model is one with ``keep_weights=False``: it cannot be restored, trained or saved by ``save_pretrained``.

    Raises:
        ArtifactError: no artifact, of another format, incomplete or damaged.
        BackendUnavailableError: the backend does not run on the device, or not what the artifact's recipe asks for.
        InvalidOptionError: ``folder``, ``verify``, ``device`` or ``backend`` is something else, or ``head`` is for
            another encoder.
    """
    if verify is not None and not isinstance(verify, bool):
        raise InvalidOptionError(f"verify: expected True, False or None, got {verify!r}")
    require_one_of("backend", backend, ("auto", *(one.name for one in PACKED_BACKENDS)))
    level = {None: "checksum", True: "full", False: "size"}[verify]
    loaded = load_model(_path_of(folder), level, _device(device), backend)
    root = loaded.model if head is None else put_under(head, loaded)
    options = Options(loaded.backend_name, loaded.manifest.precision, loaded.manifest.layers, keep_weights=False)
    patch = EncoderPatch(loaded.encoder, options)
    patch.plan.adopt(loaded.engine, loaded.backend_name, [], loaded.freed, loaded.encoder)
    for installed in (patch, *_head_patches(root, [loaded.encoder])):
        installed.install()
    return root


def _path_of(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise InvalidOptionError(f"folder: expected a str or a path, got {folder!r:.80}") from None


def _device(device: str | torch.device) -> torch.device:
    """With its index."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise InvalidOptionError(f"device: {device!r} is not accepted: {error}") from None


def _refuse_freed(call: str, patches: Sequence[Patch]) -> None:
    for patch in patches:
        if isinstance(patch, EncoderPatch) and patch.freed:
            raise WeightsFreedError(f"{call}: {patch.freed}")


def _refuse_wrapped(call: str, root: nn.Module) -> None:
    for patch in wrapped_since(root.modules()):
        raise UnsupportedModelError(
            f"{call}: the forward of {type(patch.module).__name__} was wrapped after xfast.accelerate; put back "
            "the one that it wraps first"
        )


@_changing.held()
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
        places = places_of_encoder(module)
        encoder = next((e for e in encoders if any(e is candidate for candidate in places)), None)
        if rule is None or encoder is None:
            continue
        patches.append(HeadPatch(module, encoder, rule, _unpatched(module)))
        token_head = head_module(module, rule) if rule.rows == "all" else None
        if token_head is not None:
            patches.append(TokenHeadPatch(token_head, encoder, rule, _unpatched(token_head)))
    return patches
