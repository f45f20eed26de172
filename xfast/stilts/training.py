"""A training run on transformers' ``Trainer``: its data, its evaluation on English dev sets, its checkpoints.

``Trainer`` and ``accelerate`` bring devices, mixed precision, ``torchrun`` and FSDP; what is here is the order of the
batches, the heads and the scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

import xfast
from xfast import files
from xfast.errors import BackendUnavailableError, InvalidOptionError
from xfast.stilts import checkpoints, dev, mixture, sharding
from xfast.stilts.arguments import accelerate_precision, trainer_arguments
from xfast.stilts.batches import Key, Masking, Padding, Schedule, collate, masked_batch
from xfast.stilts.config import RunConfig, from_dict, load
from xfast.stilts.estimate import Estimate, estimate
from xfast.stilts.features import Feature
from xfast.stilts.folders import Lock
from xfast.stilts.mixture import TrainingSet
from xfast.stilts.model import MultiTaskModel, build, head_name, load_config, usable_positions
from xfast.stilts.prediction import padding_of
from xfast.stilts.task import MLM
from xfast.stilts.tokenizer import load_tokenizer


class _Examples(Dataset):
    def __init__(self, sets: dict[str, TrainingSet]) -> None:
        self.sets = sets

    def __getitem__(self, key: Key) -> tuple[Key, Feature]:
        return key, self.sets[key.task].features.items[key.example]


@dataclass
class _Collate:
    types: dict[str, str]
    padding: Padding
    masking: Masking

    def __call__(self, items: Sequence[tuple[Key, Feature]]) -> dict[str, Any]:
        name = items[0][0].task
        kind = self.types[head_name(name)]
        features = [feature for _, feature in items]
        if kind != MLM:
            return {"task": name, **collate(features, kind, self.padding)}
        rows, serials = [feature.rows[0] for feature in features], [key.serial for key, _ in items]
        return {"task": name, **masked_batch(rows, serials, self.masking, self.padding)}


class _EarlyStopping(transformers.EarlyStoppingCallback):
    """Counts again, when a run continues, how many evaluations have passed without a better score.

    And finds the best checkpoint again where the run's folder was moved meanwhile: the state holds its old path.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best_checkpoint = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best_checkpoint.is_dir():
            state.best_model_checkpoint = str(best_checkpoint)
        self.early_stopping_patience_counter = _without_a_better_one(state)


def _without_a_better_one(state: transformers.TrainerState) -> int:
    """Evaluations since the one with the best score."""
    best: float | None = None
    count = 0
    for score in (entry["eval_score"] for entry in state.log_history if "eval_score" in entry):
        count += 1
        if best is None or score > best:
            best, count = score, 0
    return count


class _EvaluateAtTheEnd(transformers.TrainerCallback):
    """Transformers 4 evaluates at multiples of ``eval_steps`` alone and would never see the last steps' model."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BackendUnavailableError("tensorboard is not installed: pip install tensorboard") from None
    return transformers.integrations.TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


class StiltsTrainer(transformers.Trainer):
    """The Trainer with our batches and our evaluation.

    Args:
        schedule: every batch of the run.
        sets: training sets by task.
        evaluate_with: called with the model; returns metrics with ``score`` among them.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        sets: dict[str, TrainingSet],
        collator: Callable[[Any], Any],
        evaluate_with: Callable[[Any], dict[str, float]],
        **arguments: Any,
    ) -> None:
        data = _Examples(sets)
        # an evaluation set only because the Trainer insists on one
        super().__init__(train_dataset=data, eval_dataset=data, data_collator=collator, **arguments)
        self.remove_callback(transformers.PrinterCallback)  # its lines go to result.json and TensorBoard
        self.schedule = schedule
        self.evaluate_with = evaluate_with

    def create_accelerator_and_postprocess(self) -> None:
        sharding.settle(self.args)
        with accelerate_precision("bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"):
            super().create_accelerator_and_postprocess()
        sharding.switch_on(self)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            sharding.fill(self.optimizer)  # its parameters are sharded by now, and no checkpoint is loaded yet
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # Sharded weights are written with the optimizer's state; the Trainer looks for the folder before that.
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.schedule,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        # sharded weights are gathered by the wrapped model's forward, in every process
        model = self.model if self.is_fsdp_enabled else self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        metrics = {f"eval_{name}": value for name, value in self.evaluate_with(model).items()}
        model.train(training)
        metrics = self._of_the_first(metrics)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _of_the_first(self, metrics: dict[str, float]) -> dict[str, float]:
        """The first process's metrics: rounding may differ between machines, and all must stop and save together."""
        if self.args.world_size == 1:
            return metrics
        shared = [metrics]
        torch.distributed.broadcast_object_list(shared, device=self.args.device)
        return shared[0]


