"""The log has nothing that a client sends but the path, whatever becomes of the request."""

import asyncio
import io
import json
import logging
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from lorafold.engine.runner import SlotRunner
from lorafold.engine.sequence import Detokenizer
from lorafold.serving import logs
from lorafold.serving.app import Gate
from serving_cases import ADMIN, Running, raw, until

pytest_plugins = ["serving_fixtures"]
MARK = "zq7marker9xk"
LOGGERS = ("lorafold", "uvicorn", "asyncio", "sse_starlette")
TURNS, PLAIN = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"anyOf": [{"type": "array", "items": [{"const": f"{MARK}{i}"}]} for i in range(2500)]}


class PanicException(BaseException):
    """As pyo3 raises it for a panic in a tokenizer."""


@pytest.fixture(scope="module")
def server(serve) -> Running:
    return serve(keys={"acme": ["a"]})


@pytest.fixture(params=["plain", "json"])
def written(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    found = io.StringIO()
    before = {n: vars(logging.getLogger(n)).copy() for n in LOGGERS}
    hooks = threading.excepthook, sys.unraisablehook
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", found)
        logs.configure(request.param == "json")
    yield found
    threading.excepthook, sys.unraisablehook = hooks
    for name, state in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = state["handlers"], state["propagate"]
        logger.setLevel(state["level"])


def check_private(written: io.StringIO) -> str:
    """The log, in which the mark is in paths alone."""
    text = written.getvalue()
    for line in text.splitlines():
        assert len(line) < 5000
        if line.startswith("{"):
            fields = json.loads(line)
            assert len(fields.pop("path", "")) <= 200
            line = json.dumps(fields)
        assert MARK not in re.sub(r"path=\S{0,200}", "", line), line
    return text


def bodies() -> Iterator[tuple[str, Any]]:
    """Requests with the mark wherever a client can write one."""
    plain: dict[str, Any] = {"model": "a", "prompt": MARK, "max_tokens": 3}
    said: list[dict[str, Any]] = [{"role": "user", "content": MARK}]
    chat: dict[str, Any] = {"model": "a", "messages": said, "max_tokens": 3}
    tool = {"type": "function", "function": {"name": MARK, "description": MARK}}
    for more in (
        {}, {"stream": True}, {"model": MARK}, {"model": f"a@{MARK}"}, {MARK: 1}, {"stop": MARK},
        {"logit_bias": {MARK: 1}}, {"user": MARK}, {"metadata": {MARK: MARK}}, {"suffix": MARK},
        {"temperature": MARK}, {"temperature": 1e39}, {"prompt": {MARK: MARK}}, {"n": MARK},
        {"prompt": [10**6]}, {"stop": [MARK] * 99}, {"stream_options": {MARK: 1}},
        {"prompt": MARK * 2000},
    ):  # fmt: skip
        yield PLAIN, plain | more
    for more in (
        {}, {"stream": True}, {MARK: MARK}, {"tools": [tool]}, {"tools": [{MARK: MARK}]},
        {"tool_choice": MARK}, {"messages": [{"role": MARK, "content": MARK}]},
        {"messages": [{"role": "user", "content": MARK, MARK: 1}]}, {"reasoning_effort": MARK},
        {"chat_template_kwargs": {MARK: MARK}}, {"response_format": {"type": MARK}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": MARK}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
         "stream": True},
        {"response_format": {"type": "json_schema", "json_schema": {
            "schema": {"type": "string", "pattern": f"({MARK}"}}}},
    ):  # fmt: skip
        yield TURNS, chat | more
    yield "/v1/responses", {"model": "a", "input": MARK, MARK: MARK}
    yield "/v1/responses", {"model": "a", "input": MARK, "max_output_tokens": 2}
    yield "/tokenize", {"model": MARK, "prompt": MARK}
    yield "/tokenize", {"prompt": MARK}
    yield PLAIN, f'{{"{MARK}"'.encode()
    yield "/v1/load_lora_adapter", {"lora_name": MARK, MARK: MARK}
    yield "/v1/load_lora_adapter", {"lora_name": MARK}
    yield "/admin/adapters", {MARK: MARK}


def test_the_log_has_nothing_that_clients_send(server, written, capfd) -> None:
    key, statuses = server.keys["acme"], set()
    for path, body in bodies():
        for used in (ADMIN if "l" in path[4:6] or "admin" in path else key, MARK):
            answer = server.ask(f"{path}?{MARK}={MARK}", body, used)
            statuses.add(answer.status)
            assert answer.status < 500, (path, answer.content[:300])
    marked = {"X-Request-Id": MARK, "Cookie": MARK, "User-Agent": MARK, "Content-Type": MARK}
    server.ask(PLAIN, {"model": "a", "prompt": MARK}, key, headers=marked)
    for path in (f"/v1/models/{MARK}", f"/{MARK * 50}", f"/v1/adapters/{MARK}/page"):
        statuses.add(server.ask(path, key=key).status)
    server.ask(f"/admin/aliases/{MARK}", {"target": MARK}, ADMIN, "PUT")
    server.ask(f"/admin/adapters/{MARK}:{MARK}", {}, ADMIN)
    whole = f"GET http://{MARK}:{MARK}@localhost/v1/models HTTP/1.1"
    assert b" 401 " in raw(server, whole)[:14]
    text = check_private(written)
    assert MARK not in "".join(capfd.readouterr())
    assert {200, 400, 401, 404} <= statuses
    assert text.count("outcome") > len(list(bodies()))
    assert "400" in text


def boom(*_: object, **__: object) -> Any:
    raise ValueError(f"{MARK} was found") from KeyError(MARK)


def panic(*_: object, **__: object) -> Any:
    raise PanicException(f"{MARK} was found")


@pytest.mark.parametrize("fault", [boom, panic])
@pytest.mark.parametrize("stream", [False, True])
def test_defects_are_told_without_their_messages(
    server: Running, written: io.StringIO, monkeypatch: pytest.MonkeyPatch, fault: Any, stream: bool
) -> None:
    base, key = server.parts.registry.base_model.renderer, server.keys["acme"]
    asked = {"model": "a", "prompt": MARK, "max_tokens": 3, "ignore_eos": True}
    asked |= {"stream": stream, "logprobs": 1}
    places: tuple[tuple[Any, str, str], ...] = (
        (base, "tokens", "internal_error"), (Detokenizer, "add", "not_computed"),
        (Detokenizer, "finish", "not_computed"), (base.texts, "legacy_logprobs", "internal_error"),
        *([(SlotRunner, "forward", "not_computed")] if fault is boom else []),
    )  # fmt: skip
    before = server.metrics(ADMIN)
    for owner, name, code in places:
        for prompt in (MARK, MARK * 10):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fault)
                answer = server.ask(PLAIN, asked | {"prompt": prompt}, key)
            error = (answer.events[-1] if answer.status == 200 else answer.json)["error"]
            assert error["code"] == code
            assert MARK not in error["message"]
            assert answer.status == (200 if stream and name != "tokens" else 500)
    text = check_private(written)
    assert type_of(fault) in text
    assert "test_serving_private.py" in text
    after = server.metrics(ADMIN)
    for code in ("internal_error", "not_computed"):
        of_code = [name for *_, name in places].count(code)
        assert counted(after, code) == counted(before, code) + 2 * of_code
    until(server.idle)
    states = server.engine.adapters
    assert all(state.references == 0 for state in states._entries)
    assert server.ask(PLAIN, asked | {"stream": False}, key).status == 200


