"""The table of methods in PEFT's files, for reading and writing; checked against PEFT 0.21.2.

    METHODS    spec class   <->  adapter_config.json
    TENSORS    delta class  <->  keys of adapter_model.safetensors

The rows are in `table_lora.py`, `table_others.py` and `derived.py`; this file adds DoRA, biases and
modules to save. A method that PEFT lacks has a peft_type of lorafold's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorafold.methods.common.biases_and_modules import BiasDelta, ReplaceDelta
from lorafold.methods.common.trainable_tokens import EmbeddingRows, HeadRows
from lorafold.methods.dora import DoRA, DoRADelta
from lorafold.methods.ia3 import IA3
from lorafold.peft import derived, table_lora, table_others
from lorafold.peft.convolution import all_flat, as_channels
from lorafold.peft.table_types import FileTensor, Method, TargetModule, TensorConversion
from lorafold.peft.tokens import ROWS

PLAIN = (*table_lora.METHODS, *table_others.METHODS)


def inside(site: TargetModule) -> TargetModule:
    """The site with the delta inside DoRA, if its delta is DoRA."""
    return replace(site, delta=site.delta.inner) if isinstance(site.delta, DoRADelta) else site


def dora_over(method: Method) -> Method:
    """The row of DoRA on top of a method: PEFT has a flag for DoRA over LoRA; others get an own
    peft_type.
    """
    of_peft = "use_dora" in method.marks
    return replace(
        method, outer=DoRA, derived=lambda sites: method.derived([inside(site) for site in sites]),
        peft_type=method.peft_type if of_peft else f"DORA_{method.peft_type}",
        parameters=False,
        marks={**method.marks, "use_dora": True} if of_peft else method.marks,
    )  # fmt: skip


def over_experts(method: Method) -> Method:
    """The row of a method on experts, which PEFT lacks: the same layout under an own peft_type."""
    kind = f"{derived.PREFIX}EXPERTS_{method.peft_type}"
    return replace(method, peft_type=kind, parameters=False)


OF_PEFT = (*PLAIN, *(dora_over(method) for method in PLAIN if method.spec is not IA3))
METHODS = (
    *OF_PEFT,
    *(over_experts(method) for method in OF_PEFT if method.of_peft),
    *table_others.VIRTUAL,
    *derived.OWN,
)


def more_methods() -> tuple[Method, ...]:
    """The derived rows of the other registered methods."""
    more = derived.methods({method.spec for method in METHODS} | {DoRA})
    return (*more, *map(dora_over, more))


def dora(site: TargetModule) -> list[FileTensor]:
    """The tensors of DoRA: its magnitudes and the inner delta's."""
    def of_inner(change: Any) -> TensorConversion | None:
        return change and (lambda tensor, site: change(tensor, inside(site)))

    within = inside(site)
    entries = TENSORS.get(type(within.delta), derived.entries)(within)
    of_channels = (as_channels, all_flat) if site.window else ()
    return [FileTensor("magnitude", "{at}.lora_magnitude_vector", *of_channels)] + [
        FileTensor(f"inner.{e.attribute}", e.template, of_inner(e.to_file), of_inner(e.from_file))
        for e in entries
    ]


def with_bias(offset: Tensor, site: TargetModule) -> Tensor:
    """The bias (out,), from the trained offset (out,)."""
    own = site.base_parameter("bias")
    return offset if own is None else offset + own.to(offset)


def without_bias(bias: Tensor, site: TargetModule) -> Tensor:
    """The offset (out,), from the bias (out,) in a file."""
    own = site.base_parameter("bias")
    return bias.float() if own is None else bias.float() - own.to(bias.device).float()


def unlike_base(
    name: str, found: Tensor, site: TargetModule, file: Mapping[str, Tensor]
) -> str | None:
    """The problem with a buffer (any shape) of a module to save, or None. It must equal the base's,
    which a merged model keeps.
    """
    own = site.delta.get_submodule("copy").get_buffer(name)
    if own.shape == found.shape and (own.is_meta or torch.equal(own.cpu(), found.to(own.dtype))):
        return None
    return f"a buffer that differs from this base's buffer of shape {list(own.shape)}"


def token_rows(site: TargetModule) -> list[FileTensor]:
    """The token rows of an embedding or head; tied ones are in the file once."""
    return [FileTensor("rows", f"{{at}}.{ROWS}")] * (site.delta.twin is None)


TENSORS = {
    **table_lora.TENSORS,
    **table_others.TENSORS,
    **derived.TENSORS,
    DoRADelta: dora,
    # the file contains the bias itself
    BiasDelta: lambda site: [FileTensor("offset", "{under}.bias", with_bias, without_bias)],
    ReplaceDelta: lambda site: [
        FileTensor(n, f"{{at}}.{own}", misfit=None if n in trained else partial(unlike_base, own))
        for trained in [dict(site.delta.named_parameters())]
        for n in site.delta.state_dict()
        for own in [n.removeprefix("copy.")]
    ],
    EmbeddingRows: token_rows,
    HeadRows: token_rows,
}
