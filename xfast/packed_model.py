"""Models to and from packed artifacts: which parameters go where, and a model built around mapped files.

The products of the layers (and in int8 the word table) are stored packed, everything else of the model under its own
name. Loading builds the class without memory for its parameters and puts mapped ones in.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from xfast import _C, artifact, tokenizer_files
from xfast.architecture import LINEAR_ROLES, EncoderWeights, describe, find_encoders, output_dtype
from xfast.artifact import Manifest, Reader, Shapes, Staging
from xfast.backends.base import Engine, PackedBackend, choose
from xfast.backends.native import NativeBackend, NativeEngine
from xfast.backends.triton import TritonBackend
from xfast.errors import (
    ArtifactError,
    BackendUnavailableError,
    InvalidOptionError,
    UnsupportedModelError,
    XfastError,
)
from xfast.plan import FreedWeight, Plan, refuse_state_dict
from xfast.recipe import LINEARS, QUANTISED, PackedWeights, StoredFormat
from xfast.tensor_files import DTYPES, NAMES, Mapped, as_array, as_bytes, strict_json
from xfast.threads import get_num_threads

_TORCH_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_INITIALISERS = {"normal_", "_no_grad_normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_"}
_INITIALISERS |= {"constant_", "zero_", "fill_", "copy_", "mul_"}
_CLASS_NAME = re.compile(r"(transformers\.models(?:\.\w+)+):(\w+)")
BACKENDS: tuple[PackedBackend, ...] = (NativeBackend(), TritonBackend())
PackedLayer = Mapping[str, Mapping[str, np.ndarray]]


class _ParametersOnMeta(TorchFunctionMode):
    """Uninitialised memory, which is what modules make parameters of, has no memory; buffers are made as always.

    Initialising it changes nothing, and is left out: the meta device takes milliseconds for each call.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        filled = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in _INITIALISERS and getattr(filled, "is_meta", False):
            return filled
        return func(*args, **kwargs)


def skeleton(cls: type[nn.Module], config: Any, arguments: Mapping[str, bool]) -> nn.Module:
    """A model in eval mode whose weights are on the meta device and whose buffers have their values."""
    with _ParametersOnMeta(), torch.device("cpu"):
        return cls(config, **arguments).eval()


def config_of(cls: Any, content: dict[str, Any]) -> Any:
    """The config object that a model class takes."""
    return cls.config_class.from_dict(content)


def parameters_outside(root: nn.Module, encoder: nn.Module) -> set[int]:
    """Ids of the parameters that modules outside the encoder use."""
    inside = set(encoder.modules())
    return {id(p) for m in root.modules() if m not in inside for p in m.parameters(recurse=False)}


def full_name(encoder_path: str, inner: str) -> str:
    """What a tensor of the encoder is called in its model."""
    return f"{encoder_path}.{inner}" if encoder_path else inner


@dataclass(frozen=True)
class Contents:
    """How a model's tensors are divided. Names are those of its ``state_dict``.

    packed: stored in packed form only. stored: stored under their own names, widest type first. aliases: second names.
    """

    encoder_path: str
    weights: EncoderWeights
    packed: frozenset[str]
    packed_words: bool
    stored: dict[str, torch.Tensor]
    aliases: dict[str, str]

    def shapes(self) -> Shapes:
        """What the file of stored tensors holds."""
        return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.stored.items()}


def contents_of(root: nn.Module, precision: str) -> Contents:
    """Divides the tensors of a transformers model, of a skeleton too.

    Raises:
        UnsupportedModelError: not a model of transformers' own with one supported encoder, or one that was changed.
    """
    encoders = find_encoders(root)
    if len(encoders) != 1:
        raise UnsupportedModelError(
            f"{type(root).__name__} holds {len(encoders)} supported encoders; an artifact holds a model with one"
        )
    path, encoder, family = encoders[0]
    weights = describe(encoder, family)
    word = weights.modules[-1, "word"].weight
    packed_words = precision in QUANTISED and id(word) not in parameters_outside(root, encoder)
    alone = {(layer, role) for layer, role in weights.modules if layer >= 0 and role in LINEAR_ROLES}
    alone |= {(-1, "word")} if packed_words else set()
    packed = {full_name(path, f"{weights.names[at]}.weight") for at in alone}
    first: dict[int, str] = {}
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors_of(root):
        if name in packed:
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)], stored[name] = name, tensor
    if odd := {name: str(tensor.dtype) for name, tensor in stored.items() if tensor.dtype not in NAMES}:
        raise UnsupportedModelError(f"{type(root).__name__}: artifacts hold no tensors of these types: {odd}")
    order = list(DTYPES)
    widest_first = dict(sorted(stored.items(), key=lambda item: (order.index(NAMES[item[1].dtype]), item[0])))
    return Contents(path, weights, frozenset(packed), packed_words, widest_first, aliases)


