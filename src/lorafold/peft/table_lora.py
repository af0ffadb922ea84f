"""LoRA and its variants in PEFT's files, for `table.py`.

    LoRA            r, lora_alpha ...           lora_A, lora_B
    PiSSA, OLoRA    written as LoRA of rank 2 r and alpha 2 alpha, with the factors [s (B - B0),
                    s B0] and [A; A - A0] of the offset from the base; read as LoRA
    AdaLoRA         rank_pattern of booleans    lora_A = Q, lora_B = P, lora_E = E, without the
                                                dropped triplets; on experts with all triplets and
                                                lora_kept, which marks the kept triplets
    VeRA            projection_prng_key ...     vera_lambda_b, vera_lambda_d; vera_A, vera_B once,
                                                if save_projection

PEFT stores the factors of all experts as two matrices: A (E, r, in) as (E r, in), and B (E, out, r)
as (out, r E). The factors are exchanged if PEFT exchanges inputs and outputs
(`form.exchanges_sides`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.layers.dense import Conv1D
from lorafold.methods.adalora import AdaLoRA, AdaLoRADelta
from lorafold.methods.lora import LoRA, LoRADelta
from lorafold.methods.lora_inits import OffsetDelta, OLoRA, PiSSA
from lorafold.methods.vera import VeRA, VeRADelta
from lorafold.peft.convolution import from_kernel, lora_a_problem, to_kernel
from lorafold.peft.table_types import Field, FileTensor, Method, Regex, TargetModule


def _exchange_sides(factors: Tensor, site: TargetModule) -> Tensor:
    return factors.mT if site.turned else factors


def as_rows(factors: Tensor, site: TargetModule) -> Tensor:
    """PEFT's A (E r, in) of all experts, from factors (E, r, in), or (E, in, r) if `site.turned`.
    """
    return _exchange_sides(factors, site).flatten(0, 1)


def as_columns(factors: Tensor, site: TargetModule) -> Tensor:
    """PEFT's B (out, r E) of all experts, from factors (E, out, r), or (E, r, out) if
    `site.turned`.
    """
    return _exchange_sides(factors, site).permute(1, 2, 0).flatten(1)


def from_rows(a: Tensor, site: TargetModule) -> Tensor:
    """The inverse of `as_rows`: (E, r, in), or (E, in, r)."""
    experts = len(site.delta.B)  # type: ignore[arg-type]
    return _exchange_sides(a.unflatten(0, (experts, -1)), site).contiguous()


def from_columns(b: Tensor, site: TargetModule) -> Tensor:
    """The inverse of `as_columns`: (E, out, r), or (E, r, out)."""
    experts = len(site.delta.B)  # type: ignore[arg-type]
    return _exchange_sides(b.unflatten(1, (-1, experts)).permute(2, 0, 1), site).contiguous()


# initializations that leave the base unchanged, so they don't matter for a trained adapter
INITS = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "eva": "kaiming",
    "orthogonal": "kaiming",
    "mica": "kaiming",
}


def as_peft_number(value: float) -> int | float:
    """An integral float as an int, as PEFT writes it."""
    return int(value) if value == int(value) else value


def init_from_file(value: bool | str) -> str:
    """The spec's `init` for a value of `init_lora_weights`."""
    if value not in INITS:
        raise LorafoldError(
            f"init_lora_weights={value!r} is not supported, because this initialization changes the"
            " base weights; save the adapter again with PEFT's"
            " path_initial_model_for_weight_conversion"
        )
    return INITS[value]


def with_init(spec: LoRA, init: Any) -> LoRA | PiSSA | OLoRA:
    """The spec of a new adapter with this value of `init_lora_weights`."""
    kind, _, niter = str(init).partition("_niter_")
    if init in (True, "gaussian", "loftq"):
        return spec if init is True else replace(spec, init=init)
    if kind in ("pissa", "olora") and not (spec.rslora or spec.rank_pattern or spec.alpha_pattern):
        shared = (spec.rank, spec.alpha, spec.dropout)
        return OLoRA(*shared) if kind == "olora" else PiSSA(*shared, int(niter or 0))
    with_others = "" if kind not in ("pissa", "olora") else " with use_rslora or patterns"
    raise LorafoldError(f"init_lora_weights={init!r}: not supported{with_others}")


