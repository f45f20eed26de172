"""``attn_implementation="xfast"`` in stock models, and ``accelerate(training=True)``: values, gradients, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from gpu import DEVICE
from models import PAD, arguments, at_tokens, build, fallbacks, labels, left_padded, norm_error, ragged

import xfast
from xfast.attention_interface import attention_forward


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def model_of(family: str = "xlm-roberta", head: str = "base-no-pooler", **changes: Any) -> Any:
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2, **changes}
    return build(family, head, **changes).to(DEVICE)


@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_an_encoder_with_our_attention(family: str) -> None:
    model = model_of(family)
    batches = [moved(ragged(family)), moved(left_padded(ragged(family)))]
    batches.append({"input_ids": batches[0]["input_ids"]})
    with torch.no_grad():
        wants = [model(**batch)[0] for batch in batches]
        model.set_attn_implementation("xfast")
        for batch, want in zip(batches, wants, strict=True):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            assert norm_error(at_tokens(model(**batch)[0], mask), at_tokens(want, mask)) <= 1e-5


def test_another_familys_encoder() -> None:
    config = transformers.ElectraConfig(
        vocab_size=50, embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40,        max_position_embeddings=40, pad_token_id=PAD,
    )  # fmt: skip
    model = transformers.ElectraModel(config).eval().to(DEVICE)
    batch = moved(ragged(vocab=50))
    with torch.no_grad():
        want = model(**batch)[0]
        model.set_attn_implementation("xfast")
        got = model(**batch)[0]
    assert norm_error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def test_gradients_through_a_stock_model() -> None:
    def gradients(name: str) -> dict[str, torch.Tensor]:
        model = model_of(head="token-classification").train()
        model.set_attn_implementation(name)
        batch = moved(ragged())
        model(**batch, **moved(labels("token-classification", batch))).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    want, got = gradients("sdpa"), gradients("xfast")
    assert want.keys() == got.keys()
    for key in want:  # a gradient that is zero but for rounding (a key's bias) has no relative error
        assert float((got[key] - want[key]).norm()) <= 1e-4 * float(want[key].norm()) + 1e-6, key


def test_a_head_size_without_a_kernel_runs_torchs_attention() -> None:
    model = model_of(hidden_size=48)  # head_dim 24
    batch = moved(ragged())
    with torch.no_grad():
        want = model(**batch)[0]
        model.set_attn_implementation("xfast")
        got = model(**batch)[0]
    assert norm_error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= 1e-5


def test_what_it_refuses() -> None:
    q = torch.randn(2, 2, 5, 16, device=DEVICE)
    module = torch.nn.Module()
    with pytest.raises(xfast.InvalidInputError, match=r"expected shape \(2, 5\), got \(2, 1, 5, 5\)"):
        attention_forward(module, q, q, q, torch.ones(2, 1, 5, 5))
    with pytest.raises(xfast.UnsupportedModelError, match="self-attention"):
        attention_forward(module, q[:, :, :1], q, q, None)
    module.is_causal = True  # type: ignore[assignment]
    with pytest.raises(xfast.UnsupportedModelError, match="is causal"):
        attention_forward(module, q, q, q, None)


# --- accelerate(training=True) ---------------------------------------------------------------------------------------


def loss_and_gradients(model: Any, head: str, family: str = "xlm-roberta") -> tuple[float, dict[str, torch.Tensor]]:
    batch = moved(arguments(family, head))
    model.zero_grad()
    loss = model(**batch, **moved(labels(head, batch))).loss
    loss.backward()
    return float(loss.detach()), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification", "multiple-choice", "masked-lm"])
@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl", "bert"])
def test_training_gives_the_same_loss_and_gradients(family: str, head: str) -> None:
    model = model_of(family, head).train()
    want_loss, want = loss_and_gradients(model, head, family)
    xfast.accelerate(model, backend="triton", training=True)
    got_loss, got = loss_and_gradients(model, head, family)
    assert fallbacks(model) == {}
    assert abs(got_loss - want_loss) <= 1e-5 * max(1, abs(want_loss))
    assert want.keys() == got.keys()
    for key in want:  # a gradient that is zero but for rounding (a key's bias) has no relative error
        assert float((got[key] - want[key]).norm()) <= 1e-4 * float(want[key].norm()) + 1e-6, key


def test_training_steps_then_inference_see_the_new_weights() -> None:
    model, stock = (model_of(head="sequence-classification").train() for _ in range(2))
    xfast.accelerate(model, backend="triton", training=True)
    batch = moved(ragged())
    for each in (model, stock):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(**batch, **moved(labels("sequence-classification", batch))).loss.backward()
            optimizer.step()
        each.eval()
    with torch.no_grad():
        assert norm_error(model(**batch).logits, stock(**batch).logits) <= 1e-4


def test_dropout_is_repeated_by_the_seed_and_is_off_in_eval() -> None:
    model = model_of(attention_probs_dropout_prob=0.3).train()
    xfast.accelerate(model, backend="triton", training=True)
    batch = moved(ragged())

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(**batch)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_what_cannot_train_packed_runs_the_original_code() -> None:
    model = model_of(head="token-classification").train()
    xfast.accelerate(model, backend="triton", training=True)
    batch = moved(ragged())
    model(**batch, output_attentions=True)
    model.gradient_checkpointing_enable()
    model(**batch)
    assert set(fallbacks(model)) == {"attention weights are asked for", "gradient checkpointing is on"}


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_hidden_states_and_embeddings_while_training(family: str) -> None:
    model = model_of(family)
    batch = moved(ragged())
    embeds = model.embeddings.word_embeddings(batch["input_ids"]).detach().requires_grad_()
    call = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    want = model(**call).hidden_states
    xfast.accelerate(model, backend="triton", training=True)
    got = model(**call).hidden_states
    assert len(want) == len(got)
    for ours, theirs in zip(got, want, strict=True):
        kept = (at_tokens(states.detach(), batch["attention_mask"]) for states in (ours, theirs))
        assert norm_error(*kept) <= 1e-5
    got[-1].sum().backward()
    assert embeds.grad is not None and not embeds.grad[batch["attention_mask"] == 0].any()


def test_options_that_do_not_go_with_training() -> None:
    for options in ({"keep_weights": False}, {"layers": 2}, {"training": "yes"}):
        with pytest.raises(xfast.InvalidOptionError):
            xfast.accelerate(model_of(), **{"training": True, **options})
