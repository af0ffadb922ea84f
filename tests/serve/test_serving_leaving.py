"""Requests of clients that left stand in nobody's way."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafold.serving.host import CANCELLED_RATIO, THREADS_PER_TENANT
from serving_cases import Running, posted, stream_of, until

pytest_plugins = ["serving_fixtures"]
MOST = 4


@pytest.fixture
def server(serve_once) -> Running:
    return serve_once(slots=1, limits={"tenant_queue": MOST})


@pytest.fixture
def go(server: Running) -> Iterator[threading.Event]:
    """Until it is set, the engine makes no step."""
    event, engine = threading.Event(), server.engine
    step = engine.step
    engine.step = lambda: event.wait(20) and step()  # type: ignore[method-assign]
    yield event
    event.set()


@pytest.mark.parametrize("stream", [True, False])
def test_who_left_does_not_wait(server: Running, go: threading.Event, stream: bool) -> None:
    host = server.parts.host
    for n in range(1, CANCELLED_RATIO):  # each time as many as may wait
        asked = [stream_of(server, "a", 20, stream=stream) for _ in range(MOST)]
        until(lambda n=n: len(host.jobs) == n * MOST)
        assert host.waiting() == MOST
        assert server.complete("a", "The").code == "tenant_queue_full"
        for at in asked:
            at.close()
        until(lambda: host.waiting() == 0)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(server.complete, "a", "The")
        until(lambda: host.waiting() == 1)
        go.set()
        assert stays.result().status == 200
    until(server.idle)


def test_who_left_is_bounded_too(server: Running, go: threading.Event) -> None:
    host = server.parts.host
    for n in range(1, CANCELLED_RATIO * MOST + 1):
        at = stream_of(server, "a", 20)
        until(lambda n=n: len(host.jobs) == n)
        at.close()
        until(lambda: host.waiting() == 0)
    assert server.complete("a", "The").code == "tenant_queue_full"
    assert len(host.jobs) == CANCELLED_RATIO * MOST
    go.set()
    until(server.idle)
    assert server.complete("a", "The").status == 200


@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_what_was_not_thought_about_yet_is_left_out(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str, read: bool
) -> None:
    host, renderer = server.parts.host, server.parts.registry.base_model.renderer
    go, thought, tokens = threading.Event(), [], renderer.tokens

    def slow(text: str, special: bool) -> tuple[int, ...]:
        thought.append(text[:6])
        go.wait(20)
        return tokens(text[:6], special)

    monkeypatch.setattr(renderer, "tokens", slow)
    body = {"model": "a", "prompt": "x" * 9000}
    asked = [posted(server, path, body) for _ in range(MOST if read else THREADS_PER_TENANT)]
    until(lambda: len(thought) == THREADS_PER_TENANT)
    asked += [posted(server, path, body) for _ in range(MOST - len(asked))]  # no turn to read these
    until(lambda: host.waiting() == MOST)
    assert server.complete("a", "The").code == "tenant_queue_full"
    for at in asked:
        at.close()
    # those that threads are at keep their tenant's turns
    until(lambda: host.waiting() == THREADS_PER_TENANT)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(server.ask, path, body | {"prompt": "stays " + body["prompt"]})
        until(lambda: host.waiting() == THREADS_PER_TENANT + 1)
        assert thought == ["xxxxxx"] * THREADS_PER_TENANT
        go.set()
        assert stays.result().status == 200
    assert thought == ["xxxxxx"] * THREADS_PER_TENANT + ["stays "]
    until(server.idle)


def test_what_the_engine_got_for_nobody_ends(server, monkeypatch) -> None:
    engine = server.engine
    began, go, submit, streams = threading.Event(), threading.Event(), engine.submit, []

    def slow(request: Any) -> Any:
        began.set()
        go.wait(20)
        streams.append(submit(request))
        return streams[0]

    monkeypatch.setattr(engine, "submit", slow)
    monkeypatch.setattr(server.parts.registry.base_model.renderer, "tokens", lambda *_: (5, 6, 7))
    body = {"model": "a", "prompt": "x " * 4100, "max_tokens": 400, "ignore_eos": True}
    at = posted(server, "/v1/completions", body)
    began.wait(20)
    at.close()
    time.sleep(0.1)  # it is noticed while the engine is asked
    go.set()
    until(lambda: 'outcome="client_left"' in server.metrics())
    until(server.idle)
    assert streams[0].result().reason == "cancelled"
