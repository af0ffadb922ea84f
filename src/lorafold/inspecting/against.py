"""Two adapters side by side, or the layers of one: do they move the same directions
(`subspaces.phi`)?

    similarity    cos(dW_a, dW_b) = <dW_a, dW_b> / (|dW_a| |dW_b|), from the factors alone
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafold.inspecting.residual import Stream
from lorafold.inspecting.subspaces import phi
from lorafold.inspecting.updates import Svd

SHOWN = 64  # directions of each adapter in a heat map at most
TOP = 4  # directions that stand for a layer


def kind_of(path: str) -> tuple[str, int | None]:
    """A module's name within its block, and the block's number: self_attn.q_proj and 3 of
    model.layers.3.self_attn.q_proj.
    """
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (found[2], int(found[1])) if found else (path, None)


def by_kind(paths: Sequence[str]) -> dict[str, list[str]]:
    """The modules of each kind, in the order of their blocks."""
    kinds = defaultdict(list)
    for path in paths:
        kinds[kind_of(path)[0]].append(path)
    return dict(kinds)


def compared(a: Mapping[str, Svd], b: Mapping[str, Svd]) -> dict[str, Any]:
    """What two adapters have in common, where both changed something: per site, and phi averaged
    over the sites of a kind (i down, j across; as many as all of the kind have), with what
    unrelated updates would have.
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


def across_layers(svds: Mapping[str, Svd], stream: Stream) -> dict[str, dict[str, Any]]:
    """phi of the top directions of each two blocks, by kind of module: does an adapter do the same
    at every depth? On the side that is in the residual stream, which all blocks share.
    """
    found = {}
    for kind, paths in by_kind([path for path, svd in svds.items() if len(svd.s)]).items():
        for side, inside in (("read", stream.readers.keys()), ("written", stream.writers)):
            if len(paths) > 1 and inside >= set(paths):
                top = [
                    (svds[path].v if side == "read" else svds[path].u)[:, :TOP] for path in paths
                ]
                grid = [[round(float(phi(a, b)[-1, -1]), 4) for b in top] for a in top]
                found[kind] = {"side": side, "layers": paths, "phi": grid}
    return found


def _mean(grids: Sequence[Tensor]) -> list[list[float]]:
    i, j = (min(g.shape[side] for g in grids) for side in (0, 1))
    return [
        [round(x, 4) for x in row]
        for row in torch.stack([g[:i, :j] for g in grids]).mean(0).tolist()
    ]
