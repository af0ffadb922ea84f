"""Loading of the `model` and `adapters` arguments of public functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.adapter import load_all
from lorafold.api.arguments import as_paths, console_or_quiet
from lorafold.api.options import Paths
from lorafold.core.attach import selection_of
from lorafold.core.contexts import prepare_model
from lorafold.errors import LorafoldError
from lorafold.files.terminal import print_lines
from lorafold.models.loading import recorded_storage
from lorafold.models.positions import positions_in, positions_of
from lorafold.models.quantizations import UNQUANTIZED
from lorafold.models.sources import ModelSource, name_of_base, source_of
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.classify import Classify
from lorafold.objectives.objective import Objective
from lorafold.objectives.reward import RewardModel
from lorafold.objectives.sft import Sft
from lorafold.peft.adapter_directory import SavedAdapter, open_all
from lorafold.recipe.resolve_settings import fit_length, spec_of
from lorafold.resolve import Base, base_for
from lorafold.resolve.base import LANGUAGE_MODEL, REWARD_MODEL, known_classes, model_kind
from lorafold.training_step.preference_algorithms import BradleyTerry

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.recipe.recipe import Recipe


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
) -> tuple[Base, tuple[SavedAdapter, ...]]:
    """Does the same as `resolve_base`, but also accepts a loaded model, for which it rejects
    arguments that have no effect.
    """
    if model is None or isinstance(model, (str, Path, ModelSource)):
        return resolve_base(model, adapters, console, **options)
    prepare_model(model)
    unused = [n for n, v in options.items() if n != "trust_remote_code" and v != getattr(Base(), n)]
    unused = [*["adapters"] * bool(as_paths(adapters)), *unused]
    if unused:
        raise LorafoldError(
            f"{', '.join(unused)}: not supported for a model that is already loaded; pass the"
            " model's name instead, or pass storage, device and revision to lf.load_model, and"
            " adapters and allow_other_base to lf.load"
        )
    trusted, where = options.get("trust_remote_code", False), str(model.device)
    source = source_of(model) or name_of_base(model) or "without a name (pass tokenizer)"
    return Base(source, device=where, trust_remote_code=trusted, loaded=model), ()


def loaded_base(
    model: PreTrainedModel, recipe: Recipe, console: Console | None, **options: Any
) -> Base:
    """A loaded model as the base of a training run."""
    base, _ = resolve_model(model, (), console, **options)
    stored = recorded_storage(model) or {"storage": "unknown", "dtype": "unknown"}
    storage, dtype = stored["storage"].partition(" ")[0], stored["dtype"]
    is_set, attached = "storage" in recipe.model_fields_set, selection_of(model).names
    wrong = {
        f"dtype {dtype}": dtype not in UNQUANTIZED,
        f"adapters on it ({', '.join(attached)})": attached,
        f"storage {recipe.storage}": is_set and recipe.storage not in ("auto", storage),
        f"objective {recipe.objective}": OBJECTIVES[recipe.objective].head,
        f"method {recipe.method}": spec_of(recipe).trains_base,
        f"strategy {recipe.strategy}": recipe.strategy != "ddp",
    }
    if found := [text for text, holds in wrong.items() if holds]:
        raise LorafoldError(
            f"model: a loaded model can't be trained with {', '.join(found)}; change this, or pass"
            " the model's name"
        )
    return replace(base, storage=storage, dtype=dtype)


def load_with_adapters(
    model: Base,
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
    tokenizer = tokenizer or model.tokenizer(adapters)
    if (loaded := model.loaded) is not None:
        return loaded, tokenizer if classify else set_up_tokenizer(tokenizer, Sft(), console)
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
    model: Base,
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
    if model.loaded is not None:
        positions = positions_of(model.loaded)
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
