"""The Trainer's arguments: what a run's own options say, what a user may add, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers

from xfast.errors import BackendUnavailableError, InvalidOptionError
from xfast.stilts import sharding
from xfast.stilts.config import RunConfig

FREE = {
    *("logging_steps", "disable_tqdm", "dataloader_pin_memory", "ddp_find_unused_parameters", "save_total_limit"),
    "use_cpu",
}
"""Arguments of the Trainer that a run gives a value, but may be given another."""

COMPUTED = {
    *("max_steps", "gradient_accumulation_steps", "warmup_steps", "warmup_ratio", "logging_dir"),
    "lr_scheduler_kwargs",
}
"""Arguments that follow from the data, or belong to one that the run sets."""

REFUSED = {
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip", "eval_on_start", "resume_from_checkpoint"),
        "a run that is continued would not be the one that was begun",
    ),
    **dict.fromkeys(("label_smoothing_factor", "neftune_noise_alpha"), "the heads compute their losses themselves"),
    **dict.fromkeys(
        (
            *("auto_find_batch_size", "train_sampling_strategy", "group_by_length", "length_column_name", "data_seed"),
            *("dataloader_drop_last", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
        ),
        "the run makes its batches itself",
    ),
    **dict.fromkeys(
        (
            *("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only", "label_names"),
            *("bf16_full_eval", "fp16_full_eval", "include_for_metrics", "eval_do_concat_batches"),
            *("batch_eval_metrics", "eval_use_gather_object", "do_eval"),
        ),
        "the run evaluates on its dev sets itself",
    ),
}
"""Arguments that would do nothing here, or harm, and why."""

HARMLESS = ("even_batches", "non_blocking", "use_seedable_sampler")
"""Settings of ``accelerator_config`` that change no batch. Others train on a part of each batch, or on several."""


def trainer_arguments(config: RunConfig) -> transformers.TrainingArguments:
    """The arguments of a run.

    Raises:
        InvalidOptionError: an argument is unknown, set by the run itself, refused or malformed; or the processes that
            were started would not train together.
        BackendUnavailableError: training needs a package that is not there.
    """
    given: dict[str, Any] = {
        "output_dir": config.output,
        "num_train_epochs": 1,  # the schedule is one pass over all steps
        "per_device_train_batch_size": config.device_batch_size,
        "learning_rate": config.recipe.learning_rate,
        "weight_decay": config.weight_decay,
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.max_grad_norm,
        "lr_scheduler_type": "linear",
        "seed": config.seed,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": config.eval_steps,
        "save_steps": config.eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "logging_steps": max(1, min(50, config.eval_steps)),
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "ddp_find_unused_parameters": True,  # a step uses one task's head
        "use_cpu": not torch.accelerator.is_available(),  # else processes on CPUs would not join
    }
    if config.gradient_checkpointing:
        given.update(_checkpointing())
    _check_names(config, given)
    try:
        # a copy: transformers writes its defaults into the mappings that it is given
        with accelerate_precision(config.precision):
            arguments = transformers.TrainingArguments(**{**given, **copy.deepcopy(config.trainer)})
    except ImportError as error:  # accelerate, which training needs and evaluation does not
        raise BackendUnavailableError(f"training needs more packages: pip install accelerate ({error})") from None
    except (ValueError, TypeError) as error:  # bf16 where there is none, for instance
        raise InvalidOptionError(f"precision or trainer: {error}") from None
    _check_values(arguments)
    _check_batches(arguments)
    sharding.check(config, arguments)
    if arguments.n_gpu > 1:  # one process drives one GPU: replicas of a head would refer to the first GPU's encoder
        arguments._n_gpu = 1
    return arguments


def accelerate_precision(precision: str) -> AbstractContextManager[None]:
    """The run's precision where accelerate looks for it: ``accelerate launch`` and earlier runs leave theirs there.

    transformers 5 reads it when it makes its arguments, transformers 4 when it makes its accelerator.
    """
    from accelerate.utils import patch_environment  # evaluation does without accelerate

    return patch_environment(ACCELERATE_MIXED_PRECISION="no" if precision == "fp32" else precision)


def _check_batches(arguments: transformers.TrainingArguments) -> None:
    settings = arguments.accelerator_config
    usual = type(settings)()
    if other := [
        known.name
        for known in dataclasses.fields(settings)
        if known.name not in HARMLESS and getattr(settings, known.name) != getattr(usual, known.name)
    ]:
        raise InvalidOptionError(
            f"trainer: accelerator_config: {', '.join(other)}: the run makes its batches itself; accepted: "
            f"{', '.join(HARMLESS)}"
        )


def _check_names(config: RunConfig, given: dict[str, Any]) -> None:
    if unknown := set(config.trainer) - set(transformers.TrainingArguments.__dataclass_fields__):
        raise InvalidOptionError(f"trainer: TrainingArguments has no {', '.join(sorted(unknown))}")
    if taken := set(config.trainer) & ((given.keys() - FREE) | COMPUTED):
        raise InvalidOptionError(f"trainer: {', '.join(sorted(taken))} follows from the run's own options")
    for name in sorted(config.trainer.keys() & REFUSED.keys()):
        raise InvalidOptionError(f"trainer: {name} is not accepted: {REFUSED[name]}")
    sharding.check_wish(config.trainer)


def _check_values(arguments: transformers.TrainingArguments) -> None:
    """What transformers takes and fails with later: too few processes, and what YAML made of ``9.8e-1``, a text."""
    started = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    if arguments.world_size < started:  # each would write what the others write
        raise InvalidOptionError(f"trainer: of {started} processes {arguments.world_size} would train together")
    for known in dataclasses.fields(arguments):
        value = getattr(arguments, known.name)
        if isinstance(value, str) and isinstance(known.default, int | float) and not isinstance(known.default, bool):
            raise InvalidOptionError(f"trainer: {known.name}: {value!r}; accepted: a number (9.8e-1 is text in YAML)")


def _checkpointing() -> dict[str, Any]:
    """Transformers 5.23 renamed the option."""
    name = "activation_checkpointing"
    if name not in transformers.TrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
