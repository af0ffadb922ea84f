"""Methods in PEFT's files: one table, read both ways. A method is a row of each; nothing else in `io` knows which there are.

    METHODS    spec class   <->  adapter_config.json
    TENSORS    delta class  <->  keys of adapter_model.safetensors

Checked against PEFT 0.21.2, which is the oracle of the tests. A method that PEFT lacks has the same layout under a peft_type of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorafold.bases.dense import Conv1D, Embedding
from lorafold.core.delta import Delta
from lorafold.core.layer import Base
from lorafold.errors import LorafoldError
from lorafold.io.format import Entries, Entry, Field, Method, Regex, Site
from lorafold.methods.bitfit import BiasDelta
from lorafold.methods.lora import LoRA, LoRADelta
from lorafold.methods.replace import ReplaceDelta

# How A was drawn, where the base stayed as it is; once trained, the file holds all there is to know.
INITS: dict[bool | str, str] = {
    True: "kaiming", False: "kaiming", "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming", "mica": "kaiming",
}  # fmt: skip


def number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def numbers(values: Mapping[str, float]) -> dict[str, int | float]:
    return {key: number(value) for key, value in values.items()}


def or_empty(values: dict[str, Any] | None) -> dict[str, Any]:
    return values or {}


def init_to_file(init: str) -> bool | str:
    return next(value for value, name in INITS.items() if name == init)


def init_from_file(value: bool | str) -> str:
    if value not in INITS:
        raise LorafoldError(
            f"init_lora_weights={value!r} is not supported: such a file is relative to a base that the initialization changed; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    return INITS[value]


def fan_in_fan_out(sites: Sequence[Site]) -> dict[str, bool]:
    return {"fan_in_fan_out": any(site.target and issubclass(site.layer, Conv1D) for site in sites)}


# the base's storage decides the first; the others belong to options that are off, or to how A was drawn
LORA_IRRELEVANT = frozenset({
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip

METHODS: tuple[Method, ...] = (
    Method(
        LoRA, "LORA",
        (
            Field("r", "rank", int, 8),
            Field("lora_alpha", "alpha", float, 8, number),
            Field("lora_dropout", "dropout", float, 0.0),
            Field("use_rslora", "rslora", bool, False),
            Field("init_lora_weights", "init", bool | str, True, init_to_file, init_from_file),
            Field("rank_pattern", "rank_pattern", dict[Regex, int] | None, {}, dict, or_empty),
            Field("alpha_pattern", "alpha_pattern", dict[Regex, float] | None, {}, numbers, or_empty),
        ),
        marks={"use_dora": False},
        irrelevant=LORA_IRRELEVANT,
        derived=fan_in_fan_out,
    ),
)  # fmt: skip


def lora(delta: Delta, layer: type[Base]) -> list[Entry]:
    if issubclass(layer, Embedding):
        return [Entry("A", "{at}.lora_embedding_A"), Entry("B", "{at}.lora_embedding_B")]
    return [Entry("A", "{at}.lora_A.weight"), Entry("B", "{at}.lora_B.weight")]


def with_bias(offset: Tensor, site: Site) -> Tensor:
    own = site.own("bias")
    return offset if own is None else offset + own.to(offset)


def without_bias(bias: Tensor, site: Site) -> Tensor:
    own = site.own("bias")
    return bias.float() if own is None else bias.float() - own.to(bias.device).float()


TENSORS: dict[type[Delta], Entries] = {
    LoRADelta: lora,
    BiasDelta: lambda delta, layer: [Entry("offset", "{under}.bias", with_bias, without_bias)],  # the file holds the bias itself
    ReplaceDelta: lambda delta, layer: [Entry(n, f"{{at}}.{n.removeprefix('copy.')}") for n, _ in delta.named_parameters()],
}


def entries_of(site: Site) -> list[Entry]:
    """The tensors of one delta in the file. LorafoldError for a delta with a tensor that the format has no place for."""
    row = TENSORS.get(type(site.delta))
    entries = [] if row is None else row(site.delta, site.layer)
    if homeless := set(site.delta.state_dict()) - {e.attribute for e in entries}:
        raise LorafoldError(f"{site.path}: {type(site.delta).__name__} has no place in PEFT's format for {', '.join(sorted(homeless))}")
    return entries
