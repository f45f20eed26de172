"""Tiny models of every family and head, with explicit configurations and non-trivial weights, and ragged batches."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference import quantize_groups
from torch import nn

import xfast

PREFIXES = {"xlm-roberta": "XLMRoberta", "roberta": "Roberta", "camembert": "Camembert", "bert": "Bert"}
PREFIXES["xlm-roberta-xl"] = "XLMRobertaXL"
ENDINGS = {
    "base": "Model",
    "base-no-pooler": "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "multiple-choice": "ForMultipleChoice",
    "masked-lm": "ForMaskedLM",
}
FAMILIES = ("xlm-roberta", "roberta", "camembert", "bert")
ALL_FAMILIES = tuple(PREFIXES)
"""With the pre-norm one, which not every backend runs."""
HEADS = tuple(ENDINGS)
TASK_HEADS = HEADS[2:]
TOKEN_HEADS = ("token-classification", "question-answering", "masked-lm")
FIRST_HEADS = ("sequence-classification", "multiple-choice")

VOCAB, LABELS, CHOICES = 101, 3, 2
BOS, PAD, EOS = 0, 1, 2  # as in XLM-R; BERT's own pad id is 0
LENGTHS = (9, 1, 17, 13)  # of the default ragged batch

ALTCLIP_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 100,
    "max_position_embeddings": 40,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "project_dim": 24,
}
ALTCLIP_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
}


def one_thread() -> Iterator[None]:
    """For ``pytest.fixture(autouse=True)(one_thread)``: torch on one thread.

    Its OpenMP barriers make tiny models some 50 times slower when another process keeps a core busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick_settings() -> Iterator[None]:
    """For ``pytest.fixture(autouse=True)(quick_settings)``: no gradients, xfast on two threads, torch on one."""
    xfast.set_num_threads(2)
    with torch.no_grad():
        yield from one_thread()
    xfast.set_num_threads(None)


def make_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """A tiny configuration with every size explicit: the classes' defaults are no real checkpoint's values."""
    bert = family == "bert"
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 100,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 40,
        "type_vocab_size": 2 if bert else 1,
        "layer_norm_eps": 1e-12 if bert else 1e-5,
        "pad_token_id": 0 if bert else PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "num_labels": LABELS,
    }
    return getattr(transformers, PREFIXES[family] + "Config")(**{**values, **changes})


def randomise(model: nn.Module, seed: int) -> None:
    """Gives every parameter a value that matters: biases are not 0, gains not 1, attention not uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            scale = 0.7 if "embeddings" in name else parameter.shape[1] ** -0.5
            value = noise * scale
        elif name.endswith("weight"):  # a LayerNorm's gain
            value = 1 + 0.3 * noise
        else:
            value = 0.3 * noise
        with torch.no_grad():
            parameter.copy_(value)


def build(
    family: str = "xlm-roberta", head: str = "base", *, seed: int = 0, attention: str = "sdpa", **changes: Any
) -> Any:
    """A seeded model in eval mode. ``changes`` override the configuration."""
    if head == "question-answering":
        changes.setdefault("num_labels", 2)
    config = make_config(family, **changes)
    config._attn_implementation = attention
    cls = getattr(transformers, PREFIXES[family] + ENDINGS[head])
    model = cls(config, add_pooling_layer=head == "base") if ENDINGS[head] == "Model" else cls(config)
    randomise(model, seed)
    return model.eval()


def text_tower(**changes: Any) -> Any:
    """AltCLIP's text model: encoder, LayerNorm, projection of every token; column 0 is the text's embedding."""
    model = transformers.AltCLIPTextModel(transformers.AltCLIPTextConfig(**{**ALTCLIP_TEXT, **changes}))
    randomise(model, 0)
    return model.eval()


def alt_clip() -> Any:
    """AltCLIP with both towers."""
    config = transformers.AltCLIPConfig(text_config=ALTCLIP_TEXT, vision_config=ALTCLIP_VISION, projection_dim=16)
    model = transformers.AltCLIPModel(config)
    randomise(model, 0)
    return model.eval()


def fallbacks(model: Any) -> dict[str, int]:
    """Calls that ran the original code, by reason, over all encoders inside ``model``."""
    return xfast.explain(model).fallbacks


def engine_outputs(model: Any) -> list[torch.Tensor]:
    """Fills, at every later call of an accelerated model, with the packed rows that its engine returns."""
    engine = encoder_of(model).__dict__["forward"].plan.engine
    run, seen = engine.run, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        seen.append(result[0])
        return result

    engine.run = spy
    return seen


def encoder_of(model: nn.Module) -> Any:
    """The encoder inside a model with or without a head."""
    return model.base_model


def ragged(
    family: str = "xlm-roberta", lengths: Sequence[int] = LENGTHS, *, seed: int = 0, vocab: int = VOCAB
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of sequences padded on the right; real ids differ from the pad id."""
    generator = torch.Generator().manual_seed(seed)
    pad = 0 if family == "bert" else PAD
    rows, width = len(lengths), max(lengths, default=0)
    ids = torch.randint(3, vocab, (rows, width), generator=generator)
    mask = torch.arange(width).expand(rows, width) < torch.tensor(lengths, dtype=torch.long).view(rows, 1)
    ids[~mask] = pad
    return {"input_ids": ids, "attention_mask": mask.long()}


