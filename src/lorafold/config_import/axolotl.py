"""Converts axolotl's training YAML, with axolotl's defaults as of July 2026. Keys that matter with
`rl` or `reward_model` are in `axolotl_objectives`.

The batch is for one GPU, as in axolotl. With packing, axolotl's micro-batch counts packed
sequences, while lorafold's batch counts rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafold.config_import import axolotl_objectives as objectives
from lorafold.config_import import grpo, trainer
from lorafold.config_import.axolotl_objectives import accumulation, is_policy, of_policy
from lorafold.config_import.rules import (
    KEYS,
    OFF,
    PLACEHOLDER,
    REASONS,
    TURN_KEYS,
    Outcome,
    Reader,
    SourceDataset,
    Table,
    ToolSettings,
    Values,
    by_value,
    changed,
    choice,
    data_outcome,
    dataset,
    expected_rows,
    if_else,
    is_off,
    mapped,
    rename_remarks,
    static_rows,
    table,
    to_field,
    unmapped,
    unsupported_remarks,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import NO_FP16, boolean, integer, modules, names, number

# axolotl's names of a PEFT adapter's weights
LORA_WEIGHTS = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    "base_model.model.model.layers.17.mlp.down_proj.lora_B.default.weight",
)
NO_ADAPTER = "none (full fine-tuning)"  # for a file without `adapter`
PLUGIN_PREFIX = "axolotl.integrations."
NAMES = KEYS["names"]["axolotl"]
# Keys that are read of a dataset, and of a dataset of conversations
DATASET_KEYS = {*NAMES["dataset_keys"].split()}
CONVERSATION_KEYS = {*NAMES["conversation_keys"].split()}


BATCH = trainer.batch(
    "GPU", lambda settings: bool(settings["sample_packing"]), "axolotl sequence_len", accumulation
)
TOO_LONG = by_value(
    {
        "truncate": ("taken", "longer rows are truncated"),
        "else": ("changed", "lorafold truncates longer rows; to drop them, filter the data first"),
    }
)


def is_lora(settings: ToolSettings) -> bool:
    return settings["adapter"] != NO_ADAPTER


def is_quantized(settings: ToolSettings) -> bool:
    return bool(settings["load_in_4bit"] or settings["load_in_8bit"])


def _adapter(value: Any, settings: ToolSettings) -> Outcome:
    if not is_lora(settings):
        if settings["pretraining_dataset"]:
            raise LorafoldError("found pretraining_dataset, but lorafold does not pretrain")
        _require("learning_rate", settings)
        return mapped(method="full")
    choice(value, "lora", "qlora")
    if value == "qlora" and not settings["load_in_4bit"]:
        raise LorafoldError("found qlora without load_in_4bit: true, which axolotl requires")
    is_new = objectives.is_new_adapter(settings)
    _require("learning_rate lora_r lora_alpha" if is_new else "learning_rate", settings)
    keys = [f"lora_target_{name}" for name in ("modules", "linear", "parameters")]
    if is_new and not any(settings[key] for key in keys):
        raise LorafoldError(f"found {value} without targets, expected one of {', '.join(keys)}")
    peft = settings["peft"]
    loftq = isinstance(peft, dict) and peft.get("loftq_config")
    return trainer.kind_of_lora(
        settings.is_on("peft_use_dora"),
        settings.is_on("peft_use_rslora"),
        settings["peft_init_lora_weights"] or ("loftq" if loftq else None),
    )


def _require(keys: str, settings: ToolSettings) -> None:
    if missing := [key for key in keys.split() if settings[key] is None]:
        raise LorafoldError(f"{', '.join(missing)} missing; axolotl has no default, so set a value")


def _bf16(value: Any, settings: ToolSettings) -> Outcome | None:
    if is_quantized(settings):
        return mapped("a quantized base computes in 16-bit") if "bf16" in settings.config else None
    if value not in ("full", True) and any(settings[key] for key in ("fp16", "float16", "float32")):
        return None
    if value == "auto":
        return mapped(storage="auto")
    is_on = value == "full" or boolean(value) or bool(settings["bfloat16"])
    return mapped(storage="bf16" if is_on else "fp32")


def unless_bf16(outcome: Outcome) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        if not boolean(value):
            return OFF
        return None if (is_quantized(settings) or settings["bf16"] in (True, "full")) else outcome

    return read


def sample_packing(value: Any, settings: ToolSettings) -> Outcome:
    """Without an attention setting, axolotl's packed rows attend to each other."""
    if is_policy(settings):
        return mapped("lorafold computes a prompt once for all its completions")
    mixed = boolean(value) and all(is_off(settings[key]) for key in NAMES["attention_keys"].split())
    why = "axolotl's packed rows attend to each other without attn_implementation, lorafold's don't"
    return changed(why if mixed else "", packing=boolean(value))


