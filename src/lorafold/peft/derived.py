"""File formats of methods without a row in the table, derived from the code of the method.

    peft_type    LORAFOLD_<NAME>, the method's first name in `lorafold.methods.METHODS`
    keys         the fields of the spec, under their names, with their types and defaults
    tensors      {at}.<delta>_<tensor> for all of the delta's state dict except its `run_names`; for
                 example, the tensor `scale` of a `ScaledDelta` is `{at}.scaled_scale`

A new method needs a row only if PEFT has it too, if its file uses other names than the code, or if
the size of a tensor depends on the file and not on the spec. METHODS_WITHOUT_PREFIX and TENSORS
contain methods whose names in files are older than this rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import MISSING, fields
from dataclasses import Field as OfSpec
from math import prod
from typing import Any, get_type_hints

import torch
from pydantic import PydanticUserError, TypeAdapter
from torch import Tensor

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.methods import METHODS
from lorafold.methods.bitfit import BitFit
from lorafold.methods.bottleneck import Bottleneck, BottleneckDelta
from lorafold.methods.fastfood import Fastfood, FastfoodDelta, Subspace
from lorafold.methods.linear_probe import LinearProbe
from lorafold.methods.mixture import GATES, Mixture, MixtureDelta, RoutedDelta
from lorafold.methods.sparse import LTSFT, FishMask, SparseDelta
from lorafold.peft.table_types import (
    Check,
    Field,
    FileTensor,
    Method,
    TargetModule,
    Tensors,
    fixed,
    named,
)

PREFIX = "LORAFOLD_"


def derived_method(spec: type[Spec], peft_type: str) -> Method:
    own = (_field(spec, field) for field in fields(spec) if field.init)  # type: ignore[arg-type]
    return Method(spec, peft_type, tuple(own))


def derived_methods(known: Collection[type[Spec]]) -> list[Method]:
    """The rows of the registered methods that are not `known`. Methods that train the base have no
    row, because they are saved as models.
    """
    rows: dict[str, tuple[str, Method]] = {}
    seen = {*known}
    for name in METHODS:
        cls = METHODS.spec(name)
        if cls in seen or cls.trains_base:
            continue
        seen.add(cls)
        peft_type = PREFIX + re.sub(r"[^A-Z0-9]+", "_", name.upper())
        if peft_type in rows:
            raise LorafoldError(
                f"the methods {rows[peft_type][0]!r} and {name!r} would both have the peft_type"
                f" {peft_type}; rename one of them"
            )
        rows[peft_type] = name, derived_method(cls, peft_type)
    return [row for _, row in rows.values()]


def derived_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for a delta that has no row in TENSORS."""
    delta = site.delta
    prefix = type(delta).__name__.lower().removesuffix("delta")
    names = [name for name in delta.state_dict() if name not in delta.run_names]
    return [FileTensor(name, f"{{at}}.{prefix}_{name}") for name in names]


def _field(spec: type[Spec], field: OfSpec[Any]) -> Field:
    made = field.default if field.default_factory is MISSING else field.default_factory()
    default = None if made is MISSING else made

    def from_file(value: Any) -> Any:
        if value is default and made is not MISSING:
            return default
        # validated as JSON, in which tuples are lists
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
            f"{spec.__name__}: {field.name}={value!r} can't be saved as JSON and loaded again;"
            f" expected a value of type {field.type} that JSON supports"
        )

    return Field(field.name, field.name, Any, default, to_file, from_file)


def positions_problem(at: Tensor, site: TargetModule, file: Tensors) -> str | None:
    """An error message for a sparse delta's positions (k,) in a row-major weight, or None. The file
    determines k.
    """
    shape: Any = site.delta.shape
    ascending = at.dim() == 1 and at.dtype == torch.int64 and bool((at[1:] > at[:-1]).all())
    if ascending and (not len(at) or (at[0] >= 0 and at[-1] < prod(shape))):
        return None
    return f"expected ascending int64 positions in a weight of {' x '.join(map(str, shape))}"


