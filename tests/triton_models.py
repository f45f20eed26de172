"""Small models on the Triton backend, and what they are held against."""

from __future__ import annotations

from typing import Any

import torch
from gpu import DEVICE
from models import at_tokens, build, norm_error

import xfast

PRE_NORM = "xlm-roberta-xl"


def moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def model_of(family: str = "xlm-roberta", head: str = "base", **changes: Any) -> Any:
    return build(family, head, **{"intermediate_size": 112, "num_hidden_layers": 2, **changes}).to(DEVICE)


def fast(model: Any, **options: Any) -> Any:
    return xfast.accelerate(model, backend="triton", **options)


def first_output(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return model(**batch, **options)[0].float().cpu()


def same_at_tokens(got: torch.Tensor, want: torch.Tensor, batch: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    mask = batch["attention_mask"].cpu()
    if got.shape[: mask.dim()] == mask.shape:
        assert torch.equal(got[mask == 0], torch.zeros_like(got[mask == 0]))
        got, want = at_tokens(got, mask), at_tokens(want, mask)
    assert norm_error(got, want) <= limit
