"""Exports of other tools: rows for other APIs, chats, workbooks, archives, encodings."""

import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from conversation_cases import said, user
from error_cases import refusal
from lorafold.data import readers
from lorafold.data.formats import CONVERSATIONS
from lorafold.data.row_sources import Reading, parse_source
from lorafold.data.rows import check_rows, read_rows
from lorafold.data.stream import RowStream
from lorafold.errors import LorafoldError

DAY = {"day": "Sunday"}
CALL = {"type": "function", "function": {"name": "hours", "arguments": DAY}}
SCHEMA = {"type": "object", "properties": {"day": {"type": "string"}}}
TOOL = {"name": "hours", "parameters": SCHEMA}
SYSTEM = {"role": "system", "content": "Be brief."}


def node(name: str, parent: str | None, role: str, *parts: Any, **more: Any) -> dict[str, Any]:
    kind = more.pop("kind", "text")
    message = {"author": {"role": role}, "content": {"content_type": kind, "parts": [*parts]}}
    return {"id": name, "parent": parent, "message": message | {"recipient": "all"} | more}


def tree(*nodes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"title": "x", "mapping": {one["id"]: one for one in nodes}, **more}


CHATGPT = tree(
    {"id": "root", "parent": None, "message": None},
    node("s", "root", "system", ""),
    node("hid", "s", "user", kind="user_editable_context", user_profile="I am Ada."),
    node("u", "hid", "user", {"content_type": "image_asset_pointer"}, "Where?"),
    node("left", "u", "assistant", "An answer that was regenerated."),
    node("think", "u", "assistant", kind="thoughts"),
    node("call", "think", "assistant", "search(1)", recipient="browser"),
    node("tool", "call", "tool", "a page"),
    node("a", "tool", "assistant", "Ulm.\ue200cite\ue202turn0search0\ue201"),
    node("b", "a", "assistant", "Hafengasse."),
    current_node="b",
)
CLAUDE_PARTS = [
    {"type": "thinking", "thinking": "Hm."},
    {"type": "tool_use", "name": "web", "input": {}},
    {"type": "text", "text": "Ulm."},
]
CLAUDE = {
    "uuid": "x",
    "chat_messages": [
        {"uuid": "1", "sender": "human", "text": "Where?", "content": [],
         "attachments": [{"file_name": "a.txt", "extracted_content": "A map."}]},
        {"uuid": "2", "sender": "assistant", "text": "This block is not supported",
         "content": CLAUDE_PARTS, "files": []},
        {"uuid": "3", "sender": "assistant", "text": "This block is not supported",
         "content": CLAUDE_PARTS[1:2]},
    ],
}  # fmt: skip
CLAUDE_TREE = {
    "chat_messages": [
        {"uuid": name, "parent_message_uuid": parent, "sender": sender, "text": text}
        for name, parent, sender, text in [
            ("1", "0", "human", "Where?"), ("2", "1", "assistant", "Old."),
            ("3", "1", "assistant", "Ulm."),
        ]
    ]
}  # fmt: skip
ANTHROPIC = {
    "system": [{"type": "text", "text": "Be brief."}],
    "tools": [{"name": "hours", "input_schema": SCHEMA}],
    "messages": [
        user("Open?"),
        said([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Wait."},
              {"type": "tool_use", "id": "t1", "name": "hours", "input": {"day": "Sunday"}}]),
        user([{"type": "tool_result", "tool_use_id": "t1",
               "content": [{"type": "text", "text": "no"}]}, {"type": "text", "text": "And?"}]),
        said([{"type": "text", "text": "Closed."}]),
    ],
}  # fmt: skip
GEMINI = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "tools": [{"functionDeclarations": [TOOL]}],
    "contents": [
        {"role": "user", "parts": [{"text": "Open?"}]},
        {"role": "model", "parts": [{"thought": True, "text": "Hm."},
                                    {"functionCall": {"name": "hours", "args": DAY}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "hours", "response": {"a": 1}}}]},
        {"role": "model", "parts": [{"text": "Closed."}]},
    ],
}  # fmt: skip
RESPONSES = {
    "instructions": "Be brief.",
    "input": "Open?",
    "output": [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c", "name": "hours", "arguments": json.dumps(DAY)},
        {"type": "function_call_output", "call_id": "c", "output": "no"},
        {"type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Closed.", "annotations": []}]},
    ],
}  # fmt: skip
PREFERENCE = {
    "input": {"messages": [user("Open?")], "tools": [TOOL], "parallel_tool_calls": True},
    "preferred_output": [said("No.")],
    "non_preferred_output": [said("Dunno.")],
}
LEFT_OUT = "that are not text for the user"
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "ChatGPT": (
        CHATGPT, [user("Where?"), said("Ulm.\n\nHafengasse.")], f"5 messages or parts {LEFT_OUT}",
    ),
    "ChatGPT, no leaf": (
        tree(node("u", None, "user", "a"), node("x", "u", "assistant", "b")),
        [user("a"), said("b")], "",
    ),
    "Claude": (
        CLAUDE, [user("Where?\n\nA map."), said("Ulm.")], f"3 messages or parts {LEFT_OUT}",
    ),
    "Claude's branch": (CLAUDE_TREE, [user("Where?"), said("Ulm.")], ""),
    "Anthropic": (
        ANTHROPIC,
        [SYSTEM, user("Open?"),
         said("Wait.") | {"reasoning_content": "Hm.", "tool_calls": [CALL | {"id": "t1"}]},
         {"role": "tool", "tool_call_id": "t1", "content": "no"}, user("And?"), said("Closed.")],
        "",
    ),
    "Gemini": (
        GEMINI,
        [SYSTEM, user("Open?"),
         {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [CALL]},
         {"role": "tool", "content": '{"a": 1}'}, said("Closed.")],
        "",
    ),
    "Responses": (
        RESPONSES,
        [SYSTEM, user("Open?"),
         {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [CALL | {"id": "c"}]},
         {"role": "tool", "tool_call_id": "c", "content": "no"}, said("Closed.")],
        "",
    ),
    "preferences": (PREFERENCE, [user("Open?"), said("No.")], ""),
    "ChatGPT, a question that is an image": (
        tree(
            node("u", None, "user", "Hi"), node("a", "u", "assistant", "Hello."),
            node("image", "a", "user", {"content_type": "image_asset_pointer"}),
            node("b", "image", "assistant", "A dog."), node("v", "b", "user", "Bye"),
            node("w", "v", "user", {"content_type": "image_asset_pointer"}),
            node("c", "w", "assistant", "Bye【4:0†a.pdf】."),
            node("d", "c", "assistant", "And", status="in_progress"),
            current_node="d",
        ),
        [user("Hi"), said("Hello."), user("Bye"), said("Bye.")],
        "3 messages or parts that are not text for the user (tools, reasoning, files) are left out;"
        " 1 answers to no message, or to messages without text, are left out",
    ),
    "ChatGPT, spoken": (
        tree(*(
            node(name, parent, role, {"content_type": "audio_transcription", "text": text},
                 {"content_type": "audio_asset_pointer"}, kind="multimodal_text")
            for name, parent, role, text in [("u", None, "user", "a"), ("x", "u", "assistant", "b")]
        )),
        [user("a"), said("b")], f"2 messages or parts {LEFT_OUT}",
    ),
    "Claude, a question that is a file": (
        {"chat_messages": [
            {"sender": "human", "text": "", "files": [{"file_name": "a.png"}]},
            {"sender": "assistant", "text": "A dog."},
            {"sender": "human", "text": "Hi"}, {"sender": "assistant", "text": "Hello."},
        ]},
        [user("Hi"), said("Hello.")],
        f"1 messages or parts {LEFT_OUT} (tools, reasoning, files) are left out; 1 answers to",
    ),
    "Gemini, several messages of a role": (
        {"contents": [
            {"role": "user", "parts": [{"text": "Hello"}]},
            {"role": "user", "parts": [{"text": "Open"}, {"text": "?"}]},
            {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "Yes."}]},
            {"role": "model", "parts": [{"text": "Now."}, {"functionCall": {"name": "hours"}}]},
        ]},
        [user("Hello\n\nOpen?"),
         said("Yes.\n\nNow.") | {"reasoning_content": "Hm.", "tool_calls": [
             {"type": "function", "function": {"name": "hours", "arguments": {}}}]}],
        "",
    ),
    "Responses, several messages": (
        {"input": [user("Context."), user("Open?")],
         "output": [{"type": "message", "role": "assistant",
                     "content": [{"type": "output_text", "text": text}]} for text in ("a", "b")]},
        [user("Context.\n\nOpen?"), said("a\n\nb")], "",
    ),
    "OpenAI, refused": (
        {"messages": [user("a"), {"role": "assistant", "content": None, "refusal": "No."}]},
        [user("a"), said("No.")], "",
    ),
    "Anthropic, plain messages": (
        {"system": [{"type": "text", "text": "Be brief."}], "messages": [user("a"), said("b")]},
        [SYSTEM, user("a"), said("b")], "",
    ),
    "LMSYS": ({"conversation": [user("a"), said("b")], "model": "m"}, [user("a"), said("b")], ""),
    "ShareGPT": (
        {"items": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [user("a"), said("b")], "",
    ),
    "Capybara": (
        {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
        [user("a"), said("b"), user("c"), said("d")], "",
    ),
    "OpenOrca": (
        {"system_prompt": "Be brief.", "question": "a", "response": "b"},
        [SYSTEM, user("a"), said("b")], "",
    ),
    "OpenOrca without a system prompt": (
        {"system_prompt": "", "question": "a", "response": "b"}, [user("a"), said("b")], "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows_for_other_tools_are_conversations(case: str) -> None:
    row, wanted, left = ROWS[case]
    before = json.dumps(row)
    rows = check_rows([(1, row)], "data")
    [found] = rows.extract(CONVERSATIONS)
    assert found.messages == wanted
    assert json.dumps(row) == before
    assert left in "; ".join(rows.remarks)
    assert bool(left) == bool(rows.remarks)
    if "tools" in before:
        assert [one["function"] for one in found.tools] == [TOOL]


@pytest.mark.parametrize("empty", [tree(current_node="x"), {"chat_messages": [], "name": ""}])
def test_empty_conversations_of_an_export_are_left_out(empty: dict[str, Any]) -> None:
    rows = check_rows([(1, empty), (2, CLAUDE_TREE)], "data")
    assert len(rows) == 1
    assert rows.remarks == ("1 rows are blank and are left out; the first: data: row 1",)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "field contents: found"),
        ({"mapping": {"a": 3}, "current_node": "a"}, "row 1: field mapping: found content that is"),
        ({"chat_messages": [{"sender": "human"}]}, "or lacks a key: 'text'"),
        ({"conversation": ["a"]}, "field conversations[0]: found text, expected an object"),
        ({"output": [{"type": "image"}], "input": "a"}, "field output: found content that is not"),
    ],
)
def test_what_a_layout_does_not_have_is_said(row: dict[str, Any], told: str) -> None:
    assert told in refusal(check_rows, [(1, row)], "data")


