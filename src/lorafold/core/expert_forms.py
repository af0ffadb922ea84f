"""How modules hold the matrices of experts: which parameters, which way round, and how the forward
that multiplies by them learns which rows are of which expert.

    CHOSEN     forward(x, experts, weights)    the experts of each token (T, k), and their weights
    WEIGHED    forward(x)                      its `router` gives the scores (T, E) of its `top_k`
                                               experts, which weigh their inputs; `shared_expert`
                                               is added
    SORTED     forward(rows, sizes)            rows (S, in) that lie sorted by expert

Transformers' interface for experts (`use_experts_implementation`) says of itself what its form is.
A class that has another is a row of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

CHOSEN, WEIGHED, SORTED = "chosen", "weighed", "sorted"


@dataclass(frozen=True)
class Stored:
    """How a parameter stores matrices.

    number: the attribute of the module that says how many there are.
    transposed: each as (in, out), not (out, in).
    flat: the parameter is 2-D, with the matrices below each other.
    """

    number: str = "num_experts"
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Form:
    """How a module holds the matrices of experts.

    parameters: how each of its parameters stores its matrices, in the order in which they are
        applied. Where the last has fewer than another, the experts beyond give back their input.
    called: how the forward learns which rows are of which expert.
    around: that forward is of the module around this one.
    activation: the attribute that is applied to the gates: the first half of what the first
        parameter gives, or what it gives, where there are three. Empty for transformers' interface,
        which has a method for this.
    """

    parameters: Mapping[str, Stored]
    called: str = CHOSEN
    around: bool = False
    activation: str = ""


# Names, not classes, so that nothing is imported for a form that a model does not use.
FORMS: dict[str, Form] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": Form(
        {"gate_up_proj": Stored(transposed=True), "down_proj": Stored(transposed=True)},
        WEIGHED,
        around=True,
        activation="act_fn",
    ),
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Form(
        {"gate_up_proj": Stored("total_experts"), "down_proj": Stored("num_routed_experts")},
        activation="act_fn",
    ),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": Form(
        {"weight": Stored()}, SORTED
    ),
    "transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU": Form(
        {
            "w1": Stored("moe_num_experts", flat=True),
            "v1": Stored("moe_num_experts", flat=True),
            "w2": Stored("moe_num_experts", transposed=True, flat=True),
        },
        around=True,
        activation="activation_fn",
    ),
}


def form_of(module: nn.Module) -> Form | None:
    """The form in which a module holds matrices of experts; None for any other module."""
    if "is_transposed" in module.__dict__ and "has_gate" in module.__dict__:
        stored = Stored(transposed=bool(module.is_transposed))
        return Form({"gate_up_proj" if module.has_gate else "up_proj": stored, "down_proj": stored})
    kind = type(module)
    return FORMS.get(f"{kind.__module__}.{kind.__qualname__}")
