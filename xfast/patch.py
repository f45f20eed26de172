"""The callables that replace ``forward`` on single instances (never on a class), and their exact undo.

Each lives in the instance's ``__dict__['forward']``, knows what it replaced, and survives ``copy.deepcopy`` and
``pickle`` together with its module. They hold their module weakly: deleting a model frees it at once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling  # is_compiling says so to other threads, too

from xfast import compiled, training
from xfast.architecture import family_of, is_exact_attention, layers_of, output_dtype
from xfast.backends.base import Batch, CannotRunError, Engine, EngineRefusedError
from xfast.errors import ModelFreedError, WeightsFreedError
from xfast.heads import is_plain, is_transformed
from xfast.locks import ThreadLock
from xfast.options import Options
from xfast.outputs import apart, countable, encoder_output
from xfast.packing import ARGUMENTS, PositionOverflowError
from xfast.plan import CHANGED, FreedCopy, Plan
from xfast.truncation import run_layers

# Arguments that change no result of the encoder (num_items_in_batch: Trainer hands it to every model)
_FLAGS = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})
_contexts = threading.local()  # .by_encoder: id of an encoder's patch -> HeadContext of the call in progress


class Patch:
    """Base: a replacement for one instance's ``forward``.

    is_xfast marks it for code below that must not import this module.

    Making one reads nothing from the module, which may still be under construction (``deepcopy``, ``pickle``).
    """

    is_xfast = True

    def __init__(self, module: nn.Module, previous: Any = None) -> None:
        self._module = weakref.ref(module)
        self.installed = False
        self.previous = previous  # an instance-level forward found in place (accelerate's hooks); None = the class's
        self._names = _argument_names(type(module), previous)

    @property
    def module(self) -> nn.Module:
        """The patched module. Raises ModelFreedError when it is gone."""
        module = self._module()
        if module is None:
            raise ModelFreedError(
                "this forward belongs to a model that has been freed (copy.copy leaves it behind; use copy.deepcopy)"
            )
        return module

    @property
    def alive(self) -> bool:
        """Whether the module is still there."""
        return self._module() is not None

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Runs what this patch replaced."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        if self.previous is not None:
            return inspect.signature(self.previous)
        return inspect.signature(functools.partial(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__  # torch.export reads it off every forward

    def install(self) -> None:
        """Puts this patch in place."""
        self.installed = True
        self.module.__dict__["forward"] = self

    def _copied_previous(self, memo: dict[int, Any]) -> Any:
        return None if self.previous is None else copy.deepcopy(self.previous, memo)

    def undo(self) -> None:
        """Puts back exactly what was there."""
        self.installed = False
        state = self.module.__dict__
        if self.previous is None:
            state.pop("forward", None)
        else:
            state["forward"] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate's unwrap_model binds what it finds under ``forward`` as a method
        return self.call(*(args[1:] if args and isinstance(args[0], nn.Module) else args), **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the module's forward."""
        raise NotImplementedError


def _argument_names(cls: type[nn.Module], previous: Any) -> tuple[str, ...]:
    """Names of the arguments that may be given by position."""
    own = list(inspect.signature(cls.forward).parameters.values())[1:]
    given = own if previous is None else list(inspect.signature(previous).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in given):  # a wrapper that hands on what it gets
        given = own
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in given if p.kind in kinds)


class HeadContext:
    """What a head tells its encoder for one call, and what the encoder leaves for the head's packed module."""

    def __init__(
        self, rows: str, original: str | None = None, needs_first: bool = False, untouched: bool = False
    ) -> None:
        self.rows = rows
        self.original = original  # why the encoder must run its original code, or None
        self.needs_first = needs_first  # column 0 must have its original value even where it is masked
        self.untouched = untouched  # nothing of the user's stands between the encoder and the head's module
        self.padded: torch.Tensor | None = None
        self.packed: Batch | None = None
        self.hidden: torch.Tensor | None = None


def current_context(patch: EncoderPatch | None) -> HeadContext | None:
    """What the head told ``patch``'s encoder for the call in progress on this thread."""
    return getattr(_contexts, "by_encoder", {}).get(id(patch))


@contextmanager
def context_of(patch: EncoderPatch, context: HeadContext) -> Iterator[None]:
    """Makes ``context`` the one that ``patch`` sees on this thread."""
    if not hasattr(_contexts, "by_encoder"):
        _contexts.by_encoder = {}
    outer = _contexts.by_encoder.get(id(patch))
    _contexts.by_encoder[id(patch)] = context
    try:
        yield
    finally:
        if outer is None:
            del _contexts.by_encoder[id(patch)]
        else:
            _contexts.by_encoder[id(patch)] = outer