# chats

GERMAN = """\
01.05.26, 09:59 - Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt.
01.05.26, 10:00 - Kunde: Habt ihr offen?
Auch: sonntags?
01.05.26, 10:01 - Laden: <Medien ausgeschlossen>
01.05.26, 10:02 - Laden: IMG-1.jpg (Datei angehängt)
Das Schild.
01.05.26, 10:03 - Laden: Bis 18 Uhr.
02.05.26, 09:00 - Laden: Dein Rad ist fertig.
02.05.26, 09:05 - Kunde: Danke, was kostet es?
03.05.26, 09:05 - Laden: 20 Euro.
03.05.26, 21:05 - Kunde: Ok
"""
CHAT = [
    [user("Habt ihr offen?\nAuch: sonntags?"), said("Das Schild.\nBis 18 Uhr.")],
    [user("Danke, was kostet es?"), said("20 Euro.")],
]
AMERICAN = """\
12/31/25, 11:59\u202fPM - Kunde: Open?
1/1/26, 12:01\u202fAM - Laden: Yes.
1/1/26, 1:00 PM - Kunde: Now?
1/1/26, 1:01 PM - Laden: No. \u200e<This message was edited>
1/1/26, 1:02 PM - Laden: This message was deleted
"""
APPLE = """\
\u200e[01.05.26, 10:00:01] Kunde: \u200eMessages and calls are end-to-end encrypted.
[01.05.26, 10:00:01] ~\u202fKunde: Open?
\u200e[01.05.26, 10:00:02] Laden: \u200eimage omitted
[01.05.26, 10:00:03] Laden: Yes.
[13.05.26, 10:00:03] ~\u202fKunde: Now?
[13.05.26, 10:00:03] Laden: No.
"""
GROUP = """\
2026-05-01 10:00 - Ada: Open?
2026-05-01 10:00 - Bob: Me too: open?
2026-05-01 10:00 - Laden: Yes.
"""
ENGLISH = [[user("Open?"), said("Yes.")], [user("Now?"), said("No.")]]
TELEGRAM = {
    "name": "Shop",
    "type": "personal_chat",
    "messages": [
        {"id": 1, "type": "service", "date": "2026-05-01T10:00:00", "action": "phone_call"},
        *(
            {"type": "message", "date": f"2026-05-0{day}T10:00:00", "from": name, "text": t}
            for day, name, t in [
                (1, "Kunde", "Open?"), (1, "Laden", ["Ye", {"type": "bold", "text": "s."}]),
                (1, "Laden", ""), (2, "Kunde", "Now?"), (3, "Laden", "No."),
            ]
        ),
    ],
}  # fmt: skip
CHATS: dict[str, tuple[str, str, list[Any], str]] = {
    "WhatsApp in German": ("a.txt", GERMAN, CHAT, "2 messages without text (media"),
    "WhatsApp of America": ("a.txt", AMERICAN, ENGLISH, "1 messages without text"),
    "WhatsApp of iOS": ("_chat.txt", APPLE, ENGLISH, "2 messages without text"),
    "WhatsApp of a group": (
        "a.txt", GROUP, [[user("Ada: Open?\nBob: Me too: open?"), said("Yes.")]], "of 6 hours",
    ),
    "Telegram": ("result.json", json.dumps(TELEGRAM, indent=1), ENGLISH, "2 messages without text"),
    "all of Telegram": (
        "result.json",
        json.dumps({
            "about": "x", "chats": {"list": [{"type": "saved_messages", "messages": []}, {}]},
            "left_chats": {"list": [TELEGRAM, TELEGRAM | {"messages": []}]},
        }),
        ENGLISH, "2 messages without text",
    ),
    "Telegram without dates, and with an image": (
        "result.json",
        json.dumps({"messages": [
            {"type": "message", "from": name, "text": text}
            for name, text in [("K", "Open?"), ("Laden", "Yes."), ("K", ""), ("Laden", "A dog."),
                               ("Laden", "Brown."), ("K", "Now?"), ("Laden", "No.")]
        ]}),
        [[*ENGLISH[0], *ENGLISH[1]]],
        "1 messages without text (media, deleted, of the system) are left out; 2 answers to no",
    ),
    "WhatsApp, a line that looks like a message": (
        "a.txt",
        "01.05.26, 10:00 - K: Is it\n99.99.2026, 10:00 - x: y\n01.05.26, 10:01 - Laden: No.\n",
        [[user("Is it\n99.99.2026, 10:00 - x: y"), said("No.")]], "of 6 hours",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("archive", [False, True])
def test_a_chat_is_cut_into_conversations(case: str, archive: bool, tmp_path, caplog) -> None:
    name, text, wanted, told = CHATS[case]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    if archive:
        path = tmp_path / "export.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"chat/{name}", text)
            file.writestr("chat/photo.jpg", b"x")
            file.writestr("__MACOSX/._x.json", b"x")
    rows = read_rows(str(path), Reading(me="Laden"))
    assert [row["messages"] for row in rows] == wanted
    assert "a chat is cut into conversations at pauses of 6 hours" in caplog.messages[-1]
    assert told in caplog.messages[-1]
    assert ("left out: chat/photo.jpg" in caplog.text) == archive
    assert rows.record["me"] == "Laden"
    told = refusal(read_rows, str(path)).partition("add --me with the name of the person who")[2]
    assert re.search(r"'Laden' \(\d messages\)", told)
    assert "found no message of 'Nobody'" in refusal(read_rows, str(path), Reading(me="Nobody"))


def test_long_chats_are_cut_before_a_question(tmp_path: Path) -> None:
    lines = ["01.05.26, 10:00 - K: a?\n01.05.26, 10:00 - L: " + "b" * 900 + "\n"] * 9
    (tmp_path / "a.txt").write_text("".join(lines))
    rows = read_rows(str(tmp_path / "a.txt"), Reading(me="L"))
    assert [len(row["messages"]) for row in rows] == [6, 6, 6]
    assert [place.row for place in rows.origins.places(range(3))] == [1, 7, 13]


# containers


def book(*sheets: list[list[Any]]) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    made = openpyxl.Workbook()
    made.remove(made.active)
    for number, rows in enumerate(sheets):
        sheet = made.create_sheet(f"S{number}")
        for row in rows:
            sheet.append(row)
    into = io.BytesIO()
    made.save(into)
    return into.getvalue()


def archive(**files: str) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as made:
        for name, text in files.items():
            made.writestr(name.replace("__", "."), text)
    return into.getvalue()


def locked() -> bytes:
    """An archive whose flags say that its file is encrypted."""
    content = archive(a__csv="prompt,completion\na,b\n")
    central = content.index(b"PK\x01\x02")
    return content[: central + 8] + b"\x01" + content[central + 9 :]


HEAD = ["prompt", "completion"]
TITLES = [["Fragen, Antworten und mehr"], [], HEAD, ["a", "b"], [None, None], [1, 2.5]]
COMMAS = "prompt,completion\na,b\n1,2.5\n"
TABLE = [{"prompt": "a", "completion": "b"}, {"prompt": "1", "completion": "2.5"}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.xlsx", lambda: book(TITLES, [["other"]]), ["left out: 'S1'", "header is row 3 of"]),
        ("a.xlsx", lambda: book(TITLES[2:]), []),
        ("a.zip", lambda: archive(a__csv=COMMAS, b__html=""), ["b.html"]),
        ("a.csv", lambda: b"FAQ 2026\n\nprompt;completion\na;b\n1;2.5\n", ["above it, 'FAQ 2026'"]),
        ("a.csv", lambda: b";\nFAQ, 2026;\nprompt;completion\na;b\n1;2.5\n", ["'FAQ, 2026'"]),
    ],
)  # fmt: skip
def test_tables_in_containers_and_below_titles(name, content, told, tmp_path, caplog) -> None:
    (tmp_path / name).write_bytes(content())
    assert list(read_rows(str(tmp_path / name))) == TABLE
    assert [part in line for part, line in zip(told, caplog.messages, strict=True)] == [True] * len(
        told
    )


ONE = ["text\na\nb, c\n", 'text\n"a, b"\n"c, d"\n', "text\na; b\nc; d\n"]


@pytest.mark.parametrize("text", ONE)
def test_a_header_of_one_column_is_no_title(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    if "\na\n" in text:
        assert "row 2: found 2 values, expected 1" in refusal(read_rows, str(tmp_path / "a.csv"))
    else:
        assert len(read_rows(str(tmp_path / "a.csv"))) == 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.xlsx", lambda: book([HEAD, ["a", "=1+1"]]), "cell B2: found a formula without a saved"),
        ("a.xlsx", lambda: b"\xd0\xcf\x11\xe0", "not a workbook, or protected by a password"),
        ("a.xlsx", lambda: archive(x="y"), "not a workbook, or protected by a password"),
        ("a.zip", locked, "protected by a password; unpack it, and pass the file in it"),
        ("a.zip", lambda: archive(a__csv="a", b__jsonl="b"), "a.csv, b.jsonl, expected one;"),
        ("a.zip", lambda: archive(a__pdf=""), "found no file of rows, expected one"),
        ("a.zip", lambda: b"PK", "can't be read: File is not a zip file"),
        ("a.txt", lambda: b"Dear Ada,\n", "line 1 is not a message of a WhatsApp chat"),
    ],
)  # fmt: skip
def test_containers_that_cant_be_read(name: str, content, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content())
    assert told in refusal(read_rows, str(tmp_path / name))


