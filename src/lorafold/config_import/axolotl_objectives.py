"""axolotl's keys for `rl` and `reward_model`: loss, beta, weights, and with `rl: grpo` the block
`trl`, whose keys are TRL's and become `trl.KEY` in a translation.

axolotl passes them to TRL's trainers (1.8), whose losses equal lorafold's except as the remarks
state: supervised terms are averaged over all tokens of a micro-batch there, and over the tokens of
each completion here. If `max_completion_length` is absent, axolotl passes None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorafold.config_import import grpo, trainer
from lorafold.config_import.rules import (
    OFF,
    Outcome,
    Reader,
    Row,
    Rule,
    Table,
    ToolSettings,
    changed,
    choice,
    either,
    flagged,
    is_off,
    left,
    read_with,
    refused,
    refusing,
    table,
    taken,
    to_options,
    unless,
    where,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import boolean, integer, names, number
from lorafold.objectives import OBJECTIVES

BLOCK = "trl"
PREFIX = f"{BLOCK}."
OTHERS = ("ipo", "orpo", "simpo", "kto")
REFUSED = {"gdpo": grpo.SUMMED, "ebft": "lorafold has no energy-based objective"}
DEFAULTS = {"max_completion_length": grpo.WITHOUT_LIMIT, "use_bias_correction_kl": False}
# `beta` is read with the other keys that may contain it
IN_BLOCK: Table = {
    "rollout_func": refusing("lorafold samples completions itself, in one turn"),
    "replay_buffer_size": refusing("lorafold does not reuse completions"),
    "reroll_start_fraction": unless(1, "lorafold uses the prompts in order"),
    "skip_zero_advantage_batches": taken("lorafold always skips groups with zero advantages"),
    "use_data_producer async_prefetch prefetch_depth vllm_sync_interval"
    " streaming_partial_batch streaming_min_groups reward_num_workers"
    " replay_recompute_logps reroll_max_groups vllm_lora_sync"
    " reward_processing_classes": grpo.OWN_DRAWS,
}
OF_BLOCK = (
    *(
        replace(rule, default=DEFAULTS.get(rule.key, rule.default))
        for rule in table(grpo.GRPO)
        if rule.key != "beta"
    ),
    *table(IN_BLOCK),
)


is_policy = where("rl", "grpo")


def is_reward_model(settings: ToolSettings) -> bool:
    return is_off(settings["rl"]) and not is_off(settings["reward_model"])


def objective_of(settings: ToolSettings) -> str | None:
    rl = str(settings["rl"])
    if is_policy(settings):
        return grpo.objective_of(as_trl(settings))
    if rl == "dpo":
        return trainer.DPO_LOSSES.get(next(iter(settings.read("dpo_loss_type", names)), ""))
    return rl if rl in OTHERS else "reward" if is_reward_model(settings) else None


def flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    block = config.get(BLOCK)
    if config.get("rl") != "grpo" or not isinstance(block, Mapping):
        return config
    rest = {key: value for key, value in config.items() if key != BLOCK}
    return rest | {f"{PREFIX}{key}": value for key, value in block.items()}


def accumulation(settings: ToolSettings) -> int:
    total = settings["batch_size"]
    if total is not None and settings.given.get("gradient_accumulation_steps") is None:
        return max(1, integer(total) // max(1, settings.read("micro_batch_size", integer)))
    return settings.read("gradient_accumulation_steps", integer)


def as_trl(settings: ToolSettings) -> ToolSettings:
    given = {k: v for k, v in settings.given.items() if v is not None}
    block = {k.removeprefix(PREFIX): v for k, v in given.items() if k.startswith(PREFIX)}
    outside = {
        "beta": given.get(beta_key(settings), 0.0),
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": accumulation(settings),
        "max_prompt_length": settings["sequence_len"],
    }
    return ToolSettings(block | outside, {rule.key: rule.default for rule in OF_BLOCK})


def beta_key(settings: ToolSettings) -> str:
    may = (f"{PREFIX}beta", "rl_beta", "orpo_alpha")
    return next((key for key in may if settings.given.get(key) is not None), "")


def of_policy(row: Reader, otherwise: Row = None) -> Reader:
    return either(is_policy, lambda value, settings: row(value, as_trl(settings)), otherwise)


def rl(value: Any, settings: ToolSettings) -> Outcome:
    if is_off(value):
        return OFF
    if str(value) in REFUSED:
        raise refused(value, REFUSED[str(value)])
    choice(value, "dpo", *OTHERS, "grpo")
    if settings["sample_packing"]:
        raise LorafoldError(f"found {value!r} and sample_packing, which axolotl does not combine")
    if value not in OTHERS:
        key = "dpo_loss_type" if value == "dpo" else "trl.loss_type"
        return taken(f"{key} determines the objective")
    if value == "simpo" and settings["simpo_gamma"] is None:
        raise LorafoldError("simpo_gamma missing; axolotl has no default, so set a value")
    return changed(trainer.ORPO_TERM if value == "orpo" else "", objective=value)


def _loss_weights(value: Any, settings: ToolSettings) -> Outcome:
    if settings.given.get("dpo_loss_type") is None:
        raise LorafoldError(f"found {value!r} without dpo_loss_type, which axolotl requires")
    return read_with("dpo_loss_type")


def beta_of(key: str) -> Reader:
    """Read one of the keys that may contain beta: the first of `trl`, `rl_beta`, `dpo_beta` and
    `orpo_alpha` that the file sets; for a policy, `trl.beta` comes first.
    """

    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        if is_policy(settings):
            return grpo.beta(value, as_trl(settings)) if key == beta_key(settings) else None
        if objective_of(settings) in (None, "reward"):
            return None
        values = {k: settings.given.get(k) for k in ("trl", "rl_beta", "dpo_beta", "orpo_alpha")}
        values["trl"] = values["trl"].get("beta") if isinstance(values["trl"], dict) else None
        decides = next((k for k, v in values.items() if v is not None), "rl_beta")
        if key != decides:
            return None
        return taken(beta=number(values["trl"] if key == "trl" else value))

    return read


def _num_labels(value: Any, settings: ToolSettings) -> Outcome:
    if integer(value) != 1:
        raise refused(value, "lorafold's reward models output one score")
    return taken("a reward model outputs one score")


def dropout(value: Any, settings: ToolSettings) -> Outcome:
    rate, objective = number(value), objective_of(settings)
    if not rate or objective is None:
        return taken(dropout=rate)
    if OBJECTIVES[objective].draws:
        return changed(grpo.NO_DROPOUT, dropout=0.0)
    return taken(trainer.NO_DROPOUT, dropout=0.0)


def starts_afresh(settings: ToolSettings) -> bool:
    """Whether axolotl trains a new adapter, although `lora_model_dir` may name one."""
    return settings["lora_model_dir"] is None or str(settings["rl"]) in ("dpo", "ipo", "kto")


OWN: Table = {
    "lora_model_dir": lambda value, settings: (
        flagged("--init-adapter", value)
        if not starts_afresh(settings)
        else left(
            f"with rl: {settings['rl']}, axolotl ignores this adapter and trains a new one on the"
            " base; to train on top of this adapter, pass it as --over"
        )
    ),
    "rl": rl,
    "trl": beta_of("trl"),
    "trl.beta": beta_of("trl.beta"),
    "vllm": grpo.OWN_DRAWS,
    "rl_beta": (beta_of("rl_beta"), 0.1),
    "dpo_beta": beta_of("dpo_beta"),
    "orpo_alpha": beta_of("orpo_alpha"),
    "dpo_use_weighting": refusing("lorafold gives every pair the same weight"),
    "rpo_alpha": refusing("axolotl rejects this key; use dpo_loss_type: [sigmoid, sft]"),
    "dpo_norm_loss": refusing("axolotl rejects this key"),
    "simpo_gamma": trainer.law_option("gamma", objective_of),
    "kto_desirable_weight": trainer.law_option("desirable_weight", objective_of),
    "kto_undesirable_weight": trainer.law_option("undesirable_weight", objective_of),
    "reward_model": lambda value, settings: (
        OFF
        if not boolean(value)
        else taken(objective="reward")
        if is_reward_model(settings)
        else None
    ),
    "process_reward_model": refusing("lorafold's reward models score whole texts"),
}
OF_DPO: Table = {
    "dpo_loss_type": (
        lambda value, settings: trainer.of_dpo(
            names(value), settings["dpo_loss_weights"], "dpo_loss_weights"
        ),
        ["sigmoid"],
    ),
    "dpo_loss_weights": _loss_weights,
    "dpo_label_smoothing": trainer.smoothing_of_dpo,
}
RULES: tuple[Rule, ...] = (
    *table(OWN),
    *table(OF_DPO, where("rl", "dpo")),
    *table(
        {"cpo_alpha": (trainer.supervised_as("simpo"), 1.0)}, where("rl", "simpo")
    ),
    *table(
        {
            "center_rewards_coefficient": lambda value, settings: (
                to_options("centre")(value, settings) if number(value) else OFF
            ),
            "num_labels": _num_labels,
        }, is_reward_model
    ),
    *(Rule(f"{PREFIX}{rule.key}", of_policy(rule.reader), rule.default) for rule in OF_BLOCK),
)
