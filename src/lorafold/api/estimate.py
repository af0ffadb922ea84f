"""`lf.estimate`: the memory of training or inference, and what fits a device."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError, renamed_warning, two_names_message
from lorafold.recipe.fields import MEMORY_FIELDS, ROW_FIELDS

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.data.row_sources import Reading
    from lorafold.memory.estimate_report import Forecast
    from lorafold.memory.trace import MemorySetting
    from lorafold.recipe.recipe import Recipe
    from lorafold.resolve import Base


@opt.verb
def estimate(
    model: opt.OnlyModel = "smollm2",
    mode: str = "qlora",
    *,
    params: str | None = None,
    data: Annotated[opt.Data | None, opt.Option(kind=list[str])] = None,
    rewards: opt.Rewards = (),
    batch: opt.OptionalCount = None,
    max_length: opt.OptionalLength = None,
    labelled: Annotated[int | None, opt.Option(rare=True, min=1)] = None,
    recipe: Annotated[
        "Recipe | None", opt.RecipeOptions((MEMORY_FIELDS | ROW_FIELDS) - {"method"}, config=False)
    ] = None,
    gpus: opt.Count = 1,
    strategy: str = "fsdp",
    tflops: Annotated[float, opt.Option(rare=True, min=1)] = 400,
    device_memory: Annotated[str | int | None, opt.Option(kind=str, metavar="SIZE")] = None,
    measure: bool = False,
    device: str | None = None,
    compute_capability: Annotated[str | None, opt.Option(metavar="X.Y")] = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    length: Annotated[int | None, opt.Option(python_only=True)] = None,
    **base_options: Unpack[opt.EstimateOptions],
) -> "Forecast":
    """Estimate the memory of training or inference from a model's configuration, without its
    weights.

    With `data` (and --objective and its options, as for train), the estimate is for a run on these
    rows: for preferences, a classifier, or a policy including the sampling of its completions.

    Args:
        mode: inference, full, lora, qlora, or the name of a method.
        params: Instead of a model, the size of a Llama: 7b, 13b, 33b, 65b or 70b.
        data: Training rows, as for train; the estimate is for the largest micro-batch.
        batch: Rows per forward pass; training packs them up to max_length tokens. Default: 1. With
            `data`: rows per optimizer step as in train, 8.
        max_length: Tokens per row; for inference, of prompt and completion. Default: 1,024, or the
            model's maximum if it is smaller.
        labelled: Tokens per batch that count in the loss. Default: all.
        recipe: Fields that override the mode; unsupported ones are rejected.
        gpus: The number of devices that train together; the estimate is for each, with `batch`
            rows.
        strategy: fsdp (the weights are sharded over `gpus`) or ddp (replicated).
        tflops: The throughput of a device in TFLOP/s, to compute the bandwidth that `gpus` need.
        device_memory: The memory of a device, for example 24GB, to check whether the run fits and
            what would fit. In Python also a number of bytes.
        measure: Also load the model and run two real steps, to check the estimate.
        device: The device to estimate for: cpu is this machine's CPU. Default: a CUDA GPU. With
            `measure`, the device that runs the steps. Default: the fastest one.
        compute_capability: The GPU's compute capability, for example 7.5 for a T4. Default: 8.0 or
            newer, with FlashAttention.
        html: Also write a chart of the memory by part to one HTML file.
        length: The old name of `max_length`.

    Raises LorafoldError for an unknown mode or size, arguments that exclude each other, or a model
    that can't be traced.

    Examples:
        lorafold estimate --params 7b --mode lora --device-memory 24GB
        lorafold estimate --model smollm2 --mode full --batch 4 --max-length 512
        lorafold estimate --params 70b --gpus 8 --device-memory 80GB

    Notes:
        Modes. inference (bf16); full (all weights in fp32, AdamW); lora (base model in bf16); qlora
        (base model in 4 bits); or any method of `lorafold train` (base model in 4 bits).
        --quantization chooses another quantization or dtype of the base model, for example bf16
        for full.

        For a GPU, the estimate is the peak memory that torch's allocator has allocated to tensors
        during a step, with 16-bit matrices multiplied without conversion. It does not include the
        CUDA context, scratch memory of kernels or fragmentation, so leave a tenth of the device
        free. No estimate has been compared with a real GPU yet.

        With --device cpu, the estimate is for this machine's CPU, which may use fp32 copies of
        16-bit matrices. For training, it is the resident memory of the process without imported
        libraries: the tensors, and the report's line `process`. `measure` compares only tensors.
    """
    from dataclasses import replace
    from functools import partial

    from lorafold.api.arguments import as_html_path, as_reading, as_recipe, console_or_quiet
    from lorafold.memory import estimate
    from lorafold.memory.estimate import advise, advise_on_rows
    from lorafold.memory.estimate_report import Forecast, page
    from lorafold.memory.measure import measure as measured_bytes
    from lorafold.memory.presets import llama, memory_setting, with_file_quantization
    from lorafold.memory.trace import STRATEGIES
    from lorafold.models.loading import load_model
    from lorafold.models.positions import positions_in
    from lorafold.models.sources import EMBEDDED
    from lorafold.ops.arithmetic import widens
    from lorafold.recipe.recipe import Recipe
    from lorafold.recipe.resolve_settings import DEFAULT_MAX_LENGTH, fit_length
    from lorafold.resolve import Base
    from lorafold.runtime.assumed_device import DeviceKind, kind_of_device
    from lorafold.runtime.devices import choose_device

    html_path = as_html_path(html)
    if length is not None:
        if max_length is not None:
            raise LorafoldError(two_names_message("length", "max_length"))
        warnings.warn(renamed_warning("length", "max_length"), DeprecationWarning, stacklevel=2)
        max_length = length
    memory_bytes = parse_bytes(device_memory) if isinstance(device_memory, str) else device_memory
    if params is not None and str(model) != EMBEDDED:
        raise LorafoldError(
            f"--params: found --params {params} and --model {model}, expected only one of them"
        )
    if measure and params is not None:
        raise LorafoldError(
            f"--measure: needs a model with weights; replace --params {params} by --model"
        )
    if gpus > 1 and strategy not in STRATEGIES:
        raise LorafoldError(
            f"--strategy: found {strategy}, expected one of {', '.join(STRATEGIES)}"
        )
    excluded = {"--mode inference": mode == "inference", "--measure": measure}
    if gpus > 1:
        reason = "the estimate is for a training step with --batch rows in each process"
        check_excluded("--gpus", {**excluded, "--data": data is not None}, reason)
    console, recipe_overrides = console_or_quiet(console), as_recipe(recipe, Recipe())
    set_fields = recipe_overrides.model_dump(exclude_unset=True)
    needs_data = sorted(set_fields.keys() & ROW_FIELDS)
    reading = as_reading(base_options)
    opening: opt.HubOptions = base_options
    given = {"rewards": rewards, **reading._asdict()}
    needs_data += [name for name, of in given.items() if of]
    if data is not None:
        excluded[f"--params {params}"] = params is not None
        excluded[f"--labelled {labelled}"] = labelled is not None
        reason = "the estimate is for training on these rows, with the model's tokenizer"
        check_excluded("--data", excluded, reason)
    elif needs_data:
        raise LorafoldError(
            f"estimate: found {', '.join(needs_data)} without --data; pass --data, because the"
            " memory of such a run depends on its rows"
        )
    # without `measure` the device need not exist
    device_type = choose_device("cuda" if device is None else device, absent=True).type
    if compute_capability is not None:
        no_gpu = {f"--device {device}": device_type != "cuda", "--measure": measure}
        check_excluded("--compute-capability", no_gpu, "it describes the CUDA GPU to estimate for")
    target_device = DeviceKind(device_type, parse_capability(compute_capability))
    trust_code = base_options.get("trust_remote_code", False)
    base = Base(model, device=device if measure else None, **opening)
    if data is None:
        # reports errors before the configuration is read
        memory_setting(mode, recipe_overrides, batch or 1, DEFAULT_MAX_LENGTH, labelled)
        config = base.config() if params is None else llama(params)
        fitted = fit_length(positions_in(config, False, trust_code), max_length, 0, console)
        setting = memory_setting(mode, recipe_overrides, batch or 1, fitted, labelled)
    else:
        sizes = {"batch": batch, "max_length": max_length}
        run_recipe = Recipe(**set_fields | {name: n for name, n in sizes.items() if n is not None})
        setting = setting_on_rows(base, mode, run_recipe, data, rewards, reading, console)
        memory_recipe = Recipe(**{k: v for k, v in set_fields.items() if k in MEMORY_FIELDS})
        base_storage = memory_setting(mode, memory_recipe, 1, DEFAULT_MAX_LENGTH).base
        # the estimate is for a GPU, as it is without `data`
        setting, config = replace(setting, base=base_storage, widened=False), base.config()
    setting = with_file_quantization(setting, config, str(model), "storage" in set_fields)
    measured_device = base.where if measure else None
    is_this_cpu = (device if measured_device is None else measured_device.type) == "cpu"
    setting = replace(
        setting,
        trust_remote_code=trust_code,
        processes=gpus,
        strategy=strategy,
        widened=widens(setting.base.dtype) if is_this_cpu else setting.widened,
        device_kind=target_device if measured_device is None else kind_of_device(measured_device),
        resident=is_this_cpu and setting.spec is not None and measured_device is None,
    )
    total, advice, measured_memory = estimate.estimate(config, setting), None, None
    if memory_bytes is not None:
        with console.status("searching for settings that fit (about 20 estimates)"):
            search = advise if data is None else advise_on_rows
            advice = search(config, setting, memory_bytes)
    if measured_device is not None:
        with console.status("running two real steps"):
            load = partial(load_model, base.source, setting.base, measured_device)
            measured_memory = measured_bytes(load, setting, measured_device)
    forecast = Forecast(total, setting, advice, measured_memory, is_this_cpu, tflops * 1e12)
    if html_path is not None:
        rows = f"{setting.batch} x {setting.length} tokens" if data is None else "on your rows"
        title = f"{mode} of {params or model}, {rows}"
        page(total, title, html_path, forecast.remarks(), memory_bytes)
    return forecast


def setting_on_rows(
    base: "Base",
    mode: str,
    recipe: "Recipe",
    data: opt.Data,
    rewards: opt.RewardSources,
    reading: "Reading",
    console: "Console",
) -> "MemorySetting":
    """Returns the memory setting of the largest micro-batch of a `lorafold train` run."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from lorafold.api.arguments import as_rows, source_label, with_rewards
    from lorafold.memory.presets import check_fields, recipe_for_mode

    check_fields(recipe, MEMORY_FIELDS | ROW_FIELDS | {"batch", "max_length"})
    recipe, functions, _ = with_rewards(recipe_for_mode(mode, recipe), rewards)
    rows = as_rows(data, reading, console, recipe=recipe)
    from lorafold.training.inputs import RunRequest
    from lorafold.training.setup import largest_memory_setting, set_up

    with TemporaryDirectory() as folder:
        out, label = Path(folder) / "adapter", source_label(data)
        request = RunRequest(base, out, recipe, rows, label, rewards=functions)
        setting = largest_memory_setting(set_up(request, console))
    return replace(setting, checkpointing=recipe.gradient_checkpointing is True)


def check_excluded(option: str, excluded: Mapping[str, bool], reason: str) -> None:
    """Raises an error if one of the `excluded` options is given together with `option`."""
    if conflicts := [name for name, is_given in excluded.items() if is_given]:
        raise LorafoldError(f"{option}: can't be combined with {', '.join(conflicts)}: {reason}")


def parse_capability(text: str | None) -> tuple[int, int]:
    """Parses a compute capability such as 8.0 into (major, minor)."""
    from lorafold.runtime.devices import AMPERE

    if text is None:
        return AMPERE
    if not re.fullmatch(r"\d{1,2}\.\d", text, re.ASCII):
        raise LorafoldError(
            f"--compute-capability: found {text!r}, expected MAJOR.MINOR such as 8.0"
        )
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def parse_bytes(text: str) -> int:
    """Parses a size such as 24GB, 24GiB or 500MB into bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None or not match[2]:
        hint = f"; did you mean {text}GB?" if re.fullmatch(r"[\d.]+", text) else ""
        expected = "expected a size as in 24GB or 24GiB"
        raise LorafoldError(f"--device-memory: found {text}, {expected}{hint}")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** (1 + "KMGT".index(match[2])))
