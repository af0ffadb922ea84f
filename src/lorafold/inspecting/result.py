"""The result of `lf.inspect`. The fields are the keys of `lorafold inspect --json`, but the objects
in `FLATTENED` are merged into their parents, and optional fields that are None are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lorafold.files.html_page import ShownInNotebooks

LossPoint = tuple[float, float]  # t, loss in nats a labelled token
Grid = list[list[float]]
FLATTENED = ("base", "positions", "pooled")


@dataclass(frozen=True)
class Neighbour:
    name: str
    cosine: float


@dataclass(frozen=True)
class NearestNeighbours:
    positive: list[Neighbour]
    negative: list[Neighbour]


@dataclass(frozen=True)
class BaseFigures:
    """An update compared with its base weight. Ratios are None if one of them is zero."""

    norm: float
    base_norm: float
    relative_norm: float | None
    projection: float
    random_projection: float
    amplification: float | None
    strength_read: float | None
    strength_written: float | None


@dataclass(frozen=True)
class SpectrumPositions:
    """The update's energy on each tenth of the base's directions and outside of them, and the
    base's norm in its own top directions.
    """

    position_written: list[float]
    position_read: list[float]
    top_projection: float


@dataclass(frozen=True, kw_only=True)
class MatrixFigures:
    """The update of one matrix; `rank` is the numerical rank if the method has no factors."""

    rank: int
    numerical_rank: int
    effective_rank_90: int
    effective_rank_95: int
    effective_rank_99: int
    factored: bool
    stable_rank: float
    entropy_rank: float
    base: BaseFigures
    directions: int
    intruders: int | None = None
    positions: SpectrumPositions | None = None
    shape: list[int]
    singular_values: list[float]
    advice: str
    heads: list[float] | None = None
    reads: list[NearestNeighbours] | None = None
    writes: list[NearestNeighbours] | None = None
    reads_vectors: list[NearestNeighbours] | None = None
    reads_shares: dict[str, float] | None = None
    writes_vectors: list[NearestNeighbours] | None = None
    writes_shares: dict[str, float] | None = None


Sites = Mapping[str, MatrixFigures]  # by module path, or the name of a matrix of experts


@dataclass(frozen=True)
class PooledRank:
    """The common rank that keeps 95% of the energy, the advised rank, and its loss."""

    rank_95: int
    advised_rank: int
    advised_loss: float


@dataclass(frozen=True)
class AdapterFigures:
    """Means and medians over the modules; `rank` is None if they have different ranks."""

    sites: int
    rank: int | None
    effective_rank_90: float
    effective_rank_95: float
    effective_rank_99: float
    stable_rank: float
    entropy_rank: float
    norm: float
    relative_norm: float | None
    amplification: float | None
    pooled: PooledRank


@dataclass(frozen=True)
class LayerOverlap:
    side: str
    layers: list[str]
    phi: Grid


@dataclass(frozen=True)
class ExpertOverlap:
    side: str
    experts: int
    phi: float
    phi_lowest: float
    phi_highest: float


@dataclass(frozen=True)
class UpdateOverlap:
    """Two updates of one matrix: cosine, phi of the first and all directions, and by chance."""

    cosine: float
    phi_read_first: float
    phi_written_first: float
    phi_read_all: float
    phi_written_all: float
    chance_read_all: float
    chance_written_all: float


@dataclass(frozen=True)
class KindOverlap:
    """phi[i][j] of the first i + 1 and j + 1 directions, averaged over a kind of module."""

    phi_read: Grid
    phi_written: Grid


@dataclass(frozen=True)
class AdapterOverlap:
    adapter: str
    sites: dict[str, UpdateOverlap]
    kinds: dict[str, KindOverlap]
    only_first: list[str]
    only_second: list[str]


@dataclass(frozen=True)
class LossPaths:
    rows: int
    scaling: Sequence[LossPoint]
    between: Sequence[LossPoint] | None = None
    barrier: float | None = None


@dataclass(frozen=True)
class Inspection(ShownInNotebooks):
    """The figures of one adapter.

    `sites` has the figures of each module path, or matrix of experts as in `...gate_up_proj[3]`;
    `whole` of all modules together; `beside` the number of deltas without figures, by class.
    `layers` and `experts` are overlaps of the top directions of blocks and experts, `chance_cosine`
    the cosine of a random direction to its nearest token, `advice` the conclusions. Without base
    adapters, a second adapter or data, `over`, `against` or `paths` is None. `tokens_left_out`,
    `heads_left_out` and `experts_left_out` are reasons for missing figures.
    """

    adapter: str
    model: str
    method: str
    beside: dict[str, int]
    whole: AdapterFigures
    sites: Sites
    layers: dict[str, LayerOverlap]
    chance_cosine: dict[str, float]
    tokens_left_out: str | None
    advice: list[str]
    over: list[str] | None = None
    against: AdapterOverlap | None = None
    paths: LossPaths | None = None
    experts: dict[str, ExpertOverlap] | None = None
    experts_left_out: str | None = None
    heads_left_out: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All figures under the keys of `lorafold inspect --json`."""
        return asdict(self, dict_factory=_flat)

    def __str__(self) -> str:
        return "\n".join(self.advice)


OPTIONAL = frozenset(
    f.name for of in (MatrixFigures, LossPaths, Inspection) for f in fields(of) if f.default is None
)


def _flat(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in FLATTENED and value is not None:
            content |= value
        elif value is not None or name not in OPTIONAL:
            content[name] = value
    return content
