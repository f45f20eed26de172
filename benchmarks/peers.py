"""One adapter per engine behind one call, so that all do the same work: padded batches in, last hidden states out.

``build(engine, model, threads)`` returns ``run(input_ids, attention_mask) -> [batch, length, hidden] array``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]

SIZES = {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096), "tiny": (2, 128, 4, 256)}
# engine -> (pip name, module) that it needs
ENGINES = {
    "transformers-fp32": ("transformers", "transformers"),
    "transformers-bf16": ("transformers", "transformers"),
    "ctranslate2-fp32": ("ctranslate2", "ctranslate2"),
    "ctranslate2-int8": ("ctranslate2", "ctranslate2"),
    "xfast-fp32": ("xfast", "xfast"),
    "xfast-bf16": ("xfast", "xfast"),
    "xfast-int8": ("xfast", "xfast"),
}


def missing(engine: str) -> str | None:
    """The pip name that would add a missing engine, or None when it is installed."""
    package, module = ENGINES[engine]
    return None if importlib.util.find_spec(module) else package


def version(engine: str) -> str:
    """Installed version of the package behind an engine."""
    return importlib.metadata.version(ENGINES[engine][0])


def make_model(size: str, seed: int = 0) -> nn.Module:
    """XLM-R without pooler at a real size (``base``, ``large``) or ``tiny``, with seeded random weights."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    layers, hidden, heads, inner = SIZES[size]
    config = XLMRobertaConfig(
        vocab_size=250002,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return XLMRobertaModel(config, add_pooling_layer=False).eval()


def build(engine: str, model: nn.Module, threads: int) -> Run:
    """An engine ready to run ``model`` on ``threads`` threads. May change ``model``."""
    torch.set_num_threads(threads)
    name, precision = engine.rsplit("-", 1)
    if name == "transformers":
        return _torch_run(model.to(torch.bfloat16) if precision == "bf16" else model)
    if name == "xfast":
        import xfast

        xfast.set_num_threads(threads)
        return _torch_run(xfast.accelerate(model, precision=precision))
    if name == "ctranslate2":
        return _ctranslate2(model, precision, threads)
    raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")


def _torch_run(model: nn.Module) -> Run:
    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask).last_hidden_state.float().numpy()

    return run


def _ctranslate2(model: nn.Module, precision: str, threads: int) -> Run:
    import ctranslate2
    from ctranslate2.converters.transformers import XLMRobertaLoader

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
        spec.optimize(quantization={"int8": "int8", "fp32": "float32"}[precision])
        spec.save(str(path))
        encoder = ctranslate2.Encoder(
            str(path), device="cpu", compute_type={"int8": "int8", "fp32": "float32"}[precision], intra_threads=threads
        )

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        view = ctranslate2.StorageView.from_array(ids.to(torch.int32).numpy())
        lengths = ctranslate2.StorageView.from_array(mask.sum(1, dtype=torch.int32).numpy())
        return np.array(encoder.forward_batch(view, lengths).last_hidden_state)

    return run
