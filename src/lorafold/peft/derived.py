"""The row of a method that has none written out: what its files hold follows from its own code.

    peft_type    LORAFOLD_<NAME>, the method's first name in `lorafold.methods.METHODS`; no method
                 of PEFT's has such a name
    keys         the fields of the spec, under their names, with their types and defaults
    tensors      {at}.<delta>_<tensor> for everything in the delta's state dict but its `run_names`:
                 the tensor `scale` of a `ScaledDelta` is `{at}.scaled_scale`

So a new method needs no row here. It needs one where PEFT has the method too, where a file has
other names than the code, or where the file and not the spec decides on the size of a tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import MISSING, fields
from dataclasses import Field as OfSpec
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS
from lorafold.peft.format import Entry, Field, Method, Site

PREFIX = "LORAFOLD_"


def method(spec: type[Spec], peft_type: str) -> Method:
    """The row of a spec's class, from its fields."""
    own = [field for field in fields(spec) if field.init]  # type: ignore[arg-type]
    return Method(spec, peft_type, tuple(_field(spec, field) for field in own))


def methods(known: Collection[type[Spec]]) -> list[Method]:
    """The rows of the registered methods that are not `known`. Those that train the base have none:
    they are saved as models.

    LorafoldError where two of them would have one name in files.
    """
    names: dict[type[Spec], str] = {}
    for name, make in METHODS.items():
        spec = make()
        if type(spec) not in known and not spec.trains_base:
            names.setdefault(type(spec), name)
    rows: dict[str, tuple[str, Method]] = {}
    for cls, name in names.items():
        peft_type = PREFIX + re.sub(r"[^A-Z0-9]+", "_", name.upper())
        if peft_type in rows:
            raise LorafoldError(
                f"the methods {rows[peft_type][0]!r} and {name!r} would both be called {peft_type}"
                " in files; rename one of them"
            )
        rows[peft_type] = name, method(cls, peft_type)
    return [row for _, row in rows.values()]


def entries(site: Site) -> list[Entry]:
    """The tensors of a delta that has no row."""
    delta = site.delta
    prefix = type(delta).__name__.lower().removesuffix("delta")
    names = [name for name in delta.state_dict() if name not in delta.run_names]
    return [Entry(name, f"{{at}}.{prefix}_{name}") for name in names]


def _field(spec: type[Spec], field: OfSpec[Any]) -> Field:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    default = None if made is MISSING else made

    def from_file(value: Any) -> Any:
        if value is default and made is not MISSING:
            return default
        # as JSON, which has lists where the field may have a tuple
        kind = TypeAdapter(get_type_hints(spec)[field.name])
        return kind.validate_json(json.dumps(value), strict=True)

    def to_file(value: Any) -> Any:
        try:
            written = TypeAdapter(Any).dump_python(value, mode="json")
            if from_file(json.loads(json.dumps(written, allow_nan=False))) == value:
                return written
        except (PydanticUserError, ValueError, TypeError, NameError):
            pass
        raise LorafoldError(
            f"{spec.__name__}: {field.name}={value!r} would not come back from a file; expected a"
            f" value of the type {field.type} that JSON can hold"
        )

    return Field(field.name, field.name, Any, default, to_file, from_file)