def warmup_ratio(value: Any, settings: ToolSettings) -> Outcome | None:
    """If the number of steps is known, axolotl rounds the warm-up down, and limits it to 100 steps
    if the ratio is not set.
    """
    if settings["warmup_steps"] is not None:
        return None
    share, total = number(value), trainer.total_steps(settings)
    if total is None:
        return trainer.warmup_of(share, share=True)
    steps = int(share * total)
    if settings.config.get("warmup_ratio") is None:
        steps = min(steps, 100)
    return trainer.warmup_of(2 if steps == 1 else steps)


def per_epoch(name: str) -> Reader:
    """As in axolotl, the interval is the fraction 1 / (value x epochs) of the run."""
    read = trainer.interval(name)

    def of_count(value: Any, settings: ToolSettings) -> Outcome | None:
        count = number(value) * settings.read("num_epochs", number)
        return OFF if count <= 0 else read(min(1 / count, 0.999), settings)

    return of_count


def unfrozen_parameters(value: Any, settings: ToolSettings) -> Outcome:
    """axolotl attaches the adapter and then freezes all parameters that match no pattern. The
    adapter's weights are named base_model.model.PATH.lora_A.default.weight.
    """
    if not is_lora(settings):
        raise LorafoldError(f"found {value!r}, but lorafold's full method trains the whole model")
    try:  # axolotl escapes dots, except before +
        patterns = [re.compile(re.sub(r"\.(?!\+)", r"\\.", one)) for one in names(value)]
    except re.error as error:
        raise LorafoldError(f"found {value!r}, expected regular expressions: {error}") from None
    if all(any(pattern.match(name) for pattern in patterns) for name in LORA_WEIGHTS):
        return mapped("the patterns match all weights of the adapter")
    return unmapped(
        "axolotl freezes adapter weights whose names match no pattern, such as"
        f" {LORA_WEIGHTS[0]}; lorafold trains all of them: choose modules with --set targets=REGEX"
    )


def _plugins(value: Any, settings: ToolSettings) -> Outcome:
    others = []
    for name in names(value):
        own = name.startswith(PLUGIN_PREFIX)
        part = name.removeprefix(PLUGIN_PREFIX).partition(".")[0] if own else ""
        if why := NAMES["rejected_plugins"].get(part):
            raise LorafoldError(f"found {name}, which {why}; lorafold does not")
        if part not in NAMES["neutral_plugins"]:
            others.append(name)
    if others:
        return unmapped(f"unknown plugins, which have no effect in lorafold: {', '.join(others)}")
    return unmapped("affects speed, evaluation or logging, not the result of training")


def _datasets(value: Any, settings: ToolSettings) -> Outcome:
    objective = objectives.objective_of(settings)
    sources = value if isinstance(value, list) else [value]
    if not all(isinstance(one, Mapping) and one.get("path") for one in sources):
        return unmapped(f"{expected_rows(objective)}: {value}", PLACEHOLDER)
    return data_outcome([*map(_dataset, sources)], objective)


def _dataset(one: Values) -> SourceDataset:
    return dataset(
        one["path"], one.get("name"), one.get("split"), one.get("data_files"),
        columns=_columns(one), remarks=_remarks(one), kind=f" ({one.get('type', 'no type')})",
    )  # fmt: skip


def _columns(one: Values) -> dict[str, Any]:
    kind, turns = one.get("type"), one.get("field_messages") or "messages"
    if isinstance(kind, Mapping):
        names = ("instruction", "input", "output", "system")
        return {name: kind.get(f"field_{name}") for name in names}
    if kind == "completion":
        return {"text": one.get("field")}
    if str(kind).startswith("chat_template."):  # preferences
        judged = {name: one.get(f"field_{name}") for name in ("chosen", "rejected")}
        return {"prompt": turns, **judged}
    if kind != "chat_template":
        return {}
    name = "conversations" if _properties(one) == TURN_KEYS[1] else "messages"
    return {name: turns, "tools": one.get("field_tools")}


def _properties(one: Values) -> tuple[str, ...]:
    given = one.get("message_property_mappings") or {}
    return tuple(str(given.get(k) or one.get(f"message_field_{k}") or k) for k in TURN_KEYS[0])


