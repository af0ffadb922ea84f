"""Converts another tool's file to a recipe, with a report on each key. The recipe's YAML has a
comment on the origin of every line.

A tool is a candidate if the file has one of its markers; the candidate with the fewest unknown keys
is chosen. If two tools tie, or more than a third of the keys are unknown, the user has to name the
tool.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafold.config_import import (
    axolotl,
    axolotl_objectives,
    llamafactory,
    mlx,
    peft_config,
    swift,
    torchtune,
    trl,
    unsloth,
)
from lorafold.config_import.rules import (
    KEYS,
    REASONS,
    Expression,
    Outcome,
    Rule,
    TranslatedKey,
    TranslatedKeys,
    Values,
    apply_rules,
    static_rows,
    table,
)
from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import read_object, write_text
from lorafold.objectives import OBJECTIVES
from lorafold.objectives.algorithm_options import policy_options, preference_algorithm
from lorafold.peft.config import CONFIG
from lorafold.recipe.parsing import parse_fields, parse_yaml, read_text
from lorafold.recipe.recipe import RAW_ERRORS, Recipe
from lorafold.recipe.resolve_settings import ignored_fields, spec_of, trainable_storage

WIDTH = 100
SECTIONS = {
    "taken": "converted",
    "changed": "converted with a difference",
    "left": "not part of the recipe",
}


UNSUPPORTED_FILES: Mapping[str, str] = KEYS["unsupported_files"]
NOTES: Mapping[str, str] = KEYS["notes"]
FILE_RULES = table(static_rows("file"))
LAUNCHES: Mapping[str, str] = KEYS["launches"]
TOKEN = re.compile(
    r"""\\\n|`\#[^`]*`|(?<![^\s;&|])\#[^\n]*|(?<!\S)\d?[<>]+&?\d?|[\n;&|()<>]+
    |(?:[^\s'"\\$;&|<>()]|\\[^\n]|'[^']*'|"(?:\\.|[^"\\])*"
    |\$\(\([^)]*\)\)|\$\([^)]*\)|\$\{[^}]*\}|\$)+""",
    re.DOTALL | re.VERBOSE,
)
SUBCOMMANDS = {"rlhf": {"rlhf_type": "dpo"}, "pt": {"loss_scale": "all"}}  # of ms-swift
CONFIG_FILE = re.compile(r"\.(?:ya?ml|json)$")
SETTINGS = "a training configuration"
PASSED = ("$@", "$*")  # the arguments of the script itself
OVERRIDE = re.compile(r"[a-z_][\w.]*")  # as in key=value
PART = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|[^'"]+""", re.DOTALL)
VARIABLE = re.compile(r"\$\{?(\w+)(?::-([^}]*))?\}?")


@dataclass(frozen=True)
class Tool:
    """Another tool. `markers` are keys, or key=value, separated by spaces; `known` are the keys
    that it supports (None: all).
    """

    name: str
    markers: str
    read_keys: ReadKeys
    known: frozenset[str] | None


ReadKeys = Callable[[Values], TranslatedKeys]


def _from_rules(
    rules: Sequence[Rule], flatten: Callable[[Values], Values] = dict
) -> tuple[ReadKeys, frozenset[str]]:
    """Reads a file with a table of rules; `flatten` moves keys in blocks to the top level."""
    known = frozenset(name for rule in rules for name in (rule.key, rule.key.split(".")[0]))
    return lambda config: apply_rules(rules, flatten(config)), known


READERS: Mapping[str, tuple[ReadKeys, frozenset[str] | None]] = {
    "axolotl": _from_rules(axolotl.RULES, axolotl_objectives.flatten),
    "llamafactory": _from_rules(llamafactory.RULES),
    **{kind: _from_rules(rules) for kind, rules in trl.RULES.items()},
    "mlx-lm": _from_rules(mlx.RULES, mlx.flatten_lora),
    "torchtune": _from_rules(torchtune.RULES, torchtune.flatten),
    "ms-swift": (swift.read_keys, swift.KNOWN),
    "unsloth": (unsloth.read_keys, unsloth.KNOWN),
    "peft": (peft_config.read_keys, None),
}
TOOLS = {
    kind: Tool(about["name"], about["markers"], *READERS[kind])
    for kind, about in KEYS["tools"].items()
}


@dataclass(frozen=True)
class Translation:
    """A recipe, and the outcome of each key of the file and of the tool's defaults that matter.
    `note` is about settings that such a file never contains.
    """

    source: Path
    tool: str
    recipe: Recipe
    taken: TranslatedKeys
    changed: TranslatedKeys
    left: TranslatedKeys
    note: str = ""

    @property
    def entries(self) -> TranslatedKeys:
        return (*self.taken, *self.changed, *self.left)

    @property
    def unread(self) -> list[TranslatedKey]:
        """Keys that a recipe would contain, but whose values the script computes."""
        return [e for e in self.left if isinstance(e.value, Expression) and e.outcome.flag]

    def written(self) -> dict[str, Any]:
        """The recipe's fields that differ from its defaults, and `storage` if a key set it, because
        it would otherwise be taken from the model's files.
        """
        fields = self.recipe.model_dump(mode="json", exclude_unset=True)
        defaults = Recipe().model_dump(mode="json")
        return {
            name: fields[name]
            for name in defaults
            if name in fields and (name == "storage" or fields[name] != defaults[name])
        }

    def to_yaml(self, path: str = "recipe.yaml") -> str:
        """The recipe's YAML, with a comment on the origin of every line. `path` is the recipe's
        path in the command of the header.
        """
        lines = [
            f"# {self.source.name} ({self.tool}), converted by lorafold {version('lorafold')}.",
            f"# {self.command(path)}",
            *(f"# NOT READ: {_key_text(e)}: {e.outcome.remark}" for e in self.unread),
        ]
        for name, value in self.written().items():
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            line = f"{name}: {text.strip().removesuffix('...').strip()}"
            sources = [entry for entry in self.entries if name in entry.outcome.fields]
            changes = [e.outcome.remark for e in sources if e.outcome.status == "changed"]
            lines += [f"# {remark}:" for remark in changes]
            comment = ", ".join(map(_key_text, sources))
            fits = len(line) + len(comment) + 4 <= WIDTH
            lines += [f"{line}  # {comment}"] if fits else [f"# {comment}", line]
        return "\n".join(lines) + "\n"

    def command(self, config: str = "recipe.yaml") -> str:
        flags = {"--model": "", "--data": "--data DATA", "--eval-data": "", "--out": "--out OUT"}
        given = [entry.outcome.flag for entry in self.entries]
        flags |= {flag.partition(" ")[0]: flag for flag in given}
        parts = ["lorafold train --config", shlex.quote(config), *flags.values()]
        return " ".join(filter(None, parts))

    def as_json(self) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "tool": self.tool,
            "recipe": self.written(),
            "yaml": self.to_yaml(),
            "command": self.command(),
            **{status: [*map(_as_json, getattr(self, status))] for status in SECTIONS},
            "note": self.note,
        }

    def report(self, config: str = "recipe.yaml") -> str:
        lines = [f"{self.source} ({self.tool}), converted to a recipe"]
        said = [entry for entry in self.taken if entry.outcome.remark in ("off", "not set")]
        off = [e for e in said if e.outcome.status == "taken" and not e.outcome.fields]
        for status, head in SECTIONS.items():
            if entries := [entry for entry in getattr(self, status) if entry not in off]:
                lines += [f"{head}:", *_table(entries)]
        if off:
            lines.append(f"off or not set: {', '.join(entry.key for entry in off)}")
        lines += [self.note] * bool(self.note)
        return "\n".join([*lines, f"train with: {self.command(config)}"])

    def __str__(self) -> str:
        return self.report()


def _key_text(entry: TranslatedKey) -> str:
    return f"{entry.key}: {_value_text(entry.value)}{'' if entry.given else ' (tool default)'}"


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(entries: Sequence[TranslatedKey]) -> Iterator[str]:
    key_texts = [*map(_key_text, entries)]
    wide = min(44, max(map(len, key_texts)))
    for entry, key_text in zip(entries, key_texts, strict=True):
        fields = ", ".join(f"{k}: {_value_text(v)}" for k, v in entry.outcome.fields.items())
        remarks = "; ".join(filter(None, (fields, entry.outcome.remark)))
        line = f"  {key_text:<{wide}}  {'->' if fields else ' -'} {remarks}"
        yield textwrap.fill(
            line, WIDTH, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
        )


def _as_json(entry: TranslatedKey) -> dict[str, Any]:
    values = asdict(entry)
    return values | values.pop("outcome")


def translate(path: str | Path, kind: str | None = None) -> Translation:
    if kind is not None and kind not in TOOLS:
        raise LorafoldError(f"kind {kind!r}: expected {', '.join(TOOLS)}")
    source = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    config, launched = _read(source, kind)
    about_file = {rule.key: config[rule.key] for rule in FILE_RULES if rule.key in config}
    config = {key: value for key, value in config.items() if key not in about_file}
    kind = kind or launched or detect_tool(source, config)
    tool = TOOLS[kind]
    try:
        entries = (*tool.read_keys(config), *apply_rules(FILE_RULES, about_file))
        recipe = _recipe(entries)
        if spec_of(recipe).trains_base:
            trainable_storage(recipe)
    except LorafoldError as error:
        raise LorafoldError(f"{source}: {error}") from None
    absent = ignored_fields(recipe)
    entries = tuple(_without_fields(entry, absent, recipe.method) for entry in entries)
    by_outcome = {s: tuple(e for e in entries if e.outcome.status == s) for s in SECTIONS}
    return Translation(source, tool.name, _recipe(entries), **by_outcome, note=NOTES.get(kind, ""))


def write(translation: Translation, out: str | Path, overwrite: bool = False) -> None:
    check_free(out, overwrite)
    write_text(out, translation.to_yaml(str(out)))


def check_free(out: str | Path, overwrite: bool) -> None:
    if Path(out).is_dir():
        raise LorafoldError(f"{out}: found a directory, expected a file for the recipe")
    if os.path.lexists(out) and not overwrite:
        raise LorafoldError(f"{out} exists; pass --overwrite to replace it")


def _read(path: Path, kind: str | None) -> tuple[Values, str]:
    """The settings of a file, and the kind of tool that a shell script starts."""
    text = read_text(path, SETTINGS)
    if not text.strip():
        raise LorafoldError(f"{path}: found an empty file, expected {SETTINGS}")
    if path.suffix in (".sh", ".bash"):
        return _read_shell(path, text)
    if path.suffix == ".ipynb":
        try:
            cells = [c for c in read_object(path)["cells"] if c["cell_type"] == "code"]
            code = "\n".join("".join(cell["source"]) for cell in cells)
        except (KeyError, TypeError):
            raise LorafoldError(f"{path}: found no cells, expected a notebook") from None
        return unsloth.arguments_of(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", code), str(path)), ""
    if path.suffix == ".py" or kind == "unsloth":
        return unsloth.arguments_of(text, str(path)), ""
    return read_object(path) if path.suffix == ".json" else parse_fields(text, path, SETTINGS), ""


def _read_shell(path: Path, text: str) -> tuple[Values, str]:
    try:
        trainings = [(words, found) for words in _commands(text) if (found := _launch(words))]
    except ValueError as error:
        raise LorafoldError(f"{path}: not a shell script: {error}") from None
    if not trainings:
        raise LorafoldError(
            f"{path}: found no command that trains, expected for example trl sft, swift sft, tune"
            " run, axolotl train, llamafactory-cli train or mlx_lm.lora"
        )
    (words, (kind, start, end)), *more = trainings
    if kind == "torchtune" and "--config" in words:
        start = end = words.index("--config")
    if kind in REASONS:
        raise LorafoldError(f"{path}: found {REASONS[kind]}")
    given, files = _arguments(words[end:])
    given = SUBCOMMANDS.get(words[end - 1], {}) | given
    config: dict[str, Any] = {}
    if name := given.pop("config", next(filter(CONFIG_FILE.search, files), None)):
        files = [str(path.parent / str(name)), str(name)]
        file = Path(next(filter(os.path.isfile, files), ""))
        if not file.name:
            copy = "; copy it with tune cp" * (kind == "torchtune")
            raise LorafoldError(f"{path}: reads {name}, which was not found{copy}")
        config = parse_fields(read_text(file, SETTINGS), file, SETTINGS)
    config |= {key: _typed(value, str(path)) for key, value in given.items()}
    others = "; ".join(" ".join(rest[first : last + 2]) for rest, (_, first, last) in more)
    about = {"launcher": " ".join(words[:start]), "another_training": others}
    return config | {key: value for key, value in about.items() if value}, kind


def _launch(words: Sequence[str]) -> tuple[str, int, int] | None:
    """The kind of tool that a command starts, and the indices of its name and first argument."""
    for index, pair in enumerate(pairwise([*words, ""])):
        for pattern, kind in LAUNCHES.items():
            if found := re.fullmatch(pattern, " ".join(pair)):
                return kind.format(*found.groups()), index, index + 2 - pattern.endswith(" .*")
    return None


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, as words with the values of the variables that it sets. A
    word with any other expression is an `Expression`.
    """
    variables: dict[str, str] = {}
    words = []
    for token in [*TOKEN.findall(text.replace("\r", "")), "\n"]:
        if token[0] not in "\n;&|()<>" and not re.match(r"\\\n|`?\#|\d?[<>]", token):
            words.append(token)
        elif token[0] in "\n;&|()" and words:
            pairs = [word.partition("=") for word in words if word != "export"]
            if all(name.isidentifier() and equals for name, equals, _ in pairs):
                variables |= {n: " ".join(_expand(value, variables)) for n, _, value in pairs}
            else:
                yield [one for word in words for one in _expand(word, variables)]
            words = []


