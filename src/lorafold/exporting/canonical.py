"""Plain LoRA in PEFT's format: one rank, scale 1, no patterns, every factor as it acts.

    B (out, r) has every scale in it, alpha = r; smaller ranks are filled with zeros

What engines that serve PEFT's adapters read without exceptions; PiSSA and OLoRA, whose own files
are for a base that was changed, become the change itself, of twice the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F

from lorafold.adapter import attach
from lorafold.core.targets import Matches
from lorafold.exporting.update import Factors
from lorafold.files.record import TRAINED_ON
from lorafold.inspecting.resize import as_lora
from lorafold.methods.lora import LoRA
from lorafold.opening import Base
from lorafold.peft.config import CONFIG, WEIGHTS
from lorafold.peft.saved import Saved

NAME = "canonical"


def of_one_rank(factors: Mapping[str, Factors], rank: int) -> dict[str, Factors]:
    """The same products, every one of this rank."""
    return {
        path: (F.pad(up, (0, rank - up.shape[-1])), F.pad(down, (0, 0, 0, rank - down.shape[-2])))
        for path, (up, down) in factors.items()
    }


def write_canonical(
    base: Base, factors: Mapping[str, Factors], out: Path, overwrite: bool = False
) -> Saved:
    """Write the directory of an adapter over the bare base, and open it.

    Args:
        base: the model that it is for; its weights stay in their files.
        factors: of each site, by module path.
        out: the directory.
    """
    rank = max(down.shape[-2] for _, down in factors.values())
    model = base.mapped().model
    matches = Matches({path: (path,) for path in factors})
    adapter = attach(model, LoRA(rank=rank, alpha=rank, dropout=0.0), matches, NAME)
    adapter = as_lora(adapter, of_one_rank(factors, rank))
    adapter.save(out, overwrite=overwrite, record={"exported": {"rank": rank}, TRAINED_ON: None})
    return Saved.open(out)


FILES = (WEIGHTS, CONFIG)
