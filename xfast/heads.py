"""What each task head reads from the encoder, as data, and how a token head runs on packed rows.

``first`` heads read column 0 only: the encoder may return ``(batch, 1, hidden_size)``, so the head needs no rewrite.
``all`` heads read every real token: their ``module`` runs on ``(1, total_tokens, hidden_size)`` and is padded after.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class HeadRule:
    """One row: class-name ending, rows read, and the module that maps hidden states to outputs (``all`` heads)."""

    ending: str
    rows: str
    modules: tuple[str, ...] = ()


HEAD_RULES = (
    HeadRule("ForSequenceClassification", "first"),
    HeadRule("ForMultipleChoice", "first"),
    HeadRule("ForNextSentencePrediction", "first"),
    HeadRule("ForTokenClassification", "all", ("classifier",)),
    HeadRule("ForQuestionAnswering", "all", ("qa_outputs",)),
    HeadRule("ForMaskedLM", "all", ("lm_head", "cls")),
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
    """The module of an ``all`` head that runs on packed rows, or None."""
    for name in rule.modules:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return module
    return None
