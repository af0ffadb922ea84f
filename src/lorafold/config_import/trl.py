"""Converts TRL's configurations, with one table for each trainer: SFT, DPO, KTO, CPO (SimPO), ORPO,
reward, GRPO and RLOO, as of TRL 1.16 (CPO and ORPO are in its experimental part) and transformers
5.24.

A file without model settings trains LoRA, lorafold's default. The batch is for one process; with
packing, TRL's batch counts packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafold.config_import import grpo, trainer
from lorafold.config_import.rules import (
    OFF,
    Outcome,
    Rule,
    Table,
    ToolSettings,
    Values,
    changed,
    choice,
    data_outcome,
    dataset,
    mapped,
    objects_with_path,
    read_with,
    static_rows,
    table,
    unmapped,
)
from lorafold.errors import LorafoldError
from lorafold.foreign_options import NO_FP16, boolean, integer, names, number, targets
from lorafold.models.quantizations import bnb_storage

BY_ARCHITECTURE = "by architecture"  # for a file without lora_target_modules
SCORE_HEAD = "score"  # transformers' name of a reward model's head
DTYPES = {"bfloat16": "bf16", "float16": "bf16", "float32": "bf16", "auto": "auto"}


def is_lora(settings: ToolSettings) -> bool:
    return settings.is_on("use_peft") or settings["model_name_or_path"] is None


def _use_peft(value: Any, settings: ToolSettings) -> Outcome:
    if not is_lora(settings):
        return mapped(method="full")
    kind = trainer.kind_of_lora(settings.is_on("use_dora"), settings.is_on("use_rslora"), None)
    return changed(
        "" if boolean(value) else "the file sets no model, so lorafold trains LoRA", **kind.fields
    )


def _modules_to_save(value: Any, settings: ToolSettings) -> Outcome:
    others = tuple(name for name in names(value) if name != SCORE_HEAD)
    remark = f"a reward model always trains {SCORE_HEAD}" if SCORE_HEAD in names(value) else ""
    return mapped(remark, modules_to_save=others) if others else mapped(remark)


def dtype(value: Any, settings: ToolSettings) -> Outcome | None:
    """TRL multiplies fp32 weights in bf16 unless `bf16` is off."""
    name = choice(value, *DTYPES)
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return None
    if name == "float16" or settings.is_on("fp16"):
        return changed(NO_FP16, storage="bf16")
    if name == "float32" and not is_lora(settings):
        return mapped("trained weights are kept in fp32", storage="fp32")
    if name == "float32" and not settings.is_on("bf16"):
        return mapped(storage="fp32")
    remarks = {"float32": "TRL multiplies these fp32 weights in bf16", "auto": trainer.AUTO}
    return mapped(remarks.get(name, ""), storage=DTYPES[name])


def _load_in_4bit(value: Any, settings: ToolSettings) -> Outcome:
    if not boolean(value):
        return OFF
    if settings["bnb_4bit_quant_type"] != "nf4":
        raise LorafoldError("lorafold supports only nf4 as bnb_4bit_quant_type")
    return mapped(storage=bnb_storage(4))


# ModelConfig and related keys
LORA_KEYS: Table = {
    "lora_target_modules": (
        lambda value, settings: (
            trainer.AUTO_TARGETS if value == BY_ARCHITECTURE else mapped(targets=targets(value))
        ),
        BY_ARCHITECTURE,
    ),
    "lora_target_parameters": trainer.parameters_besides("lora_target_modules"),
    "lora_modules_to_save": _modules_to_save,
    **static_rows("trl_lora"),
}
MODEL = (
    *table(
        {
            "use_peft": (_use_peft, False),
            "load_in_4bit": (_load_in_4bit, False),
            "torch_dtype": dtype,
            **static_rows("trl_model"),
        }
    ),
    *table({"dtype": (dtype, "float32")}, lambda settings: settings["torch_dtype"] is None),
    *table(LORA_KEYS, is_lora),
)
IN_MODEL = {rule.key for rule in MODEL}
COMMON = (
    *MODEL,
    *(r for r in table({**trainer.SHARED_KEYS, **trainer.TRAINER_KEYS}) if r.key not in IN_MODEL),
    *table({"test_split_size": trainer.held_out_rows, **static_rows("trl")}),
)


def _packing(value: Any, settings: ToolSettings) -> Outcome:
    mixed = boolean(value) and "flash" not in str(settings["attn_implementation"])
    why = "without FlashAttention TRL lets packed rows attend to each other; lorafold never does"
    return changed(why if mixed else "", packing=boolean(value))


def is_packed(settings: ToolSettings) -> bool:
    return bool(settings["packing"]) and settings.is_on("packing")


def _max_length(value: Any, settings: ToolSettings) -> Outcome | None:
    if settings["max_seq_length"] is not None:
        return None
    unlimited = settings.config.get("max_length", value) is None
    why = f"TRL does not truncate the rows, lorafold does at {value} tokens" if unlimited else ""
    return changed(why, max_length=integer(value))


def _chat_template_path(value: Any, settings: ToolSettings) -> Outcome:
    if Path(str(value)).suffix in (".jinja", ".j2", ".txt"):
        return mapped(chat_template=str(value))
    return unmapped(f"write the template of {value} to a file and pass it as --chat-template FILE")


def centre(value: Any, settings: ToolSettings) -> Outcome:
    """`center_rewards_coefficient` also sets the objective, because no other key names it."""
    options = {"objective_options": {"centre": number(value)}} if number(value) else {}
    return mapped(objective="reward", **options)


def _sampling_dropout(value: Any, settings: ToolSettings) -> Outcome:
    return changed(grpo.NO_DROPOUT if number(value) else "", dropout=0.0)


def data_rows(objective: str | None) -> Table:
    def name(value: Any, settings: ToolSettings) -> Outcome:
        if settings["datasets"]:
            return mapped("replaced by datasets")
        config, split = settings["dataset_config"], settings["dataset_train_split"]
        return data_outcome([dataset(value, config, split)], objective)

    def datasets(value: Any, settings: ToolSettings) -> Outcome | None:
        if not isinstance(value, list):
            raise LorafoldError(f"found {value!r}, expected a list of objects with the key path")
        sources = []
        for one in objects_with_path(value):
            files = one.get("data_files") or one.get("data_dir")
            remarks = [f"only the columns {one['columns']}"] if one.get("columns") else []
            if one.get("weight", 1) != 1:
                remarks.append(f"a share of its rows: pass --data {one['path']}:{one['weight']}")
            place = one["path"], one.get("name"), one.get("split"), files
            sources.append(dataset(*place, remarks=remarks))
        return data_outcome(sources, objective) if sources else None

    def mixture(value: Any, settings: ToolSettings) -> Outcome | None:
        if not isinstance(value, dict):
            raise LorafoldError(f"found {value!r}, expected an object")
        splits = [one for one in settings["dataset_splits"] or () if "train" in one] or [None]
        named = [{"id": k, "weight": v, "split": splits[0]} for k, v in value.items()]
        given = value.get("datasets", named)
        renamed = [{**one, "path": one.get("id"), "name": one.get("config")} for one in given]
        return datasets(renamed, settings)

    return {
        "dataset_name": name,
        "datasets": datasets,
        "dataset_mixer dataset_mixture": mixture,  # of the alignment handbook
        "dataset_config dataset_train_split": read_with("dataset_name"),
        "dataset_test_split": "pass the rows of this split as --eval-data",
    }


LORA_DROPOUT = trainer.dropout(
    lambda settings: bool(settings["disable_dropout"]) and settings.is_on("disable_dropout")
)
RATE = trainer.rate(is_lora)
LENGTH_KEYS: Table = {
    "per_device_train_batch_size": (trainer.batch("process", is_packed, "TRL max_length"), 8),
    "max_length": (_max_length, 1024),
    **static_rows("length"),
}
# Preferences: dropout is off, and the reference is the model below the adapter
PREFERENCE_KEYS: Table = {
    "learning_rate": (RATE, 1e-6),
    **LENGTH_KEYS,
    **static_rows("preferences"),
}
# With sampled completions, a batch counts completions and there is no dropout
SAMPLING_KEYS: Table = {
    **data_rows("grpo"),
    "learning_rate": (RATE, 1e-6),
    "per_device_train_batch_size": (grpo.batch, 8),
    "gradient_accumulation_steps": (grpo.accumulation, 1),
    **static_rows("trl_sampling"),
}
TABLES: Mapping[str, Table] = {
    "trl-sft": {
        "learning_rate": (RATE, 2e-5),
        "packing": (_packing, False),
        **static_rows("trl_packed", lambda settings: settings.is_on("packing")),
        **static_rows("trl_sft"),
        "chat_template_path": _chat_template_path,
        **data_rows(None),
        **LENGTH_KEYS,
    },
    "trl-dpo": {
        "loss_type": (
            lambda value, settings: trainer.dpo_objective(
                names(value), settings["loss_weights"], "loss_weights"
            ),
            ["sigmoid"],
        ),
        "beta": (
            trainer.beta(
                lambda settings: trainer.DPO_LOSSES.get(
                    next(iter(settings.read("loss_type", names)), "")
                )
            ),
            0.1,
        ),
        "label_smoothing": trainer.dpo_label_smoothing,
        **static_rows("trl_dpo"),
        **data_rows("dpo"),
        **grpo.REFERENCE,
        **PREFERENCE_KEYS,
    },
    "trl-kto": {
        **static_rows("trl_kto"),
        "desirable_weight": (trainer.loss_option("desirable_weight", lambda _: "kto"), 1.0),
        "undesirable_weight": (trainer.loss_option("undesirable_weight", lambda _: "kto"), 1.0),
        **data_rows("kto"),
        **grpo.REFERENCE,
        **PREFERENCE_KEYS,
    },
    "trl-orpo": {
        # no key names its loss
        "beta": (
            lambda value, settings: changed(
                trainer.ORPO_TERM, objective="orpo", beta=number(value)
            ),
            0.1,
        ),
        **data_rows("orpo"),
        **PREFERENCE_KEYS,
    },
    "trl-cpo": {
        **static_rows("trl_cpo"),
        "simpo_gamma": (trainer.loss_option("gamma", lambda _: "simpo"), 0.5),
        "cpo_alpha": (trainer.sft_term_of("simpo"), 1.0),
        **data_rows("simpo"),
        **PREFERENCE_KEYS,
    },
    "trl-reward": {
        "center_rewards_coefficient": (centre, 0.0),
        "chat_template_path": _chat_template_path,
        **data_rows("reward"),
        **PREFERENCE_KEYS,
        "learning_rate": (RATE, 1e-4),
    },
    "trl-grpo": {**grpo.GRPO, **SAMPLING_KEYS},
    "trl-rloo": {**grpo.RLOO, **SAMPLING_KEYS},
}
SAMPLERS = {"trl-grpo", "trl-rloo"}  # trainers that sample completions
DROPOUTS = {kind: _sampling_dropout if kind in SAMPLERS else LORA_DROPOUT for kind in TABLES}
RULES = {
    kind: (*table(rows), *table({"lora_dropout": (DROPOUTS[kind], 0.05)}, is_lora), *COMMON)
    for kind, rows in TABLES.items()
}
# The objective of a trainer; None for supervised training
OBJECTIVES = {kind: kind.removeprefix("trl-") for kind in TABLES} | {
    "trl-sft": None, "trl-cpo": "simpo"
}  # fmt: skip


def rules_over(rules: Sequence[Rule], own: Sequence[Rule], defaults: Values) -> tuple[Rule, ...]:
    """The rules of a tool that passes its settings to a trainer: its `own` rules, and the trainer's
    with the tool's `defaults`.
    """
    taken = {rule.key for rule in own} | IN_MODEL
    rest = (rule for rule in rules if rule.key not in taken)
    return (*own, *(replace(r, default=defaults.get(r.key, r.default)) for r in rest))
