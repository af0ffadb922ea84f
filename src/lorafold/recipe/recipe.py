"""The recipe: all settings of a training run in one frozen record."""

import warnings
from collections.abc import Iterator, Mapping
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Self, get_args

import yaml
from pydantic import (
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorafold.errors import LorafoldError, listed, renamed_warning, truncate
from lorafold.files.record import RENAMED, current_names
from lorafold.foreign_options import advice
from lorafold.objectives import DEFAULT, OBJECTIVES
from lorafold.recipe.fields import METHOD_FIELDS, Fields

EXPECTATIONS = {
    "missing": "one more value",
    **dict.fromkeys(("int_parsing", "int_from_float"), "an integer"),
    "float_parsing": "a number",
}
NO_SOURCES: Mapping[str, str] = MappingProxyType({})


def explain(
    error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str] = NO_SOURCES
) -> Iterator[str]:
    """Yields a message for each invalid field, with the value found and the value expected.
    `sources` maps fields to their origins, such as a file; fields set in Python have no origin.
    """

    def origin(field: str) -> str:
        return f" (from {sources[field]})" if field in sources else ""

    # (field, key of its entry) -> failed expectations, in order, without duplicates
    expected: dict[tuple[str, str], dict[str, None]] = {}
    unknown: dict[str, list[str]] = {}  # unknown fields by origin
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if not problem["loc"]:
            yield message
            continue
        kind = problem["type"]
        message = "on or off" if kind.startswith("bool_") else EXPECTATIONS.get(kind, message)
        field, *inner = map(str, problem["loc"])
        if kind != "extra_forbidden":
            is_entry = isinstance(values[field], dict) and inner and inner[0] in values[field]
            expected.setdefault((field, inner[0] if is_entry else ""), {})[message] = None
        elif hint := advice(field, values, Fields.model_fields):
            yield f"{field}{origin(field)} is not a field of a recipe: {hint}"
        else:
            unknown.setdefault(origin(field), []).append(field)
    for place, names in unknown.items():
        what = "is not a field" if len(names) == 1 else "are not fields"
        known = listed(Fields.model_fields, max_chars=60)
        yield f"{listed(names, max_chars=60)}{place} {what} of a recipe: expected one of {known}"
    for (field, key), messages in expected.items():
        value, name = values[field], field
        if key:
            value, name = value[key], f"{field}.{key}"
        yield f"{name}: found {value!r}{origin(field)}, expected {' or '.join(messages)}"


STEPS = 100  # minimum of `epochs="auto"`
FEW = 30  # steps that are too few to learn much
RAW_ERRORS = "unworded"  # validation context in which pydantic's own error is raised


class Recipe(Fields):
    """All settings of a training run except its model, data and paths: method, tokens, objective,
    quantization, optimizer, steps and evaluation. A recipe is frozen.

    Raises LorafoldError with every invalid field, the value found and the value expected.
    """

    @field_validator("objective", mode="before")
    @classmethod
    def _known_objective(cls, value: Any) -> Any:
        if value not in list(OBJECTIVES):
            *others, last = map(repr, OBJECTIVES)
            raise ValueError(f"{', '.join(others)} or {last}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            # Python treats it as 1 or 0
            raise ValueError("something other than true or false")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate: found {self.accumulate}, expected a divisor of batch, which is"
                f" {self.batch}"
            )
        if self.warmup_steps and self.warmup != type(self).model_fields["warmup"].default:
            raise ValueError("warmup_steps: found together with warmup, expected one of the two")
        joins = self.join == "auto"
        if joins and (self.streaming or self.train_on == "last" or self.objective != DEFAULT):
            raise ValueError("join: requires objective sft, train_on all, and no streaming")
        if self.streaming and self.steps is None:
            raise ValueError("streaming: requires steps, because a stream has no known length")
        if self.streaming and self.eval_fraction:
            raise ValueError("eval_fraction: not supported with streaming; pass held-out rows")
        if self.streaming and not OBJECTIVES[self.objective].streams:
            streamed = " or ".join(name for name, one in OBJECTIVES.items() if one.streams)
            raise ValueError(f"streaming: requires the objective {streamed}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _explain_errors(
        cls, given: Any, check: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if isinstance(given, dict):
            old_names = RENAMED.keys() & given.keys()
            try:
                given = current_names(given)
            except LorafoldError as error:
                raise LorafoldError(f"recipe: {error}") from None
            for old in old_names:  # stacklevel 3 is the caller of `Recipe`
                warnings.warn(renamed_warning(old, RENAMED[old]), DeprecationWarning, stacklevel=3)
        try:
            return check(given)
        except ValidationError as error:
            if info.context == RAW_ERRORS:
                raise
            raise LorafoldError(f"recipe: {'; '.join(explain(error, given))}") from None

    if not TYPE_CHECKING:  # type checkers report it themselves

        def __setattr__(self, name: str, value: Any) -> NoReturn:
            raise LorafoldError(
                f"recipe: {name}: can't be set, because a recipe is frozen; create a new recipe, as"
                f" in lf.Recipe({name}={truncate(repr(value), 80)})"
            )

    @property
    def base(self) -> str:
        """The old name of `storage`."""
        return self.storage

    def for_method(self) -> dict[str, Any]:
        """The fields that are options of methods, such as `rank`, and are set. `options` contains
        the method's other options.
        """
        values = {name: getattr(self, name) for name in METHOD_FIELDS}
        return {name: value for name, value in values.items() if value not in (None, {})}

    def total_steps(self, n_rows: int) -> int:
        if self.steps is not None:
            return self.steps
        if self.epochs == "auto":
            return max(STEPS, ceil(n_rows / self.batch))
        return max(1, ceil(self.epochs * n_rows / self.batch))

    @property
    def stops(self) -> bool:
        """Whether training stops early when the held-out loss no longer falls, and keeps the best
        adapter. Policies run all steps, because a reward may stay constant for many steps.
        """
        ends = self.steps is None and self.epochs == "auto"
        return ends and not OBJECTIVES[self.objective].draws

    def checkpoint_interval(self, total_steps: int) -> int:
        return self.save_every or max(1, ceil(total_steps / 10))

    def to_yaml(self) -> str:
        """The whole recipe as YAML, including defaults; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