def _remarks(one: Values) -> Iterator[str]:
    kind, template = one.get("type"), one.get("chat_template")
    format_name, known = str(kind).split(".")[0], DATASET_KEYS | {"chat_template"}
    alpaca = format_name.split(":")[0] == "alpaca"
    if isinstance(kind, Mapping) or alpaca:
        example = " (### Instruction:)" * alpaca
        yield f"lorafold uses the model's chat template instead of this prompt format{example}"
    elif format_name == "chat_template":
        known |= CONVERSATION_KEYS
        yield from rename_remarks(*_properties(one))
    if template not in (None, "tokenizer_default"):
        yield f"to use its template {template}, write it to a file and pass --chat-template FILE"
    known |= {"field"} if kind == "completion" else set()
    rest = {k: v for k, v in one.items() if k not in known and not is_off(v)}
    same = NAMES["same_values"]
    yield from unsupported_remarks([k for k, v in rest.items() if v not in same.get(k, ())])


MAIN_KEYS: Table = {
    "adapter": (_adapter, NO_ADAPTER),
    "bf16": (_bf16, "auto"),
    "fp16 float16": unless_bf16(changed(NO_FP16, storage="bf16")),
    "float32": unless_bf16(mapped(storage="fp32")),
    "lr_scheduler": (trainer.schedule, "cosine"),
    "optimizer": (trainer.optimizer, "adamw_torch_fused"),
    "micro_batch_size": (of_policy(grpo.batch, BATCH), 1),
    "gradient_accumulation_steps": (
        of_policy(
            grpo.accumulation, lambda value, settings: mapped(accumulate=accumulation(settings))
        ),
        1,
    ),
    "sequence_len": (
        if_else(
            is_policy,
            changed("axolotl does not truncate prompts; lorafold rejects longer ones"),
            to_field("max_length", integer),
        ),
        512,
    ),
    "excess_length_strategy": (
        if_else(is_policy, changed("lorafold rejects longer prompts"), TOO_LONG),
        "drop",
    ),
    "sample_packing": (sample_packing, False),
    "gradient_checkpointing": lambda value, settings: (
        changed("lorafold does not offload activations", gradient_checkpointing=True)
        if str(value).startswith(("offload", "unsloth"))
        else mapped(gradient_checkpointing=boolean(value))
    ),
    "val_set_size": (trainer.held_out_rows, 0.0),
    "evals_per_epoch": per_epoch("eval_every"),
    "saves_per_epoch": per_epoch("save_every"),
    "tokens": lambda value, settings: (
        unmapped(REASONS["own_tokens"])
        if isinstance(value, dict)
        else changed("the new rows are in the adapter, not the base", new_tokens=names(value))
    ),
    "chat_template_jinja": lambda value, settings: (
        mapped(chat_template=str(value))
        if "{" not in str(value) and Path(str(value)).suffix
        else unmapped(REASONS["template_file"])
    ),
    "chat_template_kwargs": lambda value, settings: (
        unmapped("ignored: expected an object with variables of the chat template")
        if not isinstance(value, dict)
        else changed(
            "lorafold rejects variables that the model's chat template does not use",
            template_kwargs=value,
        )
    ),
    "datasets pretraining_dataset": _datasets,
    "unfrozen_parameters": unfrozen_parameters,
    "plugins": _plugins,
    **trainer.SHARED_KEYS,
    **static_rows("axolotl"),
}
LORA_KEYS: Table = {
    "lora_dropout": (objectives.dropout, 0.0),
    "lora_target_modules": if_else(
        lambda settings: settings["lora_target_linear"],
        changed("lora_target_linear is on, so all linear layers of the blocks are targets"),
        to_field("targets", modules),
    ),
    "lora_target_parameters": lambda value, settings: trainer.target_parameters(
        "all-linear" if settings["lora_target_linear"] else settings["lora_target_modules"],
        names(value),
    ),
    "loraplus_lr_ratio": (trainer.loraplus_ratio, 1),
    **static_rows("axolotl_lora"),
}
RULES = (
    *table(MAIN_KEYS),
    *table(LORA_KEYS, is_lora),
    *table(
        {
            "warmup_steps": lambda value, settings: trainer.warmup_of(
                2 if number(value) == 1 else number(value)
            ),
            "warmup_ratio": (warmup_ratio, 0.03),
        },
        lambda settings: settings["lr_scheduler"] != "constant",
    ),
    *objectives.RULES,
)
