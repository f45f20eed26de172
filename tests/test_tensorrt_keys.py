"""What an engine is kept under: a digest of the weights, and a key that knows all that decides which engine it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorrt_stub import KEY, SPEC
from torch import nn

from xfast.architecture import EncoderSpec, EncoderWeights
from xfast.backends import tensorrt_store as stores
from xfast.backends.tensorrt_build import Profile
from xfast.backends.tensorrt_store import Key, Store, digest
from xfast.errors import InvalidInputError, InvalidWeightsError


def _changed_keys() -> dict[str, Key]:
    changes: dict[str, Any] = {
        "weights": "ac" * 32,
        "precision": "bf16",
        "layers": 1,
        "profiles": (*KEY.profiles, Profile((1, 8, 17), (1, 1, 3), (1, 8, 8))),
        "runtime": "tensorrt",
        "version": "1.7.1.117",
        "target": "SM80",
        "network": KEY.network + 1,
    }
    made = {name: dataclasses.replace(KEY, **{name: value}) for name, value in changes.items()}
    for each in dataclasses.fields(EncoderSpec):
        value = getattr(SPEC, each.name)
        other = not value if type(value) is bool else f"{value}x" if type(value) is str else value + 1
        made[f"spec.{each.name}"] = dataclasses.replace(KEY, spec=dataclasses.replace(SPEC, **{each.name: other}))
    for dimension, sizes in (("tokens", (1, 8, 15)), ("batch", (1, 1, 3)), ("length", (1, 8, 9))):
        profile = dataclasses.replace(KEY.profiles[0], **{dimension: sizes})
        made[f"profiles.{dimension}"] = dataclasses.replace(KEY, profiles=(profile,))
    return made


CHANGED = _changed_keys()


def test_every_field_of_a_key_is_changed() -> None:
    names = {each.name for each in dataclasses.fields(Key)} - {"spec"}
    assert names <= CHANGED.keys()


@pytest.mark.parametrize("change", CHANGED)
def test_a_key_that_differs_anywhere_has_another_name(change: str, tmp_path: Path) -> None:
    store, other = Store(tmp_path), CHANGED[change]
    assert other != KEY and other.name != KEY.name
    path = store.save(KEY, b"engine")
    assert path is not None and store.load(other) is None
    # and were the names the same, the header would tell
    path.rename(store.path(other))
    assert store.load(other) is None
    assert store.reasons == {"absent": 1, "foreign": 1}


def test_names_are_stable_and_plain() -> None:
    assert KEY.name == "xlm-roberta-2x64-fp16-sm89-" + KEY.name[-32:]
    assert dataclasses.replace(KEY).name == KEY.name
    odd = dataclasses.replace(KEY, target="NVIDIA “H200” / ../../etc\0\ud800", precision="fp16" * 100)
    assert set(odd.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(odd.name) < 120


@pytest.mark.parametrize("key", [KEY, *CHANGED.values()])
def test_keys_survive_json(key: Key) -> None:
    values = json.loads(json.dumps(key.to_json()))
    assert Key.from_json(values) == key and Key.from_json(values).name == key.name


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "ab"},
        {"weights": 3},
        {"spec": {}},
        {"spec": None},
        {"profiles": None},
        {"profiles": [{"tokens": [3, 2, 1], "batch": [1, 1, 1], "length": [1, 1, 1]}]},
        {"profiles": [["tokens"]]},
        {"profiles": {}},
        {"layers": "2"},
        {"layers": True},
        {"layers": 2.0},
        {"spec": {**KEY.to_json()["spec"], "family": ["x"]}},
        {"surplus": 1},
    ],
    ids=str,
)
def test_other_json_is_no_key(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"not an engine's key|no SHA-256"):
        Key.from_json(KEY.to_json() | change)


@pytest.mark.parametrize("values", [None, 3, [], "key", {}, {"spec": KEY.to_json()["spec"]}])
def test_nor_are_other_types(values: Any) -> None:
    with pytest.raises(InvalidInputError):
        Key.from_json(values)


def test_weights_are_a_digest() -> None:
    with pytest.raises(InvalidInputError, match="SHA-256"):
        dataclasses.replace(KEY, weights="../../etc")


def weights_of(**tensors: torch.Tensor) -> EncoderWeights:
    modules: dict[tuple[int, str], nn.Module] = {}
    names = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(tensor, requires_grad=False))
        modules[index, "query"], names[index, "query"] = module, name
    return EncoderWeights(SPEC, modules, names)


def test_equal_values_have_equal_digests() -> None:
    a, b = torch.randn(5, 3), torch.randn(7)
    want = digest(weights_of(a=a, b=b))
    assert len(want) == 64
    assert digest(weights_of(b=b.clone(), a=a.clone())) == want
    assert digest(weights_of(a=a.t().contiguous().t(), b=b.repeat_interleave(2)[::2])) == want  # other memory layouts


def test_any_change_changes_the_digest() -> None:
    a = torch.randn(4, 6)
    want = digest(weights_of(a=a))
    seen = {want}
    for bit in (0, 1, 100, 8 * 4 * 24 - 1):
        flipped = a.clone()
        flipped.view(torch.uint8).view(-1)[bit // 8] ^= 1 << bit % 8
        seen.add(digest(weights_of(a=flipped)))
    others = [a.view(6, 4), a.view(-1), a.half(), a.bfloat16(), a.double(), a.view(torch.int32), a[:3], a[:, :5], a.t()]
    seen |= {digest(weights_of(a=other)) for other in others}
    seen |= {digest(weights_of(b=a)), digest(weights_of(a=a, b=a)), digest(weights_of(a=a[:2], b=a[2:]))}
    seen |= {digest(weights_of(a=torch.zeros(1))), digest(weights_of(a=-torch.zeros(1)))}
    assert len(seen) == 1 + 4 + len(others) + 3 + 2


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 0), (2, 3, 4)])
def test_digests_of_odd_shapes(shape: tuple[int, ...]) -> None:
    assert digest(weights_of(a=torch.ones(shape))) == digest(weights_of(a=torch.ones(shape)))
    assert digest(weights_of(a=torch.ones(shape))) != digest(weights_of(a=torch.ones((*shape, 1))))


def test_digests_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(37, 11)
    tensors = {"a": a, "b": a.t(), "c": a[:, ::2], "d": a[:1].expand(9, 11), "e": a.bfloat16()}
    want = digest(weights_of(**tensors))
    for chunk in (1, 7, 44, 100):
        monkeypatch.setattr(stores, "_CHUNK", chunk)
        assert digest(weights_of(**tensors)) == want


def test_no_digest_without_values() -> None:
    with pytest.raises(InvalidWeightsError, match=r"a\.weight is on the meta device"):
        digest(weights_of(a=torch.empty(3, device="meta")))
