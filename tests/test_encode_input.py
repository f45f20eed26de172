"""``xfast encode``: bad and odd input. What cannot be encoded is named; nothing is dropped silently."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import encode
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stilts
import tokenizers
import transformers

from xfast.encode import jsonl, source
from xfast.encode.settings import Execution, Settings
from xfast.errors import (
    DataFileError,
    InvalidOptionError,
    InvalidWeightsError,
    TokenIdError,
    UnsupportedModelError,
    XfastError,
)

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
write = pytest.fixture(stilts.write)

GOOD = [{"text": "river stone", "id": 0}, {"text": "lamp", "id": 1}, {"text": "", "id": 2}]


def refused(kind: type[XfastError], tmp_path: Path, model: Any, given: Any, *parts: str, **settings: Any) -> None:
    """The job raises ``kind`` with all ``parts`` in its message and makes no shard."""
    with pytest.raises(kind) as caught:
        encode.run(given, tmp_path / "out", model, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("options", [{"text_column": "body"}, {"pair_column": "body"}, {"keep": ("body",)}])
def test_a_missing_column_is_named_with_those_there(tmp_path: Path, base: Path, kind: str, options: Any) -> None:
    columns = {"text": ["a", "b"], "id": [1, 2]}
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        encode.parquet(path, columns)
    else:
        encode.jsonl(path, rows)
    refused(DataFileError, tmp_path, base, path, str(path), "'body'", "text, id", **options)
    if "keep" not in options and kind == "jsonl":  # not even where bad rows are skipped: every row would be
        refused(DataFileError, tmp_path, base, path, "'body'", on_error="skip", **options)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "some-org/no-such-model"])
def test_a_model_that_is_not_there(name: str, tmp_path: Path) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    refused(DataFileError, tmp_path, name, path, f"model: {name}: no such folder", "a Hub id")


def test_a_parquet_column_that_is_no_text(tmp_path: Path, base: Path) -> None:
    path = encode.parquet(tmp_path / "in.parquet", {"text": [1, 2]})
    refused(DataFileError, tmp_path, base, path, str(path), "'text' is int64", on_error="skip")


BAD_LINES = {
    "null": (b'{"text": null}', "'text' is null"),
    "number": (b'{"text": 7}', "'text' is int"),
    "no column": (b'{"txt": "a"}', "columns there: txt"),
    "no JSON": (b'{"text": "a"', "not JSON"),
    "no object": (b'["text"]', "got list"),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "half a pair": (b'{"text": "\\ud800"}', "surrogate"),
    "deep": (b'{"text": ' + b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("line", "reason"), list(BAD_LINES.values()), ids=list(BAD_LINES))
def test_bad_lines(tmp_path: Path, base: Path, write: Any, line: bytes, reason: str) -> None:
    good = [json.dumps(row).encode() for row in GOOD]
    path = write("in.jsonl", b"\n".join([good[0], b"", good[1], line, good[2]]))
    refused(DataFileError, tmp_path, base, path, f"{path}:4: ", reason, "--on-error skip", shard_rows=2)
    summary = encode.run(path, tmp_path / "out", base, shard_rows=2, on_error="skip")
    assert summary.totals["rows"] == 3 and summary.totals["skipped"] == 1
    assert encode.read(tmp_path / "out").column("id").to_pylist() == [0, 1, 2]
    [[where, why]] = [one for output in encode.manifest(tmp_path / "out")["outputs"] for one in output["skipped"]]
    assert where == f"{path}:4" and reason in why


def test_a_line_that_is_too_deep_to_be_written_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading goes a little deeper than writing; how deep depends on the stack."""

    def deep(row: Any) -> bool:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(jsonl, "_is_unicode", deep)
    path = stilts.write_lines(tmp_path / "in.jsonl", ['{"text": "a\\u0061"}', '{"text": "b"}'])
    refused(DataFileError, tmp_path, base, path, f"{path}:1: nested too deeply")
    assert encode.run(path, tmp_path / "out", base, on_error="skip").totals["skipped"] == 1


