"""Pre-norm encoders (XLM-R-XL and XXL) as TensorRT networks: what is theirs alone. No GPU is needed.

What they share with the others is in the files that run every family.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import tensorrt_layers
import torch
from models import quick_settings

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")

from tensorrt_built import RAGGED, Built, batch_of, expected, feeds_of, made  # noqa: E402

from xfast.backends import tensorrt_build, tensorrt_network  # noqa: E402
from xfast.backends.tensorrt_network import DTYPES, PRECISIONS  # noqa: E402
from xfast.backends.tensorrt_runtime import Log, find  # noqa: E402

_quick = pytest.fixture(autouse=True)(quick_settings)

XL = "xlm-roberta-xl"
HALF_MAX = torch.finfo(torch.float16).max
PROFILES = tensorrt_build.profiles(512, 8, 38)[-1:]


def run(
    weights: Any, precision: str, layers: int | None = None, *, lengths: Sequence[int] = RAGGED
) -> tuple[torch.Tensor, Built]:
    built = Built(weights, precision, layers)
    return built.run(feeds_of(weights, batch_of(XL, lengths, 1), None)), built


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head_dim", [80, 128], ids=["XL", "XXL"])
def test_head_sizes(head_dim: int, precision: str) -> None:
    model, weights = made(XL, hidden_size=2 * head_dim, intermediate_size=320, num_hidden_layers=2)
    got, built = run(weights, precision)
    want = expected(model, batch_of(XL, RAGGED, 1))
    # as far as PyTorch gets with operands of that type
    plain = models.simulated(model, precision) if precision in ("int8", "fp8") else model
    own = models.norm_error(expected(plain.to(DTYPES[precision]), batch_of(XL, RAGGED, 1)).float(), want)
    assert models.norm_error(got.float(), want) <= 2 * own + (1e-6 if precision == "fp32" else 1e-4)
    assert "layer0.attention.softmax" not in built.names()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_residual_stream_is_float32_and_norms_are_where_they_belong(precision: str) -> None:
    network = run(made(XL)[1], precision)[1].network
    layers = {layer["name"]: layer for layer in tensorrt_layers.describe(network)}
    for index in range(3):
        for part, product in (("attention", "qkv"), ("ffn", "ffn_in")):
            stream, norm = layers[f"layer{index}.{part}_residual"], layers[f"layer{index}.{part}_norm"]
            assert {tensor["dtype"] for tensor in (*stream["inputs"], *stream["outputs"])} == {"FLOAT"}
            assert list(layers).index(norm["name"]) < list(layers).index(f"layer{index}.{product}")
    assert "embeddings.norm" not in layers
    assert layers["final_norm"]["inputs"][0]["name"] == "layer2.ffn_residual"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_fewer_layers_give_the_stream_as_it_is(layers: int, precision: str) -> None:
    got, built = run(made(XL)[1], precision, layers)
    assert got.dtype == torch.float32 and "final_norm" not in built.names()
    built.serialized("SM89")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_encoder_without_layers_is_its_embeddings_and_the_final_norm(precision: str) -> None:
    model, weights = made(XL, num_hidden_layers=0)
    got, built = run(weights, precision)
    assert got.dtype == DTYPES[precision] and built.names().count("final_norm") == 1
    batch = batch_of(XL, RAGGED, 1)
    want = model(**batch)[0][batch["attention_mask"].bool()]
    assert models.norm_error(got.float(), want) <= 1e-2


def _grown(layers: int) -> tuple[Any, Any]:
    """A stream that leaves fp16's range after two layers, though no product does."""
    model, weights = made(XL, num_hidden_layers=layers)
    for layer in model.encoder.layer:
        layer.output.dense.bias[3] = 5e4
    return model, weights


@pytest.mark.parametrize("layers", [None, 2])
def test_a_stream_beyond_fp16_stays_right(layers: int | None) -> None:
    model, weights = _grown(4)
    batch = batch_of(XL, RAGGED, 1)
    want = expected(model, batch, None, layers)
    got, _ = run(weights, "fp16", layers)
    assert models.norm_error(got.float(), want) <= 5e-3
    assert layers is None or float(got.abs().max()) > HALF_MAX
    stock = expected(model.to(torch.float16), batch, None, layers)
    assert not torch.isfinite(stock).all()  # what the stream would be in fp16


