"""Sites that PEFT adapts as parameters and not as modules: `target_parameters`.

    ...experts.gate_up_proj (E, 2 I, H)     the matrices of experts, for which there is no module
    ...self_attn.o_a_proj.weight (out, in)  that of a grouped linear: PEFT's layer for linears would
                                            add outputs of all groups to those of each
    ...mlp.down_proj.weight (out, in)       a linear's weight; only for LoRA in models whose experts
                                            transformers 4 had as modules (`renames`)

PEFT puts a wrapper over the module for each of its parameters, the last registered outermost:

    ...experts.lora_A.weight                of down_proj
    ...experts.base_layer.lora_A.weight     of gate_up_proj, if down_proj is adapted too

A module without the attribute `is_transposed` has matrices (out, in) for it, so those of Llama 4,
which are (in, out), have its factors exchanged. What has two dimensions is one matrix for it, so
for flat matrices of experts it has no form.

It takes the names gate_proj, up_proj, down_proj, w1 ... among the target modules of such a model
for parameters of its experts, and a regular expression or "all-linear" for the last parts of the
paths that match; so there these linears are named by their weights, and all others in a list.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from lorafold.bases import is_linear, layer_class
from lorafold.bases.dense import Conv1D
from lorafold.bases.grouped import GroupedLinear
from lorafold.core.anatomy import Anatomy
from lorafold.core.matrices import Matrices, expert_parameters, form_of, module_at, parameter_path
from lorafold.core.targets import pattern_matches
from lorafold.errors import LorafoldError, listed

# the last parts of the paths that PEFT renames, by the family of experts in transformers 4
FAMILIES = ("mixtral", "qwen2_moe")
RENAMED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
PER_EXPERT = re.compile(r"\.experts\.\d+\.")

V = TypeVar("V")


def renames(model: nn.Module) -> bool:
    """Whether PEFT takes some target modules of LoRA in this model for parameters of experts: it
    looks the model's type up in transformers' table of families.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or not Anatomy.of(model).experts:
        return False
    from transformers import conversion_mapping

    table: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return kind == "mixtral" or table.get(kind) in FAMILIES


def as_parameters(model: nn.Module, targets: Iterable[str], renamed: bool) -> dict[str, str]:
    """The paths of the parameters by site, for the targets that PEFT adapts as such.

    Args:
        targets: The sites that the method adapts.
        renamed: Whether PEFT renames target modules of this method in this model.
    """
    found = {}
    for path in targets:
        module = module_at(model, path)
        alone = isinstance(module, Matrices) or layer_class(module) is GroupedLinear
        if alone or (renamed and path.rsplit(".", 1)[-1] in RENAMED):
            found[path] = parameter_path(module, path, "weight")
    return found


def wrappers_over(model: nn.Module, targets: Iterable[str]) -> dict[str, int]:
    """How many wrappers of other parameters PEFT puts over each target that is one of experts."""
    owned: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    for path in targets:
        if isinstance(module := module_at(model, path), Matrices) and not module.stored.flat:
            owned[module.owner][module.name] = path
    found = {}
    for owner, sites in owned.items():
        order = [sites[name] for name in reversed(expert_parameters(owner)) if name in sites]
        found.update({path: above for above, path in enumerate(order)})
    return found


def turned(module: nn.Module) -> bool:
    """Whether PEFT takes the inputs of a module's matrices for their outputs."""
    if not isinstance(module, Matrices):
        return False
    return module.stored.transposed != bool(getattr(module.owner, "is_transposed", False))


def any_flat(model: nn.Module, targets: Iterable[str]) -> bool:
    """Whether PEFT would take the matrices of experts of a target for one."""
    found = (module_at(model, path) for path in targets)
    return any(isinstance(module, Matrices) and module.stored.flat for module in found)


def shortest(model: nn.Module, chosen: Collection[str]) -> tuple[str, ...]:
    """The shortest ends of paths, in whole parts, that name exactly the chosen parameters."""
    if not chosen:
        return ()
    every = Counter(end for path, *_ in _parameters(model) for end in _ends(path))
    own = Counter(end for path in chosen for end in _ends(path))
    names = (next(e for e in _ends(p) if own[e] == every[e] or e == p) for p in chosen)
    return tuple(sorted(set(names)))


def selected(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sites that PEFT's `target_parameters` select, by name; a name that matches no parameter
    has none. Raises LorafoldError for parameters that are neither the matrices of experts nor the
    weights of linear modules.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    wrong = []
    for path, owner, module, leaf in _parameters(model) if names else ():
        name = next((n for n in names if path == n or path.endswith(f".{n}")), None)
        if name is None:
            continue
        matrix = is_linear(module) and not issubclass(layer_class(module), Conv1D)
        stored = form.parameters.get(leaf) if (form := form_of(module)) else None
        if stored is not None and not stored.flat:
            found[name].append(path)
        elif leaf == "weight" and matrix:
            found[name].append(owner)
        else:
            wrong.append(path)
    if wrong:
        raise LorafoldError(
            f"target_parameters: found {listed(wrong)}, expected the matrices of experts in"
            " parameters of three dimensions, or the weights of linear modules"
        )
    return {name: tuple(sites) for name, sites in found.items()}


def renamed_patterns(values: Mapping[str, V], pairs: Iterable[tuple[str, str]]) -> dict[str, V]:
    """The values by pattern, with more of them where a path would get another value under its
    second name than under its first.

    Args:
        values: Ranks or alphas by regular expression, as PEFT matches them.
        pairs: The first and the second name of each path.
    """
    def of(path: str) -> Any:
        return next((v for key, v in values.items() if pattern_matches(key, path)), None)

    more = {re.escape(b): of(a) for a, b in pairs if of(a) is not None and of(a) != of(b)}
    return {**more, **values}


def check_fused(model: nn.Module, keys: Iterable[str]) -> None:
    """Raise LorafoldError if a file has tensors for each expert and the model has the matrices of
    all experts in one parameter.
    """
    each = [key for key in keys if PER_EXPERT.search(key)]
    if each and any(isinstance(m, Matrices) for _, m in Anatomy.of(model).modules):
        raise LorafoldError(
            f"found {len(each)} tensors of single experts, such as {min(each)}, as transformers 4"
            " had them; expected those of target_parameters: load the adapter with PEFT, which"
            " converts it, and save it again"
        )


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Yield the path of each parameter, that of its module, the module and the parameter's name.
    Experts have those of a plain model in any storage.
    """
    anatomy = Anatomy.of(model)
    for path, module in anatomy.modules:
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        matrices = expert_parameters(module) if path in anatomy.experts else ()
        for name in dict.fromkeys([*matrices, *own]):
            yield f"{path}.{name}" if path else name, path, module, name


def _ends(path: str) -> Iterator[str]:
    """Yield the ends of a path in whole parts, the shortest first."""
    parts = path.split(".")
    return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