def values_problem(values: Tensor, site: TargetModule, file: Tensors) -> str | None:
    """An error message for a sparse delta's values (k,), or None."""
    at = file.get(f"{site.at}.sparse_at")
    if values.is_floating_point() and at is not None and values.shape == at.shape:
        return None
    return f"shape {list(values.shape)}, expected one value for each position in sparse_at"


def fastfood_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for a Fastfood delta: the scale and, at the first module, the shared
    vector.
    """
    own = isinstance(site.delta.subspace, Subspace)
    vector = [FileTensor("subspace.vector", "{at}.fastfood_vector")] * own
    return [FileTensor("scale", "{at}.fastfood_scale"), *vector]


def owner_problem(owner: Tensor, site: TargetModule, file: Tensors) -> str | None:
    """An error message for the adapter numbers (R,) of a mixture's columns, or None. The file
    determines R.
    """
    n: Any = site.delta.n
    if owner.dim() == 1 and owner.dtype == torch.int64 and bool(((owner >= 0) & (owner < n)).all()):
        return None
    return f"expected int64 adapter indices of at least 0 and below {n}"


def factor_problem(dim: int) -> Check:
    """The check of a mixture's factors, up (*matrices, out, R) or down (*matrices, R, in), in which
    dimension `dim` is R.
    """

    def problem(factor: Tensor, site: TargetModule, file: Tensors) -> str | None:
        owner = file.get(f"{site.at}.mixture_owner")
        delta: Any = site.delta
        expected = list((delta.up if dim == -1 else delta.down).shape)
        expected[dim] = -1 if owner is None else owner.numel()
        if factor.is_floating_point() and list(factor.shape) == expected:
            return None
        del expected[dim]
        return (
            f"shape {list(factor.shape)}, expected a factor of size"
            f" {' and '.join(map(str, expected))} in dimension"
            f" {' and '.join(str(i) for i in range(factor.dim()) if i != dim % factor.dim())} and"
            " the number of owners in the other"
        )

    return problem


# the frozen factors of a mixture, and the adapter number of each column
MIXTURE_TENSORS = (
    FileTensor("up", "{at}.mixture_up", check=factor_problem(-1)),
    FileTensor("down", "{at}.mixture_down", check=factor_problem(-2)),
    FileTensor("owner", "{at}.mixture_owner", check=owner_problem),
)


def mixture_tensors(site: TargetModule) -> list[FileTensor]:
    """The file's entries for a mixture. Gates that several deltas share are in the file once."""
    delta = site.delta
    key = GATES if delta.gates.shared else "{at}.mixture_gates"  # type: ignore[union-attr]
    return [*MIXTURE_TENSORS, *[FileTensor("gates.values", key)] * ("gates" in delta._modules)]


METHODS_WITHOUT_PREFIX = (
    derived_method(Bottleneck, "BOTTLENECK"),
    derived_method(LTSFT, "LT_SFT"),
    derived_method(FishMask, "FISH_MASK"),
    derived_method(Fastfood, "FASTFOOD"),
    derived_method(Mixture, "MIXTURE"),
    derived_method(BitFit, "BITFIT"),
    derived_method(LinearProbe, "LINEAR_PROBE"),
)

TENSORS = {
    BottleneckDelta: named(
        down="{at}.bottleneck_down.weight", down_bias="{at}.bottleneck_down.bias",
        up="{at}.bottleneck_up.weight", up_bias="{at}.bottleneck_up.bias",
    ),
    SparseDelta: fixed(
        FileTensor("at", "{at}.sparse_at", check=positions_problem),
        FileTensor("values", "{at}.sparse_values", check=values_problem),
    ),
    FastfoodDelta: fastfood_tensors,
    MixtureDelta: mixture_tensors,
    RoutedDelta: fixed(*MIXTURE_TENSORS, FileTensor("router", "{at}.mixture_router")),
}  # fmt: skip
