"""Rules that convert another tool's configuration, key by key.

    Rule            one key of another tool: its reader, and the tool's default
    Outcome         mapped, mapped differently (changed), or left, with recipe fields and a remark
    TranslatedKey   a key with its value and its outcome

A rule's reader raises LorafoldError for a value that the other tool rejects or lorafold does not
support; all such errors are reported together.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml

from lorafold.data.formats import JUDGED
from lorafold.errors import LorafoldError, join_problems, truncate_middle
from lorafold.foreign_options import FOREIGN_OPTIONS, READERS, boolean, did_you_mean, number
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.fields import ADAPTER_FIELDS

T = TypeVar("T")
Values = Mapping[str, Any]  # the keys of a file, or of an object in it

UNKNOWN_KEY = "unknown key"
PLACEHOLDER = "--data DATA"
TURN_KEYS = (("role", "content"), ("from", "value"))
AS_OPTION = "="  # the reader of a key in `FOREIGN_OPTIONS`


@dataclass(frozen=True)
class Outcome:
    """The result of converting a key: the recipe `fields` that it sets, a `remark` with the reason,
    and `flag`, options of `lorafold train` for settings that a recipe can't contain.
    """

    status: Literal["taken", "changed", "left"]
    fields: Values = field(default_factory=dict)
    remark: str = ""
    flag: str = ""


@dataclass(frozen=True)
class TranslatedKey:
    """A key, its value and its outcome. `given` is False if the value is the tool's default."""

    key: str
    value: Any
    given: bool
    outcome: Outcome


TranslatedKeys = tuple[TranslatedKey, ...]


@dataclass(frozen=True)
class ToolSettings:
    """The value of each key in the file, or the tool's default if the key is absent or null."""

    config: Values
    defaults: Values

    def __getitem__(self, key: str) -> Any:
        value = self.config.get(key)
        return self.defaults.get(key) if value is None else value

    def read(self, key: str, convert: Callable[[Any], T]) -> T:
        try:
            return convert(self[key])
        except LorafoldError as error:
            raise LorafoldError(f"{key}: {error}") from None

    def is_on(self, key: str) -> bool:
        return self.read(key, boolean)


# The outcome of a value; None: the key is off or has no effect
Reader = Callable[[Any, ToolSettings], Outcome | None]


@dataclass(frozen=True)
class Rule:
    """One key of another tool. A rule with a `default` also applies to files without the key."""

    key: str
    reader: Reader
    default: Any = None


# A reader; or a constant outcome; or the option of `lorafold train` for the value; or the reason
# why there is no counterpart; or AS_OPTION
Handler = Reader | Outcome | str | None
Table = Mapping[str, Handler | tuple[Handler, Any]]  # by keys, with the tool's default
Condition = Callable[[ToolSettings], bool]


def table(rows: Table, only: Condition | None = None) -> tuple[Rule, ...]:
    return tuple(
        Rule(key, if_else(only, reader) if only else reader, default)
        for keys, row in rows.items()
        for one, default in [row if isinstance(row, tuple) else (row, None)]
        for key in keys.split()
        for reader in [_reader(one, key)]
    )


def static_rows(section: str, only: Condition | None = None) -> Table:
    """The rows of a section of `keys.yaml`."""
    return {
        key: (row, yaml.safe_load(default)) if default else row
        for kind, rows in KEYS[section].items()
        for first, second in rows.items()
        for keys, made in [
            (first, BY_VALUE[kind](second)) if kind in BY_VALUE else (second, ROWS[kind](first))
        ]
        for row in [if_else(only, made) if only else made]
        for key, _, default in (one.partition("=") for one in keys.split())
    }


