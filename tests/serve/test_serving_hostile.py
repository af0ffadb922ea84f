"""Hostile adapters and requests are refused, or harm nobody but whoever sends them."""

import ctypes
import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

import lorafold as lf
from hostile_adapters import CASES, MOVING, moving
from hostile_adapters.siege import Siege, said
from hostile_requests import ASK, asking, bodies, chain, hostile_schema
from lorafold.runtime.processor import STACK_BYTES, stack_size
from lorafold.serving.server import MAX_INLINE_BYTES
from lorafold.verification import checks as screening
from lorafold.verification.worker_pool import WorkerPool
from serving_cases import TOOL_TEMPLATE, Running, raw, running, saved, until

pytest_plugins = ["serving_fixtures"]
WORST = (
    "config-deep", "config-surrogate", "config-huge-rank", "pattern-just-slow", "weights-trailing",
    "weights-large-header-nan", "weights-twice", "file-pipe", "file-dangling", "name-newline",
    "record-cycle", "manifest-deep", "tokenizer-many-words", "tokenizer-template-percent-later",
)  # fmt: skip


def worker_pids() -> set[int]:
    children = psutil.Process().children(recursive=True)
    return {one.pid for one in children if one.status() != psutil.STATUS_ZOMBIE}


def besieged(base: Path, folder: Path, names: Sequence[str], everything: bool) -> Siege:
    """What came of a server that starts among hostile adapters and is asked for each of them.

    Args:
        names: The cases.
        everything: Load each too, while files of others change.
    """
    before = worker_pids()
    with running(base, folder) as server:
        texts = {name: said(server, name) for name in ("good", "also")}
    for name in names:
        CASES[name].make(folder, base)
    stop = moving(folder) if everything else lambda: None
    with running(base, folder, waits=False, processes=3 if everything else 1) as server:
        siege = Siege(server, texts)
        with siege.watched() if everything else nullcontext():
            siege.settle()
            if everything:
                siege.load([*names, *MOVING])
            siege.request([*names, *MOVING] if everything else names[-4:])
        stop()
        siege.settle()
        told = siege.adapters["wrong"]
        for name in names:
            siege.check(name in told or not CASES[name].wrong, f"{name}: it is not told as wrong")
        for name, text in texts.items():
            siege.check(said(server, name) == text, f"{name}: it says something else afterwards")
    siege.check(worker_pids() <= before, "processes are left")
    return siege


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    specs = {"good": lf.LoRA(rank=2), "also": lf.DoRA()}
    return saved(tiny_model_dir("llama"), specs, tmp_path / "adapters")


def test_the_worst_are_told_or_harm_nobody(tiny_model_dir, folder):
    siege = besieged(tiny_model_dir("llama"), folder, WORST, everything=False)
    assert siege.faults == []


def withstands_all(llama: Path, folder: Path) -> None:
    ended, sizes = threading.Event(), [psutil.Process().memory_info().rss]

    def weigh() -> None:
        while not ended.wait(0.05):
            sizes.append(psutil.Process().memory_info().rss)

    thread = threading.Thread(target=weigh)
    thread.start()
    began = time.monotonic()
    try:
        siege = besieged(llama, folder, list(CASES), everything=True)
    finally:
        ended.set()
        thread.join()
    found = sorted(siege.latencies)
    print(f"{len(CASES)} cases, {siege.answers} answers in {time.monotonic() - began:.0f} s")
    print(f"/livez: median {found[len(found) // 2]:.3f}, worst {found[-1]:.3f} s, n {len(found)}")
    assert siege.faults == []
    assert max(sizes) - sizes[0] < 1 << 30


@pytest.mark.slow
def test_all_of_them_at_start_by_admin_and_by_request(tiny_model_dir, folder):
    # in a process of its own: the heap that other tests leave behind grows by itself
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(withstands_all, tiny_model_dir("llama"), folder).result()
    assert not Path("/tmp/hostile-ran").exists()


@pytest.fixture(scope="module")
def server(serve) -> Running:
    limits = {"receive_seconds": 1.0, "connections": 40, "tenant_queue": 8}
    return serve(keys={"me": ["*"]}, template=TOOL_TEMPLATE, limits=limits)


