"""What each task head reads from the encoder, as data, and how a token head runs on packed rows.

``first`` heads read column 0 only: the encoder may return ``(batch, 1, hidden_size)``, so the head needs no rewrite.
``all`` heads read every real token: their module runs on ``(1, total_tokens, hidden_size)`` and is padded after.

Both hold only for the head's own modules. One that was replaced (mean pooling, an LSTM or CRF tagger) or hooked gets
every row of the padded batch, as it would from the original encoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import forward_ad


@dataclass(frozen=True)
class HeadRule:
    """One row: class-name ending, rows read, and the names of the modules that read hidden states.

    ``pools``: column 0 of an ``all`` head's output is used whatever its mask says, as a pooler does.
    """

    ending: str
    rows: str
    modules: tuple[str, ...]
    pools: bool = False


HEAD_RULES = (
    HeadRule("ForSequenceClassification", "first", ("classifier",)),
    HeadRule("ForMultipleChoice", "first", ("classifier",)),
    HeadRule("ForNextSentencePrediction", "first", ("cls",)),
    HeadRule("ForTokenClassification", "all", ("classifier",)),
    HeadRule("ForQuestionAnswering", "all", ("qa_outputs",)),
    HeadRule("ForMaskedLM", "all", ("lm_head", "cls")),
    HeadRule("AltCLIPTextModel", "all", ("pre_LN",), pools=True),
)


def rule_for(model: nn.Module) -> HeadRule | None:
    """The rule of a transformers head whose ``forward`` has not been overridden, else None."""
    for cls in type(model).__mro__:
        if not cls.__module__.startswith("transformers.models."):
            continue
        overridden = getattr(type(model), "forward", None) is not getattr(cls, "forward", None)
        for rule in HEAD_RULES:
            if cls.__name__.endswith(rule.ending) and not overridden:
                return rule
    return None


def head_module(model: nn.Module, rule: HeadRule) -> nn.Module | None:
    """The module that reads hidden states, or None."""
    for name in rule.modules:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


# Modules that treat every row of their input alone
_ROWWISE = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Tanh, nn.GELU, nn.ReLU)


def is_plain(module: nn.Module | None) -> bool:
    """Whether a head's module (or pooler) is transformers' own, so that it reads what its rule says; no hooks on it."""
    if module is None:
        return True
    for part in module.modules():
        if type(part) not in _ROWWISE and not type(part).__module__.startswith("transformers."):
            return False
        if part._forward_hooks or part._forward_pre_hooks:
            return False
        forward = part.__dict__.get("forward")
        if forward is not None and (not getattr(forward, "is_xfast", False) or forward.previous is not None):
            return False
    return True


def selects_first(module: nn.Module | None) -> bool:
    """Whether a plain ``module``, a pooler or head, reads column 0, whatever other rows there are.

    A bare ``nn.Linear`` or ``nn.Identity`` in its place would pass all of them on.
    """
    return module is not None and type(module) not in _ROWWISE


def is_observed(module: nn.Module) -> bool:
    """Whether a hook sees, and may change, what ``module`` returns."""
    return bool(module._forward_hooks)


def is_transformed() -> bool:
    """Whether ``vmap``, ``jvp`` or forward-mode differentiation is active: tensors may have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_followed(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether something needs to see what is computed from ``parameters``: autograd or a transform."""
    return is_transformed() or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters))
