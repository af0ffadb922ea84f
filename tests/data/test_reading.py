"""Which files a source stands for, in which order, and what is told of one that can't be read."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import error_cases
import lorafold as lf
from error_cases import told_of as told
from large_cases import stream_of
from lorafold.api.arguments import as_rows
from lorafold.data import rows as reading
from lorafold.data import tokenizing
from lorafold.data.row_sources import Reading, parse_source
from lorafold.data.row_store import SourcePart
from lorafold.data.rows import read_rows
from lorafold.errors import LorafoldError

ROW = {"prompt": "2024-01-02", "completion": "Hi"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
LINE = json.dumps(ROW) + "\n"


def folder(path: Path, **rows: int) -> Path:
    """A directory of files with as many rows; `a__jsonl` names a.jsonl."""
    for name, count in rows.items():
        file = path / name.replace("__", ".").replace("_in_", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(ROW | {"completion": f"{file.name} {n}"}) for n in range(count))
        file.write_text("".join(f"{line}\n" for line in lines))
    return path


def refusal(source: Any) -> str:
    return error_cases.refusal(as_rows, source if isinstance(source, list) else str(source))


def test_a_directory_has_every_file_of_a_known_kind_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", b10__jsonl=1, b2__JSONL=2, my_test_questions__jsonl=1, z__jsonl=0)
    (path / "c.csv").write_text("prompt,completion\na,c.csv 0\n")
    (path / "notes.txt").write_text("a")
    (path / ".ipynb_checkpoints").mkdir()
    (path / ".ipynb_checkpoints" / "b2.jsonl").write_text(LINE)
    (path / ".gitattributes").write_text("a")
    rows = read_rows(str(path))
    assert [row["completion"] for row in rows] == [
        "b2.JSONL 0", "b2.JSONL 1", "b10.jsonl 0", "c.csv 0", "my_test_questions.jsonl 0"
    ]  # fmt: skip
    assert rows[0]["prompt"] == "2024-01-02", "text stays text"
    assert list(rows.files.values()) == [2, 1, 1, 1, 0]
    assert rows.record["files"] == rows.files
    assert told(path) == (
        f"{path}: 5 files: b2.JSONL 2 rows, b10.jsonl 1 rows, c.csv 1 rows, my_test_questions.jsonl"
        " 1 rows, z.jsonl 0 rows; left out: .ipynb_checkpoints/b2.jsonl (hidden); notes.txt"
        " (unsupported format)\n"
    )


def test_of_splits_a_directory_has_those_for_training(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "d", train_in_a__jsonl=1, test_in_a__jsonl=1, dev__jsonl=1, more__jsonl=1,
        contest__jsonl=1,
    )  # fmt: skip
    assert [Path(name).name for name in read_rows(str(path)).files] == [
        "contest.jsonl", "more.jsonl", "a.jsonl"
    ]  # fmt: skip
    left = "left out: dev.jsonl, test/a.jsonl (another split; to use it, give the file)"
    assert left in told(path)
    assert len(read_rows(str(path / "dev.jsonl"))) == 1
    other = folder(tmp_path / "e", test__jsonl=1, validation__jsonl=1)
    assert refusal(other) == (
        f"{other}: found the splits test, validation, expected only one, or one named train;"
        f" select a split with a pattern such as {other}/*test*"
    )
    (other / "test.jsonl").unlink()
    assert len(read_rows(str(other))) == 1
    (other / "validation.jsonl").unlink()
    assert f"{other}: found no file of rows, expected .jsonl" in refusal(other)


def test_a_pattern_stands_for_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", a__jsonl=1, b__jsonl=1, in_in_c__jsonl=1, d__csv=0, test__jsonl=1)
    assert len(read_rows(str(path / "*.jsonl"))) == 3
    assert len(read_rows(str(path / "**" / "*.jsonl"))) == 4
    assert [part.weight for part in read_rows(f"{path}/[ab].jsonl:0.5").parts] == [0.5]
    assert "left out" in told(path / "*")
    assert "found no file that matches, expected .jsonl" in refusal(path / "*.parquet")
    (path / "x[1].jsonl").write_text(LINE)
    assert len(read_rows(str(path / "x[1].jsonl"))) == 1, "a file of that name is meant"


def test_files_of_a_directory_may_have_shapes_of_their_own(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", a__jsonl=2, b__jsonl=3)
    (path / "c.jsonl").write_text(json.dumps(CHAT) + "\n")
    rows = read_rows(f"{path}:0.5")
    assert rows.parts == (SourcePart(5, 0.5), SourcePart(1, 0.5))
    assert [str(form) for form in rows.formats] == ["{prompt, completion}", "{messages}"]
    (path / "d.jsonl").write_text(LINE + json.dumps(CHAT) + "\n")
    message = refusal(path)
    assert message.startswith(f"{path / 'd.jsonl'}: row 2: format {{messages}}, but row 1 has")


def test_a_file_that_changed_at_one_size_and_time_is_read_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizing, "MAX_IN_MEMORY", 100)
    monkeypatch.setattr(reading, "MAX_IN_MEMORY", 100)
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    path = folder(tmp_path / "d", a__jsonl=5, b__jsonl=5)
    first, stream = read_rows(str(path)), stream_of(str(path)).identity
    assert read_rows(str(path)).files == first.files == {
        str(path / "a.jsonl"): 5, str(path / "b.jsonl"): 5
    }  # fmt: skip
    before = (path / "b.jsonl").stat()
    (path / "b.jsonl").write_text((path / "b.jsonl").read_text().replace("b.jsonl 4", "b.jsonl 5"))
    os.utime(path / "b.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path / "b.jsonl").stat().st_size == before.st_size
    assert read_rows(str(path))[-1]["completion"] == "b.jsonl 5"
    assert read_rows(str(path)).sha256 != first.sha256
    assert stream_of(str(path)).identity != stream
    (path / "b.jsonl").rename(path / "c.jsonl")
    assert list(read_rows(str(path)).files.values()) == [5, 5]
    assert str(path / "c.jsonl") in read_rows(str(path)).files


def test_a_stream_goes_through_the_files_of_a_directory(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", a__jsonl=2, b__jsonl=0, c__jsonl=1)
    rows = stream_of(str(path)).rows(0, 1)
    found = [next(rows) for _ in range(6)]
    assert {(name, row["completion"]) for name, row, _ in found} == {
        (f"{path}/a.jsonl: row 1", "a.jsonl 0"), (f"{path}/a.jsonl: row 2", "a.jsonl 1"),
        (f"{path}/c.jsonl: row 1", "c.jsonl 0"),
    }  # fmt: skip
    with pytest.raises(LorafoldError, match="no rows found"):
        stream_of(str(folder(tmp_path / "e", a__jsonl=0)))


def test_a_run_has_its_files_in_its_result(tiny_model_dir, tmp_path: Path) -> None:
    path = folder(tmp_path / "d", a__jsonl=2, b__jsonl=1)
    recipe = lf.Recipe(steps=1, batch=1, storage="fp32")
    done = lf.train(recipe, data=path, out=tmp_path / "out", model=tiny_model_dir("llama"))
    assert done.files == {str(path / "a.jsonl"): 2, str(path / "b.jsonl"): 1}
    record = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert record["data"]["files"] == done.files


TABLE = pa.table({
    "prompt": pa.array([ROW["prompt"]], pa.large_string()),
    "completion": pa.array([ROW["completion"]]).dictionary_encode(),
})  # fmt: skip


def as_arrow(writer: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with writer(sink, TABLE.schema) as file:
        file.write_table(TABLE)
    return sink.getvalue()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("a.json.GZ", gzip.compress(json.dumps([ROW]).encode(), mtime=0)),
        ("a.ndjson", LINE.encode()),
        ("a.JSONL", LINE.replace("\n", "\r\n").encode()),
        ("a.tsv", b"prompt\tcompletion\n2024-01-02\tHi\n"),
        ("a.csv", b"\xef\xbb\xbfprompt;completion\r\n2024-01-02;Hi\r\n"),
        ("a.arrow", as_arrow(pa.ipc.new_file)),
        ("a.arrow", as_arrow(pa.ipc.new_stream)),
        ("a.parquet", as_parquet()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps([ROW]).encode()),
        ("a.json", json.dumps(ROW, indent=1).encode()),
        ("a.json", b"\n" + LINE.encode()),
    ],
    ids=map(str, range(12)),
)
def test_kinds_of_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_rows(str(tmp_path / name)) == [ROW]


@pytest.mark.parametrize(("name", "codec"), [("a.jsonl.zst", "zstd"), ("a.csv.bz2", "bz2")])
def test_compressed_files_of_several_parts(name: str, codec: str, tmp_path: Path) -> None:
    """A compressed file may be several, end to end."""
    pieces = [LINE, LINE] if "json" in name else ["prompt,completion\n", "2024-01-02,Hi\n" * 2]
    for piece in pieces:
        file = (tmp_path / name).open("ab")
        with file, pa.CompressedOutputStream(file, codec) as stream:
            stream.write(piece.encode())
    assert read_rows(str(tmp_path / name)) == [ROW, ROW]
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-5])
    assert "can't be read: " in refusal(tmp_path / name)


LONG = "1" * 5000
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b", "x": {"y": ["\\ud83d"]}}',
         "row 1: field x.y[0]: found half of a surrogate pair, \\ud83d at character 1, expected"),
        ("a.json", json.dumps([ROW, {"\ud83d": 1}]), "row 2: found the key '\\ud83d', expected"),
        ("a.json", '[{"prompt": "é"}]'.encode("latin-1"), "a.json: not UTF-8 at byte 14; save"),
        ("a.jsonl", f'{{"prompt": "a", "x": [2, {LONG}]}}',
         "row 1: field x[1]: found an integer with more than 4,300 digits, expected fewer"),
        ("a.json", f'[{{"x": {LONG}}}]', "field [0].x: found an integer with more than 4,300"),
        ("a.jsonl", f'{{"x": {DEEP}}}', "row 1: found a value nested in more than 100 lists"),
        ("a.jsonl", f'{{"x": {DEEP[99_800:100_200]}}}',
         "row 1: field x: found a value nested in more than 100 lists and objects, expected fewer"),
        ("a.jsonl", json.dumps(CHAT | {"tools": f'[{{"name": "f", "x": {LONG}}}]'}),
         "row 1: field tools: found unusable JSON: field [0].x: found an integer"),
        ("a.jsonl", json.dumps(CHAT | {"tools": DEEP}), "unusable JSON: found a value nested"),
        ("a.jsonl", LINE + '{"prompt": "a", "completion": null}',
         "row 2: field completion: found null, expected a value, which rows of {prompt, comple"),
        ("a.json", '{"data": [1,\n 2]}', "row 1: keys found: 'data'; expected one of"),
        ("a.json", '{"prompt": "a",\n "x": }', "row 1: not JSON: Expecting property name enclosed"),
        ("a.json", '{\n"prompt": "a",\n "x": }', "a.json: line 3: not JSON: Expecting value at"),
        ("a.jsonl.gz", b"no", "found no gzip data; if the file is plain text, rename it"),
        ("a.pdf", b"PK", "found a .pdf file, expected .jsonl"),
        ("a.csv", b"PK\x03\x04", "a workbook or another zip file, expected a name that ends with"),
    ],
)  # fmt: skip
def test_one_line_says_what_cant_be_read(name, content, part, tmp_path) -> None:
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    assert part in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (ROW | {"x": "\ud83d"}, "row 1: field x: found half of a surrogate pair"),
        (ROW | {"x": 10**5000}, "row 1: field x: found an integer with more than 4,300 digits"),
        (ROW | {3: 4}, "row 1: found the key 3, expected keys that are valid text"),
        (3, "row 1: found 3, expected an object"),
    ],
)  # fmt: skip
def test_rows_given_in_python_are_looked_through(row: Any, part: str) -> None:
    assert part in refusal([row])


def broken() -> Iterator[dict[str, str]]:
    yield ROW
    raise ValueError("no such\nfield")


SAVED = datasets.Dataset.from_list([ROW, ROW])
FRAME = pandas.DataFrame([ROW, ROW])


@pytest.mark.parametrize(
    "data",
    [
        SAVED, SAVED.to_iterable_dataset(), datasets.DatasetDict(train=SAVED),
        datasets.DatasetDict(only=SAVED), FRAME, pandas.DataFrame([CHAT, CHAT]),
        FRAME.set_index("prompt"), FRAME[FRAME.completion == "Hi"].iloc[::-1],
        pa.Table.from_pylist([ROW, ROW]), pa.RecordBatch.from_pylist([ROW, ROW]),
        (row for row in [ROW, ROW]), (ROW, ROW), {name: [v, v] for name, v in ROW.items()},
    ],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_rows_are_taken_from_what_a_notebook_has(data: Any) -> None:
    rows = as_rows(data)
    assert len(rows) == 2
    assert rows[1] in (ROW, CHAT, {"completion": "Hi", "prompt": "2024-01-02"})


def test_other_splits_and_columns_are_named(caplog: pytest.LogCaptureFixture) -> None:
    other = SAVED.rename_column("prompt", "x")
    assert len(as_rows(datasets.DatasetDict(train=SAVED, test=other, dev=other))) == 2
    assert caplog.messages == ["rows given in Python: using the split train; left out: test, dev"]
    ignored = "rows given in Python: ignored keys: Unnamed: 0 (rows of {prompt, completion})\n"
    assert told(FRAME.reset_index(names="Unnamed: 0")) == ignored


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (None, "data: found None, expected rows, a path or a Hub dataset"),
        (broken, "data: found <function broken"),
        (broken(), "rows given in Python: reading row 2: ValueError: no such field"),
        (ROW, "rows given in Python: found a single row, expected a list of rows"),
        ({"prompt": ["a"], "completion": ["b", "c"]}, "expected length 1 but got length 2"),
        (SAVED.select([]), "rows given in Python: no rows found, expected at least one"),
        (pandas.DataFrame(), "rows given in Python: no rows found, expected at least one"),
        (pandas.DataFrame([ROW, ROW | {"completion": float("nan")}]),
         "row 2: field completion: found null, expected a value"),
        (pandas.DataFrame([ROW, ROW | {"completion": 5}]), "ArrowTypeError"),
        (SAVED["prompt"], "rows 1 to 2: found text, expected an object"),
        (datasets.DatasetDict(a=SAVED, b=SAVED), "found the splits a, b, expected only one, or"),
    ],
)  # fmt: skip
def test_rows_that_cant_be_taken_are_refused_in_one_line(data: Any, part: str) -> None:
    assert part in error_cases.refusal(as_rows, data)


def test_a_field_of_csv_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{'a' * 200_000},b\n")
    assert len(read_rows(str(tmp_path / "a.csv"))[0]["prompt"]) == 200_000


def test_a_column_may_be_dropped(tmp_path: Path) -> None:
    rows = [CHAT | ROW]
    assert as_rows(rows, Reading({"messages": ""})) == [ROW]
    dropped = "rows given in Python: dropped by --columns: messages\n"
    assert told(rows, {"messages": ""}) == dropped
    with pytest.raises(LorafoldError, match="row 1: found no column 'x'; the row has"):
        as_rows(rows, Reading({"x": ""}))


def test_sources_know_whether_they_are_several(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", a__jsonl=1)
    several = [parse_source(str(p)).is_multiple for p in (path, path / "a.jsonl", path / "*")]
    assert several == [True, False, True]
