"""What stands around the routes: paths with a slash at the end, HEAD, pages of other origins, the
description of the API, and the body of vLLM's route that loads an adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorafold as lf
from lorafold.errors import LorafoldError
from lorafold.serving.settings import read_settings
from serving_cases import ADMIN, Answer, Running, running, saved

ORIGIN = "https://app.example"
CHAT = {"model": "a", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that pages of one other origin may ask."""
    folder = tmp_path_factory.mktemp("http")
    adapters = saved(tiny_model_dir("llama"), {"a": lf.LoRA(rank=2)}, folder / "adapters")
    with running(tiny_model_dir("llama"), adapters, cors=[ORIGIN]) as found:
        yield found


def test_a_slash_at_the_end_changes_nothing(server: Running) -> None:
    assert server.ask("/v1/models/").json == server.ask("/v1/models").json
    assert server.ask("/v1/models/a/").json["id"] == "a"
    assert server.ask("/v1/chat/completions/", CHAT).status == 200
    assert server.ask("/v1/nothing/").code == "no_route"


@pytest.mark.parametrize("path", ["/", "/v1/models", "/livez", "/openapi.json"])
def test_head_is_get_without_a_body(server: Running, path: str) -> None:
    got, head = server.ask(path), server.ask(path, method="HEAD")
    assert (head.status, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]
    assert server.ask("/v1/completions", method="HEAD").status == 405


def preflight(server: Running, origin: str) -> Answer:
    asked = {"Access-Control-Request-Method": "POST", "Origin": origin}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    return server.ask("/v1/chat/completions", method="OPTIONS", headers=asked)


def test_pages_of_named_origins_may_ask_and_no_others(server: Running) -> None:
    allowed = preflight(server, ORIGIN)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    found = server.ask("/v1/chat/completions", CHAT, headers={"Origin": ORIGIN})
    assert found.headers["access-control-allow-origin"] == ORIGIN
    refused = server.ask("/v1/chat/completions", {}, headers={"Origin": ORIGIN})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (400, ORIGIN)
    for origin in ("https://app.example.evil.example", "http://app.example", "null"):
        assert preflight(server, origin).status == 400
        other = server.ask("/v1/models", headers={"Origin": origin})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["*", "https://*.example", "app.example", "https://a.b/c"])
def test_an_origin_is_an_address_without_a_path(origin: str) -> None:
    with pytest.raises(LorafoldError, match=r"cors\.0: found"):
        read_settings(None, {"cors": [origin]})


def test_the_description_has_every_body(server: Running) -> None:
    found = server.ask("/openapi.json").json
    schemas = found["components"]["schemas"]
    for methods in found["paths"].values():
        for method, operation in methods.items():
            body = operation.get("requestBody")
            if method in ("post", "put") and body is not None:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                assert schemas[name]["type"] == "object"
    chat = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert chat["application/json"]["schema"]["$ref"].endswith("/ChatBody")
    assert "response_format" in schemas["ChatBody"]["properties"]
    bare = {
        path for path, methods in found["paths"].items() for method, o in methods.items()
        if method in ("post", "put") and "requestBody" not in o
    }  # fmt: skip
    assert bare == {"/v1/adapters/{name}/page", "/admin/adapters/{name}:{act}"}


def load(server: Running, **more: Any) -> Answer:
    return server.ask("/v1/load_lora_adapter", {"lora_name": "a"} | more, key=ADMIN)


def test_a_path_to_the_directory_s_entry_is_its_name(server: Running, tmp_path: Path) -> None:
    entry = server.folder / "a"
    (tmp_path / "link").symlink_to(entry)
    for path in (entry, os.path.relpath(entry), f"{entry}/../a/", tmp_path / "link"):
        assert load(server, lora_path=str(path), lora_int_id=1).json["status"] == "loaded"
    for path in ("/etc", str(server.folder), "a", "", "x\0", "y" * 9999, "org/adapter"):
        answer = load(server, lora_path=path)
        assert answer.status == 400, path
        assert answer.json["error"]["param"] == "lora_path"


def test_a_load_may_refuse_to_replace(server: Running) -> None:
    again = load(server, load_inplace=False)
    assert again.json["error"]["param"] == "load_inplace"
    assert "has already been loaded" in again.json["error"]["message"]
    assert load(server, load_inplace=True, base_model_name="any").status == 200
    gone = server.ask("/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": 1}, key=ADMIN)
    assert gone.status == 200
    assert load(server, load_inplace=False).status == 200
