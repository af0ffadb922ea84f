"""The attention heads that an update writes to and reads from.

    share of head h = |dW_h|^2 / |dW|^2        dW_h the rows of q, k and v that make head h, or the
                                               columns of the output projection that read it

An even update has 1 / n at each of n heads. A projection is one of heads where it is part of an
attention that says how large a head is, and its side away from the residual stream has as many as
the configuration has of queries, or of keys and values. Fused projections are none of these: which
of their rows belong to a head is not said anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold.bases import layer_of
from lorafold.core.anatomy import bare_modules
from lorafold.errors import NotMergeable
from lorafold.inspecting.residual import Stream
from lorafold.inspecting.updates import Svd


@dataclass(frozen=True)
class Heads:
    """A projection's heads: `n` of `size` each, on the side that it writes (`out`), or reads."""

    n: int
    size: int
    out: bool

    def shares(self, svd: Svd) -> list[float]:
        """The share of the update's energy at each head; all are 0 for an update that is 0."""
        side: Tensor = svd.u if self.out else svd.v  # (n * size, k)
        energy = ((side * svd.s) ** 2).sum(1).reshape(self.n, self.size).sum(1)
        whole = float(energy.sum())
        return [float(e) / whole if whole else 0.0 for e in energy]


def heads_of(model: PreTrainedModel, stream: Stream) -> tuple[dict[str, Heads], list[str]]:
    """The heads of each projection, by module path, and the paths of projections of an attention
    that has heads which can't be told apart.

    Args:
        stream: The modules of the model's residual stream.
    """
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None)
    counts = {queries, getattr(config, "num_key_value_heads", None) or queries}
    found, fused = dict[str, Heads](), list[str]()
    for path, module in bare_modules(model):
        parent = model.get_submodule(path.rpartition(".")[0])
        size = getattr(parent, "head_dim", None)
        if not isinstance(size, int) or (shape := _shape(module)) is None:
            continue
        if path not in stream.readers and path not in stream.writers:
            continue
        out = path in stream.readers
        n, rest = divmod(shape[0 if out else 1], size)
        if not rest and n in counts:
            found[path] = Heads(n, size, out)
        elif not rest and out and n > max(c for c in counts if c):
            fused.append(path)
    return found, fused


def evenness(sites: Mapping[str, Mapping[str, Any]]) -> tuple[str, int, float, int] | None:
    """(module path, head, its share, the number of heads) where the largest share is most times an
    even one; None without heads.
    """
    known = [(path, site["heads"]) for path, site in sites.items() if any(site.get("heads", ()))]
    if not known:
        return None
    path, shares = max(known, key=lambda one: max(one[1]) * len(one[1]))
    return path, shares.index(max(shares)), max(shares), len(shares)


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    try:
        shape = tuple(layer_of(module).shape)
    except NotMergeable:
        return None
    return shape if len(shape) == 2 else None
