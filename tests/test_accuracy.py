"""int8 and bf16 accuracy at XLM-R base's real size, on seeded random weights, plain and with planted outliers.

Bounds are those of plain per-token, per-channel W8A8 (0.9997 worst token; mean 0.9987 with outliers), not better ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
from models import make_config
from torch import nn
from torch.nn.functional import cosine_similarity

import xfast

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LENGTHS = (3, 5, 8, 9, 11, 12, 14, 16, 17, 21, 24, 31, 38, 47)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """XLM-R base for token classification with transformers' own initialisation; a small vocabulary saves memory."""
    from transformers import XLMRobertaForTokenClassification

    config = make_config("xlm-roberta", vocab_size=2000, max_position_embeddings=514, num_labels=9, **BASE)
    torch.manual_seed(20)
    return XLMRobertaForTokenClassification(config).eval()


def batch() -> dict[str, torch.Tensor]:
    """Ragged random sequences, right-padded."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(4, 2000, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def outputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of the real tokens: [tokens, hidden_size], [tokens, labels]."""
    given = batch()
    keep = given["attention_mask"].bool()
    with torch.inference_mode():
        result = model(**given, output_hidden_states=True)
    return result.hidden_states[-1][keep], result.logits[keep]


def test_int8_on_seeded_weights(base: nn.Module) -> None:
    hidden, logits = outputs(base)
    with xfast.accelerated(base, precision="int8"):
        hidden8, logits8 = outputs(base)
    cosines = cosine_similarity(hidden8, hidden)
    assert cosines.min() >= 0.999
    # Labels of random heads on every token: random weights give small margins, trained ones larger. The mean over
    # heads is what is stable; two labels are what the bound was stated for (with 9 labels plain W8A8 reaches 0.977).
    agreement = []
    for seed in range(20):
        head = 0.02 * torch.randn(2, 768, generator=torch.Generator().manual_seed(seed))
        labels, labels8 = (hidden @ head.T).argmax(1), (hidden8 @ head.T).argmax(1)
        agreement.append(float((labels == labels8).float().mean()))
    assert sum(agreement) / len(agreement) >= 0.99
    clear = (logits.topk(2).values @ torch.tensor([1.0, -1.0])) > 0.05 * logits.std()
    assert len(logits.argmax(1).unique()) >= 5
    assert (logits.argmax(1) == logits8.argmax(1))[clear].float().mean() >= 0.99


def test_int8_with_outlier_channels(base: nn.Module) -> None:
    channels = torch.randperm(768, generator=torch.Generator().manual_seed(1))[:4]
    gains = [p for name, p in base.named_parameters() if "LayerNorm.weight" in name]
    with torch.no_grad():
        for gain in gains:
            gain[channels] *= 50
    try:
        hidden, _ = outputs(base)
        with xfast.accelerated(base, precision="int8"):
            hidden8, _ = outputs(base)
    finally:
        with torch.no_grad():
            for gain in gains:
                gain[channels] /= 50
    assert cosine_similarity(hidden8, hidden).mean() >= 0.9985
    # the planted channels dominate that cosine; the others must hold on their own
    rest = torch.ones(768, dtype=torch.bool)
    rest[channels] = False
    assert cosine_similarity(hidden8[:, rest], hidden[:, rest]).mean() >= 0.9985


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_floating_point_at_base_size(base: nn.Module, precision: str) -> None:
    hidden, _ = outputs(base)
    with xfast.accelerated(base, precision=precision):
        got, _ = outputs(base)
    error = (got - hidden).abs().max() / hidden.abs().max()
    if precision == "fp32":
        assert error <= 1e-5
        return
    stock = copy.deepcopy(base).to(torch.bfloat16)
    stock_hidden, _ = outputs(stock)
    assert error <= 2 * (stock_hidden.float() - hidden).abs().max() / hidden.abs().max()
