"""The recipe: every choice of a training run in one frozen record.

Use `Recipe(...)` from Python; `recipe.parsing` makes one of a YAML file, `--set` and flags.
"""

import warnings
from math import ceil
from typing import TYPE_CHECKING, Any, NoReturn, Self, get_args

import yaml
from pydantic import (
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorafold.errors import LorafoldError, called_now, cut
from lorafold.files.record import RENAMED, named_as_now
from lorafold.objectives import OBJECTIVES, named
from lorafold.recipe.fields import OF_METHOD, Fields
from lorafold.recipe.validation import explain

STEPS = 100  # the least of `epochs="auto"`
FEW = 30  # steps, by which a run learns little
UNWORDED = "unworded"  # the context of those who tell in their own words what is wrong


class Recipe(Fields):
    """What is trained, on which objective, and how.

    Raises LorafoldError that names every bad field, what was found and what was expected.
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
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            # Python would take it for 1 or 0
            raise ValueError("something other than true or false")
        return value

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate: found {self.accumulate}, expected a divisor of batch, which is"
                f" {self.batch}"
            )
        if self.warmup_steps and self.warmup != type(self).model_fields["warmup"].default:
            raise ValueError("warmup_steps: found beside warmup, expected one of the two")
        if self.streaming and self.steps is None:
            raise ValueError("streaming: expected a number of steps, since the rows have no end")
        if self.streaming and self.eval_fraction:
            raise ValueError("eval_fraction: a stream has no rows to hold out; give held-out rows")
        if self.streaming and not OBJECTIVES[self.objective].streams:
            streamed = named(name for name, one in OBJECTIVES.items() if one.streams)
            raise ValueError(f"streaming: expected the objective {streamed}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(
        cls, given: Any, check: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if isinstance(given, dict):
            old_names = RENAMED.keys() & given.keys()
            try:
                given = named_as_now(given)
            except LorafoldError as error:
                raise LorafoldError(f"recipe: {error}") from None
            for old in old_names:  # stacklevel 3 is the caller of `Recipe`
                warnings.warn(called_now(old, RENAMED[old]), DeprecationWarning, stacklevel=3)
        try:
            return check(given)
        except ValidationError as error:
            if info.context == UNWORDED:
                raise
            raise LorafoldError(f"recipe: {'; '.join(explain(error, given))}") from None

    if not TYPE_CHECKING:  # type checkers say so themselves

        def __setattr__(self, name: str, value: Any) -> NoReturn:
            """A recipe does not change. Raises LorafoldError, which says how to make another."""
            raise LorafoldError(
                f"recipe: {name}: found a new value, expected none, as a recipe is frozen; make"
                f" another one, as in lf.Recipe({name}={cut(repr(value), 80)})"
            )

    @property
    def base(self) -> str:
        """The old name of `storage`."""
        return self.storage

    def for_method(self) -> dict[str, Any]:
        """What is set of the fields that are options of methods; `options` holds the others."""
        values = {name: getattr(self, name) for name in OF_METHOD}
        return {name: value for name, value in values.items() if value not in (None, {})}

    def total_steps(self, n_rows: int) -> int:
        """Optimizer steps of a run over `n_rows` training rows."""
        if self.steps is not None:
            return self.steps
        if self.epochs == "auto":
            return max(STEPS, ceil(n_rows / self.batch))
        return max(1, ceil(self.epochs * n_rows / self.batch))

    @property
    def stops(self) -> bool:
        """Whether training ends where the held-out loss no longer falls, and keeps the best step's
        adapter. A reward may stay where it is for long, so a policy makes all its steps.
        """
        ends = self.steps is None and self.epochs == "auto"
        return ends and not OBJECTIVES[self.objective].draws

    def checkpoint_interval(self, total_steps: int) -> int:
        """Optimizer steps between checkpoints."""
        return self.save_every or max(1, ceil(total_steps / 10))

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; `load_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
