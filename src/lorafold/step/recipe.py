"""The recipe: every choice of a training run in one frozen record.

A field that is None asks for the method's own default, so that this file knows no method. Use
`Recipe(...)` from Python; `step.reading` makes one of a YAML file, `--set` and flags.
"""

from math import ceil
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


# fields that are options of methods, and those that an adapter to start from brings along
OF_METHOD = ("rank", "alpha", "dropout", "rank_pattern", "alpha_pattern")
OF_ADAPTER = {*OF_METHOD, "method", "options", "targets", "bias", "modules_to_save", "new_tokens"}


class Recipe(BaseModel):
    """What is trained, on which objective, and how.

    Raises pydantic's ValidationError; `load_recipe` turns it into one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Name = Field("lora", description="the adaptation method")
    rank: Count | None = Field(
        None, description="rank r of the update (None: the method's own; LoRA 16)"
    )
    alpha: Positive | None = Field(
        None,
        description="scale numerator, the update is alpha/r BA (None: the method's own; LoRA 2r)",
    )
    dropout: Decay | None = Field(
        None, description="dropout on the adapter's branch (None: the method's own; LoRA 0.05)"
    )
    options: dict[str, Any] = Field(
        {}, description="further fields of the method, as in options.init=gaussian"
    )
    targets: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = Field(
        None,
        description=(
            "adapted layers: all-linear, a regex, or a list of name endings (None: the method's"
            " own; LoRA all-linear)"
        ),
    )
    rank_pattern: dict[str, Count] = Field(
        {}, description="rank of the layers that match a pattern"
    )
    alpha_pattern: dict[str, Positive] = Field(
        {}, description="alpha of the layers that match a pattern"
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="biases that are trained: none, those of adapted layers, all"
    )
    modules_to_save: tuple[Name, ...] = Field(
        (), description="modules that are trained whole and saved with the adapter"
    )
    new_tokens: tuple[Name, ...] = Field(
        (), description="words that become tokens, or are, whose rows train in embedding and head"
    )
    chat_template: Name | None = Field(
        None,
        description=(
            "file with a Jinja chat template, used in place of the model's own (none: prompt and"
            " completion are joined as they stand; a file of that name is ./none)"
        ),
    )

    objective: Literal["sft", "classify"] = Field(
        "sft",
        description=(
            "what is minimized: sft = next token on completions; classify = class of a text, by a"
            " head over the body"
        ),
    )
    base: Literal["nf4", "int8", "bf16", "fp32", "auto"] = Field(
        "nf4",
        description=(
            "how the base's weights are held: packed into 4 or 8 bits, or whole (auto: bf16 where"
            " the hardware has it)"
        ),
    )

    lr: Positive | None = Field(
        None,
        description=(
            "peak learning rate of down factors and all else (None: the method's own; LoRA 2e-4)"
        ),
    )
    lr_b: Positive | None = Field(
        None,
        description="peak learning rate of up factors, LoRA+ (None: the method's own; LoRA 3e-3)",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(
        0.03, description="share of the steps over which the learning rate rises"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="AdamW's decoupled weight decay"
    )
    clip: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest gradient norm (0: no clipping)"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay of the two moments")
    eps: Positive = Field(1e-8, description="AdamW's epsilon")
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged-adamw8bit"] = Field(
        "auto",
        description=(
            "AdamW, by the form of its state (auto: adamw, which is fp32; paged-adamw8bit on CUDA"
            " where memory is short)"
        ),
    )

    epochs: Positive = Field(1.0, description="passes over the training rows")
    steps: Count | None = Field(None, description="optimizer steps (overrides epochs)")
    batch: Count = Field(8, description="rows per optimizer step")
    accumulate: Count = Field(
        1, description="micro-batches per optimizer step, at least; divides batch"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024,
        description=(
            "tokens per row, and, packing, computed at a time; longer rows are cut, and counted"
        ),
    )
    packing: bool = Field(True, description="lay rows end to end instead of padding them (sft)")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description=(
            "recompute activations in the backward pass: less memory, more time (auto: where a step"
            " would not fit without)"
        ),
    )

    eval_fraction: Decay = Field(
        0.0, description="share of the rows held out, by seed, when there is no evaluation data"
    )
    eval_every: Count | None = Field(
        None, description="steps between evaluations (None: at each checkpoint and at the end)"
    )
    save_every: Count | None = Field(
        None, description="steps between checkpoints (None: about ten a run)"
    )
    keep: Count = Field(2, description="checkpoints kept besides the best")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="seed of the initialization, the data order and dropout"
    )
    trackers: tuple[Name, ...] = Field((), description="accelerate's trackers, as in tensorboard")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            # Python would take it for 1 or 0
            raise ValueError("something other than true or false")
        return value

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> "Recipe":
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate: found {self.accumulate}, expected a divisor of batch, which is"
                f" {self.batch}"
            )
        return self

    def for_method(self) -> dict[str, Any]:
        """What is set of the fields that are options of methods; `options` holds the others."""
        values = {name: getattr(self, name) for name in OF_METHOD}
        return {name: value for name, value in values.items() if value not in (None, {})}

    def total_steps(self, n_rows: int) -> int:
        """Optimizer steps of a run over `n_rows` training rows."""
        return self.steps or max(1, ceil(self.epochs * n_rows / self.batch))

    def checkpoint_interval(self, total_steps: int) -> int:
        """Optimizer steps between checkpoints."""
        return self.save_every or max(1, ceil(total_steps / 10))

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; `load_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