@pytest.mark.parametrize("keep", [None, ()])
def test_null_rows_of_parquet(tmp_path: Path, base: Path, keep: Any) -> None:
    columns = {"text": ["a", None, "b", None], "id": range(4)}
    path = encode.parquet(tmp_path / "in.parquet", columns, row_group_size=3)
    refused(DataFileError, tmp_path, base, path, f"{path}, row 1: 'text' is null", keep=keep)
    summary = encode.run(path, tmp_path / "out", base, on_error="skip", keep=keep)
    assert summary.totals["rows"] == 2 and summary.totals["skipped"] == 2
    table = encode.read(tmp_path / "out")
    assert table.num_rows == 2 and (keep is not None or table.column("id").to_pylist() == [0, 2])
    assert encode.manifest(tmp_path / "out")["outputs"][0]["skipped"][1] == [f"{path}, row 3", "'text' is null"]


def test_bytes_that_are_no_utf8_in_a_parquet_string(tmp_path: Path, base: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32).tobytes())
    broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xff\xfeb"))
    path = encode.parquet(tmp_path / "in.parquet", {"text": broken})
    refused(DataFileError, tmp_path, base, path, "row 1: 'text' is not UTF-8")
    assert encode.run(path, tmp_path / "out", base, on_error="skip").totals["rows"] == 2


def test_parquet_that_is_cut_off_or_damaged(tmp_path: Path, base: Path, rng: Any) -> None:
    path = encode.parquet(tmp_path / "in.parquet", {"text": encode.texts(rng, 500)})
    whole = path.read_bytes()
    for size in (1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(DataFileError, tmp_path, base, path, str(path), "Parquet")
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])  # the footer is whole, the pages are not
    refused(DataFileError, tmp_path, base, path, str(path))


def test_files_without_rows(tmp_path: Path, base: Path, write: Any) -> None:
    (tmp_path / "data").mkdir()
    write("data/a.jsonl", "")
    write("data/b.jsonl", GOOD)
    refused(DataFileError, tmp_path, base, tmp_path / "data", "a.jsonl: the file is empty")
    summary = encode.run(tmp_path / "data", tmp_path / "out", base, on_error="skip")
    assert summary.totals["rows"] == 3
    assert summary.left_out == [(str(tmp_path / "data" / "a.jsonl"), "the file is empty")]
    shutil.rmtree(tmp_path / "out")
    blank = write("blank.jsonl", "\n \n\n")
    refused(DataFileError, tmp_path, base, blank, f"{blank}: holds no row")
    only = write("only.jsonl", "")
    refused(DataFileError, tmp_path, base, only, "no file has a row that can be used", on_error="skip")


def test_a_parquet_file_of_no_rows_makes_a_shard_of_none(tmp_path: Path, base: Path) -> None:
    none = pa.table({"text": pa.array([], pa.string()), "id": pa.array([], pa.int64())})
    (tmp_path / "data").mkdir()
    pq.write_table(none, tmp_path / "data" / "a.parquet")
    encode.parquet(tmp_path / "data" / "b.parquet", {"text": ["x"], "id": [1]})
    for pooling in ("mean", "none"):
        output = tmp_path / pooling
        summary = encode.run(tmp_path / "data", output, base, pooling=pooling)
        assert summary.totals["rows"] == 1 and summary.totals["shards"] == 2
        assert pq.read_table(output / "shard-000000.parquet").num_rows == 0
        assert encode.read(output).num_rows == 1


