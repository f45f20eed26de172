"""``attn_implementation="xfast"`` in stock models, and ``accelerate(training=True)``: values, gradients, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from gpu import DEVICE
from models import PAD, arguments, at_tokens, build, fallbacks, labels, left_padded, norm_error, one_thread, ragged
from triton_models import moved

import xfast
from xfast import attention_interface, watch
from xfast.attention_interface import attention_forward

_one_thread = pytest.fixture(autouse=True)(one_thread)


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
    for given, name in (({"position_bias": q}, "position_bias"), ({"sliding_window": 4}, "sliding_window")):
        with pytest.raises(xfast.UnsupportedModelError, match=f"Module gives {name}, which"):
            attention_forward(module, q, q, q, None, **given)
    attention_forward(
        module, q, q, q, None, position_ids=q, is_causal=False, position_bias=None, output_attentions=True
    )
    with pytest.raises(xfast.UnsupportedModelError, match="is causal"):
        attention_forward(module, q, q, q, None, is_causal=True)
    module.is_causal = True  # type: ignore[assignment]
    with pytest.raises(xfast.UnsupportedModelError, match="is causal"):
        attention_forward(module, q, q, q, None)


def test_models_whose_attention_is_another_are_refused() -> None:
    """A relative bias, causal attention asked for by an argument, and a mask that restricts who sees whom."""
    from transformers.masking_utils import create_bidirectional_mask

    small = {"vocab_size": 50, "num_layers": 1, "num_heads": 2, "d_model": 32, "d_kv": 16, "d_ff": 32}
    t5 = transformers.T5EncoderModel(transformers.T5Config(**small)).eval().to(DEVICE)
    small = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "eos_token_id": 2}
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(intermediate_size=32, **small)).to(DEVICE)
    batch = moved(ragged(vocab=50))
    for model in (t5, clip):
        try:
            model.set_attn_implementation("xfast")
        except ValueError:  # releases in which its attention cannot be chosen
            continue
        with torch.no_grad(), pytest.raises(xfast.UnsupportedModelError, match="xfast"):
            model(**batch)
    model = model_of()
    model.set_attn_implementation("xfast")
    states = torch.zeros(2, 5, 32, device=DEVICE)
    mask = torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    kept = create_bidirectional_mask(model.config, states, mask)
    assert kept is not None and kept.shape == (2, 5)
    with pytest.raises(xfast.UnsupportedModelError, match="every token sees every other"):
        create_bidirectional_mask(model.config, states, mask, and_mask_function=lambda b, h, q, k: q >= k)


def test_rows_of_padding_are_the_originals() -> None:
    """SigLIP's text model reads its last row, which may be padding."""
    small = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    config = transformers.SiglipTextConfig(intermediate_size=40, max_position_embeddings=20, **small)
    model = transformers.SiglipTextModel(config).eval().to(DEVICE)
    batch = moved(ragged(vocab=50))
    with torch.no_grad():
        want = model(**batch)
        model.set_attn_implementation("xfast")
        got = model(**batch)
    assert norm_error(got.pooler_output, want.pooler_output) <= 1e-5
    assert norm_error(got.last_hidden_state, want.last_hidden_state) <= 1e-5


@pytest.mark.parametrize("head_dim", [16, 48])
def test_queries_of_other_tokens_than_the_keys(head_dim: int) -> None:
    """In cross-attention with as many queries as keys the mask says nothing of queries; one sequence has no key."""
    q, k, v = (torch.randn(3, 2, 11, head_dim, device=DEVICE, requires_grad=True) for _ in range(3))
    mask = torch.ones(3, 11, dtype=torch.long, device=DEVICE)
    mask[0, 6:], mask[1, :4], mask[2] = 0, 0, 0
    keep = mask.bool()[:2, None, None, :]
    want = torch.nn.functional.scaled_dot_product_attention(q[:2], k[:2], v[:2], attn_mask=keep).transpose(1, 2)
    got, _ = attention_forward(torch.nn.Module(), q, k, v, mask)
    assert norm_error(got[:2].detach(), want.detach()) <= 1e-5 and not got[2].any()
    weights = torch.randn_like(got)
    wants = torch.autograd.grad((want * weights[:2]).sum(), (q, k, v))
    for ours, theirs in zip(torch.autograd.grad((got * weights).sum(), (q, k, v)), wants, strict=True):
        assert norm_error(ours, theirs) <= 1e-5


