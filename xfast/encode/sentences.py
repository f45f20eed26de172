"""What the files of a sentence-transformers model say of it, and the files of a Hub id that say so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from xfast import tokenizer_files
from xfast.errors import DataFileError, UnsupportedModelError, XfastError

_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}


@dataclass(frozen=True)
class Sentences:
    """How a sentence-transformers model makes vectors; the defaults are any other model's."""

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lower: bool = False


def sentences_of(name: str, revision: str | None, *, assume: bool = False) -> Sentences:
    """What the files of a sentence-transformers model say.

    Args:
        name, revision: of the model.
        assume: where it cannot be told whether it is one, it is none.

    Raises:
        UnsupportedModelError: it has parts that are not computed here.
        DataFileError: its files are not what sentence-transformers writes, or are neither in the cache nor in reach.
    """
    try:
        try:
            modules = _read(name, revision, tokenizer_files.MODULES)
        except _OutOfReachError as error:
            if not assume:
                raise _OutOfReachError(f"{error}, or pass --pooling") from None
            return Sentences()
        if modules is None:
            return Sentences()
        kinds = {module["type"].rpartition(".")[2] for module in modules}
        pooling = tokenizer_files.pooling_config(modules)
        config = {"pooling_mode": "mean"} if pooling is None else _read(name, revision, pooling)
        text = _read(name, revision, *tokenizer_files.LENGTHS) or {}
        longest, lower = text.get("max_seq_length"), text.get("do_lower_case") is True
        modes = {mode for mode in _MODES if config.get("pooling_mode") == mode or config.get(_MODES[mode]) is True}
        others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    except XfastError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataFileError(f"model: {name}: modules.json or its pooling: {type(error).__name__}: {error}") from None
    if other := ", ".join(sorted(kinds - {"Transformer", "Pooling", "Normalize"})):
        raise UnsupportedModelError(f"model: {name} has a module {other}; accepted: Transformer, Pooling, Normalize")
    if len(modes) != 1 or set(others) - set(_MODES.values()):
        raise UnsupportedModelError(f"model: {name} pools by {config}; accepted: cls or mean alone")
    return Sentences(modes.pop(), "Normalize" in kinds, longest if isinstance(longest, int) else None, lower)


class _OutOfReachError(DataFileError):
    """A file may be on the Hub, which cannot be asked."""


def _read(name: str, revision: str | None, *files: str) -> Any:
    """The content of the first of these files that a model has; None: it has none of them."""
    unknown = ""
    for file in files:
        path = hub_file(name, file, revision) if revision is not None else tokenizer_files.find(name, file)
        if path is not None:
            return json.loads(path.read_bytes())
        if revision is not None and not unknown and not _absent(name, file, revision):
            unknown = file
    if unknown:
        raise _OutOfReachError(
            f"model: {name}: {unknown} is not in the Hub's cache, and the Hub cannot be asked whether there is one; "
            f"connect once (hf download {name})"
        )
    return None


def _absent(name: str, file: str, revision: str) -> bool:
    """Whether the Hub says, or said once, that there is no such file."""
    if any(tokenizer_files.known_absent(folder, file) for folder in tokenizer_files.snapshots(name, revision)):
        return True
    try:
        hf_hub_download(name, file, revision=revision)
    except LocalEntryNotFoundError:
        return False
    except EntryNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a Hub id, fetched where it can be; None: the model has no such file."""
    found = transformers.utils.cached_file(name, file, **pinned(revision), _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def pinned(revision: str | None) -> dict[str, str]:
    """As transformers takes a revision."""
    return {} if revision is None else {"revision": revision}