def tensors_of(root: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under every name they have."""
    for prefix, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, tensor


def is_parameter(root: nn.Module, name: str) -> bool:
    """Whether a dotted name is a parameter's (else a buffer's)."""
    owner, _, leaf = name.rpartition(".")
    return leaf in root.get_submodule(owner)._parameters


def put(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replaces a parameter or buffer by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    places: Any = module._parameters if leaf in module._parameters else module._buffers
    places[leaf] = tensor


def check_saveable(root: Any, precision: str) -> None:
    """Refuses what loading could not build again.

    Raises:
        UnsupportedModelError: names what differs from the transformers class.
    """
    cls = type(root)
    known = isinstance(root, transformers.PreTrainedModel) and cls.__module__.startswith("transformers.models.")
    if not known:
        raise UnsupportedModelError(
            f"expected a model of one of transformers' own classes (or a pipeline with one), got {cls.__module__}."
            f"{cls.__name__}; save the transformers model inside it (of a SentenceTransformer: model[0].auto_model)"
        )
    fresh = skeleton(cls, copy.deepcopy(root.config), arguments_of(root))
    want, got = (
        {name: type(module) for name, module in model.named_modules()}
        | {name: tuple(tensor.shape) for name, tensor in tensors_of(model)}
        for model in (fresh, root)
    )
    if changed := sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name)):
        raise UnsupportedModelError(
            f"{cls.__name__} differs from what its config describes, so that loading could not build it again: "
            + ", ".join(changed[:5])
        )
    ours, theirs = (contents_of(model, precision) for model in (root, fresh))
    if ours.weights.spec != theirs.weights.spec:
        raise UnsupportedModelError(f"{cls.__name__}: its config was changed after it was built: {theirs.weights.spec}")
    if ours.packed_words != theirs.packed_words:
        raise UnsupportedModelError(
            f"{cls.__name__}: its word embeddings are {'not ' * ours.packed_words}tied to its decoder, other than its "
            f"config says; set model.config.tie_word_embeddings = {not ours.packed_words}"
        )


def arguments_of(root: nn.Module) -> dict[str, bool]:
    """What the class must be given beside the config: whether a bare encoder has a pooler."""
    bare = [module for name, module, _ in find_encoders(root) if not name]
    return {"add_pooling_layer": getattr(root, "pooler", None) is not None} if bare else {}


def write(
    staging: Staging,
    root: nn.Module,
    precision: str,
    layers: int | None,
    *,
    formats: Sequence[Mapping[str, StoredFormat]],
    packed_layer: Callable[[int], PackedLayer],
    packed_words: Callable[[], tuple[np.ndarray, np.ndarray]],
    value: Callable[[str], Any],
    unchanged: Callable[[], None] = lambda: None,
    advance: Callable[[str], None] = lambda name: None,
) -> Manifest:
    """Writes everything but the tokenizer's files, one layer after another, and commits.

    Args:
        staging: where to.
        root: the model, or a skeleton whose parameters have the types of the weights.
        precision: "fp32", "bf16", "int8" or "int4".
        formats: of each layer's products.
        layers: how many layers a loaded model runs, None = all.
        packed_layer: a layer's packed products.
        packed_words: the word table in 8 bits a value, and its scales; asked for only where it is packed.
        value: a stored tensor's bytes, by name.
        unchanged: raises if the weights are no longer what they were; asked before anything is moved into place.
        advance: told each file's name before it is written.
    """
    contents = contents_of(root, precision)
    spec = contents.weights.spec
    for layer in range(spec.num_layers):
        name, shapes = artifact.layer_file(layer), artifact.layer_tensors(spec, formats[layer])
        advance(name)

        def pieces(layer: int = layer, shapes: Shapes = shapes) -> Iterable[Any]:
            arrays = packed_layer(layer)
            return (arrays[key.partition(".")[0]][key.partition(".")[2]] for key in shapes)

        staging.tensors(name, shapes, pieces)
    if contents.packed_words:
        advance(artifact.WORDS)
        staging.tensors(artifact.WORDS, artifact.word_tensors(spec), lambda: packed_words()[::-1])
    advance(artifact.PARAMETERS)
    staging.tensors(artifact.PARAMETERS, contents.shapes(), lambda: (value(name) for name in contents.stored))
    staging.content(artifact.CONFIG, config_json(root))
    draft = _draft(root, contents, precision, layers, artifact.recipe_content(precision, formats))
    unchanged()
    return staging.commit(lambda records: dataclasses.replace(draft, files=dict(records)))


def _draft(
    root: nn.Module, contents: Contents, precision: str, layers: int | None, recipe: dict[str, dict[str, Any]]
) -> Manifest:
    """The manifest of a model without its files."""
    modules, spec = contents.weights.modules, contents.weights.spec
    return Manifest(
        layout=_C.pack_version,
        model_class=f"{type(root).__module__}:{type(root).__name__}",
        arguments=arguments_of(root),
        encoder=contents.encoder_path,
        precision=precision,
        layers=layers,
        recipe=recipe,
        spec=asdict(spec),
        linear_dtype=_name(modules[0, "query"].weight.dtype if spec.num_layers else torch.float32),
        word_dtype=_name(modules[-1, "word"].weight.dtype),
        packed_words=contents.packed_words,
        aliases=contents.aliases,
        files={},
    )


def save(root: nn.Module, plan: Plan, engine: NativeEngine, folder: Path, tokenizer: Any) -> None:
    """Writes an accelerated model. See :func:`xfast.save`."""
    contents = contents_of(root, engine.precision)
    word = contents.weights.modules[-1, "word"].weight

    def words() -> tuple[np.ndarray, np.ndarray]:
        held = engine.packed_words()
        if held is not None:
            return held
        return _C.quantize_rows(as_array(word), get_num_threads())

    staging = Staging(folder)
    try:
        source, commit = (getattr(root.config, name, None) for name in ("_name_or_path", "_commit_hash"))
        embeds = bool(arguments_of(root))
        tokenizer_files.write(staging, source or "", tokenizer, revision=commit, embeds=embeds)
        write(
            staging,
            root,
            engine.precision,
            plan.options.layers,
            formats=engine.formats,
            packed_layer=engine.packed_layer,
            packed_words=words,
            value=lambda name: as_bytes(contents.stored[name]),
        )
    except BaseException:
        staging.abandon()
        raise


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def config_json(root: Any) -> bytes:
    """config.json as save_pretrained would write it."""
    config = copy.deepcopy(root.config)
    config.architectures = [type(root).__name__]
    config._name_or_path = ""
    text: str = config.to_json_string()
    return text.encode()


@dataclass(frozen=True)
class Loaded:
    """A model built from an artifact, not patched yet."""

    model: nn.Module
    encoder: nn.Module
    engine: Engine
    backend_name: str
    manifest: Manifest
    freed: str


def load(folder: Path, verify: str, device: torch.device, backend: str) -> Loaded:
    """Builds the model of an artifact around its mapped files, or on another device from them.

    Args:
        folder: the artifact.
        verify: see :class:`xfast.artifact.Reader`.
        device: with its index.
        backend: "auto" or a name of ``BACKENDS``.

    Raises:
        ArtifactError: no artifact, damaged, or made for something that this version of transformers does not have.
        BackendUnavailableError: no backend runs it on the device.
    """
    reader = Reader(folder, verify)
    with reader.one_artifact():
        return _load(reader, device, backend)


def _load(reader: Reader, device: torch.device, backend: str) -> Loaded:
    folder, manifest = reader.folder, reader.manifest
    mapped, shapes = reader.tensors(artifact.PARAMETERS, None, copy_on_write=True)
    model, contents = _build(reader, len(shapes))
    spec = contents.weights.spec
    expected = (json.loads(json.dumps(asdict(spec))), contents.encoder_path, contents.packed_words)
    if expected != (manifest.spec, manifest.encoder, manifest.packed_words):
        raise ArtifactError(f"{folder}: {artifact.CONFIG} and {artifact.MANIFEST} describe different models")
    if manifest.layers is not None and not 0 <= manifest.layers <= spec.num_layers:
        raise ArtifactError(f"{folder}: layers {manifest.layers}; the model has {spec.num_layers}")
    _assign(model, contents, reader, mapped, shapes)
    freed = f"the original weights are not in the packed artifact {folder} that this model was loaded from"
    _give_up(contents, manifest, freed, folder, device)
    formats = artifact.formats_of(manifest, spec.num_layers)
    layers = [_packed_layer(reader, artifact.layer_file(i), spec, stored) for i, stored in enumerate(formats)]
    packed = PackedWeights(layers, formats, _packed_words(reader, spec) if contents.packed_words else None, str(folder))
    chosen, reasons = choose(BACKENDS, backend, spec, device, manifest.precision, packed.recipe())
    if chosen is None:
        raise BackendUnavailableError(f"{folder}: " + "; ".join(reasons))
    move(model, device)
    try:
        engine = chosen.adopt(contents.weights, manifest.precision, packed, device)
    except ValueError as error:  # the bindings check every size and pointer once more
        if isinstance(error, XfastError):
            raise
        raise ArtifactError(f"{folder}: {error}") from None
    model.config._name_or_path = str(folder.resolve())  # where saving it again finds the tokenizer
    return Loaded(model, model.get_submodule(contents.encoder_path), engine, chosen.name, manifest, freed)


def move(root: nn.Module, device: torch.device) -> None:
    """Brings parameters and buffers to a device, but those on the meta device, which have no values."""
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta and parameter.device != device:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def put_under(head: Any, loaded: Loaded) -> nn.Module:
    """Puts a loaded encoder under another model's head, in the place of that model's own, before anything is patched.

    Raises:
        InvalidOptionError: the head has no such place or no values, or its encoder has other sizes.
    """
    encoders = find_encoders(head) if isinstance(head, nn.Module) else []
    if len(encoders) != 1 or not encoders[0][0]:
        raise InvalidOptionError(f"head: expected a transformers model with one encoder under a head, got {type(head)}")
    path, own, family = encoders[0]
    want, got = loaded.engine.spec, describe(own, family).spec
    if differing := [name for name, value in asdict(want).items() if value != getattr(got, name)]:
        given = ", ".join(f"{name} {getattr(got, name)} for {getattr(want, name)}" for name in differing)
        raise InvalidOptionError(f"head: {type(head).__name__} is for another encoder than the artifact's: {given}")
    dtype, outside = output_dtype(loaded.encoder), parameters_outside(head, own)
    if other := {one.dtype for one in head.parameters() if id(one) in outside and one.dtype != dtype}:
        raise InvalidOptionError(
            f"head: {type(head).__name__} is in {other.pop()}; give head.to({dtype}), the artifact's"
        )
    lent = getattr(own, "pooler", None) if getattr(loaded.encoder, "pooler", None) is None else None
    used = parameters_outside(head, own) | {id(one) for one in (lent.parameters() if lent is not None else ())}
    parameters = head.named_parameters(remove_duplicate=False)
    if empty := [name for name, one in parameters if one.is_meta and id(one) in used]:
        raise InvalidOptionError(f"head: {empty[0]} is on the meta device: it has no values; load the head first")
    if lent is not None:
        loaded.encoder.pooler = lent
    owner, _, leaf = path.rpartition(".")
    setattr(head.get_submodule(owner), leaf, loaded.encoder)
    move(head, loaded.engine.device)
    return head.eval()


def _build(reader: Reader, stored: int) -> tuple[nn.Module, Contents]:
    """The model without its weights; ``stored``: how many tensors there are."""
    manifest, where = reader.manifest, reader.folder
    path = where / artifact.CONFIG
    config = strict_json(reader.content(artifact.CONFIG), path)
    artifact.refuse_huge(config, sum(record.bytes for record in manifest.files.values()), stored, path)
    named = _CLASS_NAME.fullmatch(manifest.model_class)
    try:
        cls = getattr(importlib.import_module(named[1]), named[2]) if named else None
    except (ImportError, AttributeError):
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ArtifactError(
            f"{where}: {manifest.model_class!r} is no model class of transformers {transformers.__version__}"
        )
    if not manifest.arguments.keys() <= {"add_pooling_layer"}:
        raise ArtifactError(f"{where}: arguments {sorted(manifest.arguments)}; accepted: add_pooling_layer")
    try:
        model = skeleton(cls, config_of(cls, config), manifest.arguments)
        return model, contents_of(model, manifest.precision)
    except Exception as error:  # whatever transformers raises for a config that is none
        raise ArtifactError(f"{where}: {cls.__name__} cannot be built from {artifact.CONFIG}: {error}") from error


def _assign(model: nn.Module, contents: Contents, reader: Reader, mapped: Mapped, shapes: Shapes) -> None:
    """Puts the stored tensors in, each as the same object under all its names."""
    where, aliases = reader.folder / artifact.PARAMETERS, reader.manifest.aliases
    names = {name: tuple(tensor.shape) for name, tensor in tensors_of(model) if name not in contents.packed}
    if names.keys() != shapes.keys() | aliases.keys() or not set(aliases.values()) <= shapes.keys():
        differing = sorted(names.keys() ^ (shapes.keys() | aliases.keys()))
        raise ArtifactError(f"{where}: holds other parameters than the model has: {', '.join(differing[:5])}")
    placed: dict[str, torch.Tensor] = {}
    for name, shape in names.items():
        stored = aliases.get(name, name)
        if shapes[stored][1] != shape:
            raise ArtifactError(f"{where}: {stored} has shape {shapes[stored][1]}, the model's {name} {shape}")
        if stored not in placed:
            tensor = mapped.tensor(stored)
            if is_parameter(model, name) and not tensor.is_floating_point():
                raise ArtifactError(f"{where}: {stored} is {shapes[stored][0]}; a parameter is a floating-point number")
            placed[stored] = nn.Parameter(tensor) if is_parameter(model, name) else tensor
        put(model, name, placed[stored])


def _give_up(contents: Contents, manifest: Manifest, freed: str, folder: Path, home: torch.device) -> None:
    """Packed weights have no values, the type that they had, and the device of the others."""
    for (layer, role), leaf in contents.weights.modules.items():
        name = full_name(contents.encoder_path, f"{contents.weights.names[layer, role]}.weight")
        if name not in contents.packed:
            continue
        dtype = _TORCH_NAMES.get(manifest.linear_dtype if layer >= 0 else manifest.word_dtype)
        if dtype is None or not dtype.is_floating_point:
            raise ArtifactError(f"{folder}: the weights' type is not one of float32, bfloat16 and float16")
        like = torch.empty(leaf.weight.shape, dtype=dtype, device="meta")
        leaf.weight = FreedWeight(like, home, freed, requires_grad=True)
        refuse_state_dict(leaf, freed)


def _packed_layer(reader: Reader, name: str, spec: Any, formats: Mapping[str, StoredFormat]) -> PackedLayer:
    mapped, _ = reader.tensors(name, artifact.layer_tensors(spec, formats))

    def arrays(linear: str) -> dict[str, np.ndarray]:
        parts = {"data": mapped.bytes_of(f"{linear}.data"), "bias": mapped.bytes_of(f"{linear}.bias").view(np.float32)}
        if formats[linear].smoothed:
            parts["column_scale"] = mapped.bytes_of(f"{linear}.column_scale").view(np.float32)
        if formats[linear].precision == "int8":
            parts["scale"] = mapped.bytes_of(f"{linear}.scale").view(np.float32)
            parts["compensation"] = mapped.bytes_of(f"{linear}.compensation").view(np.int32)
        return parts

    return {linear: arrays(linear) for linear in LINEARS}


def _packed_words(reader: Reader, spec: Any) -> tuple[np.ndarray, np.ndarray]:
    mapped, _ = reader.tensors(artifact.WORDS, artifact.word_tensors(spec))
    values = mapped.bytes_of("data").view(np.int8).reshape(spec.vocab_size, spec.hidden_size)
    return values, mapped.bytes_of("scale").view(np.float32)
