"""The factors of all experts as PEFT has them, in one matrix each.

    A (E, r, in)     lora_A (E r, in)       or, turned, lora_B (in, r E)
    B (E, out, r)    lora_B (out, r E)      or, turned, lora_A (E r, out)

Turned are those of matrices whose inputs PEFT takes for their outputs (`parameters.turned`).
"""

from __future__ import annotations

from torch import Tensor

from lorafold.peft.format import Site


def flat_a(a: Tensor, site: Site) -> Tensor:
    """A (E r, in) of all experts as PEFT has it, from A (E, r, in), or where it is turned PEFT's B
    (in, r E); any other A as it is.
    """
    if site.wrappers is None:
        return a
    return _beside(a.mT) if site.turned else a.flatten(0, 1)


def flat_b(b: Tensor, site: Site) -> Tensor:
    """B (out, r E) of all experts as PEFT has it, from B (E, out, r), or where it is turned PEFT's
    A (E r, out); any other B as it is.
    """
    if site.wrappers is None:
        return b
    return b.mT.flatten(0, 1) if site.turned else _beside(b)


def stacked_a(a: Tensor, site: Site) -> Tensor:
    """The reverse of `flat_a`: A (E, r, in)."""
    if site.wrappers is None:
        return a
    shape = site.delta.A.shape
    return _apart(a, shape[0]).mT.contiguous() if site.turned else a.view(shape)  # type: ignore


def stacked_b(b: Tensor, site: Site) -> Tensor:
    """The reverse of `flat_b`: B (E, out, r)."""
    if site.wrappers is None:
        return b
    experts = len(site.delta.B)  # type: ignore[arg-type]
    if site.turned:
        return b.unflatten(0, (experts, -1)).mT.contiguous()
    return _apart(b, experts).contiguous()


def _beside(b: Tensor) -> Tensor:
    """(k, r E) from factors (E, k, r)."""
    return b.permute(1, 2, 0).flatten(1)


def _apart(b: Tensor, experts: int) -> Tensor:
    """The reverse of `_beside`."""
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)
