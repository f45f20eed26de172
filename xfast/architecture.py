"""Models as data: what an encoder looks like, and which weight plays which role in which family.

A backend only ever sees :class:`EncoderSpec` and :class:`EncoderWeights`. A new family is a new row of ``FAMILIES``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from xfast.errors import InvalidWeightsError, UnsupportedModelError


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes and rules of one encoder. Sizes in elements.

    ``norm`` is ``"post"`` (x = LN(x + f(x)), BERT to XLM-R) or ``"pre"`` (x = x + f(LN(x)), XLM-R-XL).
    ``final_norm``: a LayerNorm follows the last layer (not one before it when fewer are run).
    ``position_rule`` is ``"columns"`` (0, 1, 2, ...; BERT) or ``"padding"`` (RoBERTa: ids other than ``pad_token_id``
    count from ``pad_token_id + 1``, padding keeps ``pad_token_id``).
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str
    norm: str
    position_rule: str
    pad_token_id: int
    embedding_norm: bool = True
    final_norm: bool = False

    def product_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a layer's product, "qkv", "attention_out", "ffn_in" or "ffn_out", or of a linear role."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = {"qkv": (3 * hidden, hidden), "ffn_in": (inner, hidden), "ffn_out": (hidden, inner)}
        return shapes.get(name, (hidden, hidden))

    @property
    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return self.pad_token_id + 1 if self.position_rule == "padding" else 0

    @property
    def usable_positions(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_positions - self.first_position


@dataclass(frozen=True)
class Family:
    """One row: the classes of a family and how its modules map to roles."""

    name: str
    encoder_classes: tuple[str, ...]
    norm: str
    position_rule: str
    paths: dict[str, str]  # role -> module path below a layer
    outer_paths: dict[str, str]  # role -> module path below the encoder, outside the layers


_POST_NORM_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_PRE_NORM_LAYER = {
    **_POST_NORM_LAYER,
    "attention_norm": "attention.self_attn_layer_norm",
    "ffn_norm": "LayerNorm",
}
_TABLES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "type": "embeddings.token_type_embeddings",
}
_POST_NORM = {**_TABLES, "embedding_norm": "embeddings.LayerNorm"}
_PRE_NORM = {**_TABLES, "final_norm": "encoder.LayerNorm"}

FAMILIES = (
    Family("xlm-roberta", ("XLMRobertaModel",), "post", "padding", _POST_NORM_LAYER, _POST_NORM),
    Family("xlm-roberta-xl", ("XLMRobertaXLModel",), "pre", "padding", _PRE_NORM_LAYER, _PRE_NORM),
    Family("roberta", ("RobertaModel",), "post", "padding", _POST_NORM_LAYER, _POST_NORM),
    Family("camembert", ("CamembertModel",), "post", "padding", _POST_NORM_LAYER, _POST_NORM),
    Family("altclip", ("AltRobertaModel",), "post", "padding", _POST_NORM_LAYER, _POST_NORM),
    Family("bert", ("BertModel",), "post", "columns", _POST_NORM_LAYER, _POST_NORM),
)

LINEAR_ROLES = ("query", "key", "value", "attention_out", "ffn_in", "ffn_out")
QKV_ROLES = LINEAR_ROLES[:3]
PRECISION_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that weights may have, by the precision that computes in them."""
NORM_ROLES = ("attention_norm", "ffn_norm")


