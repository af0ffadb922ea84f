"""The model card (README.md) of an adapter or of a fully fine-tuned model, ready for the Hub: base,
figures, recipe, data, and how to load it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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

LOAD = """\
## How to use it

```python
{opened}
{below}adapter = lf.load(model, "path/to/this/directory")
```

{or_with_peft}"""
BY_TRANSFORMERS = """\
import lorafold as lf
from transformers import {auto}

model = {auto}.from_pretrained("{base}"{head})"""
BY_LORAFOLD = """\
import lorafold as lf

model = lf.load_model("{base}"{head})"""
IN_PEFT = """\
or with PEFT:

```python
from peft import PeftModel

{grown}{stacked}
```
"""
NOT_IN_PEFT = """\
PEFT has no such adapters and refuses these files: lorafold alone reads them.
"""
ALONE = 'model = PeftModel.from_pretrained(model, "path/to/this/directory")'
GROWN = "model.resize_token_embeddings({size})  # for the new tokens; their tokenizer is here too\n"

LOAD_WHOLE = """\
## How to use it

```python
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/directory")
```
"""


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
    """The card, as Markdown with YAML front matter.

    Args:
        base: the Hub id or the directory of the base.
        record: the record, of which "recipe" and "data" are shown as tables.
        figures: measurements by name, of which the numbers are shown.
        whole: the directory contains a plain model, not an adapter.
        opened_by: the auto class of transformers that opens the base, if it is a language model.
        in_peft: PEFT reads the adapter.
    """
    on_hub = HUB_ID.fullmatch(base) is not None and not Path(base).exists()
    name = base if on_hub else Path(base).name or "the base model"
    outputs = 1 if record.get(REWARD) else len(record.get(CLASSES, ()))
    own = base == EMBEDDED and not outputs
    # a directory of this machine is told by its name alone
    elsewhere = not base or Path(base).exists() or Path(base).is_absolute() or base == EMBEDDED
    source = base if own or not elsewhere else f"path/to/{name}"
    front: dict[str, Any] = {"base_model": base} if on_hub else {}
    relation = "finetune" if whole else "adapter"
    front |= {
        "library_name": "transformers" if whole else "peft" if in_peft else "lorafold",
        "tags": [*["lora"] * (not whole), "lorafold"],
    }
    front["tags"] += [f"base_model:{relation}:{base}"] * on_hub
    form = "in PEFT's format" if in_peft else "in a format of its own"
    title = (
        f"# {name}, fine-tuned\n\nTrained in place with lorafold: a plain Hugging Face model.\n"
        if whole
        else (
            f"# An adapter of {name}\n\nMade with lorafold, {form}: a small change of the base"
            " model, attached to it.\n"
        )
    )
    numbers = {
        k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    data = {
        k: Path(v).name if k == "source" and Path(v).suffix else v
        for k, v in record.get("data", {}).items()
    }
    auto = "AutoModelForSequenceClassification" if outputs else opened_by
    head = f", num_labels={outputs}" if outputs else ""
    opened = (BY_LORAFOLD if own else BY_TRANSFORMERS).format(auto=auto, base=source, head=head)
    grown = GROWN.format(size=record[VOCABULARY]) if VOCABULARY in record else ""
    below = {f"below{n}": entry["adapter"] for n, entry in enumerate(record.get(OVER, ()), 1)}
    ours, stacked = _loaded(below) if below else ("", ALONE)
    theirs = IN_PEFT.format(grown=grown, stacked=stacked) if in_peft else NOT_IN_PEFT
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n",
        title,
        _table("Rewards", _rewards(record)) if record.get(JUDGED_BY) else "",
        _table("Figures", numbers),
        _table("Recipe", record.get("recipe", {})),
        _table("Data", data),
        LOAD_WHOLE.format(auto=auto)
        if whole
        else LOAD.format(opened=opened, below=ours, or_with_peft=theirs),
    ]
    return "\n".join(part for part in parts if part)


def _rewards(record: Mapping[str, Any]) -> dict[str, str]:
    """What a policy learned from, and what it was worth on held-out prompts, by name."""
    judges, found = record[JUDGED_BY], record.get(HELD_OUT, {})
    own = record.get("step", max(found.get("step", ()), default=0))
    when = {0: "before the first step", own: f"after step {own}"}
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


def within(interval: Sequence[float] | None, form: str = ".4g") -> str:
    """A 95% interval in parentheses; nothing for None."""
    return f" (95%: {interval[0]:{form}} to {interval[1]:{form}})" if interval else ""


def _loaded(below: Mapping[str, str]) -> tuple[str, str]:
    """The lines that load those below for lorafold, and those that load all of them for PEFT; their
    directories are by their names.
    """
    (first, path), *others = below.items()
    lines = [
        f'model = PeftModel.from_pretrained(model, "{path}", adapter_name="{first}")',
        *(f'model.load_adapter("{path}", "{name}")' for name, path in others),
        'model.load_adapter("path/to/this/directory", "default")',
        f"model.base_model.set_adapter({[*below, 'default']})",
    ]
    ours = "".join(f'lf.load(model, "{path}", "{name}")\n' for name, path in below.items())
    return ours, "\n".join(lines)


def _table(title: str, rows: Mapping[str, Any]) -> str:
    """A section with a table of two columns; empty if there is nothing to show."""
    lines = []
    for key, value in rows.items():
        if value in (None, "", [], {}):
            continue
        text = str(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
        text = text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {key.replace('_', ' ')} | {text} |")
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n" if lines else ""