def test_late_layers_are_not_lost_in_bf16() -> None:
    """What a layer adds to a stream 500 times as large: a stream in bf16 would round most of it away."""
    model, weights = made(XL, num_hidden_layers=8)
    for table in ("word_embeddings", "position_embeddings"):
        getattr(model.embeddings, table).weight.mul_(500)
    batch = batch_of(XL, RAGGED, 1)
    begin, want = (expected(model, batch, None, layers) for layers in (0, 7))
    added = run(weights, "bf16", 7)[0] - run(weights, "bf16", 0)[0]
    stock = model.to(torch.bfloat16)
    lost = (expected(stock, batch, None, 7) - expected(stock, batch, None, 0)).float()
    ours, theirs = (models.norm_error(each, want - begin) for each in (added, lost))
    assert ours <= 2e-2 and theirs > 5 * ours


ORIGINAL_NORM = tensorrt_network._Encoder.norm
WRONG: dict[str, Callable[[int, str], tuple[int, str] | None]] = {
    "no final norm": lambda layer, role: None if role == "final_norm" else (layer, role),
    "no norm before the FFN": lambda layer, role: None if role == "ffn_norm" else (layer, role),
    "norms swapped": lambda layer, role: (
        layer,
        {"attention_norm": "ffn_norm", "ffn_norm": "attention_norm"}.get(role, role),
    ),
    "the next layer's norm": lambda layer, role: (min(layer + 1, 2) if layer >= 0 else layer, role),
}
"""Which LayerNorm is taken for that of a layer and role; None: none."""


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_network_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = made(XL)
    want = expected(model, batch_of(XL, RAGGED, 1))
    assert models.norm_error(run(weights, "fp32")[0], want) <= 1e-6

    def norm(self: Any, x: Any, layer: int, role: str, name: str) -> Any:
        taken = WRONG[what](layer, role)
        return self.graph.cast(x, self.graph.dtype, name) if taken is None else ORIGINAL_NORM(self, x, *taken, name)

    monkeypatch.setattr(tensorrt_network._Encoder, "norm", norm)
    assert models.norm_error(run(weights, "fp32")[0], want) > 1e-2


def _compiled(weights: Any, precision: str, target: str) -> tuple[list[dict[str, Any]], int]:
    """The layers that the builder's log tells of, and the engine's bytes."""
    log = Log(verbose=True)
    blob = tensorrt_build.build(weights, precision, None, PROFILES, target, runtime=find("tensorrt_rtx"), log=log)
    return tensorrt_layers.compiled_layers(log), len(blob)


@pytest.mark.parametrize("target", ["SM89", "SM120"])
@pytest.mark.parametrize(("precision", "kernels"), [("fp16", 9), ("bf16", 9), ("int8", 10), ("fp8", 10)])
@pytest.mark.parametrize("head_dim", [80, 128], ids=["XL", "XXL"])
def test_a_layer_takes_as_many_kernels_as_post_norm(head_dim: int, precision: str, kernels: int, target: str) -> None:
    """What the builder's log says: attention is one kernel at these head sizes, LayerNorm needs none for itself."""
    _, weights = made(XL, hidden_size=2 * head_dim, intermediate_size=320, num_hidden_layers=2)
    layers, _ = _compiled(weights, precision, target)
    attention = [index for index, layer in enumerate(layers) if "mha" in layer["name"]]
    assert len(attention) == 2
    assert attention[1] - attention[0] == kernels
    # from QKV of the first layer to the network's output
    assert len(layers) - (attention[0] - 2) == 2 * kernels
    if precision in ("int8", "fp8"):
        products = [layer for layer in layers if layer["type"] == "gemm"]
        assert len(products) == 8
        assert {layer["inputs"][0]["dtype"] for layer in products} == {{"int8": "Int8", "fp8": "FP8"}[precision]}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_two_layers_of_xls_width_are_built(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, weights = made(XL, hidden_size=2560, num_attention_heads=32, intermediate_size=10240, num_hidden_layers=2)
    layers, size = _compiled(weights, precision, "SM89")
    assert sum("mha" in layer["name"] for layer in layers) == 2
    values = 2 * (4 * 2560**2 + 2 * 2560 * 10240) * (1 if precision in ("int8", "fp8") else 2)
    assert values < size < 1.05 * values
    with capsys.disabled():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\nXL, 2 layers, {precision}: engine {size / 2**20:.0f} MiB; peak memory {peak:.1f} GiB")