@dataclass(frozen=True)
class Trained:
    """What a run left behind.

    Attributes:
        folder: with ``encoder/`` (for the next phase), ``tasks/<name>/`` (ordinary transformers models), ``run.yaml``
            and ``result.json``.
        score: best dev score, the mean over tasks; None without evaluation.
        metrics: of the best model.
        steps: optimizer steps that were made.
        notes: what was left out or changed in the data, counted.
    """

    folder: Path
    score: float | None
    metrics: dict[str, float]
    steps: int
    notes: dict[str, dict[str, int]] = field(default_factory=dict)


def train(
    config: RunConfig,
    *,
    resume: bool = True,
    callbacks: Sequence[Any] = (),
    announce: Callable[[Estimate], None] | None = None,
    root: Path | None = None,
) -> Trained:
    """Train, or continue a run that was interrupted, or return at once what a finished run left.

    Args:
        config: the run.
        resume: continue from the last complete checkpoint in ``config.output``; False starts anew.
        callbacks: further ``TrainerCallback`` objects.
        announce: called with what the run will cost, before it begins.
        root: a folder that holds the run and whatever of ``model`` lies in it; it may have been moved as a whole.

    Raises:
        DataFileError: data or checkpoint missing or malformed.
        InvalidOptionError: ``output`` holds a run with another configuration, or another process trains there.
        CheckpointError: a checkpoint could not be written.
    """
    folder = Path(config.output)
    first = int(os.environ.get("RANK", "0")) == 0  # torchrun's; nothing distributed has begun yet
    _check_folder(folder)
    with Lock("output", folder) if first else contextlib.nullcontext() as lock:
        if first and not resume:
            _clear(folder)
        if resume:
            _same_run(folder, config, root)
        if (folder / "result.json").is_file() and resume:
            if first:  # the run that wrote the result may have died before it had removed them
                _drop_checkpoints(folder, config)
            return _read_result(folder)
        return _train(config, lock, callbacks, announce, resume)


def _train(
    config: RunConfig,
    lock: Lock | None,
    callbacks: Sequence[Any],
    announce: Callable[[Estimate], None] | None,
    resume: bool,
) -> Trained:
    """``lock``: the folder's, in the first process."""
    folder = Path(config.output)
    _check_packed(config)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    sets = mixture.training_sets(config, tokenizer)
    model = build(
        config.model,
        {head_name(name): (s.task, s.labels) for name, s in sets.items()},
        config.seed,
        keep_heads=config.heads == "checkpoint",
    )
    check_lengths(config, model.config, tokenizer)
    last = checkpoints.last_complete(folder) if resume else None
    trainer = _trainer(config, model, tokenizer, sets, callbacks, last)
    if lock is not None:  # only now: a refused run leaves nothing that a corrected one could not be
        lock.make()
        config.save(folder / "run.yaml")
    trainer.accelerator.wait_for_everyone()
    if announce is not None and lock is not None:
        args = trainer.args
        announce(estimate(config, model, sets, trainer.schedule.steps, str(args.device), args.world_size))
    with _packed(config, model), checkpoints.reported(folder), sharding.quiet():
        trainer.train(resume_from_checkpoint=last)
        return _finish(config, trainer, model, tokenizer, sets)


