"""The format in which an adapter is written: PEFT's format, or lorafold's own, which PEFT rejects.

PEFT adapts the matrices of experts and of grouped linear layers as parameters
(`target_parameters`). It supports this only for LoRA without dropout, and only if the experts are
3-D parameters. The dropout of such an adapter is therefore stored in lorafold.json, and other
methods on experts have a peft_type that only lorafold reads. In models whose experts were modules
in transformers 4, PEFT also adapts some linear layers as parameters (`renames_targets`).

PEFT wraps the module once for each adapted parameter. The wrapper of the parameter that was
registered last is the outermost:

    ...experts.lora_A.weight                of down_proj
    ...experts.base_layer.lora_A.weight     of gate_up_proj, if down_proj is adapted too

For a module without the attribute `is_transposed`, PEFT assumes matrices (out, in). The matrices of
Llama 4 are (in, out), so their factors are exchanged (`exchanges_sides`).
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
from lorafold.errors import LorafoldError, listed, truncate
from lorafold.layers import is_linear, layer_class
from lorafold.layers.dense import Conv1D
from lorafold.layers.grouped import GroupedLinear
from lorafold.peft.table import METHODS, expert_method, unlisted_methods
from lorafold.peft.table_types import JsonObject, Method
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

    Attributes:
        parameters: the parameter of each target module that PEFT adapts as a parameter.
        renamed: PEFT renames target modules of this model, so a regular expression might not match.
        own_format: PEFT does not have this method for parameters.
        dropout: the dropout, if the config can't contain it.
        unsupported: target names because of which PEFT does not load the adapter.
        bypassed: other target names whose weights the model reads without PEFT's update.
    """

    method: Method
    parameters: Mapping[str, str]
    renamed: bool = False
    own_format: bool = False
    dropout: float = 0.0
    unsupported: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()

    @property
    def in_peft(self) -> bool:
        """Whether PEFT can load the files."""
        return self.method.of_peft and not self.unsupported


def format_of(model: nn.Module, spec: Spec, targets: Collection[str]) -> AdapterFormat:
    """The format for an adapter with this spec on these target modules."""
    method = next((m for m in METHODS if m.holds(spec)), None)
    method = method or next((m for m in unlisted_methods() if m.holds(spec)), None)
    if method is None:
        raise LorafoldError(
            f"{truncate(repr(spec), 60)}: there is no file format for this spec; register the"
            " method in lorafold.methods.METHODS, or choose another one (for DoRA, another `over`)"
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
    excludes = kind in UNSUPPORTING_TYPES and method.peft_type in ("LORA", "ADALORA")
    refused = tuple(sorted(UNSUPPORTED_TARGETS & ends)) if excludes else ()
    bypassed = tuple(sorted(ends.intersection(BYPASSED_TARGETS.get(kind, ())).difference(refused)))
    if not method.of_peft:
        parameters, refused, bypassed = {}, (), ()
    if not parameters:
        return AdapterFormat(method, {}, renamed, unsupported=refused, bypassed=bypassed)
    # PEFT would mistake flat experts for a single matrix
    flat = any(isinstance(module, Matrices) and module.stored.flat for module in modules)
    if flat or not method.parameters:
        return AdapterFormat(expert_method(method), {}, own_format=True)
    dropout = spec.dropout  # type: ignore[attr-defined]
    return AdapterFormat(method, parameters, renamed, False, dropout, refused, bypassed)


def warn_limits(form: AdapterFormat, path: object) -> None:
    """Logs the limits of PEFT for the adapter, if any."""
    if form.own_format:
        log.warning(
            f"{path}: PEFT can't load this adapter (peft_type {form.method.peft_type}), because it"
            " supports only LoRA on experts and grouped linear layers, and only experts in"
            " 3-dimensional parameters; lorafold can load it"
        )
    if form.unsupported:
        log.warning(
            f"{path}: PEFT can't load this adapter, because it does not support the targets"
            f" {', '.join(form.unsupported)} in models of this type; lorafold can load it. For"
            " PEFT, use only the other targets"
        )
    if form.bypassed:
        log.warning(
            f"{path}: models of this type use the weights of {', '.join(form.bypassed)} directly,"
            " always or in their fast kernels, so PEFT silently ignores the update there until the"
            " adapter is merged; lorafold applies it"
        )
    if form.dropout:
        log.info(
            f"{path}: PEFT supports no dropout for experts and grouped linear layers, so the config"
            f" has lora_dropout 0; lorafold reads {form.dropout:g} from lorafold.json"
        )


def with_dropout(spec: Spec, record: JsonObject) -> Spec:
    """The spec with the dropout in lorafold.json, if there is one."""
    if DROPOUT not in record:
        return spec
    if type(value := record[DROPOUT]) is not float:
        raise LorafoldError(f"field {DROPOUT}: found {value!r}, expected a float")
    return replace(spec, dropout=value)  # type: ignore[type-var]


def renames_targets(model: nn.Module) -> bool:
    """Whether PEFT adapts some linear layers of this model as parameters; this depends on the model
    type.
    """
    from transformers import conversion_mapping

    kind = getattr(getattr(model, "config", None), "model_type", None)
    table = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return kind == "mixtral" or table.get(kind) in RENAMING_FAMILIES


def count_wrappers(model: nn.Module, targets: Iterable[str]) -> dict[str, int]:
    """The number of PEFT's wrappers outside the wrapper of each target in experts."""
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
    """Whether PEFT exchanges the inputs and outputs of a module's matrices."""
    if not isinstance(module, Matrices):
        return False
    return module.stored.transposed != bool(getattr(module.owner, "is_transposed", False))


def shortest_names(model: nn.Module, chosen: Collection[str]) -> tuple[str, ...]:
    """The shortest path suffixes that match exactly the chosen parameters."""
    every = Counter(end for path, *_ in _parameters(model) for end in path_ends(path))
    own = Counter(end for path in chosen for end in path_ends(path))
    names = (next(e for e in path_ends(p) if own[e] == every[e] or e == p) for p in chosen)
    return tuple(sorted(set(names)))


def select(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The modules that PEFT selects by `target_parameters`, for each name. A name without a match
    has an empty tuple.
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
    """Ranks or alphas by regular expression, extended for renamed modules. `pairs` are (old path,
    new path); a new path has an entry if its value would change otherwise.
    """
    def of(path: str) -> Any:
        return next((v for key, v in values.items() if pattern_matches(key, path)), None)

    more = {re.escape(b): of(a) for a, b in pairs if of(a) is not None and of(a) != of(b)}
    return {**more, **values}


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Yields (path, module path, module, name) for each parameter. Quantized experts are listed
    with the parameters of unquantized experts.
    """
    anatomy = Anatomy.of(model)
    for path, module in anatomy.modules:
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        matrices = expert_parameters(module) if path in anatomy.experts else ()
        for name in dict.fromkeys([*matrices, *own]):
            yield joined(path, name), path, module, name