def test_which_files_are_input(tmp_path: Path, base: Path, write: Any) -> None:
    (tmp_path / "data" / "_hidden").mkdir(parents=True)
    write("data/b.ndjson", '{"text": "b"}\n')
    write("data/a.jsonl", '{"text": "a"}')
    write("data/note.txt", "no input")
    write("data/_hidden/c.jsonl", "no JSON")
    rows = encode.run(tmp_path / "data", tmp_path / "out", base, keep=("text",))
    assert rows.totals["shards"] == 2 and encode.read(tmp_path / "out").column("text").to_pylist() == ["a", "b"]
    encode.run(f"{tmp_path}/data/*.ndjson", tmp_path / "glob", base, keep=("text",))
    assert encode.read(tmp_path / "glob").column("text").to_pylist() == ["b"]
    for given, part in ((tmp_path / "nowhere", "no file"), (tmp_path / "nowhere" / "*.jsonl", "no file")):
        with pytest.raises(DataFileError, match=part):
            encode.run(given, tmp_path / "other", base)
    for given, output, part in (
        (tmp_path / "data" / "note.txt", tmp_path / "other", "note.txt"),
        (tmp_path / "data", tmp_path / "data" / "out", "lies inside the input"),
        (tmp_path / "data" / "a.jsonl", tmp_path / "data", "lies inside the output"),
    ):
        with pytest.raises(InvalidOptionError, match=part):
            encode.run(given, output, base)


def test_lines_with_a_mark_blanks_and_carriage_returns(tmp_path: Path, base: Path, write: Any) -> None:
    path = write("in.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  {"text": "\\u0000\xc3\xa9"}\r\n\n{"text": "c"}')
    encode.run(path, tmp_path / "out", base, keep=("text",), shard_rows=1)
    assert encode.read(tmp_path / "out").column("text").to_pylist() == ["a", "\0é", "c"]


def test_types_of_kept_columns_are_one_for_all_shards(tmp_path: Path, base: Path, write: Any) -> None:
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": 2.5, "y": None}, {"text": "c", "y": ["z"]}]
    (tmp_path / "data").mkdir()
    write("data/a.jsonl", rows)
    encode.parquet(tmp_path / "data" / "b.parquet", {"text": pa.array(["d"], pa.large_string()), "z": [True]})
    encode.run(tmp_path / "data", tmp_path / "out", base, shard_rows=1)
    schemas = {str(pq.read_schema(path).remove_metadata()) for path in (tmp_path / "out").glob("*.parquet")}
    assert len(schemas) == 1
    table = encode.read(tmp_path / "out")
    assert table.column("x").to_pylist() == [1.0, 2.5, None, None]
    assert table.column("y").to_pylist() == [None, None, ["z"], None]
    assert table.column("z").to_pylist() == [None, None, None, True]
    for name, mixed in (
        ("one", [{"text": "a", "x": 1}, {"text": "b", "x": "1"}]),
        ("big", [{"text": "a", "x": 2**70}]),
    ):
        path = write(f"{name}.jsonl", mixed)
        refused(DataFileError, tmp_path / name, base, path, str(path), "x")
        refused(DataFileError, tmp_path / f"{name}1", base, path, str(path), "x", shard_rows=1)


def test_dictionary_and_view_strings(tmp_path: Path, base: Path) -> None:
    words = pa.array(["a", "b", "a"])
    for name, column in (("d", words.dictionary_encode()), ("l", words.cast(pa.large_string()))):
        path = encode.parquet(tmp_path / f"{name}.parquet", {"text": column, "kept": column})
        encode.run(path, tmp_path / name, base)
        assert encode.read(tmp_path / name).column("kept").to_pylist() == ["a", "b", "a"]


def test_a_kept_column_with_the_name_of_an_output(tmp_path: Path, base: Path, write: Any) -> None:
    path = write("in.jsonl", [{"text": "a", "embedding": 1}])
    refused(InvalidOptionError, tmp_path, base, path, "'embedding'", "--keep")
    encode.run(path, tmp_path / "out2", base, keep=())
    assert encode.read(tmp_path / "out2").column_names == ["embedding"]


def test_a_pattern_that_reaches_the_output_can_be_continued(tmp_path: Path, base: Path) -> None:
    encode.parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    encode.run(str(tmp_path / "**" / "*.parquet"), tmp_path / "out", base)
    assert encode.run(str(tmp_path / "**" / "*.parquet"), tmp_path / "out", base).encoded == 0
    assert encode.read(tmp_path / "out").num_rows == 2


def test_folders_with_a_files_name_and_links_to_folders(tmp_path: Path, base: Path) -> None:
    (tmp_path / "in" / "name.parquet").mkdir(parents=True)  # as Spark writes
    encode.parquet(tmp_path / "in" / "name.parquet" / "part-0.parquet", {"text": ["one"]})
    (tmp_path / "far").mkdir()
    encode.parquet(tmp_path / "far" / "b.parquet", {"text": ["two", "three"]})
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "in")
    encode.run(tmp_path / "in", tmp_path / "out", base)
    assert encode.read(tmp_path / "out").num_rows == 3


