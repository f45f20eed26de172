"""A loaded TensorRT engine: deserialised, run on the caller's stream, and made ready to be captured in a CUDA graph.

Scratch memory comes from torch, as much as a batch needs: TensorRT's own allocation is that of the largest batch of all
profiles, for every execution context. Memory and addresses that never change are also what a graph needs.

Not yet run on a GPU: tests see to it with a stand-in for the engine (``tests/test_tensorrt_session.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xfast.backends.cuda_graphs import finish
from xfast.backends.tensorrt_network import INPUTS, OUTPUT
from xfast.backends.tensorrt_runtime import DeviceMemoryError, Log, Runtime, unavailable
from xfast.errors import BackendUnavailableError

ALIGNMENT = 256
"""Bytes: of every address that is given to TensorRT (``NvInferRuntime.h``)."""


class Session:
    """Runs one engine on one device. Thread-safe: calls take turns, on the host and on the device.

    Args:
        runtime: that built the engine.
        blob: the serialised engine.
        dtype: of its output.
        hidden_size: columns of its output.
        device: a CUDA device.

    Raises:
        BackendUnavailableError: TensorRT does not take the engine on this device; its messages say why.
        DeviceMemoryError: there is no memory for it.
    """

    def __init__(
        self, runtime: Runtime, blob: bytes, dtype: torch.dtype, hidden_size: int, device: torch.device
    ) -> None:
        self._done: torch.cuda.Event | None = None
        self.device, self.dtype, self.hidden_size = device, dtype, hidden_size
        self._lock = threading.Lock()
        with torch.cuda.device(device), runtime.collecting() as log:
            # the engine refers to its runtime, contexts to their engine: all are kept
            self._runtime = runtime.module.Runtime(runtime.logger)
            self._engine = self._runtime.deserialize_cuda_engine(blob)
            if self._engine is None:
                raise unavailable(f"{runtime.name} does not load the engine", log)
        self._contexts: dict[int, Any] = {}
        self._messages = runtime

    def __del__(self, finish: Callable[..., None] = finish) -> None:  # bound: at exit modules lose their names first
        finish(self._done)  # contexts and the engine's weights are freed without waiting for other streams

    def run(self, inputs: Mapping[str, torch.Tensor], profile: int) -> torch.Tensor:
        """[R, hidden_size] on the device.

        Args:
            inputs: the network's inputs, contiguous int32 on the device, of sizes that the profile takes.
            profile: its index.
        """
        stream = torch.cuda.current_stream(self.device)
        inputs = {name: _aligned(tensor) for name, tensor in inputs.items()}
        output = self._output(inputs)
        with self._lock, torch.cuda.device(self.device), self._messages.collecting() as log:
            if self._done is not None:  # a context holds the state of one call
                stream.wait_event(self._done)
            if profile not in self._contexts:
                # kept: switching the profile of one between calls would wait for the device
                self._contexts[profile] = self._context(profile, stream, log)
            size = self._bind(self._contexts[profile], inputs, output)
            scratch = self._scratch(self._contexts[profile], size)
            _enqueue(self._contexts[profile], stream, log)
            self._done = torch.cuda.Event()
            self._done.record(stream)
        for tensor in (*inputs.values(), scratch):
            tensor.record_stream(stream)  # freed by Python now, read by the device later
        return output

    def recorded(self, inputs: Mapping[str, torch.Tensor], profile: int) -> Callable[[], torch.Tensor]:
        """What enqueues the engine on the stream that is current when it is called, for a capture.

        It reads ``inputs`` and returns the same tensor each time. A graph fixes shapes and addresses, so it has an
        execution context of its own, with kernels compiled for these very shapes. Each call takes scratch memory and
        lets go of it: in a capture that is memory of the graphs' pool, which they share, as they take turns.

        Raises:
            BackendUnavailableError: no memory; the function raises it, too, where TensorRT cannot be captured.
        """
        output = self._output(inputs)
        with self._lock, torch.cuda.device(self.device), self._messages.collecting() as log:
            context = self._context(profile, torch.cuda.current_stream(self.device), log, final=True)
            size = self._bind(context, inputs, output)

        def enqueue(kept: Mapping[str, torch.Tensor] = inputs) -> torch.Tensor:
            stream = torch.cuda.current_stream(self.device)
            with self._lock, self._messages.collecting() as log:
                # not in older releases, which find out in the capture
                if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream.cuda_stream):
                    raise BackendUnavailableError("TensorRT cannot be captured in a CUDA graph with these shapes")
                scratch = self._scratch(context, size)
                _enqueue(context, stream, log)
            del scratch  # for what comes later on this stream, or in a capture's pool
            return output

        return enqueue

    def _output(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.empty(len(inputs["rows"]), self.hidden_size, dtype=self.dtype, device=self.device)

    def _bind(self, context: Any, inputs: Mapping[str, torch.Tensor], output: torch.Tensor) -> int:
        """Tells a context shapes and addresses; returns the bytes of scratch memory that it needs."""
        for name in INPUTS:
            shape = tuple(inputs[name].shape)
            _accepted(context.set_input_shape(name, shape), f"{name} of shape {shape}")
            _accepted(context.set_tensor_address(name, inputs[name].data_ptr()), f"the address of {name}")
        _accepted(context.set_tensor_address(OUTPUT, output.data_ptr()), "the address of the output")
        return max(1, context.update_device_memory_size_for_shapes())

    def _scratch(self, context: Any, size: int) -> torch.Tensor:
        """Gives a context memory; what is enqueued reads and writes it."""
        scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch.data_ptr(), size)
        else:  # older releases
            context.device_memory = scratch.data_ptr()
        return scratch

    def _context(self, profile: int, stream: torch.cuda.Stream, log: Log, final: bool = False) -> Any:
        """An execution context without memory; ``final``: kernels for its shapes are compiled before they run.

        Others run the engine's own kernels for any shape: those that were checked. By default ``tensorrt_rtx`` would
        compile new ones in the background, and go over to them whenever they are ready.
        """
        trt = self._messages.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialised = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialised is None:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = specialised.EAGER if final else specialised.NONE
            context = self._engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(profile, stream.cuda_stream):
            if log.errors():
                raise unavailable("TensorRT makes no execution context", log)
            raise DeviceMemoryError("TensorRT has no memory left for another execution context")
        if hasattr(context, "nvtx_verbosity"):  # as detailed as the engine by default, which enqueueing pays for
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        return context


def _accepted(answer: bool | None, what: str) -> None:
    """A context that refuses a shape or an address keeps those of the call before."""
    if answer is False:
        raise BackendUnavailableError(f"TensorRT refuses {what}")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """At an address that TensorRT takes."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _enqueue(context: Any, stream: torch.cuda.Stream, log: Log) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise unavailable("TensorRT did not run the engine", log)
