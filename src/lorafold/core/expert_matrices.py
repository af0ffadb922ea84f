"""Expert weights as modules, so that deltas can be attached to them.

transformers stores the weights of all experts in parameters such as `experts.gate_up_proj` (E, 2 I,
H); the path of the parameter is the target path. A forward assigns rows to experts in one of three
ways:

    BY_INDEX     forward(x, experts, weights)   the experts of each token (T, k), and their weights
    BY_SCORE     forward(x)                     its `router` scores (T, E) scale the experts' inputs
    SORTED_ROWS  forward(rows, sizes)           rows (S, in) sorted by expert
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafold.errors import LorafoldError

STORED = "_"  # suffix of a `Matrices` name in a state dict
BY_INDEX, BY_SCORE, SORTED_ROWS = "chosen", "weighed", "sorted"


@dataclass(frozen=True)
class Layout:
    """How a parameter stores matrices.

    number: the name of the module's attribute with the number of matrices.
    transposed: whether each matrix is stored as (in, out).
    flat: whether the matrices are concatenated in a 2-D parameter.
    """

    number: str = "num_experts"
    transposed: bool = False
    flat: bool = False


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module holds expert weights.

    parameters: in the order of use.
    called: how the forward assigns rows to experts.
    in_parent: whether that forward belongs to the parent of this module.
    activation: the attribute applied to the gates; empty for transformers' experts interface.
    """

    parameters: Mapping[str, Layout]
    called: str = BY_INDEX
    in_parent: bool = False
    activation: str = ""


# Names, not classes, so that nothing is imported for a form that a model does not use.
FORMS = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": ExpertsLayout(
        {"gate_up_proj": Layout(transposed=True), "down_proj": Layout(transposed=True)},
        BY_SCORE,
        in_parent=True,
        activation="act_fn",
    ),
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": ExpertsLayout(
        {"weight": Layout()}, SORTED_ROWS
    ),
    "transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU": ExpertsLayout(
        {
            "w1": Layout("moe_num_experts", flat=True),
            "v1": Layout("moe_num_experts", flat=True),
            "w2": Layout("moe_num_experts", transposed=True, flat=True),
        },
        in_parent=True,
        activation="activation_fn",
    ),
}


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    if "is_transposed" in module.__dict__ and "has_gate" in module.__dict__:
        stored = Layout(transposed=bool(module.is_transposed))
        return ExpertsLayout(
            {"gate_up_proj" if module.has_gate else "up_proj": stored, "down_proj": stored}
        )
    kind = type(module)
    return FORMS.get(f"{kind.__module__}.{kind.__qualname__}")


class Matrices(nn.Module):
    """A module without parameters that represents the matrices in the parameter `name` of `owner`,
    a child of `parent`.
    """

    owner: nn.Module
    parent: nn.Module | None

    def __init__(self, owner: nn.Module, name: str, parent: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__.update(owner=owner, parent=parent)  # not submodules: that would be a cycle
        self.name = name
        self.training = owner.training

    @property
    def form(self) -> ExpertsLayout:
        form = experts_layout(self.owner)
        assert form is not None
        return form

    @property
    def stored(self) -> Layout:
        return self.form.parameters[self.name]

    @property
    def number(self) -> int:
        return int(getattr(self.owner, self.stored.number))

    @property
    def routed(self) -> nn.Module:
        """The module whose forward assigns rows to experts."""
        if not self.form.in_parent:
            return self.owner
        if self.parent is None:
            kind = type(self.owner).__name__
            raise LorafoldError(
                f"{self.name}: found a lone {kind}, expected one in the module that routes to it"
            )
        return self.parent

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self.name} is computed by {type(self.owner).__name__}")

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Returns the deltas' tensors, under the parameter's name and an underscore, because
        transformers would split tensors under the name itself by expert.
        """
        stored = f"{prefix.removesuffix('.')}{STORED}." if prefix else prefix
        return super().state_dict(destination=destination, prefix=stored, keep_vars=keep_vars)


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    form = experts_layout(module)
    return () if form is None else tuple(form.parameters)


def numbers_of_experts(module: nn.Module) -> set[int]:
    return {n for name, n in vars(module).items() if name.endswith("experts") and type(n) is int}


def expert_counts(module: nn.Module) -> set[int]:
    """Returns the numbers of experts that a module declares, or none if its own parameters are not
    expert weights.
    """
    counts = numbers_of_experts(module)
    own = [(name, p) for name, p in module._parameters.items() if p is not None] if counts else []
    if not counts or any(p.dim() > 2 or (p.dim() == 2 and name != "weight") for name, p in own):
        return counts
    form = experts_layout(module)
    stored = () if form is None else form.parameters.values()
    return {int(getattr(module, one.number)) for one in stored}


def matrices_of(module: nn.Module, parent: nn.Module | None = None) -> dict[str, Matrices]:
    return {
        name: module._modules.get(name) or Matrices(module, name, parent)  # type: ignore[misc]
        for name in expert_parameters(module)
    }


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a target path, which may be the path of an expert parameter. Raises
    AttributeError if there is none.
    """
    parent, module = None, model
    for name in path.split(".") if path else ():
        child = module._modules.get(name) or matrices_of(module, parent).get(name)
        if child is None:
            raise AttributeError(f"{path}: {type(module).__name__} has no module {name!r}")
        parent, module = module, child
    return module


def parameter_path(module: nn.Module, path: str, name: str) -> str:
    if isinstance(module, Matrices):
        return path if name == "weight" else f"{path}_{name}"
    return f"{path}.{name}" if path else name
