"""Readers of LLaMA-Factory's values: each is the function of a rule in `llamafactory.RULES` and
says what becomes of that key.

A batch is counted for one device, as LLaMA-Factory's own is. Where it packs, its batch counts
packed sequences, and lorafold's batch counts rows.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError
from lorafold.models.storages import DEFAULT, MADE, STORAGES, made_of
from lorafold.translating import trainer
from lorafold.translating.convert import boolean, choice, integer, names, number
from lorafold.translating.llamafactory_preferences import objective_of, of_supervised
from lorafold.translating.preferences import has_reference
from lorafold.translating.rules import Outcome, Reader, Settings, changed, left, taken


def of_lora(reader: Reader) -> Reader:
    """The same reader, except that the key has no effect where the file trains the whole model."""
    return lambda value, settings: (
        reader(value, settings) if settings["finetuning_type"] == "lora" else None
    )


def stage(value: Any, settings: Settings) -> Outcome:
    """`stage` becomes the objective; LorafoldError for those that lorafold does not have."""
    if value == "sft":
        return taken(objective="sft")
    if value == "pt" and settings["finetuning_type"] == "lora":
        return changed(
            "lorafold reads plain text as rows of {text}, and cuts or packs them whole",
            objective="sft",
        )
    if value == "pt":
        raise LorafoldError("found 'pt' of the whole model, but lorafold does not pretrain")
    if value == "dpo":
        return taken("pref_loss says which objective")
    if value == "rm":
        return changed(
            "its head there has a bias and a dropout of its own, and here neither",
            objective="reward",
        )
    if value == "ppo":
        raise LorafoldError(
            "found 'ppo', whose reward is a model and whose value is learned, but lorafold's ppo"
            " takes functions and has groups of completions"
        )
    return taken(objective=choice(value, "pt", "sft", "rm", "ppo", "dpo", "kto"))


def finetuning_type(value: Any, settings: Settings) -> Outcome:
    """`finetuning_type` becomes the method, with the switches of LoRA's kinds."""
    if value in ("freeze", "oft"):
        raise LorafoldError(f"found {value!r}, but lorafold has no such method")
    if choice(value, "lora", "full") == "full":
        return taken(method="full")
    pissa = f"pissa_niter_{max(0, settings.read('pissa_iter', integer))}"
    return trainer.kind_of_lora(
        settings.read("use_dora", boolean),
        settings.read("use_rslora", boolean),
        pissa if settings.read("pissa_init", boolean) else None,
    )


def pissa_init(value: Any, settings: Settings) -> Outcome | None:
    """`pissa_init` is read by the rule of `finetuning_type`; LorafoldError with a reference, as in
    LLaMA-Factory, since the base that PiSSA changes would be the reference.
    """
    if boolean(value) and has_reference(objective_of(settings)):
        raise LorafoldError(f"found {value!r}, which LLaMA-Factory refuses with a reference")
    return part_of_method(value, settings)


def part_of_method(value: Any, settings: Settings) -> Outcome | None:
    """A switch of the method, such as `use_dora`, is read by the rule of `finetuning_type`."""
    if not boolean(value):
        return None
    return taken("it is part of the method")


def lora_alpha(value: Any, settings: Settings) -> Outcome:
    """`lora_alpha` becomes alpha; 0 stands for twice the rank."""
    return taken(
        alpha=number(value) if number(value) else 2.0 * settings.read("lora_rank", integer)
    )


def lora_rank(value: Any, settings: Settings) -> Outcome:
    """`lora_rank` becomes the rank, and gives alpha as twice the rank where the file has none."""
    if settings.given.get("lora_alpha"):
        return taken(rank=integer(value))
    return taken("alpha is twice the rank there", rank=integer(value), alpha=2.0 * integer(value))


def lora_target(value: Any, settings: Settings) -> Outcome:
    """`lora_target` becomes the targets; all stands for the preset all-linear."""
    found = names(value)
    return taken(targets="all-linear" if found == ("all",) else found)


