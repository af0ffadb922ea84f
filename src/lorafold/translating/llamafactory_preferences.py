"""Readers of LLaMA-Factory's values where its stage is dpo, kto or rm: the loss, its weights, the
reference and the adapters below.

Its losses are those of lorafold, equation by equation: log-probabilities are means over tokens for
ipo, orpo and simpo and sums for the others, and `pref_ftx` weighs the mean over the tokens of each
chosen completion. Its reference is the model without the adapter that trains.
"""

from __future__ import annotations

import shlex
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import boolean, choice, integer, names, number
from lorafold.translating.preferences import NO_DROPOUT, NO_SECOND_MODEL, has_reference, supervised
from lorafold.translating.rules import Outcome, Settings, changed, left, option, taken

LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
NEGLIGIBLE = 1e-6  # LLaMA-Factory leaves terms out that weigh no more


def objective_of(settings: Settings) -> str | None:
    """The objective of preferences that the file trains, or None."""
    if settings["stage"] == "dpo":
        return LOSSES.get(str(settings["pref_loss"]))
    return {"kto": "kto", "rm": "reward"}.get(str(settings["stage"]))


def pref_loss(value: Any, settings: Settings) -> Outcome | None:
    """`pref_loss` becomes the objective; LorafoldError for kto_pair."""
    if settings["stage"] != "dpo":
        return None
    if value == "kto_pair":
        raise LorafoldError(
            "found 'kto_pair', but lorafold's kto takes completions one by one, as stage kto does"
        )
    return taken(objective=LOSSES[choice(value, *LOSSES)])


def pref_ftx(value: Any, settings: Settings) -> Outcome | None:
    """`pref_ftx` becomes `sft_weight`; a reward model has no such term there."""
    objective = objective_of(settings)
    if objective == "reward":
        return None
    return supervised(value if number(value) > NEGLIGIBLE else 0.0, objective)


def label_smoothing(value: Any, settings: Settings) -> Outcome | None:
    """`dpo_label_smoothing` becomes `label_smoothing`, which only DPO's own loss has there too."""
    if settings["stage"] != "dpo":
        return None
    if number(value) <= NEGLIGIBLE:
        return taken("it is off")
    if objective_of(settings) != "dpo":
        raise LorafoldError(
            f"found {value!r}, but LLaMA-Factory takes it with pref_loss: sigmoid only"
        )
    return taken(objective_options={"label_smoothing": number(value)})


def other_term(value: Any, settings: Settings) -> Outcome | None:
    """A term of the loss that lorafold does not have: LorafoldError where it is on."""
    if settings["stage"] != "dpo":
        return None
    raise LorafoldError(f"found {value!r}, but lorafold's losses have no such term")


def bco_weight(value: Any, settings: Settings) -> Outcome | None:
    """`pref_bco_weight` is a term that lorafold does not have, where the loss has a reference."""
    on = number(value) > NEGLIGIBLE and has_reference(objective_of(settings))
    return other_term(value, settings) if on else None


def dropout(value: Any, settings: Settings) -> Outcome:
    """`lora_dropout` becomes the dropout, which stages dpo and kto turn off."""
    found = number(value)
    if found and settings["stage"] in ("dpo", "kto"):
        return taken(NO_DROPOUT, dropout=0.0)
    return taken(dropout=found)


def of_supervised(value: Any, settings: Settings) -> None:
    """LorafoldError where a switch is on that LLaMA-Factory refuses outside supervised training."""
    if objective_of(settings) is not None and boolean(value):
        raise LorafoldError(
            f"found {value!r}, which LLaMA-Factory refuses with stage {settings['stage']}"
        )


def is_fresh(settings: Settings) -> bool:
    """Whether a fresh adapter is trained over those that are named. On a quantized base
    LLaMA-Factory goes on with the one that is named, whatever the file says.
    """
    return settings.read("create_new_adapter", boolean) and settings["quantization_bit"] is None


def adapters_below(settings: Settings) -> tuple[str, ...]:
    """The adapters that stay as they are, beneath the one that trains; the lowest first."""
    named = settings["adapter_name_or_path"]
    if named is None or settings["finetuning_type"] != "lora":
        return ()
    found = names(named)
    return found if is_fresh(settings) else found[:-1]


def named_adapters(value: Any, settings: Settings) -> Outcome | None:
    """`adapter_name_or_path` goes to `--over`, for adapters below the one that trains, and to
    `--init-adapter` for the one that goes on.
    """
    found, below = names(value), adapters_below(settings)
    if not found:
        return None
    if not below:
        return option("--init-adapter")(found[-1], settings)
    flags = [f"--over {shlex.quote(name)}" for name in below]
    rest = found[len(below) :]
    flags += [f"--init-adapter {shlex.quote(name)}" for name in rest]
    return left(
        f"LLaMA-Factory merges {', '.join(below)} first; here nothing is merged, and the adapter"
        " that trains lies over it",
        " ".join(flags),
    )


def create_new_adapter(value: Any, settings: Settings) -> Outcome:
    """`create_new_adapter` is read with `adapter_name_or_path`."""
    if boolean(value) and settings["adapter_name_or_path"] and not is_fresh(settings):
        return taken("there a quantized base goes on with the adapter that is named")
    return taken("it is read with adapter_name_or_path")


def ref_model(value: Any, settings: Settings) -> Outcome | None:
    """`ref_model` is taken where it is what lies below the new adapter; else LorafoldError."""
    if not has_reference(objective_of(settings)):
        return None
    adapters = settings["ref_model_adapters"]
    theirs = () if adapters is None else names(adapters)
    if value == settings["model_name_or_path"] and theirs == adapters_below(settings):
        return taken("it is what lies below the new adapter, and so lorafold's reference")
    over = " over ".join((*reversed(theirs), str(value)))
    raise LorafoldError(f"found {over} as the reference, but {NO_SECOND_MODEL}")


def ref_model_adapters(value: Any, settings: Settings) -> Outcome | None:
    """`ref_model_adapters` are read with `ref_model`, without which they have no effect."""
    return None if settings["ref_model"] is None else taken("it is read with ref_model")


def ref_model_quantization_bit(value: Any, settings: Settings) -> Outcome | None:
    """The reference has the storage of the base beneath the adapter that trains."""
    if settings["ref_model"] is None or not has_reference(objective_of(settings)):
        return None
    own = settings["quantization_bit"]
    if own is not None and integer(value) == integer(own):
        return taken("the reference has the storage of the base")
    return changed("the reference is the base itself, in the storage that it is trained in")
