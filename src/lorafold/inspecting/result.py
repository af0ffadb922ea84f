"""The result of `lf.inspect`. Its fields are keys of `lorafold lab inspect --json`, but the objects
in `FLATTENED` are merged into their parents, and optional fields that are None are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lorafold.files.html_page import ShownInNotebooks

LossPoint = tuple[float, float]  # t, loss in nats per labelled token
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
    """Figures of an update relative to its base weight, defined in `spectra`. A ratio is None if
    its denominator is zero.
    """

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
    """The distribution of an update's energy: its share in each tenth of the base's singular
    directions, and outside of them. `top_projection` is the base's norm in its top directions.
    """

    position_written: list[float]
    position_read: list[float]
    top_projection: float


@dataclass(frozen=True, kw_only=True)
class MatrixFigures:
    """Figures of the update of one matrix; without factors, `rank` is the numerical rank."""

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
    """One rank for all modules: `rank_95` keeps 95% of the energy; `advised_rank` is the next
    practical rank, at which the share `advised_loss` of the energy is lost.
    """

    rank_95: int
    advised_rank: int
    advised_loss: float


@dataclass(frozen=True)
class AdapterFigures:
    """Figures over all modules; `rank` is None if their ranks differ or a module has no factors."""

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
    """The overlap of two updates of one matrix: their cosine, phi of their first directions and of
    all directions, and the phi expected for unrelated updates.
    """

    cosine: float
    phi_read_first: float
    phi_written_first: float
    phi_read_all: float
    phi_written_all: float
    chance_read_all: float
    chance_written_all: float


@dataclass(frozen=True)
class KindOverlap:
    """phi[i][j] of the first i + 1 directions of one adapter and j + 1 of another, averaged over
    all modules of a kind, such as q_proj.
    """

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

    Attributes:
        beside: The number of deltas without figures, such as biases, by class.
        whole: Figures of all modules together.
        sites: Figures by module path, and for experts by matrix, as in `...gate_up_proj[3]`.
        layers: The overlap of the top directions of blocks, by kind of module.
        chance_cosine: The mean cosine of random directions to their nearest token, as a baseline.
        tokens_left_out: The reason why there are no nearest tokens.
        advice: Conclusions, as sentences.
        over: The base adapters; None if there are none.
        against: The overlap with a second adapter; None if none was given.
        paths: Losses along lines in weight space; None if no rows were given.
        experts: The overlap of the top directions of experts, by module.
        experts_left_out: The reason why tokens are not shown for all experts.
        heads_left_out: The reason why projections are missing in the figures by head.
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
        """All figures, under the keys of `lorafold lab inspect --json`."""
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
