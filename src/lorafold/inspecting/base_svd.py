"""Where in the base's spectrum an update lies, and what it puts there that is new.

Needs the SVD of every W0, which is kept on disk.

    W0 = sum_j s0_j u0_j v0_j^T
    position      p_j = sum_i s_i^2 (u_i . u0_j)^2 / sum_i s_i^2, and likewise with v: the update's
                  energy over W0's directions
    intruders     among the top 10 left singular vectors of W0 + dW, those with |cos| < 0.5 to every
                  u0_j

Positions: Hu et al. 2021, arXiv 2106.09685, section 7.3, which finds that an update amplifies
directions that W0 does not emphasize. Intruder dimensions: Shuttleworth et al. 2024, arXiv
2410.21228.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.files.atomic import atomic_directory, verify
from lorafold.files.cache import cache_directory
from lorafold.inspecting.updates import Svd, of_dense

BINS = 10
TOP, COSINE = 10, 0.5
FILE = "svd.safetensors"
FORMAT = 1  # raise it when files made by an earlier version are no longer good


def cached_svd(fingerprint: Mapping[str, Any], path: str, w: Tensor) -> Svd:
    """The SVD of a base's weight, from the cache or else made and put there: vectors in fp16, which
    cosines don't notice.
    """
    base = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    directory = cache_directory() / "svd" / f"{base}-{FORMAT}" / path
    if not verify(directory):
        return Svd(**{name: tensor.float() for name, tensor in load_file(directory / FILE).items()})
    svd = of_dense(w)
    with atomic_directory(directory, overwrite=True) as tmp:
        save_file(
            {"u": svd.u.half().contiguous(), "s": svd.s, "v": svd.v.half().contiguous()}, tmp / FILE
        )
    return svd


# (n, k), (k,), (n, m) -> (m,), its sum 1 or less
def position(vectors: Tensor, s: Tensor, base: Tensor) -> Tensor:
    """What is missing to 1 lies where W0 is zero."""
    along = (base.t() @ vectors).square() @ s.square()
    return along / s.square().sum()


def binned(p: Tensor, bins: int = BINS) -> list[float]:
    """The energy in the strongest tenth of W0's directions, the next tenth ..., and last what lies
    outside all of them.
    """
    edges = [round(i * len(p) / bins) for i in range(bins + 1)]
    return [float(p[a:b].sum()) for a, b in pairwise(edges)] + [max(0.0, 1 - float(p.sum()))]


def intruders(base: Svd, w: Tensor, update: Svd) -> int:
    """How many of the top singular vectors of w + dW are like none of w's."""
    tuned = of_dense(w + update.dense()).top(TOP)
    return int(((base.u.t() @ tuned.u).abs().amax(0) < COSINE).sum())


def figures(
    fingerprint: Mapping[str, Any], path: str, w: Tensor, update: Svd, directions: int
) -> dict[str, Any]:
    """The figures of one site, by their names in the JSON.

    `top_projection` is that of so many of W0's own directions.
    """
    base = cached_svd(fingerprint, path, w)
    if not len(update.s):
        return {"intruders": 0}
    writes, reads = position(update.u, update.s, base.u), position(update.v, update.s, base.v)
    return {
        "intruders": intruders(base, w, update),
        "position_written": binned(writes), "position_read": binned(reads),
        "top_projection": float(base.s[:directions].norm()),
    }  # fmt: skip
