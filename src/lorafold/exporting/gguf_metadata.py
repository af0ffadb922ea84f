"""What the metadata of a GGUF file says of a model, from its configuration.

    hidden_size  ->  ARCH.embedding_length          num_experts  ->  ARCH.expert_count      ...

An architecture is a row of `ARCHITECTURES`: llama.cpp's name for it, and what llama.cpp takes for
granted there, which a configuration that says otherwise is refused for. `gguf_rope` has what it
says of positions.

`add_positions` writes the rotary positions that `models.gguf_rules` reads: llama3 as the tensor
rope_freqs.weight (dims / 2,), longrope as rope_factors_{long,short}.weight, linear and yarn as
keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError
from lorafold.exporting.target import told
from lorafold.models.gguf_rules import FREQUENCIES, YARN

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

INTEGERS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
FLOATS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
QWEN = {"use_sliding_window": False}
KNOWN = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Architecture:
    """A kind of model as llama.cpp has it.

    Attributes:
        name: its own.
        activation: of the gated MLP.
        interleaved: whether rows of queries and keys lie interleaved for rotation.
        gain: what the files' gains of norms have less than the gains themselves.
        granted: fields of the configuration with the values that it takes for granted.
        period: every how many layers one attends to all positions, and the others to a window; 0
            where all do.
        square: the numbers of layers whose attention it scales by the width of a head among
            hidden_size / heads, instead of by head_dim.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    gain: float = 0.0
    granted: Mapping[str, Any] = field(default_factory=dict)
    period: int = 0
    square: tuple[int, ...] = ()


LLAMA = Architecture("llama", interleaved=True)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2", granted=QWEN),
    "qwen3": Architecture("qwen3", granted=QWEN),
    "qwen3_moe": Architecture(
        "qwen3moe",
        granted=QWEN | {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "gemma": Architecture("gemma", "gelu_pytorch_tanh", gain=1.0),
    "gemma2": Architecture("gemma2", "gelu_pytorch_tanh", gain=1.0, period=2, square=(46,)),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", gain=1.0, period=6, square=(62,)),
    "phi3": Architecture("phi3"),
}


def architecture_of(config: Any) -> Architecture:
    """The row of a model's configuration. Raises LorafoldError for one that has none, or that says
    something else than llama.cpp takes for granted.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise LorafoldError(
            f"found a model of type {config.model_type}, expected one of"
            f" {', '.join(ARCHITECTURES)}; the directory that lorafold merge writes can be"
            " converted by llama.cpp's own converter"
        )
    if wrong := _problems(config, found):
        raise LorafoldError(f"llama.cpp can't say {wrong[0]}")
    return found


def _problems(config: Any, row: Architecture) -> list[str]:
    granted = dict(row.granted)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    found = [
        f"{name} = {own!r} of {config.model_type}, which it takes for {value!r}"
        for name, value in granted.items()
        if (own := getattr(config, name, value)) != value
    ]
    if activation != row.activation:
        found.append(f"the activation {activation} of this model, where it has {row.activation}")
    scale = getattr(config, "query_pre_attn_scalar", None)
    square = config.num_hidden_layers in row.square
    width = config.hidden_size // config.num_attention_heads if square else head_width(config)
    if scale not in (None, width):
        found.append(f"query_pre_attn_scalar = {scale}, which it takes for {width}")
    return found


def head_width(config: Any) -> int:
    """The dimensions of a head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_metadata(writer: GGUFWriter, config: Any, row: Architecture) -> Sequence[str]:
    """Have a writer say what a configuration does, but for positions and tokens.

    Returns:
        What llama.cpp computes otherwise, a sentence each.
    """
    for table, add in ((INTEGERS, writer.add_uint32), (FLOATS, writer.add_float32)):
        values = {}  # by key: two fields may be one
        for name, key in table.items():
            value = getattr(config, name, None)
            if value is not None and not (name == "sliding_window" and not row.period):
                values[key] = value
        for key, value in values.items():
            add(f"{row.name}.{key}", value)
    for key in ("attention.key_length", "attention.value_length"):
        writer.add_uint32(f"{row.name}.{key}", head_width(config))
    if row.period:
        layers = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        windowed = [kind == "sliding_attention" for kind in kinds]
        if windowed != [(n + 1) % row.period != 0 for n in range(layers)]:
            writer.add_array(f"{row.name}.attention.sliding_window_pattern", windowed)
    return () if row.period else told("llama.cpp", config)


def add_positions(writer: GGUFWriter, config: Any, row: Architecture) -> dict[str, Tensor]:
    """Have a writer say what a configuration does of rotary positions.

    Returns:
        The tensors of the file that say more, by name, each (rotated / 2,).

    Raises LorafoldError for a way to scale them that it does not know.
    """
    rope, windowed = _by_kind(config)
    kind, prefix = rope.get("rope_type", "default"), f"{row.name}.rope."
    if kind not in KNOWN or windowed.get("rope_type", "default") != "default":
        raise LorafoldError(
            f"the model scales its rotary positions by {kind}, expected"
            f" {', '.join(KNOWN)}, and by default in windows"
        )
    width = int(head_width(config) * rope.get("partial_rotary_factor", 1.0))
    writer.add_uint32(f"{prefix}dimension_count", width)
    writer.add_float32(f"{prefix}freq_base", rope["rope_theta"])
    if windowed:
        writer.add_float32(f"{prefix}freq_base_swa", windowed["rope_theta"])
    if kind == "llama3":
        return {FREQUENCIES: _divisors(config, rope, width)}
    if kind == "longrope":
        return _long(writer, config, rope, prefix)
    if kind in ("linear", "yarn"):
        writer.add_string(f"{prefix}scaling.type", kind)
        writer.add_float32(f"{prefix}scaling.factor", rope["factor"])
    if kind == "yarn":
        _check_yarn(rope)
        for key, name in YARN.items():
            if rope.get(name) is not None:
                whole = name == "original_max_position_embeddings"
                (writer.add_uint32 if whole else writer.add_float32)(prefix + key, rope[name])
    return {}


def _by_kind(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What scales the positions of layers that attend to all, and of those with a window."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention", {})
    return rope, {}


def _divisors(config: Any, rope: Mapping[str, Any], width: int) -> Tensor:
    """What Llama 3's rule divides each frequency by (width / 2,)."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return rope["rope_theta"] ** -exponents / scaled


def _check_yarn(rope: Mapping[str, Any]) -> None:
    """Raise LorafoldError for a scale of attention that is not YaRN's own, which llama.cpp has."""
    own, factor = rope.get("attention_factor"), rope["factor"]
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if rope.get("mscale") or (own is not None and not math.isclose(own, usual, rel_tol=1e-4)):
        raise LorafoldError(
            "its rotary positions (yarn) scale attention by"
            f" {own or rope.get('mscale')}, expected YaRN's own {usual:.4g}, all that llama.cpp"
            " takes from a file"
        )


def _long(
    writer: GGUFWriter, config: Any, rope: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    """Phi-3's factors for texts within the first context and beyond it."""
    import torch

    first = rope["original_max_position_embeddings"]
    scale = config.max_position_embeddings / first
    usual = math.sqrt(1 + math.log(scale) / math.log(first)) if scale > 1 else 1.0
    writer.add_uint32(f"{prefix}scaling.original_context_length", first)
    writer.add_float32(f"{prefix}scaling.attn_factor", rope.get("attention_factor") or usual)
    return {
        f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"])
        for which in ("long", "short")
    }
