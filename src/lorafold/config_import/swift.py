"""Converts ms-swift's settings, with its defaults as of August 2026: files for `swift sft`, command
lines and args.json. ms-swift passes most of them to the Trainer, and with `rlhf_type` to TRL's
trainers. 3.x calls `tuner_type` `train_type`.

The batch is for one process. Without `gradient_accumulation_steps`, a step has 16 rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from lorafold.config_import import rules, trainer, trl
from lorafold.config_import.rules import Outcome, SourceDataset, Table, ToolSettings, Values, mapped
from lorafold.foreign_options import integer, names, number
from lorafold.models.quantizations import bnb_storage

SFT = "sft"  # for a file without rlhf_type
NAMES: Mapping[str, Values] = rules.KEYS["names"]["swift"]
KINDS = NAMES["kinds"]
AUTO = "auto"  # for a file without a value
DATASET = re.compile(r"(?:(hf|ms)::)?([^#:]*):?([^#]*)#?(.*)", re.IGNORECASE)
is_lora = rules.setting_in("tuner_type", "lora")
RATE = trainer.rate(is_lora)


def accumulation(settings: ToolSettings) -> int:
    given, rows = settings["gradient_accumulation_steps"], "per_device_train_batch_size"
    return ceil(16 / max(1, settings.read(rows, integer))) if given == AUTO else integer(given)


def _tuner_type(value: Any, settings: ToolSettings) -> Outcome:
    if rules.choice(value, "lora", "full") == "full":
        return mapped(method="full")
    start = str(settings["init_weights"]).lower()
    return trainer.kind_of_lora(settings.is_on("use_dora"), settings.is_on("use_rslora"), start)


def _quant_bits(value: Any, settings: ToolSettings) -> Outcome:
    made = bnb_storage(integer(value)) if settings["quant_method"] in (None, "bnb") else None
    why = "" if made else "lorafold quantizes with bitsandbytes; nf4 is used"
    return rules.changed(why, storage=made or "nf4")


def _betas(value: Any, settings: ToolSettings) -> Outcome:
    return mapped(betas=tuple(settings.read(f"adam_beta{index}", number) for index in (1, 2)))


def _dataset(value: Any, settings: ToolSettings) -> Outcome:
    sources = []
    for hub, path, subset, count in (DATASET.findall(name)[0] for name in names(value)):
        remarks = [f"only {count} rows: save them to a file"] * bool(count)
        is_file = Path(path).exists() or Path(path).suffix in (".json", ".jsonl", ".csv")
        if is_file or hub.lower() == "hf" or settings.is_on("use_hf"):
            sources.append(rules.dataset(path, subset or None, remarks=remarks))
        else:
            remarks.append("from ModelScope: save it to a file or find it on the Hugging Face Hub")
            sources.append(SourceDataset(path, None, remarks=remarks))
    kind = KINDS.get(settings["rlhf_type"] or SFT, "")
    return rules.data_outcome(sources, trl.OBJECTIVES.get(kind))


def _loss_scale(value: Any, settings: ToolSettings) -> Outcome:
    base, *others = str(value).removesuffix("+ignore_empty_think").split("+")
    if base == "all":
        return trainer.FULL_LOSS
    equal = base in ("default", "last_round") and not others
    why = "" if equal else "lorafold gives all trained tokens the same weight"
    return rules.changed(why, train_on="last" if base == "last_round" else "all")


MAIN_KEYS: Table = {
    "tuner_type": (_tuner_type, "lora"),
    "quant_bits": _quant_bits,
    "learning_rate": (
        lambda value, settings: RATE(
            (1e-4 if is_lora(settings) else 1e-5) if value == AUTO else value, settings
        ),
        AUTO,
    ),
    "adam_beta1": (_betas, 0.9),
    "adam_beta2": (_betas, 0.95),
    "split_dataset_ratio": (trainer.held_out_rows, 0.0),
    "dataset": _dataset,
    **rules.static_rows("swift"),
}
LORA_KEYS: Table = {
    "target_regex": lambda value, settings: mapped(targets=trainer.text(value)),
    "target_parameters": trainer.parameters_besides("target_modules"),
    "lorap_lr_ratio": trainer.loraplus_ratio,
    "adapters": lambda value, settings: (
        rules.pass_option("--init-adapter", names(value)[-1]) if value else rules.OFF
    ),
    **rules.static_rows("swift_lora"),
}
# With completions that the model samples, TRL's rows for these keys apply
ROW_KEYS: dict[str, Any] = {
    **rules.static_rows("swift_rows"),
    "per_device_train_batch_size": (
        trainer.batch("process", trl.is_packed, "ms-swift max_length", accumulation), 1,
    ),
    "gradient_accumulation_steps": (
        lambda value, settings: mapped(accumulate=accumulation(settings)), AUTO,
    ),
}


def _rules(name: str) -> tuple[rules.Rule, ...]:
    kind = KINDS.get(name, "trl-sft")
    sft = {"loss_scale": (_loss_scale, "default"), **rules.static_rows("swift_sft")}
    rows = {**MAIN_KEYS, **{SFT: ROW_KEYS | sft, "grpo": {}}.get(name, ROW_KEYS)}
    rows |= {"rpo_alpha": trainer.sft_term_of("dpo")} if name == "dpo" else {}
    lora = {**LORA_KEYS, "lora_dropout": (trl.DROPOUTS[kind], 0.05)}
    dtype = rules.table(rules.static_rows("swift_dtype"), rules.setting_in("quant_bits", None))
    own = (*dtype, *rules.table(rows), *rules.table(lora, is_lora))
    base = trl.COMMON if name == SFT else trl.RULES[kind]
    return trl.rules_over(base, own, {**NAMES["defaults"], **NAMES["loss_defaults"].get(name, {})})


RULES = {name: _rules(name) for name in (SFT, *KINDS)}
KNOWN = frozenset(rule.key for one in RULES.values() for rule in one).union(
    *NAMES["renamed"].values()
)


def read_keys(config: Values) -> rules.TranslatedKeys:
    settings = ToolSettings(config, {"rlhf_type": SFT})
    name = settings.read("rlhf_type", lambda value: rules.choice(value, *RULES))
    renamed = NAMES["renamed"]["all"] | NAMES["renamed"].get(name, {})
    others = " ".join(sorted(KNOWN - {rule.key for rule in RULES[name]}))
    own = (*RULES[name], *rules.table({others: rules.REASONS["other_stage"]}))
    return rules.apply_rules(own, {renamed.get(k, k): v for k, v in config.items()})
