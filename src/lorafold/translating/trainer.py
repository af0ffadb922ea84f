"""What axolotl and LLaMA-Factory both hand to Hugging Face's Trainer and to PEFT, under names of
their own: schedules, optimizers, intervals, trackers, and which kind of LoRA it is.

Read off transformers 5.24 and PEFT 0.21.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import names, number, product, whole, word
from lorafold.translating.vocabulary import Outcome, Reading, Rule, Settings, changed, left, taken

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
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "swanlab", "aim", "clearml")


def schedule(value: Any, settings: Settings) -> Outcome:
    if word(value) == "constant":
        return taken("it has no warm-up there", schedule="constant", warmup=0.0)
    if value in SCHEDULES:
        return taken(schedule=SCHEDULES[value])
    return changed(
        "lorafold has cosine, linear and constant, of which cosine is taken", schedule="cosine"
    )


def optimizer(value: Any, settings: Settings) -> Outcome:
    if word(value) in OPTIMIZERS:
        return taken(optimizer=OPTIMIZERS[value])
    if value in ("paged_adamw_32bit", "paged_adamw"):
        return changed("its fp32 state is not paged here", optimizer="adamw")
    return changed(
        "lorafold trains with AdamW only, which may need another learning rate", optimizer="adamw"
    )


def warmup_rules(scheduler: str, steps_default: int | None) -> tuple[Rule, Rule]:
    """`warmup_steps` and `warmup_ratio`, of which the steps go first.

    `scheduler` is the tool's key for the schedule.
    """

    def of_steps(value: Any, settings: Settings) -> Outcome | None:
        found = number(value)
        if settings[scheduler] == "constant":
            return None
        if found == 0 and steps_default is not None and settings["warmup_ratio"] is not None:
            return None
        if found < 1:  # a share, as transformers 5 reads it
            return taken(warmup=found)
        total = total_steps(settings)
        if total is None:
            return left(
                "warm-up is a share of the steps here, and their number depends on the rows:"
                f" --set warmup=SHARE, {whole(value)} over the steps of the run; without it 0.03"
            )
        return taken(warmup=share_of(whole(value), total))

    def of_ratio(value: Any, settings: Settings) -> Outcome | None:
        steps = settings["warmup_steps"]
        if settings[scheduler] == "constant" or (
            steps is not None and (number(steps) > 0 or steps_default is None)
        ):
            return None
        return taken(warmup=number(value))

    return Rule("warmup_steps", of_steps, steps_default), Rule("warmup_ratio", of_ratio)


def share_of(steps: int, total: int) -> float:
    """The share of `total` steps that a run rounds up to exactly `steps`, in few digits."""
    return min(1.0, next(
        share
        for digits in range(3, 18)
        if ceil((share := float(f"{min(steps / total, 1.0):.{digits}g}")) * total)
        == min(steps, total) or digits == 17
    ))  # fmt: skip


def total_steps(settings: Settings) -> int | None:
    """Optimizer steps of the run, where the file says how many."""
    found = settings["max_steps"]
    return None if found is None or whole(found) <= 0 else whole(found)


def max_steps(value: Any, settings: Settings) -> Outcome:
    return taken(steps=whole(value)) if whole(value) > 0 else taken("the epochs decide")


def every(name: str, otherwise: str) -> Reading:
    """An interval in steps, or as a share of the run's steps.

    `name` is the recipe field, and `otherwise` says what happens without it.
    """

    def read(value: Any, settings: Settings) -> Outcome:
        found, total = number(value), total_steps(settings)
        if found >= 1:
            return taken(**{name: whole(value)})
        if found <= 0:
            return taken("it is off")
        if total is None:
            return left(f"intervals are in steps here: --set {name}=STEPS; without it {otherwise}")
        return taken(**{name: ceil(found * total)})

    return read


def held_out(value: Any, settings: Settings) -> Outcome:
    """A share of the rows, or a count of them."""
    found = number(value)
    if found < 1:
        return taken(eval_fraction=found)
    return left(
        f"rows are held out as a share here: --set eval_fraction=SHARE, {whole(value)} over all"
        " rows, or give them as --eval-data"
    )


def trackers(value: Any, settings: Settings) -> Outcome:
    found = (value,) if value in ("all", "none") else names(value)
    if found == ("none",):
        return taken("no tracker")
    if unknown := [name for name in found if name not in TRACKERS]:
        return left(
            f"{', '.join(unknown)}: name trackers one by one, as in --set trackers=[tensorboard]"
        )
    return taken(trackers=found)


def plus_ratio(value: Any, settings: Settings) -> Outcome:
    """LoRA+: the rate of B over that of A. PEFT has none unless asked, and lorafold by default."""
    remark = "one rate for both factors, no LoRA+" if number(value) == 1 else ""
    return taken(remark, lr_b=product(settings["learning_rate"], value))


def betas(settings: Settings) -> tuple[float, float]:
    first, second = settings["adam_beta1"], settings["adam_beta2"]
    return (0.9 if first is None else number(first), 0.999 if second is None else number(second))


ADAM = (
    Rule("adam_beta1", lambda value, settings: taken(betas=betas(settings))),
    Rule("adam_beta2", lambda value, settings: taken(betas=betas(settings))),
    Rule("adam_epsilon", lambda value, settings: taken(eps=number(value))),
)


def clip(value: Any, settings: Settings) -> Outcome:
    return taken(clip=max(0.0, number(value)))


def keep(value: Any, settings: Settings) -> Outcome:
    return (
        taken("the best is kept besides", keep=whole(value))
        if whole(value) > 0
        else left("lorafold keeps 2 checkpoints and the best: --set keep=N")
    )


def strategy(value: Any, settings: Settings) -> Outcome:
    if value == "steps":
        return taken("the interval is in steps")
    return left(
        "checkpoints are written about ten times a run, and rows that are held out are evaluated"
        " with each: --set save_every=STEPS, --set eval_every=STEPS"
    )


def kind_of_lora(dora: bool, rslora: bool, init: Any) -> Outcome:
    """The method and its options.

    Args:
        dora: Is it weight-decomposed?
        rslora: Is the update scaled by the root of the rank?
        init: PEFT's `init_lora_weights`.

    LorafoldError for combinations that lorafold does not have.
    """
    beneath, options, why = "rslora" if rslora else "lora", {}, ""
    if init in ("gaussian", "loftq"):
        options = {"init": init}
    elif init == "olora" or str(init).startswith("pissa"):
        if rslora:
            raise LorafoldError(f"initialization {init!r} can't be had with rsLoRA here")
        beneath = "olora" if init == "olora" else "pissa"
        if beneath == "pissa":
            options = {"niter": whole(str(init).removeprefix("pissa_niter_").replace("pissa", "0"))}
    elif init not in (None, True, "true", "default"):
        why = f"initialization {init!r} is not here; A is drawn uniformly and B is zero"
    fields: dict[str, Any] = {"method": "dora" if dora else beneath}
    if dora and beneath != "lora":
        options = {"over": beneath, **options}
    if options:
        fields["options"] = options
    return changed(why, **fields) if why else taken(**fields)
