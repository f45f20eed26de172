"""``xfast export onnx``: a model as ONNX, for any batch and length, proved with ONNX Runtime before it is kept.

PyTorch's exporter traces the original modules; nothing of xfast is in the file. The graph is PyTorch's, operator by
operator: engines that want attention, LayerNorm or GELU fused have passes of their own for that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import nn

import xfast
from xfast.architecture import (
    EncoderSpec,
    describe,
    family_of,
    find_encoders,
    require_finite,
    require_values,
    supported_families,
)
from xfast.calibration import evaluated
from xfast.checkpoint import loading, require_whole
from xfast.errors import (
    BackendUnavailableError,
    DataFileError,
    InvalidOptionError,
    InvalidWeightsError,
    UnsupportedModelError,
    XfastError,
)
from xfast.heads import rule_for
from xfast.logs import errors_only
from xfast.pages import printable
from xfast.tensor_files import exists, is_folder
from xfast.terminal import JsonFlag

OUTPUTS = {
    "ForSequenceClassification": ("logits",),
    "ForMultipleChoice": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "ForMaskedLM": ("logits",),
}
"""What each head returns, by the ending of its class. A bare encoder returns its states and the pooler's, if any."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference from PyTorch, relative to an output's largest value, plus ``FLOOR``: sums in another order."""
FLOOR = 1e-6
MAX_FILE_BYTES = 1_500_000_000
"""Weights above this go to a second file, ``OUT.data``: a protobuf ends at 2 GiB, its graph included."""
LENGTHS = (1, 7, 64)
"""Columns of the batches that an export is proved on; the model's longest comes last."""
EXAMPLE = {"batch": 2, "choices": 3, "length": 11}
"""Sizes to trace with: all differ, and none is 1, which PyTorch would take for a constant."""

Progress = Callable[[str], Any]
"""Told what is being done."""


class ExportError(XfastError, RuntimeError):
    """The model could not be exported, or what was exported does not compute what the model does."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the model.
        data: the file beside it that holds its weights, or None when it holds them itself.
        bytes: of both.
        opset: of ONNX's own operators.
        inputs, outputs: their names. Inputs are int64 [batch, length], for multiple choice [batch, choices, length].
        error: largest difference from PyTorch, relative to the output's largest value.
        batches: how many batches it was proved on.
    """

    path: Path
    data: Path | None
    bytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float
    batches: int


class _Traced(nn.Module):
    """A model whose inputs and outputs are tensors in a fixed order."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        made = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **given,
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
        )
        return tuple(made[name] for name in self.outputs)


def export_onnx(
    model: nn.Module, out: str | Path, *, force: bool = False, progress: Progress | None = None
) -> Exported:
    """Write ``model`` to ``out`` as ONNX, for any batch and length.

    An accelerated model is exported as it was before, all its layers; it is accelerated again afterwards. ``out`` gets
    its name only when ONNX Runtime has returned on it what the model returns, on batches with padding on either side
    and holes; until then, and after any failure, what was there stays.

    Args:
        model: a supported encoder, or a transformers head around one; weights in float32.
        out: a file to make; ``OUT.data`` beside it is the second one, if there is one.
        force: replace ``out`` and its data if they are there.
        progress: called with a word on each step.

    Raises:
        BackendUnavailableError: a package is missing; says what to install.
        UnsupportedModelError: not such a model.
        InvalidWeightsError: weights of another type, NaN or infinity.
        WeightsFreedError: ``keep_weights=False`` gave up the originals.
        InvalidOptionError: ``out`` is there already, or a folder.
        DataFileError: ``out`` cannot be written.
        ExportError: PyTorch cannot export the model, or the file computes something else.
    """
    tell, out = progress or (lambda _: None), Path(out)
    require_packages()
    outputs = outputs_of(model)
    check_free(out, force)
    data = _data_of(out)
    with xfast.restored(model), _folder_beside(out) as folder, torch.no_grad():
        _check_weights(model)
        made, example = folder / out.name, _example(model)
        with _as_traced(model):
            tell("exporting")
            opset = _write(_Traced(model, outputs), made, example)
            error, batches = _prove(model, made, outputs, tell)
        parts = [path for path in (folder / data.name, made) if path.exists()]
        size = sum(path.stat().st_size for path in parts)
        check_free(out, force)  # again: minutes have passed
        _put(parts, out, data)
    return Exported(out, data if len(parts) == 2 else None, size, opset, tuple(example), outputs, error, batches)


def require_packages() -> None:
    """Raises BackendUnavailableError when one of ``PACKAGES`` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"ONNX export needs {', '.join(missing)}: pip install {' '.join(missing)}")


