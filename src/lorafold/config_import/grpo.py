"""The keys of TRL's GRPOConfig and RLOOConfig that other trainers lack: loss, options, sampling and
batch, as of TRL 1.16. axolotl's `trl` block has these keys too.

With one update per step, ratios are 1 and bounds on them have no effect. TRL's batch counts the
completions of one process, lorafold's the prompts, each with a group of completions.
"""

from __future__ import annotations

from math import ceil, gcd
from typing import Any

from lorafold.config_import.rules import (
    OFF,
    Outcome,
    Reader,
    Table,
    ToolSettings,
    cases,
    changed,
    choice,
    left,
    read_with,
    refused,
    refusing,
    switch,
    taken,
    to,
    to_options,
    unless,
)
from lorafold.config_import.unsupported import LOGGING, MEMORY, NUMBERS
from lorafold.errors import LorafoldError
from lorafold.foreign_options import boolean, integer, names, number

# lorafold's average, by loss_type of the clipped surrogate
AVERAGES = {
    "dapo": "tokens",
    "bnpo": "tokens",
    "grpo": "per-sequence",
    "dr_grpo": "longest",
    "luspo": "sums",
}
# `scale_rewards` may also be true or false
SCALES = {"true": "group", "batch": "batch", "false": "none"}
WITHOUT_LIMIT = "no limit"  # for a file without a completion length
LIMIT = 256  # tokens of a completion then
BESIDE = 1024  # tokens of a prompt if the file sets none
NO_DROPOUT = "lorafold samples completions and trains on them without dropout"
OWN_DRAWS = "lorafold samples completions in the training process, from the weights that it trains"
PLAINLY = "lorafold samples completions at temperature 1 from all tokens"
SUMMED = "lorafold sums rewards before it normalizes them"
NO_PART = "lorafold gives all tokens the same weight, and its loss has no entropy term"
RATIOS = "with one update per step, every importance ratio is 1"
PLACE = "FILE.py:FUNCTION"
INSTALLED = ("trl", "axolotl")  # packages whose modules are not the user's files
TEXTS = (
    "for prompts of messages, TRL passes completions to a reward as lists of messages, lorafold as"
    " text: replace completion[0]['content'] by completion"
)


def is_leave_one_out(settings: ToolSettings) -> bool:
    """Whether the settings are RLOO's, which have no loss_type."""
    return "loss_type" not in settings.defaults


def objective_of(settings: ToolSettings) -> str:
    if is_leave_one_out(settings):
        return "rloo"
    if settings["loss_type"] == "cispo":
        return "cispo"
    return "gspo" if settings["importance_sampling_level"] == "sequence" else "grpo"


def loss_type(value: Any, settings: ToolSettings) -> Outcome:
    """`loss_type` becomes the objective and its average; for cispo, TRL's `epsilon_high` bounds the
    ratio itself.
    """
    if value in ("sapo", "vespo"):
        raise refused(value, "lorafold does not support this loss")
    options: dict[str, Any] = {"average": AVERAGES.get(choice(value, *AVERAGES, "cispo"), "tokens")}
    if value == "cispo":
        bound = upper(settings)
        if bound <= 1:
            raise LorafoldError(
                f"found 'cispo' and {bound:g} as epsilon_high, but with cispo it is the upper bound"
                " of the importance ratio itself; expected more than 1, for example 5"
            )
        options["clip_high"] = float(f"{bound - 1:.12g}")
    why = "TRL averages over the tokens of a micro-batch, lorafold over the tokens of the step"
    return changed(
        why if value == "bnpo" else "", objective=objective_of(settings), objective_options=options
    )


def importance_sampling_level(value: Any, settings: ToolSettings) -> Outcome:
    """`importance_sampling_level` is read with `loss_type`; sequence means GSPO."""
    if choice(value, "token", "sequence") == "sequence" and objective_of(settings) == "cispo":
        raise refused(value, "lorafold's cispo has one ratio per token")
    return read_with("loss_type")


def upper(settings: ToolSettings) -> float:
    return settings.read("epsilon" if settings["epsilon_high"] is None else "epsilon_high", number)


def beta(value: Any, settings: ToolSettings) -> Outcome:
    if not (coefficient := number(value)):
        return taken("no KL to a reference")
    why = ""
    if is_leave_one_out(settings):
        why = (
            "TRL subtracts the KL of a completion from its reward; lorafold adds the KL of each"
            " token to the loss"
        )
    elif objective_of(settings) == "gspo" or not settings.on("use_bias_correction_kl"):
        why = "lorafold multiplies each token's KL by its importance ratio for an unbiased gradient"
    return changed(why, beta=coefficient)


def _sync_ref_model(value: Any, settings: ToolSettings) -> Outcome | None:
    if boolean(value) and settings.read("beta", number):
        raise refused(value, "lorafold's reference is never updated")
    return None if boolean(value) else OFF


