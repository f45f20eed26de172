"""What was accelerated, how, and what was left alone and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from xfast.architecture import family_of, layers_of
from xfast.errors import InvalidWeightsError, WeightsFreedError
from xfast.head_patch import HeadPatch, TokenHeadPatch
from xfast.patch import EncoderPatch
from xfast.plan import CHANGED


@dataclass(frozen=True)
class EncoderExplanation:
    """One encoder.

    Attributes:
        name, family: its class, and the row of the table of families.
        backend: "native", "triton" or "tensorrt"; "none": the original code runs.
        precision: that it computes in, "original" without a backend.
        layers, num_layers: how many run, of how many.
        keep_weights, freed: whether the original weights are there, and why not.
        details: hardware, what is fused, memory, remarks.
        notes: why this backend and precision.
        fallbacks: calls that ran the original code, by reason.
    """

    name: str
    family: str
    backend: str
    precision: str
    layers: int
    num_layers: int
    keep_weights: bool
    freed: str
    details: tuple[str, ...]
    notes: tuple[str, ...]
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """A printable plan: ``print(xfast.explain(model))``.

    Attributes:
        encoders: one for each accelerated encoder inside the model; none: it is not accelerated.
        heads: a line for each task head that tells its encoder which rows it reads.
    """

    encoders: tuple[EncoderExplanation, ...]
    heads: tuple[str, ...]

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that ran the original code, by reason, over all encoders."""
        counts: Counter[str] = Counter()
        for encoder in self.encoders:
            counts.update(encoder.fallbacks)
        return dict(counts)

    def __str__(self) -> str:
        if not self.encoders:
            return "not accelerated by xfast: the original code runs"
        lines = []
        for e in self.encoders:
            lines.append(f"{e.name} ({e.family}): backend {e.backend}, precision {e.precision}")
            lines.append(f"  layers: {e.layers} of {e.num_layers}")
            lines += [f"  {text}" for text in (*e.details, *e.notes)]
            if not e.keep_weights:
                lines.append(f"  {e.freed}")
            for reason, count in sorted(e.fallbacks.items(), key=lambda item: -item[1]):
                lines.append(f"  {count} call(s) ran the original code: {reason}")
        lines += [f"head: {text}" for text in self.heads]
        return "\n".join(lines)


def explain_patches(encoders: Sequence[EncoderPatch], heads: Sequence[HeadPatch]) -> Explanation:
    """Builds the explanation of one model from its patches."""
    explained = tuple(_encoder(patch) for patch in encoders)
    lines = [_logits(patch) if isinstance(patch, TokenHeadPatch) else _head(patch) for patch in heads]
    return Explanation(explained, tuple(line for line in lines if line is not None))


def _encoder(patch: EncoderPatch) -> EncoderExplanation:
    try:
        if patch.unusable is not None:
            return _changed(patch, f"the original code runs: {patch.unusable}")
        plan = patch.plan
        engine = plan.current_engine(patch.module)
    except CHANGED as error:  # of a copy, before its first call
        return _changed(patch, f"the original code runs: {error}")
    except (WeightsFreedError, InvalidWeightsError) as error:
        return _changed(patch, f"accelerated calls raise {type(error).__name__}: {error}")
    return EncoderExplanation(
        name=type(patch.module).__name__,
        family=plan.weights.spec.family,
        backend=plan.backend_name,
        precision="original" if engine is None else engine.precision,
        layers=plan.layers,
        num_layers=plan.weights.spec.num_layers,
        keep_weights=not plan.freed,
        freed=plan.freed,
        details=() if engine is None else tuple(engine.describe()),
        notes=tuple(plan.notes),
        fallbacks=dict(patch.fallbacks),
    )


def _changed(patch: EncoderPatch, note: str) -> EncoderExplanation:
    family, layers = family_of(patch.module), len(layers_of(patch.module))
    return EncoderExplanation(
        name=type(patch.module).__name__,
        family="unknown" if family is None else family.name,
        backend="none",
        precision="original",
        layers=layers,
        num_layers=layers,
        keep_weights=not patch.freed,
        freed=patch.freed,
        details=(),
        notes=(note,),
        fallbacks=dict(patch.fallbacks),
    )


def _head(patch: HeadPatch) -> str | None:
    name = type(patch.module).__name__
    if not patch.rule.modules:  # known for its losses alone
        return None
    encoder = patch.encoder_patch
    if encoder is None or not patch.reads_as_ruled(encoder):
        return f"{name} or what it reads was replaced, wrapped or hooked: it gets every row"
    if patch.rule.rows == "first":
        return f"{name} reads token 0: the last layer computes only that row"
    return f"{name} reads every token: it runs on real tokens, padding is added after it"


def _logits(patch: TokenHeadPatch) -> str | None:
    precision = patch.native_precision()
    if precision is None:
        return None
    return f"{type(patch.module).__name__}: one native call in {precision}, its weights read in place"
