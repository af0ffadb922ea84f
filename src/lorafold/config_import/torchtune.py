"""Converts torchtune's configurations, with its defaults as of April 2026. Keys of a block have its
name, as in `model.lora_rank`.

The component that builds the model determines the method: qlora_llama2_7b trains LoRA on a base in
4 bits, llama2_7b all weights. The batch is for one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorafold.config_import import mlx, rules, trainer
from lorafold.config_import.rules import Outcome, SourceDataset, Table, ToolSettings, Values, mapped
from lorafold.errors import LorafoldError
from lorafold.foreign_options import integer, names, number
from lorafold.models.quantizations import bnb_storage

NONE = "none"  # for a file without an entry
DATASET = "dataset."
NAMES: Mapping[str, Mapping[str, str]] = rules.KEYS["names"]["torchtune"]
OBJECTIVES = NAMES["objectives"]
# torchtune's column, of rows in the format `instruct`: lorafold's
COLUMNS = {"input": "prompt", "output": "completion"}


def flatten(config: Values) -> Values:
    """Keys of a command line, such as model.lora_rank, follow their block and replace its keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        block = f"{key}._component_" in KNOWN and isinstance(value, Mapping)
        flat |= {f"{key}.{k}": v for k, v in value.items()} if block else {key: value}
    return {  # with the values of references such as ${output_dir}/logs
        key: re.sub(r"\$\{([\w.]+)\}", lambda found: str(flat.get(found[1], found[0])), value)
        if isinstance(value, str)
        else value
        for key, value in flat.items()
    }


def component(block: str, settings: ToolSettings) -> str:
    return str(settings[f"{block}._component_"]).rpartition(".")[2]


def is_lora(settings: ToolSettings) -> bool:
    return "lora_" in component("model", settings)


def is_quantized(settings: ToolSettings) -> bool:
    return component("model", settings).startswith("qlora") or bool(settings["model.quantize_base"])


def datasets(settings: ToolSettings) -> list[Values]:
    flat = {k.removeprefix(DATASET): v for k, v in settings.config.items() if k.startswith(DATASET)}
    several = settings["dataset"] or [flat]
    if not isinstance(several, list) or not all(isinstance(one, Mapping) for one in several):
        raise LorafoldError(f"dataset: found {several!r}, expected an object with _component_")
    return several


def is_packed(settings: ToolSettings) -> bool:
    return any(one.get("packed") for one in datasets(settings))


def _model(value: Any, settings: ToolSettings) -> Outcome:
    if "vision" in str(value):
        raise rules.rejection(value, "lorafold does not train on images")
    lora = trainer.kind_of_lora(settings.is_on("model.use_dora"), False, None)
    return lora if is_lora(settings) else mapped(method="full")


def _targets(value: Any, settings: ToolSettings) -> Outcome:
    layers = [name.replace("output_proj", "o_proj") for name in names(value)]
    layers += ["gate_proj", "up_proj", "down_proj"] * settings.is_on("model.apply_lora_to_mlp")
    layers += ["lm_head"] * settings.is_on("model.apply_lora_to_output")
    if "lora_phi" in component("model", settings):  # whose files contain fused layers
        fused = {"q_proj|k_proj|v_proj": "qkv_proj", "gate_proj|up_proj": "gate_up_proj"}
        for parts, whole in fused.items():
            layers = [re.sub(f"^({parts})$", whole, name) for name in layers]
    return mapped(targets=tuple(dict.fromkeys(layers)))


def _loss(value: Any, settings: ToolSettings) -> Outcome:
    name = component("loss", settings)
    if name not in OBJECTIVES:
        raise rules.rejection(value, f"lorafold supports only {', '.join(OBJECTIVES)}")
    return mapped(objective=OBJECTIVES[name])


def _schedule(value: Any, settings: ToolSettings) -> Outcome:
    name = component("lr_scheduler", settings)
    if name in (NONE, "get_cosine_schedule_with_warmup"):
        return mapped(schedule="constant" if name == NONE else "cosine")
    return rules.changed(f"lorafold does not support {name}; cosine is used", schedule="cosine")


def _dataset(value: Any, settings: ToolSettings) -> Outcome:
    objective = OBJECTIVES.get(component("loss", settings))
    sources = [*map(_source, datasets(settings))]
    return rules.data_outcome(sources, None if objective == "sft" else objective)


def _source(one: Values) -> SourceDataset:
    builder = str(one.get("_component_")).rpartition(".")[2].removesuffix("_dataset")
    own, given = COLUMNS if builder == "instruct" else {}, one.get("column_map")
    theirs = given if isinstance(given, Mapping) else {key: key for key in own}
    columns = {own.get(k, k): v for k, v in theirs.items()}
    turns = "messages" if one.get("conversation_style") == "openai" else "conversations"
    columns |= {turns: one.get("conversation_column"), "text": one.get("column")}
    return rules.dataset(
        one.get("source", NAMES["sources"].get(builder)), one.get("name"), one.get("split"),
        one.get("data_files"), "", columns, _remarks(one, builder), f" ({builder})",
    )  # fmt: skip


def _remarks(one: Values, builder: str) -> Iterator[str]:
    alpaca = builder.startswith("alpaca")
    if alpaca:
        yield "lorafold uses the model's chat template, not its prompt format (### Instruction:)"
    if one.get("train_on_input", alpaca):
        yield f"torchtune trains on the prompts too: {trainer.FULL_LOSS.remark}"


MAIN_KEYS: Table = {
    "model._component_": (_model, NONE),
    "dtype": rules.if_else(
        is_quantized,
        mapped(storage=bnb_storage(4)),
        rules.by_value({name: ("taken", "", {"storage": name}) for name in ("bf16", "fp32")}),
    ),
    "loss._component_": _loss,
    "max_steps_per_epoch": lambda value, settings: rules.changed(
        "torchtune ends an epoch after as many steps, or before if it has fewer",
        steps=int(integer(value) * number(settings["epochs"])),
    ),
    "batch_size": (trainer.batch("device", is_packed, "torchtune tokenizer.max_seq_len"), 1),
    "clip_grad_norm": (
        lambda value, settings: mapped(clip=0.0 if value in (NONE, "inf") else number(value)), NONE,
    ),
    "optimizer._component_": lambda value, settings: trainer.optimizer(
        NAMES["optimizers"].get(component("optimizer", settings), ""), settings
    ),
    "optimizer.lr": (trainer.rate(is_lora), 1e-3),
    "optimizer.betas": rules.to_field("betas", mlx.betas),
    "lr_scheduler._component_": (_schedule, NONE),
    "lr_scheduler.num_warmup_steps": (lambda value, _: trainer.warmup_of(integer(value)), 0),
    "dataset dataset._component_": _dataset,
    "run_val_every_n_steps": trainer.interval("eval_every"),
    "save_every_n_steps": trainer.interval("save_every"),
    **rules.static_rows("torchtune"),
}
LORA_KEYS: Table = {"model.lora_attn_modules": _targets, **rules.static_rows("torchtune_lora")}
RULES = (*rules.table(MAIN_KEYS), *rules.table(LORA_KEYS, is_lora))
KNOWN = frozenset(name for rule in RULES for name in (rule.key, rule.key.partition(".")[0]))
