"""The matrices of experts as a module of their own, which deltas can be attached to.

    experts.gate_up_proj    a parameter (E, 2 I, H)  ->  a `Matrices` at `...experts.gate_up_proj`

A mixture of experts in transformers has one module for the experts of a block, whose parameters
have one matrix for each expert, in one of a few forms (`core.expert_forms`). No module is called
for such a parameter, so a site there is the path of the parameter. The `Matrices` becomes a child
of its owner, under the parameter's name, when it gets its first delta; until then it is made where
it is asked for. It has no parameters, since the owner keeps its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafold.core.expert_forms import Form, Stored, form_of
from lorafold.errors import LorafoldError

STORED = "_"  # behind the name of matrices in a state dict


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
    def form(self) -> Form:
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
        """The module whose forward learns which rows are of which expert. Raises LorafoldError if
        it is around a module that stands alone.
        """
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
    own = [(name, p) for name, p in module._parameters.items() if p is not None]
    if not any(p.dim() > 2 or (p.dim() == 2 and name != "weight") for name, p in own):
        form = form_of(module)
        stored = () if form is None else form.parameters.values()
        return {int(getattr(module, one.number)) for one in stored}
    return {n for name, n in vars(module).items() if name.endswith("experts") and type(n) is int}


def matrices_of(module: nn.Module, around: nn.Module | None = None) -> dict[str, Matrices]:
    """The matrices of a module of experts, by the names of its parameters.

    Args:
        around: the module that the module is a child of.
    """
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
        found = module._modules.get(name) or matrices_of(module, around).get(name)
        if found is None:
            raise AttributeError(f"{path}: {type(module).__name__} has no module {name!r}")
        around, module = module, found
    return module


def parameter_path(module: nn.Module, path: str, name: str) -> str:
    """The path of a parameter in the model.

    Args:
        name: the parameter's name, "weight" or "bias".
    """
    if isinstance(module, Matrices):
        return path if name == "weight" else f"{path}_{name}"
    return f"{path}.{name}" if path else name
