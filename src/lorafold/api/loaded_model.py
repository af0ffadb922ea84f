"""Loading the model of a public function: a base model with saved adapters, or a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.adapter import load_all
from lorafold.api.arguments import as_paths, or_quiet
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
    """A loaded model that the caller passed; `trust_remote_code` applies to its tokenizer."""

    model: PreTrainedModel
    trust_remote_code: bool


def base_with(
    model: str | Path | ModelSource | None, adapters: Paths, console: Console | None, **how: Any
) -> tuple[Base, tuple[SavedAdapter, ...]]:
    """The base model (see `base_for`), and the saved adapters, opened but not loaded."""
    saved = open_all(as_paths(adapters))
    return base_for(model, saved, console, **how), saved


def model_with(
    model: str | Path | ModelSource | PreTrainedModel | None,
    adapters: Paths,
    console: Console | None = None,
    **how: Any,
) -> tuple[Base | LoadedModel, tuple[SavedAdapter, ...]]:
    """Like `base_with`, but accepts a loaded model and then rejects arguments that have no effect
    on it.
    """
    if model is None or isinstance(model, (str, Path, ModelSource)):
        return base_with(model, adapters, console, **how)
    unused = [n for n, v in how.items() if n != "trust_remote_code" and v != getattr(Base(), n)]
    if as_paths(adapters):
        unused.insert(0, "adapters")
    if unused:
        raise LorafoldError(
            f"{', '.join(unused)}: not supported for a model that is already loaded; pass the"
            " model's name instead, or pass storage, device and revision to lf.load_model, and"
            " adapters and allow_other_base to lf.load"
        )
    return LoadedModel(model, how.get("trust_remote_code", False)), ()


def load_with_adapters(
    model: Base | LoadedModel,
    adapters: Sequence[SavedAdapter] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    classify: bool = False,
    reward: bool = False,
    console: Console | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode with the saved adapters attached as adapter1, adapter2 ..., and
    its tokenizer, by default the tokenizer of the last adapter that has one. `classify` expects a
    sequence classifier, `reward` a reward model.
    """
    console = or_quiet(console)
    if isinstance(model, LoadedModel):
        loaded, trusted = model.model, model.trust_remote_code
        tokenizer = tokenizer or load_tokenizer(str(loaded.name_or_path), None, trusted)
        return loaded, tokenizer if classify else prepared(tokenizer, Sft(), console)
    tokenizer = tokenizer or model.tokenizer(adapters)
    kind, classes = model_kind(model, adapters), known_classes(model, adapters)
    wanted = "a classifier" if classify else REWARD_MODEL if reward else LANGUAGE_MODEL
    if wanted != ("a classifier" if classes else kind):
        found = f"no {wanted.removeprefix('a ')}" if kind == LANGUAGE_MODEL else kind
        trains = "classify" if classify else "reward" if reward else ""
        hint = f"; train one with lorafold train --objective {trains}" * bool(trains)
        if kind == REWARD_MODEL:
            hint = "; use lorafold score to score rows"
        raise LorafoldError(
            f"{', '.join(map(str, adapters)) or model.name}: found {found}, expected {wanted} for"
            f" this data or command{hint}"
        )
    objective = (
        RewardModel(BradleyTerry()) if reward else Sft() if classes is None else Classify(classes)
    )
    tokenizer = prepared(tokenizer, objective, console)
    base = model.stored_as_trained(adapters)
    print_lines(console, f"{base.name} on {base.where}, {base.loaded_as.reason}")
    loaded, other = objective.load(base, tokenizer), base.allow_other_base
    load_all(loaded, adapters, "adapter", allow_other_base=other, base=base.weights())
    return loaded, tokenizer


def length_for(
    model: Base | LoadedModel,
    asked: int | None,
    adapters: Sequence[SavedAdapter],
    console: Console | None,
    *,
    head: bool = False,
) -> int:
    """The length in tokens to truncate rows to: `asked`, or a default within the positions that
    virtual tokens of adapters leave. `head` is for a classifier or a reward model.
    """
    if isinstance(model, LoadedModel):
        positions = positions_of(model.model)
    else:
        positions = positions_in(model.config(), head, model.trust_remote_code)
    virtual = sum(one.spec.positions for one in adapters)
    return fit_length(positions, asked, virtual, or_quiet(console))


def prepared(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, console: Console
) -> PreTrainedTokenizerBase:
    if message := objective.set_up(tokenizer):
        print_lines(console, message)
    return tokenizer
