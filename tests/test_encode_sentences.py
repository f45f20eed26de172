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
from xfast.errors import DataFileError

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
hub = pytest.fixture(encode.hub)

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


@pytest.mark.parametrize("lost", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"])
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


def test_modules_that_may_be_on_the_hub_are_not_left_out_silently(base: Path, hub: Path, tmp_path: Path) -> None:
    encode.publish(base, hub, "me/bare", "a" * 40, absent=())
    with pytest.warns(UserWarning, match=r"me/bare: modules\.json is not in the Hub's cache.*hf download"):
        xfast.save(loaded("me/bare", "a" * 40), tmp_path / "saved")
    encode.publish(base, hub, "me/plain", "a" * 40)
    xfast.save(loaded("me/plain", "a" * 40), tmp_path / "plain")
    convert("me/plain", tmp_path / "converted", "fp32", "XLMRobertaModel")
