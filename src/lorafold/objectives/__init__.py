"""The objectives by name, with the properties that are needed before torch is imported.

A new objective is a module and a row of `OBJECTIVES`, which recipes, help texts, runs and estimates
use.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from lorafold.data.formats import (
    CONVERSATIONS,
    JUDGED,
    LABELS,
    PAIRS,
    PROMPTS,
    RowFormat,
    formats_for,
)
from lorafold.errors import LorafoldError, listed

if TYPE_CHECKING:
    from lorafold.objectives.objective import Objective
    from lorafold.training_step.preference_algorithms import Law


@dataclass(frozen=True)
class Declared:
    """One row of `OBJECTIVES`.

    maker: `module.Class` in this package, imported on first use, or a subclass of `Objective`.
    about: the description in the help.
    takes: the content that rows must have, one of the `provides` of `RowFormat`.
    law: for a preference or policy objective, its loss: the class, or its name in
        `training_step.preference_algorithms` or `training_step.policy_algorithms`.
    keys: further keys of rows that it uses.
    unread: a notice if the rows are pairs and one completion of each is not used.
    streams: whether its rows can be streamed.
    head: whether it replaces the language model's head.
    compared: whether `compare` supports it.
    draws: whether it samples completions during training; rewards may then use all keys of rows,
        and dropout is off.
    """

    maker: "str | type[Objective]"
    about: str
    takes: str
    _: KW_ONLY
    law: "str | type[Law]" = ""
    keys: tuple[str, ...] = ()
    unread: str = ""
    streams: bool = False
    head: bool = False
    compared: bool = False
    draws: bool = False

    @property
    def kind(self) -> "type[Objective]":
        if not isinstance(self.maker, str):
            return self.maker
        module, _, name = self.maker.partition(".")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)

    def options(self) -> Mapping[str, Any]:
        """The options by name, with their defaults, including `beta` if the objective has it."""
        return self.kind.options(self)

    def notices(self, formats: Iterable[RowFormat | None]) -> list[str]:
        """The notices to print for rows of these formats."""
        pairs = any(of_source is not None and PAIRS in of_source.provides for of_source in formats)
        return [self.unread] if self.unread and pairs else []


COMPLETIONS_COMPARED = "prefer chosen completions to rejected ones"
POLICY, REWARDED = "policy.PolicyObjective", "sample completions, and learn from their rewards"
DEFAULT = "sft"
OBJECTIVES: dict[str, Declared] = {
    DEFAULT: Declared(
        "sft.Sft",
        "predict the next token of completions",
        CONVERSATIONS,
        unread="rejected is not used by --objective sft, which trains on the chosen answers",
        streams=True,
        compared=True,
    ),
    "classify": Declared(
        "classify.Classify", "predict the label of a text", LABELS, head=True, compared=True
    ),
    **{
        law.lower(): Declared("preference.Preference", COMPLETIONS_COMPARED, PAIRS, law=law)
        for law in ("Dpo", "Ipo", "Hinge", "Orpo", "Simpo")
    },
    "kto": Declared(
        "preference.Preference",
        "prefer completions with a true label to those with a false one",
        JUDGED,
        law="Kto",
        keys=("label",),
    ),
    "reward": Declared(
        "reward.RewardModel", "score completions", PAIRS, law="BradleyTerry", head=True
    ),
    **{
        law.lower(): Declared(POLICY, REWARDED, PROMPTS, law=law, compared=True, draws=True)
        for law in ("Reinforce", "Rloo", "Ppo", "Grpo", "Gspo", "Cispo")
    },
}


def descriptions() -> str:
    """The descriptions of all objectives, for the help. Objectives with the same description are
    listed together.
    """
    names: dict[str, list[str]] = {}
    for name, declared in OBJECTIVES.items():
        names.setdefault(declared.about, []).append(name)
    return " ".join(f"{', '.join(of)}: {about}." for about, of in names.items())


def check_formats(formats: Iterable[RowFormat | None], objective: str) -> None:
    """Raises unless the objective can train on rows of each of these formats."""
    takes = OBJECTIVES[objective].takes
    for row_format in formats:
        if row_format is None or takes not in row_format.provides:
            known = [str(one) for one in formats_for(takes) if takes in one.provides]
            expected = " or ".join(known) if len(known) < 4 else listed(known, max_chars=90)
            provided = row_format.provides if row_format else ()
            fitting = [name for name, other in OBJECTIVES.items() if other.takes in provided]
            # if rows have completions, suggest objectives that train on them first
            others = [n for n in fitting if not OBJECTIVES[n].draws] or fitting
            other = f", which are for --objective {' or '.join(others)}" if others else ""
            raise LorafoldError(
                f"data: found rows of {row_format}{other}; --objective {objective} expects rows of"
                f" {expected}"
            )
