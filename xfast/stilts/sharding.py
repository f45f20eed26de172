"""FSDP2 (PyTorch's fully sharded training): parameters, gradients and optimizer state spread over a run's processes.

``trainer: {fsdp: true}`` asks for it. ``Trainer`` and ``accelerate`` shard the model; what is here keeps the rest of a
run as it is without: the arithmetic, the checkpoints, and the whole models that it leaves. On CPUs, where accelerate
1.15 would train unsharded without a word, it is switched on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any

import torch
import transformers
from torch import nn

from xfast.errors import BackendUnavailableError, InvalidOptionError
from xfast.stilts.config import RunConfig

VERSION = 2
"""FSDP1 is refused: torch 2.13 reads freed memory when it collects a whole model on CPUs, and accelerate 1.15 does not
load its sharded optimizer state back. transformers calls it deprecated."""

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")

_DEFAULTS = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}
"""What TrainingArguments adds to ``fsdp_config`` by itself."""

_SPELLINGS = {"full_shard", "shard_grad_op", "auto_wrap"}
"""Words of the older form of ``fsdp``; "offload" is one more for transformers, and was never tested here."""


def check_wish(trainer: Mapping[str, Any]) -> None:
    """Refuse DeepSpeed and other spellings of ``fsdp``, before transformers sees them.

    Raises:
        InvalidOptionError: says what to use instead.
    """
    if trainer.get("deepspeed"):
        raise InvalidOptionError("trainer: deepspeed: what it shards cannot be saved from here; use `fsdp: true`")
    asked = trainer.get("fsdp", False)
    words = asked.split() if isinstance(asked, str) else asked
    if not isinstance(words, bool) and not (isinstance(words, list | tuple) and set(words) <= _SPELLINGS):
        raise InvalidOptionError(f"trainer: fsdp: {asked!r}; accepted: true, or {', '.join(sorted(_SPELLINGS))}")


def check(config: RunConfig, arguments: transformers.TrainingArguments) -> None:
    """Refuse what would train otherwise than asked, or was never tested.

    Raises:
        InvalidOptionError: FSDP in one process, or an option that does not go with it.
        BackendUnavailableError: transformers is too old.
    """
    if not config.trainer.get("fsdp"):
        return
    if getattr(arguments, "fsdp_plugin_args", None) is None:
        raise BackendUnavailableError(f"trainer: fsdp: transformers {transformers.__version__} is too old; 5.23 has it")
    if arguments.world_size < 2:
        raise InvalidOptionError("trainer: fsdp: shards over several processes, this is one; start it with torchrun")
    _check_settings(dict(arguments.fsdp_config))
    if arguments.optim not in OPTIMIZERS:
        raise InvalidOptionError(f"trainer: optim: {arguments.optim}; accepted with fsdp: {', '.join(OPTIMIZERS)}")
    if config.batching == "packed":
        raise InvalidOptionError("batching: packed needs whole weights, which fsdp shards; accepted: length, random")
    if config.precision == "fp16":
        raise InvalidOptionError("precision: fp16 was never tested with fsdp; accepted: fp32, bf16")


def _check_settings(settings: dict[str, Any]) -> None:
    if (version := settings.pop("version", VERSION)) != VERSION:
        raise InvalidOptionError(
            f"trainer: fsdp_config: version: {version!r}; accepted: {VERSION} (FSDP1's checkpoints continue no run)"
        )
    settings.pop("reshard_after_forward", None)
    if settings.pop("activation_checkpointing", False):  # accelerate's recomputes with another dropout mask
        raise InvalidOptionError("trainer: fsdp_config: activation_checkpointing; use the run's gradient_checkpointing")
    if other := [name for name, value in settings.items() if name not in _DEFAULTS or _DEFAULTS[name] != value]:
        raise InvalidOptionError(
            f"trainer: fsdp_config: {', '.join(other)} follows from the run; accepted: version, reshard_after_forward"
        )


def settle(arguments: transformers.TrainingArguments) -> None:
    """Give accelerate what follows from the run, before the Trainer makes its accelerator."""
    if getattr(arguments, "fsdp_plugin_args", None) is not None:
        # every process writes its own part: none has to hold the whole model and optimizer
        arguments.fsdp_plugin_args["state_dict_type"] = "SHARDED_STATE_DICT"


def switch_on(trainer: Any) -> None:
    """Called when the Trainer has its accelerator. Does nothing in a run without ``fsdp``."""
    arguments, state = trainer.args, trainer.accelerator.state
    if getattr(arguments, "fsdp_plugin_args", None) is None:
        return
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate knows FSDP on devices alone and leaves the plugin out; torch has it on CPUs, too
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
        for shared in (PartialState(), state):  # each new AcceleratorState copies from PartialState
            shared.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    # Mixed precision is autocast, as in one process. The plugin's would hold LayerNorms and sum gradients in bf16.
    state.fsdp_plugin.mixed_precision_policy = None


def fill(optimizer: Any) -> None:
    """Give every parameter the state with which AdamW begins, instead of at its first gradient.

    A checkpoint is asked for the state of all parameters, that of heads without a step before it, too.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] or group["capturable"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def with_autocast(trainer: Any, model: nn.Module) -> None:
    """Sharded models run without the autocast that accelerate puts around any other."""
    accelerator = trainer.accelerator
    if not trainer.is_fsdp_enabled or accelerator.mixed_precision == "no":
        return
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without FSDP2's warning about outputs that are views: nothing here changes an output in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield
