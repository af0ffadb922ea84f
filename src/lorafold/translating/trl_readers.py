"""Readers of the fields of TRL's SFTConfig, DPOConfig, KTOConfig, CPOConfig and RewardConfig: each
is the function of a rule in `trl_trainers` and says what becomes of that field.

A batch is counted for one process, as TRL's own is. Where TRL packs, it counts packed sequences,
and lorafold's batch counts rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import boolean, choice, integer, names, number
from lorafold.translating.preferences import (
    DPO_LOSSES,
    NO_DROPOUT,
    ORPO_TERM,
    SUPERVISED,
    of_dpo,
    rows_wanted,
    supervised,
)
from lorafold.translating.rows import Rows, given_as_data, of_hub
from lorafold.translating.rules import (
    Outcome,
    Reader,
    Rule,
    Settings,
    changed,
    left,
    taken,
    without,
)

STAYS = "lorafold's reference never moves"
# The losses of DPOTrainer; those that DPO_LOSSES lacks are refused by name
DPO_NAMES = (
    *DPO_LOSSES, "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "aot_pair", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
NO_TEMPLATE = "the model's own template is used; write the other to a file: --chat-template FILE"


def sft_loss(value: Any, settings: Settings) -> Outcome:
    """`loss_type` of SFT becomes the objective; LorafoldError for dft."""
    if value == "dft":
        raise LorafoldError(f"found {value!r}, but lorafold's sft has the mean of -log p alone")
    choice(value, "nll", "chunked_nll")
    return taken(objective="sft")


def packing(value: Any, settings: Settings) -> Outcome:
    """`packing` becomes packing, in which rows are always kept apart."""
    if boolean(value) and "flash" not in str(settings["attn_implementation"]):
        return changed(
            "without FlashAttention rows see each other there, and are kept apart here",
            packing=True,
        )
    return taken(packing=boolean(value))


def packing_strategy(value: Any, settings: Settings) -> Outcome | None:
    """`packing_strategy` has one counterpart, best fit."""
    if not settings.read("packing", boolean):
        return None
    if choice(value, "bfd", "bfd_split", "bfd-requeue", "wrapped") == "bfd":
        return taken("rows are packed by best fit")
    return changed("rows are packed by best fit, kept apart, and cut where they are too long")


def batch(value: Any, settings: Settings) -> Outcome:
    """`per_device_train_batch_size` times accumulation becomes the batch, which counts rows."""
    rows = integer(value) * settings.read("gradient_accumulation_steps", integer)
    if settings["packing"] and settings.read("packing", boolean):
        return changed(
            "TRL counts packed sequences and lorafold counts rows: to see as many tokens a step"
            " raise batch by the rows that fill max_length",
            batch=rows,
        )
    return taken("micro-batch times accumulation, of one process", batch=rows)


def max_length(value: Any, settings: Settings) -> Outcome | None:
    """`max_length` becomes max_length; null does not cut there."""
    if settings["max_seq_length"] is not None:
        return None
    if settings.given.get("max_length", value) is None:
        return changed("there rows are not cut; here they are", max_length=integer(value))
    return taken(max_length=integer(value))


def max_seq_length(value: Any, settings: Settings) -> Outcome:
    """`max_seq_length`, of older versions, becomes max_length."""
    return taken(max_length=integer(value))


def part_of_length(value: Any, settings: Settings) -> Outcome:
    """`max_prompt_length` and `max_completion_length` have no counterpart beside `max_length`."""
    return changed("prompt and completion are cut together here, at max_length")


def truncation_mode(value: Any, settings: Settings) -> Outcome:
    """`truncation_mode` has one counterpart: the start of a row is kept."""
    if choice(value, "keep_start", "keep_end") == "keep_start":
        return taken("the start of a row is kept")
    return changed("the start of a row is kept here, and its end is cut")


def completion_only_loss(value: Any, settings: Settings) -> Outcome:
    """`completion_only_loss` is what lorafold does."""
    if boolean(value):
        return taken("the loss is on completions")
    return left("every token of {text} rows is trained, and completions of the other rows")


def assistant_only_loss(value: Any, settings: Settings) -> Outcome:
    """`assistant_only_loss` is what lorafold does; off, TRL trains every token of messages."""
    if boolean(value):
        return taken("the loss is on the assistant's turns")
    return changed("TRL trains every token of {messages}; here the assistant's turns are trained")


def dataset_text_field(value: Any, settings: Settings) -> Outcome:
    """`dataset_text_field` is the column of plain text, which goes to `--columns`."""
    if value == "text":
        return taken("the column has lorafold's name")
    return left("rows of plain text have it in that column", f"--columns text={value}")


def chat_template_path(value: Any, settings: Settings) -> Outcome:
    """`chat_template_path` becomes the chat template where it is a file's path."""
    if Path(str(value)).suffix in (".jinja", ".j2", ".txt"):
        return taken(chat_template=str(value))
    return left(f"{NO_TEMPLATE}, that of {value}")


