"""int8 and fp8 in TensorRT: rounding, accuracy beside plain 8-bit products, and that 8-bit kernels are built."""

from __future__ import annotations

import itertools
from typing import Any

import models
import pytest
import tensorrt_layers
import torch
import transformers
from models import quick_settings

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")

from tensorrt_built import RAGGED, Built, batch_of, described, expected, feeds_of, made  # noqa: E402
from tensorrt_interpreter import Interpreter  # noqa: E402

from xfast.backends import tensorrt_build, tensorrt_quantize  # noqa: E402
from xfast.backends.tensorrt_quantize import TOPS, TYPES, quantize_weight  # noqa: E402
from xfast.backends.tensorrt_runtime import Log, find  # noqa: E402

_quick = pytest.fixture(autouse=True)(quick_settings)
PROFILES = tensorrt_build.profiles(512, 8, 38)
KERNEL_TYPE = {"int8": "Int8", "fp8": "FP8"}
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


class Rounding:
    """A network that is nothing but x / scale in 8 bits, times ``back``."""

    def __init__(self, dtype: torch.dtype, scale: float, back: float = 1.0) -> None:
        self.kept = [torch.tensor(scale), torch.tensor(back)]
        self.builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = self.network.add_input("x", trt.float32, (-1, -1))
        constants = [
            self.network.add_constant((), trt.Weights(trt.float32, value.data_ptr(), 1)).get_output(0)
            for value in self.kept
        ]
        made_of = {torch.int8: trt.int8, torch.float8_e4m3fn: trt.fp8}[dtype]
        x = self.network.add_quantize(x, constants[0], made_of).get_output(0)
        x = self.network.add_dequantize(x, constants[1], trt.float32).get_output(0)
        x.name = "y"
        self.network.mark_output(x)

    def __call__(self, *values: float) -> list[float]:
        feeds = {"x": torch.tensor([values])}
        return Interpreter(trt, self.network, self.kept)(feeds)["y"][0].tolist()


def test_int8_rounds_to_even_and_saturates() -> None:
    whole = Rounding(torch.int8, 1.0)
    assert whole(0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997) == [0, 2, 2, 0, -2, -2, 0]
    assert whole(126.5, 127.49, 127.5, 1e9, -127.5, -128.4, -1e9) == [126, 127, 127, 127, -128, -128, -128]
    assert Rounding(torch.int8, 0.25, 0.5)(0.375, -0.4) == [1.0, -1.0]


def test_e4m3_rounds_to_the_nearest_and_saturates() -> None:
    whole = Rounding(torch.float8_e4m3fn, 1.0)
    assert whole(448.0, 463.9, 464.0, 1e30, -1e30) == [448, 448, 448, 448, -448]  # and never NaN
    assert whole(17.0, 19.0, 2**-9, 2**-10, 1.5 * 2**-9) == [16, 20, 2**-9, 0, 2**-8]  # ties go to the even one
    finite = sorted({float(value) for value in E4M3 if torch.isfinite(value.float())})
    for low, high in itertools.pairwise(finite):
        step = high - low
        assert whole(low, low + 0.499 * step, low + 0.501 * step) == [low, low, high]


