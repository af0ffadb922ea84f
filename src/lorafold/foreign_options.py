"""Suggestions for unknown names: the most similar name, or lorafold's equivalent of another tool's
option. Command lines, recipes, specs, `attach` and the conversion of other tools' files must all
use `FOREIGN_OPTIONS`, so that they agree.

    lora_r: 8            rank=8
    learning_rate: 1e-4  lr=0.0001, lr_b=0.0001
    load_in_4bit: true   storage='nf4'

Values are converted, because YAML and command lines leave `2e-4` and quoted numbers as text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import yaml

from lorafold.errors import LorafoldError, truncate

P = ParamSpec("P")
T = TypeVar("T")

SIMILARITY = 0.6  # minimum similarity for a suggestion
TYPO = 0.8  # minimum similarity of a misspelling


class UnknownName(LorafoldError, TypeError):
    """The error for an unknown keyword argument."""


def number(value: Any) -> float:
    """Converts a finite number, which may be text."""
    try:
        if isinstance(value, bool) or not isfinite(result := float(value)):
            raise ValueError
        return result
    except (TypeError, ValueError):
        raise LorafoldError(f"found {value!r}, expected a number") from None


def integer(value: Any) -> int:
    """Converts an integer, which may be text or a float such as 3.0."""
    result = number(value)
    if result != int(result):
        raise LorafoldError(f"found {value!r}, expected an integer")
    return int(result)


def boolean(value: Any) -> bool:
    """Converts a boolean, which may be one of the texts true, yes, on, false, no and off."""
    texts = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    result = texts.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(result, bool):
        raise LorafoldError(f"found {value!r}, expected true or false")
    return result


def names(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(name, str) for name in items):
        raise LorafoldError(f"found {value!r}, expected a list of names")
    return tuple(stripped for name in items if (stripped := name.strip()))


def product(a: Any, b: Any) -> float:
    """Multiplies two numbers to 12 digits: 2e-4 times 3 is 6e-4, not 0.0006000000000000001."""
    return float(f"{number(a) * number(b):.12g}")


Fields = dict[str, Any]


class ForeignOption(NamedTuple):
    """lorafold's equivalent of another tool's option.

    fields: The names of the fields that `read` may return.
    read: A function of the option's value and of all given options that returns lorafold's fields.
    remark: A note for the user.
    example: An example value for a command line.
    """

    fields: tuple[str, ...]
    read: Callable[[Any, Mapping[str, Any]], Fields]
    remark: str = ""
    example: str = ""


def _field(name: str, read: Callable[[Any], Any], remark: str = "") -> ForeignOption:
    return ForeignOption((name,), lambda value, given: {name: read(value)}, remark)


def _switch(name: str, on: str, remark: str) -> ForeignOption:
    return ForeignOption((name,), lambda value, given: {name: on} if boolean(value) else {}, remark)


def _one_of(choices: Mapping[str, str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if str(value) not in choices:
            raise LorafoldError(f"found {value!r}, expected {' or '.join(choices)}")
        return choices[str(value)]

    return read


def modules(value: Any) -> str | tuple[str, ...]:
    """Converts a list of module names. Text is returned unchanged, because it is a regular
    expression or a preset.
    """
    return value if isinstance(value, str) else names(value)


def targets(value: Any, every: str = "all-linear") -> str | tuple[str, ...]:
    """Converts a list of module names. If `every` is the only name, it means all-linear."""
    return "all-linear" if (items := names(value)) == (every,) else items


def _rows(value: Any, given: Mapping[str, Any]) -> Fields:
    keys = ("gradient_accumulation_steps", "grad_accumulation_steps")
    return {"batch": integer(value) * integer(next(filter(None, map(given.get, keys)), 1))}


def _betas(value: Any, given: Mapping[str, Any]) -> Fields:
    first, second = given.get("adam_beta1"), given.get("adam_beta2")
    pair = (0.9 if first is None else first, 0.999 if second is None else second)
    return {"betas": tuple(map(number, pair))}


TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
REMARKS: Mapping[str, str] = TABLES["remarks"]
SCHEDULES: Mapping[str, str] = TABLES["values"]["schedules"]
OPTIMIZERS: Mapping[str, str] = TABLES["values"]["optimizers"]
ONE_RATE = "the same learning rate for A and B, without LoRA+"
NO_FP16 = REMARKS["fp16 float16"]
READERS: Mapping[str, Callable[[Any], Any]] = {
    **{f.__name__: f for f in (number, integer, boolean, names, modules, targets, str)},
    **{name: _one_of(choices) for name, choices in TABLES["values"].items()},
    "llamafactory_targets": lambda value: targets(value, "all"),
    "not_negative": lambda value: max(0.0, number(value)),
    "same": lambda value: value,
}
TRAINING_OPTIONS = {
    **{
        keys: _field(name, READERS[reader])
        for keys, row in TABLES["training"].items()
        for name, reader in [row.split()]
    },
    **{
        keys: _switch(name, on, REMARKS.get(keys, ""))
        for keys, row in TABLES["switches"].items()
        for name, on in [row.split()]
    },
    "learning_rate": ForeignOption(
        ("lr", "lr_b"), lambda value, given: dict.fromkeys(("lr", "lr_b"), number(value)), ONE_RATE
    ),
    "adam_beta1 adam_beta2": ForeignOption(("betas",), _betas),
    "per_device_train_batch_size micro_batch_size batch_size": ForeignOption(
        ("batch",), _rows, "micro-batch times gradient accumulation, for one process"
    ),
}
SERVER_OPTIONS = {
    keys: _field(name, READERS["same"], REMARKS.get(keys, ""))._replace(example=" ".join(example))
    for keys, row in TABLES["servers"].items()
    for name, *example in [row.split()]
}
FOREIGN_OPTIONS = {
    key: one for keys, one in (TRAINING_OPTIONS | SERVER_OPTIONS).items() for key in keys.split()
}
SERVER_OPTION_NAMES = {key for keys in SERVER_OPTIONS for key in keys.split()}
# field -> the function or class that has it, if that is not lf.Recipe
OWNERS = {name: owner for owner, fields in TABLES["owners"].items() for name in fields.split()}


def did_you_mean(name: str, known: Collection[str], cutoff: float = SIMILARITY, n: int = 1) -> str:
    matches = get_close_matches(name, known, n, cutoff)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def advice(name: str, given: Mapping[str, Any], known: Collection[str]) -> str:
    """Returns a suggestion in words for an unknown name, or an empty string."""
    option, other = FOREIGN_OPTIONS.get(name), ""
    own = {field for one in TRAINING_OPTIONS.values() for field in one.fields}
    if name in own and {"recipe", "spec"} & {*known}:
        option = _field(name, READERS["same"])  # of another function or class
    if option is not None:
        try:
            fields = option.read(given[name], given)
        except LorafoldError:  # invalid value
            fields = {}
        shown = ", ".join(f"{k}={truncate(repr(v), 40)}" for k, v in fields.items())
        shown = shown or " and ".join(option.fields)
        remark = f" ({option.remark})" if option.remark else ""
        if {*known} >= {*option.fields}:
            return f"use {shown}{remark}"
        owner = OWNERS.get(option.fields[0], "lf.Recipe")
        other = f"use {shown} of {'lf.Recipe' if 'recipe' in known else owner}{remark}"
    ending = next((f"did you mean {one}?" for one in known if name.endswith(f"_{one}")), "")
    return did_you_mean(name, known, TYPO, 3) or ending or other or did_you_mean(name, known, n=3)


def unknown_names(what: str, given: Mapping[str, Any], known: Collection[str]) -> UnknownName:
    hints = {name: advice(name, given, known) for name in given if name not in known}
    others = [name for name, hint in hints.items() if not hint]
    all_of_them = f"options: {', '.join(known) or 'none'}"
    lines = [f"{name}; {hint}" for name, hint in hints.items() if hint]
    lines += [f"{', '.join(others)}; {all_of_them}"] if others else []
    return UnknownName("; ".join(f"{what} has no option {line}" for line in lines))


def with_suggestions(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function suggest names in its error for unknown keyword arguments."""
    known = inspect.signature(function).parameters.keys()

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if not options.keys() <= known:
            raise unknown_names(function.__name__, options, known)
        return function(*args, **options)

    return call
