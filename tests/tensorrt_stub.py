"""What tests of the TensorRT backend share: a key, and a network that needs no encoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from xfast.architecture import EncoderSpec
from xfast.backends.tensorrt_build import Profile
from xfast.backends.tensorrt_network import INPUTS, OUTPUT
from xfast.backends.tensorrt_store import Key

SPEC = EncoderSpec(
    family="xlm-roberta",
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    head_dim=32,
    intermediate_size=100,
    vocab_size=101,
    max_positions=40,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    activation="gelu",
    norm="post",
    position_rule="padding",
    pad_token_id=1,
)
KEY = Key(
    weights="ab" * 32,
    spec=SPEC,
    precision="fp16",
    layers=2,
    profiles=(Profile((1, 8, 16), (1, 1, 2), (1, 8, 8)),),
    runtime="tensorrt_rtx",
    version="1.7.1.116",
    target="SM89",
)
BLOB = bytes(range(256)) * 3


def populate(trt: Any, network: Any, columns: int = 8, products: int = 1) -> list[Any]:
    """A network with an encoder's inputs: rows of a table, multiplied in fp16, normalised and added up in fp32."""
    rng = np.random.default_rng(0)
    shapes = [(11, columns), *[(columns, columns)] * products, (1, columns), (1, columns)]
    arrays = [np.ascontiguousarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    table, *weights, gain, bias = (network.add_constant(a.shape, trt.Weights(a)).get_output(0) for a in arrays)
    inputs = {name: network.add_input(name, trt.int32, (-1,) * len(dims)) for name, dims in INPUTS.items()}
    x = network.add_gather(table, inputs["token_ids"], 0).get_output(0)
    x = network.add_cast(x, trt.float16).get_output(0)
    for index, weight in enumerate(weights):
        weight = network.add_cast(weight, trt.float16).get_output(0)
        product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, weight, trt.MatrixOperation.TRANSPOSE)
        product.name = f"product{index}"
        x = product.get_output(0)
    x = network.add_cast(x, trt.float32).get_output(0)
    norm = network.add_normalization_v2(x, gain, bias, 1 << 1)
    norm.name = "norm"
    x = network.add_gather(norm.get_output(0), inputs["rows"], 0).get_output(0)
    x.name = OUTPUT
    network.mark_output(x)
    return arrays
