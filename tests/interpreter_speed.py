"""Triton's interpreter without work that it does over and over; a third of the time of the tests that use it.

Both replacements give what the originals give, and are left out where a later Triton no longer has the originals.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np


def speed_up() -> None:
    """Replaces two functions of Triton's interpreter, if it is installed; for the rest of the process."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "_get_np_dtype")):
        _patch_once_a_launch(interpreter, tl)
        _remember_dtypes(interpreter, tl)


def _patch_once_a_launch(interpreter: Any, tl: Any) -> None:
    """The interpreter replaces the language's functions at each launch, and again at each call of a jitted function."""
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope
    restore = scope.restore
    patched: set[Any] = set()

    def once(function: Any) -> Any:
        languages = {value for value in function.__globals__.values() if inspect.ismodule(value)} & {tl, tl.core}
        if languages and languages <= patched:
            return scope()
        found = patch(function)
        patched.update(languages)
        return found

    def restored(self: Any) -> None:  # what a launch ends with; scopes of calls inside of it are never restored
        patched.clear()
        restore(self)

    interpreter._patch_lang, scope.restore = once, restored


def _remember_dtypes(interpreter: Any, tl: Any) -> None:
    """The interpreter builds its table of all dtypes anew for each value."""
    original = interpreter._get_np_dtype
    known: dict[str, np.dtype[Any]] = {}

    def np_dtype(dtype: Any) -> np.dtype[Any]:
        name = dtype.scalar.name
        if name not in known:
            known[name] = original(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = np_dtype
