"""Reward models: a head that scores a text, trained on preferences.

The model is transformers' sequence classifier with one output (PEFT's SEQ_CLS). Its new head is
initialized from the seed, trained in full in fp32, and saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.evaluation import Measured
from lorafold.evaluation.reward_model_scores import reward_figures, scores_of
from lorafold.files.model_card import REWARD
from lorafold.models.classifier import load_classifier, padding_id
from lorafold.objectives.classify import class_loss, head_to_save
from lorafold.objectives.objective import ObjectiveRequest
from lorafold.objectives.preference import PreferenceObjective
from lorafold.resolve import Base
from lorafold.resolve.base import LANGUAGE_MODEL, REWARD_MODEL, known_classes, model_kind
from lorafold.training_step.preference_algorithms import BradleyTerry, Scored
from lorafold.training_step.preference_loss import Preferences

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RewardModel(PreferenceObjective):
    outputs = 1
    algorithm: BradleyTerry

    @classmethod
    def of(cls, request: ObjectiveRequest) -> Self:
        objective = super().of(request)
        if known_classes(request.base, request.adapters):
            raise LorafoldError(
                f"{request.start}: found {model_kind(request.base, request.adapters)}, expected"
                f" {REWARD_MODEL}, or {LANGUAGE_MODEL}, to start from"
            )
        return objective

    def load(
        self, base: Base, tokenizer: PreTrainedTokenizerBase, seed: int = 0
    ) -> PreTrainedModel:
        pad = padding_id(tokenizer)
        return load_classifier(base.source, (REWARD,), pad, base.loaded_as, base.where, seed=seed)

    def traced(self, model: Any, inputs: Mapping[str, Tensor], labelled: int) -> Tensor:
        return class_loss(model, inputs)

    def modules_to_save(self, model: PreTrainedModel, spec: Spec, targets: Any) -> tuple[str, ...]:
        return head_to_save(model, spec, targets)

    def record(self) -> dict[str, Any]:
        return {REWARD: True}

    def padding(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return padding_id(tokenizer)

    def guessing(self, labels: Mapping[str, int]) -> float:
        """The loss if all texts have the same score: ln 2 without a margin."""
        return math.log1p(math.exp(self.algorithm.margin))

    def measure(self, loss: Preferences, held_out: Any) -> Measured:
        scores, tokens = scores_of(loss, held_out.examples)
        pairs = Scored(torch.from_numpy(scores), None, torch.from_numpy(tokens))
        figures, losses = reward_figures(scores, tokens), loss.algorithm.loss(pairs)
        return Measured(float(losses.mean()), figures.as_json(), f", {figures.summary}")