def _check_folder(folder: Path) -> None:
    """Before data is read for minutes; a refused run leaves no folder."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written" if there.is_dir() else "is no folder"
        raise InvalidOptionError(f"output: {folder}: {there} {what}")


def check(config: RunConfig) -> None:
    """What :func:`train` would refuse, as far as it can be said without data and weights.

    Raises:
        DataFileError: there is no such checkpoint or tokenizer.
        InvalidOptionError: options do not go together, or the model cannot take its sequences.
        BackendUnavailableError: training needs a package that is not there.
    """
    _micro_batches(config, trainer_arguments(config))
    _check_packed(config)
    check_lengths(config, load_config(config.model), load_tokenizer(config.tokenizer or config.model))


def _check_packed(config: RunConfig) -> None:
    if config.batching == "packed" and config.gradient_checkpointing:
        raise InvalidOptionError("batching: packed keeps all activations; leave gradient_checkpointing out")


def check_lengths(config: RunConfig, architecture: Any, tokenizer: Any) -> None:
    """Raises InvalidOptionError where the model cannot take what the tokenizer and the recipe will give it."""
    room = usable_positions(architecture)
    if room and config.recipe.max_length > room:
        raise InvalidOptionError(f"max_length: {config.recipe.max_length}; {config.model} has positions for {room}")
    if len(tokenizer) > architecture.vocab_size:
        raise InvalidOptionError(
            f"tokenizer: {len(tokenizer)} ids, but {config.model} has a vocabulary of {architecture.vocab_size}"
        )


def _trainer(
    config: RunConfig,
    model: MultiTaskModel,
    tokenizer: Any,
    sets: dict[str, TrainingSet],
    callbacks: Sequence[Any],
    last: str | None,
) -> StiltsTrainer:
    """``last``: the checkpoint to continue from."""
    padding = padding_of(model, tokenizer)
    masking = Masking(tokenizer.mask_token_id, len(tokenizer), frozenset(tokenizer.all_special_ids), seed=config.seed)
    arguments = trainer_arguments(config)
    schedule = _schedule(config, sets, arguments)
    evaluator = dev.Evaluator(sets, padding, masking)
    if evaluator and last is not None and (made := _stopped(last, config.patience)):
        schedule = dataclasses.replace(schedule, steps=made)
        arguments.max_steps = made
    if not evaluator:
        arguments.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
        arguments.load_best_model_at_end = False
    own: list[Any] = [_EarlyStopping(config.patience), _EvaluateAtTheEnd()] if evaluator else []
    if config.tensorboard:
        own.append(_tensorboard(Path(config.output) / "logs"))
    trainer = StiltsTrainer(
        model=model,
        args=arguments,
        schedule=schedule,
        sets=sets,
        collator=_Collate(model.types, padding, masking),
        evaluate_with=evaluator,
        callbacks=[*own, *callbacks, checkpoints.MarkComplete()],
    )
    if (trainer.is_fsdp_enabled and not arguments.fsdp) or trainer.is_deepspeed_enabled:
        raise InvalidOptionError(
            "trainer: FSDP or DeepSpeed by accelerate's own settings; give `trainer: {fsdp: true}`"
        )
    sharding.with_autocast(trainer, model)
    return trainer


def _stopped(checkpoint: str, patience: int) -> int | None:
    """The steps of a run that had stopped early when it made its last checkpoint: it only has to be finished."""
    state = transformers.TrainerState.load_from_json(str(Path(checkpoint) / transformers.trainer.TRAINER_STATE_NAME))
    return state.global_step if _without_a_better_one(state) >= patience else None


def _schedule(config: RunConfig, sets: dict[str, TrainingSet], arguments: transformers.TrainingArguments) -> Schedule:
    micro = _micro_batches(config, arguments)
    arguments.gradient_accumulation_steps = micro // max(1, arguments.world_size)
    steps = mixture.steps(config, sets)
    arguments.max_steps = steps
    arguments.warmup_steps = math.ceil(config.warmup_share * steps)
    return Schedule(
        lengths={name: np.asarray([f.length for f in s.features.items]) for name, s in sets.items()},
        probabilities=mixture.probabilities(config, sets),
        steps=steps,
        micro=micro,
        batch_size=config.recipe.batch_size // micro,
        seed=config.seed,
        grouped=config.batching != "random",
    )


def _micro_batches(config: RunConfig, arguments: transformers.TrainingArguments) -> int:
    """Of one step, over all processes."""
    batch, device = config.recipe.batch_size, config.device_batch_size
    world = max(1, arguments.world_size)
    per_step = world * device
    if batch % per_step == 0:
        return batch // device
    if batch > per_step or world > 1:
        raise InvalidOptionError(
            f"batch_size: {batch} is no multiple of device_batch_size x devices = {device} x {world}"
        )
    return 1


@contextlib.contextmanager
def _packed(config: RunConfig, model: MultiTaskModel) -> Any:
    """``batching="packed"``: the encoder trains without padding, on the kernels of ``accelerate(training=True)``."""
    if config.batching != "packed":
        yield
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    xfast.accelerate(model.encoder.to(device), training=True, backend="auto" if device == "cuda" else "triton")
    try:
        yield
    finally:
        xfast.restore(model.encoder)


def _clear(folder: Path) -> None:
    """Whatever an earlier run left that this one could take for its own; last of all what says whose it was."""
    (folder / "result.json").unlink(missing_ok=True)
    for path in (*folder.glob("checkpoint-*"), folder / "encoder", folder / "tasks"):
        if path.exists():
            shutil.rmtree(path)
    (folder / "run.yaml").unlink(missing_ok=True)


def _same_run(folder: Path, config: RunConfig, root: Path | None) -> None:
    """A run that has not come to a checkpoint may be changed; where its folder lies does not matter."""
    stored = folder / "run.yaml"
    if not ((folder / "result.json").is_file() or checkpoints.last_complete(folder)):
        return
    if not stored.is_file():
        raise InvalidOptionError(f"output: {folder} holds a run without its run.yaml; start anew (--anew)")
    before = from_dict(load(stored), str(stored)).as_dict()
    now = config.as_dict()
    changed = [name for name in now if name != "output" and now[name] != before[name]]
    inside = root is not None and Path(config.model).absolute().is_relative_to(root.absolute())
    if inside and "model" in changed and _from_output(before) == _from_output(now):
        changed.remove("model")
    if changed:
        raise InvalidOptionError(
            f"output: {folder} holds a run with another {', '.join(changed)}; "
            "choose another folder, or start anew (--anew)"
        )


def _from_output(run: Mapping[str, str]) -> str:
    """Where the model lies, seen from the run's folder."""
    return os.path.relpath(run["model"], run["output"])


