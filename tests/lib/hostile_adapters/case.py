"""A hostile adapter: its name, what it attacks, and whether the server has to report it."""

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
        """Make it in a directory of adapters that has a good one; `base` has a tokenizer."""
        at = folder / self.name
        shutil.copytree(folder / GOOD, at)
        (at / "manifest.json").unlink()  # which would tell that anything was changed
        self.alter(at, base) if self.name.startswith("tokenizer") else self.alter(at)


CASES: dict[str, Case] = {}
Alter = Callable[..., None]


def cases(of: str, rows: dict[str, tuple[str, Alter]], told: bool = True) -> None:
    """A table of cases: what each attacks, and how it is made. `told`: the server has to name them
    among those that are wrong; the others may be served.
    """
    for name, (attacks, alter) in rows.items():
        CASES[f"{of}-{name}"] = Case(f"{of}-{name}", attacks, told, alter)


def wrong(alter: Alter, told: bool = True) -> Alter:
    """A case that the server has to name among those that are wrong, with a function of its own."""
    of, _, name = alter.__name__.replace("_", "-").partition("-")
    cases(of, {name: ((alter.__doc__ or "").strip(), alter)}, told)
    return alter


def either(alter: Alter) -> Alter:
    """A case that may be served."""
    return wrong(alter, told=False)


def raw(at: Path, before: str, after: str, name: str = CONFIG) -> None:
    """Write a field as no library would."""
    text = (at / name).read_text()
    assert before in text, before
    (at / name).write_text(text.replace(before, after, 1))


def instead(at: Path, name: str, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file."""
    (at / name).unlink(missing_ok=True)
    make(at / name)


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
