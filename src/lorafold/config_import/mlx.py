"""Converts the YAML of `mlx_lm.lora`, with mlx-lm's defaults as of August 2026.

mlx-lm adds scale B A x to a layer's output, so alpha is scale times the rank. Its iterations are
micro-batches. It does not clip gradients or pack rows.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from math import ceil, sqrt
from pathlib import PurePath
from typing import Any

from lorafold.config_import import grpo, trainer
from lorafold.config_import.rules import (
    KEYS,
    Outcome,
    Reader,
    SourceDataset,
    Table,
    ToolSettings,
    Values,
    changed,
    choice,
    data_outcome,
    dataset,
    flattened,
    mapped,
    objects_with_path,
    pass_option,
    setting_in,
    static_rows,
    table,
    to_field,
    unmapped,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import integer, names, number, product
from lorafold.models.quantizations import bnb_storage

BLOCK = "lora_parameters"
ALL = "every linear layer"  # for a file without keys
BETAS = 0.9, 0.999
CONSTANT = "constant"  # for a file without a schedule
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
COLUMN_KEYS: Mapping[str, str] = KEYS["names"]["mlx"]["columns"]  # by lorafold's column


is_lora = setting_in("fine_tune_type", "lora", "dora")


def flatten_lora(config: Values) -> Values:
    block = config.get(BLOCK)
    if block is None:
        return config
    if not isinstance(block, dict):
        raise LorafoldError(f"{BLOCK}: found {block!r}, expected an object: rank, scale, dropout")
    if missing := [key for key in ("rank", "scale", "dropout") if key not in block]:
        raise LorafoldError(f"{BLOCK}: {', '.join(missing)} missing; mlx-lm has no default")
    return flattened(config, BLOCK)


def steps_of(key: str, settings: ToolSettings) -> int:
    accumulated = grpo.count("grad_accumulation_steps", settings)
    return max(1, ceil(settings.read(key, integer) / accumulated))


def in_steps(name: str, key: str) -> Reader:
    return lambda value, settings: mapped(**{name: steps_of(key, settings)})


def _fine_tune_type(value: Any, settings: ToolSettings) -> Outcome:
    if choice(value, "lora", "dora", "full") == "full" and settings["num_layers"] != -1:
        raise LorafoldError(
            f"found 'full' for the last {settings['num_layers']} layers (num_layers), but"
            " lorafold's full method trains the whole model: set num_layers: -1"
        )
    return mapped(objective="sft", method=value)


def _num_layers(value: Any, settings: ToolSettings) -> Outcome:
    if integer(value) < 0:
        return mapped("every layer")
    return unmapped(
        f"mlx-lm adapts only the last {integer(value)} layers, lorafold all: for fewer, pass --set"
        " targets=REGEX for their module paths"
    )


def _optimizer(value: Any, settings: ToolSettings) -> Outcome:
    name = str(value).lower()
    choice(name, "adam", "adamw", "muon", "sgd", "adafactor")
    config = settings["optimizer_config"] or {}
    given = config.get(name) or {} if isinstance(config, dict) else None
    if not isinstance(given, dict):
        raise LorafoldError(f"found optimizer_config: {config!r}, expected {name} to be an object")
    decay = number(given.get("weight_decay", 0.01)) if name == "adamw" else 0.0
    fields: dict[str, Any] = {"optimizer": "adamw", "weight_decay": decay}
    if name not in ("adam", "adamw"):
        return changed(trainer.ADAMW, **fields)
    readers = {"betas": betas, "eps": number}
    fields |= {key: read(given[key]) for key, read in readers.items() if key in given}
    why = "" if given.get("bias_correction") else _uncorrected(fields.get("betas", BETAS), settings)
    return changed(why, **fields)


def betas(value: Any) -> tuple[float, ...]:
    given = tuple(map(number, value)) if isinstance(value, list) else ()
    if len(given) != 2 or not all(0 <= one < 1 for one in given):
        raise LorafoldError(f"found betas {value!r}, expected two numbers, at least 0 and below 1")
    return given


def _uncorrected(betas: tuple[float, float], settings: ToolSettings) -> str:
    """A remark on Adam without bias correction: its step k is (1 - beta1^k) / sqrt(1 - beta2^k)
    times as large as with it. The remark is "" if this factor is about 1 on average over the run.
    """
    steps = steps_of("iters", settings)
    first = range(1, min(steps, 20_000) + 1)  # later steps don't differ
    times = 1 + sum((1 - betas[0] ** k) / sqrt(1 - betas[1] ** k) - 1 for k in first) / steps
    if round(times, 1) == 1:
        return ""
    schedule = settings["lr_schedule"]
    arguments = schedule.get("arguments") if isinstance(schedule, dict) else None
    scheduled = isinstance(arguments, list) and arguments
    rate = times * number(scheduled[0] if scheduled else settings["learning_rate"])
    near = f"--lr {rate:.2g}" + (f" --lr-b {rate:.2g}" if is_lora(settings) else "")
    return (
        f"mlx-lm does not correct the bias of Adam's moments, so its steps are {times:.1f} times as"
        f" large on average over {steps} steps: use {near} for steps of this size"
    )


def _lr_schedule(value: Any, settings: ToolSettings) -> Outcome:
    if value == CONSTANT:
        return mapped("no warm-up", schedule="constant", warmup=0.0)
    arguments = value.get("arguments") if isinstance(value, dict) else None
    if not isinstance(arguments, list) or not arguments or "name" not in value:
        raise LorafoldError(f"found {value!r}, expected an object with name and arguments (a list)")
    name, rate = value["name"], trainer.rate(is_lora)(arguments[0], settings)
    warm = integer(value.get("warmup") or 0)
    fields = {**(rate.fields if rate else {}), "schedule": SCHEDULES.get(name, "cosine")}
    fields |= {"warmup_steps": warm} if warm else {"warmup": 0.0}
    remarks = [] if name in SCHEDULES else [f"lorafold does not support {name}; cosine is used"]
    if name in SCHEDULES:
        rest = [*arguments[1:], 0, 0][:2]
        length, end = rest if name == "cosine_decay" else reversed(rest)
        steps = steps_of("iters", settings) - warm
        if number(end):
            remarks.append(f"mlx-lm ends the schedule at {end}, lorafold at 0")
        if integer(length) != steps:
            remarks.append(f"mlx-lm decays over {length} steps, lorafold over {steps}")
    if warm and number(value.get("warmup_init") or 0):
        remarks.append(
            f"mlx-lm starts the warm-up at {value['warmup_init']}, lorafold at peak / warm-up steps"
        )
    return changed("; ".join(remarks), **fields)


def _batch(value: Any, settings: ToolSettings) -> Outcome:
    steps = grpo.count("grad_accumulation_steps", settings)
    fields = {"batch": integer(value) * steps, "accumulate": steps}
    note = "; mlx-lm weights micro-batches equally, lorafold tokens" if steps > 1 else ""
    return mapped(
        f"micro-batch times accumulation, for one machine{note}", **fields, packing=False, clip=0.0
    )


def _data(value: Any, settings: ToolSettings) -> Outcome:
    if settings["hf_dataset"]:
        return mapped("replaced by hf_dataset")
    columns = {ours: settings[theirs] for ours, theirs in COLUMN_KEYS.items()}
    rows = data_outcome([SourceDataset(str(value), str(value), columns)], None)
    valid = shlex.quote(str(PurePath(str(value)) / "valid.jsonl"))
    remark = f"{rows.remark}; lorafold reads train.jsonl of a directory: add --eval-data {valid}"
    return replace(rows, remark=remark)


def _hf_dataset(value: Any, settings: ToolSettings) -> Outcome:
    sources = []
    for one in objects_with_path(value):
        place = one["path"], one.get("config"), one.get("train_split", "train[:80%]")
        columns = {ours: one.get(theirs) for ours, theirs in COLUMN_KEYS.items()}
        sources.append(dataset(*place, columns=columns))
    return data_outcome(sources, None)


def model(value: Any, settings: ToolSettings) -> Outcome:
    """lorafold can't read MLX's quantized formats, so the remark asks for the original model."""
    bits = next((n for n in (4, 8) if f"{n}bit" in str(value)), None)
    if bits is None:
        outcome = pass_option("--model", value)
        remark = f"{trainer.AUTO}; {outcome.remark}"
        return replace(outcome, status="taken", fields={"storage": "auto"}, remark=remark)
    return Outcome(
        "changed",
        {"storage": bnb_storage(bits)},
        f"lorafold does not read MLX's quantized format: pass the original of {value} as --model",
        "--model MODEL",
    )


MAIN_KEYS: Table = {
    "fine_tune_type": (_fine_tune_type, "lora"),
    "model": (model, "Qwen/Qwen3-0.6b"),
    "optimizer": (_optimizer, "adam"),
    "lr_schedule": (_lr_schedule, CONSTANT),
    "iters": (in_steps("steps", "iters"), 1000),
    "batch_size": (_batch, 4),
    "steps_per_eval": (in_steps("eval_every", "steps_per_eval"), 200),
    "save_every": (in_steps("save_every", "save_every"), 100),
    "report_to": trainer.trackers,
    "data": (_data, "mlx-community/WikiSQL"),
    "hf_dataset": _hf_dataset,
    **static_rows("mlx"),
}
LORA_KEYS: Table = {
    f"{BLOCK}.scale": (
        lambda value, settings: mapped(
            "alpha is scale times the rank", alpha=product(value, settings[f"{BLOCK}.rank"])
        ),
        20.0,
    ),
    f"{BLOCK}.keys": (
        to_field("targets", lambda value: "all-linear" if value == ALL else names(value)),
        ALL,
    ),
    "num_layers": (_num_layers, 16),
    "lora_layers": _num_layers,
    **static_rows("mlx_lora"),
}
RULES = (
    *table(MAIN_KEYS),
    *table({"learning_rate": (trainer.rate(is_lora), 1e-5)}, setting_in("lr_schedule", CONSTANT)),
    *table(LORA_KEYS, is_lora),
)
