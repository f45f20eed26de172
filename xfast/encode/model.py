"""A model as a job sees it: what its head computes, what identifies it, and the accelerated model itself."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import xfast
from xfast import artifact, tensor_files, tokenizer_files
from xfast.architecture import FAMILIES, check_class, describe, find_encoders, supported_families
from xfast.encode import outputs
from xfast.encode.rows import text_columns
from xfast.encode.sentences import Sentences, hub_file, pinned, sentences_of
from xfast.encode.settings import BATCH_TOKENS, Execution, Settings
from xfast.encode.tokens import Batch, Tokenizer
from xfast.errors import DataFileError, InvalidOptionError, InvalidWeightsError, UnsupportedModelError, XfastError
from xfast.logs import quiet_transformers

_EMBEDDED = ("Model", "ForMaskedLM")
_CLASSES, _TAGS = "ForSequenceClassification", "ForTokenClassification"
_PARTS = (".json", ".safetensors", ".bin", ".model", ".txt")  # of a checkpoint or a tokenizer
_BYTES = 1 << 20


@dataclass(frozen=True)
class Head:
    """What a job reads from the model.

    Attributes:
        kind: "vector", "tokens", "classes", "relevance" or "tags".
        columns: that the output gets.
        labels: names, in the order of the model's outputs.
        pooling, normalize: of vectors: as the job has it, or the model says.
        prefix: put before every text: as the job has it, or the model says.
        max_length, lower: of texts, as the model says.
        revision, tokenizer_revision: commits on the Hub; None: a folder.
        files: what identifies the files of the model and the tokenizer.
    """

    kind: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    pooling: str = "mean"
    normalize: bool = False
    prefix: str = ""
    max_length: int | None = None
    lower: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    files: str = ""


def head_of(settings: Settings) -> tuple[Head, str]:
    """The head, and what identifies the model and the tokenizer: a hash of a folder's files, a Hub's revision.

    Of a packed artifact the weights are not read for it: they are verified by the hashes in its manifest.

    Raises:
        DataFileError: no such model.
        ArtifactError: a packed artifact that is damaged.
        UnsupportedModelError: a head that makes neither embeddings nor predictions of these kinds.
        InvalidOptionError: ``content`` or the pair column does not go with the head.
    """
    manifest = _packed(settings)
    try:
        config = transformers.AutoConfig.from_pretrained(settings.model)  # whose words for what is not there are known
        revision = revision_of(settings.model, "config.json")
        if revision is not None:
            config = transformers.AutoConfig.from_pretrained(settings.model, revision=revision)
    except XfastError:
        raise
    except Exception as error:  # transformers' checks of single fields raise their own kinds
        if not isinstance(error, OSError) or tensor_files.is_folder(Path(settings.model)):
            raise DataFileError(f"model: {settings.model}: {error}") from None
        raise DataFileError(
            f"model: {settings.model}: no such folder, and no model that the Hub or its cache has; expected a folder "
            f"with a config.json, a packed artifact or a Hub id (transformers says: {error})"
        ) from None
    tokens = revision if settings.tokenizer is None else _tokenizer_revision(settings.tokenizer)
    identity = files = _files_identity(settings, revision, tokens)
    name = _architecture(config, settings) if manifest is None else _packed_class(manifest, settings)
    head = _head(name, config, settings)
    if head.kind != "tags":
        head, said = _as_sentences(head, settings, revision)
        identity += said
    return replace(head, revision=revision, tokenizer_revision=tokens, files=files), identity


def _as_sentences(head: Head, settings: Settings, revision: str | None) -> tuple[Head, str]:
    """The head with what a sentence-transformers model says of itself, and that as text for the identity."""
    auto = settings.pooling == "auto"
    # A head is hardly ever another's: release 6 keeps its length and lower case in the tokenizer
    own = sentences_of(settings.model, revision, head.kind, assume=not auto or bool(head.labels))
    prefix = own.prompt if settings.prefix is None else settings.prefix
    if prefix and auto and not own.pools_prompt:
        raise UnsupportedModelError(
            f"model: {settings.model} does not pool the tokens of its prompt (include_prompt: false), which is not "
            f"computed here; accepted: no prefix (it is {prefix!r:.100}), or --pooling, which pools them, too"
        )
    said = "" if own == Sentences() else f" {own.pooling} {own.normalize} {own.max_length}" + " lower" * own.lower
    if own.prompt and settings.prefix is None:
        said += f" prompt {own.prompt!r}"
    head = replace(head, prefix=prefix, max_length=own.max_length, lower=own.lower)
    if head.kind == "vector":
        unit = settings.normalize or own.normalize
        head = replace(head, pooling=own.pooling if auto else settings.pooling, normalize=unit)
    return head, said


class Encoder:
    """An accelerated model with its tokenizer.

    Args:
        settings, execution: of the job.
        head: what is read from the model.

    Raises:
        DataFileError: the checkpoint or the tokenizer cannot be read.
        ArtifactError: a packed artifact that is damaged.
        InvalidWeightsError: the checkpoint lacks weights of its head.
        XfastError: what :func:`xfast.accelerate` raises.
    """

    def __init__(self, settings: Settings, execution: Execution, head: Head) -> None:
        self.settings, self.head = settings, head
        self.device = torch.device(settings.device)
        self.budget = execution.batch_tokens or BATCH_TOKENS[settings.device]
        with quiet_transformers():
            self.model: Any = _accelerated(settings, head)
            _, module, family = find_encoders(self.model)[0]
            spec = describe(module, family).spec
            room = spec.usable_positions
            self.pad_id = spec.pad_token_id
            self.hidden_size = spec.hidden_size
            self.tokenizer = Tokenizer(
                settings.tokenizer or settings.model,
                revision=head.tokenizer_revision,
                max_length=settings.max_length or (head.max_length and min(head.max_length, room)),
                capacity=room,
                vocab_size=spec.vocab_size,
                pairs=len(text_columns(settings)) == 2,
                spans=head.kind == "tags",
                lower=head.lower,
            )

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, hidden] or logits [B, labels] or [B, L, labels]."""
        call = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": batch.types}
        with torch.inference_mode():
            output = self.model(**{name: value.to(self.device) for name, value in call.items() if value is not None})
        return output.logits if self.head.labels else output.last_hidden_state

    def collector(self, rows: int) -> outputs.Collector:
        """For a shard of ``rows`` rows."""
        settings, head = self.settings, self.head
        if head.kind == "vector":
            return outputs.Pooled(rows, self.hidden_size, head.pooling, head.normalize, settings.dtype)
        if head.kind == "tokens":
            return outputs.PerToken(rows, self.hidden_size, settings.dtype)
        if head.kind == "classes":
            return outputs.Classes(rows, head.labels)
        if head.kind == "relevance":
            return outputs.Relevance(rows, settings.normalize)
        return outputs.Tags(rows, head.labels)

    def fallbacks(self) -> dict[str, int]:
        """Calls that ran the original code, by reason."""
        return xfast.explain(self.model).fallbacks


