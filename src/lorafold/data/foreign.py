"""Rows as other tools write them, with the keys and lists by which `data.shapes` knows them.

| found | becomes |
|---|---|
| `messages` or `conversations` as JSON text | the list |
| lists of messages by columns: `{"role": [...], "content": [...]}` | a list of messages |
| `conversations` whose turns have `role` | `messages` |
| `functions` beside messages | `tools` |
"""

from typing import Any

from lorafold.data.parsing import Found, Row, as_row, parsed

CONVERSED = ("messages", "conversations")
SPOKEN = (*CONVERSED, "prompt", "completion", "chosen", "rejected")  # which may hold messages


def as_known(row: Any) -> Found:
    """The row with the keys and lists that shapes know, or the reason why it can't be read."""
    if not isinstance(row, dict):
        return row if isinstance(row, str) else as_row(row)
    found: Row = row
    for key in SPOKEN:
        value = row.get(key)
        if isinstance(value, str) and key in CONVERSED and value.lstrip()[:1] in ("[", "{"):
            try:
                value = parsed(value)
            except ValueError as error:
                what = f"found text that is no JSON of messages ({error})"
                return f"field {key}: {what}, expected a list of messages"
            found = found | {key: value}
        if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
            lengths = {name: len(column) for name, column in value.items()}
            if len(set(lengths.values())) > 1:
                many = ", ".join(f"{n} of {name}" for name, n in lengths.items())
                return f"field {key}: found {many}, expected as many of each"
            columns = zip(*value.values(), strict=True)
            found = found | {key: [dict(zip(value, one, strict=True)) for one in columns]}
    return _renamed(found)


def _renamed(row: Row) -> Row:
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        row = _moved(row, "conversations", "messages")
    return _moved(row, "functions", "tools") if "messages" in row else row


def _moved(row: Row, key: str, name: str) -> Row:
    """The row with the value of one key under another name, unless that has a value too."""
    if row.get(key) is None or row.get(name) is not None:
        return row
    return {name if k == key else k: v for k, v in row.items() if k != name}
