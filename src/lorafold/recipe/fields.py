"""The fields of a recipe, with types, defaults and the descriptions that help and docs show."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorafold.methods import METHODS
from lorafold.models import quantizations
from lorafold.objectives import DEFAULT, descriptions

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


# fields that are options of methods; that an initial adapter sets; that affect a step's memory
METHOD_FIELDS = ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern")
ADAPTER_FIELDS = {
    *(*METHOD_FIELDS, "method", "options", "targets", "bias", "modules_to_save", "new_tokens")
}
MEMORY_FIELDS = {
    *(*METHOD_FIELDS, "method", "options", "targets", "storage", "optimizer"),
    "gradient_checkpointing",
}
# further fields that affect a step's memory, through its rows
ROW_FIELDS = {
    *("objective", "beta", "objective_options", "accumulate", "packing", "chat_template"),
    *("template_kwargs", "train_on", "mask_reasoning"),
}
# fields that affect training but not evaluation
TRAINING_FIELDS = {
    *(*MEMORY_FIELDS - {"method"}, "bias", "modules_to_save", "beta", "lr", "lr_b", "schedule"),
    *("warmup", "warmup_steps", "weight_decay", "clip", "betas", "eps", "epochs", "steps", "batch"),
    *("accumulate", "packing"),
}
# first field of a group -> heading in help and docs
GROUPS = {
    "method": "the update",
    "new_tokens": "tokens and chat template",
    "objective": "the objective and the base",
    "lr": "the optimizer",
    "epochs": "steps and batches",
    "eval_fraction": "evaluation, checkpoints, tracking",
}

# the fields that --help shows if a command has many options; --help-all shows all fields
COMMON = {
    *("method", "rank", "targets", "objective", "storage"),
    *("lr", "epochs", "steps", "batch", "max_length"),
}


def described(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


class Fields(BaseModel):
    """The fields of a recipe, each validated by itself; `Recipe` validates combinations."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Name = described("lora", f"The adaptation method: {', '.join(METHODS)}.")
    rank: Count | None = described(
        None, "The rank r of the update. Default: the method's; 16 for LoRA."
    )
    alpha: Positive | None = described(
        None, "The update is scaled by alpha / r (rslora: alpha / sqrt(r)). Default for LoRA: 2r."
    )
    dropout: Share | None = described(
        None, "Dropout on the input of the update. Default for LoRA: 0.05."
    )
    options: dict[str, Any] = described(
        {}, "Further options of the method, for example init=gaussian."
    )
    targets: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = described(
        None,
        "The target modules: a preset such as all-linear, a regular expression for whole module"
        " paths, or a list of name endings such as q_proj. Default: the method's; all-linear"
        " for LoRA.",
    )
    rank_pattern: dict[str, Count] = described(
        {}, "Another rank for modules that match a pattern, for example 0.q_proj=8."
    )
    alpha_pattern: dict[str, Positive] = described(
        {}, "Another alpha for modules that match a pattern."
    )
    bias: Literal["none", "lora_only", "all"] = described(
        "none", "Also train the biases of the target modules, or of all modules."
    )
    modules_to_save: tuple[Name, ...] = described(
        (), "Modules to train in full and save with the adapter."
    )
    new_tokens: tuple[Name, ...] = described(
        (),
        'New tokens, for example "<|user|>,<|bot|>". Their rows of the embeddings and the LM'
        " head are trained, even if they are tokens already.",
    )
    chat_template: Name | None = described(
        None,
        "A file with a Jinja chat template, which replaces the model's template and is saved"
        " with the adapter. none concatenates prompt and completion (./none is a file); tools"
        " is ChatML with tools, for models whose template does not support tools.",
    )
    template_kwargs: dict[Name, Any] = described(
        {}, "Variables for the chat template, saved with it: enable_thinking=false."
    )
    allow_control_tokens: bool = described(
        False, "Read control tokens inside messages as tokens instead of plain text."
    )
    train_on: Literal["all", "last"] = described(
        "all", "The assistant turns to train on: all, or the last one of each row."
    )
    join: Literal["none", "auto"] = described(
        "none",
        "auto joins rows with one question into conversations of 1 to 3 questions, so that the"
        " model answers a second question as well as a first.",
    )
    mask_reasoning: bool = described(
        False, "Exclude the reasoning in assistant turns from the loss."
    )
    end_of_turn: Literal["auto", "none"] = described(
        "auto", "Whether to train an end-of-turn token if the template writes none."
    )

    objective: str = described(DEFAULT, descriptions())
    beta: NonNegative | None = described(
        None,
        "The strength of the pull towards the reference model; smaller values allow larger"
        " changes. Default: the objective's; 0.1 for DPO, 0 for GRPO.",
    )
    objective_options: dict[str, Any] = described(
        {}, "Further options of the objective, for example label_smoothing=0.1."
    )
    storage: quantizations.StorageName = described(
        quantizations.DEFAULT,
        "The quantization or dtype of the base model during training:"
        f" {quantizations.STORAGE_NAMES}. auto is bf16 if the device supports it natively, else"
        " fp32.",
    )

    lr: Positive | None = described(
        None,
        "The peak learning rate. Default: the method's (2e-4 for LoRA), times the objective's"
        " factor (0.05 for DPO, 0.25 for GRPO).",
    )
    lr_b: Positive | None = described(
        None,
        "The peak learning rate of LoRA's B matrices (LoRA+). Default: the method's (3e-3 for"
        " LoRA), times the same factor; 4e-4 for LoRA with classes.",
    )
    schedule: Literal["cosine", "linear", "constant"] = described(
        "cosine", "The learning rate schedule after the warm-up."
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = described(
        0.03, "The warm-up, as a share of the steps."
    )
    warmup_steps: Count | None = described(None, "The warm-up as a number of steps instead.")
    weight_decay: NonNegative = described(
        0.0, "AdamW's decoupled weight decay of matrices; vectors such as biases have none."
    )
    clip: NonNegative = described(
        1.0, "Clip the gradient norm at this value. 0 turns clipping off."
    )
    betas: tuple[Share, Share] = described((0.9, 0.999), "The decay rates of AdamW's two moments.")
    eps: Positive = described(1e-8, "AdamW's epsilon.")
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged-adamw8bit"] = described(
        "auto",
        "AdamW with moments in fp32 or in 8 bits. auto is adamw, or paged-adamw8bit on a CUDA"
        " device that is short of memory.",
    )

    epochs: Positive | Literal["auto"] = described(
        "auto",
        "Passes over the training rows. auto is one pass, or at least 100 steps; it stops early"
        " when the held-out loss no longer falls and keeps the best adapter (policies run all"
        " steps).",
    )
    steps: Count | None = described(
        None, "The number of optimizer steps. Takes precedence over epochs."
    )
    batch: Count = described(8, "Rows per optimizer step, over all micro-batches and processes.")
    accumulate: Count = described(
        1, "Gradient accumulation: split the batch into at least this many parts."
    )
    streaming: bool = described(
        False,
        "Read rows while training without storing them, for data that is larger than the disk."
        " Requires a number of steps; held-out rows, if any, must be separate.",
    )
    shuffle_buffer: Count = described(
        10_000, "With streaming, the size of the buffer that rows are sampled from."
    )
    max_length: Annotated[int, Field(ge=2)] = described(
        1024,
        "Truncate rows to this many tokens, which is also the length of packed sequences. The"
        " default is reduced to the model's maximum if that is smaller.",
    )
    packing: bool | Literal["auto"] = described(
        "auto",
        "Pack rows end to end, with attention inside each row, instead of padding. auto also"
        " computes shared prefixes once if that is faster.",
    )
    gradient_checkpointing: bool | Literal["auto"] = described(
        "auto",
        "Recompute activations in the backward pass, to trade time for memory. auto does so if"
        " a step would not fit otherwise.",
    )
    strategy: Literal["ddp", "fsdp"] = described(
        "ddp",
        "For several processes: ddp replicates the model in each; fsdp shards its weights and"
        " gathers one block at a time.",
    )

    eval_fraction: Share = described(
        0.0, "The share of the rows to hold out if you give no held-out rows."
    )
    eval_every: Count | None = described(
        None, "Steps between evaluations. Default: at each checkpoint and at the end."
    )
    save_every: Count | None = described(
        None, "Steps between checkpoints. Default: about ten checkpoints per run."
    )
    keep: Count = described(2, "How many checkpoints to keep besides the best.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = described(
        0, "The seed, for example for the initialization, the order of the rows and dropout."
    )
    trackers: tuple[Name, ...] = described(
        (), "Experiment trackers, for example tensorboard or wandb."
    )