def _packed(settings: Settings) -> artifact.Manifest | None:
    """The manifest of a packed artifact, which is run as it was packed and whose config is verified here."""
    folder = Path(settings.model)
    manifest = artifact.manifest_in(folder)
    if manifest is None:
        return None
    artifact.Reader(folder, "size").content(artifact.CONFIG)
    every = manifest.spec.get("num_layers")
    packed = every if manifest.layers is None else manifest.layers
    if settings.layers not in (None, packed):
        raise InvalidOptionError(f"layers: {settings.layers} is not accepted: {folder} was packed with {packed}")
    if settings.precision not in ("model", manifest.precision):
        raise InvalidOptionError(
            f"precision: {settings.precision!r} is not accepted: {folder} was packed with {manifest.precision}"
        )
    return manifest


def _packed_class(manifest: artifact.Manifest, settings: Settings) -> str:
    """The artifact's class, which is a bare encoder or one with a head: else its states are not the encoder's."""
    name = manifest.model_class.rpartition(":")[2]
    if "For" not in name and not any(name in family.encoder_classes for family in FAMILIES):
        raise UnsupportedModelError(f"model: {settings.model} is a packed {name}, whose outputs are not its encoder's")
    return name


def _architecture(config: Any, settings: Settings) -> str:
    """The class that a checkpoint's config names first."""
    named = getattr(config, "architectures", None) or ["no architecture"]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise DataFileError(
            f"model: {settings.model}: architectures in config.json: expected names, got {named!r:.100}"
        )
    return named[0]


