"""Unsloth's scripts: the rules of the functions that make its model, and TRL's of the trainer, with
the defaults that Unsloth puts in place of TRL's.

Read off Unsloth as of August 2026. What a script does with its rows before it trains is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lorafold.models.storages import made_of
from lorafold.translating import policies, trainer, trl, trl_readers, trl_trainers
from lorafold.translating.convert import boolean, integer, names, number
from lorafold.translating.no_counterpart import ABSENT, ATTENTION, MEMORY, MODEL, NUMBERS, ROWS
from lorafold.translating.preferences import rows_wanted
from lorafold.translating.rows import PLACEHOLDER, given_as_data, of_hub
from lorafold.translating.rules import (
    Outcome,
    Reader,
    Rule,
    Settings,
    TranslatedKey,
    all_without,
    by_rules,
    changed,
    left,
    option,
    taken,
    to,
    without,
)
from lorafold.translating.unsloth_script import TRAINERS, Expression

LOADED, ADAPTED = "from_pretrained.", "get_peft_model."
SIGNS = f"{LOADED}model_name {LOADED}max_seq_length {ADAPTED}r {ADAPTED}lora_alpha"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEFAULTS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.001,
    "seed": 3407,
    "optim": "adamw_8bit",
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "max_length": None,
}
OF_GRPO = {"loss_type": "bnpo", "beta": 0.001}
# Fields of TRL that the functions of Unsloth have in their place
OF_MODEL = {rule.key for rule in trl.MODEL} | {"lora_dropout", "learning_rate"}
# What each trainer trains, where rows are not those of supervised training
OBJECTIVES = {
    "trl-dpo": "dpo",
    "trl-kto": "kto",
    "trl-orpo": "orpo",
    "trl-cpo": "simpo",
    "trl-reward": "reward",
    "trl-grpo": "grpo",
    "trl-rloo": "rloo",
}
OBJECTS = (
    "model",
    "tokenizer",
    "processing_class",
    "args",
    "data_collator",
    "trainer",
    "train_dataset",
    "eval_dataset",
)


def is_full(settings: Settings) -> bool:
    """Whether the whole model is trained."""
    return settings.read(f"{LOADED}full_finetuning", boolean)


def of_lora(reader: Reader) -> Reader:
    """The same reader, except that the key has no effect where the whole model is trained."""
    return lambda value, settings: None if is_full(settings) else reader(value, settings)


def method(value: Any, settings: Settings) -> Outcome:
    """`full_finetuning` becomes the method, with the switches of LoRA's kinds."""
    if boolean(value):
        return taken(method="full")
    start = settings[f"{ADAPTED}init_lora_weights"]
    loftq = settings[f"{ADAPTED}loftq_config"]
    rslora = settings.read(f"{ADAPTED}use_rslora", boolean)
    return trainer.kind_of_lora(False, rslora, "loftq" if loftq else start)


def storage(value: Any, settings: Settings) -> Outcome:
    """`load_in_4bit`, on unless the script says, becomes the base's storage; other switches are
    read with it.
    """
    if is_full(settings):
        return changed("the whole model trains in bf16 where it can", storage="bf16")
    if settings.read(f"{LOADED}load_in_8bit", boolean):
        return taken(storage=made_of(8))
    if settings[f"{LOADED}load_in_fp8"]:
        return changed("lorafold quantizes to nf4 or int8, of which int8 is taken", storage="int8")
    if not boolean(value) or settings.read(f"{LOADED}load_in_16bit", boolean):
        return taken(storage="auto")
    return taken(storage=made_of(4))


def learning_rate(value: Any, settings: Settings) -> Outcome:
    """`learning_rate` becomes the rate, of LoRA that of both factors."""
    if is_full(settings):
        return taken(lr=number(value))
    return taken("one rate for both factors, no LoRA+", lr=number(value), lr_b=number(value))


def length(value: Any, settings: Settings) -> Outcome:
    """`max_seq_length` of the model bounds the rows; the trainer's, where it is less, decides."""
    own = [settings[key] for key in ("max_length", "max_seq_length")]
    found = min(integer(one) for one in (value, *own) if one is not None)
    return taken(max_length=found)


