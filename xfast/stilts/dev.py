"""Evaluation on the English dev sets during training: what early stopping and the choice of a checkpoint look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch

from xfast.stilts import metrics, prediction
from xfast.stilts.batches import Masking, Padding, by_length, masked_batch
from xfast.stilts.features import IGNORED
from xfast.stilts.mixture import TrainingSet
from xfast.stilts.task import CHOICE, CLASSIFICATION, MATCHING, MLM, SPAN

MLM_TOKENS_PER_BATCH = 2048
"""Tokens of a batch of masked language modelling: its logits have the whole vocabulary."""


class Evaluator:
    """``evaluator(model)`` returns metrics in percent with ``score``, the mean of the tasks' main ones.

    A run of masked language modelling alone has the negative loss as its score. False: there is nothing to evaluate.
    """

    def __init__(self, sets: Mapping[str, TrainingSet], padding: Padding, masking: Masking) -> None:
        self.sets = {name: s for name, s in sets.items() if len(s.dev)}
        self.padding = padding
        self.masking = masking

    def __bool__(self) -> bool:
        return bool(self.sets)

    def __call__(self, model: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        main = []
        losses = []
        for name, part in self.sets.items():
            if part.task.type == MLM:
                loss = self._masked_loss(model, name, part)
                losses.append(loss)
                found[f"{name}_perplexity"] = math.exp(min(loss, 50.0))
                continue
            scores = self._scores(model, name, part)
            metric = part.task.metric
            main.append(next(scores[key] for key in (metric, "f1", "accuracy") if key in scores))
            found.update({f"{name}_{key}": value for key, value in scores.items()})
        if main:
            found["score"] = fmean(main)
        elif losses:
            found["score"] = -fmean(losses)
        return found

    def _scores(self, model: Any, name: str, part: TrainingSet) -> metrics.Scores:
        forward = partial(model, task=name)
        device = next(model.parameters()).device
        features, items = part.dev_features, part.dev.items
        if part.task.type == MATCHING:
            return self._matching(forward, part, device)
        if part.task.type == SPAN:
            answered = prediction.answers(forward, features, items, self.padding, device)
            return _answer_scores(part, answered)
        if part.task.type in (CLASSIFICATION, CHOICE):
            logits = prediction.classes(forward, features, part.task.type, self.padding, device)
            best = logits.argmax(-1).tolist() if len(logits) else []
            guessed = [part.labels[i] for i in best] if part.labels else best
            score = metrics.accuracy_f1 if part.task.metric == "accuracy_f1" else metrics.accuracy
            return score([item.label for item in items], guessed)
        words = [len(item.words) for item in items]
        tagged = prediction.tags(forward, features, words, part.labels, self.padding, device)
        return metrics.tag_f1([item.tags for item in items], tagged)

    def _matching(self, encoder: prediction.Forward, part: TrainingSet, device: torch.device) -> metrics.Scores:
        """Share of the queries whose own target is the nearest of all dev targets."""
        sides = [
            prediction.vectors(
                encoder,
                [feature.rows[i] for feature in part.dev_features.items],
                self.padding,
                device,
                pooling="cls",
                second=[feature.second[i] for feature in part.dev_features.items],
            )
            for i in (0, 1)
        ]
        left, right = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        targets = [feature.rows[1].tobytes() for feature in part.dev_features.items]
        best = (left @ right.T).argmax(1)
        # several queries may have one target: any copy of it is right
        return metrics.accuracy(targets, [targets[i] for i in best])

    def _masked_loss(self, model: Any, name: str, part: TrainingSet) -> float:
        """Mean loss over the masked pieces, the same pieces every time."""
        device = next(model.parameters()).device
        rows = [feature.rows[0] for feature in part.dev_features.items]
        total, count = 0.0, 0
        for indices in by_length([len(row) for row in rows], MLM_TOKENS_PER_BATCH):
            inputs = masked_batch([rows[i] for i in indices], indices, self.masking, self.padding)
            number = int((inputs["labels"] != IGNORED).sum())
            with torch.no_grad():  # not inference mode: sharded weights, gathered here, are trained on
                loss = model(task=name, **{key: value.to(device) for key, value in inputs.items()})["loss"]
            prediction.check_finite(float(loss), indices[0], "a loss")
            total, count = total + float(loss) * number, count + number
        return total / count  # every row that was kept has a piece to mask


def _answer_scores(part: TrainingSet, answered: list[prediction.Answered]) -> metrics.Scores:
    pairs = list(zip(part.dev.items, answered, strict=True))
    if part.task.name == "squad_v2":
        gold = {item.id: [a.text for a in item.answers] for item, _ in pairs}
        texts = {item.id: best.text for item, best in pairs}
        return metrics.squad_v2(gold, texts, {item.id: best.no_answer for item, best in pairs})
    answerable = [(item, best) for item, best in pairs if item.answers]
    gold = {item.id: [a.text for a in item.answers] for item, _ in answerable}
    scores = metrics.squad(gold, {item.id: best.text for item, best in answerable})
    return {**scores, part.task.metric: scores["squad"]}
