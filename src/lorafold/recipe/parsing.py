"""Parses a recipe from a YAML file, `--set key=value` pairs and options.

In increasing order of precedence: the defaults, the YAML file, `--set`, options. Values are merged
before they are validated, and one error lists all invalid fields with their sources.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafold.errors import LorafoldError, listed, read_failure, renamed_warning, two_names_message
from lorafold.files.record import NAMES, RENAMED, current_names
from lorafold.recipe.recipe import RAW_ERRORS, Recipe, explain

log = logging.getLogger(__name__)
ALL = "all"  # accelerate's name for all installed trackers
PACKAGES = {"comet_ml": "comet-ml"}  # trackers with another package name
MAPPINGS = [name for name, field in Recipe.model_fields.items() if field.default == {}]


def load_recipe(
    config: Path | None = None,
    sets: Sequence[str] = (),
    defaults: Recipe | None = None,
    **flags: Any,
) -> Recipe:
    """Parses a recipe from a YAML file, `--set key=value` pairs and options; None means that an
    option was not given.

    The values of pairs are YAML. The key of a pair may address an entry of a field that is a
    mapping, as in `options.init=gaussian` and `rank_pattern.0.q_proj=8`.
    """
    values = defaults.model_dump(exclude_unset=True) if defaults else {}
    sources = dict.fromkeys(values, "the defaults")
    problems = []
    given = {} if config is None else _read(config)
    values |= given
    sources |= dict.fromkeys(given, str(config))
    set_names = {pair.partition("=")[0].strip() for pair in sets}
    for old, now in NAMES.items():
        if {old, now} <= set_names:
            problems.append(two_names_message(f"--set {old}", f"--set {now}"))
        if old in RENAMED and old in set_names:
            log.warning(renamed_warning(f"--set {old}", f"--set {now}"))
    for pair in sets:
        key, equals, text = pair.partition("=")
        field, dot, inner = key.strip().partition(".")
        field, source = NAMES.get(field, field), "--set"
        value = parse_yaml(text, f"--set {pair}")
        if not equals or not field:
            problems.append(f"--set {pair}: expected key=value")
            continue
        if dot and field in Recipe.model_fields and field not in MAPPINGS:
            problems.append(
                f"--set {pair}: found a dotted key, but {field} has no entries; expected"
                f" {field}=value (only {', '.join(MAPPINGS[:-1])} and {MAPPINGS[-1]} have entries)"
            )
            continue
        if dot:
            entries = values.get(field)
            value = (entries if isinstance(entries, dict) else {}) | {inner: value}
            if entries and sources[field] not in ("--set", "the defaults"):
                source = f"{sources[field]} and --set"
        values[field], sources[field] = value, source
    given = {field: value for field, value in flags.items() if value is not None}
    values |= given
    sources |= {field: "--" + field.replace("_", "-") for field in given}
    try:
        recipe = Recipe.model_validate(values, context=RAW_ERRORS)
    except ValidationError as error:
        problems += explain(error, values, sources)
    if problems:
        raise LorafoldError("recipe: " + "; ".join(problems))
    return recipe


def read_text(path: Path, what: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LorafoldError(f"{path}: can't be read as {what}: {read_failure(error)}") from error


class _Yaml(yaml.SafeLoader):
    """PyYAML's YAML 1.1, except that 3e-4 is a number (1.1 requires a dot and a sign), and that a
    key is given once.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        if again := [key for i, (key, _) in enumerate(node.value) if names[i] in names[:i]]:
            raise yaml.MarkedYAMLError(
                None, None, f"found {again[0].value} twice", again[0].start_mark
            )
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise LorafoldError(f"{source}: not YAML{place}: {reason}") from error


def parse_fields(text: str, source: Path, what: str) -> dict[str, Any]:
    """Parses `name: value` lines; `what` describes them in the error message."""
    fields = parse_yaml(text, str(source)) or {}
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        names: Any = {dict: "keys that are not text", list: "a list", str: "text"}
        raise LorafoldError(
            f"{source}: found {names.get(type(fields), repr(fields))}, expected `name: value`"
            f" lines of {what}"
        )
    return fields


def _read(config: Path) -> Mapping[str, Any]:
    hint = f"to convert another tool's file, run lorafold recipe --from {config}"
    fields = parse_fields(read_text(config, "a recipe"), config, f"a recipe; {hint}")
    if not fields:
        log.warning("%s: the file is empty, so the defaults apply", config)
    unknown = [name for name in fields if name not in {*Recipe.model_fields, *RENAMED}]
    if 2 * len(unknown) > len(fields) and len(unknown) > 1:
        raise LorafoldError(
            f"{config}: found {listed(unknown, max_chars=100)}, which are not recipe fields; {hint}"
        )
    try:
        return current_names(fields)
    except LorafoldError as error:
        raise LorafoldError(f"{config}: {error}") from None


def check_trackers(names: Sequence[str]) -> None:
    """Checks that trackers exist and are installed, because accelerate ignores other names.
    The check must come before any work, so that a wrong name does not waste a run.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [*map(str, LOGGER_TYPE_TO_CLASS)]
    for name in names:
        if name not in (*known, ALL):
            near = get_close_matches(name.lower(), known, n=1) or sorted(known)
            raise LorafoldError(f"trackers: found {name!r:.80}, expected {' or '.join(near)}")
        if name != ALL and name not in map(str, get_available_trackers()):
            package = PACKAGES.get(name, name)
            raise LorafoldError(
                f"trackers: {name} is not installed; run pip install {package}, or remove {name}"
            )