def left_padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same sequences with their padding on the left."""
    lengths = batch["attention_mask"].sum(1).tolist()
    rolled = {}
    for name, values in batch.items():
        width = values.shape[1]
        rows = [row.roll(width - length) for row, length in zip(values, lengths, strict=True)]
        rolled[name] = torch.stack(rows)
    return rolled


def arguments(family: str, head: str, lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A ragged batch in the shape that the head takes: multiple choice has a dimension of choices."""
    batch = ragged(family, lengths, seed=seed)
    if head == "multiple-choice":
        return {name: values.view(-1, CHOICES, values.shape[-1]) for name, values in batch.items()}
    return batch


def labels(head: str, batch: dict[str, torch.Tensor], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Labels for the head's loss; padding is labelled -100, as data collators do."""
    generator = torch.Generator().manual_seed(seed)
    mask = batch["attention_mask"].cpu()
    rows = mask.shape[0]
    if head in FIRST_HEADS:
        count = CHOICES if head == "multiple-choice" else LABELS
        return {"labels": torch.randint(0, count, (rows,), generator=generator)}
    if head == "question-answering":
        spans = torch.randint(0, int(mask.sum(1).min()), (2, rows), generator=generator)
        return {"start_positions": spans[0], "end_positions": spans[1]}
    count = VOCAB if head == "masked-lm" else LABELS
    return {"labels": torch.randint(0, count, mask.shape, generator=generator).masked_fill(mask == 0, -100)}


def outputs_of(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a transformers output by name, tuples flattened to ``name.index``."""
    tensors = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None:
            tensors.update({f"{name}.{i}": item for i, item in enumerate(value) if item is not None})
    return tensors


def at_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values at real tokens when ``values`` has one per token, else all of them."""
    return values[mask.bool()] if values.shape[: mask.dim()] == mask.shape else values


def assert_alike(got: Any, want: Any, limit: float = 1e-5) -> int:
    """The same structure, texts and whole numbers; floats within ``limit``. Returns how many floats there were."""
    if isinstance(want, Mapping):
        assert list(got) == list(want)
        return sum(assert_alike(got[key], value, limit) for key, value in want.items())
    if isinstance(want, list | tuple):
        assert len(got) == len(want)
        return sum(assert_alike(ours, theirs, limit) for ours, theirs in zip(got, want, strict=True))
    if isinstance(want, float | np.floating):
        assert math.isclose(got, want, rel_tol=limit, abs_tol=limit)
        return 1
    if isinstance(want, np.ndarray | torch.Tensor):
        assert error(torch.as_tensor(got), torch.as_tensor(want)) <= limit
        return torch.as_tensor(want).numel()
    assert got == want
    return 0


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the scale (largest value) of ``want``."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-12))


def norm_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """``||got - want|| / ||want||``."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    return float((got.double() - want.double()).norm() / want.double().norm())


def token_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """What ``tolerance`` means: root mean square error of tokens [T, hidden_size] over their standard deviation."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    squares = (got.double() - want.double()).square().sum(1).mean()
    return float((squares / want.double().var(0, correction=1).sum()).sqrt())


class _SimulatedLinear(nn.Linear):
    """Plain 8-bit products: weights per output channel (int4: 4 bits, per 64 inputs), activations per token."""

    precision: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.precision != "int4":
            operands = _quantised(x, self.precision), _quantised(self.weight, self.precision)
            return nn.functional.linear(*operands, self.bias)
        q, scale = quantize_groups(self.weight.detach().numpy(), 64)
        weight = torch.from_numpy((q * scale[..., None]).astype(np.float32)).flatten(1)[:, : self.in_features]
        return nn.functional.linear(_quantised(x, "int8"), weight, self.bias)


def _quantised(x: torch.Tensor, precision: str) -> torch.Tensor:
    """int8 in [-127, 127], or e4m3, whose largest value is 448."""
    top = 127 if precision == "int8" else 448
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
    scaled = (x / scale).clamp(-top, top)
    return (scaled.round() if precision == "int8" else scaled.to(torch.float8_e4m3fn).to(x.dtype)) * scale


def simulated(model: nn.Module, precision: str) -> Any:
    """A copy whose encoder layers round products' operands to ``"int8"``, ``"int4"`` or ``"fp8"`` in plain PyTorch."""
    clone = copy.deepcopy(model)
    for module in encoder_of(clone).encoder.modules():
        if type(module) is nn.Linear:
            module.__class__, module.precision = _SimulatedLinear, precision
    return clone


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_growth(call: Callable[[], Any]) -> tuple[Any, int]:
    """The call's result, and how far resident memory rose above its start while it ran."""
    start = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    peak = max(peak, resident())
    done.set()
    watcher.join()
    return result, peak - start


def simulated_int8(model: nn.Module) -> Any:
    """What xfast's int8 is measured against."""
    return simulated(model, "int8")
