"""Converts keys that several tools pass to Hugging Face's Trainer, to TRL's preference trainers and
to PEFT, as of transformers 5.24 and PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from lorafold.config_import.rules import (
    OFF,
    REASONS,
    Condition,
    Outcome,
    Reader,
    Table,
    ToolSettings,
    Values,
    changed,
    if_else,
    mapped,
    rejection,
    static_rows,
    to_field,
    to_options,
    unmapped,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import (
    FOREIGN_OPTIONS,
    ONE_RATE,
    OPTIMIZERS,
    SCHEDULES,
    integer,
    names,
    number,
    product,
)
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.algorithm_options import algorithm_class

AUTO = "the tool keeps the files' dtype; lorafold uses bf16 if native to the device, else fp32"
FROM_ZERO = "the other tool warms up from a learning rate of 0, lorafold from peak / warm-up steps"
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "swanlab", "aim", "clearml")
ADAMW = "lorafold supports only AdamW, which may need a different learning rate"
COMPLETIONS = mapped(REASONS["completions"])
FULL_LOSS = unmapped(REASONS["full_loss"])
PART_OF_METHOD = mapped("part of the method")
AUTO_TARGETS = changed("PEFT chooses targets by architecture; lorafold uses the method's default")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise LorafoldError(f"found {value!r}, expected text")
    return value


def schedule(value: Any, settings: ToolSettings) -> Outcome:
    if text(value) == "constant":
        return mapped("without warm-up, as in transformers", schedule="constant", warmup=0.0)
    known = value in SCHEDULES
    why = "" if known else "lorafold has only cosine, linear and constant; cosine is used"
    return changed(why, schedule=SCHEDULES.get(value, "cosine"))


def optimizer(value: Any, settings: ToolSettings) -> Outcome:
    paged = value in ("paged_adamw_32bit", "paged_adamw")
    why = "lorafold does not page the fp32 optimizer state" if paged else ADAMW
    known = text(value) in OPTIMIZERS
    return changed("" if known else why, optimizer=OPTIMIZERS.get(value, "adamw"))


def _warmup_steps(value: Any, settings: ToolSettings) -> Outcome | None:
    steps, ratio = number(value), settings["warmup_ratio"]
    if settings["lr_scheduler_type"] == "constant" or (steps == 0 and ratio is not None):
        return None
    return warmup_of(steps)


def warmup_of(length: float, share: bool = False) -> Outcome:
    """`length` is in steps, or a share of the run if below 1 (transformers 5) or with `share`."""
    if length == 0:
        return mapped(warmup=0.0)
    if share or length < 1:
        return mapped(FROM_ZERO, warmup=length)
    return mapped(FROM_ZERO, warmup_steps=integer(length))


def total_steps(settings: ToolSettings) -> int | None:
    return max(0, integer(settings["max_steps"] or 0)) or None


def interval(name: str) -> Reader:
    checkpoints = "lorafold writes about ten checkpoints per run"
    usual = checkpoints if name == "save_every" else "lorafold evaluates at each checkpoint"

    def read(value: Any, settings: ToolSettings) -> Outcome:
        every, total = number(value), total_steps(settings)
        if every >= 1:
            return mapped(**{name: integer(value)})
        if every <= 0:
            return OFF
        if total is None:
            return unmapped(f"pass the interval in steps as --set {name}=STEPS; by default {usual}")
        return mapped(**{name: ceil(every * total)})

    return read


def held_out_rows(value: Any, settings: ToolSettings) -> Outcome:
    if number(value) < 1:
        return mapped(eval_fraction=number(value))
    return unmapped(
        "pass the held-out rows as --eval-data, or their share of all rows as"
        f" --set eval_fraction=SHARE ({integer(value)} / number of rows)"
    )


def trackers(value: Any, settings: ToolSettings) -> Outcome:
    if value == "none" or (given := (value,) if value == "all" else names(value)) == ("none",):
        return mapped("no tracker")
    if unknown := [name for name in given if name not in TRACKERS]:
        return unmapped(
            f"unsupported: {', '.join(unknown)}; list trackers, as in --set trackers=[tensorboard]"
        )
    return mapped(trackers=given)


def target_parameters(modules: Any, parameters: Sequence[str]) -> Outcome:
    """Converts names of parameters to targets in addition to `modules`, which is a preset, a
    regular expression or a list of names. A linear layer's weight becomes the layer.
    """
    if modules == "all-linear":
        return changed("all-linear also includes the weight matrices of experts")
    if isinstance(modules, str):
        return unmapped("pass --set targets=REGEX that also matches these parameters")
    layers = tuple(name.removesuffix(".weight") for name in parameters)
    bare = " or ".join(name for name in layers if "." not in name)
    return changed(f"modules named {bare} become targets too" if bare else "", targets=layers)


def parameters_besides(key: str) -> Reader:
    """A reader for names of parameters that are targets besides the modules in `key`."""
    return lambda value, settings: target_parameters(settings[key], names(value))


def loraplus_ratio(value: Any, settings: ToolSettings) -> Outcome:
    remark = ONE_RATE if number(value) == 1 else ""
    return mapped(remark, lr_b=product(settings["learning_rate"], value))


def rate(is_lora: Condition) -> Reader:
    row = FOREIGN_OPTIONS["learning_rate"]
    return lambda value, settings: (
        mapped(row.remark, **row.read(value, {})) if is_lora(settings) else mapped(lr=number(value))
    )


def accumulation(settings: ToolSettings) -> int:
    return settings.read("gradient_accumulation_steps", integer)


def batch(
    of_one: str, packed: Condition, fills: str, steps: Callable[[ToolSettings], int] = accumulation
) -> Reader:
    """A reader for the micro-batch size. The recipe's batch size is this size times the gradient
    accumulation steps. `fills` names the tool and its key for the length of packed sequences.
    """

    def read(value: Any, settings: ToolSettings) -> Outcome:
        rows = integer(value) * steps(settings)
        if not packed(settings):
            return mapped(f"micro-batch times gradient accumulation, for one {of_one}", batch=rows)
        tool, _, key = fills.partition(" ")
        return changed(
            f"{tool} counts packed sequences, lorafold counts rows: for as many tokens per step,"
            f" multiply batch by the number of rows that fit in {key}",
            batch=rows,
        )

    return read


def kind_of_lora(dora: bool, rslora: bool, init: Any) -> Outcome:
    base_method, options, why = "rslora" if rslora else "lora", {}, ""
    if init in ("gaussian", "loftq"):
        options["init"] = init
    elif init == "olora" or str(init).startswith("pissa"):
        if rslora:
            raise LorafoldError(f"lorafold does not support initialization {init!r} with rsLoRA")
        base_method = "olora" if init == "olora" else "pissa"
        if base_method == "pissa":
            options["niter"] = integer(init.removeprefix("pissa_niter_").replace("pissa", "0"))
    elif init not in (None, True, "true", "default"):
        why = f"lorafold does not support {init!r}; A is initialized uniformly and B to zero"
    if dora and base_method != "lora":
        options = {"over": base_method, **options}
    fields = {"method": "dora" if dora else base_method} | ({"options": options} if options else {})
    return changed(why, **fields)


# The Trainer's keys that tools rename
SHARED_KEYS: Table = {
    "max_steps": lambda value, settings: (
        mapped(steps=integer(value)) if integer(value) > 0 else mapped("no limit: epochs apply")
    ),
    "eval_steps": interval("eval_every"),
    "save_steps": interval("save_every"),
    "save_total_limit": lambda value, settings: (
        mapped("the best one is kept in addition", keep=integer(value))
        if integer(value) > 0
        else unmapped(
            "lorafold keeps 2 checkpoints and the best one; change this with --set keep=N"
        )
    ),
    **static_rows("trainer"),
}
# The Trainer's keys under its own names
TRAINER_KEYS: Table = {
    "lr_scheduler_type": (schedule, "linear"),
    "warmup_steps": (_warmup_steps, 0),
    "warmup_ratio": lambda value, settings: (
        None
        if settings["lr_scheduler_type"] == "constant" or number(settings["warmup_steps"]) > 0
        else warmup_of(number(value), share=True)
    ),
    "optim": (optimizer, "adamw_torch_fused"),
    "report_to": trackers,
    **static_rows("transformers"),
}


NO_DROPOUT = "the other tool turns dropout off in preference training"
NO_SECOND_MODEL = (
    "lorafold loads only one model: the reference is this model without the new adapter (the base,"
    " with the adapters of --over)"
)
# the losses of TRL's DPOTrainer, and those that are a `loss_type` of lorafold's dpo
DPO_LOSSES = {
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "dpo", "exo_pair": "dpo"
}  # fmt: skip
LOSS_TYPES = {"robust": "robust", "exo_pair": "exo"}
SUPERVISED = (
    "TRL averages the SFT term over the chosen tokens of a micro-batch, lorafold over the tokens of"
    " each row"
)
ORPO_TERM = (
    "TRL's SFT term also trains on the prompts and averages over the tokens of a micro-batch;"
    " lorafold's trains only on the chosen completions, one by one"
)
# The preference objective of a file's settings; None if it has no supported one
ObjectiveOf = Callable[[ToolSettings], str | None]


def has_reference(objective: str | None) -> bool:
    if objective is None or not OBJECTIVES[objective].law:
        return False
    from lorafold.training_step import preference_algorithms

    return bool(algorithm_class(OBJECTIVES[objective], preference_algorithms).has_reference)


def options_of(objective: str | None) -> Values:
    return {} if objective is None else OBJECTIVES[objective].options()


def beta(objective_of: ObjectiveOf) -> Reader:
    return if_else(lambda one: "beta" in options_of(objective_of(one)), to_field("beta", number))


def loss_option(name: str, objective_of: ObjectiveOf) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        options = options_of(objective_of(settings))
        if name not in options:
            return None
        is_same = number(value) == options[name]
        return mapped("the objective's default") if is_same else to_options(name)(value, settings)

    return read


def sft_term(value: Any, objective: str | None, remark: str = "") -> Outcome | None:
    if objective is None:
        return None
    weight = number(value)
    if weight == 0:
        return OFF
    if "sft_weight" not in options_of(objective):
        raise rejection(value, f"lorafold's objective {objective} does not support an SFT term")
    return changed(remark, objective_options={"sft_weight": weight})


def sft_term_of(objective: str) -> Reader:
    return lambda value, settings: sft_term(value, objective, SUPERVISED)


def dpo_objective(losses: Sequence[str], given: Any, key: str) -> Outcome:
    """Converts the losses of TRL's DPOTrainer to the objective, and a second loss sft to
    `sft_weight`. `given` lists the weights of the losses, or is None; `key` is their key in the
    file.
    """
    losses = list(losses)
    weights = [1.0] * len(losses)
    if given is not None:
        if not isinstance(given, list) or len(given) != len(losses):
            raise LorafoldError(f"found {losses} with {key}: {given!r}, expected one per loss")
        weights = [*map(number, given)]
    if not losses or losses[0] not in DPO_LOSSES:
        raise LorafoldError(f"found {losses}, expected {' or '.join(DPO_LOSSES)}")
    if losses[1:] not in ([], ["sft"]) or weights[0] != 1:
        raise LorafoldError(
            f"found {losses} with weights {weights}, but lorafold supports one loss of weight 1"
            " and, with sigmoid, an additional sft"
        )
    objective = DPO_LOSSES[losses[0]]
    extra = sft_term(weights[1], objective, SUPERVISED) if losses[1:] else None
    fields = extra.fields if extra else {}
    if (loss := losses[0]) in LOSS_TYPES:
        own = {"loss_type": LOSS_TYPES[loss]}
        fields = {"objective_options": {**fields.get("objective_options", {}), **own}}
    return changed(SUPERVISED if extra and extra.fields else "", objective=objective, **fields)


def dpo_label_smoothing(value: Any, settings: ToolSettings) -> Outcome | None:
    """TRL's DPOTrainer uses `label_smoothing` only for some losses."""
    if not (smoothing := number(value)):
        return None
    if LOSS_TYPES.keys() & set(names(settings["dpo_loss_type"] or settings["loss_type"])):
        return mapped(objective_options={"label_smoothing": smoothing})
    remark = "TRL 1 ignores this key for this loss; for cDPO pass --objective-options"
    return unmapped(f"{remark} label_smoothing={smoothing:g}")


def dropout(turned_off: Condition) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome:
        rate = number(value)
        off = bool(rate) and turned_off(settings)
        return mapped(NO_DROPOUT if off else "", dropout=0.0 if off else rate)

    return read
