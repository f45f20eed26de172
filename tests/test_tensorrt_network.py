"""The TensorRT network: its numerics, read off the network itself, and that TensorRT builds it. No GPU is needed."""

from __future__ import annotations

import copy
import dataclasses
import resource
import time
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
from models import quick_settings

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")

import tensorrt_built  # noqa: E402
from tensorrt_built import (  # noqa: E402
    CAPABILITIES,
    RAGGED,
    Built,
    Without,
    batch_of,
    described,
    expected,
    feeds_of,
    made,
)
from tensorrt_interpreter import NotModelled  # noqa: E402

from xfast.architecture import EncoderWeights  # noqa: E402
from xfast.backends import tensorrt_network  # noqa: E402
from xfast.backends.tensorrt_network import (  # noqa: E402
    DTYPES,
    INPUTS,
    PRECISIONS,
    output_dtype,
    refusal,
)
from xfast.errors import (  # noqa: E402
    BackendUnavailableError,
    InvalidOptionError,
    InvalidWeightsError,
    UnsupportedModelError,
)

_quick = pytest.fixture(autouse=True)(quick_settings)

QUANTISED = ("int8", "fp8")
FP32_BOUND = 1e-5
FLOOR = 1e-4  # of the reduced precisions' relative error
# What older releases lack
NO_ATTENTION, NO_NORMALIZATION_V2 = ("add_attention", "add_attention_v2"), ("add_normalization_v2",)


def check(
    model: Any,
    weights: EncoderWeights,
    precision: str,
    lengths: Sequence[int] = RAGGED,
    *,
    rows: Sequence[int] | None = None,
    layers: int | None = None,
    missing: Sequence[str] = (),
) -> float:
    """The error against the float32 original, which must be small for the precision."""
    batch = batch_of(weights.spec.family, lengths, weights.spec.type_vocab_size)
    got = Built(weights, precision, layers, missing).run(feeds_of(weights, batch, rows))
    assert got.dtype == output_dtype(weights.spec, precision, weights.spec.num_layers if layers is None else layers)
    want = expected(model, batch, rows, layers)
    if precision == "fp32":
        error = models.error(got, want)
        assert error <= FP32_BOUND, f"error {error:.1e}"
        return error
    error = models.norm_error(got, want)
    reduced = models.simulated(model, precision) if precision in QUANTISED else copy.deepcopy(model)
    reduced = reduced.to(DTYPES[precision])
    torch_error = models.norm_error(expected(reduced, batch, rows, layers), want)
    assert error <= 2 * torch_error + FLOOR, f"error {error:.1e}, torch's {torch_error:.1e}"
    return error


@pytest.mark.parametrize("missing", [(), NO_ATTENTION], ids=["attention-layer", "plain-attention"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", models.ALL_FAMILIES)
def test_is_the_model(family: str, precision: str, missing: Sequence[str]) -> None:
    check(*made(family), precision, missing=missing)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(1,), (38,), (1, 1, 1), (2, 3, 5, 7, 11, 13), (38, 1, 37), (4, 4)], ids=str)
@pytest.mark.parametrize("missing", [(), NO_ATTENTION], ids=["attention-layer", "plain-attention"])
def test_any_lengths(lengths: Sequence[int], precision: str, missing: Sequence[str]) -> None:
    check(*made(num_hidden_layers=2), precision, lengths, missing=missing)


@pytest.mark.parametrize("rows", [(0, 9, 10, 27), (10,), (39,), (39, 0, 9, 9, 12), tuple(range(40))], ids=str)
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
def test_only_the_rows_wanted(family: str, rows: Sequence[int], layers: int) -> None:
    check(*made(family), "fp32", rows=rows, layers=layers)
    check(*made(family), "fp16", rows=rows, layers=layers)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layers", [0, 1, 2, 3, None])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta-xl"])
def test_first_layers_only(family: str, layers: int | None, precision: str) -> None:
    check(*made(family), precision, layers=layers)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head_dim", [9, 16, 32, 64, 80])