def ask(server: Running, path: str, body: Any) -> Any:
    return server.ask(path, body, server.keys["me"])


@pytest.mark.parametrize("inside", ["$ref", "properties"])
def test_a_chain_of_schemas_is_refused_and_ends_nothing(server: Running, inside: str) -> None:
    """One of 3,000 overflowed the stack of the thread that compiled it, by each of the routes."""
    for path, body in asking(chain(3000, inside)):
        answer = ask(server, path, body)
        assert (answer.status, b"levels deep" in answer.content) == (400, True), path
    for path, body in [*asking(chain(600, inside))][::2]:  # tools would be too long a prompt
        assert ask(server, path, body).status == 200, path


def test_a_chain_that_is_not_seen_ends_a_process_once(server: Running, monkeypatch: Any) -> None:
    """References by an anchor are not counted before llguidance follows them."""
    parts = {f"a{i}": {"$anchor": f"x{i}", "$ref": f"#x{i + 1}"} for i in range(9000)}
    schema = {"$ref": "#x0", "$defs": parts | {"a9000": {"$anchor": "x9000", "type": "integer"}}}
    path, body = next(asking(schema))
    first = ask(server, path, body)
    assert (first.status, first.json["error"]["param"]) == (400, "response_format")
    assert b"compiling the grammar takes more than" in first.content
    monkeypatch.setattr(WorkerPool, "call", None)
    assert ask(server, path, body).content == first.content


def test_a_schema_that_never_ends_is_given_up(server: Running, monkeypatch: Any) -> None:
    monkeypatch.setitem(screening.CPU_SECONDS, "compile", 0.3)
    patterns = {f"^x{i}_": {} for i in range(2000)}
    path, body = next(asking({"type": "object", "patternProperties": patterns}))
    answer = ask(server, path, body)
    assert b"compiling the grammar takes more than 0.3 s" in answer.content
    assert ask(server, *next(asking({"type": "integer"}))).status == 200


def test_threads_have_the_stack_that_grammars_were_tried_with(server: Running) -> None:
    libc = ctypes.CDLL(None)

    def here() -> int:
        about, size = (ctypes.c_char * 64)(), ctypes.c_size_t()
        libc.pthread_self.restype = ctypes.c_void_p
        assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), about) == 0
        assert libc.pthread_attr_getstacksize(about, ctypes.byref(size)) == 0
        return size.value

    assert server.parts.host.pool.submit(here).result() >= STACK_BYTES
    with stack_size(1 << 20), ThreadPoolExecutor(1) as pool:
        assert pool.submit(here).result() < STACK_BYTES
    assert server.parts.host.pool.submit(here).result() >= STACK_BYTES
    before = threading.stack_size(STACK_BYTES)
    threading.stack_size(before)
    assert before == STACK_BYTES  # of the engine, if it starts again


def half_sent(server: Running, head: str, body: bytes = b"") -> socket.socket:
    at = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    at.sendall(f"{head}\r\nHost: localhost\r\n".encode() + body)
    return at


def test_what_is_sent_by_half_is_closed(server: Running) -> None:
    length = b"Content-Type: application/json\r\nContent-Length: 9999\r\n"
    key = f"Authorization: Bearer {server.keys['me']}\r\n".encode()
    began = time.monotonic()
    for head, body in (
        ("POST /v1/completions HTTP/1.1", b"X: "),
        ("POST /v1/completions HTTP/1.1", key + length + b"\r\n{"),
        ("POST /v1/adapters/a/page HTTP/1.1", length + b"\r\nkey="),
    ):
        with half_sent(server, head, body) as at:
            answer = at.recv(65536)
            assert b" 408 " in answer[:20], answer
            assert b"request_timeout" in answer
            assert at.recv(1) == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as at:
        assert at.recv(1) == b""  # nothing was asked, so that nothing is answered
    assert time.monotonic() - began < 20


def test_heads_and_forms_have_a_size(server: Running) -> None:
    get = "GET /livez HTTP/1.1\r\nX: " + "y" * 200_000
    assert raw(server, get)[:20].count(b" 431 ") == 1
    form = "POST /v1/adapters/a/page HTTP/1.1\r\nContent-Length: 5000"
    assert b" 413 " in raw(server, form, b"x" * 5000)[:20]
    assert server.ask("/v1/adapters/a/page", b"key=x").code == "invalid_api_key"