def _row(kind: Any, text: str = "", more: Any = "") -> Reader:
    """The reader for one value of a key; `more` are recipe fields or an option."""
    if kind == "refused":
        return reject(text, lambda value: False)
    if kind in ("fields", "options", "unused") or text.startswith("--"):
        return _reader(ROWS[kind](text))
    fields = more if isinstance(more, dict) else {}
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    flag, remark = "" if fields else more, REASONS.get(text, text)

    def read(value: Any, settings: ToolSettings) -> Outcome:
        texts = (one.replace("{value}", str(value)) for one in (remark, flag))
        return Outcome(kind, fields, *texts)

    return read


def switch(rows: Mapping[bool, Sequence[Any]]) -> Reader:
    on, off = _row(*rows[True]), _row(*rows.get(False, ("taken", "off")))
    return lambda value, settings: (on if boolean(value) else off)(value, settings)


def _in_use(row: Sequence[Any]) -> Reader:
    reader = _row(*row)
    return lambda value, settings: reader(value, settings) if value else OFF


def by_value(rows: Mapping[str, Sequence[Any]]) -> Reader:
    readers = {value: _row(*row) for values, row in rows.items() for value in values.split()}
    choices = " ".join(values for values, row in rows.items() if row[0] != "refused")

    def read(value: Any, settings: ToolSettings) -> Outcome | None:
        if reader := readers.get(str(value), readers.get("else")):
            return reader(value, settings)
        raise unexpected(value, choices.split())

    return read


def _reader(row: Handler, key: str = "") -> Reader:
    if row == AS_OPTION:
        option = FOREIGN_OPTIONS[key]
        return lambda value, settings: mapped(option.remark, **option.read(value, settings.config))
    if isinstance(row, str) and row.startswith("--"):
        return lambda value, settings: pass_option(row, value)
    if isinstance(row, str):
        return lambda value, settings: OFF if is_off(value) else unmapped(row)
    return row if callable(row) else lambda value, settings: row


def if_else(condition: Condition, row: Handler, otherwise: Handler = None) -> Reader:
    reader, other = _reader(row), _reader(otherwise)
    return lambda value, settings: (reader if condition(settings) else other)(value, settings)


def setting_in(key: str, *values: Any) -> Condition:
    return lambda settings: settings[key] in values


def mapped(remark: str = "", /, **fields: Any) -> Outcome:
    """The outcome of a key with the same meaning in lorafold, as these recipe fields."""
    return Outcome("taken", fields, remark)


def changed(why: str, /, **fields: Any) -> Outcome:
    """The outcome of a key that lorafold implements differently, with the reason `why`; without a
    reason, it counts as mapped.
    """
    return Outcome("changed" if why else "taken", fields, why)


def unmapped(instead: str, flag: str = "") -> Outcome:
    """The outcome of a key without a counterpart in the recipe; `instead` is advice, `flag` the
    option to pass.
    """
    return Outcome("left", {}, instead, flag)


OFF = mapped("off")
KEYS = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text(encoding="utf-8"))
REASONS: Mapping[str, str] = KEYS["reasons"]


def read_with(key: str) -> Outcome:
    return mapped(f"read together with {key}")


def to_field(name: str, read: Callable[[Any], Any] = lambda value: value) -> Reader:
    return lambda value, settings: mapped(**{name: read(value)})


def to_options(name: str, read: Callable[[Any], Any] = number) -> Reader:
    return lambda value, settings: mapped(objective_options={name: read(value)})


def pass_option(name: str, value: Any) -> Outcome:
    return unmapped(f"pass this value as {name}", f"{name} {shlex.quote(str(value))}")


def is_off(value: Any) -> bool:
    """Whether a value turns its key off: null, false, empty, or the text no, none or null."""
    return value is None or value is False or value in ("", [], {}, "no", "none", "null")


def rejection(value: Any, why: str) -> LorafoldError:
    return LorafoldError(f"found {value!r}, but {why}")


def reject(why: str, is_neutral: Callable[[Any], bool] = is_off) -> Reader:
    def read(value: Any, settings: ToolSettings) -> Outcome:
        if is_neutral(value):
            return OFF
        raise rejection(value, REASONS.get(why, why))

    return read


