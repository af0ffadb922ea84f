"""The model card (README.md) of an adapter or of a fully fine-tuned model, ready for the Hub: base,
figures, recipe, data, and how to load it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorafold.files.templates import in_words, within

CARD = "README.md"
CLASSES = "classes"  # in an adapter's record: a classifier's classes, in the order of its logits
REWARD = "reward"  # in an adapter's record: true if it is a reward model, whose head has one output
# in an adapter's record: the rewards that judged its completions, their weights by name
JUDGED_BY = "judged_by"
# in an adapter's record: the figures of each step by name, those of held-out rows by name beside
# their steps, and completions to read, the first and the last ones
STEPS, HELD_OUT, SAMPLES = "steps", "held_out", "samples"
# in an adapter's record: the size of the vocabulary, if the adapter has new tokens
VOCABULARY = "vocabulary"
# in an adapter's record: the adapters that it was trained over, the lowest first
OVER = "over"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EMBEDDED = "smollm2"  # the model that has a package of its own; no other library knows the name


@dataclass(frozen=True)
class ResultFiles:
    """What is written beside the weights of a result, and whether it may replace another one."""

    record: Mapping[str, Any]  # how it was made, for lorafold.json
    card: str | None = None  # the text of the model card; None for a short one
    tokenizer: Any = None  # None if it has none of its own
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
    """The model card, as Markdown with YAML front matter. `whole` is for a plain model, `opened_by`
    the auto class that loads the base, and `in_peft` whether PEFT can read the adapter.
    """
    on_hub = HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    name = base if on_hub else Path(base).name or "the base model"
    outputs = 1 if record.get(REWARD) else len(record.get(CLASSES, ()))
    embedded = base == EMBEDDED and not outputs
    # only the name of a directory of this machine is shown
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
    text = in_words(
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
    """The rewards that a policy learned from, and their values on held-out prompts."""
    judges, found = record[JUDGED_BY], record.get(HELD_OUT, {})
    last = record.get("step", max(found.get("step", ()), default=0))
    when = {0: "before the first step", last: f"after step {last}"}
    columns = (found.get(name, ()) for name in ("step", "reward", "reward_interval"))
    return {
        "objective": record["recipe"]["objective"],
        "judged by": ", ".join(f"{weight:g} x {name}" for name, weight in judges.items()),
        **{
            f"held-out reward {when[step]}": f"{reward:.4g}{within(interval)}"
            for step, reward, interval in zip(*columns, strict=True)
            if step in when and reward is not None
        },
    }
