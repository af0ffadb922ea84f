"""The matrices of experts as a module of their own, which deltas can be attached to.

    experts.gate_up_proj    a parameter (E, 2 I, H)  ->  a `Matrices` at `...experts.gate_up_proj`

A mixture of experts in transformers has one module for the experts of a block, whose 3-D parameters
have one matrix for each expert. No module is called for such a parameter, so a site there is the
path of the parameter. The `Matrices` becomes a child of its owner, under the parameter's name, when
it gets its first delta; until then it is made where it is asked for. It has no parameters, since
the owner keeps its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

STORED = "_"  # behind the name of matrices in a state dict


class Matrices(nn.Module):
    """The matrices of the parameter `name` of `owner`."""

    owner: nn.Module

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not as a submodule, which would be a cycle
        self.name = name
        self.training = owner.training

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
    """The names of the parameters in which a module holds the matrices of experts: those of
    transformers' interface for experts (`use_experts_implementation`); none for any other module.
    """
    if "is_transposed" not in module.__dict__ or "has_gate" not in module.__dict__:
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module says that there are, if it holds matrices of experts, in whatever
    form: matrices beside each other in parameters of its own. Empty for any other module.
    """
    own = [(name, p) for name, p in module._parameters.items() if p is not None]
    if not any(p.dim() > 2 or (p.dim() == 2 and name != "weight") for name, p in own):
        return {module.num_experts} if expert_parameters(module) else set()  # type: ignore[arg-type]
    return {n for name, n in vars(module).items() if name.endswith("experts") and type(n) is int}


def matrices_of(module: nn.Module) -> dict[str, Matrices]:
    """The matrices of a module of experts, by the names of its parameters."""
    return {
        name: module._modules.get(name) or Matrices(module, name)  # type: ignore[misc]
        for name in expert_parameters(module)
    }


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a site, which is a module path or the path of a parameter of experts.

    Raises AttributeError if there is none.
    """
    module = model
    for name in path.split(".") if path else ():
        found = module._modules.get(name) or matrices_of(module).get(name)
        if found is None:
            raise AttributeError(f"{path}: {type(module).__name__} has no module {name!r}")
        module = found
    return module


def parameter_path(module: nn.Module, path: str, name: str) -> str:
    """The path of a parameter in the model.

    Args:
        name: the parameter's name, "weight" or "bias".
    """
    if isinstance(module, Matrices):
        return path if name == "weight" else f"{path}_{name}"
    return f"{path}.{name}" if path else name
