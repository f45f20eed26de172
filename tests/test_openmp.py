"""Torch's OpenMP threads, borrowed while they are awake: results are the same bits, and nothing depends on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build, ragged
from reference import assert_same_bits
from test_thread_pool import at_once, in_child

import xfast
from xfast import _C

THREADS = 2
PATIENCE = 30.0
"""Seconds within which torch's threads are awake at the right moment at least once, however busy the machine is."""

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < THREADS, reason="OpenMP's threads spin where each has a core")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    xfast.set_num_threads(THREADS)
    with torch.inference_mode():
        yield
    xfast.set_num_threads(None)
    torch.set_num_threads(before)


def wide(precision: str = "int8") -> Any:
    """A model whose forward takes a millisecond."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 2}
    model = build(**sizes)
    model.pooler = None  # in a forked child torch's own operations on several threads hang
    return xfast.accelerate(model, precision=precision)


def head(states: torch.Tensor) -> torch.Tensor:
    """What heads do: an operation that torch runs on all its threads, which spin afterwards."""
    return (torch.ones(1 << 18) * states.sum()).sum()


def borrow(model: Any, batch: dict[str, torch.Tensor], want: np.ndarray) -> bool:
    """Calls model and head in turn until a call has run on torch's threads; every result must be the same bits."""
    before, end = _C.borrowed_regions(), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        states = model(**batch).last_hidden_state
        assert_same_bits(states.numpy(), want)
        if _C.borrowed_regions() > before:
            return True
        head(states)
    return False


