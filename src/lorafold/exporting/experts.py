"""The factors of experts apart, as engines have them whose experts have no `gate_up_proj`.

    gate_up_proj    up (E, 2 I, r), down (E, r, H)  ->  gate_proj, up_proj    up (E, I, r) each
"""

from __future__ import annotations

from collections.abc import Iterator

from lorafold.exporting.update import Factors

GATE_UP, DOWN = "gate_up_proj", "down_proj"
INTERLEAVED = frozenset({"gpt_oss"})  # families in whose rows gates and ups take turns


def apart(kind: str, name: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    """Yield the name and the factors of each matrix that a parameter of experts is.

    Args:
        kind: the model's type.
        name: of the parameter.
        factors: of all experts.
    """
    up, down = factors
    if name != GATE_UP:
        yield name, factors
        return
    if kind in INTERLEAVED:
        gate, beside = up[:, ::2], up[:, 1::2]
    else:
        gate, beside = up.chunk(2, 1)
    yield "gate_proj", (gate, down)
    yield "up_proj", (beside, down.clone())  # safetensors writes no tensor twice
