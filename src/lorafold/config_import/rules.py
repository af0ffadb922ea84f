"""Tables of rules, and the reading of a configuration with them.

    Rule            one key of another tool: its reader, and that tool's default
    Outcome         taken, taken differently (changed), or left, with recipe fields and a remark
    TranslatedKey   a key with its value and its outcome

A rule's reader raises LorafoldError for a value that the other tool rejects or that lorafold can't
train; all such errors are reported together.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from lorafold.data.formats import JUDGED
from lorafold.errors import LorafoldError, join_problems, truncate_middle
from lorafold.foreign_options import FOREIGN_OPTIONS, boolean, did_you_mean, number
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.fields import ADAPTER_FIELDS

T = TypeVar("T")

NOT_KNOWN = "unknown key"
PLACEHOLDER = "--data DATA"
TURNS = (("role", "content"), ("from", "value"))
SAME = "="  # the reader of a key in `FOREIGN_OPTIONS`


@dataclass(frozen=True)
class Outcome:
    """The result for a key: the recipe `fields` that it sets, a `remark` with the reason, and
    `flag`, the options of `lorafold train` for what a recipe can't contain.
    """

    how: Literal["taken", "changed", "left"]
    fields: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""
    flag: str = ""


@dataclass(frozen=True)
class TranslatedKey:
    """A key, its value and its outcome. `given` is False if the value is the tool's default."""

    key: str
    value: Any
    given: bool
    outcome: Outcome


@dataclass(frozen=True)
class ToolSettings:
    """The value of each key: the file's, or the tool's default if that is absent or null."""

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        value = self.given.get(key)
        return self.defaults.get(key) if value is None else value

    def read(self, key: str, convert: Callable[[Any], T]) -> T:
        try:
            return convert(self[key])
        except LorafoldError as error:
            raise LorafoldError(f"{key}: {error}") from None

    def on(self, key: str) -> bool:
        return self.read(key, boolean)


# The outcome of a value; None: the key is off or has no effect
Reader = Callable[[Any, ToolSettings], Outcome | None]


@dataclass(frozen=True)
class Rule:
    """One key of another tool. With a `default`, it is also read if the file lacks it."""

    key: str
    reader: Reader
    default: Any = None


# A reader; or a constant outcome; or the option of `lorafold train` for the value; or the reason
# why there is no counterpart; or SAME
Row = Reader | Outcome | str | None
Table = Mapping[str, Row | tuple[Row, Any]]  # by keys, with the tool's default
Condition = Callable[[ToolSettings], bool]


def table(rows: Table, only: Condition | None = None) -> tuple[Rule, ...]:
    return tuple(
        Rule(key, either(only, reader) if only else reader, default)
        for keys, row in rows.items()
        for one, default in [row if isinstance(row, tuple) else (row, None)]
        for key in keys.split()
        for reader in [_reader(one, key)]
    )


def _reader(row: Row, key: str = "") -> Reader:
    if row == SAME:
        here = FOREIGN_OPTIONS[key]
        return lambda value, settings: taken(here.remark, **here.read(value, settings.given))
    if isinstance(row, str) and row.startswith("--"):
        return lambda value, settings: flagged(row, value)
    if isinstance(row, str):
        return lambda value, settings: OFF if is_off(value) else left(row)
    return row if callable(row) else lambda value, settings: row


def either(condition: Condition, row: Row, otherwise: Row = None) -> Reader:
    reader, other = _reader(row), _reader(otherwise)
    return lambda value, settings: (reader if condition(settings) else other)(value, settings)


def where(key: str, *values: Any) -> Condition:
    return lambda settings: settings[key] in values


def taken(remark: str = "", /, **fields: Any) -> Outcome:
    """The key has the same meaning here, as these recipe fields."""
    return Outcome("taken", fields, remark)


def changed(why: str, /, **fields: Any) -> Outcome:
    """The key is taken differently, for the reason `why`; without a reason it is taken."""
    return Outcome("changed" if why else "taken", fields, why)


def left(instead: str, flag: str = "") -> Outcome:
    """The key has no counterpart in the recipe; `instead` is advice, `flag` the option."""
    return Outcome("left", {}, instead, flag)


OFF = taken("off")


def read_with(key: str) -> Outcome:
    return taken(f"read together with {key}")


def to(name: str, read: Callable[[Any], Any] = lambda value: value) -> Reader:
    return lambda value, settings: taken(**{name: read(value)})


def to_options(name: str, read: Callable[[Any], Any] = number) -> Reader:
    return lambda value, settings: taken(objective_options={name: read(value)})


def switch(on: Outcome | None, off: Outcome | None = OFF) -> Reader:
    return lambda value, settings: on if boolean(value) else off


def cases(outcomes: Mapping[str, Outcome | str], otherwise: Outcome | str = "") -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome:
        outcome = outcomes.get(str(value), otherwise)
        if not outcome:
            choice(value, *(key for key, one in outcomes.items() if not isinstance(one, str)))
        if isinstance(outcome, str):
            raise refused(value, outcome)
        return outcome

    return read


def if_on(outcome: Outcome) -> Reader:
    return lambda value, settings: outcome if value else OFF


def flagged(name: str, value: Any) -> Outcome:
    return left(f"pass this value as {name}", f"{name} {shlex.quote(str(value))}")


def is_off(value: Any) -> bool:
    """Whether a value turns its key off: null, false, empty, or the text no, none or null."""
    return value is None or value is False or value in ("", [], {}, "no", "none", "null")


def refused(value: Any, why: str) -> LorafoldError:
    return LorafoldError(f"found {value!r}, but {why}")


