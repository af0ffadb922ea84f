"""The rows that another tool's file names, as the options `--data` and `--columns` of a run.

`Rows` are those of one source there: where they lie, their columns by lorafold's names, and what
`--data` can't say of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafold.translating.rules import Outcome, left

PLACEHOLDER = "--data DATA"


@dataclass(frozen=True)
class Rows:
    """The rows of one source. `path`: a file, a directory or a hub dataset, or None where no
    option can name them; `columns`: theirs by lorafold's names; `said`: what differs.
    """

    name: str
    path: str | None
    columns: Mapping[str, str] = field(default_factory=dict)
    said: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.said)})" if self.said else self.name


def given_as_data(found: Sequence[Rows], wanted: str) -> Outcome:
    """Rows are left, and the command names them.

    Args:
        wanted: The shapes of rows that the objective takes, in words.
    """
    columns: dict[str, str] = {}
    clash = any(
        columns.setdefault(ours, theirs) != theirs
        for rows in found
        for ours, theirs in rows.columns.items()
    )
    listed = ", ".join(map(str, found))
    if clash:
        listed += "; their columns have other names in each: rename them in the files"
    flags = [PLACEHOLDER if r.path is None else f"--data {shlex.quote(r.path)}" for r in found]
    pairs = () if clash else [f"{ours}={theirs}" for ours, theirs in sorted(columns.items())]
    named = [f"--columns {shlex.quote(','.join(pairs))}"] if pairs else []
    return left(f"{wanted}: {listed}", " ".join([*dict.fromkeys(flags), *named]) or PLACEHOLDER)


def differing(ours: Mapping[str, Any]) -> dict[str, str]:
    """Columns whose names differ, of lorafold's names and theirs (None: the same)."""
    return {name: str(theirs) for name, theirs in ours.items() if theirs and theirs != name}


def of_hub(path: Any, config: Any = None, split: Any = None, files: Any = None) -> Rows:
    """The rows of a path or hub dataset, of which lorafold reads the default configuration and the
    split train.

    Args:
        config: The name of a configuration; None: the default.
        split: That of a split; None: train.
        files: The dataset's files, where only some are read.
    """
    said = []
    if config is not None:
        said.append(f"its configuration {config}")
    if split not in (None, "train"):
        said.append(f"its split {split}")
    if files:
        said.append(f"its files {files}")
    if said:
        said[-1] += ": save these rows to a file, as --data reads the default and train"
    return Rows(str(path), None if said or path is None else str(path), {}, said)
