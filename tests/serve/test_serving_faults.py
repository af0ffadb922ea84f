"""Faults stay where they are: numbers, bodies, clients, files, threads."""

import asyncio
import ctypes
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

import lorafold as lf
from engine_cases import evict
from serving_cases import ADMIN, Answer, Running, raw, running, saved, stream_of, until

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.filterwarnings(  # threads are killed
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
SPECS = {"a": lf.LoRA(rank=2), "b": lf.LoRA(rank=3), "c": lf.DoRA()}


@pytest.fixture
def server(serve_once) -> Running:
    """A server for a test that damages it or its adapters."""
    return serve_once(SPECS)


@pytest.fixture(scope="module")
def common(serve) -> Running:
    """A server for the tests that leave it as it was."""
    return serve(SPECS)


def at_once(server: Running, models: list[str], **more: object) -> list[Answer]:
    with ThreadPoolExecutor(len(models)) as pool:
        asked = [
            pool.submit(server.complete, model, f"Number {i}", **more)
            for i, model in enumerate(models)
        ]
        return [one.result() for one in asked]


def test_numbers_that_are_not_finite_fail_their_adapter_alone(server: Running):
    models = ["a", "b", "c", server.parts.registry.base]
    clean = [answer.json["choices"][0]["text"] for answer in at_once(server, models, max_tokens=12)]
    key = server.parts.registry.adapters["a"].key
    states = server.engine.adapters
    held = states.entry(key).loaded
    assert held is not None
    for t in held.tensors:
        t.fill_(torch.nan)
    for _ in range(3):
        poisoned, *others = at_once(server, models, max_tokens=12)
        assert (poisoned.status, poisoned.code) == (500, "adapter_numerics")
        assert [answer.json["choices"][0]["text"] for answer in others] == clean[1:]
    until(lambda: "a" in server.parts.registry.state.quarantined)
    assert server.complete("a", "The").code == "adapter_quarantined"
    assert server.ask("/v1/models/a").json["state"] == "quarantined"
    assert "lorafold_quarantines_total 1.0" in server.metrics()
    loaded = server.load("a")
    assert loaded.status == 200, loaded.content
    assert server.text("a", "Number 0", max_tokens=12) == clean[0]
    assert server.text("b", "Number 1", max_tokens=12) == clean[1]  # whatever slot it got


def test_a_quarantine_holds_where_it_cannot_be_kept(server: Running, caplog):
    state = server.parts.registry.file
    state.unlink(missing_ok=True)
    state.mkdir()
    answer = server.manage("a", "quarantine")
    assert answer.status == 200, answer.content
    assert server.complete("a", "The").code == "adapter_quarantined"
    assert "the quarantine of a can't be saved" in caplog.text


def test_other_files_are_not_in_quarantine(llama, tmp_path):
    folder = saved(llama, SPECS, tmp_path / "adapters")
    with running(llama, folder) as server:
        for name in "ab":
            server.manage(name, "quarantine")
    shutil.rmtree(folder / "a")
    shutil.copytree(folder / "c", folder / "a")
    with running(llama, folder) as server:
        assert server.complete("a", "The").status == 200
        assert server.complete("b", "The").code == "adapter_quarantined"


def test_every_first_token_and_every_other_is_counted(server: Running):
    at_once(server, ["a", "b", "c"] * 8, max_tokens=5)
    text = server.metrics()
    assert "lorafold_first_token_seconds_count 24.0" in text
    assert "lorafold_queue_seconds_count 24.0" in text
    assert "lorafold_between_tokens_seconds_count 96.0" in text


def test_a_client_writes_no_line_of_the_log(common: Running, caplog):
    caplog.set_level("INFO", "lorafold")
    common.ask("/v1/x%0A12:00:00%20req-fake%20status=200%1b[31m")
    assert not any("\n" in record.getMessage() for record in caplog.records)
    assert "req-fake status" not in caplog.text
    assert "\x1b" not in caplog.text


def test_bodies_that_nobody_should_send(common: Running):
    """The others' streams go on meanwhile, with the same text."""
    alone = common.text("b", "The", max_tokens=200)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(common.text, "b", "The", max_tokens=200)
        post = "POST /v1/completions HTTP/1.1\r\n"
        assert b" 413 " in raw(common, f"{post}Content-Length: 100000000", b"x" * 1000)[:20]
        chunk = b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16))
        assert b" 413 " in raw(common, f"{post}Transfer-Encoding: chunked", *[chunk] * 20)[:20]
        assert b" 4" in raw(common, f"{post}Content-Length: -1")[:20]
        assert b" 400 " in raw(common, f"{post}Content-Length: {'0' * 4400}")[:20]
        assert b" 4" in raw(common, "POST completions")[:20]
        for content in (
            b"[" * 10000, b'{"a":' * 10000 + b"1" + b"}" * 10000, b"\xff\xfe", b"", b"nope",
            b'{"model": "a", "prompt": "\xc3\x28"}', b'{"temperature": NaN}',
        ):  # fmt: skip
            answer = common.ask("/v1/completions", content)
            assert (answer.status, answer.code) == (400, "invalid_json"), content[:20]
        big = {"model": "a", "prompt": [1] * 100000}
        assert common.ask("/v1/completions", big).code == "context_length_exceeded"
        long = {"model": "a", "messages": [{"role": "user", "content": "x"}] * 300}
        assert common.ask("/v1/chat/completions", long).status == 400
        assert beside.result() == alone
    assert common.idle()


