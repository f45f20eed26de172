"""One encoder shared by the heads of several tasks, made from transformers' own head classes.

The encoder is registered once; heads hold a plain reference to it. So checkpoints hold every tensor once, an optimizer
sees every parameter once, and what is saved is an ordinary transformers model that any program can load.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

import xfast
from xfast.architecture import check_class
from xfast.artifact import read_manifest
from xfast.errors import DataFileError, UnsupportedModelError, XfastError
from xfast.stilts.task import BITEXT, CHOICE, CLASSIFICATION, MATCHING, MLM, SPAN, TAGGING, Task

AUTO_CLASSES = {
    CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    CHOICE: transformers.AutoModelForMultipleChoice,
    SPAN: transformers.AutoModelForQuestionAnswering,
    TAGGING: transformers.AutoModelForTokenClassification,
    MLM: transformers.AutoModelForMaskedLM,
}
"""The transformers class of each type; a dual encoder (matching) is the bare encoder."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the weights of a model that is evaluated can be converted to, by name."""

LOGIT_SCALE = 100.0
"""What multiplies the cosine in a dual encoder's softmax, as in XTREME-R's code."""


class _TiedDecoder(nn.Module):
    """The output layer of a masked language model, which is the encoder's word embeddings and the head's bias."""

    def __init__(self, embeddings: nn.Module, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(embeddings=embeddings, owner=owner)  # not registered: both belong to someone else

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.embeddings.weight, self.owner.bias)


class MultiTaskModel(nn.Module):
    """``model(task="xnli", **inputs)`` runs the shared encoder under that task's head.

    Args:
        encoder: a transformers encoder.
        heads: by task, a transformers model whose own encoder is replaced by this one; None for a dual encoder.
        types: type of each task.
    """

    accepts_loss_kwargs = (
        False  # losses are means over a batch, which the Trainer must divide by the accumulation steps
    )

    def __init__(self, encoder: Any, heads: Mapping[str, Any], types: Mapping[str, str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.types = dict(types)
        self.heads = nn.ModuleDict()
        for name, head in heads.items():
            if head is None:
                continue
            prefix = head.base_model_prefix
            del head._modules[prefix]
            head.__dict__[prefix] = encoder
            if types[name] == MLM:
                _settle_decoder(head, encoder)
            self.heads[name] = head
        layers = [part for part in encoder.modules() if isinstance(part, GradientCheckpointingLayer)]
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})  # what FSDP shards one by one

    def forward(self, task: str, **inputs: Any) -> Any:
        """The head's output: ``loss`` where labels are given, and ``logits``.

        Of a dual encoder: the loss of ``query`` and ``target``, or one side's own states.
        """
        name = head_name(task)
        if self.types[name] == MATCHING:
            return self._match(**inputs) if "query" in inputs else self.encoder(**inputs)
        if self.types[name] == MLM:
            return self._masked(self.heads[name], **inputs)
        return self.heads[name](**inputs)

    def _match(self, query: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """In-batch softmax: each query against every target of the batch, by the cosine of the first token's states."""
        left, right = (first_token(self.encoder(**side).last_hidden_state) for side in (query, target))
        with torch.autocast(left.device.type, enabled=False):  # bf16's steps at 100 are as large as the differences
            logits = LOGIT_SCALE * left @ right.T
        return {
            "loss": functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device)),
            "logits": logits,
        }

    def _masked(self, head: Any, labels: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        """Logits of the masked positions only: [masked, vocabulary] instead of [batch, length, vocabulary]."""
        states = self.encoder(**inputs).last_hidden_state
        masked = labels != -100
        logits = _prediction(head)(states[masked])
        return {"loss": functional.cross_entropy(logits.float(), labels[masked]), "logits": logits}

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The encoder's; the Trainer calls it."""
        self.encoder.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same under the name that transformers gave it in 5.23."""
        self.encoder.activation_checkpointing_enable(*args, **kwargs)

    def save_encoder(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """The bare encoder, for the next phase.

        Args:
            folder: made if it is missing.
            state: this model's whole state, which is not in the model where it is sharded.
        """
        self.encoder.save_pretrained(folder, state_dict=_below(state, "encoder"))

    def save_task(self, name: str, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """The encoder with one task's head, an ordinary transformers model; ``state`` as above."""
        if self.types[name] == MATCHING:
            self.save_encoder(folder, state)
            return
        head = self.heads[name]
        encoder = {f"{head.base_model_prefix}.{key}": value for key, value in _below(state, "encoder").items()}
        wanted = _bare(type(head), self.encoder.config, head.config).state_dict().keys()
        own = {**encoder, **_below(state, f"heads.{name}")}
        for key in [key for key in own if key.endswith(".decoder.bias")]:
            own[key.replace(".decoder", "")] = own[key].clone()  # an untied head's: transformers 4 may read this one
        head.save_pretrained(folder, state_dict={key: value for key, value in own.items() if key in wanted})


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The part of a state that belongs to one submodule, under that module's own names."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}


def _bare(cls: Any, encoder_config: Any, head_config: Any) -> Any:
    """The model on the meta device: its parameter names without its memory."""
    config = copy.deepcopy(encoder_config)
    config.id2label, config.label2id = head_config.id2label, head_config.label2id
    with torch.device("meta"):
        return cls(config)


def head_name(task: str) -> str:
    """The head that a training set uses: the texts ``mlm:sw`` and ``mlm:yo`` share ``mlm``."""
    return task.split(":")[0]


def first_token(states: torch.Tensor) -> torch.Tensor:
    """[batch, hidden_size] L2-normalised states of the first token, the representation of a dual encoder."""
    return functional.normalize(states[:, 0].float(), dim=-1)


def _prediction(head: Any) -> nn.Module:
    return head.lm_head if hasattr(head, "lm_head") else head.cls


def _settle_decoder(head: Any, encoder: Any) -> None:
    """Tie the output layer to this encoder where the checkpoint has it tied; else it is one of its own."""
    prediction = _prediction(head)
    owner = getattr(prediction, "predictions", prediction)  # BERT's head is one level deeper
    if head.config.tie_word_embeddings:
        owner.decoder = _TiedDecoder(encoder.get_input_embeddings(), owner)
    elif owner.decoder.bias is owner.bias:  # transformers 4: a checkpoint holds no tensor twice
        owner.decoder.bias = nn.Parameter(owner.bias.detach().clone())


def labels_config(config: Any, labels: Sequence[str]) -> Any:
    """A copy of a configuration that names these labels."""
    config = copy.deepcopy(config)
    config.problem_type = None  # a regression checkpoint's would turn labels into numbers
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}
    return config


