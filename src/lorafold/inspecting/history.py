"""The history of a training run, read from the record that is saved with the adapter, and warnings
about it. Records of earlier versions of lorafold contain only losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from lorafold.errors import LorafoldError, escape_unprintable
from lorafold.evaluation.observations import MIN_STEPS, first_and_last, observations_of
from lorafold.files.atomic import check_intact, read_object
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.record import RECORD
from lorafold.files.templates import interval_text, render_text

LEARNING_RATE = "learning rate"
PEFT_CONFIG = "adapter_config.json"
PEFT_SIZES = {"r": "r", "alpha": "lora_alpha"}

INTERVAL = "_interval"  # suffix of the interval of a held-out metric
MAX_VALUE = 1e150  # so that means and squares are finite


def check_bounded(value: float) -> float:
    if abs(value) > MAX_VALUE:
        raise ValueError(f"found {value:g}, expected a value from -{MAX_VALUE:g} to {MAX_VALUE:g}")
    return value


Metric = Annotated[float, Field(allow_inf_nan=False), AfterValidator(check_bounded)]


class RecordedCompletion(BaseModel):
    where: str
    prompt: str
    completion: str
    reward: Metric
    ended: bool
    each: dict[str, Metric] = {}


class SampleSet(BaseModel):
    step: int
    samples: list[RecordedCompletion]


class RunRecord(BaseModel):
    """The part of an adapter's record that describes its run; records may be untrusted."""

    recipe: dict[str, Any]
    losses: list[Metric | None] = Field(min_length=1)
    evals: dict[int, Metric] = {}
    step: int | None = None
    steps: dict[str, list[Metric | None]] = {}
    held_out: dict[str, list[int | Metric | tuple[Metric, Metric] | None]] = {}
    judged_by: dict[str, Metric] = {}
    samples: dict[Literal["first", "last"], SampleSet] = {}
    data: dict[str, Any] = {}
    trained_on: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not isinstance(self.recipe.get("objective_options") or {}, dict):
            raise ValueError("recipe.objective_options: expected an object")
        num_evaluations = len(self.held_out.get("step", ()))
        for name, figures in self.steps.items():
            if len(figures) != len(self.losses):
                raise ValueError(f"steps.{name}: {len(figures)}, not {len(self.losses)} values")
        for name, measured in self.held_out.items():
            expected_type: Any = int | float | None
            expected = "numbers"
            if name == "step":
                expected_type, expected = int, "integers"
            elif name.endswith(INTERVAL):
                expected_type, expected = tuple | None, "pairs"
            if not all(isinstance(value, expected_type) for value in measured):
                raise ValueError(f"held_out.{name}: expected {expected}")
            if len(measured) != num_evaluations:
                raise ValueError(f"held_out.{name}: {len(measured)}, not {num_evaluations} values")
        return self


