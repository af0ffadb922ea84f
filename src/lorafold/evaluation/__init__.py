"""Evaluation on held-out rows: losses, exact match, preferences and rewards, with 95% intervals."""

from lorafold.evaluation.batched_losses import held_out_loss
from lorafold.evaluation.confidence_intervals import Interval, Z, loss_interval, wilson
from lorafold.evaluation.loss_and_exact_match import (
    Answer,
    Evaluation,
    EvaluationSettings,
    Measured,
    evaluate,
    evaluate_classifier,
)
from lorafold.evaluation.policy_rewards import RewardEvaluation, RewardSettings, evaluate_rewards

__all__ = [
    "Answer",
    "Evaluation",
    "EvaluationSettings",
    "Interval",
    "Measured",
    "RewardEvaluation",
    "RewardSettings",
    "Z",
    "evaluate",
    "evaluate_classifier",
    "evaluate_rewards",
    "held_out_loss",
    "loss_interval",
    "wilson",
]
