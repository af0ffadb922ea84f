"""How a GGUF file says what a model's rotary positions are: what `models.gguf_rope` reads.

    llama3      rope_freqs.weight (dims / 2,)     what each frequency is divided by
    linear, yarn                                  ARCH.rope.scaling.type and its numbers
    longrope    rope_factors_long.weight, rope_factors_short.weight (dims / 2,)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorafold.errors import LorafoldError
from lorafold.exporting.gguf_metadata import Architecture, head_width
from lorafold.models.gguf_rope import FREQUENCIES, YARN

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

KNOWN = ("default", "linear", "llama3", "yarn", "longrope")


def add_positions(writer: GGUFWriter, config: Any, row: Architecture) -> dict[str, Tensor]:
    """Have a writer say what a configuration does of rotary positions.

    Returns:
        The tensors (dims / 2,) of the file that say more, by name.

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
