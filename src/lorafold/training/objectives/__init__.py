"""The objectives, in one table: how each turns rows into examples, which model it loads, and which
loss it computes with the model.

    objective = OBJECTIVES["classify"](recipe, rows, source, adapters)
    data = objective.encode(rows, tokenizer, max_length);  model = objective.load(request)
    with objective.loss(model, tokenizer, packing, console) as loss: ...

A run and its loop call these methods and name no objective.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from lorafold.data.sources import Row
from lorafold.models.sources import ModelSource
from lorafold.recipe.recipe import Recipe
from lorafold.step.preference_laws import LAWS
from lorafold.training.objectives.classify import Classify, classify
from lorafold.training.objectives.objective import Data, ModelRequest, Objective
from lorafold.training.objectives.preference import preference
from lorafold.training.objectives.reward import RewardModel, reward
from lorafold.training.objectives.sft import Sft, sft

OBJECTIVES: dict[str, Callable[[Recipe, Sequence[Row], ModelSource, Sequence[Path]], Objective]] = {
    "sft": sft,
    "classify": classify,
    **dict.fromkeys(LAWS, preference),
    "reward": reward,
}

__all__ = ["OBJECTIVES", "Classify", "Data", "ModelRequest", "Objective", "RewardModel", "Sft"]
