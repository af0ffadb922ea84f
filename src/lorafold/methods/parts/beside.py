"""What an adapter trains beside its method: the biases of modules, and the rows of tokens.

Both are added to what is laid already, a list of deltas by module path, the lowest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lorafold.core.anatomy import bare_modules
from lorafold.core.delta import Delta
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError
from lorafold.methods.parts.bias import BiasDelta
from lorafold.methods.parts.token_rows import Tokens, carried

Bias = Literal["none", "lora_only", "all"]


def add_biases(
    model: nn.Module, matches: Matches, bias: Bias, laid: dict[str, list[Delta]]
) -> None:
    """An offset for every bias of the adapted modules ("lora_only") or of all modules ("all")."""
    every = [path for path, _ in bare_modules(model)]
    for path in {"none": (), "lora_only": matches.paths, "all": every}[bias]:
        own = model.get_submodule(path)._parameters.get("bias")
        if own is not None:
            laid.setdefault(path, []).append(BiasDelta(len(own), own.device))


def add_rows(
    model: nn.Module, spec: Spec, tokens: Tokens, live: Sequence[str], laid: dict[str, list[Delta]]
) -> None:
    """Add the token rows to what is laid already.

    LorafoldError where another change of the same module is in the way.
    """
    rows = tokens.deltas(model, live)
    if rows and spec.trains_base:
        raise LorafoldError(
            f"tokens: {type(spec).__name__} trains the base's own weights, and rows of its own"
            " would lie over them"
        )
    over = [path for path in laid if path not in rows and any(carried(model.get_submodule(path)))]
    problems = [
        f"{path} carries token rows of another adapter, so it has no shape of its own; merge that"
        " one first"
        for path in over
    ]
    for path, delta in rows.items():
        if any(not isinstance(other, BiasDelta) for other in laid.get(path, ())):
            problems.append(
                f"tokens: {path} is a target or a module to save as well; train its rows or the"
                " whole of it"
            )
        laid.setdefault(path, []).append(delta)
    if problems:
        raise LorafoldError("; ".join(problems))
