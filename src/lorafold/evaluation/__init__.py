"""Evaluation on held-out rows: losses, exact match, preferences and rewards, with 95% intervals."""

from lorafold.evaluation.batched_losses import held_out_loss as held_out_loss
from lorafold.evaluation.loss_and_exact_match import Evaluation as Evaluation
from lorafold.evaluation.loss_and_exact_match import EvaluationSettings as EvaluationSettings
from lorafold.evaluation.loss_and_exact_match import Measured as Measured
from lorafold.evaluation.loss_and_exact_match import evaluate as evaluate
from lorafold.evaluation.policy_rewards import RewardEvaluation as RewardEvaluation
from lorafold.evaluation.policy_rewards import RewardSettings as RewardSettings
from lorafold.evaluation.policy_rewards import evaluate_rewards as evaluate_rewards