@dataclass(frozen=True)
class History(ShownInNotebooks):
    """The metrics of a training run, by step.

    Attributes:
        losses: The loss of each step; None if it was not finite.
        steps: Other metrics of each step by name; None for a step without a value.
        evals: Held-out losses by step; step 0 is before training.
        held_out: Other held-out metrics by name; the entry `step` has the step of each evaluation.
        judged_by: The weight of each reward, by name.
        samples: Sample completions of the `first` and of the `last` evaluation.
        observations: Warnings and other observations, as sentences.
        configuration: The run's settings as texts, by name.
    """

    adapter: str
    recipe: Mapping[str, Any]
    losses: Sequence[float | None]
    steps: Mapping[str, Sequence[float | None]]
    evals: Mapping[int, float]
    held_out: Mapping[str, Sequence[Any]]
    judged_by: Mapping[str, float]
    samples: Mapping[str, Mapping[str, Any]]
    observations: Sequence[str]
    configuration: Mapping[str, str] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """The name of the run's objective."""
        return str(self.recipe.get("objective", "sft"))

    @property
    def by_step(self) -> dict[str, Sequence[float | None]]:
        """All metrics with one value per step; the loss comes last."""
        return {**self.steps, "loss": self.losses}

    def measured(self, name: str) -> list[tuple[int, float, Any]]:
        """(step, value, interval or None) for each evaluation that has a value of the metric."""
        if name == "loss":
            return [(step, loss, None) for step, loss in sorted(self.evals.items())]
        steps, values = (self.held_out.get(column, ()) for column in ("step", name))
        intervals = self.held_out.get(name + INTERVAL) or [None] * len(values)
        rows = zip(steps, values, intervals, strict=False)
        return [(n, float(v), interval) for n, v, interval in rows if isinstance(v, int | float)]

    @property
    def names(self) -> list[str]:
        """The names of all metrics that have a value, per step or held-out."""
        first = [] if self.judged_by else ["loss"]
        held_out = [n for n in self.held_out if n != "step" and not n.endswith(INTERVAL)]
        return [
            name
            for name in dict.fromkeys([*first, *self.steps, *held_out, "loss"])
            if self.measured(name) or any(v is not None for v in self.by_step.get(name, ()))
        ]

    def in_words(self, name: str) -> str:
        """The first and the last value of a held-out metric, with intervals; "" if it has none."""
        if not (points := self.measured(name)):
            return ""
        (start, first, low), (end, last, high) = points[0], points[-1]
        before = "before the first step" if start == 0 else f"after step {start}"
        text = f"{first:.4g}{interval_text(low)} {before}"
        return text if start == end else f"{text}, {last:.4g}{interval_text(high)} after step {end}"

    def __str__(self) -> str:
        figures = {n: ends for n, v in self.by_step.items() if (ends := first_and_last(v))}
        names = ["means of steps", *self.configuration, *map(escape_unprintable, figures)]
        return render_text(
            "inspecting/history.jinja", history=self, figures=figures, line=escape_unprintable,
            mean=fmean, wide=max(map(len, names)), n=max(MIN_STEPS, len(self.losses) // 10),
        )  # fmt: skip


def read_history(path: str | Path) -> History:
    path = Path(path)
    check_intact(path, [RECORD])
    if not (path / RECORD).is_file():
        raise LorafoldError(f"{path}: found no {RECORD}, expected the output of lorafold train")
    try:
        record = RunRecord.model_validate(read_object(path / RECORD))
    except ValidationError as error:
        problems = []
        for problem in error.errors()[:3]:
            location = f"{'.'.join(map(str, problem['loc']))}: " * bool(problem["loc"])
            problems.append(location + problem["msg"].removeprefix("Value error, "))
        raise LorafoldError(
            f"{path / RECORD}: not a valid record of lorafold train: {'; '.join(problems)}"
        ) from None
    options = record.recipe.get("objective_options") or {}
    return History(
        adapter=str(path),
        configuration=dict(configuration(path, record)),
        **record.model_dump(exclude={"step", "data", "trained_on"}),
        observations=observations_of(record.steps, record.held_out, options, record.step),
    )


def configuration(path: Path, record: RunRecord) -> Iterator[tuple[str, str]]:
    peft = read_object(path / PEFT_CONFIG) if (path / PEFT_CONFIG).is_file() else {}
    recipe, data, trained_on = record.recipe, record.data, record.trained_on or {}
    base = [peft.get("base_model_name_or_path"), trained_on.get("storage") or recipe.get("storage")]
    method = [recipe.get("method")]
    method += [f"{name} = {peft[key]}" for name, key in PEFT_SIZES.items() if peft.get(key)]
    peak = max((r for r in record.steps.get(LEARNING_RATE, ()) if r is not None), default=None)
    batch, splits = recipe.get("batch"), recipe.get("accumulate", 1)
    rows = f"{data['rows']:,} rows" if isinstance(data.get("rows"), int) else None
    settings = {
        "base model": base,
        "method": method,
        "objective": [recipe.get("objective", "sft")],
        "learning rate": [f"{peak:g} (peak)", recipe.get("schedule")] if peak else [],
        "steps": [f"{len(record.losses):,}"],
        "batch size": [batch, f"{splits} micro-batches" if splits != 1 else None],
        "training data": [data.get("source"), rows],
        "seed": [recipe.get("seed")],
        "file date": [date.fromtimestamp((path / RECORD).stat().st_mtime)],
    }
    for name, splits in settings.items():
        if text := ", ".join(str(part) for part in splits if part is not None):
            yield name, text
