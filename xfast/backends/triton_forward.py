"""The forward pass of the Triton backend: which kernel runs on what. All sizes come from the host, all lengths do not.

Buffers have R rows: T itself, or the bucket that T was rounded up to. Rows past T hold whatever comes of it, NaN too;
no row before T ever reads them: products and norms go row by row, and attention's tiles name the rows they read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfast.architecture import EncoderSpec
from xfast.backends.triton_weights import Layer, Parameters, Weight
from xfast.kernels.activation import bias_gelu, bias_gelu_quantize
from xfast.kernels.attention import Tiles, attention
from xfast.kernels.embedding import embed
from xfast.kernels.gemm import Scaled, choose, gemm, scaled_gemm
from xfast.kernels.gemm_weight_only import expand, expands, weight_only_gemm
from xfast.kernels.integer_weights import IntegerWeights
from xfast.kernels.launch import capability_of
from xfast.kernels.norm import add_norm
from xfast.kernels.packing import attention_tiles
from xfast.kernels.quantize import quantize
from xfast.kernels.tiles import Tile, attention_plan, attention_tile


@dataclass(frozen=True)
class DeviceBatch:
    """What a forward reads. R buffer rows, S sequences (some may be empty).

    Attributes:
        ids, positions, types: int32 [R].
        cu_seqlens: int32 [S + 1]; row_keys: int32 [2, R]; count: int32 [1], the real number of tokens.
        tile, shared: attention's plan.
        embeds: [*, hidden_size] that ``ids`` index, or None for the word embeddings.
        selected: int32 [N], ascending rows wanted from the last layer, or None for all.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    cu_seqlens: torch.Tensor
    row_keys: torch.Tensor
    count: torch.Tensor
    tile: Tile
    shared: bool
    embeds: torch.Tensor | None = None
    selected: torch.Tensor | None = None


@dataclass
class _Hidden:
    """The residual stream [R, hidden_size], and what the next product reads: the stream or, pre-norm, its LayerNorm.

    ``quantised``: the latter in e4m3, where that product is.
    """

    values: torch.Tensor
    normed: torch.Tensor
    quantised: Scaled | None

    def operand(self, fp8: bool) -> torch.Tensor | Scaled:
        """What a product reads."""
        if not fp8:
            return self.normed
        return quantize(self.normed) if self.quantised is None else self.quantised