def test_masks_for_other_queries_than_the_keys_are_refused() -> None:
    """SigLIP 2's pooling head asks for the mask of one query and repeats its rows."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = transformers.Siglip2VisionConfig(patch_size=2, num_patches=16, **small)
    model = transformers.Siglip2VisionModel(config).eval().to(DEVICE)
    model.set_attn_implementation("xfast")
    mask = torch.ones(2, 16, dtype=torch.long, device=DEVICE)
    mask[1, 9:] = 0
    shapes = torch.tensor([[4, 4], [3, 3]], device=DEVICE)
    with torch.no_grad(), pytest.raises(xfast.UnsupportedModelError, match="a mask for 1 queries and 16 keys"):
        model(torch.randn(2, 16, 12, device=DEVICE), mask, shapes)


def test_a_packing_that_was_made_without_gradients_is_not_saved_for_them() -> None:
    q = torch.randn(2, 2, 5, 16, device=DEVICE, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=DEVICE)
    with torch.inference_mode():
        attention_forward(torch.nn.Module(), q, q, q, mask)
    attention_forward(torch.nn.Module(), q, q, q, mask)[0].sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_is_packed_once_a_forward(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfast.kernels import packing

    calls: list[int] = []
    own = packing.unpad
    monkeypatch.setattr(packing, "unpad", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    model, batch = model_of(), moved(ragged())
    with mode():
        mask = batch["attention_mask"].clone()
        for columns in (17, 5):
            mask[:, columns:] = 0
            call = {**batch, "attention_mask": mask}
            model.set_attn_implementation("sdpa")
            want = model(**call)[0]
            model.set_attn_implementation("xfast")
            calls.clear()
            assert norm_error(at_tokens(model(**call)[0], mask), at_tokens(want, mask)) <= 1e-5
            assert len(calls) == 1


def test_compiled_graphs_keep_no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a compiled graph a mask of the same shape, alive as the last one is, would be the same mask."""
    from xfast.kernels import packing

    def unpad(_batch: int, _length: int, _device: Any, _ids: Any, mask: torch.Tensor, *_: Any, **__: Any) -> Any:
        real = mask.reshape(-1) != 0  # dynamo does not trace Triton's interpreter
        lengths = torch.cat([real.new_zeros(1, dtype=torch.int32), (mask != 0).sum(1).cumsum(0).int()])
        return SimpleNamespace(source=torch.argsort(~real, stable=True).int(), cu_seqlens=lengths, info=lengths[-1:])

    monkeypatch.setattr(packing, "unpad", unpad)
    compiled = torch.compile(attention_interface._packing, backend="eager")
    masks = [torch.tensor(rows) for rows in ([[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]], [[1, 1, 0], [1, 0, 0]])]
    for mask in masks * 3:
        for _layer in range(2):
            assert compiled(mask)[1].tolist() == [0, *mask.sum(1).cumsum(0).tolist()]


def test_no_value_is_read_from_the_device_in_a_forward() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(function):
                Reads.count += 1
            return function(*args, **(kwargs or {}))

    model = model_of()
    model.set_attn_implementation("xfast")
    batch = moved(ragged())
    with torch.no_grad(), Reads():
        model(**batch)
    assert Reads.count == 0


