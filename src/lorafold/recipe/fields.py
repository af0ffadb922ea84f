"""The fields of a recipe: the type, the default and the meaning of each choice of a training run.

A field that is None asks for the method's own default, so that this file knows no method.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorafold.methods import METHODS
from lorafold.models import quantizations
from lorafold.objectives import DEFAULT, descriptions

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


# The fields that are options of methods, that come with an adapter to start from, that bear on the
# memory of a step.
OF_METHOD = ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern")
OF_ADAPTER = {*OF_METHOD, "method", "options", "targets", "bias", "modules_to_save", "new_tokens"}
OF_MEMORY = {
    *(*OF_METHOD, "method", "options", "targets", "storage", "optimizer", "gradient_checkpointing")
}
# The fields besides that bear on it through the rows.
OF_ROWS = {
    *("objective", "beta", "objective_options", "accumulate", "packing", "chat_template"),
    *("template_kwargs", "train_on", "mask_reasoning"),
}
# The fields that change what is trained and not what it is measured by.
OF_TRAINING = {
    *(*OF_MEMORY - {"method"}, "bias", "modules_to_save", "beta", "lr", "lr_b", "schedule"),
    *("warmup", "warmup_steps", "weight_decay", "clip", "betas", "eps", "epochs", "steps", "batch"),
    *("accumulate", "packing"),
}
# The subject of the fields from this one on, for help and docs.
GROUPS = {
    "method": "the update",
    "new_tokens": "tokens and chat template",
    "objective": "the objective and the base",
    "lr": "the optimizer",
    "epochs": "steps and batches",
    "eval_fraction": "evaluation, checkpoints, tracking",
}

# The fields that --help has of a command with many options; --help-all has the others too.
COMMON = {
    *("method", "rank", "alpha", "dropout", "targets", "objective", "storage", "lr"),
    *("epochs", "steps", "batch", "accumulate", "max_length", "seed"),
}


def described(default: Any, description: str) -> Any:
    """A field with a default and what `--help` says of it."""
    return Field(default=default, description=description)


class Fields(BaseModel):
    """What each field is alone; `Recipe` says what they are together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Name = described("lora", f"The adaptation method: {', '.join(METHODS)}.")
    rank: Count | None = described(
        None, "The rank r of the update. Without it the method's own; LoRA has 16."
    )
    alpha: Positive | None = described(
        None, "The update is scaled by alpha / r. Without it 2r for LoRA."
    )
    dropout: Decay | None = described(
        None, "Dropout on the input of the update. Without it 0.05 for LoRA."
    )
    options: dict[str, Any] = described(
        {}, "Further options of the method, as in init=gaussian or over=loha."
    )
    targets: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = described(
        None,
        "The modules to adapt: a preset such as all-linear, a regular expression over whole"
        " module paths, or a list of name endings such as q_proj. Without it the method's own;"
        " LoRA has all-linear.",
    )
    rank_pattern: dict[str, Count] = described(
        {}, "Another rank for the modules that a pattern matches, as in 0.q_proj=8."
    )
    alpha_pattern: dict[str, Positive] = described(
        {}, "Another alpha for the modules that a pattern matches."
    )
    bias: Literal["none", "lora_only", "all"] = described(
        "none", "Also train the biases of the adapted modules, or of all modules."
    )
    modules_to_save: tuple[Name, ...] = described(
        (), "Modules that are trained whole and saved with the adapter."
    )
    new_tokens: tuple[Name, ...] = described(
        (),
        "Words that shall each be one token. Their rows of the embedding and the head are"
        ' trained, also those of words that are tokens already. As in "<|user|>,<|bot|>".',
    )
    chat_template: Name | None = described(
        None,
        "A file with a Jinja chat template, which replaces the model's own and is saved with"
        " the adapter. none joins prompt and completion as they stand (./none is a file); tools"
        " is ChatML with tools, for models whose own template has none.",
    )
    template_kwargs: dict[Name, Any] = described(
        {}, "Variables of the chat template, saved with it: enable_thinking=false."
    )
    allow_control_tokens: bool = described(
        False, "Control tokens in contents are tokens; else they are read as text."
    )
    train_on: Literal["all", "last"] = described(
        "all", "The turns of the assistant to train on: all, or the last of each row."
    )
    mask_reasoning: bool = described(
        False, "Leave the reasoning of the assistant's turns out of the loss."
    )
    end_of_turn: Literal["auto", "none"] = described(
        "auto", "Train an end also where the template writes none with a turn, or none there."
    )

    objective: str = described(DEFAULT, descriptions())
    beta: NonNegative | None = described(
        None,
        "How strongly a preference or a policy is held to the reference: small allows large"
        " changes. Without it the objective's own; DPO has 0.1, GRPO 0.",
    )
    objective_options: dict[str, Any] = described(
        {}, "Further options of the objective, as in label_smoothing=0.1 or sft_weight=1."
    )
    storage: quantizations.StorageName = described(
        quantizations.DEFAULT,
        "How the base stores its weights while the adapter is trained:"
        f" {quantizations.LISTED}. auto is bf16 where the device multiplies it natively,"
        " else fp32.",
    )

    lr: Positive | None = described(
        None,
        "The peak learning rate. Without it the method's own, of which preferences take a"
        " twentieth; LoRA has 2e-4.",
    )
    lr_b: Positive | None = described(
        None,
        "The peak learning rate of LoRA's up factors B (LoRA+). Without it the method's own;"
        " LoRA has 3e-3, and 4e-4 for classes.",
    )
    schedule: Literal["cosine", "linear", "constant"] = described(
        "cosine", "How the learning rate goes on after the warm-up."
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = described(
        0.03, "The share of the steps over which the learning rate rises."
    )
    warmup_steps: Count | None = described(
        None, "The number of steps over which it rises, in place of their share."
    )
    weight_decay: NonNegative = described(
        0.0, "AdamW's decoupled weight decay of matrices; vectors, as biases, have none."
    )
    clip: NonNegative = described(
        1.0, "Gradients are scaled down to this norm. 0 leaves them as they are."
    )
    betas: tuple[Decay, Decay] = described((0.9, 0.999), "The decay rates of AdamW's two moments.")
    eps: Positive = described(1e-8, "AdamW's epsilon.")
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged-adamw8bit"] = described(
        "auto",
        "AdamW with its moments in fp32 or in 8 bits. auto is adamw, or paged-adamw8bit on a"
        " CUDA device that is short of memory.",
    )

    epochs: Positive | Literal["auto"] = described(
        "auto",
        "Passes over the training rows. auto is one, of few rows as many as 100 steps take; it"
        " ends where the held-out loss no longer falls, and keeps the adapter of the best step"
        " (a policy makes all steps).",
    )
    steps: Count | None = described(
        None, "The number of optimizer steps. It takes precedence over epochs."
    )
    batch: Count = described(8, "Rows of an optimizer step.")
    accumulate: Count = described(
        1, "Micro-batches of an optimizer step, at least. It divides batch."
    )
    streaming: bool = described(
        False,
        "Read rows while training, and keep none: for data that is larger than the disk. It"
        " takes a number of steps, and held-out rows of their own.",
    )
    shuffle_buffer: Count = described(
        10_000, "With streaming, the rows among which the next one is drawn."
    )
    max_length: Annotated[int, Field(ge=2)] = described(
        1024,
        "Longer rows are cut to this many tokens, and counted. A packed sequence holds as many."
        " Unless it is set, it is at most the model's positions.",
    )
    packing: bool | Literal["auto"] = described(
        "auto",
        "Lay rows end to end, with attention per row, instead of padding them. auto also"
        " computes once what rows begin with in common, where that pays.",
    )
    gradient_checkpointing: bool | Literal["auto"] = described(
        "auto",
        "Recompute activations in the backward pass, which takes less memory and more time."
        " auto does it where a step would not fit otherwise.",
    )
    strategy: Literal["ddp", "fsdp"] = described(
        "ddp",
        "What several processes hold: ddp the whole model in each, fsdp a part of its weights,"
        " of which one block is whole at a time.",
    )

    eval_fraction: Decay = described(
        0.0, "The share of the rows to hold out if no held-out rows are given."
    )
    eval_every: Count | None = described(
        None, "Steps between evaluations. Without it at each checkpoint and at the end."
    )
    save_every: Count | None = described(
        None, "Steps between checkpoints. Without it about ten checkpoints a run."
    )
    keep: Count = described(2, "Checkpoints to keep besides the best.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = described(
        0, "The seed of the initialization, the order of the rows and dropout."
    )
    trackers: tuple[Name, ...] = described(
        (), "Trackers of the accelerate library to report to, as in tensorboard."
    )