def fan_in_fan_out(sites: Sequence[TargetModule]) -> dict[str, bool]:
    """PEFT's flag for modules whose weight is (in, out), such as the Conv1D layers of GPT-2."""
    return {"fan_in_fan_out": any(site.target and issubclass(site.layer, Conv1D) for site in sites)}


# fan_in_fan_out follows from the module's class; the others are for options that are off, or for
# the initialization of A
LORA_IRRELEVANT = frozenset({
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
})  # fmt: skip


LORA = Method(
    LoRA, "LORA",
    (
        Field("r", "rank", int, 8),
        Field("lora_alpha", "alpha", float, 8, as_peft_number),
        Field("lora_dropout", "dropout", float, 0.0),
        Field("use_rslora", "rslora", bool, False),
        Field(
            "init_lora_weights", "init", bool | str, True,
            lambda init: next((value for value, name in INITS.items() if name == init), True),
            init_from_file,
        ),
        Field("rank_pattern", "rank_pattern", dict[Regex, int] | None, {}, dict, empty={}),
        Field(
            "alpha_pattern", "alpha_pattern", dict[Regex, float] | None, {},
            lambda values: {key: as_peft_number(value) for key, value in values.items()}, empty={},
        ),
    ),
    marks={"use_dora": False},
    irrelevant=LORA_IRRELEVANT,
    derived=fan_in_fan_out,
    parameters=True,
)  # fmt: skip


def lora_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for LoRA, which differ for embeddings, convolutions and experts."""
    if site.layer.takes_ids:
        return [FileTensor("A", "{at}.lora_embedding_A"), FileTensor("B", "{at}.lora_embedding_B")]
    down, up = "{at}.lora_A.weight", "{at}.lora_B.weight"
    if site.window:
        a = FileTensor("A", down, to_kernel, from_kernel, lora_a_problem)
        ones = (1,) * len(site.window)  # a kernel of window 1: (out, r, 1, ...)
        return [a, FileTensor("B", up, lambda b, site: b.view(*b.shape, *ones), from_kernel)]
    if site.wrappers is None:
        return [FileTensor("A", down), FileTensor("B", up)]
    rows, columns = (down, as_rows, from_rows), (up, as_columns, from_columns)
    of_a, of_b = (columns, rows) if site.turned else (rows, columns)
    return [FileTensor("A", *of_a), FileTensor("B", *of_b)]


def written_as_lora(spec: type[PiSSA] | type[OLoRA]) -> Method:
    """The row of PiSSA or OLoRA, which are written as LoRA and therefore read as LoRA."""
    return Method(
        spec, "LORA",
        (
            Field("r", "rank", int, 8, lambda rank: 2 * rank),
            Field("lora_alpha", "alpha", float, 8, lambda alpha: as_peft_number(2 * alpha)),
            Field("lora_dropout", "dropout", float, 0.0),
        ),
        marks={"use_dora": False, "use_rslora": False, "init_lora_weights": True},
        derived=fan_in_fan_out,
        parameters=True,
    )  # fmt: skip


def offset_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for PiSSA and OLoRA: the factors of a LoRA of twice the rank."""
    a, b = lora_tensors(site)

    def up(_: Tensor, site: TargetModule) -> Tensor:  # (*matrices, out, 2 r)
        delta: Any = site.delta
        own = delta.factors()[0] / delta.scale
        return b.to_file(own, site) if b.to_file else own

    def down(_: Tensor, site: TargetModule) -> Tensor:  # (*matrices, 2 r, in)
        own = site.delta.factors()[1]  # type: ignore[index]
        return a.to_file(own, site) if a.to_file else own

    return [replace(a, to_file=down), replace(b, to_file=up)]


