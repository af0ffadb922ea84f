"""What a verb is given: rows, paths of adapters, a console.

Nothing here imports torch, nor transformers before rows are read, so that what is wrong with them
is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lorafold.api.options import Data, Named, Paths, Rewarding
from lorafold.data.row_store import Rows
from lorafold.data.rows import check_rows, read_rows, renamed
from lorafold.data.shapes import PAIRS
from lorafold.data.sources import Row, source_from
from lorafold.errors import LorafoldError, cut
from lorafold.objectives import DEFAULT, OBJECTIVES, named
from lorafold.recipe.parsing import check_trackers
from lorafold.rewards.judging import check_there

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.data.stream import RowStream
    from lorafold.recipe.recipe import Recipe


def as_rows(
    data: Data,
    columns: Named | None = None,
    console: Console | None = None,
    weighted: bool = False,
    objective: str | None = DEFAULT,
) -> Rows:
    """The rows, after they are read, if sources are named, and checked.

    Args:
        data: A file, a directory or a hub dataset, several of them, or the rows themselves.
        columns: The user's names of keys, by lorafold's, as in {"prompt": "question"}; "" drops a
            key.
        console: Where the keys are named that the rows have and lorafold ignores, and what else
            there is to say of rows of this shape.
        weighted: Whether sources may have weights, as in rows.jsonl:0.3.
        objective: What is trained on the rows; None for what reads all that they have.

    Raises LorafoldError for bad rows and for a source that can't be read.
    """

    def notice(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    declared = None if objective is None else OBJECTIVES[objective]
    wanted = PAIRS if declared is None else declared.takes  # all that rows have: both answers
    if (sources := sources_in(data)) is not None:
        rows = read_rows(sources, columns, notice, wanted)
    else:
        numbered: Iterable[tuple[int, Any]] = enumerate(cast(Sequence[Row], data), 1)
        numbered = renamed(numbered, columns) if columns else numbered
        rows = check_rows(numbered, source_of(data), wanted)
    if not weighted and any(part.weight != 1 for part in rows.parts):
        raise LorafoldError(f"{source_of(data)}: found a weight, which only training rows may have")
    read = () if declared is None else declared.keys
    told = [*(_dropped(columns) if columns else ()), *rows.remarks]
    if declared is not None:
        told += declared.told(rows.shapes)
    everything = declared is not None and declared.draws
    if ignored := [key for key in rows.ignored if key not in read and not everything]:
        told.insert(0, f"{_ignored(ignored)} (rows of {rows.shapes[0]})")
    for text in told:
        notice(f"{source_of(data)}: {text}")
    return rows


def with_rewards(
    recipe: Recipe, rewards: Rewarding
) -> tuple[Recipe, tuple[Callable[..., Any], ...]]:
    """The recipe with the rewards that are named, and those that are functions.

    Raises LorafoldError for rewards of an objective that takes none.
    """
    given = as_rewards(rewards)
    if given and not OBJECTIVES[recipe.objective].draws:
        drawing = named(name for name, one in OBJECTIVES.items() if one.draws)
        raise LorafoldError(
            f"rewards: the objective {recipe.objective} takes none; expected {drawing}"
        )
    names = [one for one in given if isinstance(one, str)]
    if names:
        options = recipe.objective_options
        before = options.get("rewards", ())
        recipe = recipe.model_copy(
            update={"objective_options": {**options, "rewards": [*before, *names]}}
        )
    return recipe, tuple(one for one in given if not isinstance(one, str))


def as_rewards(rewards: Rewarding) -> list[str | Callable[..., Any]]:
    """The rewards as a list, also if there is only one. Raises LorafoldError for what can't be one.
    """
    one = isinstance(rewards, str) or not isinstance(rewards, Iterable)
    given: list[Any] = [rewards] if one or callable(rewards) else [*cast(Iterable[Any], rewards)]
    if wrong := [each for each in given if not (isinstance(each, str) or callable(each))]:
        found = cut(repr(wrong[0]), 80)
        raise LorafoldError(f"rewards: found {found}, expected functions or names")
    if names := [one for one in given if isinstance(one, str)]:
        check_there(names)
    return given


def as_prompts(data: Data, columns: Named | None = None) -> list[Row]:
    """Prompts, whose rows need no completion, after they are read, if sources are named, and
    checked.

    Args:
        data: As for `as_rows`.
        columns: The user's names of keys, by lorafold's.

    Raises LorafoldError for bad rows and for a source that can't be read.
    """
    from lorafold.data.prompts import read_prompts  # and with it transformers

    if (sources := sources_in(data)) is None:
        given = enumerate(cast(Sequence[Row], data), 1)
        return read_prompts(given, columns or {}, source_of(data))
    files = [file for source in map(source_from, sources) for file in source.files]
    return [r for f in files for r in read_prompts(f.numbered(), columns or {}, f.name)]


def as_stream(
    data: Data, columns: Named | None, console: Console | None, objective: str
) -> RowStream:
    """The stream of the rows that a recipe with `streaming` trains on.

    Args:
        data: The names of sources, as for `as_rows`.
        columns: The user's names of keys, by lorafold's.
        console: Where ignored keys are named.
        objective: What is trained on the rows.

    Raises LorafoldError for bad rows and for sources that can't be read.
    """
    from lorafold.data.stream import stream_of

    if (sources := sources_in(data)) is None:
        raise LorafoldError("streaming: found rows given in Python, expected the name of a source")
    declared = OBJECTIVES[objective]
    stream = stream_of(sources, columns, declared.takes)
    remarks = stream.remarks()
    told = [source.described() for source in stream.sources if source.several]
    told += [*(_dropped(columns) if columns else ()), *declared.told(stream.shapes)]
    told += [f"the first rows: {text}" for text in remarks.lines]
    if remarks.ignored:
        told.append(_ignored([*remarks.ignored]))
    if console is not None:
        for text in told:
            line = f"{source_of(data)}: {text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return stream


def _dropped(columns: Named) -> list[str]:
    """What a user is told of columns without another name."""
    names = ", ".join(name for name, column in columns.items() if not column)
    return [f"dropped by --columns: {names}"] if names else []


def _ignored(keys: Sequence[str]) -> str:
    """What a user is told of keys that are no part of rows."""
    inside = any(key.startswith("messages[]") for key in keys)
    of = "; those of messages go to the chat template" if inside else ""
    return f"ignored keys: {', '.join(keys)}{of}"


def sources_in(data: Data) -> list[str] | None:
    """The sources that data names, or None for the rows themselves."""
    if isinstance(data, (str, Path)):
        return [str(data)]
    named = [item for item in data if isinstance(item, (str, Path))]
    return [str(item) for item in named] if named and len(named) == len(data) else None


def source_of(data: Data) -> str:
    """The source of the rows, for records and messages."""
    return ", ".join(sources_in(data) or ["rows given in Python"])


def as_recipe(recipe: Recipe | None, default: Recipe, trains: bool = False) -> Recipe:
    """The recipe, or the default for None. Raises LorafoldError for anything else, and of one that
    trains for trackers that there are not.
    """
    if recipe is not None and not isinstance(recipe, type(default)):
        raise LorafoldError(
            f"recipe: found {type(recipe).__name__}, expected an lf.Recipe, as in lf.Recipe(rank=8)"
        )
    found = default if recipe is None else recipe
    if trains and found.trackers:
        check_trackers(found.trackers)
    return found


def missing(name: str) -> LorafoldError:
    """The error for an argument that has no default besides `model`, which stands before it."""
    return LorafoldError(f"{name}: found none, expected it")


def as_paths(adapters: Paths) -> list[Path]:
    """The paths as a list, also if there is only one. Raises LorafoldError for anything else."""
    given: Any = adapters
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
    return [as_path(one, "adapters") for one in (given if several else [given])]


def as_path(path: str | PathLike[str], name: str = "out") -> Path:
    """The path, with ~ as the user's home. Raises LorafoldError for what is none.

    Args:
        name: Of the argument, for the message.
    """
    if not isinstance(path, (str, PathLike)):
        raise LorafoldError(f"{name}: found {cut(repr(path), 80)}, expected a path")
    return Path(path).expanduser()


def as_page(file: str | Path | None, name: str = "html") -> Path | None:
    """The file of a page, or None. Raises LorafoldError for one that can't be written.

    Args:
        name: Of the argument, for the message.
    """
    from lorafold.files.atomic import check_file

    if file is None:
        return None
    place = as_path(file, name)
    check_file(place)
    return place


def as_console(console: Console | None) -> Console | None:
    """The console. Raises LorafoldError for what is none."""
    from rich.console import Console

    if console is not None and not isinstance(console, Console):
        found = cut(repr(console), 80)
        raise LorafoldError(f"console: found {found}, expected a rich Console or None")
    return console


def or_shown(console: Console | Literal[False] | None) -> Console:
    """The console, for None one that shows progress where somebody looks, on a terminal or in a
    notebook, and else nothing, as for False.
    """
    from rich.console import Console

    if console is not None and console is not False:
        as_console(console)
        return console
    found = Console(stderr=True)
    quiet = console is False or not (found.is_terminal or found.is_jupyter)
    return Console(quiet=True) if quiet else found


def or_quiet(console: Console | None) -> Console:
    """The console, or for None one that prints nothing."""
    from rich.console import Console

    return as_console(console) or Console(quiet=True)
