"""Builds engines: which shapes they take, the build itself with progress, and what a built engine says of itself.

Everything but ``inspect``'s last step works without a GPU where the runtime's builder does (``tensorrt_rtx``).
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

from xfast.architecture import EncoderWeights
from xfast.backends.tensorrt_runtime import Log, Runtime, find
from xfast.errors import InvalidInputError, InvalidOptionError, XfastError

NETWORK_VERSION = 2
"""Raised whenever the same weights and options would give another engine; part of the cache's key."""

BUCKETS = (32, 128, 512, 2048)
"""Upper lengths of the buckets below ``max_length``."""

TYPICAL_TOKENS = 4096
"""Tokens (padding included) of the batch that each bucket is tuned for."""

Range: TypeAlias = tuple[int, int, int]
"""Least, typical and largest size of a dimension."""

Progress: TypeAlias = Callable[[str, int, int], Any]
"""``progress(phase, step, total)``: steps done of a phase, 0 to total; returning False cancels the build."""

Populate: TypeAlias = Callable[[Any, Any], list[Any]]
"""``populate(trt, network)`` adds inputs, layers and outputs; returns the arrays that must outlive the build."""


class EngineBuildError(XfastError, RuntimeError):
    """TensorRT could not build an engine. ``messages`` are its own errors, the message holds them too."""

    def __init__(self, text: str, messages: Sequence[str] = ()) -> None:
        super().__init__("; ".join((text, *messages)))
        self.messages = tuple(messages)


class BuildCancelledError(XfastError, RuntimeError):
    """The progress callback returned False."""


@dataclass(frozen=True)
class Profile:
    """The batches that one optimisation profile takes: (least, typical, largest) tokens, sequences, padded length.

    Raises:
        InvalidOptionError: a range that is not ascending from 1, or more tokens than sequences of that length hold.
    """

    tokens: Range
    batch: Range
    length: Range

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "length"):
            sizes = getattr(self, name)
            if not _is_range(sizes):
                raise InvalidOptionError(f"profile {name}: {sizes!r} is not accepted; accepted: 1 <= min <= opt <= max")
        for index, place in enumerate(("min", "opt", "max")):
            most = self.batch[index] * self.length[index]
            if self.tokens[index] > most:
                raise InvalidOptionError(f"profile {place}: {self.tokens[index]} tokens do not fit, at most {most} do")

    def fits(self, tokens: int, batch: int, length: int) -> bool:
        """Whether a batch of these sizes can run in this profile."""
        given = ((tokens, self.tokens), (batch, self.batch), (length, self.length))
        return all(sizes[0] <= size <= sizes[2] for size, sizes in given)

    def sizes(self, dimension: str) -> Range:
        """The range of a network input's dimension: T tokens, B sequences, L columns, R rows that are wanted."""
        if dimension == "R":  # from a single row to all
            return 1, self.tokens[1], self.tokens[2]
        return {"T": self.tokens, "B": self.batch, "L": self.length}[dimension]

    def to_json(self) -> dict[str, list[int]]:
        """Its three ranges as lists."""
        return {"tokens": list(self.tokens), "batch": list(self.batch), "length": list(self.length)}


def _is_range(sizes: Any) -> bool:
    if not isinstance(sizes, tuple) or len(sizes) != 3 or not all(type(size) is int for size in sizes):
        return False
    least, typical, most = sizes
    return bool(1 <= least <= typical <= most < 2**31)


