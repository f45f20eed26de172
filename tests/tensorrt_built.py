"""What tests of the TensorRT network share: networks of tiny models, evaluated or built, and what goes into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import numpy as np
import tensorrt_rtx as trt
import torch
from tensorrt_interpreter import Interpreter

from xfast.architecture import EncoderWeights, describe, find_encoders
from xfast.backends.tensorrt_network import INPUTS, OUTPUT, build_network
from xfast.packing import unpad

CAPABILITIES = ("SM80", "SM89", "SM120")
RAGGED = (9, 1, 17, 13)  # rows of length 1, primes and a multiple of three


class Log(trt.ILogger):
    """Keeps what TensorRT has to say."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


class Without:
    """A network whose release lacks some calls."""

    def __init__(self, network: Any, missing: Sequence[str]) -> None:
        self._network, self._missing = network, missing

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(name)
        return getattr(self._network, name)


class Built:
    """A network and everything that must outlive it."""

    def __init__(
        self, weights: EncoderWeights, precision: str, layers: int | None = None, missing: Sequence[str] = ()
    ) -> None:
        self.log = Log()
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        target = Without(self.network, missing) if missing else self.network
        self.arrays = build_network(trt, target, weights, precision, layers)
        assert not self.log.errors

    def run(self, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = Interpreter(trt, self.network, self.arrays)(feeds)
        assert outputs.keys() == {OUTPUT}
        return outputs[OUTPUT]

    def names(self) -> list[str]:
        return [self.network.get_layer(i).name for i in range(self.network.num_layers)]

    def serialized(self, *capabilities: str, tokens: int = 512) -> int:
        """Bytes of an engine for GPUs of these compute capabilities."""
        config = self.builder.create_builder_config()
        profile = self.builder.create_optimization_profile()
        sizes = {"T": (1, tokens // 4, tokens), "B": (1, 4, 32), "L": (1, 24, 40), "R": (1, 8, tokens)}
        for name, dims in INPUTS.items():
            profile.set_shape(name, *(tuple(sizes[dim][i] for dim in dims) for i in range(3)))
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            assert config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
        engine = self.builder.build_serialized_network(self.network, config)
        assert engine is not None and not self.log.errors, self.log.errors
        return int(engine.nbytes)


def described(model: Any) -> EncoderWeights:
    ((_, encoder, family),) = find_encoders(model)
    return describe(encoder, family)


def made(family: str = "xlm-roberta", **changes: Any) -> tuple[Any, EncoderWeights]:
    model = models.build(family, "base-no-pooler", **changes)
    return model, described(model)


def batch_of(family: str, lengths: Sequence[int], types: int) -> dict[str, torch.Tensor]:
    batch = models.ragged(family, lengths)
    if types > 1:
        batch["token_type_ids"] = (torch.arange(batch["input_ids"].shape[1]) % types).expand_as(batch["input_ids"])
    return batch


def feeds_of(weights: EncoderWeights, batch: dict[str, torch.Tensor], rows: Sequence[int] | None) -> dict[str, Any]:
    """The network's inputs for a batch padded on the right."""
    packed = unpad(weights.spec, **batch)
    starts, lengths = packed.cu_seqlens[:-1], np.diff(packed.cu_seqlens)
    columns = np.arange(lengths.max())
    padded = np.where(columns < lengths[:, None], starts[:, None] + columns, 0)
    values = {
        "token_ids": packed.ids,
        "position_ids": packed.position_ids,
        "type_ids": packed.type_ids,
        "padded_rows": padded,
        "lengths": lengths,
        "packed_columns": packed.indices,
        "rows": np.arange(packed.total_tokens) if rows is None else np.array(rows),
    }
    return {name: torch.tensor(np.asarray(value), dtype=torch.int32) for name, value in values.items()}


def expected(
    model: Any, batch: dict[str, torch.Tensor], rows: Sequence[int] | None = None, layers: int | None = None
) -> torch.Tensor:
    """[R, hidden_size] of the original, in its dtype."""
    states = model(**batch, output_hidden_states=True).hidden_states
    packed = states[-1 if layers is None else layers][batch["attention_mask"].bool()]
    return packed if rows is None else packed[list(rows)]
