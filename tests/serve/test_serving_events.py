"""`GET /v1/models/events`: the list, what changed since, who sees which of it, and its cost."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest

import lorafold as lf
from lorafold.serving.directory import Directory
from lorafold.serving.routes import models as routes
from serving_cases import ADMIN, Running

pytest_plugins = ["serving_fixtures"]
PATH = "/v1/models/events"


@pytest.fixture
def server(serve_once, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setattr(routes, "SNAPSHOT_INTERVAL", 0.1)
    keys = {"acme": ["a*"], "beta": ["b"]}
    found = serve_once({n: lf.LoRA(rank=2) for n in "ab"}, keys, limits={"tenant_streams": 2})
    assert found.parts.registry.watcher.settled(30)
    return found


@contextmanager
def listening(server: Running, key: str) -> Iterator[Iterator[Any]]:
    """The events of a stream, which raise TimeoutError where none comes."""
    at = HTTPConnection("127.0.0.1", server.port, timeout=5)
    at.request("GET", PATH, headers={"Authorization": f"Bearer {key}"})
    answer, sock = at.getresponse(), at.sock
    assert answer.status == 200, answer.read()

    def events() -> Iterator[Any]:
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    try:
        yield events()
    finally:
        answer.close()
        (sock or at).close()
        at.close()


def names(event: Any) -> list[str]:
    return [model["id"] for model in event["data"]]


def until(events: Iterator[Any], name: str, **wanted: Any) -> Any:
    """The model of that name in the event in which it is as wanted."""
    for event in events:
        for model in event["data"]:
            if model["id"] == name and wanted.items() <= model.items():
                return model
    raise AssertionError("the stream ended")


def test_the_list_comes_first_and_then_what_changed_alone(server: Running) -> None:
    key, registry = server.keys["beta"], server.parts.registry
    with listening(server, key) as events:
        first = next(events)
        assert first["object"] == "list"
        assert (first["status"], first["administrator"]) == ("", False)
        assert first["data"] == server.ask("/v1/models", key=key).json["data"]
        asked = {"model": "b", "prompt": "The", "max_tokens": 3, "ignore_eos": True}
        for _ in range(2):
            assert server.ask("/v1/completions", asked, key).status == 200
        model = until(events, "b", requests=2, tokens=6, running=0, state="resident")
        assert model == server.ask("/v1/models/b", key=key).json
        registry.quarantine("b", "the test put it there")
        assert "why" not in until(events, "b", state="quarantined")
        registry.unload("a")  # which this tenant does not see
        registry.unload("b")
        assert next(events) == {"object": "changes", "data": [], "removed": ["b"]}
        for name in ("a", "b"):
            registry.load(name)
        assert names(next(events)) == ["b"]
        server.parts.host.draining = True
        assert next(events)["status"] == "the server is shutting down"
        assert next(events, None) is None
        assert server.ask(PATH, key=key).code == "not_ready"
        server.parts.host.draining = False


def test_nothing_is_told_where_nothing_changes_and_a_look_is_for_all(server, monkeypatch) -> None:
    looks: list[float] = []
    look = routes.Snapshot
    monkeypatch.setattr(routes, "Snapshot", lambda s: looks.append(time.monotonic()) or look(s))
    acme = server.keys["acme"]
    with listening(server, acme) as one, listening(server, ADMIN) as other, \
            listening(server, acme) as third:  # fmt: skip
        lists = [next(each) for each in (one, other, third)]
        assert [names(each)[1:] for each in lists] == [["a"], ["a", "b"], ["a"]]
        began, n = time.monotonic(), len(looks)
        server.parts.registry.pin("b", True)
        assert until(other, "b", pinned=True, state="resident")
        time.sleep(0.5)
        server.parts.registry.pin("a", True)
        for each in (one, third):
            assert names(next(each)) == ["a"]  # and not of "b"
        assert len(looks) - n <= (time.monotonic() - began) / routes.SNAPSHOT_INTERVAL + 1
    late = time.monotonic() + 5
    while not server.idle() or time.monotonic() - looks[-1] < 2 * routes.SNAPSHOT_INTERVAL:
        assert time.monotonic() < late
        time.sleep(0.05)  # nobody listens, and nobody looks


def test_a_listener_learns_at_once_what_is_and_that_the_server_ends(server, monkeypatch) -> None:
    monkeypatch.setattr(routes, "SNAPSHOT_INTERVAL", 1.0)
    acme, described, page = server.keys["acme"], list[str](), Directory.page_file
    with listening(server, ADMIN) as events:
        next(events)
        server.parts.registry.pin("a", True)
        with listening(server, acme) as late:
            assert next(late)["data"][1]["pinned"]
        until(events, "a", pinned=True, state="resident")
        monkeypatch.setattr(Directory, "page_file", lambda d, n: described.append(n) or page(d, n))
        server.parts.registry.pin("a", False)
        server.parts.host.draining = True
        assert next(events)["status"] == "the server is shutting down"
        assert {*described} <= {"a"}  # of ten thousand models the others make no work
        began = time.monotonic()
        assert next(events, None) is None
        assert time.monotonic() - began < 0.5
        server.parts.host.draining = False


def test_the_administrator_learns_what_is_not_served_and_why(server: Running) -> None:
    broken = server.folder / "broken"
    with listening(server, ADMIN) as events, listening(server, server.keys["acme"]) as others:
        assert next(events)["administrator"]
        next(others)
        broken.mkdir()
        (broken / "adapter_config.json").write_text("{")
        assert "adapter_config.json" in until(events, "broken", state="wrong")["why"]
        server.parts.registry.quarantine("a", "too rude")
        assert until(events, "a", state="quarantined")["why"] == "too rude"
        assert names(next(others)) == ["a"]
        server.parts.registry.unload("b")
        assert until(events, "b", state="unloaded")


def test_a_tenant_holds_so_many_streams_and_a_key_that_is_gone_none(server: Running) -> None:
    acme, beta = server.keys["acme"], server.keys["beta"]
    with listening(server, acme) as events, listening(server, acme):
        next(events)
        refused = server.ask(PATH, key=acme)
        assert (refused.status, refused.code) == (429, "too_many_streams")
        assert server.ask(PATH, key="lf-wrong").code == "invalid_api_key"
        assert server.ask(PATH, key=beta, method="HEAD").status == 200
        with listening(server, beta) as other:
            next(other)
            assert server.parts.keys.file is not None
            content = json.loads(server.parts.keys.file.read_text())
            content["keys"] = [k for k in content["keys"] if k["tenant"] != "acme"]
            server.parts.keys.file.write_text(json.dumps(content))
            server.parts.registry.pin("a", True)
            server.parts.registry.pin("b", True)
            assert names(next(other)) == ["b"]
            assert next(events, None) is None


def test_streams_that_clients_left_are_free_again(server: Running) -> None:
    acme = server.keys["acme"]
    for _ in range(4):
        for _ in range(50):  # the server learns of it a moment later
            try:
                with listening(server, acme) as events:
                    assert names(next(events))[1:] == ["a"]
                break
            except AssertionError:
                time.sleep(0.05)
        else:
            raise AssertionError("the streams stay held")