def test_a_pattern_reads_each_file_once(tmp_path: Path, base: Path) -> None:
    encode.parquet(tmp_path / "in" / "deep" / "a.parquet", {"text": ["one", "two"]})
    (tmp_path / "in" / "b.parquet").symlink_to(tmp_path / "in" / "deep" / "a.parquet")
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    encode.run(str(tmp_path / "in" / "**" / "**" / "*.parquet"), tmp_path / "out", base)
    assert encode.read(tmp_path / "out").num_rows == 2


def test_a_file_with_several_names_is_read_once(tmp_path: Path, base: Path) -> None:
    encode.parquet(tmp_path / "in" / "b.parquet", {"text": ["one", "two"]})
    (tmp_path / "in" / "a.parquet").hardlink_to(tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "c.parquet").symlink_to("b.parquet")
    for given in (tmp_path / "in", tmp_path / "in" / "*.parquet"):
        [found] = source.find(str(given), tmp_path / "out")
        assert found.path == str(tmp_path / "in" / "a.parquet")


@pytest.mark.parametrize("given", ["in", "in/*.jsonl", "**/*.jsonl", "in/nowhere.jsonl"])
def test_what_is_no_file_any_more_is_not_passed_over(given: str, tmp_path: Path) -> None:
    encode.jsonl(tmp_path / "in" / "a.jsonl", GOOD)
    for name in ("nowhere.jsonl", "pipe.jsonl"):
        path = tmp_path / "in" / name
        if name == "pipe.jsonl":
            os.mkfifo(path)
        else:
            path.symlink_to(tmp_path / "gone.jsonl")
        with pytest.raises(DataFileError, match=f"input: {path}: "):
            source.find(str(tmp_path / given).replace("nowhere", path.stem), tmp_path / "out")
        path.unlink()
    (tmp_path / "in" / ".hidden.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "in" / "note.txt").symlink_to(tmp_path / "gone.txt")
    [found] = source.find(str(tmp_path / given).replace("nowhere", "a"), tmp_path / "out")
    assert found.path == str(tmp_path / "in" / "a.jsonl")


@pytest.mark.parametrize("given", ["in", "in/**/*.jsonl", "**/*.jsonl", "in/*/*.jsonl", "in/**"])
def test_a_folder_that_cannot_be_listed_is_named(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("in/a", "in/closed", "in/.closed"):
        encode.jsonl(tmp_path / folder / "a.jsonl", GOOD)
    scan = os.scandir

    def refuse(path: Any = ".") -> Any:  # as root, who may list any folder, is refused nothing
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataFileError, match=f"input: {tmp_path}/in/closed/?: Permission denied"):
        source.find(str(tmp_path / given), tmp_path / "out")
    shutil.move(tmp_path / "in" / "closed", tmp_path / "elsewhere")
    assert len(source.find(str(tmp_path / "in"), tmp_path / "out")) == 1  # hidden ones are not looked into


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_names_that_are_no_text(tmp_path: Path, base: Path, kind: str, folder: bool) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        encode.parquet(path, {"text": ["a"]})
    else:
        encode.jsonl(path, GOOD)
    with pytest.raises(InvalidOptionError, match=r"output: b'.*\\xff/out' is not UTF-8"):
        encode.run(path, odd / "out", base)
    path.rename(odd / path.name)
    refused(InvalidOptionError, tmp_path, base, odd if folder else odd / path.name, "input: b'", r"\xff", "not UTF-8")


def test_kept_columns_that_parquet_cannot_hold(tmp_path: Path, base: Path) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a", "meta": {}}])
    refused(DataFileError, tmp_path, base, path, "column 'meta'", "--keep")
    encode.run(path, tmp_path / "kept", base, keep=())


def test_a_required_column_that_one_file_lacks_becomes_null(tmp_path: Path, base: Path) -> None:
    required = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("id", pa.int64(), nullable=False)])
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"], "id": [7]}, schema=required), tmp_path / "in" / "a.parquet")
    encode.parquet(tmp_path / "in" / "b.parquet", {"text": ["b"]})
    encode.run(tmp_path / "in", tmp_path / "out", base)
    assert encode.read(tmp_path / "out").column("id").to_pylist() == [7, None]


