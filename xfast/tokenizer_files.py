"""The tokenizer's files of a checkpoint, and those of sentence-transformers, copied into an artifact unread."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from xfast.artifact import MANIFEST, Staging
from xfast.errors import DataFileError
from xfast.tensor_files import is_file, is_folder, reading

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


MODULES = "modules.json"
LENGTHS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where sentence-transformers keeps lengths and letter case, in the order in which it looks."""

PROMPTS = "config_sentence_transformers.json"
"""Where it keeps prompts."""

_POOLING = "1_Pooling/config.json"


def pooling_config(modules: Any) -> str | None:
    """The file of the pooling that a modules.json names; None: it has no pooling. Raises KeyError, TypeError, ..."""
    paths = [module["path"] for module in modules if module["type"].rpartition(".")[2] == "Pooling"]
    if paths and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", paths[0]) is None:
        raise ValueError(f"path: {paths[0]!r:.100}: expected a folder inside the model's")
    return f"{paths[0]}/config.json" if paths else None


def flat(name: str) -> str:
    """The name of such a file in an artifact, which has no folders."""
    return name.replace("/", "_")


def find(source: str, name: str) -> Path | None:
    """A file of a checkpoint that is a folder, or a Hub id whose files are in the cache; None when it is not there."""
    if not source:
        return None
    if is_folder(Path(source)):
        return _in_folder(Path(source), name)
    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(cached) if isinstance(cached, str) else None


def _in_folder(folder: Path, name: str) -> Path | None:
    """Of a checkpoint, or flat, of an artifact."""
    return next((path for path in (folder / name, folder / flat(name)) if is_file(path)), None)


def known_absent(snapshot: Path, name: str) -> bool:
    """Whether the Hub is known to have no such file in this revision: it said so once, or listed what there is.

    Else a file that is not in the cache may be one that nobody has asked for.
    """
    repository, commit = snapshot.parent.parent, snapshot.name
    if (repository / ".no_exist" / commit / name).is_file():
        return True
    try:  # written when a whole repository is downloaded
        listing = json.loads((repository / "trees" / f"{commit}.json").read_bytes())
        return listing["format_version"] == 1 and name not in listing["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def snapshots(source: str, revision: str | None) -> list[Path]:
    """The folders in the Hub's cache that may be this model: of one commit, or without one all that are there."""
    if not source:
        return []
    folder = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots"
    if revision is not None:
        return [folder / revision]
    return sorted(path for path in folder.iterdir() if path.is_dir()) if is_folder(folder) else []


def write(
    staging: Staging, source: str, tokenizer: Any = None, *, revision: str | None = None, embeds: bool = False
) -> None:
    """Puts a tokenizer's files, or copies of those in ``source``, into an artifact; and sentence-transformers' own.

    Args:
        staging: the artifact.
        source: folder or Hub id that the model came from; "": unknown.
        tokenizer: saved instead of copied.
        revision: commit of the Hub id, None: unknown.
        embeds: whether the model is one that sentence-transformers may pool.

    Raises:
        DataFileError: a file differs between the revisions that the model may be.
    """
    folders = [Path(source)] if _is_source(source, staging.folder) else snapshots(source, revision)
    modules = _the_one(folders, MODULES, source)
    if embeds and modules is None:
        _warn_unknown(folders, source)
    for name in (MODULES, PROMPTS, *LENGTHS, _named(modules)):
        if (content := _the_one(folders, name, source)) is not None:
            staging.content(flat(name), content)
    if tokenizer is None:
        for name in NAMES:
            if (content := _the_one(folders, name, source, "; or give tokenizer=")) is not None:
                staging.content(name, content)
        return
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        for path in sorted(path for path in Path(made).iterdir() if path.name in NAMES):
            staging.content(path.name, path.read_bytes())


def _is_source(source: str, made: Path) -> bool:
    """Whether a folder is what the model came from: not the artifact's own, of the name of a Hub id, made just now."""
    folder = Path(source)
    if not source or not is_folder(folder):
        return False
    return is_file(folder / MANIFEST) or folder.resolve() != made.resolve()


def _named(modules: bytes | None) -> str:
    """The pooling's file, by modules.json where that can be read; it is copied as it is."""
    try:
        return (pooling_config(json.loads(modules)) if modules is not None else None) or _POOLING
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return _POOLING


def _the_one(folders: list[Path], name: str, source: str, instead: str = "") -> bytes | None:
    """The file's bytes, which are the same in all folders that may have it; None: none has."""
    found: set[bytes | None] = set()
    for folder in folders:
        with reading(folder / name):
            if (path := _in_folder(folder, name)) is not None:
                found.add(path.read_bytes())
            elif len(folders) > 1 and known_absent(folder, name):  # else it may only not have been fetched
                found.add(None)
    if len(found) > 1:
        raise DataFileError(
            f"model: {source}: {name} differs between the {len(folders)} revisions in the Hub's cache, and the model "
            f"does not say which it is; load the model from the folder of one ({folders[0].parent}/...){instead}"
        )
    return found.pop() if found else None


def _warn_unknown(folders: list[Path], source: str) -> None:
    """Only of the Hub's cache: a folder of one's own is whole."""
    cached = [folder for folder in folders if folder.parent.name == "snapshots"]
    if not all(known_absent(folder, MODULES) for folder in cached):
        warnings.warn(
            f"xfast: {source}: {MODULES} is not in the Hub's cache; if this is a sentence-transformers model, the "
            "artifact does not have its pooling: fetch it all with hf download, then make the artifact again",
            stacklevel=5,
        )
