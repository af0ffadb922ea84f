"""Where the updates of two adapters meet, site by site and over all sites that both change: what
interference there can be.

    cosine            <dW_a, dW_b> / (|dW_a| |dW_b|)                       from the factors; below 0
                      they undo each other
    shared output     |U_a^T U_b|^2 / min(r_a, r_b)                        of what they write, U the
                      columns' orthonormal basis (QR)
    shared input      the same of what they read: the rows' basis          both 0 to 1; two at
                      random share max(r_a, r_b) / side
    sign conflict     share of the entries among the largest fifth of both whose signs differ; at
                      random 1/2

The subspace measure is phi of the LoRA paper (Hu et al. 2021, arXiv 2106.09685, sec. 7.2) at the
full rank; sign conflict is what TIES resolves (Yadav et al. 2023, arXiv 2306.01708, sec. 3). Over
all such sites the cosine is that of their updates as one, the others are means, each site weighing
by |dW_a| |dW_b|. No subspaces are given where an update is no product of factors. Adapters trained
from one seed begin with the same A, which moves little: they read the same subspace, and that is no
collision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from lorafold.composing.arithmetic import inner, trim
from lorafold.composing.updates import Change, Site, Updates, change_of, dense

if TYPE_CHECKING:
    from rich.console import Console

LARGEST = 0.2  # the share of entries whose signs are compared, TIES' own


@dataclass(frozen=True)
class Meeting:
    """How two updates lie to each other, at one site or over all; `norms` are |dW_a| and |dW_b|,
    `chance_*` what subspaces of their ranks share at random.
    """

    cosine: float
    shared_output: float | None
    shared_input: float | None
    chance_output: float | None
    chance_input: float | None
    sign_conflict: float
    norms: tuple[float, float]

    @property
    def weight(self) -> float:
        return self.norms[0] * self.norms[1]


@dataclass(frozen=True)
class Pair:
    """Two adapters, by name; None over all where no site is changed by both."""

    a: str
    b: str
    overall: Meeting | None
    sites: dict[str, Meeting]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """A line or two: the figures, and the sites where the updates oppose each other most."""
        if (all_ := self.overall) is None:
            return f"{self.a} and {self.b} change no site in common"
        text = (
            f"{self.a} and {self.b}: cosine {all_.cosine:+.3f}, signs differ in"
            f" {all_.sign_conflict:.1%} of the largest entries"
        )
        if all_.shared_output is not None:
            text += (
                f", shared output {all_.shared_output:.3f} (at random {all_.chance_output:.3f}), "
                f"input {all_.shared_input:.3f} ({all_.chance_input:.3f})"
            )
        worst = sorted(
            self.sites, key=lambda path: self.sites[path].cosine * self.sites[path].weight
        )[:3]
        opposed = [
            f"{path} ({self.sites[path].cosine:+.3f})"
            for path in worst
            if self.sites[path].cosine < 0
        ]
        return text + ("\n  most opposed at " + ", ".join(opposed) if opposed else "")


def meetings(updates: Updates, console: Console) -> list[Pair]:
    """Every two of the adapters. One site's dense updates exist at a time, for the signs."""
    found: dict[tuple[int, int], dict[str, Meeting]] = {
        pair: {} for pair in combinations(range(len(updates.names)), 2)
    }
    for site in track(
        updates.sites, "geometry", console=console, transient=True, disable=not console.is_terminal
    ):
        for pair, meeting in meet(site).items():
            found[pair][site.path] = meeting
    return [
        Pair(updates.names[i], updates.names[j], overall(list(sites.values())), sites)
        for (i, j), sites in found.items()
    ]


@torch.no_grad()
def meet(site: Site) -> dict[tuple[int, int], Meeting]:
    changes = {i: change_of(update) for i, update in site.there}
    norms = {i: inner(change, change) ** 0.5 for i, change in changes.items()}
    largest = {
        i: trim(dense(change), LARGEST, torch.default_generator).sign().to(torch.int8)
        for i, change in changes.items()
    }
    found = {}
    for i, j in combinations(changes, 2):
        a, b, norm = changes[i], changes[j], norms[i] * norms[j]
        both = largest[i] * largest[j]
        conflict = int((both < 0).sum()) / max(1, int((both != 0).sum()))
        found[i, j] = Meeting(
            inner(a, b) / norm if norm else 0.0, *subspaces(a, b), conflict, (norms[i], norms[j])
        )
    return found


def subspaces(
    a: Change, b: Change
) -> tuple[float | None, float | None, float | None, float | None]:
    """(shared output, shared input) of two products of factors, then the same of random ones:
    max(r_a, r_b) over the side.
    """
    if not (isinstance(a, tuple) and isinstance(b, tuple)):
        return None, None, None, None
    (up_a, down_a), (up_b, down_b) = a, b
    rank = max(len(down_a), len(down_b))
    return (
        overlap(up_a, up_b),
        overlap(down_a.t(), down_b.t()),
        min(1.0, rank / len(up_a)),
        min(1.0, rank / down_a.shape[1]),
    )


def overlap(a: Tensor, b: Tensor) -> float:  # (side, r_a), (side, r_b)
    qa, qb = (torch.linalg.qr(x.double()).Q for x in (a, b))
    return (qa.t() @ qb).square().sum().item() / min(qa.shape[1], qb.shape[1])


def overall(sites: Sequence[Meeting]) -> Meeting | None:
    if not sites:
        return None
    norms = (sum(m.norms[0] ** 2 for m in sites) ** 0.5, sum(m.norms[1] ** 2 for m in sites) ** 0.5)

    def mean(name: str) -> float | None:
        known = [(value, m.weight) for m in sites if (value := getattr(m, name)) is not None]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    cosine = sum(m.cosine * m.weight for m in sites) / ((norms[0] * norms[1]) or 1)
    return Meeting(
        cosine,
        mean("shared_output"),
        mean("shared_input"),
        mean("chance_output"),
        mean("chance_input"),
        mean("sign_conflict") or 0.0,
        norms,
    )