@dataclass(frozen=True)
class EncoderWeights:
    """The modules of one encoder by role; parameters are read from them when packing, so they are never stale.

    ``modules`` maps ``(layer, role)`` to a module, with layer -1 for what is outside the layers, and ``names`` to its
    dotted path.
    """

    spec: EncoderSpec
    modules: dict[tuple[int, str], nn.Module]
    names: dict[tuple[int, str], str]

    def parameters(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Yields (dotted name, module, parameter name) of every parameter the forward pass reads."""
        for key, module in self.modules.items():
            for parameter in ("weight", "bias"):
                if getattr(module, parameter, None) is not None:
                    yield f"{self.names[key]}.{parameter}", module, parameter

    def loose(self) -> list[tuple[nn.Module, str]]:
        """(module, attribute name) of weights that are plain attributes, in no module's parameters."""
        return [(module, name) for _, module, name in self.parameters() if name in module.__dict__]


def supported_families() -> str:
    """Human-readable list of the encoder classes that can be accelerated."""
    return ", ".join(f"{family.name} ({', '.join(family.encoder_classes)})" for family in FAMILIES)


def family_of(module: nn.Module) -> Family | None:
    """The family whose encoder class ``module`` is (or inherits ``forward`` from), else None."""
    for cls in type(module).__mro__:
        if not cls.__module__.startswith("transformers."):
            continue
        for family in FAMILIES:
            if cls.__name__ in family.encoder_classes:
                return family
    return None


def find_encoders(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """All supported encoders inside ``model`` as (dotted name, module, family)."""
    found = []
    for name, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            found.append((name, module, family))
    return found


def describe(module: nn.Module, family: Family) -> EncoderWeights:
    """Reads spec and weight roles off an encoder.

    Raises:
        UnsupportedModelError: the encoder differs from its family in a way that would change results (decoder mode,
            another activation, relative positions, replaced or wrapped layers, an overridden forward).
    """
    config = module.config
    _refuse(module, family)
    layers_path, layers = _layers(module)
    hidden, heads = config.hidden_size, config.num_attention_heads
    spec = EncoderSpec(
        family=family.name,
        num_layers=len(layers),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.intermediate_size,
        **{size: _rows(module, family, table) for table, size in _SIZES.items()},
        layer_norm_eps=float(config.layer_norm_eps),
        activation="gelu",
        norm=family.norm,
        position_rule=family.position_rule,
        pad_token_id=_padding_idx(module, family),
        embedding_norm="embedding_norm" in family.outer_paths,
        final_norm="final_norm" in family.outer_paths,
    )
    modules: dict[tuple[int, str], nn.Module] = {}
    names: dict[tuple[int, str], str] = {}
    places = [(-1, "", role, path) for role, path in family.outer_paths.items()]
    for layer in range(spec.num_layers):
        places += [(layer, f"{layers_path}.{layer}.", role, path) for role, path in family.paths.items()]
    for layer, prefix, role, path in places:
        key = (layer, role)
        modules[key], names[key] = _leaf(module, prefix + path, role), prefix + path
    weights = EncoderWeights(spec, modules, names)
    _check_shapes(weights)
    return weights


def _layers(encoder: nn.Module) -> tuple[str, nn.ModuleList]:
    name = "layer" if hasattr(encoder.encoder, "layer") else "layers"  # so AltRoberta calls them in transformers 5
    return f"encoder.{name}", getattr(encoder.encoder, name)


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """An encoder's layers."""
    return _layers(encoder)[1]


def output_dtype(encoder: nn.Module) -> torch.dtype:
    """The dtype of an encoder's hidden states: that of the LayerNorm outside its layers."""
    outer: Any = encoder.embeddings if hasattr(encoder.embeddings, "LayerNorm") else encoder.encoder
    return cast("torch.dtype", outer.LayerNorm.weight.dtype)


def check_class(encoder: nn.Module) -> None:
    """Refuses an encoder that transformers built from the wrong class.

    A published config.json of XLM-R-XXL says ``model_type: xlm-roberta``, from which the Auto classes build a post-norm
    model: most weights fit, the LayerNorms are new. ``architectures`` in the same file tells.

    Raises:
        UnsupportedModelError: names the class to load the checkpoint with.
    """
    family, config = family_of(encoder), encoder.config
    for name in getattr(config, "architectures", None) or ():
        meant = _family_named(name)
        if family is not None and meant is not None and meant.norm != family.norm:
            raise UnsupportedModelError(
                f"the checkpoint holds a {name} (config.architectures), whose LayerNorms sit elsewhere, but its "
                f"model_type {config.model_type!r} made transformers build a {type(encoder).__name__}, which gives "
                f"meaningless results; load it with transformers.{name} or another class of {meant.name}, or correct "
                "model_type in its config.json"
            )


def _family_named(architecture: str) -> Family | None:
    """The family that a class name such as XLMRobertaXLForMaskedLM belongs to."""
    stems = {cls.removesuffix("Model"): family for family in FAMILIES for cls in family.encoder_classes}
    return stems[max(found, key=len)] if (found := [s for s in stems if architecture.startswith(s)]) else None


_SIZES = {"word": "vocab_size", "position": "max_positions", "type": "type_vocab_size"}


def _rows(encoder: nn.Module, family: Family, table: str) -> int:
    """Of a table's tensor: it may be another than the module was made with, and ``num_embeddings`` still the old."""
    return (*_shape(_leaf(encoder, family.outer_paths[table], table).weight), 0)[0]


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return () if tensor is None or is_lazy(tensor) else tuple(tensor.shape)


def _check_shapes(weights: EncoderWeights) -> None:
    """Refuses layers that no longer have the sizes of the spec (pruned heads, swapped modules)."""
    spec = weights.spec
    for at, module in weights.modules.items():
        shape: tuple[int, ...] = spec.product_shape(at[1]) if at[1] in LINEAR_ROLES else (spec.hidden_size,)
        if at[1] in _SIZES:
            shape = (max(1, getattr(spec, _SIZES[at[1]])), spec.hidden_size)
        for parameter, expected in (("weight", shape), ("bias", shape[:1])):
            found = getattr(module, parameter, None)
            if (found is not None or parameter == "weight") and _shape(found) != expected:
                has = f"{weights.names[at]}.{parameter} has shape {_shape(found)}"
                raise UnsupportedModelError(f"{has}, expected {expected}")
    for name, module, parameter in weights.parameters():
        if not is_plain_tensor(getattr(module, parameter)):
            raise UnsupportedModelError(f"{name} is no plain dense tensor (quantised, sparse or of a class of its own)")


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a dense array in memory, not one of a class that computes its values itself (torchao)."""
    return tensor.layout == torch.strided and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def require_values(name: str, tensor: torch.Tensor) -> None:
    """Raises InvalidWeightsError where a parameter has no values."""
    if is_lazy(tensor) or tensor.is_meta:
        where = "not initialised" if is_lazy(tensor) else "on the meta device"
        raise InvalidWeightsError(f"{name} is {where}: it has no values; load the weights first")


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises InvalidWeightsError where a tensor holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InvalidWeightsError(f"{name} holds NaN or infinity")


def _padding_idx(module: nn.Module, family: Family) -> int:
    if family.position_rule == "padding":
        if module.embeddings.padding_idx is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no padding token (pad_token_id is None), from whose number its positions "
                "count; accepted: a pad_token_id, 1 in published models"
            )
        return int(module.embeddings.padding_idx)
    pad = module.config.pad_token_id
    return 0 if pad is None else int(pad)


_REASONS = 4  # that are told: adapters change every layer


def _refuse(module: nn.Module, family: Family) -> None:
    check_class(module)
    config = module.config
    reasons = []
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        reasons.append("it is configured as a decoder")
    if config.hidden_act != "gelu":
        reasons.append(f"its activation is {config.hidden_act!r}; supported: 'gelu' (exact)")
    position_type = getattr(config, "position_embedding_type", None) or "absolute"
    if position_type != "absolute":
        reasons.append(f"its positions are {position_type!r}; supported: 'absolute'")
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        reasons.append(f"hidden_size is no multiple of num_attention_heads, {config.num_attention_heads}")
    attention = getattr(config, "_attn_implementation", None)
    if not is_exact_attention(attention):
        reasons.append(f"its attention is the user's own, {attention!r}")
    reasons += _changed_modules(module)
    reasons += _changed_helpers(type(module).__name__, module)
    base = next(c for c in type(module).__mro__ if c.__name__ in family.encoder_classes)
    if getattr(type(module), "forward", None) is not getattr(base, "forward", None):
        reasons.append(f"{type(module).__name__} overrides forward")
    elif not is_stock(base):
        reasons.append(f"the forward of the class {base.__name__} was replaced")
    if reasons:
        more = len(reasons) - _REASONS
        told = [*reasons[:_REASONS], *([f"and {more} more like these"] if more > 0 else [])]
        raise UnsupportedModelError(f"{type(module).__name__} cannot be accelerated: {'; '.join(told)}")


def _changed_modules(encoder: nn.Module) -> list[str]:
    """What a user changed inside the encoder: replaced classes or forwards, activation, epsilon, attention scale."""
    config = encoder.config
    head_dim = config.hidden_size // config.num_attention_heads
    found = []
    for name, module in encoder.named_modules():
        if not name.startswith(("embeddings", "encoder")):
            continue
        if "forward" in module.__dict__:
            found.append(f"{name} has a forward of its own")
        kind = type(module)
        if not is_stock(kind):
            if kind.__module__.startswith(_STOCK):
                found.append(f"{name}: the forward of the class {kind.__name__} was replaced")
            else:
                place = f"{kind.__module__}.{kind.__name__}"
                found.append(f"{name} is a {place}; merge adapters first, as merge_and_unload() does")
            continue
        if kind.__module__.startswith("torch.nn.modules.") and not _in_place(name, module):
            found.append(f"{name} is a torch.nn.{kind.__name__}, which transformers has not there")
        found += _changed_helpers(name, module)
        if isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_eps:
            found.append(f"{name}.eps is {module.eps}, not the config's {config.layer_norm_eps}")
        if getattr(module, "scaling", head_dim**-0.5) != head_dim**-0.5:
            found.append(f"{name}.scaling is {module.scaling}")
        if getattr(module, "is_causal", False):
            found.append(f"{name}.is_causal is {module.is_causal}")
        if getattr(module, "attention_head_size", head_dim) != head_dim:
            found.append(f"{name}.attention_head_size is {module.attention_head_size}, not {head_dim} as by the config")
        activation = getattr(module, "intermediate_act_fn", None)
        if activation is not None and not is_exact_gelu(activation):
            found.append(f"{name}.intermediate_act_fn is {activation}")
    for name, table in position_buffers(encoder):
        counted = torch.arange(table.shape[-1], device=table.device).to(table)
        usual = torch.zeros_like(table) if name == "token_type_ids" else counted
        if not table.is_meta and not torch.equal(table, usual.expand_as(table)):
            found.append(f"embeddings.{name} holds other values than transformers gives it")
    return found


_PARTS = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList)
_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.Identity)


def _in_place(name: str, module: nn.Module) -> bool:
    """Whether one of torch's modules is of a kind that belongs under its name; roles are checked apart."""
    leaf = name.rpartition(".")[2]
    if leaf == "intermediate_act_fn":
        return True
    return isinstance(module, _DROPOUTS) if "dropout" in leaf else isinstance(module, (*_PARTS, *_DROPOUTS))


HELPERS = (
    "_create_attention_masks",
    "get_extended_attention_mask",
    "create_position_ids_from_input_ids",
    "create_position_ids_from_inputs_embeds",
    "feed_forward_chunk",
)
"""Methods that transformers' forwards call, and that the accelerated path computes itself."""


def _changed_helpers(name: str, module: nn.Module) -> list[str]:
    kind = type(module)
    changed = [
        one
        for one in HELPERS
        if one in module.__dict__ or ((method := getattr(kind, one, None)) is not None and not is_theirs(method))
    ]
    return [f"{name} has a {one} of its own" for one in changed]


def position_buffers(encoder: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What positions and token types are where a call gives none, by name."""
    tables: Any = encoder.embeddings
    named = [(name, getattr(tables, name, None)) for name in ("position_ids", "token_type_ids")]
    return [(name, table) for name, table in named if isinstance(table, torch.Tensor)]


_STOCK = ("transformers.", "torch.nn.modules.")


def is_stock(kind: type) -> bool:
    """Whether a module's class and its forward are transformers' or torch's own: some libraries replace the forward."""
    return _is_stock(kind, getattr(kind, "forward", None))


@functools.lru_cache(4096)  # asked for every part of a head in every call
def _is_stock(kind: type, forward: object) -> bool:
    return (getattr(kind, "__module__", None) or "").startswith(_STOCK) and is_theirs(forward)


def is_theirs(function: Any) -> bool:
    """Whether a function was written in transformers or torch, by itself and by what ``functools.wraps`` hides."""
    says = getattr(function, "__module__", None) or ""
    return says.startswith(_STOCK) and _written_in(function).startswith(_STOCK)


def _written_in(function: Any) -> str:
    """The module whose names a function sees, whatever it says of itself; empty for other objects."""
    return getattr(function, "__globals__", {}).get("__name__") or ""


_ATTENTION = (None, "eager", "sdpa", "flex_attention", "xfast")


def is_exact_attention(implementation: str | None) -> bool:
    """Whether an attention implementation computes softmax(q k^T / sqrt(d)) v: transformers' own, or a hub kernel.

    A name that a user registered may stand for anything.
    """
    if implementation in _ATTENTION:
        # whoever has such a model has imported it
        known = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
        registered = known.get(implementation)
        return registered is None or _written_in(registered).startswith(("transformers.", "torch.", "xfast."))
    return implementation.startswith(("flash_attention", "paged|")) or "/" in implementation


def is_exact_gelu(activation: object) -> bool:
    """Whether a module or function computes x Phi(x) itself, not an approximation."""
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    if isinstance(activation, nn.Module) and is_stock(type(activation)):
        activation = getattr(activation, "act", None)  # transformers' GELUActivation holds the function it applies
    return activation is nn.functional.gelu


_LEAF_TYPES: dict[str, type[nn.Module]] = {
    **dict.fromkeys(LINEAR_ROLES, nn.Linear),
    **dict.fromkeys((*NORM_ROLES, "embedding_norm", "final_norm"), nn.LayerNorm),
    **dict.fromkeys(("word", "position", "type"), nn.Embedding),
}


def _leaf(module: nn.Module, path: str, role: str) -> nn.Module:
    try:
        leaf = module.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(module).__name__} cannot be accelerated: {error}") from None
    expected = _LEAF_TYPES[role]
    # A subclass may compute something else (LoRA, quantised linears): only the plain module is known to match.
    if type(leaf).forward is not expected.forward:
        raise UnsupportedModelError(
            f"{path} is a {type(leaf).__module__}.{type(leaf).__name__}, not a plain torch.nn.{expected.__name__}; "
            "merge adapters (e.g. merge_and_unload()) or undo quantisation first"
        )
    if getattr(leaf, "max_norm", None) is not None:
        raise UnsupportedModelError(f"{path}.max_norm is {leaf.max_norm}: only embeddings without it are supported")
    return leaf


def roles_of(product: str) -> tuple[str, ...]:
    """The linear roles whose outputs, one after another, are those of a product ("qkv", "ffn_in", ...)."""
    return QKV_ROLES if product == "qkv" else (product,)


def parameter_dtype(weights: EncoderWeights) -> torch.dtype:
    """The dtype of the first layer's linear weights (of the word embeddings when there are no layers)."""
    key = (0, "query") if weights.spec.num_layers else (-1, "word")
    return weights.modules[key].weight.dtype
