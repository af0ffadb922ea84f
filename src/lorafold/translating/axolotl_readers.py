"""Readers of axolotl's values: each is the function of a rule in `axolotl.RULES` and says what
becomes of that key.

A batch is counted for one GPU, as axolotl's own is. Where axolotl packs, its micro-batch counts
packed sequences, and lorafold's batch counts rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.models.storages import made_of
from lorafold.translating import policy_batches, trainer
from lorafold.translating.axolotl_policies import accumulation, as_trl, is_policy
from lorafold.translating.axolotl_preferences import starts_afresh
from lorafold.translating.convert import boolean, choice, integer, names, number
from lorafold.translating.rules import Outcome, Reader, Settings, changed, is_off, left, taken

# Weights of an adapter of PEFT, as axolotl names them
OF_LORA = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    "base_model.model.model.layers.17.mlp.down_proj.lora_B.default.weight",
)
# What names the attention, by which axolotl keeps packed rows apart
APART = (
    "attn_implementation", "flash_attention", "flex_attention", "xformers_attention",
    "sage_attention", "sdp_attention", "eager_attention", "sdpa_varlen",
)  # fmt: skip
NO_ADAPTER = "none, the whole model"  # what stands for a file without `adapter`


def of_lora(reader: Reader) -> Reader:
    """The same reader, except that the key has no effect where the file trains the whole model."""
    return lambda value, settings: (
        None if settings["adapter"] == NO_ADAPTER else reader(value, settings)
    )


def adapter(value: Any, settings: Settings) -> Outcome:
    """`adapter` becomes the method; with none the whole model trains.

    LorafoldError where a key is missing that axolotl asks for, and for combinations that lorafold
    can't train.
    """
    if value == NO_ADAPTER:
        if settings["pretraining_dataset"]:
            raise LorafoldError("found none and a pretraining_dataset: lorafold does not pretrain")
        require("learning_rate", settings)
        return taken(method="full")
    choice(value, "lora", "qlora")
    if value == "qlora" and not settings["load_in_4bit"]:
        raise LorafoldError("found qlora without load_in_4bit: true, which axolotl asks for")
    if not starts_afresh(settings):
        require("learning_rate", settings)
    else:
        require("learning_rate lora_r lora_alpha", settings)
        where = [f"lora_target_{name}" for name in ("modules", "linear", "parameters")]
        if not any(settings[key] for key in where):
            raise LorafoldError(f"found {value}, expected one of {', '.join(where)} beside it")
    peft = settings["peft"]
    loftq = isinstance(peft, dict) and peft.get("loftq_config")
    return trainer.kind_of_lora(
        settings.read("peft_use_dora", boolean),
        settings.read("peft_use_rslora", boolean),
        settings["peft_init_lora_weights"] or ("loftq" if loftq else None),
    )


def require(keys: str, settings: Settings) -> None:
    """Raise LorafoldError where one of the keys, separated by spaces, has no value."""
    if missing := [key for key in keys.split() if settings[key] is None]:
        raise LorafoldError(f"{', '.join(missing)} missing, and axolotl has no default for it")


def part_of_method(value: Any, settings: Settings) -> Outcome:
    """A switch of the method, such as `peft_use_dora`, is read by the rule of `adapter`."""
    return taken("it is part of the method") if value else taken("it is off")


def target_linear(value: Any, settings: Settings) -> Outcome:
    """`lora_target_linear` becomes the preset all-linear."""
    return taken(targets="all-linear") if boolean(value) else taken("it is off")


def target_modules(value: Any, settings: Settings) -> Outcome:
    """`lora_target_modules` become the targets, unless `lora_target_linear` is on."""
    if settings["lora_target_linear"]:
        return changed(
            "lora_target_linear is on besides: all-linear has every linear layer of the blocks"
        )
    return taken(targets=value if isinstance(value, str) else names(value))


def target_parameters(value: Any, settings: Settings) -> Outcome:
    """`lora_target_parameters` become targets beside the modules."""
    modules = "all-linear" if settings["lora_target_linear"] else settings["lora_target_modules"]
    return trainer.target_parameters(modules, names(value))


def quantized(bits: int) -> Reader:
    """The reader of `load_in_4bit` or `load_in_8bit`, which become a base quantized to so many."""

    def read(value: Any, settings: Settings) -> Outcome:
        return taken(storage=made_of(bits)) if boolean(value) else taken("it is off")

    return read


def bf16(value: Any, settings: Settings) -> Outcome | None:
    """`bf16` becomes the base's storage, unless a quantized base, `fp16` or `float32` decides."""
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return taken("a quantized base computes in 16 bits") if "bf16" in settings.given else None
    if value not in ("full", True) and any(settings[key] for key in ("fp16", "float16", "float32")):
        return None
    if value == "auto":
        return taken(storage="auto")
    on = value == "full" or boolean(value) or bool(settings["bfloat16"])
    return taken(storage="bf16" if on else "fp32")


