"""The format in which an adapter is written: PEFT's, or lorafold's own, which PEFT rejects.

PEFT adapts the matrices of experts and of grouped linear layers as parameters
(`target_parameters`), only with LoRA, without dropout, and only if the experts are 3-D parameters.
The dropout of such an adapter is therefore in lorafold.json, and other methods on them have a
peft_type of lorafold's. In models whose experts were modules in transformers 4, some linear layers
are named by their weights too (`renames`).

PEFT puts a wrapper over the module for each of its parameters, the last registered outermost:

    ...experts.lora_A.weight                of down_proj
    ...experts.base_layer.lora_A.weight     of gate_up_proj, if down_proj is adapted too

For a module without the attribute `is_transposed` PEFT assumes matrices (out, in), so the factors
for Llama 4's matrices, which are (in, out), are exchanged (`turned`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from lorafold.core.anatomy import Anatomy, ends_in, joined, last_part
from lorafold.core.expert_matrices import (
    Matrices,
    expert_parameters,
    experts_layout,
    module_at,
    parameter_path,
)
from lorafold.core.spec import Spec
from lorafold.core.targets import pattern_matches
from lorafold.errors import LorafoldError, listed
from lorafold.layers import is_linear, layer_class
from lorafold.layers.dense import Conv1D
from lorafold.layers.grouped import GroupedLinear
from lorafold.peft.table import METHODS, expert_method, unlisted_methods
from lorafold.peft.table_types import Method
from lorafold.peft.tokens import path_ends

log = logging.getLogger(__name__)
# PEFT rejects these targets of LoRA and AdaLoRA in models of these types, whose kernels may read
# the weights directly
UNSUPPORTED_TARGETS = frozenset({"out_proj", "conv1d"})
UNSUPPORTING_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
# the modules whose weights models of these types access without the modules' forward, always or in
# their fast kernels
BYPASSED_TARGETS = {
    **dict.fromkeys(("falcon_mamba", "mamba"), ("dt_proj", "out_proj", "x_proj")),
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), ("out_proj",)
    ),
    "jamba": ("dt_proj",),
    "rwkv": ("output", "value"),
    "wavlm": ("k_proj", "out_proj", "q_proj", "v_proj"),
}
DROPOUT = "dropout"  # in lorafold.json: the dropout of an adapter whose config can't contain it
# the model families whose target modules PEFT renames, and the last parts of these modules' paths
RENAMING_FAMILIES = ("mixtral", "qwen2_moe")
RENAMED_TARGETS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
PER_EXPERT = re.compile(r"\.experts\.\d+\.")

V = TypeVar("V")


@dataclass(frozen=True)
class AdapterFormat:
    """The format of a written adapter.

    parameters: Target module -> parameter, for modules that PEFT adapts as parameters. renamed:
    PEFT renames target modules of this model, so that only lists of names are safe. own_format:
    PEFT does not have this method for parameters. dropout: The dropout that the config can't
    contain. refused: Target names because of which PEFT does not load the adapter. past: Other
    target names whose weights the model reads without PEFT's update.
    """

    method: Method
    parameters: Mapping[str, str]
    renamed: bool = False
    own_format: bool = False
    dropout: float = 0.0
    refused: tuple[str, ...] = ()
    past: tuple[str, ...] = ()

    @property
    def in_peft(self) -> bool:
        """Whether PEFT can load the files."""
        return self.method.of_peft and not self.refused


def format_of(model: nn.Module, spec: Spec, targets: Collection[str]) -> AdapterFormat:
    """The format for an adapter."""
    method = next((m for m in METHODS if m.holds(spec)), None)
    method = method or next((m for m in unlisted_methods() if m.holds(spec)), None)
    if method is None:
        raise LorafoldError(
            f"{type(spec).__name__} is not registered in lorafold.methods.METHODS, so a saved"
            " adapter could not be loaded; register the method there"
        )
    experts = Anatomy.of(model).experts
    renamed = bool(experts) and method.peft_type == "LORA" and renames_targets(model)
    parameters, modules = dict[str, str](), [module_at(model, path) for path in targets]
    for path, module in zip(targets, modules, strict=True):
        alone = isinstance(module, Matrices) or layer_class(module) is GroupedLinear
        if alone or (renamed and last_part(path) in RENAMED_TARGETS):
            parameters[path] = parameter_path(module, path, "weight")
    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    ends = {last_part(path) for path in targets if path not in parameters}
    refusing = kind in UNSUPPORTING_TYPES and method.peft_type in ("LORA", "ADALORA")
    refused = tuple(sorted(UNSUPPORTED_TARGETS & ends)) if refusing else ()
    past = tuple(sorted(ends.intersection(BYPASSED_TARGETS.get(kind, ())).difference(refused)))
    if not method.of_peft:
        parameters, refused, past = {}, (), ()
    if not parameters:
        return AdapterFormat(method, {}, renamed, refused=refused, past=past)
    # PEFT would mistake these for a single matrix
    flat = any(isinstance(module, Matrices) and module.stored.flat for module in modules)
    if flat or not method.parameters:
        return AdapterFormat(expert_method(method), {}, own_format=True)
    dropout = spec.dropout  # type: ignore[attr-defined]
    return AdapterFormat(method, parameters, renamed, dropout=dropout, refused=refused, past=past)


def warn_limits(form: AdapterFormat, path: object) -> None:
    """Log the limits of the format for users of PEFT."""
    if form.own_format:
        log.warning(
            f"{path}: PEFT can't load this adapter (peft_type {form.method.peft_type}), because it"
            " supports only LoRA on experts and grouped linear layers, and only experts in"
            " 3-dimensional parameters; lorafold can load it"
        )
    if form.refused:
        log.warning(
            f"{path}: PEFT supports no targets {', '.join(form.refused)} in models of this type, so"
            " it can't load this adapter; lorafold can. For PEFT, use only the other targets"
        )
    if form.past:
        log.warning(
            f"{path}: models of this type use the weights of {', '.join(form.past)} directly,"
            " always or in their fast kernels, so PEFT silently ignores the update there until the"
            " adapter is merged; lorafold applies it"
        )
    if form.dropout:
        log.info(
            f"{path}: PEFT supports no dropout for experts and grouped linear layers, so its config"
            f" has lora_dropout 0; lorafold reads {form.dropout:g} from lorafold.json"
        )


def with_dropout(spec: Spec, record: Mapping[str, Any]) -> Spec:
    """The spec of a config with the dropout from lorafold.json."""
    if DROPOUT not in record:
        return spec
    if type(value := record[DROPOUT]) is not float:
        raise LorafoldError(f"field {DROPOUT}: found {value!r}, expected a number")
    return replace(spec, dropout=value)  # type: ignore[type-var]


def renames_targets(model: nn.Module) -> bool:
    """Whether PEFT treats some LoRA targets in this model with experts as parameters, by the model
    type's family.
    """
    from transformers import conversion_mapping

    kind = getattr(getattr(model, "config", None), "model_type", None)
    table = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return kind == "mixtral" or table.get(kind) in RENAMING_FAMILIES


def count_wrappers(model: nn.Module, targets: Iterable[str]) -> dict[str, int]:
    """The number of other parameters' wrappers that PEFT puts over each target in experts."""
    owned: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    for path in targets:
        if isinstance(module := module_at(model, path), Matrices) and not module.stored.flat:
            owned[module.owner][module.name] = path
    return {
        sites[name]: above
        for owner, sites in owned.items()
        for above, name in enumerate(n for n in reversed(expert_parameters(owner)) if n in sites)
    }