def alone(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The result on one thread."""
    xfast.set_num_threads(1)
    states = model(**batch).last_hidden_state.numpy()
    xfast.set_num_threads(THREADS)
    return states


@pytest.fixture
def always() -> Iterator[None]:
    """Calls run on torch's threads, awake or not."""
    _C.borrow_threads("always")
    yield
    _C.borrow_threads("auto")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_results_on_torchs_threads_are_the_same_bits(precision: str, always: None) -> None:
    model = wide(precision)
    for batch in (ragged(), ragged(lengths=[38, 36, 17, 38, 30])):  # columns are split, rows are split
        want = alone(model, batch)
        for _ in range(5):
            before = _C.borrowed_regions()
            assert_same_bits(model(**batch).last_hidden_state.numpy(), want)
            assert _C.borrowed_regions() > before


def test_calls_between_torchs_operations_run_on_its_threads() -> None:
    model, batch = wide(), ragged()
    assert borrow(model, batch, alone(model, batch)), "torch's threads were never awake"


def test_the_float_mode_of_caller_and_borrowed_threads(always: None) -> None:
    """Denormal numbers count in the encoder whatever the caller's mode is, and torch's threads keep theirs."""
    model, batch = wide("fp32"), ragged()
    tiny = torch.full((1 << 18,), 1e-40)
    want, halves = model(**batch).last_hidden_state.numpy(), tiny * 0.5
    assert halves.min() > 0
    torch.set_flush_denormal(True)
    try:
        assert_same_bits(model(**batch).last_hidden_state.numpy(), want)
        assert float(torch.tensor(1e-40) * 0.5) == 0
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(tiny * 0.5, halves)


def test_policies_have_names() -> None:
    with pytest.raises(ValueError, match="accepted: auto, always, never"):
        _C.borrow_threads("sometimes")
    _C.borrow_threads("never")
    try:
        model, batch = wide(), ragged()
        before, want = _C.borrowed_regions(), alone(model, batch)
        for _ in range(30):
            states = model(**batch).last_hidden_state
            assert_same_bits(states.numpy(), want)
            head(states)
        assert _C.borrowed_regions() == before
    finally:
        _C.borrow_threads("auto")


def test_a_process_without_torchs_operations_leaves_its_threads_alone() -> None:
    """Unless calls are pushed off their cores by other threads of the process, which two calls cannot show."""
    code = """
import os, torch
torch.set_num_threads(1)
import xfast, test_openmp as t
model = t.wide()
torch.set_num_threads(2)
with torch.inference_mode():
    before = len(os.listdir("/proc/self/task"))
    for _ in range(2):
        model(**t.ragged())
    assert len(os.listdir("/proc/self/task")) == before + 1, "more than xfast's own thread was started"
assert xfast._C.borrowed_regions() == 0
"""
    done = python(code, {})
    assert done.returncode == 0, done.stderr[-2000:]


def python(code: str, setting: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs code beside these tests, where ``xfast`` is the installed one."""
    here = Path(__file__).parent
    environment = {**os.environ, **setting, "PYTHONPATH": str(here)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=False)


def test_another_number_of_threads_than_torchs_is_xfasts_own() -> None:
    model, batch = wide(), ragged()
    want = alone(model, batch)
    assert borrow(model, batch, want)
    for own, torchs in ((3, THREADS), (THREADS, 1), (THREADS, 3)):
        xfast.set_num_threads(own)
        torch.set_num_threads(torchs)
        before = _C.borrowed_regions()
        for _ in range(30):
            head(torch.from_numpy(want))
            assert_same_bits(model(**batch).last_hidden_state.numpy(), want)
        assert _C.borrowed_regions() == before, f"{own} threads, torch {torchs}"
    xfast.set_num_threads(THREADS)  # the thread that was known has ended with a team of one, or not: both are right
    torch.set_num_threads(THREADS)
    assert borrow(model, batch, want)


def test_a_forked_child_has_its_own_threads(always: None) -> None:
    model, batch = wide(), ragged()
    want = alone(model, batch)
    assert_same_bits(model(**batch).last_hidden_state.numpy(), want)
    before = _C.borrowed_regions()
    assert before > 0

    def child() -> bool:
        same = all(np.array_equal(model(**batch).last_hidden_state.numpy(), want) for _ in range(20))
        return same and _C.borrowed_regions() == before

    in_child(child)


def test_a_process_that_was_forked_before_the_import_leaves_torchs_threads_alone() -> None:
    """Torch's threads may be those of its parent."""
    code = """
import os, torch
torch.set_num_threads(2)
torch.ones(1 << 20).mul(2)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own operations hang otherwise
    import xfast, test_openmp as t
    xfast._C.borrow_threads("always")
    model, batch = t.wide(), t.ragged()
    torch.set_num_threads(2)
    xfast.set_num_threads(2)
    with torch.inference_mode():
        for _ in range(5):
            model(**batch)
    os._exit(0 if xfast._C.borrowed_regions() == 0 else 7)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python(code, {})
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_threads_of_several_callers() -> None:
    """Each Python thread has OpenMP threads of its own, and the pool goes to one caller at a time."""
    model, batch = wide(), ragged(lengths=[38, 36, 17, 38, 30])
    want = alone(model, batch)

    def work(_: int) -> None:
        for _ in range(40):
            states = model(**batch).last_hidden_state
            assert_same_bits(states.numpy(), want)
            head(states)

    at_once(work, 3, timeout=120)


@pytest.mark.parametrize(
    ("setting", "borrows"),
    [({"OMP_THREAD_LIMIT": "1"}, False), ({"OMP_WAIT_POLICY": "passive"}, True), ({"OMP_PROC_BIND": "true"}, True)],
)
def test_where_openmp_gives_fewer_threads_or_sleeping_ones(setting: dict[str, str], borrows: bool) -> None:
    code = """
import numpy as np, torch, xfast
import test_openmp as t
torch.set_num_threads(2)
xfast._C.borrow_threads("always")
with torch.inference_mode():
    model = t.wide()
    for batch in (t.ragged(), t.ragged(lengths=[38, 36, 17, 38, 30])):
        want = t.alone(model, batch)
        for _ in range(50):
            states = model(**batch).last_hidden_state
            assert np.array_equal(states.numpy(), want)
            t.head(states)
print(xfast._C.borrowed_regions())
"""
    done = python(code, setting)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (int(done.stdout) > 0) == borrows
