"""The GPU backend: Triton kernels around cuBLASLt products, on packed tokens. Needs the package ``triton``.

A layer is eight launches (nine with fp8): QKV in one product, attention, the output projection added to the residual
stream, LayerNorm (which adds the projection's bias), the two FFN products with bias + GELU between them, LayerNorm.
Every launch takes its sizes from the host but its *lengths* from the device, so that a captured graph serves every
batch that fits its bucket (``backends/cuda_graphs.py``).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch

from xfast.architecture import EncoderSpec, EncoderWeights
from xfast.backends.base import unusual_norms
from xfast.backends.triton_weights import COMPUTED, Packer, Parameters, Rebinder, Unpacker, dtype_of, tensors_of
from xfast.errors import BackendUnavailableError
from xfast.recipe import QUANTISED, PackedWeights, Recipe, summary

if TYPE_CHECKING:
    from xfast.backends.triton_forward import TritonForward
    from xfast.device_packing import DevicePacked

MIN_CAPABILITY, MIN_FP8_CAPABILITY = 80, 89
_DIVISORS = "divisors are for quantised activations on the CPU: only weights are int8 and int4 here"


class TritonBackend:
    """Runs encoders on NVIDIA GPUs of compute capability 8.0 and later."""

    name = "triton"

    def supports(
        self, spec: EncoderSpec, device: torch.device, precision: str, recipe: Recipe | None = None
    ) -> str | None:
        """See :class:`xfast.backends.base.Backend`."""
        wanted = (precision, *(recipe.precisions() if recipe else ()))
        reason = _unavailable(device, "fp8" if "fp8" in wanted else precision)
        if reason is not None:
            return reason
        if precision not in COMPUTED:
            return f"precision {precision} is not available on the GPU; available: {', '.join(COMPUTED)}"
        if recipe is not None and (mixture := _impossible(precision, recipe)) is not None:
            return mixture
        if (unusual := unusual_norms(spec)) is not None:
            return unusual
        from xfast.kernels.attention import HEAD_DIMS  # not before triton is known to be there

        if spec.head_dim not in HEAD_DIMS:
            return f"head_dim {spec.head_dim} is not supported; supported: {', '.join(map(str, HEAD_DIMS))}"
        if "fp8" in wanted and (spec.hidden_size % 16 or spec.intermediate_size % 16):
            return "fp8 needs hidden_size and intermediate_size that are multiples of 16"
        return None

    def automatic(self, device: torch.device) -> bool:
        """See :class:`xfast.backends.base.Backend`. Not in the interpreter, which is for tests."""
        return device.type == "cuda"

    def compile(self, weights: EncoderWeights, precision: str, recipe: Recipe | None = None) -> TritonEngine:
        """See :class:`xfast.backends.base.Backend`."""
        packer = Packer(weights, precision, recipe or Recipe())
        return TritonEngine(weights.spec, weights.modules[-1, "word"].weight.device, packer)

    def adopt(
        self, weights: EncoderWeights, precision: str, packed: PackedWeights, device: torch.device
    ) -> TritonEngine:
        """See :class:`xfast.backends.base.PackedBackend`. Nothing of the packed memory is kept."""
        if any(stored.smoothed for products in packed.formats for stored in products.values()):
            raise BackendUnavailableError(f"{packed.origin}: {_DIVISORS}")
        return TritonEngine(weights.spec, device, Unpacker(weights, precision, packed, device))


def _impossible(precision: str, recipe: Recipe) -> str | None:
    """Why an encoder of this precision cannot have these products, or None."""
    computed = COMPUTED[precision]
    accepted = (computed, *QUANTISED, *(("fp8",) if computed == "bf16" else ()))
    for wanted in recipe.precisions():
        if wanted not in accepted:
            return f"products in {wanted} do not go with precision {precision}; accepted: {', '.join(accepted)}"
    if any(chosen.divisor is not None for chosen in recipe.linears.values()):
        return _DIVISORS
    return None


def _unavailable(device: torch.device, precision: str) -> str | None:
    """Why this device or installation cannot run the kernels, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"the model is on {device}, this backend runs on cuda"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    try:
        from xfast.kernels.launch import INTERPRETED, capability_of
    except Exception as error:  # a broken installation may raise anything
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if (device.type == "cpu") != INTERPRETED:
        return f"the model is on {device}, this backend runs on {'cpu (TRITON_INTERPRET=1)' if INTERPRETED else 'cuda'}"
    capability = capability_of(device)
    needed = MIN_FP8_CAPABILITY if precision == "fp8" else MIN_CAPABILITY
    if capability < needed:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability / 10}; {precision} needs {needed / 10} or later"
    return _driver_missing() if device.type == "cuda" else None