def require(neutral: str, why: str) -> Reader:
    return reject(why, lambda value: number(value) == float(neutral))


def unexpected(value: Any, choices: Iterable[str]) -> LorafoldError:
    return LorafoldError(f"found {value!r}, expected {' or '.join(choices)}")


def choice(value: Any, *choices: str) -> str:
    if value not in choices:
        raise unexpected(value, choices)
    return str(value)


class Expression(str):
    """The source of a value that a script computes."""


def _to(option: bool, text: str) -> Reader:
    name, reader = text.split()
    return (to_options if option else to_field)(name, READERS[reader])


# How the rows of `keys.yaml` are read, by a remark, and by the outcomes of values
ROWS: Mapping[str, Callable[[str], Handler]] = {
    "taken": lambda text: mapped(REASONS.get(text, text)),
    "changed": lambda text: changed(REASONS.get(text, text)),
    "refused": reject,
    "neutral": lambda text: require(*text.split(" ", 1)),
    "left": lambda text: REASONS.get(text, text),
    "unused": lambda text: None,
    "fields": partial(_to, False),
    "options": partial(_to, True),
}
BY_VALUE: Mapping[str, Callable[[Any], Reader]] = {
    "values": by_value,
    "switches": switch,
    "in_use": _in_use,
}


def apply_rules(
    rules: Sequence[Rule], config: Values, objects: Collection[str] = ()
) -> TranslatedKeys:
    """Converts every key of `config`, and the tool's defaults that matter. A value that is an
    `Expression` is not read, except for keys of `objects`, nor is a batch computed from one.
    """
    unread = {k: v for k, v in config.items() if isinstance(v, Expression) and k not in objects}
    read = _apply(rules, {key: value for key, value in config.items() if key not in unread})
    fields = {entry.key: entry.outcome.fields for entry in read}
    if any("accumulate" in fields.get(key, ()) for key in unread):
        unread |= {
            entry.key: Expression(f"{entry.value} x gradient accumulation")
            for entry in read
            if "batch" in entry.outcome.fields
        }
    result = [entry for entry in read if entry.key not in unread]
    for key, text in unread.items():
        options = [f"--{name.replace('_', '-')} {name.upper()}" for name in fields.get(key, ())]
        flag, remark = " ".join(options), "not read because it is not a literal"
        outcome = unmapped(f"{remark}: pass {flag}" if flag else remark, flag)
        result.append(TranslatedKey(key, text, True, outcome))
    return tuple(result)


def _apply(rules: Sequence[Rule], config: Values) -> TranslatedKeys:
    """If a rule passes `--init-adapter`, this adapter determines the method, rank and targets, so
    the file's values are left out.
    """
    settings = ToolSettings(config, {rule.key: rule.default for rule in rules})
    entries, problems = [], []
    for rule in rules:
        value, in_file = settings[rule.key], rule.key in config
        if value is None:
            entries += [TranslatedKey(rule.key, None, True, mapped("not set"))] * in_file
            continue
        try:
            outcome = rule.reader(value, settings)
        except LorafoldError as error:
            problems.append(truncate_middle(f"{rule.key}: {error}", 250))
            continue
        if outcome is None:
            outcome = OFF if is_off(value) else mapped("no effect with these settings")
        if in_file or outcome.fields or outcome.status != "taken":
            given = config.get(rule.key) is not None
            entries.append(TranslatedKey(rule.key, value, given, outcome))
    if problems:
        raise LorafoldError(join_problems(problems))
    if any("--init-adapter" in entry.outcome.flag.split() for entry in entries):
        entries = list(_without_adapter_fields(entries))
    known = [rule.key for rule in rules]
    for key in (key for key in config if key not in known):
        remark = "; ".join(filter(None, (UNKNOWN_KEY, did_you_mean(key, known, 0.75))))
        entries.append(TranslatedKey(key, config[key], True, unmapped(remark)))
    return tuple(entries)


