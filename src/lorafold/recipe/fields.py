"""The fields of a recipe: the type, the default and the meaning of each choice of a training run.

A field that is None asks for the method's own default, so that this file knows no method. Defaults
are keywords (`default=`), where type checkers look for them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorafold.methods import METHODS
from lorafold.models import quantizations
from lorafold.objectives import DEFAULT, in_words

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


class Fields(BaseModel):
    """What each field is alone; `Recipe` says what they are together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Name = Field(
        default="lora", description=f"The adaptation method: {', '.join(METHODS)}."
    )
    rank: Count | None = Field(
        default=None,
        description="The rank r of the update. Default: the method's; 16 for LoRA.",
    )
    alpha: Positive | None = Field(
        default=None, description="The update is scaled by alpha / r. Default for LoRA: 2r."
    )
    dropout: Decay | None = Field(
        default=None, description="Dropout on the input of the update. Default for LoRA: 0.05."
    )
    options: dict[str, Any] = Field(
        default={}, description="Further options of the method, for example init=gaussian."
    )
    targets: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "The target modules: a preset such as all-linear, a regular expression for whole module"
            " paths, or a list of name endings such as q_proj. Default: the method's; all-linear"
            " for LoRA."
        ),
    )
    rank_pattern: dict[str, Count] = Field(
        default={},
        description="Another rank for modules that match a pattern, for example 0.q_proj=8.",
    )
    alpha_pattern: dict[str, Positive] = Field(
        default={}, description="Another alpha for modules that match a pattern."
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        default="none",
        description="Also train the biases of the target modules, or of all modules.",
    )
    modules_to_save: tuple[Name, ...] = Field(
        default=(), description="Modules to train in full and save with the adapter."
    )
    new_tokens: tuple[Name, ...] = Field(
        default=(),
        description=(
            'New tokens, for example "<|user|>,<|bot|>". Their rows of the embeddings and the LM'
            " head are trained, even if they are tokens already."
        ),
    )
    chat_template: Name | None = Field(
        default=None,
        description=(
            "A file with a Jinja chat template, which replaces the model's template and is saved"
            " with the adapter. none concatenates prompt and completion (./none is a file); tools"
            " is ChatML with tools, for models whose template does not support tools."
        ),
    )
    template_kwargs: dict[Name, Any] = Field(
        default={},
        description="Variables for the chat template, saved with it: enable_thinking=false.",
    )
    allow_control_tokens: bool = Field(
        default=False,
        description="Read control tokens inside messages as tokens instead of plain text.",
    )
    train_on: Literal["all", "last"] = Field(
        default="all",
        description="The assistant turns to train on: all, or the last one of each row.",
    )
    mask_reasoning: bool = Field(
        default=False, description="Exclude the reasoning in assistant turns from the loss."
    )
    end_of_turn: Literal["auto", "none"] = Field(
        default="auto",
        description="Whether to train an end-of-turn token if the template writes none.",
    )

    objective: str = Field(default=DEFAULT, description=in_words())
    beta: NonNegative | None = Field(
        default=None,
        description=(
            "The strength of the pull towards the reference model; smaller values allow larger"
            " changes. Default: the objective's; 0.1 for DPO, 0 for GRPO."
        ),
    )
    objective_options: dict[str, Any] = Field(
        default={},
        description="Further options of the objective, for example label_smoothing=0.1.",
    )
    storage: quantizations.StorageName = Field(
        default=quantizations.DEFAULT,
        description=(
            "The quantization or dtype of the base model during training:"
            f" {quantizations.LISTED}. auto is bf16 if the device multiplies it natively, else"
            " fp32. You can also write --quantization."
        ),
    )

    lr: Positive | None = Field(
        default=None,
        description=(
            "The peak learning rate. Default: the method's, or a twentieth of it for preferences;"
            " 2e-4 for LoRA."
        ),
    )
    lr_b: Positive | None = Field(
        default=None,
        description=(
            "The peak learning rate of LoRA's B matrices (LoRA+). Default: the method's; 3e-3 for"
            " LoRA, 4e-4 for LoRA with classes."
        ),
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="The learning rate schedule after the warm-up."
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.03, description="The warm-up, as a share of the steps."
    )
    warmup_steps: Count | None = Field(
        default=None,
        description="The warm-up as a number of steps instead.",
    )
    weight_decay: NonNegative = Field(
        default=0.0,
        description="AdamW's decoupled weight decay of matrices; vectors such as biases have none.",
    )
    clip: NonNegative = Field(
        default=1.0,
        description="Clip the gradient norm at this value. 0 turns clipping off.",
    )
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="The decay rates of AdamW's two moments."
    )
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon.")
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged-adamw8bit"] = Field(
        default="auto",
        description=(
            "AdamW with moments in fp32 or in 8 bits. auto is adamw, or paged-adamw8bit on a CUDA"
            " device that is short of memory."
        ),
    )

    epochs: Positive | Literal["auto"] = Field(
        default="auto",
        description=(
            "Passes over the training rows. auto is one pass, or at least 100 steps; it stops early"
            " when the held-out loss no longer falls and keeps the best adapter (policies run all"
            " steps)."
        ),
    )
    steps: Count | None = Field(
        default=None, description="The number of optimizer steps. Takes precedence over epochs."
    )
    batch: Count = Field(
        default=8, description="Rows per optimizer step, over all micro-batches and processes."
    )
    accumulate: Count = Field(
        default=1,
        description="Gradient accumulation: split the batch into at least this many parts.",
    )
    streaming: bool = Field(
        default=False,
        description=(
            "Read rows while training without storing them, for data that is larger than the disk."
            " Requires a number of steps, and separate held-out rows."
        ),
    )
    shuffle_buffer: Count = Field(
        default=10_000, description="With streaming, how many rows to sample the next one from."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        default=1024,
        description=(
            "Truncate rows to this many tokens, which is also the length of packed sequences. The"
            " default is reduced to the model's maximum if that is smaller."
        ),
    )
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description=(
            "Pack rows end to end, with attention inside each row, instead of padding. auto also"
            " computes shared prefixes once if that is faster."
        ),
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description=(
            "Recompute activations in the backward pass, to trade time for memory. auto does so if"
            " a step would not fit otherwise."
        ),
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description=(
            "For several processes: ddp replicates the model in each; fsdp shards its weights and"
            " gathers one block at a time."
        ),
    )

    eval_fraction: Decay = Field(
        default=0.0, description="The share of the rows to hold out if you give no held-out rows."
    )
    eval_every: Count | None = Field(
        default=None,
        description="Steps between evaluations. Default: at each checkpoint and at the end.",
    )
    save_every: Count | None = Field(
        default=None,
        description="Steps between checkpoints. Default: about ten checkpoints per run.",
    )
    keep: Count = Field(default=2, description="How many checkpoints to keep besides the best.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="The seed for the initialization, the order of the rows and dropout."
    )
    trackers: tuple[Name, ...] = Field(
        default=(),
        description="Experiment trackers, for example tensorboard or wandb.",
    )
