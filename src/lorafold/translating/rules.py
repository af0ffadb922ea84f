"""What a table of rules is made of, and how a configuration is read with one.

    Rule            one key of another tool: what becomes of it, and what that tool assumes
                    without it
    Outcome         taken, taken differently (changed), or left, with recipe fields and a remark
    TranslatedKey   a key with its value and its outcome
    Settings        the file's values, and behind them the tool's defaults

Each tool's table stands in a file of its own; `by_rules` reads a configuration with it. A rule's
reader raises LorafoldError for a value that the other tool would refuse, and for one that lorafold
has no way to train; all of these are reported together.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from lorafold.errors import LorafoldError, as_one, shortened
from lorafold.recipe.fields import OF_ADAPTER
from lorafold.translating.convert import number

T = TypeVar("T")

NOT_KNOWN = "it is not known here"


@dataclass(frozen=True)
class Outcome:
    """What becomes of a key: `fields` are those of the recipe that it sets, `remark` says why, and
    `flag` is the part of `lorafold train`'s command line that does what a recipe can't say.
    """

    how: Literal["taken", "changed", "left"]
    fields: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""
    flag: str = ""


@dataclass(frozen=True)
class TranslatedKey:
    """A key, its value and its outcome. `given`: the value is the file's; otherwise the key is
    absent or null there, and the value is the tool's default.
    """

    key: str
    value: Any
    given: bool
    outcome: Outcome


@dataclass(frozen=True)
class Settings:
    """The value of each key: the file's or, where that is absent or null, the tool's default."""

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


# Says what becomes of a value; None: the key is off or has no effect
Reader = Callable[[Any, Settings], Outcome | None]


@dataclass(frozen=True)
class Rule:
    """One key of another tool; it is also read where the file is silent if it has a `default`."""

    key: str
    reader: Reader
    default: Any = None


def taken(remark: str = "", /, **fields: Any) -> Outcome:
    """The key means the same here: these recipe fields hold its value."""
    return Outcome("taken", fields, remark)


def changed(why: str, /, **fields: Any) -> Outcome:
    """The key is taken differently, and `why` says how."""
    return Outcome("changed", fields, why)


def left(instead: str, flag: str = "") -> Outcome:
    """The key has no counterpart in the recipe; `instead` says what to do, `flag` is the option."""
    return Outcome("left", {}, instead, flag)


def to(name: str, read: Callable[[Any], Any] = lambda value: value) -> Reader:
    """The reader of a key whose value, converted by `read`, becomes the recipe field `name`."""
    return lambda value, settings: taken(**{name: read(value)})


def option(name: str) -> Reader:
    """The reader of a key whose value goes to the option `name` of `lorafold train`."""
    return lambda value, settings: flagged(name, value)


def flagged(name: str, value: Any) -> Outcome:
    """The key is left, and its value goes to the option `name` of `lorafold train`."""
    return left(f"pass it as {name}", f"{name} {shlex.quote(str(value))}")


def is_off(value: Any) -> bool:
    """Whether a value turns its key off: null, false, empty, or the text no, none or null."""
    return value is None or value is False or value in ("", [], {}, "no", "none", "null")


def without(remark: str) -> Reader:
    """The reader of a key that has no counterpart: it is left, unless its value turns it off."""
    return lambda value, settings: taken("it is off") if is_off(value) else left(remark)


def all_without(remark: str, keys: str) -> tuple[Rule, ...]:
    """Rules `without` a counterpart, all for the same reason; the keys are separated by spaces."""
    return tuple(Rule(key, without(remark)) for key in keys.split())


def refusing(why: str) -> Reader:
    """The reader of a key that asks for what lorafold can't train: LorafoldError, unless off."""

    def read(value: Any, settings: Settings) -> Outcome:
        if is_off(value):
            return taken("it is off")
        raise LorafoldError(f"found {value!r}, but {why}")

    return read


def unless(neutral: float, why: str) -> Reader:
    """The reader of a number that asks for what lorafold can't train, unless it is neutral."""

    def read(value: Any, settings: Settings) -> Outcome:
        if number(value) == neutral:
            return taken("it is off")
        raise LorafoldError(f"found {value!r}, but {why}")

    return read


def by_rules(rules: Sequence[Rule], config: Mapping[str, Any]) -> tuple[TranslatedKey, ...]:
    """Every key of `config` as an entry, and the tool's defaults that matter where it is silent.

    Where a rule passes `--init-adapter`, that adapter brings its own method, rank and targets, and
    the file's are left. LorafoldError lists the values that can't be read, or that lorafold can't
    train.
    """
    settings = Settings(config, {rule.key: rule.default for rule in rules})
    entries: list[TranslatedKey] = []
    problems: list[str] = []
    for rule in rules:
        value, given = settings[rule.key], config.get(rule.key) is not None
        if value is None:
            entries += [TranslatedKey(rule.key, None, True, taken("it is not set"))] * (
                rule.key in config
            )
            continue
        try:
            outcome = rule.reader(value, settings)
        except LorafoldError as error:
            problems.append(shortened(f"{rule.key}: {error}", 250))
            continue
        if outcome is None:
            outcome = taken("it is off" if is_off(value) else "it has no effect here")
        if given or rule.key in config or outcome.fields or outcome.how != "taken":
            entries.append(TranslatedKey(rule.key, value, given, outcome))
    if problems:
        raise LorafoldError(as_one(problems))
    if any("--init-adapter" in entry.outcome.flag.split() for entry in entries):
        entries = list(_brought_by_adapter(entries))
    return (*entries, *unknown(config, [rule.key for rule in rules]))


def unknown(config: Mapping[str, Any], known: Sequence[str]) -> Iterator[TranslatedKey]:
    """The keys that the tool's table does not have, as entries that suggest the nearest name."""
    for key in config:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield TranslatedKey(key, config[key], True, left(NOT_KNOWN + hint))


def _brought_by_adapter(entries: Sequence[TranslatedKey]) -> Iterator[TranslatedKey]:
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
