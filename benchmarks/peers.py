"""The engines to compare, as data; each runs behind one call, so that all do the same work.

``build(engine, model, threads)`` returns ``run(input_ids, attention_mask) -> [batch, length, hidden] array``. The
adapters live in one module per family of engines (``peers_*.py``), each with one function ``build``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from xfast.errors import InvalidOptionError
from xfast.terminal import listed

Run = Callable[[torch.Tensor, torch.Tensor], np.ndarray]

PRECISIONS = ("fp32", "bf16", "int8")
REFERENCE = "transformers-fp32"
"""Errors are distances to this engine's output."""


@dataclass(frozen=True)
class Engine:
    """How to make one engine.

    Attributes:
        name: ``family-precision``.
        module: module of this package whose ``build(model, precision, threads=, calibration=, **options)`` makes it.
        packages: what it needs, importable module -> pip name.
        options: further arguments of ``build``.
        needs_flags: it needs one of these CPU flags to be worth running.
        own_python: it lives in a Python environment of its own.
        calibrated: ``build`` sets ranges by the activations of ``calibration``.
    """

    name: str
    module: str
    packages: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_flags: tuple[str, ...] = ()
    own_python: bool = False
    calibrated: bool = False

    @property
    def family(self) -> str:
        """The name without the precision."""
        return self.name.rpartition("-")[0]

    @property
    def precision(self) -> str:
        """fp32, bf16 or int8."""
        return self.name.rpartition("-")[2]


_TORCH = {"torch": "torch", "transformers": "transformers"}
_ONNX = {"onnxruntime": "onnxruntime", "onnx": "onnx", "sympy": "sympy"}
_OPENVINO = {"openvino": "openvino"}
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("xfast-fp32", "peers_xfast", {"xfast": "xfast"}),
        Engine("xfast-bf16", "peers_xfast", {"xfast": "xfast"}),
        Engine("xfast-int8", "peers_xfast", {"xfast": "xfast"}),
        Engine("transformers-fp32", "peers_torch", _TORCH, {"method": "sdpa"}),
        Engine("transformers-bf16", "peers_torch", _TORCH, {"method": "sdpa"}),
        Engine("transformers-eager-fp32", "peers_torch", _TORCH, {"method": "eager"}),
        Engine("torch-compile-fp32", "peers_torch", _TORCH, {"method": "compile"}),
        Engine("torch-compile-bf16", "peers_torch", _TORCH, {"method": "compile"}),
        Engine("torch-dynamic-int8", "peers_torch", _TORCH, {"method": "dynamic"}),
        Engine("torchao-int8", "peers_torch", {**_TORCH, "torchao": "torchao"}, {"method": "torchao"}),
        Engine("onnxruntime-fp32", "peers_onnx", _ONNX),
        Engine("onnxruntime-int8", "peers_onnx", _ONNX),
        Engine("openvino-fp32", "peers_openvino", _OPENVINO),
        Engine("openvino-bf16", "peers_openvino", _OPENVINO, needs_flags=_BF16_FLAGS),
        Engine("openvino-int8", "peers_openvino", {**_OPENVINO, "nncf": "nncf"}, calibrated=True),
        Engine("ctranslate2-fp32", "peers_ctranslate2", {"ctranslate2": "ctranslate2"}),
        Engine("ctranslate2-int8", "peers_ctranslate2", {"ctranslate2": "ctranslate2"}),
        Engine("zentorch-bf16", "peers_zentorch", {"zentorch": "zentorch"}, own_python=True),
    )
}


def choose(peers: str, precisions: Iterable[str]) -> list[str]:
    """Engines by what ``--peers`` says (``all``, ``none``, or names of engines or families) and by precision.

    xfast's own engines of these precisions come first.

    Raises:
        InvalidOptionError: an unknown name, or no engine of these precisions.
    """
    wanted = list(precisions)
    if unknown := [precision for precision in wanted if precision not in PRECISIONS]:
        raise InvalidOptionError(f"precision: {unknown[0]!r} is not accepted; accepted: {', '.join(PRECISIONS)}")
    rest = [engine for engine in ENGINES.values() if engine.family != "xfast"]
    names = () if peers == "none" else listed(peers)
    if not names and peers != "none":
        raise InvalidOptionError(f"peers: {peers!r} is not accepted; accepted: all, none, or names")
    chosen = [f"xfast-{precision}" for precision in PRECISIONS if precision in wanted]
    for name in names:
        found = rest if name == "all" else [engine for engine in rest if name in (engine.name, engine.family)]
        if not found:
            families = ", ".join(dict.fromkeys(engine.family for engine in rest))
            accepted = f"all, none, {families}, or one of them with -{', -'.join(PRECISIONS)}"
            raise InvalidOptionError(f"peers: {name!r} is not accepted; accepted: {accepted}")
        fitting = [engine.name for engine in found if engine.precision in wanted or engine.name == name]
        if not fitting and name != "all":
            has = ", ".join(engine.name for engine in found)
            raise InvalidOptionError(f"peers: {name} has no engine in {', '.join(wanted)}; accepted: {has}")
        chosen += fitting
    return list(dict.fromkeys(chosen))


def missing(engine: str) -> str | None:
    """The pip name that would add what an engine lacks, or None when it is installed here."""
    absent = [pip for module, pip in ENGINES[engine].packages.items() if importlib.util.find_spec(module) is None]
    return " ".join(absent) or None