def _head(name: str, config: Any, settings: Settings) -> Head:
    predicts = name.endswith((_CLASSES, _TAGS))
    if settings.content == "predictions" and not predicts:
        raise InvalidOptionError(
            f"content: 'predictions' is not accepted: {settings.model} is {name}, which makes none"
        )
    if settings.content == "embeddings" or (settings.content == "auto" and name.endswith(_EMBEDDED)):
        if settings.pooling == "none":
            return Head("tokens", outputs.PerToken.names)
        return Head("vector", outputs.Pooled.names)
    if not predicts:
        raise UnsupportedModelError(
            f"model: {settings.model} is {name}; accepted: *{', *'.join((*_EMBEDDED, _CLASSES, _TAGS))}, "
            "or any head with --content embeddings"
        )
    names = config.id2label
    if not isinstance(names, dict) or not names or set(names) != set(range(len(names))):
        raise DataFileError(
            f"model: {settings.model}: id2label in config.json: expected a name for each of 0 to "
            f"{config.num_labels - 1}, got {names}"
        )
    labels = tuple(str(names[i]) for i in range(config.num_labels))
    if settings.pooling != "auto" or settings.dtype != "float32":
        raise InvalidOptionError(f"pooling, dtype: not accepted with {name}, which makes no embeddings")
    if settings.normalize and (name.endswith(_TAGS) or config.num_labels > 1):
        raise InvalidOptionError("normalize: not accepted with a head that gives labels")
    if name.endswith(_TAGS):
        if settings.pair_column is not None:
            raise InvalidOptionError("pair-column: not accepted with a head that labels tokens")
        return Head("tags", outputs.Tags.names, labels, prefix=settings.prefix or "")
    if config.problem_type == "multi_label_classification":
        raise UnsupportedModelError(f"model: {settings.model} gives several labels at once, which is not supported")
    if config.num_labels == 1:
        return Head("relevance", outputs.Relevance.names, labels)
    if config.problem_type == "regression":
        raise UnsupportedModelError(f"model: {settings.model} gives several numbers, which is not supported")
    return Head("classes", outputs.Classes.names, labels)


def _accelerated(settings: Settings, head: Head) -> Any:
    """The model; a packed artifact without its head where that is not asked (its pooler stays, and is not read)."""
    if artifact.is_artifact(Path(settings.model)):
        loaded = xfast.load(settings.model, device=settings.device, backend=settings.backend)
        return loaded if head.labels else loaded.base_model
    return xfast.accelerate(
        _load(settings, head).eval().to(settings.device),
        backend=settings.backend,
        precision=settings.precision,
        layers=settings.layers,
    )


def _load(settings: Settings, head: Head) -> Any:
    if not head.labels:
        cls, more = transformers.AutoModel, {"add_pooling_layer": False}
    elif head.kind == "tags":
        cls, more = transformers.AutoModelForTokenClassification, {}
    else:
        cls, more = transformers.AutoModelForSequenceClassification, {}
    try:
        loaded, found = cls.from_pretrained(settings.model, output_loading_info=True, **more, **pinned(head.revision))
    except TypeError:  # add_pooling_layer, which only the families have
        raise UnsupportedModelError(f"model: {settings.model}: supported: {supported_families()}") from None
    except Exception as error:  # readers of bad files raise whatever they like
        raise DataFileError(f"model: {settings.model}: {error}") from error
    if encoders := find_encoders(loaded):  # the published XXL calls itself an XLM-R: its weights show that it is none
        check_class(encoders[0][1])
    if missing := sorted(found["missing_keys"]):
        raise InvalidWeightsError(f"model: {settings.model} lacks {len(missing)} weights, {missing[0]} among them")
    return loaded


