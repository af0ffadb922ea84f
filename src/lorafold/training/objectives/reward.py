"""Reward models: a head that scores a text, trained on preferences.

    r(x, y) = head(h at the last token of the text of prompt x and completion y)

The model is transformers' sequence classifier with one output (PEFT's SEQ_CLS). The head is drawn
from the seed, trained whole in fp32 beside the method's own update, and saved with the adapter. The
loss is the law `Reward` (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafold.core.spec import Spec
from lorafold.data.checking import check_objective
from lorafold.data.sources import Row
from lorafold.data.stored import Rows
from lorafold.errors import LorafoldError
from lorafold.evaluation import Measured
from lorafold.evaluation.rewards import reward_figures, scores_of
from lorafold.files.card import REWARD
from lorafold.models.classifier import (
    LANGUAGE_MODEL,
    REWARD_MODEL,
    kind_of,
    known_classes,
    load_reward_model,
    padding_id,
)
from lorafold.models.sources import ModelSource
from lorafold.recipe.recipe import Recipe
from lorafold.step.preference_laws import Scored, law_of
from lorafold.step.preferences import Preferences
from lorafold.training.objectives.classify import head_to_save
from lorafold.training.objectives.comparing import Comparing
from lorafold.training.objectives.objective import ModelRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RewardModel(Comparing):
    """A head that scores texts; every method trains the whole head too."""

    @property
    def outputs(self) -> int:
        return 1

    def load(self, request: ModelRequest) -> PreTrainedModel:
        return load_reward_model(
            request.source,
            padding_id(request.tokenizer),
            request.storage,
            request.device,
            seed=request.seed,
            trust_remote_code=request.trust_remote_code,
        )

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        return head_to_save(model, spec, targets)

    def record(self) -> dict[str, Any]:
        return {REWARD: True}

    def padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return padding_id(tokenizer)

    def measure(self, loss: Preferences, held_out: Any) -> Measured:
        scores, tokens = scores_of(loss, held_out.examples)
        pairs = Scored(torch.from_numpy(scores), None, torch.from_numpy(tokens))
        found, own = reward_figures(scores, tokens), loss.law.loss(pairs)
        return Measured(float(own.mean()), found.as_json(), f", {found.told}")


def reward(
    recipe: Recipe, rows: Sequence[Row], source: ModelSource, adapters: Sequence[Path]
) -> RewardModel:
    """The objective, with its options.

    Args:
        recipe: Has the options.
        rows: Rows of preferences.
        source: The model.
        adapters: Saved adapters that will be loaded on it.

    Raises LorafoldError for options that the objective does not have, rows of other shapes, and
    a classifier.
    """
    law = law_of(recipe.objective, recipe.beta, recipe.objective_options)
    check_objective(Rows.of(rows).firsts(), recipe.objective)
    if known_classes(source, adapters):
        start = ", ".join(map(str, adapters)) or source.name
        raise LorafoldError(
            f"{start}: found {kind_of(source, adapters)}, expected {REWARD_MODEL}, or"
            f" {LANGUAGE_MODEL}, to start from"
        )
    return RewardModel(law)
