"""What a newcomer brings and meets: tables as programs save them, and errors of bounded length."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from conversation_cases import said, user
from error_cases import refusal
from large_cases import stream_of
from lorafold.data.row_sources import Reading, parse_source
from lorafold.data.rows import check_rows, read_rows
from lorafold.errors import MAX_ITEMS, LorafoldError, listed, truncate_middle
from lorafold.models.sources import resolve_model

TABLE = 'prompt,completion\n"Wann, bitte?",früh\n'


def refused(source: Path) -> str:
    return refusal(read_rows, str(source)).replace(str(source), "FILE")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_is_read_as_a_program_saved_it(delimiter, encoding: str, tmp_path: Path) -> None:
    text = f'prompt{delimiter}completion\n"Wann{delimiter} bitte?"{delimiter}früh\n'
    (tmp_path / "rows.csv").write_bytes(text.encode(encoding))
    found = read_rows(str(tmp_path / "rows.csv"))
    assert list(found) == [{"prompt": f"Wann{delimiter} bitte?", "completion": "früh"}]


@pytest.mark.parametrize("before", [0, 10_000, 400_000])  # ASCII, in one piece and in several
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_excel_saves_is_read_and_said(before: int, suffix: str, tmp_path, caplog) -> None:
    plain = "prompt,completion\n" + "a,b\n" * (before // 4)
    content = f"{plain}Wann? „Öffnet“ ihr,früh – 5 €\n".encode("cp1252")
    file = tmp_path / f"rows.csv{suffix}"
    file.write_bytes(gzip.compress(content) if suffix else content)
    found = read_rows(str(file))
    assert found[-1] == {"prompt": "Wann? „Öffnet“ ihr", "completion": "früh – 5 €"}
    [line] = caplog.messages
    assert line.startswith(f"{file}: not UTF-8, so the file is decoded as Windows-1252")
    assert "'Öffnet'; if this word is wrong, save the file as UTF-8" in line


def test_what_excel_saves_is_said_of_streamed_and_kept_rows_too(tmp_path, caplog, monkeypatch):
    (tmp_path / "rows.csv").write_bytes(TABLE.encode("cp1252"))
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorafold.data.rows.MAX_IN_MEMORY", 1)
    for _ in range(2):  # written to the cache, and found there
        caplog.clear()
        assert read_rows(str(tmp_path / "rows.csv"))[0]["completion"] == "früh"
        assert ["Windows-1252" in line for line in caplog.messages] == [True]
    caplog.clear()
    rows = stream_of(str(tmp_path / "rows.csv")).rows(0, 1)
    assert next(rows)[1]["completion"] == "früh"
    assert "Windows-1252" in caplog.text


@pytest.mark.parametrize(
    ("encoding", "text", "told"),
    [
        ("cp1251", "Когда вы открываетесь?", "neither UTF-8 nor Windows-1252"),
        ("gbk", "你们几点开门？我想订一张桌子。", "neither UTF-8 nor Windows-1252"),
        ("shift-jis", "何時に開きますか。予約をお願いします。", "neither UTF-8 nor Windows-1252"),
        ("cp1252", "früh", "invalid UTF-8 soon after line"),
    ],
)
def test_other_code_pages_are_not_read_as_that_of_windows(encoding, text, told, tmp_path) -> None:
    before = "ä,b\n" if encoding == "cp1252" else "a,b\n"
    content = f"prompt,completion\n{before}".encode() + f"{text},b\n".encode(encoding)
    (tmp_path / "rows.csv").write_bytes(content)
    assert told in refused(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_is_read_as_the_shell_of_windows_writes_it(name: str, tmp_path: Path) -> None:
    row = {"prompt": "Wann?", "completion": "früh"}
    text = json.dumps(row if name == "rows.jsonl" else [row], ensure_ascii=False)
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    assert list(read_rows(str(tmp_path / name))) == [row]
    (tmp_path / name).write_bytes(text.encode("utf-16")[:-1])
    assert "has a UTF-16 BOM, but is not UTF-16" in refused(tmp_path / name)


def test_cells_that_name_nothing_are_said_to_be_words(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\na,NULL\nb,NULL\nc,#N/A\nNone,a\n")
    assert read_rows(str(tmp_path / "rows.csv")).remarks == tuple(
        f"{count} values of {key} are the text {word!r}, which is not treated as an empty cell"
        for count, key, word in [
            (2, "completion", "NULL"), (1, "completion", "#N/A"), (1, "prompt", "None")
        ]
    )  # fmt: skip


SHEET = "prompt;completion;id\na;b;1\n;;\n ; ;\t\n;;;;\nc;d;2\n;;\n"
BLANK: dict[str, tuple[str, list[int]]] = {
    "a.csv": (SHEET, [1, 5]),
    "a.tsv": (SHEET.replace("\t", " ").replace(";", "\t"), [1, 5]),
    "a.jsonl": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "", "completion": null}\n\n'
        '{"prompt": "c", "completion": "d"}\n{}\n{"prompt": " ", "completion": ""}\n'
        '{"messages": null}\n',
        [1, 4],
    ),
}


@pytest.mark.parametrize("name", BLANK)
def test_blank_rows_are_left_out_and_counted(name: str, tmp_path: Path) -> None:
    """Also of what other shape they would be, and the others keep their numbers."""
    text, numbers = BLANK[name]
    (tmp_path / name).write_text(text)
    rows = read_rows(str(tmp_path / name))
    assert [row["prompt"] for row in rows] == ["a", "c"]
    line = f"4 rows are blank and are left out; the first: {tmp_path / name}: row 2"
    assert rows.remarks == (line,)
    assert [place.row for place in rows.origins.places(range(2))] == numbers


UNANSWERED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a completion": ("", {"completion": " \n"}, {"completion": "b"}),
    "messages": (
        "", {"messages": [user("a"), said("")]}, {"messages": [user("a"), said(""), said("b")]},
    ),
    "asked for": (
        "", {"messages": [user("a"), said("")]},
        {"messages": [user("a"), said("") | {"weight": 1}]},
    ),
    "ShareGPT": (
        "",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ),
    "Alpaca": ("", {"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}),
    "a side of a pair": (
        "pairs", {"prompt": "a", "chosen": "b", "rejected": ""},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "the last turn of a side": (
        "pairs",
        {"chosen": [user("a"), said("b"), user("c"), said("")],
         "rejected": [user("a"), said("b"), user("c"), said("d")]},
        {"chosen": [user("a"), said("b"), user("c"), said("e")],
         "rejected": [user("a"), said("b"), user("c"), said("d")]},
    ),
    "a judged completion": (
        "judged", {"completion": "", "label": False}, {"completion": "b", "label": False},
    ),
    "a text": ("", {"text": "", "id": 1}, {"text": "a"}),
    "a label": ("labels", {"text": "a", "label": ""}, {"text": "a", "label": 0}),
    "a prompt alone": ("prompts", {"prompt": "", "wanted": None}, {"prompt": "a"}),
    "an answer that rewards get": ("prompts", {"a": None}, {"completion": ""}),
}  # fmt: skip


@pytest.mark.parametrize("case", UNANSWERED)
def test_rows_with_an_empty_answer_are_left_out_and_counted(case: str) -> None:
    wanted, empty, full = UNANSWERED[case]
    if "completion" in full:
        full = {"prompt": "a", **full}
        empty = empty if wanted == "prompts" else {"prompt": "a", **empty}
    rows = check_rows(enumerate([full, empty, full], 1), "data", wanted)
    assert list(rows) == [full, full]
    assert [place.row for place in rows.origins.places(range(2))] == [1, 3]
    assert rows.remarks[0].startswith("1 rows ")
    assert rows.remarks[0].endswith("; the first: data: row 2")
    with pytest.raises(LorafoldError, match=r"data: no rows found, .*; 1 rows (have|are) "):
        check_rows([(1, empty)], "data", wanted)


def test_the_first_line_of_excel_names_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sep=;\r\nprompt;completion\r\na,b;c\r\n", newline="")
    assert list(read_rows(str(tmp_path / "rows.csv"))) == [{"prompt": "a,b", "completion": "c"}]


@pytest.mark.parametrize("found", ["prompt,ä\na,b\n".encode("utf-16-le"), b"\xd0\xcf\0\xff"])
def test_what_is_no_text_is_not_to_be_converted(found: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(found)
    line = refused(tmp_path / "rows.csv")
    assert "not text; expected CSV in UTF-8" in line
    assert "iconv" not in line


@pytest.mark.parametrize("name", ["a.xls", "a.ods"])
def test_a_spreadsheet_is_told_how_to_save_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    line = refused(tmp_path / name)
    assert "found a spreadsheet" in line
    assert "save as .xlsx or as CSV in UTF-8" in line


@pytest.mark.parametrize(
    ("header", "values", "told"),
    [
        ("Question,Answer,id", "a,b,c", "did you mean --columns prompt=Question,completion=Answer"),
        ("id;Frage;Antwort", "7;a;b", "did you mean --columns prompt=Frage,completion=Antwort"),
        ("Eingabe,Ausgabe", "a,b", "did you mean --columns prompt=Eingabe,completion=Ausgabe"),
        ("prompt,answer", "a,b", "did you mean to add completion=answer to --columns"),
        ("Mail text,when,Reply text", "a,2024-01-02,b",
         "--columns 'prompt=Mail text,completion=Reply text' (guessed from the order of the"
         " columns; a CSV file needs a header)"),
        ("one,two,three", "a,b,c", "(rename with --columns)"),
    ],
)  # fmt: skip
def test_the_columns_to_try_are_proposed(header, values, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{header}\n{values}\n")
    line = refused(tmp_path / "rows.csv")
    assert line.endswith(told)
    assert len(line) <= 300


def test_what_is_proposed_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Frage,Antwort\na,b\n")
    pairs = refused(tmp_path / "rows.csv").rpartition("--columns ")[2].split(",")
    columns = dict(pair.split("=") for pair in pairs)
    found = read_rows(str(tmp_path / "rows.csv"), Reading(columns))
    assert list(found) == [{"prompt": "a", "completion": "b"}]


def test_a_null_is_called_one(tmp_path: Path) -> None:
    rows = '{"text": "a", "label": "b"}\n{"text": "a", "label": null}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    assert "row 2: field label: found null, expected a value" in refused(tmp_path / "a.jsonl")


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(1239)]
    text = listed(names)
    assert text.endswith(f" and {1239 - text.count('model'):,} more")
    assert len(text) <= 220
    assert listed("abcdefg", "; ") == "a; b; c; d; e; and 2 more"
    assert listed(["a"], count=7) == "a and 6 more"
    assert listed([]) == ""
    assert len(truncate_middle("x" * 1000, 41)) == 41
    # the widest table and the worst file
    header = ",".join(f"c{n}" for n in range(999))
    (tmp_path / "wide.csv").write_text(f"{header}\n{header}\n")
    (tmp_path / "bad.jsonl").write_text("\n".join(f'{{"key {n}": {n}}}' for n in range(999)))
    for name in ("wide.csv", "bad.jsonl"):
        assert len(refused(tmp_path / name)) <= 300
    assert MAX_ITEMS == 5


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    began = time.monotonic()
    with pytest.raises(LorafoldError, match=r"on this machine.*9 does not answer, and the model"):
        resolve_model("nobody/nothing")
    with pytest.raises(LorafoldError, match=r"this name fails: http://127.0.0.1:9 does not ans"):
        _ = parse_source("nobody/nothing").size
    assert time.monotonic() - began < 10  # with retries half a minute
