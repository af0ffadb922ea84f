"""The form in which an adapter is written: PEFT's, or one of our own that PEFT refuses.

PEFT adapts the matrices of experts and of grouped linears (`parameters`) with LoRA alone, without
dropout, and experts in parameters of three dimensions. So dropout is 0 in the config of such an
adapter and stands in its record, where lorafold finds it again; any other method over them, and
LoRA over experts of two dimensions, has the layout of PEFT's files under a peft_type of our own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.peft.format import Method
from lorafold.peft.parameters import any_flat, as_parameters, renames
from lorafold.peft.table import methods, over_experts

log = logging.getLogger(__name__)
# PEFT refuses these targets of LoRA and AdaLoRA in models of these types, whose kernels may read
# the weights past its layers
REFUSED = frozenset({"out_proj", "conv1d"})
REFUSING = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
# the modules whose weights models of these types read or write past the modules' forwards, always
# or in their fast kernels
PAST = {
    **dict.fromkeys(("falcon_mamba", "mamba"), ("dt_proj", "out_proj", "x_proj")),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), ("out_proj",)
    ),
    "jamba": ("dt_proj",),
    "rwkv": ("output", "value"),
    "wavlm": ("k_proj", "out_proj", "q_proj", "v_proj"),
}
DROPOUT = "dropout"  # in the record: the dropout of an adapter whose config can't have it


@dataclass(frozen=True)
class Form:
    """How an adapter is written.

    method: The row of the table.
    parameters: The paths of the parameters by site, for the sites that PEFT adapts as parameters;
        empty in a form of our own.
    renamed: PEFT renames target modules of this model, so that only lists of names are safe.
    own: The form is one of our own because PEFT has no such method for parameters.
    dropout: The dropout that the config can't have.
    refused: The targets for which PEFT does not load it, by the last part of their paths.
    past: Likewise the others whose weights the model reads itself, without PEFT's update.
    """

    method: Method
    parameters: Mapping[str, str]
    renamed: bool = False
    own: bool = False
    dropout: float = 0.0
    refused: tuple[str, ...] = ()
    past: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The keys of the config that differ from those of the spec."""
        return {"lora_dropout": 0.0} if self.dropout else {}

    @property
    def record(self) -> dict[str, Any]:
        """What the record has beside the config."""
        return {DROPOUT: self.dropout} if self.dropout else {}


def form_of(model: nn.Module, spec: Spec, targets: Iterable[str]) -> Form:
    """The form of an adapter. Raises LorafoldError for a method that is not registered.

    Args:
        model: The adapted model.
        spec: The method with its options.
        targets: The sites that the method adapts.
    """
    method = next((m for m in methods() if m.holds(spec)), None)
    if method is None:
        raise LorafoldError(
            f"{type(spec).__name__} is no method of lorafold.methods.METHODS, where a file would be"
            " looked up by its name; register it there"
        )
    renamed = method.peft_type == "LORA" and renames(model)
    parameters = as_parameters(model, targets, renamed)
    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    ends = {path.rpartition(".")[2] for path in targets if path not in parameters}
    refusing = kind in REFUSING and method.peft_type in ("LORA", "ADALORA")
    refused = tuple(sorted(REFUSED & ends)) if refusing else ()
    past = tuple(sorted(ends.intersection(PAST.get(kind, ())).difference(refused)))
    if not method.of_peft:
        return Form(method, {}, renamed)
    if not parameters:
        return Form(method, {}, renamed, refused=refused, past=past)
    if not method.parameters or any_flat(model, targets):
        return Form(over_experts(method), {}, own=True)
    dropout: float = spec.dropout  # type: ignore[attr-defined]
    return Form(method, parameters, renamed, dropout=dropout, refused=refused, past=past)


def peft_reads(model: nn.Module, spec: Spec, targets: Iterable[str]) -> bool:
    """Whether PEFT reads the files of an adapter, or refuses their peft_type, which is one of our
    own, or their targets. Raises LorafoldError as `form_of` does.

    Args:
        model: The adapted model.
        spec: The method with its options.
        targets: The sites that the method adapts.
    """
    form = form_of(model, spec, targets)
    return form.method.of_peft and not form.refused


def tell(form: Form, path: object) -> None:
    """Log what the form means to a user of PEFT.

    Args:
        form: The form of an adapter.
        path: Where it was written.
    """
    if form.own:
        log.warning(
            f"{path}: PEFT adapts experts and grouped linears with LoRA alone, and experts in"
            " parameters of three dimensions, so it refuses this adapter (peft_type"
            f" {form.method.peft_type}); lorafold reads it"
        )
    if form.refused:
        log.warning(
            f"{path}: PEFT refuses {', '.join(form.refused)} as targets of a model of this type, so"
            " it does not load this adapter; lorafold reads it. For PEFT give the others as targets"
        )
    if form.past:
        log.warning(
            f"{path}: models of this type read or divide the weights of {', '.join(form.past)}"
            " themselves, always or in their fast kernels, where PEFT leaves its update out;"
            " lorafold computes with it, and PEFT once it has merged it"
        )
    if form.dropout:
        log.info(
            f"{path}: PEFT adapts experts and grouped linears without dropout, so lora_dropout is"
            f" 0 in its config; lorafold reads {form.dropout:g} from lorafold.json"
        )


def with_dropout(spec: Spec, record: Mapping[str, Any]) -> Spec:
    """The spec of a config, with the dropout of the record. Raises LorafoldError if that is none.

    Args:
        spec: The spec that was read from the config.
        record: The record beside it; empty where PEFT wrote the adapter.
    """
    if DROPOUT not in record:
        return spec
    if type(value := record[DROPOUT]) is not float:
        raise LorafoldError(f"field {DROPOUT}: found {value!r}, expected a number")
    return replace(spec, dropout=value)  # type: ignore[type-var]