def exchanges_sides(module: nn.Module) -> bool:
    """Whether PEFT exchanges inputs and outputs of a module's matrices."""
    if not isinstance(module, Matrices):
        return False
    return module.stored.transposed != bool(getattr(module.owner, "is_transposed", False))


def shortest_names(model: nn.Module, chosen: Collection[str]) -> tuple[str, ...]:
    """The shortest path ends that name exactly the chosen parameters."""
    every = Counter(end for path, *_ in _parameters(model) for end in path_ends(path))
    own = Counter(end for path in chosen for end in path_ends(path))
    names = (next(e for e in path_ends(p) if own[e] == every[e] or e == p) for p in chosen)
    return tuple(sorted(set(names)))


def select(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The modules that PEFT's `target_parameters` select, by name; empty for a name without a
    match.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    wrong = []
    for path, owner, module, leaf in _parameters(model):
        name = next((n for n in names if ends_in(path, n)), None)
        if name is None:
            continue
        matrix = is_linear(module) and not issubclass(layer_class(module), Conv1D)
        stored = form.parameters.get(leaf) if (form := experts_layout(module)) else None
        if stored is not None and not stored.flat:
            found[name].append(path)
        elif leaf == "weight" and matrix:
            found[name].append(owner)
        else:
            wrong.append(path)
    if wrong:
        raise LorafoldError(
            f"target_parameters: found {listed(wrong)}, expected 3-dimensional parameters"
            " of experts, or the weights of linear layers"
        )
    return {name: tuple(sites) for name, sites in found.items()}


def rename_patterns(values: Mapping[str, V], pairs: Iterable[tuple[str, str]]) -> dict[str, V]:
    """Ranks or alphas by regular expression, with entries for new names of (old, new) paths that
    would get other values.
    """
    def of(path: str) -> Any:
        return next((v for key, v in values.items() if pattern_matches(key, path)), None)

    more = {re.escape(b): of(a) for a, b in pairs if of(a) is not None and of(a) != of(b)}
    return {**more, **values}


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Yield (path, module path, module, name) of each parameter, for experts as if unquantized."""
    anatomy = Anatomy.of(model)
    for path, module in anatomy.modules:
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        matrices = expert_parameters(module) if path in anatomy.experts else ()
        for name in dict.fromkeys([*matrices, *own]):
            yield joined(path, name), path, module, name
