"""Overlap of the directions that two adapters, blocks or experts change, as cosine and phi (defined
in `spectra`; Hu et al. 2021, arXiv 2106.09685, sec. 7).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorafold.core.anatomy import grouped
from lorafold.inspecting.residual_stream import ResidualStream
from lorafold.inspecting.result import (
    AdapterOverlap,
    ExpertOverlap,
    Grid,
    KindOverlap,
    LayerOverlap,
    UpdateOverlap,
)
from lorafold.inspecting.spectra import phi
from lorafold.inspecting.updates import Svds, group_experts, module_path

NUM_SHOWN = 64  # directions of each adapter in a heat map, at most
NUM_TOP = 4  # directions of each block or expert that are compared


def kind_and_block(path: str) -> tuple[str, int | None]:
    """A module's path within its block and the block's number; outside of blocks, (path, None)."""
    path = module_path(path)
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (match[2], int(match[1])) if match else (path, None)


def by_kind(paths: Iterable[str]) -> dict[str, list[str]]:
    return grouped((kind_and_block(path)[0], path) for path in paths)


def compare_updates(name: str, a: Svds, b: Svds) -> AdapterOverlap:
    sites, phis = {}, defaultdict(list)
    for path, x in a.items():
        if path not in b or not (len(x.s) and len((y := b[path]).s)):
            continue
        reads, writes = phi(x.v, y.v), phi(x.u, y.u)
        inner = torch.einsum("i,ij,ij,j->", x.s, x.u.t() @ y.u, x.v.t() @ y.v, y.s)
        sites[path] = UpdateOverlap(
            float(inner / (x.s.norm() * y.s.norm())),
            float(reads[0, 0]),
            float(writes[0, 0]),
            float(reads[-1, -1]),
            float(writes[-1, -1]),
            max(reads.shape) / len(x.v),
            max(writes.shape) / len(x.u),
        )
        grids = tuple(grid[:NUM_SHOWN, :NUM_SHOWN] for grid in (reads, writes))
        phis[kind_and_block(path)[0]].append(grids)
    kinds = {
        kind: KindOverlap(*map(_mean, zip(*pairs, strict=True))) for kind, pairs in phis.items()
    }
    only = (sorted(one.keys() - other.keys()) for one, other in ((a, b), (b, a)))
    return AdapterOverlap(name, sites, kinds, *only)


# side: (field of `ResidualStream` with its modules, singular vectors of the update)
SIDES = {"read": ("readers", "v"), "written": ("writers", "u")}


def across_layers(svds: Svds, stream: ResidualStream) -> dict[str, LayerOverlap]:
    overlaps = {}
    single = [path for path, svd in svds.items() if len(svd.s) and module_path(path) == path]
    for kind, paths in by_kind(single).items():
        for side, (modules, vectors) in SIDES.items():
            if len(paths) > 1 and {*paths} <= {*getattr(stream, modules)}:
                top = [getattr(svds[path], vectors)[:, :NUM_TOP] for path in paths]
                grid = [[round(float(phi(a, b)[-1, -1]), 4) for b in top] for a in top]
                overlaps[kind] = LayerOverlap(side, paths, grid)
    return overlaps


def across_experts(svds: Svds, stream: ResidualStream) -> dict[str, ExpertOverlap]:
    """The mean, smallest and largest phi over all pairs of experts of a module, near 1 if experts
    change the same directions.
    """
    overlaps = {}
    changed = {name: svd for name, svd in svds.items() if len(svd.s)}
    for site, experts in group_experts(changed).items():
        for side, (modules, vectors) in SIDES.items():
            if len(experts) > 1 and site in getattr(stream, modules):
                phis = _pairs([getattr(svd, vectors)[:, :NUM_TOP] for svd in experts])
                low, high = (float(phi) for phi in phis.aminmax())
                overlaps[site] = ExpertOverlap(side, len(experts), float(phis.mean()), low, high)
    return overlaps


def _pairs(top: Sequence[Tensor]) -> Tensor:
    """phi of each pair of subspaces, given as orthonormal columns (n, k)."""
    ranks = torch.tensor([directions.shape[1] for directions in top])
    owner = torch.arange(len(top)).repeat_interleave(ranks)
    columns = torch.cat(list(top), 1)
    overlap = (columns.t() @ columns).double().square()
    sums = overlap.new_zeros(len(top), len(overlap)).index_add(0, owner, overlap)
    shared = overlap.new_zeros(len(top), len(top)).index_add(1, owner, sums)
    i, j = torch.triu_indices(len(top), len(top), 1)
    return shared[i, j] / torch.minimum(ranks[i], ranks[j])


def _mean(grids: Sequence[Tensor]) -> Grid:
    i, j = (min(g.shape[side] for g in grids) for side in (0, 1))
    mean = torch.stack([g[:i, :j] for g in grids]).mean(0)
    return [[round(x, 4) for x in line] for line in mean.tolist()]
