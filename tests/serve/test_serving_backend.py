"""The server needs of what computes the nine calls of `Backend`, and nothing else of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from http.client import HTTPConnection
from typing import Any

import pytest

import lorafold as lf
from lorafold.serving import run
from lorafold.serving.backend import AdapterFiles, Backend, News, Request, States, Until
from serving_cases import ADMIN, Running, running, saved

CALLS = {"submit", "cancel", "events", "load", "unload", "pin", "states", "length", "ready"}


class Relay(Backend):
    """A backend that passes every call on to another one, and notes which there were."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.calls: set[str] = set()

    def _to(self, call: str) -> Any:
        self.calls.add(call)
        return getattr(self._backend, call)

    @property
    def length(self) -> int:
        return self._to("length")

    @property
    def ready(self) -> str:
        return self._to("ready")

    def events(self, take: Callable[[Sequence[News]], None]) -> AbstractAsyncContextManager[None]:
        return self._to("events")(take)

    def submit(self, request: Request) -> None:
        self._to("submit")(request)

    def cancel(self, id: str) -> None:
        self._to("cancel")(id)

    def load(self, found: AdapterFiles, until: Until) -> None:
        self._to("load")(found, until)

    def unload(self, key: str) -> None:
        self._to("unload")(key)

    def pin(self, key: str, pinned: bool) -> None:
        self._to("pin")(key, pinned)

    def states(self) -> States:
        return self._to("states")()


@pytest.fixture
def server(
    tiny_model_dir: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    specs = {name: lf.LoRA(rank=2) for name in "ab"}
    folder, opened = saved(tiny_model_dir("llama"), specs, tmp_path / "adapters"), run.EngineBackend
    monkeypatch.setattr(run, "EngineBackend", lambda *args: Relay(opened(*args)))
    with running(tiny_model_dir("llama"), folder) as found:
        yield found


def test_a_server_over_nothing_but_the_nine_calls(server: Running) -> None:
    host = server.parts.host
    assert Backend.__abstractmethods__ == CALLS
    alone = server.text("a", "The", max_tokens=5)
    assert server.text("b", "The", max_tokens=5) != alone
    chat = {"model": "a", "messages": [{"role": "user", "content": "The"}], "max_tokens": 5}
    assert server.ask("/v1/chat/completions", chat | {"stream": True}).events
    assert server.complete("a", "The", max_tokens=10**6).code == "context_length_exceeded"
    assert server.complete("a", "The", logit_bias={"999999": 1}).status == 400
    for act in ("/admin/adapters/a:pin", "/admin/adapters/a:unpin"):
        assert server.ask(act, {}, ADMIN).status == 200
    for path in ("/v1/unload_lora_adapter", "/v1/load_lora_adapter"):
        assert server.ask(path, {"lora_name": "a"}, ADMIN).status == 200
    assert server.text("a", "The", max_tokens=5) == alone
    states = {one["id"]: one["state"] for one in server.ask("/v1/models").json["data"]}
    assert (states["a"], states["b"]) == ("resident", "resident")
    assert 'lorafold_adapter_state{adapter="a",state="resident"} 1.0' in (
        server.ask("/metrics").content.decode()
    )
    who_leaves = HTTPConnection("127.0.0.1", server.port)
    body = {"model": "a", "prompt": "The", "max_tokens": 400, "ignore_eos": True}
    head = {"Content-Type": "application/json"}
    who_leaves.request("POST", "/v1/completions", json.dumps(body), head)
    while not host.jobs:
        time.sleep(0.001)
    who_leaves.close()
    while host.jobs:
        time.sleep(0.01)
    assert isinstance(host.backend, Relay)
    assert host.backend.calls == CALLS
