"""CTranslate2: a ``TransformerEncoder`` specification filled from the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]

_TYPES = {"int8": "int8", "fp32": "float32"}


def build(model: nn.Module, precision: str, *, threads: int, **_: Any) -> Run:
    """Its loader reads XLM-RoBERTa only."""
    os.environ.setdefault("CT2_USE_EXPERIMENTAL_PACKED_GEMM", "1")
    import ctranslate2
    from ctranslate2.converters.transformers import XLMRobertaLoader

    if model.config.model_type != "xlm-roberta":
        raise ValueError(f"its loader reads xlm-roberta, this is {model.config.model_type}")
    model.config.position_embedding_type = "absolute"
    wrapper = nn.Module()
    wrapper.config, wrapper.roberta = model.config, model
    spec = XLMRobertaLoader().get_model_spec(wrapper)
    # its loader keeps the two unused positions in front of RoBERTa's table
    spec.encoder.position_encodings.encodings = model.embeddings.position_embeddings.weight[2:]
    spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "3", "0", "2"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.mkdir()
        spec.validate()
        spec.optimize(quantization=_TYPES[precision])
        spec.save(str(path))
        encoder = ctranslate2.Encoder(
            str(path), device="cpu", compute_type=_TYPES[precision], inter_threads=1, intra_threads=threads
        )

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        view = ctranslate2.StorageView.from_array(ids.to(torch.int32).numpy())
        lengths = ctranslate2.StorageView.from_array(mask.sum(1, dtype=torch.int32).numpy())
        return np.array(encoder.forward_batch(view, lengths).last_hidden_state)

    return run
