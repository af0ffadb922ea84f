"""Converts LLaMA-Factory's training YAML, with its defaults and the Trainer's, as of August 2026.

The batch is for one device; with packing, LLaMA-Factory's batch counts packed sequences. Its
preference losses equal lorafold's: log-probabilities are averaged over tokens for ipo, orpo and
simpo and summed for the others, and `pref_ftx` weights the mean over the tokens of each chosen
completion. The reference is the model without the adapter in training.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafold.config_import import trainer
from lorafold.config_import.rules import (
    KEYS,
    OFF,
    REASONS,
    Outcome,
    SourceDataset,
    Table,
    ToolSettings,
    Values,
    by_value,
    changed,
    choice,
    data_outcome,
    dataset,
    is_off,
    mapped,
    pass_option,
    read_with,
    rejection,
    rename_remarks,
    setting_in,
    static_rows,
    table,
    unmapped,
    unsupported_remarks,
)
from lorafold.errors import LorafoldError
from lorafold.files.atomic import read_object
from lorafold.foreign_options import NO_FP16, boolean, integer, names, number
from lorafold.models.quantizations import DEFAULT, ON_LOAD, STORAGES, bnb_storage

NAMES = KEYS["names"]["llamafactory"]
FULL = by_value(
    {
        "freeze oft": ("refused", "lorafold does not support this method"),
        "lora": ("taken", "off"),
        "full": ("taken", "", {"method": "full"}),
    }
)
NEGLIGIBLE = 1e-6  # LLaMA-Factory ignores terms up to this weight
DATASET_INFO = "dataset_info.json"
ONLINE = "ONLINE"  # a dataset_dir for Hub datasets


is_lora = setting_in("finetuning_type", "lora")


is_dpo = setting_in("stage", "dpo")


def is_quantized(settings: ToolSettings) -> bool:
    return settings["quantization_bit"] is not None


def objective_of(settings: ToolSettings) -> str | None:
    if is_dpo(settings):
        return NAMES["losses"].get(str(settings["pref_loss"]))
    return {"kto": "kto", "rm": "reward"}.get(str(settings["stage"]))


def has_reference(settings: ToolSettings) -> bool:
    return trainer.has_reference(objective_of(settings))


def is_packed(settings: ToolSettings) -> bool:
    """Whether LLaMA-Factory packs rows: with `neat_packing` or `packing`, and in pretraining unless
    `packing` is off, but never for preferences.
    """
    if objective_of(settings) is not None:
        return False
    packing = settings["packing"]
    by_stage = settings["stage"] == "pt"
    return settings.is_on("neat_packing") or (by_stage if packing is None else boolean(packing))


def is_new_adapter(settings: ToolSettings) -> bool:
    """Whether a new adapter is trained on top of the named adapters. On a quantized base,
    LLaMA-Factory always continues to train the named adapter.
    """
    return settings.is_on("create_new_adapter") and not is_quantized(settings)


def _of_supervised(value: Any, settings: ToolSettings) -> bool:
    if boolean(value) and objective_of(settings) is not None:
        raise LorafoldError(
            f"found {value!r}, which LLaMA-Factory rejects with stage {settings['stage']}"
        )
    return boolean(value)


def _stage(value: Any, settings: ToolSettings) -> Outcome:
    remarks = {
        "pt": "lorafold reads plain text as rows of {text}, and truncates or packs whole rows",
        "rm": "LLaMA-Factory's value head has a bias and dropout, lorafold's head has neither",
    }
    choice(value, "pt", "sft", "rm", "ppo", "dpo", "kto")
    if value == "dpo":
        return mapped("pref_loss determines the objective")
    if value == "pt" and not is_lora(settings):
        raise LorafoldError("found 'pt' with full fine-tuning, but lorafold does not pretrain")
    if value == "ppo":
        raise LorafoldError(
            "found 'ppo', which needs a reward model and a value model, but lorafold's ppo uses"
            " --reward and groups of completions"
        )
    ours = {"pt": "sft", "rm": "reward"}
    return changed(remarks.get(value, ""), objective=ours.get(value, value))


def _finetuning_type(value: Any, settings: ToolSettings) -> Outcome | None:
    if not is_lora(settings):
        return FULL(value, settings)
    pissa = f"pissa_niter_{max(0, settings.read('pissa_iter', integer))}"
    return trainer.kind_of_lora(
        settings.is_on("use_dora"),
        settings.is_on("use_rslora"),
        pissa if settings.is_on("pissa_init") else None,
    )


def pissa_init(value: Any, settings: ToolSettings) -> Outcome | None:
    """LLaMA-Factory rejects PiSSA for losses with a reference model, because that would be the
    base, which PiSSA changes.
    """
    if boolean(value) and has_reference(settings):
        raise LorafoldError(f"found {value!r}, which LLaMA-Factory rejects with a reference")
    return trainer.PART_OF_METHOD if boolean(value) else None


def _quantization_bit(value: Any, settings: ToolSettings) -> Outcome:
    kind, made = settings["quantization_type"], bnb_storage(integer(value))
    nearest = made or DEFAULT
    same = STORAGES[nearest].bnb_options.get("bnb_4bit_quant_type", kind) == kind
    exact = made and same and settings["quantization_method"] in ("bnb", "bitsandbytes")
    why = f"lorafold quantizes with bitsandbytes to {' or '.join(ON_LOAD)}; {nearest} is used"
    return changed("" if exact else why, storage=nearest)


def _bf16(value: Any, settings: ToolSettings) -> Outcome | None:
    if is_quantized(settings):
        return mapped("a quantized base computes in 16-bit") if "bf16" in settings.config else None
    if boolean(value) or settings.is_on("pure_bf16"):
        if is_lora(settings) or settings.is_on("pure_bf16"):
            return mapped(storage="bf16")
        return changed("trained weights are kept in fp32, as in LLaMA-Factory", storage="fp32")
    return None if settings.is_on("fp16") else mapped(trainer.AUTO, storage="auto")


def _neat_packing(value: Any, settings: ToolSettings) -> Outcome:
    neat, packed = _of_supervised(value, settings), is_packed(settings)
    why = "LLaMA-Factory lets packed rows attend to each other; lorafold never does"
    return changed(why if packed and not neat else "", packing=packed)


def _pref_ftx(value: Any, settings: ToolSettings) -> Outcome | None:
    objective = objective_of(settings)
    if objective == "reward":
        return None
    return trainer.sft_term(value if number(value) > NEGLIGIBLE else 0.0, objective)


def _label_smoothing(value: Any, settings: ToolSettings) -> Outcome:
    if number(value) <= NEGLIGIBLE:
        return OFF
    if objective_of(settings) != "dpo":
        raise rejection(value, "LLaMA-Factory supports this only with pref_loss: sigmoid")
    return mapped(objective_options={"label_smoothing": number(value)})


def _bco_weight(value: Any, settings: ToolSettings) -> Outcome | None:
    if number(value) > NEGLIGIBLE and has_reference(settings) and is_dpo(settings):
        raise rejection(value, REASONS["no_such_term"])
    return None


def adapters_below(settings: ToolSettings) -> tuple[str, ...]:
    given = settings["adapter_name_or_path"] if is_lora(settings) else None
    adapters = () if given is None else names(given)
    return adapters if is_new_adapter(settings) else adapters[:-1]


def named_adapters(value: Any, settings: ToolSettings) -> Outcome | None:
    adapters, below = names(value), adapters_below(settings)
    if not adapters:
        return None
    if not below:
        return pass_option("--init-adapter", adapters[-1])
    options = ["--over"] * len(below) + ["--init-adapter"] * (len(adapters) - len(below))
    pairs = zip(options, adapters, strict=True)
    return unmapped(
        f"LLaMA-Factory merges {', '.join(below)} into the base first; lorafold merges nothing and"
        " trains the adapter on top",
        " ".join(f"{option} {shlex.quote(name)}" for option, name in pairs),
    )


def _ref_model(value: Any, settings: ToolSettings) -> Outcome:
    theirs = names(settings["ref_model_adapters"] or ())
    if value == settings["model_name_or_path"] and theirs == adapters_below(settings):
        return mapped("this is the model without the new adapter, lorafold's reference")
    over = " on top of ".join((*reversed(theirs), str(value)))
    raise LorafoldError(f"found {over} as the reference, but {trainer.NO_SECOND_MODEL}")


def _ref_model_quantization_bit(value: Any, settings: ToolSettings) -> Outcome | None:
    if settings["ref_model"] is None:
        return None
    own = settings["quantization_bit"]
    if own is not None and integer(value) == integer(own):
        return mapped("the reference is quantized like the base")
    return changed("the reference is the base itself, quantized as for training")


def _dataset(value: Any, settings: ToolSettings) -> Outcome:
    folder = Path(str(settings["dataset_dir"] or "data"))
    info = read_object(folder / DATASET_INFO) if (folder / DATASET_INFO).is_file() else {}
    sources = [_listed_dataset(name, info.get(name), folder) for name in names(value)]
    return data_outcome(sources, objective_of(settings))


def _listed_dataset(name: str, info: Any, folder: Path) -> SourceDataset:
    if str(folder) == ONLINE:
        return SourceDataset(name, name)
    if not isinstance(info, Mapping):
        return SourceDataset(name, None, {}, [f"not found in {folder / DATASET_INFO}"])
    file = info.get("file_name")
    path = info.get("hf_hub_url") or (str(folder / file) if file else None)
    subset, split = info.get("subset"), info.get("split")
    return dataset(path, subset, split, None, name, _columns(info), _remarks(info))


def _columns(info: Values) -> dict[str, Any]:
    given, tags = info.get("columns") or {}, info.get("tags") or {}
    judged = {name: given.get(key) for name, key in NAMES["preference_columns"].items()}
    if info.get("formatting") != "sharegpt":
        return {name: given.get(key) for name, key in NAMES["instruction_columns"].items()} | judged
    is_openai = (tags.get("role_tag"), tags.get("content_tag")) == ("role", "content")
    turns = {"messages" if is_openai else "conversations": given.get("messages") or "conversations"}
    return turns | (judged if info.get("ranking") or "kto_tag" in given else {})


def _remarks(info: Values) -> Iterator[str]:
    tags, given = info.get("tags") or {}, info.get("columns") or {}
    yield from rename_remarks(tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    others = [key for key in ("history", "images", "videos", "audios") if given.get(key)]
    known = NAMES["dataset_keys"].split()
    others += [key for key, value in info.items() if key not in known and not is_off(value)]
    yield from unsupported_remarks(others)


MAIN_KEYS: Table = {
    "stage": (_stage, "sft"),
    "finetuning_type": (_finetuning_type, "lora"),
    "pissa_init": (pissa_init, False),
    "pissa_iter": (
        lambda value, settings: trainer.PART_OF_METHOD if settings.is_on("pissa_init") else None,
        16,
    ),
    "adapter_name_or_path": named_adapters,
    "create_new_adapter": (
        lambda value, settings: (
            mapped("LLaMA-Factory continues the given adapter on a quantized base")
            if boolean(value) and settings["adapter_name_or_path"] and not is_new_adapter(settings)
            else read_with("adapter_name_or_path")
        ),
        False,
    ),
    "pref_beta": (trainer.beta(objective_of), 0.1),
    "pref_ftx": (_pref_ftx, 0.0),
    "pref_bco_weight": (_bco_weight, 0.0),
    "simpo_gamma": (trainer.loss_option("gamma", objective_of), 0.5),
    "kto_chosen_weight": (trainer.loss_option("desirable_weight", objective_of), 1.0),
    "kto_rejected_weight": (trainer.loss_option("undesirable_weight", objective_of), 1.0),
    "ref_model_adapters": lambda value, settings: (
        None if settings["ref_model"] is None else read_with("ref_model")
    ),
    "quantization_bit": _quantization_bit,
    "bf16": (_bf16, False),
    "fp16": (
        lambda value, settings: (
            None
            if not boolean(value) or is_quantized(settings) or settings.is_on("bf16")
            else changed(NO_FP16, storage="bf16")
        ),
        False,
    ),
    "per_device_train_batch_size": (
        trainer.batch("device", is_packed, "LLaMA-Factory cutoff_len"), 8,
    ),
    "neat_packing": (_neat_packing, False),
    "train_on_prompt": lambda value, settings: (
        trainer.FULL_LOSS if _of_supervised(value, settings) else trainer.COMPLETIONS
    ),
    "mask_history": lambda value, settings: (
        mapped(train_on="last")
        if _of_supervised(value, settings)
        else mapped("every assistant turn is trained", train_on="all")
    ),
    "enable_thinking": lambda value, settings: changed(
        "lorafold rejects enable_thinking if the model's chat template does not use it",
        template_kwargs={"enable_thinking": boolean(value)},
    ),
    "val_size": (trainer.held_out_rows, 0.0),
    "dataset": _dataset,
    **trainer.TRAINER_KEYS,
    **trainer.SHARED_KEYS,
    **static_rows("llamafactory"),
}
LORA_KEYS: Table = {
    "lora_rank": (
        lambda value, settings: (
            mapped(rank=integer(value))
            if settings.config.get("lora_alpha")
            else mapped(
                "alpha defaults to twice the rank", rank=integer(value), alpha=2.0 * integer(value)
            )
        ),
        8,
    ),
    "lora_alpha": lambda value, settings: mapped(
        alpha=number(value) or 2.0 * settings.read("lora_rank", integer)
    ),
    "lora_dropout": (trainer.dropout(setting_in("stage", "dpo", "kto")), 0.0),
    "loraplus_lr_ratio": (trainer.loraplus_ratio, 1),
    **static_rows("llamafactory_lora"),
}
RULES = (
    *table(MAIN_KEYS),
    *table(LORA_KEYS, is_lora),
    *table(
        {"dpo_label_smoothing": (_label_smoothing, 0.0), **static_rows("llamafactory_dpo")}, is_dpo
    ),
    *table(
        {"ref_model": _ref_model, "ref_model_quantization_bit": _ref_model_quantization_bit},
        has_reference,
    ),
    *table(static_rows("llamafactory_quantization"), is_quantized),
)
