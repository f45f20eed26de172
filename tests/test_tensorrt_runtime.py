"""Which TensorRT is found, what it can build for, and where its messages go."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xfast.backends import tensorrt_runtime as runtimes
from xfast.backends.tensorrt_runtime import Log, Runtime, find
from xfast.errors import BackendUnavailableError, InvalidOptionError


@pytest.fixture(scope="module")
def rtx() -> Runtime:
    pytest.importorskip("tensorrt_rtx", reason="builds engines with TensorRT for RTX: pip install tensorrt-rtx-cu13")
    return find("tensorrt_rtx")


def _module(name: str, version: str | None, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that these modules are all there is: an exception is raised by the import."""
    monkeypatch.delenv(runtimes.VARIABLE, raising=False)

    def pretend(**modules: Any) -> None:
        def load(name: str) -> Any:
            found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(runtimes.importlib, "import_module", load)

    return pretend


DATA_CENTRE, RTX = _module("tensorrt", "10.9.0.34", Builder=1), _module("tensorrt_rtx", "1.7.1.116", Builder=1)


def test_the_data_centre_runtime_is_preferred(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tensorrt=DATA_CENTRE, tensorrt_rtx=RTX)
    found = find()
    assert (found.name, found.version, found.version_text) == ("tensorrt", (10, 9, 0, 34), "10.9.0.34")
    assert found.needs_gpu_to_build and found.targets() == () and found.module is DATA_CENTRE
    assert find("tensorrt_rtx").name == "tensorrt_rtx" and not find("tensorrt_rtx").needs_gpu_to_build
    monkeypatch.setenv("XFAST_TENSORRT", "tensorrt_rtx")
    assert find().name == "tensorrt_rtx" and find("tensorrt").name == "tensorrt"
    monkeypatch.setenv("XFAST_TENSORRT", "")
    assert find().name == "tensorrt"
    installed(tensorrt_rtx=RTX)
    assert find().name == "tensorrt_rtx"


def test_unknown_names(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tensorrt=DATA_CENTRE)
    with pytest.raises(InvalidOptionError, match=r"runtime: 'trt' is not accepted; accepted: tensorrt, tensorrt_rtx"):
        find("trt")
    monkeypatch.setenv("XFAST_TENSORRT", "os")
    with pytest.raises(InvalidOptionError, match="XFAST_TENSORRT: 'os' is not accepted"):
        find()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, r"tensorrt: not installed: pip install tensorrt"),
        (ImportError("libnvinfer.so.10: cannot open shared object file"), r"cannot be imported: .*libnvinfer.so.10"),
        (ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"), "cannot be imported: .*_libs"),
        (OSError("libcudart"), r"cannot be imported: OSError: libcudart; install it again"),
        (AttributeError("x"), "cannot be imported: AttributeError"),
        (_module("tensorrt", "8.6.1", Builder=1), r"version 8\.6\.1 is not accepted; accepted: 10\.0 or later"),
        (_module("tensorrt", "", Builder=1), "is not accepted"),
        (_module("tensorrt", None), "is no TensorRT"),
        (_module("tensorrt", "10.9"), "is no TensorRT"),
    ],
)
def test_broken_installations_are_reasons(installed: Any, module: Any, reason: str) -> None:
    installed(**({} if module is None else {"tensorrt": module}))
    with pytest.raises(BackendUnavailableError, match=reason):
        find("tensorrt")
    with pytest.raises(BackendUnavailableError, match=reason + r".*; tensorrt_rtx: not installed"):
        find()


def test_old_rtx(installed: Any) -> None:
    installed(tensorrt_rtx=_module("tensorrt_rtx", "1.6.9", Builder=1))
    with pytest.raises(BackendUnavailableError, match=r"1\.6\.9 is not accepted; accepted: 1\.7 or later \(pip"):
        find("tensorrt_rtx")


def test_versions_with_an_end() -> None:
    kind = dataclasses.replace(runtimes.KINDS[0], accepted=((10, 0), (12, 0)))
    assert kind.refusal((10, 0)) is None and kind.refusal((11, 9, 9, 9)) is None
    assert "10.0 or later, before 12.0" in str(kind.refusal((12, 0, 0)))


def test_nothing_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    names = {"tensorrt", "tensorrt_rtx"}
    code = f"import sys; from xfast.backends import tensorrt_store; assert not {names} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)


def test_targets(rtx: Runtime) -> None:
    targets = rtx.targets()
    assert {"SM75", "SM80", "SM86", "SM89", "SM120"} < set(targets) and "NONE" not in targets
    assert targets[-1] == "CURRENT" and targets[:2] == ("SM75", "SM80")
    assert rtx.check_target(None) == () and rtx.check_target("SM89") == ("SM89",)
    assert rtx.check_target(["SM120", "SM80"]) == ("SM80", "SM120")
    for wrong in ("SM90", "sm89", "", "NONE", [], ["SM89", "SM89"], ["SM89", "CURRENT"], ["SM89", 3]):
        with pytest.raises(InvalidOptionError, match="target: "):
            rtx.check_target(wrong)


def test_the_data_centre_runtime_has_no_targets(installed: Any) -> None:
    installed(tensorrt=DATA_CENTRE)
    found = find()
    assert found.check_target(None) == ()
    with pytest.raises(InvalidOptionError, match=r"SM80 is not accepted; tensorrt builds for the GPU that is there"):
        found.check_target("SM80")


def test_logs(rtx: Runtime) -> None:
    def say(severity: str, text: str) -> None:
        rtx.logger.log(getattr(rtx.logger, severity), text)

    verbose = Log(verbose=True)
    say("ERROR", "to nobody")
    with rtx.collecting() as outer, rtx.collecting(verbose):
        for severity in ("ERROR", "INTERNAL_ERROR", "WARNING", "INFO", "VERBOSE", "ERROR"):
            say(severity, severity.lower())
        with rtx.collecting(outer):
            say("ERROR", "twice")
    say("ERROR", "to nobody")
    assert outer.errors() == ["error", "internal_error", "twice"]
    assert [severity for severity, _ in outer.messages] == ["ERROR", "INTERNAL_ERROR", "WARNING", *["ERROR"] * 3]
    assert len(verbose.messages) == 7
    for index in range(2 * runtimes.MAX_MESSAGES):
        outer.add("ERROR", str(index))
    assert len(outer.messages) == runtimes.MAX_MESSAGES
