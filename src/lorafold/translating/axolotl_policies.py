"""axolotl's `trl` block where `rl` is grpo: its keys are TRL's own, so TRL's rules read them.

In a translation they are called `trl.KEY`. axolotl has TRL 1.8, and hands it the block's
`max_completion_length` also where that is absent: as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorafold.translating import policies
from lorafold.translating.convert import integer
from lorafold.translating.policy_rules import GRPO
from lorafold.translating.rules import (
    Outcome,
    Reader,
    Rule,
    Settings,
    all_without,
    refusing,
    taken,
    unless,
)

BLOCK = "trl"
PREFIX = f"{BLOCK}."
DEFAULTS = {
    "max_completion_length": policies.WITHOUT_LIMIT,
    "use_bias_correction_kl": False,
}
OWN = (
    Rule("rollout_func", refusing("lorafold draws completions itself, of one turn")),
    Rule("replay_buffer_size", refusing("what was drawn is not used again")),
    Rule("reroll_start_fraction", unless(1, "prompts are drawn in their order")),
    Rule("skip_zero_advantage_batches",
        lambda value, settings: taken("groups without a signal are always left out")),
    *all_without(policies.OWN_DRAWS, "use_data_producer async_prefetch prefetch_depth"
        " vllm_sync_interval streaming_partial_batch streaming_min_groups reward_num_workers"
        " replay_recompute_logps reroll_max_groups vllm_lora_sync reward_processing_classes"),
)  # fmt: skip
# `beta` is read with the other keys that may hold it
OF_BLOCK = (
    *(replace(r, default=DEFAULTS.get(r.key, r.default)) for r in GRPO if r.key != "beta"),
    *OWN,
)


def is_policy(settings: Settings) -> bool:
    """Whether the file trains a policy on rewards."""
    return settings["rl"] == "grpo"


def flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file with the keys of its block `trl` as keys `trl.KEY`, where it trains a policy."""
    block = config.get(BLOCK)
    if config.get("rl") != "grpo" or not isinstance(block, Mapping):
        return config
    rest = {key: value for key, value in config.items() if key != BLOCK}
    return rest | {f"{PREFIX}{key}": value for key, value in block.items()}


def beta_key(settings: Settings) -> str | None:
    """The key that holds beta of a policy, the first that the file sets of those that may."""
    may = (f"{PREFIX}beta", "rl_beta", "orpo_alpha")
    return next((key for key in may if settings.given.get(key) is not None), None)


def accumulation(settings: Settings) -> int:
    """The number of micro-batches in a step, which axolotl may also derive from `batch_size`."""
    total = settings["batch_size"]
    if total is not None and settings.given.get("gradient_accumulation_steps") is None:
        return max(1, integer(total) // max(1, settings.read("micro_batch_size", integer)))
    return settings.read("gradient_accumulation_steps", integer)


def as_trl(settings: Settings) -> Settings:
    """The block, with what stands outside of it, as settings of TRL's trainer."""
    key = beta_key(settings)
    given = {
        name.removeprefix(PREFIX): value
        for name, value in settings.given.items()
        if name.startswith(PREFIX)
    }
    outside = {
        "beta": 0.0 if key is None else settings.given[key],
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": accumulation(settings),
        "max_prompt_length": settings["sequence_len"],
    }
    present = {name: value for name, value in given.items() if value is not None}
    return Settings(present | outside, {rule.key: rule.default for rule in OF_BLOCK})


def of_policy(reader: Reader, otherwise: Reader) -> Reader:
    """A reader of TRL's settings where the file trains a policy, and another where it does not."""
    return lambda value, settings: (
        reader(value, as_trl(settings)) if is_policy(settings) else otherwise(value, settings)
    )


def nothing(value: Any, settings: Settings) -> Outcome | None:
    """The reader of a key without an effect."""
    return None


RULES = tuple(
    Rule(f"{PREFIX}{rule.key}", of_policy(rule.reader, nothing), rule.default) for rule in OF_BLOCK
)
