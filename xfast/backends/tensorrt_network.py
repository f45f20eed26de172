"""An encoder as a TensorRT network, straight from its description: strongly typed, no exporter between.

Products, LayerNorm and GELU see packed tokens only, [T, hidden_size]. Attention alone needs a padded batch: the fused
product's rows are gathered to [B, L, 3 * hidden_size], and what attention returns is gathered back. Every precision is
one a reader can see in the network: the products' operands are in the computing dtype (in int8 and fp8 they are those
of ``tensorrt_quantize``), while LayerNorm with the sum before it, GELU and softmax are float32. The casts are no
kernels: release 1.7.1 makes nine of a layer in fp16 or bf16: QKV with its bias, gather, attention, gather, product, sum
with LayerNorm, product with bias and GELU, product, sum with LayerNorm (read off the builder's log, for 8.9).

The residual stream is in the computing dtype where every LayerNorm brings it back to size (post-norm). In a pre-norm
encoder (XLM-R-XL) it is float32 in every precision: layers only add to it, so float16, which ends at 65504, would
overflow in a deep one, and bfloat16 would lose what a late layer adds to a large stream. It costs no kernel: LayerNorm
reads float32 anyway, and rounds to the computing dtype what the next product reads.

No shape is known but the model's: T tokens, B sequences, L columns, R rows wanted.
"""

from __future__ import annotations

from typing import Any

import torch

from xfast.architecture import QKV_ROLES, EncoderSpec, EncoderWeights
from xfast.backends import tensorrt_quantize
from xfast.backends.base import unusual_norms
from xfast.backends.parameters import ParameterReader
from xfast.errors import BackendUnavailableError, InvalidOptionError, UnsupportedModelError

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""What each precision computes in; int8 and fp8 are those of the products' operands only."""

PRECISIONS = tuple(DTYPES)

INPUTS = {
    "token_ids": ("T",),
    "position_ids": ("T",),
    "type_ids": ("T",),
    "padded_rows": ("B", "L"),
    "lengths": ("B",),
    "packed_columns": ("T",),
    "rows": ("R",),
}
"""The network's int32 inputs and what their dimensions count. All are there in every network, read or not.

``padded_rows`` holds the packed row of each padded position (any valid row, 0 say, where there is none), ``lengths``
the tokens of each sequence (1 or more), ``packed_columns`` the padded position ``b * L + column`` of each packed token,
and ``rows`` the packed rows wanted, in any order, repeated or not. No value is checked on the device.
"""

OUTPUT = "hidden"
"""The network's output, [R, hidden_size] in ``output_dtype``."""

_TYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.int64: "int64",
}
_SWAP_HEADS = (0, 2, 1, 3)  # [B, L, heads, head_dim] to [B, heads, L, head_dim] and back
_MASKED = torch.finfo(torch.float32).min  # finite: a row of nothing but padding must not become NaN


def refusal(spec: EncoderSpec, precision: str) -> str | None:
    """Why no network can be built for this encoder, or None."""
    if precision not in PRECISIONS:
        return f"precision {precision} is not available with TensorRT; available: {', '.join(PRECISIONS)}"
    if (unusual := unusual_norms(spec)) is not None:
        return unusual
    if spec.activation != "gelu":
        return f"activation {spec.activation!r} is not supported; supported: 'gelu' (exact)"
    if spec.num_heads * spec.head_dim != spec.hidden_size:
        return f"{spec.num_heads} heads of {spec.head_dim} are not hidden_size {spec.hidden_size}"
    return None


def output_dtype(spec: EncoderSpec, precision: str, layers: int) -> torch.dtype:
    """The dtype of the output of the first ``layers`` layers: the precision's, or float32 for a pre-norm stream."""
    ends_in_norm = spec.norm == "post" or layers == spec.num_layers
    return DTYPES[precision] if ends_in_norm else torch.float32


def has_fused_attention(trt: Any, network: Any, head_dim: int) -> bool:
    """Whether attention becomes TensorRT's attention layer; else products and a softmax that TensorRT may fuse."""
    if not hasattr(network, "add_attention_v2") or not hasattr(getattr(trt, "IAttention", None), "key_value_lengths"):
        return False
    # The kernels' head sizes, found by building (1.7.1, 8.0 to 12.0). float32 has no kernel: the layer is decomposed,
    # which changes nothing there, but is never allowed in fp16 and bf16, where softmax would lose its float32.
    return head_dim % 8 == 0 and 16 <= head_dim <= 256


