"""The best LoRA of a rank for adapters of any method, what it costs, and which rank is enough.

    share(r) = KL(adapted, cut to rank r) / KL(adapted, base)      over the proof's prompts, in fp32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafold.adapter import attach
from lorafold.core.attach import only, selection_of
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError, as_one
from lorafold.exporting.answers import Ours, last
from lorafold.exporting.plain_lora import of_one_rank, write_canonical
from lorafold.exporting.proof import divergences
from lorafold.exporting.target import Progress, Subject
from lorafold.exporting.update import update_of
from lorafold.files.page import Shown
from lorafold.inspecting.resize import as_lora
from lorafold.methods.lora import LoRA

ENOUGH = 0.01  # of what the adapters change
LARGEST = 128  # the largest rank that is tried
NAME = "cut"


@dataclass(frozen=True)
class Cut(Shown):
    """A cut to a rank: `error` is relative to the norm of the updates, `sites` has that of each
    matrix. `kl` in nats and `share` are None where nothing was proved; `enough` is the smallest
    power of two whose share is below 1%, None where no rank up to 128 is.
    """

    rank: int
    error: float
    sites: Mapping[str, float]
    kl: float | None
    share: float | None
    enough: int | None

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"cut to rank {self.rank}: {self.error:.2%} of the update's norm is lost"
        if self.share is None:
            return line
        least = f"rank {self.enough}" if self.enough else f"no rank up to {LARGEST}"
        return (
            f"{line}, KL {self.kl:.1e} nats, {self.share:.2%} of what the adapters change;"
            f" {least} stays below {ENOUGH:.0%}"
        )


def cut_to(subject: Subject, rank: int, scratch: Path, ours: Ours | None) -> tuple[Subject, Cut]:
    """The subject with one plain LoRA of this rank in place of its adapters.

    Raises LorafoldError for what no rank has: biases, vectors, rows of tokens.

    Args:
        scratch: a directory that does not exist, for its files.
        ours: what the adapters compute, for what the cut costs; None measures none.
    """
    update = update_of(subject.model, subject.names, rank)
    if update.beside:
        lines = [f"{path}: {what}, which no LoRA has" for path, what in update.beside.items()]
        raise LorafoldError(f"--as-lora {rank}: {as_one(lines)}")
    if not update.rank:
        raise LorafoldError(f"--as-lora {rank}: found no adapter that changes anything")
    saved = write_canonical(subject.base, update.factors, scratch)
    sites = {name: (lost / whole) ** 0.5 for name, (lost, whole) in update.lost.items() if whole}
    kl = share = enough = None
    if ours is not None:
        kls, distance = kl_by_rank(ours, subject, sorted({rank, *_powers()}))
        kl, enough = kls[rank], _enough(kls, distance)
        share = kl / distance if distance else None
    cut = Cut(rank, update.error, sites, kl, share, enough)
    return replace(subject, adapters=(saved,), given=subject.adapters), cut


def rank_enough(subject: Subject, source: str | Path | None, progress: Progress) -> str:
    """What to advise where adapters can't be said exactly: the end of a refusal."""
    kls, distance = kl_by_rank(Ours.of(subject, source, progress), subject, _powers())
    found = _enough(kls, distance)
    if found is None:
        return f"; no LoRA of rank up to {LARGEST} keeps {1 - ENOUGH:.0%} of what they change"
    lost = kls[found] / distance
    return f"; --as-lora {found} writes the best LoRA, which loses {lost:.2%} of what they change"


@torch.no_grad()
def kl_by_rank(
    ours: Ours, subject: Subject, ranks: list[int]
) -> tuple[dict[int, float], float]:
    """KL(adapted, cut) in nats by rank, and KL(adapted, base).

    Args:
        ours: with the adapters on its model.
        ranks: to try, in any order.
    """
    largest = max(ranks)
    update = update_of(ours.model, selection_of(ours.model).names, largest)
    factors = of_one_rank(update.factors, largest)
    found: dict[int, float] = {}
    with only(ours.model):
        matches = Matches({path: (path,) for path in factors})
        adapter = attach(ours.model, LoRA(rank=largest, alpha=largest, dropout=0.0), matches, NAME)
        adapter = as_lora(adapter, factors)
        for rank in sorted(ranks, reverse=True):
            for name, factor in adapter.named_parameters():
                if name.endswith(".B"):
                    factor[..., rank:] = 0
            with only(ours.model, NAME):
                cut = torch.stack([last(ours.model, ids) for ids in ours.prompts.ids])
            found[rank] = float(divergences(ours.answers.adapted, cut).mean())
        adapter.detach()
    return found, float(divergences(ours.answers.adapted, ours.answers.base).mean())


def _powers() -> list[int]:
    return [2**n for n in range(LARGEST.bit_length())]


def _enough(kls: Mapping[int, float], distance: float) -> int | None:
    small = [rank for rank in _powers() if rank in kls and kls[rank] < ENOUGH * distance]
    return min(small, default=None)
