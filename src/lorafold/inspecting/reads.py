"""What a direction of an update reads and writes: the tokens, and the user's own vectors, that lie
nearest to it.

    W reads the residual stream h through a norm with gain g:   v^T (g * h) = (g * v)^T h
        so g * v, beside the rows of the embedding
    W writes u to it:                                           logits E' (g' * u)
        so g' * u, g' the final norm's gain, beside the rows of the unembedding E'

"Beside" is the cosine. The embedding's own inputs and the head's own outputs are tokens already:
there the entries of v and u, which have norm 1, are shown. u and v are only known up to a sign that
they share, so both ends of a direction are: what it reads and writes together, and what it reads
and writes with the opposite sign. A norm's division by |h| and its mean's removal are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.errors import LorafoldError
from lorafold.inspecting.residual import Stream, gain
from lorafold.inspecting.updates import Svd
from lorafold.models.weights import FileWeights

DIRECTIONS = 3  # of a module, the strongest
DRAWN = 64  # random directions to compare with
SHOWN = 6  # tokens at each end of a direction
VECTORS = 10  # of the user's, those with the largest share of a module's update
ROWS = 8192  # of the vocabulary at a time


@dataclass(frozen=True)
class Near:
    """The places of the largest and of the smallest values along each direction, and the values:
    (SHOWN, directions) each.
    """

    top: tuple[Tensor, Tensor]
    bottom: tuple[Tensor, Tensor]

    def named(self, direction: int, name: Callable[[int], str]) -> dict[str, list[dict[str, Any]]]:
        """The two ends of a direction; the values are cosines."""

        def end(values: Tensor, places: Tensor) -> list[dict[str, Any]]:
            pairs = zip(places[:, direction].tolist(), values[:, direction].tolist(), strict=True)
            return [{"name": name(i), "cosine": value} for i, value in pairs]

        return {"positive": end(*self.top), "negative": end(*self.bottom)}


# (V, d), (d, n), any lengths
def nearest(rows: Tensor, directions: Tensor, shown: int = SHOWN) -> Near:
    """By cosine. `rows` may be in any dtype; a part of them at a time is brought to fp32."""
    unit = F.normalize(directions, dim=0)
    near = [
        extremes(F.normalize(part.float(), dim=1) @ unit, shown, i * ROWS)
        for i, part in enumerate(rows.split(ROWS))
    ]

    def merged(ends: Sequence[tuple[Tensor, Tensor]], sign: int) -> tuple[Tensor, Tensor]:
        values, places = (torch.cat(parts) for parts in zip(*ends, strict=True))
        best = (sign * values).topk(min(shown, len(values)), 0).indices
        return values.gather(0, best), places.gather(0, best)

    return Near(merged([n.top for n in near], 1), merged([n.bottom for n in near], -1))


def chance(rows: Tensor, through: Tensor | None) -> float:  # (n, d), (d,)
    """How near the nearest row lies to a random direction on average: a cosine that a direction
    must beat to be about a token.
    """
    directions = torch.randn(rows.shape[1], DRAWN, generator=torch.Generator().manual_seed(0))
    return float(
        nearest(rows, directions if through is None else through[:, None] * directions, 1)
        .top[0]
        .mean()
    )


def extremes(values: Tensor, shown: int = SHOWN, first: int = 0) -> Near:  # (V, n)
    """The largest and the smallest; `first` is the place of the first row."""
    k = min(shown, len(values))
    (top, at_top), (bottom, at_bottom) = values.topk(k, 0), values.topk(k, 0, largest=False)
    return Near((top, at_top + first), (bottom, at_bottom + first))


@dataclass(frozen=True)
class Side:
    """One side of a module: its singular directions (d, k), in the residual stream's own
    coordinates or over the vocabulary.
    """

    directions: Tensor
    of_tokens: bool


def reading(model: PreTrainedModel, stream: Stream, path: str, svd: Svd) -> Side | None:
    """None for a module that reads something else than tokens or the residual stream."""
    if path == stream.embedding:
        return Side(svd.v, True)
    if (norm := stream.readers.get(path)) is None:
        return None
    return Side(
        gain(model.get_submodule(norm), stream.size)[:, None] * svd.v if norm else svd.v, False
    )


def writing(stream: Stream, path: str, svd: Svd) -> Side | None:
    """None for a module that writes to something else than logits or the residual stream."""
    if path == stream.head:
        return Side(svd.u, True)
    return Side(svd.u, False) if path in stream.writers else None


def tables(
    sides: Mapping[str, Side], rows: Tensor, through: Tensor | None, name: Callable[[int], str]
) -> dict[str, list[dict[str, Any]]]:
    """The nearest of `rows` (n, d) to the first directions of each side, by path: all in one pass
    over the rows. `through` (d,): the gain between a direction and the rows.
    """
    found = {
        path: _named(extremes(side.directions[:, :DIRECTIONS]), name)
        for path, side in sides.items()
        if side.of_tokens
    }
    streams = {
        path: side.directions[:, :DIRECTIONS] for path, side in sides.items() if not side.of_tokens
    }
    if streams:
        together = torch.cat(list(streams.values()), 1)
        named = iter(
            _named(
                nearest(rows, together if through is None else through[:, None] * together), name
            )
        )
        found |= {
            path: list(islice(named, directions.shape[1])) for path, directions in streams.items()
        }
    return found


def _named(near: Near, name: Callable[[int], str]) -> list[dict[str, Any]]:
    return [near.named(i, name) for i in range(near.top[0].shape[1])]


def read_vectors(path: str | Path, size: int) -> tuple[list[str], Tensor]:
    """Names and vectors (n, d) of a safetensors file: a tensor (d,) is one, a tensor (n, d) or (d,
    n) is n, named by number, as an SAE's decoder has them. LorafoldError lists tensors of other
    shapes.
    """
    file, names, found, problems = (
        FileWeights([Path(path)]),
        list[str](),
        list[Tensor](),
        list[str](),
    )
    for name in sorted(file.names):
        shape = file.shape(name)
        if not file.is_floating(name) or len(shape) not in (1, 2) or size not in shape:
            problems.append(f"{name}: shape {list(shape)}, expected [{size}] or [n, {size}]")
            continue
        tensor = file.get(name).float()
        rows = tensor[None] if tensor.dim() == 1 else tensor if shape[1] == size else tensor.t()
        names += [name] if tensor.dim() == 1 else [f"{name}[{i}]" for i in range(len(rows))]
        found.append(rows)
    if problems or not found:
        raise LorafoldError(f"{path}: {'; '.join(problems) or 'no vectors in it'}")
    return names, torch.cat(found)


def shares(side: Side, s: Tensor, vectors: Tensor) -> Tensor:  # (d, k), (k,), (n, d) -> (n,)
    """The share of an update's energy on each vector: |dW f|^2 / |dW|^2 for one that is read, |f^T
    dW|^2 / |dW|^2 for one that is written, f the vector at length 1. 1 / d of it lies on any one on
    average.
    """
    along = F.normalize(vectors, dim=1) @ F.normalize(side.directions, dim=0)
    return (along * s).square().sum(1) / s.square().sum()


def largest_shares(
    side: Side, s: Tensor, names: Sequence[str], vectors: Tensor
) -> dict[str, float]:
    """The vectors with the largest shares, largest first."""
    found = shares(side, s, vectors)
    values, places = found.topk(min(VECTORS, len(found)))
    return {names[i]: value for i, value in zip(places.tolist(), values.tolist(), strict=True)}
