"""What a hostile adapter is: its name, what it attacks, whether it has to be told as wrong; the
table of them, and how the files of a good one are altered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD = "good"  # the entry that is copied
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lorafold.json"
SLOW = "(([a-z._0-9])+)+X"  # takes twice as long for each character that it is tried on
HELLO = "{% for m in messages %}{{ m.content }}{% endfor %}"
MANY = 10**6


@dataclass(frozen=True)
class Case:
    """One hostile adapter: its name, what it attacks, and whether it has to be told as wrong."""

    name: str
    attacks: str
    wrong: bool
    alter: Callable[..., None]

    def make(self, folder: Path, base: Path) -> None:
        """Make it in a directory of adapters that has a good one.

        Args:
            folder: the directory.
            base: the base's directory, whose tokenizer it may have.
        """
        at = folder / self.name
        shutil.copytree(folder / GOOD, at)
        (at / "manifest.json").unlink()  # which would tell that anything was changed
        self.alter(at, base) if self.name.startswith("tokenizer") else self.alter(at)


CASES: dict[str, Case] = {}


def wrong(alter: Callable[..., None], told: bool = True) -> Callable[..., None]:
    """A case that the server has to name among those that are wrong."""
    name = alter.__name__.replace("_", "-")
    CASES[name] = Case(name, (alter.__doc__ or "").strip(), told, alter)
    return alter


def either(alter: Callable[..., None]) -> Callable[..., None]:
    """A case that may be served."""
    return wrong(alter, told=False)


def config(at: Path, **fields: Any) -> None:
    """Change fields of the configuration."""
    found = json.loads((at / CONFIG).read_text())
    (at / CONFIG).write_text(json.dumps(found | fields))


def own(at: Path, base: Path, **config: Any) -> dict[str, Any]:
    """Give the adapter the base's tokenizer, with other fields of its configuration."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, at / name)
    found = json.loads((at / "tokenizer_config.json").read_text())
    (at / "tokenizer_config.json").write_text(json.dumps(found | config))
    content: dict[str, Any] = json.loads((at / "tokenizer.json").read_text())
    return content