@functools.cache
def _driver_missing() -> str | None:
    """Why Triton cannot launch kernels, or None. It compiles its own launcher: that takes a C compiler."""
    try:
        import triton

        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        return f"triton cannot launch kernels: {type(error).__name__}: {error}"
    return None


class TritonEngine:
    """A packed encoder on the GPU. Thread-safe.

    Args:
        spec: the encoder's.
        device: where its parameters are.
        packer: makes them.
        parameters: in the packer's formats, where they are made already, for a few runs: nothing is captured.
    """

    def __init__(
        self, spec: EncoderSpec, device: torch.device, packer: Packer, parameters: Parameters | None = None
    ) -> None:
        from xfast.backends.triton_forward import TritonForward
        from xfast.backends.triton_graphs import GraphCache
        from xfast.kernels.launch import on

        self.precision, self.spec, self.device = packer.precision, spec, device
        packer.recipe.check(spec)
        self._formats = [packer.recipe.stored(layer, self.precision) for layer in range(spec.num_layers)]
        self._recipe = packer.recipe
        made = parameters or packer.pack()
        self._forward: TritonForward = TritonForward(spec, made, dtype_of(self.precision), device)
        with on(device):  # its stream and memory pool belong to a device
            self._graphs = GraphCache(self._forward, capture=parameters is None)
            self._packed = torch.cuda.Event() if device.type == "cuda" else None
            if self._packed is not None:
                self._packed.record()
        self._streams: set[int] = set()
        self._copied_bytes = packer.copied_bytes

    def unpad(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> DevicePacked:
        """See :class:`xfast.backends.base.Engine`."""
        from xfast.device_packing import unpad

        with torch.no_grad():
            return unpad(self.spec, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)

    def run(
        self,
        packed: DevicePacked,
        *,
        rows: torch.Tensor | None = None,
        layers: int | None = None,
        hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`xfast.backends.base.Engine`."""
        from xfast.kernels.launch import on

        layers = self.spec.num_layers if layers is None else layers
        with on(self.device), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._shared_with_stream()
            return self._graphs.run(packed, rows, layers, hidden_states)

    def _shared_with_stream(self) -> None:
        """Another stream than the one that packed waits for that, and memory is not reused before its work is done."""
        if self._packed is None or (stream := torch.cuda.current_stream()).cuda_stream in self._streams:
            return
        stream.wait_event(self._packed)
        for tensor in tensors_of(self._forward.parameters):
            tensor.record_stream(stream)
        self._streams.add(stream.cuda_stream)

    def for_copy(self, weights: EncoderWeights) -> TritonEngine:
        """See :class:`xfast.backends.base.Engine`."""
        packer = Rebinder(weights, self.precision, self._recipe, self._forward.parameters)
        return TritonEngine(self.spec, self.device, packer)

    def own_word_table(self) -> bool:
        """See :class:`xfast.backends.base.Engine`: the word embeddings are read in place."""
        return False

    def describe(self) -> list[str]:
        """See :class:`xfast.backends.base.Engine`."""
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            where = f"{torch.cuda.get_device_name(self.device)}, compute capability {major}.{minor}"
        else:
            where = "Triton's interpreter on the CPU: for tests, very slow"
        used = {stored.precision for layer in self._formats for stored in layer.values()}
        lines = [
            f"device: {where}",
            f"packed weights: {self._copied_bytes / 2**20:.1f} MiB (the rest is read in place)",
            "fused: QKV in one product; product + residual; bias + LayerNorm, bias + GELU"
            + (", each with per-token e4m3 quantisation" if "fp8" in used else "")
            + "; varlen attention over real tokens only",
            *summary(self._formats, self.precision),
            *self._graphs.describe(),
        ]
        if "fp8" in used:
            from xfast.kernels.gemm import refused_scaled

            lines += refused_scaled()
        if used & set(QUANTISED):
            lines.append("int8 and int4: weights only, multiplied as they are by activations that are not quantised")
        if self.precision == "fp32":
            from xfast.backends.triton_graphs import tf32

            lines.append(
                f"TF32 in matrix products: {'on' if tf32() else 'off'} (torch.backends.cuda.matmul); attention: off"
            )
        return lines
