"""The loaded engine with a stand-in for TensorRT: what it is told, in which order, and what is made of its refusals."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from gpu import Captures
from models import quick_settings

from xfast.backends import cuda_graphs
from xfast.backends.tensorrt_build import profiles
from xfast.backends.tensorrt_graphs import GraphRunner, Key, buffers_of, fill, key_of
from xfast.backends.tensorrt_network import INPUTS, OUTPUT
from xfast.backends.tensorrt_runtime import DeviceMemoryError, Log
from xfast.backends.tensorrt_session import Session
from xfast.errors import BackendUnavailableError

_quick = pytest.fixture(autouse=True)(quick_settings)
CPU, HIDDEN = torch.device("cpu"), 4
PROFILES = profiles(8192, 64, 500)


class Stream:
    """A CUDA stream that remembers what it waited for."""

    cuda_stream = 77

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


class Event:
    waited: ClassVar[int] = 0  # for any of them, by the host

    def record(self, stream: Any = None) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        Event.waited += 1


class Context:
    """An execution context: computes [R, HIDDEN] from the token ids of the rows, reading nothing but addresses."""

    def __init__(self, engine: Engine, how: Any) -> None:
        self.engine, self.how, self.nvtx_verbosity = engine, how, "detailed"
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.profile: int | None = None
        engine.contexts.append(self)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == Stream.cuda_stream
        self.profile = profile
        return "profile" not in self.engine.refuse

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        sizes = dict(zip(INPUTS[name], shape, strict=True))
        for dimension, size in sizes.items():
            least, _, most = PROFILES[self.profile].sizes(dimension)
            assert least <= size <= most, (name, dimension, size)
        if "shape" in self.engine.refuse:
            return False
        self.shapes[name], self.memory = shape, None  # other shapes need other memory
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if "address" in self.engine.refuse:
            return False
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == INPUTS.keys()
        return 100 * self.shapes["token_ids"][0]

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return "capture" not in self.engine.refuse

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory is not None and self.memory[1] >= self.update_device_memory_size_for_shapes()
        if "run" in self.engine.refuse:
            self.engine.log.add("ERROR", self.engine.says)
            return False
        ids, rows = (_at(self.addresses[name], self.shapes[name][0]) for name in ("token_ids", "rows"))
        out = _at(self.addresses[OUTPUT], len(rows) * HIDDEN, torch.float32).view(-1, HIDDEN)
        out.copy_(ids[rows.long()].float()[:, None].expand(-1, HIDDEN))
        return True


def _at(address: int, count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """The tensor at an address."""
    import ctypes

    return torch.frombuffer((ctypes.c_char * (4 * count)).from_address(address), dtype=dtype)


class Engine:
    def __init__(self, log: Log) -> None:
        self.log, self.contexts, self.refuse = log, [], set()  # type: ignore[var-annotated]
        self.says = "no such kernel"

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace()
        config.set_execution_context_allocation_strategy = lambda how: setattr(config, "allocation", how)
        return config

    def create_execution_context(self, how: Any) -> Context | None:
        return None if "context" in self.refuse else Context(self, how)


class Runtime:
    """As ``tensorrt_runtime.Runtime``, with a module whose engines are ``Engine``."""

    name, logger = "stand-in", None

    def __init__(self, rtx: bool = True) -> None:
        self.log = Log()
        self.engine: Engine | None = Engine(self.log)
        self.module = SimpleNamespace(
            Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda blob: self.engine),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
            ProfilingVerbosity=SimpleNamespace(NONE="quiet"),
        )
        if rtx:
            self.module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", NONE="none")

    @contextmanager
    def collecting(self) -> Iterator[Log]:
        yield self.log


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """CUDA's streams and events, which are not here."""
    made = Stream()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return made


def session(runtime: Runtime) -> Session:
    return Session(runtime, b"engine", torch.float32, HIDDEN, CPU)  # type: ignore[arg-type]


