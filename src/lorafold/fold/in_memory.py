"""Carry out a fold plan on the model itself, one module at a time.

    W' = round(fold(W))         summed in fp32, rounded once to the dtype that the module stores

A quantized weight is dequantized, to the dtype that it is computed in.

`untie` separates weights that several modules share, because a config has one switch for all ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of
from lorafold.core.anatomy import bare_modules
from lorafold.core.base import bare
from lorafold.core.matrices import module_at
from lorafold.errors import NotMergeable, as_one, listed
from lorafold.fold.plan import FoldPlan, declare, fold, module_of, switch_on


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give the module its own copy of a tied weight."""
    weight: nn.Parameter = bare(module).weight  # type: ignore[assignment]
    module.weight = _own(weight)


def untie_others(model: nn.Module) -> None:
    """Record in the model's config that its weights are not tied, if it says that they are, and
    give every module its own copy of those that still are.
    """
    config = getattr(model, "config", None)
    parts = [part for part in (config, getattr(config, "text_config", None)) if part is not None]
    tied = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    if not tied:
        return
    for part in tied:
        part.tie_word_embeddings = False
    seen: set[int] = set()
    for _, module in bare_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                setattr(module, name, _own(parameter))
            seen.add(id(parameter))


def _own(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def carry_out(
    model: nn.Module, plan: FoldPlan, names: Sequence[str], *, untie_weights: bool = False
) -> None:
    """Write the folded weights into the model. The deltas stay attached; detach them afterwards.

    Raises NotMergeable, before anything is changed, with the plan's problems and the tied weights
    that would not change in the same way.

    Args:
        names: the names of the adapters to fold, lowest first.
        untie_weights: give modules their own weight where a tied one can't stay tied; then none
            stays tied, since transformers has one switch for all ties.
    """
    problems = [f"{path}: {reason}" for path, reason in plan.problems]
    if not untie_weights:
        problems += [
            f"{module_of(name)}: its weight is tied to {listed(map(module_of, others))}, where"
            " it would not change in the same way; untie_weights=True gives it its own"
            for name, others in plan.apart.items()
        ]
    if problems:
        raise NotMergeable(as_one(problems))
    switch_on(model, plan.switches)
    if plan.vocabulary is not None:
        declare(model, plan.vocabulary)
    sharing = {module_of(name) for name in plan.together}
    # all modules of a tied weight are folded before the weight changes
    ahead = {path: _folded(model, path, names) for path in plan.paths if path in sharing}
    for path in plan.paths:
        w, b = ahead[path] if path in ahead else _folded(model, path, names)
        module = module_at(model, path)
        if f"{path}.weight" in plan.apart:
            untie(model, module)
        layer_of(module).dequantize()
        layer_of(module).write(w, b)
    for name, others in plan.together.items():  # a weight that grew is a new parameter
        kept = bare(module_at(model, module_of(name)))
        for other in others:
            path, _, leaf = other.rpartition(".")
            setattr(module_at(model, path), leaf, getattr(kept, leaf))
    if plan.apart:
        untie_others(model)


@torch.no_grad()
def _folded(model: nn.Module, path: str, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    module = module_at(model, path)
    wide = [
        None if t is None else t.detach().to(torch.promote_types(t.dtype, torch.float32))
        for t in layer_of(module).dense()
    ]
    return fold(module, names, *wide)  # type: ignore[arg-type]
