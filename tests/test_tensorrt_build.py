"""Profiles and builds: real engines, built without a GPU by TensorRT for RTX."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import types
from typing import Any

import pytest
import tensorrt_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_stub import populate

from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_runtime as runtimes
from xfast.backends.tensorrt_build import BuildCancelledError, EngineBuildError, Profile, build_from, choose, profiles
from xfast.backends.tensorrt_network import INPUTS, OUTPUT
from xfast.backends.tensorrt_runtime import Log, Runtime, find
from xfast.errors import InvalidInputError, InvalidOptionError

PROFILE = Profile((1, 8, 32), (1, 2, 4), (1, 4, 8))


@pytest.fixture(scope="module")
def rtx() -> Runtime:
    pytest.importorskip("tensorrt_rtx", reason="builds engines with TensorRT for RTX: pip install tensorrt-rtx-cu13")
    return find("tensorrt_rtx")


@pytest.fixture(scope="module")
def blob(rtx: Runtime) -> bytes:
    return build_from(rtx, populate, [PROFILE], "SM89")


# --- profiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (0, 1, 2)}, "tokens"),
        ({"tokens": (1, 9, 8)}, "tokens"),
        ({"tokens": (1, 8, 33)}, "profile max: 33 tokens do not fit, at most 32 do"),
        ({"tokens": (1, 9, 32)}, "profile opt: 9 tokens do not fit"),
        ({"tokens": (2, 8, 32)}, "profile min: 2 tokens do not fit"),
        ({"batch": (1, 4)}, "batch"),
        ({"batch": [1, 2, 4]}, "batch"),
        ({"batch": (1, 2.0, 4)}, "batch"),
        ({"batch": (True, 2, 4)}, "batch"),
        ({"batch": None}, "batch"),
        ({"length": (1, 4, 2**31)}, "length"),
        ({"length": "148"}, "length"),
    ],
    ids=str,
)
def test_impossible_profiles(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        dataclasses.replace(PROFILE, **change)


def test_default_profiles() -> None:
    assert profiles(32768, 256, 512) == (
        Profile((1, 32, 512), (1, 1, 1), (1, 32, 512)),
        Profile((1, 3072, 8192), (1, 128, 256), (1, 32, 32)),
        Profile((1, 3072, 32768), (1, 32, 256), (1, 128, 128)),
        Profile((1, 3072, 32768), (1, 8, 256), (1, 512, 512)),
    )
    assert profiles(1, 1, 1) == (Profile((1, 1, 1), (1, 1, 1), (1, 1, 1)),)
    assert [profile.length[2] for profile in profiles(40, 2, 33)] == [33, 32, 33]
    assert [profile.length[2] for profile in profiles(8192, 2, 8192)] == [8192, 32, 128, 512, 2048, 8192]


def test_the_padded_area_is_limited() -> None:
    made = profiles(32768, 256, 512, 16384, 2**21)
    assert made == (
        Profile((1, 32, 512), (1, 1, 1), (1, 32, 512)),
        Profile((1, 3072, 8192), (1, 128, 256), (1, 32, 32)),
        Profile((1, 3072, 16384), (1, 32, 128), (1, 128, 128)),  # 16384 / 128
        Profile((1, 3072, 4096), (1, 8, 8), (1, 512, 512)),  # 2 ** 21 / 512 ** 2
    )
    assert profiles(32768, 256, 512, 512, 1) == made[:1]
    assert [profile.batch[2] for profile in profiles(32768, 256, 512, 512)] == [1, 16, 4]  # 512: the first does it
    assert profiles(512, 1, 512, 1, 1) == profiles(512, 1, 512)
    for limits in ((0, 1), (1, 0), (True, 1), (1, 2.0)):
        with pytest.raises(InvalidOptionError, match=r"max_(area|squares): .* or None"):
            profiles(4, 4, 4, *limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limits", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (4, 1, 5), (2.0, 1, 1), (1, True, 1), (2**31, 1, 1)]
)
def test_impossible_limits(limits: Any) -> None:
    with pytest.raises(InvalidOptionError, match="max_"):
        profiles(*limits)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(data=st.data())
def test_every_batch_within_the_limits_has_one_profile(data: st.DataObject) -> None:
    sizes = st.integers(1, 300)
    max_batch, max_length = data.draw(sizes), data.draw(sizes)
    max_tokens = data.draw(st.integers(max_length, max(max_length, 2 * max_batch * max_length)))
    made = profiles(max_tokens, max_batch, max_length)
    batch, length = data.draw(st.integers(1, max_batch)), data.draw(st.integers(1, max_length))
    tokens = data.draw(st.integers(1, min(max_tokens, batch * length)))
    index = choose(made, tokens, batch, length)
    assert index is not None and made[index].fits(tokens, batch, length)
    area = made[index].batch[2] * made[index].length[2]
    assert all(area <= p.batch[2] * p.length[2] for p in made if p.fits(tokens, batch, length))
    beyond = [(max_tokens + 1, batch, length), (tokens, max_batch + 1, length), (tokens, batch, max_length + 1)]
    assert [choose(made, *sizes) for sizes in [*beyond, (0, 1, 1), (1, 0, 1), (1, 1, 0)]] == [None] * 6


@settings(deadline=None, max_examples=200, derandomize=True)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40), area=st.integers(1, 500), squares=st.none())
def test_parts_fit_a_profile(lengths: list[int], area: int, squares: int | None) -> None:
    import torch

    from xfast.backends.tensorrt_inputs import Sequences

    made = profiles(100, 7, 60, area, squares)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ids = torch.arange(total, dtype=torch.int32)
    whole = Sequences(ids, ids, ids, offsets, max(1, *lengths))
    rows = ids[::3]
    parts = list(whole.parts(rows, lambda *sizes: choose(made, *sizes) is not None))
    assert torch.cat([part.ids for part, _ in parts]).tolist() == ids.tolist()
    assert torch.cat([part.ids[wanted.long()] for part, wanted in parts]).tolist() == rows.tolist()
    assert sum(part.batch for part, _ in parts) == len(lengths)
    for part, _ in parts:
        assert part.longest == max(1, *part.offsets.diff().tolist())
        index = choose(made, max(1, part.tokens), part.batch, part.longest)
        assert index is not None and (part.batch == 1 or part.batch * part.longest <= area)


def test_the_smallest_profile_is_chosen() -> None:
    made = profiles(32768, 256, 512)
    assert [choose(made, n, 1, n) for n in (1, 32, 33, 512)] == [0, 0, 0, 0]
    assert [choose(made, 2 * n, 2, n) for n in (1, 32, 33, 128, 129, 512)] == [1, 1, 2, 2, 3, 3]
    assert choose(tuple(reversed(made)), 64, 2, 32) == 2  # wherever it stands
    assert choose((PROFILE, PROFILE), 1, 1, 1) == 0
    assert choose((), 1, 1, 1) is None


# --- builds


def test_builds(rtx: Runtime, blob: bytes) -> None:
    assert isinstance(blob, bytes) and len(blob) > 1000
    assert len(build_from(rtx, populate, profiles(64, 4, 40))) > 1000


def test_progress(rtx: Runtime) -> None:
    seen: list[tuple[str, int, int]] = []
    build_from(rtx, populate, [PROFILE], "SM89", lambda *event: seen.append(event))
    assert len(seen) > 10
    assert seen[0][1] == 0 and seen[-1] == (seen[0][0], seen[0][2], seen[0][2])  # the outermost phase
    assert all(0 <= step <= total and total > 0 for _, step, total in seen)
    ended = [phase for phase, step, total in seen if step == total]
    assert {phase for phase, _, _ in seen} == set(ended)


def _progress_points(rtx: Runtime) -> int:
    counter = itertools.count()
    build_from(rtx, populate, [PROFILE], "SM89", lambda *_: next(counter))
    return next(counter)


def test_a_build_can_be_cancelled_anywhere(rtx: Runtime) -> None:
    points = _progress_points(rtx)
    for stop in {0, 1, 2, points // 2, points - 2, points - 1}:
        calls = itertools.count()
        with pytest.raises(BuildCancelledError):
            build_from(rtx, populate, [PROFILE], "SM89", lambda *_, c=calls, s=stop: next(c) != s)
        assert next(calls) == stop + 1  # it was not called again


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_what_progress_raises_is_raised(rtx: Runtime, error: BaseException) -> None:
    def progress(phase: str, step: int, total: int) -> None:
        if step == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        build_from(rtx, populate, [PROFILE], "SM89", progress)
    assert caught.value is error


def test_threads_build_at_once(rtx: Runtime) -> None:
    made: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: made.append(build_from(rtx, populate, [PROFILE], "SM89"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [builder.inspect(rtx, each)["header"]["targets"] for each in made] == [["SM89"]] * 4


def test_options_are_checked_first(rtx: Runtime) -> None:
    def never(*_: Any) -> list[Any]:
        raise AssertionError

    with pytest.raises(InvalidOptionError, match="target: SM90"):
        build_from(rtx, never, [PROFILE], "SM90")
    with pytest.raises(InvalidOptionError, match="profiles: none"):
        build_from(rtx, never, [], "SM89")


def _types_do_not_match(trt: Any, network: Any) -> list[Any]:
    arrays = populate(trt, network)
    ids = network.get_input(0)
    wrong = network.add_elementwise(network.get_output(0), ids, trt.ElementWiseOperation.SUM).get_output(0)
    network.mark_output(wrong)
    return arrays


def _unknown_input(trt: Any, network: Any) -> list[Any]:
    network.add_input("surplus", trt.int32, (-1,))
    return populate(trt, network)


def _no_output(trt: Any, network: Any) -> list[Any]:
    arrays = populate(trt, network)
    network.unmark_output(network.get_output(0))
    return arrays


def _missing_method(_: Any, network: Any) -> list[Any]:
    network.add_something_new()
    return []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_types_do_not_match, r"SM89: no engine was built; .*same input types|SM89: no engine was built; .*[Tt]ype"),
        (_unknown_input, "'surplus' has no known dimensions"),
        (_no_output, r"no engine was built; .*output"),
        (_missing_method, "AttributeError: .*add_something_new"),
    ],
)
def test_failures_say_what_tensorrt_said(rtx: Runtime, wrong: Any, message: str, capfd: Any) -> None:
    with pytest.raises(EngineBuildError, match=message):
        build_from(rtx, wrong, [PROFILE], "SM89")
    captured = capfd.readouterr()
    assert not captured.out and not captured.err  # nothing is printed


def test_impossible_layers_are_named(rtx: Runtime) -> None:
    with pytest.raises(EngineBuildError, match="no engine was built") as caught:
        build_from(rtx, _types_do_not_match, [PROFILE], "SM89")
    assert caught.value.messages and all(message in str(caught.value) for message in caught.value.messages)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.skipif(_has_gpu(), reason="there is a GPU")
def test_the_current_gpu_is_missing(rtx: Runtime) -> None:
    with pytest.raises(EngineBuildError, match=r"without a GPU name a target: SM75, .*cudaError"):
        build_from(rtx, populate, [PROFILE], "CURRENT")


def test_a_builder_that_needs_a_gpu() -> None:
    class Builder:
        def __init__(self, logger: Any) -> None:
            logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    class Logger:
        ERROR = types.SimpleNamespace(name="ERROR")

        def log(self, severity: Any, message: str) -> None: ...

    module = types.ModuleType("tensorrt")
    module.__dict__.update(Builder=Builder, ILogger=Logger)
    runtime = Runtime(runtimes.KINDS[0], (10, 9, 0, 34), module)
    match = "tensorrt builds only where an NVIDIA GPU and its driver are; CUDA initialization failure"
    with pytest.raises(EngineBuildError, match=match):
        build_from(runtime, populate, [PROFILE])


# --- what engines say of themselves


def test_describe(rtx: Runtime) -> None:
    kept: list[dict[str, Any]] = []

    def keep(trt: Any, network: Any) -> list[Any]:
        arrays = populate(trt, network, products=2)
        kept.extend(tensorrt_layers.describe(network))
        return arrays

    log = Log(verbose=True)
    build_from(rtx, keep, [PROFILE], "SM89", log=log)
    layers = {layer["name"]: layer for layer in kept}
    products = [layers[f"product{index}"] for index in range(2)]
    assert all(layer["type"] == "MATRIX_MULTIPLY" for layer in products)
    assert all([tensor["dtype"] for tensor in layer["inputs"]] == ["HALF", "HALF"] for layer in products)
    assert products[0]["outputs"][0]["dtype"] == "HALF" and products[0]["outputs"][0]["shape"] == [-1, 8]
    norm = layers["norm"]
    assert norm["type"] == "NORMALIZATION" and norm["inputs"][1]["shape"] == [1, 8]
    assert {tensor["dtype"] for tensor in (*norm["inputs"], *norm["outputs"])} == {"FLOAT"}
    assert kept[-1]["type"] == "GATHER" and kept[-1]["outputs"][0]["name"] == OUTPUT

    compiled = tensorrt_layers.compiled_layers(log)
    assert [layer["type"] for layer in compiled].count("gemm") == 2
    gemms = [layer for layer in compiled if layer["type"] == "gemm"]
    assert all(tensor["dtype"] == "Half" for layer in gemms for tensor in (*layer["inputs"], *layer["outputs"]))
    assert {"name": OUTPUT, "dtype": "Float"} in [tensor for layer in compiled for tensor in layer["outputs"]]
    assert tensorrt_layers.compiled_layers(Log()) == []


def test_what_a_header_tells(rtx: Runtime, blob: bytes) -> None:
    facts = builder.inspect(rtx, blob)
    assert facts["bytes"] == len(blob)
    want = {"version": rtx.version_text, "bytes": len(blob), "targets": ["SM89"], "compiled_for": ["sm89"]}
    assert facts["header"] == {**want, "tf32": False}
    several = builder.inspect(rtx, build_from(rtx, populate, [PROFILE], ["SM120", "SM80"]))["header"]
    assert several["targets"] == ["SM80", "SM120"] and several["tf32"] is False
    anywhere = builder.inspect(rtx, build_from(rtx, populate, [PROFILE]))["header"]
    assert {"SM80", "SM86", "SM89", "SM120", "SM121"} <= set(anywhere["targets"])


@pytest.mark.skipif(_has_gpu(), reason="there is a GPU")
def test_what_needs_a_gpu(rtx: Runtime, blob: bytes) -> None:
    """The day this fails, engines can be inspected without a GPU."""
    facts = builder.inspect(rtx, blob)
    assert facts["engine"] is None and "cudaError" in facts["reason"]
    assert facts["validity"] == "INVALID" and "MALFORMED_ENGINE" not in facts["diagnostics"]


def test_a_runtime_that_needs_a_gpu() -> None:
    class Logger:
        ERROR = types.SimpleNamespace(name="ERROR")

        def log(self, severity: Any, message: str) -> None: ...

    def nothing(logger: Any) -> None:
        logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = types.ModuleType("tensorrt without a GPU")
    module.__dict__.update(Runtime=nothing, ILogger=Logger)
    facts = builder.inspect(Runtime(runtimes.KINDS[0], (10, 9, 0, 34), module), b"any bytes")
    assert facts["engine"] is None and facts["validity"] is None and facts["bytes"] == 9
    assert re.fullmatch(r"CUDA initialization failure with error: 35; TypeError: .*returned nullptr", facts["reason"])


def test_what_is_no_engine(rtx: Runtime, blob: bytes) -> None:
    for size in (0, 1, 4, 35):
        with pytest.raises(InvalidInputError, match="not an engine of tensorrt_rtx"):
            builder.inspect(rtx, blob[:size])
    for size in (36, 64, 100, len(blob) - 1):
        with pytest.raises(InvalidInputError, match=f"the engine has {size} bytes, its header says {len(blob)}"):
            builder.inspect(rtx, blob[:size])
    with pytest.raises(InvalidInputError, match="not an engine"):
        builder.inspect(rtx, bytes(1000))
    for version in (b"\1\6\1\x74", b"\1\7\2\x74"):
        with pytest.raises(InvalidInputError, match=r"was built by 1\.\d\.\d\.116, this is 1"):
            builder.inspect(rtx, blob[:24] + version + blob[28:])


class _Engine:
    """What an engine answers on a GPU."""

    num_io_tensors, num_optimization_profiles = 2, 2

    def get_tensor_name(self, index: int) -> str:
        return ("lengths", OUTPUT)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if name == "lengths" else (-1, 8)

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name="INT32" if name == "lengths" else "FLOAT")

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "lengths" else "out"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1,), (2,), (4 + profile,)]

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=lambda _: '{"Layers": [{"Name": "gemm"}]}')


def test_how_an_engine_is_read() -> None:
    trt = types.SimpleNamespace(
        TensorIOMode=types.SimpleNamespace(INPUT="in"), LayerInformationFormat=types.SimpleNamespace(JSON=0)
    )
    ranges = [[[1], [2], [4]], [[1], [2], [5]]]
    assert builder._read_engine(trt, _Engine()) == {
        "profiles": 2,
        "inputs": [{"name": "lengths", "dtype": "INT32", "shape": [-1], "profiles": ranges}],
        "outputs": [{"name": OUTPUT, "dtype": "FLOAT", "shape": [-1, 8]}],
        "layers": [{"Name": "gemm"}],
    }


# --- an encoder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_encoder(rtx: Runtime, precision: str) -> None:
    import models

    from xfast.architecture import FAMILIES, describe

    model = models.build("xlm-roberta", num_hidden_layers=1)
    weights = describe(model, FAMILIES[0])
    log = Log(verbose=True)
    made = builder.build(weights, precision, None, [PROFILE], "SM89", runtime=rtx, log=log)
    header = builder.inspect(rtx, made)["header"]
    assert header["targets"] == ["SM89"] and header["tf32"] is False
    assert set(INPUTS) <= {name for name in INPUTS if name.encode() in made}
    dtypes = {tensor["dtype"] for layer in tensorrt_layers.compiled_layers(log) for tensor in layer["constants"]}
    assert {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}[precision] in dtypes


def test_a_long_context_in_fp32(rtx: Runtime) -> None:
    """Its attention holds all scores: batches as large as those of short sequences would take terabytes."""
    import models

    from xfast.architecture import FAMILIES, describe
    from xfast.backends.tensorrt import default_profiles

    model = models.build(
        "xlm-roberta", num_hidden_layers=1, hidden_size=128, num_attention_heads=16, max_position_embeddings=8194
    )
    weights = describe(model, FAMILIES[0])
    made = default_profiles(weights.spec, "fp32", rtx)
    assert (made[0].length[2], made[-1].length[2]) == (8192, 8192)
    assert len(builder.build(weights, "fp32", None, made, "SM89", runtime=rtx)) > 10_000
    with pytest.raises(EngineBuildError, match=r"(?i)out ?of ?memory"):  # the limits are needed
        builder.build(weights, "fp32", None, profiles(32768, 256, 8192), "SM89", runtime=rtx)