class TritonForward:
    """Runs an encoder's layers."""

    def __init__(self, spec: EncoderSpec, parameters: Parameters, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.parameters = parameters
        self.capability = capability_of(device)
        self._pre_norm = spec.norm == "pre"

    def plan(self, max_seqlen: int, sequences: int) -> tuple[Tile, bool]:
        """Attention's tile and whether short sequences share tiles."""
        return attention_plan(self.spec.head_dim, self.dtype.itemsize, self.capability, max_seqlen, sequences)

    def __call__(
        self, batch: DeviceBatch, layers: int, hidden_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[R or N, hidden_size] and, if asked for, [layers + 1, R, hidden_size], in ``dtype``."""
        hidden = self._embed(batch, layers)
        # Kept states are copies: a layer adds its projections to the residual stream in place.
        states = [hidden.values.clone()] if hidden_states else []
        if layers == 0:
            values = hidden.values if batch.selected is None else hidden.values[batch.selected.long()]
            return values, torch.stack(states) if hidden_states else None
        keys = batch.row_keys if batch.shared else None
        tiles = attention_tiles(batch.cu_seqlens, batch.cu_seqlens, batch.ids.shape[0], batch.tile, row_keys=keys)
        for index in range(layers):
            next_fp8 = index + 1 < layers and _is_fp8(self.parameters.layers[index + 1].qkv)
            if index + 1 == layers and batch.selected is not None:
                hidden = self._last_layer(index, hidden, batch, batch.selected)
            else:
                hidden = self._layer(index, hidden, tiles, next_fp8)
            if hidden_states:
                states.append(hidden.values.clone())
        return hidden.values, torch.stack(states) if hidden_states else None

    def _embed(self, batch: DeviceBatch, layers: int) -> _Hidden:
        p, spec = self.parameters, self.spec
        table = p.word if batch.embeds is None else batch.embeds
        fp8 = layers > 0 and _is_fp8(p.layers[0].qkv)
        rows, columns = batch.ids.shape[0], spec.hidden_size
        norm, apart = self._norm_after(0)
        stream = torch.empty(rows, columns, dtype=self.dtype, device=self.device) if apart else None
        normed, quantised = embed(
            batch.ids, batch.positions, batch.types, batch.count, table, p.position, p.type, *norm,
            spec.layer_norm_eps, rows=rows, dtype=self.dtype, total=stream, quantize=fp8,
        )  # fmt: skip
        return _Hidden(normed if stream is None else stream, normed, quantised)

    def _norm_after(self, done: int) -> tuple[tuple[torch.Tensor, torch.Tensor], bool]:
        """The LayerNorm after ``done`` layers, and whether the residual stream stays beside it (pre-norm)."""
        p = self.parameters
        if not self._pre_norm:
            return (p.outer_norm if done == 0 else p.layers[done - 1].ffn_norm), False
        if done < self.spec.num_layers:
            return p.layers[done].attention_norm, True
        return p.outer_norm, False

    def _layer(self, index: int, x: _Hidden, tiles: Tiles, next_fp8: bool) -> _Hidden:
        layer = self.parameters.layers[index]
        heads, head_dim, rows = self.spec.num_heads, self.spec.head_dim, x.values.shape[0]
        qkv = self._product(x.operand(_is_fp8(layer.qkv)), layer.qkv, layer.qkv_bias)
        q, k, v = qkv.view(rows, 3, heads, head_dim).unbind(1)
        context = attention(q, k, v, tiles).view(rows, self.spec.hidden_size)
        return self._rest(index, x.values, context, next_fp8)

    def _last_layer(self, number: int, x: _Hidden, batch: DeviceBatch, selected: torch.Tensor) -> _Hidden:
        """Keys and values of every token, everything else of the ``selected`` rows only."""
        layer = self.parameters.layers[number]
        hidden, heads, head_dim = self.spec.hidden_size, self.spec.num_heads, self.spec.head_dim
        index = selected.long()
        residual = x.values[index]
        operand = x.operand(_is_fp8(layer.qkv))
        kv = self._product(operand, _part(layer.qkv, hidden, 3 * hidden), layer.qkv_bias[hidden:])
        if isinstance(operand, tuple):  # e4m3 rows are gathered as bytes: indexing has no kernel for the type
            mine: torch.Tensor | Scaled = (
                operand[0].view(torch.uint8)[index].view(operand[0].dtype),
                operand[1][index],
            )
        else:
            mine = operand[index] if self._pre_norm else residual
        q = self._product(mine, _part(layer.qkv, 0, hidden), layer.qkv_bias[:hidden])
        cu_q = torch.searchsorted(selected, batch.cu_seqlens, out_int32=True)
        tile = attention_tile(head_dim, self.dtype.itemsize, self.capability, 1)
        tiles = attention_tiles(cu_q, batch.cu_seqlens, selected.shape[0], tile)
        k, v = kv.view(-1, 2, heads, head_dim).unbind(1)
        context = attention(q.view(-1, heads, head_dim), k, v, tiles, out=torch.zeros_like(q).view(-1, heads, head_dim))
        return self._rest(number, residual, context.view(-1, hidden), False)

    def _rest(self, index: int, residual: torch.Tensor, context: torch.Tensor, next_fp8: bool) -> _Hidden:
        """Everything after attention: output projection, LayerNorm, FFN, LayerNorm."""
        layer = self.parameters.layers[index]
        out = self._projected(context, layer.attention_out, residual)
        norm = layer.ffn_norm if self._pre_norm else layer.attention_norm
        middle = self._add_norm(
            out, residual, layer.attention_out_bias, norm, self._pre_norm, self._is_alone(layer.attention_out),
            _is_fp8(layer.ffn_in),
        )  # fmt: skip
        out = self._projected(self._ffn_in(layer, middle), layer.ffn_out, middle.values)
        norm, apart = self._norm_after(index + 1)
        alone = self._is_alone(layer.ffn_out)
        return self._add_norm(out, middle.values, layer.ffn_out_bias, norm, apart, alone, next_fp8)

    def _add_norm(
        self, out: torch.Tensor, stream: torch.Tensor, bias: torch.Tensor | None,
        norm: tuple[torch.Tensor, torch.Tensor], apart: bool, alone: bool, quantize: bool,
    ) -> _Hidden:  # fmt: skip
        """The residual stream after a product, and its LayerNorm.

        Args:
            out: the product without its bias, already added to the ``stream`` in place unless it is ``alone``.
            apart: the stream stays beside its LayerNorm; else LayerNorm is the stream.
            quantize: the next product is e4m3.
        """
        normed, quantised = add_norm(
            out, *norm, self.spec.layer_norm_eps, bias=bias, residual=stream if alone else None,
            total=stream if apart else None, quantize=quantize,
        )  # fmt: skip
        return _Hidden(stream if apart else normed, normed, quantised)

    def _ffn_in(self, layer: Layer, x: _Hidden) -> torch.Tensor | Scaled:
        """GELU(x W^T + b), quantised when the next product is e4m3."""
        operand = x.operand(_is_fp8(layer.ffn_in))
        if _is_fp8(layer.ffn_out):
            return bias_gelu_quantize(self._product(operand, layer.ffn_in, None), layer.ffn_in_bias)
        if isinstance(operand, tuple):
            return bias_gelu(self._product(operand, layer.ffn_in, None), layer.ffn_in_bias)
        weight = self._ready(layer.ffn_in, operand.shape[0])
        if isinstance(weight, IntegerWeights):
            return weight_only_gemm(operand, weight, bias=layer.ffn_in_bias, activation="gelu")
        shape = (self.spec.hidden_size, self.spec.intermediate_size, operand.shape[0])
        if choose(f"{self.dtype.itemsize * 8}-gelu", *shape) == "triton":
            return gemm(operand, weight, bias=layer.ffn_in_bias, activation="gelu")
        return bias_gelu(torch.mm(operand, weight.t()), layer.ffn_in_bias)

    def _projected(self, x: torch.Tensor | Scaled, weight: Weight, residual: torch.Tensor) -> torch.Tensor:
        """x W^T added to the residual, in place, in the product's accumulator, or alone: LayerNorm adds it then.

        In place, because out of place torch first copies the residual.
        """
        if self._is_alone(weight):
            return self._product(quantize(x) if _is_fp8(weight) and not isinstance(x, tuple) else x, weight, None)
        assert isinstance(x, torch.Tensor)
        ready = self._ready(weight, x.shape[0])
        if isinstance(ready, IntegerWeights):
            return weight_only_gemm(x, ready, residual=residual, out=residual)
        return residual.addmm_(x, ready.t())

    def _is_alone(self, weight: Weight) -> bool:
        """Whether LayerNorm adds a product to the residual stream.

        A pre-norm stream is rounded each time it is stored and grows: rounded after the product and again after the
        bias, it would lose biases below half its last place in every layer.
        """
        return self._pre_norm or _is_fp8(weight)

    def _product(self, x: torch.Tensor | Scaled, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias, [rows, out]."""
        if isinstance(weight, tuple):
            assert isinstance(x, tuple)
            return scaled_gemm(x, weight, self.dtype, bias)
        assert isinstance(x, torch.Tensor)
        ready = self._ready(weight, x.shape[0])
        if isinstance(ready, IntegerWeights):
            return weight_only_gemm(x, ready, bias=bias)
        return torch.mm(x, ready.t()) if bias is None else torch.addmm(bias, x, ready.t())

    def _ready(self, weight: Weight, rows: int) -> torch.Tensor | IntegerWeights:
        """Integer weights as floats, where there are so many rows that cuBLASLt is worth expanding them for."""
        assert not isinstance(weight, tuple)
        return expand(weight, self.dtype) if isinstance(weight, IntegerWeights) and expands(rows) else weight


def _is_fp8(weight: Weight) -> bool:
    """Whether the product reads e4m3 operands."""
    return isinstance(weight, tuple)


def _part(weight: Weight, begin: int, end: int) -> Weight:
    """Some of a weight's outputs."""
    if isinstance(weight, IntegerWeights):
        return weight.part(begin, end)
    if isinstance(weight, tuple):
        return weight[0][begin:end], weight[1][:, begin:end]
    return weight[begin:end]
