"""axolotl's `datasets`: where rows lie goes to `--data`, the names of their columns to `--columns`,
and what else a dataset says is told with its path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorafold.translating.preferences import ObjectiveOf, rows_wanted
from lorafold.translating.rows import PLACEHOLDER, Rows, differing, given_as_data, of_hub
from lorafold.translating.rules import Outcome, Reader, Settings, is_off, left

# What is read of a dataset, and of one whose turns the chat template renders
READ = {"path", "name", "split", "data_files", "ds_type", "type", "trust_remote_code"}
OF_TURNS = {
    "chat_template", "field_messages", "message_property_mappings", "message_field_role",
    "message_field_content", "field_tools", "field_chosen", "field_rejected",
}  # fmt: skip
SAME = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "train_on_eot": "turn"}
INSTRUCTIONS = {
    "instruction": "field_instruction",
    "input": "field_input",
    "output": "field_output",
    "system": "field_system",
}
TURNS = (("role", "content"), ("from", "value"))
PROMPTED = "its prompt form (### Instruction:) is not written, but the model's chat template is"
FILES = ("json", "csv", "parquet", "text", "arrow")  # paths that stand for data_files


def datasets(objective_of: ObjectiveOf) -> Reader:
    """The reader of `datasets`, whose rows are those of the file's objective."""

    def read(value: Any, settings: Settings) -> Outcome:
        wanted = rows_wanted(objective_of(settings))
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, Mapping) and one.get("path") for one in found):
            return left(f"{wanted}: {value}", PLACEHOLDER)
        return given_as_data([_rows(one) for one in found], wanted)

    return read


def _rows(one: Mapping[str, Any]) -> Rows:
    path, files = one["path"], one.get("data_files")
    single = files if isinstance(files, str) else None
    if path in FILES and single:
        path, files = single, None
    at = of_hub(path, one.get("name"), one.get("split"), files)
    return Rows(f"{path} ({one.get('type', 'no type')})", at.path, _columns(one), [
        *at.said, *_said(one)
    ])  # fmt: skip


def _columns(one: Mapping[str, Any]) -> dict[str, str]:
    """The columns by lorafold's names, where theirs differ."""
    kind = one.get("type")
    if isinstance(kind, Mapping):
        return differing({ours: kind.get(key) for ours, key in INSTRUCTIONS.items()})
    if kind == "completion":
        return differing({"text": one.get("field")})
    if str(kind).startswith("chat_template."):  # of preferences
        return differing(
            {
                "prompt": one.get("field_messages") or "messages",
                "chosen": one.get("field_chosen"),
                "rejected": one.get("field_rejected"),
            }
        )
    if kind != "chat_template":
        return {}
    turns = "conversations" if _properties(one) == TURNS[1] else "messages"
    theirs = one.get("field_messages") or "messages"
    return differing({turns: theirs, "tools": one.get("field_tools")})


def _has_turns(kind: Any) -> bool:
    return str(kind).split(".")[0] == "chat_template"


def _properties(one: Mapping[str, Any]) -> tuple[str, str]:
    """What a turn calls its role and its content."""
    given = one.get("message_property_mappings") or {}
    return (
        str(given.get("role") or one.get("message_field_role") or "role"),
        str(given.get("content") or one.get("message_field_content") or "content"),
    )


def _said(one: Mapping[str, Any]) -> Iterator[str]:
    """What a dataset says that has no counterpart."""
    kind = one.get("type")
    if isinstance(kind, Mapping):
        yield "its prompt form is not written, but the model's chat template is"
    elif str(kind).split(".")[0].split(":")[0] == "alpaca":
        yield PROMPTED
    elif _has_turns(kind) and _properties(one) not in TURNS:
        yield f"its turns have {' and '.join(_properties(one))}: rename them to role and content"
    template = one.get("chat_template")
    if template not in (None, "tokenizer_default"):
        yield f"its template {template}: write it to a file, --chat-template FILE"
    known = READ | ({"chat_template"} if not _has_turns(kind) else OF_TURNS)
    known |= {"field"} if kind == "completion" else set()
    others = [
        key
        for key, value in one.items()
        if key not in known and not is_off(value) and SAME.get(key) != value
    ]
    if others:
        yield f"{', '.join(others)}: without a counterpart"
