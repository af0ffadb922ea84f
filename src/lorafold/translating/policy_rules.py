"""The rules of TRL's GRPOConfig and RLOOConfig, apart from what all trainers have: one table for
each, with the defaults of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating import policies, policy_batches
from lorafold.translating.convert import names, number
from lorafold.translating.no_counterpart import LOGGING, MEMORY, NUMBERS
from lorafold.translating.policies import drawn_plainly
from lorafold.translating.rules import (
    Outcome,
    Rule,
    Settings,
    all_without,
    left,
    refusing,
    taken,
    to,
    unless,
    without,
)

PLACE = "FILE.py:FUNCTION"
INSTALLED = ("trl", "axolotl")  # packages whose modules are no files of the user
TEXTS = (
    "TRL gives completions of prompts that are messages as lists of messages; here they are texts,"
    " and so completion[0]['content'] is completion"
)
NO_PART = "tokens count alike here, and entropy has no part in the loss"
STAYS = "lorafold's reference never moves"


def weights_of(settings: Settings, n: int) -> Sequence[float]:
    """The weights of n reward functions, 1 without `reward_weights`. LorafoldError for others than
    n.
    """
    given = settings["reward_weights"]
    if given is None:
        return [1.0] * n
    found = given if isinstance(given, list | tuple) else [given]
    if len(found) != n:
        raise LorafoldError(f"found {n} functions and {len(found)} reward_weights, one for each")
    return [number(one) for one in found]


def reward_funcs(value: Any, settings: Settings) -> Outcome:
    """`reward_funcs` become the rewards; those that are no functions of a file are left.

    LorafoldError for a model that scores.
    """
    found = names(value)
    if not found:
        return left(f"pass what judges completions as --reward {PLACE}", f"--reward {PLACE}")
    if models := [name for name in found if "/" in name]:
        raise LorafoldError(
            f"found {models[0]!r}, a model that scores, but lorafold's rewards are functions,"
            " patterns, schemas and verifiers"
        )
    rewards, others, flags = [], [], []
    for name, weight in zip(found, weights_of(settings, len(found)), strict=True):
        scale = "" if weight == 1 else f"{weight:.12g}*"
        module, _, function = name.rpartition(".")
        if module and module.split(".")[0] not in INSTALLED:
            rewards.append(f"{scale}{module.replace('.', '/')}.py:{function}")
        else:
            others.append(name)
            flags.append(f"--reward {scale}{PLACE}")
    said = [TEXTS]
    if others:
        said.insert(0, f"no file of yours has {', '.join(others)}: write a function")
    fields = {"objective_options": {"rewards": rewards}} if rewards else {}
    return Outcome("changed" if rewards else "left", fields, "; ".join(said), " ".join(flags))


def reward_weights(value: Any, settings: Settings) -> Outcome:
    """`reward_weights` are read with `reward_funcs`, without which they are left."""
    if names(settings["reward_funcs"] or ()):
        return taken("they are part of the rewards")
    return left("write each before its reward, as in --reward 0.5*FILE.py:FUNCTION")


def reward_clip_range(value: Any, settings: Settings) -> Outcome:
    """`reward_clip_range` has no counterpart: LorafoldError, as rewards would be others."""
    raise LorafoldError(f"found {value!r}, but rewards count as they are: clip in the function")


SHARED: tuple[Rule, ...] = (
    Rule("reward_funcs", reward_funcs, ()),
    Rule("reward_weights", reward_weights),
    Rule("max_completion_length", policies.completion_length, 512),
    Rule("epsilon", policies.epsilon, 0.2),
    Rule("epsilon_high", policies.epsilon_high),
    Rule("num_iterations", policies.num_iterations),
    Rule("steps_per_generation", policy_batches.draws_for("")),
    Rule("generation_batch_size", policy_batches.draws_for("per_device_train_batch_size")),
    Rule("temperature", drawn_plainly(1)),
    Rule("top_p", drawn_plainly(1)),
    Rule("top_k", drawn_plainly(0, -1)),
    Rule("min_p", drawn_plainly(0)),
    Rule("repetition_penalty", drawn_plainly(1)),
    Rule("generation_kwargs", without("completions are drawn at temperature 1 among all tokens")),
    Rule("chat_template_kwargs", to("template_kwargs")),
    Rule("mask_truncated_completions", policies.mask_truncated, False),
    Rule("sync_ref_model", policies.needs_reference(STAYS)),
    *(Rule(key, lambda value, settings: taken("it is read with sync_ref_model"))
      for key in ("ref_model_mixup_alpha", "ref_model_sync_steps")),
    Rule("disable_dropout", lambda value, settings: taken("there is no dropout here")),
    Rule("num_generations_eval",
        without("held-out prompts have one completion each, and their reward its interval")),
    Rule("vllm_structured_outputs_regex", refusing("completions are drawn among all tokens")),
    Rule("vllm_guided_decoding_regex", refusing("completions are drawn among all tokens")),
    *all_without(policies.OWN_DRAWS, "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode"
        " vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout"
        " vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length"
        " vllm_tensor_parallel_size vllm_importance_sampling_correction"
        " vllm_importance_sampling_mode vllm_importance_sampling_clip_max"
        " vllm_importance_sampling_clip_min vllm_importance_sampling_cap ds3_gather_for_generation"
        " use_transformers_continuous_batching transformers_continuous_batching_config"
        " use_transformers_paged cache_implementation"),
    *all_without(LOGGING, "log_completions log_multimodal num_completions_to_print"
        " log_unique_prompts log_completions_hub_repo"),
    *all_without(MEMORY, "pad_to_multiple_of"),
)  # fmt: skip

GRPO: tuple[Rule, ...] = (
    Rule("loss_type", policies.loss_type, "dapo"),
    Rule("importance_sampling_level", policies.importance_sampling_level, "token"),
    Rule("num_generations", policies.group, 8),
    Rule("beta", policies.beta, 0.0),
    Rule("use_bias_correction_kl", lambda value, settings: taken("it is read with beta"), True),
    Rule("scale_rewards", policies.scale_rewards, "group"),
    Rule("multi_objective_aggregation", policies.aggregation),
    Rule("delta", policies.bound_of_ratios(1)),
    Rule("off_policy_mask_threshold", policies.bound_of_ratios(0)),
    Rule("top_entropy_quantile", unless(1, NO_PART)),
    Rule("entropy_coef", unless(0, NO_PART)),
    Rule("use_adaptive_entropy", refusing(NO_PART)),
    *(Rule(key, lambda value, settings: None)
      for key in ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
                  "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
                  "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")),
    Rule("max_tool_calling_iterations",
        without("a completion is one turn here, without tools that answer")),
    *all_without(NUMBERS, "cast_lm_head_to_fp32 use_liger_loss"),
    *SHARED,
)  # fmt: skip

RLOO: tuple[Rule, ...] = (
    Rule("num_generations", policies.group, 2),
    Rule("beta", policies.beta, 0.05),
    Rule("normalize_advantages", policies.normalize_advantages, False),
    Rule("reward_clip_range", reward_clip_range),
    *SHARED,
)  # fmt: skip