def outputs_of(model: nn.Module) -> tuple[str, ...]:
    """Names of what the model returns.

    Raises:
        UnsupportedModelError: neither a supported encoder nor a known head around one.
    """
    if family_of(model) is not None:
        return ("last_hidden_state", "pooler_output")[: 1 if model.pooler is None else 2]
    rule, encoder = rule_for(model), getattr(model, "base_model", None)
    # A rule may be of one family's class alone, and its ending that class's whole name
    ending = next((one for one in OUTPUTS if rule is not None and rule.modules and rule.ending.endswith(one)), None)
    if ending is None or encoder is None or family_of(encoder) is None:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} cannot be exported; accepted: {supported_families()}, "
            f"alone or with the head {', '.join(OUTPUTS)}"
        )
    return OUTPUTS[ending]


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        require_values(name, parameter)
        if parameter.dtype != torch.float32:
            raise InvalidWeightsError(f"{name} is {parameter.dtype}; accepted: torch.float32, see model.float()")
        require_finite(name, parameter)


def check_free(out: Path, force: bool) -> None:
    """Raises InvalidOptionError when ``out`` or its data file is there and may not be replaced, or is a folder."""
    if is_folder(out):
        raise InvalidOptionError(f"out: {out} is a folder; accepted: a file, such as {out / 'model.onnx'}")
    for path in (out, _data_of(out)):
        if is_folder(path) or (exists(path) and not force):
            raise InvalidOptionError(f"out: {path} exists; --force (force=True) replaces a file")


def _data_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.data")


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder on the same disk, so that its files can be renamed to ``out``; it goes whatever happens."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise DataFileError(f"out: {out} cannot be written: {type(error).__name__}: {error}") from error


def _put(parts: list[Path], out: Path, data: Path) -> None:
    """Renames into place. Of two files neither is right without the other: ``out`` goes first and comes last."""
    for part in parts:
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # a name must not outlive a power failure that the contents do not
    if len(parts) == 2 or data.exists():
        with suppress(FileNotFoundError):
            out.unlink()
        with suppress(FileNotFoundError):
            data.unlink()  # of the model that is replaced
    for part in parts:
        part.replace(out.with_name(part.name))


@contextmanager
def _as_traced(model: nn.Module) -> Iterator[None]:
    """Evaluation, and the one attention implementation that has an ONNX form; as it was afterwards."""
    attention = model.config._attn_implementation
    with evaluated(model):
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(attention)


def _spec(model: nn.Module) -> EncoderSpec:
    ((_, encoder, family), *_) = find_encoders(model)
    return describe(encoder, family).spec


def _shape(model: nn.Module, sizes: dict[str, int]) -> tuple[int, ...]:
    names = ("batch", "choices", "length") if _has_choices(model) else ("batch", "length")
    return tuple(sizes[name] for name in names)


def _has_choices(model: nn.Module) -> bool:
    rule = rule_for(model)
    return rule is not None and rule.ending == "ForMultipleChoice"