def test_clients_that_leave_leave_nothing(common: Running):
    draw = random.Random(0)
    before = threading.active_count()
    for _ in range(10):
        open_now = [stream_of(common, draw.choice("abc"), 400) for _ in range(30)]
        for at in draw.sample(open_now, len(open_now)):
            at.settimeout(0.002 * draw.random())
            with suppress(TimeoutError):
                at.recv(draw.choice((1, 500, 5000)))
            at.close()
    until(common.idle)
    states = common.engine.adapters
    assert all(state.references == state.leases == 0 for state in states._entries)
    assert threading.active_count() <= before + 8
    assert common.complete("a", "The").status == 200


def test_a_slow_reader_is_let_go(serve_once):
    server = serve_once(SPECS, limits={"unread_tokens": 64, "choices": 4})
    at = stream_of(server, "a", 480, n=4, logprobs=20)
    until(lambda: server.parts.host.jobs)
    most = 0
    while not server.idle():
        most = max([most, *(len(job.events) for job in list(server.parts.host.jobs.values()))])
        time.sleep(0.01)
    at.close()
    until(lambda: "slow_reader" in server.metrics())
    assert most < 480


DAMAGES: dict[str, Callable[[os.PathLike[str]], object]] = {
    "truncated": lambda file: os.truncate(file, 100),
    "emptied": lambda file: os.truncate(file, 0),
    "overwritten": lambda file: _flip(file),
    "deleted": lambda file: os.remove(file),
    "unreadable": lambda file: (os.remove(file), os.mkdir(file)),
    "swapped": lambda file: (os.remove(file), os.symlink("/etc/passwd", file)),
}


def _flip(file: os.PathLike[str]) -> None:
    with open(file, "r+b") as at:
        at.seek(-8, os.SEEK_END)
        at.write(b"\x01" * 8)


@pytest.fixture
def mended(common, tmp_path):
    """The common server, whose adapter a is whole again afterwards."""
    whole = shutil.copytree(common.folder / "a", tmp_path / "a")
    yield common
    shutil.rmtree(common.folder / "a", ignore_errors=True)
    shutil.copytree(whole, common.folder / "a")
    assert common.load("a").status == 200


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_files_that_change_under_the_server(mended: Running, damage, name):
    text = mended.text("a", "The")
    DAMAGES[damage](mended.folder / "a" / name)
    assert mended.text("a", "The") == text  # it is in memory
    key = mended.parts.registry.adapters["a"].key
    assert evict(mended.engine.adapters, key)
    cold = mended.complete("a", "The")
    assert (cold.status, cold.code) == (503, "adapter_unavailable")
    assert str(mended.folder) not in cold.content.decode()
    refused = mended.load("a")
    assert refused.status == 400, refused.content
    assert mended.complete("b", "The").status == 200
    shutil.rmtree(mended.folder / "a")
    assert mended.load("a").status == 400
    assert mended.text("b", "The")


def kill(server: Running) -> None:
    thread = server.engine._thread
    assert thread is not None
    assert thread.ident is not None
    dead = ctypes.py_object(SystemExit)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), dead) == 1


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_that_dies_is_started_again(server: Running, times):
    text = server.text("a", "The", max_tokens=30)
    server.ask("/admin/aliases/now", {"target": "a"}, ADMIN, "PUT")
    assert evict(server.engine.adapters, server.parts.registry.adapters["c"].key)
    time.sleep(0.6)  # what is in memory is noted twice a second
    for _ in range(times):
        with ThreadPoolExecutor(6) as pool:
            asked = [
                pool.submit(server.complete, model, "The", max_tokens=450, stream=stream)
                for model in "aab"
                for stream in (True, False)
            ]
            until(lambda: len(server.parts.host.jobs) == 6)
            kill(server)
            for i, one in enumerate(asked):
                answer = one.result()
                error = answer.events[-1]["error"] if i % 2 == 0 else answer.json["error"]
                assert error["code"] == "engine_restarted"
                assert answer.status == (200 if i % 2 == 0 else 503)
        until(lambda: server.ask("/readyz").status == 200)
        until(lambda: server.ask("/v1/models/a").json["state"] == "resident")
        assert server.ask("/v1/models/c").json["state"] == "cold"
        assert server.text("now", "The", max_tokens=30) == text
    assert f"lorafold_engine_restarts_total {times}.0" in server.metrics()
    assert server.idle()


def test_while_the_engine_is_away_requests_are_told(server: Running, monkeypatch):
    opened = threading.Event()
    backend = server.parts.host.backend
    reopen = backend._new_engine
    monkeypatch.setattr(backend, "_new_engine", lambda: opened.wait(30) and reopen())
    kill(server)
    until(lambda: server.ask("/readyz").status == 503)
    answer = server.complete("a", "The")
    assert (answer.status, answer.code) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"
    assert server.ask("/livez").status == 200
    opened.set()
    until(lambda: server.ask("/readyz").status == 200)
    assert server.complete("a", "The").status == 200


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["queue", "first_token", "total"])
def test_deadlines_end_what_takes_too_long(serve_once, name):
    server = serve_once(SPECS, slots=1, limits={f"{name}_seconds": 0.2})
    step = server.engine.step
    server.engine.step = lambda: time.sleep(0.1) or step()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.complete, "a", "The", max_tokens=20) for _ in range(2)]
        answers = [one.result() for one in asked]
    assert f"{name}_timeout" in [answer.code for answer in answers if answer.status != 200]
    until(server.idle)


def test_nothing_is_left_on_the_event_loop(common: Running):
    at_once(common, ["a", "b", "c"] * 4, stream=True)
    loop = common.parts.host._loop

    async def others() -> int:
        return len(asyncio.all_tasks()) - 1

    count = [asyncio.run_coroutine_threadsafe(others(), loop).result() for _ in range(2)]
    at_once(common, ["a", "b", "c"] * 4, stream=True)
    until(lambda: asyncio.run_coroutine_threadsafe(others(), loop).result() <= max(count))
