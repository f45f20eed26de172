"""sentence-transformers models in ``xfast encode`` and in artifacts: none of what they say of themselves is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import encode
import numpy as np
import pytest
import stilts
import transformers
from huggingface_hub.errors import EntryNotFoundError

import xfast
from xfast import tokenizer_files
from xfast.convert import convert
from xfast.encode.model import head_of
from xfast.encode.settings import Settings
from xfast.errors import DataFileError, InvalidOptionError, UnsupportedModelError

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
hub = pytest.fixture(encode.hub)

PROMPTS = "config_sentence_transformers.json"
UNIT = ("Transformer", "Pooling", "Normalize")


def sentences(base: Path, folder: Path, *, pooling: str = "1_Pooling", file: str = "", **text: Any) -> Path:
    """A checkpoint that pools with the first token, to length 1; ``text`` is in ``file``."""
    shutil.copytree(base, folder)
    paths = ("", pooling, "2_Normalize")
    rows = [{"path": path, "type": f"x.{name}"} for path, name in zip(paths, UNIT, strict=True)]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / pooling).mkdir()
    (folder / pooling / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    if file:
        (folder / file).write_text(json.dumps(text))
    return prompted(folder)


def prompted(folder: Path, default: str | None = None, **more: Any) -> Path:
    """With prompts, one of which may be put before every text."""
    content = {"prompts": {"query": "river lamp ", "none": None}, "default_prompt_name": default, **more}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(content))
    return folder


def changed(folder: Path, file: str, **values: Any) -> Path:
    """With other values in a file of JSON."""
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in ("River STONE", "lamp " * 40, "")])


def hidden(model: Any, text: str, tokenizer: Path) -> np.ndarray:
    """The first token's state, of length 1."""
    tokens = transformers.AutoTokenizer.from_pretrained(tokenizer)(text, return_tensors="pt")
    state = model(**tokens).last_hidden_state[0, 0].detach().numpy()
    return state / np.linalg.norm(state)


# --- the Hub's cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", PROMPTS])
def test_what_was_never_cached_is_not_taken_for_absent(base: Path, hub: Path, tmp_path: Path, lost: str) -> None:
    whole = sentences(base, tmp_path / "m", file="sentence_bert_config.json", max_seq_length=16)
    snapshot = encode.publish(whole, hub, "me/whole", "a" * 40, absent=())
    head, _ = head_of(Settings(model="me/whole"))
    assert (head.pooling, head.normalize, head.max_length) == ("cls", True, 16)
    (snapshot / lost).unlink()
    with pytest.raises(DataFileError, match=f"model: me/whole: {lost} is not in the Hub's cache.*hf download me/whole"):
        head_of(Settings(model="me/whole"))


def test_a_pooling_that_is_named_needs_no_hub(base: Path, hub: Path, tmp_path: Path, source: Path) -> None:
    encode.publish(base, hub, "me/plain", "a" * 40, absent=())
    with pytest.raises(DataFileError, match="or pass --pooling"):
        encode.run(source, tmp_path / "out", "me/plain")
    encode.run(source, tmp_path / "out", "me/plain", pooling="mean")


def test_a_list_of_the_repository_says_what_is_absent(base: Path, hub: Path) -> None:
    snapshot = encode.publish(base, hub, "me/listed", "a" * 40, absent=())
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    content: dict[str, Any] = {"format_version": 1, "files": {path.name: {} for path in snapshot.iterdir()}}
    (trees / f"{'a' * 40}.json").write_text(json.dumps(content))
    assert head_of(Settings(model="me/listed"))[0].pooling == "mean"
    content["files"]["modules.json"] = {}
    (trees / f"{'a' * 40}.json").write_text(json.dumps(content))
    with pytest.raises(DataFileError, match=r"modules\.json is not in the Hub's cache"):
        head_of(Settings(model="me/listed"))


