"""Conversion and validation of the arguments of public functions.

This module must not import torch, nor transformers before rows are read, so that errors in rows are
reported before these slow imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lorafold.api.options import ColumnNames, Data, Paths, RewardSources
from lorafold.data.formats import PAIRS
from lorafold.data.json_input import Row
from lorafold.data.row_sources import AS_IS, Reading, numbered_rows, parse_source, rename_columns
from lorafold.data.row_store import Rows
from lorafold.data.rows import check_each, check_rows, read_rows
from lorafold.errors import LorafoldError, truncate
from lorafold.files.terminal import print_lines
from lorafold.objectives import DEFAULT, OBJECTIVES
from lorafold.recipe.parsing import check_trackers
from lorafold.rewards.reward import check_names, weighted

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.data.stream import RowStream
    from lorafold.recipe.recipe import Recipe

PATH = str | Path
STEPS, TEST_ROWS = 60, 100  # the quickstart task's training steps and held-out rows


def as_rows(
    data: Data,
    reading: Reading = AS_IS,
    console: Console | None = None,
    objective: str | None = DEFAULT,
    recipe: Recipe | None = None,
) -> Rows:
    """Reads the rows if `data` contains paths or dataset names, checks them, and prints ignored
    keys. If `objective` is None, preference rows keep both completions. With `recipe`, they are
    training rows, which may have weights and are joined.
    """
    objective = recipe.objective if recipe else objective
    entry, label = None if objective is None else OBJECTIVES[objective], source_label(data)
    content = PAIRS if entry is None else entry.takes  # both completions of preferences
    if (sources := source_names(data)) is not None:
        rows = read_rows(sources, reading, lambda text: print_lines(console, text), content)
    else:
        numbered = enumerate(data, 1) if isinstance(data, list) else numbered_rows(data, label)
        if reading.columns:
            numbered = rename_columns(numbered, reading.columns)
        rows = check_rows(numbered, label, content)
    if recipe is None and any(part.weight != 1 for part in rows.parts):
        raise LorafoldError(f"{label}: only training rows may have a weight (FILE:0.3); remove it")
    dropped = _dropped_columns(reading.columns) if reading.columns else []
    messages = [*dropped, *rows.remarks]
    ignored: Sequence[str] = rows.ignored
    if entry is not None:
        messages += entry.notices(rows.formats)
        ignored = [] if entry.draws else [key for key in ignored if key not in entry.keys]
    if ignored:
        messages.insert(0, f"{_ignored_keys(ignored)} (rows of {rows.formats[0]})")
    if recipe is not None and recipe.join == "auto":
        from lorafold.data.batches import join_questions

        rows, text = join_questions(rows, recipe.seed, recipe.max_length)
        messages += [text] * bool(text)
    print_lines(console, *(f"{label}: {text}" for text in messages))
    return rows


def as_reading(options: Any) -> Reading:
    """Removes `DataOptions` from the options of a function, and returns them."""
    given = {name: options.pop(name, None) for name in Reading._fields}
    reading = Reading(**{name: value for name, value in given.items() if value})
    columns: Any = reading.columns
    if not isinstance(columns, Mapping) or not all(type(x) is str for x in columns.values()):
        raise LorafoldError(f"columns: found {columns!r:.80}, expected a mapping of names")
    try:
        b"x".decode(reading.encoding or "utf-8", "replace")
    except LookupError as error:
        raise LorafoldError(
            f"encoding: found {reading.encoding!r}, expected an encoding that Python knows, for"
            " example cp1252, mac_roman or cp932"
        ) from error
    return reading


def train_and_test(
    data: Data | None,
    eval_data: Data | None,
    recipe: Recipe,
    reading: Reading,
    console: Console,
    rewarded: bool = False,
) -> tuple[Sequence[Row], Sequence[Row], str]:
    """Returns training rows, held-out rows and a description of their source. If `data` is None,
    they come from the quickstart task. With `rewarded`, objectives that sample completions are
    accepted too.
    """
    from lorafold.data.batches import split
    from lorafold.quickstart.task import rows as quickstart_rows

    supported = [n for n, one in OBJECTIVES.items() if one.compared and (rewarded or not one.draws)]
    if recipe.objective not in supported:
        raise LorafoldError(
            f"objective: found {recipe.objective}, expected one that this command supports:"
            f" {' or '.join(supported)}"
        )
    if recipe.streaming:
        raise LorafoldError("streaming: only for lorafold train; this command keeps rows in memory")
    if data is None:
        made = quickstart_rows("train", recipe.batch * (recipe.steps or STEPS), 0)
        train = as_rows(made, console=console, recipe=recipe)
        return train, quickstart_rows("test", TEST_ROWS, 0), "the quickstart's task"
    objective = recipe.objective
    rows = as_rows(data, reading, console, recipe=recipe)
    if eval_data is not None:
        return rows, as_rows(eval_data, reading, console, objective=objective), source_label(data)
    return *split(rows, recipe.eval_fraction or 0.1, recipe.seed), source_label(data)


def with_rewards(
    recipe: Recipe, rewards: RewardSources, environment: Any = ""
) -> tuple[Recipe, tuple[Callable[..., Any], ...], Any]:
    """Adds rewards and an environment that are names to the recipe; returns it, and those that are
    Python objects.
    """
    reward_list = as_rewards(rewards)
    if (reward_list or environment) and not OBJECTIVES[recipe.objective].draws:
        sampling = " or ".join(name for name, one in OBJECTIVES.items() if one.draws)
        what = "rewards" if reward_list else "environment"
        raise LorafoldError(
            f"{what}: not used by the objective {recipe.objective}; choose objective {sampling}"
        )
    options = {**recipe.objective_options}
    if names := [one for one in reward_list if isinstance(one, str)]:
        options["rewards"] = [*options.get("rewards", ()), *names]
    if isinstance(environment, str) and environment:
        options["environment"], environment = environment, ""
    if options != recipe.objective_options:
        recipe = recipe.model_copy(update={"objective_options": options})
    return recipe, tuple(one for one in reward_list if not isinstance(one, str)), environment


def as_rewards(rewards: RewardSources) -> list[str | Callable[..., Any]]:
    is_single = isinstance(rewards, str) or callable(rewards) or not isinstance(rewards, Iterable)
    given: list[Any] = [rewards] if is_single else [*cast(Iterable[Any], rewards)]
    is_pair = len(given) == 2 and isinstance(given[0], int | float)
    reward_list = [*map(weighted, [tuple(given)] if is_pair else given)]
    if wrong := [entry for entry in reward_list if not (isinstance(entry, str) or callable(entry))]:
        raise LorafoldError(
            f"rewards: found {truncate(repr(wrong[0]), 80)}, expected functions or names, or pairs"
            " of a weight and one of them"
        )
    if names := [entry for entry in reward_list if isinstance(entry, str)]:
        check_names(names)
    return reward_list


def as_prompts(data: Data, reading: Reading = AS_IS) -> list[Row]:
    """Reads and checks rows of prompts; their completions are optional."""
    from lorafold.data.prompts import PROMPT_FORMATS  # imports transformers

    inputs: list[tuple[Iterable[tuple[int, Any]], str]]
    if (sources := source_names(data)) is None:
        given = numbered_rows(data, source_label(data))
        inputs = [(rename_columns(given, reading.columns), source_label(data))]
    else:
        parsed = [parse_source(text, reading) for text in sources]
        files = [file for source in parsed for file in source.files]
        inputs = [(file.numbered_rows(), file.name) for file in files]
    return [
        row
        for rows, label in inputs
        for *_, row in check_each(rows, label, False, PROMPT_FORMATS)
    ]


def as_stream(
    data: Data, reading: Reading, console: Console | None, objective: str
) -> RowStream:
    from lorafold.data.stream import RowStream

    if (sources := source_names(data)) is None:
        raise LorafoldError("streaming: found rows, expected files or the name of a Hub dataset")
    entry = OBJECTIVES[objective]
    stream = RowStream(tuple(parse_source(text, reading) for text in sources), entry.takes)
    remarks = stream.remarks()
    messages = [source.describe() for source in stream.sources if source.is_multiple]
    messages += [*_dropped_columns(reading.columns), *entry.notices(stream.formats)]
    messages += [f"the first rows: {text}" for text in remarks.lines]
    if remarks.ignored:
        messages.append(_ignored_keys([*remarks.ignored]))
    print_lines(console, *(f"{source_label(data)}: {text}" for text in messages))
    return stream


def _dropped_columns(columns: ColumnNames) -> list[str]:
    names = ", ".join(name for name, column in columns.items() if not column)
    return [f"dropped by --columns: {names}"] if names else []


def _ignored_keys(keys: Sequence[str]) -> str:
    in_messages = any(key.startswith("messages[]") for key in keys)
    hint = "; keys of messages are passed to the chat template" if in_messages else ""
    return f"ignored keys: {', '.join(keys)}{hint}"


def source_names(data: Data) -> list[str] | None:
    """Returns the paths and dataset names in `data`, or None if it contains rows."""
    if isinstance(data, PATH):
        return [str(data)]
    if not isinstance(data, Iterable | Sized):
        raise LorafoldError(
            f"data: found {truncate(repr(data), 80)}, expected rows, a path or a Hub dataset"
        )
    items = data if isinstance(data, list | tuple) else ()
    names = [str(item) for item in items if isinstance(item, PATH)]
    return names if names and len(names) == len(items) else None


def source_label(data: Data) -> str:
    return ", ".join(source_names(data) or ["rows given in Python"])


def as_recipe(recipe: Recipe | None, default: Recipe, trains: bool = False) -> Recipe:
    """Returns the recipe, or `default` if it is None. With `trains`, also checks that its trackers
    are installed.
    """
    if recipe is not None and not isinstance(recipe, type(default)):
        raise LorafoldError(
            f"recipe: found {type(recipe).__name__}, expected an lf.Recipe, as in lf.Recipe(rank=8)"
        )
    recipe = recipe or default
    if trains and recipe.trackers:
        check_trackers(recipe.trackers)
    return recipe


def missing_argument(name: str) -> LorafoldError:
    """Returns the error for a required argument that has a default only because `model` has one."""
    return LorafoldError(f"{name}: missing; this argument is required")


def as_paths(adapters: Paths) -> list[Path]:
    paths: Any = adapters
    is_sequence = isinstance(paths, Iterable) and not isinstance(paths, (str, bytes))
    return [as_path(path, "adapters") for path in (paths if is_sequence else [paths])]


def as_path(path: str | PathLike[str], name: str = "out") -> Path:
    """Expands ~ in a path; `name` is the argument's name in the error message."""
    if not isinstance(path, (str, PathLike)):
        raise LorafoldError(f"{name}: found {truncate(repr(path), 80)}, expected a path")
    return Path(path).expanduser()


def as_html_path(file: str | Path | None, name: str = "html") -> Path | None:
    from lorafold.files.atomic import check_file

    if file is None:
        return None
    path = as_path(file, name)
    check_file(path)
    return path


def as_study_path(out: str | Path) -> Path:
    """Returns the directory of a study after checking that it is writable and, in a cluster worker,
    that all workers share it.
    """
    from lorafold.files.atomic import check_folder
    from lorafold.files.claims import check_token

    path = as_path(out)
    check_folder(path)
    check_token(path)
    return path


def console_or_default(console: Console | Literal[False] | None) -> Console:
    """Returns the console, or for None a console that prints only on a terminal or in a notebook,
    or for False a console that prints nothing.
    """
    from rich.console import Console

    if console is not None and console is not False:
        return console_or_quiet(console)
    stderr = Console(stderr=True)
    is_visible = console is None and (stderr.is_terminal or stderr.is_jupyter)
    return stderr if is_visible else Console(quiet=True)


def console_or_quiet(console: Console | None) -> Console:
    from rich.console import Console

    if console is not None and not isinstance(console, Console):
        raise LorafoldError(
            f"console: found {truncate(repr(console), 80)}, expected a rich Console or None"
        )
    return console or Console(quiet=True)
