"""What every configuration of TRL has, whichever its trainer: the fields of ModelConfig, of the
script and of the Trainer beneath, one rule each, with TRL's defaults. What is a trainer's own
stands in `trl_trainers` and `policy_rules`.

Read off TRL 1.16 and transformers 5.24. A file of a trainer's fields alone says nothing of the
model: then LoRA is trained, lorafold's default, where `trl` would train the whole model.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.models.storages import made_of
from lorafold.translating import trainer
from lorafold.translating.convert import boolean, choice, integer, names, number
from lorafold.translating.no_counterpart import TRL
from lorafold.translating.rules import (
    Outcome,
    Reader,
    Rule,
    Settings,
    all_without,
    changed,
    left,
    option,
    taken,
    to,
    without,
)

BY_ARCHITECTURE = "by architecture"  # what stands for a file without lora_target_modules
HEAD = "score"  # what transformers calls the head of a reward model
DTYPES = {"bfloat16": "bf16", "float16": "bf16", "float32": "bf16", "auto": "auto"}


def is_lora(settings: Settings) -> bool:
    """Whether an adapter is trained, and not the whole model."""
    return settings.read("use_peft", boolean) or settings["model_name_or_path"] is None


def of_lora(reader: Reader) -> Reader:
    """The same reader, except that the key has no effect where the file trains the whole model."""
    return lambda value, settings: reader(value, settings) if is_lora(settings) else None


def use_peft(value: Any, settings: Settings) -> Outcome:
    """`use_peft` becomes the method, with the switches of LoRA's kinds."""
    if not is_lora(settings):
        return taken(method="full")
    kind = trainer.kind_of_lora(
        settings.read("use_dora", boolean), settings.read("use_rslora", boolean), None
    )
    if boolean(value):
        return kind
    return changed("the file names no model: LoRA is trained", **kind.fields)


def target_modules(value: Any, settings: Settings) -> Outcome:
    """`lora_target_modules` become the targets; without them both have a rule of their own."""
    if value == BY_ARCHITECTURE:
        return changed("PEFT looks them up by architecture, and lorafold by the method's own rule")
    found = names(value)
    return taken(targets="all-linear" if found == ("all-linear",) else found)


def modules_to_save(value: Any, settings: Settings) -> Outcome:
    """`lora_modules_to_save`, without the head that a reward model trains in any case."""
    others = tuple(name for name in names(value) if name != HEAD)
    said = f"{HEAD} is trained with a reward model in any case" if HEAD in names(value) else ""
    return taken(said, modules_to_save=others) if others else taken(said)


def learning_rate(value: Any, settings: Settings) -> Outcome:
    """`learning_rate` becomes the rate, of LoRA that of both factors."""
    if not is_lora(settings):
        return taken(lr=number(value))
    return taken("one rate for both factors, no LoRA+", lr=number(value), lr_b=number(value))


def dtype(value: Any, settings: Settings) -> Outcome | None:
    """`dtype` becomes the base's storage, unless that is quantized: what TRL keeps in fp32 it
    multiplies in bf16, unless `bf16` is off.
    """
    found = choice(value, *DTYPES)
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return None
    if found == "float16" or settings.read("fp16", boolean):
        return changed(trainer.NO_FP16, storage="bf16")
    if found == "float32" and not is_lora(settings):
        return taken("weights that train are kept in fp32", storage="fp32")
    if found == "float32" and not settings.read("bf16", boolean):
        return taken(storage="fp32")
    remarks = {"float32": "its products are in bf16 there", "auto": trainer.AUTO}
    return taken(remarks.get(found, ""), storage=DTYPES[found])


def read_with(key: str) -> Reader:
    """The reader of a key that the rule of another one reads."""
    return lambda value, settings: taken(f"it is read with {key}") if value else taken("it is off")


def quantized(bits: int) -> Reader:
    """The reader of `load_in_4bit` or `load_in_8bit`. LorafoldError for FP4."""

    def read(value: Any, settings: Settings) -> Outcome:
        if not boolean(value):
            return taken("it is off")
        if bits == 4 and settings["bnb_4bit_quant_type"] != "nf4":
            raise LorafoldError("found 4 bits of fp4, but lorafold has nf4")
        return taken(storage=made_of(bits))

    return read


# Of the model: ModelConfig and what goes with it
MODEL: tuple[Rule, ...] = (
    Rule("use_peft", use_peft, False),
    Rule("use_dora", read_with("use_peft"), False),
    Rule("use_rslora", read_with("use_peft"), False),
    Rule("lora_r", of_lora(to("rank", integer)), 16),
    Rule("lora_alpha", of_lora(to("alpha", number)), 32),
    Rule("lora_target_modules", of_lora(target_modules), BY_ARCHITECTURE),
    Rule("lora_target_parameters", of_lora(lambda value, settings: (
        trainer.target_parameters(settings["lora_target_modules"], names(value))))),
    Rule("lora_modules_to_save", of_lora(modules_to_save)),
    Rule("lora_task_type", lambda value, settings: taken("the objective decides") if (
        choice(value, "CAUSAL_LM", "SEQ_CLS")) else None),
    Rule("load_in_4bit", quantized(4), False),
    Rule("load_in_8bit", quantized(8), False),
    Rule("bnb_4bit_quant_type", lambda value, settings: taken("it is part of the base"), "nf4"),
    Rule("use_bnb_nested_quant", lambda value, settings: taken("nf4 always quantizes its scales")),
    Rule("dtype", lambda value, settings: (
        dtype(value, settings) if settings["torch_dtype"] is None else None), "float32"),
    Rule("torch_dtype", dtype),
    Rule("bf16", read_with("dtype"), True),
    Rule("fp16", read_with("dtype"), False),
    Rule("gradient_checkpointing", to("gradient_checkpointing", boolean), True),
    Rule("model_name_or_path", option("--model")),
    Rule("model_revision", lambda value, settings: (
        taken("the model's own") if value == "main" else option("--revision")(value, settings))),
    Rule("trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if boolean(value) else taken("it is off"))),
)  # fmt: skip

COMMON: tuple[Rule, ...] = (
    *MODEL,
    Rule("lr_scheduler_type", trainer.schedule, "linear"),
    *trainer.warmup_rules("lr_scheduler_type", 0),
    Rule("optim", trainer.optimizer, "adamw_torch_fused"),
    Rule("weight_decay", to("weight_decay", number), 0.0),
    Rule("max_grad_norm", trainer.max_grad_norm, 1.0),
    *trainer.ADAM_RULES,
    Rule("num_train_epochs", to("epochs", number), 3.0),
    Rule("max_steps", trainer.max_steps),
    Rule("eval_steps", trainer.interval("eval_every", "each checkpoint is evaluated")),
    Rule("save_steps", trainer.interval("save_every", "there are about ten checkpoints a run")),
    Rule("save_strategy", trainer.interval_strategy),
    Rule("eval_strategy", trainer.interval_strategy),
    Rule("save_total_limit", trainer.save_total_limit),
    Rule("test_split_size", trainer.held_out_rows),
    Rule("seed", to("seed", integer)),
    Rule("use_cpu", trainer.use_cpu),
    Rule("report_to", trainer.trackers),
    Rule("output_dir", option("--out")),
    Rule("overwrite_output_dir", without("pass --overwrite to replace what an earlier run wrote")),
    Rule("do_train", lambda value, settings: taken("lorafold train does it")),
    Rule("resume_from_checkpoint", without("lorafold resumes runs of its own: --resume")),
    *(rule for why, keys in TRL for rule in all_without(why, keys)),
)  # fmt: skip