@pytest.mark.parametrize("precision", TOPS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 100), (5, 1)])
def test_weights_are_a_channels_own(shape: tuple[int, int], precision: str) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 4, shape[0])[:, None]
    weight[-1] = 0.0
    values, scale = quantize_weight(weight, precision)
    assert values.dtype == TYPES[precision] and scale.dtype == torch.bfloat16 and scale.shape == shape[:1]
    error = (values.float() * scale.float()[:, None] - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    if precision == "int8":  # half a step; where the scale was rounded down, the largest may lose a little more
        assert bool((error <= largest / 127 * 0.51 + largest * 2**-9).all())
        assert int(values.min()) >= -127
    else:  # half a unit in the last of three places, and of subnormal numbers
        assert bool((error <= weight.abs() * (2**-4 + 2**-8) + largest / 448 * 2**-10).all())
    assert not values[-1].float().any()


def pair(weights: Any, model: Any, precision: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The network's output, that of plain products of operands of the same type in bfloat16, and fp32's."""
    batch = batch_of(weights.spec.family, RAGGED, weights.spec.type_vocab_size)
    got = Built(weights, precision).run(feeds_of(weights, batch, None))
    return got, expected(models.simulated(model, precision).bfloat16(), batch), expected(model, batch)


def errors(weights: Any, model: Any, precision: str) -> tuple[float, float]:
    """Distances from fp32: the network's, and that of plain products."""
    got, plain, want = pair(weights, model, precision)
    return models.norm_error(got, want), models.norm_error(plain, want)


OUTLIERS = [7, 31]


@pytest.mark.parametrize("precision", TOPS)
@pytest.mark.parametrize("factor", [1, 10, 50])
@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
def test_outlier_channels(family: str, factor: float, precision: str) -> None:
    """Channels far larger than the others, as trained encoders have them: they cost the others bits, not the result."""
    config = models.make_config(family, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    model = getattr(transformers, models.PREFIXES[family] + "Model")(config, add_pooling_layer=False).eval()
    for layer in model.encoder.layer:
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            norm.weight[OUTLIERS] *= factor
    got, plain, want = pair(described(model), model, precision)
    rest = torch.ones(256, dtype=torch.bool)
    rest[OUTLIERS] = False
    for channels in (slice(None), rest):
        error = models.norm_error(got[:, channels], want[:, channels])
        assert 1e-3 < error <= 2 * models.norm_error(plain[:, channels], want[:, channels])


def test_a_row_of_nothing_but_zeros_stays_one() -> None:
    model, weights = made(num_hidden_layers=2)
    for name in ("weight", "bias"):
        getattr(model.embeddings.LayerNorm, name).zero_()
        getattr(model.encoder.layer[0].intermediate.dense, name).zero_()
    for precision in TOPS:
        error, plain = errors(weights, model, precision)
        assert error <= 2 * plain + 1e-2


WRONG = {
    "rows not scaled back": lambda self, a, b, op, name, go: a if name.endswith(".descaled") else go(),
    "the largest of nothing": lambda self, a, b, op, name, go: b if name.endswith(".nonzero") else go(),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_network_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfast.backends.tensorrt_network import _Graph

    original = _Graph.elementwise

    def elementwise(self: Any, a: Any, b: Any, operation: str, name: str) -> Any:
        return WRONG[what](self, a, b, operation, name, lambda: original(self, a, b, operation, name))

    model, weights = made()
    monkeypatch.setattr(_Graph, "elementwise", elementwise)
    error, plain = errors(weights, model, "int8")
    assert not error <= 2 * plain + 1e-2


def test_int8_with_the_scales_of_other_channels_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tensorrt_quantize.quantize_weight

    def shifted(weight: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        values, scale = original(weight, precision)
        return values, scale.roll(1)

    model, weights = made()
    monkeypatch.setattr(tensorrt_quantize, "quantize_weight", shifted)
    error, plain = errors(weights, model, "int8")
    assert error > 2 * plain + 1e-2


@pytest.mark.parametrize(
    ("precision", "target"),
    [("int8", "SM80"), ("int8", "SM89"), ("int8", "SM120"), ("fp8", "SM89"), ("fp8", "SM120")],
)
def test_every_product_gets_an_8_bit_kernel(precision: str, target: str) -> None:
    """And the rounding none of its own: what the builder's log says of the engine, layer by layer."""
    _, weights = made(num_hidden_layers=2, hidden_size=128, intermediate_size=512)
    log = Log(verbose=True)
    tensorrt_build.build(weights, precision, None, PROFILES[-1:], target, runtime=find("tensorrt_rtx"), log=log)
    layers = tensorrt_layers.compiled_layers(log)
    products = [layer for layer in layers if layer["type"] == "gemm"]
    eight = KERNEL_TYPE[precision]
    assert len(products) == 2 * 4
    for layer in products:
        assert [each["dtype"] for each in layer["inputs"]] == [eight]
        assert layer["constants"][0]["dtype"] == eight and layer["outputs"][0]["dtype"] == "BFloat16"
    # ten a layer, and what prepares attention's lengths and the embeddings
    names = [layer["name"] for layer in layers]
    first = next(index for index, name in enumerate(names) if name.startswith("layer0.qkv"))
    assert len(names) - first == 2 * 10


def test_fp8_where_there_is_none() -> None:
    _, weights = made(num_hidden_layers=1)
    with pytest.raises(tensorrt_build.EngineBuildError, match=r"SM80: no engine .* HW-specific datatypes: fp8_e4m3"):
        tensorrt_build.build(weights, "fp8", None, PROFILES[-1:], "SM80", runtime=find("tensorrt_rtx"))
