"""Packed artifacts on a GPU: what the CPU packed, unpacked product by product, gives what packing there gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import DEVICE
from models import HEADS, arguments, build, encoder_of, outputs_of, quick_settings, ragged
from triton_models import PRE_NORM, fast, moved

import xfast
from xfast import quantization
from xfast.architecture import describe, find_encoders
from xfast.backends.native import pack_layer
from xfast.kernels.integer_weights import to_int4, to_int8
from xfast.kernels.packed_layout import unpack, unpack_int4
from xfast.recipe import LINEARS, LinearFormat, Recipe

quick = pytest.fixture(autouse=True)(quick_settings)
AWKWARD = {"hidden_size": 48, "intermediate_size": 80}  # neither whole panels nor whole chunks


def saved(folder: Path, precision: str, *given: Any, recipe: Recipe | None = None, **changes: Any) -> None:
    xfast.save(xfast.accelerate(build(*given, **changes), precision=precision, recipe=recipe), folder)


def load(folder: Path, **options: Any) -> Any:
    return xfast.load(folder, device=DEVICE, backend="triton", **options)


def products(precision: str, **changes: Any) -> Any:
    """Every product of a model's first layer: its arrays, its weights [out, in], its (out, in)."""
    for group_size in (32, 64, 128) if precision == "int4" else (64,):
        _, module, family = find_encoders(build(**changes))[0]
        weights = describe(module, family)
        packed = pack_layer(weights, 0, precision, Recipe(group_size))
        for name in LINEARS:
            roles = ("query", "key", "value") if name == "qkv" else (name,)
            original = torch.cat([weights.modules[0, role].weight.detach() for role in roles])
            arrays = {key: torch.from_numpy(array.copy()) for key, array in packed[name].items()}
            yield arrays, original, weights.spec.product_shape(name), group_size


@pytest.mark.parametrize("changes", [{}, AWKWARD], ids=["whole", "awkward"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_unpacked_values_are_those_that_were_packed(precision: str, changes: dict[str, int]) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
    for arrays, original, shape, _ in products(precision, **changes):
        got = unpack(arrays["data"], dtype, shape)
        want = to_int8(original).values if precision == "int8" else original.to(dtype)
        assert got.shape == shape and got.is_contiguous() and torch.equal(got, want)


@pytest.mark.parametrize("changes", [{}, AWKWARD], ids=["whole", "awkward"])
def test_unpacked_int4_is_that_of_the_gpu(changes: dict[str, int]) -> None:
    for arrays, original, shape, group_size in products("int4", **changes):
        got, want = unpack_int4(arrays["data"], shape, group_size), to_int4(original, group_size)
        assert (got.depth, got.group_size, got.shape) == (want.depth, want.group_size, want.shape)
        assert got.values.is_contiguous() and got.values.shape == want.values.shape
        # Both search for the scale with the least error; sums in another order may prefer the other of two alike
        alike = got.scale == want.scale
        assert alike.float().mean() > 0.99
        rows = alike.all(1)
        assert rows.any() and torch.equal(got.values[rows], want.values[rows])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["xlm-roberta", PRE_NORM])
def test_a_loaded_model_gives_what_the_gpu_packs(family: str, precision: str, tmp_path: Path) -> None:
    saved(tmp_path, precision, family, "masked-lm")  # whose words stay as they are
    want = fast(build(family, "masked-lm").to(DEVICE), precision=precision)(**moved(ragged(family)))
    loaded = load(tmp_path)
    assert {p.device.type for p in loaded.parameters() if not p.is_meta} == {torch.device(DEVICE).type}
    got = loaded(**moved(ragged(family)))
    assert torch.equal(got.logits, want.logits)
    text = str(xfast.explain(loaded))
    assert "triton" in text and "mapped" not in text


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, tmp_path: Path) -> None:
    saved(tmp_path, "int8", "xlm-roberta", head)
    batch = arguments("xlm-roberta", head)
    want, got = outputs_of(xfast.load(tmp_path)(**batch)), outputs_of(load(tmp_path)(**moved(batch)))
    assert want.keys() == got.keys()
    for name, value in want.items():  # the CPU's activations are in 8 bits, the GPU's in bf16
        assert torch.nn.functional.cosine_similarity(got[name].cpu().flatten(), value.flatten(), 0) > 0.99


def test_words_in_8_bits_are_expanded(tmp_path: Path) -> None:
    saved(tmp_path, "int8")
    words = encoder_of(build()).embeddings.word_embeddings
    rounded = to_int8(words.weight.detach())
    model = build()
    encoder_of(model).embeddings.word_embeddings.weight.data = (rounded.values * rounded.scale).bfloat16().float()
    want = fast(model.to(DEVICE), precision="int8")(**moved(ragged()))
    assert torch.equal(load(tmp_path)(**moved(ragged())).last_hidden_state, want.last_hidden_state)


def test_an_encoder_is_loaded_under_another_head(tmp_path: Path) -> None:
    under = build(head="token-classification")
    want = fast(build(head="token-classification").to(DEVICE), precision="bf16")(**moved(ragged()))
    encoder = encoder_of(build(head="token-classification"))
    xfast.save(xfast.accelerate(encoder, precision="bf16"), tmp_path)
    encoder_of(under).to("meta")
    loaded = load(tmp_path, head=under)
    assert loaded is under and torch.equal(loaded(**moved(ragged())).logits, want.logits)


def test_a_recipe_goes_with_it(tmp_path: Path) -> None:
    recipe = Recipe(linears={(0, "ffn_in"): LinearFormat("int4", 32), (1, "qkv"): LinearFormat("bf16")})
    saved(tmp_path, "int8", "xlm-roberta", "masked-lm", recipe=recipe)
    want = fast(build(head="masked-lm").to(DEVICE), precision="int8", recipe=recipe)(**moved(ragged()))
    loaded = load(tmp_path)
    assert torch.equal(loaded(**moved(ragged())).logits, want.logits)
    assert "1 in int4, groups of 32" in str(xfast.explain(loaded))


def test_what_a_gpu_cannot_compute_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "mixed", "int8", recipe=Recipe(linears={(0, "ffn_in"): LinearFormat("fp32")}))
    with pytest.raises(xfast.BackendUnavailableError, match="products in fp32 do not go with precision int8"):
        load(tmp_path / "mixed")
    saved(tmp_path / "smooth", "int8", recipe=quantization.smooth(build()))
    with pytest.raises(xfast.BackendUnavailableError, match="smooth: divisors are for quantised activations"):
        load(tmp_path / "smooth")
    saved(tmp_path / "plain", "int8")
    for wrong in ("tensorrt", "gpu", None):
        with pytest.raises(xfast.InvalidOptionError, match=r"backend: .*accepted: auto, native, triton"):
            xfast.load(tmp_path / "plain", backend=wrong)  # type: ignore[arg-type]
    for device in ("gpu", "cuda:99", 1.5):
        with pytest.raises(xfast.InvalidOptionError, match="device: "):
            xfast.load(tmp_path / "plain", device=device)  # type: ignore[arg-type]
    with pytest.raises(xfast.BackendUnavailableError, match="runs on cpu"):
        xfast.load(tmp_path / "plain", device="meta")


def test_it_is_a_model_without_its_weights(tmp_path: Path) -> None:
    saved(tmp_path / "a", "int8")
    loaded = load(tmp_path / "a")
    for call in (loaded.state_dict, lambda: xfast.restore(loaded)):
        with pytest.raises(xfast.WeightsFreedError):
            call()
    with pytest.raises(xfast.InvalidOptionError, match="accelerate made fast on the CPU"):
        xfast.save(loaded, tmp_path / "b")