@pytest.mark.parametrize("wrong", ["A1", "A1:B2", "A1:C9"])
def test_the_dimension_of_a_sheet_may_be_wrong(wrong: str, tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(io.BytesIO(book([HEAD, ["a", "b"], ["c", "d"]]))) as made,
        zipfile.ZipFile(tmp_path / "a.xlsx", "w") as written,
    ):
        for name in made.namelist():
            content = made.read(name).replace(b'ref="A1:B3"', f'ref="{wrong}"'.encode())
            written.writestr(name, content)
    rows = read_rows(str(tmp_path / "a.xlsx"))
    assert [row["completion"] for row in rows] == ["b", "d"]


def test_openpyxl_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    told = refusal(read_rows, str(tmp_path / "a.xlsx"))
    assert told.endswith("requires openpyxl; run pip install 'lorafold[xlsx]'")


def test_the_directory_of_an_export(tmp_path: Path) -> None:
    names = ["user.json", "conversations-001.json", "conversations-000.json"]
    for number, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps([CLAUDE | {"name": str(number)}]))
    (tmp_path / "readme.txt").write_text("Hello")
    rows = read_rows(str(tmp_path))
    assert [row["name"] for row in rows] == ["2", "1"]


# long JSON

LONG = [{"prompt": f"a{n} [é,", "completion": "b" * n} for n in range(1, 300, 7)]