def _expand(word: str, variables: Mapping[str, str]) -> list[str]:
    def expanded(part: re.Match[str]) -> str:
        def value(found: re.Match[str]) -> str:
            text = variables.get(found[1], found[2])
            if text is None:
                return found[0]
            escaped = re.sub(r"([\\'\"])", r"\\\1", text)
            return escaped.replace("\\'", "'") if part[0][0] == '"' else escaped

        return part[0] if part[0][0] == "'" else VARIABLE.sub(value, part[0])

    text = PART.sub(expanded, word)
    if "$(" in text:
        return [Expression(text)]
    return [Expression(one) if "$" in one else one for one in shlex.split(text)]


def _arguments(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of a command, and its other arguments."""
    given: dict[str, Any] = {}
    others, key = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if word in PASSED:
            given["script_arguments"] = str(word)
        elif word == "-c" or name.startswith("--") or (equals and OVERRIDE.fullmatch(name)):
            key = "config" if word == "-c" else name.removeprefix("--").replace("-", "_")
            given[key] = type(word)(value) if equals else True
        elif key:
            before = given[key]
            several = before if isinstance(before, list) else [before]
            given[key] = word if before is True else [*several, word]
        else:
            others.append(word)
    return given, others


def _typed(value: Any, source: str) -> Any:
    is_yaml = type(value) is str and re.match(r"[\[{]|(?:true|false|null)$", value, re.IGNORECASE)
    return parse_yaml(value, source) if is_yaml else value


def _recipe(entries: Sequence[TranslatedKey]) -> Recipe:
    values: dict[str, Any] = {}
    for entry in entries:
        for name, value in entry.outcome.fields.items():
            values[name] = _merge_values(values.get(name), value)

    def keys(*names: str) -> str:
        return ", ".join(e.key for e in entries if {*names} & e.outcome.fields.keys())

    try:
        recipe = Recipe.model_validate(values, context=RAW_ERRORS)
    except ValidationError as error:
        problems = {}
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else ""
            problems[name] = (
                f"{keys(name)}: found {values.get(name)!r} as recipe field {name};"
                f" {problem['msg'].removeprefix('Value error, ').lower()}"
            )
        raise LorafoldError("; ".join(problems.values())) from None
    declared = OBJECTIVES[recipe.objective]
    if declared.law:
        check = policy_options if declared.draws else preference_algorithm
        try:
            check(recipe.objective, recipe.beta, recipe.objective_options)
        except LorafoldError as error:
            raise LorafoldError(f"{keys('beta', 'objective_options')}: {error}") from None
    return recipe


def _merge_values(before: Any, value: Any) -> Any:
    """Combines values of trackers, tokens and options; otherwise, the later value is used."""
    if isinstance(before, tuple) and isinstance(value, tuple) and before != value:
        return (*before, *(one for one in value if one not in before))
    return {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _without_fields(entry: TranslatedKey, names: Sequence[str], method: str) -> TranslatedKey:
    fields = entry.outcome.fields
    rest = {name: value for name, value in fields.items() if name not in names}
    if len(rest) == len(fields):
        return entry
    absent = ", ".join(name for name in fields if name not in rest)
    outcome = Outcome("left", {}, f"method {method} has no option {absent}")
    return replace(entry, outcome=replace(entry.outcome, fields=rest) if rest else outcome)


def detect_tool(path: Path, config: Values) -> str:
    if found := [name for keys, name in UNSUPPORTED_FILES.items() if {*keys.split()} <= {*config}]:
        raise LorafoldError(f"{path}: found {REASONS[found[0]]}")
    markers, unknown = {}, {}
    for kind, tool in TOOLS.items():
        markers[kind] = sum(_has(config, *marker.partition("=")) for marker in tool.markers.split())
        known = config.keys() if tool.known is None else tool.known
        unknown[kind] = [key for key in config if key not in known]
    rank = {kind: (not markers[kind], len(unknown[kind]), -markers[kind]) for kind in TOOLS}
    best, *others = [kind for kind in TOOLS if rank[kind] == min(rank.values())]
    if markers[best] and not others and 3 * len(unknown[best]) <= len(config):
        return best
    keys = [key for key in config if key in Recipe.model_fields]
    if 2 * len(keys) > len(config):
        raise LorafoldError(
            f"{path}: found a lorafold recipe ({listed(keys)}), expected another tool's file; train"
            f" with: lorafold train --config {path}"
        )
    # PEFT's file may contain any key, so every file would tie with it
    kinds: Collection[str] = [best, *(kind for kind in others if TOOLS[kind].known is not None)]
    names = listed(TOOLS[kind].name for kind in kinds)
    if len(kinds) > 1:
        why = f"{names} match equally well"
    elif markers[best]:
        why = f"{names} does not have {listed(unknown[best])}"
    else:
        why, kinds = "no supported tool has them", TOOLS
    raise LorafoldError(
        f"{path}: the keys do not identify the tool ({listed(config) or 'none'}):"
        f" {why}; choose one with --kind: {', '.join(kinds)}"
    )


def _has(config: Values, key: str, equals: str, value: str) -> bool:
    given = config.get(key)
    values = given if isinstance(given, list) else [given]
    return key in config and (not equals or value in values)
