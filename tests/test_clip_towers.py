"""Text towers of multilingual CLIPs: an XLM-R encoder inside a model that reads it in its own way."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import (
    LENGTHS,
    alt_clip,
    at_tokens,
    build,
    error,
    fallbacks,
    left_padded,
    norm_error,
    quick_settings,
    ragged,
    simulated_int8,
    text_tower,
)
from torch import nn

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

PRECISIONS = ("fp32", "bf16", "int8")
FP32_ERROR = 1e-5


class MultilingualCLIP(nn.Module):
    """As in the package multilingual_clip: AutoModel with its pooler, mean over real tokens, one linear layer."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.LinearTransformation = nn.Linear(64, 24)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        states, mask = self.transformer(**batch)[0], batch["attention_mask"]
        mean = (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1)[:, None]
        return self.LinearTransformation(mean)


# --- AltCLIP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_altclip_text_tower_equals_the_original(precision: str) -> None:
    model, batch = text_tower(), ragged()
    tokens = batch["attention_mask"]
    want = model(**batch)
    plain = copy.deepcopy(model)
    if precision == "int8":
        plain.roberta = simulated_int8(plain.roberta)
    simulated = (plain.to(torch.bfloat16) if precision == "bf16" else plain)(**batch)
    got = xfast.accelerate(model, precision=precision)(**batch)
    assert fallbacks(model) == {} and "AltRobertaModel (altclip): backend native" in str(xfast.explain(model))
    assert list(got) == list(want)
    for name in ("last_hidden_state", "pooler_output"):
        ours, theirs = (norm_error(at_tokens(o[name], tokens), at_tokens(want[name], tokens)) for o in (got, simulated))
        assert ours <= {"fp32": FP32_ERROR, "bf16": 2 * theirs, "int8": 1.2 * theirs}[precision], name


def test_altclip_hidden_states_equal_the_original() -> None:
    model, batch = text_tower(), ragged()
    tokens = batch["attention_mask"]
    want = model(**batch, output_hidden_states=True).hidden_states
    got = xfast.accelerate(model)(**batch, output_hidden_states=True).hidden_states
    assert fallbacks(model) == {} and len(got) == len(want) == 4
    for ours, theirs in zip(got, want, strict=True):
        assert error(at_tokens(ours, tokens), at_tokens(theirs, tokens)) <= FP32_ERROR


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_altclip_runs_fewer_layers(layers: int) -> None:
    model, shorter, batch = text_tower(), text_tower(), ragged()
    encoder = shorter.roberta.encoder
    kept = encoder.layers if hasattr(encoder, "layers") else encoder.layer  # transformers 5 and 4
    del kept[layers:]
    got = xfast.accelerate(model, layers=layers)(**batch)
    assert fallbacks(model) == {} and f"layers: {layers} of 3" in str(xfast.explain(model))
    assert error(got.pooler_output, shorter(**batch).pooler_output) <= FP32_ERROR


def test_altclip_reads_column_0_even_where_it_is_masked() -> None:
    # of padding on the left, whose value the original's pooled output is
    model, batch = text_tower(), left_padded(ragged())
    want = model(**batch).pooler_output
    got = xfast.accelerate(model)(**batch).pooler_output
    assert error(got, want) <= FP32_ERROR
    assert fallbacks(model) == {"column 0 is masked in a row whose first token is read": 1}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_altclip_towers_give_the_originals_logits(precision: str) -> None:
    model, batch = alt_clip(), ragged()
    pixels = torch.randn(2, 3, 8, 8)
    want = model(**batch, pixel_values=pixels)
    got = xfast.accelerate(model, precision=precision)(**batch, pixel_values=pixels)
    assert fallbacks(model) == {} and [e.family for e in xfast.explain(model).encoders] == ["altclip"]
    limit = {"fp32": FP32_ERROR, "bf16": 2e-2, "int8": 4e-2}[precision]
    for name in ("logits_per_text", "logits_per_image", "text_embeds"):
        assert norm_error(got[name], want[name]) <= limit, name
    assert torch.equal(got.image_embeds, want.image_embeds)  # the vision tower is not xfast's
    xfast.restore(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(**batch, pixel_values=pixels).logits_per_text, want.logits_per_text)


def test_altclip_changes_copies_and_pickles() -> None:
    model, batch = xfast.accelerate(text_tower()), ragged()
    first = model(**batch).pooler_output
    clone, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301
    model.roberta.embeddings.LayerNorm.weight.mul_(1.5)
    changed = model(**batch).pooler_output
    assert not torch.equal(changed, first) and fallbacks(model) == {}
    assert error(changed, xfast.restore(model)(**batch).pooler_output) <= FP32_ERROR
    for other in (clone, again):
        assert torch.equal(other(**batch).pooler_output, first) and fallbacks(other) == {}


def test_altclip_weights_may_be_given_up() -> None:
    model, batch = text_tower(), ragged()
    want = xfast.accelerate(model)(**batch).pooler_output
    xfast.accelerate(xfast.restore(model), keep_weights=False)
    assert torch.equal(model(**batch).pooler_output, want)


def test_altclip_on_triton() -> None:
    device = pytest.importorskip("gpu").DEVICE
    model = text_tower().to(device)
    batch = {name: value.to(device) for name, value in ragged(lengths=(9, 3)).items()}
    want = model(**batch).pooler_output
    got = xfast.accelerate(model, backend="triton")(**batch).pooler_output
    assert fallbacks(model) == {} and error(got.cpu(), want.cpu()) <= FP32_ERROR


# --- M-CLIP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_mclip_equals_the_original(side: str, precision: str, family: str) -> None:
    model = MultilingualCLIP(build(family)).eval()
    batch = ragged(lengths=LENGTHS * 8)
    batch = left_padded(batch) if side == "left" else batch
    want = model(batch)
    assert xfast.accelerate(model, precision=precision) is model
    got = model(batch)
    assert [encoder.family for encoder in xfast.explain(model).encoders] == [family]
    # its AutoModel has a pooler, whose output nobody reads but which reads column 0
    assert bool(fallbacks(model)) == (side == "left")
    limit = {"fp32": FP32_ERROR, "bf16": 1e-2, "int8": 2e-2}[precision]
    assert norm_error(got, want) <= limit
