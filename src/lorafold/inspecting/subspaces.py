"""Two adapters compared, or the blocks of one: how far they change the same directions.

    similarity    cos(dW_a, dW_b) = <dW_a, dW_b> / (|dW_a| |dW_b|), from singular vectors alone
    phi(i, j)     the overlap of subspaces (`subspaces`; Hu et al. 2021, arXiv 2106.09685, sec. 7)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafold.inspecting.residual_stream import ResidualStream
from lorafold.inspecting.spectra import phi
from lorafold.inspecting.updates import Svd, of_experts, site_of

SHOWN = 64  # the most directions of each adapter in a heat map
TOP = 4  # directions of each block, or expert, that are compared with those of the others


def kind_of(path: str) -> tuple[str, int | None]:
    """A module's name within its block, and the number of the block: self_attn.q_proj and 3 for
    model.layers.3.self_attn.q_proj. Outside of blocks: the whole path, and None. All experts of a
    block are of one kind.
    """
    path = site_of(path)
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (found[2], int(found[1])) if found else (path, None)


def by_kind(paths: Sequence[str]) -> dict[str, list[str]]:
    """The module paths of each kind (the name within the block), in the order of the blocks."""
    kinds = defaultdict(list)
    for path in paths:
        kinds[kind_of(path)[0]].append(path)
    return dict(kinds)


def compared(a: Mapping[str, Svd], b: Mapping[str, Svd]) -> dict[str, Any]:
    """Figures by their names in the JSON, for the matrices that both adapters change: the cosine
    and phi of each, phi of unrelated updates (`chance_*`), and the phi of each kind of module as a
    mean over its matrices, phi[i][j] for the first i + 1 and j + 1 directions.
    """
    shared = [path for path in a if path in b and len(a[path].s) and len(b[path].s)]
    sites, sums = {}, defaultdict[str, list[tuple[Tensor, Tensor]]](list)
    for path in shared:
        x, y = a[path], b[path]
        reads, writes = phi(x.v, y.v), phi(x.u, y.u)
        inner = torch.einsum("i,ij,ij,j->", x.s, x.u.t() @ y.u, x.v.t() @ y.v, y.s)
        sites[path] = {
            "cosine": float(inner / (x.s.norm() * y.s.norm())),
            "phi_read_first": float(reads[0, 0]),
            "phi_written_first": float(writes[0, 0]),
            "phi_read_all": float(reads[-1, -1]),
            "phi_written_all": float(writes[-1, -1]),
            "chance_read_all": max(reads.shape) / len(x.v),
            "chance_written_all": max(writes.shape) / len(x.u),
        }
        sums[kind_of(path)[0]].append((reads[:SHOWN, :SHOWN], writes[:SHOWN, :SHOWN]))
    kinds = {
        kind: {
            name: _mean([pair[side] for pair in pairs])
            for side, name in enumerate(("phi_read", "phi_written"))
        }
        for kind, pairs in sums.items()
    }
    return {
        "sites": sites,
        "kinds": kinds,
        "only_first": sorted(a.keys() - b.keys()),
        "only_second": sorted(b.keys() - a.keys()),
    }


def across_layers(svds: Mapping[str, Svd], stream: ResidualStream) -> dict[str, dict[str, Any]]:
    """phi of the top directions of every two blocks, by kind of module: near 1 where an adapter
    makes the same change at every depth. Only the side in the residual stream, which all blocks
    share, can be compared. Experts are left out, since those of one number in two blocks have
    nothing in common.
    """
    found = {}
    single = [path for path, svd in svds.items() if len(svd.s) and site_of(path) == path]
    for kind, paths in by_kind(single).items():
        for side, inside in (("read", stream.readers.keys()), ("written", stream.writers)):
            if len(paths) > 1 and inside >= set(paths):
                top = [
                    (svds[path].v if side == "read" else svds[path].u)[:, :TOP] for path in paths
                ]
                grid = [[round(float(phi(a, b)[-1, -1]), 4) for b in top] for a in top]
                found[kind] = {"side": side, "layers": paths, "phi": grid}
    return found


def across_experts(svds: Mapping[str, Svd], stream: ResidualStream) -> dict[str, dict[str, Any]]:
    """phi of the top directions of every two experts, by site: its mean, lowest and highest value,
    near 1 where the experts of a block make the same change. Only the side in the residual stream
    is compared, which they share.
    """
    found = {}
    changed = {name: svd for name, svd in svds.items() if len(svd.s)}
    for site, own in of_experts(changed).items():
        for side, inside in (("read", stream.readers.keys()), ("written", stream.writers)):
            if len(own) > 1 and site in inside:
                phis = _pairs([(svd.v if side == "read" else svd.u)[:, :TOP] for svd in own])
                found[site] = {
                    "side": side,
                    "experts": len(own),
                    "phi": float(phis.mean()),
                    "phi_lowest": float(phis.min()),
                    "phi_highest": float(phis.max()),
                }
    return found


def _pairs(top: Sequence[Tensor]) -> Tensor:
    """phi of all directions of every two of these (n, k), each pair once."""
    ranks = torch.tensor([directions.shape[1] for directions in top])
    owner = torch.arange(len(top)).repeat_interleave(ranks)
    together = torch.cat(list(top), 1)
    overlap = (together.t() @ together).double().square()
    sums = overlap.new_zeros(len(top), len(overlap)).index_add(0, owner, overlap)
    shared = overlap.new_zeros(len(top), len(top)).index_add(1, owner, sums)
    i, j = torch.triu_indices(len(top), len(top), 1)
    return shared[i, j] / torch.minimum(ranks[i], ranks[j])


def _mean(grids: Sequence[Tensor]) -> list[list[float]]:
    """The mean of the grids, each cut to the shape that all have."""
    i, j = (min(g.shape[side] for g in grids) for side in (0, 1))
    mean = torch.stack([g[:i, :j] for g in grids]).mean(0)
    return [[round(x, 4) for x in line] for line in mean.tolist()]