def _head(task: Task, config: Any, labels: Sequence[str], model: str, keep: bool) -> Any:
    """A new head. Its own encoder has no layers and hardly a vocabulary: it is thrown away."""
    if task.type == MATCHING:
        return None
    named = labels_config(config, labels or ("start", "end") if task.type == SPAN else labels)
    if task.type == MLM:
        return _masked_head(model)
    if keep:
        head = load_task_model(model, task).float()
        if task.type in (CLASSIFICATION, TAGGING) and list(head.config.id2label.values()) != list(labels):
            raise DataFileError(f"heads: the labels in {model} are not those of {task.name}; use new heads")
        return head.train()
    small = copy.deepcopy(named)
    small.num_hidden_layers, small.vocab_size = 0, max(8, (config.pad_token_id or 0) + 1)
    head = AUTO_CLASSES[task.type].from_config(small).float()  # the configuration may name a smaller type
    head.config = named
    return head


def _masked_head(model: str) -> Any:
    """The checkpoint's own head: a new one over 250,000 pieces would have to be learned from nothing."""
    head, report = AUTO_CLASSES[MLM].from_pretrained(model, output_loading_info=True, dtype=torch.float32)
    if new := sorted(name for name in report["missing_keys"] if not name.startswith(head.base_model_prefix)):
        raise DataFileError(
            f"model: {model}: no trained masked language model's head ({', '.join(new[:3])}); "
            "start from a checkpoint with one, such as a run's tasks/mlm"
        )
    return head


