"""The recipe: every choice of a training run in one frozen record, read from YAML, `--set` and
flags.

Precedence, weakest first: the defaults below, the YAML file, `--set key=value`, explicit flags.
Values are checked once they are merged, and everything wrong is listed in one message that names
where each value came from. A field that is None asks for the method's own default, so that this
file knows no method. Use `load_recipe` from commands and `Recipe(...)` from Python.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorafold.errors import LorafoldError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


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

    def method_options(self) -> dict[str, Any]:
        """The fields of the method's spec that are set; the others are the method's own."""
        named = {k: getattr(self, k) for k in ("rank", "alpha", "dropout")}
        patterns = {k: getattr(self, k) for k in ("rank_pattern", "alpha_pattern")}
        return (
            {k: v for k, v in named.items() if v is not None}
            | {k: v for k, v in patterns.items() if v}
            | self.options
        )

    def total_steps(self, n_rows: int) -> int:
        """Optimizer steps of a run over `n_rows` training rows."""
        return self.steps or max(1, ceil(self.epochs * n_rows / self.batch))

    def checkpoint_interval(self, total_steps: int) -> int:
        """Optimizer steps between checkpoints."""
        return self.save_every or max(1, ceil(total_steps / 10))

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; `load_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(
    config: Path | None = None,
    sets: Sequence[str] = (),
    defaults: Recipe | None = None,
    **flags: Any,
) -> Recipe:
    """The recipe that a YAML file, `--set key=value` pairs and flags ask for; a flag that is None
    was not given.

    Where none of them speaks, `defaults` holds.

    The value of a pair is YAML. A key may reach into options, rank_pattern and alpha_pattern at its
    first dot (`options.init=gaussian`, `rank_pattern.0.q_proj=8`); the rest of it is taken as it
    is. Raises LorafoldError with every bad field: its source, what was found and what is expected.
    """
    values: dict[str, Any] = defaults.model_dump(exclude_unset=True) if defaults else {}
    sources: dict[str, str] = dict.fromkeys(values, "the defaults")
    problems: list[str] = []
    for key, value in _read(config).items() if config is not None else ():
        values[key], sources[key] = value, str(config)
    for pair in sets:
        key, equals, text = pair.partition("=")
        field, dot, inner = key.strip().partition(".")
        value = _parse(text, f"--set {pair}")
        if not equals or not field:
            problems.append(f"--set {pair}: expected key=value")
        elif not dot:
            values[field], sources[field] = value, "--set"
        elif field in Recipe.model_fields and Recipe.model_fields[field].default != {}:
            problems.append(
                f"--set {pair}: {field} has nothing inside; dotted keys reach into options,"
                " rank_pattern and alpha_pattern"
            )
        else:
            below = values.get(field)
            values[field] = (below if isinstance(below, dict) else {}) | {inner: value}
            sources[field] = (
                f"{sources[field]} and --set"
                if below and sources[field] not in ("--set", "the defaults")
                else "--set"
            )
    for field, value in flags.items():
        if value is not None:
            values[field], sources[field] = value, "--" + field.replace("_", "-")
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        problems += _explain(error, values, sources)
    if problems:
        raise LorafoldError("recipe: " + "; ".join(problems))
    return recipe


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with 3e-4 a number (1.1 asks for a dot and a sign)."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise LorafoldError(
            f"{where}: not YAML{place}: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from error


def _read(config: Path) -> Mapping[str, Any]:
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LorafoldError(
            f"{config}: can't be read as a recipe: {getattr(error, 'strerror', None) or error}"
        ) from error
    found = _parse(text, str(config))
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise LorafoldError(
            f"{config}: expected recipe fields as `name: value` lines, found {type(found).__name__}"
        )
    return found


def _explain(
    error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str]
) -> Iterator[str]:
    # (field, key inside) -> what would do, in order, once
    expected: dict[tuple[str, str], dict[str, None]] = {}
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if not problem["loc"]:
            yield message
            continue
        if problem["type"] == "missing":
            message = "one more value"
        elif problem["type"].startswith("bool_"):
            message = "on or off"
        field, *inner = map(str, problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(field, Recipe.model_fields, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"known are {', '.join(Recipe.model_fields)}"
            )
            yield f"{field} (from {sources[field]}) is no field of a recipe: {hint}"
            continue
        deep = isinstance(values[field], dict) and inner and inner[0] in values[field]
        expected.setdefault((field, inner[0] if deep else ""), {})[message] = None
    for (field, key), messages in expected.items():
        found = values[field][key] if key else values[field]
        name = f"{field}.{key}" if key else field
        yield f"{name}: found {found!r} (from {sources[field]}), expected {' or '.join(messages)}"
