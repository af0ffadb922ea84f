"""Converts axolotl's keys for `rl` and `reward_model`: loss, beta, weights, and for `rl: grpo` the
block `trl`. The block's keys are TRL's and are called `trl.KEY` in a translation.

axolotl passes these settings to TRL's trainers (1.8), whose losses equal lorafold's except as the
remarks state: TRL averages supervised terms over all tokens of a micro-batch, lorafold over the
tokens of each completion. If `max_completion_length` is absent, axolotl passes None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorafold.config_import import grpo, trainer
from lorafold.config_import.rules import (
    OFF,
    Handler,
    Outcome,
    Reader,
    Rule,
    Table,
    ToolSettings,
    Values,
    changed,
    choice,
    flattened,
    if_else,
    is_off,
    mapped,
    pass_option,
    read_with,
    rejection,
    setting_in,
    static_rows,
    table,
    to_options,
    unmapped,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import boolean, integer, names, number
from lorafold.objectives import OBJECTIVES

BLOCK = "trl"
PREFIX = f"{BLOCK}."
OTHER_LOSSES = ("ipo", "orpo", "simpo", "kto")
REJECTED = {"gdpo": grpo.SUM_FIRST, "ebft": "lorafold has no energy-based objective"}
DEFAULTS = {"max_completion_length": grpo.NO_LIMIT, "use_bias_correction_kl": False}
# `beta` is read with the other keys that may contain it
BLOCK_RULES = (
    *(
        replace(rule, default=DEFAULTS.get(rule.key, rule.default))
        for rule in table(grpo.GRPO)
        if rule.key != "beta"
    ),
    *table(static_rows("axolotl_policies")),
)


is_policy = setting_in("rl", "grpo")


def is_reward_model(settings: ToolSettings) -> bool:
    return is_off(settings["rl"]) and not is_off(settings["reward_model"])


def objective_of(settings: ToolSettings) -> str | None:
    rl = str(settings["rl"])
    if is_policy(settings):
        return grpo.objective_of(as_trl(settings))
    if rl == "dpo":
        return trainer.DPO_LOSSES.get(next(iter(settings.read("dpo_loss_type", names)), ""))
    return rl if rl in OTHER_LOSSES else "reward" if is_reward_model(settings) else None


def flatten(config: Values) -> Values:
    is_flat = config.get("rl") != "grpo" or not isinstance(config.get(BLOCK), Mapping)
    return config if is_flat else flattened(config, BLOCK)


def accumulation(settings: ToolSettings) -> int:
    total = settings["batch_size"]
    if total is not None and settings.config.get("gradient_accumulation_steps") is None:
        return max(1, integer(total) // max(1, settings.read("micro_batch_size", integer)))
    return settings.read("gradient_accumulation_steps", integer)


def as_trl(settings: ToolSettings) -> ToolSettings:
    given = {k: v for k, v in settings.config.items() if v is not None}
    block = {k.removeprefix(PREFIX): v for k, v in given.items() if k.startswith(PREFIX)}
    outside = {
        "beta": given.get(beta_key(settings), 0.0),
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": accumulation(settings),
        "max_prompt_length": settings["sequence_len"],
    }
    return ToolSettings(block | outside, {rule.key: rule.default for rule in BLOCK_RULES})


def beta_key(settings: ToolSettings) -> str:
    keys = (f"{PREFIX}beta", "rl_beta", "orpo_alpha")
    return next((key for key in keys if settings.config.get(key) is not None), "")


def of_policy(row: Reader, otherwise: Handler = None) -> Reader:
    return if_else(is_policy, lambda value, settings: row(value, as_trl(settings)), otherwise)


def rl(value: Any, settings: ToolSettings) -> Outcome:
    if is_off(value):
        return OFF
    if str(value) in REJECTED:
        raise rejection(value, REJECTED[str(value)])
    choice(value, "dpo", *OTHER_LOSSES, "grpo")
    if settings["sample_packing"]:
        raise LorafoldError(f"found {value!r} and sample_packing, which axolotl does not combine")
    if value not in OTHER_LOSSES:
        key = "dpo_loss_type" if value == "dpo" else "trl.loss_type"
        return mapped(f"{key} determines the objective")
    if value == "simpo" and settings["simpo_gamma"] is None:
        raise LorafoldError("simpo_gamma missing; axolotl has no default, so set a value")
    return changed(trainer.ORPO_TERM if value == "orpo" else "", objective=value)


def _loss_weights(value: Any, settings: ToolSettings) -> Outcome:
    if settings.config.get("dpo_loss_type") is None:
        raise LorafoldError(f"found {value!r} without dpo_loss_type, which axolotl requires")
    return read_with("dpo_loss_type")


def beta_of(key: str) -> Reader:
    """A reader for one of the keys that may contain beta. The first of `trl`, `rl_beta`, `dpo_beta`
    and `orpo_alpha` that the file sets is used; for a policy, `trl.beta` comes first.
    """

    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        if is_policy(settings):
            return grpo.beta(value, as_trl(settings)) if key == beta_key(settings) else None
        if objective_of(settings) in (None, "reward"):
            return None
        values = {k: settings.config.get(k) for k in ("trl", "rl_beta", "dpo_beta", "orpo_alpha")}
        values["trl"] = values["trl"].get("beta") if isinstance(values["trl"], dict) else None
        if key != next((k for k, v in values.items() if v is not None), "rl_beta"):
            return None
        return mapped(beta=number(values["trl"] if key == "trl" else value))

    return read


def _num_labels(value: Any, settings: ToolSettings) -> Outcome:
    if integer(value) != 1:
        raise rejection(value, "lorafold's reward models output one score")
    return mapped("a reward model outputs one score")


def dropout(value: Any, settings: ToolSettings) -> Outcome:
    rate, objective = number(value), objective_of(settings)
    if not rate or objective is None:
        return mapped(dropout=rate)
    if OBJECTIVES[objective].draws:
        return changed(grpo.NO_DROPOUT, dropout=0.0)
    return mapped(trainer.NO_DROPOUT, dropout=0.0)


def is_new_adapter(settings: ToolSettings) -> bool:
    """Whether axolotl trains a new adapter; with rl dpo, ipo or kto, it does so even if
    `lora_model_dir` names an adapter.
    """
    return settings["lora_model_dir"] is None or str(settings["rl"]) in ("dpo", "ipo", "kto")


MAIN_KEYS: Table = {
    "lora_model_dir": lambda value, settings: (
        pass_option("--init-adapter", value)
        if not is_new_adapter(settings)
        else unmapped(
            f"with rl: {settings['rl']}, axolotl ignores this adapter and trains a new one on the"
            " base; to train on top of this adapter, pass it as --over"
        )
    ),
    "rl": rl,
    "trl": beta_of("trl"),
    "trl.beta": beta_of("trl.beta"),
    "rl_beta": (beta_of("rl_beta"), 0.1),
    "dpo_beta": beta_of("dpo_beta"),
    "orpo_alpha": beta_of("orpo_alpha"),
    "simpo_gamma": trainer.loss_option("gamma", objective_of),
    "kto_desirable_weight": trainer.loss_option("desirable_weight", objective_of),
    "kto_undesirable_weight": trainer.loss_option("undesirable_weight", objective_of),
    "reward_model": lambda value, settings: (
        OFF
        if not boolean(value)
        else mapped(objective="reward")
        if is_reward_model(settings)
        else None
    ),
    **static_rows("axolotl_objectives"),
}
RULES = (
    *table(MAIN_KEYS),
    *table(
        {
            "dpo_loss_type": (
                lambda value, settings: trainer.dpo_objective(
                    names(value), settings["dpo_loss_weights"], "dpo_loss_weights"
                ),
                ["sigmoid"],
            ),
            "dpo_loss_weights": _loss_weights,
            "dpo_label_smoothing": trainer.dpo_label_smoothing,
        },
        setting_in("rl", "dpo"),
    ),
    *table({"cpo_alpha": (trainer.sft_term_of("simpo"), 1.0)}, setting_in("rl", "simpo")),
    *table(
        {
            "center_rewards_coefficient": lambda value, settings: (
                to_options("centre")(value, settings) if number(value) else OFF
            ),
            "num_labels": _num_labels,
        }, is_reward_model
    ),
    *(Rule(f"{PREFIX}{rule.key}", of_policy(rule.reader), rule.default) for rule in BLOCK_RULES),
)
