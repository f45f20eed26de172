"""The TensorRT backend: engines built from the model description, kept on disk, checked before they are trusted.

Asked for by name (``backend="tensorrt"``): building takes seconds to minutes, the Triton backend needs none. The first
call builds the engine, or finds it in the cache; batches larger than its profiles run in parts.

Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from xfast.architecture import EncoderSpec, EncoderWeights
from xfast.backends import tensorrt_build as builder
from xfast.backends import tensorrt_check as judge
from xfast.backends import tensorrt_network as networks
from xfast.backends import tensorrt_runtime as runtimes
from xfast.backends import tensorrt_store as stores
from xfast.backends.base import CannotRunError, EngineRefusedError
from xfast.backends.cuda_graphs import empty_cache
from xfast.backends.parameters import ParameterReader
from xfast.backends.tensorrt_graphs import GraphRunner
from xfast.backends.tensorrt_inputs import Sequences
from xfast.errors import BackendUnavailableError, XfastError, in_short
from xfast.recipe import Recipe

if TYPE_CHECKING:
    from xfast.device_packing import DevicePacked

MAX_TOKENS, MAX_BATCH = 32768, 256
"""Limits of the default profiles: what a batch may have, padding not counted."""

MAX_PADDED_AREA = 256 * 512
"""Padded positions, B * L, of a default profile: attention alone computes them, but its inputs take memory for each."""

MAX_SCORES = 2**31
"""Attention scores of a default profile, B * heads * L * L, where attention is not fused: 8 GiB, and twice in memory.
The builder of 1.7.1 refuses what takes more than 64 GiB."""

MIN_FP8_CAPABILITY = (8, 9)

MIN_PAUSE, MAX_PAUSE = 30, 1800
"""Seconds before an engine for which there was no memory is tried again: twice as many each time. Calls wait for it."""


class Runner(Protocol):
    """What runs a built engine: :class:`xfast.backends.tensorrt_graphs.GraphRunner`."""

    bound: float | None

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
            return "triton, which drops the padding, is not installed: pip install triton"
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
        """See :class:`xfast.backends.base.Backend`. The engine itself is built by the first call.

        Raises:
            InvalidWeightsError: a weight has no values, or holds NaN or infinity.
        """
        reader = ParameterReader(weights)
        for layer, role in weights.modules:  # now: an engine is built by the first call, and whoever asked is gone then
            for name in ("weight", "bias"):
                if reader.has(layer, role, name):
                    reader.read(layer, role, name)
        return TensorRTEngine(weights, precision)


@dataclass(frozen=True)
class _Pause:
    """After a failure for want of memory: why, for how many seconds, and until when on the monotonic clock."""

    reason: str
    seconds: float
    until: float


def _is_memory(error: Exception) -> bool:
    """Whether it says that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | runtimes.DeviceMemoryError)