def adalora_config(sites: Sequence[TargetModule]) -> dict[str, Any]:
    """Further config keys that PEFT requires: a schedule, and for each module a list of booleans,
    as long as the initial rank, whose true values are the kept triplets.
    """
    pattern = {}
    for site in sites:
        delta: Any = site.delta
        if isinstance(delta, AdaLoRADelta) and delta.kept.dim() == 1:
            rank = int(delta.kept.sum())
            pattern[f"{site.path}.lora_E"] = [True] * rank + [False] * (delta.init_rank - rank)
    return {
        **fan_in_fan_out(sites),
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
        "rank_pattern": None if all(all(kept) for kept in pattern.values()) else pattern,
    }


ADALORA = Method(
    AdaLoRA,
    "ADALORA",
    (
        Field("target_r", "rank", int, 8),
        Field("init_r", "init_rank", int, 12),
        Field("lora_alpha", "alpha", float, 8, as_peft_number),
        Field("lora_dropout", "dropout", float, 0.0),
        Field("deltaT", "delta_t", int, 1),
        Field("beta1", "beta1", float, 0.85),
        Field("beta2", "beta2", float, 0.85),
        Field("orth_reg_weight", "orth_reg", float, 0.5),
        Field(
            "rank_pattern", "rank_pattern", dict[str, list[bool]] | None, {},
            from_file=lambda pattern: {
                re.escape(key.removesuffix(".lora_E")): sum(kept)
                for key, kept in (pattern or {}).items()
            },
        ),
    ),
    irrelevant=LORA_IRRELEVANT | {"r", "tinit", "tfinal", "total_step", "init_lora_weights"},
    derived=adalora_config,
)  # fmt: skip


def adalora_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for AdaLoRA's kept triplets. Experts keep different triplets, so for
    experts the file contains all triplets.
    """
    kept: Any = site.delta.kept
    if kept.dim() > 1:
        return [
            FileTensor("P", "{at}.lora_B"), FileTensor("E", "{at}.lora_E"),
            FileTensor("Q", "{at}.lora_A"), FileTensor("kept", "{at}.lora_kept"),
        ]  # fmt: skip
    return [
        FileTensor("P", "{at}.lora_B", lambda p, site: p[:, kept]),
        FileTensor("E", "{at}.lora_E", lambda e, site: e[kept, None], lambda e, site: e[:, 0]),
        FileTensor("Q", "{at}.lora_A", lambda q, site: q[kept]),
    ]


VERA = Method(
    VeRA, "VERA",
    (
        Field("r", "rank", int, 256),
        Field("vera_dropout", "dropout", float, 0.0),
        Field("d_initial", "d_initial", float, 0.1),
        Field("projection_prng_key", "projection_prng_key", int, 0),
        Field("save_projection", "save_projection", bool, True),
    ),
    irrelevant=frozenset({"fan_in_fan_out", "init_weights"}),
    derived=fan_in_fan_out,
)  # fmt: skip


def vera_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for VeRA: its vectors and, if saved, its shared projections."""
    names = {"b": "{at}.vera_lambda_b", "d": "{at}.vera_lambda_d"}
    if site.delta.projections.saved:  # type: ignore[union-attr]
        names |= {f"projections.{m}": f"base_model.vera_{m}" for m in "AB"}
    return [FileTensor(name, key) for name, key in names.items()]


# the deltas that PEFT supports for parameters too
PARAMETER_DELTAS = (LoRADelta, OffsetDelta)
METHODS = (LORA, written_as_lora(PiSSA), written_as_lora(OLoRA), ADALORA, VERA)

TENSORS = {
    LoRADelta: lora_tensors,
    OffsetDelta: offset_tensors,
    AdaLoRADelta: adalora_tensors,
    VeRADelta: vera_tensors,
}
