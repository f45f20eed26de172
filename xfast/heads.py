"""What each task head reads from the encoder, as data, and how a token head runs on packed rows.

``first`` heads read column 0 only: the encoder may return ``(batch, 1, hidden_size)``, so the head needs no rewrite.
``all`` heads read every real token: their module runs on ``(1, total_tokens, hidden_size)`` and is padded after.

Both hold only for the head's own modules. One that was replaced (mean pooling, an LSTM or CRF tagger) or hooked gets
every row of the padded batch, as it would from the original encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.autograd import forward_ad

from xfast.architecture import is_stock


@dataclass(frozen=True)
class HeadRule:
    """One row of the table of heads.

    Attributes:
        ending: of the class's name.
        rows: that are read, "first" or "all".
        modules: names of those that read hidden states; none: nothing but the rest of the row is known.
        pooled: a ``first`` head reads the encoder's pooler, not hidden states.
        pools: column 0 of an ``all`` head's output is used whatever its mask says, as a pooler does.
        token_labels: labels are of tokens, so that a loss may read outputs at padding.
        shifted: each label is compared with the token before it.
    """

    ending: str
    rows: str
    modules: tuple[str, ...] = ()
    pooled: bool = False
    pools: bool = False
    token_labels: bool = False
    shifted: bool = False


# The first that fits counts
HEAD_RULES = (
    HeadRule("BertForSequenceClassification", "first", ("classifier",), pooled=True),
    HeadRule("ForSequenceClassification", "first", ("classifier",)),
    HeadRule("ForMultipleChoice", "first", ("classifier",), pooled=True),
    HeadRule("ForNextSentencePrediction", "first", ("cls",), pooled=True),
    HeadRule("ForTokenClassification", "all", ("classifier",), token_labels=True),
    HeadRule("ForQuestionAnswering", "all", ("qa_outputs",), token_labels=True),
    HeadRule("ForMaskedLM", "all", ("lm_head", "cls"), token_labels=True),
    HeadRule("ForPreTraining", "all", token_labels=True),
    HeadRule("ForCausalLM", "all", token_labels=True, shifted=True),
    HeadRule("LMHeadModel", "all", token_labels=True, shifted=True),
    HeadRule("AltCLIPTextModel", "all", ("pre_LN",), pools=True),
    HeadRule("DPREncoder", "all", pools=True),
)


def rule_for(model: nn.Module) -> HeadRule | None:
    """The rule of a transformers head, else None.

    Of one whose ``forward`` was overridden or replaced nothing is known but what its losses and column 0 need.
    """
    kind: type = type(model)
    return _rule_for(kind, getattr(kind, "forward", None))


@functools.lru_cache(4096)  # asked in every call
def _rule_for(kind: type, forward: object) -> HeadRule | None:
    for cls in kind.__mro__:
        if not cls.__module__.startswith("transformers.models."):
            continue
        for rule in HEAD_RULES:
            if cls.__name__.endswith(rule.ending):
                own = forward is getattr(cls, "forward", None) and is_stock(cls)
                pools = rule.pools or rule.rows == "first"
                return rule if own else replace(rule, rows="all", modules=(), pools=pools)
    return None


def places_of_encoder(model: nn.Module) -> tuple[nn.Module | None, ...]:
    """Where a head has its encoder: AltCLIP's text model is its own base_model in transformers 4."""
    return (getattr(model, "base_model", None), *model.children())


def head_module(model: nn.Module, rule: HeadRule) -> nn.Module | None:
    """The module that reads hidden states, or None."""
    for name in rule.modules:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


# Modules that treat every row of their input alone; of transformers' own by the ending of their names
_ROWWISE = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Tanh, nn.GELU, nn.ReLU)
_HEADS = ("LMHead", "MLMHead", "NSPHead", "PredictionHead", "PredictionHeadTransform", "ClassificationHead", "Pooler")


def _is_rowwise(kind: type) -> bool:
    if not kind.__module__.startswith("transformers."):
        return kind in _ROWWISE
    return kind.__module__ == "transformers.activations" or kind.__name__.endswith(_HEADS)  # others may attend


def is_plain(module: nn.Module | None) -> bool:
    """Whether a head's module (or pooler) is transformers' own, so that it reads what its rule says; no hooks on it."""
    if module is None:
        return True
    for part in module.modules():
        if not is_stock(type(part)) or not _is_rowwise(type(part)):
            return False
        if part._forward_hooks or part._forward_pre_hooks:
            return False
        forward = part.__dict__.get("forward")
        if forward is not None and (not getattr(forward, "is_xfast", False) or forward.previous is not None):
            return False
    return True


def selects_first(module: nn.Module | None) -> bool:
    """Whether a plain ``module``, a pooler or head, reads column 0, whatever other rows there are.

    A bare ``nn.Linear`` or ``nn.Identity`` in its place would pass all of them on, a summary may take their mean.
    """
    return type(module).__name__.endswith(("ClassificationHead", "Pooler"))


def is_observed(module: nn.Module) -> bool:
    """Whether a hook sees what ``module`` is given or returns, and may change it or call the module itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_transformed() -> bool:
    """Whether ``vmap``, ``jvp`` or forward-mode differentiation is active: tensors may have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_followed(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether something needs to see what is computed from ``parameters``: autograd or a transform."""
    return is_transformed() or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters))
