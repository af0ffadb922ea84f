"""The types of the method table.

    Field         a config key  <->  a field of the spec
    FileTensor    a key in the tensor file  <->  a tensor of a delta
    Method        a peft_type with its fields
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError
from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.core.layer import BaseLayer
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.models.weights import Weights

JsonObject = Mapping[str, Any]
Tensors = Mapping[str, Tensor]  # of a file, by key
ROOT = "base_model.model"
# the types in the table that PEFT can load
PEFT_TYPES = frozenset(
    {"LORA", "ADALORA", "VERA", "LOHA", "LOKR", "IA3", "PROMPT_TUNING", "PREFIX_TUNING"}
)


def check_regex(pattern: str) -> str:
    """Returns the pattern, or raises ValueError if it is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"not a regular expression, {e}") from None
    return pattern


Regex = Annotated[str, AfterValidator(check_regex)]


@dataclass(frozen=True)
class TargetModule:
    """A module and a delta on it.

    Attributes:
        target: the method adapts this module, so PEFT moves the module itself to `base_layer`.
        at: the module's path in PEFT's names.
        wrappers: for experts that PEFT adapts too, the number of PEFT's wrappers outside (`form`).
        window: the kernel size of a convolution; () for any other module.
        turned: PEFT exchanges inputs and outputs of the matrices (`form.exchanges_sides`).
    """

    path: str
    delta: Delta
    layer: type[BaseLayer]
    target: bool
    base: Weights
    at: str
    wrappers: int | None = None
    window: tuple[int, ...] = ()
    turned: bool = False

    def base_parameter(self, name: str) -> Tensor | None:
        """The module's parameter of this name in the base (any shape), or None."""
        key = self.base.find(f"{self.path}.{name}")
        return None if key is None else self.base.get(key)


@dataclass(frozen=True)
class Field:
    """A config key and the spec's field for it, the type in the file, PEFT's default, conversions,
    and the value that replaces null.
    """

    key: str
    attribute: str
    type: Any
    default: Any
    to_file: Callable[[Any], Any] | None = None
    from_file: Callable[[Any], Any] | None = None
    empty: Any = None

    @cached_property
    def _checked(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.type)

    def read(self, config: JsonObject) -> Any:
        value = config.get(self.key, self.default)
        try:
            checked = self._checked.validate_python(value, strict=True)
            if checked is None and self.empty is not None:
                return self.empty
            return self.from_file(checked) if self.from_file else checked
        except ValidationError as e:
            message = e.errors()[0]["msg"].lower()
            raise LorafoldError(f"{self.key}: found {value!r}; {message}") from None


TensorConversion = Callable[[Tensor, TargetModule], Tensor]
# (tensor of the file, target module, all tensors of the file) -> an error message, or None
Check = Callable[[Tensor, TargetModule, Tensors], str | None]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a delta (a dotted name), and the template of its key in the file. The template
    contains `at`, the module's path in PEFT's names, or `under`, the path of the base's weights.

    `to_file` and `from_file` convert the tensor. `check` is used for tensors whose shape depends on
    other tensors of the file.
    """

    attribute: str
    template: str
    to_file: TensorConversion | None = None
    from_file: TensorConversion | None = None
    check: Check | None = None


Entries = Callable[[TargetModule], list[FileTensor]]  # the entries of a target module's delta


def fixed(*entries: FileTensor) -> Entries:
    """The entries of a delta that has the same entries on every module."""
    return lambda site: [*entries]


def named(**templates: str) -> Entries:
    """The entries of a delta, from templates by tensor name."""
    return fixed(*(FileTensor(attribute, key) for attribute, key in templates.items()))


@dataclass(frozen=True)
class Method:
    """A row of the table: the config of a method.

    Attributes:
        marks: the values that distinguish the method from other methods of the same `peft_type`.
        irrelevant: keys that do not change the outputs of a saved adapter.
        derived: returns further keys, from the target modules.
        outer: a spec whose `over` is this method, such as DoRA.
        biases: PEFT's config of this method has a key for biases.
        preset: the fixed targets of the method, whose config has no target modules.
        parameters: PEFT supports the method for `target_parameters`.
    """

    spec: type[Spec]
    peft_type: str
    fields: tuple[Field, ...]
    marks: JsonObject = field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    derived: Callable[[Sequence[TargetModule]], JsonObject] = lambda sites: {}
    outer: type[Spec] | None = None
    biases: bool = True
    preset: str | None = None
    parameters: bool = False

    @cached_property
    def of_peft(self) -> bool:
        """Whether PEFT reads files of this type."""
        return self.peft_type in PEFT_TYPES

    def holds(self, spec: Spec) -> bool:
        """Whether the row describes the method of this spec."""
        if self.outer is None:
            return type(spec) is self.spec
        return type(spec) is self.outer and type(spec.over) is self.spec  # type: ignore[attr-defined]

    def config(self, spec: Spec, sites: Sequence[TargetModule]) -> dict[str, Any]:
        own = spec if self.outer is None else spec.over  # type: ignore[attr-defined]
        mapped = {f.key: getattr(own, f.attribute) for f in self.fields}
        mapped |= {f.key: f.to_file(mapped[f.key]) for f in self.fields if f.to_file}
        return {"peft_type": self.peft_type, **mapped, **self.marks, **self.derived(sites)}

    def read(self, config: JsonObject) -> tuple[Spec | None, list[str]]:
        """The spec of a config and an empty list, or None and a message for each invalid field."""
        values, problems = {}, []
        for f in self.fields:
            try:
                values[f.attribute] = f.read(config)
            except LorafoldError as e:
                problems.append(str(e))
        if problems:
            return None, problems
        try:
            spec = self.spec(**values)
            return self.outer(spec) if self.outer else spec, []
        except LorafoldError as e:
            return None, [str(e)]

    @cached_property
    def known(self) -> frozenset[str]:
        """The keys that a config of this method may have, besides the keys of all methods."""
        return frozenset(f.key for f in self.fields) | self.irrelevant