@pytest.mark.parametrize("indent", [None, 1])
def test_long_lists_are_read_object_by_object(indent, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "MAX_PARSED", 500)
    monkeypatch.setattr(readers, "READ_BYTES", 64)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(LONG, indent=indent, ensure_ascii=False) + "\n")
    assert list(read_rows(str(path))) == LONG
    path.write_text(json.dumps([*LONG, 3, {"x": "\ud83d"}]))
    assert "row 44: found 3, expected an object; row 45: field x: found half" in refusal(
        read_rows, str(path)
    )
    path.write_text(json.dumps(LONG)[:-30])
    assert f"row {len(LONG)}: not JSON, or too long" in refusal(read_rows, str(path))
    monkeypatch.setattr(readers, "MAX_OBJECT", 500)
    path.write_text(json.dumps({"a": LONG}, indent=1))
    assert "object of over 1 GB needs 8 GB of memory" in refusal(read_rows, str(path))


# encodings

GUESSED = {
    "German": "Öffnet ihr früh? – Natürlich, für 5 €. „Schöne“ Grüße",
    "French": "Où est le café? À côté de l’hôtel, près du théâtre: 20 °C",
    "Spanish": "¿Dónde está? En la esquina, mañana también",
    "Portuguese": "Não, amanhã às três, até à estação",
    "Danish": "Hvor længe har I åbent på søndag?",
}
REFUSED = {
    ("German", "mac_roman"): GUESSED["German"],
    ("German", "cp850"): "Öffnet ihr früh? Natürlich, schöne Grüße",
    ("French", "mac_roman"): GUESSED["French"],
    ("Spanish", "mac_roman"): GUESSED["Spanish"],
    ("Czech", "cp1250"): "Kdy máte otevřeno? Příští týden, děkuji, můžete přijít",
    ("Polish", "cp1250"): "Gdzie jest dworzec? Proszę iść prosto, następnie w lewo, dziękuję",
    ("Russian", "cp1251"): "Когда вы открываетесь?",
    ("Russian", "koi8_r"): "когда вы открываетесь?",
    ("Japanese", "cp932"): "何時に開きますか。予約をお願いします。",
    ("Japanese", "euc_jp"): "何時に開きますか。予約をお願いします。",
    ("Chinese", "gb18030"): "你们几点开门？我想订一张桌子。",
    ("Korean", "cp949"): "몇 시에 여나요? 예약하고 싶어요.",
}


