"""The manifest of ``xfast encode`` names the model that made the rows, even where the files change under the job."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import encode
import numpy as np
import pytest
import stilts
from safetensors.torch import load_file, save_file

import xfast.encode.worker
from xfast.encode import source
from xfast.encode.model import head_of
from xfast.encode.ray_engine import ShardActor
from xfast.encode.rows import Shard
from xfast.encode.settings import Execution, Settings
from xfast.encode.worker import Task, Worker
from xfast.errors import DataFileError

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in ("river", "stone", "lamp")])


def replace_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "new", {"format": "pt"})
    (model / "new").replace(model / "model.safetensors")


def change(model: Path, what: str) -> None:
    if what == "weights":
        replace_weights(model)
    elif what == "tokenizer":
        (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    else:
        (model / "modules.json").write_text("[]")


@pytest.mark.parametrize("what", ["weights", "tokenizer", "a new file"])
def test_a_model_that_is_replaced_before_it_is_loaded(
    model: Path, given: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = xfast.encode.worker.Encoder

    def replaced(*arguments: Any) -> Any:
        change(model, what)
        return load(*arguments)

    monkeypatch.setattr(xfast.encode.worker, "Encoder", replaced)
    with pytest.raises(DataFileError, match=f"model: {model}/.* changed while the job ran"):
        encode.run(given, tmp_path / "out", model)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_model_that_is_replaced_while_it_encodes(
    model: Path, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Worker.run
    monkeypatch.setattr(Worker, "run", lambda *arguments: (run(*arguments), replace_weights(model)))
    with pytest.raises(DataFileError, match="changed while the job ran"):
        encode.run(given, tmp_path / "out", model)
    assert not encode.manifest(tmp_path / "out")["complete"]


def test_a_worker_of_a_cluster_has_the_jobs_model(model: Path, given: Path, tmp_path: Path) -> None:
    settings, execution = Settings(model=str(model)), Execution(threads=1)
    shards, schema, _ = source.plan(source.find(str(given), tmp_path / "out"), settings)
    (tmp_path / "out").mkdir()
    task = Task(settings, execution, head_of(settings)[0], str(tmp_path / "out"), "abc", schema)

    def answer(shard: Shard) -> dict[str, Any]:
        return ShardActor(task)({"shard": np.array([json.dumps(asdict(shard))])})

    assert answer(shards[0])["error"] == [""]
    (tmp_path / "out" / "shard-000000.parquet").unlink()
    replace_weights(model)
    refused = answer(shards[0])
    assert refused["error"] == ["DataFileError"] and "not those that the job began with" in refused["message"][0]
    assert not list((tmp_path / "out").glob("*.parquet"))