@pytest.mark.parametrize(
    "content",
    [["neg", "pos", "neutral"], {"1": "a", "2": "b", "3": "c"}, {}],
    ids=["list", "from 1", "none"],
)
def test_labels_that_are_not_named_from_0(tmp_path: Path, base: Path, content: Any) -> None:
    model = encode.headed(base, tmp_path / "model", "SequenceClassification")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "id2label": content}))
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    parts = ("id2label",) if isinstance(content, dict) else ()  # a list is refused by transformers, in its words
    refused(DataFileError, tmp_path, model, path, str(model), *parts)


@pytest.mark.parametrize("content", [5, [5], [None], {"a": 1}], ids=str)
def test_architectures_that_are_no_names(tmp_path: Path, base: Path, content: Any) -> None:
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": content}))
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    refused(DataFileError, tmp_path, tmp_path / "model", path, str(tmp_path / "model"))


def test_a_prefix_that_is_no_text(tmp_path: Path, base: Path) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    refused(InvalidOptionError, tmp_path, base, path, "prefix: ", "surrogate", prefix="\udcff")


def test_a_column_name_that_is_no_text(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a"], "wxyz": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"wxyz", b"\xff\xfe\xfd\xfc"))
    for keep in (None, ()):
        refused(DataFileError, tmp_path, base, path, str(path), keep=keep)


def test_an_output_that_cannot_be_listed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    iterdir = Path.iterdir

    def denied(folder: Path) -> Any:
        if folder == tmp_path / "out":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", denied)
    refused(DataFileError, tmp_path, base, path, "output: cannot read", "Permission denied")


def test_input_that_changes_under_the_job(tmp_path: Path, base: Path) -> None:
    settings = Settings(model=str(base))
    lines = encode.jsonl(tmp_path / "in.jsonl", GOOD)
    rows = encode.parquet(tmp_path / "in.parquet", {"text": ["a", "b"]})
    for path in (lines, rows):
        [shard], schema, _ = source.plan(source.find(str(path), tmp_path / "out"), settings)
        longer = dataclasses.replace(shard, rows=shard.rows + 1)
        with pytest.raises(DataFileError, match=f"{shard.rows + 1} rows were planned"):
            source.read(longer, schema, settings)
        files = source.find(str(path), tmp_path / "out")
        source.unchanged(files)
        os.utime(path, ns=(1, 1))
        with pytest.raises(DataFileError, match=f"{path} changed while"):
            source.unchanged(files)
        path.unlink()
        for look in (lambda: source.read(shard, schema, settings), lambda: source.unchanged(files)):  # noqa: B023
            with pytest.raises(DataFileError, match=str(path)):
                look()


def test_rows_without_tokens(tmp_path: Path, base: Path, write: Any) -> None:
    """A tokenizer that adds no special tokens has none for an empty text."""
    bare = shutil.copytree(base, tmp_path / "model")
    core = tokenizers.Tokenizer.from_file(str(bare / "tokenizer.json"))
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    core.save(str(bare / "tokenizer.json"))
    path = write("in.jsonl", [GOOD[2], *GOOD[:2], GOOD[2]])
    refused(DataFileError, tmp_path, bare, path, ":1: has no tokens")
    summary = encode.run(path, tmp_path / "out", bare, on_error="skip")
    assert summary.totals["rows"] == 2 and summary.totals["skipped"] == 2
    assert encode.read(tmp_path / "out").column("id").to_pylist() == [0, 1]
    expected = [states.mean(0).numpy() for states in encode.one_by_one(bare, "AutoModel", ["river stone", "lamp"])]
    np.testing.assert_allclose(encode.embeddings(tmp_path / "out"), expected, atol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_tokenizer_that_does_not_fit(tmp_path: Path, base: Path, write: Any, overlap: bool) -> None:
    small = stilts.checkpoint(tmp_path / "small", 20)
    path = write("in.jsonl", [GOOD[2], GOOD[0]])
    with pytest.raises(TokenIdError) as caught:
        encode.run(path, tmp_path / "out", small, Execution(overlap=overlap), tokenizer=str(base))
    assert f"{path}:2 has token" in str(caught.value) and "0 to 19" in str(caught.value)


def test_models_that_are_refused(tmp_path: Path, base: Path) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", GOOD)
    choice = encode.headed(base, tmp_path / "choice", "MultipleChoice")
    refused(UnsupportedModelError, tmp_path, choice, path, "XLMRobertaForMultipleChoice", "--content embeddings")
    several = encode.headed(
        base, tmp_path / "several", "SequenceClassification", problem_type="multi_label_classification"
    )
    refused(UnsupportedModelError, tmp_path, several, path, "several labels")
    refused(InvalidOptionError, tmp_path, base, path, "'predictions'", content="predictions")
    tagger = encode.headed(base, tmp_path / "tagger", "TokenClassification")
    refused(InvalidOptionError, tmp_path, tagger, path, "pair-column", pair_column="id")
    classes = encode.headed(base, tmp_path / "classes", "SequenceClassification", num_labels=3)
    refused(InvalidOptionError, tmp_path, classes, path, "normalize", normalize=True)
    refused(DataFileError, tmp_path, tmp_path / "nowhere", path, "nowhere")
    config = json.loads((base / "config.json").read_text())
    (classes / "config.json").write_text(json.dumps({**config, "architectures": ["XLMRobertaForTokenClassification"]}))
    refused(InvalidWeightsError, tmp_path, classes, path, "lacks")


def test_checkpoints_that_are_not_whole(tmp_path: Path, base: Path) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", GOOD)
    bare = stilts.checkpoint(tmp_path / "bare", 600)
    refused(DataFileError, tmp_path, bare, path, "tokenizer", str(bare))
    cut = shutil.copytree(base, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(DataFileError, tmp_path, cut, path, str(cut))
    config = transformers.DistilBertConfig(vocab_size=600, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "distil")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "distil")
    refused(UnsupportedModelError, tmp_path, tmp_path / "distil", path, "supported")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"dtype": "int8"}, "dtype"),
        ({"precision": "auto"}, "precision"),
        ({"content": "text"}, "content"),
        ({"on_error": "ignore"}, "on-error"),
        ({"device": "tpu"}, "device"),
        ({"shard_rows": 0}, "shard-rows"),
        ({"max_length": 0}, "max-length"),
        ({"max_length": 2}, "max-length: 2 is not accepted; accepted: 3 to 512"),
        ({"max_length": 513}, "max-length"),
        ({"layers": 3}, "layers"),
        ({"pair_column": "text"}, "pair-column"),
        ({"keep": ("id", "id")}, "keep"),
        ({"pooling": "none", "normalize": True}, "normalize"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, base: Path, options: dict[str, Any], part: str) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", GOOD)
    refused(InvalidOptionError, tmp_path, base, path, part, **options)


@pytest.mark.parametrize(
    "options", [{"engine": "spark"}, {"window": 0}, {"batch_tokens": 0}, {"workers": 2}, {"address": "auto"}]
)
def test_ways_to_run_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(options)).replace("_", "-")):
        Execution(**options)
