"""Checkpoints, input and a plain transformers loop for the tests of ``xfast encode``; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stilts
import torch
import transformers

from xfast.encode import job
from xfast.encode.settings import Execution, Settings

LABELS = ("sad", "so-so", "glad")


class Quiet:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.total = self.done = 0

    def begin(self, rows: int, done: int) -> None:
        self.total, self.done = rows, done

    def advance(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens


def run(source: Any, output: Path, model: Any, execution: Execution | None = None, **settings: Any) -> job.Summary:
    """One job on small batches and windows, so that a few rows make many of them."""
    execution = execution or Execution(batch_tokens=50, window=7)
    return job.encode(str(source), output, Settings(model=str(model), **settings), execution, Quiet())


def headed(base: Path, folder: Path, ending: str, **changes: Any) -> Path:
    """A checkpoint with a head (``SequenceClassification``, ...) beside the base's tokenizer."""
    config = transformers.AutoConfig.from_pretrained(base)
    config.update(changes)
    torch.manual_seed(1)
    getattr(transformers, f"XLMRobertaFor{ending}")(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def texts(rng: Any, count: int, longest: int = 30) -> list[str]:
    """Sentences of 0 to ``longest`` words."""
    return [" ".join(rng.choice(stilts.WORDS, int(rng.integers(0, longest + 1)))) for _ in range(count)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return stilts.write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def parquet(path: Path, columns: dict[str, Any], row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def read(output: Path) -> pa.Table:
    """All shards in order; readers pass over the manifest."""
    return pq.read_table(output)


def embeddings(output: Path) -> np.ndarray:
    """[rows, hidden]."""
    column = read(output).column("embedding").combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "_manifest.json").read_text(encoding="utf-8"))


def one_by_one(model: Path, cls: str, inputs: Sequence[Any], **tokenize: Any) -> list[Any]:
    """The stock model's outputs, a row at a time; hidden states [L, hidden] or logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    stock = getattr(transformers, cls).from_pretrained(model).eval()
    found = []
    for given in inputs:
        pair = given if isinstance(given, tuple) else (given,)
        with torch.inference_mode():
            output = stock(**tokenizer(*pair, return_tensors="pt", **tokenize))
        found.append((output.logits if "logits" in output else output.last_hidden_state)[0])
    return found


def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For ``pytest.fixture(hub)``: an empty cache of the Hub, which is out of reach."""
    cache = tmp_path / "hub"
    for module in (transformers.utils.hub, __import__("huggingface_hub").constants):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"):
            monkeypatch.setattr(module, name, str(cache), raising=False)
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True, raising=False)
    return cache


def publish(folder: Path, cache: Path, name: str, revision: str, *, absent: Sequence[str] = ("modules.json",)) -> Path:
    """As huggingface_hub keeps a repository whose main is this revision; ``absent``: what the Hub said it has not."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    for path in (root / "blobs", root / "refs", snapshot, root / ".no_exist" / revision):
        path.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob("*"):
        if file.is_file():
            blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.relative_to(folder)).parent.mkdir(exist_ok=True)
            (snapshot / file.relative_to(folder)).symlink_to(blob)
    for missing in absent:
        (root / ".no_exist" / revision / missing).touch()
    (root / "refs" / "main").write_text(revision)
    return snapshot
