"""Data of any size: Arrow files, worker processes, the cache, weights, streams, killed runs."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import lorafold as lf
from conftest import lorafold, make_tokenizer, refused
from conversation_cases import jsonl, prompts, said, user
from error_cases import refusal
from large_cases import N, row, stream_of, train, written
from lorafold.data import rows as reading
from lorafold.data import tokenizing
from lorafold.data.batches import Batches, epoch_size
from lorafold.data.classification import encode_labelled
from lorafold.data.control_tokens import rendered_ids
from lorafold.data.examples import CompletionEncoder, encode, tokenize_in_parts
from lorafold.data.formats import CONVERSATIONS, format_of
from lorafold.data.render import ensure_chat_template, render_trained
from lorafold.data.row_sources import parse_source
from lorafold.data.row_store import ArrowRows, Rows, SourcePart
from lorafold.data.rows import read_rows
from lorafold.errors import LorafoldError
from lorafold.files import cache
from lorafold.files.atomic import MANIFEST
from lorafold.runtime.processor import usable_cores
from serving_cases import until

pytestmark = pytest.mark.usefixtures("unestimated")


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Large data, with a cache of its own."""
    monkeypatch.setattr(tokenizing, "MAX_IN_MEMORY", 100_000)
    monkeypatch.setattr(reading, "MAX_IN_MEMORY", 100_000)
    monkeypatch.setenv("LORAFOLD_CACHE", str(tmp_path / "cache"))
    return written(tmp_path / "rows.jsonl")


def in_memory(path: Path) -> Rows:
    return Rows.of([json.loads(line) for line in path.read_text().splitlines()])


def test_large_rows_and_tokens_are_those_of_small_data(large: Path) -> None:
    rows, plain = read_rows(str(large)), in_memory(large)
    assert isinstance(rows.rows, ArrowRows)
    assert rows.digest_and_size[1] > tokenizing.MAX_IN_MEMORY
    assert rows == plain
    assert list(rows[0]) == ["completion", "prompt"], "keys keep their order"
    assert (rows[5], rows[-1], rows[2:4]) == (plain[5], plain[-1], plain[2:4])
    assert rows.digest_and_size == plain.digest_and_size

    tokenizer = make_tokenizer()
    kept = encode(rows, tokenizer, 75)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "MAX_IN_MEMORY", 10**9)
        direct = encode(plain, tokenizer, 75)
    assert kept.report == direct.report
    assert kept.report.truncated > 0
    assert list(kept.examples) == list(direct.examples)
    assert kept.examples[-3:] == direct.examples[-3:]
    assert kept.examples.lengths.tolist() == [len(e.ids) for e in direct.examples]  # type: ignore[attr-defined]
    some = np.array([3, 700, N - 1])
    found = encode(rows.select(some), tokenizer, 75).examples
    assert list(found) == [direct.examples[i] for i in some]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_prompts_that_are_tokenized_with_their_completions_have_the_ids_of_generation(template):
    """With a template of added tokens, and with one of ordinary text, where borders merge."""
    tokenizer = make_tokenizer()
    if template == "plain":
        tokenizer.chat_template = None
        ensure_chat_template(tokenizer)
    rng = random.Random(0)
    pieces = ["Book", " a", "\n", "\n\n", "###", " ", "  ", "é", "🙂", "<|im_end|>", "{", "tab"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(600)]
    rows = [{"prompt": p, "completion": c} for p, c in zip(texts[::2], texts[1::2], strict=True)]
    found = CompletionEncoder(tokenizer).encode(Rows.of(rows).extract(CONVERSATIONS), 0).to_pylist()
    for (prompt, _), example, data in zip(prompts(rows, tokenizer), found, rows, strict=True):
        alone = rendered_ids(prompt, tokenizer)
        assert example["ids"][: example["spans"][0]] == alone
        [rendered] = render_trained(format_of(data).conversation(data), tokenizer).renderings  # type: ignore[union-attr, misc]
        assert (example["ids"], example["spans"]) == tokenize_in_parts(rendered, tokenizer)


