"""The table of methods and their formats in PEFT's files, which was checked against PEFT 0.21.2.

    METHODS    spec class   <->  adapter_config.json
    TENSORS    delta class  <->  keys of adapter_model.safetensors

The rows are in `table_lora.py`, `table_others.py` and `derived.py`; this file adds DoRA, biases and
modules to save. A method that PEFT lacks has a peft_type that only lorafold reads.
"""

from __future__ import annotations

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
from lorafold.peft.convolution import from_channels, to_channels
from lorafold.peft.table_types import FileTensor, Method, TargetModule, TensorConversion, Tensors
from lorafold.peft.tokens import ROWS

BASIC = (*table_lora.METHODS, *table_others.METHODS)


def inner_site(site: TargetModule) -> TargetModule:
    """The target module with the delta inside DoRA, if its delta is DoRA."""
    return replace(site, delta=site.delta.inner) if isinstance(site.delta, DoRADelta) else site


def dora_method(method: Method) -> Method:
    """The row of DoRA on top of a method. PEFT has a flag for DoRA on LoRA; for other methods, the
    peft_type begins with DORA_.
    """
    of_peft = "use_dora" in method.marks
    return replace(
        method, outer=DoRA, derived=lambda sites: method.derived([inner_site(s) for s in sites]),
        peft_type=method.peft_type if of_peft else f"DORA_{method.peft_type}",
        parameters=False,
        marks={**method.marks, "use_dora": True} if of_peft else method.marks,
    )  # fmt: skip


def expert_method(method: Method) -> Method:
    """The row of a method on experts, which PEFT lacks. It has the same layout, but another
    peft_type.
    """
    kind = f"{derived.PREFIX}EXPERTS_{method.peft_type}"
    return replace(method, peft_type=kind, parameters=False)


PEFT_METHODS = (*BASIC, *(dora_method(m) for m in BASIC if m.spec is not IA3))
METHODS = (
    *PEFT_METHODS,
    *(expert_method(method) for method in PEFT_METHODS if method.of_peft),
    *table_others.VIRTUAL_TOKEN_METHODS,
    *derived.METHODS_WITHOUT_PREFIX,
)


def unlisted_methods() -> tuple[Method, ...]:
    """The derived rows of registered methods that are not in METHODS."""
    more = derived.derived_methods({method.spec for method in METHODS} | {DoRA})
    return (*more, *map(dora_method, more))


def dora_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for DoRA: the magnitudes, and the tensors of the inner delta."""
    def of_inner(change: Any) -> TensorConversion | None:
        return change and (lambda tensor, site: change(tensor, inner_site(site)))

    within = inner_site(site)
    entries = TENSORS.get(type(within.delta), derived.derived_tensors)(within)
    of_channels = (to_channels, from_channels) if site.window else ()
    return [FileTensor("magnitude", "{at}.lora_magnitude_vector", *of_channels)] + [
        FileTensor(f"inner.{e.attribute}", e.template, of_inner(e.to_file), of_inner(e.from_file))
        for e in entries
    ]


def add_bias(offset: Tensor, site: TargetModule) -> Tensor:
    """The bias (out,) for the file, from the trained offset (out,)."""
    own = site.base_parameter("bias")
    return offset if own is None else offset + own.to(offset)


def subtract_bias(bias: Tensor, site: TargetModule) -> Tensor:
    """The trained offset (out,), from the bias (out,) in the file."""
    own = site.base_parameter("bias")
    return bias.float() if own is None else bias.float() - own.to(bias.device).float()


def buffer_problem(name: str, found: Tensor, site: TargetModule, file: Tensors) -> str | None:
    """An error message for a buffer (any shape) of a module to save, or None. The buffer must equal
    the base's buffer, because a merged model keeps the base's.
    """
    own = site.delta.get_submodule("copy").get_buffer(name)
    if own.shape == found.shape and (own.is_meta or torch.equal(own.cpu(), found.to(own.dtype))):
        return None
    return f"a buffer that differs from this base's buffer of shape {list(own.shape)}"


def token_row_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for token rows of an embedding or head. Tied rows are in the file once."""
    return [FileTensor("rows", f"{{at}}.{ROWS}")] * (site.delta.twin is None)


TENSORS = {
    **table_lora.TENSORS,
    **table_others.TENSORS,
    **derived.TENSORS,
    DoRADelta: dora_tensors,
    # files contain the bias, not the offset
    BiasDelta: lambda site: [FileTensor("offset", "{under}.bias", add_bias, subtract_bias)],
    ReplaceDelta: lambda site: [
        FileTensor(n, f"{{at}}.{own}", check=None if n in trained else partial(buffer_problem, own))
        for trained in [dict(site.delta.named_parameters())]
        for n in site.delta.state_dict()
        for own in [n.removeprefix("copy.")]
    ],
    EmbeddingRows: token_row_tensors,
    HeadRows: token_row_tensors,
}
