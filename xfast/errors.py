"""Every error xfast raises on purpose. Each names the argument, what was given and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import TypeGuard


class XfastError(Exception):
    """Base class: ``except xfast.XfastError`` catches everything xfast raises on purpose."""


class InvalidOptionError(XfastError, ValueError):
    """An option (precision, backend, instruction set, threads, ...) has a value that is not accepted."""


class InvalidInputError(XfastError, ValueError):
    """A tensor or file has the wrong shape, dtype or values."""


class DataFileError(InvalidInputError):
    """A data file is missing, truncated or not in the expected format; names the file and, where it can, the line."""


class ArtifactError(DataFileError):
    """A folder is no packed artifact, or not one that this version reads, or it is damaged."""


class ArtifactWriteError(XfastError, OSError):
    """A packed artifact cannot be written: disk full, read-only folder, a folder that holds something else."""


class TokenIdError(InvalidInputError, IndexError):
    """A token or token-type id lies outside its embedding table."""


class UnsupportedModelError(XfastError, TypeError):
    """The object holds no encoder that xfast can accelerate, or one that differs from its family."""


class InvalidWeightsError(XfastError, ValueError):
    """A weight holds NaN or infinity, or has no data (``meta`` device)."""


class WeightsFreedError(XfastError, RuntimeError):
    """The original weights were given up with ``keep_weights=False`` and are needed now."""


class ModelFreedError(XfastError, RuntimeError):
    """An accelerated ``forward`` outlived the model it belongs to."""


class BackendUnavailableError(XfastError, RuntimeError):
    """What was asked for cannot run here: a backend, a precision, a tolerance, a package; the message says why."""


def in_short(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters: drivers and libraries write pages."""
    return " ".join(str(error).split())[:200]


def is_number(value: object) -> TypeGuard[float]:
    """Whether an option is a finite number; NumPy's are, too."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf  # type: ignore[operator]


def require_one_of(name: str, value: object, accepted: Collection[str]) -> None:
    """Raises InvalidOptionError where an option is none of the values that are accepted."""
    if not isinstance(value, str) or value not in accepted:
        raise InvalidOptionError(f"{name}: {value!r} is not accepted; accepted: {', '.join(accepted)}")