def profiles(
    max_tokens: int, max_batch: int, max_length: int, max_area: int | None = None, max_squares: int | None = None
) -> tuple[Profile, ...]:
    """Profiles by bucket of padded length, up to each of ``BUCKETS`` and ``max_length``, and one for a single sequence.

    Each is tuned for sequences of its full length, three quarters of them tokens, as many as make ``TYPICAL_TOKENS``;
    the one for single sequences, that latency is measured on, for 32 tokens. All of them begin at 1, so whatever fits
    one, its parts do, too. A single sequence always fits one, and without a limit of the padded area every batch within
    the other limits does.

    Args:
        max_tokens: most tokens of a batch, padding not counted.
        max_batch: most sequences.
        max_length: most columns, at most ``max_tokens``.
        max_area: most padded positions, B * L, of more than one sequence; None: any number.
        max_squares: most pairs of positions, B * L * L, of more than one sequence; None: any number.

    Raises:
        InvalidOptionError: a limit below 1, or ``max_length`` above ``max_tokens``.
    """
    limits = {"max_tokens": max_tokens, "max_batch": max_batch, "max_length": max_length}
    for name, value in limits.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise InvalidOptionError(f"{name}: {value!r} is not accepted; accepted: 1 to {2**31 - 1}")
    for name, most in (("max_area", max_area), ("max_squares", max_squares)):
        if most is not None and (type(most) is not int or most < 1):
            raise InvalidOptionError(f"{name}: {most!r} is not accepted; accepted: 1 or more, or None")
    if max_length > max_tokens:
        raise InvalidOptionError(f"max_tokens: {max_tokens} is less than one sequence of max_length={max_length}")
    made = []
    if max_batch > 1:
        typical = min(BUCKETS[0], max_length)
        made.append(Profile((1, typical, max_length), (1, 1, 1), (1, typical, max_length)))
    for length in (*(bucket for bucket in BUCKETS if bucket < max_length), max_length):
        areas = max_batch if max_area is None else max_area // length
        squares = max_batch if max_squares is None else max_squares // length**2
        sequences = max(1, min(max_batch, areas, squares))
        if sequences == 1 < max_batch:  # the first profile's
            continue
        batch = max(1, min(sequences, TYPICAL_TOKENS // length))
        most_tokens = min(max_tokens, sequences * length)
        tokens = min(most_tokens, -(-3 * batch * length // 4))
        made.append(Profile((1, tokens, most_tokens), (1, batch, sequences), (1, length, length)))
    return tuple(made)


def choose(profiles: Sequence[Profile], tokens: int, batch: int, length: int) -> int | None:
    """Index of the smallest profile that takes the batch, or None.

    The smallest is the one with the fewest padded positions at its largest, then fewest tokens, then the first.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.fits(tokens, batch, length)]
    return min(fitting, key=lambda index: (*_size(profiles[index]), index), default=None)


def _size(profile: Profile) -> tuple[int, int]:
    return profile.batch[2] * profile.length[2], profile.tokens[2]


def build(
    weights: EncoderWeights,
    precision: str,
    layers: int | None,
    profiles: Sequence[Profile],
    target: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    runtime: Runtime | None = None,
    log: Log | None = None,
) -> bytes:
    """Builds an encoder's engine. Its bytes differ from build to build, by what TensorRT writes into it.

    Args:
        weights: the encoder.
        precision: one of ``tensorrt_network.PRECISIONS``.
        layers: how many layers; None for all.
        profiles: at least one.
        target: see :meth:`Runtime.set_target`.
        progress: see ``Progress``; may be called from any thread. What it raises cancels the build and is raised here.
        runtime: None for the one that is found.
        log: takes TensorRT's messages. A verbose one is told the layers after fusion, too.

    Returns:
        The serialised engine.

    Raises:
        BackendUnavailableError: no TensorRT that is accepted.
        InvalidOptionError: precision, target or profiles.
        InvalidWeightsError: NaN, infinity, or values too large for the precision.
        EngineBuildError: TensorRT refused, e.g. because there is no GPU or no memory; its messages are attached.
        BuildCancelledError: ``progress`` returned False.
    """
    from xfast.backends.tensorrt_network import build_network

    def populate(trt: Any, network: Any) -> list[Any]:
        return list(build_network(trt, network, weights, precision, layers))

    runtime = find() if runtime is None else runtime
    return build_from(runtime, populate, profiles, target, progress, log=log)


def build_from(
    runtime: Runtime,
    populate: Populate,
    profiles: Sequence[Profile],
    target: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    log: Log | None = None,
) -> bytes:
    """As :func:`build`, for any strongly typed network whose inputs are among ``tensorrt_network.INPUTS``."""
    if not profiles:
        raise InvalidOptionError("profiles: none is given; at least one is needed")
    target = runtime.check_target(target) or None
    trt = runtime.module
    # a log of this build's own: an error of an earlier one is none of its
    with runtime.collecting() as own, nullcontext() if log is None else runtime.collecting(log):
        try:
            builder = trt.Builder(runtime.logger)
            network = builder.create_network(_network_flags(trt))
            network.name = "xfast"  # by default a counter of this process, which would change the engine's bytes
            arrays = populate(trt, network)
            config = _configure(runtime, builder, network, profiles, target)
            monitor = _monitor(trt, progress, runtime.logger)
            config.progress_monitor = monitor
            serialised = builder.build_serialized_network(network, config)
        except XfastError:
            raise
        except Exception as error:  # pybind11's: a factory that returned nullptr, a method that this version lacks
            raise _failure(runtime, target, own, f"{type(error).__name__}: {error}") from error
        if (raised := monitor.raised or runtime.logger.raised) is not None:
            raise raised
        if monitor.cancelled:
            raise BuildCancelledError("the build was cancelled by its progress callback")
        if serialised is None:
            raise _failure(runtime, target, own, "no engine was built")
        blob = bytes(serialised)
        del arrays  # TensorRT reads them up to here
    return blob


def _network_flags(trt: Any) -> int:
    # from TensorRT 11 on every network is strongly typed
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(
    runtime: Runtime, builder: Any, network: Any, profiles: Sequence[Profile], target: Sequence[str] | None
) -> Any:
    trt = runtime.module
    config = builder.create_builder_config()
    # On by default: fp32 products would have 10 bits of mantissa. No other precision uses it.
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # else large engines allocate while they run: no graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers, with dtypes, stay readable in the engine
    runtime.set_target(config, target)
    for profile in profiles:
        _add_profile(builder, network, config, profile)
    return config


def _add_profile(builder: Any, network: Any, config: Any, profile: Profile) -> None:
    from xfast.backends.tensorrt_network import INPUTS

    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in INPUTS:
            raise EngineBuildError(f"the network's input {name!r} has no known dimensions")
        ranges = [profile.sizes(dimension) for dimension in INPUTS[name]]
        made.set_shape(name, *(tuple(sizes[place] for sizes in ranges) for place in range(3)))
    if config.add_optimization_profile(made) < 0:
        raise EngineBuildError(f"TensorRT refuses {profile}")


def _failure(runtime: Runtime, target: Sequence[str] | None, log: Log, text: str) -> EngineBuildError:
    messages = log.errors()
    where = ", ".join(target) if target else "its default target"
    hint = []
    if any("cuda" in message.lower() for message in messages):
        if runtime.needs_gpu_to_build:
            hint = [f"{runtime.name} builds only where an NVIDIA GPU and its driver are"]
        elif target == ("CURRENT",):
            hint = ["without a GPU name a target: " + ", ".join(runtime.targets()[:-1])]
    return EngineBuildError("; ".join([f"{runtime.name} {runtime.version_text}, {where}: {text}", *hint]), messages)


def _monitor(trt: Any, progress: Progress | None, sink: Any) -> Any:
    """``sink``: the logger, whose ``raised`` is set when Ctrl-C comes while it runs."""
    sink.raised = None

    class Monitor(trt.IProgressMonitor):
        """Hands progress on. Nothing may be raised through TensorRT: it is kept and the build cancelled."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self.cancelled = False
            self._totals: dict[str, int] = {}
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._totals[phase_name] = num_steps
            self._report(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            # some phases end before their last step is reported
            self._report(phase_name, self._totals.get(phase_name, 0))

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self._totals.get(phase_name, step + 1)
            if step + 1 < total:  # the last one is reported by phase_finish
                self._report(phase_name, step + 1)
            if sink.raised is not None:
                self.raised, self.cancelled = sink.raised, True
            return not self.cancelled

        def _report(self, phase: str, step: int) -> None:
            if progress is None or self.cancelled:
                return
            try:
                self.cancelled = progress(phase, step, self._totals.get(phase, step)) is False
            except BaseException as error:  # KeyboardInterrupt arrives here or in the logger
                self.raised, self.cancelled = error, True

    return Monitor()


_HEADER = struct.Struct("<4s12xQ4B4xI")  # magic, bytes in all, version, targets as bits
_SECTIONS, _SECTION = 64, struct.Struct("<4s4xQQ")  # tag, offset, bytes
# The layout of a tensorrt_rtx plan is nowhere described; this is what 1.7.1 writes, and only 1.7 is read with it.
_HEADER_VERSION = (1, 7)
_HEADER_TARGETS = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
_MAGIC = {"tensorrt_rtx": b"vtrt"}


def inspect(runtime: Runtime, blob: bytes) -> dict[str, Any]:
    """What can be read of a serialised engine here.

    Without a GPU that is the header (``tensorrt_rtx`` only) and TensorRT's opinion of it: deserialising, and with it
    the inspector, needs a GPU even for engines built without.

    Returns:
        ``bytes``; ``header``: None when its layout is not known, else ``version``, ``bytes``, ``targets``, ``tf32``
        (whether any product may use it) and ``compiled_for`` (names such as ``sm89``), None where they are not known;
        ``validity`` and ``diagnostics`` as TensorRT names them (None and empty where it has no such check, INVALID
        where there is no GPU to judge for); ``engine``: None, or ``profiles``, ``inputs``, ``outputs`` (name, dtype,
        shape, for inputs a range a profile) and ``layers`` as the inspector has them; ``reason``: why it is None.

    Raises:
        InvalidInputError: not an engine of this runtime, cut short, or of another version.
    """
    trt, magic = runtime.module, _MAGIC.get(runtime.name)
    if magic is not None and (blob[:4] != magic or len(blob) < _HEADER.size):
        raise InvalidInputError(f"not an engine of {runtime.name}: it begins with {blob[:4]!r}")
    header = None if magic is None else _header(blob)
    if header is not None and header["bytes"] != len(blob):  # before TensorRT may read past its end
        raise InvalidInputError(f"the engine has {len(blob)} bytes, its header says {header['bytes']}")
    if header is not None and header["version"] != runtime.version_text:
        raise InvalidInputError(f"the engine was built by {header['version']}, this is {runtime.version_text}")
    facts: dict[str, Any] = {"bytes": len(blob), "header": header}
    with runtime.collecting() as log:
        try:
            reader = trt.Runtime(runtime.logger)
        except Exception as error:  # pybind11's, where no GPU is: a factory that returned nullptr
            log.add("ERROR", f"{type(error).__name__}: {error}")
            reader = None
        facts |= dict(zip(("validity", "diagnostics"), _validity(trt, reader, blob), strict=True))
        engine = None if reader is None else reader.deserialize_cuda_engine(blob)
        facts["engine"] = None if engine is None else _read_engine(trt, engine)
    facts["reason"] = None if engine is not None else "; ".join(log.errors()) or "TensorRT gives no reason"
    return facts


def _header(blob: bytes) -> dict[str, Any] | None:
    _, size, *version, bits = _HEADER.unpack_from(blob)
    facts: dict[str, Any] = {"version": ".".join(map(str, version)), "bytes": size}
    if tuple(version[:2]) != _HEADER_VERSION:
        return facts | {"targets": None, "tf32": None, "compiled_for": None}
    text = _engine_section(blob)
    tf32 = {match == b"1" for match in re.findall(rb"\btf32=([01])\b", text)}
    names = b" ".join(re.findall(rb"\baccelerators=\{([^}]*)\}", text)).split()
    return facts | {
        "targets": [
            _HEADER_TARGETS[bit] if bit < len(_HEADER_TARGETS) else f"bit {bit}" for bit in range(32) if bits >> bit & 1
        ],
        "tf32": any(tf32) if tf32 else None,
        "compiled_for": sorted({name.decode("ascii", "replace") for name in names if name != b"*"}),
    }


def _engine_section(blob: bytes) -> bytes:
    """The part with the compiled layers; the weights lie apart from it."""
    for place in range(_SECTIONS, min(len(blob) - _SECTION.size, _SECTIONS + 8 * _SECTION.size), _SECTION.size):
        tag, offset, size = _SECTION.unpack_from(blob, place)
        if tag == b"NGNE":
            return blob[offset : offset + size]
    return b""


def _validity(trt: Any, reader: Any, blob: bytes) -> tuple[str | None, list[str]]:
    if not hasattr(reader, "get_engine_validity"):
        return None, []
    validity, bits = reader.get_engine_validity(blob)
    members = trt.EngineInvalidityDiagnostics.__members__
    return validity.name, [name for name, value in members.items() if int(bits) & int(value)]


def _read_engine(trt: Any, engine: Any) -> dict[str, Any]:
    inputs, outputs = [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = list(engine.get_tensor_shape(name))
        tensor: dict[str, Any] = {"name": name, "dtype": engine.get_tensor_dtype(name).name, "shape": shape}
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            every = range(engine.num_optimization_profiles)
            ranges = [engine.get_tensor_profile_shape(name, profile) for profile in every]
            inputs.append(tensor | {"profiles": [[list(dims) for dims in places] for places in ranges]})
        else:
            outputs.append(tensor)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {
        "profiles": engine.num_optimization_profiles,
        "inputs": inputs,
        "outputs": outputs,
        "layers": json.loads(text).get("Layers", []),
    }