def decomposes_attention(trt: Any, head_dim: int, precision: str) -> bool:
    """Whether an engine holds attention's scores, fp32 [B, heads, L, L], instead of computing them piece by piece."""
    return precision == "fp32" or not has_fused_attention(trt, trt.INetworkDefinition, head_dim)


def build_network(
    trt: Any, network: Any, weights: EncoderWeights, precision: str, layers: int | None = None
) -> list[torch.Tensor]:
    """Adds the encoder's first ``layers`` layers to a network.

    Args:
        trt: the module, ``tensorrt`` or ``tensorrt_rtx``.
        network: an empty, strongly typed ``INetworkDefinition``.
        weights: the encoder; parameters on any device and in any floating dtype.
        precision: one of ``PRECISIONS``.
        layers: 0 to the number of layers, None for all; 0 is the embeddings, normalised where the model does so. The
            LayerNorm behind a pre-norm encoder's last layer belongs to all of them; fewer give the residual stream.

    Returns:
        What TensorRT reads from, one tensor for each constant layer, in the network's order. They must outlive the
        build. In fp32, those of a CPU model share its memory.

    Raises:
        UnsupportedModelError: see ``refusal``.
        InvalidOptionError: so many layers there are not.
        InvalidWeightsError: a parameter is missing, holds NaN or infinity, or would in this precision; named.
        BackendUnavailableError: TensorRT would not add a layer; named.
    """
    spec = weights.spec
    reason = refusal(spec, precision)
    if reason is not None:
        raise UnsupportedModelError(reason)
    layers = spec.num_layers if layers is None else layers
    if not 0 <= layers <= spec.num_layers:
        raise InvalidOptionError(f"layers: {layers} is not accepted; accepted: 0 to {spec.num_layers}")
    graph = _Graph(trt, network, DTYPES[precision])
    encoder = _Encoder(graph, weights, precision)
    hidden = encoder.embeddings()
    for layer in range(layers):
        hidden = encoder.layer(layer, hidden, last=layer + 1 == layers)
    if layers == 0:
        hidden = graph.gather(hidden, encoder.inputs["rows"], "rows_of_embeddings")
    if spec.final_norm and layers == spec.num_layers:
        hidden = encoder.norm(hidden, -1, "final_norm", "final_norm")
    hidden.name = OUTPUT
    network.mark_output(hidden)
    return graph.arrays


