"""LLaMA-Factory's training YAML: the table of rules, one for a key, with its own defaults and those
of the Trainer that it hands them to.

Read off LLaMA-Factory's argument classes as of August 2026. Values that need more than a conversion
are read in `llamafactory_readers`, and keys that a recipe has no field for are listed in
`no_counterpart`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafold.files.atomic import read_object
from lorafold.translating import llamafactory_preferences as preferences
from lorafold.translating import llamafactory_readers as readers
from lorafold.translating import trainer
from lorafold.translating.convert import boolean, integer, names, number
from lorafold.translating.llamafactory_preferences import objective_of
from lorafold.translating.no_counterpart import LLAMAFACTORY, SYSTEM
from lorafold.translating.preferences import beta, law_option, rows_wanted
from lorafold.translating.rows import Rows, differing, given_as_data, of_hub
from lorafold.translating.rules import (
    Outcome,
    Rule,
    Settings,
    all_without,
    changed,
    is_off,
    left,
    option,
    refusing,
    taken,
    to,
    without,
)

INFO = "dataset_info.json"
ONLINE = "ONLINE"  # a dataset_dir whose names are those of hub datasets
READ = {
    "hf_hub_url", "ms_hub_url", "om_hub_url", "file_name", "subset", "split", "formatting",
    "ranking", "columns", "tags",
}  # fmt: skip
# lorafold's columns by theirs, of both forms
INSTRUCTIONS = {"instruction": "prompt", "input": "query", "output": "response"}
JUDGED = {"chosen": "chosen", "rejected": "rejected", "label": "kto_tag"}
BESIDE = {"system": "system", "tools": "tools"}
LEFT = ("history", "images", "videos", "audios")


def dataset(value: Any, settings: Settings) -> Outcome:
    """`dataset` goes to `--data`, as `dataset_info.json` says where that can be read."""
    folder = Path(str(settings["dataset_dir"] or "data"))
    info = read_object(folder / INFO) if (folder / INFO).is_file() else {}
    found = [_rows(name, info.get(name), folder) for name in names(value)]
    return given_as_data(found, rows_wanted(objective_of(settings)))


def _rows(name: str, info: Any, folder: Path) -> Rows:
    if str(folder) == ONLINE:
        return Rows(name, name)
    if not isinstance(info, Mapping):
        return Rows(name, None, {}, [f"not found in {folder / INFO}"])
    file = info.get("file_name")
    path = info.get("hf_hub_url") or (str(folder / file) if file else None)
    at = of_hub(path or name, info.get("subset"), info.get("split"))
    return Rows(name, at.path if path else None, _columns(info), [*at.said, *_said(info)])


def _columns(info: Mapping[str, Any]) -> dict[str, str]:
    given = info.get("columns") or {}
    judged = info.get("ranking") or "kto_tag" in given
    ours = {name: given.get(key) for name, key in (JUDGED | BESIDE).items()}
    if info.get("formatting") != "sharegpt":
        return differing({name: given.get(key) for name, key in INSTRUCTIONS.items()} | ours)
    turns = "messages" if _is_openai(info) else "conversations"
    return differing({turns: given.get("messages") or "conversations"} | (ours if judged else {}))


def _is_openai(info: Mapping[str, Any]) -> bool:
    """Whether turns have a role and content, and not from and value."""
    tags = info.get("tags") or {}
    return (tags.get("role_tag"), tags.get("content_tag")) == ("role", "content")


def _said(info: Mapping[str, Any]) -> Iterator[str]:
    tags, given = info.get("tags") or {}, info.get("columns") or {}
    pair = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    if pair not in (("from", "value"), ("role", "content")):
        yield f"its turns have {pair[0]} and {pair[1]}: rename them to role and content"
    others = [key for key in LEFT if given.get(key)]
    others += [key for key, value in info.items() if key not in READ and not is_off(value)]
    if others:
        yield f"{', '.join(others)}: without a counterpart"


SIGNS = (
    "finetuning_type stage cutoff_len lora_rank lora_target template quantization_bit dataset_dir"
    " dataset pref_loss pref_beta adapter_name_or_path preprocessing_num_workers overwrite_cache"
)

RULES: tuple[Rule, ...] = (
    Rule("stage", readers.stage, "sft"),
    Rule("finetuning_type", readers.finetuning_type, "lora"),
    Rule("use_dora", readers.part_of_method, False),
    Rule("use_rslora", readers.part_of_method, False),
    Rule("pissa_init", readers.pissa_init, False),
    Rule("pissa_iter", lambda value, settings: (
        taken("it is part of the method") if settings.read("pissa_init", boolean) else None), 16),
    Rule("pissa_convert", lambda value, settings: (
        taken("an adapter is always saved as LoRA over the plain base"))),
    Rule("lora_rank", readers.of_lora(readers.lora_rank), 8),
    Rule("lora_alpha", readers.of_lora(readers.lora_alpha)),
    Rule("lora_dropout", readers.of_lora(preferences.dropout), 0.0),
    Rule("lora_target", readers.of_lora(readers.lora_target), "all"),
    Rule("additional_target", readers.of_lora(to("modules_to_save", names))),
    Rule("adapter_name_or_path", preferences.named_adapters),
    Rule("create_new_adapter", preferences.create_new_adapter, False),
    Rule("pref_loss", preferences.pref_loss, "sigmoid"),
    Rule("pref_beta", beta(objective_of), 0.1),
    Rule("pref_ftx", preferences.pref_ftx, 0.0),
    Rule("pref_bco_weight", preferences.bco_weight, 0.0),
    Rule("ld_alpha", preferences.other_term),
    Rule("dpo_label_smoothing", preferences.label_smoothing, 0.0),
    Rule("simpo_gamma", law_option("gamma", objective_of), 0.5),
    Rule("kto_chosen_weight", law_option("desirable_weight", objective_of), 1.0),
    Rule("kto_rejected_weight", law_option("undesirable_weight", objective_of), 1.0),
    Rule("ref_model", preferences.ref_model),
    Rule("ref_model_adapters", preferences.ref_model_adapters),
    Rule("ref_model_quantization_bit", preferences.ref_model_quantization_bit),
    Rule("quantization_bit", readers.quantization_bit),
    Rule("quantization_method", readers.part_of_quantization, "bnb"),
    Rule("quantization_type", readers.part_of_quantization, "nf4"),
    Rule("double_quantization", lambda value, settings: (
        None if settings["quantization_bit"] is None
        else taken("nf4 is always so") if boolean(value)
        else changed("nf4 always quantizes its scales again here"))),
    Rule("bf16", readers.bf16, False),
    Rule("pure_bf16", readers.pure_bf16, False),
    Rule("fp16", readers.fp16, False),
    Rule("learning_rate", to("lr", number), 5e-5),
    Rule("loraplus_lr_ratio", readers.of_lora(trainer.loraplus_ratio), 1),
    Rule("lr_scheduler_type", trainer.schedule, "linear"),
    *trainer.warmup_rules("lr_scheduler_type", 0),
    Rule("optim", trainer.optimizer, "adamw_torch_fused"),
    Rule("weight_decay", to("weight_decay", number), 0.0),
    Rule("max_grad_norm", trainer.max_grad_norm, 1.0),
    *trainer.ADAM_RULES,
    Rule("num_train_epochs", to("epochs", number), 3.0),
    Rule("max_steps", trainer.max_steps),
    Rule("per_device_train_batch_size", readers.batch, 8),
    Rule("gradient_accumulation_steps", to("accumulate", integer), 1),
    Rule("cutoff_len", to("max_length", integer), 2048),
    Rule("packing", lambda value, settings: taken("neat_packing is read with it")),
    Rule("neat_packing", readers.neat_packing, False),
    Rule("train_on_prompt", readers.train_on_prompt),
    Rule("mask_history", readers.mask_history),
    Rule("enable_thinking", readers.enable_thinking),
    Rule("disable_gradient_checkpointing", lambda value, settings: (
        taken(gradient_checkpointing=not boolean(value)))),
    Rule("gradient_checkpointing", lambda value, settings: (
        taken("disable_gradient_checkpointing decides there"))),
    Rule("val_size", trainer.held_out_rows, 0.0),
    Rule("eval_steps", trainer.interval("eval_every", "each checkpoint is evaluated")),
    Rule("save_steps", trainer.interval("save_every", "there are about ten checkpoints a run")),
    Rule("save_strategy", trainer.interval_strategy),
    Rule("eval_strategy", trainer.interval_strategy),
    Rule("evaluation_strategy", trainer.interval_strategy),
    Rule("save_total_limit", trainer.save_total_limit),
    Rule("seed", to("seed", integer)),
    Rule("use_cpu", trainer.use_cpu),
    Rule("default_system", without(SYSTEM)),
    Rule("report_to", trainer.trackers),
    Rule("use_swanlab", lambda value, settings: (
        taken(trackers=("swanlab",)) if boolean(value) else taken("it is off"))),
    Rule("template", readers.template),
    Rule("model_name_or_path", option("--model")),
    Rule("model_revision", option("--revision")),
    Rule("trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if boolean(value) else taken("it is off"))),
    Rule("output_dir", option("--out")),
    Rule("overwrite_output_dir", without("pass --overwrite to replace what an earlier run wrote")),
    Rule("dataset", dataset),
    Rule("dataset_dir", lambda value, settings: taken("it is read with dataset")),
    Rule("eval_dataset", lambda value, settings: (
        left("pass its rows as --eval-data", "--eval-data EVAL_DATA"))),
    Rule("do_train", lambda value, settings: (
        taken("lorafold train does it") if boolean(value)
        else left("the file does not train; lorafold train does"))),
    Rule("resume_from_checkpoint", without("lorafold resumes runs of its own: --resume")),
    Rule("train_from_scratch", refusing("lorafold does not pretrain")),
    Rule("use_galore", refusing("lorafold has no GaLore")),
    Rule("use_apollo", refusing("lorafold has no APOLLO")),
    Rule("use_badam", refusing("lorafold has no BAdam")),
    *(rule for why, keys in LLAMAFACTORY for rule in all_without(why, keys)),
)  # fmt: skip
