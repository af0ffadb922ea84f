"""`lf.estimate`: the memory of training or inference, whether it fits a device, and what would fit.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.api.arguments import Columns, Data, Rewarding, as_recipe, or_quiet
from lorafold.api.rows_estimated import setting_on_rows
from lorafold.errors import LorafoldError, both_names, called_now
from lorafold.files.page import Shown
from lorafold.machine.devices import AMPERE, check_device
from lorafold.memory import report, terms
from lorafold.memory.advice import Advice, advise, advise_on_rows
from lorafold.memory.measure import measure as measured_bytes
from lorafold.memory.modes import as_in_files, llama, setting_of
from lorafold.memory.terms import SPEED, Estimate
from lorafold.memory.trace import FSDP, STRATEGIES, Setting
from lorafold.models.loading import load_model
from lorafold.models.positions import positions_in
from lorafold.models.sources import EMBEDDED
from lorafold.opening import Base
from lorafold.ops.arithmetic import widens
from lorafold.ops.demands import Place, place_of
from lorafold.recipe.fields import OF_MEMORY, OF_ROWS
from lorafold.recipe.fitting import LENGTH, fitted_length
from lorafold.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Forecast(Shown):
    """The memory of a setting at its peak, in bytes by term.

    `advice` says whether it fits a device's memory and what would, if that was asked; `measured`
    has the bytes of a real step, if one was run. `of_this_cpu` is set if the estimate is for this
    machine's CPU instead of a GPU. Of several processes the bytes are those of
    each; `speed` is what a device computes, in operations a second.
    """

    estimate: Estimate
    setting: Setting
    advice: Advice | None = None
    measured: int | None = None
    of_this_cpu: bool = False
    speed: float = SPEED

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.estimate.total

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term; their sum is the total."""
        return self.estimate.terms

    def remarks(self) -> list[str]:
        """The lines below the terms: the device, whether it fits, and the measured bytes."""
        lines = [report.about(self.setting)] * self.of_this_cpu
        lines += report.together(self.estimate, self.setting, self.speed)
        lines += [] if self.advice is None else report.verdict(self.advice, self.setting)
        lines += [] if self.measured is None else [report.beside(self.estimate, self.measured)]
        return lines

    def as_json(self) -> dict[str, Any]:
        """All figures under the keys of `lorafold estimate --json`."""
        advice = {} if self.advice is None else asdict(self.advice)
        largest = {f"largest_{k}" if k in ("batch", "length") else k: v for k, v in advice.items()}
        measured = {} if self.measured is None else {"measured": self.measured}
        sent = self.estimate.sent
        exchange = (
            {} if sent is None else {"sent": sent.bytes, "bandwidth": sent.bandwidth(self.speed)}
        )
        return {"total": self.total, **self.terms, **exchange, "fits": None, **largest, **measured}

    def __str__(self) -> str:
        return "\n".join([*report.bars(self.estimate), *self.remarks()])


