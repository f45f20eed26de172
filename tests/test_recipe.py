"""Recipes: products of different precisions in one encoder, int4 groups, divisors; run, explained, saved, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ALL_FAMILIES, build, norm_error, quick_settings, ragged
from torch import nn

import xfast
from xfast import artifact
from xfast.convert import convert
from xfast.recipe import LINEARS, LinearFormat, Recipe

_settings = pytest.fixture(autouse=True)(quick_settings)
LAYERS, HIDDEN, INNER = 3, 64, 96


def states(model: Any, **arguments: Any) -> torch.Tensor:
    batch = ragged(**arguments)
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def divisors(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.exp(rng.uniform(-1, 1, size)).astype(np.float32)


def every_kind(rng: np.random.Generator) -> Recipe:
    """Every precision next to every other, groups of each size, some inputs divided."""
    kinds = ["int4", "fp32", "int8", "bf16"]
    linears = {}
    for layer in range(LAYERS):
        for i, name in enumerate(LINEARS):
            precision = kinds[(layer + i) % 4]
            size = INNER if name == "ffn_out" else HIDDEN
            divisor = divisors(rng, size) if precision in ("int8", "int4") and layer != 1 else None
            linears[layer, name] = LinearFormat(precision, (32, 64, 128)[layer], divisor)
    return Recipe(128, linears)


def built(family: str = "xlm-roberta") -> Any:
    return build(family, head="base-no-pooler", num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=INNER)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_products_of_every_precision_in_one_encoder(
    family: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = built(family), every_kind(rng)
    for lengths in ((9, 1, 17, 13), (38, 3, 1, 37, 25, 38, 17)):  # columns and rows are split
        xfast.restore(model)
        want, results = states(model, lengths=lengths), []
        for isa in xfast.available_isas():
            monkeypatch.setenv("XFAST_ISA", isa)
            xfast.accelerate(model, precision="fp32", recipe=recipe)
            for threads in (1, 2, 3):
                xfast.set_num_threads(threads)
                results.append(states(model, lengths=lengths))
                assert torch.equal(results[-1], results[3 * ((len(results) - 1) // 3)]), (isa, threads)
        assert 1e-3 < norm_error(results[0], want) < 0.15
        assert all(norm_error(result, results[0]) < 2e-2 for result in results)  # fp32 rounding, then quantisation


@pytest.mark.parametrize("product", LINEARS)
def test_one_product_alone_is_quantised(product: str) -> None:
    model = built()
    want = states(model)
    errors = []
    for precision in ("int8", "int4"):
        recipe = Recipe(linears={(1, product): LinearFormat(precision)})
        errors.append(norm_error(states(xfast.accelerate(model, recipe=recipe)), want))
    whole = norm_error(states(xfast.accelerate(model, precision="int8")), want)
    assert 1e-5 < errors[0] < whole and errors[0] < errors[1]


def test_divisors_only_move_rounding() -> None:
    """With an outlier channel in every LayerNorm, dividing it away is what it should be: much better, nothing else."""
    model = built()
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter.data[5] *= 60
    want = states(model)
    divisor = np.ones(HIDDEN, np.float32)
    divisor[5] = 12
    chosen = {
        (layer, name): LinearFormat("int8", divisor=divisor) for layer in range(LAYERS) for name in ("qkv", "ffn_in")
    }
    plain = norm_error(states(xfast.accelerate(model, precision="int8")), want)
    smoothed = norm_error(states(xfast.accelerate(model, precision="int8", recipe=Recipe(linears=chosen))), want)
    assert smoothed < 0.6 * plain


def test_rows_of_the_last_layer_equal_the_whole(rng: np.random.Generator) -> None:
    """A classifier reads one row a sequence: quantised by another call than the whole layer's, to the same bits."""
    model = build(head="sequence-classification", num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=INNER)
    xfast.accelerate(model, precision="int4", recipe=every_kind(rng))
    for lengths in ((9, 1, 17, 13), (38, 3, 1, 37, 25, 38, 17)):
        batch = ragged(lengths=lengths)
        first = model.roberta(**batch).last_hidden_state[:, 0]
        want = model.classifier(first[:, None])
        assert torch.allclose(model(**batch).logits, want, atol=1e-5)


def test_explain_says_what_is_mixed(rng: np.random.Generator) -> None:
    model = xfast.accelerate(built(), precision="int8", recipe=every_kind(rng))
    text = str(xfast.explain(model))
    for part in ("3 in fp32", "3 in int8", "3 in bf16", "1 in int4, groups of 64"):
        assert part in text.split("products: ")[1].split("\n")[0]
    assert "products with smoothed inputs: 4 of 12" in text and "bf16:" in text
    assert "products:" not in str(xfast.explain(xfast.accelerate(built(), precision="int8")))
    assert "12 in int4, groups of 64" in str(xfast.explain(xfast.accelerate(built(), precision="int4")))