def table(text: str, encoding: str, path: Path) -> str:
    path.write_bytes(f"prompt;completion\n{text};b\n".encode(encoding))
    return str(path)


@pytest.mark.parametrize("language", GUESSED)
def test_western_text_of_windows_is_guessed(language: str, tmp_path: Path) -> None:
    path = table(GUESSED[language], "cp1252", tmp_path / "a.csv")
    assert read_rows(path)[0]["prompt"] == GUESSED[language]


@pytest.mark.parametrize("case", REFUSED, ids=" in ".join)
def test_other_encodings_are_named_and_not_guessed(case, tmp_path: Path) -> None:
    text, path = REFUSED[case], table(REFUSED[case], case[1], tmp_path / "a.csv")
    told = refusal(read_rows, path)
    word = told.partition(f"--encoding {case[1]} if it contains '")[2].partition("'")[0]
    assert word
    assert word in text
    assert read_rows(path, Reading(encoding=case[1]))[0]["prompt"] == text


def test_columns_are_guessed_by_order_only_in_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage 1,antwort 1\nWo?,Hier\n")
    guess = "did you mean --columns 'prompt=frage 1,completion=antwort 1' (guessed from the order"
    assert guess in refusal(read_rows, str(tmp_path / "a.csv"))
    row = {"custom_id": 1, "method": "POST", "url": "/v1/chat", "body": {"messages": [user("q")]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    told = refusal(read_rows, str(tmp_path / "a.jsonl"))
    assert "did you mean" not in told
    assert told.endswith("(rename with --columns)")


def test_an_encoding_is_for_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\n'.encode("mac_roman"))
    rows = read_rows(str(tmp_path / "a.jsonl"), Reading(me="Ada", encoding="mac_roman"))
    assert rows[0]["text"] == "é"
    assert rows.record["encoding"] == "mac_roman"
    assert "--me is not used, because this is not a chat" in caplog.text
    told = refusal(read_rows, str(tmp_path / "a.jsonl"), Reading(encoding="cp932"))
    assert "is not CP932; save it as UTF-8" in told
    (tmp_path / "a.xlsx").write_bytes(book([["text"], ["a"]]))
    assert len(read_rows(str(tmp_path / "a.xlsx"), Reading(encoding="cp932"))) == 1
    assert "--encoding is not used, because a.xlsx is not a text file" in caplog.text


def test_how_rows_are_read_is_recorded_and_part_of_their_identity(tiny_model_dir, tmp_path) -> None:
    path, recipe = tmp_path / "a.txt", lf.Recipe(steps=1, batch=1, storage="fp32")
    path.write_text(GROUP)
    lf.train(recipe, data=path, me="Laden", out=tmp_path / "out", model=tiny_model_dir("llama"))
    record = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert (record["data"]["rows"], record["data"]["me"]) == (1, "Laden")
    ways = [Reading(), Reading(me="Ada"), Reading({"a": "b"}), Reading(encoding="cp1252")]
    streams = [RowStream((parse_source(str(path), way),)) for way in ways]
    assert len({stream.identity for stream in streams}) == len(ways)
    for wrong, expected in (("base64", "an encoding that Python knows"), (3, "text or None")):
        with pytest.raises(LorafoldError, match=f"encoding: found {wrong!r}, expected {expected}"):
            lf.preview(data=path, encoding=wrong)
    for names in ("a=b", {"prompt": 3}):
        told = f"columns: found {names!r}, expected a mapping of names"
        with pytest.raises(LorafoldError, match=re.escape(told)):
            lf.preview(data=path, columns=names)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": ["human"], "value": "x"}]},
        {"contents": [{"role": ["user"], "parts": "x"}]},
        {"mapping": {"a": {"parent": "a", "message": None}}, "current_node": "a"},
        {"messages": [{"type": "message", "date": "x", "from": 3, "text": [3]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}], "output": [{}]},
    ],
)
def test_values_of_other_types_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(LorafoldError, match=r"rows\.json"):
        read_rows(str(path))


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", json.dumps({"text": "word " * 5000}))
    content = bytearray(path.read_bytes())
    content[45:60] = bytes(15)
    path.write_bytes(content)
    with pytest.raises(LorafoldError, match="can't be read"):
        read_rows(str(path))
