"""The TensorRT backend: engines built from the model description, kept on disk, checked before they are trusted.

Asked for by name (``backend="tensorrt"``): building takes seconds to minutes, the Triton backend needs none. The first
call builds the engine, or finds it in the cache; batches outside its profiles run the original code.

Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import TYPE_CHECKING, Protocol

import torch

from xfast.architecture import EncoderSpec, EncoderWeights
from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_check as judge
from xfast.backends import tensorrt_network as networks
from xfast.backends import tensorrt_runtime as runtimes
from xfast.backends import tensorrt_store as stores
from xfast.backends.base import CannotRunError
from xfast.backends.tensorrt_graphs import GraphRunner
from xfast.errors import BackendUnavailableError, XfastError
from xfast.recipe import Recipe

if TYPE_CHECKING:
    from xfast.device_packing import DevicePacked

MAX_TOKENS, MAX_BATCH = 32768, 256
"""Limits of the default profiles: what a batch may have, padding not counted."""

CHECKED_LENGTH = 128
"""Tokens of the longest sequence that a new engine is checked on."""


MIN_FP8_CAPABILITY = (8, 9)


class Runner(Protocol):
    """What runs a built engine: :class:`xfast.backends.tensorrt_graphs.GraphRunner`."""

    def run(self, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        """[R, hidden_size]."""
        ...

    def describe(self) -> list[str]:
        """Lines for ``explain``."""
        ...


class TensorRTBackend:
    """Runs encoders on NVIDIA GPUs through TensorRT."""

    name = "tensorrt"

    def supports(
        self, spec: EncoderSpec, device: torch.device, precision: str, recipe: Recipe | None = None
    ) -> str | None:
        """See :class:`xfast.backends.base.Backend`."""
        if recipe is not None:
            return "engines hold all products in one precision: no recipe"
        if device.type != "cuda":
            return f"the model is on {device}, this backend runs on cuda"
        if importlib.util.find_spec("triton") is None:
            return 'triton, which drops the padding, is not installed: pip install "xfast[triton]"'
        reason = networks.refusal(spec, precision)
        if reason is not None:
            return reason
        capability = torch.cuda.get_device_capability(device)
        if precision == "fp8" and capability < MIN_FP8_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {'.'.join(map(str, capability))}; fp8 needs 8.9 or later"
        try:
            runtimes.find()
        except XfastError as error:
            return str(error)
        return None

    def automatic(self, device: torch.device) -> bool:
        """See :class:`xfast.backends.base.Backend`: only by name."""
        return False

    def compile(self, weights: EncoderWeights, precision: str, recipe: Recipe | None = None) -> TensorRTEngine:
        """See :class:`xfast.backends.base.Backend`. The engine itself is built by the first call."""
        return TensorRTEngine(weights, precision)


class TensorRTEngine:
    """An encoder whose engines, one for each number of layers asked for, are built or found when first needed."""

    def __init__(self, weights: EncoderWeights, precision: str, store: stores.Store | None = None) -> None:
        self.precision = precision
        self.spec = weights.spec
        self.device = weights.modules[-1, "word"].weight.device
        self.profiles = default_profiles(self.spec)
        self._weights = weights
        self._store = store
        self._lock = threading.Lock()
        self._runners: dict[int, Runner] = {}
        self._refused: dict[int, str] = {}
        self._notes: list[str] = []

    def unpad(self, *inputs: torch.Tensor | None, **named: torch.Tensor | None) -> DevicePacked:
        """See :class:`xfast.backends.base.Engine`."""
        from xfast.device_packing import unpad

        with torch.no_grad():
            return unpad(self.spec, *inputs, **named)

    def run(
        self,
        packed: DevicePacked,
        *,
        rows: torch.Tensor | None = None,
        layers: int | None = None,
        hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`xfast.backends.base.Engine`.

        Raises:
            CannotRunError: hidden states or embeddings are asked for, the batch is outside all profiles, or the engine
                was refused: the original code runs.
        """
        if hidden_states:
            raise CannotRunError("TensorRT: hidden states were asked for")
        if packed.embeds is not None:
            raise CannotRunError("TensorRT: inputs_embeds were given")
        tokens, batch, length = packed.total_tokens, packed.batch, packed.max_seqlen
        if tokens == 0 or (rows is not None and not len(rows)):
            return torch.zeros(0, self.spec.hidden_size, device=self.device), None
        profile = builder.choose(self.profiles, tokens, batch, length)
        if profile is None:
            raise CannotRunError(f"TensorRT: {tokens} tokens in {batch} sequences are outside the profiles")
        with torch.no_grad():
            inputs = network_inputs(packed, rows)
            return self._runner(self.spec.num_layers if layers is None else layers).run(inputs, profile), None

    def _runner(self, layers: int) -> Runner:
        with self._lock:
            if layers in self._refused:
                raise CannotRunError(self._refused[layers])
            if layers not in self._runners:
                try:
                    self._runners[layers] = self._made(layers)
                except XfastError as error:  # remembered: a failed build is not repeated at every call
                    self._refused[layers] = f"TensorRT: {error}"
                    raise CannotRunError(self._refused[layers]) from error
            return self._runners[layers]

    def _made(self, layers: int) -> Runner:
        """From the cache or built, and checked in either case: a file cannot prove that it computes the right thing."""
        runtime = runtimes.find()
        store, key, blob = self._stored(runtime, layers)
        found = blob is not None
        if blob is None:
            target = "CURRENT" if "CURRENT" in runtime.targets() else None
            with torch.cuda.device(self.device):
                blob = builder.build(self._weights, self.precision, layers, self.profiles, target, runtime=runtime)
        runner = self._load(runtime, blob, layers)
        report = self._check(runner, layers)
        if not found:
            store.save(key, blob)
        self._notes.append(f"engine of {layers} layers: {'from the cache' if found else 'built'}, {report}")
        return runner

    def _stored(self, runtime: runtimes.Runtime, layers: int) -> tuple[stores.Store, stores.Key, bytes | None]:
        """(store, key of an engine built on this very GPU, an engine: that, or one built for its capability)."""
        store = stores.Store() if self._store is None else self._store
        digest = stores.digest(self._weights)
        major, minor = torch.cuda.get_device_capability(self.device)
        keys = [
            key_of(digest, self.spec, self.precision, layers, runtime, target)
            for target in (torch.cuda.get_device_name(self.device), f"SM{major}{minor}")
        ]
        return store, keys[0], next(filter(None, map(store.load, keys)), None)

    def verify(self, layers: int) -> judge.Report:
        """The store's engine for this GPU beside PyTorch. Builds none.

        Raises:
            BackendUnavailableError: the store has none, or it does not load.
            EngineRejectedError: it differs by more than its precision explains.
        """
        runtime = runtimes.find()
        store, _, blob = self._stored(runtime, layers)
        if blob is None:
            raise BackendUnavailableError(f"{store.folder} has no engine of this model for this GPU: {store.notes}")
        return self._check(self._load(runtime, blob, layers), layers)

    def _load(self, runtime: runtimes.Runtime, blob: bytes, layers: int) -> Runner:
        from xfast.backends.tensorrt_session import Session

        with torch.cuda.device(self.device):  # the graphs' stream and memory pool belong to a device
            dtype = networks.output_dtype(self.spec, self.precision, layers)
            session = Session(runtime, blob, dtype, self.spec.hidden_size, self.device)
            return GraphRunner(session, self.profiles)

    def _check(self, runner: Runner, layers: int) -> judge.Report:
        def run(case: judge.Case) -> torch.Tensor:
            inputs = case_inputs(case)
            profile = builder.choose(self.profiles, len(case.ids), len(case.lengths), max(case.lengths))
            assert profile is not None  # the cases are within every model's limits
            return runner.run(inputs, profile)

        cases = judge.cases(self.spec, CHECKED_LENGTH, self.device)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # the engine computes no TF32: what it is held to must not either
        try:
            with torch.autocast(self.device.type, enabled=False):
                return judge.check(run, self._weights, self.precision, layers, cases)
        finally:
            torch.set_float32_matmul_precision(before)

    def own_word_table(self) -> bool:
        """See :class:`xfast.backends.base.Engine`: the engine has its own copy, but a rebuild needs the original."""
        return False

    def describe(self) -> list[str]:
        """See :class:`xfast.backends.base.Engine`."""
        largest = self.profiles[-1]
        return [
            f"device: {torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else self.device}",
            "fused: what TensorRT chooses, on packed tokens; attention alone is padded",
            f"profiles: {len(self.profiles)}, up to {largest.tokens[2]} tokens, {largest.batch[2]} sequences",
            *(self._notes or ["no engine yet: the first call builds it"]),
            *(line for runner in self._runners.values() for line in runner.describe()),
            *self._refused.values(),
        ]


