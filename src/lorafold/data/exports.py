"""Layouts of other tools: rows for other APIs, exported conversations, and chats of messengers.

To add a layout of rows, add an entry to `LAYOUTS`. Chats have no roles: one person, `me`, becomes
the assistant, and pauses end a conversation.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import chain, groupby
from typing import Any

from lorafold.data.json_input import Row, RowResult, Unreadable
from lorafold.data.messages import KNOWN_KEYS, Message, role_of

Numbered = Iterator[tuple[int, RowResult]]
HIDDEN = "messages or parts that are not text for the user (tools, reasoning, files) are left out"
LOST = "answers to no message, or to messages without text, are left out"
PAUSE, MAX_CHARS = timedelta(hours=6), 2000
CUT = "a chat is cut into conversations at pauses of 6 hours, and after about 2,000 characters"
NO_TEXT = "messages without text (media, deleted, of the system) are left out"
NO_ANSWER = "messages that have no answer are left out"
PARTS = {  # by type of part: its field in a message, and the keys of its ID and its content
    **dict.fromkeys(("text", "input_text", "output_text"), ("content", "", "text")),
    "refusal": ("content", "", "refusal"),
    "thinking": ("reasoning_content", "", "thinking"),
    "reasoning": ("reasoning_content", "", "summary"),
    "tool_use": ("tool_calls", "id", "input"),
    "function_call": ("tool_calls", "call_id", "arguments"),
    "functionCall": ("tool_calls", "id", "args"),
    "tool_result": ("tool", "tool_use_id", "content"),
    "function_call_output": ("tool", "call_id", "output"),
    "functionResponse": ("tool", "id", "response"),
}
CITATION = re.compile("\ue200[^\ue201]*\ue201|【[^【】]*†[^【】]*】")  # of ChatGPT's search


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("parts", value.get("text", value))
    if isinstance(value, list):
        return "".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _messages(items: Any, separator: str = "\n\n") -> list[Message]:
    """Returns messages with parts, such as calls, in OpenAI's format. Consecutive ones of a role
    are joined with the separator.
    """
    found: list[Message] = []
    for item in items if isinstance(items, list) else [{"role": "user", "content": items}]:
        item = item if "role" in item else {"role": "assistant", "content": [item]}
        parts = item.get("parts", item.get("content") or item.get("refusal"))
        turn: Message = {key: item[key] for key in KNOWN_KEYS & item.keys() - {"content"}}
        turn["role"] = role_of(item["role"])
        if found and found[-1]["role"] == turn["role"] != "tool":
            turn = found.pop() | turn
        given: Any = [{"text": parts}] if isinstance(parts, str) else parts
        between = dict[str, str]()  # the separator, except between the parts of one message
        for part in given or ():
            kind = part.get("type") or next((key for key in part if key in PARTS), f"{[*part]}")
            field, identity, key = PARTS[kind]
            inner = part[kind] if isinstance(part.get(kind), dict) else part
            text, number = _text(inner.get(key, "")), inner.get(identity)
            if field == "tool":
                found += [turn] * (len(turn) > 1)
                found.append({"role": field, "tool_call_id": number, "content": text})
                turn = {"role": turn["role"]}
            elif field == "tool_calls":
                call = {"id": number, "name": inner["name"], "arguments": inner.get(key) or {}}
                turn[field] = [*turn.get(field, ()), call]
            elif text:
                field = "reasoning_content" if part.get("thought") else field
                glue, between[field] = between.get(field, separator), ""
                turn[field] = glue.join(filter(None, (turn.get(field), text)))
        if len(turn) > 1:
            found.append(turn)
    return found


def _turns(turns: list[Row]) -> list[Row]:
    keys = {"input": "user", "output": "assistant"}  # of Capybara
    pairs = [{"role": keys[k], "content": turn[k]} for turn in turns for k in keys if k in turn]
    return pairs or turns


def _branch(nodes: Mapping[str, Row], end: Any, parent: str) -> list[Row]:
    """Returns the nodes from the root to `end`."""
    found: list[Row] = []
    while end in nodes and len(found) < len(nodes):
        found.append(nodes[end])
        end = nodes[end].get(parent)
    return found[::-1]


def _with_questions(
    messages: Iterable[Message], left: Counter[str], asked: bool = True
) -> Iterator[Message]:
    """Leaves out messages without text, and the answers to questions without text."""
    for role, group in groupby(messages, lambda message: role_of(message["role"])):
        told = [message for message in group if message["content"].strip()]
        asked = bool(told) if role == "user" else asked
        if asked or role == "system":
            yield from told
        else:
            left[LOST] += len(told)


def _chatgpt(row: Row, counts: Counter[str]) -> Iterator[Message]:
    nodes = row["mapping"]
    for node in _branch(nodes, row.get("current_node") or next(reversed(nodes), ""), "parent"):
        message = node.get("message") or {}
        content, role = message.get("content") or {}, message.get("author", {}).get("role")
        parts = content.get("parts") or []
        spoken = (part if isinstance(part, str) else part.get("text") for part in parts)
        texts = [text for text in spoken if isinstance(text, str)]
        ended = message.get("status") != "in_progress"
        shown = ended and role != "tool" and message.get("recipient", "all") == "all"
        hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
        if shown and not hidden and content.get("content_type") in ("text", "multimodal_text"):
            counts[HIDDEN] += len(parts) - len(texts)
            yield {"role": role, "content": CITATION.sub("", "\n".join(texts))}
        else:
            counts[HIDDEN] += bool(content)


def _claude(row: Row, counts: Counter[str]) -> Iterator[Message]:
    messages = row["chat_messages"]
    if messages and "parent_message_uuid" in messages[-1]:
        nodes = {message["uuid"]: message for message in messages}
        messages = _branch(nodes, messages[-1]["uuid"], "parent_message_uuid")
    for message in messages:
        parts = message.get("content") or []
        texts = [part["text"] for part in parts if part["type"] == "text"]
        counts[HIDDEN] += len(parts) - len(texts) + len(message.get("files") or ())
        texts += [file.get("extracted_content") for file in message.get("attachments") or ()]
        texts = texts if parts else [message["text"], *texts]
        yield {"role": message["sender"], "content": "\n\n".join(filter(None, texts))}


LAYOUTS = (  # the fields that the keys of a row become
    {"messages": "messages"},
    {"contents": "messages", "systemInstruction": "system", "system_instruction": "system"},
    {"output": "completion", "input": "prompt", "instructions": "system"},
    {"preferred_output": "chosen", "non_preferred_output": "rejected", "messages": "prompt"},
    {"conversation": "conversations"},
    {"items": "conversations"},
    {"system_prompt": "system", "question": "prompt", "response": "completion"},
)
LAYOUT_KEYS = {"mapping", "chat_messages", *(next(iter(layout)) for layout in LAYOUTS)}
READ: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("messages", "prompt", "completion"), _messages),
    "conversations": _turns,
    "system": _text,
    "tools": lambda tools: [t for one in tools for t in one.get("functionDeclarations", [one])],
}


def _is_layout(row: Row, layout: Mapping[str, str]) -> bool:
    [first, *_], missing = layout, [key for key in layout if row.get(key) is None]
    value, field = row.get(first), layout[first]
    if any(layout[key] != "system" for key in missing) or (field != first and field in row):
        return False
    if first != "messages":
        return isinstance(value, str if first == "system_prompt" else list)
    messages = [m for m in value or () if isinstance(m, dict)]
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    kinds = {part.get("type") for part in parts if isinstance(part, dict)}
    refused = [m for m in messages if m.get("refusal")] or isinstance(row.get("system"), list)
    return bool(refused) or not kinds.isdisjoint(PARTS.keys() - {"text", "thinking"})


def convert_layout(row: Row, counts: Counter[str]) -> RowResult:
    """Converts a row in another tool's layout, and counts what is left out of it. Returns an error
    message if that is impossible, and an empty row for a conversation without messages.
    """
    key, result = "", dict[str, Any]()
    try:
        for key, read in (("mapping", _chatgpt), ("chat_messages", _claude)):
            if isinstance(row.get(key), list | dict):
                messages = _messages([*_with_questions(read(row, counts), counts)])
                rest = {k: v for k, v in row.items() if k not in (key, "current_node")}
                return rest | {"messages": messages} if messages else {}
        if "preferred_output" in row and isinstance(row.get("input"), dict):
            row = row | row["input"] | {"input": None}
        layout = next((one for one in LAYOUTS if _is_layout(row, one)), {})
        for key, value in row.items() if layout else ():
            field = layout.get(key, key)
            convert = isinstance(value, list | dict) or (field, key) == ("prompt", "input")
            result[field] = READ[field](value) if value and convert and field in READ else value
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"field {key}: found content that is not supported, or lacks a key: {error}"
    return result or row


def cut_chats(numbered: Numbered, me: str, note: Callable[[str], None]) -> Numbered:
    """Replaces chats by conversations in which the person `me` is the assistant."""
    names, left = Counter[str](), Counter[str]()
    for number, row in numbered:
        chats = _chats(row)
        if not chats:
            yield number, row
        for turns in chain.from_iterable(_cut(chat, me, names, left) for chat in chats):
            answered = [*_with_questions(turns, left, asked=False)]
            while answered and answered[-1]["role"] == "user":
                answered.pop()
                left[NO_ANSWER] += 1
            group = len({turn["from"] for turn in answered}) > 2
            messages = [
                turn | {"content": f"{turn['from']}: {turn['content']}"}
                if group and turn["role"] == "user"
                else turn
                for turn in answered
            ]
            if answered:
                yield answered[0]["line"], {"messages": _messages(messages, "\n")}
    if names and me not in names:
        found = ", ".join(f"{name!r} ({count:,} messages)" for name, count in names.most_common(9))
        what = f"found no message of {me!r} in this chat" if me else "found a chat"
        raise Unreadable(f"{what}; add --me with the name of the person who answers: {found}")
    if names:
        note("; ".join([CUT, *(f"{count:,} {what}" for what, count in left.items() if count)]))
    elif me:
        note("--me is not used, because this is not a chat")


def _cut(chat: Row, me: str, names: Counter[str], left: Counter[str]) -> Iterator[list[Message]]:
    """Yields the messages of each conversation."""
    turns, last, size = list[Message](), datetime.min, 0
    for index, message in enumerate(chat.get("messages") or (), 1):
        name, text = str(message.get("from")), _text(message.get("text") or "").strip()
        is_message, role = message.get("type") == "message", "assistant" if name == me else "user"
        left[NO_TEXT] += not (is_message and text)
        if is_message:
            time = datetime.fromisoformat(message.get("date") or last.isoformat())
            roles = (turns[-1]["role"] if turns else "", role)
            paused = abs(time - last) > PAUSE and roles != ("user", "assistant")
            if paused or (size > MAX_CHARS and roles == ("assistant", "user")):
                yield turns
                turns, size = [], 0
            number = message.get("line", index)
            turns.append({"role": role, "content": text, "from": name, "line": number})
            names[name], last, size = names[name] + 1, time, size + len(text)
    yield turns


def _chats(row: Any) -> list[Row]:
    """Returns the chats of Telegram's export, or of `read_whatsapp`."""
    if not isinstance(row, dict):
        return []
    lists = [row[key].get("list") or [] for key in CHATS if isinstance(row.get(key), dict)]
    chats = [*chain(*lists)] or [row]
    messages = next(filter(None, (chat.get("messages") for chat in chats)), None)
    first = messages[0] if isinstance(messages, list) else None
    is_telegram = isinstance(first, dict) and first.get("type") in KINDS and "role" not in first
    return chats if is_telegram or isinstance(messages, Iterator) else []


