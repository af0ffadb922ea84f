"""Converts torchtune's configurations, with its defaults as of April 2026. Keys of a block have its
name, as in `model.lora_rank`, except that the dataset is read as a whole.

A component that builds the model determines the method: lora_llama3_1_8b, qlora_llama3_1_8b and
llama3_1_8b train LoRA, LoRA on 4 bits and all weights. The batch is for one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorafold.config_import import rules, trainer
from lorafold.config_import.rules import Outcome, SourceDataset, Table, ToolSettings, mapped
from lorafold.foreign_options import boolean, integer, names, number
from lorafold.models.quantizations import bnb_storage

MARKERS = "checkpointer metric_logger max_steps_per_epoch enable_activation_checkpointing"
COMPONENT = "_component_"
BLOCKS = ("model", "tokenizer", "checkpointer", "optimizer", "lr_scheduler", "loss")
NONE = "none"  # for a file without an entry
OBJECTIVES = {
    **dict.fromkeys(
        ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss"), "sft"
    ),
    "DPOLoss": "dpo",
    "RSOLoss": "hinge",
}
OPTIMIZERS = {
    "AdamW": "adamw_torch",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW": "paged_adamw",
    "PagedAdamW8bit": "paged_adamw_8bit",
}
STORAGES = {"bf16": mapped(storage="bf16"), "fp32": mapped(storage="fp32")}
MLP = ("gate_proj", "up_proj", "down_proj")
# torchtune's modules, and the layers that contain them in the files of Phi
FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    MLP[:2], "gate_up_proj"
)
SOURCES = {  # of builders that name their rows
    "alpaca": "tatsu-lab/alpaca",
    "alpaca_cleaned": "yahma/alpaca-cleaned",
    "stack_exchange_paired": "lvwerra/stack-exchange-paired",
    "hh_rlhf_helpful": "RLHFlow/HH-RLHF-Helpful-standard",
}
COLUMNS = {"input": "prompt", "output": "completion"}  # torchtune's column: lorafold's
DATASET_KEYS = {
    COMPONENT, "source", "name", "split", "data_files", "column_map", "column",
    "conversation_column", "conversation_style", "train_on_input", "packed",
}  # fmt: skip


def flatten(config: Mapping[str, Any]) -> Mapping[str, Any]:
    flat = {}
    for key, value in config.items():
        if key in BLOCKS and isinstance(value, dict):
            flat |= {f"{key}.{entry}": one for entry, one in value.items()}
        else:
            flat[key] = value
    # references such as ${output_dir}/logs
    return {
        key: re.sub(r"\$\{([\w.]+)\}", lambda found: str(flat.get(found[1], found[0])), value)
        if isinstance(value, str)
        else value
        for key, value in flat.items()
    }


def component(key: str, settings: ToolSettings) -> str:
    return str(settings[f"{key}.{COMPONENT}"]).rpartition(".")[2]


def is_lora(settings: ToolSettings) -> bool:
    return "lora_" in component("model", settings)


def is_quantized(settings: ToolSettings) -> bool:
    return component("model", settings).startswith("qlora") or settings.is_on("model.quantize_base")


def objective_of(settings: ToolSettings) -> str:
    return OBJECTIVES.get(component("loss", settings), "sft")


def datasets(settings: ToolSettings) -> list[Mapping[str, Any]]:
    value = settings["dataset"]
    return [one for one in (value if isinstance(value, list) else [value]) if one]


def is_packed(settings: ToolSettings) -> bool:
    return any(one.get("packed") for one in datasets(settings))


def _model(value: Any, settings: ToolSettings) -> Outcome:
    if not is_lora(settings):
        return mapped(method="full")
    return trainer.kind_of_lora(settings.is_on("model.use_dora"), False, None)


def _targets(value: Any, settings: ToolSettings) -> Outcome:
    linears = [name.replace("output_proj", "o_proj") for name in names(value)]
    linears += MLP if settings.is_on("model.apply_lora_to_mlp") else ()
    linears += ["lm_head"] if settings.is_on("model.apply_lora_to_output") else ()
    is_fused = component("model", settings).removeprefix("q").startswith("lora_phi")
    layers = tuple(dict.fromkeys(FUSED.get(n, n) if is_fused else n for n in linears))
    why = "the model's files contain these layers fused" if is_fused else ""
    return rules.changed(why, targets=layers)


def _max_steps(value: Any, settings: ToolSettings) -> Outcome:
    return rules.changed(
        "torchtune trains on as many steps of each epoch, or fewer if the epoch ends first",
        steps=int(integer(value) * settings.read("epochs", number)),
    )


def _schedule(value: Any, settings: ToolSettings) -> Outcome:
    name = component("lr_scheduler", settings)
    cosine = name == "get_cosine_schedule_with_warmup"
    why = "" if cosine or name == NONE else f"lorafold does not support {name}; cosine is used"
    return rules.changed(why, schedule="constant" if name == NONE else "cosine")


def _loss(value: Any, settings: ToolSettings) -> Outcome:
    name = component("loss", settings)
    if name not in OBJECTIVES:
        raise rules.rejection(value, f"lorafold supports only the losses {', '.join(OBJECTIVES)}")
    return mapped(objective=OBJECTIVES[name])


def _dataset(value: Any, settings: ToolSettings) -> Outcome:
    sources, packing = [*map(_source, datasets(settings))], is_packed(settings)
    rows = rules.data_outcome(sources, {"sft": None}.get(one := objective_of(settings), one))
    return Outcome("left", {"packing": packing}, rows.remark, rows.flag)


def _source(one: Mapping[str, Any]) -> SourceDataset:
    builder = str(one.get(COMPONENT)).rpartition(".")[2].removesuffix("_dataset")
    theirs = one.get("column_map") or ({k: k for k in COLUMNS} if builder == "instruct" else {})
    columns = {COLUMNS.get(k, k) if builder == "instruct" else k: v for k, v in theirs.items()}
    is_openai = one.get("conversation_style") == "openai"
    columns["messages" if is_openai else "conversations"] = one.get("conversation_column")
    columns["text"] = one.get("column")
    place = one.get("name"), one.get("split"), one.get("data_files")
    path = one.get("source", SOURCES.get(builder))
    return rules.dataset(
        path, *place, columns=columns, remarks=_remarks(one, builder), kind=f" ({builder})"
    )


def _remarks(one: Mapping[str, Any], builder: str) -> Iterator[str]:
    alpaca = builder.startswith("alpaca")
    if alpaca:
        yield "lorafold uses the model's chat template, not its prompt format (### Instruction:)"
    if one.get("train_on_input", alpaca):
        yield str(trainer.FULL_LOSS.remark)
    others = [k for k, v in one.items() if k not in DATASET_KEYS and not rules.is_off(v)]
    yield from rules.unsupported_remarks(others)


MAIN_KEYS: Table = {
    f"model.{COMPONENT}": (_model, NONE),
    "dtype": (
        rules.if_else(is_quantized, mapped(storage=bnb_storage(4)), rules.by_value(STORAGES)),
        "fp32",
    ),
    "model.quantize_base": (rules.if_on(rules.read_with("dtype")), False),
    f"loss.{COMPONENT}": _loss,
    "device": rules.by_value(
        {"cpu": rules.unmapped("pass --device cpu", "--device cpu")},
        mapped("lorafold trains on a GPU if there is one"),
    ),
    "loss.beta loss.gamma": rules.to_field("beta", number),
    "loss.label_smoothing": rules.to_options("label_smoothing"),
    "epochs": (rules.to_field("epochs", number), 1),
    "max_steps_per_epoch": _max_steps,
    "batch_size": (trainer.batch("device", is_packed, "torchtune tokenizer.max_seq_len"), 1),
    "gradient_accumulation_steps": (rules.AS_OPTION, 1),
    "clip_grad_norm": (
        lambda value, settings: mapped(clip=0.0 if value in (NONE, "inf") else number(value)), NONE,
    ),
    f"optimizer.{COMPONENT}": lambda value, settings: trainer.optimizer(
        OPTIMIZERS.get(component("optimizer", settings), ""), settings
    ),
    "optimizer.lr": (trainer.rate(is_lora), 1e-3),
    "optimizer.weight_decay": (rules.to_field("weight_decay", number), 0.01),
    "optimizer.betas": rules.to_field("betas", lambda value: tuple(map(number, value))),
    "optimizer.eps": rules.to_field("eps", number),
    f"lr_scheduler.{COMPONENT}": (_schedule, NONE),
    "lr_scheduler.num_warmup_steps": (
        lambda value, settings: trainer.warmup_of(integer(value)), 0,
    ),
    "lr_scheduler.num_cycles": rules.require(0.5, "lorafold's schedule is half a cosine"),
    "tokenizer.max_seq_len": (
        lambda value, settings: (
            rules.changed("torchtune does not truncate the rows, lorafold does at max_length")
            if value == NONE
            else mapped(max_length=integer(value))
        ),
        NONE,
    ),
    "enable_activation_checkpointing": (rules.to_field("gradient_checkpointing", boolean), False),
    "seed": rules.to_field("seed", integer),
    "dataset": _dataset,
    "dataset_val": trainer.EVAL_DATA,
    "run_val_every_n_steps": trainer.interval("eval_every"),
    "save_every_n_steps": trainer.interval("save_every"),
    "checkpointer.keep_last_n_checkpoints": rules.to_field("keep", integer),
    **rules.static_rows("torchtune"),
}
LORA_KEYS: Table = {
    "model.use_dora": (rules.if_on(trainer.PART_OF_METHOD), False),
    "model.lora_attn_modules": _targets,
    "model.apply_lora_to_mlp model.apply_lora_to_output": (
        rules.if_on(rules.read_with("model.lora_attn_modules")), False,
    ),
    "model.lora_rank": (rules.to_field("rank", integer), 8),
    "model.lora_alpha": (rules.to_field("alpha", number), 16),
    "model.lora_dropout": (rules.to_field("dropout", number), 0.0),
}
RULES = (*rules.table(MAIN_KEYS), *rules.table(LORA_KEYS, is_lora))
KNOWN = frozenset(rule.key.partition(".")[0] for rule in RULES)