def estimate(
    model: str | Path = "smollm2",
    mode: str = "qlora",
    *,
    params: str | None = None,
    data: Data | None = None,
    rewards: Rewarding = (),
    columns: Columns | None = None,
    batch: int | None = None,
    max_length: int | None = None,
    labelled: int | None = None,
    recipe: Recipe | None = None,
    gpus: int = 1,
    strategy: str = FSDP,
    tflops: float = SPEED / 1e12,
    device_memory: int | None = None,
    measure: bool = False,
    device: str | None = None,
    compute_capability: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
    length: int | None = None,
) -> Forecast:
    """Estimate the memory of training or inference from a model's configuration, without weights.

    Args:
        model: A name or path as `lf.load_model` takes it; only its configuration is read.
        mode: inference, full, lora, qlora, or a method's name.
        params: A Llama by its size instead of a model: 7b, 13b, 33b, 65b or 70b.
        data: Training rows as `lf.train` takes them, for any objective: the estimate is that of the
            largest micro-batch of a run's first steps.
        rewards: With `data`: what judges completions, for an objective that draws them.
        columns: With `data`: the keys of the rows under other names.
        batch: Rows computed at a time; None is 1. With `data` the rows of a step, as the recipe's.
        max_length: Tokens of a row; for inference those of prompt and completion together. None
            takes 1,024, or as many as the model has positions. With `data` as the recipe's.
        labelled: Tokens of the batch that count in the loss; None counts all.
        recipe: Its fields take precedence over the mode; those that an estimate does not support
            are refused.
        gpus: Processes that train together, one on each device; `batch` is that of each.
        strategy: What of the model each of them holds: all (ddp), or its part (fsdp).
        tflops: What a device computes, in 10^12 operations a second, for the bandwidth from which
            on what they send is hidden.
        device_memory: Bytes of the device, to say whether it fits and what would.
        measure: Also load the model and run two real steps.
        device: cpu estimates for this machine's CPU; without it for a GPU of CUDA. `measure` runs
            on it: cpu, cuda, cuda:N or mps.
        compute_capability: That of the GPU, such as 8.0, which is assumed; kernels that an older
            one lacks are left out.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        console: A rich console for progress; None is quiet.
        length: The old name of `max_length`.

    Raises LorafoldError for an unknown mode or size, for arguments that exclude each other, and for
    a model that can't be traced.
    """
    if length is not None:
        if max_length is not None:
            raise LorafoldError(both_names("length", "max_length"))
        warnings.warn(called_now("length", "max_length"), DeprecationWarning, stacklevel=2)
        max_length = length
    if params is not None and str(model) != EMBEDDED:
        raise LorafoldError(
            f"--params: found --params {params} and --model {model}, expected one of the two"
        )
    if measure and params is not None:
        raise LorafoldError(
            f"--measure: found --params {params}, which has no weights; expected --model"
        )
    if gpus > 1:
        check_shared(mode, strategy, data is not None, measure)
    console, asked = or_quiet(console), as_recipe(recipe, Recipe())
    if data is None:
        check_rows_given(asked, rewards, columns)
    else:
        check_rows_alone(mode, params, labelled, measure)
    kind = (device or "cuda").partition(":")[0]
    if compute_capability is not None and (measure or kind != "cuda"):
        found_too = "--measure" if measure else f"--device {device}"
        raise LorafoldError(
            f"--compute-capability: found {found_too} too, expected it alone: it is of a GPU of"
            " CUDA that is not asked"
        )
    asked_for = Place(kind, capability(compute_capability))
    check_device(device)  # without `measure` it may be one that this machine lacks
    on_it = device if measure else None
    base = Base(model, device=on_it, revision=revision, trust_remote_code=trust_remote_code)
    if data is None:
        of_length = partial(setting_of, mode, asked, batch or 1, labelled=labelled)
        of_length(length=max_length or LENGTH)  # what is wrong with it needs no model
        config = base.config() if params is None else llama(params)
        positions = positions_in(config, False, trust_remote_code)
        setting = of_length(length=fitted_length(positions, max_length, 0, console))
    else:
        sizes = {"batch": batch, "max_length": max_length}
        given = asked.model_dump(exclude_unset=True)
        of_run = Recipe(**given | {name: n for name, n in sizes.items() if n is not None})
        setting = setting_on_rows(base, mode, of_run, data, rewards, columns, console)
        bare = {k: v for k, v in given.items() if k in OF_MEMORY}
        stored_as = setting_of(mode, Recipe(**bare), 1, LENGTH).base
        # for a GPU, as without rows
        setting, config = replace(setting, base=stored_as, widened=False), base.config()
    setting = replace(setting, trust_remote_code=trust_remote_code)
    setting = replace(setting, processes=gpus, strategy=strategy)
    stored = "storage" in asked.model_fields_set
    setting = as_in_files(setting, config, str(model), stored)
    on = base.where if measure else None
    of_this_cpu = (device if on is None else on.type) == "cpu"
    if of_this_cpu:
        setting = replace(setting, widened=widens(setting.base.dtype))
    place = asked_for if on is None else place_of(on)
    training = setting.spec is not None
    setting = replace(setting, place=place, resident=of_this_cpu and training and on is None)
    found, advice, measured = terms.estimate(config, setting), None, None
    if device_memory is not None:
        with console.status("searching for what fits, in about twenty settings"):
            looked_for = advise if data is None else advise_on_rows
            advice = looked_for(config, setting, device_memory)
    if on is not None:
        with console.status("running two real steps"):
            measured = measured_bytes(
                lambda: load_model(base.source, setting.base, on),
                setting,
                on,
            )
    return Forecast(found, setting, advice, measured, of_this_cpu, tflops * 1e12)


def check_shared(mode: str, strategy: str, data: bool, measure: bool) -> None:
    """Raise LorafoldError for what several processes don't do, or no estimate of them."""
    if strategy not in STRATEGIES:
        raise LorafoldError(
            f"--strategy: found {strategy}, expected one of {', '.join(STRATEGIES)}"
        )
    found = {"--mode inference": mode == "inference", "--data": data, "--measure": measure}
    if wrong := [name for name, given in found.items() if given]:
        raise LorafoldError(
            f"--gpus: found {', '.join(wrong)} too, expected none: the estimate is that of a"
            " training step of which each process has --batch rows"
        )


def check_rows_given(recipe: Recipe, rewards: Rewarding, columns: Columns | None) -> None:
    """Raise LorafoldError for what is of use with rows alone."""
    needy = sorted(recipe.model_fields_set & OF_ROWS)
    needy += [name for name, of in {"rewards": rewards, "columns": columns}.items() if of]
    if needy:
        raise LorafoldError(
            f"estimate: found {', '.join(needy)} without data; expected --data, since the memory of"
            " a run with them follows from its rows"
        )


def check_rows_alone(mode: str, params: str | None, labelled: int | None, measure: bool) -> None:
    """Raise LorafoldError for what is not for rows."""
    found = {
        "--mode inference": mode == "inference",
        f"--params {params}": params is not None,
        f"--labelled {labelled}": labelled is not None,
        "--measure": measure,
    }
    if wrong := [name for name, given in found.items() if given]:
        raise LorafoldError(
            f"--data: found {', '.join(wrong)} too, expected none: rows need a tokenizer, have"
            " lengths and labels of their own, and are trained on"
        )


def capability(given: str | None) -> tuple[int, int]:
    """The compute capability of a GPU, major and minor, from text such as 8.0.

    Raises LorafoldError for other text.
    """
    if given is None:
        return AMPERE
    if not re.fullmatch(r"\d{1,2}\.\d", given, re.ASCII):
        raise LorafoldError(
            f"--compute-capability: found {given!r}, expected two numbers such as 8.0 or 9.0"
        )
    major, _, minor = given.partition(".")
    return int(major), int(minor)