def test_the_key_comes_before_the_body(server: Running) -> None:
    for path in ("/v1/completions", "/tokenize", "/v1/responses/input_tokens", "/admin/aliases/x"):
        verb = "PUT" if "admin" in path else "POST"
        head = f"{verb} {path} HTTP/1.1\r\nContent-Length: 1000000"
        assert b" 401 " in raw(server, head, b"{")[:20], path


def test_a_newcomer_takes_the_place_of_the_slowest(server: Running) -> None:
    held = [half_sent(server, "GET /livez HTTP/1.1", b"X: ") for _ in range(60)]
    assert server.ask("/livez").status == 200
    assert b" 503 " in held[0].recv(100)
    for at in held:
        at.close()


def test_bodies_that_are_half_there_wait_in_the_tenants_queue(server: Running) -> None:
    key = f"Authorization: Bearer {server.keys['me']}\r\nContent-Type: application/json\r\n"
    body = f"{key}Content-Length: 9999\r\n\r\n{{".encode()
    held = [half_sent(server, "POST /v1/completions HTTP/1.1", body) for _ in range(8)]
    until(lambda: server.parts.host.waiting("me") == 8)
    for path in ("/v1/completions", "/tokenize"):
        assert ask(server, path, {"model": "a", "prompt": "x"}).code == "tenant_queue_full"
    for at in held:
        at.close()
    until(lambda: server.parts.host.waiting("me") == 0)


def test_large_bodies_are_read_and_answered_beside_the_event_loop(server, monkeypatch) -> None:
    """The event loop's thread never has a text of so many bytes in its hands."""
    from lorafold.serving import server as module
    from lorafold.serving.routes import completions

    read, by = module.read_body, set[tuple[str, bool]]()

    def noted(kind: Any, content: bytes) -> Any:
        thread = threading.current_thread().name.rpartition("_")[0]
        by.add((thread, len(content) > MAX_INLINE_BYTES))
        return read(kind, content)

    monkeypatch.setattr(module, "read_body", noted)
    monkeypatch.setattr(completions, "json_response", None)  # only for small answers
    text = "hello " * 2000
    for prompt in ("x", text):
        body = {"model": "a", "prompt": prompt, "return_token_strs": True}
        found = ask(server, "/tokenize", body).json
        assert "".join(found["token_strs"][-len(prompt) :]) == prompt
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert {large for name, large in by if name == "lorafold-requests"} == {True}
    assert {large for name, large in by if name != "lorafold-requests"} == {False}


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "prompt", [1, *["a"] * 200_000]),
        ("/v1/completions", "prompt", ["x"] * 210_000),
        ("/v1/completions", "logit_bias", {f"{i}": "x" for i in range(60_000)}),
        ("/v1/chat/completions", "messages", [1] * 300_000),
        ("/v1/chat/completions", "stop", [1] * 300_000),
        ("/v1/responses", "input", [1] * 300_000),
        ("/v1/messages", "system", [1] * 300_000),
        ("/detokenize", "tokens", [1] * 300_000),
    ],
)
def test_one_error_of_a_million_is_looked_for(server, path: str, field: str, value: Any) -> None:
    """A list with an error in each element took 5 s, in which nothing else was answered."""
    chat = path in ("/v1/chat/completions", "/v1/messages")
    body = {"model": "a"} | ({"max_tokens": 2, "messages": ASK} if chat else {})
    content = json.dumps(body | {field: value}, separators=(",", ":")).encode()
    began = time.process_time()
    answer = ask(server, path, content)
    assert (answer.status, len(answer.content) < 500) == (400, True), answer.content[:500]
    assert time.process_time() - began < 2.0


@pytest.mark.slow
def test_nothing_that_is_asked_ends_the_server(server: Running) -> None:
    for number in range(100):
        for path, body in asking(hostile_schema(number)[1]):
            answer = ask(server, path, body)
            assert answer.status < 500, (number, path, answer.content)
    for i, (path, body) in enumerate(bodies()):
        if i % 10 == 0:
            assert ask(server, path, body).status < 500, (path, body[:100])
    assert ask(server, "/v1/completions", {"model": "a", "prompt": "x"}).status == 200
