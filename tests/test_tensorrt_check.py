"""The judge of TensorRT engines: it accepts rounding and refuses everything else. Needs neither TensorRT nor a GPU."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch

from xfast.architecture import EncoderWeights, describe, family_of
from xfast.backends import tensorrt_check as judge
from xfast.backends.tensorrt_quantize import TOPS

CPU = torch.device("cpu")


def _weights(family: str, **changes: object) -> tuple[torch.nn.Module, EncoderWeights]:
    model = models.build(family, "base-no-pooler", **changes)
    found = family_of(model)
    assert found is not None
    return model, describe(model, found)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_reference_is_the_model(family: str) -> None:
    model, weights = _weights(family)
    for case in judge.cases(weights.spec, 30, CPU):
        ours = judge.reference(weights, case, "fp32", weights.spec.num_layers)
        parts = []
        for ids, types in zip(case.ids.split(case.lengths), case.types.split(case.lengths), strict=True):
            # positions as the family counts them: ids that happen to be the padding id must not shift them
            start = weights.spec.first_position
            positions = torch.arange(start, start + len(ids))[None]
            with torch.no_grad():
                out = model(ids[None].long(), token_type_ids=types[None].long(), position_ids=positions)
            parts.append(out.last_hidden_state[0])
        assert torch.allclose(ours, torch.cat(parts), atol=2e-6)


@pytest.mark.parametrize("precision", list(judge.DTYPES))
def test_rounding_is_accepted(precision: str) -> None:
    _, weights = _weights("xlm-roberta")
    layers = weights.spec.num_layers
    report = judge.check(
        lambda case: judge.reference(weights, case, precision, layers),
        weights,
        precision,
        layers,
        judge.cases(weights.spec, 30, CPU),
    )
    assert report.accepted and report.error <= report.bound and report.agreement == 1


def _swapped(x: torch.Tensor, amount: float) -> torch.Tensor:
    count = round(40 * amount)
    return torch.cat([x[:, :count].flip(1), x[:, count:]], 1)


def _nan(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(x))[:, None] == len(x) - 1, torch.nan, x)


WRONG: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "channels swapped": _swapped,
    "one token is NaN": lambda x, _: _nan(x),
    "rows shifted": lambda x, _: x.roll(1, 0),
    "scaled": lambda x, amount: (1 + amount) * x,
    "noise": lambda x, amount: x + amount * torch.randn_like(x),
}


@pytest.mark.parametrize("precision", list(judge.DTYPES))
@pytest.mark.parametrize("wrong", list(WRONG))
def test_anything_else_is_refused(wrong: str, precision: str) -> None:
    _, weights = _weights("xlm-roberta")
    layers = weights.spec.num_layers
    amount = 0.2 if precision in TOPS else 0.05  # of what rounding 8 bits explains there is more
    with pytest.raises(judge.EngineRejectedError, match=r"refused: (NaN|relative error)") as caught:
        judge.check(
            lambda case: WRONG[wrong](judge.reference(weights, case, "fp32", layers), amount),
            weights,
            precision,
            layers,
            judge.cases(weights.spec, 30, CPU),
        )
    assert not caught.value.report.accepted and caught.value.report.finite == (wrong != "one token is NaN")


def test_an_engine_with_a_layer_too_few_is_refused() -> None:
    _, weights = _weights("bert")
    with pytest.raises(judge.EngineRejectedError):
        judge.check(
            lambda case: judge.reference(weights, case, "fp32", 2),
            weights,
            "bf16",
            3,
            judge.cases(weights.spec, 30, CPU),
        )


def test_cases_fit_the_model() -> None:
    _, weights = _weights("xlm-roberta")
    assert weights.spec.usable_positions == 38
    for case in judge.cases(weights.spec, 1000, CPU):
        assert sum(case.lengths) == len(case.ids) and max(case.lengths) <= 38
        assert int(case.positions.max()) < weights.spec.max_positions
        assert int(case.ids.max()) < weights.spec.vocab_size