def test_head_sizes(head_dim: int, precision: str) -> None:
    model, weights = made(hidden_size=2 * head_dim, num_hidden_layers=2)
    check(model, weights, precision)
    fused = "layer0.attention.softmax" not in Built(weights, precision).names()
    assert fused == (head_dim != 9)


@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_token_types(family: str, types: int) -> None:
    model, weights = made(family, type_vocab_size=types, num_hidden_layers=2)
    check(model, weights, "fp32")
    check(model, weights, "bf16")
    assert ("embeddings.type" in Built(weights, "fp32").names()) == (types > 1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_older_releases_normalisation(precision: str) -> None:
    check(*made(num_hidden_layers=2), precision, missing=NO_NORMALIZATION_V2)


def test_models_in_other_dtypes_and_without_biases() -> None:
    model, weights = made(num_hidden_layers=2)
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = None
    check(model, weights, "fp32")
    half = copy.deepcopy(model).bfloat16()
    batch = models.ragged()
    got = Built(described(half), "fp32").run(feeds_of(weights, batch, None))
    assert models.error(got, expected(half.float(), batch)) <= FP32_BOUND


def test_what_padding_reads_changes_nothing() -> None:
    _, weights = made()
    feeds = feeds_of(weights, models.ragged(), None)
    built = Built(weights, "bf16")
    want = built.run(feeds)
    padding = torch.arange(17) >= feeds["lengths"][:, None]
    feeds["padded_rows"][padding] = torch.randint(0, 40, (int(padding.sum()),), dtype=torch.int32)
    assert torch.equal(built.run(feeds), want)


@pytest.mark.parametrize("missing", [(), NO_ATTENTION], ids=["attention-layer", "plain-attention"])
def test_scores_far_from_zero_stay_finite(missing: Sequence[str]) -> None:
    """The known NaN of half-precision encoders: variances and exponentials out of fp16's range."""
    model, weights = made(num_hidden_layers=2)
    for layer in model.encoder.layer:
        layer.output.dense.weight.mul_(3000)
        layer.attention.self.query.weight.mul_(30)
    batch = models.ragged()
    got = Built(weights, "fp16", missing=missing).run(feeds_of(weights, batch, None))
    assert bool(torch.isfinite(got).all())


WRONG = {
    "queries not scaled": ("_qkv", lambda self, layer: _unscaled(self, layer)),
    "epsilon": ("_norm", lambda self, layer, role: (*ORIGINAL["_norm"](self, layer, role)[:2], 1e-2)),
    "gelu left out": ("_gelu", lambda self, x, name: x),
    "residual left out": (
        "_residual",
        lambda self, x, out, layer, part: ORIGINAL["_residual"](self, out, out, layer, part),
    ),
    "keys for values": (
        "_fused_attention",
        lambda self, q, k, v, name: ORIGINAL["_fused_attention"](self, q, k, k, name),
    ),
    "heads and columns mixed up": ("_heads", lambda self, padded, begin, name: _mixed_up(self, padded, begin, name)),
}
ORIGINAL = {name: vars(tensorrt_network._Encoder)[name] for name, _ in WRONG.values()}


def _unscaled(self: Any, layer: int) -> Any:
    weight, bias = ORIGINAL["_qkv"](self, layer)
    hidden, scale = self.spec.hidden_size, self.spec.head_dim**0.5
    factors = torch.cat([torch.full((hidden,), scale), torch.ones(2 * hidden)])
    return weight * factors[:, None], bias * factors


def _mixed_up(self: Any, padded: Any, begin: int, name: str) -> Any:
    """A reshape that should have been a transpose: the shape is right, the values are not."""
    right = ORIGINAL["_heads"](self, padded, begin, name)
    flat = self.graph.shuffle(right, (0, 0, -1), f"{name}.flat", before=(0, 2, 1, 3))
    return self.graph.shuffle(flat, (0, self.spec.num_heads, -1, self.spec.head_dim), f"{name}.wrong")


@pytest.mark.parametrize("family", ["xlm-roberta", "xlm-roberta-xl"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_network_is_noticed(what: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = WRONG[what]
    model, weights = made(family, num_hidden_layers=2)
    monkeypatch.setattr(tensorrt_network._Encoder, name, wrong)
    with pytest.raises(AssertionError, match=r"^error \d"):
        check(model, weights, "fp32")


def test_swapped_transposes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = made()
    original = tensorrt_network._Graph.shuffle

    def without_transpose(self: Any, x: Any, dims: Any, name: str, *, before: Any = None, after: Any = None) -> Any:
        return original(self, x, dims, name, after=after)

    monkeypatch.setattr(tensorrt_network._Graph, "shuffle", without_transpose)
    with pytest.raises(AssertionError, match=r"^error \d"):
        check(model, weights, "fp32")
    original_matmul = tensorrt_network._Graph.matmul
    monkeypatch.setattr(tensorrt_network._Graph, "shuffle", original)
    monkeypatch.setattr(
        tensorrt_network._Graph, "matmul", lambda self, a, b, name, *, transposed: original_matmul(
            self, a, b, name, transposed=transposed and "attention_out" not in name
        ),
    )  # fmt: skip
    with pytest.raises(AssertionError, match=r"^error \d"):
        check(model, weights, "fp32")


def test_the_interpreter_refuses_what_it_does_not_know() -> None:
    _, weights = made(num_hidden_layers=1)
    feeds = feeds_of(weights, models.ragged(), None)
    built = Built(weights, "fp32")
    hidden = built.network.get_output(0)
    identity = built.network.add_identity(hidden)
    with pytest.raises(NotModelled, match="IDENTITY"):
        built.run(feeds)
    del identity
    built = Built(weights, "fp32")
    activation = next(
        layer for layer in map(built.network.get_layer, range(built.network.num_layers)) if layer.name == "layer0.gelu"
    )
    activation.__class__ = trt.IActivationLayer
    activation.type = trt.ActivationType.GELU_TANH
    with pytest.raises(NotModelled, match="GELU_TANH"):
        built.run(feeds)


def test_layers_are_named_and_inputs_described() -> None:
    _, weights = made()
    built = Built(weights, "bf16")
    names = built.names()
    assert len(set(names)) == len(names) and not any("Unnamed" in name for name in names)
    expected_names = {f"layer{i}.{part}" for i in range(3) for part in ("qkv", "attention_norm", "gelu", "ffn_norm")}
    assert expected_names <= set(names)
    inputs = [built.network.get_input(i) for i in range(built.network.num_inputs)]
    assert {x.name: len(x.shape) for x in inputs} == {name: len(dims) for name, dims in INPUTS.items()}
    assert {x.dtype for x in inputs} == {trt.int32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("missing", [(), NO_ATTENTION], ids=["attention-layer", "plain-attention"])
def test_weights_need_no_cast(precision: str, missing: Sequence[str]) -> None:
    """Casts serve LayerNorm, GELU and softmax; in fp32 there are none."""
    _, weights = made()
    network = Built(weights, precision, missing=missing).network
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    casts = [layer for layer in layers if layer.type == trt.LayerType.CAST]
    assert bool(casts) == (precision != "fp32")
    constants = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.CONSTANT}
    assert not {layer.get_input(0).name for layer in casts} & constants


def test_refusals() -> None:
    spec = made()[1].spec
    assert refusal(spec, "fp16") is None
    for change in (
        {"norm": "pre"},
        {"final_norm": True},
        {"embedding_norm": False},
        {"activation": "relu"},
        {"head_dim": 3},
    ):
        assert refusal(dataclasses.replace(spec, **change), "fp16")
    assert "available: fp32, fp16, bf16, int8, fp8" in str(refusal(spec, "int4"))
    _, weights = made()
    with pytest.raises(UnsupportedModelError, match="LayerNorms"):
        Built(dataclasses.replace(weights, spec=dataclasses.replace(spec, norm="pre")), "fp16")
    for layers in (-1, 4):
        with pytest.raises(InvalidOptionError, match=f"layers: {layers} is not accepted; accepted: 0 to 3"):
            Built(weights, "fp16", layers)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.1.attention.self.key.bias",
        "encoder.layer.2.output.dense.weight",
        "encoder.layer.0.output.LayerNorm.weight",
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(name: str, value: float) -> None:
    model, weights = made()
    model.get_parameter(name).flatten()[-1] = value
    with pytest.raises(InvalidWeightsError, match=f"^{name} holds NaN or infinity"):
        Built(weights, "bf16")


def test_weights_out_of_range_missing_or_without_values() -> None:
    model, weights = made()
    model.get_parameter("encoder.layer.1.output.dense.bias")[0] = 1e5
    Built(weights, "bf16")
    with pytest.raises(
        InvalidWeightsError, match=r"^encoder.layer.1.output.dense.bias holds values too large for .*16"
    ):
        Built(weights, "fp16")
    model.encoder.layer[0].output.LayerNorm.bias = None
    with pytest.raises(InvalidWeightsError, match=r"^encoder.layer.0.output.LayerNorm.bias is missing"):
        Built(weights, "bf16")
    with pytest.raises(InvalidWeightsError, match=r"^embeddings.word_embeddings.weight is on the meta device"):
        Built(described(made()[0].to("meta")), "bf16")


def test_a_layer_that_is_not_added_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Without):
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: None) if name == "add_activation" else super().__getattr__(name)

    monkeypatch.setattr(tensorrt_built, "Without", Refusing)
    with pytest.raises(BackendUnavailableError, match=r"would not add layer layer0\.gelu"):
        Built(made()[1], "fp32", missing=("nothing",))


def test_fp32_shares_the_models_memory() -> None:
    model, weights = made()
    arrays = Built(weights, "fp32").arrays
    pointers = {array.data_ptr() for array in arrays}
    assert {
        model.embeddings.word_embeddings.weight.data_ptr(),
        model.encoder.layer[0].output.dense.weight.data_ptr(),
    } <= pointers


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", models.ALL_FAMILIES)
def test_engines_are_built(family: str, precision: str) -> None:
    """One engine for all three, which is what a builder for several GPUs makes."""
    _, weights = made(family, num_hidden_layers=2)
    Built(weights, precision).serialized(*CAPABILITIES[precision == "fp8" :])  # which 8.0 has not


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_for_one_gpu_are_built(precision: str, capability: str) -> None:
    _, weights = made(num_hidden_layers=2)
    if (precision, capability) != ("fp8", "SM80"):
        Built(weights, precision).serialized(capability)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("hidden", "layers"), [(18, 2), (160, 2), (64, 0), (64, 1)])
def test_engines_of_other_sizes_are_built(hidden: int, layers: int, precision: str) -> None:
    _, weights = made(num_hidden_layers=2, hidden_size=hidden)
    Built(weights, precision, layers).serialized("SM89")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_of_older_releases_layers_are_built(precision: str) -> None:
    _, weights = made(num_hidden_layers=2)
    Built(weights, precision, missing=(*NO_ATTENTION, *NO_NORMALIZATION_V2)).serialized("SM89")


@pytest.mark.slow
def test_base_size_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    _, weights = made(
        vocab_size=250002, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=514,
    )  # fmt: skip
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    built = Built(weights, "bf16")
    described_at = time.perf_counter()
    size = built.serialized("SM89", tokens=16384)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capsys.disabled():
        print(
            f"\nXLM-R base, bf16: network {described_at - started:.1f} s, engine "
            f"{time.perf_counter() - described_at:.1f} s, {size / 2**20:.0f} MiB; "
            f"peak memory +{(peak - before) / 2**20:.1f} GiB of {peak / 2**20:.1f} GiB"
        )
    parameters = sum(array.numel() * array.element_size() for array in built.arrays)
    assert parameters < size < 1.2 * parameters
