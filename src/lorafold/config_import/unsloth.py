"""Converts Unsloth's scripts as of August 2026: the keyword arguments of its model functions and of
TRL's trainers, with Unsloth's defaults in place of TRL's.

    FastLanguageModel.get_peft_model(model, r=16, ...)         get_peft_model.r
    SFTTrainer(..., args=SFTConfig(learning_rate=2e-4, ...))   learning_rate

A script is parsed and never executed. A value is a literal, or a name to which the script assigns
one literal; any other value is an `Expression`. Only the first call of each function counts.
Processing of rows before training is ignored.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lorafold.config_import import trainer, trl
from lorafold.config_import.rules import (
    PLACEHOLDER,
    Outcome,
    Rule,
    Table,
    ToolSettings,
    TranslatedKey,
    apply_rules,
    changed,
    data_outcome,
    dataset,
    expected_rows,
    mapped,
    read_with,
    table,
    to_field,
    unmapped,
)
from lorafold.config_import.unsupported import ABSENT, ATTENTION, MEMORY, MODEL, NUMBERS
from lorafold.errors import LorafoldError
from lorafold.foreign_options import boolean, integer, modules, names, number
from lorafold.models.quantizations import bnb_storage

LOAD, ADAPT, DATASET = "from_pretrained.", "get_peft_model.", "load_dataset."
MARKERS = f"{LOAD}model_name {LOAD}max_seq_length {ADAPT}r {ADAPT}lora_alpha"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastTextModel", "FastMllamaModel")
# the translation's kind, by trainer; the configuration of XTrainer is called XConfig
TRAINERS = {
    "SFTTrainer": "trl-sft",
    "UnslothTrainer": "trl-sft",
    "DPOTrainer": "trl-dpo",
    "KTOTrainer": "trl-kto",
    "ORPOTrainer": "trl-orpo",
    "CPOTrainer": "trl-cpo",
    "RewardTrainer": "trl-reward",
    "GRPOTrainer": "trl-grpo",
    "RLOOTrainer": "trl-rloo",
}
CONFIGS = {name.replace("Trainer", "Config") for name in TRAINERS} | {
    "TrainingArguments",
    "UnslothTrainingArguments",
}
# Functions whose arguments become keys after their name, and their positional arguments
FUNCTIONS = {
    "from_pretrained": ("model_name",),
    "get_peft_model": ("model",),
    "load_dataset": ("path", "name"),
    "get_chat_template": ("tokenizer", "chat_template"),
    "train_on_responses_only": ("trainer",),
}
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
# Objectives other than supervised training
OBJECTIVES = {
    "trl-dpo": "dpo",
    "trl-kto": "kto",
    "trl-orpo": "orpo",
    "trl-cpo": "simpo",
    "trl-reward": "reward",
    "trl-grpo": "grpo",
    "trl-rloo": "rloo",
}
OBJECTS = {
    *("model", "tokenizer", "processing_class", "args", "data_collator", "trainer"),
    *("train_dataset", "eval_dataset"),
}


def is_lora(settings: ToolSettings) -> bool:
    return not settings.is_on(f"{LOAD}full_finetuning")


def _method(value: Any, settings: ToolSettings) -> Outcome:
    if boolean(value):
        return mapped(method="full")
    start = settings[f"{ADAPT}init_lora_weights"]
    loftq = settings[f"{ADAPT}loftq_config"]
    rslora = settings.is_on(f"{ADAPT}use_rslora")
    return trainer.kind_of_lora(False, rslora, "loftq" if loftq else start)


def storage(value: Any, settings: ToolSettings) -> Outcome:
    if not is_lora(settings):
        return changed("lorafold uses bf16, Unsloth only if the GPU supports it", storage="bf16")
    if settings.is_on(f"{LOAD}load_in_8bit"):
        return mapped(storage=bnb_storage(8))
    if settings[f"{LOAD}load_in_fp8"]:
        return changed("lorafold quantizes to nf4 or int8; int8 is used", storage="int8")
    if not boolean(value) or settings.is_on(f"{LOAD}load_in_16bit"):
        return mapped(storage="auto")
    return mapped(storage=bnb_storage(4))


def _length(value: Any, settings: ToolSettings) -> Outcome:
    own = [settings[key] for key in ("max_length", "max_seq_length")]
    return mapped(max_length=min(integer(one) for one in (value, *own) if one is not None))


def objective_of(settings: ToolSettings) -> str | None:
    return OBJECTIVES.get(TRAINERS.get(str(settings["trainer"]), ""))


def _loaded_rows(value: Any, settings: ToolSettings) -> Outcome:
    name, split, files = (settings[f"{DATASET}{key}"] for key in ("name", "split", "data_files"))
    return data_outcome([dataset(value, name, split, files)], objective_of(settings))


def _prefixed(prefix: str, rows: Table) -> Table:
    return {" ".join(f"{prefix}{k}" for k in keys.split()): row for keys, row in rows.items()}


LOADING_KEYS: Table = {
    "full_finetuning": (_method, False),
    "model_name": "--model",
    "load_in_4bit": (storage, True),
    "load_in_8bit load_in_16bit": (read_with("load_in_4bit"), False),
    "load_in_fp8": read_with("load_in_4bit"),
    "dtype": "if the base is not quantized, set its dtype with --quantization",
    "max_seq_length": (_length, 2048),
    "revision": "--revision",
    "trust_remote_code": trainer.TRUST,
    "use_gradient_checkpointing": mapped("determined by get_peft_model"),
    "token device_map rope_scaling fix_tokenizer resize_model_vocab"
    " use_exact_model_name text_only auto_model quantization_config"
    " return_logits": MODEL,
    "attn_implementation": ATTENTION,
    "float32_mixed_precision qat_scheme unsloth_tiled_mlp fullgraph unsloth_force_compile": NUMBERS,
    "offload_embedding gpu_memory_utilization float8_kv_cache max_lora_rank"
    " disable_log_stats fast_inference random_state": MEMORY,
}
ADAPTER_KEYS: Table = {
    "use_gradient_checkpointing": (
        lambda value, settings: (
            changed("lorafold recomputes activations only if memory is short; no offloading")
            if value == "unsloth"
            else mapped(gradient_checkpointing=boolean(value))
        ),
        "unsloth",
    ),
    "random_state": mapped("determined by seed"),
    "max_seq_length": None,
    "model": mapped("the base model"),
    "layers_to_transform layers_pattern finetune_last_n_layers"
    " finetune_vision_layers finetune_audio_layers finetune_language_layers"
    " finetune_attention_modules"
    " finetune_mlp_modules": "pass --set targets=REGEX for these modules",
    "qat_scheme ensure_weight_tying temporary_location task_type": ABSENT,
}
LORA_KEYS: Table = {
    "r": (to_field("rank", integer), 16),
    "lora_alpha": (to_field("alpha", number), 16),
    "target_modules": (to_field("targets", modules), LINEARS),
    "target_parameters": lambda value, settings: trainer.target_parameters(
        settings[f"{ADAPT}target_modules"], names(value)
    ),
    "bias": to_field("bias"),
    "modules_to_save": to_field("modules_to_save", names),
    "use_rslora": (read_with(f"{LOAD}full_finetuning"), False),
    "init_lora_weights": (read_with(f"{LOAD}full_finetuning"), True),
    "loftq_config": read_with(f"{LOAD}full_finetuning"),
}
MAIN_RULES: tuple[Rule, ...] = (
    *table(
        {
            "trainer": mapped("determines the objective"),
            **_prefixed(LOAD, LOADING_KEYS),
            "max_length max_seq_length": read_with(f"{LOAD}max_seq_length"),
            **_prefixed(ADAPT, ADAPTER_KEYS),
            "gradient_checkpointing": mapped("determined by get_peft_model"),
            "bf16 fp16": mapped("determined by the base's quantization or dtype"),
            "embedding_learning_rate": ABSENT,
            f"{DATASET}path": _loaded_rows,
            f"{DATASET}name {DATASET}split {DATASET}data_files": read_with(f"{DATASET}path"),
            "train_dataset": lambda value, settings: (
                mapped("loaded by load_dataset")
                if settings[f"{DATASET}path"]
                else unmapped(expected_rows(objective_of(settings)), PLACEHOLDER)
            ),
            "eval_dataset": trainer.EVAL_DATA,
            "get_chat_template.chat_template": lambda value, settings: unmapped(
                f"to replace the model's own template by {value}, pass --chat-template FILE"
            ),
            "get_chat_template.mapping get_chat_template.map_eos_token"
            " get_chat_template.system_message": "lorafold uses the model's own template",
            "model tokenizer processing_class args data_collator get_chat_template.tokenizer"
            " train_on_responses_only.trainer": mapped("lorafold creates its own"),
            **_prefixed(
                "train_on_responses_only.",
                {
                    "instruction_part response_part tokenizer num_proc": mapped(
                        "lorafold finds the completions by itself"
                    )
                },
            ),
            "ref_model": "the reference is the model without the new adapter",
            "formatting_func": "apply the function to the rows before training",
            "callbacks compute_metrics": ABSENT,
        }
    ),
    *table(_prefixed(ADAPT, LORA_KEYS), is_lora),
)


def _rules(kind: str) -> tuple[Rule, ...]:
    own = {*(rule.key for rule in MAIN_RULES), *trl.IN_MODEL, "lora_dropout", "learning_rate"}
    defaults = DEFAULTS | ({"loss_type": "bnpo", "beta": 0.001} if kind == "trl-grpo" else {})
    rest = (rule for rule in trl.RULES[kind] if rule.key not in own)
    return (
        *MAIN_RULES,
        *table({"learning_rate": (trainer.rate(is_lora), defaults["learning_rate"])}),
        *table({f"{ADAPT}lora_dropout": (trl.DROPOUTS[kind], 0.0)}, is_lora),
        *(replace(rule, default=defaults.get(rule.key, rule.default)) for rule in rest),
    )


RULES = {kind: _rules(kind) for kind in dict.fromkeys(TRAINERS.values())}
KNOWN = frozenset(rule.key for rules in RULES.values() for rule in rules)


class Expression(str):
    """The source of a value that is not a literal."""


def read_keys(config: Mapping[str, Any]) -> tuple[TranslatedKey, ...]:
    rules = RULES[TRAINERS.get(config.get("trainer", ""), "trl-sft")]
    objects = {"bf16", "fp16", *(r.key for r in MAIN_RULES if r.key.split(".")[-1] in OBJECTS)}
    unread = {k: v for k, v in config.items() if isinstance(v, Expression) and k not in objects}
    read = apply_rules(rules, {k: v for k, v in config.items() if k not in unread})
    defaults = {entry.key: entry.outcome.fields for entry in read}
    result = [entry for entry in read if entry.key not in unread]
    for key, text in unread.items():
        options = [f"--{name.replace('_', '-')} {name.upper()}" for name in defaults.get(key, ())]
        flag, remark = " ".join(options), "not read because it is not a literal"
        outcome = unmapped(f"{remark}: pass {flag}" if flag else remark, flag)
        result.append(TranslatedKey(key, text, True, outcome))
    return tuple(result)


def arguments_of(text: str, source: str) -> Mapping[str, Any]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f"line {n}: " if (n := getattr(error, "lineno", None)) else ""
        raise LorafoldError(f"{source}: {line}not valid Python") from None
    literals, seen = _literals(tree), set[str]()
    arguments = {}
    for call in _calls(tree):
        name, owner = _name_of(call.func)
        if name in TRAINERS and "trainer" not in arguments:
            arguments["trainer"] = name
        elif name not in CONFIGS and name not in FUNCTIONS:
            continue
        if name in seen or (name in ("from_pretrained", "get_peft_model") and owner not in MODELS):
            continue
        seen.add(name)
        prefix = f"{name}." if name in FUNCTIONS else ""
        for key, node in _arguments(call, FUNCTIONS.get(name, ())):
            if not (isinstance(node, ast.Call) and _name_of(node.func)[0] in CONFIGS):
                arguments[f"{prefix}{key}"] = _value(node, literals)
    if not any(key.startswith(LOAD) for key in arguments):
        raise LorafoldError(
            f"{source}: found no from_pretrained call of {' or '.join(MODELS[:2])}, expected an"
            " Unsloth script"
        )
    return arguments


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Yields the calls in order, except calls under `if False`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            node = ast.Module(node.orelse, [])
        yield from _calls(node)


def _name_of(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Attribute):
        return function.attr, getattr(function.value, "id", "")
    return getattr(function, "id", ""), ""


def _arguments(call: ast.Call, names: tuple[str, ...]) -> Iterator[tuple[str, ast.expr]]:
    for index, node in enumerate(call.args):
        yield names[index] if index < len(names) else f"argument {index + 1}", node
    for keyword in call.keywords:
        yield keyword.arg or f"**{ast.unparse(keyword.value)}", keyword.value


def _literals(tree: ast.Module) -> Mapping[str, Any]:
    """The names to which the script assigns exactly once, with a literal, and these values."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            value = node.value if isinstance(target, ast.Name) else target
            for one in ast.walk(target):
                if isinstance(one, ast.Name):
                    assigned.setdefault(one.id, []).append(value)
    values = {name: _value(nodes[0], {}) for name, nodes in assigned.items() if len(nodes) == 1}
    return {name: value for name, value in values.items() if not isinstance(value, Expression)}


def _value(node: ast.expr, literals: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in literals:
        return literals[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Expression(ast.unparse(node))
    return list(value) if isinstance(value, tuple | set) else value
