"""What a network is made of, read without a GPU: its definition, and what a build tells a verbose log after fusion."""

from __future__ import annotations

import re
from typing import Any

from xfast.backends.tensorrt_runtime import Log


def describe(network: Any) -> list[dict[str, Any]]:
    """The layers of a network definition in their order.

    Returns:
        One dict a layer: ``name``, ``type`` (``"NORMALIZATION"``, ...), ``inputs`` and ``outputs``: a list of
        ``{"name", "dtype", "shape"}``, dtypes as ``"FLOAT"``, ``"HALF"``, ``"BF16"``, ``"INT32"``, -1 for a dynamic
        size. Inputs that are left out do not appear.
    """
    made = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(place) for place in range(layer.num_inputs)]
        outputs = [layer.get_output(place) for place in range(layer.num_outputs)]
        made.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "inputs": [_tensor(tensor) for tensor in inputs if tensor is not None],
                "outputs": [_tensor(tensor) for tensor in outputs if tensor is not None],
            }
        )
    return made


def _tensor(tensor: Any) -> dict[str, Any]:
    try:
        shape = list(tensor.shape)
    except ValueError:  # its rank is not known: the network is wrong
        shape = None
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": shape}


_COMPILED = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<rest>.*)$", re.MULTILINE)
_COMPILED_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: .*?Datatype: (?P<dtype>\w+)")


def compiled_layers(log: Log) -> list[dict[str, Any]]:
    """What TensorRT made of the network: the layers after fusion as a build told a verbose log, no GPU needed.

    Returns:
        One dict for each layer of each profile: ``name``, ``type`` (``"gemm"``, ``"kgen"`` for generated ones, ...),
        ``inputs``, ``constants`` and ``outputs``: a list of ``{"name", "dtype"}``, dtypes as ``"Float"``, ``"Half"``.
        What a kernel computes in between is not told. Empty when the messages do not hold it (another version, not
        verbose).
    """
    found: list[dict[str, Any]] = []
    for _, text in log.messages:
        for match in _COMPILED.finditer(text) if "LayerType: " in text else ():
            parts = re.split(r", (?:Constants|Outputs|TacticName): ", match["rest"])
            lists = [[m.groupdict() for m in _COMPILED_TENSOR.finditer(part)] for part in (*parts, "", "")[:3]]
            found.append(
                {"name": match["name"], "type": match["type"]}
                | dict(zip(("inputs", "constants", "outputs"), lists, strict=True))
            )
    return found
