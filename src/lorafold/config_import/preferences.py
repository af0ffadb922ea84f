"""What the files of axolotl, LLaMA-Factory and TRL share where they train on preferences: options
of an objective, and the rows that it takes.

Which options an objective has stands in `objectives` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorafold.advice import number
from lorafold.config_import.rules import (
    OFF,
    Outcome,
    Reader,
    ToolSettings,
    changed,
    either,
    left,
    refused,
    taken,
    to,
)
from lorafold.data.shapes import JUDGED
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.algorithms import class_of

NO_DROPOUT = "there it is off while preferences are trained"
NO_SECOND_MODEL = (
    "lorafold loads one model, and its reference is what lies below the new adapter: the base, or"
    " the adapters of --over"
)
DPO_LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo"}  # of TRL's DPOTrainer
SUPERVISED = (
    "TRL averages the supervised term over the chosen tokens of a micro-batch, and lorafold over"
    " those of each row"
)
ORPO_TERM = (
    "TRL's supervised term also learns the prompts, and averages over the tokens of a micro-batch;"
    " lorafold's learns each chosen completion"
)
# Of a file's settings, the objective of preferences that it trains; None: another, or one refused
ObjectiveOf = Callable[[ToolSettings], str | None]


def has_reference(objective: str | None) -> bool:
    """Whether the objective compares with a reference."""
    declared = OBJECTIVES[objective] if objective is not None else None
    if declared is None or not declared.law:
        return False
    from lorafold.training_step import preference_algorithms

    return bool(class_of(declared, preference_algorithms).has_reference)


def options_of(objective: str | None) -> Mapping[str, Any]:
    """The options of the objective with their defaults; none where it is not one of preferences."""
    return {} if objective is None else OBJECTIVES[objective].options()


def beta(objective_of: ObjectiveOf) -> Reader:
    """The reader of a key that becomes beta; a reward model has none."""
    return either(lambda one: "beta" in options_of(objective_of(one)), to("beta", number))


def law_option(name: str, objective_of: ObjectiveOf) -> Reader:
    """The reader of a key that becomes the option `name`, of the objectives that have it."""

    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        found = options_of(objective_of(settings))
        if name not in found:
            return None
        if number(value) == found[name]:
            return taken("the objective's own")
        return taken(objective_options={name: number(value)})

    return read


def supervised(value: Any, objective: str | None, remark: str = "") -> Outcome | None:
    """A weight of the chosen completions' supervised loss becomes `sft_weight`."""
    if objective is None:
        return None
    weight = number(value)
    if weight == 0:
        return OFF
    if "sft_weight" not in options_of(objective):
        raise refused(value, f"lorafold's objective {objective} takes no such term")
    return changed(remark, objective_options={"sft_weight": weight})


def supervised_as(objective: str) -> Reader:
    """The reader of TRL's weight of the supervised term, of one objective."""
    return lambda value, settings: supervised(value, objective, SUPERVISED)


def of_dpo(found: Sequence[str], given: Any, key: str) -> Outcome:
    """The losses of TRL's DPOTrainer become the objective and, where sft is the second, its
    `sft_weight`.
    """
    weights = [1.0] * len(found)
    if given is not None:
        if not isinstance(given, list) or len(given) != len(found):
            raise LorafoldError(f"found {list(found)}, and {key}: {given!r}, one for each")
        weights = [number(one) for one in given]
    if not found or found[0] not in DPO_LOSSES:
        raise LorafoldError(
            f"found {list(found)}, expected {', '.join(DPO_LOSSES)}, of what lorafold has"
        )
    if tuple(found[1:]) not in ((), ("sft",)) or weights[0] != 1:
        raise LorafoldError(
            f"found {list(found)} with weights {weights}, but lorafold has one loss of weight 1"
            " and, for sigmoid, sft besides"
        )
    objective = DPO_LOSSES[found[0]]
    extra = supervised(weights[1], objective, SUPERVISED) if found[1:] else None
    fields = {} if extra is None else extra.fields
    return changed(SUPERVISED if fields else "", objective=objective, **fields)


def smoothing_of_dpo(value: Any, settings: ToolSettings) -> Outcome | None:
    """TRL's DPOTrainer reads `label_smoothing` for other losses than those of lorafold only."""
    found = number(value)
    told = "TRL 1 does not read it for this loss; for cDPO pass --objective-options label_smoothing"
    return left(f"{told}={found:g}") if found else None


def rows_wanted(objective: str | None) -> str:
    """The rows to give as --data, in words."""
    rows = "prompt, chosen and rejected"
    if objective is None:
        rows = "messages, of prompt and completion, or of text"
    elif OBJECTIVES[objective].draws:
        rows = "prompt, and of what the rewards read,"
    elif OBJECTIVES[objective].takes == JUDGED:
        rows = "prompt, completion and label (true or false)"
    return f"pass rows of {rows} as --data"


def dropout(turned_off: Callable[[ToolSettings], bool]) -> Reader:
    """The reader of a dropout, which tools turn off with some settings."""

    def read(value: Any, settings: ToolSettings) -> Outcome:
        found = number(value)
        off = bool(found) and turned_off(settings)
        return taken(NO_DROPOUT if off else "", dropout=0.0 if off else found)

    return read
