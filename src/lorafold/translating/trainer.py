"""What axolotl and LLaMA-Factory both hand to Hugging Face's Trainer and to PEFT, under names of
their own: schedules, optimizers, intervals, trackers, and which kind of LoRA it is.

Read off transformers 5.24 and PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import boolean, integer, names, number, product, text
from lorafold.translating.rules import Outcome, Reader, Rule, Settings, changed, left, taken

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",  # one cycle unless the scheduler's arguments say otherwise
    "linear": "linear",
    "polynomial": "linear",  # of power 1 unless the scheduler's arguments say otherwise
    "constant_with_warmup": "constant",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "paged_adamw_8bit": "paged-adamw8bit",
}
NO_FP16 = "lorafold does not train in fp16; bf16 takes the same memory"
AUTO = "there as the model's files are; here bf16 where the device multiplies it, else fp32"
RISES = "the first step has a rate of 0 there, and a share here"
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "swanlab", "aim", "clearml")


def schedule(value: Any, settings: Settings) -> Outcome:
    """The scheduler becomes the schedule; cosine replaces those that lorafold does not have."""
    if text(value) == "constant":
        return taken("it has no warm-up there", schedule="constant", warmup=0.0)
    if value in SCHEDULES:
        return taken(schedule=SCHEDULES[value])
    return changed(
        "lorafold has cosine, linear and constant, of which cosine is taken", schedule="cosine"
    )


def optimizer(value: Any, settings: Settings) -> Outcome:
    """The optimizer becomes one of lorafold's; adamw replaces those that it does not have."""
    if text(value) in OPTIMIZERS:
        return taken(optimizer=OPTIMIZERS[value])
    if value in ("paged_adamw_32bit", "paged_adamw"):
        return changed("its fp32 state is not paged here", optimizer="adamw")
    return changed(
        "lorafold trains with AdamW only, which may need another learning rate", optimizer="adamw"
    )


def warmup_rules(scheduler: str, steps_default: int | None) -> tuple[Rule, Rule]:
    """The rules of `warmup_steps` and `warmup_ratio`; where both are given, the steps count.

    `scheduler` is the tool's key for the schedule, and `steps_default` its default for the steps.
    """

    def of_steps(value: Any, settings: Settings) -> Outcome | None:
        found = number(value)
        if settings[scheduler] == "constant":
            return None
        if found == 0 and steps_default is not None and settings["warmup_ratio"] is not None:
            return None
        return warmed(found)

    def of_ratio(value: Any, settings: Settings) -> Outcome | None:
        steps = settings["warmup_steps"]
        if settings[scheduler] == "constant" or (
            steps is not None and (number(steps) > 0 or steps_default is None)
        ):
            return None
        return warmed(number(value), share=True)

    return Rule("warmup_steps", of_steps, steps_default), Rule("warmup_ratio", of_ratio)


def warmed(found: float, share: bool = False) -> Outcome:
    """A warm-up of so many steps, or of a share of them: one below 1, as transformers 5 reads it,
    or any that `share` says is one.
    """
    if found == 0:
        return taken(warmup=0.0)
    if share or found < 1:
        return taken(RISES, warmup=found)
    return taken(RISES, warmup_steps=integer(found))


def total_steps(settings: Settings) -> int | None:
    """The number of optimizer steps of the run, or None where the file leaves it to the epochs."""
    found = settings["max_steps"]
    return None if found is None or integer(found) <= 0 else integer(found)


def max_steps(value: Any, settings: Settings) -> Outcome:
    """`max_steps` becomes the number of steps, unless it leaves that to the epochs."""
    return taken(steps=integer(value)) if integer(value) > 0 else taken("the epochs decide")


def interval(name: str, otherwise: str) -> Reader:
    """The reader of an interval, which the Trainer takes in steps or as a share of the run's steps.

    `name` is the recipe field, and `otherwise` says what happens without it.
    """

    def read(value: Any, settings: Settings) -> Outcome:
        found, total = number(value), total_steps(settings)
        if found >= 1:
            return taken(**{name: integer(value)})
        if found <= 0:
            return taken("it is off")
        if total is None:
            return left(f"intervals are in steps here: --set {name}=STEPS; without it {otherwise}")
        return taken(**{name: ceil(found * total)})

    return read


def held_out_rows(value: Any, settings: Settings) -> Outcome:
    """A share of held-out rows becomes `eval_fraction`; a count of them is left."""
    found = number(value)
    if found < 1:
        return taken(eval_fraction=found)
    return left(
        f"rows are held out as a share here: --set eval_fraction=SHARE, {integer(value)} over all"
        " rows, or give them as --eval-data"
    )


