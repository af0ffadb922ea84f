"""Reads a user's rows, and checks that those of one file are well-formed and of one shape.

    rows = read_rows(["mine.jsonl", "other.jsonl:0.3"])       an epoch takes 0.3 of the second

Further keys are ignored, and `Rows.ignored` names them. One error message lists everything that is
wrong, each with its file, row (in a JSONL file the line, from 1), field, and what was found and
expected. Large data is checked once: its rows are kept in the cache, under the digest of the files.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from lorafold.data.json_input import SPOKEN, Row, as_known, unusable
from lorafold.data.messages import KEYS, TURN_KEYS, asks, role_of
from lorafold.data.preferences import as_turns
from lorafold.data.row_store import LARGE, ArrowRows, Origins, Rows, SourcePart, write_rows
from lorafold.data.shapes import PAIRS, PROMPTS, SHAPES, Shape, shape_of, shapes_for
from lorafold.data.sources import DataSource, source_from
from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import write_json
from lorafold.files.cache import cached

log = logging.getLogger(__name__)
Notice = Callable[[str], None]
ASKED = {
    *("prompt", "question", "query", "instruction", "input", "user", "q"),
    *("frage", "eingabe", "anfrage"),
}
SAID = {
    *("completion", "answer", "response", "output", "reply", "assistant", "a"),
    *("antwort", "ausgabe"),
}
WORDED = re.compile(r"[^\W\d_]")  # a text with a letter is no number or date
GUESS = " (a guess by their order, if the file begins with names)"
PLAIN = {"system", "user", "assistant", "tool", "developer"}
SHOWN = 5  # roles that one line names
# what databases, spreadsheets and pandas write where there is nothing, or a wrong formula
NOTHING = {
    *("NULL", "null", "None", "NaN", "nan", "\\N"),
    *("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!"),
}
LONGEST = max(map(len, NOTHING))
AS_WORD = "which is read as that word and not as an empty cell"
BLANK = "rows are blank and are left out"
UNANSWERED = "rows have an empty answer and are left out (weight: 1 in its message keeps one)"
LEFT = "assistant turns are not trained on, as their rows say"
OTHERS = "turns that rows want trained are not of the assistant, and are not trained on"
AS_THEY_ARE = "messages go to the chat template with roles of their own, and are not trained on"


@dataclass
class Noticed:
    """Gathers what there is to say of rows that are good, row by row: `ignored` are the keys that
    are no part of shapes, as they appear (messages[].id for one inside), and `told` all else.

    wanted: What is asked of the rows, of what shapes give.
    """

    wanted: str = ""
    ignored: dict[str, None] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _roles: dict[str, Counter[str]] = field(default_factory=dict)  # by what becomes of them

    def left_out(self, row: Any, place: str, shape: Shape | None = None) -> bool:
        """Whether a row is left out: it has nothing in any of its fields, as spreadsheets have
        them, or an empty answer where answers are needed.
        """
        if shape is None:
            values = row.values() if isinstance(row, dict) else [row]
            filled = (x.strip() if isinstance(x, str) else x is not None for x in values)
            why, out = BLANK, not any(filled)
        else:
            why, out = UNANSWERED, self.wanted != PROMPTS and not shape.answered(row)
        if out:
            self._counts[why] += 1
            self._first.setdefault(why, f"; the first: {place}")
        return out

    def add(self, shape: Shape, row: Row) -> None:
        """Look at one more row that is used."""
        for key, value in row.items():
            if value is None:
                continue
            if key not in shape.known:
                self.ignored[key] = None
            elif isinstance(value, str):
                if len(value) <= LONGEST and value in NOTHING and key != "label":
                    self._counts[f"texts of {key} are {value!r} alone, {AS_WORD}"] += 1
            elif key in SPOKEN and isinstance(value, list):
                for message in value:
                    self._look(f"{key}[]", message)
            elif key in SPOKEN and isinstance(value, dict):
                self._look(key, value)
        if PAIRS in shape.gives and (remark := as_turns(row)):
            self._counts[remark] += 1

    def _look(self, name: str, message: dict[str, Any]) -> None:
        turn = "from" in message
        role = message["from" if turn else "role"]
        content = message.get("content")
        if role in PLAIN and len(message) == 2 and not isinstance(content, list):
            return
        known = TURN_KEYS if turn else KEYS
        for key, value in message.items():
            if key not in known and value is not None:
                self.ignored[f"{name}.{key}"] = None
        for part in content if isinstance(content, list) else ():
            for key in sorted(part.keys() - {"type", "text"}):
                if part[key] is not None:
                    self.ignored[f"{name}.content[].{key}"] = None
        meant, asked = role_of(role), asks(message)
        if meant == "assistant" and asked is False:
            self._counts[LEFT] += 1
        elif meant != "assistant" and asked:
            self._counts[OTHERS] += 1
        if not turn and role not in PLAIN:
            what = f"messages are read as those of {meant}" if meant in PLAIN else AS_THEY_ARE
            self._roles.setdefault(what, Counter())[role] += 1

    @property
    def told(self) -> tuple[str, ...]:
        """What else there is to say, in one line each."""
        counts = self._counts.items()
        found = [f"{count:,} {what}{self._first.get(what, '')}" for what, count in counts]
        for what, roles in self._roles.items():
            named = ", ".join(map(repr, list(roles)[:SHOWN]))
            more = f" and {len(roles) - SHOWN} more" if len(roles) > SHOWN else ""
            found.append(f"{roles.total():,} {what}: {named}{more}")
        return tuple(found)


def proposed(row: Row) -> str:
    """The option `--columns` to try for a row of no known shape: known names first, else the first
    and the last column of text, marked as a guess. Empty where there is no plain guess.
    """
    texts = [key for key, value in row.items() if isinstance(value, str) and WORDED.search(value)]
    asked, said = ([k for k in texts if k.strip().lower() in names] for names in (ASKED, SAID))
    guess = ""
    if not len(asked) == len(said) == 1:
        if len(texts) != 2:
            return ""
        (asked, said), guess = (texts[:1], texts[1:]), GUESS
    names = {"prompt": asked[0], "completion": said[0]}
    pairs = [f"{name}={column}" for name, column in names.items() if name != column]
    if any("," in pair or pair != pair.strip() for pair in pairs) or not pairs:
        return ""  # `columns_of` could not read them
    return f"did you mean --columns {shlex.quote(','.join(pairs))}{guess}"


def renamed(
    numbered: Iterable[tuple[int, Any]], columns: Mapping[str, str]
) -> Iterator[tuple[int, Any]]:
    """Numbered rows whose keys have other names: the value under `columns[name]` is then under
    `name`. A key of which there is no other name is dropped. A row that lacks one of these keys, or
    has a value under `name` too, which would be lost, becomes the reason why it can't be read.
    """
    if not columns:
        yield from numbered
        return
    names = {name: key for name, key in columns.items() if key}
    dropped = [name for name in columns if name not in names]
    theirs = {*names.values(), *dropped}
    for number, row in numbered:
        if not isinstance(row, dict):
            yield number, row
        elif missing := [key for key in (*names.values(), *dropped) if key not in row]:
            keys = listed(map(repr, row), room=100) or "none"
            there = {*columns} <= {*row} and all(names.values())
            turned = ",".join(f"{key}={name}" for name, key in names.items())
            has = f"; it has {keys}{meant(names, row)}"
            hint = f"; NAME=COLUMN is --columns {turned}" if there else has
            yield number, f"found no column {listed(map(repr, missing), room=80)}{hint}"
        elif lost := [name for name in names if name in row and name not in theirs]:
            pairs = ", ".join(f"{name}={names[name]}" for name in lost)
            yield number, f"--columns {pairs}: the row has a column {', '.join(lost)} as well"
        else:
            rest = {key: value for key, value in row.items() if key not in theirs}
            yield number, rest | {name: row[key] for name, key in names.items()}


def meant(names: Mapping[str, str], row: Mapping[str, Any]) -> str:
    """A question, after a semicolon, for the columns whose names are nearest to those that a row
    has not; empty where one of these has none.
    """
    near = {
        name: key if key in row else next(iter(get_close_matches(key, map(str, row), 1)), "")
        for name, key in names.items()
    }
    turned = ",".join(f"{name}={key}" for name, key in near.items())
    return f"; did you mean --columns {turned}?" if near and all(near.values()) else ""


def checked(
    numbered: Iterable[tuple[int, Any]],
    source: str,
    at_once: bool = False,
    shapes: Sequence[Shape] = SHAPES,
    none: bool = False,
    noticed: Noticed | None = None,
) -> Iterator[tuple[int, Shape, Row]]:
    """Yield the rows that are well-formed and of the first one's shape, with the keys by which
    shapes know them, each after its number and the shape.

    After the last row, raises LorafoldError that lists the first bad rows, or says that there is no
    row.
    """
    bad: dict[str, list[int]] = {}  # the rows by what is wrong with them
    first: tuple[int, Shape] | None = None
    used = False  # of any row
    for number, given in numbered:
        place = f"{source}: row {number}"
        if noticed and noticed.left_out(given, place):
            continue
        row = as_known(given)
        if isinstance(row, str):
            problems = [row]
        elif (shape := shape_of(row, shapes)) is None:
            problems = [*_shapeless(row, shapes)]
        else:
            first = first or (number, shape)
            problems = list(shape.problems(row))
            nulls = [key for key in first[1].keys if key in row and row[key] is None]
            if shape is not first[1] and nulls:
                problems += _null(nulls, first[1])
            elif shape is not first[1]:
                problems.append(f"shape {shape}, but row {first[0]} has {first[1]}")
            if not (problems or bad or (noticed and noticed.left_out(row, place, shape))):
                if noticed:
                    noticed.add(shape, row)
                used = True
                yield number, shape, row
        for problem in problems:
            bad.setdefault(problem, []).append(number)
        if bad and at_once:
            break
    told = []
    for problem, numbers in bad.items():
        one, last = numbers[0], numbers[-1]
        rows = f"{len(numbers)} rows from {one} to {last}"
        if last - one == len(numbers) - 1:
            rows = f"row {one}" if one == last else f"rows {one} to {last}"
        told.append(f"{rows}: {problem}")
    if bad:
        raise LorafoldError(f"{source}: {listed(told, '; ')}")
    if not used and not none:
        out = "".join(f"; {text}" for text in noticed.told) if noticed else ""
        raise LorafoldError(f"{source}: no rows found, expected at least one{out}")


def _shapeless(row: Row, shapes: Sequence[Shape]) -> Iterator[str]:
    """What is wrong with a row of no shape: it has all keys of one, and some without a value, or it
    lacks keys.
    """
    near = [shape for shape in shapes if all(key in row for key in shape.keys)]
    if near:
        nearest = max(near, key=lambda shape: sum(row[key] is not None for key in shape.keys))
        yield from _null((key for key in nearest.keys if row[key] is None), nearest)
        return
    keys = listed(map(repr, row), room=80) or "none"
    guess = proposed(row)
    known = listed(shapes, room=40 if guess else 90)
    renames = f"; {guess}" if guess else " (--columns renames)"
    yield f"keys found: {keys}; expected one of {known}{renames}"


def _null(keys: Iterable[str], shape: Shape) -> Iterator[str]:
    """That these keys have no value."""
    for key in keys:
        yield f"field {key}: found null, expected a value, as rows of {shape} have one"


def check_given(shapes: Iterable[Shape | None], what: str) -> None:
    """Raise LorafoldError if one of the shapes does not give what is taken of its rows."""
    for shape in shapes:
        if shape is None or what not in shape.gives:
            expected = " or ".join(str(known) for known in SHAPES if what in known.gives)
            raise LorafoldError(f"data: found rows of {shape}, expected rows of {expected}")


def _reading(
    sources: Sequence[DataSource],
    columns: Mapping[str, str],
    wanted: str,
    notice: Notice,
    about: dict[str, Any],
) -> Iterator[Row]:
    """The rows of sources as they are read."""
    parts, files, runs = list[list[int]](), list[list[int]](), list[list[int]]()
    noticed, shapes, guessed = Noticed(wanted), shapes_for(wanted), list[str]()
    for number, source in enumerate(sources):
        last = None
        for file in source.files:
            files.append([number, 0])
            begins, none = True, source.several
            numbered = renamed(file.numbered(guessed.append), columns)
            for place, shape, row in checked(numbered, file.name, False, shapes, none, noticed):
                if shape is not last:  # files of one source and one shape are one part
                    parts.append([number, 0])
                    last = shape
                if begins or place != sum(runs[-1][1:]):
                    runs.append([len(files) - 1, place, 0])
                    begins = False
                for count in (runs[-1], parts[-1], files[-1]):
                    count[-1] += 1
                if files[-1][1] % 100_000 == 0:
                    notice(f"{file.name}: {files[-1][1]:,} rows read")
                yield row
        if last is None:
            raise LorafoldError(f"{source.name}: no rows found, expected at least one")
    about |= {"parts": parts, "files": files, "runs": runs, "guessed": guessed}
    about |= {"ignored": [*noticed.ignored], "told": noticed.told}


def read_rows(
    sources: str | Sequence[str],
    columns: Mapping[str, str] | None = None,
    notice: Notice = lambda text: None,
    wanted: str = "",
) -> Rows:
    """Read the rows of one or several sources: files, directories and patterns that stand for
    files, or hub datasets (their train split). SOURCE:0.3 gives a source a weight.
    """
    named = [source_from(text) for text in ([sources] if isinstance(sources, str) else sources)]
    columns, about, known = columns or {}, dict[str, Any](), None
    size = sum(source.size for source in named)
    reading = partial(_reading, named, columns, wanted, notice)
    if size <= LARGE:
        rows: Sequence[Row] = list(reading(about))
    else:

        def write(directory: Path) -> None:
            notice(f"reading {size / 1e9:.2f} GB of rows; they are kept in {directory.parent}")
            about = dict[str, Any]()
            sha256, written = write_rows(reading(about), directory / "rows.arrow")
            known = {"sha256": sha256, "bytes": written}
            write_json(directory / "about.json", about | known)

        from lorafold.identity import of_code  # which loads torch

        code = of_code("data", packages=("datasets", "pyarrow"))
        identities = [[source.several, source.identity] for source in named]
        key = json.dumps([code, identities, sorted(columns.items()), wanted])
        path = cached("rows", key, write, notice)
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
        rows, known = ArrowRows(path / "rows.arrow"), (about["sha256"], about["bytes"])
    parts = tuple(SourcePart(count, named[n].weight) for n, count in about["parts"])
    for guessed in about["guessed"]:
        log.warning(guessed)
    counts = [count for _, count in about["files"]]
    files = dict[str, int]()
    for source in named:
        of = dict(zip((file.name for file in source.files), counts, strict=False))
        del counts[: len(of)]
        if source.several:
            notice(f"{source.name}: {source.told(of)}")
            files |= of
    names = [file.name for source in named for file in source.files]
    origins = Origins(tuple((names[n], first, count) for n, first, count in about["runs"]))
    ignored, told = tuple(about["ignored"]), tuple(about["told"])
    return Rows(rows, parts, ignored, known, wanted, told, files, origins)


def as_checked(rows: Sequence[Row], wanted: str = "") -> Rows:
    """Rows of which some may not have been checked yet; their source is named "data"."""
    return rows if isinstance(rows, Rows) else check_rows(enumerate(rows, 1), "data", wanted)


def check_rows(numbered: Iterable[tuple[int, Any]], source: str, wanted: str = "") -> Rows:
    """Return rows, once they are known to be well-formed and of one shape."""
    noticed, found, runs = Noticed(wanted), list[Row](), list[list[int]]()
    usable = ((n, (unusable(row) or row) if isinstance(row, dict) else row) for n, row in numbered)
    for place, _, row in checked(usable, source, shapes=shapes_for(wanted), noticed=noticed):
        found.append(row)
        if not runs or place != sum(runs[-1]):
            runs.append([place, 0])
        runs[-1][1] += 1
    parts, origins = (SourcePart(len(found)),), Origins(tuple(("", first, n) for first, n in runs))
    ignored = tuple(noticed.ignored)
    return Rows(found, parts, ignored, None, wanted, noticed.told, origins=origins)
