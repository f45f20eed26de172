"""A model as a job sees it: what its head computes, what identifies it, and the accelerated model itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import xfast
from xfast import artifact
from xfast.architecture import describe, find_encoders, supported_families
from xfast.encode import outputs
from xfast.encode.rows import text_columns
from xfast.encode.settings import BATCH_TOKENS, Execution, Settings
from xfast.encode.tokens import Batch, Tokenizer
from xfast.errors import DataFileError, InvalidOptionError, InvalidWeightsError, UnsupportedModelError
from xfast.stilts.progress import quiet_transformers

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
    """

    kind: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()


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
        config = transformers.AutoConfig.from_pretrained(settings.model)
    except Exception as error:  # transformers' checks of single fields raise their own kinds
        if not isinstance(error, OSError) or Path(settings.model).is_dir():
            raise DataFileError(f"model: {settings.model}: {error}") from None
        raise DataFileError(
            f"model: {settings.model}: no such folder, and no model that the Hub or its cache has; expected a folder "
            f"with a config.json, a packed artifact or a Hub id (transformers says: {error})"
        ) from None
    identity = _identity(settings.model, getattr(config, "_commit_hash", None))
    if settings.tokenizer is not None:
        identity += " " + _identity(settings.tokenizer, None)
    if manifest is None:
        return _head((getattr(config, "architectures", None) or ["no architecture"])[0], config, settings), identity
    return _head(manifest.model_class.rpartition(":")[2], config, settings), identity


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
            # RoBERTa counts positions from the padding's number + 1
            reserved = spec.pad_token_id + 1 if spec.position_rule == "padding" else 0
            self.pad_id = spec.pad_token_id
            self.hidden_size = spec.hidden_size
            self.tokenizer = Tokenizer(
                settings.tokenizer or settings.model,
                max_length=settings.max_length,
                capacity=spec.max_positions - reserved,
                vocab_size=spec.vocab_size,
                pairs=len(text_columns(settings)) == 2,
                spans=head.kind == "tags",
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
            return outputs.Pooled(rows, self.hidden_size, settings.pooling, settings.normalize, settings.dtype)
        if head.kind == "tokens":
            return outputs.PerToken(rows, self.hidden_size, settings.dtype)
        if head.kind == "classes":
            return outputs.Classes(rows, head.labels)
        if head.kind == "relevance":
            return outputs.Relevance(rows, settings.normalize)
        return outputs.Tags(rows, head.labels)

    def fallbacks(self) -> dict[str, int]:
        """Calls that ran the original code, by reason."""
        return xfast.explain(self.model).encoders[0].fallbacks


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
    if not isinstance(names, dict) or set(names) != set(range(len(names))):
        raise DataFileError(
            f"model: {settings.model}: id2label in config.json: expected a name for each of 0 to "
            f"{config.num_labels - 1}, got {names}"
        )
    labels = tuple(str(names[i]) for i in range(config.num_labels))
    if name.endswith(_TAGS):
        if settings.pair_column is not None:
            raise InvalidOptionError("pair-column: not accepted with a head that labels tokens")
        return Head("tags", outputs.Tags.names, labels)
    if config.problem_type == "multi_label_classification":
        raise UnsupportedModelError(f"model: {settings.model} gives several labels at once, which is not supported")
    if config.num_labels == 1:
        return Head("relevance", outputs.Relevance.names, labels)
    if settings.normalize:
        raise InvalidOptionError("normalize: not accepted with a head that gives labels")
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
        loaded, found = cls.from_pretrained(settings.model, output_loading_info=True, **more)
    except TypeError:  # add_pooling_layer, which only the families have
        raise UnsupportedModelError(f"model: {settings.model}: supported: {supported_families()}") from None
    except Exception as error:  # readers of bad files raise whatever they like
        raise DataFileError(f"model: {settings.model}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise InvalidWeightsError(f"model: {settings.model} lacks {len(missing)} weights, {missing[0]} among them")
    return loaded


def _identity(name: str, revision: str | None) -> str:
    """A folder's files hashed; a Hub id with its revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision}"
    digest = hashlib.blake2b(digest_size=16)
    try:
        packed = artifact.is_artifact(folder)
        for path in sorted(path for path in folder.iterdir() if path.suffix in _PARTS):
            if packed and path.suffix == ".safetensors":  # the manifest has their hashes
                continue
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(_BYTES):
                    digest.update(block)
    except OSError as error:
        raise DataFileError(f"model: {name}: {error}") from error
    return digest.hexdigest()
