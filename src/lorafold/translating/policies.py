"""Readers of TRL's GRPOConfig and RLOOConfig, whose keys axolotl's `trl` block has too: the law,
its options, and how completions are drawn.

Read off TRL 1.16. Where a step draws and learns once, ratios are 1, and what bounds them has no
effect.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import boolean, choice, integer, number
from lorafold.translating.rules import Outcome, Reader, Settings, changed, taken

# The average of a loss over tokens: of each loss_type that is the clipped surrogate
AVERAGES = {
    "dapo": "tokens",
    "bnpo": "tokens",
    "grpo": "per-sequence",
    "dr_grpo": "longest",
    "luspo": "sums",
}
LOSSES = (*AVERAGES, "cispo")
WITHOUT_LIMIT = "no limit"  # what stands for a file that leaves the length of completions open
LIMIT = 256  # the most tokens of one of theirs
BESIDE = 1024  # the tokens that a prompt may have, where the file does not say
NO_DROPOUT = "completions are drawn without dropout, and learned from without it"
OWN_DRAWS = "completions are drawn in the process that trains, by the weights that train"
RATIOS = "ratios are 1 where a step draws and learns once"


def is_leave_one_out(settings: Settings) -> bool:
    """Whether the settings are RLOO's, which has no loss_type."""
    return "loss_type" not in settings.defaults


def objective_of(settings: Settings) -> str:
    """The objective that the settings train."""
    if is_leave_one_out(settings):
        return "rloo"
    if settings["loss_type"] == "cispo":
        return "cispo"
    return "gspo" if settings["importance_sampling_level"] == "sequence" else "grpo"


def loss_type(value: Any, settings: Settings) -> Outcome:
    """`loss_type` becomes the objective and its average; LorafoldError for those that lorafold does
    not have.
    """
    if value in ("sapo", "vespo"):
        raise LorafoldError(f"found {value!r}, but lorafold has no such law of policies")
    options: dict[str, Any] = {"average": AVERAGES.get(choice(value, *LOSSES), "tokens")}
    if value == "cispo":
        options["clip_high"] = cispo_bound(settings)
    fields = {"objective": objective_of(settings), "objective_options": options}
    if value == "bnpo":
        return changed(
            "TRL averages over the tokens of a micro-batch, and lorafold over those of the step",
            **fields,
        )
    return taken(**fields)


def importance_sampling_level(value: Any, settings: Settings) -> Outcome:
    """`importance_sampling_level` is read with `loss_type`, which has GSPO's where it is sequence.

    LorafoldError where cispo has it.
    """
    if choice(value, "token", "sequence") == "sequence" and objective_of(settings) == "cispo":
        raise LorafoldError("found 'sequence', but lorafold's cispo has a ratio for each token")
    return taken("it is read with loss_type")


def epsilon(value: Any, settings: Settings) -> Outcome | None:
    """`epsilon` becomes the clip; `epsilon_high`, where it is absent, is the same."""
    if objective_of(settings) in ("rloo", "cispo"):
        return None
    return taken(objective_options={"clip": number(value), "clip_high": upper(settings)})


def upper(settings: Settings) -> float:
    """`epsilon_high`, which is `epsilon` where it is absent."""
    return settings.read("epsilon" if settings["epsilon_high"] is None else "epsilon_high", number)


def epsilon_high(value: Any, settings: Settings) -> Outcome | None:
    """`epsilon_high` is read with `epsilon`, except that it bounds the weights of cispo."""
    if objective_of(settings) == "rloo":
        return None
    return taken("it is part of the bound" if objective_of(settings) == "cispo" else "the upper")


def cispo_bound(settings: Settings) -> float:
    """How far cispo's weights may go up; in TRL `epsilon_high` bounds the ratio itself.

    LorafoldError where it is no more than 1, as it is with TRL's defaults.
    """
    found = upper(settings)
    if found <= 1:
        raise LorafoldError(
            f"found 'cispo' and {found:g} as epsilon_high, to which TRL bounds the ratio itself, so"
            " that no weight would be 1; expected more than 1, as 5"
        )
    return float(f"{found - 1:.12g}")


def beta(value: Any, settings: Settings) -> Outcome:
    """`beta` becomes beta, where it is not 0."""
    found = number(value)
    if not found:
        return taken("there is no KL to a reference")
    if is_leave_one_out(settings):
        return changed(
            "TRL takes the KL of a completion off its reward, and lorafold adds that of each token"
            " to its loss",
            beta=found,
        )
    if objective_of(settings) == "gspo" or not settings.read("use_bias_correction_kl", boolean):
        return changed(
            "lorafold weighs the KL of each token by its ratio, so that its gradient is the KL's",
            beta=found,
        )
    return taken(beta=found)