def _mask_truncated(value: Any, settings: ToolSettings) -> Outcome:
    masked = boolean(value)
    same = not masked or settings["loss_type"] in ("dapo", "bnpo", "cispo")
    why = "TRL includes truncated completions in the mean, with a loss of 0; lorafold excludes them"
    truncated = "masked" if masked else "counted"
    return changed("" if same else why, objective_options={"truncated": truncated})


def _completion_length(value: Any, settings: ToolSettings) -> Outcome:
    longest, prompt, remarks = settings.given.get("max_completion_length", value), BESIDE, []
    if longest in (None, WITHOUT_LIMIT):
        longest = LIMIT
        remarks.append(f"TRL has no limit on completions, lorafold limits them to {LIMIT} tokens")
    if settings["max_prompt_length"] is None:
        remarks.append(f"TRL has no limit on prompts, lorafold rejects more than {BESIDE} tokens")
    else:
        prompt = settings.read("max_prompt_length", integer)
    longest = integer(longest)
    options = {"max_new_tokens": longest}
    return changed("; ".join(remarks), objective_options=options, max_length=longest + prompt)


def _num_iterations(value: Any, settings: ToolSettings) -> Outcome:
    updates = integer(value)
    if updates == 1:
        return taken("one update per step")
    if is_leave_one_out(settings):
        raise refused(value, "lorafold's rloo does not clip ratios")
    return changed(
        f"a lorafold step makes {updates} updates, a TRL step one: divide max_steps by {updates}",
        objective_options={"updates": updates},
    )


def drawn_plainly(*neutral: float) -> Reader:
    bent = changed(f"{PLAINLY}, the distribution that it trains")
    return lambda value, settings: taken(PLAINLY) if number(value) in neutral else bent


def bound_of_ratios(least: float) -> Reader:
    """Read a bound on ratios of at least `least`, which has no effect if ratios are 1."""

    def read(value: Any, settings: ToolSettings) -> Outcome:
        if number(value) < least:
            raise LorafoldError(f"found {value!r}, expected {least:g} or more")
        if integer(settings["num_iterations"] or 1) != 1:
            raise refused(value, "with num_iterations above 1, lorafold has no such bound")
        return changed(f"lorafold has no such bound; {RATIOS}")

    return read


def _reward_funcs(value: Any, settings: ToolSettings) -> Outcome:
    functions, given = names(value), settings["reward_weights"]
    if not functions:
        return left(f"pass a reward function as --reward {PLACE}", f"--reward {PLACE}")
    if models := [name for name in functions if "/" in name]:
        raise LorafoldError(
            f"found {models[0]!r}, a reward model, but lorafold supports functions, patterns,"
            " schemas and verifiers as rewards"
        )
    weights = given if isinstance(given, list | tuple) else [given]
    weights = [1.0] * len(functions) if given is None else weights
    if len(weights) != len(functions):
        counts = f"{len(functions)} functions and {len(weights)} reward_weights"
        raise LorafoldError(f"found {counts}, expected one weight per function")
    rewards, others, flags = [], [], []
    for name, weight in zip(functions, map(number, weights), strict=True):
        scale = "" if weight == 1 else f"{weight:.12g}*"
        module, _, function = name.rpartition(".")
        if module and module.split(".")[0] not in INSTALLED:
            rewards.append(f"{scale}{module.replace('.', '/')}.py:{function}")
        else:
            others.append(name)
            flags.append(f"--reward {scale}{PLACE}")
    remark = f"no file for {', '.join(others)}: write your own function; " if others else ""
    fields = {"objective_options": {"rewards": rewards}} if rewards else {}
    return Outcome("changed" if rewards else "left", fields, f"{remark}{TEXTS}", " ".join(flags))


def count(key: str, settings: ToolSettings, least: int = 1) -> int:
    value = settings.read(key, integer)
    if value < least:
        raise LorafoldError(f"{key}: found {value}, expected {least} or more")
    return value


def sizes(settings: ToolSettings) -> tuple[int, int, int]:
    """(completions per optimizer step of one process, completions per prompt, prompts per step)."""
    micro = count("per_device_train_batch_size", settings)
    completions = micro * count("gradient_accumulation_steps", settings)
    size = count("num_generations", settings, 2)
    return completions, size, ceil(completions / size)


def batch(value: Any, settings: ToolSettings) -> Outcome:
    completions, size, rows = sizes(settings)
    if completions == rows * size:
        return taken(f"{completions} completions per process, {size} per prompt", batch=rows)
    return changed(
        f"{completions} completions per process are not a multiple of {size} per prompt: for N"
        f" processes pass --batch N*{completions}/{size}",
        batch=rows,
    )


def accumulation(value: Any, settings: ToolSettings) -> Outcome:
    steps, rows = count("gradient_accumulation_steps", settings), sizes(settings)[2]
    why = "lorafold's micro-batches contain whole groups of completions" if rows % steps else ""
    return changed(why, accumulate=gcd(rows, steps))


