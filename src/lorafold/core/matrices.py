"""The matrices of experts as a module of their own, which deltas can be attached to.

    experts.gate_up_proj    a parameter (E, 2 I, H)  ->  a `Matrices` at `...experts.gate_up_proj`

transformers has one module for the experts of a block, whose parameters have one matrix for each
expert. A site there is the path of the parameter. The `Matrices` becomes a child of the parameter's
owner when it gets its first delta; it has no parameters. An `ExpertsForm` says which parameters
these are, which way round, and how the forward learns which rows are of which expert:

    CHOSEN     forward(x, experts, weights)    the experts of each token (T, k), and their weights
    WEIGHED    forward(x)                      its `router` gives the scores (T, E) of its `top_k`
                                               experts, which weigh their inputs; `shared_expert`
                                               is added
    SORTED     forward(rows, sizes)            rows (S, in) that lie sorted by expert

transformers' interface for experts describes its own form; other classes are rows of `FORMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafold.errors import LorafoldError

STORED = "_"  # behind the name of matrices in a state dict
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
class ExpertsForm:
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
FORMS = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": ExpertsForm(
        {"gate_up_proj": Stored(transposed=True), "down_proj": Stored(transposed=True)},
        WEIGHED,
        around=True,
        activation="act_fn",
    ),
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": ExpertsForm(
        {"gate_up_proj": Stored("total_experts"), "down_proj": Stored("num_routed_experts")},
        activation="act_fn",
    ),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": ExpertsForm(
        {"weight": Stored()}, SORTED
    ),
    "transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU": ExpertsForm(
        {
            "w1": Stored("moe_num_experts", flat=True),
            "v1": Stored("moe_num_experts", flat=True),
            "w2": Stored("moe_num_experts", transposed=True, flat=True),
        },
        around=True,
        activation="activation_fn",
    ),
}


def form_of(module: nn.Module) -> ExpertsForm | None:
    """The form in which a module holds matrices of experts; None for any other module."""
    if "is_transposed" in module.__dict__ and "has_gate" in module.__dict__:
        stored = Stored(transposed=bool(module.is_transposed))
        return ExpertsForm(
            {"gate_up_proj" if module.has_gate else "up_proj": stored, "down_proj": stored}
        )
    kind = type(module)
    return FORMS.get(f"{kind.__module__}.{kind.__qualname__}")


class Matrices(nn.Module):
    """The matrices of the parameter `name` of `owner`, which is a child of `around`."""

    owner: nn.Module
    around: nn.Module | None

    def __init__(self, owner: nn.Module, name: str, around: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__.update(owner=owner, around=around)  # no submodules, which would be a cycle
        self.name = name
        self.training = owner.training

    @property
    def form(self) -> ExpertsForm:
        """How the owner holds the matrices."""
        form = form_of(self.owner)
        assert form is not None
        return form

    @property
    def stored(self) -> Stored:
        """How the parameter stores them."""
        return self.form.parameters[self.name]

    @property
    def number(self) -> int:
        """How many there are."""
        return int(getattr(self.owner, self.stored.number))

    @property
    def routed(self) -> nn.Module:
        """The module whose forward learns which rows are of which expert."""
        if not self.form.around:
            return self.owner
        if self.around is None:
            kind = type(self.owner).__name__
            raise LorafoldError(
                f"{self.name}: found a {kind} alone, expected one in the module that routes to it"
            )
        return self.around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: the owner's forward computes with the matrices."""
        raise NotImplementedError(f"{self.name} is computed by {type(self.owner).__name__}")

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The tensors of the deltas, under the parameter's name with an underscore behind it:
        transformers divides what it finds under that name itself, one for each expert.
        """
        stored = f"{prefix.removesuffix('.')}{STORED}." if prefix else prefix
        return super().state_dict(destination=destination, prefix=stored, keep_vars=keep_vars)


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters in which a module holds the matrices of experts, in the order in
    which they are applied; none for any other module.
    """
    form = form_of(module)
    return () if form is None else tuple(form.parameters)


def expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module says that there are, if it holds matrices of experts, in whatever
    form: matrices beside each other in parameters of its own. Empty for any other module.
    """
    counts = {n for name, n in vars(module).items() if name.endswith("experts") and type(n) is int}
    own = [(name, p) for name, p in module._parameters.items() if p is not None] if counts else []
    if not counts or any(p.dim() > 2 or (p.dim() == 2 and name != "weight") for name, p in own):
        return counts
    form = form_of(module)
    stored = () if form is None else form.parameters.values()
    return {int(getattr(module, one.number)) for one in stored}


def matrices_of(module: nn.Module, around: nn.Module | None = None) -> dict[str, Matrices]:
    """The matrices of a module of experts, by the names of its parameters."""
    return {
        name: module._modules.get(name) or Matrices(module, name, around)  # type: ignore[misc]
        for name in expert_parameters(module)
    }


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a site, which is a module path or the path of a parameter of experts.

    Raises AttributeError if there is none.
    """
    around, module = None, model
    for name in path.split(".") if path else ():
        child = module._modules.get(name) or matrices_of(module, around).get(name)
        if child is None:
            raise AttributeError(f"{path}: {type(module).__name__} has no module {name!r}")
        around, module = module, child
    return module


def parameter_path(module: nn.Module, path: str, name: str) -> str:
    """The path of a parameter in the model."""
    if isinstance(module, Matrices):
        return path if name == "weight" else f"{path}_{name}"
    return f"{path}.{name}" if path else name