def refusing(why: str, is_neutral: Callable[[Any], bool] = is_off) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome:
        if is_neutral(value):
            return OFF
        raise refused(value, why)

    return read


def unless(neutral: float, why: str) -> Reader:
    return refusing(why, lambda value: number(value) == neutral)


def choice(value: Any, *choices: str) -> str:
    if value not in choices:
        raise LorafoldError(f"found {value!r}, expected {' or '.join(choices)}")
    return str(value)


def by_rules(rules: Sequence[Rule], config: Mapping[str, Any]) -> tuple[TranslatedKey, ...]:
    """An entry for every key of `config`, and for the tool's defaults that matter.

    If a rule passes `--init-adapter`, that adapter has its own method, rank and targets, and the
    file's are left.
    """
    settings = ToolSettings(config, {rule.key: rule.default for rule in rules})
    entries, problems = [], []
    for rule in rules:
        value, there = settings[rule.key], rule.key in config
        if value is None:
            entries += [TranslatedKey(rule.key, None, True, taken("not set"))] * there
            continue
        try:
            outcome = rule.reader(value, settings)
        except LorafoldError as error:
            problems.append(truncate_middle(f"{rule.key}: {error}", 250))
            continue
        if outcome is None:
            outcome = OFF if is_off(value) else taken("no effect with these settings")
        if there or outcome.fields or outcome.how != "taken":
            given = config.get(rule.key) is not None
            entries.append(TranslatedKey(rule.key, value, given, outcome))
    if problems:
        raise LorafoldError(join_problems(problems))
    if any("--init-adapter" in entry.outcome.flag.split() for entry in entries):
        entries = list(_brought_by_adapter(entries))
    known = [rule.key for rule in rules]
    for key in (key for key in config if key not in known):
        remark = "; ".join(filter(None, (NOT_KNOWN, did_you_mean(key, known, 0.75))))
        entries.append(TranslatedKey(key, config[key], True, left(remark)))
    return tuple(entries)


def _brought_by_adapter(entries: Sequence[TranslatedKey]) -> Iterator[TranslatedKey]:
    for entry in entries:
        fields = entry.outcome.fields
        rest = {k: v for k, v in fields.items() if k not in ADAPTER_FIELDS}
        if rest or not fields:
            yield replace(entry, outcome=replace(entry.outcome, fields=rest))
        elif entry.given:
            brought = left("set by the adapter of --init-adapter")
            yield replace(entry, outcome=brought)


@dataclass(frozen=True)
class SourceDataset:
    name: str
    path: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.remarks)})" if self.remarks else self.name


FILES = ("json", "csv", "parquet", "text", "arrow")  # paths that mean data_files


def dataset(
    path: Any, config: Any = None, split: Any = None, files: Any = None, name: str = "",
    columns: Mapping[str, Any] = MappingProxyType({}), remarks: Iterable[str] = (), kind: str = "",
) -> SourceDataset:  # fmt: skip
    """A dataset as `datasets` loads it; lorafold reads only the default configuration and the split
    train. `kind` follows the path in messages.
    """
    if path in FILES and isinstance(files, str):
        path, files = files or path, None
    parts = [f"configuration {config}"] if config is not None else []
    parts += [f"split {split}"] if split not in (None, "train") else []
    parts += [f"files {files}"] if files else []
    if parts:
        parts[-1] += ": save these rows to a file, as --data reads only the default train split"
    place = None if parts or path is None else str(path)
    return SourceDataset(name or f"{path}{kind}", place, columns, [*parts, *remarks])


def turn_keys(*keys: Any) -> Iterator[str]:
    if keys not in TURNS:
        yield f"rename the keys {' and '.join(map(str, keys))} of the messages to role and content"


def without_counterpart(keys: Sequence[str]) -> Iterator[str]:
    if keys:
        yield f"{', '.join(keys)}: not supported"


def given_as_data(sources: Sequence[SourceDataset], objective: str | None) -> Outcome:
    """The outcome for datasets: --data and --columns on the command line. `objective` is None for
    supervised training.
    """
    pairs = {
        (ours, str(theirs))
        for source in sources
        for ours, theirs in source.columns.items()
        if theirs and theirs != ours
    }
    listed, columns = ", ".join(map(str, sources)), sorted(pairs)
    if len(dict(columns)) < len(columns):
        listed += "; the datasets use different column names: rename the columns in the files"
        columns = []
    flags = [PLACEHOLDER if s.path is None else f"--data {shlex.quote(s.path)}" for s in sources]
    if columns:
        flags.append(f"--columns {shlex.quote(','.join(map('='.join, columns)))}")
    remark = f"{rows_wanted(objective)}: {listed}"
    return left(remark, " ".join(dict.fromkeys(flags)) or PLACEHOLDER)


def rows_wanted(objective: str | None) -> str:
    if objective is None:
        rows = "{messages}, {prompt, completion} or {text}"
    elif OBJECTIVES[objective].draws:
        rows = "{prompt} and the columns that the rewards read"
    elif OBJECTIVES[objective].takes == JUDGED:
        rows = "{prompt, completion, label}, where label is true or false"
    else:
        rows = "{prompt, chosen, rejected}"
    return f"pass --data with rows of {rows}"


def objects_with_path(value: Any) -> list[Mapping[str, Any]]:
    objects = value if isinstance(value, list) else [value]
    for one in objects:
        if not isinstance(one, dict) or not one.get("path"):
            raise LorafoldError(f"found {one!r}, expected an object with the key path")
    return objects