def test_a_hub_that_answers_says_what_is_absent(base: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode.publish(base, hub, "me/asked", "a" * 40, absent=())  # a cache that cannot be written keeps no answer

    def answer(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("404")

    monkeypatch.setattr("xfast.encode.sentences.hf_hub_download", answer)
    assert head_of(Settings(model="me/asked"))[0].pooling == "mean"


# --- letter case and lengths --------------------------------------------------------------------------


@pytest.mark.parametrize("file", tokenizer_files.LENGTHS)
def test_every_file_of_lengths_and_letter_case_is_read(base: Path, tmp_path: Path, source: Path, file: str) -> None:
    model = sentences(base, tmp_path / "m", file=file, max_seq_length=16, do_lower_case=True)
    encode.run(source, tmp_path / "out", model)
    stock = transformers.AutoModel.from_pretrained(base).eval()
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out")[0], hidden(stock, "river stone", base), atol=1e-5)
    assert encode.manifest(tmp_path / "out")["totals"]["truncated"] == 1
    convert(str(model), tmp_path / "packed", "fp32", "XLMRobertaModel")
    encode.run(source, tmp_path / "again", tmp_path / "packed")
    np.testing.assert_allclose(encode.embeddings(tmp_path / "again"), encode.embeddings(tmp_path / "out"), atol=1e-5)


def test_lower_case_is_sentence_transformers_own(base: Path, tmp_path: Path, source: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    parts_of = pytest.importorskip("sentence_transformers.models")
    text = parts_of.Transformer(str(base), max_seq_length=16, do_lower_case=True)
    model = library.SentenceTransformer(modules=[text, parts_of.Pooling(64, pooling_mode="mean")], device="cpu")
    model.save(str(tmp_path / "model"))
    encode.run(source, tmp_path / "out", tmp_path / "model")
    want = model.encode(["River STONE", "lamp " * 40, ""])
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), want, atol=1e-5)


# --- prompts and other settings -----------------------------------------------------------------------

TEXTS = ["River STONE", "lamp " * 40, ""]


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("sentence_transformers")


def saved(library: Any, base: Path, folder: Path, **pool: Any) -> Any:
    """The library's own model, saved and read again: of 16 tokens, in lower case, with a default prompt."""
    parts_of = pytest.importorskip("sentence_transformers.models")
    parts = [parts_of.Transformer(str(base)), parts_of.Pooling(64, **{"pooling_mode": "mean", **pool})]
    named = {"prompts": {"query": "river lamp ", "passage": ""}, "default_prompt_name": "query"}
    library.SentenceTransformer(modules=parts, device="cpu", **named).save(str(folder))
    changed(folder, "sentence_bert_config.json", max_seq_length=16, do_lower_case=True)
    return library.SentenceTransformer(str(folder), device="cpu")


def test_the_default_prompt_is_the_one_that_is_put(library: Any, base: Path, tmp_path: Path, source: Path) -> None:
    model = saved(library, base, tmp_path / "model")
    convert(str(tmp_path / "model"), tmp_path / "packed", "fp32", "XLMRobertaModel")
    identities = set()
    for prefix in (None, "", "lamp "):
        want = model.encode(TEXTS, prompt=prefix)
        for name in ("model", "packed"):
            output = tmp_path / f"{name} {prefix}"
            encode.run(source, output, tmp_path / name, prefix=prefix)
            np.testing.assert_allclose(encode.embeddings(output), want, atol=1e-5)
        identities.add(head_of(Settings(model=str(tmp_path / "model"), prefix=prefix))[1])
    assert len(identities) == 2  # what is asked for is among the settings
    (tmp_path / "packed" / PROMPTS).unlink()  # as packed before prompts were kept
    assert head_of(Settings(model=str(tmp_path / "packed")))[0].prefix == ""
    with pytest.raises(InvalidOptionError, match='prefix was null, now ""'):
        encode.run(source, tmp_path / "model None", tmp_path / "model", prefix="")


def test_vectors_of_tokens_are_the_librarys(library: Any, base: Path, tmp_path: Path, source: Path) -> None:
    model = saved(library, base, tmp_path / "model", pooling_mode="max", include_prompt=False)
    encode.run(source, tmp_path / "out", tmp_path / "model", pooling="none")
    got = encode.read(tmp_path / "out").column("embedding").to_pylist()
    for ours, theirs in zip(got, model.encode(TEXTS, output_value="token_embeddings"), strict=True):
        np.testing.assert_allclose(np.array(ours), theirs.cpu().numpy(), atol=1e-5)


def test_cross_encoders_have_lengths_and_lower_case_too(library: Any, base: Path, tmp_path: Path) -> None:
    encode.headed(base, tmp_path / "plain", "SequenceClassification", num_labels=1)
    named = {"prompts": {"query": "river lamp "}, "default_prompt_name": "query"}
    library.CrossEncoder(str(tmp_path / "plain"), device="cpu", **named).save_pretrained(str(tmp_path / "model"))
    changed(tmp_path / "model", "sentence_bert_config.json", max_seq_length=24, do_lower_case=True)
    model = library.CrossEncoder(str(tmp_path / "model"), device="cpu")
    pairs = [("River STONE", "lamp green bread " * 30), ("Song", "LETTER")]
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": one, "other": two} for one, two in pairs])
    encode.run(source, tmp_path / "out", tmp_path / "model", pair_column="other", normalize=True)
    np.testing.assert_allclose(encode.read(tmp_path / "out")["score"], model.predict(pairs), atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="accepted: Transformer '', Pooling"):
        head_of(Settings(model=str(tmp_path / "model"), content="embeddings"))
    head = head_of(Settings(model=str(tmp_path / "model"), content="embeddings", pooling="mean"))[0]
    assert (head.prefix, head.max_length, head.lower) == ("river lamp ", 24, True)
    modules = json.loads((tmp_path / "model/modules.json").read_text())
    (tmp_path / "model/modules.json").write_text(json.dumps([*modules, {"path": "1_Dense", "type": "x.Dense"}]))
    with pytest.raises(UnsupportedModelError, match="Dense '1_Dense'; accepted: Transformer '' alone"):
        head_of(Settings(model=str(tmp_path / "model")))


def test_heads_that_were_never_asked_for_modules_are_run(base: Path, hub: Path, tmp_path: Path) -> None:
    encode.headed(base, tmp_path / "plain", "SequenceClassification", num_labels=1)
    encode.publish(tmp_path / "plain", hub, "me/reranker", "a" * 40, absent=())
    assert head_of(Settings(model="me/reranker"))[0].kind == "relevance"


def test_a_prompt_that_is_not_pooled_is_refused(base: Path, tmp_path: Path) -> None:
    model = changed(sentences(base, tmp_path / "m"), "1_Pooling/config.json", include_prompt=False)
    for prefix in (None, ""):
        assert head_of(Settings(model=str(model), prefix=prefix))[0].prefix == ""
    prompted(model, "query")
    for prefix in (None, "lamp "):
        with pytest.raises(UnsupportedModelError, match=r"include_prompt: false.*'(river )?lamp '.*--pooling"):
            head_of(Settings(model=str(model), prefix=prefix))
    assert head_of(Settings(model=str(model), prefix=""))[0].prefix == ""
    assert head_of(Settings(model=str(model), pooling="mean"))[0].prefix == "river lamp "


@pytest.mark.parametrize(
    ("default", "more", "kind", "message"),
    [
        ("passage", {}, DataFileError, "default_prompt_name is 'passage'; expected.*query, document, none"),
        ("odd", {"prompts": {"odd": 7}}, DataFileError, "default_prompt_name is 'odd'"),
        ("half", {"prompts": {"half": "\ud800"}}, DataFileError, "default_prompt_name is 'half'"),
        ("odd", {"prompts": ["odd"]}, DataFileError, "modules.json or a file that goes with it"),
        (None, {"truncate_dim": 16}, UnsupportedModelError, "truncate_dim to 16"),
    ],
)
def test_prompts_that_cannot_be_put(
    default: str | None, more: dict[str, Any], kind: Any, message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        head_of(Settings(model=str(prompted(sentences(base, tmp_path / "m"), default, **more))))


@pytest.mark.parametrize("default", ["none", "document", None])
def test_prompts_that_are_none(default: str | None, base: Path, tmp_path: Path) -> None:
    assert head_of(Settings(model=str(prompted(sentences(base, tmp_path / "m"), default))))[0].prefix == ""


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (UnsupportedModelError, "processing_kwargs", {"text": {"add_special_tokens": False}}),
        (UnsupportedModelError, "tokenizer_args", {"model_max_length": 5}),
        (UnsupportedModelError, "transformer_task", "fill-mask"),
        (UnsupportedModelError, "modality_config", {"text": {"method": "forward", "method_output_name": "pooler"}}),
        (UnsupportedModelError, "document_length", 7),
        (UnsupportedModelError, "of_another_release", 0),
        (DataFileError, "max_seq_length", "16"),
        (DataFileError, "do_lower_case", "yes"),
    ],
)
def test_settings_that_are_not_applied_are_refused(kind: Any, key: str, value: Any, base: Path, tmp_path: Path) -> None:
    file = "sentence_bert_config.json"
    model = sentences(base, tmp_path / "m", file=file, do_lower_case=False, query_length=None, processing_kwargs={})
    changed(model, file, unpad_inputs=True, model_args={"trust_remote_code": True})
    assert head_of(Settings(model=str(model)))[0].max_length is None
    with pytest.raises(kind, match=key):
        head_of(Settings(model=str(changed(model, file, **{key: value}))))