def inputs_of(lengths: tuple[int, ...], rows: tuple[int, ...] | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    from xfast.backends.tensorrt_inputs import places

    tokens = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ids = torch.randint(0, 1000, (3, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    wanted = torch.arange(tokens) if rows is None else torch.tensor(rows)
    named = dict(zip(("token_ids", "position_ids", "type_ids"), ids, strict=True))
    return {**named, **places(offsets, tokens, max(lengths)), "rows": wanted.to(torch.int32)}


def wanted(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["token_ids"][inputs["rows"].long()].float()[:, None].expand(-1, HIDDEN)


def test_one_context_a_profile_with_memory_for_each_batch(stream: Stream) -> None:
    runtime = Runtime()
    loaded = session(runtime)
    assert runtime.engine is not None
    for lengths, rows, profile in (((3, 5), None, 1), ((1,), None, 0), ((30, 2, 9), (0, 40), 1)):
        inputs = inputs_of(lengths, rows)
        assert torch.equal(loaded.run(inputs, profile), wanted(inputs))
    contexts = runtime.engine.contexts
    assert [(each.profile, each.how.allocation) for each in contexts] == [(1, "user"), (0, "user")]
    assert {each.nvtx_verbosity for each in contexts} == {"quiet"}
    # what was checked goes on running: nothing is compiled for shapes that come up
    assert {each.how.dynamic_shapes_kernel_specialization_strategy for each in contexts} == {"none"}
    assert contexts[0].memory is not None and contexts[0].memory[1] == 100 * 41
    assert len(stream.waited) == 2  # each call waits for the one before


@pytest.mark.parametrize("rtx", [True, False])
def test_what_is_recorded_has_a_context_of_its_own(rtx: bool, stream: Stream) -> None:
    runtime = Runtime(rtx)
    loaded, inputs = session(runtime), inputs_of((3, 5))
    enqueue = loaded.recorded(inputs, 1)
    out = enqueue()
    assert torch.equal(out, wanted(inputs))
    inputs["token_ids"].add_(1)  # in place: the addresses stay
    assert enqueue() is out and torch.equal(out, wanted(inputs))
    loaded.run(inputs_of((7,)), 1)
    assert enqueue() is out and torch.equal(out, wanted(inputs))
    assert runtime.engine is not None and len(runtime.engine.contexts) == 2
    how = runtime.engine.contexts[0].how
    if rtx:
        assert (how.allocation, how.dynamic_shapes_kernel_specialization_strategy) == ("user", "eager")
    else:
        assert how == "user"


def test_scratch_of_a_graph_is_taken_when_it_is_captured(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory taken in a capture comes from the graphs' pool, and goes back to it: they share it."""
    alive: list[Any] = []
    empty = torch.empty

    def counted(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        if options.get("dtype") is torch.uint8:
            alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch, "empty", counted)
    runtime = Runtime()
    loaded, inputs = session(runtime), inputs_of((3, 5))
    enqueue = loaded.recorded(inputs, 1)
    assert not alive and runtime.engine is not None
    execute, held = Context.execute_async_v3, []
    monkeypatch.setattr(
        Context,
        "execute_async_v3",
        lambda self, stream: (held.append([made() is not None for made in alive]), execute(self, stream))[1],
    )
    for _ in range(2):  # in a trial run, and in the capture
        assert torch.equal(enqueue(), wanted(inputs))
    assert held == [[True], [False, True]] and [made() for made in alive] == [None, None]


def test_letting_go_waits_for_what_runs(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any stream: TensorRT frees what its kernels are reading."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for waits, runs, capture in ((0, 0, False), (1, 1, False), (1, 3, False), (0, 1, True)):
        loaded = session(Runtime())
        for _ in range(runs):
            loaded.run(inputs_of((3, 5)), 1)
        Event.waited, capturing[0] = 0, capture
        del loaded
        assert Event.waited == waits
    graphs = cuda_graphs.Graphs(CPU, None)
    graphs._done = Event()  # type: ignore[assignment]
    capturing[0], Event.waited = False, 0
    del graphs
    assert Event.waited == 1


def test_a_graph_that_makes_room_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(cuda_graphs, "QUIET_CALLS", 0)
    monkeypatch.setattr(cuda_graphs, "MEETINGS_BEFORE_CAPTURE", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphs = cuda_graphs.Graphs(CPU, Captures())
    for key, waits in (("first", 0), ("second", 1)):
        Event.waited = 0
        assert graphs.replay(key, lambda: (None, lambda: torch.ones(2, 2)), lambda _: None, 2) is not None
        graphs._done = Event()  # type: ignore[assignment]
        assert Event.waited == waits and graphs.keys == [key]


def test_a_context_is_made_while_no_other_call_runs(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, held = session(Runtime()), []
    create = Engine.create_execution_context

    def watched(self: Engine, how: Any) -> Context | None:
        held.append(loaded._lock.locked())
        return create(self, how)

    monkeypatch.setattr(Engine, "create_execution_context", watched)
    loaded.run(inputs_of((3, 5)), 1)
    loaded.recorded(inputs_of((3, 5)), 1)()
    assert held == [True, True]


def test_older_releases_take_memory_without_its_size(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Context, "set_device_memory")
    device_memory = property(fset=lambda self, address: setattr(self, "memory", (address, 10**9)))
    monkeypatch.setattr(Context, "device_memory", device_memory, raising=False)
    inputs = inputs_of((3, 5))
    assert torch.equal(session(Runtime()).run(inputs, 1), wanted(inputs))


def test_refusals(stream: Stream) -> None:
    for what, message in (
        ("context", "no memory left"),
        ("profile", "no memory left"),
        ("run", "no such kernel"),
        ("shape", r"refuses token_ids of shape \(8,\)"),
        ("address", "refuses the address of token_ids"),  # else it would keep that of the call before
    ):
        runtime = Runtime()
        loaded = session(runtime)
        assert runtime.engine is not None
        runtime.engine.refuse = {what}
        with pytest.raises(BackendUnavailableError, match=message):
            loaded.run(inputs_of((3, 5)), 1)
        runtime.engine.refuse = set()
        assert torch.equal(loaded.run(inputs_of((3, 5)), 1), wanted(inputs_of((3, 5))))
    runtime = Runtime()
    runtime.engine = None
    runtime.log.add("ERROR", "another GPU's")
    with pytest.raises(BackendUnavailableError, match="stand-in does not load the engine: another GPU's"):
        session(runtime)


def test_want_of_memory_has_a_type_of_its_own(stream: Stream) -> None:
    """What TensorRT says decides: an engine for which there is no memory is not a bad one."""
    for text, missing in (
        ("[defaultAllocator.cpp::allocate::57] Error Code 1: Cuda Runtime (out of memory)", True),
        ("Error Code 2: OutOfMemory (Requested size was 1024 bytes.)", True),
        ("cudaErrorMemoryAllocation", True),
        ("Engine deserialization failed: built for another GPU", False),
    ):
        for what in ("engine", "context", "profile", "run"):
            runtime = Runtime()
            loaded, engine = session(runtime), runtime.engine
            assert engine is not None
            engine.refuse, engine.says = {what}, text
            runtime.log.add("ERROR", text)
            if what == "engine":
                runtime.engine = None
            with pytest.raises(BackendUnavailableError, match=re.escape(text)) as caught:
                session(runtime) if what == "engine" else loaded.run(inputs_of((3, 5)), 1)
            assert isinstance(caught.value, DeviceMemoryError) is missing


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> tuple[GraphRunner, Captures, Engine]:
    monkeypatch.setattr(cuda_graphs, "MEETINGS_BEFORE_CAPTURE", 0)
    runtime = Runtime()
    made, captures = GraphRunner(session(runtime), PROFILES), Captures()
    made.graphs.capture, made.bound = captures, 0.01
    assert runtime.engine is not None
    return made, captures, runtime.engine


def test_batches_of_like_sizes_share_a_graph(runner: tuple[GraphRunner, Captures, Engine]) -> None:
    made, captures, engine = runner
    for seed, lengths in enumerate([(9, 1, 7), (3, 12, 10), (12, 4, 4, 4), (16, 1, 1)]):
        for _ in range(2):
            inputs = inputs_of(lengths, seed=seed)
            got = made.run(inputs, 1)
            assert torch.equal(got, wanted(inputs)) and len(got) == sum(lengths)
    assert (captures.count, captures.replays) == (1, 8)
    assert made.describe() == ["CUDA graphs: 1 captured, token buckets 32"]
    # in a context of its own, whose memory is for these very sizes; its first result was compared with another's
    assert [(each.shapes["padded_rows"], each.memory) for each in engine.contexts] == [
        ((4, 16), (engine.contexts[0].memory[0], 3200)),  # type: ignore[index]
        ((3, 9), (engine.contexts[1].memory[0], 1700)),  # type: ignore[index]
    ]


def test_rows_and_results_that_stay(runner: tuple[GraphRunner, Captures, Engine]) -> None:
    made, captures, _ = runner
    first, second = inputs_of((9, 5), (0, 9), seed=1), inputs_of((9, 6), (0, 9), seed=2)
    kept = made.run(first, 1)
    assert torch.equal(made.run(second, 1), wanted(second)) and torch.equal(kept, wanted(first))
    assert captures.count == 1


def test_what_cannot_be_captured_runs_without_and_says_so(runner: tuple[GraphRunner, Captures, Engine]) -> None:
    made, captures, engine = runner
    inputs = inputs_of((9, 5))
    engine.refuse = {"capture"}
    for _ in range(3):
        assert torch.equal(made.run(inputs, 1), wanted(inputs))
    assert not made.graphs.keys and "no graph for 16 tokens: TensorRT cannot be captured" in made.describe()[1]
    assert len(engine.contexts) == 2  # the one refused, and the profile's; it is not tried again
    captures.fail = True
    other = inputs_of((40,))
    assert torch.equal(made.run(other, 0), wanted(other))
    assert "no graph for 64 tokens: CUDA out of memory" in made.describe()[2]


def test_nothing_is_captured_before_the_check(runner: tuple[GraphRunner, Captures, Engine]) -> None:
    made, captures, _ = runner
    made.bound = None
    assert torch.equal(made.run(inputs_of((9, 5)), 1), wanted(inputs_of((9, 5)))) and captures.count == 0
    made.bound = 0.01
    assert torch.equal(made.run(inputs_of((9, 5)), 1), wanted(inputs_of((9, 5)))) and captures.count == 1


@pytest.mark.parametrize(("factor", "good"), [(1.0, True), (1.015, True), (1.03, False), (float("nan"), False)])
def test_a_graph_is_compared_with_the_kernels_that_were_checked(
    factor: float, good: bool, runner: tuple[GraphRunner, Captures, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph has kernels of its own. What they make of its first batch may be two roundings away."""
    made, captures, engine = runner
    execute = Context.execute_async_v3

    def other_kernels(self: Context, stream: int) -> bool:
        done = execute(self, stream)
        if self.how.dynamic_shapes_kernel_specialization_strategy == "eager":
            _at(self.addresses[OUTPUT], self.shapes["rows"][0] * HIDDEN, torch.float32).mul_(factor)
        return done

    monkeypatch.setattr(Context, "execute_async_v3", other_kernels)
    for seed in range(3):
        inputs = inputs_of((9, 5), seed=seed)
        got = made.run(inputs, 1)
        assert torch.equal(got, wanted(inputs) * factor if good else wanted(inputs))
    assert captures.count == 1 and captures.replays == (3 if good else 1)
    assert len(engine.contexts) == 2  # the graph's, and that of its first comparison
    assert bool(made.graphs.keys) is good
    refusal = [line for line in made.describe() if "differs from that of the checked kernels by" in line]
    assert len(refusal) == (not good)


def test_large_batches_run_without(runner: tuple[GraphRunner, Captures, Engine]) -> None:
    made, captures, engine = runner
    inputs = inputs_of((500,) * 9)
    assert torch.equal(made.run(inputs, len(PROFILES) - 1), wanted(inputs))
    assert captures.count == 0 and len(engine.contexts) == 1


@pytest.mark.parametrize(
    ("lengths", "rows", "key"),
    [
        ((1,), None, Key(16, 1, 8, 16, 0)),
        ((500,), (0,), Key(512, 1, 500, 16, 3)),  # no longer than the model's longest
        ((32,) * 3, None, Key(96, 4, 32, 96, 1)),
        ((33,) * 3, (0, 33, 66), Key(128, 4, 48, 16, 2)),
        ((1,) * 65, None, None),  # more sequences than a profile takes
        ((16, *[1] * 13), None, Key(32, 16, 16, 32, 1)),
        ((17, *[1] * 13), None, None),  # 16 x 24 are more than eight times 32
        ((500,) * 9, None, None),
    ],
)
def test_keys(lengths: tuple[int, ...], rows: tuple[int, ...] | None, key: Key | None) -> None:
    assert key_of(inputs_of(lengths, rows), PROFILES) == key


def test_enlarged_batches_are_the_same_batches() -> None:
    """Attention over the buffers, brute force: every token finds its own sequence, whatever was there before."""
    before, lengths = inputs_of((20, 3, 30, 1), seed=5), (7, 11, 2)
    inputs = inputs_of(lengths)
    key = Key(64, 4, 32, 64, 1)
    buffers = buffers_of(key, CPU)
    fill(buffers, before)
    fill(buffers, inputs)
    assert all(tuple(buffers[name].shape) == tuple(map(key.size, dims)) for name, dims in INPUTS.items())
    for name, bound in (("padded_rows", 64), ("packed_columns", 4 * 32), ("rows", 64)):
        assert int(buffers[name].min()) >= 0 and int(buffers[name].max()) < bound
    assert buffers["lengths"].tolist() == [*lengths, 1]
    token = 0
    for sequence, count in enumerate(lengths):
        for column in range(count):
            assert buffers["padded_rows"][sequence, column] == token
            assert buffers["packed_columns"][token] == sequence * 32 + column
            assert all(buffers[name][token] == inputs[name][token] for name in ("token_ids", "position_ids"))
            token += 1


def test_inputs_and_scratch_are_kept_for_the_stream(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, on: kept.append((self.data_ptr(), on)))
    runtime = Runtime()
    session(runtime).run(inputs_of((3, 5)), 1)
    context = runtime.engine.contexts[0]
    want = {context.memory[0], *(context.addresses[name] for name in INPUTS)}
    assert {address for address, on in kept if on is stream} == want