def fp16(value: Any, settings: Settings) -> Outcome | None:
    """`fp16` becomes a base in bf16, unless that is quantized or `bf16` is on."""
    if not boolean(value):
        return taken("it is off")
    if settings["load_in_4bit"] or settings["load_in_8bit"] or settings["bf16"] in (True, "full"):
        return None
    return changed(trainer.NO_FP16, storage="bf16")


def fp32(value: Any, settings: Settings) -> Outcome | None:
    """`float32` becomes a base in fp32, unless that is quantized or `bf16` is on."""
    if not boolean(value):
        return taken("it is off")
    quantized_base = settings["load_in_4bit"] or settings["load_in_8bit"]
    return None if quantized_base or settings["bf16"] in (True, "full") else taken(storage="fp32")


def batch(value: Any, settings: Settings) -> Outcome:
    """`micro_batch_size` times accumulation becomes the batch, which counts rows."""
    if is_policy(settings):
        return policy_batches.batch(value, as_trl(settings))
    rows = integer(value) * accumulation(settings)
    if settings["sample_packing"]:
        return changed(
            "axolotl counts packed sequences and lorafold counts rows: to see as many tokens a step"
            " raise batch by the rows that fill sequence_len",
            batch=rows,
        )
    return taken("micro-batch times accumulation, of one GPU", batch=rows)


def micro_batches(value: Any, settings: Settings) -> Outcome:
    """`gradient_accumulation_steps` become the micro-batches of a step."""
    if is_policy(settings):
        return policy_batches.accumulation(accumulation(settings), as_trl(settings))
    return taken(accumulate=accumulation(settings))


def sequence_len(value: Any, settings: Settings) -> Outcome:
    """`sequence_len` becomes `max_length`; of a policy it is what a prompt may have of that."""
    if is_policy(settings):
        return changed("axolotl does not cut prompts; here they may have as many tokens")
    return taken(max_length=integer(value))


def sample_packing(value: Any, settings: Settings) -> Outcome:
    """`sample_packing` becomes packing, except that a policy reads a prompt once for its group. Of
    a file that names no attention axolotl lets packed rows see each other, with positions that
    start anew.
    """
    if is_policy(settings):
        return taken("a prompt is read once for all its completions")
    if boolean(value) and all(is_off(settings[key]) for key in APART):
        return changed(
            "without an attn_implementation rows see each other there, and are kept apart here",
            packing=True,
        )
    return taken(packing=boolean(value))


def excess_length(value: Any, settings: Settings) -> Outcome:
    """`excess_length_strategy` has one counterpart: longer rows are cut, and none are dropped."""
    if is_policy(settings):
        return changed("a run refuses prompts that are too long")
    if value == "truncate":
        return taken("longer rows are cut")
    return changed("longer rows are cut here, and the run says how many; filter them out before")


def warmup_steps(value: Any, settings: Settings) -> Outcome | None:
    """`warmup_steps` becomes the warm-up; axolotl makes two steps of one."""
    if settings["lr_scheduler"] == "constant":
        return None
    return trainer.warmed(2 if number(value) == 1 else number(value))