def default_profiles(spec: EncoderSpec) -> tuple[builder.Profile, ...]:
    """For batches of up to ``MAX_BATCH`` sequences of any length the model takes, ``MAX_TOKENS`` tokens together."""
    longest = spec.usable_positions
    return builder.profiles(max(MAX_TOKENS, longest), MAX_BATCH, longest)


def key_of(
    digest: str, spec: EncoderSpec, precision: str, layers: int, runtime: runtimes.Runtime, target: str
) -> stores.Key:
    """The store's key of an engine with the default profiles."""
    profiles = default_profiles(spec)
    return stores.Key(digest, spec, precision, layers, profiles, runtime.name, runtime.version_text, target)


def network_inputs(packed: DevicePacked, rows: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The network's inputs for a batch, made on its device without waiting for it."""
    tokens = packed.total_tokens
    offsets = packed.rows.cu_seqlens
    return {
        "token_ids": packed.rows.ids[:tokens].contiguous(),
        "position_ids": packed.rows.position_ids[:tokens].contiguous(),
        "type_ids": packed.rows.type_ids[:tokens].contiguous(),
        **places(offsets, tokens, packed.max_seqlen),
        "rows": _all_rows(tokens, offsets.device) if rows is None else rows.to(torch.int32).contiguous(),
    }


def case_inputs(case: judge.Case) -> dict[str, torch.Tensor]:
    """The same for a sample batch, with all rows."""
    device = case.ids.device
    offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0, dtype=torch.int32)
    return {
        "token_ids": case.ids,
        "position_ids": case.positions,
        "type_ids": case.types,
        **places(offsets, len(case.ids), max(case.lengths)),
        "rows": _all_rows(len(case.ids), device),
    }


def _all_rows(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.arange(tokens, dtype=torch.int32, device=device)


def places(offsets: torch.Tensor, tokens: int, longest: int) -> dict[str, torch.Tensor]:
    """Where attention's padded batch takes each place from, and where each token finds its result again.

    Args:
        offsets: int32 [B + 1], ``cu_seqlens``.
        tokens: T.
        longest: L, tokens of the longest sequence.
    """
    begin, end = offsets[:-1, None], offsets[1:, None]
    columns = torch.arange(longest, dtype=torch.int32, device=offsets.device)[None]
    rows = begin + columns
    packed = torch.arange(tokens, dtype=torch.int32, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), packed, right=True, out_int32=True)
    return {
        "padded_rows": torch.where(rows < end, rows, 0).contiguous(),
        # an empty sequence counts as one token, which nobody reads
        "lengths": (offsets[1:] - offsets[:-1]).clamp(min=1).contiguous(),
        "packed_columns": (sequence * longest + packed - offsets[sequence]).to(torch.int32).contiguous(),
    }
