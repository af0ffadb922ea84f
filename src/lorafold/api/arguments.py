"""Conversion of the arguments of public functions: rows, rewards, paths, consoles.

It imports neither torch nor, before rows are read, transformers, so that errors in rows are
reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lorafold.api.options import ColumnNames, Data, Paths, RewardSources
from lorafold.data.formats import PAIRS
from lorafold.data.json_input import Row
from lorafold.data.row_sources import parse_source
from lorafold.data.row_store import Rows
from lorafold.data.rows import check_each, check_rows, read_rows, rename_columns
from lorafold.errors import LorafoldError, cut
from lorafold.files.terminal import print_lines
from lorafold.objectives import DEFAULT, OBJECTIVES
from lorafold.recipe.parsing import check_trackers
from lorafold.rewards.reward import check_names

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.data.stream import RowStream
    from lorafold.recipe.recipe import Recipe


def as_rows(
    data: Data,
    columns: ColumnNames | None = None,
    console: Console | None = None,
    weighted: bool = False,
    objective: str | None = DEFAULT,
) -> Rows:
    """The rows, read if `data` names sources, and checked; an objective of None reads preference
    pairs whole. The console shows which keys are ignored.
    """
    declared, source = None if objective is None else OBJECTIVES[objective], source_of(data)
    wanted = PAIRS if declared is None else declared.takes  # both completions of preferences
    if (sources := sources_in(data)) is not None:
        rows = read_rows(sources, columns, lambda text: print_lines(console, text), wanted)
    else:
        numbered: Iterable[tuple[int, Any]] = enumerate(cast(Sequence[Row], data), 1)
        numbered = rename_columns(numbered, columns) if columns else numbered
        rows = check_rows(numbered, source, wanted)
    if not weighted and any(part.weight != 1 for part in rows.parts):
        raise LorafoldError(f"{source}: only training rows may have a weight; remove it")
    messages = [*(_dropped(columns) if columns else ()), *rows.remarks]
    ignored: Sequence[str] = rows.ignored
    if declared is not None:
        messages += declared.notices(rows.formats)
        ignored = [] if declared.draws else [key for key in ignored if key not in declared.keys]
    if ignored:
        messages.insert(0, f"{_ignored(ignored)} (rows of {rows.formats[0]})")
    for text in messages:
        print_lines(console, f"{source}: {text}")
    return rows


def with_rewards(
    recipe: Recipe, rewards: RewardSources
) -> tuple[Recipe, tuple[Callable[..., Any], ...]]:
    """The recipe with the rewards that are names, and the rewards that are functions."""
    given = as_rewards(rewards)
    if given and not OBJECTIVES[recipe.objective].draws:
        sampling = " or ".join(name for name, one in OBJECTIVES.items() if one.draws)
        raise LorafoldError(
            f"rewards: not used by the objective {recipe.objective}; choose one of {sampling}"
        )
    if names := [one for one in given if isinstance(one, str)]:
        options = recipe.objective_options
        options = {**options, "rewards": [*options.get("rewards", ()), *names]}
        recipe = recipe.model_copy(update={"objective_options": options})
    return recipe, tuple(one for one in given if not isinstance(one, str))


def as_rewards(rewards: RewardSources) -> list[str | Callable[..., Any]]:
    """The rewards as a list of functions and names."""
    one = isinstance(rewards, str) or callable(rewards) or not isinstance(rewards, Iterable)
    given: list[Any] = [rewards] if one else [*cast(Iterable[Any], rewards)]
    if wrong := [each for each in given if not (isinstance(each, str) or callable(each))]:
        raise LorafoldError(
            f"rewards: found {cut(repr(wrong[0]), 80)}, expected functions or names"
        )
    if names := [each for each in given if isinstance(each, str)]:
        check_names(names)
    return given


def as_prompts(data: Data, columns: ColumnNames | None = None) -> list[Row]:
    """The checked rows of prompts, which need no completion."""
    from lorafold.data.prompts import PROMPT_FORMATS  # imports transformers

    each: list[tuple[Iterable[tuple[int, Any]], str]]
    if (sources := sources_in(data)) is None:
        each = [(enumerate(cast(Sequence[Row], data), 1), source_of(data))]
    else:
        files = [file for source in map(parse_source, sources) for file in source.files]
        each = [(file.numbered_rows(), file.name) for file in files]
    return [
        row
        for rows, name in each
        for *_, row in check_each(rename_columns(rows, columns or {}), name, formats=PROMPT_FORMATS)
    ]


def as_stream(
    data: Data, columns: ColumnNames | None, console: Console | None, objective: str
) -> RowStream:
    """The stream of rows for a recipe with `streaming`."""
    from lorafold.data.stream import RowStream

    if (sources := sources_in(data)) is None:
        raise LorafoldError("streaming: found a list of rows, expected files or a Hub dataset")
    declared = OBJECTIVES[objective]
    stream = RowStream(tuple(map(parse_source, sources)), columns or {}, declared.takes)
    remarks = stream.remarks()
    messages = [source.describe() for source in stream.sources if source.is_multiple]
    messages += [*_dropped(columns), *declared.notices(stream.formats)]
    messages += [f"the first rows: {text}" for text in remarks.lines]
    if remarks.ignored:
        messages.append(_ignored([*remarks.ignored]))
    print_lines(console, *(f"{source_of(data)}: {text}" for text in messages))
    return stream


def _dropped(columns: ColumnNames | None) -> list[str]:
    names = ", ".join(name for name, column in (columns or {}).items() if not column)
    return [f"dropped by --columns: {names}"] if names else []


def _ignored(keys: Sequence[str]) -> str:
    inside = any(key.startswith("messages[]") for key in keys)
    of = "; keys of messages are passed to the chat template" if inside else ""
    return f"ignored keys: {', '.join(keys)}{of}"


def sources_in(data: Data) -> list[str] | None:
    """The sources that `data` names; None if it is a list of rows."""
    if isinstance(data, (str, Path)):
        return [str(data)]
    if isinstance(data, Mapping):
        raise LorafoldError("data: found a dict, expected a list of rows, a path or a Hub dataset")
    names = [str(item) for item in data if isinstance(item, (str, Path))]
    return names if names and len(names) == len(data) else None


def source_of(data: Data) -> str:
    return ", ".join(sources_in(data) or ["rows given in Python"])


def as_recipe(recipe: Recipe | None, default: Recipe, trains: bool = False) -> Recipe:
    """The recipe, or `default` for None; `trains` also checks the trackers."""
    if recipe is not None and not isinstance(recipe, type(default)):
        raise LorafoldError(
            f"recipe: found {type(recipe).__name__}, expected an lf.Recipe, as in lf.Recipe(rank=8)"
        )
    recipe = recipe or default
    if trains and recipe.trackers:
        check_trackers(recipe.trackers)
    return recipe


def missing(name: str) -> LorafoldError:
    """The error for a required argument that has a default because it follows `model`."""
    return LorafoldError(f"{name}: missing; this argument is required")


def as_paths(adapters: Paths) -> list[Path]:
    given: Any = adapters
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
    return [as_path(one, "adapters") for one in (given if several else [given])]


def as_path(path: str | PathLike[str], name: str = "out") -> Path:
    """The path with ~ expanded; `name` is the argument in the error message."""
    if not isinstance(path, (str, PathLike)):
        raise LorafoldError(f"{name}: found {cut(repr(path), 80)}, expected a path")
    return Path(path).expanduser()


def as_page(file: str | Path | None, name: str = "html") -> Path | None:
    from lorafold.files.atomic import check_file

    if file is None:
        return None
    place = as_path(file, name)
    check_file(place)
    return place


def as_study(out: str | Path) -> Path:
    """The directory of a study, checked to be writable and to be the one that workers share."""
    from lorafold.files.atomic import check_folder
    from lorafold.files.claims import check_token

    place = as_path(out)
    check_folder(place)
    check_token(place)
    return place


def or_shown(console: Console | Literal[False] | None) -> Console:
    """The console. None prints on a terminal and in a notebook only; False prints nothing."""
    from rich.console import Console

    if console is not None and console is not False:
        return or_quiet(console)
    shown = Console(stderr=True)
    visible = console is None and (shown.is_terminal or shown.is_jupyter)
    return shown if visible else Console(quiet=True)


def or_quiet(console: Console | None) -> Console:
    """The console, or for None one that prints nothing."""
    from rich.console import Console

    if console is not None and not isinstance(console, Console):
        raise LorafoldError(
            f"console: found {cut(repr(console), 80)}, expected a rich Console or None"
        )
    return console or Console(quiet=True)
