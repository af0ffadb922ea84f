"""The vocabulary of the tables: what becomes of one setting of another tool.

    Rule        a key of theirs, what it becomes, and what their tool assumes where it is absent
    Outcome     taken, taken differently (changed), or left, with recipe fields and a remark
    Entry       an outcome with the key and the value that it is of
    Settings    the file's values, and behind them their tool's defaults

A table of rules stands in the file of its tool; `by_rules` reads a configuration with it. A rule's
function raises LorafoldError for a value that their tool would refuse, and for one that lorafold
has no way to train; all of these are told together.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from lorafold.errors import LorafoldError
from lorafold.step.recipe import OF_ADAPTER

T = TypeVar("T")

NOT_KNOWN = "it is not known here"


@dataclass(frozen=True)
class Outcome:
    """`fields` are those of the recipe; `flag` is the part of `lorafold train`'s command line that
    does what a recipe can't say.
    """

    how: Literal["taken", "changed", "left"]
    fields: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""
    flag: str = ""


@dataclass(frozen=True)
class Entry:
    """`value` is the file's or, where it is silent or says null, the tool's default; `given` says
    which of them.
    """

    key: str
    value: Any
    given: bool
    outcome: Outcome


@dataclass(frozen=True)
class Settings:
    """What holds of each key: the file's value or, where that is absent or null, the default."""

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        value = self.given.get(key)
        return self.defaults.get(key) if value is None else value

    def read(self, key: str, convert: Callable[[Any], T]) -> T:
        """The value, converted. LorafoldError names the key."""
        try:
            return convert(self[key])
        except LorafoldError as error:
            raise LorafoldError(f"{key}: {error}") from None


# None: there is nothing to say of it
Reading = Callable[[Any, Settings], Outcome | None]


@dataclass(frozen=True)
class Rule:
    """One key of another tool; it is also read where the file is silent if it has a `default`."""

    key: str
    reading: Reading
    default: Any = None


def taken(remark: str = "", /, **fields: Any) -> Outcome:
    return Outcome("taken", fields, remark)


def changed(why: str, /, **fields: Any) -> Outcome:
    return Outcome("changed", fields, why)


def left(instead: str, flag: str = "") -> Outcome:
    return Outcome("left", {}, instead, flag)


def to(name: str, read: Callable[[Any], Any] = lambda value: value) -> Reading:
    """The recipe field of that name has this value, as `read` converts it."""
    return lambda value, settings: taken(**{name: read(value)})


def option(name: str) -> Reading:
    """A flag of `lorafold train` that takes this value."""
    return lambda value, settings: flagged(name, value)


def flagged(name: str, value: Any) -> Outcome:
    return left(f"pass it as {name}", f"{name} {shlex.quote(str(value))}")


def is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {}, "no", "none", "null")


def without(remark: str) -> Reading:
    """No counterpart, unless the value says that it is off."""
    return lambda value, settings: taken("it is off") if is_off(value) else left(remark)


def all_without(remark: str, keys: str) -> tuple[Rule, ...]:
    """Rules `without` a counterpart, all for the same reason; the keys are separated by spaces."""
    return tuple(Rule(key, without(remark)) for key in keys.split())


def refusing(why: str) -> Reading:
    """Lorafold can't train what this asks for, unless the value says that it is off."""

    def read(value: Any, settings: Settings) -> Outcome:
        if is_off(value):
            return taken("it is off")
        raise LorafoldError(f"found {value!r}, but {why}")

    return read


def by_rules(
    rules: Sequence[Rule], config: Mapping[str, Any], init_adapter: str | None = None
) -> tuple[Entry, ...]:
    """Every key of `config` as one entry, and with it what their tool assumes besides.

    Args:
        rules: The table of the tool.
        config: What its file says.
        init_adapter: The key that names an adapter to start from. Where it is set, that adapter
            brings its own method, rank and places, and the file's are left.

    LorafoldError lists every value that can't be understood or trained.
    """
    settings = Settings(config, {rule.key: rule.default for rule in rules})
    entries: list[Entry] = []
    problems: list[str] = []
    for rule in rules:
        value, given = settings[rule.key], config.get(rule.key) is not None
        if value is None:
            entries += [Entry(rule.key, None, True, taken("it is not set"))] * (rule.key in config)
            continue
        try:
            outcome = rule.reading(value, settings)
        except LorafoldError as error:
            problems.append(f"{rule.key}: {error}")
            continue
        if outcome is None:
            outcome = taken("it is off" if is_off(value) else "it has no effect here")
        if given or rule.key in config or outcome.fields or outcome.how != "taken":
            entries.append(Entry(rule.key, value, given, outcome))
    if problems:
        raise LorafoldError("; ".join(problems))
    if init_adapter and settings[init_adapter]:
        entries = list(_brought_by_adapter(entries))
    return (*entries, *unknown(config, [rule.key for rule in rules]))


def unknown(config: Mapping[str, Any], known: Sequence[str]) -> Iterator[Entry]:
    """The keys that a tool's table does not have, with near names."""
    for key in config:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield Entry(key, config[key], True, left(NOT_KNOWN + hint))


def _brought_by_adapter(entries: Sequence[Entry]) -> Iterator[Entry]:
    for entry in entries:
        rest = {k: v for k, v in entry.outcome.fields.items() if k not in OF_ADAPTER}
        if rest == entry.outcome.fields:
            yield entry
        elif rest:
            yield replace(entry, outcome=replace(entry.outcome, fields=rest))
        elif entry.given:
            yield replace(
                entry, outcome=left("the adapter that --init-adapter names brings its own")
            )