class EncoderPatch(Patch):
    """Runs an encoder through its plan's engine, or its original code for calls that cannot be accelerated."""

    def __init__(self, module: nn.Module, options: Options, freed: FreedCopy | None = None) -> None:
        super().__init__(module)
        self.options = options
        self.fallbacks: Counter[str] = Counter()
        self.unusable: str | None = None  # why a copy has no engine
        self.traces_original = False  # set by a head for the time of a call that torch.compile traces
        self._freed_copy = freed
        self._warned: set[str] = set()
        self._making = ThreadLock()
        self.handle = compiled.register(self)

    @property
    def plan(self) -> Plan:
        """How this encoder runs; made on first use."""
        plan: Plan | None = self.__dict__.get("plan")
        return self._make_plan() if plan is None else plan

    def _make_plan(self) -> Plan:
        with self._making.held():  # cached_property locks none, or before Python 3.12 all, which a fork leaves locked
            if (made := self.__dict__.get("plan")) is not None:
                return cast("Plan", made)
            family = family_of(self.module)
            assert family is not None
            plan = Plan(self.module, family, self.options)
            if self._freed_copy is not None:
                plan.adopt_copy(self._freed_copy, self.module)
            self.__dict__["plan"] = plan
            return plan

    @property
    def freed(self) -> str:
        """Why the original weights are gone, or nothing. Does not make the plan, which a changed copy may refuse."""
        source = None if self._freed_copy is None else self._freed_copy.source
        plan: Plan | None = self.__dict__.get("plan", source)
        return "" if plan is None else plan.freed

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderPatch:
        # Freed weights live only in the engine, which the copy then shares; otherwise it packs its own when called.
        freed = FreedCopy.of(self.plan, memo) if self.freed else None
        copied = EncoderPatch(memo[id(self.module)], self.options, freed)
        copied.installed = self.installed
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        if self.freed:
            raise WeightsFreedError(f"pickle: {self.freed}")
        return EncoderPatch, (self.module, self.options), {"installed": self.installed}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See :class:`Patch`."""
        if is_dynamo_compiling():
            return self._traced(args, kwargs)
        module = self.module
        if len(args) > len(self._names) or any(name in kwargs for name in self._names[: len(args)]):
            return self.original(*args, **kwargs)  # which raises TypeError
        call = self._named(args, kwargs)
        train = self.options.training and (module.training or torch.is_grad_enabled())
        try:
            return self._train(module, call) if train else self._run(module, call)
        except CannotRunError as refusal:
            reason = str(refusal)
            if isinstance(refusal, EngineRefusedError):
                self._warn_once(f"{reason}; the original code runs")
        except PositionOverflowError:
            reason = "a position lies outside the position table"  # the original raises its own error
        return self._fall_back(reason, args, kwargs)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"xfast: {text}", stacklevel=6)

    def encode(self, call: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """``last_hidden_state`` for tensors alone: what the custom operator behind ``torch.compile`` runs."""
        outer = current_context(self)  # of an eager head around a compiled encoder
        original = None if outer is None else outer.original
        context = HeadContext("all", original, needs_first=True)  # which head reads the result is unknown here
        with torch.no_grad(), context_of(self, context):
            return self(**call, return_dict=True).last_hidden_state

    def _fall_back(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.freed:
            hint = "; use torch.inference_mode() or no_grad()" if reason == _GRADIENTS else ""
            raise WeightsFreedError(f"the original code is needed ({reason}), but {self.freed}{hint}")
        self.fallbacks[reason] += 1
        if reason == _GRADIENTS:
            self._warn_once("gradients are enabled, so the original code runs; use torch.inference_mode() or no_grad()")
        return self._original_layers(args, kwargs)

    def _original_layers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original code, cut to the ``layers`` that were asked for."""
        layers, module = self.options.layers, self.module
        if layers is None or layers >= len(layers_of(module)):
            return self.original(*args, **kwargs)
        call = self._named(args, kwargs)
        wanted = bool(_flag(module, call, "output_hidden_states"))
        last, states, attentions = run_layers(module, layers, call, self.original, want_states=wanted)
        return self._answer(module, call, last, states, attentions)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name. To transformers 5 a flag that is None is not one that was left to the config."""
        call = dict(zip(self._names, args, strict=False), **kwargs)
        unset = {name: default for name, default in _UNSET if name not in self._names and name in call}
        return {**call, **{name: default for name, default in unset.items() if call[name] is None}}

    def _engine_for(self, module: nn.Module, call: dict[str, Any]) -> Engine:
        if (reason := self._refusal(module, call)) is not None:
            raise CannotRunError(reason)
        engine = self._packed(module)
        if engine is None:
            raise CannotRunError("no backend runs this model")
        if (reason := self.plan.inner.refusal(module)) is not None:
            raise CannotRunError(reason)
        if torch.is_grad_enabled() and any(getattr(*one).requires_grad for one in self.plan.weights.loose()):
            raise CannotRunError(_GRADIENTS)
        _refuse_elsewhere(call, engine.device)
        return engine

    def _packed(self, module: nn.Module) -> Engine | None:
        """The engine. accelerate() saw to it that there is one; a copy may have been changed before its first call."""
        try:
            plan = self._plan_of_a_copy()
            plan.alert()  # not sooner: the original code has threads of its own
            return plan.current_engine(module)
        except CHANGED as error:
            raise self._unusable_since(error) from None

    def _plan_of_a_copy(self) -> Plan:
        if self.unusable is not None:
            raise CannotRunError(self.unusable)
        try:
            return self.plan
        except CHANGED as error:
            raise self._unusable_since(error) from None

    def _unusable_since(self, error: Exception) -> CannotRunError:
        self.unusable = f"this copy cannot be accelerated: {error} (after a change call xfast.accelerate again)"
        warnings.warn(f"xfast: the original code runs: {self.unusable}", stacklevel=8)
        return CannotRunError(self.unusable)

    def _refusal(self, module: nn.Module, call: dict[str, Any], train: bool = False) -> str | None:
        """Why this call must run the original code, or None."""
        static = _static_refusal(module, call, train)
        if static is not None:
            return static
        tensors = [t for name in ARGUMENTS if (t := call.get(name)) is not None]
        if not tensors or any(type(t) not in (torch.Tensor, nn.Parameter) for t in tensors):
            return "an input is not a plain tensor"
        if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
            return "input_ids and inputs_embeds are both given or both missing"
        mask = call.get("attention_mask")
        if mask is not None and mask.dim() > 2:
            return "the attention mask has more than 2 dimensions"
        if (
            not train
            and torch.is_grad_enabled()
            and (any(t.requires_grad for t in tensors) or any(p.requires_grad for p in module.parameters()))
        ):
            return _GRADIENTS
        if torch.jit.is_tracing():
            return "torch.jit tracing"
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return "the program is capturing a CUDA graph, in which no number of tokens can be waited for"
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
            return "make_fx is tracing, which sees torch's operations only"
        if is_transformed():
            return "a functional transform (torch.func) or forward-mode differentiation is active"
        context = current_context(self)
        if context is not None and context.original is not None:
            return context.original
        if not train and _autocast(tensors[0]) and self.options.precision == "model":
            return "autocast is on and no precision was asked for"
        return None

    def _run(self, module: nn.Module, call: dict[str, Any]) -> Any:
        engine = self._engine_for(module, call)
        packed = engine.unpad(*(call.get(name) for name in ARGUMENTS))
        context = current_context(self)
        want_states = bool(_flag(module, call, "output_hidden_states"))
        pooler = getattr(module, "pooler", None)
        first = context is not None and context.rows == "first" and is_plain(pooler)
        _refuse_batch(packed, first or pooler is not None or (context is not None and context.needs_first))
        dtype = output_dtype(module)
        rows = packed.first_rows() if first and not want_states else None
        # of this engine: another thread may have made a plan for another number of layers meanwhile
        layers = self.options.layers_of(engine.spec)
        with countable(context is not None and rows is None):
            hidden, states = engine.run(packed, rows=rows, layers=layers, hidden_states=want_states)
            last = hidden.unsqueeze(1).to(dtype) if rows is not None else packed.pad(hidden, dtype)
        if context is not None and rows is None:
            context.padded, context.packed, context.hidden = last, packed, hidden
        padded = None if states is None else (*apart(packed.pad(s, dtype) for s in states[:-1]), last)
        return self._answer(module, call, last, padded)

    def training_unavailable(self) -> str | None:
        """Why ``training=True`` cannot work for this encoder here, or None."""
        word = self.plan.weights.modules[-1, "word"].weight
        return training.unavailable(self.plan.weights.spec, word.device)

    def _train(self, module: nn.Module, call: dict[str, Any]) -> Any:
        """A differentiable forward through the module's own parts, on packed tokens."""
        if (reason := self._refusal(module, call, train=True)) is not None:
            raise CannotRunError(reason)
        plan = self._plan_of_a_copy()
        given = next(t for name in ("input_ids", "inputs_embeds") if (t := call.get(name)) is not None)
        spec = plan.weights.spec
        if (reason := training.refusal(module, spec, given.device) or plan.inner.refusal(module, True)) is not None:
            raise CannotRunError(reason)
        _refuse_elsewhere(call, given.device)
        spec = training.current(module, spec)
        packed = training.pack(spec, *(call.get(name) for name in ARGUMENTS))
        context = current_context(self)
        reads_first = context is not None and (context.rows == "first" or context.needs_first)
        _refuse_batch(packed, getattr(module, "pooler", None) is not None or reads_first)
        wanted = bool(_flag(module, call, "output_hidden_states"))
        last, states = training.run(module, spec, packed, call.get("inputs_embeds"), wanted)
        return self._answer(module, call, last, (*states, last) if wanted else None)

    def _answer(
        self,
        module: nn.Module,
        call: dict[str, Any],
        last: torch.Tensor,
        states: tuple[torch.Tensor, ...] | None = None,
        attentions: tuple[torch.Tensor, ...] | None = None,
    ) -> Any:
        """What the original returns for this call, of the same kind; its pooler reads ``last``."""
        pooler = getattr(module, "pooler", None)
        output = encoder_output(last, None if pooler is None else pooler(last), states, attentions)
        wanted, old = _flag(module, call, "return_dict", True), "return_dict" in self._names
        if wanted or (wanted is None and not old):  # None in a config means no to transformers 4 only
            return output
        if not old:
            return output.to_tuple()
        # transformers 4: the encoder builds the tuple itself and keeps an empty pooler's place
        return (last, output.pooler_output, *(each for each in (states, attentions) if each is not None))

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Under torch.compile: one custom operator for the encoder, so that tracing never sees the native call."""
        module = self.module
        call = self._named(args, kwargs)
        ids = call.get("input_ids")
        mask = call.get("attention_mask")
        if (
            _static_refusal(module, call) is not None
            or any(inner.training for inner in module.modules())
            or ids is None
            or call.get("inputs_embeds") is not None
            or (mask is not None and mask.dim() > 2)
            or torch.is_grad_enabled()
            or getattr(torch.compiler, "is_exporting", bool)()  # newer than torch 2.6
            or _flag(module, call, "output_hidden_states")
            or self.traces_original
            or (_autocast(ids) and self.options.precision == "model")
        ):
            return unseen(self, args, kwargs) if self.freed else self._original_layers(args, kwargs)
        dtype = output_dtype(module)
        hidden = torch.ops.xfast.encode(
            self.handle,
            ids,
            mask,
            call.get("token_type_ids"),
            call.get("position_ids"),
            module.embeddings.word_embeddings.embedding_dim,
            dtype,
        )
        return self._answer(module, call, hidden)


@torch.compiler.disable
def unseen(patch: Patch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call between two graphs: there is no original code to trace, and what can run without it does."""
    return patch(*args, **kwargs)


