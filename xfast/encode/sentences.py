"""What the files of a sentence-transformers model say of it, and the files of a Hub id that say so."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from xfast import tokenizer_files
from xfast.encode.settings import is_unicode
from xfast.errors import DataFileError, UnsupportedModelError, XfastError
from xfast.tensor_files import reading

_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
_READ = ("max_seq_length", "do_lower_case", "unpad_inputs")  # the last saves time alone
_ARGUMENTS = re.compile(r"(model|tokenizer|processor|config)_(args|kwargs)")
_PLAIN = {  # what release 6 writes of every model, by setting
    "transformer_task": ("feature-extraction", "sequence-classification"),
    "module_output_name": ("token_embeddings", "scores"),
    "modality_config": tuple(
        {"method": "forward", "method_output_name": output} for output in ("last_hidden_state", "logits")
    ),
}
_ACCEPTED = {
    "vector": "Transformer '', Pooling, any number of Normalize",
    "tokens": "Transformer '', alone or with Pooling after it",
    **dict.fromkeys(("classes", "relevance"), "Transformer '' alone"),
}


@dataclass(frozen=True)
class Sentences:
    """How sentence-transformers runs a model; the defaults are any other model's.

    Attributes:
        pooling, normalize: of vectors.
        max_length, lower: of texts.
        prompt: put before every text.
        pools_prompt: whether its tokens are pooled, too.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lower: bool = False
    prompt: str = ""
    pools_prompt: bool = True


def sentences_of(name: str, revision: str | None, kind: str, *, assume: bool = False) -> Sentences:
    """What the files of a sentence-transformers model say.

    Args:
        name, revision: of the model.
        kind: of what is read from it, as :class:`xfast.encode.model.Head` has it.
        assume: where it cannot be told whether it is one, it is none; vectors need no module that pools.

    Raises:
        UnsupportedModelError: it has parts or settings that are not computed here.
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
        kinds = _order(name, modules, kind, assume)
        made = Sentences(normalize=kind == "vector" and "Normalize" in kinds, prompt=_prompt(name, revision, kind))
        made = replace(made, **_text(name, revision))
        return replace(made, **_pooled(name, revision, modules)) if kind == "vector" and "Pooling" in kinds else made
    except XfastError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataFileError(
            f"model: {name}: {tokenizer_files.MODULES} or a file that goes with it: {type(error).__name__}: {error}"
        ) from None


def _order(name: str, modules: Any, kind: str, assume: bool) -> list[str]:
    """The classes of the modules, which must be those that are computed here, in that order."""
    found = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    kinds = [one for one, _ in found]
    rest = kinds[1:]
    if kind == "vector":
        good = (rest[:1] == ["Pooling"] and set(rest[1:]) <= {"Normalize"}) or (assume and not rest)
    else:  # of tokens' states nothing is changed once they are pooled
        good = not rest or (kind == "tokens" and rest[0] == "Pooling")
    if found[:1] != [("Transformer", "")] or not good:
        raise UnsupportedModelError(
            f"model: {name} has the modules {', '.join(f'{one} {path!r}' for one, path in found) or 'of none'}; "
            f"accepted: {_ACCEPTED[kind]}"
        )
    return kinds


def _pooled(name: str, revision: str | None, modules: Any) -> dict[str, Any]:
    config = _read(name, revision, tokenizer_files.pooling_config(modules) or "")
    modes = {mode for mode in _MODES if config.get("pooling_mode") == mode or config.get(_MODES[mode]) is True}
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or set(others) - set(_MODES.values()):
        raise UnsupportedModelError(f"model: {name} pools by {config}; accepted: cls or mean alone")
    return {"pooling": modes.pop(), "pools_prompt": config.get("include_prompt") is not False}


def _text(name: str, revision: str | None) -> dict[str, Any]:
    """The longest input and lower case; any other setting must be one that changes nothing."""
    text = _read(name, revision, *tokenizer_files.LENGTHS) or {}
    if other := [key for key, value in text.items() if key not in _READ and not _changes_nothing(key, value)]:
        raise UnsupportedModelError(
            f"model: {name}: {tokenizer_files.LENGTHS[0]} sets {other[0]} to {text[other[0]]!r:.100}, which is not "
            "computed here; accepted: max_seq_length, do_lower_case, and what says nothing"
        )
    longest, lower = text.get("max_seq_length"), text.get("do_lower_case")
    if not (longest is None or (type(longest) is int and longest > 0)) or lower not in (None, False, True):
        raise DataFileError(
            f"model: {name}: max_seq_length {longest!r:.50}, do_lower_case {lower!r:.50}: expected a number above 0, "
            "true or false"
        )
    return {"max_length": longest, "lower": bool(lower)}


def _changes_nothing(key: str, value: Any) -> bool:
    if key in _PLAIN and value is not None:
        return (value.get("text") if isinstance(value, dict) else value) in _PLAIN[key]
    if _ARGUMENTS.fullmatch(key) and isinstance(value, dict):  # sentence-transformers takes no trust from a file
        value = {name: given for name, given in value.items() if name != "trust_remote_code"}
    return value is None or value is False or value in ("", [], {})


def _prompt(name: str, revision: str | None, kind: str) -> str:
    """The prompt that is put before every text where none is asked for."""
    config = _read(name, revision, tokenizer_files.PROMPTS) or {}
    if kind == "vector" and config.get("truncate_dim") is not None:
        raise UnsupportedModelError(
            f"model: {name}: {tokenizer_files.PROMPTS} sets truncate_dim to {config['truncate_dim']!r:.50}; vectors "
            "are not cut here"
        )
    chosen, prompts = config.get("default_prompt_name"), {"query": "", "document": "", **(config.get("prompts") or {})}
    if chosen is None:
        return ""
    prompt = prompts.get(chosen, 0)
    if not isinstance(prompt, str | None) or not is_unicode(prompt or ""):
        raise DataFileError(
            f"model: {name}: {tokenizer_files.PROMPTS}: default_prompt_name is {chosen!r:.100}; expected the name of "
            f"a text among its prompts: {', '.join(map(str, prompts))}"
        )
    return prompt or ""


class _OutOfReachError(DataFileError):
    """A file may be on the Hub, which cannot be asked."""


def _read(name: str, revision: str | None, *files: str) -> Any:
    """The content of the first of these files that a model has; None: it has none of them."""
    unknown = ""
    for file in files:
        path = hub_file(name, file, revision) if revision is not None else tokenizer_files.find(name, file)
        if path is not None:
            with reading(path):
                content = path.read_bytes()
            return json.loads(content)
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
