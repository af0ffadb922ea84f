"""The update in the spectrum of the base: which of the base's singular directions it changes, and
which directions it adds. This takes the SVD of every W0, which is kept in the cache under
the digest of W0 itself.

    W0 = sum_j s0_j u0_j v0_j^T
    position      p_j = sum_i s_i^2 (u_i . u0_j)^2 / sum_i s_i^2, and the same with v: how the
                  update's energy is distributed over W0's directions
    intruders     those of the top 10 left singular vectors of W0 + dW with |cos| < 0.5 to every
                  u0_j

Positions follow Hu et al. 2021, arXiv 2106.09685, section 7.3, which finds that an update amplifies
directions that W0 does not emphasize. Intruder dimensions: Shuttleworth et al. 2024, arXiv
2410.21228.
"""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.files.atomic import atomic_directory, verify
from lorafold.files.paths import cache_directory
from lorafold.identity import of_code
from lorafold.inspecting.updates import Svd, of_dense

BINS = 10
TOP, COSINE = 10, 0.5
FILE = "svd.safetensors"
DIGITS = 32
CODE = ("inspecting/base_svd", "inspecting/updates")  # that decomposes W0


def cached_svd(w: Tensor) -> Svd:
    """The SVD of a weight of the base, from the cache, or computed and added to it. Vectors are
    stored in fp16, whose rounding is far below the cosines that are measured.

    Args:
        w: W0, (out, in), in fp32.
    """
    found = sha256(f"{tuple(w.shape)} {w.dtype}\n".encode())
    found.update(w.flatten().numpy().data)
    made_by = cache_directory() / "svd" / of_code(*CODE)[:DIGITS]
    directory = made_by / found.hexdigest()[:DIGITS]
    if not verify(directory):
        return Svd(**{name: tensor.float() for name, tensor in load_file(directory / FILE).items()})
    svd = of_dense(w)
    with atomic_directory(directory, overwrite=True) as tmp:
        save_file(
            {"u": svd.u.half().contiguous(), "s": svd.s, "v": svd.v.half().contiguous()}, tmp / FILE
        )
    return svd


def position(vectors: Tensor, s: Tensor, base: Tensor) -> Tensor:  # (m,)
    """p_j: the share of the update's energy on each of W0's directions. The rest, up to a sum of 1,
    is on directions where W0 is zero.

    Args:
        vectors: Singular vectors of the update, (n, k).
        s: Its singular values, (k,).
        base: Singular vectors of W0 on the same side, (n, m).
    """
    along = (base.t() @ vectors).square() @ s.square()
    return along / s.square().sum()


def binned(p: Tensor, bins: int = BINS) -> list[float]:  # (m,)
    """The share of the energy on each tenth of W0's directions, the strongest tenth first, and as
    the last entry the share outside all of them.
    """
    edges = [round(i * len(p) / bins) for i in range(bins + 1)]
    return [float(p[a:b].sum()) for a, b in pairwise(edges)] + [max(0.0, 1 - float(p.sum()))]


def intruders(base: Svd, w: Tensor, update: Svd) -> int:
    """The number of intruder dimensions: top singular vectors of w + dW that are like none of w.

    Args:
        base: The SVD of w.
        w: W0, (out, in).
        update: The SVD of dW.
    """
    tuned = of_dense(w + update.dense()).top(TOP)
    return int(((base.u.t() @ tuned.u).abs().amax(0) < COSINE).sum())


def figures(w: Tensor, update: Svd, directions: int) -> dict[str, Any]:
    """The figures of one site, by their names in the JSON.

    Args:
        w: W0, (out, in), in fp32.
        update: The SVD of dW.
        directions: `top_projection` is the norm of W0 in so many of its own top directions.
    """
    base = cached_svd(w)
    if not len(update.s):
        return {"intruders": 0}
    writes, reads = position(update.u, update.s, base.u), position(update.v, update.s, base.v)
    return {
        "intruders": intruders(base, w, update),
        "position_written": binned(writes), "position_read": binned(reads),
        "top_projection": float(base.s[:directions].norm()),
    }  # fmt: skip