def draws_for(factor: str) -> Reader:
    """Read `steps_per_generation` (in micro-batches) or `generation_batch_size` (in completions):
    how many updates learn from one sample. `factor` is the key of the micro-batch size; empty for
    1.
    """

    def read(value: Any, settings: ToolSettings) -> Outcome:
        sampled = integer(value) / (count(factor, settings) if factor else 1)
        if sampled <= count("gradient_accumulation_steps", settings):
            return taken("each step trains on the completions that it samples")
        return changed("TRL makes several updates per sample; lorafold samples for each update")

    return read


REFERENCE: Table = {
    "sync_ref_model": _sync_ref_model,
    "ref_model_mixup_alpha ref_model_sync_steps": read_with("sync_ref_model"),
}
SHARED: Table = {
    "reward_funcs": (_reward_funcs, ()),
    "reward_weights": lambda value, settings: (
        taken("part of the rewards")
        if names(settings["reward_funcs"] or ())
        else left("put each weight before its reward, as in --reward 0.5*FILE.py:FUNCTION")
    ),
    "max_completion_length": (_completion_length, 512),
    "epsilon": (
        lambda value, settings: (
            None
            if objective_of(settings) in ("rloo", "cispo")
            else taken(objective_options={"clip": number(value), "clip_high": upper(settings)})
        ),
        0.2,
    ),
    "epsilon_high": lambda value, settings: {
        "rloo": None, "cispo": read_with("loss_type")
    }.get(objective_of(settings), read_with("epsilon")),
    "num_iterations": _num_iterations,
    "steps_per_generation": draws_for(""),
    "generation_batch_size": draws_for("per_device_train_batch_size"),
    "temperature top_p repetition_penalty": drawn_plainly(1),
    "top_k": drawn_plainly(0, -1),
    "min_p": drawn_plainly(0),
    "generation_kwargs": PLAINLY,
    "chat_template_kwargs": to("template_kwargs"),
    "mask_truncated_completions": (_mask_truncated, False),
    **REFERENCE,
    "disable_dropout": taken("lorafold trains without dropout"),
    "num_generations_eval": "lorafold samples one completion per held-out prompt and reports the"
    " mean reward with its confidence interval",
    "vllm_structured_outputs_regex vllm_guided_decoding_regex": refusing(
        "lorafold does not support structured outputs in training"
    ),
    "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url"
    " vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port"
    " vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size"
    " vllm_importance_sampling_correction vllm_importance_sampling_mode"
    " vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"
    " vllm_importance_sampling_cap ds3_gather_for_generation cache_implementation"
    " use_transformers_continuous_batching transformers_continuous_batching_config"
    " use_transformers_paged": OWN_DRAWS,
    "log_completions log_multimodal num_completions_to_print log_unique_prompts"
    " log_completions_hub_repo": LOGGING,
    "pad_to_multiple_of": MEMORY,
}
GRPO: Table = {
    **SHARED,
    "loss_type": (loss_type, "dapo"),
    "importance_sampling_level": (importance_sampling_level, "token"),
    "num_generations": (to_options("group", integer), 8),
    "beta": (beta, 0.0),
    "use_bias_correction_kl": (read_with("beta"), True),
    "scale_rewards": (
        to_options(
            "scale", lambda value: choice(SCALES.get(str(value).lower(), value), *SCALES.values())
        ),
        "group",
    ),
    "multi_objective_aggregation": cases(
        {
            "sum_then_normalize": taken("rewards are summed, then normalized"),
            "normalize_then_sum": SUMMED,
        }
    ),
    "delta": bound_of_ratios(1),
    "off_policy_mask_threshold": bound_of_ratios(0),
    "top_entropy_quantile": unless(1, NO_PART),
    "entropy_coef": unless(0, NO_PART),
    "use_adaptive_entropy": refusing(NO_PART),
    "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
    " sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg"
    " vespo_lambda_neg": None,
    "max_tool_calling_iterations": "lorafold samples completions of one turn, without tool calls",
    "cast_lm_head_to_fp32 use_liger_loss": NUMBERS,
}
RLOO: Table = {
    **SHARED,
    "num_generations": (
        lambda value, settings: taken(
            objective="rloo", objective_options={"group": integer(value)}
        ),
        2,
    ),
    "beta": (beta, 0.05),
    "normalize_advantages": (
        switch(
            changed(
                "TRL divides by the standard deviation of the batch's advantages, lorafold by"
                " the standard deviation of the batch's rewards",
                objective_options={"scale": "batch"},
            ),
            taken(objective_options={"scale": "none"}),
        ),
        False,
    ),
    "reward_clip_range": refusing(
        "lorafold does not clip rewards: clip them in the reward function", lambda value: False
    ),
}
