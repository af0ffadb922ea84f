"""Converts ms-swift's settings, with its defaults as of August 2026 (4.x; 3.x calls `tuner_type`
`train_type`). ms-swift passes them to the Trainer, and for `rlhf_type` to TRL's trainers.

The batch is for one process. Without `gradient_accumulation_steps`, a step has 16 rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from lorafold.config_import import rules, trainer, trl
from lorafold.config_import.rules import Outcome, SourceDataset, Table, ToolSettings, mapped
from lorafold.errors import LorafoldError
from lorafold.foreign_options import NO_FP16, boolean, integer, names, number, targets
from lorafold.models.quantizations import bnb_storage

MARKERS = "tuner_type train_type rlhf_type quant_bits split_dataset_ratio lora_rank attn_impl"
SFT = "sft"  # for a file without rlhf_type
KINDS = {SFT: "trl-sft", "simpo": "trl-cpo", "rm": "trl-reward"} | {
    name: f"trl-{name}" for name in ("dpo", "kto", "orpo", "cpo", "grpo")
}
AUTO = "auto"  # for a file without a value
DEFAULTS = {
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "seed": 42,
}
# Defaults of a loss, if they differ from TRL's
OF_LOSS: Mapping[str, Mapping[str, Any]] = {
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "grpo": {"loss_type": "grpo", "beta": 0.04, "temperature": 0.9},
}
DTYPES = {
    AUTO: mapped(trainer.AUTO, storage="auto"),
    "bfloat16": mapped(storage="bf16"),
    "float16": rules.changed(NO_FP16, storage="bf16"),
    "float32": mapped(storage="fp32"),
}
RENAMED = {
    "train_type": "tuner_type", "sft_type": "tuner_type", "max_epochs": "num_train_epochs"
}  # fmt: skip
# ms-swift's names of TRL's keys
OF_POLICIES = {
    "max_length": "max_prompt_length",
    "overlong_filter": "mask_truncated_completions",
}
DATASET = re.compile(r"(?:(hf|ms)::)?([^#]+?)(?::([\w/.-]+))?(?:#(\d+))?", re.I)


def is_lora(settings: ToolSettings) -> bool:
    return bool(settings["tuner_type"] == "lora")


def accumulation(settings: ToolSettings) -> int:
    given, rows = settings["gradient_accumulation_steps"], "per_device_train_batch_size"
    return ceil(16 / settings.read(rows, integer)) if given == AUTO else integer(given)


def _tuner_type(value: Any, settings: ToolSettings) -> Outcome:
    if rules.choice(value, "lora", "full") == "full":
        return mapped(method="full")
    kind = str(settings["init_weights"]).lower()
    return trainer.kind_of_lora(settings.is_on("use_dora"), settings.is_on("use_rslora"), kind)


def _quant_bits(value: Any, settings: ToolSettings) -> Outcome:
    made = bnb_storage(integer(value)) or "int8"
    other = settings["quant_method"] not in (None, "bnb") or made != bnb_storage(integer(value))
    why = f"lorafold quantizes with bitsandbytes; {made} is used" if other else ""
    return rules.changed(why, storage=made)


def _learning_rate(value: Any, settings: ToolSettings) -> Outcome | None:
    own = 1e-4 if is_lora(settings) else 1e-5
    return trainer.rate(is_lora)(own if value == AUTO else value, settings)


def _max_length(value: Any, settings: ToolSettings) -> Outcome:
    if value == AUTO:
        return rules.changed("ms-swift's limit is the model's context, lorafold's is max_length")
    return mapped(max_length=integer(value))


def _dataset(value: Any, settings: ToolSettings) -> Outcome:
    found = [DATASET.fullmatch(name) for name in names(value)]
    sources = [_source(*one.groups(), settings) for one in found if one]  # type: ignore[misc]
    return rules.data_outcome(sources, trl.OBJECTIVES[KINDS[settings["rlhf_type"] or SFT]])


def _source(hub: str, path: str, subset: str, count: str, settings: ToolSettings) -> SourceDataset:
    is_here = Path(path).exists() or Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet")
    remarks = [f"only {count} rows: pass a file with them"] if count else []
    if not (is_here or hub == "hf" or settings.is_on("use_hf")):
        remarks += ["from ModelScope: pass its rows as a file, or the same dataset of the HF Hub"]
        return SourceDataset(path, None, remarks=remarks)
    return rules.dataset(path, subset, remarks=remarks)


def _loss_scale(value: Any, settings: ToolSettings) -> Outcome:
    base, *others = str(value).split("+")
    if base == "all":
        return trainer.FULL_LOSS
    why = f"lorafold gives all trained tokens the same weight; ignored: {', '.join(others)}"
    train_on = "last" if base == "last_round" else "all"
    others = [name for name in others if name != "ignore_empty_think"]
    others += [base] if base not in ("default", "last_round") else []
    return rules.changed(why if others else "", train_on=train_on)


MAIN_KEYS: Table = {
    "tuner_type": (_tuner_type, "lora"),
    "torch_dtype": (
        rules.if_else(rules.setting_in("quant_bits", None), rules.by_value(DTYPES)), AUTO,
    ),
    "quant_bits": _quant_bits,
    "learning_rate": (_learning_rate, AUTO),
    "adam_beta2": (
        lambda value, settings: mapped(betas=(number(settings["adam_beta1"]), number(value))), 0.95,
    ),
    "adam_beta1": (rules.read_with("adam_beta2"), 0.9),
    "gradient_checkpointing": (rules.to_field("gradient_checkpointing", boolean), True),
    "trust_remote_code": trainer.TRUST,
    "val_dataset": rules.if_on(trainer.EVAL_DATA),
    "split_dataset_ratio": (trainer.held_out_rows, 0.0),
    "use_hf": (rules.if_on(rules.read_with("dataset")), False),
    "dataset": _dataset,
    "advantage_estimator": rules.by_value(
        {"grpo": rules.OFF}, "lorafold's objective grpo has only this one; for rloo, set objective"
    ),
    "freeze_parameters_ratio": rules.require(0, "lorafold's full method trains the whole model"),
    "freeze_vit freeze_aligner": rules.switch(
        mapped("lorafold adapts the language model's blocks"),
        rules.unmapped(rules.REASONS["every_layer"]),
    ),
    **rules.static_rows("swift"),
}
LORA_KEYS: Table = {
    "use_dora use_rslora": (rules.if_on(trainer.PART_OF_METHOD), False),
    "init_weights": (trainer.PART_OF_METHOD, "true"),
    "lora_rank": (rules.AS_OPTION, 8),
    "lora_alpha": (rules.AS_OPTION, 32),
    "lora_bias": rules.to_field("bias"),
    "target_modules": (
        lambda value, settings: mapped(targets=settings["target_regex"] or targets(value)),
        "all-linear",
    ),
    "target_parameters": lambda value, settings: trainer.target_parameters(
        settings["target_modules"], names(value)
    ),
    "modules_to_save": rules.to_field("modules_to_save", names),
    "lorap_lr_ratio": trainer.loraplus_ratio,
    "adapters": lambda value, settings: (
        rules.pass_option("--init-adapter", names(value)[-1]) if value else rules.OFF
    ),
}
SFT_KEYS: Table = {
    "max_length": (_max_length, AUTO),
    "truncation_strategy": (
        rules.by_value(
            {"right": mapped("rows are truncated at the end")},
            rules.changed("lorafold truncates longer rows at the end"),
        ),
        "delete",
    ),
    "per_device_train_batch_size": (
        trainer.batch("process", trl.is_packed, "ms-swift max_length", accumulation), 1,
    ),
    "gradient_accumulation_steps": (
        lambda value, settings: mapped(accumulate=accumulation(settings)), AUTO,
    ),
}
COMPLETION_KEYS: Table = {
    "task_type": (
        rules.by_value(
            {"causal_lm": mapped(objective="sft"), "seq_cls": mapped(objective="classify")},
            "lorafold does not train embeddings and rerankers",
        ),
        "causal_lm",
    ),
    "loss_type": rules.reject("lorafold does not have ms-swift's own losses"),
    "packing": (rules.to_field("packing", boolean), False),
    "loss_scale": (_loss_scale, "default"),
}


def _rules(name: str) -> tuple[rules.Rule, ...]:
    kind = KINDS[name]
    rows = MAIN_KEYS | ({} if kind == "trl-grpo" else SFT_KEYS)
    rows = {**rows, **({"rpo_alpha": trainer.sft_term_of("dpo")} if name == "dpo" else {})}
    lora = {**LORA_KEYS, "lora_dropout": (trl.DROPOUTS[kind], 0.05)}
    own = (*rules.table(rows), *rules.table(lora, is_lora))
    own += rules.table(COMPLETION_KEYS) if name == SFT else ()
    return trl.rules_over(kind, own, {**DEFAULTS, **OF_LOSS.get(name, {})})


RULES = {name: _rules(name) for name in KINDS}
KNOWN = frozenset(rule.key for one in RULES.values() for rule in one) | {*RENAMED, *OF_POLICIES}
# keys of args.json that matter to another loss


def read_keys(config: Mapping[str, Any]) -> tuple[rules.TranslatedKey, ...]:
    name = config.get("rlhf_type") or SFT
    if name not in KINDS:
        raise LorafoldError(f"rlhf_type: found {name!r}, expected {', '.join(KINDS)}")
    renamed = RENAMED | (OF_POLICIES if name == "grpo" else {})
    return rules.apply_rules(RULES[name], {renamed.get(k, k): v for k, v in config.items()})
