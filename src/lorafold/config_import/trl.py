"""TRL's files, with one table for each trainer: SFT, DPO, KTO, CPO (SimPO), ORPO, reward, GRPO and
RLOO, as of TRL 1.16 (CPO and ORPO from its experimental part) and transformers 5.24.

A file without model settings trains LoRA, lorafold's default. The batch is for one process; with
packing, TRL's counts packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafold.config_import import grpo, trainer
from lorafold.config_import.rules import (
    OFF,
    SAME,
    Outcome,
    Table,
    ToolSettings,
    cases,
    changed,
    choice,
    dataset,
    either,
    flagged,
    given_as_data,
    if_on,
    left,
    objects_with_path,
    read_with,
    refusing,
    switch,
    table,
    taken,
    to,
    unless,
)
from lorafold.config_import.unsupported import MEMORY, TRL
from lorafold.errors import LorafoldError
from lorafold.foreign_options import NO_FP16, boolean, integer, names, number, targets
from lorafold.models.quantizations import bnb_storage

BY_ARCHITECTURE = "by architecture"  # for a file without lora_target_modules
HEAD = "score"  # transformers' name of a reward model's head
DTYPES = {"bfloat16": "bf16", "float16": "bf16", "float32": "bf16", "auto": "auto"}
# The losses of DPOTrainer; losses that DPO_LOSSES lacks are rejected by name
DPO_NAMES = (
    *trainer.DPO_LOSSES, "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "aot_pair", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


def is_lora(settings: ToolSettings) -> bool:
    return settings.on("use_peft") or settings["model_name_or_path"] is None


def _use_peft(value: Any, settings: ToolSettings) -> Outcome:
    if not is_lora(settings):
        return taken(method="full")
    kind = trainer.kind_of_lora(settings.on("use_dora"), settings.on("use_rslora"), None)
    return changed(
        "" if boolean(value) else "the file sets no model, so lorafold trains LoRA", **kind.fields
    )


def _modules_to_save(value: Any, settings: ToolSettings) -> Outcome:
    others = tuple(name for name in names(value) if name != HEAD)
    said = f"a reward model always trains {HEAD}" if HEAD in names(value) else ""
    return taken(said, modules_to_save=others) if others else taken(said)


def dtype(value: Any, settings: ToolSettings) -> Outcome | None:
    """`dtype` becomes the base's quantization or dtype. TRL multiplies fp32 weights in bf16 unless
    `bf16` is off.
    """
    name = choice(value, *DTYPES)
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return None
    if name == "float16" or settings.on("fp16"):
        return changed(NO_FP16, storage="bf16")
    if name == "float32" and not is_lora(settings):
        return taken("trained weights are kept in fp32", storage="fp32")
    if name == "float32" and not settings.on("bf16"):
        return taken(storage="fp32")
    remarks = {"float32": "TRL multiplies these fp32 weights in bf16", "auto": trainer.AUTO}
    return taken(remarks.get(name, ""), storage=DTYPES[name])


def _load_in_4bit(value: Any, settings: ToolSettings) -> Outcome:
    if not boolean(value):
        return OFF
    if settings["bnb_4bit_quant_type"] != "nf4":
        raise LorafoldError("lorafold supports only nf4 as bnb_4bit_quant_type")
    return taken(storage=bnb_storage(4))


# ModelConfig and related keys
SWITCHES: Table = {
    "use_peft": (_use_peft, False),
    "use_dora use_rslora": (if_on(read_with("use_peft")), False),
    "lora_task_type": cases(
        dict.fromkeys(("CAUSAL_LM", "SEQ_CLS"), taken("determined by the objective"))
    ),
    "load_in_4bit": (_load_in_4bit, False),
    "load_in_8bit": (switch(taken(storage=bnb_storage(8))), False),
    "bnb_4bit_quant_type": (taken("part of the base's quantization"), "nf4"),
    "use_bnb_nested_quant": taken("nf4 always uses nested quantization"),
    "torch_dtype": dtype,
    "bf16": (if_on(read_with("dtype")), True),
    "fp16": (if_on(read_with("dtype")), False),
    "gradient_checkpointing": (to("gradient_checkpointing", boolean), True),
    "model_name_or_path": "--model",
    "model_revision": lambda value, settings: (
        taken("the default revision") if value == "main" else flagged("--revision", value)
    ),
    "trust_remote_code": trainer.TRUST,
}
OF_METHOD: Table = {
    "lora_r": (SAME, 16),
    "lora_alpha": (SAME, 32),
    "lora_target_modules": (
        lambda value, settings: (
            trainer.LOOKED_UP if value == BY_ARCHITECTURE else taken(targets=targets(value))
        ),
        BY_ARCHITECTURE,
    ),
    "lora_target_parameters": lambda value, settings: trainer.target_parameters(
        settings["lora_target_modules"], names(value)
    ),
    "lora_modules_to_save": _modules_to_save,
}
MODEL = (
    *table(SWITCHES),
    *table({"dtype": (dtype, "float32")}, lambda settings: settings["torch_dtype"] is None),
    *table(OF_METHOD, is_lora),
)
IN_MODEL = {rule.key for rule in MODEL}
COMMON = (
    *MODEL,
    *(rule for rule in table({**trainer.STEPS, **trainer.ARGUMENTS}) if rule.key not in IN_MODEL),
    *table(
        {
            "test_split_size": trainer.held_out_rows,
            "do_train": taken("lorafold train always trains"),
            **TRL,
        }
    ),
)


def _packing(value: Any, settings: ToolSettings) -> Outcome:
    mixed = boolean(value) and "flash" not in str(settings["attn_implementation"])
    why = "without FlashAttention TRL lets packed rows attend to each other; lorafold never does"
    return changed(why if mixed else "", packing=boolean(value))


def is_packed(settings: ToolSettings) -> bool:
    return bool(settings["packing"]) and settings.on("packing")


def _max_length(value: Any, settings: ToolSettings) -> Outcome | None:
    if settings["max_seq_length"] is not None:
        return None
    uncut = settings.given.get("max_length", value) is None
    why = f"TRL does not truncate the rows, lorafold does at {value} tokens" if uncut else ""
    return changed(why, max_length=integer(value))


def _chat_template_path(value: Any, settings: ToolSettings) -> Outcome:
    if Path(str(value)).suffix in (".jinja", ".j2", ".txt"):
        return taken(chat_template=str(value))
    return left(f"write the template of {value} to a file and pass it as --chat-template FILE")


def losses(settings: ToolSettings) -> tuple[str, ...]:
    plain = not number(settings["label_smoothing"] or 0)
    given = settings.read("loss_type", names)
    return tuple("sigmoid" if name == "robust" and plain else name for name in given)


def centre(value: Any, settings: ToolSettings) -> Outcome:
    """`center_rewards_coefficient` becomes `centre`; it also sets the objective, which no other key
    names.
    """
    options = {"objective_options": {"centre": number(value)}} if number(value) else {}
    return taken(objective="reward", **options)


def _drawn_dropout(value: Any, settings: ToolSettings) -> Outcome:
    return changed(grpo.NO_DROPOUT if number(value) else "", dropout=0.0)


def data_rows(objective: str | None) -> Table:
    def name(value: Any, settings: ToolSettings) -> Outcome:
        if settings["datasets"]:
            return taken("replaced by datasets")
        config, split = settings["dataset_config"], settings["dataset_train_split"]
        return given_as_data([dataset(value, config, split)], objective)

    def several(value: Any, settings: ToolSettings) -> Outcome | None:
        if not isinstance(value, list):
            raise LorafoldError(f"found {value!r}, expected a list of objects with the key path")
        sources = []
        for one in objects_with_path(value):
            files = one.get("data_files") or one.get("data_dir")
            remarks = [f"only the columns {one['columns']}"] if one.get("columns") else []
            place = one["path"], one.get("name"), one.get("split"), files
            sources.append(dataset(*place, remarks=remarks))
        return given_as_data(sources, objective) if sources else None

    return {
        "dataset_name": name,
        "datasets": several,
        "dataset_config dataset_train_split": read_with("dataset_name"),
        "dataset_test_split": "pass the rows of this split as --eval-data",
    }


LORA_DROPOUT = trainer.dropout(
    lambda settings: bool(settings["disable_dropout"]) and settings.on("disable_dropout")
)
RATE = trainer.rate(is_lora)
GIVEN: Table = {
    "per_device_train_batch_size": (trainer.batch("process", is_packed, "TRL max_length"), 8),
    "gradient_accumulation_steps": (SAME, 1),
    "max_length": (_max_length, 1024),
    "max_prompt_length max_completion_length": changed(
        "lorafold truncates prompt and completion together, at max_length"
    ),
    "truncation_mode": cases(
        {
            "keep_start": taken("rows are truncated at the end"),
            "keep_end": changed("lorafold truncates rows at the end"),
        }
    ),
    "pad_to_multiple_of": MEMORY,
}
# Preferences: dropout is off, and the reference is the model below the adapter
COMPARING: Table = {
    "disable_dropout": (switch(taken("there is no dropout"), taken("dropout is applied")), True),
    "packing": (taken(packing=False), False),
    "learning_rate": (RATE, 1e-6),
    **GIVEN,
}
# With sampled completions, a batch counts completions and there is no dropout
DRAWING: Table = {
    **data_rows("grpo"),
    "learning_rate": (RATE, 1e-6),
    "per_device_train_batch_size": (grpo.batch, 8),
    "gradient_accumulation_steps": (grpo.accumulation, 1),
    "max_prompt_length": changed(
        "TRL truncated longer prompts, lorafold rejects them; max_length includes both parts"
    ),
    "reward_model_name_or_path": refusing(
        "lorafold supports functions, patterns, schemas and verifiers as rewards"
    ),
}
REVERSE_KL = "lorafold supports only the reverse KL"
OTHER_STRATEGIES = ("bfd_split", "bfd-requeue", "wrapped")
OF_POLICIES = (
    "reward_funcs reward_weights num_generations mask_truncated_completions steps_per_generation"
    " generation_batch_size use_vllm"
)
# Each trainer's name, signs and own keys
TRAINERS: Mapping[str, tuple[str, str, Table]] = {
    "trl-sft": (
        "SFT",
        "packing packing_strategy padding_free completion_only_loss assistant_only_loss"
        " dataset_text_field dataset_kwargs eval_packing loss_type=nll loss_type=dft"
        " loss_type=chunked_nll max_seq_length",
        {
            "loss_type": (
                cases(
                    {
                        **dict.fromkeys(("nll", "chunked_nll"), taken(objective="sft")),
                        "dft": "lorafold's sft supports only the mean of -log p",
                    }
                ),
                "nll",
            ),
            "learning_rate": (RATE, 2e-5),
            "packing": (_packing, False),
            "packing_strategy": either(
                lambda settings: settings.on("packing"),
                cases(
                    {
                        "bfd": taken("best-fit packing"),
                        **dict.fromkeys(
                            OTHER_STRATEGIES,
                            changed(
                                "lorafold uses best-fit packing without attention between rows,"
                                " and truncates rows that are too long"
                            ),
                        ),
                    }
                ),
            ),
            "eval_packing": taken("determined by packing"),
            "max_seq_length": SAME,
            "completion_only_loss": switch(trainer.COMPLETIONS, trainer.EVERY_TOKEN),
            "assistant_only_loss": (
                switch(
                    taken("the loss is computed on assistant turns only"),
                    changed(
                        "TRL trains on every token of {messages} rows, lorafold only on assistant"
                        " turns"
                    ),
                ),
                False,
            ),
            "dataset_text_field": lambda value, settings: (
                taken("lorafold uses the same column name")
                if value == "text"
                else left("name the text column with --columns", f"--columns text={value}")
            ),
            "chat_template_path": _chat_template_path,
            **data_rows(None),
            **GIVEN,
        },
    ),
    "trl-dpo": (
        "DPO",
        " ".join(f"loss_type={name}" for name in DPO_NAMES)
        + " loss_weights f_divergence_type use_weighting discopop_tau ld_alpha",
        {
            "loss_type": (
                lambda value, settings: trainer.of_dpo(
                    losses(settings), settings["loss_weights"], "loss_weights"
                ),
                ["sigmoid"],
            ),
            "loss_weights": read_with("loss_type"),
            "beta": (
                trainer.beta(
                    lambda settings: trainer.DPO_LOSSES.get(next(iter(losses(settings)), ""))
                ),
                0.1,
            ),
            "label_smoothing": trainer.smoothing_of_dpo,
            "f_divergence_type": cases(
                {"reverse_kl": taken(REVERSE_KL)}, f"{REVERSE_KL} (reverse_kl)"
            ),
            "f_alpha_divergence_coef": read_with("f_divergence_type"),
            "ld_alpha": unless(1, "lorafold gives all tokens of both completions the same weight"),
            "use_weighting": refusing("lorafold gives every pair the same weight"),
            "discopop_tau": None,
            **data_rows("dpo"),
            **grpo.REFERENCE,
            **COMPARING,
        },
    ),
    "trl-kto": (
        "KTO",
        "desirable_weight undesirable_weight loss_type=kto loss_type=apo_zero_unpaired",
        {
            "loss_type": (
                cases(
                    {
                        "kto": changed(
                            "TRL estimates z (the KL) over a micro-batch, lorafold over a step",
                            objective="kto",
                        )
                    },
                    "lorafold's kto supports only the loss kto",
                ),
                "kto",
            ),
            "beta": (to("beta", number), 0.1),
            "desirable_weight": (trainer.law_option("desirable_weight", lambda _: "kto"), 1.0),
            "undesirable_weight": (trainer.law_option("undesirable_weight", lambda _: "kto"), 1.0),
            **data_rows("kto"),
            **grpo.REFERENCE,
            **COMPARING,
        },
    ),
    "trl-orpo": (
        "ORPO",
        "",
        {
            # no key names its loss
            "beta": (
                lambda value, settings: changed(
                    trainer.ORPO_TERM, objective="orpo", beta=number(value)
                ),
                0.1,
            ),
            **data_rows("orpo"),
            **COMPARING,
        },
    ),
    "trl-cpo": (
        "CPO",
        "cpo_alpha simpo_gamma loss_type=simpo loss_type=alphapo",
        {
            "loss_type": (
                cases(
                    {"simpo": taken(objective="simpo")},
                    "lorafold supports only simpo of CPO's losses",
                ),
                "sigmoid",
            ),
            "beta": (to("beta", number), 0.1),
            "simpo_gamma": (trainer.law_option("gamma", lambda _: "simpo"), 0.5),
            "cpo_alpha": (trainer.supervised_as("simpo"), 1.0),
            "alpha": unless(0, "lorafold does not support AlphaPO's reward transformation"),
            "label_smoothing": unless(0, "lorafold's simpo does not support label smoothing"),
            **data_rows("simpo"),
            **COMPARING,
        },
    ),
    "trl-reward": (
        "reward trainer",
        "center_rewards_coefficient",
        {
            "center_rewards_coefficient": (centre, 0.0),
            "chat_template_path": _chat_template_path,
            **data_rows("reward"),
            **COMPARING,
            "learning_rate": (RATE, 1e-4),
        },
    ),
    "trl-grpo": (
        "GRPO",
        f"{OF_POLICIES} num_iterations scale_rewards importance_sampling_level"
        " multi_objective_aggregation delta loss_type=dapo loss_type=bnpo loss_type=dr_grpo"
        " loss_type=grpo loss_type=luspo loss_type=cispo",
        {**grpo.GRPO, **DRAWING},
    ),
    "trl-rloo": (
        "RLOO",
        f"{OF_POLICIES} normalize_advantages reward_clip_range",
        {**grpo.RLOO, **DRAWING},
    ),
}
DRAW = {"trl-grpo", "trl-rloo"}  # trainers that sample completions
DROPOUTS = {kind: _drawn_dropout if kind in DRAW else LORA_DROPOUT for kind in TRAINERS}
RULES = {
    kind: (*table(rows), *table({"lora_dropout": (DROPOUTS[kind], 0.05)}, is_lora), *COMMON)
    for kind, (_, _, rows) in TRAINERS.items()
}