def dropout(value: Any, settings: Settings) -> Outcome:
    """`lora_dropout` becomes the dropout, which `disable_dropout` turns off."""
    found = number(value)
    if found and settings["disable_dropout"] and settings.read("disable_dropout", boolean):
        return taken(NO_DROPOUT, dropout=0.0)
    return taken(dropout=found)


def only(name: str, why: str) -> Reader:
    """The reader of a key with one value that lorafold can train; LorafoldError for others."""

    def read(value: Any, settings: Settings) -> Outcome:
        if value != name:
            raise LorafoldError(f"found {value!r}, but {why}: expected {name}")
        return taken(why)

    return read


def losses(settings: Settings) -> tuple[str, ...]:
    """The losses of DPO; robust is sigmoid where labels are not smoothed."""
    found = settings.read("loss_type", names)
    plain = not number(settings["label_smoothing"] or 0)
    return tuple("sigmoid" if name == "robust" and plain else name for name in found)


def objective_of_dpo(settings: Settings) -> str | None:
    """The objective that the losses of DPO train, or None for those that lorafold lacks."""
    return DPO_LOSSES.get(next(iter(losses(settings)), ""))


def dpo_loss(value: Any, settings: Settings) -> Outcome:
    """`loss_type` of DPO becomes the objective; LorafoldError for others than lorafold's."""
    return of_dpo(losses(settings), settings["loss_weights"], "loss_weights")


def kto_loss(value: Any, settings: Settings) -> Outcome:
    """`loss_type` of KTO becomes the objective; LorafoldError for APO's."""
    if value != "kto":
        raise LorafoldError(f"found {value!r}, but lorafold's kto has the loss kto alone")
    return changed("z is a mean over a micro-batch there, and over the step here", objective="kto")


def cpo_loss(value: Any, settings: Settings) -> Outcome:
    """`loss_type` of CPO becomes simpo; LorafoldError for the others, which have no reference."""
    if value != "simpo":
        raise LorafoldError(
            f"found {value!r} without a reference, but of CPO's losses lorafold has simpo alone"
        )
    return taken(objective="simpo")


def cpo_alpha(value: Any, settings: Settings) -> Outcome | None:
    """`cpo_alpha` becomes `sft_weight`."""
    return supervised(value, "simpo", SUPERVISED)


def orpo_beta(value: Any, settings: Settings) -> Outcome:
    """`beta` of ORPO, which has no field that names its loss, becomes the objective too."""
    return changed(ORPO_TERM, objective="orpo", beta=number(value))


def centre(value: Any, settings: Settings) -> Outcome:
    """`center_rewards_coefficient` becomes `centre`, of the reward trainer, which has no field that
    names its loss.
    """
    options = {"objective_options": {"centre": number(value)}} if number(value) else {}
    return taken(objective="reward", **options)


def _of_mixture(one: Any) -> Rows:
    if not isinstance(one, dict) or not one.get("path"):
        raise LorafoldError(f"found {one!r}, expected an object with path")
    files = one.get("data_files") or one.get("data_dir")
    found = of_hub(one["path"], one.get("name"), one.get("split"), files)
    said = [f"its columns {one['columns']} alone"] if one.get("columns") else []
    return Rows(found.name, found.path, {}, [*found.said, *said])


def data_rules(objective: str | None) -> Sequence[Rule]:
    """The rules of the script's fields that name rows, of a trainer with that objective."""

    def name(value: Any, settings: Settings) -> Outcome | None:
        if settings["datasets"]:
            return taken("datasets takes its place")
        found = of_hub(value, settings["dataset_config"], settings["dataset_train_split"])
        return given_as_data([found], rows_wanted(objective))

    def several(value: Any, settings: Settings) -> Outcome | None:
        if not isinstance(value, list):
            raise LorafoldError(f"found {value!r}, expected a list of objects with path")
        return (
            given_as_data([_of_mixture(one) for one in value], rows_wanted(objective))
            if (value)
            else None
        )

    return (
        Rule("dataset_name", name),
        Rule("datasets", several),
        Rule("dataset_config", lambda value, settings: taken("it is read with dataset_name")),
        Rule("dataset_train_split", lambda value, settings: taken("it is read with dataset_name")),
        Rule("dataset_test_split", without("pass its rows as --eval-data")),
    )  # fmt: skip