def _example(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors to trace with, by input."""
    spec, device = _spec(model), next(model.parameters()).device
    shape = _shape(model, {**EXAMPLE, "length": min(EXAMPLE["length"], spec.usable_positions)})
    ids = torch.full(shape, 0 if spec.pad_token_id else 1, device=device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"token_type_ids": torch.zeros_like(ids)} if spec.type_vocab_size > 1 else {})


def _write(traced: _Traced, path: Path, example: dict[str, torch.Tensor]) -> int:
    """Exports to ``path``; returns the opset."""
    dims = [torch.export.Dim(name) for name in (EXAMPLE if _has_choices(traced.model) else ("batch", "length"))]
    try:
        with warnings.catch_warnings(), errors_only("torch.onnx"):  # it logs operators of packages not installed
            warnings.simplefilter("ignore")  # the exporter's deprecations are between it and PyTorch
            program = torch.onnx.export(
                traced,
                (),
                kwargs=example,
                input_names=list(example),
                output_names=list(traced.outputs),
                dynamic_shapes={name: dict(enumerate(dims)) for name in example},
                dynamo=True,
                verbose=False,
            )
            size = sum(parameter.numel() * parameter.element_size() for parameter in traced.parameters())
            program.save(path, external_data=size > MAX_FILE_BYTES)
            return int(program.model.opset_imports[""])
    except OSError:
        raise  # of the disk: the caller names the file
    except Exception as error:  # the exporter raises whatever its passes do
        text = " ".join(str(error).split())[:500]
        raise ExportError(f"{type(traced.model).__name__} was not exported: {type(error).__name__}: {text}") from error


def samples(spec: EncoderSpec) -> Iterator[dict[str, torch.Tensor]]:
    """Batches to compare on, of ``LENGTHS`` and the longest: padding on the right, on the left, holes, none."""
    generator = torch.Generator("cpu").manual_seed(0)
    longest = spec.usable_positions
    for length in (*(each for each in LENGTHS if each < longest), longest):
        rows = 2 if length == longest else 4
        mask = torch.ones(rows, length, dtype=torch.int64, device="cpu")
        mask[0, (length + 1) // 2 :] = 0
        mask[1, : length // 2] = 0
        if rows > 2 and length > 2:
            mask[2, 1 : length - 1 : 2] = 0
        ids = torch.randint(0, spec.vocab_size - 1, mask.shape, generator=generator, device="cpu")
        ids += (ids >= spec.pad_token_id).long()  # any but the padding id
        ids[mask == 0] = spec.pad_token_id
        types = torch.randint(0, spec.type_vocab_size, mask.shape, generator=generator, device="cpu")
        yield {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if types.any() else {})


def _prove(model: nn.Module, path: Path, outputs: tuple[str, ...], tell: Progress) -> tuple[float, int]:
    """(largest error, number of batches), or raises ExportError."""
    names, run = _session(path)
    device, worst, count = next(model.parameters()).device, 0.0, 0
    for batch in samples(_spec(model)):
        length = batch["input_ids"].shape[1]
        tell(f"comparing at length {length}")
        if _has_choices(model):
            batch = {name: values.view(-1, 2, length) for name, values in batch.items()}
        given = {name: batch.get(name, torch.zeros_like(batch["input_ids"])) for name in names}
        want = _Traced(model, outputs)(**{name: values.to(device) for name, values in given.items()})
        for name, ours, theirs in zip(outputs, run(outputs, given), want, strict=True):
            error = _error(ours, theirs.cpu())
            if not error <= TOLERANCE:  # NaN is not, either
                raise ExportError(
                    f"ONNX Runtime's {name} differs from PyTorch's by {error:.1e} (allowed {TOLERANCE:.0e}) "
                    f"on a batch of shape {tuple(given['input_ids'].shape)}; nothing was written"
                )
            worst = max(worst, error)
        count += 1
    return worst, count


def _session(path: Path) -> tuple[list[str], Callable[..., list[torch.Tensor]]]:
    """Names of the inputs, and what runs the file: (names of outputs, tensors by input) to tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a dozen types, with no base of their own
        raise ExportError(f"ONNX Runtime does not load the export: {' '.join(str(error).split())[:500]}") from error

    def run(outputs: tuple[str, ...], given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        try:
            made = session.run(list(outputs), {name: values.numpy() for name, values in given.items()})
        except Exception as error:
            raise ExportError(f"ONNX Runtime does not run the export: {' '.join(str(error).split())[:500]}") from error
        return [torch.from_numpy(values) for values in made]

    return [each.name for each in session.get_inputs()], run


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    scale = float(want.abs().max()) + FLOOR / TOLERANCE
    return float((got - want).abs().max()) / scale


def load(model: str, encoder: bool = False) -> nn.Module:
    """A checkpoint's model in fp32, with the head that it was saved with or, with ``encoder``, without.

    Raises:
        DataFileError: there is no such checkpoint, or it lacks weights.
        UnsupportedModelError: its class is not in transformers, or not one that can be exported.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    with loading(model):
        config = transformers.AutoConfig.from_pretrained(model)
        names = config.architectures or ["AutoModel"]
        cls = transformers.AutoModel if encoder else getattr(transformers, names[0], None)
        if cls is None:
            raise UnsupportedModelError(f"model: {model} is a {names[0]}, which transformers does not have")
        made, facts = cls.from_pretrained(model, **options)
        if facts["missing_keys"] and all(name.startswith("pooler.") for name in facts["missing_keys"]):
            # saved with a head that reads the encoder itself
            made, facts = cls.from_pretrained(model, add_pooling_layer=False, **options)
    outputs_of(made)
    require_whole(model, facts)
    return made


app = typer.Typer(no_args_is_help=True, help="Models for other engines.")


@app.callback()
def _group() -> None:
    """A group even while it has a single command."""


@app.command()
def onnx(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a transformers model.")],
    out: Annotated[Path, typer.Argument(help="The file to write. Weights above 1.5 GB go to OUT.data beside it.")],
    encoder: Annotated[bool, typer.Option("--encoder", help="Without the head it was saved with.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT and OUT.data if they are there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a model as ONNX for any batch and length, compared with PyTorch by ONNX Runtime before OUT appears."""
    require_packages()
    check_free(out, force)  # before a minute of loading
    started = time.perf_counter()
    console = Console(stderr=True)
    with console.status("loading") as status:
        made = export_onnx(load(model, encoder), out, force=force, progress=status.update)
    facts = vars(made) | {"path": str(made.path), "data": None if made.data is None else str(made.data)}
    if as_json:
        typer.echo(json.dumps(facts | {"seconds": round(time.perf_counter() - started, 1)}, indent=1))
        return
    written = printable(f"{made.path}" if made.data is None else f"{made.path} and {made.data.name}")
    Console(width=200).print(
        f"{written}: {made.bytes / 2**20:.1f} MiB, opset {made.opset}, {', '.join(made.outputs)}; "
        f"within {made.error:.1e} of PyTorch on {made.batches} batches",
        markup=False,  # names of files may look like it
        highlight=False,
        soft_wrap=True,
    )