def needs_reference(why: str) -> Reader:
    """The reader of a switch that bears on the reference: LorafoldError where it is on and there is
    one.
    """

    def read(value: Any, settings: Settings) -> Outcome | None:
        if not boolean(value):
            return taken("it is off")
        if not settings.read("beta", number):
            return None
        raise LorafoldError(f"found {value!r}, but {why}")

    return read


def scale_rewards(value: Any, settings: Settings) -> Outcome:
    """`scale_rewards` becomes the scale, also as true (group) and false (none)."""
    found = {"True": "group", "true": "group", "False": "none", "false": "none"}.get(str(value))
    scale = choice(found or value, "group", "batch", "none")
    return taken(objective_options={"scale": scale})


def normalize_advantages(value: Any, settings: Settings) -> Outcome:
    """`normalize_advantages` of RLOO becomes the scale over the batch."""
    if not boolean(value):
        return taken(objective_options={"scale": "none"})
    return changed(
        "TRL divides by the deviation of the batch's advantages, and lorafold by that of its"
        " rewards",
        objective_options={"scale": "batch"},
    )


def mask_truncated(value: Any, settings: Settings) -> Outcome:
    """`mask_truncated_completions` becomes `truncated`."""
    options = {"truncated": "masked" if boolean(value) else "counted"}
    if boolean(value) and settings["loss_type"] not in ("dapo", "bnpo", "cispo"):
        return changed(
            "TRL averages over them too, with a loss of 0; lorafold leaves them out of the mean",
            objective_options=options,
        )
    return taken(objective_options=options)


def group(value: Any, settings: Settings) -> Outcome:
    """`num_generations` becomes the group; RLOO's objective has no key of its own."""
    fields = {"objective_options": {"group": integer(value)}}
    return taken(objective="rloo", **fields) if is_leave_one_out(settings) else taken(**fields)


def dropout(value: Any, settings: Settings) -> Outcome:
    """`lora_dropout` is 0 where completions are drawn."""
    if number(value):
        return changed(NO_DROPOUT, dropout=0.0)
    return taken(dropout=0.0)


def completion_length(value: Any, settings: Settings) -> Outcome:
    """`max_completion_length` becomes `max_new_tokens`, and with the prompt's the `max_length`."""
    told, prompt = settings.given.get("max_completion_length", value), settings["max_prompt_length"]
    unlimited = told in (None, WITHOUT_LIMIT)
    longest = LIMIT if unlimited else integer(value)
    fields = {
        "objective_options": {"max_new_tokens": longest},
        "max_length": longest
        + (BESIDE if prompt is None else settings.read("max_prompt_length", integer)),
    }
    said = [f"completions have no limit there, and {LIMIT} tokens here"] * unlimited
    if prompt is None:
        said.append(f"prompts have none there; here a run refuses those of more than {BESIDE}")
    return changed("; ".join(said), **fields) if said else taken(**fields)


def prompt_length(value: Any, settings: Settings) -> Outcome:
    """`max_prompt_length`, of older versions, is part of `max_length`."""
    return changed("TRL cut longer prompts, and a run here refuses them; max_length has both")


def num_iterations(value: Any, settings: Settings) -> Outcome:
    """`num_iterations` becomes `updates`. LorafoldError for several of RLOO, whose ratios TRL clips
    and lorafold does not have.
    """
    found = integer(value)
    if found == 1:
        return taken("a step draws and learns once")
    if is_leave_one_out(settings):
        raise LorafoldError(
            f"found {value!r}, but lorafold's rloo clips no ratios"
        )
    return changed(
        f"steps count draws here, and updates there: of {found} each, for max_steps too",
        objective_options={"updates": found},
    )


def drawn_plainly(*neutral: float) -> Reader:
    """The reader of what bends the distribution that completions are drawn from, as a temperature,
    unless it has one of the neutral values.
    """

    def read(value: Any, settings: Settings) -> Outcome:
        if number(value) in neutral:
            return taken("completions are drawn at temperature 1 among all tokens")
        return changed(
            "completions are drawn at temperature 1 among all tokens: what draws is what learns"
        )

    return read


def bound_of_ratios(least: float) -> Reader:
    """The reader of a further bound of ratios, which has no effect where they are 1. LorafoldError
    where they are not.

    `least` is the least value of which that is so.
    """

    def read(value: Any, settings: Settings) -> Outcome:
        if number(value) < least:
            raise LorafoldError(f"found {value!r}, expected {least:g} or more")
        if integer(settings["num_iterations"] or 1) != 1:
            raise LorafoldError(
                f"found {value!r} with num_iterations, but there is no such bound"
            )
        return changed(f"lorafold has no such bound; {RATIOS}")

    return read


def aggregation(value: Any, settings: Settings) -> Outcome:
    """`multi_objective_aggregation` sums rewards; LorafoldError for GDPO's."""
    if choice(value, "sum_then_normalize", "normalize_then_sum") == "sum_then_normalize":
        return taken("rewards are summed, then compared")
    raise LorafoldError(f"found {value!r}, but lorafold sums rewards before it compares them")