def quantization_bit(value: Any, settings: Settings) -> Outcome:
    """`quantization_bit` becomes a quantized base, the nearest of those that lorafold makes."""
    by, kind = settings["quantization_method"], settings["quantization_type"]
    found = made_of(integer(value))
    nearest = found or DEFAULT
    same = STORAGES[nearest].made.get("bnb_4bit_quant_type", kind) == kind
    if found and same and by in ("bnb", "bitsandbytes"):
        return taken(storage=found)
    return changed(
        f"lorafold quantizes with bitsandbytes, as {' or '.join(MADE)}, of which {nearest} is"
        " nearest",
        storage=nearest,
    )


def part_of_quantization(value: Any, settings: Settings) -> Outcome | None:
    """How to quantize is read by the rule of `quantization_bit`."""
    return None if settings["quantization_bit"] is None else taken("it is part of the base")


def bf16(value: Any, settings: Settings) -> Outcome | None:
    """`bf16` becomes the base's storage, unless that is quantized or `fp16` is on."""
    if settings["quantization_bit"] is not None:
        return taken("a quantized base computes in 16 bits") if "bf16" in settings.given else None
    if boolean(value) or settings.read("pure_bf16", boolean):
        whole_model = settings["finetuning_type"] == "full" and not settings.read(
            "pure_bf16", boolean
        )
        return (
            changed("weights that train are held in fp32 there, and so here", storage="fp32")
            if whole_model
            else taken(storage="bf16")
        )
    if settings.read("fp16", boolean):
        return None
    return taken(trainer.AUTO, storage="auto")


def pure_bf16(value: Any, settings: Settings) -> Outcome | None:
    """`pure_bf16` is read by the rule of `bf16`."""
    return None if not boolean(value) else taken("bf16 is read with it")


def fp16(value: Any, settings: Settings) -> Outcome | None:
    """`fp16` becomes a base in bf16, unless that is quantized or `bf16` is on."""
    if (
        not boolean(value)
        or settings["quantization_bit"] is not None
        or settings.read("bf16", boolean)
    ):
        return None
    return changed(trainer.NO_FP16, storage="bf16")


def is_packed(settings: Settings) -> bool:
    """Whether rows are packed, as LLaMA-Factory decides it: where `neat_packing` or `packing` is
    on, and in pretraining unless `packing` is off. Rows of preferences are not.
    """
    found = settings["packing"]
    by_stage = settings["stage"] == "pt"
    if objective_of(settings) is not None:
        return False
    return settings.read("neat_packing", boolean) or (by_stage if found is None else boolean(found))


def neat_packing(value: Any, settings: Settings) -> Outcome:
    """`neat_packing` and `packing` become `packing`, where packed rows never see each other."""
    of_supervised(value, settings)
    if is_packed(settings) and not boolean(value):
        return changed("rows see each other there and are kept apart here", packing=True)
    return taken(packing=is_packed(settings))


def batch(value: Any, settings: Settings) -> Outcome:
    """`per_device_train_batch_size` times accumulation becomes the batch, which counts rows."""
    rows = integer(value) * settings.read("gradient_accumulation_steps", integer)
    if is_packed(settings):
        return changed(
            "LLaMA-Factory counts packed sequences and lorafold counts rows: to see as many tokens"
            " a step raise batch by the rows that fill cutoff_len",
            batch=rows,
        )
    return taken("micro-batch times accumulation, of one device", batch=rows)


def template(value: Any, settings: Settings) -> Outcome:
    """`template` is left: the model's own chat template is used."""
    return left(
        f"the model's own template is used; for {value} write it to a file and pass it as"
        " --chat-template FILE"
    )


def train_on_prompt(value: Any, settings: Settings) -> Outcome:
    """`train_on_prompt` is left where it is on: the loss is on completions."""
    of_supervised(value, settings)
    if boolean(value):
        return left("every token of {text} rows is trained, and completions of the other rows")
    return taken("the loss is on completions")


def mask_history(value: Any, settings: Settings) -> Outcome:
    """`mask_history` trains the last turn of the assistant alone, where it is on."""
    of_supervised(value, settings)
    if boolean(value):
        return taken(train_on="last")
    return taken("every turn of the assistant is trained", train_on="all")


def enable_thinking(value: Any, settings: Settings) -> Outcome:
    """`enable_thinking` becomes a variable of the chat template, where it is given."""
    if value is None:
        return taken("the chat template decides by the row")
    return changed(
        "a run refuses it where the model's chat template does not read it",
        template_kwargs={"enable_thinking": boolean(value)},
    )
