"""The deltas that an adapter can have in addition to those of its method: trained biases, and the
embedding rows of tokens.

They are added to a dictionary from module path to a list of deltas, the lowest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import adapted_modules
from lorafold.core.delta import Delta
from lorafold.core.layer import bare
from lorafold.core.matrices import module_at
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError, as_one
from lorafold.methods.parts.bias import BiasDelta
from lorafold.methods.parts.trainable_tokens import TokenRows, TrainableTokens, carried

Bias = Literal["none", "lora_only", "all"]


def add_biases(
    model: nn.Module, matches: Matches, bias: Bias, deltas: dict[str, list[Delta]]
) -> None:
    """Add a delta for every bias that is to be trained, but those of experts and their routers."""
    left_out = Anatomy.of(model).routers
    every = (path for path, _ in Anatomy.of(model).modules if path not in left_out)
    for path in {"lora_only": matches.paths, "all": every}[bias]:
        own = module_at(model, path)._parameters.get("bias")
        if own is not None:
            deltas.setdefault(path, []).append(BiasDelta(len(own), own.device))


def add_token_rows(
    model: nn.Module, spec: Spec, tokens: TrainableTokens, active: Sequence[str],
    deltas: dict[str, list[Delta]],
) -> None:  # fmt: skip
    """Add the deltas that train the embedding rows of tokens."""
    rows = tokens.deltas(model, active) if tokens.ids else {}
    if rows and spec.trains_base:
        raise LorafoldError(
            f"tokens: {type(spec).__name__} trains the base's own weights, so it can't have token"
            " rows too; leave out the tokens"
        )
    carry = {id(m) for _, m in adapted_modules(model) if any(carried(m))}
    others = [path for path in deltas if path not in rows] if carry else []
    over = [path for path in others if id(module_at(model, path)) in carry]
    problems = [
        f"{path} has token rows of another adapter, which change its shape; merge that one first"
        for path in over
    ]
    for path, delta in rows.items():
        if any(not isinstance(other, BiasDelta) for other in deltas.get(path, ())):
            problems.append(
                f"tokens: {path} is a target or a module to save as well; train either its token"
                " rows or all of it"
            )
        deltas.setdefault(path, []).append(delta)
    if problems:
        raise LorafoldError(as_one(problems))


def vocabulary(model: nn.Module, parts: Iterable[tuple[str, Delta]]) -> int | None:
    """The size of the vocabulary with the new tokens of an adapter, whose parts these are by module
    path; None if it has none.
    """
    ids = {path: part.ids for path, part in parts if isinstance(part, TokenRows)}
    ends: dict[str, Any] = {path: bare(module_at(model, path)) for path in ids}
    sizes = {path: max(own) + 1 for path, own in ids.items()}
    return max((n for path, n in sizes.items() if n > len(ends[path].weight)), default=None)
