"""The model of a verb: a base with saved adapters, which are loaded, or a model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.adapter import load
from lorafold.api.arguments import or_quiet
from lorafold.errors import LorafoldError
from lorafold.models.positions import positions_in, positions_of
from lorafold.models.sources import ModelSource
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.classify import Classify
from lorafold.objectives.objective import Objective
from lorafold.objectives.reward import RewardModel
from lorafold.objectives.sft import Sft
from lorafold.peft.saved import Saved
from lorafold.recipe.fitting import fitted_length
from lorafold.resolve import Base, base_for
from lorafold.resolve.base import LANGUAGE_MODEL, REWARD_MODEL, kind_of, known_classes
from lorafold.training_step.preference_algorithms import BradleyTerry

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model that a verb was given. The Python files of its tokenizer run if they are trusted."""

    model: PreTrainedModel
    trust_remote_code: bool


def at_hand(
    model: str | Path | ModelSource | PreTrainedModel | None,
    adapters: Sequence[Saved],
    console: Console | None = None,
    **how: Any,
) -> Base | LoadedModel:
    """What a verb was given as its model: the model itself if it is loaded, else the base as
    `base_for` finds it.

    Raises LorafoldError for arguments that a loaded model leaves without effect.

    Args:
        model: A loaded model keeps its storage, device and adapters.
        adapters: Those to load.
        console: For which base is taken; None is quiet.
        how: The fields of `Base`.
    """
    if model is None or isinstance(model, (str, Path, ModelSource)):
        return base_for(model, adapters, console, **how)
    unasked = Base()
    given = ["adapters"] if adapters else []
    given += [n for n, v in how.items() if n != "trust_remote_code" and v != getattr(unasked, n)]
    if given:
        raise LorafoldError(
            f"{', '.join(given)}: expected none, because the model is loaded already; pass the"
            " model's name, or give storage, device and revision to lf.load_model, adapters and"
            " allow_other_base to lf.load"
        )
    return LoadedModel(model, how.get("trust_remote_code", False))


def opened(
    model: Base | LoadedModel,
    adapters: Sequence[Saved] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    classify: bool = False,
    reward: bool = False,
    console: Console | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode with saved adapters attached to it, and its tokenizer.

    Args:
        model: As `at_hand` gives it. If the storage of a base is auto, it is the one that the
            adapters were trained on, else bf16 or fp32, whichever the device is faster with.
        adapters: Attached in this order as adapter1, adapter2 ...
        tokenizer: None takes that of the last adapter that has one, else the model's.
        classify: Expect a sequence classifier instead of a language model.
        reward: Expect a reward model instead of a language model.
        console: For notices; None is quiet.

    Raises LorafoldError as the loaders do, and where a model of another kind is found than is
    expected: a language model, a classifier or a reward model.
    """
    console = or_quiet(console)
    if isinstance(model, LoadedModel):
        loaded, trusted = model.model, model.trust_remote_code
        tokenizer = tokenizer or load_tokenizer(str(loaded.name_or_path), None, trusted)
        return loaded, tokenizer if classify else prepared(tokenizer, Sft(), console)
    tokenizer = tokenizer or model.tokenizer(adapters)
    kind, classes = kind_of(model, adapters), known_classes(model, adapters)
    wanted = "a classifier" if classify else REWARD_MODEL if reward else LANGUAGE_MODEL
    if wanted != ("a classifier" if classes else kind):
        what = f"no {wanted.removeprefix('a ')}" if kind == LANGUAGE_MODEL else kind
        hint = "; lorafold score has the scores of rows" if kind == REWARD_MODEL else ""
        trains = "classify" if classify else "reward" if reward else ""
        hint = hint or f"; lorafold train --objective {trains} makes one" * bool(trains)
        raise LorafoldError(
            f"{', '.join(map(str, adapters)) or model.name}: found {what}, expected {wanted} for"
            f" this data or command{hint}"
        )
    objective: Objective = (
        RewardModel(BradleyTerry()) if reward else Sft() if classes is None else Classify(classes)
    )
    tokenizer = prepared(tokenizer, objective, console)
    base = model.stored_as_trained(adapters)
    line = f"{base.name} on {base.where}, {base.loaded_as.why}"
    console.print(line, highlight=False, markup=False)
    loaded, weights = objective.load(base, tokenizer), base.weights()
    for number, one in enumerate(adapters, 1):
        name, other = f"adapter{number}", base.allow_other_base
        load(loaded, one, name, allow_other_base=other, base=weights)
    return loaded, tokenizer


def length_for(
    model: Base | LoadedModel,
    asked: int | None,
    adapters: Sequence[Saved],
    console: Console | None,
    *,
    head: bool = False,
) -> int:
    """The length that rows are cut to: as it was asked for, or as many tokens as usual and as the
    model has positions.

    Raises LorafoldError for a length that was asked for and is beyond its positions.

    Args:
        model: As `at_hand` gives it.
        asked: None where nobody asked for one.
        adapters: Those to load, of which some take positions.
        console: For a line where the positions bound it; None is quiet.
        head: Expect a classifier or a reward model instead of a language model.
    """
    if isinstance(model, LoadedModel):
        found = positions_of(model.model)
    else:
        found = positions_in(model.config(), head, model.trust_remote_code)
    before = sum(one.spec.positions for one in adapters)
    return fitted_length(found, asked, before, or_quiet(console))


def prepared(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> PreTrainedTokenizerBase:
    """The tokenizer, after `Objective.set_up` added what it lacked.

    Args:
        tokenizer: Changed in place.
        objective: The objective that it must suit.
        console: For a notice of what was added.
    """
    if notice := objective.set_up(tokenizer):
        console.print(notice, highlight=False, markup=False)
    return tokenizer
