"""What a model with its adapters is: a language model, a reward model, or a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from lorafold.errors import LorafoldError, listed
from lorafold.models.classifier import outputs_of_model
from lorafold.opening.base import Base
from lorafold.peft.saved import Saved

LANGUAGE_MODEL, REWARD_MODEL = "a language model", "a reward model"


def known_classes(base: Base, adapters: Sequence[Saved]) -> tuple[str, ...] | None:
    """The classes of the adapters, or else of the model, or None if neither has classes.

    Raises LorafoldError if the adapters' classes differ.
    """
    found = {str(one): classes for one in adapters if (classes := one.classes)}
    if len(set(found.values())) > 1:
        raise LorafoldError(
            "adapters: expected the same classes in all of them, found "
            + "; ".join(f"{', '.join(classes)} in {name}" for name, classes in found.items())
        )
    if found:
        return next(iter(found.values()))
    outputs = outputs_of_model(base.source)
    return outputs if outputs and len(outputs) > 1 else None


def kind_of(base: Base, adapters: Sequence[Saved]) -> str:
    """In words: a language model, a reward model, or a classifier of its classes. Raises
    LorafoldError as `known_classes` does.
    """
    if classes := known_classes(base, adapters):
        return f"a classifier of {listed(classes, room=60)}"
    scores = any(one.scores for one in adapters) or len(outputs_of_model(base.source) or ()) == 1
    return REWARD_MODEL if scores else LANGUAGE_MODEL


def check_language_model(base: Base, adapters: Sequence[Saved], advice: str = "") -> None:
    """Raise LorafoldError unless the adapters are those of a language model.

    Args:
        advice: What to do instead, for the message.
    """
    if (kind := kind_of(base, adapters)) != LANGUAGE_MODEL:
        raise LorafoldError(
            f"{listed(adapters)}: found {kind}, expected an adapter of a language"
            f" model{advice}"
        )
