"""The losses of recipes that were translated from TRL's GRPOConfig are TRL's own."""

import pytest

from lorafold.objectives.options import policy_options
from policy_losses import LONGEST, check_loss_of_trl
from translation_cases import trl_of

LOSSES = [
    {},
    {"loss_type": "grpo", "beta": 0.04},
    {"loss_type": "bnpo", "epsilon": 0.1},
    {"loss_type": "dr_grpo", "scale_rewards": False, "epsilon_high": 0.28},
    {"loss_type": "cispo", "epsilon_high": 1.1, "scale_rewards": "batch"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4},
    {"importance_sampling_level": "sequence"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "luspo", "beta": 0.1},
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_losses_of_translated_recipes_are_those_of_trl(
    settings, tmp_path, tiny_model_dir, monkeypatch
):
    recipe = trl_of(tmp_path, max_completion_length=LONGEST, **settings).recipe
    law, _ = policy_options(recipe.objective, recipe.beta, recipe.objective_options)
    check_loss_of_trl(law, settings, tiny_model_dir("llama"), tmp_path, monkeypatch)
