"""Validation of a method's options, and initialization of factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.errors import LorafoldError


def check(
    spec: object,
    *wrong: str,
    whole: Sequence[str] = (),
    below_one: Sequence[str] = (),
    one_of: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raises one LorafoldError that lists all invalid options of a spec. `whole` names options that
    must be integers above 0 (or mappings to them), `below_one` names probabilities, and `one_of`
    maps names to choices; `wrong` are messages about other options.
    """
    lines = []
    for name in whole:
        value = getattr(spec, name)
        for n in value.values() if isinstance(value, Mapping) else (value,):
            if not isinstance(n, int) or n < 1:
                lines.append(f"{name}: found {n!r}, expected a positive integer")
    for name in below_one:
        if not 0 <= (value := getattr(spec, name)) < 1:
            lines.append(f"{name}: found {value!r}, expected at least 0 and below 1")
    for name, choices in (one_of or {}).items():
        if (value := getattr(spec, name)) not in choices:
            lines.append(f"{name}: found {value!r}, expected {' or '.join(choices)}")
    if lines := [*lines, *wrong]:
        raise LorafoldError(f"{type(spec).__name__}: {'; '.join(lines)}")


def zeros(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    """A parameter of zeros (any shape), fp32."""
    return nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))


def set_alpha(spec: Any, default: float) -> None:
    """Converts the alpha of a frozen spec to a float; None becomes the default."""
    object.__setattr__(spec, "alpha", float(default if spec.alpha is None else spec.alpha))


def kaiming(factor: Tensor) -> None:
    """Fills a factor (*matrices, k, in) with kaiming-uniform values between -1 / sqrt(in) and 1 /
    sqrt(in), matrix by matrix, as PEFT does.
    """
    for matrix in factor.detach().view(-1, *factor.shape[-2:]):
        nn.init.kaiming_uniform_(matrix, a=5**0.5)
