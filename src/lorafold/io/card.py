"""The README.md beside an adapter: a model card ready for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def plain_card(base: str | None, what: str) -> str:
    """A card that says what the adapter is and how it is loaded."""
    front = yaml.safe_dump({"base_model": base, "library_name": "peft", "tags": ["lora", "lorafold"]}, sort_keys=False) if base else (
        yaml.safe_dump({"library_name": "peft", "tags": ["lora", "lorafold"]}, sort_keys=False)
    )  # fmt: skip
    return f"""---
{front}---

# Adapter of {base or "a model"}

{what}

```python
import lorafold as lf
adapter = lf.load(model, "path/of/this/directory")          # or peft.PeftModel.from_pretrained(model, ...)
```
"""


def training_card(base: str, record: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The card of a trained adapter: base, data by its digest, figures and the whole recipe."""
    data, recipe = record["data"], yaml.safe_dump(dict(record["recipe"]), sort_keys=False)
    shown = {"training loss (last ten steps)": "train_loss", "held-out loss": "eval_loss", "steps": "steps",
             "trainable parameters": "trainable_parameters", "tokens per second": "tokens_per_second", "peak bytes": "peak_bytes"}  # fmt: skip
    rows = [f"| {name} | {value:,.4g} |" if isinstance(value := figures[key], float) else f"| {name} | {value:,} |"
            for name, key in shown.items() if figures[key] is not None]  # fmt: skip
    table = "\n".join(["| figure | value |", "|---|---|", *rows])
    return f"""{plain_card(base, f"Trained with lorafold, method `{record['recipe']['method']}`.")}
## Figures

{table}

## Data

{data["rows"]} rows of `{data["source"]}`, sha256 `{data["sha256"]}`

## Recipe

```yaml
{recipe}```
"""