# --- artifacts ----------------------------------------------------------------------------------------


def test_saving_a_loaded_artifact_keeps_the_pooling(base: Path, tmp_path: Path) -> None:
    convert(str(sentences(base, tmp_path / "m", pooling="1_First")), tmp_path / "packed", "fp32", "XLMRobertaModel")
    for target in (tmp_path / "packed", tmp_path / "elsewhere"):
        xfast.save(xfast.load(tmp_path / "packed"), target)
        head, _ = head_of(Settings(model=str(target)))
        assert (head.pooling, head.normalize) == ("cls", True)


def loaded(name: str, revision: str) -> Any:
    return xfast.accelerate(transformers.AutoModel.from_pretrained(name, revision=revision).eval(), precision="fp32")


def test_saving_takes_the_files_of_the_models_own_revision(base: Path, hub: Path, tmp_path: Path) -> None:
    first = encode.publish(sentences(base, tmp_path / "m"), hub, "me/two", "a" * 40)
    changed = Path(shutil.copytree(tmp_path / "m", tmp_path / "changed"))
    (changed / "tokenizer_config.json").write_text("{}")
    encode.publish(changed, hub, "me/two", "b" * 40)
    model = loaded("me/two", "a" * 40)
    model.config._commit_hash = "a" * 40
    xfast.save(model, tmp_path / "known")
    for name in ("tokenizer_config.json", "modules.json"):
        assert (tmp_path / "known" / name).read_bytes() == (first / name).read_bytes()
    model.config._commit_hash = None
    with pytest.raises(DataFileError, match=r"tokenizer_config\.json differs between the 2 revisions.*give tokenizer="):
        xfast.save(model, tmp_path / "unknown")
    shutil.copytree(tmp_path / "m", tmp_path / "fewer")
    (tmp_path / "fewer" / "modules.json").unlink()
    encode.publish(tmp_path / "fewer", hub, "me/fewer", "b" * 40)
    encode.publish(sentences(base, tmp_path / "more"), hub, "me/fewer", "a" * 40)
    with pytest.raises(DataFileError, match=r"modules\.json differs between the 2 revisions"):
        xfast.save(loaded("me/fewer", "a" * 40), tmp_path / "unknown")
    xfast.save(model, tmp_path / "given", tokenizer=transformers.AutoTokenizer.from_pretrained(first))
    assert (tmp_path / "given" / "modules.json").read_bytes() == (first / "modules.json").read_bytes()