def usable_positions(config: Any) -> int | None:
    """Tokens of the longest sequence that a model takes; None where its configuration does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    return int(positions) - (0 if config.model_type == "bert" else (getattr(config, "pad_token_id", None) or 0) + 1)


def load_config(model: str) -> Any:
    """A checkpoint's configuration. Raises DataFileError where there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataFileError(f"model: {model}: {error}") from None


def build(
    model: str, tasks: Mapping[str, tuple[Task, Sequence[str]]], seed: int, *, keep_heads: bool = False
) -> MultiTaskModel:
    """The checkpoint's encoder with a new head for each task.

    Args:
        model: folder or Hub id of any checkpoint with this encoder; heads in it are left aside (but for the masked
            language model's, which a run with the task ``mlm`` continues).
        tasks: by name, the task and its labels.
        seed: of the new weights.
        keep_heads: continue the heads in the checkpoint instead.

    Raises:
        DataFileError: there is no such checkpoint, or it does not fit its configuration.
        UnsupportedModelError: transformers has no head of a task's type for it, or its configuration names another
            class.
    """
    config = load_config(model)
    transformers.set_seed(seed)
    try:
        heads = {name: _head(task, config, labels, model, keep_heads) for name, (task, labels) in tasks.items()}
        pooled = any(getattr(head and head.base_model, "pooler", None) is not None for head in heads.values())
        encoder = _encoder(model, pooled)
    except XfastError:
        raise
    except (OSError, RuntimeError) as error:
        raise DataFileError(f"model: {model}: {error}") from None
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(f"model: {model}: {error}") from None
    return MultiTaskModel(encoder, heads, {name: task.type for name, (task, _) in tasks.items()})


def _encoder(model: str, pooled: bool) -> Any:
    """In fp32, whatever the file holds. A pooler stays if the checkpoint has one: a later phase's head may read it."""
    encoder, report = transformers.AutoModel.from_pretrained(
        model, add_pooling_layer=True, output_loading_info=True, dtype=torch.float32
    )
    check_class(encoder)
    if not pooled and any("pooler" in name for name in report["missing_keys"]):
        encoder.pooler = None
    return encoder


def load_task_model(folder: str, task: Task, dtype: torch.dtype | None = None) -> Any:
    """A trained model for evaluation: the type's transformers class, the bare encoder for matching and bitext.

    Args:
        folder: of the model.
        task: which class and head.
        dtype: of the weights; None: as they are saved.

    Raises:
        DataFileError: there is none, or it holds no trained head of this type.
        UnsupportedModelError: its configuration names another class.
    """
    cls = AUTO_CLASSES.get(task.type, transformers.AutoModel)
    extra: dict[str, Any] = {} if task.type in AUTO_CLASSES else {"add_pooling_layer": False}
    if dtype is not None:
        extra["dtype"] = dtype
    try:
        loaded, report = cls.from_pretrained(folder, output_loading_info=True, **extra)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataFileError(f"model: {folder}: {error}") from None
    check_class(loaded.base_model)
    new = sorted(name for name in report["missing_keys"] if "pooler" not in name or task.type == CHOICE)
    if new:
        raise DataFileError(f"model: {folder}: no trained weights for {', '.join(new[:4])}; train {task.name} first")
    return loaded.eval()


def load_packed_task_model(folder: str, task: Task) -> Any:
    """Like :func:`load_task_model` for a packed artifact, which is accelerated already.

    Raises:
        ArtifactError: damaged.
        DataFileError: it holds no head of this type, or lacks the layers that retrieval reads.
    """
    layers = read_manifest(Path(folder)).layers
    if task.type == BITEXT and layers is not None:
        raise DataFileError(f"model: {folder}: runs {layers} layers only; {task.name} needs an artifact that runs all")
    loaded = xfast.load(folder)
    if task.type not in AUTO_CLASSES:
        return loaded.base_model
    head = AUTO_CLASSES[task.type].__name__.removeprefix("AutoModel")
    if not type(loaded).__name__.endswith(head):
        raise DataFileError(f"model: {folder}: is a {type(loaded).__name__}, {task.name} needs a model {head}")
    return loaded
