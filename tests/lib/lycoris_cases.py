"""LyCORIS' own modules beside ours, with the same numbers."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import lorafold as lf
from lorafold.core.spec import Spec


def lycoris(
    kind: str, module: nn.Module, rank: int, alpha: float, factor: int
) -> tuple[Spec, nn.Module]:
    """loha, lokr or lokr-both: our spec, and LyCORIS' module over the same layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule
    theirs: dict[str, Any] = {"lora_dim": rank, "alpha": alpha}
    if kind == "loha":
        return lf.LoHa(rank=rank, alpha=alpha), LohaModule("m", module, 1.0, **theirs)
    both = {"decompose_both": kind == "lokr-both"}
    spec = lf.LoKr(rank=rank, alpha=alpha, decompose_factor=factor, **both)
    return spec, LokrModule("m", module, 1.0, factor=factor, **both, **theirs)


@torch.no_grad()
def their_change(theirs: Any, delta: nn.Module, shape: torch.Size) -> Tensor:
    """The change of a weight of this shape that LyCORIS computes, once both have random numbers."""
    own = dict(delta.named_parameters())
    for name, p in theirs.named_parameters():
        p.copy_(torch.randn_like(p))
        mine = own.pop(re.sub("^(hada|lokr)_", "", name))
        mine.copy_(p.view(mine.shape))
    assert not own
    found = theirs.get_weight(shape)
    return found[0] if isinstance(found, tuple) else found
