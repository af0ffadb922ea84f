"""The model card (README.md) of an adapter or a fully fine-tuned model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorafold.files.templates import interval_text, render_text

CARD = "README.md"
# keys of an adapter's record
CLASSES = "classes"  # a classifier's classes, in the order of its logits
REWARD = "reward"  # true for a reward model, whose head has one output
JUDGED_BY = "judged_by"  # the weight of each reward function, by name
# metrics of each step by name, metrics on held-out rows with their steps, sample completions
STEPS, HELD_OUT, SAMPLES = "steps", "held_out", "samples"
VOCABULARY = "vocabulary"  # the vocabulary size, if the adapter has new tokens
OVER = "over"  # adapters below this one in its stack, the lowest first
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EMBEDDED = "smollm2"  # a model inside a package of lorafold; other libraries can't load it by name


@dataclass(frozen=True)
class ResultFiles:
    """Files to write next to a result's weights. `overwrite` allows replacing an older result."""

    record: Mapping[str, Any]  # for lorafold.json
    card: str | None = None  # the model card; None for a short one
    tokenizer: Any = None  # None for the base's
    overwrite: bool = False


def training_card(
    base: str,
    record: Mapping[str, Any],
    figures: Mapping[str, Any],
    *,
    whole: bool = False,
    opened_by: str = "AutoModelForCausalLM",
    in_peft: bool = True,
) -> str:
    """Returns Markdown with YAML front matter. `whole` is True for full fine-tuning, `opened_by` is
    the base's auto class, and `in_peft` is True if PEFT can load the adapter.
    """
    on_hub = HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    name = base if on_hub else Path(base).name or "the base model"
    outputs = 1 if record.get(REWARD) else len(record.get(CLASSES, ()))
    embedded = base == EMBEDDED and not outputs
    # of a local path, only the last part is shown
    local = not base or Path(base).exists() or Path(base).is_absolute() or base == EMBEDDED
    relation = f"base_model:{'finetune' if whole else 'adapter'}:{base}"
    front = {
        "library_name": "transformers" if whole else "peft" if in_peft else "lorafold",
        "tags": [*["lora"] * (not whole), "lorafold", *[relation] * on_hub],
    }
    if on_hub:
        front["base_model"] = base
    data = dict(record.get("data", {}))
    if Path(source := data.get("source", "")).suffix:
        data["source"] = Path(source).name
    tables = {
        "Rewards": _rewards(record) if record.get(JUDGED_BY) else {},
        "Figures": {
            name: value
            for name, value in figures.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
        "Recipe": record.get("recipe", {}),
        "Data": data,
    }
    text = render_text(
        "files/model_card.jinja",
        front=yaml.safe_dump(front, sort_keys=True),
        name=name,
        whole=whole,
        in_peft=in_peft,
        tables={
            title: {k: v for k, v in rows.items() if v not in (None, "", [], {})}
            for title, rows in tables.items()
        },
        auto="AutoModelForSequenceClassification" if outputs else opened_by,
        base=f"path/to/{name}" if local and not embedded else base,
        embedded=embedded,
        outputs=outputs,
        below=[entry["adapter"] for entry in record.get(OVER, ())],
        vocabulary=record.get(VOCABULARY),
    )
    return f"{text}\n"


def _rewards(record: Mapping[str, Any]) -> dict[str, str]:
    judges, found = record[JUDGED_BY], record.get(HELD_OUT, {})
    last = record.get("step", max(found.get("step", ()), default=0))
    when = {0: "before the first step", last: f"after step {last}"}
    columns = (found.get(name, ()) for name in ("step", "reward", "reward_interval"))
    return {
        "objective": record["recipe"]["objective"],
        "judged by": ", ".join(f"{weight:g} x {name}" for name, weight in judges.items()),
        **{
            f"held-out reward {when[step]}": f"{reward:.4g}{interval_text(interval)}"
            for step, reward, interval in zip(*columns, strict=True)
            if step in when and reward is not None
        },
    }