def checkpointing(value: Any, settings: Settings) -> Outcome:
    """`use_gradient_checkpointing` becomes gradient_checkpointing; Unsloth's own is auto."""
    if value == "unsloth":
        return changed("activations are recomputed where a step would not fit, and not offloaded")
    return taken(gradient_checkpointing=boolean(value))


def target_modules(value: Any, settings: Settings) -> Outcome:
    """`target_modules` become the targets."""
    return taken(targets=value if isinstance(value, str) else names(value))


def wanted(settings: Settings) -> str:
    """The rows that the script's trainer takes, in words."""
    return rows_wanted(OBJECTIVES.get(TRAINERS.get(str(settings["trainer"]), "")))


def loaded_rows(value: Any, settings: Settings) -> Outcome:
    """The first dataset that the script loads goes to `--data`."""
    files = settings["load_dataset.data_files"]
    if isinstance(files, str) and value in ("json", "csv", "parquet", "text"):
        return given_as_data([of_hub(files)], wanted(settings))
    name, split = (settings[f"load_dataset.{key}"] for key in ("name", "split"))
    return given_as_data([of_hub(value, name, split, files)], wanted(settings))


def read_with(key: str) -> Reader:
    """The reader of an argument that the rule of another one reads."""
    return lambda value, settings: taken(f"it is read with {key}")


def _each(prefix: str, why: str, keys: str) -> tuple[Rule, ...]:
    return all_without(why, " ".join(f"{prefix}{key}" for key in keys.split()))


