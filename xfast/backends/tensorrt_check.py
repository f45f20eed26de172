"""An engine is compared with plain PyTorch before it is trusted: finite, within its precision's error, same labels.

The reference reads the model's own modules by role. It is slow and simple on purpose: by sequence, nothing fused.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from xfast.architecture import QKV_ROLES, EncoderSpec, EncoderWeights
from xfast.backends.tensorrt_network import DTYPES
from xfast.backends.tensorrt_quantize import TOPS, TYPES
from xfast.errors import XfastError

FACTOR = 2.0
"""An engine may be this many times as far from fp32 as PyTorch in the same precision.

Two ways to compute int8 or fp8 differ from each other as much as from fp32, some percent: no bound sees less than that.
"""

FLOOR = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3, "int8": 8e-3, "fp8": 8e-3}
"""Relative error that is always accepted: about one rounding of the output."""

LABELS, AGREEMENT = 3, 0.99
"""Classes of the seeded random head, and the share of the tokens with a clear label that must get the same one."""

CLEAR = 4.0
"""A label is clear whose margin is this many times what the allowed error can move a logit."""


class EngineRejectedError(XfastError, RuntimeError):
    """An engine's results differ from PyTorch's by more than its precision explains; ``report`` has the figures."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"the engine was refused: {report}")
        self.report = report


@dataclass(frozen=True)
class Case:
    """One sample batch, packed.

    Attributes:
        ids, positions, types: int32 [T].
        lengths: tokens of each sequence, T together.
        rows: int32, ascending rows that are wanted; None: all.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    lengths: tuple[int, ...]
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        error: worst relative error ||y - y32|| / ||y32|| over the batches.
        bound: what was allowed in that batch.
        agreement: share of the clearly labelled tokens with the reference's label.
        finite: no NaN and no infinity.
    """

    error: float
    bound: float
    agreement: float
    finite: bool

    @property
    def accepted(self) -> bool:
        return self.finite and self.error <= self.bound and self.agreement >= AGREEMENT

    def __str__(self) -> str:
        if not self.finite:
            return "NaN or infinity in its output"
        return f"relative error {self.error:.2e} (allowed {self.bound:.2e}), labels agree in {self.agreement:.1%}"


