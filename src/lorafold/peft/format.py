"""The vocabulary of the table: what one method looks like in PEFT's files.

The rows themselves are in `table.py`.

    Field      a config key  <->  a field of the spec
    Entry      a key in the tensor file  <->  a tensor of a delta
    Method     a peft_type with its fields

Each holds for both ways, with a pair of functions where the file says it differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError
from torch import Tensor

from lorafold.core.delta import Delta
from lorafold.core.layer import Base
from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.models.weights import Weights

ROOT = "base_model.model"


def compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"no regular expression, {e}") from None
    return pattern


Regex = Annotated[str, AfterValidator(compiles)]


@dataclass(frozen=True)
class Site:
    """One delta at one module.

    `target`: the method was laid there, so that PEFT moves the module itself to `base_layer`.
    """

    path: str
    delta: Delta
    layer: type[Base]
    target: bool
    base: Weights

    @property
    def at(self) -> str:
        return f"{ROOT}.{self.path}"

    @property
    def under(self) -> str:
        return f"{self.at}.base_layer" if self.target else self.at

    def own(self, name: str) -> Tensor | None:
        """The module's own parameter, from the base."""
        found = self.base.find(f"{self.path}.{name}")
        return None if found is None else self.base.get(found)


def as_is(value: Any) -> Any:
    return value


def unchanged(tensor: Tensor, site: Site) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Field:
    """A config key, the spec's field, what the file may hold (a type for pydantic) and what PEFT
    assumes where the key is absent.
    """

    key: str
    attribute: str
    type: Any
    default: Any
    to_file: Callable[[Any], Any] = as_is
    from_file: Callable[[Any], Any] = as_is

    def read(self, config: Mapping[str, Any]) -> Any:
        """LorafoldError for a value of another type."""
        value = config.get(self.key, self.default)
        try:
            return self.from_file(TypeAdapter(self.type).validate_python(value, strict=True))
        except ValidationError as e:
            raise LorafoldError(
                f"{self.key}: found {value!r}; {e.errors()[0]['msg'].lower()}"
            ) from None


@dataclass(frozen=True)
class Entry:
    """A tensor of a delta (a dotted name) and its key, a template over the site's `at` and `under`.

    The functions change between the delta's tensor and the file's. Where the file and not the spec
    decides on its shape, `misfit` says what is wrong with a tensor of the file, given all that it
    holds of the adapter.
    """

    attribute: str
    template: str
    to_file: Callable[[Tensor, Site], Tensor] = unchanged
    from_file: Callable[[Tensor, Site], Tensor] = unchanged
    misfit: Callable[[Tensor, Site, Mapping[str, Tensor]], str | None] | None = None

    def key(self, site: Site) -> str:
        return self.template.format(at=site.at, under=site.under)


# of a delta on a module that stores its matrix that way
Entries = Callable[[Delta, type[Base]], list[Entry]]


def named(**templates: str) -> Entries:
    """The entries of a delta that is stored in one way whatever it lies on."""
    return lambda delta, layer: [
        Entry(attribute, template) for attribute, template in templates.items()
    ]


@dataclass(frozen=True)
class Method:
    """One method's config. `marks` are the values that tell it from others of its `peft_type`;
    `irrelevant` are keys that do not bear on what a saved adapter computes; `derived` gives further
    keys from the sites. `outer`: a spec that lies `over` this one; `biases`: PEFT's config has a
    word on biases. `preset`: the method has this one place, so that its files name no target
    modules.
    """

    spec: type[Spec]
    peft_type: str
    fields: tuple[Field, ...]
    marks: Mapping[str, Any] = field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    derived: Callable[[Sequence[Site]], Mapping[str, Any]] = lambda sites: {}
    outer: type[Spec] | None = None
    biases: bool = True
    preset: str | None = None

    def holds(self, spec: Spec) -> bool:
        return (
            type(spec) is self.spec
            if self.outer is None
            else type(spec) is self.outer and type(self.inner(spec)) is self.spec
        )

    def inner(self, spec: Spec) -> Spec:
        return spec if self.outer is None else spec.over  # type: ignore[attr-defined]

    def config(self, spec: Spec, sites: Sequence[Site]) -> dict[str, Any]:
        mapped = {f.key: f.to_file(getattr(self.inner(spec), f.attribute)) for f in self.fields}
        return {"peft_type": self.peft_type, **mapped, **self.marks, **self.derived(sites)}

    def read(self, config: Mapping[str, Any]) -> tuple[Spec | None, list[str]]:
        """The spec, or None and all that is wrong with the fields."""
        values, problems = {}, []
        for f in self.fields:
            try:
                values[f.attribute] = f.read(config)
            except LorafoldError as e:
                problems.append(str(e))
        try:
            spec = None if problems else self.spec(**values)
            if spec is not None and self.outer is not None:
                spec = self.outer(spec)  # type: ignore[call-arg]
            return spec, problems
        except LorafoldError as e:
            return None, [str(e)]

    @property
    def known(self) -> frozenset[str]:
        return frozenset(f.key for f in self.fields) | self.irrelevant
