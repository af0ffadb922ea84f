"""Keys that several tools pass to Hugging Face's Trainer, to TRL's preference trainers and to PEFT,
as of transformers 5.24 and PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from lorafold.advice import (
    ELSEWHERE,
    ONE_RATE,
    OPTIMIZERS,
    SCHEDULES,
    integer,
    names,
    number,
    product,
)
from lorafold.config_import.rules import (
    OFF,
    SAME,
    Condition,
    Outcome,
    Reader,
    Row,
    Table,
    ToolSettings,
    cases,
    changed,
    either,
    left,
    refused,
    switch,
    taken,
    to,
    to_options,
)
from lorafold.config_import.unsupported import TRAINER, TRANSFORMERS
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.options import law_class

AUTO = "there as the model's files are; here bf16 where the device multiplies it, else fp32"
RISES = "the first step has a rate of 0 there, and a share here"
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "swanlab", "aim", "clearml")
ADAMW = "lorafold trains with AdamW only, which may need another learning rate"
COMPLETIONS = taken("the loss is on completions")
EVERY_TOKEN = left("every token of {text} rows is trained, and completions of the other rows")
OF_METHOD = taken("it is part of the method")
LOOKED_UP = changed("PEFT looks them up by architecture, and lorafold by the method's own rule")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise LorafoldError(f"found {value!r}, expected text")
    return value


def schedule(value: Any, settings: ToolSettings) -> Outcome:
    if text(value) == "constant":
        return taken("it has no warm-up there", schedule="constant", warmup=0.0)
    known = value in SCHEDULES
    why = "" if known else "lorafold has cosine, linear and constant, of which cosine is taken"
    return changed(why, schedule=SCHEDULES.get(value, "cosine"))


def optimizer(value: Any, settings: ToolSettings) -> Outcome:
    paged = value in ("paged_adamw_32bit", "paged_adamw")
    why = "its fp32 state is not paged here" if paged else ADAMW
    known = text(value) in OPTIMIZERS
    return changed("" if known else why, optimizer=OPTIMIZERS.get(value, "adamw"))


def _warmup_steps(value: Any, settings: ToolSettings) -> Outcome | None:
    steps, ratio = number(value), settings["warmup_ratio"]
    if settings["lr_scheduler_type"] == "constant" or (steps == 0 and ratio is not None):
        return None
    return warmed(steps)


def warmed(length: float, share: bool = False) -> Outcome:
    """A warm-up of `length` steps, or of a share of the run: with `share`, or below 1, as in
    transformers 5.
    """
    if length == 0:
        return taken(warmup=0.0)
    if share or length < 1:
        return taken(RISES, warmup=length)
    return taken(RISES, warmup_steps=integer(length))


def total_steps(settings: ToolSettings) -> int | None:
    return max(0, integer(settings["max_steps"] or 0)) or None


def interval(name: str) -> Reader:
    checkpoints = "there are about ten checkpoints a run"
    otherwise = checkpoints if name == "save_every" else "each checkpoint is evaluated"

    def read(value: Any, settings: ToolSettings) -> Outcome:
        every, total = number(value), total_steps(settings)
        if every >= 1:
            return taken(**{name: integer(value)})
        if every <= 0:
            return OFF
        if total is None:
            return left(f"intervals are in steps here: --set {name}=STEPS; without it {otherwise}")
        return taken(**{name: ceil(every * total)})

    return read


def held_out_rows(value: Any, settings: ToolSettings) -> Outcome:
    if number(value) < 1:
        return taken(eval_fraction=number(value))
    return left(
        f"rows are held out as a share here: --set eval_fraction=SHARE, {integer(value)} over all"
        " rows, or give them as --eval-data"
    )


def trackers(value: Any, settings: ToolSettings) -> Outcome:
    if value == "none" or (named := (value,) if value == "all" else names(value)) == ("none",):
        return taken("no tracker")
    if unknown := [name for name in named if name not in TRACKERS]:
        return left(
            f"{', '.join(unknown)}: name trackers one by one, as in --set trackers=[tensorboard]"
        )
    return taken(trackers=named)


def target_parameters(modules: Any, parameters: Sequence[str]) -> Outcome:
    """Names of parameters become targets in addition to `modules`, a preset, regular expression or
    list of names; a linear layer's weight becomes the layer.
    """
    if modules == "all-linear":
        return changed("all-linear has the matrices of experts too")
    if isinstance(modules, str):
        return left("write --set targets=REGEX that matches these parameters too")
    own = tuple(name.removesuffix(".weight") for name in parameters)
    bare = " or ".join(name for name in own if "." not in name)
    return changed(f"modules called {bare} are targets too" if bare else "", targets=own)


def loraplus_ratio(value: Any, settings: ToolSettings) -> Outcome:
    remark = ONE_RATE if number(value) == 1 else ""
    return taken(remark, lr_b=product(settings["learning_rate"], value))


def rate(is_lora: Condition) -> Reader:
    both = ELSEWHERE["learning_rate"]
    return lambda value, settings: (
        taken(both.remark, **both.read(value, {})) if is_lora(settings) else taken(lr=number(value))
    )


def accumulation(settings: ToolSettings) -> int:
    return settings.read("gradient_accumulation_steps", integer)


def batch(
    of_one: str, packed: Condition, fills: str, steps: Callable[[ToolSettings], int] = accumulation
) -> Reader:
    """Read a micro-batch, which times accumulation becomes the batch. `fills` is the tool and the
    key that a packed sequence fills.
    """

    def read(value: Any, settings: ToolSettings) -> Outcome:
        rows = integer(value) * steps(settings)
        if not packed(settings):
            return taken(f"micro-batch times accumulation, of one {of_one}", batch=rows)
        tool, _, key = fills.partition(" ")
        return changed(
            f"{tool} counts packed sequences and lorafold counts rows: to see as many tokens a step"
            f" raise batch by the rows that fill {key}",
            batch=rows,
        )

    return read


def kind_of_lora(dora: bool, rslora: bool, init: Any) -> Outcome:
    beneath, options, why = "rslora" if rslora else "lora", {}, ""
    if init in ("gaussian", "loftq"):
        options["init"] = init
    elif init == "olora" or str(init).startswith("pissa"):
        if rslora:
            raise LorafoldError(f"initialization {init!r} can't be had with rsLoRA here")
        beneath = "olora" if init == "olora" else "pissa"
        if beneath == "pissa":
            options["niter"] = integer(init.removeprefix("pissa_niter_").replace("pissa", "0"))
    elif init not in (None, True, "true", "default"):
        why = f"initialization {init!r} is not here; A is drawn uniformly and B is zero"
    if dora and beneath != "lora":
        options = {"over": beneath, **options}
    fields = {"method": "dora" if dora else beneath} | ({"options": options} if options else {})
    return changed(why, **fields)


TRUST: Row = switch(left("pass --trust-remote-code", "--trust-remote-code"))
TRAINS: Row = switch(
    taken("lorafold train does it"), left("the file does not train; lorafold train does")
)
EVAL_DATA = left("pass its rows as --eval-data", "--eval-data EVAL_DATA")
interval_strategy = cases(
    {"steps": taken("the interval is in steps")},
    left(
        "checkpoints are written about ten times a run, and rows that are held out are evaluated"
        " with each: --set save_every=STEPS, --set eval_every=STEPS"
    ),
)
# The Trainer's keys that tools rename
STEPS: Table = {
    "weight_decay": (to("weight_decay", number), 0.0),
    "max_grad_norm": (SAME, 1.0),
    "adam_beta1 adam_beta2 adam_epsilon": SAME,
    "max_steps": lambda value, settings: (
        taken(steps=integer(value)) if integer(value) > 0 else taken("the epochs decide")
    ),
    "eval_steps": interval("eval_every"),
    "save_steps": interval("save_every"),
    "save_strategy eval_strategy": interval_strategy,
    "save_total_limit": lambda value, settings: (
        taken("the best is kept besides", keep=integer(value))
        if integer(value) > 0
        else left("lorafold keeps 2 checkpoints and the best: --set keep=N")
    ),
    "seed": to("seed", integer),
    "trust_remote_code": TRUST,
    "output_dir": "--out",
    "resume_from_checkpoint": "lorafold resumes runs of its own: --resume",
    **TRAINER,
}
# The Trainer's keys under its own names
ARGUMENTS: Table = {
    "lr_scheduler_type": (schedule, "linear"),
    "warmup_steps": (_warmup_steps, 0),
    "warmup_ratio": lambda value, settings: (
        None
        if settings["lr_scheduler_type"] == "constant" or number(settings["warmup_steps"]) > 0
        else warmed(number(value), share=True)
    ),
    "optim": (optimizer, "adamw_torch_fused"),
    "num_train_epochs": (SAME, 3.0),
    "use_cpu": switch(left("pass --device cpu", "--device cpu")),
    "report_to": trackers,
    "overwrite_output_dir": "pass --overwrite to replace the output of an earlier run",
    "model_name_or_path": "--model",
    **TRANSFORMERS,
}


NO_DROPOUT = "there it is off while preferences are trained"
NO_SECOND_MODEL = (
    "lorafold loads one model, and its reference is the model below the new adapter: the base, or"
    " the adapters of --over"
)
DPO_LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo"}  # of TRL's DPOTrainer
SUPERVISED = (
    "TRL averages the supervised term over the chosen tokens of a micro-batch, and lorafold over"
    " the tokens of each row"
)
ORPO_TERM = (
    "TRL's supervised term also learns the prompts, and averages over the tokens of a micro-batch;"
    " lorafold's learns each chosen completion"
)
# The preference objective of a file's settings; None: another, or a rejected one
ObjectiveOf = Callable[[ToolSettings], str | None]


def has_reference(objective: str | None) -> bool:
    if objective is None or not OBJECTIVES[objective].law:
        return False
    from lorafold.training_step import preference_algorithms

    return bool(law_class(OBJECTIVES[objective], preference_algorithms).has_reference)


def options_of(objective: str | None) -> Mapping[str, Any]:
    return {} if objective is None else OBJECTIVES[objective].options()


def beta(objective_of: ObjectiveOf) -> Reader:
    return either(lambda one: "beta" in options_of(objective_of(one)), to("beta", number))


def law_option(name: str, objective_of: ObjectiveOf) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        options = options_of(objective_of(settings))
        if name not in options:
            return None
        is_default = number(value) == options[name]
        return taken("the objective's own") if is_default else to_options(name)(value, settings)

    return read


def supervised(value: Any, objective: str | None, remark: str = "") -> Outcome | None:
    if objective is None:
        return None
    weight = number(value)
    if weight == 0:
        return OFF
    if "sft_weight" not in options_of(objective):
        raise refused(value, f"lorafold's objective {objective} takes no such term")
    return changed(remark, objective_options={"sft_weight": weight})


def supervised_as(objective: str) -> Reader:
    return lambda value, settings: supervised(value, objective, SUPERVISED)


def of_dpo(losses: Sequence[str], given: Any, key: str) -> Outcome:
    """The losses of TRL's DPOTrainer become the objective, and a second loss sft its `sft_weight`.
    `given` are their weights, or None, under the file's `key`.
    """
    losses = list(losses)
    weights = [1.0] * len(losses)
    if given is not None:
        if not isinstance(given, list) or len(given) != len(losses):
            raise LorafoldError(f"found {losses}, and {key}: {given!r}, one for each")
        weights = [*map(number, given)]
    if not losses or losses[0] not in DPO_LOSSES:
        raise LorafoldError(
            f"found {losses}, expected {', '.join(DPO_LOSSES)}, of what lorafold has"
        )
    if losses[1:] not in ([], ["sft"]) or weights[0] != 1:
        raise LorafoldError(
            f"found {losses} with weights {weights}, but lorafold has one loss of weight 1"
            " and, for sigmoid, sft besides"
        )
    objective = DPO_LOSSES[losses[0]]
    extra = supervised(weights[1], objective, SUPERVISED) if losses[1:] else None
    fields = extra.fields if extra else {}
    return changed(SUPERVISED if fields else "", objective=objective, **fields)


def smoothing_of_dpo(value: Any, settings: ToolSettings) -> Outcome | None:
    """`label_smoothing`, which TRL's DPOTrainer reads only for losses that lorafold lacks."""
    if not (smoothing := number(value)):
        return None
    remark = "TRL 1 does not read it for this loss; for cDPO pass --objective-options"
    return left(f"{remark} label_smoothing={smoothing:g}")


def dropout(turned_off: Condition) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome:
        rate = number(value)
        off = bool(rate) and turned_off(settings)
        return taken(NO_DROPOUT if off else "", dropout=0.0 if off else rate)

    return read
