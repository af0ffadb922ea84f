"""Parses untrusted JSON and reports errors in one line.

Rejects lone surrogates, which UTF-8 can't encode, integers of thousands of digits and deep nesting,
because rows are also written as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from math import log10
from typing import Any

Row = dict[str, Any]
RowResult = Row | str  # a row, or an error message
MAX_DEPTH = 100  # number of lists and objects around a value
TOO_DEEP = f"found a value nested in more than {MAX_DEPTH} lists and objects, expected fewer"
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
CONVERSATION_KEYS = ("messages", "conversations")
MESSAGE_KEYS = (*CONVERSATION_KEYS, "prompt", "completion", "chosen", "rejected")


class Unreadable(ValueError):
    """A problem with the whole file, as a one-line message."""


def decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error


def load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if error.lineno > 1 else ""
        raise ValueError(f"{line}not JSON: {_wrong(error)}") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except ValueError as error:  # raised for Python's limit of digits
        most = sys.get_int_max_str_digits()
        long = json.loads(text, parse_int=lambda s: int(s) if len(s) <= most else 10 ** len(s))
        raise ValueError(find_unusable(long)) from error


def _wrong(error: json.JSONDecodeError) -> str:
    here, before = error.doc[error.pos :], error.doc[: error.pos].rstrip()
    if (before.endswith(",") and here[:1] in ("]", "}")) or "trailing comma" in error.msg:
        return "found a trailing comma, expected none before a closing bracket"
    if "Extra data" in error.msg and here[:1] == ",":
        return "found a comma after the object, expected one object per line and no commas between"
    if "double quotes" in error.msg and here[:1] == "'":
        return "found single quotes, expected double quotes, as json.dumps writes them"
    if word := re.match("None|True|False|nan", here):
        meant = "null" if word[0] in ("None", "nan") else word[0].lower()
        return f"found {word[0]}, expected {meant}"
    if "Unterminated string" in error.msg:
        return f"the string that begins at column {error.colno} has no closing quote"
    return f"{error.msg} at column {error.colno}"


def suspicious(text: str) -> bool:
    deep = text.count("[") + text.count("{") > MAX_DEPTH
    return deep or ("\\u" in text and bool(ESCAPED_SURROGATE.search(text)))


def parse_json(text: str) -> Any:
    """Parses JSON. Raises ValueError with one line, also for values that can't be used."""
    value = load_json(text)
    if suspicious(text) and (reason := find_unusable(value)):
        raise ValueError(reason)
    return value


def parse_row(line: bytes) -> RowResult:
    try:
        return check_row(parse_json(decode(line).rstrip()), find=False)
    except ValueError as error:
        return str(error)


def check_row(value: Any, find: bool = True) -> RowResult:
    """Returns the value, or an error if it is not an object or, with `find`, can't be used."""
    if not isinstance(value, dict):
        return f"found {json_type(value)}, expected an object"
    return (find_unusable(value) if find else "") or value


def find_unusable(value: Any) -> str:
    """Returns a message about the first value that can't be used, or ""."""
    digits = sys.get_int_max_str_digits()  # 0: no limit
    stack = [("", value, 0)]
    while stack:
        name, one, depth = stack.pop()
        field = f"field {name}: " if name else ""
        if isinstance(one, str):
            if not one.isascii() and (half := SURROGATE.search(one)):
                what = f"{ascii(half[0])[1:-1]} at character {half.start() + 1}"
                return f"{field}found half of a surrogate pair, {what}, expected whole characters"
        elif isinstance(one, dict | list):
            if depth > MAX_DEPTH:
                return f"field {re.split(r'[.[]', name)[0]}: {TOO_DEEP}"
            if isinstance(one, list):
                inner = [(f"{name}[{n}]", item) for n, item in enumerate(one)]
            elif wrong := [key for key in one if not isinstance(key, str) or SURROGATE.search(key)]:
                return f"{field}found the key {wrong[0]!a}, expected keys that are valid text"
            else:
                inner = [(f"{name}.{key}" if name else key, item) for key, item in one.items()]
            stack += ((*pair, depth + 1) for pair in reversed(inner))
        elif isinstance(one, int) and 0 < digits < one.bit_length() * log10(2):
            return f"{field}found an integer with more than {digits:,} digits, expected fewer"
    return ""


def json_type(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def normalize_row(row: Any) -> RowResult:
    """Converts lists of messages from JSON text or columns, and renames the keys `conversations`
    and `functions`. Returns an error message if that is impossible.
    """
    if not isinstance(row, dict):
        return row if isinstance(row, str) else check_row(row)
    result = row
    for key in MESSAGE_KEYS:
        value = row.get(key)
        if isinstance(value, str) and key in CONVERSATION_KEYS and value.lstrip()[:1] in ("[", "{"):
            try:
                value = parse_json(value)
            except ValueError as error:
                what = f"found text that is not a JSON list ({error})"
                return f"field {key}: {what}, expected a list of messages"
            result = result | {key: value}
        if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
            if len({*map(len, value.values())}) > 1:
                many = ", ".join(f"{len(column)} in {name}" for name, column in value.items())
                return f"field {key}: found columns of values ({many}), expected equal lengths"
            columns = zip(*value.values(), strict=True)
            result = result | {key: [dict(zip(value, one, strict=True)) for one in columns]}
    turns = result.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        result = _rename_key(result, "conversations", "messages")
    return _rename_key(result, "functions", "tools") if "messages" in result else result


def _rename_key(row: Row, key: str, name: str) -> Row:
    if row.get(key) is None or row.get(name) is not None:
        return row
    return {name if k == key else k: v for k, v in row.items() if k != name}