def test_int4_takes_half_the_bytes() -> None:
    sizes = {}
    for precision, group in (("int8", 64), ("int4", 32), ("int4", 64), ("int4", 128)):
        big = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
        model = xfast.accelerate(build(head="base-no-pooler", **big), precision=precision, recipe=Recipe(group))
        text = str(xfast.explain(model))
        sizes[precision, group] = float(text.split("packed weights: ")[1].split(" MiB")[0])
    whole = 2 * 12 * 256 * 256 / 2**20
    for group in (32, 64, 128):
        assert sizes["int4", group] == pytest.approx(whole * (0.5 + 2 / group), abs=0.1 + 0.05)
    assert sizes["int4", 128] < 0.55 * sizes["int8", 64]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_saved_recipe_is_loaded(precision: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = xfast.accelerate(built(), precision=precision, recipe=every_kind(rng), keep_weights=False)
    xfast.save(model, tmp_path / "a")
    loaded = xfast.load(tmp_path / "a", verify=True)
    assert torch.equal(states(loaded), states(model))
    xfast.save(loaded, tmp_path / "b")
    assert torch.equal(states(xfast.load(tmp_path / "b")), states(model))
    assert (tmp_path / "a/xfast.json").read_text() == (tmp_path / "b/xfast.json").read_text()
    assert "smoothed inputs: 4 of 12" in str(xfast.explain(loaded))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_converting_to_int4_writes_what_saving_writes(group: int, tmp_path: Path) -> None:
    model = built()
    model.save_pretrained(tmp_path / "m")
    model.config._name_or_path = str(tmp_path / "m")
    convert(str(tmp_path / "m"), tmp_path / "c", "int4", group_size=group)
    xfast.save(xfast.accelerate(model, precision="int4", recipe=Recipe(group)), tmp_path / "s")
    for path in (tmp_path / "c").iterdir():
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes(), path.name
    words_too = xfast.accelerate(model, precision="int4", recipe=Recipe(group), keep_weights=False)
    assert torch.equal(states(xfast.load(tmp_path / "c")), states(words_too))


DAMAGED: dict[str, Any] = {
    "layer": {"3.qkv": {"precision": "int8", "group_size": 64, "smoothed": False}},
    "name": {"0.query": {"precision": "int8", "group_size": 64, "smoothed": False}},
    "no number": {"x.qkv": {"precision": "int8", "group_size": 64, "smoothed": False}},
    "precision": {"0.qkv": {"precision": "int2", "group_size": 64, "smoothed": False}},
    "group": {"0.qkv": {"precision": "int4", "group_size": 48, "smoothed": False}},
    "group type": {"0.qkv": {"precision": "int4", "group_size": True, "smoothed": False}},
    "field": {"0.qkv": {"precision": "int8", "group_size": 64}},
    "smoothed fp32": {"0.qkv": {"precision": "fp32", "group_size": 64, "smoothed": True}},
    "other tensors": {"0.qkv": {"precision": "int8", "group_size": 64, "smoothed": True}},
    "other sizes": {"0.qkv": {"precision": "fp32", "group_size": 64, "smoothed": False}},
    "no object": {"0.qkv": "int8"},
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_manifest_with_another_recipe_is_refused(change: Any, tmp_path: Path) -> None:
    xfast.save(xfast.accelerate(built(), precision="int4"), tmp_path)
    content = json.loads((tmp_path / artifact.MANIFEST).read_text())
    del content["sha256"]
    content["recipe"] = change
    content["sha256"] = artifact.digest(content)
    (tmp_path / artifact.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(xfast.ArtifactError):
        xfast.load(tmp_path)


REFUSED: dict[str, tuple[Any, str]] = {
    "group": (lambda: Recipe(48), "group_size"),
    "group type": (lambda: Recipe(True), "group_size"),
    "key": (lambda: Recipe(linears={"qkv": LinearFormat("int8")}), "layer, name"),
    "name": (lambda: Recipe(linears={(0, "query"): LinearFormat("int8")}), "qkv, attention_out"),
    "precision": (lambda: Recipe(linears={(0, "qkv"): LinearFormat("int2")}), "fp32, bf16, int8, int4"),
    "linear's group": (lambda: Recipe(linears={(0, "qkv"): LinearFormat("int4", 16)}), "32, 64, 128"),
    "divisor of fp32": (
        lambda: Recipe(linears={(0, "qkv"): LinearFormat("fp32", 64, np.ones(64, np.float32))}),
        "int8",
    ),
    "divisor's type": (lambda: Recipe(linears={(0, "qkv"): LinearFormat("int8", 64, np.ones(64))}), "float32"),
    "divisor's value": (
        lambda: Recipe(linears={(0, "qkv"): LinearFormat("int8", 64, np.zeros(64, np.float32))}),
        "between",
    ),
}


@pytest.mark.parametrize(("make", "part"), REFUSED.values(), ids=REFUSED)
def test_recipes_that_are_refused(make: Any, part: str) -> None:
    with pytest.raises(xfast.InvalidOptionError, match=part):
        make()


def test_recipes_that_do_not_fit_a_model() -> None:
    model = built()
    for linears, part in (
        ({(LAYERS, "qkv"): LinearFormat("int8")}, "layers 0 to 2"),
        ({(0, "ffn_out"): LinearFormat("int8", 64, np.ones(HIDDEN, np.float32))}, r"expected \(96,\)"),
    ):
        with pytest.raises(xfast.InvalidOptionError, match=part):
            xfast.accelerate(model, precision="int8", recipe=Recipe(linears=linears))
    for options, part in (
        ({"recipe": {}}, "expected an xfast.recipe.Recipe"),
        ({"recipe": Recipe(), "backend": "tensorrt"}, "has one precision"),
        ({"recipe": Recipe(), "precision": "auto", "calibration": [ragged()], "tolerance": 1.0}, "auto"),
    ):
        with pytest.raises(xfast.InvalidOptionError, match=part):
            xfast.accelerate(model, **options)
    for name in ("fp16", "fp8"):
        with pytest.raises(xfast.BackendUnavailableError, match=f"precision {name} is not available on the CPU"):
            xfast.accelerate(model, recipe=Recipe(linears={(0, "qkv"): LinearFormat(name)}))
    assert isinstance(model, nn.Module) and torch.isfinite(states(model)).all()
