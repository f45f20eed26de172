"""Strange arguments for the native boundary: what replaces valid ones, and how an answer or a refusal is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

REFUSED = (ValueError, TypeError, RuntimeError)
FUZZ = settings(deadline=None, max_examples=200, derandomize=True)

# No dtype strings with letters beyond ASCII and no st.text(): hypothesis would write a table of Unicode to disk.
DTYPES = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "?", "S3", "O", "M8[s]", "i4,f4"]
DTYPES += [">f4", ">f2", ">u2", ">i4", ">i8"]
# Sizes that are valid but large would only test the machine's memory; those between are in test_extreme_sizes.
INTEGERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**40, 2**62, 2**64, -(2**70)]
NAMES = ["", "auto", "int8", "fp32", "bf16", "bias", "gelu", "qkv", "ffn_in", "ffn_norm", "embedding_norm", "portable"]
LAYOUTS = ["plain"] * 4 + ["fortran", "strided", "reversed", "broadcast", "read-only", "unaligned"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any shape, dtype, values, memory layout and flags."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8]), max_size=4)))
    array = np.zeros(shape, draw(st.sampled_from(DTYPES)))
    if array.dtype.kind in "iuf":
        limits = np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
        values = [0, 1, 2, 3, limits.min, limits.max]
        values += [np.nan, np.inf, -np.inf] if array.dtype.kind == "f" else []
        array[...] = draw(st.sampled_from(values))
        if array.size:
            array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(values))
    return rearrange(array, draw(st.sampled_from(LAYOUTS)))


def rearrange(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another memory layout."""
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "strided" and array.ndim:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "reversed" and array.ndim:
        return array[::-1]
    if layout == "broadcast" and array.ndim:
        return np.broadcast_to(array[:1], array.shape) if array.shape[0] else array
    if layout == "unaligned" and array.dtype.kind in "iuf":
        raw = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        raw[...] = array
        return raw
    if layout == "read-only":
        array.flags.writeable = False
    return array


STRANGE = st.one_of(
    arrays(),
    arrays(),
    st.none(),
    st.sampled_from(INTEGERS),
    st.sampled_from([float("nan"), 1.5, True, b"x", (), [[1.0, 2.0]], {"a": 1}, object()]),
    st.sampled_from(NAMES),
)


@st.composite
def disturbed(draw: st.DrawFn, arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with up to two of them replaced."""
    names = draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True))
    return {**arguments, **{name: draw(STRANGE) for name in names}}


def threads_of(value: Any) -> Any:
    # Starting hundreds of threads is allowed and works, but slows down every later test of this process.
    return 3 if isinstance(value, int) and value > 8 else value


def attempt(call: Any, *args: Any) -> Any:
    """The call's answer, or None when it refused; any other exception fails the test."""
    try:
        return call(*args)
    except REFUSED:
        return None