def test_labelled_rows_are_kept_too(large: Path) -> None:
    data = large.with_name("labels.jsonl")
    said = '{{"text": "Book table {} early or late", "label": "{}"}}\n'
    data.write_text("".join(said.format(i, "ab"[i % 2]) for i in range(N)))
    kept = encode_labelled(read_rows(str(data)), make_tokenizer(), 8, ("a", "b"))
    assert kept.examples.counts == {"a": N // 2, "b": N // 2}
    assert [example.label for example in kept.examples[:4]] == [0, 1, 0, 1]
    assert {len(example.ids) for example in kept.examples} == {8}
    assert [entry.kind for entry in cache.entries()] == ["rows", "tokens"]


def test_a_second_run_reads_and_tokenizes_nothing(large: Path, monkeypatch) -> None:
    tokenizer = make_tokenizer()
    first = encode(read_rows(str(large)), tokenizer, 80)

    def never(*args: object) -> None:
        raise AssertionError("it was made again")

    monkeypatch.setattr(CompletionEncoder, "encode", never)
    monkeypatch.setattr(reading, "write_rows", never)
    assert list(encode(read_rows(str(large)), tokenizer, 80).examples) == list(first.examples)
    shorter = encode(read_rows(str(large)), tokenizer, 75)
    assert shorter.report.truncated > 0, "the length is not part of what is kept"
    with pytest.raises(AssertionError, match="made again"):
        read_rows(str(written(large, N + 1)))
    tokenizer.chat_template += "\n"
    written(large)
    with pytest.raises(AssertionError, match="made again"):
        encode(read_rows(str(large)), tokenizer, 80)


def test_what_is_damaged_is_made_again(large: Path) -> None:
    tokenizer, told = make_tokenizer(), io.StringIO()
    first = list(encode(read_rows(str(large)), tokenizer, 80).examples)
    for entry in cache.entries():
        [file] = entry.path.glob("*.arrow")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    notices: list[str] = []
    rows = read_rows(str(large), notice=notices.append)
    assert list(encode(rows, tokenizer, 80, Console(file=told)).examples) == first
    assert any("rows.arrow: content differs from the manifest" in text for text in notices)
    assert "tokens.arrow: content differs" in told.getvalue()


def test_two_runs_at_once_share_what_one_makes(large: Path) -> None:
    made: list[int] = []

    def write(directory: Path) -> None:
        made.append(1)
        time.sleep(0.5)
        (directory / "file").write_text("whole")

    notices: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(cache.cache_entry, "tokens", "key", write, notices.append)
    assert made == [1]
    assert [text.split(" to create ")[0] for text in notices] == ["waiting for another process"]


def test_the_command_lists_and_clears_the_cache(large: Path) -> None:
    encode(read_rows(str(large)), make_tokenizer(), 80)
    listed = json.loads(lorafold("cache", "--json").stdout)
    assert [entry["kind"] for entry in listed["entries"]] == ["rows", "tokens"]
    assert listed["bytes"] > 200_000
    assert "MB in" in lorafold("cache", "--kind", "tokens").stdout
    assert "MB removed from" in lorafold("cache", "--kind", "tokens", "--clear").stdout
    assert [entry.kind for entry in cache.entries()] == ["rows"]
    lorafold("cache", "--clear")
    assert cache.entries() == []
    kinds = "digests, models, native, reference, rows, svd, tokens"
    assert refused("cache", "--kind", "token") == (
        f"error: --kind token: expected one of {kinds}\n"
    )


def test_clearing_leaves_what_another_process_makes(large: Path) -> None:
    left: list[str] = []

    def write(directory: Path) -> None:
        left.append(lorafold("cache", "--clear").stdout)
        (directory / "file").write_text("whole")

    path = cache.cache_entry("tokens", "key", write, lambda text: None)
    assert (path / MANIFEST).exists()
    assert left == [f"0.0 MB removed from {cache.cache_directory()}\n"]


def test_a_full_disk_is_one_line_and_leaves_nothing(large: Path, monkeypatch) -> None:
    rows, tokenizer = read_rows(str(large)), make_tokenizer()
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(tokenizing.shutil, "disk_usage", lambda path: full)
    with pytest.raises(LorafoldError, match=r"tokens: found 0.00 GB free, expected about"):
        encode(rows, tokenizer, 80)
    monkeypatch.undo()


def test_rows_that_fill_the_disk_leave_nothing(large: Path) -> None:
    """A file may not be larger than a limit of the process, as if the disk were full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(LorafoldError, match="was not written: "):
            read_rows(str(large))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, told)
    assert [p for p in (cache.cache_directory() / "rows").iterdir() if p.is_dir()] == []


def test_a_cache_that_cant_be_written_names_the_variable(large: Path, monkeypatch) -> None:
    (large.parent / "file").write_text("")
    monkeypatch.setenv("LORAFOLD_CACHE", str(large.parent / "file"))
    with pytest.raises(LorafoldError, match=r"can't be written: .*set LORAFOLD_CACHE to another"):
        read_rows(str(large))


def test_bad_rows_of_large_data_are_counted_and_nothing_is_kept(large: Path) -> None:
    with large.open("a") as file:
        file.write('{"prompt": 3, "completion": "x"}\n' * 12 + "no row\n")
    assert refusal(read_rows, str(large)) == (
        f"{large}: rows {N + 1} to {N + 12}: field prompt: found 3, expected text; row {N + 13}:"
        " not JSON: Expecting value at column 1"
    )
    assert cache.entries() == []


def test_what_the_template_refuses_is_told_also_from_workers(large: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if '1500' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
        + tokenizer.chat_template
    )
    for _ in range(2):
        told = refusal(encode, read_rows(str(large)), tokenizer, 80)
        assert told.startswith(f"{large}: row 1501: the model's chat template")


def test_an_error_in_a_worker_is_raised_here(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows(str(large))

    def broken(self: CompletionEncoder, rows: list, first: int) -> None:
        if first:
            raise ZeroDivisionError(first)
        return whole(self, rows, first)

    whole = CompletionEncoder.encode
    monkeypatch.setattr(CompletionEncoder, "encode", broken)
    with pytest.raises(ZeroDivisionError):
        encode(rows, make_tokenizer(), 80)
    killed = lambda self, rows, first: os._exit(1) if first else whole(self, rows, first)  # noqa: E731
    monkeypatch.setattr(CompletionEncoder, "encode", killed)
    if usable_cores() > 1 and sys.platform == "linux":
        with pytest.raises(LorafoldError, match="a worker process was killed"):
            encode(rows, make_tokenizer(), 80)
    assert [entry.kind for entry in cache.entries()] == ["rows"]


def test_weights_are_read_after_the_last_colon_before_a_number(tmp_path: Path) -> None:
    for text, name, weight in (
        ("a.jsonl", "a.jsonl", 1), ("a.jsonl:0.3", "a.jsonl", 0.3),
        ("C:\\a.jsonl", "C:\\a.jsonl", 1), ("x:y:2e1", "x:y", 20),
    ):  # fmt: skip
        assert (parse_source(text).name, parse_source(text).weight) == (name, weight)
    (tmp_path / "a:3").write_text("")
    assert parse_source(str(tmp_path / "a:3")).weight == 1, "a file of that name is meant"
    for wrong in ("a.jsonl:0", "a.jsonl:-1", "a.jsonl:inf", "a.jsonl:nan"):
        with pytest.raises(LorafoldError, match=r"--data a.jsonl:.*expected a finite number"):
            parse_source(wrong)


def test_only_training_rows_have_weights(tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl", 4)
    with pytest.raises(LorafoldError, match="only training rows may have a weight"):
        lf.evaluate("smollm2", f"{data}:0.5")


def test_an_epoch_takes_each_source_by_its_weight() -> None:
    parts = [SourcePart(10), SourcePart(100, 0.3), SourcePart(4, 2.0)]
    size = epoch_size(parts)
    assert size == 10 + 30 + 8
    order = [i for step in Batches(parts, size, 10, seed=1) for i in step]
    for epoch in range(10):
        taken = Counter(order[epoch * size : (epoch + 1) * size])
        assert all(taken[i] == 1 for i in range(10))
        assert sum(taken[i] for i in range(10, 110)) == 30
        assert all(taken[i] == 2 for i in range(110, 114))
    assert all(Counter(order)[i] == 3 for i in range(10, 110)), "all of it in ten thirds"
    assert list(Batches([SourcePart(6), SourcePart(4)], 4, 5, 3)) == list(Batches(10, 4, 5, 3))
    assert list(Batches(parts, 7, 30, 1))[:8] == list(Batches(parts, 7, 8, 1))


def test_sources_may_have_shapes_of_their_own(tmp_path: Path) -> None:
    chat = {"messages": [user("Book"), said("Yes")], "id": 1}
    first, second = written(tmp_path / "a.jsonl", 20), jsonl(tmp_path / "b.jsonl", *[chat] * 10)
    rows = read_rows([str(first), f"{second}:0.5"])
    assert rows.parts == (SourcePart(20), SourcePart(10, 0.5))
    assert rows.ignored == ("id",)
    assert rows.identity == f"{rows.sha256} 20*1 10*0.5"
    found = encode(rows, make_tokenizer(), 80)
    assert found.parts == rows.parts
    held = rows.select(np.array([1, 2, 25]))
    assert held.parts == (SourcePart(2), SourcePart(1, 0.5))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "folder"])
def test_a_stream_is_seeded_endless_and_read_row_by_row(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / "rows.jsonl", 50)
    if name != "rows.jsonl":
        (tmp_path / "folder").mkdir()
        file = tmp_path / ("folder/rows.parquet" if name == "folder" else name)
        pq.write_table(pa.Table.from_pylist([row(i) for i in range(50)]), file)
        file = tmp_path / name

    def taken(n: int, seed: int = 0, buffer: int = 20) -> list[dict]:
        rows = stream_of(str(file)).rows(seed, buffer)
        return [next(rows)[1] for _ in range(n)]

    first = taken(200)
    assert first == taken(200)
    assert first != taken(200, seed=1)
    assert {r["prompt"] for r in first} == {row(i)["prompt"] for i in range(50)}
    assert taken(50, buffer=1) == [row(i) for i in range(50)]
    assert sorted(taken(50), key=str) != sorted(taken(60)[10:], key=str)


def test_a_stream_mixes_sources_by_their_weights(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.jsonl", 40), written(tmp_path / "b.jsonl", 40, first=1000)
    rows = stream_of(a, f"{b}:0.25").rows(0, 10)
    labels = Counter(next(rows)[0].split(":")[0] for _ in range(2000))
    assert labels[str(a)] / 2000 == pytest.approx(0.8, abs=0.03)


def test_a_bad_row_of_a_stream_is_told_when_it_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", 300)
    with file.open("a") as lines:
        lines.write('{"prompt": "x", "completion": null}\n')
    rows = stream_of(str(file)).rows(0, 10)
    with pytest.raises(LorafoldError, match=r"row 301: field completion: found null"):
        list(islice(rows, 400))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "streaming: requires steps"),
        ({"steps": 3, "eval_fraction": 0.1}, "eval_fraction: not supported with streaming"),
        ({"steps": 3, "objective": "classify"}, "streaming: requires the objective sft"),
    ],
)
def test_what_a_stream_cant_do(fields: dict, said: str) -> None:
    with pytest.raises(LorafoldError, match=said):
        lf.Recipe(streaming=True, **fields)


def test_other_verbs_need_all_rows(tmp_path: Path) -> None:
    with pytest.raises(LorafoldError, match="streaming: only for lorafold train"):
        lf.compare(tmp_path / "out", recipe=lf.Recipe(streaming=True, steps=2))
    with pytest.raises(LorafoldError, match="streaming: found rows"):
        lf.train(lf.Recipe(streaming=True, steps=2), data=[row(1)], out=tmp_path / "out")


@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_has_rows_of_the_objective(streaming: bool, tiny_model_dir, tmp_path) -> None:
    first, second = written(tmp_path / "a.jsonl", 5), tmp_path / "b.jsonl"
    second.write_text('{"text": "Book a table", "label": "x"}\n' * 5)
    data, model = [str(first), str(second)], tiny_model_dir("llama")
    with pytest.raises(LorafoldError, match=r"found rows of \{text, label\}, which are for"):
        train(data, tmp_path / "out", model, streaming=streaming)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def straight(tiny_model_dir, tmp_path_factory) -> dict[bool, bytes]:
    """The bytes of an adapter that was trained without a break, by whether rows were streamed."""
    root = tmp_path_factory.mktemp("straight")
    data = written(root / "rows.jsonl")
    for streaming in (False, True):
        train(str(data), root / str(streaming), tiny_model_dir("llama"), streaming=streaming)
    return {s: (root / str(s) / WEIGHTS).read_bytes() for s in (False, True)}


WEIGHTS = "adapter_model.safetensors"
KILLED = """
import os, signal, sys
sys.path.insert(0, "tests/lib")
import large_cases as t
t.lowered()
where, data, out, model, pids = sys.argv[1:]
def kill(*args, **fields):
    os.kill(parent, signal.SIGKILL)
    import time; time.sleep(1)
parent = os.getpid()
if where == "tokenizing":
    from lorafold.data.examples import CompletionEncoder
    whole = CompletionEncoder.encode
    def encode(self, rows, first):
        open(os.path.join(pids, str(os.getpid())), "w").close()
        return kill() if first >= 2000 else whole(self, rows, first)
    CompletionEncoder.encode = encode
elif where == "reading":
    from lorafold.data import row_store
    import lorafold.data.rows as reading
    whole = reading.write_rows
    def write(rows, path):
        whole([next(iter(rows))], path)
        kill()
    reading.write_rows = write
elif where == "packing":
    from lorafold.training_step import losses
    losses.CompletionLoss.micro_batches = kill
else:
    from lorafold.training import loop
    whole = loop.train_step
    loop.train_step = lambda job, rows, i: kill() if i == 8 else whole(job, rows, i)
t.train(data, t.Path(out), model, streaming=where == "streaming")
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["tokenizing", "streaming", "reading", "packing", "training"])
def test_killed_at_any_stage_and_resumed_it_ends_with_the_same_bytes(
    where: str, large: Path, straight: dict[bool, bytes], tiny_model_dir, tmp_path: Path
) -> None:
    model, out, pids = tiny_model_dir("llama"), tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    command = [sys.executable, "-c", KILLED, where, str(large), str(out), str(model), str(pids)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()
    workers = [int(path.name) for path in pids.iterdir()]
    until(lambda: not any(alive(pid) for pid in workers), 10)  # none outlives the run
    train(str(large), out, model, resume=True, streaming=where == "streaming")
    assert (out / WEIGHTS).read_bytes() == straight[where == "streaming"]
    assert not [p for p in cache.cache_directory().glob("*/.*") if p.is_dir()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_what_a_run_says_of_its_rows(large: Path, tiny_model_dir, tmp_path: Path) -> None:
    more = written(tmp_path / "more.jsonl", 100)
    model = ["--model", str(tiny_model_dir("llama")), "--device", "cpu", "--storage", "fp32"]
    train = ("train", *model, "--steps", "2", "--data", str(large), "--out")
    done = lorafold(*train, str(tmp_path / "a"), "--data", f"{more}:0.5")
    assert done.returncode == 0, done.stderr
    assert "MB of rows" in done.stderr or "GB of rows" in done.stderr
    assert "run lorafold lab cache --clear" in done.stderr
    assert "2200 rows" in done.stderr
    record = json.loads((tmp_path / "a" / "lorafold.json").read_text())
    assert record["data"]["source"] == f"{large}, {more}:0.5"
    assert record["data"]["rows"] == 2200
    done = lorafold(*train, str(tmp_path / "b"), "--streaming", "--resume")
    assert done.returncode == 0, done.stderr
    assert "no run to resume" in done.stderr
    assert "stream: 16 rows read" in done.stderr
    done = lorafold("train", "--data", f"{large}:x", *model, "--out", str(tmp_path / "c"))
    assert done.returncode == 2
    assert "no such file or directory" in done.stderr