def test_an_artifact_in_a_folder_of_the_hub_ids_name_gets_all_files(
    base: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That folder is there when files are looked for, and has none; a folder that the model came from has them."""
    encode.publish(sentences(base, tmp_path / "m"), hub, "me/e5", "a" * 40, absent=())
    monkeypatch.chdir(tmp_path)
    model = loaded("me/e5", "a" * 40)
    for target in ("elsewhere", "me/e5", "me/e5"):
        xfast.save(model, target)
        assert head_of(Settings(model=target))[0].pooling == "cls"
    names = [sorted(path.name for path in Path(target).iterdir()) for target in ("elsewhere", "me/e5")]
    assert names[0] == names[1] and "tokenizer.json" in names[0]


def test_modules_that_may_be_on_the_hub_are_not_left_out_silently(base: Path, hub: Path, tmp_path: Path) -> None:
    encode.publish(base, hub, "me/bare", "a" * 40, absent=())
    with pytest.warns(UserWarning, match=r"me/bare: modules\.json is not in the Hub's cache.*hf download"):
        xfast.save(loaded("me/bare", "a" * 40), tmp_path / "saved")
    encode.publish(base, hub, "me/plain", "a" * 40)
    xfast.save(loaded("me/plain", "a" * 40), tmp_path / "plain")
    convert("me/plain", tmp_path / "converted", "fp32", "XLMRobertaModel")
