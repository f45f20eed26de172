"""ONNX Runtime: exported, fused by its transformer optimiser, and for int8 quantised as its documentation says."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xfast.benchmarks.peers_torch import Encoder

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]


def build(model: nn.Module, precision: str, *, threads: int, full_range: bool = True, **_: Any) -> Run:
    """``full_range=False`` quantises weights to 7 bits, for CPUs whose u8 x s8 products saturate (no VNNI)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = _fused(_exported(model, Path(folder)), model.config)
        if precision == "int8":
            path = _quantized(path, full_range)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return run


def _exported(model: nn.Module, folder: Path) -> Path:
    """By the tracing exporter with eager attention: the graph that the optimiser's patterns are written for."""
    path = folder / "exported.onnx"
    model.set_attn_implementation("eager")
    ids = torch.full((2, 8), 5)
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder(model),
            (ids, torch.ones_like(ids)),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "last_hidden_state": axes},
            opset_version=17,
            dynamo=False,
        )
    return path


def _fused(path: Path, config: Any) -> Path:
    """Attention, LayerNorm with its residual, and GELU with its bias as one operator each."""
    from onnxruntime.transformers import optimizer

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    fused = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=0
    )
    target = path.with_name("fused.onnx")
    fused.save_model_to_file(str(target), use_external_data_format=True)  # a protobuf ends at 2 GB
    return target


def _quantized(path: Path, full_range: bool) -> Path:
    """Dynamic quantisation, weights per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name("int8.onnx")
    logging.getLogger().setLevel(logging.ERROR)  # it advises pre-processing, which the optimiser has done
    quantize_dynamic(
        path,
        target,
        per_channel=True,
        reduce_range=not full_range,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return target
