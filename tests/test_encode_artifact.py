"""``xfast encode`` with packed artifacts: what the checkpoint they were made from gives, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encode
import numpy as np
import pytest
import stilts
import torch
import transformers
from typer.testing import CliRunner

import xfast
from xfast import artifact, cli
from xfast.encode.model import head_of
from xfast.encode.settings import Settings

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)

TOLERANCE = 1e-5


def packed(checkpoint: Path, folder: Path, cls: str, precision: str, layers: int | None = None) -> Path:
    """The artifact of a checkpoint, with its tokenizer."""
    model = getattr(transformers, cls).from_pretrained(checkpoint).eval()
    xfast.save(xfast.accelerate(model, precision=precision, layers=layers), folder)
    return folder


@pytest.fixture
def source(tmp_path: Path, rng: Any) -> Path:
    return encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in encode.texts(rng, 20)])


def one_by_one(folder: Path, texts: list[str]) -> list[Any]:
    """What ``xfast.load`` gives, a text at a time; hidden states or logits."""
    model, tokenizer = xfast.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        outputs = [model(**tokenizer(text, return_tensors="pt")) for text in texts]
    return [(output.logits if "logits" in output else output.last_hidden_state)[0] for output in outputs]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_embeddings_are_those_of_the_loaded_model(tmp_path: Path, base: Path, rng: Any, precision: str) -> None:
    texts = encode.texts(rng, 20)
    folder = packed(base, tmp_path / "packed", "AutoModel", precision)
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    assert encode.run(source, tmp_path / "out", folder, pooling="cls").fallbacks == {}
    want = np.stack([states[0].numpy() for states in one_by_one(folder, texts)])
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), want, atol=TOLERANCE)


def test_classes_of_artifacts(tmp_path: Path, base: Path, rng: Any) -> None:
    texts = encode.texts(rng, 20)
    checkpoint = encode.headed(base, tmp_path / "model", "SequenceClassification", num_labels=3)
    folder = packed(checkpoint, tmp_path / "packed", "XLMRobertaForSequenceClassification", "int8")
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    encode.run(source, tmp_path / "out", folder)
    encode.run(source, tmp_path / "embeddings", folder, content="embeddings", precision="int8")
    assert encode.embeddings(tmp_path / "embeddings").shape == (20, 64)
    for row, logits in zip(encode.read(tmp_path / "out").to_pylist(), one_by_one(folder, texts), strict=True):
        score, best = logits.softmax(0).max(0)
        assert row["label"] == f"LABEL_{best}"
        np.testing.assert_allclose(row["score"], score.numpy(), atol=TOLERANCE)


def test_tags_of_artifacts(tmp_path: Path, base: Path, rng: Any) -> None:
    texts = [text for text in encode.texts(rng, 20) if text]
    checkpoint = encode.headed(base, tmp_path / "model", "TokenClassification", num_labels=3)
    folder = packed(checkpoint, tmp_path / "packed", "XLMRobertaForTokenClassification", "fp32")
    encode.run(encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts]), tmp_path / "out", folder)
    for row, logits in zip(encode.read(tmp_path / "out").to_pylist(), one_by_one(folder, texts), strict=True):
        scores, best = logits[1:-1].softmax(1).max(1)  # <s> and </s> are no part of the text
        assert row["labels"] == [f"LABEL_{i}" for i in best]
        np.testing.assert_allclose(row["scores"], scores.numpy(), atol=TOLERANCE)


def test_layers_are_the_artifacts(tmp_path: Path, base: Path, source: Path) -> None:
    folder = packed(base, tmp_path / "packed", "AutoModel", "fp32", layers=1)
    encode.run(source, tmp_path / "want", base, layers=1)
    encode.run(source, tmp_path / "got", folder)
    np.testing.assert_array_equal(encode.embeddings(tmp_path / "got"), encode.embeddings(tmp_path / "want"))
    encode.run(source, tmp_path / "same", folder, layers=1)
    whole = packed(base, tmp_path / "whole", "AutoModel", "fp32")
    encode.run(source, tmp_path / "all", whole, layers=transformers.AutoConfig.from_pretrained(base).num_hidden_layers)
    with pytest.raises(xfast.InvalidOptionError, match=r"layers: 2 is not accepted: .* packed with 1"):
        encode.run(source, tmp_path / "more", folder, layers=2)


def test_an_artifact_has_one_precision(tmp_path: Path, base: Path, source: Path) -> None:
    folder = packed(base, tmp_path / "packed", "AutoModel", "int8")
    for precision in ("fp32", "int4"):
        with pytest.raises(xfast.InvalidOptionError, match=f"precision: '{precision}' is not accepted: .* with int8"):
            encode.run(source, tmp_path / "out", folder, precision=precision)
    with pytest.raises(xfast.InvalidOptionError, match="backend: 'tensorrt' is not accepted"):
        encode.run(source, tmp_path / "out", folder, backend="tensorrt")
    with pytest.raises(xfast.InvalidOptionError, match="content: 'predictions'"):
        encode.run(source, tmp_path / "out", folder, content="predictions")


def test_damaged_artifacts_make_no_output(tmp_path: Path, base: Path, source: Path) -> None:
    folder = packed(base, tmp_path / "packed", "AutoModel", "int8")
    weights = folder / artifact.layer_file(0)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-200] + bytes(200))
    with pytest.raises(xfast.ArtifactError, match="damaged"):
        encode.run(source, tmp_path / "out", folder)
    assert not list((tmp_path / "out").glob("*.parquet"))
    weights.write_bytes(whole)
    config = (folder / artifact.CONFIG).read_bytes()
    for damaged in (config[:-5], config.replace(b"XLMRoberta", b"XLMroberta")):
        (folder / artifact.CONFIG).write_bytes(damaged)
        with pytest.raises(xfast.ArtifactError, match=artifact.CONFIG):
            encode.run(source, tmp_path / "out", folder)
    (folder / artifact.CONFIG).write_bytes(config)
    (folder / artifact.MANIFEST).unlink()
    (folder / artifact.STAGING).mkdir()
    with pytest.raises(xfast.ArtifactError, match="is not finished"):
        encode.run(source, tmp_path / "out", folder)


def test_the_identity_is_the_manifests_and_the_tokenizers(tmp_path: Path, base: Path, monkeypatch: Any) -> None:
    """Without reading the weights, which are many gigabytes; other weights are another manifest."""
    folder = packed(base, tmp_path / "packed", "AutoModel", "int8")
    other = packed(base, tmp_path / "other", "AutoModel", "int8", layers=1)
    opened: list[str] = []
    open_path = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path.name) or open_path(path, *a, **k))
    _, identity = head_of(Settings(model=str(folder)))
    assert artifact.MANIFEST in opened and not any(name.endswith(".safetensors") for name in opened)
    assert head_of(Settings(model=str(folder)))[1] == identity != head_of(Settings(model=str(other)))[1]
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    assert head_of(Settings(model=str(folder)))[1] != identity


def test_the_command_line(tmp_path: Path, base: Path, source: Path) -> None:
    folder = packed(base, tmp_path / "packed", "AutoModel", "int8")
    arguments = ["encode", str(source), str(tmp_path / "out"), "--model", str(folder)]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert len(encode.embeddings(tmp_path / "out")) == 20
    refused = CliRunner().invoke(cli.app, [*arguments[:2], str(tmp_path / "no"), *arguments[3:], "--precision", "bf16"])
    assert refused.exit_code != 0 and "packed with int8" in refused.output + str(refused.exception)