def _autocast(given: torch.Tensor) -> bool:
    return not given.is_meta and torch.is_autocast_enabled(given.device.type)  # torch knows none for meta


def _refuse_elsewhere(call: dict[str, Any], device: torch.device) -> None:
    for name in ARGUMENTS:
        if (given := call.get(name)) is not None and given.device != device:
            raise CannotRunError(f"an input is on {given.device}, the model on {device}")


def _refuse_batch(packed: Batch, reads_first: bool) -> None:
    if packed.first_masked and reads_first:
        raise CannotRunError("column 0 is masked in a row whose first token is read")
    if packed.length == 0:
        raise CannotRunError("the batch has no columns")


def wrapped_since(modules: Iterable[nn.Module]) -> list[EncoderPatch]:
    """Patches of ``modules`` that run, but behind a ``forward`` that somebody put around them later."""
    wrapped = {
        module
        for module in modules
        if not isinstance(module.__dict__.get("forward"), Patch) and "forward" in module.__dict__
    }
    if not wrapped:
        return []
    return [patch for patch in compiled.registered() if patch.installed and patch._module() in wrapped]


_GRADIENTS = "gradients are enabled"
_UNSET = (("output_attentions", False), ("output_hidden_states", False), ("return_dict", True))


def _flag(module: nn.Module, call: dict[str, Any], name: str, default: bool = False) -> Any:
    value = call.get(name)
    return getattr(module.config, name, default) if value is None else value


def _static_refusal(module: nn.Module, call: dict[str, Any], train: bool = False) -> str | None:
    """Reasons that depend on the mode and the kind of call, not on tensors."""
    if module.training and not train:
        return "the model is in training mode"
    if _flag(module, call, "output_attentions"):
        return "attention weights are asked for"
    if not isinstance(_flag(module, call, "output_hidden_states"), bool):
        return "selected hidden states are asked for"
    if getattr(module.config, "is_decoder", False):
        return "decoder mode"
    if not is_exact_attention(getattr(module.config, "_attn_implementation", None)):
        return f"attention is the user's own: {module.config._attn_implementation!r}"
    for name, value in call.items():
        if value is not None and name not in ARGUMENTS and name not in _FLAGS:
            return f"{name} is given"
    return None