OWN: tuple[Rule, ...] = (
    Rule("trainer", lambda value, settings: taken("it says which objective")),
    Rule(f"{LOADED}full_finetuning", method, False),
    Rule(f"{LOADED}model_name", option("--model")),
    Rule(f"{LOADED}load_in_4bit", storage, True),
    Rule(f"{LOADED}load_in_8bit", read_with("load_in_4bit"), False),
    Rule(f"{LOADED}load_in_16bit", read_with("load_in_4bit"), False),
    Rule(f"{LOADED}load_in_fp8", read_with("load_in_4bit")),
    Rule(f"{LOADED}dtype", without("a base that is not quantized is stored as its files are")),
    Rule(f"{LOADED}max_seq_length", length, 2048),
    Rule("max_length", read_with(f"{LOADED}max_seq_length")),
    Rule("max_seq_length", read_with(f"{LOADED}max_seq_length")),
    Rule(f"{LOADED}revision", option("--revision")),
    Rule(f"{LOADED}trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if boolean(value) else taken("it is off"))),
    Rule(f"{LOADED}use_gradient_checkpointing", lambda value, settings: taken(
        "get_peft_model's decides")),
    *_each(LOADED, MODEL, "token device_map rope_scaling fix_tokenizer resize_model_vocab"
        " use_exact_model_name text_only auto_model quantization_config return_logits"),
    *_each(LOADED, ATTENTION, "attn_implementation"),
    *_each(LOADED, NUMBERS, "float32_mixed_precision qat_scheme unsloth_tiled_mlp fullgraph"
        " unsloth_force_compile"),
    *_each(LOADED, MEMORY, "offload_embedding gpu_memory_utilization float8_kv_cache"
        " max_lora_rank disable_log_stats fast_inference random_state"),
    Rule(f"{ADAPTED}r", of_lora(to("rank", integer)), 16),
    Rule(f"{ADAPTED}lora_alpha", of_lora(to("alpha", number)), 16),
    Rule(f"{ADAPTED}target_modules", of_lora(target_modules), LINEARS),
    Rule(f"{ADAPTED}target_parameters", of_lora(lambda value, settings: trainer.target_parameters(
        settings[f"{ADAPTED}target_modules"], names(value)))),
    Rule(f"{ADAPTED}bias", of_lora(to("bias"))),
    Rule(f"{ADAPTED}modules_to_save", of_lora(to("modules_to_save", names))),
    *(Rule(f"{ADAPTED}{key}", of_lora(read_with(f"{LOADED}full_finetuning")), default)
      for key, default in [("use_rslora", False), ("init_lora_weights", True)]),
    Rule(f"{ADAPTED}loftq_config", of_lora(read_with(f"{LOADED}full_finetuning"))),
    Rule(f"{ADAPTED}use_gradient_checkpointing", checkpointing, "unsloth"),
    Rule(f"{ADAPTED}random_state", lambda value, settings: taken("seed decides")),
    Rule(f"{ADAPTED}max_seq_length", lambda value, settings: None),
    Rule(f"{ADAPTED}model", lambda value, settings: taken("it is the base")),
    *_each(ADAPTED, "write --set targets=REGEX of these modules", "layers_to_transform"
        " layers_pattern finetune_last_n_layers finetune_vision_layers finetune_audio_layers"
        " finetune_language_layers finetune_attention_modules finetune_mlp_modules"),
    *_each(ADAPTED, ABSENT, "qat_scheme ensure_weight_tying temporary_location task_type"),
    Rule("gradient_checkpointing", lambda value, settings: taken("get_peft_model's decides")),
    *(Rule(key, lambda value, settings: taken("the base's storage decides"))
      for key in ("bf16", "fp16")),
    *all_without(ABSENT, "embedding_learning_rate"),
    Rule("load_dataset.path", loaded_rows),
    *(Rule(f"load_dataset.{key}", read_with("load_dataset.path"))
      for key in ("name", "split", "data_files")),
    Rule("train_dataset", lambda value, settings: (
        taken("it is load_dataset's") if settings["load_dataset.path"]
        else left(wanted(settings), PLACEHOLDER))),
    Rule("eval_dataset", lambda value, settings: (
        left("pass its rows as --eval-data", "--eval-data EVAL_DATA"))),
    Rule("get_chat_template.chat_template", lambda value, settings: left(
        f"the model's own template is used; write {value}'s to a file: --chat-template FILE")),
    *_each("get_chat_template.", "the model's own template is used",
        "mapping map_eos_token system_message"),
    *(Rule(key, lambda value, settings: taken("lorafold makes its own"))
      for key in ("model", "tokenizer", "processing_class", "args", "data_collator",
                  "get_chat_template.tokenizer", "train_on_responses_only.trainer")),
    *(Rule(f"train_on_responses_only.{key}", lambda value, settings: taken(
        "the loss is on completions, by the template itself"))
      for key in ("instruction_part", "response_part", "tokenizer", "num_proc")),
    *all_without("the reference is what lies beneath the new adapter", "ref_model"),
    *all_without("what it does is to be done to the rows themselves", "formatting_func"),
    *all_without(ROWS, "callbacks compute_metrics"),
)  # fmt: skip


def _rules(kind: str) -> tuple[Rule, ...]:
    own = {rule.key for rule in OWN} | OF_MODEL
    given = DEFAULTS | (OF_GRPO if kind == "trl-grpo" else {})
    rest = (rule for rule in trl_trainers.RULES[kind] if rule.key not in own)
    theirs = [replace(rule, default=given.get(rule.key, rule.default)) for rule in rest]
    rate = Rule("learning_rate", learning_rate, given["learning_rate"])
    dropout = policies.dropout if kind in ("trl-grpo", "trl-rloo") else trl_readers.dropout
    drop = Rule(f"{ADAPTED}lora_dropout", of_lora(dropout), 0.0)
    return (*OWN, rate, drop, *theirs)


RULES = {kind: _rules(kind) for kind in dict.fromkeys(TRAINERS.values())}
KNOWN = frozenset(rule.key for rules in RULES.values() for rule in rules)


def entries(config: Mapping[str, Any]) -> tuple[TranslatedKey, ...]:
    """Every argument of a script as an entry; those that are no literals are told, and not read."""
    rules = RULES[TRAINERS.get(config.get("trainer", ""), "trl-sft")]
    objects = {"bf16", "fp16", *(r.key for r in OWN if r.key.split(".")[-1] in OBJECTS)}
    unread = {k: v for k, v in config.items() if isinstance(v, Expression) and k not in objects}
    found = by_rules(rules, {k: v for k, v in config.items() if k not in unread})
    return (*(e for e in found if e.key not in unread), *_unread(unread, found))


def _unread(
    expressions: Mapping[str, Expression], found: tuple[TranslatedKey, ...]
) -> Iterator[TranslatedKey]:
    defaults = {entry.key: entry.outcome.fields for entry in found}
    for key, text in expressions.items():
        fields = defaults.get(key, ())
        flag = " ".join(f"--{name.replace('_', '-')} {name.upper()}" for name in fields)
        told = "no literal, so that it is not read" + (f": give {flag}" if flag else "")
        yield TranslatedKey(key, text, True, left(told, flag))
