"""A loaded TensorRT engine: deserialised, one execution context for each profile, run on the caller's stream.

Not yet run on a GPU: what can be tested without one is everything around it (``tests/test_tensorrt_backend.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from xfast.backends.tensorrt_network import DTYPES, INPUTS, OUTPUT
from xfast.backends.tensorrt_runtime import Runtime
from xfast.errors import BackendUnavailableError


class Session:
    """Runs one engine on one device. Thread-safe: calls take turns while they enqueue.

    Args:
        runtime: that built the engine.
        blob: the serialised engine.
        precision: of its output.
        hidden_size: columns of its output.
        device: a CUDA device.

    Raises:
        BackendUnavailableError: TensorRT does not take the engine on this device; its messages say why.
    """

    def __init__(self, runtime: Runtime, blob: bytes, precision: str, hidden_size: int, device: torch.device) -> None:
        self.device, self.dtype, self.hidden_size = device, DTYPES[precision], hidden_size
        self._lock = threading.Lock()
        with torch.cuda.device(device), runtime.collecting() as log:
            # the engine refers to its runtime, contexts to their engine: all are kept
            self._runtime = runtime.module.Runtime(runtime.logger)
            self._engine = self._runtime.deserialize_cuda_engine(blob)
            if self._engine is None:
                raise BackendUnavailableError(f"{runtime.name} does not load the engine: {'; '.join(log.errors())}")
        self._contexts: dict[int, Any] = {}
        self._messages = runtime

    def run(self, inputs: Mapping[str, torch.Tensor], profile: int) -> torch.Tensor:
        """[R, hidden_size] on the device.

        Args:
            inputs: the network's inputs, contiguous int32 on the device, of sizes that the profile takes.
            profile: its index.
        """
        stream = torch.cuda.current_stream(self.device)
        output = torch.empty(len(inputs["rows"]), self.hidden_size, dtype=self.dtype, device=self.device)
        with self._lock, torch.cuda.device(self.device), self._messages.collecting() as log:
            context = self._context(profile, stream.cuda_stream)
            for name in INPUTS:
                context.set_input_shape(name, tuple(inputs[name].shape))
                context.set_tensor_address(name, inputs[name].data_ptr())
            context.set_tensor_address(OUTPUT, output.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise BackendUnavailableError(f"TensorRT did not run the engine: {'; '.join(log.errors())}")
        for tensor in inputs.values():
            tensor.record_stream(stream)  # freed by Python now, read by the device later
        return output

    def _context(self, profile: int, stream: int) -> Any:
        """A context keeps its profile: switching one between calls would wait for the device."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, stream):
                raise BackendUnavailableError("TensorRT has no memory left for another execution context")
            self._contexts[profile] = context
        return self._contexts[profile]
