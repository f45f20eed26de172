"""Evaluates a TensorRT network with torch on the CPU, as the network itself says: for tests, without a GPU.

Everything is read off the ``INetworkDefinition``: kinds of layers, attributes, constants, dtypes. What is not modelled
raises ``NotModelled``, so that nothing is approximated in silence. Products accumulate in float32; every layer's result
is rounded to the dtype that the network gives it, which a fused engine does less often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


class NotModelled(AssertionError):
    """The network holds something that this interpreter does not know."""


def known(condition: bool, what: str) -> None:
    if not condition:
        raise NotModelled(what)


class Interpreter:
    """One network.

    Args:
        trt: the module.
        network: its ``INetworkDefinition``.
        arrays: the constants' tensors in the order of the constant layers: the API cannot read bfloat16 and e4m3 back.
            Where it can, they must be the very memory that the network reads.
    """

    def __init__(self, trt: Any, network: Any, arrays: Sequence[torch.Tensor]) -> None:
        self.trt, self.network = trt, network
        self.arrays = list(arrays)
        self.dtypes = {
            trt.float32: torch.float32,
            trt.float16: torch.float16,
            trt.bfloat16: torch.bfloat16,
            trt.int32: torch.int32,
            trt.int64: torch.int64,
            trt.bool: torch.bool,
            trt.int8: torch.int8,
            trt.fp8: torch.float8_e4m3fn,
        }
        kinds = trt.LayerType
        # Layer type -> (class, method). The Python API returns plain ILayer objects: the class gives them attributes.
        self.layers: dict[Any, tuple[type, Callable[..., torch.Tensor]]] = {
            kinds.CONSTANT: (trt.IConstantLayer, self._constant),
            kinds.GATHER: (trt.IGatherLayer, self._gather),
            kinds.CAST: (trt.ICastLayer, self._cast),
            kinds.ELEMENTWISE: (trt.IElementWiseLayer, self._elementwise),
            kinds.NORMALIZATION: (trt.INormalizationLayer, self._normalization),
            kinds.MATRIX_MULTIPLY: (trt.IMatrixMultiplyLayer, self._matmul),
            kinds.SHUFFLE: (trt.IShuffleLayer, self._shuffle),
            kinds.SLICE: (trt.ISliceLayer, self._slice),
            kinds.SHAPE: (trt.IShapeLayer, self._shape),
            kinds.CONCATENATION: (trt.IConcatenationLayer, self._concatenation),
            kinds.ACTIVATION: (trt.IActivationLayer, self._activation),
            kinds.SOFTMAX: (trt.ISoftMaxLayer, self._softmax),
            kinds.FILL: (trt.IFillLayer, self._fill),
            kinds.SELECT: (trt.ISelectLayer, self._select),
            kinds.UNARY: (trt.IUnaryLayer, self._unary),
            kinds.REDUCE: (trt.IReduceLayer, self._reduce),
            kinds.QUANTIZE: (trt.IQuantizeLayer, self._quantize),
            kinds.DEQUANTIZE: (trt.IDequantizeLayer, self._dequantize),
        }
        if hasattr(kinds, "ATTENTION_INPUT"):
            self.layers[kinds.ATTENTION_INPUT] = (trt.IAttentionInputLayer, self._attention_input)
            self.layers[kinds.ATTENTION_OUTPUT] = (trt.IAttentionOutputLayer, self._attention_output)

    def __call__(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The network's outputs by name; ``feeds`` are its inputs."""
        network = self.network
        self.values: dict[str, Any] = {}
        self.constants = 0
        declared = [network.get_input(i) for i in range(network.num_inputs)]
        assert {tensor.name for tensor in declared} == feeds.keys()
        for tensor in declared:
            self._keep(tensor, feeds[tensor.name])
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            kind = self.trt.ILayer.type.fget(layer)  # IActivationLayer hides it with one of its own
            known(kind in self.layers, f"layer {layer.name}: {kind}")
            known(layer.num_outputs == 1, f"layer {layer.name}: {layer.num_outputs} outputs")
            cls, evaluate = self.layers[kind]
            layer.__class__ = cls
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            missing = [x.name for x in inputs if x is not None and x.name not in self.values]
            assert not missing, f"layer {layer.name} comes before its inputs {missing}"
            values = [None if x is None else self.values[x.name] for x in inputs]
            self._keep(layer.get_output(0), evaluate(layer, *values))
        assert self.constants == len(self.arrays)
        return {name: self.values[name] for name in (network.get_output(i).name for i in range(network.num_outputs))}

    def _keep(self, tensor: Any, value: torch.Tensor) -> None:
        """Stores a value that must be what the network declares."""
        if isinstance(value, torch.Tensor):
            assert value.dtype == self.dtypes[tensor.dtype], f"{tensor.name}: {value.dtype}, declared {tensor.dtype}"
            shape = tuple(tensor.shape)
            fits = len(shape) == value.dim() and all(a in (-1, b) for a, b in zip(shape, value.shape, strict=True))
            assert fits, f"{tensor.name}: {tuple(value.shape)}, declared {shape}"
        assert tensor.name not in self.values, f"two tensors are named {tensor.name}"
        self.values[tensor.name] = value

    def _constant(self, layer: Any) -> torch.Tensor:
        values = self.arrays[self.constants]
        self.constants += 1
        weights = layer.weights
        known(values.is_contiguous() and values.numel() == weights.size, f"{layer.name}: its array is another's")
        if isinstance(weights, self.trt.Weights):  # what NumPy cannot hold
            known(weights.dtype in (self.trt.bfloat16, self.trt.fp8), f"{layer.name}: {weights.dtype}")
            assert values.dtype == self.dtypes[weights.dtype], f"{layer.name}: {values.dtype}"
        else:
            assert weights.ctypes.data == values.data_ptr(), f"{layer.name} reads other memory"
            values = torch.from_numpy(weights)
        return values.view(tuple(layer.shape))

    def _gather(self, layer: Any, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        known(layer.mode == self.trt.GatherMode.DEFAULT and layer.num_elementwise_dims == 0, f"{layer.name}: mode")
        axis = layer.axis
        inside = bool(((indices >= 0) & (indices < x.shape[axis])).all())
        assert inside, f"{layer.name}: an index outside 0 to {x.shape[axis] - 1}"
        shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
        return x.index_select(axis, indices.flatten().long()).view(shape)

    def _cast(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtypes[layer.to_type])

    def _elementwise(self, layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype, f"{layer.name}: {a.dtype} and {b.dtype}"
        self._check_broadcast(layer, a, b)
        operations = self.trt.ElementWiseOperation
        if layer.op == operations.LESS:
            return a < b
        arithmetic = {
            operations.SUM: torch.add,
            operations.PROD: torch.mul,
            operations.DIV: torch.div,
            operations.MAX: torch.maximum,
        }
        known(layer.op in arithmetic, f"{layer.name}: {layer.op}")
        return arithmetic[layer.op](a.float(), b.float()).to(a.dtype)

    def _unary(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        known(layer.op == self.trt.UnaryOperation.ABS, f"{layer.name}: {layer.op}")
        return x.abs()

    def _reduce(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        known(layer.op == self.trt.ReduceOperation.MAX and layer.keep_dims, f"{layer.name}: {layer.op}")
        known(layer.axes == 1 << x.dim() - 1, f"{layer.name}: axes {layer.axes:b}")
        return x.amax(-1, keepdim=True)

    def _quantize(self, layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Division in float32, rounding to even, saturation: at -128 and 127, or e4m3's largest finite values."""
        assert x.dtype == scale.dtype, f"{layer.name}: {x.dtype} by {scale.dtype}"
        known(scale.dim() == 0, f"{layer.name}: a scale of shape {tuple(scale.shape)}")
        scaled = x.float() / scale.float()
        if self.dtypes[layer.to_type] == torch.int8:
            return scaled.round().clamp(-128, 127).to(torch.int8)
        return scaled.clamp(-448, 448).to(self.dtypes[layer.to_type])

    def _dequantize(self, layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        dtype = self.dtypes[layer.to_type]
        assert scale.dtype == dtype, f"{layer.name}: a scale in {scale.dtype} for {dtype}"
        if scale.dim() == 1:
            known(layer.axis == 0 and len(scale) == len(x), f"{layer.name}: axis {layer.axis}")
            scale = scale[:, None]
        else:
            known(scale.dim() == 0, f"{layer.name}: a scale of shape {tuple(scale.shape)}")
        return (x.float() * scale.float()).to(dtype)

    def _normalization(self, layer: Any, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        assert x.dtype == gain.dtype == bias.dtype == torch.float32, f"{layer.name}: statistics in {x.dtype}"
        known(layer.num_groups == 1, f"{layer.name}: groups")
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        known(axes == [x.dim() - 1] and layer.axes >> x.dim() == 0, f"{layer.name}: axes {axes}")
        assert gain.shape == bias.shape == (1, x.shape[-1]), f"{layer.name}: {tuple(gain.shape)}"
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        return (x - mean) / (variance + layer.epsilon).sqrt() * gain + bias

    def _matmul(self, layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype and a.dim() == b.dim(), f"{layer.name}: operands differ in dtype or rank"
        assert a.shape[:-2] == b.shape[:-2], f"{layer.name}: leading dimensions differ"
        kinds = self.trt.MatrixOperation
        operands = []
        for x, kind in ((a, layer.op0), (b, layer.op1)):
            known(kind in (kinds.NONE, kinds.TRANSPOSE), f"{layer.name}: {kind}")
            operands.append(x.float().mT if kind == kinds.TRANSPOSE else x.float())
        return (operands[0] @ operands[1]).to(a.dtype)

    def _shuffle(self, layer: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        known(not rest and layer.zero_is_placeholder, f"{layer.name}: dynamic or literal dimensions")
        x = x.permute(*list(layer.first_transpose)[: x.dim()])
        dims = list(layer.reshape_dims)
        known(len(dims) > 0 and dims.count(-1) < 2, f"{layer.name}: reshape {dims}")
        known(all(i < x.dim() for i, size in enumerate(dims) if size == 0), f"{layer.name}: reshape {dims}")
        dims = [x.shape[i] if size == 0 else size for i, size in enumerate(dims)]
        x = x.reshape(dims)
        return x.permute(*list(layer.second_transpose)[: x.dim()]).contiguous()

    def _slice(self, layer: Any, x: torch.Tensor, *dynamic: Any) -> torch.Tensor:
        known(layer.mode == self.trt.SampleMode.STRICT_BOUNDS, f"{layer.name}: {layer.mode}")
        known(getattr(layer, "axes", None) is None, f"{layer.name}: axes")
        start, stride = list(layer.start), list(layer.stride)
        known(set(stride) == {1}, f"{layer.name}: stride {stride}")
        if dynamic:  # (start, sizes)
            known(len(dynamic) == 2 and dynamic[0] is None, f"{layer.name}: dynamic start or stride")
            sizes = dynamic[1].tolist()
        else:
            sizes = list(layer.shape)
        assert len(start) == len(sizes) == x.dim(), f"{layer.name}: rank"
        for axis, (begin, size) in enumerate(zip(start, sizes, strict=True)):
            assert begin >= 0 and size >= 0 and begin + size <= x.shape[axis], f"{layer.name}: out of bounds"
            x = x.narrow(axis, begin, size)
        return x.contiguous()

    def _shape(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(x.shape, dtype=torch.int64)

    def _concatenation(self, layer: Any, *parts: torch.Tensor) -> torch.Tensor:
        assert len({part.dtype for part in parts}) == 1, f"{layer.name}: dtypes differ"
        return torch.cat(parts, layer.axis)

    def _activation(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32, f"{layer.name}: in {x.dtype}"
        known(layer.type == self.trt.ActivationType.GELU_ERF, f"{layer.name}: {layer.type}")
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def _softmax(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32, f"{layer.name}: in {x.dtype}"
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        known(len(axes) == 1, f"{layer.name}: axes {axes}")
        return x.softmax(axes[0])

    def _fill(self, layer: Any, *inputs: Any) -> torch.Tensor:
        known(layer.operation == self.trt.FillOperation.LINSPACE, f"{layer.name}: {layer.operation}")
        known(len(inputs) == 3 and not any(x is None for x in inputs), f"{layer.name}: static values")
        size, first, step = inputs
        known(size.shape == (1,) and first.dim() == 0 and step.shape == (1,), f"{layer.name}: rank")
        dtype = self.dtypes[layer.to_type]
        assert first.dtype == step.dtype == dtype, f"{layer.name}: {first.dtype}, {step.dtype} for {dtype}"
        return first + step * torch.arange(int(size), dtype=dtype)

    def _select(self, layer: Any, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert condition.dtype == torch.bool and a.dtype == b.dtype, f"{layer.name}: dtypes"
        self._check_broadcast(layer, condition, a, b)
        return torch.where(condition, a, b)

    def _attention_input(self, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        """Checks everything; what the output layer computes is stored in place of a tensor."""
        trt, attention = self.trt, layer.attention
        known(attention.norm_op == trt.AttentionNormalizationOp.SOFTMAX, f"{layer.name}: {attention.norm_op}")
        known(attention.causal_kind == trt.CausalMaskKind.NONE, f"{layer.name}: {attention.causal_kind}")
        forms = {attention.query_form, attention.key_value_form}
        known(forms == {trt.AttentionIOForm.PADDED_BHND}, f"{layer.name}: {forms}")
        absent = (attention.mask, attention.normalization_quantize_scale, attention.query_lengths)
        known(all(x is None for x in absent) and attention.num_ranks == 1, f"{layer.name}: mask, scale or ranks")
        names = [attention.get_input(i).name for i in range(3)]
        assert names == [layer.get_input(i).name for i in range(3)]
        lengths = self.values[attention.key_value_lengths.name]
        known([x is None for x in rest] == [True] * 3 + [False] and rest[-1] is lengths, f"{layer.name}: inputs")
        assert q.dtype == k.dtype == v.dtype and q.shape == k.shape == v.shape, f"{layer.name}: q, k, v differ"
        known(q.dtype == torch.float32 or not attention.decomposable, f"{layer.name}: may lose its float32 softmax")
        return q, k, v, lengths

    def _attention_output(self, layer: Any, made: Any) -> torch.Tensor:
        """softmax(q k^T) v over the first ``lengths`` keys, unscaled; shares are rounded, as kernels do it."""
        q, k, v, lengths = made
        assert lengths.shape == q.shape[:1] and bool((lengths > 0).all()), f"{layer.name}: lengths {lengths}"
        exists = torch.arange(k.shape[2]) < lengths[:, None, None, None]
        scores = (q.float() @ k.float().mT).masked_fill(~exists, -math.inf)
        return (scores.softmax(-1).to(v.dtype).float() @ v.float()).to(v.dtype)

    def _check_broadcast(self, layer: Any, *parts: torch.Tensor) -> None:
        assert len({part.dim() for part in parts}) == 1, f"{layer.name}: ranks differ"
        shape = torch.broadcast_shapes(*(part.shape for part in parts))
        assert len(shape) == parts[0].dim()