def type_of(fault: Any) -> str:
    return "ValueError" if fault is boom else "PanicException"


def counted(metrics: str, outcome: str) -> float:
    found = re.findall(rf'lorafold_requests_total{{.*outcome="{outcome}".*}} (\S+)', metrics)
    return sum(map(float, found))


@pytest.mark.parametrize("written", ["json"], indirect=True)
def test_the_death_of_the_engine_and_lost_tasks_are_told_without_messages(
    server: Running, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = server.parts.host

    async def lost() -> None:
        boom()

    host._loop.call_soon_threadsafe(lambda: host._loop.create_task(lost()) and None)
    until(lambda: "event loop error" in written.getvalue())
    engine = server.engine
    monkeypatch.setattr(engine, "step", boom)
    engine.wake()
    until(lambda: server.engine is not engine and not host.ready)
    text = check_private(written)
    assert "the thread lorafold-engine failed" in text
    assert "ValueError" in text


def test_a_client_that_leaves_in_its_body_is_counted_as_one(server, written) -> None:
    before = counted(server.metrics(ADMIN), "client_left")
    for path in (PLAIN, TURNS, "/v1/responses", "/tokenize"):
        with socket.create_connection(("127.0.0.1", server.port)) as at:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            auth = f"Authorization: Bearer {server.keys['acme']}\r\nContent-Length: 5000\r\n\r\n"
            at.sendall(f'{head}{auth}{{"model": "{MARK}'.encode())
        until(lambda path=path: f"{path} status=499" in written.getvalue().replace('"', ""))
    text = check_private(written)
    assert "Traceback" not in text
    assert " in " not in text
    assert text.count("outcome=client_left") == 4
    assert counted(server.metrics(ADMIN), "client_left") == before + 3


def test_of_a_whole_address_the_path_alone_is_kept(server: Running, written: io.StringIO) -> None:

    async def ask() -> None:
        scope = {
            "type": "http", "method": "BREW", "path": "/nowhere", "headers": [],
            "raw_path": f"http://{MARK}@{MARK}/nowhere".encode(),
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            pass

        await Gate(PlainTextResponse("", 404), server.parts)(scope, receive, send)

    asyncio.run(ask())
    text = check_private(written)
    assert re.search(r"path=/nowhere|\"path\": \"/nowhere\"", text)
    assert re.search(r"method=other|\"method\": \"other\"", text)


def test_with_log_texts_all_of_it_is_there(serve_once, written, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", written)
        logs.configure(True, texts=True)
    server = serve_once(log_texts=True)
    server.text("a", MARK)
    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "add", boom)
        server.complete("a", "The")
    monkeypatch.setattr(server.parts.registry.base_model.renderer, "tokens", boom)
    server.complete("a", "The")
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert next(line["prompt"] for line in lines if "prompt" in line) == MARK
    assert any(f"{MARK} was found" in line.get("error", "") for line in lines)
    assert any(line["message"].endswith(f"{MARK} was found") for line in lines)


def test_lines_that_repeat_one_are_counted(written: io.StringIO, monkeypatch) -> None:
    def flood() -> None:
        for _ in range(1000):
            context = {"message": "socket.accept() out of system resource", "exception": OSError()}
            logs.unhandled(asyncio.new_event_loop(), context)

    log = logging.getLogger("lorafold.serving.verifier")
    flood()
    log.info("another line")
    told = "event loop error: socket.accept() out of system resource"
    assert written.getvalue().count("out of system resource") == 1
    assert written.getvalue().count("another line") == 1
    monkeypatch.setattr(logs, "REPEAT_SECONDS", -1.0)
    log.info("another line")
    monkeypatch.setattr(logs, "REPEAT_SECONDS", 5.0)
    flood()
    assert f"{told} (repeated 999 times)" in written.getvalue()
    assert written.getvalue().count("out of system resource") == 3
    assert written.getvalue().count("another line") == 2
    for _ in range(3):
        log.info("a request", extra={"fields": {"request": "1"}})
    assert written.getvalue().count("a request") == 3
