"""Accelerated models inside ``torch.compile``, ``torch.export`` and ``torch.jit``: never broken, never wrong."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    TOKEN_HEADS,
    arguments,
    at_tokens,
    build,
    encoder_of,
    error,
    fallbacks,
    labels,
    left_padded,
    quick_settings,
    ragged,
)

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any, *, fullgraph: bool = True, backend: str = "eager", **options: Any) -> Any:
    """Traces as any backend would; the "eager" one then runs the graph as it is, which needs no C++ compiler."""
    return torch.compile(model, fullgraph=fullgraph, backend=backend, **options)


def assert_same(got: torch.Tensor, want: torch.Tensor, batch: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    """Equal at real tokens."""
    assert error(at_tokens(got, batch["attention_mask"]), at_tokens(want, batch["attention_mask"])) <= limit


@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_compiled_losses_over_padding_are_the_originals(head: str) -> None:
    model, batch = build(head=head), ragged()
    asked = labels(head, batch)
    if "labels" in asked:
        asked["labels"].clamp_min_(0)  # padding counts
    want = model(**batch, **asked).loss
    for fullgraph in (True, False):
        torch.compiler.reset()
        got = compiled(xfast.accelerate(model), fullgraph=fullgraph)(**batch, **asked).loss
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    logits = model(**batch)[0]
    assert not logits[batch["attention_mask"] == 0].any()  # later calls are accelerated


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
@pytest.mark.parametrize("head", HEADS)
def test_compiled_models_give_the_originals_outputs(head: str, family: str) -> None:
    model, batch = build(family, head), arguments(family, head)
    want = model(**batch)
    fast = compiled(xfast.accelerate(model))
    got = fast(**batch)
    assert list(got) == list(want)
    for name, values in want.items():
        assert_same(got[name], values, batch)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks allowed", "fullgraph"])
def test_compiled_before_and_after_the_first_call(fullgraph: bool, mode: Callable[[], Any]) -> None:
    model, batch = build(head="sequence-classification"), ragged()
    want = model(**batch).logits
    xfast.accelerate(model)
    with mode():
        cold = compiled(model, fullgraph=fullgraph)(**batch).logits
        model(**batch)
        torch.compiler.reset()
        warm = compiled(model, fullgraph=fullgraph)(**batch).logits
    assert_same(cold, want, batch)
    assert torch.equal(cold, warm)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_encoder_is_one_operator_of_the_graph(fullgraph: bool) -> None:
    model, graphs = xfast.accelerate(build(head="sequence-classification")), []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(model, fullgraph=fullgraph, backend=record)(**ragged())
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("xfast" in call for call in calls) == 1
    assert not any("attention" in call or "layer_norm" in call for call in calls)


@pytest.mark.slow
def test_default_backend() -> None:
    model, batch = build(head="token-classification"), ragged()
    want = model(**batch).logits
    got = compiled(xfast.accelerate(model), backend="inductor")(**batch).logits
    assert_same(got, want, batch)


def test_dynamic_shapes() -> None:
    model = build()
    batches = [ragged(lengths=lengths) for lengths in [(4, 3), (7, 7, 1), (20,), (2, 2, 9, 5, 5)]]
    want = [model(**batch)[0] for batch in batches]
    fast = compiled(xfast.accelerate(model), dynamic=True)
    for batch, values in zip(batches, want, strict=True):
        assert_same(fast(**batch)[0], values, batch)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("head", ["base", "sequence-classification", "multiple-choice", "masked-lm"])
def test_masked_first_columns(head: str) -> None:
    model, batch = build(head=head), arguments("xlm-roberta", head)
    flat = left_padded({name: values.view(-1, values.shape[-1]) for name, values in batch.items()})
    batch = {name: flat[name].view(values.shape) for name, values in batch.items()}
    want = model(**batch)
    got = compiled(xfast.accelerate(model), fullgraph=False)(**batch)
    for name, values in want.items():
        assert_same(got[name], values, batch)


def test_call_arguments() -> None:
    model, batch = build("bert"), ragged("bert")
    extra = {"token_type_ids": torch.randint(0, 2, (4, 17)), "position_ids": torch.arange(17).flip(0)[None]}
    want = model(**batch, **extra)
    xfast.accelerate(model)
    fast = compiled(model)
    assert_same(fast(**batch, **extra)[0], want[0], batch)
    states = model(**batch, output_hidden_states=True).hidden_states
    got = compiled(model, fullgraph=False)(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(states) == 4
    for ours, plain in zip(got, states, strict=True):
        assert_same(ours, plain, batch)
    embeds = model.embeddings.word_embeddings(batch["input_ids"])
    got = compiled(model, fullgraph=False)(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert_same(got[0], model(**batch)[0], batch)
    as_tuple = fast(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 2


def test_precision_and_layers_hold_in_the_graph() -> None:
    model, batch = xfast.accelerate(build(), precision="int8", layers=2), ragged()
    want = model(**batch).last_hidden_state
    assert torch.equal(compiled(model)(**batch).last_hidden_state, want)


def test_half_precision_models() -> None:
    model, batch = xfast.accelerate(build().to(torch.bfloat16)), ragged()
    want = model(**batch)
    got = compiled(model)(**batch)
    assert got[0].dtype == torch.bfloat16 and torch.equal(got[0], want[0])


def test_changed_weights_are_noticed() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    fast = compiled(model)
    before = fast(**batch)[0]
    encoder_of(model).encoder.layer[0].output.dense.weight.mul_(1.5)
    after = fast(**batch)[0]
    assert not torch.equal(after, before)
    assert_same(after, xfast.restore(model)(**batch)[0], batch)


def test_restored_and_accelerated_again() -> None:
    model, batch = build(), ragged()
    want = model(**batch)[0]
    fast = compiled(xfast.accelerate(model), fullgraph=False)
    assert_same(fast(**batch)[0], want, batch)
    xfast.restore(model)
    gc.collect()
    assert_same(fast(**batch)[0], want, batch)
    xfast.accelerate(model, precision="int8")
    assert torch.equal(fast(**batch)[0], model(**batch)[0])


def test_gradients() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    fast = compiled(model, fullgraph=False)
    with torch.enable_grad():
        fast(**batch).last_hidden_state.sum().backward()
    assert encoder_of(model).encoder.layer[0].output.dense.weight.grad is not None
    assert_same(fast(**batch)[0], model(**batch)[0], batch)


def test_dropout_in_eval_mode() -> None:
    model, batch = xfast.accelerate(build(head="base-no-pooler")), ragged()
    for layer in model.encoder.layer:
        layer.output.dropout.train()
    fast = compiled(model, fullgraph=False)
    assert not torch.equal(fast(**batch)[0], fast(**batch)[0])


def test_bad_ids_are_named() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    fast = compiled(model)
    fast(**batch)
    batch["input_ids"][1, 0] = 1000
    with pytest.raises(xfast.TokenIdError, match=r"input_ids\[1, 0\] is 1000"):
        fast(**batch)


def test_the_operator_passes_torchs_own_checks() -> None:
    model, batch = xfast.accelerate(build()), ragged()
    handle = model.forward.handle
    given = (handle, batch["input_ids"], batch["attention_mask"], None, None, 64, torch.float32)
    torch.library.opcheck(torch.ops.xfast.encode.default, given, test_utils=("test_schema", "test_faketensor"))
    del model
    gc.collect()
    with pytest.raises(xfast.ModelFreedError):
        torch.ops.xfast.encode(*given)


def test_eager_calls_while_another_thread_compiles() -> None:
    """torch says to all threads that it is compiling."""
    model, batch = xfast.accelerate(build(head="sequence-classification")), ragged()
    want, wrong, calls, done = model(**batch).logits, [], [], threading.Event()

    def serve() -> None:
        try:
            with torch.inference_mode():
                while not done.is_set():
                    calls.append(torch.compiler.is_compiling())
                    assert torch.equal(model(**batch).logits, want)
        except BaseException as error:
            wrong.append(error)

    other = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(30)))
    thread = threading.Thread(target=serve)
    thread.start()
    fast = torch.compile(other, backend="eager")
    for rows in range(2, 6):
        fast(torch.randn(rows, 8))
    done.set()
    thread.join()
    assert not wrong, wrong[0]
    assert any(calls) and fallbacks(model) == {}


def test_export_traces_the_original() -> None:
    model, batch = build(), ragged()
    want = model(**batch)[0]
    program = torch.export.export(xfast.accelerate(model), (), batch)
    assert "xfast" not in str(program.graph)
    assert_same(program.module()(**batch)[0], want, batch)


@pytest.mark.filterwarnings("ignore")  # tracing warns of every Python branch in transformers
def test_jit_trace_traces_the_original() -> None:
    model, batch = build(return_dict=False), ragged()
    want = model(**batch)[0]
    xfast.accelerate(model)
    traced = torch.jit.trace(model, (batch["input_ids"], batch["attention_mask"]), strict=False, check_trace=False)
    assert_same(traced(batch["input_ids"], batch["attention_mask"])[0], want, batch)
    assert fallbacks(model) == {"torch.jit tracing": 1}