def _without_adapter_fields(entries: Sequence[TranslatedKey]) -> Iterator[TranslatedKey]:
    for entry in entries:
        fields = entry.outcome.fields
        rest = {k: v for k, v in fields.items() if k not in ADAPTER_FIELDS}
        if rest or not fields:
            yield replace(entry, outcome=replace(entry.outcome, fields=rest))
        elif entry.given:
            yield replace(entry, outcome=unmapped("set by the adapter of --init-adapter"))


@dataclass(frozen=True)
class SourceDataset:
    name: str
    path: str | None
    columns: Values = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.remarks)})" if self.remarks else self.name


def dataset(
    path: Any, config: Any = None, split: Any = None, files: Any = None, name: str = "",
    columns: Values = MappingProxyType({}), remarks: Iterable[str] = (), kind: str = "",
) -> SourceDataset:  # fmt: skip
    """A dataset as the other tool loads it with `datasets`. lorafold reads only the default
    configuration and the split train, so other values become remarks. `kind` follows the path in
    messages.
    """
    if path in ("json", "csv", "parquet", "text", "arrow") and isinstance(files, str):
        path, files = files or path, None
    parts = [f"configuration {config}"] if config is not None else []
    parts += [f"split {split}"] if split not in (None, "train") else []
    parts += [f"files {files}"] if files else []
    if parts:
        parts[-1] += ": save these rows to a file, as --data reads only the default train split"
    path_or_none = None if parts or path is None else str(path)
    return SourceDataset(name or f"{path}{kind}", path_or_none, columns, [*parts, *remarks])


def rename_remarks(*keys: Any) -> Iterator[str]:
    if keys not in TURN_KEYS:
        yield f"rename the keys {' and '.join(map(str, keys))} of the messages to role and content"


def unsupported_remarks(keys: Sequence[str]) -> Iterator[str]:
    if keys:
        yield f"{', '.join(keys)}: not supported"


def data_outcome(sources: Sequence[SourceDataset], objective: str | None) -> Outcome:
    """The outcome of datasets, which become --data and --columns on the command line. `objective`
    is None for supervised training.
    """
    pairs = {
        (ours, str(theirs))
        for source in sources
        for ours, theirs in source.columns.items()
        if theirs and theirs != ours
    }
    names, columns = ", ".join(map(str, sources)), sorted(pairs)
    if len(dict(columns)) < len(columns):
        names += "; the datasets use different column names: rename the columns in the files"
        columns = []
    flags = [PLACEHOLDER if s.path is None else f"--data {shlex.quote(s.path)}" for s in sources]
    if columns:
        flags.append(f"--columns {shlex.quote(','.join(map('='.join, columns)))}")
    remark = f"{expected_rows(objective)}: {names}"
    return unmapped(remark, " ".join(dict.fromkeys(flags)) or PLACEHOLDER)


def expected_rows(objective: str | None) -> str:
    if objective is None:
        rows = "{messages}, {prompt, completion} or {text}"
    elif OBJECTIVES[objective].draws:
        rows = "{prompt} and the columns that the rewards read"
    elif OBJECTIVES[objective].takes == JUDGED:
        rows = "{prompt, completion, label}, where label is true or false"
    else:
        rows = "{prompt, chosen, rejected}"
    return f"pass --data with rows of {rows}"


def flattened(config: Values, block: str) -> Values:
    """Returns `config` with the keys of the object `block` as keys of their own, `block.key`."""
    rest = {key: value for key, value in config.items() if key != block}
    return rest | {f"{block}.{key}": value for key, value in config[block].items()}


def objects_with_path(value: Any) -> list[Values]:
    objects = value if isinstance(value, list) else [value]
    for one in objects:
        if not isinstance(one, dict) or not one.get("path"):
            raise LorafoldError(f"found {one!r}, expected an object with the key path")
    return objects