def cases(spec: EncoderSpec, shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Case]:
    """Seeded batches with sequences of these lengths; and the last one again, of which every third row is wanted."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    made = [_case(spec, lengths, generator, device) for lengths in shapes]
    rows = torch.arange(0, sum(shapes[-1]), 3, dtype=torch.int32, device=device)
    return [*made, replace(made[-1], rows=rows)]


def _case(spec: EncoderSpec, lengths: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Case:
    total = sum(lengths)
    first = spec.first_position
    positions = torch.cat([torch.arange(first, first + length, device="cpu") for length in lengths])
    ids = torch.randint(0, spec.vocab_size, (total,), generator=generator, device="cpu")
    types = torch.randint(0, spec.type_vocab_size, (total,), generator=generator, device="cpu")
    ids, positions, types = (values.to(device, torch.int32) for values in (ids, positions, types))
    return Case(ids, positions, types, lengths)


_setting = threading.RLock()  # of the whole process: whoever came second would put back what the first had set


@contextlib.contextmanager
def true_fp32() -> Iterator[None]:
    """No TF32 in fp32 products: an engine computes none, so what it is held to must not either. One thread at a time.

    torch refuses to be asked in its older words where a program has used the newer ones, so the newer come first.
    """
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    with _setting:
        before = getattr(matmul, name)
        setattr(matmul, name, "ieee" if name == "fp32_precision" else False)
        try:
            yield
        finally:
            setattr(matmul, name, before)


def reference(weights: EncoderWeights, case: Case, precision: str, layers: int) -> torch.Tensor:
    """fp32 [T, hidden_size] after the encoder's first ``layers`` layers, computed by plain PyTorch in ``precision``.

    Of a case with ``rows`` those rows of it.

    A pre-norm encoder's residual stream is float32, as in the network: in float16 it may overflow.
    """
    spec, modules, dtype = weights.spec, weights.modules, DTYPES[precision]
    pre = spec.norm == "pre"

    def parameter(layer: int, role: str, name: str) -> torch.Tensor | None:
        value = getattr(modules[layer, role], name, None)
        return None if value is None else value.detach().to(dtype)

    def linear(layer: int, role: str, x: torch.Tensor) -> torch.Tensor:
        weight = parameter(layer, role, "weight")
        assert weight is not None
        x, weight = _operand(x, precision), _operand(weight, precision)
        return functional.linear(x, weight, parameter(layer, role, "bias"))

    def norm(layer: int, role: str, x: torch.Tensor) -> torch.Tensor:
        gain, bias = (parameter(layer, role, name) for name in ("weight", "bias"))
        assert gain is not None and bias is not None
        x = functional.layer_norm(x, (spec.hidden_size,), gain.to(x), bias.to(x), spec.layer_norm_eps)
        return x.to(dtype)

    def table(role: str, index: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = modules[-1, role].weight.detach()[index.long()]
        return rows.to(torch.float32 if pre else dtype)

    x = table("word", case.ids) + table("position", case.positions) + table("type", case.types)
    x = norm(-1, "embedding_norm", x) if spec.embedding_norm else x
    for layer in range(layers):
        operand = norm(layer, "attention_norm", x) if pre else x
        heads = [linear(layer, role, operand).split(case.lengths) for role in QKV_ROLES]
        parts = [_attend(spec, *parts) for parts in zip(*heads, strict=True)]
        x = x + linear(layer, "attention_out", torch.cat(parts))
        x = x if pre else norm(layer, "attention_norm", x)
        operand = norm(layer, "ffn_norm", x) if pre else x
        x = x + linear(layer, "ffn_out", functional.gelu(linear(layer, "ffn_in", operand)))
        x = x if pre else norm(layer, "ffn_norm", x)
    x = norm(-1, "final_norm", x) if spec.final_norm and layers == spec.num_layers else x
    return (x if case.rows is None else x[case.rows.long()]).float()


def _operand(x: torch.Tensor, precision: str) -> torch.Tensor:
    """What a product makes of ``x``: itself, or rows of int8 or e4m3 values with a scale each."""
    top = TOPS.get(precision)
    if top is None:
        return x
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / top
    scaled = (x.float() / scale).clamp(-top, top)
    return ((scaled.round() if precision == "int8" else scaled).to(TYPES[precision]).float() * scale).to(x.dtype)


def _attend(spec: EncoderSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.view(-1, spec.num_heads, spec.head_dim).transpose(0, 1) for t in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(query), -1)


def check(
    run: Callable[[Case], torch.Tensor], weights: EncoderWeights, precision: str, layers: int, samples: Sequence[Case]
) -> Report:
    """Compare an engine with PyTorch on sample batches.

    Args:
        run: the engine: a case to [T, hidden_size], or its rows.
        weights: of the model.
        precision: of the engine.
        layers: that it runs.
        samples: see :func:`cases`.

    Raises:
        EngineRejectedError: it differs by more than its precision explains.
    """
    spec = weights.spec
    generator = torch.Generator(device="cpu").manual_seed(1)
    head = torch.randn(spec.hidden_size, LABELS, generator=generator, dtype=torch.float32, device="cpu")
    worst, finite, same, clear = (0.0, FLOOR[precision]), True, 0, 0
    with torch.no_grad():
        for case in samples:
            exact = reference(weights, case, "fp32", layers).cpu()
            found = run(case).float().cpu()
            rounded = reference(weights, case, precision, layers).cpu()
            finite = finite and bool(torch.isfinite(found).all())
            scale = exact.norm()
            error, own = float((found - exact).norm() / scale), float((rounded - exact).norm() / scale)
            # where PyTorch overflows in this precision, its error allows nothing
            bound = (FACTOR * own if math.isfinite(own) else 0.0) + FLOOR[precision]
            if error / bound > worst[0] / worst[1]:
                worst = error, bound
            top = (exact @ head).topk(2, -1)
            moved = bound * exact.norm(dim=-1) / spec.hidden_size**0.5 * head.norm(dim=0).max()
            sure = top.values[:, 0] - top.values[:, 1] > CLEAR * moved
            same += int(((found @ head).argmax(-1) == top.indices[:, 0])[sure].sum())
            clear += int(sure.sum())
    report = Report(*worst, same / clear if clear else 1.0, finite)
    if not report.accepted:
        raise EngineRejectedError(report)
    return report
