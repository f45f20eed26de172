"""The encoder's output object is the one that transformers' constructor makes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

from xfast import outputs

X, Y = torch.arange(6.0).view(1, 2, 3), torch.ones(1, 3)
VALUES = (
    {},
    {"pooler_output": Y},
    {"hidden_states": (X, Y)},
    {"pooler_output": Y, "hidden_states": (X,), "attentions": (Y, Y)},
)


def made(values: dict[str, Any]) -> tuple[Output, Output]:
    ours = outputs.encoder_output(X, values.get("pooler_output"), values.get("hidden_states"), values.get("attentions"))
    return ours, Output(last_hidden_state=X, **values)


@pytest.mark.parametrize("values", VALUES, ids=lambda values: "+".join(values) or "last alone")
def test_it_is_what_the_constructor_makes(values: dict[str, Any]) -> None:
    ours, theirs = made(values)
    assert type(ours) is type(theirs) and vars(ours) == vars(theirs)
    assert list(ours.items()) == list(theirs.items())
    assert all(a is b for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True))
    assert ours[0] is X and ours["last_hidden_state"] is X and ours.cross_attentions is None
    flat, spec = _pytree.tree_flatten(ours)
    assert len(flat) == len(_pytree.tree_flatten(theirs)[0])
    assert type(_pytree.tree_unflatten(flat, spec)) is Output


def pickled(output: Output) -> Any:
    return pickle.loads(pickle.dumps(output))  # noqa: S301 - its own


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_it_can_be_copied_and_changed_alike(copied: Any) -> None:
    ours, theirs = (copied(output) for output in made(VALUES[3]))
    for output in (ours, theirs):
        output.pooler_output = X
        output["attentions"] = (X,)
    assert list(ours) == list(theirs)
    for output in (ours, theirs):
        assert output["pooler_output"] is X and output.attentions == (X,)


def test_the_installed_transformers_is_one_whose_constructor_is_known() -> None:
    assert outputs._KNOWN


def test_another_constructor_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Output):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.__dict__["more"] = 1

    monkeypatch.setattr(outputs, "Output", Other)
    assert not outputs._is_known()
    monkeypatch.setattr(outputs, "_KNOWN", False)
    assert vars(outputs.encoder_output(X, None))["more"] == 1
