"""From features to predictions: batches through a model, logits back to labels, tags, answers and vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfast.errors import InvalidInputError
from xfast.stilts.batches import Padding, by_length, collate, pad_rows
from xfast.stilts.examples import SpanExample
from xfast.stilts.features import Feature, Features, Ids
from xfast.stilts.task import SPAN, TAGGING

N_BEST = 20
"""Start and end positions of a window that are considered, as in the SQuAD scripts."""

MAX_ANSWER_LENGTH = 30
"""Tokens of the longest answer."""

TOKENS_PER_BATCH = 8192
"""Tokens of an evaluation batch, padding included; sorted batches have hardly any."""

Forward = Callable[..., Any]

Progress = Callable[[str, int, int], None]
"""Called with (language, features done, features in all)."""


@dataclass(frozen=True)
class Answered:
    """The best answer to a question, and how much better "no answer" scores than it."""

    text: str
    no_answer: float


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def outputs(
    forward: Forward,
    features: Sequence[Feature],
    type: str,
    padding: Padding,
    device: torch.device,
    *,
    progress: Any = None,
) -> Iterator[tuple[list[int], Any]]:
    """(indices of a batch's features, model output), from the longest batch to the shortest.

    Args:
        forward: called with a batch's tensors; no gradients are needed.
        progress: called with the number of features done after each batch.
    """
    lengths = [feature.length * len(feature.rows) for feature in features]
    for indices in by_length(lengths, TOKENS_PER_BATCH):
        batch = collate([features[i] for i in indices], type, padding, labels=False)
        with torch.no_grad():  # not inference mode: sharded weights, gathered here, are trained on
            result = forward(**_to(batch, device))
        yield indices, result
        if progress is not None:
            progress(len(indices))


def counter(progress: Progress | None, language: str, total: int) -> Callable[[int], None] | None:
    """What the functions here take: called with the number of features that a batch has done."""
    if progress is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(language, done, total)

    return advance


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.float().cpu().numpy()


def check_finite(values: npt.ArrayLike, example: int, what: str = "scores") -> None:
    """An argmax over NaN is an ordinary class: it must not become a prediction, nor NaN a score.

    Raises:
        InvalidInputError: a value is no finite number.
    """
    if not np.isfinite(values).all():
        raise InvalidInputError(
            f"model: NaN or infinity instead of {what} for example {example}: do its weights hold any, or are numbers "
            "larger than fp16 takes?"
        )


def classes(
    forward: Forward, features: Features, type: str, padding: Padding, device: torch.device, progress: Any = None
) -> npt.NDArray[np.float32]:
    """[features, classes] logits of classification or multiple choice, in the features' order."""
    found: list[Any] = [None] * len(features)
    for indices, result in outputs(forward, features.items, type, padding, device, progress=progress):
        for index, row in zip(indices, _array(result.logits), strict=True):
            check_finite(row, features.items[index].example)
            found[index] = row
    return np.stack(found) if found else np.zeros((0, 0), np.float32)


def tags(
    forward: Forward,
    features: Features,
    words: Sequence[int],
    names: Sequence[str],
    padding: Padding,
    device: torch.device,
    progress: Any = None,
) -> list[list[str]]:
    """A tag for every word of every sentence, windows joined again.

    Args:
        words: number of words of each example.
        names: tag of each class.
    """
    found: list[list[str]] = [[""] * count for count in words]
    for indices, result in outputs(forward, features.items, TAGGING, padding, device, progress=progress):
        most, best = result.logits.max(-1)
        for index, row, scores in zip(indices, best.cpu().numpy(), _array(most), strict=True):
            feature = features.items[index]
            first, starts = feature.extra
            check_finite(scores[starts], feature.example)
            found[feature.example][first : first + len(starts)] = [names[i] for i in row[starts]]
    return found


def answers(
    forward: Forward,
    features: Features,
    examples: Sequence[SpanExample],
    padding: Padding,
    device: torch.device,
    progress: Any = None,
) -> list[Answered]:
    """The best answer to each question over all windows of its context: a piece of the context as it stands there.

    As the SQuAD scripts decode: the best ``N_BEST`` starts and ends of each window, ends not before starts, at most
    ``MAX_ANSWER_LENGTH`` tokens, a start only in the window that shows most context around it; the highest sum wins.
    The text is cut out of the context by offsets, where the scripts re-align detokenised text.
    """
    best = [(-np.inf, "")] * len(examples)
    null = [np.inf] * len(examples)
    for indices, result in outputs(forward, features.items, SPAN, padding, device, progress=progress):
        starts, ends = _array(result.start_logits), _array(result.end_logits)
        for index, start, end in zip(indices, starts, ends, strict=True):
            feature = features.items[index]
            example = feature.example
            inside = slice(feature.extra.first, feature.extra.first + len(feature.extra.offsets))
            check_finite(np.concatenate([start[:1], end[:1], start[inside], end[inside]]), example)
            null[example] = min(null[example], float(start[0] + end[0]))
            found = best_span(start, end, feature)
            if found is not None and found[0] > best[example][0]:
                offsets = feature.extra.offsets
                context = examples[example].context
                best[example] = (found[0], context[offsets[found[1], 0] : offsets[found[2], 1]].strip())
    return [Answered(text, float(n - s) if np.isfinite(s) else np.inf) for (s, text), n in zip(best, null, strict=True)]


def best_span(start: npt.NDArray[np.float32], end: npt.NDArray[np.float32], feature: Feature) -> Any:
    """(score, first token, last token) of a window's best span, tokens counted in the window; None without one.

    Args:
        start, end: [length] logits of the row.
        feature: with its :class:`~xfast.stilts.features.Window`.
    """
    window = feature.extra
    count = len(window.offsets)
    if not count:
        return None
    inside = slice(window.first, window.first + count)
    first, last = start[inside].astype(np.float64), end[inside].astype(np.float64)
    first = np.where(window.best, first, -np.inf)
    starts, ends = (np.argsort(-scores, kind="stable")[:N_BEST] for scores in (first, last))
    scores = first[starts][:, None] + last[ends][None, :]
    length = ends[None, :] - starts[:, None] + 1
    scores[(length < 1) | (length > MAX_ANSWER_LENGTH)] = -np.inf
    which = int(scores.argmax())
    if not np.isfinite(scores.flat[which]):
        return None
    i, j = divmod(which, len(ends))
    return float(scores[i, j]), int(starts[i]), int(ends[j])


def vectors(
    encoder: Forward,
    rows: Sequence[Ids],
    padding: Padding,
    device: torch.device,
    *,
    pooling: str = "mean",
    second: Sequence[int] | None = None,
    progress: Any = None,
) -> npt.NDArray[np.float32]:
    """[rows, hidden_size] one vector a text, not normalised: the mean of its tokens' states.

    ``<s>`` and ``</s>`` are included, as in XTREME's scripts. ``pooling="cls"`` takes the first token's state instead.
    """
    found: list[Any] = [None] * len(rows)
    second = second or [len(row) for row in rows]
    for indices in by_length([len(row) for row in rows], TOKENS_PER_BATCH):
        batch = pad_rows([rows[i] for i in indices], [second[i] for i in indices], padding)
        with torch.no_grad():  # not inference mode: sharded weights, gathered here, are trained on
            states = encoder(**_to(batch, device)).last_hidden_state.float()
        if pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = batch["attention_mask"].to(device, torch.float32)[:, :, None]
            pooled = (states * mask).sum(1) / mask.sum(1)
        for index, row in zip(indices, _array(pooled), strict=True):
            check_finite(row, index, "a vector")
            found[index] = row
        if progress is not None:
            progress(len(indices))
    return np.stack(found) if found else np.zeros((0, 0), np.float32)


def padding_of(model: Any, tokenizer: Any) -> Padding:
    """How a model's batches are padded."""
    types = getattr(model.config, "type_vocab_size", 1)
    return Padding(tokenizer.pad_token_id, token_types=(types or 0) > 1)