def trackers(value: Any, settings: Settings) -> Outcome:
    """`report_to` becomes the trackers; names that lorafold does not have are left."""
    found = (value,) if value in ("all", "none") else names(value)
    if found == ("none",):
        return taken("no tracker")
    if unknown := [name for name in found if name not in TRACKERS]:
        return left(
            f"{', '.join(unknown)}: name trackers one by one, as in --set trackers=[tensorboard]"
        )
    return taken(trackers=found)


def target_parameters(modules: Any, parameters: Sequence[str]) -> Outcome:
    """Names of parameters become targets beside those of modules; a linear module is called by its
    own name, and not by its weight's.

    Args:
        modules: The names of the modules, or a preset or a regular expression.
    """
    if modules == "all-linear":
        return changed("all-linear has the matrices of experts too")
    if isinstance(modules, str):
        return left("write --set targets=REGEX that matches these parameters too")
    own = tuple(name.removesuffix(".weight") for name in parameters)
    if bare := [name for name in own if "." not in name]:
        return changed(f"modules called {' or '.join(bare)} are targets too", targets=own)
    return taken(targets=own)


def loraplus_ratio(value: Any, settings: Settings) -> Outcome:
    """The ratio of LoRA+ becomes the learning rate of B; without one PEFT trains both factors at
    one rate, and lorafold with LoRA+.
    """
    remark = "one rate for both factors, no LoRA+" if number(value) == 1 else ""
    return taken(remark, lr_b=product(settings["learning_rate"], value))


def betas(settings: Settings) -> tuple[float, float]:
    """AdamW's betas, of which an absent one has the usual default."""
    first, second = settings["adam_beta1"], settings["adam_beta2"]
    return (0.9 if first is None else number(first), 0.999 if second is None else number(second))


ADAM_RULES = (
    Rule("adam_beta1", lambda value, settings: taken(betas=betas(settings))),
    Rule("adam_beta2", lambda value, settings: taken(betas=betas(settings))),
    Rule("adam_epsilon", lambda value, settings: taken(eps=number(value))),
)


def max_grad_norm(value: Any, settings: Settings) -> Outcome:
    """`max_grad_norm` becomes the norm that gradients are clipped to; 0 does not clip."""
    return taken(clip=max(0.0, number(value)))


def use_cpu(value: Any, settings: Settings) -> Outcome:
    """`use_cpu` goes to `--device`."""
    return left("pass --device cpu", "--device cpu") if boolean(value) else taken("it is off")


def save_total_limit(value: Any, settings: Settings) -> Outcome:
    """`save_total_limit` becomes the number of checkpoints that are kept besides the best."""
    return (
        taken("the best is kept besides", keep=integer(value))
        if integer(value) > 0
        else left("lorafold keeps 2 checkpoints and the best: --set keep=N")
    )


def interval_strategy(value: Any, settings: Settings) -> Outcome:
    """`save_strategy` and its like are taken where the interval is in steps, and else left."""
    if value == "steps":
        return taken("the interval is in steps")
    return left(
        "checkpoints are written about ten times a run, and rows that are held out are evaluated"
        " with each: --set save_every=STEPS, --set eval_every=STEPS"
    )


def kind_of_lora(dora: bool, rslora: bool, init: Any) -> Outcome:
    """The kind of LoRA becomes `method` and `options`.

    Args:
        dora: Whether the update is weight-decomposed.
        rslora: Whether the update is scaled by alpha over the square root of the rank.
        init: PEFT's `init_lora_weights`.

    Raises:
        LorafoldError: lorafold does not have the combination.
    """
    beneath, options, why = "rslora" if rslora else "lora", {}, ""
    if init in ("gaussian", "loftq"):
        options = {"init": init}
    elif init == "olora" or str(init).startswith("pissa"):
        if rslora:
            raise LorafoldError(f"initialization {init!r} can't be had with rsLoRA here")
        beneath = "olora" if init == "olora" else "pissa"
        if beneath == "pissa":
            options = {
                "niter": integer(str(init).removeprefix("pissa_niter_").replace("pissa", "0"))
            }
    elif init not in (None, True, "true", "default"):
        why = f"initialization {init!r} is not here; A is drawn uniformly and B is zero"
    fields: dict[str, Any] = {"method": "dora" if dora else beneath}
    if dora and beneath != "lora":
        options = {"over": beneath, **options}
    if options:
        fields["options"] = options
    return changed(why, **fields) if why else taken(**fields)
