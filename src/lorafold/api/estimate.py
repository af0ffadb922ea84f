"""`lf.estimate`: the memory of training or inference, whether it fits a device, and what would fit.
"""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError, both_names, called_now
from lorafold.recipe.fields import OF_MEMORY, OF_ROWS

if TYPE_CHECKING:
    from lorafold.memory.result import Forecast
    from lorafold.recipe.recipe import Recipe


@opt.verb
def estimate(
    model: opt.OnlyModel = "smollm2",
    mode: str = "qlora",
    *,
    params: str | None = None,
    data: Annotated[opt.Data | None, opt.Option(kind=list[str])] = None,
    rewards: opt.Judges = (),
    columns: opt.Columns = None,
    batch: Annotated[int | None, opt.Option(min=1)] = None,
    max_length: Annotated[int | None, opt.Option(min=2)] = None,
    labelled: Annotated[int | None, opt.Option(rare=True, min=1)] = None,
    recipe: Annotated[
        "Recipe | None", opt.RecipeOptions((OF_MEMORY | OF_ROWS) - {"method"}, config=False)
    ] = None,
    gpus: Annotated[int, opt.Option(min=1)] = 1,
    strategy: str = "fsdp",
    tflops: Annotated[float, opt.Option(rare=True, min=1)] = 400,
    device_memory: Annotated[int | None, opt.Option(kind=str, metavar="SIZE")] = None,
    measure: bool = False,
    device: str | None = None,
    compute_capability: Annotated[str | None, opt.Option(metavar="X.Y")] = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    length: Annotated[int | None, opt.Option(typed=False)] = None,
    **opening: Unpack[opt.Hub],
) -> "Forecast":
    """Estimate the memory of training or inference from a model's configuration alone, without its
    weights.

    With `data`, and --objective and its options as for train, the estimate is that of a run on
    these rows: of preferences, of a classifier, or of a policy with what draws its completions.

    Args:
        mode: inference, full, lora, qlora, or the name of a method.
        params: Instead of a model, a Llama of this size: 7b, 13b, 33b, 65b or 70b.
        data: Training rows, as for train: the estimate is that of the largest micro-batch of a run
            on them, whatever the objective.
        batch: Rows computed at a time. Training packs rows up to max_length tokens at a time.
            Default: 1, and with `data` 8 rows of a step.
        max_length: Tokens of a row. For inference those of prompt and completion together. Default:
            1,024, or as many as the model has positions.
        labelled: Tokens of a batch that count in the loss. Default: all.
        recipe: Its fields take precedence over the mode; those that an estimate does not support
            are refused.
        gpus: Devices that train together; the estimate is that of each, with `batch` rows.
        strategy: What each of `gpus` holds: its part (fsdp), or all (ddp).
        tflops: What a device computes, in TFLOP/s, to say which bandwidth `gpus` need.
        device_memory: The memory of a device, as in 24GB, to say whether it fits and what would. In
            Python in bytes.
        measure: Also load the model and run two real steps, to check the estimate.
        device: cpu estimates for this machine's CPU; without it for a GPU of CUDA. `measure` runs
            on this device: cpu, cuda, cuda:N or mps; without it on the fastest that this machine
            has.
        compute_capability: Of the GPU, such as 7.5 of a T4; 8.0 or newer is assumed, which has
            flash attention.
        html: Also write the terms as a chart, in one HTML file.
        length: The old name of `max_length`.

    Raises LorafoldError for an unknown mode or size, for arguments that exclude each other, and for
    a model that can't be traced.

    Examples:
        lorafold estimate --params 7b --mode lora --device-memory 24GB
        lorafold estimate --model smollm2 --mode full --batch 4 --max-length 512
        lorafold estimate --params 70b --gpus 8 --device-memory 80GB

    Notes:
        Modes. inference; full (every weight in fp32, AdamW); lora (on a base in bf16); qlora (on a
        base in 4 bits); or the name of any method of `lorafold train` (on a base in 4 bits).
        --storage chooses another storage of the base.

        For a GPU, the estimate is the memory that torch's allocator has allocated to tensors at the
        peak of a step. It assumes that 16-bit matrices are multiplied as they are, so every machine
        gives the same number. CUDA's context, the scratch memory of kernels and fragmentation are
        not counted, so leave a tenth of the device free. No estimate has been compared with a GPU
        yet.

        With --device cpu, the estimate is for this machine, whose CPU may be faster with copies of
        16-bit matrices in fp32. Of training, it is the resident memory of the whole process without
        the libraries that it imports: the term "process" is added to the tensors. `measure` runs
        two real steps and compares tensors alone, as torch's allocator counts them.
    """
    from dataclasses import replace
    from functools import partial

    from lorafold.api.arguments import as_page, as_recipe, or_quiet
    from lorafold.api.estimate_rows import setting_on_rows
    from lorafold.memory import estimate
    from lorafold.memory.estimate import advise, advise_on_rows
    from lorafold.memory.measure import measure as measured_bytes
    from lorafold.memory.presets import as_in_files, llama, setting_of
    from lorafold.memory.result import Forecast, page
    from lorafold.models.loading import load_model
    from lorafold.models.positions import positions_in
    from lorafold.models.sources import EMBEDDED
    from lorafold.ops.arithmetic import widens
    from lorafold.ops.kernel_requirements import DeviceKind, place_of
    from lorafold.recipe.fitting import LENGTH, fitted_length
    from lorafold.recipe.recipe import Recipe
    from lorafold.resolve import Base
    from lorafold.runtime.devices import choose_device

    chart = as_page(html)
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
    asked_for = DeviceKind(kind, capability(compute_capability))
    choose_device(device, absent=True)  # without `measure` it may be one that this machine lacks
    on_it = device if measure else None
    trusted = opening.get("trust_remote_code", False)
    base = Base(model, device=on_it, **opening)
    if data is None:
        of_length = partial(setting_of, mode, asked, batch or 1, labelled=labelled)
        of_length(length=max_length or LENGTH)  # what is wrong with it needs no model
        config = base.config() if params is None else llama(params)
        positions = positions_in(config, False, trusted)
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
    setting = replace(setting, trust_remote_code=trusted)
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
    found, advice, measured = estimate.estimate(config, setting), None, None
    if device_memory is not None:
        with console.status("searching for what fits, in about twenty settings"):
            looked_for = advise if data is None else advise_on_rows
            advice = looked_for(config, setting, device_memory)
    if on is not None:
        with console.status("running two real steps"):
            measured = measured_bytes(
                lambda: load_model(base.source, setting.base, on), setting, on
            )
    forecast = Forecast(found, setting, advice, measured, of_this_cpu, tflops * 1e12)
    if chart is not None:
        rows = f"{setting.batch} x {setting.length} tokens"
        title = f"{mode} of {params or model}, {rows if data is None else 'on its rows'}"
        page(found, title, chart, forecast.remarks(), device_memory)
    return forecast


def check_shared(mode: str, strategy: str, data: bool, measure: bool) -> None:
    """Raise LorafoldError for what several processes don't do, or no estimate of them."""
    from lorafold.memory.trace import STRATEGIES

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


def check_rows_given(recipe: "Recipe", rewards: opt.Rewarding, columns: opt.Named | None) -> None:
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
    from lorafold.runtime.devices import AMPERE

    if given is None:
        return AMPERE
    if not re.fullmatch(r"\d{1,2}\.\d", given, re.ASCII):
        raise LorafoldError(
            f"--compute-capability: found {given!r}, expected two numbers such as 8.0 or 9.0"
        )
    major, _, minor = given.partition(".")
    return int(major), int(minor)
