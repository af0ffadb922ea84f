"""axolotl's training YAML: a rule a key, with axolotl's own defaults.

Read off axolotl's configuration schema and its builders as of July 2026. A batch is counted for one
GPU, as axolotl's own is. Where axolotl packs, its micro-batch counts packed sequences, and
lorafold's batch counts rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating import trainer
from lorafold.translating.convert import choice, names, number, truth, whole
from lorafold.translating.no_counterpart import AXOLOTL
from lorafold.translating.vocabulary import (
    Outcome,
    Reading,
    Rule,
    Settings,
    all_without,
    changed,
    left,
    option,
    refusing,
    taken,
    to,
    without,
)

MARKS = (
    "base_model adapter micro_batch_size sequence_len num_epochs lora_r lora_target_linear"
    " sample_packing val_set_size lora_target_modules lora_model_dir"
)
INIT_ADAPTER = "lora_model_dir"
NO_ADAPTER = "none, the whole model"


def of_lora(reading: Reading) -> Reading:
    """The reading, which has no effect where the file trains the whole model."""
    return lambda value, settings: (
        None if settings["adapter"] == NO_ADAPTER else reading(value, settings)
    )


def adapter(value: Any, settings: Settings) -> Outcome:
    if value == NO_ADAPTER:
        if settings["pretraining_dataset"]:
            raise LorafoldError("found none and a pretraining_dataset: lorafold does not pretrain")
        need("learning_rate", settings)
        return taken(method="full")
    choice(value, "lora", "qlora")
    if value == "qlora" and not settings["load_in_4bit"]:
        raise LorafoldError("found qlora without load_in_4bit: true, which axolotl asks for")
    if settings[INIT_ADAPTER]:
        need("learning_rate", settings)
    else:
        need("learning_rate lora_r lora_alpha", settings)
        if not (settings["lora_target_modules"] or settings["lora_target_linear"]):
            raise LorafoldError(
                f"found {value}, and neither lora_target_modules nor lora_target_linear"
            )
    peft = settings["peft"]
    loftq = isinstance(peft, dict) and peft.get("loftq_config")
    return trainer.kind_of_lora(
        settings.read("peft_use_dora", truth),
        settings.read("peft_use_rslora", truth),
        settings["peft_init_lora_weights"] or ("loftq" if loftq else None),
    )


def need(keys: str, settings: Settings) -> None:
    if missing := [key for key in keys.split() if settings[key] is None]:
        raise LorafoldError(f"{', '.join(missing)} missing, and axolotl has no default for it")


def part_of_method(value: Any, settings: Settings) -> Outcome:
    return taken("it is part of the method") if value else taken("it is off")


def target_linear(value: Any, settings: Settings) -> Outcome:
    return taken(targets="all-linear") if truth(value) else taken("it is off")


def target_modules(value: Any, settings: Settings) -> Outcome:
    if settings["lora_target_linear"]:
        return changed(
            "lora_target_linear is on besides: all-linear has every linear layer of the blocks"
        )
    return taken(targets=value if isinstance(value, str) else names(value))


def quantized(base: str) -> Reading:
    def read(value: Any, settings: Settings) -> Outcome:
        return taken(base=base) if truth(value) else taken("it is off")

    return read


def bf16(value: Any, settings: Settings) -> Outcome | None:
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return taken("a quantized base computes in 16 bits") if "bf16" in settings.given else None
    if value not in ("full", True) and any(settings[key] for key in ("fp16", "float16", "float32")):
        return None
    if value == "auto":
        return taken(base="auto")
    on = value == "full" or truth(value) or bool(settings["bfloat16"])
    return taken(base="bf16" if on else "fp32")


def fp16(value: Any, settings: Settings) -> Outcome | None:
    if not truth(value):
        return taken("it is off")
    if settings["load_in_4bit"] or settings["load_in_8bit"] or settings["bf16"] in (True, "full"):
        return None
    return changed("lorafold does not train in fp16; bf16 takes the same memory", base="bf16")


def fp32(value: Any, settings: Settings) -> Outcome | None:
    if not truth(value):
        return taken("it is off")
    quantized_base = settings["load_in_4bit"] or settings["load_in_8bit"]
    return None if quantized_base or settings["bf16"] in (True, "full") else taken(base="fp32")


def accumulation(settings: Settings) -> int:
    """axolotl's own rule where the file gives the total batch in its place."""
    total = settings["batch_size"]
    if total is not None and settings.given.get("gradient_accumulation_steps") is None:
        return max(1, whole(total) // max(1, settings.read("micro_batch_size", whole)))
    return settings.read("gradient_accumulation_steps", whole)


def batch(value: Any, settings: Settings) -> Outcome:
    rows = whole(value) * accumulation(settings)
    if settings["sample_packing"]:
        return changed(
            "axolotl counts packed sequences and lorafold counts rows: to see as many tokens a step"
            " raise batch by the rows that fill sequence_len",
            batch=rows,
        )
    return taken("micro-batch times accumulation, of one GPU", batch=rows)


def excess(value: Any, settings: Settings) -> Outcome:
    if value == "truncate":
        return taken("longer rows are cut")
    return changed("longer rows are cut here, and the run says how many; filter them out before")


def per_epoch(name: str, otherwise: str) -> Reading:
    """A count an epoch, as axolotl turns it into a share of the run."""
    read = trainer.every(name, otherwise)

    def of_count(value: Any, settings: Settings) -> Outcome | None:
        count = number(value) * settings.read("num_epochs", number)
        return taken("it is off") if count <= 0 else read(min(1 / count, 0.999), settings)

    return of_count


def template(value: Any, settings: Settings) -> Outcome:
    if value == "tokenizer_default":
        return taken("the model's own template")
    if value == "jinja":
        return taken("it is chat_template_jinja's")
    return left(
        f"write the template {value} to a file and pass it as --chat-template FILE; without it the"
        " model's own is used"
    )


def template_file(value: Any, settings: Settings) -> Outcome:
    if "{" not in str(value) and Path(str(value)).suffix:
        return taken(chat_template=str(value))
    return left("write the template to a file and pass it as --chat-template FILE")


def datasets(value: Any, settings: Settings) -> Outcome:
    found = [d for d in value if isinstance(d, dict)] if isinstance(value, list) else []
    listed = ", ".join(f"{d.get('path')} ({d.get('type', 'no type')})" for d in found)
    return left(
        f"pass rows of messages, of prompt and completion, or of text as --data: {listed or value}",
        "--data DATA",
    )


def tokens(value: Any, settings: Settings) -> Outcome:
    if isinstance(value, dict):
        return left("the tokenizer's own special tokens are used")
    return changed("the base is not resized: their rows train beside it", new_tokens=names(value))


def on_inputs(value: Any, settings: Settings) -> Outcome:
    if truth(value):
        return left("every token of {text} rows is trained, and completions of the other rows")
    return taken("the loss is on completions")


def tracker(name: str) -> Reading:
    return lambda value, settings: taken(trackers=(name,)) if value else taken("it is off")


def project(value: Any, settings: Settings) -> Outcome:
    return changed("the tracker's project is named lorafold", trackers=("wandb",))


RULES: tuple[Rule, ...] = (
    Rule("adapter", adapter, NO_ADAPTER),
    Rule("peft_use_dora", of_lora(part_of_method), False),
    Rule("peft_use_rslora", of_lora(part_of_method), False),
    Rule("peft_init_lora_weights", of_lora(part_of_method)),
    Rule("peft", of_lora(part_of_method)),
    Rule("lora_r", of_lora(to("rank", whole))),
    Rule("lora_alpha", of_lora(to("alpha", number))),
    Rule("lora_dropout", of_lora(to("dropout", number)), 0.0),
    Rule("lora_target_linear", of_lora(target_linear)),
    Rule("lora_target_modules", of_lora(target_modules)),
    Rule("lora_rank_pattern", of_lora(to("rank_pattern"))),
    Rule("lora_alpha_pattern", of_lora(to("alpha_pattern"))),
    Rule("lora_modules_to_save", of_lora(to("modules_to_save", names))),
    Rule(INIT_ADAPTER, option("--init-adapter")),
    Rule("load_in_4bit", quantized("nf4")),
    Rule("load_in_8bit", quantized("int8")),
    Rule("bf16", bf16, "auto"),
    Rule("bfloat16", lambda value, settings: taken("bf16 decides")),
    Rule("fp16", fp16),
    Rule("float16", fp16),
    Rule("float32", fp32),
    Rule("learning_rate", to("lr", number)),
    Rule("loraplus_lr_ratio", of_lora(trainer.plus_ratio), 1),
    Rule("lr_scheduler", trainer.schedule, "cosine"),
    *trainer.warmup_rules("lr_scheduler", None),
    Rule("optimizer", trainer.optimizer, "adamw_torch_fused"),
    Rule("weight_decay", to("weight_decay", number), 0.0),
    Rule("max_grad_norm", trainer.clip, 1.0),
    *trainer.ADAM,
    Rule("num_epochs", to("epochs", number), 1.0),
    Rule("max_steps", trainer.max_steps),
    Rule("micro_batch_size", batch, 1),
    Rule("gradient_accumulation_steps",
        lambda value, settings: taken(accumulate=accumulation(settings)), 1),
    Rule("batch_size", lambda value, settings: taken("accumulation follows from it")),
    Rule("sequence_len", to("max_length", whole), 512),
    Rule("excess_length_strategy", excess, "drop"),
    Rule("sample_packing", to("packing", truth), False),
    Rule("train_on_inputs", on_inputs),
    Rule("gradient_checkpointing", lambda value, settings: (
        changed("activations are recomputed, and not offloaded", gradient_checkpointing=True)
        if str(value).startswith(("offload", "unsloth"))
        else taken(gradient_checkpointing=truth(value)))),
    Rule("val_set_size", trainer.held_out, 0.0),
    Rule("eval_steps", trainer.every("eval_every", "each checkpoint is evaluated")),
    Rule("evals_per_epoch", per_epoch("eval_every", "each checkpoint is evaluated")),
    Rule("save_steps", trainer.every("save_every", "there are about ten checkpoints a run")),
    Rule("saves_per_epoch", per_epoch("save_every", "there are about ten checkpoints a run")),
    Rule("save_strategy", trainer.strategy),
    Rule("eval_strategy", trainer.strategy),
    Rule("evaluation_strategy", trainer.strategy),
    Rule("save_total_limit", trainer.keep),
    Rule("seed", to("seed", whole)),
    Rule("tokens", tokens),
    Rule("chat_template", template),
    Rule("chat_template_jinja", template_file),
    Rule("use_wandb", tracker("wandb")),
    Rule("wandb_project", project),
    Rule("use_tensorboard", tracker("tensorboard")),
    Rule("use_mlflow", tracker("mlflow")),
    Rule("use_comet", tracker("comet_ml")),
    Rule("use_trackio", tracker("trackio")),
    Rule("use_swanlab", tracker("swanlab")),
    Rule("base_model", option("--model")),
    Rule("model_revision", option("--revision")),
    Rule("revision_of_model", option("--revision")),
    Rule("trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if truth(value) else taken("it is off"))),
    Rule("output_dir", option("--out")),
    Rule("datasets", datasets),
    Rule("pretraining_dataset", datasets),
    Rule("test_datasets", lambda value, settings: (
        left("pass its rows as --eval-data", "--eval-data EVAL_DATA"))),
    Rule("resume_from_checkpoint", without("lorafold resumes runs of its own: --resume")),
    Rule("auto_resume_from_checkpoints", without("pass --resume to go on with a run")),
    Rule("rl", refusing("lorafold's objectives are sft and classify")),
    Rule("reward_model", refusing("lorafold does not train reward models")),
    Rule("process_reward_model", refusing("lorafold does not train reward models")),
    Rule("reinit_weights", refusing("lorafold does not pretrain")),
    Rule("relora", refusing("lorafold does not restart LoRA")),
    Rule("unfrozen_parameters", refusing("lorafold's full method trains the whole model")),
    Rule("qat", refusing("lorafold does not train for later quantization")),
    Rule("special_tokens",
        without("the tokenizer's own are used; words that are to be tokens: --new-tokens")),
    Rule("lora_fan_in_fan_out",
        of_lora(lambda value, settings: taken("the base's storage decides"))),
    *(rule for why, keys in AXOLOTL for rule in all_without(why, keys)),
)  # fmt: skip