CHATS, KINDS = ("chats", "left_chats"), ("message", "service")  # of Telegram
LINE = re.compile(  # the beginning of a message in WhatsApp's export
    r"\u200e?\[?(\d{1,4})([./-]) ?(\d{1,2})[./-] ?(\d{1,4}),? (\d{1,2})[:.](\d\d)(?:[:.]\d\d)?"
    r"(?:\s*([ap])\.?\s?m\.?)?(?:\]| -) (?:([^:]+): )?(.*)",
    re.IGNORECASE,
)
MARKS = re.compile("[\u200e\u200f\u202a-\u202e]|^~\\s*")
WITHOUT_TEXT = re.compile(  # media, deleted messages, and the mark of an edited message
    r"\A\u200e.*|\A<[^<>]*>\Z|\A[^\n]*\.\w{2,4} \([^()\n]*\)$|\s*\u200e<[^<>]*>\Z|\A(This message"
    r" was deleted|You deleted this message|(Du hast d|D)iese Nachricht (wurde )?gelöscht)\.?\Z",
    re.DOTALL | re.MULTILINE,
)


def read_whatsapp(file: io.BufferedReader, warn: Any) -> Numbered:
    with io.TextIOWrapper(file, "utf-8-sig") as lines:
        yield 1, {"messages": _whatsapp(lines)}