def _finish(
    config: RunConfig, trainer: StiltsTrainer, model: MultiTaskModel, tokenizer: Any, sets: dict[str, TrainingSet]
) -> Trained:
    """Save models and result. ``result.json`` comes last: a run is finished when it is there."""
    folder = Path(config.output)
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    state = trainer.accelerator.get_state_dict(trainer.model)  # whole, in the first process; all must ask for it
    if trainer.is_world_process_zero():
        model.save_encoder(folder / "encoder", state)
        tokenizer.save_pretrained(folder / "encoder")
        for name in model.types:
            model.save_task(name, folder / "tasks" / name, state)
            tokenizer.save_pretrained(folder / "tasks" / name)
        notes = {name: dict(s.features.notes) for name, s in sets.items()}
        notes.update({f"{name} dev": dict(s.dev.skipped) for name, s in sets.items() if s.dev.skipped})
        result = {
            "score": metrics.get("score"),
            "metrics": metrics,
            "steps": trainer.state.global_step,
            "notes": notes,
            "log": trainer.state.log_history,
        }
        files.write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        _drop_checkpoints(folder, config)
    trainer.accelerator.wait_for_everyone()  # the other processes read what the first one wrote
    return _read_result(folder)


def _drop_checkpoints(folder: Path, config: RunConfig) -> None:
    """Of a finished run: three times the model each, and of no use any more."""
    for checkpoint in () if config.keep_checkpoints else folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _read_result(folder: Path) -> Trained:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Trained(folder, result["score"], result["metrics"], result["steps"], result["notes"])
