"""The tokens, and the user's own vectors, nearest to the directions that an update reads and writes
(Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are
Highly Interpretable").

    W reads the residual stream h through a norm with gain g:   v^T (g * h) = (g * v)^T h
        so g * v is compared with the vectors of the embedding E
    W writes u to the residual stream:                          logits E' (g' * u)
        so g' * u, with the gain g' of the final norm, is compared with the unembedding E'

At the embedding, each entry of v already belongs to a token, as does each entry of u at the head.
The sign of a pair u, v is arbitrary, so the nearest tokens of both signs are shown. The norm's
division by |h| and its subtraction of the mean are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.errors import LorafoldError
from lorafold.inspecting.residual_stream import ResidualStream, gain
from lorafold.inspecting.result import NearestNeighbours, Neighbour
from lorafold.inspecting.updates import Svds, module_path
from lorafold.models.weights import FileWeights

NUM_DIRECTIONS = 3  # the strongest directions of a module that are shown
SAMPLES = 64  # random directions to compare with
NUM_TOKENS = 6  # tokens at each end of a direction
NUM_VECTORS = 10  # the user's vectors with the largest shares of a module's update
CHUNK_SIZE = 8192  # vectors of the vocabulary that are converted to fp32 at a time


@dataclass(frozen=True)
class Extremes:
    """The k largest values (`top`) and the k smallest (`bottom`) for each of n directions, as
    (values, indices), (k, n) each.
    """

    top: tuple[Tensor, Tensor]
    bottom: tuple[Tensor, Tensor]

    def named(self, name: Callable[[int], str]) -> list[NearestNeighbours]:
        def end(values: Tensor, indices: Tensor) -> list[list[Neighbour]]:
            pairs = zip(indices.t().tolist(), values.t().tolist(), strict=True)
            return [[Neighbour(name(i), v) for i, v in zip(*pair, strict=True)] for pair in pairs]

        return [*map(NearestNeighbours, end(*self.top), end(*self.bottom))]


def nearest(vectors: Tensor, directions: Tensor, k: int = NUM_TOKENS) -> Extremes:  # (V, d), (d, n)
    """The k vectors with the largest cosines to each direction, and the k with the smallest."""
    unit = F.normalize(directions, dim=0)
    near = [
        extremes(F.normalize(part.float(), dim=1) @ unit, k, i * CHUNK_SIZE)
        for i, part in enumerate(vectors.split(CHUNK_SIZE))
    ]

    def merged(ends: Sequence[tuple[Tensor, Tensor]], largest: bool) -> tuple[Tensor, Tensor]:
        values, indices = map(torch.cat, zip(*ends, strict=True))
        values, best = values.topk(min(k, len(values)), 0, largest)
        return values, indices.gather(0, best)

    return Extremes(merged([n.top for n in near], True), merged([n.bottom for n in near], False))


def mean_nearest(vectors: Tensor, norm_gain: Tensor | None) -> float:  # (n, d), (d,)
    """The mean cosine between a random direction and its nearest vector, as a baseline."""
    directions = torch.randn(vectors.shape[1], SAMPLES, generator=torch.Generator().manual_seed(0))
    return float(nearest(vectors, after_norm(directions, norm_gain), 1).top[0].mean())


def after_norm(directions: Tensor, norm_gain: Tensor | None) -> Tensor:  # (d, n), (d,) -> (d, n)
    return directions if norm_gain is None else norm_gain[:, None] * directions


def extremes(values: Tensor, shown: int = NUM_TOKENS, first: int = 0) -> Extremes:  # (V, n)
    """The `shown` largest and smallest values of each column; `first` is added to the indices."""
    k = min(shown, len(values))
    (top, at_top), (bottom, at_bottom) = (values.topk(k, 0, largest) for largest in (True, False))
    return Extremes((top, at_top + first), (bottom, at_bottom + first))


@dataclass(frozen=True)
class Directions:
    """Directions in the residual stream (d, k) or, if `of_tokens`, over the vocabulary (V, k)."""

    directions: Tensor
    of_tokens: bool


def find_sides(
    model: PreTrainedModel, stream: ResidualStream, svds: Svds
) -> dict[str, dict[str, Directions]]:
    reads, writes = {}, {}
    for path, svd in svds.items():
        norm = stream.readers.get(module_path(path))
        if not len(svd.s):
            continue
        if path == stream.embedding:
            reads[path] = Directions(svd.v, True)
        elif norm is not None:
            g = gain(model.get_submodule(norm), stream.size) if norm else None
            reads[path] = Directions(after_norm(svd.v, g), False)
        if path == stream.head or module_path(path) in stream.writers:
            writes[path] = Directions(svd.u, path == stream.head)
    return {"reads": reads, "writes": writes}


def near_to(
    sides: Mapping[str, Directions],
    vectors: Tensor,  # (n, d)
    norm_gain: Tensor | None,  # (d,)
    name: Callable[[int], str],
) -> dict[str, list[NearestNeighbours]]:
    tops = {path: side.directions[:, :NUM_DIRECTIONS] for path, side in sides.items()}
    named_by_path = {
        path: extremes(tops[path]).named(name) for path, side in sides.items() if side.of_tokens
    }
    streams = {path: directions for path, directions in tops.items() if path not in named_by_path}
    if streams:
        directions_after_norm = after_norm(torch.cat(list(streams.values()), 1), norm_gain)
        named = iter(nearest(vectors, directions_after_norm).named(name))
        named_by_path |= {
            path: list(islice(named, directions.shape[1])) for path, directions in streams.items()
        }
    return named_by_path


def read_vectors(path: str | Path, size: int) -> tuple[list[str], Tensor]:
    """The names and vectors (n, d) in a safetensors file with tensors (d,), (n, d) or (d, n)."""
    file, names, matrices = FileWeights([Path(path)]), [], []
    problems = []
    for name in sorted(file.names):
        shape = file.shape(name)
        if not file.is_floating(name) or len(shape) not in (1, 2) or size not in shape:
            problems.append(f"{name}: found shape {list(shape)}, expected [{size}] or [n, {size}]")
            continue
        tensor = file.get(name).float()
        vectors = tensor[None] if tensor.dim() == 1 else tensor if shape[1] == size else tensor.t()
        names += [name] if tensor.dim() == 1 else [f"{name}[{i}]" for i in range(len(vectors))]
        matrices.append(vectors)
    if problems or not matrices:
        none = f"found no tensors, expected [{size}] or [n, {size}]"
        raise LorafoldError(f"{path}: {'; '.join(problems) or none}")
    return names, torch.cat(matrices)


def shares(side: Directions, s: Tensor, vectors: Tensor) -> Tensor:  # (n,)
    """The share |dW f|^2 / |dW|^2 of an update's energy along each vector f; 1 / d if random."""
    cosines = F.normalize(vectors, dim=1) @ F.normalize(side.directions, dim=0)
    return (cosines * s).square().sum(1) / s.square().sum()


def largest_shares(
    side: Directions, s: Tensor, names: Sequence[str], vectors: Tensor
) -> dict[str, float]:
    """The NUM_VECTORS largest shares by name, in descending order, for vectors (n, d)."""
    all_shares = shares(side, s, vectors)
    values, indices = all_shares.topk(min(NUM_VECTORS, len(all_shares)))
    return {names[i]: value for i, value in zip(indices.tolist(), values.tolist(), strict=True)}
