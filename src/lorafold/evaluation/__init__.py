"""Evaluation on held-out rows: losses, exact match, preferences and rewards, with 95% intervals."""

from lorafold.evaluation.held_out import held_out_loss
from lorafold.evaluation.intervals import Interval, Z, loss_interval, wilson
from lorafold.evaluation.policy import RewardEvaluation, RewardSettings, evaluate_rewards
from lorafold.evaluation.rows import (
    Answer,
    Evaluation,
    EvaluationSettings,
    Measured,
    evaluate,
    evaluate_classifier,
)

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
