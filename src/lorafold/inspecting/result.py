"""What `lf.inspect` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorafold.files.html_page import ShownInNotebooks


@dataclass(frozen=True)
class Inspection(ShownInNotebooks):
    """The figures of one adapter; `lorafold.inspecting` defines each.

    `sites` has the figures of every module path, and of each matrix of experts as
    `...gate_up_proj[3]`; `whole` those of all sites together, `beside` the number of deltas that
    are not measured, `layers` the overlaps of the blocks' top directions, and `advice` the
    conclusions in sentences. `over` is None for an adapter over the bare base, `against` without a
    second adapter, `paths` without data; without experts so are `experts`, the overlaps of their
    top directions, and `experts_left_out`, which of them have tokens. `heads_left_out` says which
    projections of an attention have no heads.
    """

    adapter: str
    model: str
    method: str
    beside: dict[str, int]
    whole: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    layers: dict[str, Any]
    chance_cosine: dict[str, Any]
    tokens_left_out: str | None
    advice: list[str]
    over: list[str] | None = None
    against: dict[str, Any] | None = None
    paths: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    experts_left_out: str | None = None
    heads_left_out: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All figures under the keys of `lorafold inspect --json`."""
        optional = (
            "over", "against", "paths", "experts", "experts_left_out", "heads_left_out",
        )  # fmt: skip
        return {k: v for k, v in asdict(self).items() if k not in optional or v is not None}

    def __str__(self) -> str:
        return "\n".join(self.advice)
