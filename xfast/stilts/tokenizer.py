"""The tokenizer in a folder or on the Hub, also where a SentencePiece model lies alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xfast.errors import BackendUnavailableError, DataFileError


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder or the Hub; a folder with nothing but a SentencePiece model is XLM-R's.

    Raises:
        DataFileError: there is none.
        BackendUnavailableError: a library that reads it is not installed.
    """
    from transformers import AutoTokenizer, XLMRobertaTokenizer  # slow to import: not before --help

    folder = Path(name)
    # A bare SentencePiece model has no configuration that would say which class reads it.
    described = any((folder / file).is_file() for file in ("tokenizer_config.json", "config.json"))
    bare = folder.is_dir() and not described
    try:
        tokenizer: Any = (XLMRobertaTokenizer if bare else AutoTokenizer).from_pretrained(name)
    except Exception as error:  # readers of bad files raise whatever they like
        if isinstance(error, ImportError) or (bare and isinstance(error, ValueError)):
            # without these, transformers asks for tiktoken, which does not help
            hint = "cannot read it (pip install sentencepiece protobuf?)"
            raise BackendUnavailableError(f"tokenizer: {name}: {hint}: {error}") from None
        raise DataFileError(f"tokenizer: {name}: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes one up where the files are missing
        raise DataFileError(f"tokenizer: {name}: no tokenizer files there; name the folder that has them")
    return tokenizer
