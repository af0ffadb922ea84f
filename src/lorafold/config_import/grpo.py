"""Converts the keys of TRL's GRPOConfig and RLOOConfig that its other trainers don't have, as of
TRL 1.16: loss, options, sampling and batch. axolotl's `trl` block has these keys too.

With one update per step, importance ratios are 1 and bounds on them have no effect. TRL's batch
counts the completions of one process; lorafold's batch counts prompts, each with a group of
completions.
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
    changed,
    choice,
    mapped,
    read_with,
    rejection,
    static_rows,
    to_field,
    to_options,
    unmapped,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import boolean, integer, names, number

# by loss_type of the clipped surrogate: lorafold's average
AVERAGES = {
    "dapo": "tokens",
    "bnpo": "tokens",
    "grpo": "per-sequence",
    "dr_grpo": "longest",
    "luspo": "sums",
}
# `scale_rewards` may also be true or false
SCALES = {"true": "group", "batch": "batch", "false": "none"}
NO_LIMIT = "no limit"  # for a file without a completion length
MAX_NEW = 256  # tokens of a completion if there is no limit
PROMPT = 1024  # tokens of a prompt if the file sets none
NO_DROPOUT = "lorafold samples completions and trains on them without dropout"
FULL_SAMPLING = "lorafold samples completions from all tokens"
SUM_FIRST = "lorafold sums rewards before it normalizes them"
RATIOS = "with one update per step, every importance ratio is 1"
FUNCTION = "FILE.py:FUNCTION"
AS_TEXT = (
    "for prompts of messages, TRL passes completions to a reward as lists of messages, lorafold as"
    " text: replace completion[0]['content'] by completion"
)


def is_leave_one_out(settings: ToolSettings) -> bool:
    """Whether the settings are for RLOO, which has no loss_type."""
    return "loss_type" not in settings.defaults


def objective_of(settings: ToolSettings) -> str:
    if is_leave_one_out(settings):
        return "rloo"
    if settings["loss_type"] == "cispo":
        return "cispo"
    return "gspo" if settings["importance_sampling_level"] == "sequence" else "grpo"


def loss_type(value: Any, settings: ToolSettings) -> Outcome:
    """For cispo, TRL's `epsilon_high` is the upper bound of the importance ratio, which is 1 +
    clip_high in lorafold.
    """
    if value in ("sapo", "vespo"):
        raise rejection(value, "lorafold does not support this loss")
    options: dict[str, Any] = {"average": AVERAGES.get(choice(value, *AVERAGES, "cispo"), "tokens")}
    if value == "cispo":
        bound = clip_high(settings)
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
    if choice(value, "token", "sequence") == "sequence" and objective_of(settings) == "cispo":
        raise rejection(value, "lorafold's cispo has one ratio per token")
    return read_with("loss_type")


def clip_high(settings: ToolSettings) -> float:
    return settings.read("epsilon" if settings["epsilon_high"] is None else "epsilon_high", number)


def beta(value: Any, settings: ToolSettings) -> Outcome:
    if not (coefficient := number(value)):
        return mapped("no KL to a reference")
    why = ""
    if is_leave_one_out(settings):
        why = (
            "TRL subtracts the KL of a completion from its reward; lorafold adds the KL of each"
            " token to the loss"
        )
    elif objective_of(settings) == "gspo" or not settings.is_on("use_bias_correction_kl"):
        why = "lorafold multiplies each token's KL by its importance ratio for an unbiased gradient"
    return changed(why, beta=coefficient)


def _sync_ref_model(value: Any, settings: ToolSettings) -> Outcome | None:
    if boolean(value) and settings.read("beta", number):
        raise rejection(value, "lorafold's reference is never updated")
    return None if boolean(value) else OFF


def _mask_truncated(value: Any, settings: ToolSettings) -> Outcome:
    masked = boolean(value)
    same = not masked or settings["loss_type"] in ("dapo", "bnpo", "cispo")
    why = "TRL includes truncated completions in the mean, with a loss of 0; lorafold excludes them"
    truncated = "masked" if masked else "counted"
    return changed("" if same else why, objective_options={"truncated": truncated})


def _completion_length(value: Any, settings: ToolSettings) -> Outcome:
    longest, prompt, remarks = settings.config.get("max_completion_length", value), PROMPT, []
    if longest in (None, NO_LIMIT):
        longest = MAX_NEW
        remarks.append(f"TRL has no limit on completions, lorafold limits them to {MAX_NEW} tokens")
    if settings["max_prompt_length"] is None:
        remarks.append(f"TRL has no limit on prompts, lorafold rejects more than {PROMPT} tokens")
    else:
        prompt = settings.read("max_prompt_length", integer)
    longest = integer(longest)
    options = {"max_new_tokens": longest}
    return changed("; ".join(remarks), objective_options=options, max_length=longest + prompt)


def _num_iterations(value: Any, settings: ToolSettings) -> Outcome:
    updates = integer(value)
    if updates == 1:
        return mapped("one update per step")
    return changed(
        f"a lorafold step makes {updates} updates, a TRL step one: divide all steps by {updates}",
        objective_options={"updates": updates},
    )


def sampling_option(*neutral: float) -> Reader:
    differs = changed(f"{FULL_SAMPLING}, the distribution that it trains")
    return lambda value, settings: mapped(FULL_SAMPLING) if number(value) in neutral else differs


def bound_of_ratios(least: float) -> Reader:
    """A reader for a bound on importance ratios, which has no effect because ratios are 1."""

    def read(value: Any, settings: ToolSettings) -> Outcome:
        if number(value) < least:
            raise LorafoldError(f"found {value!r}, expected {least:g} or more")
        if integer(settings["num_iterations"] or 1) != 1:
            raise rejection(value, "with num_iterations above 1, lorafold has no such bound")
        return changed(f"lorafold has no such bound; {RATIOS}")

    return read


def _reward_funcs(value: Any, settings: ToolSettings) -> Outcome:
    functions, given = names(value), settings["reward_weights"]
    if not functions:
        return unmapped(f"pass a reward function as --reward {FUNCTION}", f"--reward {FUNCTION}")
    if models := [name for name in functions if "/" in name]:
        raise LorafoldError(
            f"found {models[0]!r}, a reward model, but lorafold's reward models are adapters,"
            " trained with --objective reward and passed as --reward adapter:DIR"
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
        if module and module.split(".")[0] not in ("trl", "axolotl"):
            rewards.append(f"{scale}{module.replace('.', '/')}.py:{function}")
        else:
            others.append(name)
            flags.append(f"--reward {scale}{FUNCTION}")
    remark = f"no file for {', '.join(others)}: write your own function; " if others else ""
    fields = {"objective_options": {"rewards": rewards}} if rewards else {}
    return Outcome("changed" if rewards else "left", fields, f"{remark}{AS_TEXT}", " ".join(flags))


def count(key: str, settings: ToolSettings, least: int = 1) -> int:
    value = settings.read(key, integer)
    if value < least:
        raise LorafoldError(f"{key}: found {value}, expected {least} or more")
    return value


def batch_sizes(settings: ToolSettings) -> tuple[int, int, int]:
    """(completions per optimizer step of one process, completions per prompt, prompts per step)."""
    micro = count("per_device_train_batch_size", settings)
    completions = micro * count("gradient_accumulation_steps", settings)
    size = count("num_generations", settings, 2)
    return completions, size, ceil(completions / size)


def batch(value: Any, settings: ToolSettings) -> Outcome:
    completions, size, rows = batch_sizes(settings)
    if completions == rows * size:
        return mapped(f"{completions} completions per process, {size} per prompt", batch=rows)
    return changed(
        f"{completions} completions per process are not a multiple of {size} per prompt: for N"
        f" processes pass --batch N*{completions}/{size}",
        batch=rows,
    )


def accumulation(value: Any, settings: ToolSettings) -> Outcome:
    steps, rows = count("gradient_accumulation_steps", settings), batch_sizes(settings)[2]
    why = "lorafold's micro-batches contain whole groups of completions" if rows % steps else ""
    return changed(why, accumulate=gcd(rows, steps))


def updates_per_sample(factor: str) -> Reader:
    """A reader for the number of updates per sample. `factor` is the key of the micro-batch size if
    the value counts completions; empty if it counts micro-batches.
    """

    def read(value: Any, settings: ToolSettings) -> Outcome:
        sampled = integer(value) / (count(factor, settings) if factor else 1)
        if sampled <= count("gradient_accumulation_steps", settings):
            return mapped("each step trains on the completions that it samples")
        return changed("TRL makes several updates per sample; for that, set mini_batches")

    return read


REFERENCE: Table = {"sync_ref_model": _sync_ref_model, **static_rows("grpo_reference")}
SHARED: Table = {
    "reward_funcs": (_reward_funcs, ()),
    "reward_weights": lambda value, settings: (
        mapped("part of the rewards")
        if names(settings["reward_funcs"] or ())
        else unmapped("put each weight before its reward, as in --reward 0.5*FILE.py:FUNCTION")
    ),
    "max_completion_length": (_completion_length, 512),
    "epsilon": (
        lambda value, settings: (
            None
            if objective_of(settings) == "cispo"
            else mapped(objective_options={"clip": number(value), "clip_high": clip_high(settings)})
        ),
        0.2,
    ),
    "epsilon_high": lambda value, settings: read_with(
        "loss_type" if objective_of(settings) == "cispo" else "epsilon"
    ),
    "num_iterations": _num_iterations,
    "steps_per_generation": updates_per_sample(""),
    "generation_batch_size": updates_per_sample("per_device_train_batch_size"),
    "temperature": lambda value, settings: (
        mapped() if number(value) == 1 else to_options("temperature")(value, settings)
    ),
    "top_p repetition_penalty": sampling_option(1),
    "top_k": sampling_option(0, -1),
    "min_p": sampling_option(0),
    "chat_template_kwargs": to_field("template_kwargs"),
    "mask_truncated_completions": (_mask_truncated, False),
    **REFERENCE,
    **static_rows("policies"),
}
GRPO: Table = {
    **SHARED,
    "loss_type": (loss_type, "dapo"),
    "importance_sampling_level": (importance_sampling_level, "token"),
    "beta": (beta, 0.0),
    "scale_rewards": (
        to_options(
            "scale", lambda value: choice(SCALES.get(str(value).lower(), value), *SCALES.values())
        ),
        "group",
    ),
    "delta": bound_of_ratios(1),
    "off_policy_mask_threshold": bound_of_ratios(0),
    **static_rows("grpo"),
}
RLOO: Table = {
    **SHARED,
    "num_generations": (
        lambda value, settings: mapped(
            objective="rloo", objective_options={"group": integer(value)}
        ),
        2,
    ),
    "beta": (beta, 0.05),
    **static_rows("rloo"),
}
