"""Loading of the `model` and `adapters` arguments of public functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.adapter import load_all
from lorafold.api.arguments import as_paths, console_or_quiet
from lorafold.api.options import Paths
from lorafold.errors import LorafoldError
from lorafold.files.terminal import print_lines
from lorafold.models.positions import positions_in, positions_of
from lorafold.models.sources import ModelSource
from lorafold.models.tokenizer import load_tokenizer
from lorafold.objectives.classify import Classify
from lorafold.objectives.objective import Objective
from lorafold.objectives.reward import RewardModel
from lorafold.objectives.sft import Sft
from lorafold.peft.adapter_directory import SavedAdapter, open_all
from lorafold.recipe.resolve_settings import fit_length
from lorafold.resolve import Base, base_for
from lorafold.resolve.base import LANGUAGE_MODEL, REWARD_MODEL, known_classes, model_kind
from lorafold.training_step.preference_algorithms import BradleyTerry

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model that the caller passed. `trust_remote_code` applies to its tokenizer."""

    model: PreTrainedModel
    trust_remote_code: bool


def resolve_base(
    model: str | Path | ModelSource | None, adapters: Paths, console: Console | None, **options: Any
) -> tuple[Base, tuple[SavedAdapter, ...]]:
    """Finds the base model (see `base_for`) and opens the adapters, without loading weights."""
    saved = open_all(as_paths(adapters))
    return base_for(model, saved, console, **options), saved


def resolve_model(
    model: str | Path | ModelSource | PreTrainedModel | None,
    adapters: Paths,
    console: Console | None = None,
    **options: Any,
) -> tuple[Base | LoadedModel, tuple[SavedAdapter, ...]]:
    """Does the same as `resolve_base`, but also accepts a loaded model, for which it rejects
    arguments that have no effect.
    """
    if model is None or isinstance(model, (str, Path, ModelSource)):
        return resolve_base(model, adapters, console, **options)
    unused = [n for n, v in options.items() if n != "trust_remote_code" and v != getattr(Base(), n)]
    if as_paths(adapters):
        unused.insert(0, "adapters")
    if unused:
        raise LorafoldError(
            f"{', '.join(unused)}: not supported for a model that is already loaded; pass the"
            " model's name instead, or pass storage, device and revision to lf.load_model, and"
            " adapters and allow_other_base to lf.load"
        )
    return LoadedModel(model, options.get("trust_remote_code", False)), ()


def load_with_adapters(
    model: Base | LoadedModel,
    adapters: Sequence[SavedAdapter] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    classify: bool = False,
    reward: bool = False,
    console: Console | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer, and attaches the saved adapters as
    adapter1, adapter2, ... By default, the tokenizer comes from the last adapter that has one. With
    `classify`, the model must be a sequence classifier; with `reward`, a reward model.
    """
    console = console_or_quiet(console)
    if isinstance(model, LoadedModel):
        loaded, trust_remote_code = model.model, model.trust_remote_code
        tokenizer = tokenizer or load_tokenizer(str(loaded.name_or_path), None, trust_remote_code)
        return loaded, tokenizer if classify else set_up_tokenizer(tokenizer, Sft(), console)
    tokenizer = tokenizer or model.tokenizer(adapters)
    kind, classes = model_kind(model, adapters), known_classes(model, adapters)
    expected = "a classifier" if classify else REWARD_MODEL if reward else LANGUAGE_MODEL
    if expected != ("a classifier" if classes else kind):
        actual = f"no {expected.removeprefix('a ')}" if kind == LANGUAGE_MODEL else kind
        wanted = "classify" if classify else "reward" if reward else ""
        hint = f"; train one with lorafold train --objective {wanted}" * bool(wanted)
        if kind == REWARD_MODEL:
            hint = "; use lorafold lab score to score rows"
        raise LorafoldError(
            f"{', '.join(map(str, adapters)) or model.name}: found {actual}, expected {expected}"
            f" for this data or command{hint}"
        )
    objective = (
        RewardModel(BradleyTerry()) if reward else Sft() if classes is None else Classify(classes)
    )
    tokenizer = set_up_tokenizer(tokenizer, objective, console)
    base = model.stored_as_trained(adapters)
    print_lines(console, f"{base.name} on {base.where}, {base.loaded_as.reason}")
    loaded, allow_other_base = objective.load(base, tokenizer), base.allow_other_base
    load_all(loaded, adapters, "adapter", allow_other_base=allow_other_base, base=base.weights())
    return loaded, tokenizer


def truncation_length(
    model: Base | LoadedModel,
    max_length: int | None,
    adapters: Sequence[SavedAdapter],
    console: Console | None,
    *,
    head: bool = False,
) -> int:
    """Returns the number of tokens to truncate rows to: `max_length`, or a default that leaves
    positions for the adapters' virtual tokens. `head` means that the model has a classification
    head, as classifiers and reward models do.
    """
    if isinstance(model, LoadedModel):
        positions = positions_of(model.model)
    else:
        positions = positions_in(model.config(), head, model.trust_remote_code)
    num_virtual = sum(one.spec.positions for one in adapters)
    return fit_length(positions, max_length, num_virtual, console_or_quiet(console))


def set_up_tokenizer(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> PreTrainedTokenizerBase:
    if message := objective.set_up(tokenizer):
        print_lines(console, message)
    return tokenizer
