"""What the files of axolotl, LLaMA-Factory and TRL share where they train on preferences: options
of an objective, and the rows that it takes.

Which options an objective has stands in `objectives` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorafold.data.shapes import JUDGED
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.laws import class_of
from lorafold.translating.convert import number
from lorafold.translating.rules import Outcome, Reader, Settings, changed, left, taken

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
ObjectiveOf = Callable[[Settings], str | None]


def has_reference(objective: str | None) -> bool:
    """Whether the objective compares with a reference."""
    declared = OBJECTIVES[objective] if objective is not None else None
    if declared is None or not declared.law:
        return False
    from lorafold.step import preference_laws

    return bool(class_of(declared, preference_laws).has_reference)


def options_of(objective: str | None) -> Mapping[str, Any]:
    """The options of the objective with their defaults; none where it is not one of preferences."""
    return {} if objective is None else OBJECTIVES[objective].options()


def beta(objective_of: ObjectiveOf) -> Reader:
    """The reader of a key that becomes beta; a reward model has none."""

    def read(value: Any, settings: Settings) -> Outcome | None:
        objective = objective_of(settings)
        return taken(beta=number(value)) if "beta" in options_of(objective) else None

    return read


def law_option(name: str, objective_of: ObjectiveOf) -> Reader:
    """The reader of a key that becomes the option `name`, of the objectives that have it."""

    def read(value: Any, settings: Settings) -> Outcome | None:
        found = options_of(objective_of(settings))
        if name not in found:
            return None
        if number(value) == found[name]:
            return taken("the objective's own")
        return taken(objective_options={name: number(value)})

    return read


def supervised(value: Any, objective: str | None, remark: str = "") -> Outcome | None:
    """A weight of the chosen completions' supervised loss becomes `sft_weight`.

    Args:
        objective: The objective of preferences, or None.
        remark: What differs in the other tool's loss.

    Raises:
        LorafoldError: the objective has no such term.
    """
    if objective is None:
        return None
    weight = number(value)
    if weight == 0:
        return taken("it is off")
    if "sft_weight" not in options_of(objective):
        raise LorafoldError(
            f"found {value!r}, but lorafold's objective {objective} takes no such term"
        )
    fields_set = {"objective_options": {"sft_weight": weight}}
    return changed(remark, **fields_set) if remark else taken(**fields_set)


def of_dpo(found: Sequence[str], given: Any, key: str) -> Outcome:
    """The losses of TRL's DPOTrainer become the objective and, where sft is the second, its
    `sft_weight`. LorafoldError for other losses and mixtures.

    Args:
        given: Their weights, or None.
        key: What the file calls them.
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
    if extra is None or not extra.fields:
        return taken(objective=objective)
    return changed(extra.remark, objective=objective, **extra.fields)


def smoothing_of_dpo(value: Any, settings: Settings) -> Outcome | None:
    """TRL's DPOTrainer reads `label_smoothing` for other losses than those of lorafold only."""
    if not number(value):
        return None
    return left(
        "TRL 1 does not read it for this loss; for cDPO pass --objective-options"
        f" label_smoothing={number(value):g}"
    )


def rows_wanted(objective: str | None) -> str:
    """The rows to give as --data, in words."""
    if objective is None:
        return "pass rows of messages, of prompt and completion, or of text as --data"
    if OBJECTIVES[objective].draws:
        return "pass rows of prompt, and of what the rewards read, as --data"
    if OBJECTIVES[objective].takes == JUDGED:
        return "pass rows of prompt, completion and label (true or false) as --data"
    return "pass rows of prompt, chosen and rejected as --data"
