"""OpenVINO: converted from torch.export; int8 by NNCF's post-training quantisation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from xfast.benchmarks.peers_torch import Encoder

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]

_CALIBRATION_SEQUENCES = 48


def build(
    model: nn.Module,
    precision: str,
    *,
    threads: int,
    calibration: Sequence[tuple[torch.Tensor, torch.Tensor]],
    **_: Any,
) -> Run:
    """``calibration``: padded batches whose activations set the int8 ranges."""
    import openvino

    converted = _converted(model)
    if precision == "int8":
        converted = _quantized(converted, calibration)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if precision != "int8":  # what is not quantised then runs as OpenVINO likes best on this machine: bf16 where it can
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if precision == "bf16" else "f32"
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        request.infer({0: ids.numpy(), 1: mask.numpy()}, share_inputs=True)
        return request.get_output_tensor(0).data.copy()

    return run


def _converted(model: nn.Module) -> Any:
    import openvino

    model.set_attn_implementation("sdpa")
    ids = torch.full((2, 8), 5)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=model_limit(model))
    shape = {0: batch, 1: length}
    exported = torch.export.export(
        Encoder(model), (ids, mask), dynamic_shapes={"input_ids": shape, "attention_mask": shape}
    )
    return openvino.convert_model(exported)


def model_limit(model: nn.Module) -> int:
    """Longest sequence of the model."""
    return int(model.config.max_position_embeddings) - (model.config.pad_token_id or 0) - 1


def _quantized(converted: Any, calibration: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    # one sequence at a time: padding would widen the ranges
    sequences = [
        row[keep.bool()].unsqueeze(0) for ids, mask in calibration for row, keep in zip(ids, mask, strict=True)
    ]
    inputs = [{0: ids.numpy(), 1: torch.ones_like(ids).numpy()} for ids in sequences[:_CALIBRATION_SEQUENCES]]
    return nncf.quantize(
        converted, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs)
    )
