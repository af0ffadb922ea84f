"""The server needs nothing of what computes but the nine calls of `Backend`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

import lorafold as lf
from lorafold.serving import run
from lorafold.serving.backend import AdapterFiles, Backend, Output, Request, Stage, States
from serving_cases import Running, stream_of, until

pytest_plugins = ["serving_fixtures"]
CALLS = {"submit", "cancel", "events", "load", "unload", "pin", "states", "length", "ready"}


class Relay(Backend):
    """A backend that passes every call on to another one, and records it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.calls: set[str] = set()

    def _to(self, call: str, *given: Any) -> Any:
        self.calls.add(call)
        found = getattr(self._backend, call)
        return found(*given) if callable(found) else found

    @property
    def length(self) -> int:
        return self._to("length")

    @property
    def ready(self) -> str:
        return self._to("ready")

    def events(self, take: Callable[[Sequence[Output]], None]) -> AbstractAsyncContextManager[None]:
        return self._to("events", take)

    def submit(self, request: Request) -> None:
        self._to("submit", request)

    def cancel(self, id: str) -> None:
        self._to("cancel", id)

    def load(self, found: AdapterFiles, until: Stage) -> None:
        self._to("load", found, until)

    def unload(self, key: str) -> None:
        self._to("unload", key)

    def pin(self, key: str, pinned: bool) -> None:
        self._to("pin", key, pinned)

    def states(self) -> States:
        return self._to("states")


@pytest.fixture
def server(serve_once, monkeypatch: pytest.MonkeyPatch) -> Running:
    opened = run.EngineBackend
    monkeypatch.setattr(run, "EngineBackend", lambda *args: Relay(opened(*args)))
    return serve_once({name: lf.LoRA(rank=2) for name in "ab"})


def test_a_server_over_nothing_but_the_nine_calls(server: Running) -> None:
    host = server.parts.host
    assert Backend.__abstractmethods__ == CALLS
    alone = server.text("a", "The", max_tokens=5)
    assert server.text("b", "The", max_tokens=5) != alone
    assert server.chat("a", max_tokens=5, stream=True).events
    assert server.complete("a", "The", max_tokens=10**6).code == "context_length_exceeded"
    assert server.complete("a", "The", logit_bias={"999999": 1}).status == 400
    for act in ("pin", "unpin"):
        assert server.manage("a", act).status == 200
    for act in ("unload", "load"):
        assert server.load("a", act).status == 200
    assert server.text("a", "The", max_tokens=5) == alone
    states = {one["id"]: one["state"] for one in server.ask("/v1/models").json["data"]}
    assert (states["a"], states["b"]) == ("resident", "resident")
    assert 'lorafold_adapter_state{adapter="a",state="resident"} 1.0' in server.metrics()
    at = stream_of(server, "a", 400, stream=False)
    until(lambda: host.jobs)
    at.close()
    until(lambda: not host.jobs)
    assert isinstance(host.backend, Relay)
    assert host.backend.calls == CALLS