def warmup_ratio(value: Any, settings: Settings) -> Outcome | None:
    """`warmup_ratio` becomes the warm-up; of a run whose steps the file gives, axolotl takes the
    steps rounded down, and at most 100 where the ratio is its own.
    """
    if settings["lr_scheduler"] == "constant" or settings["warmup_steps"] is not None:
        return None
    share, total = number(value), trainer.total_steps(settings)
    if total is None:
        return trainer.warmed(share, share=True)
    steps = int(share * total)
    if settings.given.get("warmup_ratio") is None:
        steps = min(steps, 100)
    return trainer.warmed(2 if steps == 1 else steps)


def per_epoch(name: str, otherwise: str) -> Reader:
    """`evals_per_epoch` and `saves_per_epoch` become an interval in steps, by the share of the run
    that axolotl computes from them.

    `name` is the recipe field, and `otherwise` says what happens without it.
    """
    read = trainer.interval(name, otherwise)

    def of_count(value: Any, settings: Settings) -> Outcome | None:
        count = number(value) * settings.read("num_epochs", number)
        return taken("it is off") if count <= 0 else read(min(1 / count, 0.999), settings)

    return of_count


def chat_template(value: Any, settings: Settings) -> Outcome:
    """`chat_template` is left, unless it is the model's own or `chat_template_jinja`'s."""
    if value == "tokenizer_default":
        return taken("the model's own template")
    if value == "jinja":
        return taken("it is chat_template_jinja's")
    return left(
        f"write the template {value} to a file and pass it as --chat-template FILE; without it the"
        " model's own is used"
    )


def chat_template_jinja(value: Any, settings: Settings) -> Outcome:
    """`chat_template_jinja` becomes the chat template where it is a file's path."""
    if "{" not in str(value) and Path(str(value)).suffix:
        return taken(chat_template=str(value))
    return left("write the template to a file and pass it as --chat-template FILE")


def chat_template_kwargs(value: Any, settings: Settings) -> Outcome:
    """`chat_template_kwargs` become the variables of the chat template."""
    if not isinstance(value, dict):
        return left("expected an object of variables of the chat template")
    return changed(
        "a run refuses those that the model's chat template does not read", template_kwargs=value
    )


def unfrozen_parameters(value: Any, settings: Settings) -> Outcome:
    """`unfrozen_parameters` are taken where they are all of the adapter's weights. axolotl freezes
    what no pattern matches after it has attached the adapter, whose weights are called
    base_model.model.PATH.lora_A.default.weight. LorafoldError where the whole model trains.
    """
    if settings["adapter"] == NO_ADAPTER:
        raise LorafoldError(f"found {value!r}, but lorafold's full method trains the whole model")
    try:  # a dot is itself there, except before +
        patterns = [re.compile(re.sub(r"\.(?!\+)", r"\\.", one)) for one in names(value)]
    except re.error as error:
        raise LorafoldError(f"found {value!r}, no regular expressions: {error}") from None
    if all(any(pattern.match(name) for pattern in patterns) for name in OF_LORA):
        return taken("they are the adapter's weights")
    return left(
        "axolotl freezes every weight of the adapter that none matches, by names such as"
        f" {OF_LORA[0]}; here they all train, and of the base none: --set targets=REGEX"
    )


def new_tokens(value: Any, settings: Settings) -> Outcome:
    """`tokens` become new tokens; a table of special tokens is left."""
    if isinstance(value, dict):
        return left("the tokenizer's own special tokens are used")
    return changed("the base is not resized: their rows train beside it", new_tokens=names(value))


def train_on_inputs(value: Any, settings: Settings) -> Outcome:
    """`train_on_inputs` is left where it is on: the loss is on completions."""
    if boolean(value):
        return left("every token of {text} rows is trained, and completions of the other rows")
    return taken("the loss is on completions")


def tracker(name: str) -> Reader:
    """The reader of a tracker's switch, such as `use_wandb`, which becomes this tracker."""
    return lambda value, settings: taken(trackers=(name,)) if value else taken("it is off")


def wandb_project(value: Any, settings: Settings) -> Outcome:
    """`wandb_project` turns the tracker wandb on; the project's name is lorafold."""
    return changed("the tracker's project is named lorafold", trackers=("wandb",))
