"""Checkpoints that cannot be read, as one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xfast.errors import DataFileError, XfastError


@contextmanager
def reading(model: str) -> Iterator[None]:
    """Inside the block whatever goes wrong is a DataFileError that names the checkpoint, but for xfast's own errors.

    transformers lets through what its readers raise: OSError, ValueError, and a type that safetensors has for itself.
    """
    try:
        yield
    except XfastError:
        raise
    except Exception as error:
        raise DataFileError(f"model: {model}: {type(error).__name__}: {error}") from error
