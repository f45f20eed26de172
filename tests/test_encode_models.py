"""Which model a job runs, and as what: Hub revisions, sentence-transformers, classes whose outputs are their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import encode
import models
import numpy as np
import pyarrow as pa
import pytest
import stilts
import torch
import transformers
from safetensors.torch import load_file, save_file

import xfast
from xfast.convert import convert
from xfast.encode.model import head_of
from xfast.encode.settings import Settings
from xfast.errors import DataFileError, InvalidOptionError, UnsupportedModelError, XfastError

base = pytest.fixture(scope="module")(stilts.base)
_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)


@pytest.fixture
def source(tmp_path: Path, rng: Any) -> Path:
    return encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in encode.texts(rng, 12)])


# --- the Hub ------------------------------------------------------------------------------------------


hub = pytest.fixture(encode.hub)


def test_a_job_is_of_one_revision(base: Path, hub: Path, tmp_path: Path, source: Path) -> None:
    encode.publish(base, hub, "me/base", "a" * 40)
    try:
        head, identity = head_of(Settings(model="me/base"))
    except XfastError as error:
        pytest.skip(f"this release of transformers looks for its cache elsewhere: {error}")
    assert identity == f"me/base@{'a' * 40}" and head.revision == head.tokenizer_revision == "a" * 40
    encode.run(source, tmp_path / "out", "me/base", shard_rows=4)
    want = encode.embeddings(tmp_path / "out")
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    weights = load_file(changed / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    encode.publish(changed, hub, "me/base", "b" * 40)
    with pytest.raises(XfastError, match="another job"):
        encode.run(source, tmp_path / "out", "me/base", shard_rows=4)
    with pytest.raises(XfastError, match="another job"):  # by its tokenizer alone, too
        encode.run(source, tmp_path / "out", str(base), tokenizer="me/base", shard_rows=4)
    encode.run(source, tmp_path / "new", "me/base")
    assert not np.allclose(encode.embeddings(tmp_path / "new"), want)


# --- sentence-transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("unit", [False, True])
def test_sentence_transformers_are_run_as_they_are(mode: str, unit: bool, base: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    parts_of = pytest.importorskip("sentence_transformers.models")
    texts = [" ".join(["river stone green"] * 20), "lamp green bread", "song"]
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    parts = [parts_of.Transformer(str(base), max_seq_length=16), parts_of.Pooling(64, pooling_mode=mode)]
    parts += [parts_of.Normalize()] if unit else []
    model = library.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(tmp_path / "model"))
    encode.run(source, tmp_path / "out", tmp_path / "model")
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), model.encode(texts), atol=1e-5)
    packed = tmp_path / "packed"  # says the same of itself
    convert(str(tmp_path / "model"), packed, "fp32", "XLMRobertaModel")
    encode.run(source, tmp_path / "again", packed)
    np.testing.assert_allclose(encode.embeddings(tmp_path / "again"), model.encode(texts), atol=1e-5)
    before = head_of(Settings(model=str(tmp_path / "model")))[1]
    other = "cls" if mode == "mean" else "mean"
    (tmp_path / "model/1_Pooling/config.json").write_text(json.dumps({"pooling_mode": other}))
    assert head_of(Settings(model=str(tmp_path / "model")))[1] != before  # another job
    encode.run(source, tmp_path / "other", packed, pooling=other)  # what is asked for counts
    assert np.abs(encode.embeddings(tmp_path / "other") - model.encode(texts)).max() > 1e-3


@pytest.mark.parametrize(
    ("modules", "pooling", "kind", "message"),
    [
        (
            ["Transformer", "Pooling", "Dense"],
            {"pooling_mode": "mean"},
            UnsupportedModelError,
            "'1_Pooling', Dense '2_Dense'; ",
        ),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, UnsupportedModelError, "accepted: cls or mean"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            UnsupportedModelError,
            "accepted: cls or mean alone",
        ),
        (["Transformer", "Pooling"], [], DataFileError, r"modules\.json or a file that goes with it"),
        (["Pooling", "Transformer"], {}, UnsupportedModelError, r"modules Pooling '', Transformer '1_Transformer'; "),
        (["Transformer"], {}, UnsupportedModelError, r"modules Transformer ''; accepted: Transformer '', Pooling, any"),
        (["Transformer", "Normalize", "Pooling"], {}, UnsupportedModelError, "Normalize '1_Normalize', Pooling"),
        (["Transformer", "Pooling", "Pooling"], {}, UnsupportedModelError, "Pooling '1_Pooling', Pooling"),
        ([], {}, UnsupportedModelError, "has the modules of none"),
    ],
)
def test_parts_that_are_not_computed_are_refused(
    modules: list[str], pooling: Any, kind: Any, message: str, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "model")
    rows = [{"path": f"{i}_{name}" if i else "", "type": f"x.{name}"} for i, name in enumerate(modules)]
    (tmp_path / "model/modules.json").write_text(json.dumps(rows))
    (tmp_path / "model/1_Pooling").mkdir()
    (tmp_path / "model/1_Pooling/config.json").write_text(json.dumps(pooling))
    with pytest.raises(kind, match=message):
        head_of(Settings(model=str(tmp_path / "model")))


# --- classes and options ------------------------------------------------------------------------------


def test_a_text_tower_is_refused_and_not_read_halfway(base: Path, tmp_path: Path, source: Path) -> None:
    tower = models.text_tower(vocab_size=600, max_position_embeddings=514, project_dim=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    xfast.save(xfast.accelerate(tower, precision="fp32"), tmp_path / "packed", tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match="packed AltCLIPTextModel, whose outputs are not its encoder's"):
        encode.run(source, tmp_path / "out", tmp_path / "packed")


def test_options_that_a_head_has_no_use_for_are_refused(base: Path, tmp_path: Path, source: Path) -> None:
    tags = encode.headed(base, tmp_path / "tags", "TokenClassification", num_labels=3)
    classes = encode.headed(base, tmp_path / "classes", "SequenceClassification", num_labels=3)
    numbers = encode.headed(
        base, tmp_path / "numbers", "SequenceClassification", num_labels=3, problem_type="regression"
    )
    for model, options, message in (
        (tags, {"normalize": True}, "normalize: not accepted with a head that gives labels"),
        (classes, {"normalize": True}, "normalize: not accepted"),
        (tags, {"pooling": "cls"}, "pooling, dtype: not accepted"),
        (classes, {"dtype": "float16"}, "pooling, dtype: not accepted"),
    ):
        with pytest.raises(InvalidOptionError, match=message):
            encode.run(source, tmp_path / "out", model, **options)
    with pytest.raises(UnsupportedModelError, match="gives several numbers"):
        encode.run(source, tmp_path / "out", numbers)
    with pytest.raises(InvalidOptionError, match="group-size: 32 is only accepted with int4"):
        convert(str(base), tmp_path / "packed", "int8", group_size=32)


def test_float16_that_cannot_hold_a_value_says_so(base: Path, tmp_path: Path, source: Path) -> None:
    shutil.copytree(base, tmp_path / "large")
    weights = load_file(tmp_path / "large/model.safetensors")
    weights["roberta.encoder.layer.1.output.LayerNorm.weight"] *= 1e6
    save_file(weights, tmp_path / "large/model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidOptionError, match="dtype: float16 holds values up to 65504"):
        encode.run(source, tmp_path / "out", tmp_path / "large", dtype="float16", pooling="cls")


def test_the_published_xxl_is_known_by_its_weights(tmp_path: Path, base: Path, source: Path) -> None:
    models.build("xlm-roberta-xl", "masked-lm", num_hidden_layers=1).save_pretrained(tmp_path / "xxl")
    config = json.loads((tmp_path / "xxl/config.json").read_text())
    (tmp_path / "xxl/config.json").write_text(json.dumps({**config, "model_type": "xlm-roberta"}))
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "xxl")
    with pytest.raises(UnsupportedModelError, match="XLMRobertaXL"):
        encode.run(source, tmp_path / "out", tmp_path / "xxl")


def test_folders_beside_the_models_files_are_none_of_them(base: Path, tmp_path: Path, source: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "runs.json").mkdir()
    assert encode.run(source, tmp_path / "out", tmp_path / "model").totals["rows"] == 12


# --- rows ---------------------------------------------------------------------------------------------


def test_rows_that_are_left_out_cost_no_job(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("not json\n")
    (folder / "b.jsonl").write_text("\n\n")
    good = {"text": "river", "hash": 2**64 - 1}
    lines = [json.dumps(good), '{"text": "a", "\\ud800": 1}', '{"text": "b", "kept": ["\\ud83d"]}', json.dumps(good)]
    stilts.write_lines(folder / "c.jsonl", lines)
    summary = encode.run(folder, tmp_path / "out", base, on_error="skip")
    assert [Path(name).name for name, _ in summary.left_out] == ["a.jsonl", "b.jsonl"]
    rows = encode.read(tmp_path / "out")
    assert rows.column("hash").to_pylist() == [2**64 - 1] * 2
    table = {"text": ["a", None, "b"], "view": pa.array(["x", "y", "z"], pa.string_view())}
    encode.parquet(tmp_path / "v.parquet", table)
    encode.run(tmp_path / "v.parquet", tmp_path / "views", base, on_error="skip")
    assert encode.read(tmp_path / "views").column("view").to_pylist() == ["x", "z"]


def test_hashes_of_64_bits_may_be_small_in_a_shard(base: Path, tmp_path: Path) -> None:
    values = [1, 2, 2**64 - 1, 3, 4]
    path = encode.jsonl(tmp_path / "a.jsonl", [{"text": "a", "hash": value} for value in values])
    encode.run(path, tmp_path / "out", base, shard_rows=2)
    assert encode.read(tmp_path / "out").column("hash").to_pylist() == values
    path = encode.jsonl(tmp_path / "b.jsonl", [{"text": "a", "hash": value} for value in (-1, 2, 2**64 - 1)])
    with pytest.raises(DataFileError, match="'hash' has numbers below 0 and above"):
        encode.run(path, tmp_path / "negative", base, shard_rows=2)
    path = encode.jsonl(tmp_path / "c.jsonl", [{"text": "a", "hash": 10**400}])
    with pytest.raises(DataFileError, match="'hash'"):
        encode.run(path, tmp_path / "large", base)


def test_a_tokenizer_that_is_not_there_is_named(base: Path, hub: Path, tmp_path: Path, source: Path) -> None:
    for name in ("./nowhere", "nosuch/tokenizer"):
        with pytest.raises(DataFileError, match=f"tokenizer: {name}: no such folder"):
            encode.run(source, tmp_path / "out", base, tokenizer=name)


def test_numbers_that_no_float_holds_are_found_before_anything_is_computed(base: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "id": i + 0.5} for i in range(4)] + [{"text": "b", "id": 1795356740914678395}]
    path = encode.jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataFileError, match=r"in\.jsonl:5: column 'id' has 1795356740914678395 here and fractions"):
        encode.run(path, tmp_path / "out", base, shard_rows=2)
    assert not list((tmp_path / "out").glob("*.parquet"))


# --- what an artifact is made from --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["xlm-roberta", "bert", "xlm-roberta-xl"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@torch.no_grad()
def test_a_decoder_of_its_own_stays_its_own(family: str, precision: str, tmp_path: Path) -> None:
    """The config ties it and the file has another one: transformers leaves the two apart."""
    model = models.build(family, "masked-lm")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    name = "cls.predictions.decoder.weight" if family == "bert" else "lm_head.decoder.weight"
    weights[name] = torch.randn(model.config.vocab_size, model.config.hidden_size)
    save_file(weights, file, {"format": "pt"})
    stock = type(model).from_pretrained(tmp_path / "model").eval()
    batch = models.ragged(family)
    mask = batch["attention_mask"].bool()
    want = stock(**batch).logits[mask]
    if torch.equal(stock.get_output_embeddings().weight, stock.get_input_embeddings().weight):
        pytest.skip("this release of transformers ties them")
    convert(str(tmp_path / "model"), tmp_path / "packed", precision)
    got = xfast.load(tmp_path / "packed")(**batch).logits[mask]
    assert models.norm_error(got, want) <= (1e-5 if precision == "fp32" else 0.05)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = models.build("xlm-roberta", "masked-lm")
    model.set_input_embeddings(torch.nn.Embedding(101, 64, padding_idx=1))
    with pytest.raises(UnsupportedModelError, match=r"set model\.config\.tie_word_embeddings = False"):
        xfast.save(xfast.accelerate(model, precision="int8"), tmp_path / "untied")
    model.config.tie_word_embeddings = False
    xfast.save(model, tmp_path / "untied")
    xfast.load(tmp_path / "untied")
    model = models.build()
    model.config.pad_token_id = 3
    with pytest.raises(UnsupportedModelError, match="config was changed after it was built"):
        xfast.save(xfast.accelerate(model, precision="fp32"), tmp_path / "padding")


def test_a_head_of_another_type_is_refused(tmp_path: Path) -> None:
    xfast.save(xfast.accelerate(models.build().to(torch.bfloat16), precision="int8"), tmp_path / "packed")
    head = models.build("xlm-roberta", "sequence-classification")
    with pytest.raises(InvalidOptionError, match=r"is in torch\.float32; give head\.to\(torch\.bfloat16\)"):
        xfast.load(tmp_path / "packed", head=head)
    loaded = xfast.load(tmp_path / "packed", head=head.to(torch.bfloat16))
    with torch.no_grad():
        assert torch.isfinite(loaded(**models.ragged()).logits).all()
