"""``xfast encode``: what is written equals a plain loop over rows, in the input's order, for every kind of output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encode
import numpy as np
import pyarrow as pa
import pytest
import stilts
import torch
import transformers
from typer.testing import CliRunner

import xfast
from xfast import cli
from xfast.encode import worker
from xfast.encode.ahead import Behind, ahead
from xfast.encode.settings import Execution
from xfast.encode.tokens import Tokenizer, Window, batches

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)

TOLERANCE = 1e-5


def pooled(states: list[torch.Tensor], pooling: str, normalize: bool = False) -> np.ndarray:
    vectors = torch.stack([one.mean(0) if pooling == "mean" else one[0] for one in states])
    return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()


@pytest.mark.parametrize(
    ("pooling", "normalize", "overlap"), [("mean", False, False), ("mean", True, True), ("cls", False, True)]
)
def test_embeddings_equal_a_plain_loop(
    tmp_path: Path, base: Path, rng: Any, pooling: str, normalize: bool, overlap: bool
) -> None:
    texts = encode.texts(rng, 61)
    source = encode.parquet(tmp_path / "in.parquet", {"id": range(61), "text": texts}, row_group_size=13)
    execution = Execution(batch_tokens=40, window=9, overlap=overlap)
    options = {"pooling": pooling, "normalize": normalize, "prefix": "query: ", "shard_rows": 17}
    summary = encode.run(source, tmp_path / "out", base, execution, **options)
    states = encode.one_by_one(base, "AutoModel", [f"query: {text}" for text in texts])
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), pooled(states, pooling, normalize), atol=TOLERANCE)
    table = encode.read(tmp_path / "out")
    assert table.column("id").to_pylist() == list(range(61)) and table.column_names == ["id", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32()), 64)
    tokens = sum(map(len, states))
    assert summary.totals == {"shards": 4, "rows": 61, "skipped": 0, "truncated": 0, "tokens": tokens}
    assert summary.fallbacks == {} and summary.encoded == 4


def test_layers_half_precision_and_truncation(tmp_path: Path, base: Path, rng: Any) -> None:
    texts = encode.texts(rng, 23)
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    summary = encode.run(source, tmp_path / "out", base, layers=1, dtype="float16", max_length=12)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    stock = transformers.AutoModel.from_pretrained(base).eval()
    expected = []
    for text in texts:
        with torch.inference_mode():
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=12)
            expected.append(stock(**given, output_hidden_states=True).hidden_states[1][0].mean(0).numpy())
    found = encode.embeddings(tmp_path / "out")
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, np.array(expected), atol=2e-3)
    assert summary.totals["truncated"] == sum(len(tokenizer(text).input_ids) > 12 for text in texts) > 0


def test_texts_longer_than_the_model_are_cut_to_its_positions(tmp_path: Path, base: Path) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": "river stone " * 2000}, {"text": "lamp"}])
    summary = encode.run(source, tmp_path / "out", base)
    assert summary.totals["truncated"] == 1 and summary.totals["tokens"] > 512
    [long, short] = encode.one_by_one(
        base, "AutoModel", ["river stone " * 2000, "lamp"], truncation=True, max_length=512
    )
    expected = pooled([long, short], "mean")
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), expected, atol=TOLERANCE)


def test_a_vector_for_every_token(tmp_path: Path, base: Path, rng: Any) -> None:
    texts = encode.texts(rng, 11)
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    encode.run(source, tmp_path / "out", base, pooling="none", shard_rows=4)
    found = encode.read(tmp_path / "out").column("embedding").to_pylist()
    for row, states in zip(found, encode.one_by_one(base, "AutoModel", texts), strict=True):
        np.testing.assert_allclose(np.array(row), states.numpy(), atol=TOLERANCE)


def test_labels_and_scores(tmp_path: Path, base: Path, rng: Any) -> None:
    names = {"id2label": dict(enumerate(encode.LABELS)), "label2id": {name: i for i, name in enumerate(encode.LABELS)}}
    model = encode.headed(base, tmp_path / "model", "SequenceClassification", **names)
    texts = encode.texts(rng, 29)
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text, "n": i} for i, text in enumerate(texts)])
    encode.run(source, tmp_path / "out", model)
    logits = torch.stack(encode.one_by_one(model, "AutoModelForSequenceClassification", texts))
    score, best = logits.softmax(1).max(1)
    table = encode.read(tmp_path / "out")
    assert table.column_names == ["n", "label", "score"]
    assert table.column("label").to_pylist() == [encode.LABELS[i] for i in best]
    np.testing.assert_allclose(table.column("score").to_numpy(), score.numpy(), atol=TOLERANCE)
    encode.run(source, tmp_path / "vectors", model, content="embeddings")
    expected = pooled(encode.one_by_one(model, "AutoModel", texts), "mean")
    np.testing.assert_allclose(encode.embeddings(tmp_path / "vectors"), expected, atol=TOLERANCE)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_reranker_reads_pairs(tmp_path: Path, base: Path, rng: Any, normalize: bool) -> None:
    model = encode.headed(base, tmp_path / "model", "SequenceClassification", num_labels=1)
    pairs = list(zip(encode.texts(rng, 19), encode.texts(rng, 19), strict=True))
    columns = {"query": [pair[0] for pair in pairs], "passage": [pair[1] for pair in pairs], "id": range(19)}
    source = encode.parquet(tmp_path / "in.parquet", columns)
    options = {"text_column": "query", "pair_column": "passage", "normalize": normalize, "max_length": 20}
    encode.run(source, tmp_path / "out", model, **options)
    cut = {"truncation": True, "max_length": 20}
    scores = torch.stack(encode.one_by_one(model, "AutoModelForSequenceClassification", pairs, **cut))[:, 0]
    table = encode.read(tmp_path / "out")
    assert table.column_names == ["id", "score"]
    expected = (scores.sigmoid() if normalize else scores).numpy()
    np.testing.assert_allclose(table.column("score").to_numpy(), expected, atol=TOLERANCE)


def test_labels_of_tokens_with_their_characters(tmp_path: Path, base: Path, rng: Any) -> None:
    model = encode.headed(base, tmp_path / "model", "TokenClassification", num_labels=3)
    texts = encode.texts(rng, 13)
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    encode.run(source, tmp_path / "out", model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    logits = encode.one_by_one(model, "AutoModelForTokenClassification", texts)
    rows = encode.read(tmp_path / "out").to_pylist()
    for text, row, values in zip(texts, rows, logits, strict=True):
        score, best = values[1:-1].softmax(1).max(1)  # <s> and </s> are no part of the text
        assert row["labels"] == [f"LABEL_{i}" for i in best]
        np.testing.assert_allclose(row["scores"], score.numpy(), atol=TOLERANCE)
        offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping[1:-1]
        assert list(zip(row["starts"], row["ends"], strict=True)) == [tuple(pair) for pair in offsets]


def test_int8_is_what_accelerate_computes(tmp_path: Path, base: Path, rng: Any) -> None:
    texts = encode.texts(rng, 9)
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    encode.run(source, tmp_path / "out", base, precision="int8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = xfast.accelerate(transformers.AutoModel.from_pretrained(base).eval(), precision="int8")
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), pooled(states, "mean"), atol=TOLERANCE)


def test_batches_hold_every_token_once_and_no_more_than_the_budget(rng: Any) -> None:
    for budget in (1, 7, 64, 10_000):
        lengths = -np.sort(-rng.integers(1, 40, 53))
        ids = np.arange(lengths.sum()) + 5
        window = Window(rng.permutation(53), lengths, ids, None, None, 0, [])
        made = list(batches(window, budget, 1))
        assert np.concatenate([batch.rows for batch in made]).tolist() == window.rows.tolist()
        assert np.concatenate([batch.ids[batch.mask == 1] for batch in made]).tolist() == ids.tolist()
        assert all((batch.ids[batch.mask == 0] == 1).all() for batch in made)
        assert all(len(batch.rows) == 1 or batch.lengths.sum() <= budget for batch in made)
    lengths = np.array([512, 300, *[3] * 1000])
    made = list(batches(Window(np.arange(1002), lengths, np.full(lengths.sum(), 7), None, None, 0, []), 600, 1))
    assert sum(len(batch.rows) for batch in made) == 1002 and len(made) < 12
    assert max(batch.ids.numel() for batch in made) <= 4 * 600  # one long row does not pad a thousand short ones
    empty = np.zeros(0, np.int64)
    assert not list(batches(Window(empty, empty, empty, None, None, 0, []), 8, 1))


def test_long_documents_end_a_window(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["river stone " * 60, "lamp", "river", "stone " * 300, "", "lamp"]
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    encode.run(source, tmp_path / "whole", base, Execution(window=100))
    monkeypatch.setattr(worker, "WINDOW_CHARACTERS", 730)
    rows, window = [], Tokenizer.window

    def counted(self: Tokenizer, first: int, texts: Any, *more: Any) -> Window:
        rows.append(len(texts))
        return window(self, first, texts, *more)

    monkeypatch.setattr(Tokenizer, "window", counted)
    encode.run(source, tmp_path / "cut", base, Execution(window=100))
    assert rows == [3, 1, 2]
    whole, cut = (encode.embeddings(tmp_path / name) for name in ("whole", "cut"))
    np.testing.assert_allclose(cut, whole, atol=TOLERANCE)


def test_ahead_raises_where_it_is_read_and_stops_when_nobody_reads() -> None:
    def failing() -> Any:
        yield from range(3)
        raise ValueError("late")

    seen = []
    with pytest.raises(ValueError, match="late"), ahead(failing(), 1) as items:
        seen.extend(items)
    assert seen == [0, 1, 2]
    endless = iter(int, 1)
    with ahead(endless, 2) as items:
        assert next(items) == 0  # leaving the block ends the thread, or the test hangs


@pytest.mark.parametrize("overlap", [False, True])
def test_behind_keeps_the_order_and_raises(overlap: bool) -> None:
    calls: list[int] = []
    with Behind(overlap) as behind:
        for i in range(5):
            behind(lambda i=i: calls.append(i))
    assert calls == list(range(5))
    with pytest.raises(ZeroDivisionError), Behind(overlap) as behind:
        behind(lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_the_command_line(tmp_path: Path, base: Path) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": "river " * i, "id": i, "more": None} for i in range(6)])
    arguments = [
        "encode",
        str(source),
        str(tmp_path / "out"),
        "--model",
        str(base),
        "--keep",
        "id",
        "--shard-rows",
        "4",
    ]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["totals"]["rows"] == 6 and facts["totals"]["shards"] == 2 and facts["encoded"] == 2
    assert encode.read(tmp_path / "out").column_names == ["id", "embedding"]
    again = CliRunner().invoke(cli.app, arguments)
    assert again.exit_code == 0
    assert again.stdout == f"{tmp_path / 'out'}: 6 rows in 2 shards (0 of them new)\n"
    other = CliRunner().invoke(cli.app, [*arguments, "--normalize"])
    assert other.exit_code == cli.BAD_INPUT
    assert "normalize was false, now true" in other.stderr and other.stderr.count("\n") == 1


def test_real_sentences(tmp_path: Path, base: Path, data_dir: Path) -> None:
    lines = (data_dir / "xtreme" / "tatoeba" / "sw-en.sw").read_text(encoding="utf-8").splitlines()[:50]
    source = encode.jsonl(tmp_path / "in.jsonl", [{"text": line} for line in lines])
    encode.run(source, tmp_path / "out", base)
    expected = pooled(encode.one_by_one(base, "AutoModel", lines), "mean")
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), expected, atol=TOLERANCE)