def _whatsapp(lines: Iterable[str]) -> Iterator[Row]:
    """Yields messages like those of Telegram. The day precedes the month, except with AM and PM."""
    message: Row = {}
    for number, line in enumerate(chain(lines, [""]), 1):
        time = None
        if found := LINE.match(line):
            day, sign, month, year, hour, minute, half, name, text = found.groups()
            if len(day) == 4:
                day, year = year, day
            elif int(month) > 12 or (half and sign == "/" and int(day) <= 12):
                day, month = month, day
            hours = int(hour) % 12 + 12 * (half in "pP") if half else int(hour)
            with suppress(ValueError):  # a line that only looks like a date is text
                time = datetime(int(year) % 100 + 2000, int(month), int(day), hours, int(minute))
        if message and (time or not line):
            yield message | {"text": WITHOUT_TEXT.sub("", message["text"])}
        if time:
            kind = "service" if name is None else "message"
            message = {"line": number, "type": kind, "date": time.isoformat(), "text": text}
            message["from"] = MARKS.sub("", MARKS.sub("", name or ""))
        elif message:
            message["text"] += f"\n{line.rstrip()}"
        elif line.strip():
            raise Unreadable(
                f"line {number} is not a message of a WhatsApp chat; write other text as JSON lines"
                ' of {"text": "..."}'
            )