class _Graph:
    """Adds single layers, each named and checked. ``ITensor`` in, ``ITensor`` out."""

    def __init__(self, trt: Any, network: Any, dtype: torch.dtype) -> None:
        self.trt, self.network, self.dtype = trt, network, dtype
        self.arrays: list[torch.Tensor] = []

    def named(self, layer: Any, name: str) -> Any:
        """The layer, named like its output."""
        if layer is None:
            raise BackendUnavailableError(f"TensorRT would not add layer {name}; its log says why")
        layer.name = name
        layer.get_output(0).name = name
        return layer

    def constant(self, values: torch.Tensor, name: str) -> Any:
        """A CPU tensor, in its dtype. By pointer: NumPy has no bfloat16."""
        values = values.contiguous()
        self.arrays.append(values)
        described = self.trt.Weights(self._type(values.dtype), values.data_ptr(), values.numel())
        return self.named(self.network.add_constant(tuple(values.shape), described), name).get_output(0)

    def cast(self, x: Any, dtype: torch.dtype, name: str) -> Any:
        to = self._type(dtype)
        return x if x.dtype == to else self.named(self.network.add_cast(x, to), name).get_output(0)

    def elementwise(self, a: Any, b: Any, operation: str, name: str) -> Any:
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self.named(self.network.add_elementwise(a, b, kind), name).get_output(0)

    def gather(self, x: Any, indices: Any, name: str) -> Any:
        """Rows of x: [*indices, ...]."""
        return self.named(self.network.add_gather(x, indices, 0), name).get_output(0)

    def shuffle(self, x: Any, dims: tuple[int, ...], name: str, *, before: Any = None, after: Any = None) -> Any:
        """Transposes by ``before``, reshapes (0 keeps a dimension, -1 is what is left), transposes by ``after``."""
        layer = self.named(self.network.add_shuffle(x), name)
        if before is not None:
            layer.first_transpose = self.trt.Permutation(list(before))
        layer.reshape_dims = dims
        if after is not None:
            layer.second_transpose = self.trt.Permutation(list(after))
        return layer.get_output(0)

    def matmul(self, a: Any, b: Any, name: str, *, transposed: bool) -> Any:
        """A b^T or a b, batched over leading dimensions."""
        kinds = self.trt.MatrixOperation
        second = kinds.TRANSPOSE if transposed else kinds.NONE
        return self.named(self.network.add_matrix_multiply(a, kinds.NONE, b, second), name).get_output(0)

    def linear(self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Any:
        """x W^T + b, [rows, out] in the computing dtype. ``weight`` is [out, in], ``bias`` [out]."""
        weights = self.constant(weight, f"{name}.weight")
        y = self.matmul(x, weights, name, transposed=True)
        if bias is None:
            return y
        return self.elementwise(y, self.constant(bias[None], f"{name}.bias"), "SUM", f"{name}.with_bias")

    def largest(self, x: Any, name: str) -> Any:
        """The largest magnitude of each row: [rows, 1]."""
        magnitudes = self.named(self.network.add_unary(x, self.trt.UnaryOperation.ABS), f"{name}.magnitudes")
        reduce = self.network.add_reduce(magnitudes.get_output(0), self.trt.ReduceOperation.MAX, 1 << 1, True)
        return self.named(reduce, name).get_output(0)

    def quantize(self, x: Any, scale: Any, dtype: torch.dtype, name: str) -> Any:
        """x / scale, rounded to even and saturated."""
        return self.named(self.network.add_quantize(x, scale, self._type(dtype)), name).get_output(0)

    def dequantize(self, x: Any, scale: Any, name: str) -> Any:
        """x * scale in the computing dtype; a scale of one dimension is by row."""
        layer = self.named(self.network.add_dequantize(x, scale, self._type(self.dtype)), name)
        if len(scale.shape) == 1:
            layer.axis = 0
        return layer.get_output(0)

    def norm(self, x: Any, gain: torch.Tensor, bias: torch.Tensor, eps: float, name: str) -> Any:
        """LayerNorm of float32 [rows, columns], rounded to the computing dtype. ``gain`` and ``bias`` are float32."""
        constants = (self.constant(gain[None], f"{name}.weight"), self.constant(bias[None], f"{name}.bias"))
        # Older releases have only the first; for one row of gains they are the same.
        add = getattr(self.network, "add_normalization_v2", None) or self.network.add_normalization
        layer = self.named(add(x, *constants, 1 << 1), name)
        layer.epsilon = eps
        return self.cast(layer.get_output(0), self.dtype, f"{name}.rounded")

    def _type(self, dtype: torch.dtype) -> Any:
        return getattr(self.trt, _TYPE_NAMES[dtype])


class _Encoder:
    """The encoder's parts, in the order of its forward."""

    def __init__(self, graph: _Graph, weights: EncoderWeights, precision: str) -> None:
        self.graph, self.spec = graph, weights.spec
        self.parameters = ParameterReader(weights, torch.device("cpu"))
        self.precision, self.quantized = precision, precision in tensorrt_quantize.TOPS
        # what products are given; the quantised ones do their own rounding
        self.operands = torch.float32 if self.quantized else graph.dtype
        trt, network = graph.trt, graph.network
        self.inputs = {name: network.add_input(name, trt.int32, (-1,) * len(dims)) for name, dims in INPUTS.items()}
        self.fused = has_fused_attention(trt, network, weights.spec.head_dim)
        self._shared: dict[str, Any] = {}

    def embeddings(self) -> Any:
        """[T, hidden_size]: the tables' rows, summed in float32 and, post-norm, normalised."""
        graph, tables = self.graph, ["word", "position"]
        if self.spec.type_vocab_size > 1:
            tables.append("type")
        total = None
        for table, ids in zip(tables, ("token_ids", "position_ids", "type_ids"), strict=False):
            values = graph.constant(self._table(table), f"embeddings.{table}.weight")
            rows = graph.gather(values, self.inputs[ids], f"embeddings.{table}")
            rows = graph.cast(rows, torch.float32, f"embeddings.{table}.float")
            total = rows if total is None else graph.elementwise(total, rows, "SUM", f"embeddings.with_{table}")
        return self.norm(total, -1, "embedding_norm", "embeddings.norm") if self.spec.embedding_norm else total

    def layer(self, layer: int, x: Any, last: bool) -> Any:
        """One layer over x [T, hidden_size], the residual stream: in float32 if pre-norm, else in the computing dtype.

        The ``last`` is [R, hidden_size]: after attention, only rows wanted.
        """
        graph, name = self.graph, f"layer{layer}"
        qkv = self._linear(self._operand(x, layer, "attention"), *self._qkv(layer), f"{name}.qkv")
        qkv = graph.cast(qkv, graph.dtype, f"{name}.qkv.rounded")
        columns = self.inputs["packed_columns"]
        if last:
            columns = graph.gather(columns, self.inputs["rows"], f"{name}.columns_of_rows")
            x = graph.gather(x, self.inputs["rows"], f"{name}.rows")
        context = graph.gather(self._attention(qkv, name), columns, f"{name}.context")
        out = self._linear(context, *self._weights(layer, "attention_out"), f"{name}.attention_out")
        x = self._residual(x, out, layer, "attention")
        inner = self._linear(self._operand(x, layer, "ffn"), *self._weights(layer, "ffn_in"), f"{name}.ffn_in")
        inner = self._gelu(inner, f"{name}.gelu")
        out = self._linear(inner, *self._weights(layer, "ffn_out"), f"{name}.ffn_out")
        return self._residual(x, out, layer, "ffn")

    def norm(self, x: Any, layer: int, role: str, name: str) -> Any:
        """LayerNorm of float32 rows, rounded to the computing dtype."""
        return self.graph.norm(x, *self._norm(layer, role), name)

    def _table(self, role: str) -> torch.Tensor:
        """A table in the computing dtype. Types of a model that has but one are part of every position."""
        if role == "position" and self.spec.type_vocab_size == 1:
            both = [self.parameters.read(-1, each, "weight") for each in ("position", "type")]
            total = both[0].float() + both[1].float()
            return self.parameters.rounded(total, self.graph.dtype, -1, "position", "weight")
        return self.parameters.rounded(self.parameters.read(-1, role, "weight"), self.graph.dtype, -1, role, "weight")

    def _norm(self, layer: int, role: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        gain, bias = (self.parameters.read(layer, role, name).float() for name in ("weight", "bias"))
        return gain, bias, self.spec.layer_norm_eps

    def _qkv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[3 * hidden_size, hidden_size] and [3 * hidden_size]: one product for all three.

        The scores' scale is the queries': TensorRT's attention has no parameter for it. It enters in float32, before
        the weights are rounded, so it costs no rounding of its own.
        """
        read, hidden = self.parameters, self.spec.hidden_size
        weights, biases = [], []
        for role in QKV_ROLES:
            scale = self.spec.head_dim**-0.5 if role == "query" else 1.0
            weight = read.read(layer, role, "weight").float() * scale
            weights.append(read.rounded(weight, self.operands, layer, role, "weight"))
            there = read.has(layer, role, "bias")
            bias = read.read(layer, role, "bias") if there else torch.zeros(hidden, device="cpu")
            biases.append(read.rounded(bias.float() * scale, self.operands, layer, role, "bias"))
        return torch.cat(weights), torch.cat(biases)

    def _weights(self, layer: int, role: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [out, in] and bias [out], if any, as products are given them."""
        read, both = self.parameters, []
        for name in ("weight", "bias"):
            there = name == "weight" or read.has(layer, role, name)
            both.append(read.rounded(read.read(layer, role, name), self.operands, layer, role, name) if there else None)
        return both[0], both[1]

    def _linear(self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Any:
        """x W^T + b: in the computing dtype, or in float32 from 8-bit operands."""
        if self.quantized:
            return tensorrt_quantize.linear(self.graph, x, weight, bias, name, self.precision)
        return self.graph.linear(x, weight, bias, name)

    def _attention(self, qkv: Any, name: str) -> Any:
        """[T, 3 * hidden_size] to [B * L, hidden_size]; rows of padding hold anything finite."""
        graph, spec = self.graph, self.spec
        padded = graph.gather(qkv, self.inputs["padded_rows"], f"{name}.padded")
        q, k, v = (
            self._heads(padded, index * spec.hidden_size, f"{name}.{role}") for index, role in enumerate(QKV_ROLES)
        )
        context = (self._fused_attention if self.fused else self._plain_attention)(q, k, v, f"{name}.attention")
        return graph.shuffle(context, (-1, spec.hidden_size), f"{name}.heads_joined", before=_SWAP_HEADS)

    def _heads(self, padded: Any, begin: int, name: str) -> Any:
        """hidden_size columns from ``begin`` of [B, L, 3 * hidden_size] as [B, heads, L, head_dim]."""
        graph, spec = self.graph, self.spec
        # The sizes here are those of an example: the third input replaces them, as B and L are not known yet.
        sizes = self._once("sizes", self._sizes)
        layer = graph.network.add_slice(padded, (0, 0, begin), (1, 1, spec.hidden_size), (1, 1, 1))
        graph.named(layer, f"{name}.columns").set_input(2, sizes)
        return graph.shuffle(layer.get_output(0), (0, 0, spec.num_heads, spec.head_dim), name, after=_SWAP_HEADS)

    def _fused_attention(self, q: Any, k: Any, v: Any, name: str) -> Any:
        trt = self.graph.trt
        softmax, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
        attention = self.graph.named(self.graph.network.add_attention_v2(q, k, v, softmax, causal), name)
        attention.key_value_lengths = self.inputs["lengths"]
        attention.decomposable = self.graph.dtype == torch.float32
        return attention.get_output(0)

    def _plain_attention(self, q: Any, k: Any, v: Any, name: str) -> Any:
        """Two products with a float32 softmax over the keys that exist between them."""
        graph = self.graph
        scores = graph.matmul(q, k, f"{name}.scores", transposed=True)  # [B, heads, L, L]
        scores = graph.cast(scores, torch.float32, f"{name}.scores.float")
        exists, masked = self._once("mask", self._mask), self._once("masked", self._masked)
        scores = graph.named(graph.network.add_select(exists, scores, masked), f"{name}.masked").get_output(0)
        softmax = graph.named(graph.network.add_softmax(scores), f"{name}.softmax")
        softmax.axes = 1 << 3
        shares = graph.cast(softmax.get_output(0), graph.dtype, f"{name}.shares")
        return graph.matmul(shares, v, name, transposed=False)

    def _operand(self, x: Any, layer: int, part: str) -> Any:
        """What a part's first product reads: the residual stream, or its LayerNorm if pre-norm."""
        pre = self.spec.norm == "pre"
        return self.norm(x, layer, f"{part}_norm", f"layer{layer}.{part}_norm") if pre else x

    def _residual(self, x: Any, out: Any, layer: int, part: str) -> Any:
        """The residual stream after a part: x + out if pre-norm, else LayerNorm(x + out).

        The sum is float32, as LayerNorm reads it: one rounding less and, post-norm, no byte more to move.
        """
        graph, name = self.graph, f"layer{layer}.{part}"
        x = graph.cast(x, torch.float32, f"{name}_residual.float")
        out = graph.cast(out, torch.float32, f"{name}_out.float")
        total = graph.elementwise(x, out, "SUM", f"{name}_residual")
        return total if self.spec.norm == "pre" else self.norm(total, layer, f"{part}_norm", f"{name}_norm")

    def _gelu(self, x: Any, name: str) -> Any:
        """Exact GELU, in float32 whatever x is: TensorRT does not promise what an activation computes in."""
        graph = self.graph
        x = graph.cast(x, torch.float32, f"{name}.float")
        x = graph.named(graph.network.add_activation(x, graph.trt.ActivationType.GELU_ERF), name).get_output(0)
        return graph.cast(x, graph.dtype, f"{name}.rounded")

    def _once(self, key: str, make: Any) -> Any:
        """What all layers share."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _shape(self) -> Any:
        """[B, L] as int64 [2]."""
        shape = self.graph.network.add_shape(self.inputs["padded_rows"])
        return self.graph.named(shape, "padded_shape").get_output(0)

    def _sizes(self) -> Any:
        """[B, L, hidden_size] as int64 [3]."""
        graph = self.graph
        hidden = graph.constant(torch.tensor([self.spec.hidden_size], device="cpu"), "hidden_size")
        layer = graph.network.add_concatenation([self._once("shape", self._shape), hidden])
        graph.named(layer, "padded_sizes").axis = 0
        return layer.get_output(0)

    def _mask(self) -> Any:
        """Which keys exist: bool [B, 1, 1, L]."""
        graph, trt = self.graph, self.graph.trt
        length = graph.network.add_slice(self._once("shape", self._shape), (1,), (1,), (1,))
        length = graph.named(length, "padded_length").get_output(0)
        first = graph.constant(torch.tensor(0, dtype=torch.int32, device="cpu"), "first_column")
        step = graph.constant(torch.tensor([1], dtype=torch.int32, device="cpu"), "column_step")
        layer = graph.named(graph.network.add_fill((1,), trt.FillOperation.LINSPACE, trt.int32), "columns")
        for index, value in enumerate((length, first, step)):
            layer.set_input(index, value)
        columns = graph.shuffle(layer.get_output(0), (1, 1, 1, -1), "columns_of_keys")
        lengths = graph.shuffle(self.inputs["lengths"], (-1, 1, 1, 1), "lengths_of_sequences")
        return graph.elementwise(columns, lengths, "LESS", "key_exists")

    def _masked(self) -> Any:
        return self.graph.constant(torch.full((1, 1, 1, 1), _MASKED, device="cpu"), "masked_score")
