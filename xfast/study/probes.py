"""What intermediate training could change although the graph stays the same: how weights bear coarser arithmetic, and
at which layer the answer is already there.

Measured without labels, on each language's own inputs: distances between an engine's embeddings and fp32's, agreement
of predictions, and agreement of every layer's prediction with the last one's, which no engine is asked for. Accuracy is
measured where labels exist (``accuracy.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import xfast
from xfast.benchmarks.workloads import Batch
from xfast.errors import XfastError
from xfast.stilts.task import CHOICE, CLASSIFICATION, SPAN, TAGGING
from xfast.study import arms
from xfast.study.factors import EARLY, QUANTISATION, STOCK, TYPES, EngineName
from xfast.study.store import Record
from xfast.study.work import CHOICES

EXAMPLES = 8
"""Examples of each task and language."""

Inputs = Mapping[tuple[str, str], Batch]


def compare(model: nn.Module, engine: EngineName, inputs: Inputs, wanted: Collection[str]) -> Iterator[Record]:
    """Yields the figures of one arm: ``QUANTISATION`` for every language, ``EARLY`` for tasks with a head.

    Predictions of a head that cannot be asked at every layer are left out, with a record of kind "note".

    Args:
        model: not accelerated; it is left as it was.
        engine: whose arithmetic is compared with fp32's.
        inputs: batches by (task, language).
        wanted: ``QUANTISATION``, ``EARLY`` or both.
    """
    if reason := _unread(model, next((task for task, _ in inputs), "")):
        yield {"kind": "note", "text": reason}
    exact = {}
    with _accelerated(model, _exact(model)):
        for key, batch in inputs.items():
            exact[key] = _run(model, batch, key[0], early=EARLY in wanted)
    for (task, language), (_, _, by_layer) in exact.items():
        for layer, agreeing in enumerate(by_layer, 1):
            text = "predictions from this layer that agree with the last layer's"
            where = {"probe": EARLY, "task": task, "language": language}
            yield {**where, "x": layer, "what": text, "value": agreeing}
    if QUANTISATION not in wanted:
        return
    with _accelerated(model, engine):
        for (task, language), batch in inputs.items():
            where = {"probe": QUANTISATION, "task": task, "language": language, "x": str(engine)}
            vectors, labels, _ = exact[task, language]
            got, got_labels, _ = _run(model, batch, task, early=False)
            cosine = functional.cosine_similarity(vectors, got, dim=-1)
            for what, value in (("mean", cosine.mean()), ("worst", cosine.min())):
                yield {**where, "what": f"cosine of sentence embeddings with fp32's, {what}", "value": float(value)}
            if labels is not None and got_labels is not None:
                share = float((labels == got_labels).float().mean())
                yield {**where, "what": "predictions that agree with fp32's", "value": share}


def _exact(model: nn.Module) -> EngineName:
    """The fastest fp32 there is for this model."""
    try:
        with xfast.accelerated(model, precision="fp32"):
            return EngineName("auto", "fp32")
    except XfastError:
        return EngineName(STOCK, "fp32")


@contextmanager
def _accelerated(model: nn.Module, engine: EngineName) -> Iterator[None]:
    arms.accelerate(model, engine)
    try:
        yield
    finally:
        if engine.backend == STOCK:
            model.float()
        else:
            xfast.restore(model)


def _run(
    model: nn.Module, batch: Batch, task: str, *, early: bool
) -> tuple[torch.Tensor, torch.Tensor | None, list[float]]:
    """Mean-pooled sentence embeddings [sequences, hidden], predictions of real positions, agreement by layer."""
    ids, mask = (tensor.view(-1, tensor.shape[-1]) for tensor in batch)
    encoder: Any = arms.without_head(model)
    with torch.inference_mode():
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=early)
        states = output.last_hidden_state.float()
        weight = mask.unsqueeze(-1).float()
        vectors = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        predict = _head(model, task, mask)
        if predict is None:
            return vectors, None, []
        labels = predict(output.last_hidden_state)
        layers = output.hidden_states[1:] if early else ()
        agreement = [float((predict(layer) == labels).float().mean()) for layer in layers]
    return vectors, labels, agreement


def _head(model: Any, task: str, mask: torch.Tensor) -> Any:
    """From hidden states [sequences, length, hidden] to predictions; None for tasks that read the states themselves."""
    kind = TYPES[task]
    if not arms.has_head(model):
        return None
    real = mask.bool()
    if kind == CLASSIFICATION:
        if _unread(model, task):
            return None
        pooler = arms.without_head(model).pooler if _is_bare(model) else nn.Identity()
        return lambda states: model.classifier(pooler(states)).argmax(-1)
    if kind == TAGGING:
        return lambda states: model.classifier(states).argmax(-1)[real]
    if kind == SPAN:
        return lambda states: model.qa_outputs(states).masked_fill(~real.unsqueeze(-1), -torch.inf).argmax(1)
    if kind == CHOICE:
        encoder = arms.without_head(model)
        return lambda states: model.classifier(encoder.pooler(states)).view(-1, CHOICES[task]).argmax(-1)
    return None


def _is_bare(model: Any) -> bool:
    """Whether the head is one matrix, as BERT's, over what the encoder's pooler makes of the first token."""
    return isinstance(getattr(model, "classifier", None), nn.Linear)


def _unread(model: Any, task: str) -> str:
    """Why a head cannot be asked at every layer; empty where it can, and where there is none to ask."""
    if TYPES.get(task) != CLASSIFICATION or not arms.has_head(model) or not _is_bare(model):
        return ""
    if getattr(arms.without_head(model), "pooler", None) is not None:
        return ""
    name = type(model).__name__
    return f"probes leave out predictions of {name}: its head is one matrix, and what it reads is not the encoder's"
