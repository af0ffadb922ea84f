"""GRPO and RLOO of axolotl and TRL as recipes: what differs is reported."""


import pytest

from lorafold.config_import import axolotl_objectives
from translation_cases import grpo_of, keys, remark, translated, trl_of

pytestmark = pytest.mark.usefixtures("unestimated")


def test_axolotls_block_has_trls_keys_and_its_own():
    blocks = {rule.key for rule in axolotl_objectives.OF_BLOCK}
    assert {"num_generations", "rollout_func", "use_liger_loss", "vllm_lora_sync"} <= blocks


def test_rloo_and_a_file_of_no_model(tmp_path):
    found = trl_of(tmp_path, "trl-rloo", normalize_advantages=True)
    assert (found.recipe.objective, found.recipe.beta) == ("rloo", 0.05)
    assert found.recipe.objective_options["group"] == 2
    assert found.recipe.objective_options["scale"] == "batch"
    assert found.recipe.batch == 4
    assert "off its reward" in remark(found, "beta")
    assert translated(tmp_path, "num_generations: 4\nreward_clip_range:").tool == "TRL's RLOO"
    alone = translated(tmp_path, "num_generations: 4\nloss_type: grpo")
    assert alone.recipe.method == "lora"
    assert "names no model" in remark(alone, "use_peft")
    assert "--reward FILE.py:FUNCTION" in alone.command()


def test_where_axolotls_beta_stands(tmp_path):
    assert grpo_of(tmp_path).recipe.beta is None
    assert grpo_of(tmp_path, {"rl_beta": 0.2}).recipe.beta == 0.2
    assert grpo_of(tmp_path, {"rl_beta": 0.2}, beta=0.0).recipe.beta is None
    assert grpo_of(tmp_path, {"rl_beta": 0.2}, beta=0.3).recipe.beta == 0.3
    found = grpo_of(tmp_path, max_completion_length=None)
    assert "no limit" in remark(found, "trl.max_completion_length")
    assert found.recipe.max_length == 512 + found.recipe.objective_options["max_new_tokens"]
    batched = grpo_of(tmp_path, {"batch_size": 32, "micro_batch_size": 8}).recipe
    assert (batched.batch, batched.accumulate) == (4, 4)


DRAWN_OTHERWISE = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.1,
                   "repetition_penalty": 1.1, "steps_per_generation": 4, "delta": 1.5,
                   "off_policy_mask_threshold": 0.5}  # fmt: skip


def test_what_means_something_else_here_is_told(tmp_path):
    assert keys(trl_of(tmp_path, **DRAWN_OTHERWISE), "changed") - {"reward_funcs"} == set(
        DRAWN_OTHERWISE
    )
    same = {"temperature": 1.0, "top_p": 1, "top_k": -1, "min_p": 0, "num_iterations": 1,
            "top_entropy_quantile": 1.0, "entropy_coef": 0}  # fmt: skip
    assert keys(trl_of(tmp_path, **same), "changed") == {"reward_funcs"}
    plain = trl_of(tmp_path, beta=0.1, use_bias_correction_kl=False)
    assert "by its ratio" in remark(plain, "beta")
    assert remark(trl_of(tmp_path, beta=0.1), "beta") == ""
    assert trl_of(tmp_path, sync_ref_model=True).recipe.beta is None  # there is no reference
    several = trl_of(tmp_path, num_iterations=4)
    assert several.recipe.objective_options["updates"] == 4
    assert "steps count draws here" in remark(several, "num_iterations")
