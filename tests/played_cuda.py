"""A GPU played on the CPU, for code that only runs where one is: ``pytest -p played_cuda``.

Tensors on ``cuda`` are real ones to torch (device checks, autograd, autocast), but their values lie in CPU memory, and
every operation on them is done there. What a GPU refuses is refused here: operands on two devices, kernels on host
memory, layouts that cuBLASLt's e4m3 product does not take, waiting for the device inside a capture. A captured graph
repeats what was recorded, on the memory it was recorded with. Triton's kernels are interpreted, and every form in which
one was launched is written down, to be compiled as a GPU would (:mod:`launch_forms`).

What is not played: time, streams that overlap, memory limits, TF32, rounding inside of tensor cores.
"""

from __future__ import annotations

import played_device  # isort: skip  # noqa: F401  (before torch)

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import launch_forms
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
_WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
_MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Waited(RuntimeError):
    """What a capture ends with when the host reads from the device."""


class Played(torch.Tensor):
    """A tensor on the played device; ``memory`` is the CPU tensor that holds its values."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> Played:
        made: Played = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            layout=memory.layout, device=CUDA, requires_grad=memory.requires_grad,
        )  # fmt: skip
        made.memory = memory
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Played({self.memory!r})"

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def record_stream(self, stream: Any) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"record_stream: expected a stream, got {stream!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "memory"})
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes what is asked for on ``cuda`` without an operand that is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _State(threading.local):
    capture: Graph | None = None


state = _State()
_interpreting = threading.Lock()  # Triton's interpreter has one state for all threads


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation on the played device, or on the CPU where no operand is there and none is asked for."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    played = [value for value in tensors if isinstance(value, Played)]
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else (CUDA if played else torch.device("cpu"))
    if target.type == "cuda" and target.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal: {target}")
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if not played and target.type != "cuda":
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Device():  # inference mode leaves it to us
            return func.decompose(*args, **kwargs)
    _check(func, tensors, played, target)
    if func is aten._fused_sdp_choice.default:
        return 0  # the plain products: kernels of the CPU have names of their own
    plain_args, plain = tree_map(_memory, args), tree_map(_memory, kwargs)
    if target.type == "cuda" and asked is not None:
        plain["device"] = torch.device("cpu")
    function = OPERATIONS.get(func, func)
    with _below():
        out = function(*plain_args, **plain)
    if state.capture is not None:
        state.capture.record(function, plain_args, plain, out)
    if target.type != "cuda":
        return out
    # also under inference mode, a view of a tensor that is not of it is not of it either
    view = func.is_view and not args[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not view):
        wrapped = tree_map(lambda value: Played(value) if isinstance(value, torch.Tensor) else value, out)
    if func in (aten.detach.default, aten.lift_fresh.default) or asked is not None:
        return wrapped
    if not torch.is_inference_mode_enabled():
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    # without versions there is nothing to share
    return kwargs.get("out", args[0]) if func._schema.is_mutable else wrapped


def _check(func: Any, tensors: list[torch.Tensor], played: list[Played], target: torch.device) -> None:
    """What a GPU would not do."""
    to_host = target.type == "cpu" and bool(played)
    waits = func in _WAITS or (to_host and not func.name().startswith("aten::empty"))
    if waits and state.capture is not None:
        raise Waited(f"{func.name()}: operation not permitted when stream is capturing")
    if not played or func in _MIXED:
        return
    strangers = [value for value in tensors if not isinstance(value, Played) and value.dim() > 0]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, Played) else value


@contextlib.contextmanager
def _below() -> Iterator[None]:
    """Without the mode: what is called now is the CPU's."""
    with torch._C._DisableTorchDispatch():
        yield


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None = None,
    scale_result: Any = None, out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> torch.Tensor:  # fmt: skip
    """``torch._scaled_mm`` with a scale a row and a column, and what compute capability 9.0 asks of its operands."""
    (rows, depth), columns = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.stride() == (depth, 1), f"a must be row-major, got strides {a.stride()}"
    assert b.stride() == (1, depth), f"b must be column-major, got strides {b.stride()}"
    assert depth % 16 == 0 and columns % 16 == 0, (depth, columns)
    assert a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0, "operands start at multiples of 16 bytes"
    for scale, shape in ((scale_a, (rows, 1)), (scale_b, (1, columns))):
        assert scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous(), (scale.shape, shape)
    assert out_dtype == torch.bfloat16, "a scale a row gives bf16"
    assert bias is None or (bias.dtype == torch.bfloat16 and bias.shape == (columns,)), "its bias is bf16"
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(out_dtype)


OPERATIONS: dict[Any, Callable[..., Any]] = {aten._scaled_mm.default: scaled_mm}


