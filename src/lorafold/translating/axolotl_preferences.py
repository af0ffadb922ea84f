"""Readers of axolotl's values where `rl` or `reward_model` is set: the loss, beta and the weights.

What trains a policy is read in `axolotl_policies`.

axolotl hands them to TRL's trainers (1.8), whose losses are those of lorafold, apart from what the
remarks say: supervised terms are means over all tokens of a micro-batch there, and over the tokens
of each completion here.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.translating import policies
from lorafold.translating.axolotl_policies import as_trl, beta_key, is_policy
from lorafold.translating.convert import boolean, choice, integer, names, number
from lorafold.translating.preferences import (
    DPO_LOSSES,
    NO_DROPOUT,
    ORPO_TERM,
    SUPERVISED,
    of_dpo,
    smoothing_of_dpo,
    supervised,
)
from lorafold.translating.rules import (
    Outcome,
    Reader,
    Settings,
    changed,
    flagged,
    is_off,
    left,
    taken,
)

OTHERS = ("ipo", "orpo", "simpo", "kto")
REFUSED = {
    "gdpo": "lorafold sums rewards before it compares them",
    "ebft": "lorafold has no energy-based objective",
}


def objective_of(settings: Settings) -> str | None:
    """The objective of preferences or of a policy that the file trains, or None."""
    found = str(settings["rl"])
    if is_policy(settings):
        return policies.objective_of(as_trl(settings))
    if found == "dpo":
        return DPO_LOSSES.get(next(iter(settings.read("dpo_loss_type", names)), ""))
    if found in OTHERS:
        return found
    return "reward" if is_reward_model(settings) else None


def is_reward_model(settings: Settings) -> bool:
    """Whether `reward_model` is on, and `rl`, which decides, is not."""
    return is_off(settings["rl"]) and not is_off(settings["reward_model"])


def rl(value: Any, settings: Settings) -> Outcome:
    """`rl` becomes the objective; of dpo and grpo it is the type of the loss that says which.

    LorafoldError for objectives that lorafold does not have, and for what axolotl refuses.
    """
    if is_off(value):
        return taken("it is off")
    if str(value) in REFUSED:
        raise LorafoldError(f"found {value!r}, but {REFUSED[str(value)]}")
    choice(value, "dpo", *OTHERS, "grpo")
    if settings["sample_packing"]:
        raise LorafoldError(f"found {value!r} and sample_packing, which axolotl refuses together")
    if value == "grpo":
        return taken("trl.loss_type says which objective")
    if value == "dpo":
        return taken("dpo_loss_type says which objective")
    if value == "simpo" and settings["simpo_gamma"] is None:
        raise LorafoldError("simpo_gamma missing, and axolotl has no default for it")
    if value == "orpo":
        return changed(ORPO_TERM, objective="orpo")
    return taken(objective=value)


def loss_type(value: Any, settings: Settings) -> Outcome | None:
    """`dpo_loss_type` becomes the objective and, where sft is its second, `sft_weight`, of which
    `dpo_loss_weights` are the weights. LorafoldError for other losses and mixtures.
    """
    if settings["rl"] != "dpo":
        return None
    return of_dpo(names(value), settings["dpo_loss_weights"], "dpo_loss_weights")


def loss_weights(value: Any, settings: Settings) -> Outcome | None:
    """`dpo_loss_weights` are read with `dpo_loss_type`."""
    if settings["rl"] != "dpo":
        return None
    if settings.given.get("dpo_loss_type") is None:
        raise LorafoldError(f"found {value!r} without dpo_loss_type, which axolotl asks for")
    return taken("they are read with dpo_loss_type")


def beta_of(key: str) -> Reader:
    """The reader of a key that may hold beta: `trl`, `rl_beta`, `dpo_beta` or `orpo_alpha`, of
    which the first that the file sets decides; of a policy `trl.beta` is the first.
    """

    def read(value: Any, settings: Settings) -> Outcome | None:
        if is_policy(settings):
            return policies.beta(value, as_trl(settings)) if key == beta_key(settings) else None
        if objective_of(settings) in (None, "reward"):
            return None
        values = {k: settings.given.get(k) for k in ("trl", "rl_beta", "dpo_beta", "orpo_alpha")}
        inner = values["trl"].get("beta") if isinstance(values["trl"], dict) else None
        values["trl"] = inner
        decides = next((k for k, v in values.items() if v is not None), "rl_beta")
        if key != decides:
            return None
        return taken(beta=number(inner if key == "trl" else value))

    return read


def label_smoothing(value: Any, settings: Settings) -> Outcome | None:
    """`dpo_label_smoothing` has no effect on the losses that can be translated."""
    return smoothing_of_dpo(value, settings) if settings["rl"] == "dpo" else None


def cpo_alpha(value: Any, settings: Settings) -> Outcome | None:
    """`cpo_alpha` becomes `sft_weight` of SimPO, the only one that it bears on."""
    return supervised(value, "simpo", SUPERVISED) if settings["rl"] == "simpo" else None


def reward_model(value: Any, settings: Settings) -> Outcome | None:
    """`reward_model` becomes the objective reward."""
    if not boolean(value):
        return taken("it is off")
    return taken(objective="reward") if is_reward_model(settings) else None


def center_rewards(value: Any, settings: Settings) -> Outcome | None:
    """`center_rewards_coefficient` becomes `centre`."""
    if not is_reward_model(settings):
        return None
    found = number(value)
    return taken(objective_options={"centre": found}) if found else taken("it is off")


def num_labels(value: Any, settings: Settings) -> Outcome | None:
    """`num_labels` of a reward model is one; LorafoldError for more."""
    if not is_reward_model(settings):
        return None
    if integer(value) != 1:
        raise LorafoldError(f"found {value!r}, but a reward model of lorafold gives one score")
    return taken("a reward model gives one score")


def dropout(value: Any, settings: Settings) -> Outcome:
    """`lora_dropout` becomes the dropout, which TRL turns off for preferences, and which there is
    none of where completions are drawn.
    """
    found, objective = number(value), objective_of(settings)
    if found and objective is not None and OBJECTIVES[objective].draws:
        return changed(policies.NO_DROPOUT, dropout=0.0)
    if found and objective is not None:
        return taken(NO_DROPOUT, dropout=0.0)
    return taken(dropout=found)


def starts_afresh(settings: Settings) -> bool:
    """Whether axolotl trains a fresh adapter, although `lora_model_dir` may name one."""
    return settings["lora_model_dir"] is None or str(settings["rl"]) in ("dpo", "ipo", "kto")


def lora_model_dir(value: Any, settings: Settings) -> Outcome:
    """`lora_model_dir` goes to `--init-adapter`, except where axolotl does not load it."""
    if not starts_afresh(settings):
        return flagged("--init-adapter", value)
    return left(
        f"axolotl does not load it for rl: {settings['rl']}, and trains a fresh adapter over the"
        " base; to train over this one pass it as --over"
    )
