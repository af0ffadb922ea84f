"""Reads rows and checks that the rows of each file are valid and have one format.

One message lists all problems. Large data is checked once and cached under the digest of its files.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorafold.data.exports import LAYOUT_KEYS, convert_layout
from lorafold.data.formats import (
    PAIRS,
    PROMPTS,
    ROW_FORMATS,
    RowFormat,
    format_of,
    formats_for,
    split_remark,
)
from lorafold.data.json_input import MESSAGE_KEYS, Row, find_unusable, normalize_row
from lorafold.data.messages import KNOWN_KEYS, TURN_KEYS, role_of, trains
from lorafold.data.row_sources import AS_IS, DataSource, Reading, parse_source
from lorafold.data.row_store import MAX_IN_MEMORY, ArrowRows, Origins, Rows, SourcePart, write_rows
from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import write_json
from lorafold.files.cache import cache_entry

log = logging.getLogger(__name__)
Notice = Callable[[str], None]
QUESTIONS = {
    *("prompt", "question", "query", "instruction", "input", "user", "q"),
    *("frage", "eingabe", "anfrage"),
}
ANSWERS = {
    *("completion", "answer", "response", "output", "reply", "assistant", "a"),
    *("antwort", "ausgabe"),
}
LETTER = re.compile(r"[^\W\d_]")  # distinguishes text from numbers and dates
BY_ORDER = " (guessed from the order of the columns; a CSV file needs a header)"
ROLES = {"system", "user", "assistant", "tool", "developer"}
# texts that databases, spreadsheets and pandas write for empty cells and formula errors
EMPTY_TEXTS = {
    *("NULL", "null", "None", "NaN", "nan", "\\N"),
    *("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!"),
}
MAX_EMPTY = max(map(len, EMPTY_TEXTS))
AS_WORD = "which is not treated as an empty cell"
BLANK = "rows are blank and are left out"
UNANSWERED = "rows have an empty answer and are left out (to keep one, set weight: 1 in a message)"
EXCLUDED = "assistant turns are not trained on, because their rows exclude them"
WRONG_ROLE = "turns that rows mark for training are not assistant turns, and are not trained on"
UNKNOWN_ROLE = "messages have an unknown role, passed to the chat template, and are not trained on"


@dataclass
class RowRemarks:
    """Collects remarks on valid rows: `ignored` keys, such as messages[].id, and other `lines`.
    `content` is the kind of data that formats must provide.
    """

    content: str = ""
    ignored: dict[str, None] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _roles: dict[str, Counter[str]] = field(default_factory=dict)  # by the remark about them

    def is_skipped(self, row: Any, place: str, row_format: RowFormat | None = None) -> bool:
        """Whether to skip a row, because it is blank or because a required answer is empty."""
        if row_format is None:
            values = row.values() if isinstance(row, dict) else [row]
            filled = (x.strip() if isinstance(x, str) else x is not None for x in values)
            why, skip = BLANK, not any(filled)
        else:
            why, skip = UNANSWERED, self.content != PROMPTS and not row_format.has_answers(row)
        if skip:
            self.counts[why] += 1
            self._first.setdefault(why, f"; the first: {place}")
        return skip

    def add(self, row_format: RowFormat, row: Row) -> None:
        for key, value in row.items():
            if value is None:
                continue
            if key not in row_format.known:
                self.ignored[key] = None
            elif isinstance(value, str):
                if len(value) <= MAX_EMPTY and value in EMPTY_TEXTS and key != "label":
                    self.counts[f"values of {key} are the text {value!r}, {AS_WORD}"] += 1
            elif key in MESSAGE_KEYS:
                is_list = isinstance(value, list)
                for message in value if is_list else [value] * isinstance(value, dict):
                    self._add_message(f"{key}[]" if is_list else key, message)
        if PAIRS in row_format.provides and (remark := split_remark(row)):
            self.counts[remark] += 1

    def _add_message(self, name: str, message: dict[str, Any]) -> None:
        turn = "from" in message
        role, content = message["from" if turn else "role"], message.get("content")
        if role in ROLES and len(message) == 2 and not isinstance(content, list):
            return
        known = TURN_KEYS if turn else KNOWN_KEYS
        keys = [f"{name}.{k}" for k, v in message.items() if k not in known and v is not None]
        for part in content if isinstance(content, list) else ():
            extra = sorted(part.keys() - {"type", "text", "thinking"})
            keys += [f"{name}.content[].{key}" for key in extra if part[key] is not None]
        self.ignored |= dict.fromkeys(keys)
        final, trained = role_of(role), trains(message)
        if final == "assistant" and trained is False:
            self.counts[EXCLUDED] += 1
        elif final != "assistant" and trained:
            self.counts[WRONG_ROLE] += 1
        if not turn and role not in ROLES:
            what = f"messages are converted to the role {final}" if final in ROLES else UNKNOWN_ROLE
            self._roles.setdefault(what, Counter())[role] += 1

    @property
    def lines(self) -> tuple[str, ...]:
        counts = self.counts.items()
        lines = [f"{n:,} {what}{self._first.get(what, '')}" for what, n in counts if n]
        for what, roles in self._roles.items():
            lines.append(f"{roles.total():,} {what}: {listed(map(repr, roles))}")
        return tuple(lines)


def propose_columns(row: Row) -> str:
    """Proposes `--columns` by known names, or by order if a row of a table has two text columns."""
    texts = [key for key, value in row.items() if isinstance(value, str) and LETTER.search(value)]
    prompts, answers = ([k for k in texts if k.strip().lower() in n] for n in (QUESTIONS, ANSWERS))
    guess = ""
    if not len(prompts) == len(answers) == 1:
        if len(texts) != 2 or {*map(type, row.values())} != {str}:  # not a table
            return ""
        prompts, answers, guess = texts[:1], texts[1:], BY_ORDER
    names = {"prompt": prompts[0], "completion": answers[0]}
    pairs = [f"{name}={column}" for name, column in names.items() if name != column]
    if any("," in pair or pair != pair.strip() for pair in pairs) or not pairs:
        return ""  # `--columns` can't express it
    columns = shlex.quote(",".join(pairs))
    if len(pairs) < len(names):  # the other may come from --columns
        return f"did you mean to add {columns} to --columns{guess}"
    return f"did you mean --columns {columns}{guess}"


def check_each(
    numbered: Iterable[tuple[int, Any]],
    source: str,
    at_once: bool = False,
    formats: Sequence[RowFormat] = ROW_FORMATS,
    none: bool = False,
    remarks: RowRemarks | None = None,
) -> Iterator[tuple[int, RowFormat, Row]]:
    """Yields (number, format, row) of valid rows that have the format of the first row, normalized.
    `numbered` contains an error message for an unreadable row.

    Raises at the end if a row is bad, or at the first bad row with `at_once`. Also raises if there
    are no rows, unless `none` is true.
    """
    bad: dict[str, list[int]] = {}  # row numbers by problem
    counts = remarks.counts if remarks else Counter[str]()
    first = None
    used = False
    for number, given in numbered:
        place = f"{source}: row {number}"
        if remarks and remarks.is_skipped(given, place):
            continue
        known = isinstance(given, dict) and not LAYOUT_KEYS.isdisjoint(given)
        row = normalize_row(convert_layout(given, counts) if known else given)
        if not row and remarks and remarks.is_skipped(row, place):
            continue
        if isinstance(row, str):
            problems = [row]
        elif (row_format := format_of(row, formats)) is None:
            problems = [*_format_problems(row, formats)]
        else:
            first = first or (number, row_format)
            problems = list(row_format.problems(row))
            if row_format is not first[1]:
                nulls = _nulls(first[1], row)
                problems += nulls or [f"format {row_format}, but row {first[0]} has {first[1]}"]
            if not (problems or bad or (remarks and remarks.is_skipped(row, place, row_format))):
                if remarks:
                    remarks.add(row_format, row)
                used = True
                yield number, row_format, row
        for problem in problems:
            bad.setdefault(problem, []).append(number)
        if bad and at_once:
            break
    if bad:
        lines = (f"{_name_rows(numbers)}: {problem}" for problem, numbers in bad.items())
        raise LorafoldError(f"{source}: {listed(lines, '; ')}")
    if not used and not none:
        out = "".join(f"; {text}" for text in remarks.lines) if remarks else ""
        raise LorafoldError(f"{source}: no rows found, expected at least one{out}")


def _name_rows(rows: Sequence[int]) -> str:
    first, last = rows[0], rows[-1]
    if last - first >= len(rows):
        return f"{len(rows)} rows from {first} to {last}"
    return f"row {first}" if first == last else f"rows {first} to {last}"


def _format_problems(row: Row, formats: Sequence[RowFormat]) -> Iterator[str]:
    if near := [row_format for row_format in formats if {*row_format.keys} <= row.keys()]:
        yield from _nulls(max(near, key=lambda s: sum(row[key] is not None for key in s.keys)), row)
        return
    keys = listed(map(repr, row), max_chars=80) or "none"
    guess = propose_columns(row)
    known = listed(formats, max_chars=40 if guess else 90)
    renames = f"; {guess}" if guess else " (rename with --columns)"
    yield f"keys found: {keys}; expected one of {known}{renames}"


def _nulls(row_format: RowFormat, row: Row) -> list[str]:
    keys = [key for key in row_format.keys if key in row and row[key] is None]
    expected = f"expected a value, which rows of {row_format} need"
    return [f"field {key}: found null, {expected}" for key in keys]


def check_provided(formats: Iterable[RowFormat | None], content: str) -> None:
    for row_format in formats:
        if row_format is None or content not in row_format.provides:
            expected = " or ".join(str(known) for known in ROW_FORMATS if content in known.provides)
            raise LorafoldError(f"data: found rows of {row_format}, expected rows of {expected}")


@dataclass
class RowsRead:
    """The numbers of rows per source part and per file, and the runs of `Origins`."""

    parts: list[list[int]] = field(default_factory=list)
    files: list[list[int]] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)  # warnings about guessed encodings
    ignored: Sequence[str] = ()
    remarks: Sequence[str] = ()


def _read_sources(
    sources: Sequence[DataSource], content: str, notice: Notice, read: RowsRead
) -> Iterator[Row]:
    remarks, formats = RowRemarks(content), formats_for(content)
    for number, source in enumerate(sources):
        last = None
        for file in source.files:
            read.files.append([number, 0])
            numbered = file.numbered_rows(read.guessed.append)
            rows = check_each(numbered, file.name, False, formats, source.is_multiple, remarks)
            for place, row_format, row in rows:
                if row_format is not last:  # consecutive files of one format are one part
                    read.parts.append([number, 0])
                    last = row_format
                file_number, run = len(read.files) - 1, read.runs[-1] if read.runs else [-1]
                if run[0] != file_number or place != sum(run[1:]):
                    read.runs.append([file_number, place, 0])
                for counts in (read.runs[-1], read.parts[-1], read.files[-1]):
                    counts[-1] += 1
                if read.files[-1][1] % 100_000 == 0:
                    notice(f"{file.name}: {read.files[-1][1]:,} rows read")
                yield row
        if last is None:
            raise LorafoldError(f"{source.name}: no rows found, expected at least one")
    read.ignored, read.remarks = [*remarks.ignored], remarks.lines


def read_rows(
    sources: str | Sequence[str],
    reading: Reading = AS_IS,
    notice: Notice = lambda text: None,
    content: str = "",
) -> Rows:
    """Reads files, directories, glob patterns or datasets from the Hugging Face Hub (their train
    split). A source may end with its weight, as in `rows.jsonl:0.3`. `content` is the kind of data
    that formats must provide; it selects among matching formats.
    """
    names = [sources] if isinstance(sources, str) else sources
    parsed, read, known = [parse_source(text, reading) for text in names], RowsRead(), None
    size = sum(source.size for source in parsed)
    if size <= MAX_IN_MEMORY:
        rows: Sequence[Row] = list(_read_sources(parsed, content, notice, read))
    else:

        def write(directory: Path) -> None:
            notice(f"reading {size / 1e9:.2f} GB of rows into the cache {directory.parent}")
            read = RowsRead()
            reading = _read_sources(parsed, content, notice, read)
            sha256, written = write_rows(reading, directory / "rows.arrow")
            about = asdict(read) | {"sha256": sha256, "bytes": written}
            write_json(directory / "about.json", about)

        from lorafold.identity import of_code  # imports torch

        code = of_code("data", packages=("datasets", "pyarrow"))
        identities = [[source.is_multiple, source.identity] for source in parsed]
        key = json.dumps([code, identities, content])
        path = cache_entry("rows", key, write, notice)
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
        known = (about.pop("sha256"), about.pop("bytes"))
        rows, read = ArrowRows(path / "rows.arrow"), RowsRead(**about)
    parts = tuple(SourcePart(count, parsed[n].weight) for n, count in read.parts)
    for guessed in read.guessed:
        log.warning(guessed)
    counts = iter([count for _, count in read.files])
    files: dict[str, int] = {}
    for source in parsed:
        counts_by_file = {file.name: next(counts) for file in source.files}
        if source.is_multiple:
            notice(f"{source.name}: {source.describe(counts_by_file)}")
            files |= counts_by_file
    names = [file.name for source in parsed for file in source.files]
    origins = Origins(tuple((names[n], first, count) for n, first, count in read.runs))
    ignored, lines = tuple(read.ignored), tuple(read.remarks)
    return Rows(rows, parts, ignored, known, content, lines, files, origins, reading._asdict())


def to_rows(rows: Sequence[Row], content: str = "") -> Rows:
    return rows if isinstance(rows, Rows) else check_rows(enumerate(rows, 1), "data", content)


def check_rows(numbered: Iterable[tuple[int, Any]], source: str, content: str = "") -> Rows:
    remarks, rows, runs = RowRemarks(content), [], [[0, 0]]
    usable = ((n, (find_unusable(r) or r) if isinstance(r, dict) else r) for n, r in numbered)
    for place, _, row in check_each(usable, source, formats=formats_for(content), remarks=remarks):
        rows.append(row)
        if place != sum(runs[-1]):
            runs.append([place, 0])
        runs[-1][1] += 1
    parts = (SourcePart(len(rows)),)
    origins = Origins(tuple(("", first, count) for first, count in runs if count))
    return Rows(rows, parts, tuple(remarks.ignored), None, content, remarks.lines, origins=origins)