class Graph:
    """A CUDA graph: what ran while it was captured, and runs again with the memory it had."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._steps: list[Callable[[], None]] = []

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """An operation; again, its results go where they were."""

        def step() -> None:
            with _below():
                again = function(*args, **kwargs)
            for new, old in zip(tree_flatten(again)[0], tree_flatten(out)[0], strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    with _below(), torch.no_grad():
                        old.copy_(new)

        self._steps.append(step)

    def launch(self, run: Callable[[], None]) -> None:
        """A kernel."""
        self._steps.append(run)

    def replay(self) -> None:
        """All of it again, in order."""
        for step in self._steps:
            step()


class Stream:
    """In order, as everything here."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        synchronize()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """A moment."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timing, self._at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        """Now."""
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """The host waits: not within a capture."""
        synchronize()

    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds."""
        assert self._timing and other._timing
        return max(1e3 * (other._at - self._at), 1e-3)


def synchronize(*_: Any) -> None:
    """The host waits: not within a capture."""
    if state.capture is not None:
        raise Waited("operation not permitted when stream is capturing")


@contextlib.contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    """In place of ``torch.cuda.graph``."""
    assert state.capture is None
    state.capture = graph
    try:
        yield
    finally:
        state.capture = None


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


class Properties(SimpleNamespace):
    """Of the device."""


def install() -> None:
    """Makes ``torch.cuda`` the played device, in all threads, until the process ends. Before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    for module in ("torch._dynamo.trace_rules", "transformers.modeling_utils", "xfast"):
        importlib.import_module(module)  # before torch.cuda's functions change, which they look at
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter's data cannot become of another class
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") moves where it is seen
    properties = Properties(
        name="played H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30, warp_size=32,
        L2_cache_size=50 * 2**20,
    )  # fmt: skip
    stream = Stream()
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: state.capture is not None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (140 * 2**30, 141 * 2**30),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": synchronize,
    }
    silent = ("init", "_lazy_init", "empty_cache", "reset_peak_memory_stats", "set_device", "manual_seed_all", "_sleep")
    contexts = {"device": _nothing, "stream": lambda _: contextlib.nullcontext(), "graph": capture}
    classes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph}
    for name, value in {**answers, **dict.fromkeys(silent, lambda *_, **__: None), **contexts, **classes}.items():
        setattr(torch.cuda, name, value)
    _in_every_thread()
    _data()
    _as_plain_tensors()
    _launches()


def _in_every_thread() -> None:
    """Dispatch modes belong to threads."""
    plain = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with Device(), torch.autograd.set_multithreading_enabled(False):
            plain(self)

    threading.Thread.run = run  # type: ignore[method-assign]
    Device().__enter__()
    torch.autograd.set_multithreading_enabled(False)


def _data() -> None:
    """``parameter.data = tensor``: the memory goes along, and the class."""
    plain = torch.Tensor.data

    def put(self: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(value, Played) and not isinstance(self, Played):
            torch.utils.swap_tensors(self, torch.nn.Parameter(value.detach(), self.requires_grad))
            return
        plain.__set__(self, value)
        if isinstance(self, Played):
            self.memory = value.memory  # type: ignore[attr-defined]

    torch.Tensor.data = property(plain.__get__, put)  # type: ignore[assignment]


def _as_plain_tensors() -> None:
    """The class is the trick, not the tensors': to xfast these are plain."""
    import xfast.architecture
    import xfast.patch

    xfast.patch.type = lambda value: torch.Tensor if isinstance(value, Played) else type(value)  # type: ignore[attr-defined]
    plain = xfast.architecture.is_plain_tensor
    for module in [module for name, module in sys.modules.items() if name.startswith("xfast.")]:
        if getattr(module, "is_plain_tensor", None) is plain:
            module.is_plain_tensor = lambda tensor: isinstance(tensor, Played) or plain(tensor)  # type: ignore[attr-defined]


def _launches() -> None:
    """Interprets kernels on the device's memory, and writes their forms down."""
    from triton.runtime.interpreter import GridExecutor

    import xfast.backends.triton
    import xfast.kernels.launch

    xfast.backends.triton._driver_missing = lambda: None
    xfast.kernels.launch.INTERPRETED = False  # for the host's code; what kernels are told stays as it is
    plain = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and not isinstance(value, Played):
                raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {self.fn.__name__}")
        args, kwargs = tuple(map(_memory, args)), {name: _memory(value) for name, value in kwargs.items()}
        launch_forms.note(self.fn, self.arg_names, self.constexprs, args, kwargs)

        def launch() -> None:
            with _below(), _interpreting:
                plain(self, *args, **kwargs)

        launch()
        if state.capture is not None:
            state.capture.launch(launch)

    GridExecutor.__call__ = call


install()


def pytest_sessionfinish() -> None:
    """Writes the launches down, for :mod:`launch_forms`."""
    launch_forms.save()