def revision_of(name: str, *files: str) -> str | None:
    """The commit of a Hub id that this job reads, every part of it; None for a folder.

    Raises:
        DataFileError: it cannot be told, so that a job that is continued might mix two models.
        OSError: no such model.
    """
    if tensor_files.is_folder(Path(name)):
        return None
    asked, cached = map(hub_file, [name], files[:1]), (tokenizer_files.find(name, file) for file in files[1:])
    for found in itertools.chain(asked, cached):  # one question to the Hub
        if found is not None and found.parent.parent.name == "snapshots":
            return found.parent.name
    raise DataFileError(f"model: {name}: the revision on the Hub cannot be told; name the folder of a snapshot instead")


def _tokenizer_revision(name: str) -> str | None:
    try:
        return revision_of(name, "tokenizer_config.json", *tokenizer_files.NAMES, "config.json")
    except (OSError, ValueError) as error:  # XfastErrors are ValueErrors, too: all are of the tokenizer here
        raise DataFileError(
            f"tokenizer: {name}: no such folder, and none that the Hub or its cache has: {error}"
        ) from None


def _files_identity(settings: Settings, revision: str | None, tokenizer_revision: str | None) -> str:
    """Of the model's files, and the tokenizer's where they are others."""
    own = _identity(settings.model, revision)
    return own if settings.tokenizer is None else f"{own} {_identity(settings.tokenizer, tokenizer_revision)}"


def _identity(name: str, revision: str | None) -> str:
    """A folder's files hashed; a Hub id with its revision."""
    folder = Path(name)
    if not tensor_files.is_folder(folder):
        return f"{name}@{revision}"
    digest = hashlib.blake2b(digest_size=16)
    try:
        packed = artifact.is_artifact(folder)
        for path in _parts(folder):
            if packed and path.suffix == ".safetensors":  # the manifest has their hashes
                continue
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(_BYTES):
                    digest.update(block)
    except OSError as error:
        raise DataFileError(f"model: {name}: {error}") from error
    return digest.hexdigest()


State = dict[str, tuple[int, ...]]


def state_of(settings: Settings) -> State:
    """Which files the model and the tokenizer are at this moment, without reading them; a Hub's commit stays as it is.

    Raises:
        DataFileError: they cannot be looked at.
    """
    names = (name for name in (settings.model, settings.tokenizer) if name)
    folders = [folder for folder in map(Path, names) if tensor_files.is_folder(folder)]
    try:
        return {str(path): tensor_files.state_of(path.stat()) for folder in folders for path in _parts(folder)}
    except OSError as error:
        raise DataFileError(f"model: {settings.model}: {error}") from error


def unchanged(settings: Settings, before: State) -> None:
    """Looks whether the files are still those of ``before``.

    Raises:
        DataFileError: one was changed or replaced, is new or gone.
    """
    now = state_of(settings)
    if other := sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)):
        raise DataFileError(
            f"model: {other[0]} changed while the job ran: its rows may be of another model than its manifest says; "
            "start again in an empty folder"
        )


def same_files(settings: Settings, head: Head) -> None:
    """Looks whether another process reads the files that ``head`` was made from.

    Raises:
        DataFileError: it does not.
    """
    if _files_identity(settings, head.revision, head.tokenizer_revision) != head.files:
        raise DataFileError(
            f"model: {settings.model}: the files are not those that the job began with; start again in an empty folder"
        )


def _parts(folder: Path) -> list[Path]:
    """The files of a checkpoint or a tokenizer that decide what it gives."""
    return sorted(path for path in folder.iterdir() if path.suffix in _PARTS and path.is_file())
