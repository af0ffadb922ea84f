"""LLaMA-Factory's training YAML: a rule a key, with its own defaults and those of the Trainer that
it hands them to.

Read off LLaMA-Factory's argument classes as of August 2026. A batch is counted for one device, as
its own is. Where it packs, its batch counts packed sequences, and lorafold's counts rows.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating import trainer
from lorafold.translating.convert import choice, names, number, truth, whole
from lorafold.translating.no_counterpart import LLAMAFACTORY
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
    "model_name_or_path finetuning_type stage cutoff_len lora_rank lora_target template"
    " per_device_train_batch_size num_train_epochs quantization_bit dataset_dir"
)
INIT_ADAPTER = "adapter_name_or_path"


def of_lora(reading: Reading) -> Reading:
    """The reading, which has no effect where the file trains the whole model."""
    return lambda value, settings: (
        reading(value, settings) if settings["finetuning_type"] == "lora" else None
    )


def stage(value: Any, settings: Settings) -> Outcome:
    if value == "sft":
        return taken(objective="sft")
    if value == "pt" and settings["finetuning_type"] == "lora":
        return changed(
            "lorafold reads plain text as rows of {text}, and cuts or packs them whole",
            objective="sft",
        )
    if value == "pt":
        raise LorafoldError("found 'pt' of the whole model, but lorafold does not pretrain")
    raise LorafoldError(f"found {value!r}, but lorafold's objectives are sft and classify")


def method(value: Any, settings: Settings) -> Outcome:
    if value in ("freeze", "oft"):
        raise LorafoldError(f"found {value!r}, but lorafold has no such method")
    if choice(value, "lora", "full") == "full":
        return taken(method="full")
    pissa = f"pissa_niter_{max(0, settings.read('pissa_iter', whole))}"
    return trainer.kind_of_lora(
        settings.read("use_dora", truth),
        settings.read("use_rslora", truth),
        pissa if settings.read("pissa_init", truth) else None,
    )


def part_of_method(value: Any, settings: Settings) -> Outcome | None:
    """A switch that the rule of the method reads with its own value."""
    if not truth(value):
        return None
    return taken("it is part of the method")


def alpha(value: Any, settings: Settings) -> Outcome:
    return taken(alpha=number(value) if number(value) else 2.0 * settings.read("lora_rank", whole))


def implied_alpha(value: Any, settings: Settings) -> Outcome:
    """Twice the rank, unless the file says."""
    if settings.given.get("lora_alpha"):
        return taken(rank=whole(value))
    return taken("alpha is twice the rank there", rank=whole(value), alpha=2.0 * whole(value))


def targets(value: Any, settings: Settings) -> Outcome:
    found = names(value)
    return taken(targets="all-linear" if found == ("all",) else found)


def bits(value: Any, settings: Settings) -> Outcome:
    by, kind = settings["quantization_method"], settings["quantization_type"]
    found = {4: "nf4", 8: "int8"}.get(whole(value))
    if found and by in ("bnb", "bitsandbytes") and (found == "int8" or kind == "nf4"):
        return taken(base=found)
    nearest = found or "nf4"
    return changed(
        f"lorafold quantizes with bitsandbytes, as nf4 or int8, of which {nearest} is nearest",
        base=nearest,
    )


def part_of_bits(value: Any, settings: Settings) -> Outcome | None:
    return None if settings["quantization_bit"] is None else taken("it is part of the base")


def bf16(value: Any, settings: Settings) -> Outcome | None:
    if settings["quantization_bit"] is not None:
        return taken("a quantized base computes in 16 bits") if "bf16" in settings.given else None
    if truth(value) or settings.read("pure_bf16", truth):
        whole_model = settings["finetuning_type"] == "full" and not settings.read(
            "pure_bf16", truth
        )
        return (
            changed("weights that train are held in fp32 there, and so here", base="fp32")
            if whole_model
            else taken(base="bf16")
        )
    if settings.read("fp16", truth):
        return None
    return taken("as the model's files are, where the hardware can", base="auto")


def pure_bf16(value: Any, settings: Settings) -> Outcome | None:
    return None if not truth(value) else taken("bf16 is read with it")


def fp16(value: Any, settings: Settings) -> Outcome | None:
    if not truth(value) or settings["quantization_bit"] is not None or settings.read("bf16", truth):
        return None
    return changed("lorafold does not train in fp16; bf16 takes the same memory", base="bf16")


def packs(settings: Settings) -> bool:
    """Packed as LLaMA-Factory decides it: neat_packing packs, and so does pretraining."""
    found = settings["packing"]
    by_stage = settings["stage"] == "pt"
    return settings.read("neat_packing", truth) or (by_stage if found is None else truth(found))


def packing(value: Any, settings: Settings) -> Outcome:
    """`neat_packing`, whose default is off: with `packing` it decides."""
    if packs(settings) and not truth(value):
        return changed("rows see each other there and are kept apart here", packing=True)
    return taken(packing=packs(settings))


def batch(value: Any, settings: Settings) -> Outcome:
    rows = whole(value) * settings.read("gradient_accumulation_steps", whole)
    if packs(settings):
        return changed(
            "LLaMA-Factory counts packed sequences and lorafold counts rows: to see as many tokens"
            " a step raise batch by the rows that fill cutoff_len",
            batch=rows,
        )
    return taken("micro-batch times accumulation, of one device", batch=rows)


def template(value: Any, settings: Settings) -> Outcome:
    return left(
        f"the model's own template is used; for {value} write it to a file and pass it as"
        " --chat-template FILE"
    )


def on_prompt(value: Any, settings: Settings) -> Outcome:
    if truth(value):
        return left("every token of {text} rows is trained, and completions of the other rows")
    return taken("the loss is on completions")


def last_turn(value: Any, settings: Settings) -> Outcome:
    if truth(value):
        return left("pass rows of prompt (the messages before) and completion (the last turn)")
    return taken("every turn of the assistant is trained")


def init_adapter(value: Any, settings: Settings) -> Outcome | None:
    found = names(value)
    if len(found) > 1 or settings["create_new_adapter"]:
        raise LorafoldError(
            f"found {value!r}, which LLaMA-Factory merges first: lorafold merge does that, and its"
            " result is the --model"
        )
    return option("--init-adapter")(found[0], settings)


RULES: tuple[Rule, ...] = (
    Rule("stage", stage, "sft"),
    Rule("finetuning_type", method, "lora"),
    Rule("use_dora", part_of_method, False),
    Rule("use_rslora", part_of_method, False),
    Rule("pissa_init", part_of_method, False),
    Rule("pissa_iter", lambda value, settings: (
        taken("it is part of the method") if settings.read("pissa_init", truth) else None), 16),
    Rule("pissa_convert", lambda value, settings: (
        taken("an adapter is always saved as LoRA over the plain base"))),
    Rule("lora_rank", of_lora(implied_alpha), 8),
    Rule("lora_alpha", of_lora(alpha)),
    Rule("lora_dropout", of_lora(to("dropout", number)), 0.0),
    Rule("lora_target", of_lora(targets), "all"),
    Rule("additional_target", of_lora(to("modules_to_save", names))),
    Rule(INIT_ADAPTER, init_adapter),
    Rule("create_new_adapter", lambda value, settings: (
        taken("a fresh adapter is lorafold's way, unless --init-adapter names one"))),
    Rule("quantization_bit", bits),
    Rule("quantization_method", part_of_bits, "bnb"),
    Rule("quantization_type", part_of_bits, "nf4"),
    Rule("double_quantization", lambda value, settings: (
        None if settings["quantization_bit"] is None
        else taken("nf4 is always so") if truth(value)
        else changed("nf4 always quantizes its scales again here"))),
    Rule("bf16", bf16, False),
    Rule("pure_bf16", pure_bf16, False),
    Rule("fp16", fp16, False),
    Rule("learning_rate", to("lr", number), 5e-5),
    Rule("loraplus_lr_ratio", of_lora(trainer.plus_ratio), 1),
    Rule("lr_scheduler_type", trainer.schedule, "linear"),
    *trainer.warmup_rules("lr_scheduler_type", 0),
    Rule("optim", trainer.optimizer, "adamw_torch_fused"),
    Rule("weight_decay", to("weight_decay", number), 0.0),
    Rule("max_grad_norm", trainer.clip, 1.0),
    *trainer.ADAM,
    Rule("num_train_epochs", to("epochs", number), 3.0),
    Rule("max_steps", trainer.max_steps),
    Rule("per_device_train_batch_size", batch, 8),
    Rule("gradient_accumulation_steps", to("accumulate", whole), 1),
    Rule("cutoff_len", to("max_length", whole), 2048),
    Rule("packing", lambda value, settings: taken("neat_packing is read with it")),
    Rule("neat_packing", packing, False),
    Rule("train_on_prompt", on_prompt),
    Rule("mask_history", last_turn),
    Rule("disable_gradient_checkpointing", lambda value, settings: (
        taken(gradient_checkpointing=not truth(value)))),
    Rule("gradient_checkpointing", lambda value, settings: (
        taken("disable_gradient_checkpointing decides there"))),
    Rule("val_size", trainer.held_out, 0.0),
    Rule("eval_steps", trainer.every("eval_every", "each checkpoint is evaluated")),
    Rule("save_steps", trainer.every("save_every", "there are about ten checkpoints a run")),
    Rule("save_strategy", trainer.strategy),
    Rule("eval_strategy", trainer.strategy),
    Rule("evaluation_strategy", trainer.strategy),
    Rule("save_total_limit", trainer.keep),
    Rule("seed", to("seed", whole)),
    Rule("report_to", trainer.trackers),
    Rule("use_swanlab", lambda value, settings: (
        taken(trackers=("swanlab",)) if truth(value) else taken("it is off"))),
    Rule("template", template),
    Rule("model_name_or_path", option("--model")),
    Rule("model_revision", option("--revision")),
    Rule("trust_remote_code", lambda value, settings: (
        left("pass --trust-remote-code", "--trust-remote-code")
        if truth(value) else taken("it is off"))),
    Rule("output_dir", option("--out")),
    Rule("overwrite_output_dir", without("pass --overwrite to replace what an earlier run wrote")),
    Rule("dataset", lambda value, settings: left(
        f"pass rows of messages, of prompt and completion, or of text as --data: {value}",
        "--data DATA")),
    Rule("eval_dataset", lambda value, settings: (
        left("pass its rows as --eval-data", "--eval-data EVAL_DATA"))),
    Rule("do_train", lambda value, settings: (
        taken("lorafold train does it") if truth(value)
        else left("the file does not train; lorafold train does"))),
    Rule("resume_from_checkpoint", without("lorafold resumes runs of its own: --resume")),
    Rule("train_from_scratch", refusing("lorafold does not pretrain")),
    Rule("use_galore", refusing("lorafold has no GaLore")),
    Rule("use_apollo", refusing("lorafold has no APOLLO")),
    Rule("use_badam", refusing("lorafold has no BAdam")),
    *(rule for why, keys in LLAMAFACTORY for rule in all_without(why, keys)),
)  # fmt: skip