class TensorRTEngine:
    """An encoder whose engines, one for each number of layers asked for, are built or found when first needed."""

    def __init__(self, weights: EncoderWeights, precision: str, store: stores.Store | None = None) -> None:
        self.precision = precision
        self.spec = weights.spec
        self.device = weights.modules[-1, "word"].weight.device
        self._runtime = runtimes.find()  # once: profiles depend on it, and a variable may name another later
        self.profiles = default_profiles(self.spec, precision, self._runtime)
        self._weights = weights
        self._store = store
        self._cache_bytes = stores.size_limit()
        self._lock = threading.Lock()
        self._runners: dict[int, Runner] = {}
        self._refused: dict[int, str] = {}
        self._pauses: dict[int, _Pause] = {}
        self._notes: list[str] = []

    def for_copy(self, weights: EncoderWeights) -> TensorRTEngine:
        """See :class:`xfast.backends.base.Engine`: an engine of TensorRT's holds all of its weights."""
        return self

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
            CannotRunError: hidden states or embeddings are asked for, there is no memory, or the engine was refused:
                the original code runs.
        """
        if hidden_states:
            raise CannotRunError("TensorRT: hidden states were asked for")
        if packed.embeds is not None:
            raise CannotRunError("TensorRT: inputs_embeds were given")
        if packed.total_tokens == 0 or (rows is not None and not len(rows)):
            return torch.zeros(0, self.spec.hidden_size, device=self.device), None
        runner = self._runner(self.spec.num_layers if layers is None else layers)
        try:
            with torch.no_grad():
                return self._run(runner, Sequences.of(packed), rows), None
        except (XfastError, torch.OutOfMemoryError) as error:  # the original may need less
            raise CannotRunError(f"TensorRT: {in_short(error)}") from error

    def _run(self, runner: Runner, sequences: Sequences, rows: torch.Tensor | None) -> torch.Tensor:
        """In one go, or where that is more than any profile takes in parts of whole sequences."""
        profile = builder.choose(self.profiles, sequences.tokens, sequences.batch, sequences.longest)
        if profile is not None:
            return runner.run(sequences.inputs(rows), profile)
        longest = max(each.length[2] for each in self.profiles)
        if sequences.longest > longest:
            raise CannotRunError(f"TensorRT: a sequence is longer than {longest} tokens")
        found = []
        for part, wanted in sequences.parts(rows, lambda *sizes: builder.choose(self.profiles, *sizes) is not None):
            if part.tokens and (wanted is None or len(wanted)):
                profile = builder.choose(self.profiles, part.tokens, part.batch, part.longest)
                assert profile is not None
                found.append(runner.run(part.inputs(wanted), profile))
        return torch.cat(found)

    def _runner(self, layers: int) -> Runner:
        with self._lock:
            if layers in self._runners:
                return self._runners[layers]
            if layers in self._refused:
                raise EngineRefusedError(self._refused[layers])
            pause = self._pauses.get(layers)
            if pause is not None and time.monotonic() < pause.until:
                raise CannotRunError(pause.reason)
            try:
                self._runners[layers] = self._made(layers)
            except Exception as error:
                raise self._failed(layers, error) from error
            self._pauses.pop(layers, None)
            return self._runners[layers]

    def _failed(self, layers: int, error: Exception) -> CannotRunError:
        """Remembers why there is no engine: for good, or where memory was missing until it is tried again."""
        if not self._passes(error):  # a failed build is not repeated at every call
            kind = "" if isinstance(error, XfastError) else f"{type(error).__name__}: "
            self._refused[layers] = f"TensorRT: {kind}{error}"
            return EngineRefusedError(self._refused[layers])
        before = self._pauses.get(layers)
        seconds = MIN_PAUSE if before is None else min(2 * before.seconds, MAX_PAUSE)
        # the same words each time: fallbacks are counted by reason
        reason = f"TensorRT: {in_short(error)}; tried again later"
        self._pauses[layers] = _Pause(reason, seconds, time.monotonic() + seconds)
        if before is None:
            text = f"the original code runs; tried again after {MIN_PAUSE} s, then at growing intervals"
            warnings.warn(f"TensorRT: {in_short(error)}; {text}", RuntimeWarning, stacklevel=2)
        return CannotRunError(reason)

    def _passes(self, error: Exception) -> bool:
        """Whether it is memory that is missing, and not more of it than the device has."""
        if isinstance(error, builder.EngineBuildError):
            cuda = self.device.type == "cuda"
            total = torch.cuda.get_device_properties(self.device).total_memory if cuda else None
            return runtimes.wants_memory([str(error)], total)  # torch's, while weights were read, is in its text alone
        return _is_memory(error)

    def _made(self, layers: int) -> Runner:
        """From the cache or built, and checked in either case: a file cannot prove that it computes the right thing."""
        runtime = self._runtime
        store = self._store or stores.Store()
        keys = self._keys(runtime, layers)
        for key in keys:
            runner = self._from_store(runtime, store, key)
            if runner is not None:
                return runner
        target = "CURRENT" if "CURRENT" in runtime.targets() else None
        with torch.cuda.device(self.device):
            empty_cache()
            blob = builder.build(self._weights, self.precision, layers, self.profiles, target, runtime=runtime)
        runner = None
        try:
            runner = self._load(runtime, blob, layers)
            report = self._check(runner, layers)
        except judge.EngineRejectedError:
            raise
        except Exception as error:
            if runner is not None or _is_memory(error):
                self._save(store, keys[0], blob)  # no fault of the engine's: it is checked again, but not built again
            raise
        self._notes.append(f"engine of {layers} layers: built, {report}")
        reason = self._save(store, keys[0], blob)
        if reason is not None:
            self._notes.append(f"it is not in the cache, so every process builds it: {reason}")
            warnings.warn(f"TensorRT: {self._notes[-1]}", RuntimeWarning, stacklevel=2)
        return runner

    def _save(self, store: stores.Store, key: stores.Key, blob: bytes) -> str | None:
        """Puts an engine into the store, and makes room for it; says why it could not."""
        if stores.digest(self._weights) != key.weights:  # it was built from both, or from the new ones
            return "the weights changed while it was built"
        if store.save(key, blob) is None:
            return store.notes[-1]
        removed = store.prune(self._cache_bytes, held=False)
        if removed:
            limit = f"{self._cache_bytes} bytes ({stores.SIZE_VARIABLE})"
            self._notes.append(f"the cache may hold {limit}, so least recently used engines went: {', '.join(removed)}")
        return None

    def _from_store(self, runtime: runtimes.Runtime, store: stores.Store, key: stores.Key) -> Runner | None:
        """A stored engine; None where there is none that loads and computes what it should: then it is built anew."""
        before = store.reasons["absent"]
        blob = store.load(key)
        if blob is None:
            if store.reasons["absent"] == before:
                self._notes.append(f"a stored engine was not used: {store.notes[-1]}")
            return None
        try:
            runner = self._load(runtime, blob, key.layers)
            report = self._check(runner, key.layers)
        except runtimes.DeviceMemoryError:
            raise  # building takes more memory, and the engine is none the worse
        except XfastError as error:
            self._notes.append(f"the stored engine for {key.target} was not used: {error}")
            return None
        self._notes.append(f"engine of {key.layers} layers: from the cache, {report}")
        return runner

    def _keys(self, runtime: runtimes.Runtime, layers: int) -> list[stores.Key]:
        """Keys of an engine that was built on this very GPU, and of one for its compute capability."""
        digest = stores.digest(self._weights)
        major, minor = torch.cuda.get_device_capability(self.device)
        return [
            key_of(digest, self.spec, self.precision, layers, runtime, target)
            for target in (torch.cuda.get_device_name(self.device), f"SM{major}{minor}")
        ]

    def verify(self, layers: int) -> judge.Report:
        """The store's engine for this GPU beside PyTorch. Builds none.

        Raises:
            BackendUnavailableError: the store has none, or it does not load.
            EngineRejectedError: it differs by more than its precision explains.
        """
        runtime = self._runtime
        store = self._store or stores.Store()
        blob = next(filter(None, map(store.load, self._keys(runtime, layers))), None)
        if blob is None:
            raise BackendUnavailableError(f"{store.folder} has no engine of this model for this GPU: {store.notes}")
        return self._check(self._load(runtime, blob, layers), layers)

    def _load(self, runtime: runtimes.Runtime, blob: bytes, layers: int) -> Runner:
        from xfast.backends.tensorrt_session import Session

        with torch.cuda.device(self.device):  # the graphs' stream and memory pool belong to a device
            empty_cache()
            dtype = networks.output_dtype(self.spec, self.precision, layers)
            session = Session(runtime, blob, dtype, self.spec.hidden_size, self.device)
            return GraphRunner(session, self.profiles)

    def _check(self, runner: Runner, layers: int) -> judge.Report:
        def run(case: judge.Case) -> torch.Tensor:
            return self._run(runner, sequences_of(case), case.rows)

        cases = judge.cases(self.spec, checked_shapes(self.profiles), self.device)
        with torch.autocast(self.device.type, enabled=False), judge.true_fp32():
            report = judge.check(run, self._weights, self.precision, layers, cases)
        runner.bound = report.bound
        return report

    def own_word_table(self) -> bool:
        """See :class:`xfast.backends.base.Engine`: the engine has its own copy, but a rebuild needs the original."""
        return False

    def describe(self) -> list[str]:
        """See :class:`xfast.backends.base.Engine`."""
        most = {name: max(getattr(each, name)[2] for each in self.profiles) for name in ("tokens", "batch")}
        # copies: a call on another thread may be adding to them, and holds the lock for as long as a build takes
        runners, refused, pauses = list(self._runners.values()), self._refused.copy(), list(self._pauses.values())
        return [
            f"device: {torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else self.device}",
            "fused: what TensorRT chooses, on packed tokens; attention alone is padded",
            f"profiles: {len(self.profiles)}, up to {most['tokens']} tokens, {most['batch']} sequences",
            *(self._notes or ["no engine yet: the first call builds it"]),
            *(line for runner in runners for line in runner.describe()),
            *refused.values(),
            *(pause.reason for pause in pauses),
        ]


def default_profiles(spec: EncoderSpec, precision: str, runtime: runtimes.Runtime) -> tuple[builder.Profile, ...]:
    """For batches of up to ``MAX_BATCH`` sequences of any length the model takes, ``MAX_TOKENS`` tokens together.

    Of long sequences fewer: as many as ``MAX_PADDED_AREA`` and, where attention is not fused, ``MAX_SCORES`` allow.
    """
    longest = spec.usable_positions
    decomposed = networks.decomposes_attention(runtime.module, spec.head_dim, precision)
    squares = max(1, MAX_SCORES // spec.num_heads) if decomposed else None
    return builder.profiles(max(MAX_TOKENS, longest), MAX_BATCH, longest, MAX_PADDED_AREA, squares)


def checked_shapes(profiles: Sequence[builder.Profile]) -> list[tuple[int, ...]]:
    """Lengths of sequences for each profile, whose kernels are its own: what a new engine is checked on."""
    shapes: list[tuple[int, ...]] = [(1,)]
    for profile in profiles:
        longest, few = profile.length[2], min(9, profile.length[2])
        if profile.batch[2] > 1:  # else it is the one for a single sequence that would take it
            longest = min(longest, profile.tokens[2] - few)
        lengths = [longest]
        for length in (few, 1, -(-longest // 2), 2):
            if profile.fits(sum(lengths) + length, len(lengths) + 1, longest):
                lengths.append(length)
        shapes.append((*lengths[1:2], longest, *lengths[2:]))  # the longest not where all begins
    return shapes


def sequences_of(case: judge.Case) -> Sequences:
    """A sample batch as the network takes it."""
    offsets = torch.tensor([0, *case.lengths], device=case.ids.device).cumsum(0, dtype=torch.int32)
    return Sequences(case.ids, case.positions, case.types, offsets, max(case.lengths))


def key_of(
    digest: str, spec: EncoderSpec, precision: str, layers: int, runtime: runtimes.Runtime, target: str
) -> stores.Key:
    """The store's key of an engine with the default profiles."""
    profiles = default_profiles(spec, precision, runtime)
    return stores.Key(digest, spec, precision, layers, profiles, runtime.name, runtime.version_text, target)
