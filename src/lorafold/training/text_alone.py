"""What training on text means for a model with towers: no row has an image or a sound, so towers
and connectors get no input, and adapters on them no gradient.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lorafold.core.presets import beneath
from lorafold.core.towers import aside, towers
from lorafold.errors import LorafoldError

INPUTS = {"vision": "an image", "audio": "a sound"}


def text_alone(model: nn.Module, sites: Collection[str]) -> str | None:
    """One line on the towers that get no input; None for a model without any.

    Raises LorafoldError if everything that an adapter changes is in them or in the connectors.

    Args:
        sites: the module paths that carry a delta of the adapter.
    """
    kinds = list(dict.fromkeys(towers(model).values()))
    if not kinds:
        return None
    idle = sum(map(beneath(aside(model)), sites))
    where = " and ".join(f"{kind} tower" for kind in kinds)
    why = f"no row has {' or '.join(INPUTS[kind] for kind in kinds)}"
    if idle and idle == len(sites):
        raise LorafoldError(
            f"targets: found {idle} modules, all in the {where} or beside it, and {why}, so none of"
            " them would get a gradient; expected modules of the language model, such as all-linear"
        )
    line = f"text alone is trained: {why}, so the {where} gets no input"
    if idle:
        line += f", and {idle} of the {len(sites)} adapted modules get no gradient"
    return line
