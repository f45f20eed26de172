"""What replaces ``forward`` on models with a task head, and on the head's module that turns tokens into outputs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from xfast import lm_head
from xfast.backends.native import NativeEngine
from xfast.heads import (
    HeadRule,
    head_module,
    is_followed,
    is_observed,
    is_plain,
    places_of_encoder,
    rule_for,
    selects_first,
)
from xfast.packing import Packed
from xfast.patch import EncoderPatch, HeadContext, Patch, context_of, current_context, unseen, wrapped_since


class HeadPatch(Patch):
    """On a model with a task head: tells the encoder which rows the head reads, for the time of one call."""

    def __init__(self, module: nn.Module, encoder: nn.Module | None, rule: HeadRule, previous: Any = None) -> None:
        super().__init__(module, previous)
        self._encoder: Callable[[], nn.Module | None] = weakref.ref(encoder) if encoder is not None else lambda: None
        self.rule = rule

    @property
    def encoder_patch(self) -> EncoderPatch | None:
        """The patch on this head's encoder, also behind a later wrapper; None when it is gone or was restored."""
        encoder, places = self._encoder(), places_of_encoder(self.module)
        if not any(one is encoder for one in places):  # another may have been put into its place
            found = (_patch_on(one) for one in places if one is not None)
            if (patch := next(filter(None, found), None)) is not None:
                return patch
        return None if encoder is None else _patch_on(encoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadPatch:
        encoder = copy.deepcopy(self._encoder(), memo)  # already in memo when the whole model is copied
        return type(self)(memo[id(self.module)], encoder, self.rule, self._copied_previous(memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self._encoder(), self.rule, self.previous)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See :class:`Patch`."""
        patch = self.encoder_patch
        if patch is None:
            return self.original(*args, **kwargs)
        if is_dynamo_compiling():
            return self._traced(patch, args, kwargs)
        context = HeadContext(
            "first" if self.rule.rows == "first" and self.reads_as_ruled(patch) else "all",
            self._loss_over_padding(args, kwargs),
            needs_first=self.rule.pools or self.rule.rows == "first",
            untouched=self.rule.rows == "all" and self._passes_on(patch),
        )
        with context_of(patch, context):
            return self.original(*args, **kwargs)

    def reads_as_ruled(self, patch: EncoderPatch) -> bool:
        """Whether this head reads no more rows than its rule says: nothing was replaced, hooked or wrapped."""
        reader = head_module(self.module, self.rule)
        if self.previous is not None or not is_plain(reader) or not self._is_as_it_was(patch):
            return False
        if self.rule.rows != "first":
            return True
        return selects_first(patch.module.pooler if self.rule.pooled else reader) and not _is_watched(patch)

    def _passes_on(self, patch: EncoderPatch) -> bool:
        """Whether the head's module is given the encoder's output as it is: what edits it might leave no trace."""
        between = (one for one in self.module.children() if one is not patch.module)
        return not _is_watched(patch) and all(is_plain(one) for one in between)

    def _is_as_it_was(self, patch: EncoderPatch) -> bool:
        """Whether the head's class has the same rule, and the encoder its place in the head."""
        model, encoder = self.module, patch.module
        return rule_for(model) == self.rule and any(one is encoder for one in places_of_encoder(model))

    def _traced(self, patch: EncoderPatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Under torch.compile no value can be looked at: every loss over a masked batch might read padding."""
        call = dict(zip(self._names, args, strict=False), **kwargs)
        loss = any(call.get(name) is not None for name in ("labels", "start_positions"))
        if not loss or not self.rule.token_labels or call.get("attention_mask") is None:
            return self.original(*args, **kwargs)
        if patch.freed:  # between two graphs values can be looked at, and there is no original to trace
            return unseen(self, args, kwargs)
        patch.traces_original = True
        try:
            return self.original(*args, **kwargs)
        finally:
            patch.traces_original = False

    def _loss_over_padding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """A loss that reads outputs at padded positions needs the original's values there."""
        call = dict(zip(self._names, args, strict=False), **kwargs)
        mask, labels, starts = (call.get(name) for name in ("attention_mask", "labels", "start_positions"))
        if not self.rule.token_labels or (labels is None and starts is None) or not isinstance(mask, torch.Tensor):
            return None
        padded = mask == 0
        if starts is not None and bool(padded.any()):  # its softmax runs over all positions
            return "a question-answering loss over a padded batch is asked for"
        if not isinstance(labels, torch.Tensor):
            return None
        if self.rule.shifted or labels.numel() != mask.numel():
            return "a loss over a padded batch is asked for" if bool(padded.any()) else None
        # any shape: the originals flatten them; the mask's device may be another
        at_padding = labels.reshape(-1)[padded.reshape(-1).to(labels.device)]
        return "labels at padded positions are not -100" if bool((at_padding != -100).any()) else None


class TokenHeadPatch(HeadPatch):
    """On the module that turns every token's hidden state into outputs: runs it on real tokens only."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See :class:`Patch`."""
        patch = None if is_dynamo_compiling() else self.encoder_patch
        context = current_context(patch)
        if (
            patch is None
            or context is None
            or kwargs
            or len(args) != 1
            or not context.untouched
            or not _same_values(args[0], context.padded)
        ):
            return self.original(*args, **kwargs)
        packed, hidden = context.packed, context.hidden
        assert packed is not None and hidden is not None and context.padded is not None
        if is_followed((*self.module.parameters(), args[0])):
            return self.original(*args)  # padding included: torch's own operations alone
        whole = packed.total_tokens == packed.batch * packed.length
        head, engine = lm_head.find(self.module), _native_engine(patch)
        if (
            head is not None
            and engine is not None
            and isinstance(packed, Packed)
            and args[0].dtype == head.decoder.weight.dtype
            and lm_head.usable(head)
        ):
            return lm_head.logits(head, hidden, packed, engine)
        if whole:
            return self.original(*args)
        outputs = self.original(hidden.to(context.padded.dtype).unsqueeze(0))[0]
        return packed.pad(outputs, outputs.dtype)

    def native_precision(self) -> str | None:
        """That of a masked-LM head's products, or None where its own code runs."""
        patch = self.encoder_patch
        engine = None if patch is None else _native_engine(patch)
        if engine is None or not is_plain(self.module) or lm_head.find(self.module) is None:
            return None
        return lm_head.precision_for(engine)


def _patch_on(encoder: nn.Module) -> EncoderPatch | None:
    patch = encoder.__dict__.get("forward")
    if patch is None or isinstance(patch, EncoderPatch):
        return patch
    return next(iter(wrapped_since([encoder])), None)


def _native_engine(patch: EncoderPatch) -> NativeEngine | None:
    """The encoder's engine if it is the CPU's, packed already."""
    plan = patch.__dict__.get("plan")  # not made for this: a changed copy may refuse
    engine = None if plan is None else plan.engine
    return engine if isinstance(engine, NativeEngine) else None


def _is_watched(patch: EncoderPatch) -> bool:
    """Whether a hook or a wrapper around its forward sees, and may change, what the encoder returns."""
    return is_observed(patch.module) or patch.module.__dict__.get("forward") is not patch


def _same_values(features: Any, padded: torch.Tensor | None) -> bool:
    """Whether the head was given the encoder's output as it was (dropout in eval mode passes it through)."""
    return (
        padded is not None
        and isinstance(features, torch.Tensor)
        and features.shape == padded.shape
        and features.data_ptr() == padded.data_ptr()
        and features.stride() == padded.stride()
        and (features.is_inference() or not features._version)
    )