def test_a_batch_of_one_and_heads_that_lie_together() -> None:
    for batch in (1, 2):
        fused = torch.randn(batch, 7, 2, 3 * 16, device=DEVICE)
        for q, k, v in (
            (t.transpose(1, 2) for t in fused.chunk(3, -1)),
            (t.transpose(1, 2).contiguous() for t in fused.chunk(3, -1)),
        ):
            got, _ = attention_forward(torch.nn.Module(), q, k, v, None)
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            assert norm_error(got, want) <= 1e-5


def test_types_that_autocast_left_apart() -> None:
    q = torch.randn(2, 2, 5, 16, device=DEVICE)
    with torch.autocast(q.device.type, torch.bfloat16):
        got, _ = attention_forward(torch.nn.Module(), q, q, q.bfloat16(), None)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)
    assert got.dtype == torch.bfloat16 and norm_error(got.float(), want) <= 2e-2


def test_dropping_everything_leaves_nothing() -> None:
    q = torch.randn(2, 2, 5, 16, device=DEVICE, requires_grad=True)
    got, _ = attention_forward(torch.nn.Module(), q, q, q, None, dropout=1.0)
    got.sum().backward()
    assert not got.detach().any() and q.grad is not None and not q.grad.any()


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


@pytest.mark.parametrize("precision", ["model", "bf16"])
def test_fused_optimizers_are_noticed(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They move no version counter, and values on a GPU are not sampled: their step itself is what tells."""
    monkeypatch.setattr(watch, "_sampled", lambda tensor: False)
    model, stock = (model_of(head="sequence-classification").train() for _ in range(2))
    xfast.accelerate(model, backend="triton", precision=precision, training=True)
    batch = moved(ragged())
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01, fused=True) for each in (model, stock)]
    for _ in range(3):
        for each, optimizer in zip((model, stock), optimizers, strict=True):
            each.train()
            loss = each(**batch, **moved(labels("sequence-classification", batch))).loss
            each.eval()
            with torch.no_grad():  # packs between forward and step: the step must be noticed all the same
                each(**batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            assert norm_error(model(**batch).logits, stock(**batch).logits) <= (1e-4 if precision == "model" else 0.05)
    engine = model.base_model.__dict__["forward"].plan.engine
    other = torch.optim.AdamW(model_of().parameters(), lr=0.01, fused=True)
    other.step()  # somebody else's model: nothing is packed anew
    with torch.no_grad():
        model(**batch)
    assert model.base_model.__dict__["forward"].plan.engine is engine


@pytest.mark.parametrize("change", ["forward", "wrapped"])
def test_layers_that_are_wrapped_later_train_as_they_are(change: str) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.inner(*args, **kwargs)

    model = model_of().train()
    xfast.accelerate(model, backend="triton", training=True)
    batch = moved(ragged())
    model(**batch)
    assert fallbacks(model) == {}
    layer = model.encoder.layer[1]
    if change == "wrapped":
        model.encoder.layer[1] = wrapper = Wrapper(layer)
    else:
        calls = []
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    model(**batch)
    assert (wrapper.calls if change == "wrapped" else len(calls)) == 1
    assert set(fallbacks(model)) == {"layers were wrapped or replaced since xfast.accelerate"}


def test_attention_drops_as_its_module_says() -> None:
    batch = moved(ragged())
    model = model_of(attention_probs_dropout_prob=0.5).train()
    xfast.accelerate(model, backend="triton", training=True)
    for on in (False, True):
        for module in model.modules():
            module.train(on != isinstance(module, torch.nn.Dropout))
        runs = [model(**batch)[0] for _ in range(2)]
        assert torch.equal(*runs) != on
    assert fallbacks(model) == {}


def test_an_input_on_another_device_is_left_to_the_original() -> None:
    model = model_of().train()
    xfast.accelerate(model, backend="triton", training=True)
    batch = {**moved(ragged()), "attention_mask": ragged()["attention_mask"].to("meta")}
    with pytest.raises((RuntimeError, NotImplementedError)):  # torch's own
        model(**batch)
    assert set(fallbacks(model)) == {f"an input is on meta, the model on {next(model.parameters()).device}"}


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
