"""The tokenizer's files of a checkpoint, and those of sentence-transformers, copied into an artifact unread."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from xfast.artifact import Staging
from xfast.tensor_files import reading

NAMES = (
    "added_tokens.json",
    "bpe.codes",
    "chat_template.jinja",
    "dict.txt",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


SENTENCES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
"""What sentence-transformers says of pooling and lengths."""


def flat(name: str) -> str:
    """The name of such a file in an artifact, which has no folders."""
    return name.replace("/", "_")


def find(source: str, name: str) -> Path | None:
    """A file of a checkpoint that is a folder, or a Hub id whose files are in the cache; None when it is not there."""
    if not source:
        return None
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(cached) if isinstance(cached, str) else None


def write(staging: Staging, source: str, tokenizer: Any = None) -> None:
    """Puts a tokenizer's files, or copies of those found in ``source``, into an artifact; and ``SENTENCES``."""
    for name in SENTENCES:
        if (path := find(source, name)) is not None:
            _copy(staging, [path], flat(name))
    if tokenizer is None:
        found = [path for name in NAMES if (path := find(source, name)) is not None]
        _copy(staging, found)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _copy(staging, sorted(path for path in Path(folder).iterdir() if path.name in NAMES))


def _copy(staging: Staging, paths: list[Path], name: str | None = None) -> None:
    for path in paths:
        with reading(path):
            content = path.read_bytes()
        staging.content(name or path.name, content)
