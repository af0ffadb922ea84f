"""How good a model is on held-out rows: losses, exact match and preferences, with intervals."""

from lorafold.evaluation.intervals import Interval, Z, loss_interval, wilson
from lorafold.evaluation.rows import (
    Answer,
    Evaluation,
    Measured,
    evaluate,
    evaluate_classifier,
    held_out_loss,
)

__all__ = [
    "Answer",
    "Evaluation",
    "Interval",
    "Measured",
    "Z",
    "evaluate",
    "evaluate_classifier",
    "held_out_loss",
    "loss_interval",
    "wilson",
]
