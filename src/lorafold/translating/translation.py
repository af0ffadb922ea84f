"""A configuration of another tool as a recipe, and what became of each of its fields.

As text it is the report; `to_yaml` gives the recipe's file, with a comment on every line that says
where its value came from.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lorafold.recipe.recipe import Recipe
from lorafold.translating.rules import TranslatedKey
from lorafold.translating.unsloth import Expression

WIDTH = 100
HEADS = {
    "taken": "taken",
    "changed": "taken differently",
    "left": "without a counterpart in the recipe",
}


@dataclass(frozen=True)
class Translation:
    """A recipe and what became of each key: `taken`, `changed` and `left` hold every key of the
    file once, and the tool's defaults that matter; `note` says what such a file never contains.
    """

    source: Path
    tool: str
    recipe: Recipe
    taken: tuple[TranslatedKey, ...]
    changed: tuple[TranslatedKey, ...]
    left: tuple[TranslatedKey, ...]
    note: str = ""

    @property
    def entries(self) -> tuple[TranslatedKey, ...]:
        """All entries: those taken, then those taken differently, then those left."""
        return (*self.taken, *self.changed, *self.left)

    @property
    def unread(self) -> list[TranslatedKey]:
        """Those of a script whose value it computes, and that a recipe would have."""
        return [e for e in self.left if isinstance(e.value, Expression) and e.outcome.flag]

    def written(self) -> dict[str, Any]:
        """The recipe's fields that differ from its defaults, and `base` wherever a key set it:
        without that line the model's files would decide on the storage.
        """
        fields = self.recipe.model_dump(mode="json", exclude_unset=True)
        defaults = Recipe().model_dump(mode="json")
        order = [name for name in Recipe.model_fields if name in fields]
        return {n: fields[n] for n in order if n == "storage" or fields[n] != defaults[n]}

    def to_yaml(self, path: str = "recipe.yaml") -> str:
        """The recipe's file, with a comment on every line that says where its value came from.

        `path` is where the file will lie, for the command in its head.
        """
        lines = [
            f"# {self.tool}'s {self.source.name}, translated by lorafold {version('lorafold')}.",
            f"# {self.command(path)}",
            *(f"# NOT READ: {_named(e)}: {e.outcome.remark}" for e in self.unread),
        ]
        for name, value in self.written().items():
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            line = f"{name}: {text.strip().removesuffix('...').strip()}"
            sources = [entry for entry in self.entries if name in entry.outcome.fields]
            for entry in sources:
                if entry.outcome.how == "changed":
                    lines.append(f"# {entry.outcome.remark}:")
            comment = ", ".join(_named(entry) for entry in sources)
            fits = len(line) + len(comment) + 4 <= WIDTH
            lines += [f"{line}  # {comment}"] if fits else [f"# {comment}", line]
        return "\n".join(lines) + "\n"

    def command(self, config: str = "recipe.yaml") -> str:
        """The command line that trains by the recipe; the user fills in what is in capitals."""
        flags = {"--model": "", "--data": "--data DATA", "--eval-data": "", "--out": "--out OUT"}
        given = [entry.outcome.flag for entry in self.entries if entry.outcome.flag]
        flags |= {flag.partition(" ")[0]: flag for flag in given}
        return " ".join(
            ["lorafold train --config", shlex.quote(config), *filter(None, flags.values())]
        )

    def as_json(self) -> dict[str, Any]:
        """The translation as an object of JSON, which `--json` prints."""
        return {
            "source": str(self.source),
            "tool": self.tool,
            "recipe": self.written(),
            "yaml": self.to_yaml(),
            "command": self.command(),
            **{how: [_as_json(e) for e in getattr(self, how)] for how in HEADS},
            "note": self.note,
        }

    def report(self, config: str = "recipe.yaml") -> str:
        """What became of each key, as lines of text.

        `config` is where the recipe lies, for the command at the end.
        """
        lines = [f"{self.source}, of {self.tool}, as a recipe"]
        for how, head in HEADS.items():
            found = [e for e in getattr(self, how) if _speaks(e)]
            if found:
                lines += [f"{head}:", *_table(found)]
        silent = [e.key for e in self.taken if not _speaks(e)]
        if silent:
            lines.append(f"off or not set: {', '.join(silent)}")
        lines += [self.note] * bool(self.note)
        return "\n".join([*lines, f"train with: {self.command(config)}"])

    def __str__(self) -> str:
        return self.report()


def _speaks(entry: TranslatedKey) -> bool:
    """Does the entry say more than that something is off?"""
    off = entry.outcome.remark in ("it is off", "it is not set")
    return entry.outcome.how != "taken" or bool(entry.outcome.fields) or not off


def _named(entry: TranslatedKey) -> str:
    return f"{entry.key}: {_shown(entry.value)}{'' if entry.given else ' (their default)'}"


def _shown(value: Any) -> str:
    as_text = isinstance(value, str)
    text = value if as_text else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(entries: Sequence[TranslatedKey]) -> Iterator[str]:
    left = [_named(e) for e in entries]
    right = [", ".join(f"{k}: {_shown(v)}" for k, v in e.outcome.fields.items()) for e in entries]
    wide = min(44, max(map(len, left)))
    for entry, theirs, ours in zip(entries, left, right, strict=True):
        said = "; ".join(filter(None, (ours, entry.outcome.remark)))
        line = f"  {theirs:<{wide}}  {'->' if ours else ' -'} {said}"
        yield textwrap.fill(
            line, WIDTH, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
        )


def _as_json(entry: TranslatedKey) -> dict[str, Any]:
    return {
        "key": entry.key,
        "value": entry.value,
        "given": entry.given,
        "fields": dict(entry.outcome.fields),
        "remark": entry.outcome.remark,
        "flag": entry.outcome.flag,
    }
