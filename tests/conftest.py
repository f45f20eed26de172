"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from interpreter_speed import speed_up

from xfast import _C

REPOSITORY = Path(__file__).resolve().parents[1]

if os.environ.get("TRITON_INTERPRET") == "1":
    speed_up()


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist would begin with the files that have most tests; the long ones have few, and would end alone."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suite runs in several processes, which must find the same tests."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: its id holds an address, which differs between processes; set ids="
            )


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """A kernel that reads where it must not ruins its process's GPU context: every test that came next would fail too.

    The process of pytest-xdist ends instead, and another one takes its place.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the GPU context is lost after {nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(3)


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction-set target that this CPU can run, one after another."""
    return str(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data (xtreme/, tokenizer/, ...)."""
    folder = Path(os.environ.get("XFAST_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "xtreme").is_dir():
        pytest.skip("no real data: set XFAST_TEST_DATA to a folder that holds xtreme/ and tokenizer/")
    return folder


def _seed_of(request: pytest.FixtureRequest) -> int:
    # By name, so that a test sees the same numbers whichever tests run before it; the same on every ISA.
    name = request.node.originalname or request.node.name
    return zlib.crc32(name.encode())


@pytest.fixture(autouse=True)
def _seed_torch(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(_seed_of(request))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """NumPy's generator, seeded by the test's name."""
    return np.random.default_rng(_seed_of(request))
