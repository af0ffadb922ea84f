"""A real server in a thread, on a tiny model with saved adapters, and requests to it."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from engine_cases import save_adapters
from fresh_models import fresh_model
from lorafold.api.model_arguments import load_with_adapters
from lorafold.engine import Engine
from lorafold.resolve import Base
from lorafold.serving.directory import Directory
from lorafold.serving.engine_backend import EngineBackend
from lorafold.serving.keys import Keys, new_key
from lorafold.serving.run import Http, bound_socket, build_server, uvicorn_config
from lorafold.serving.server import Server
from lorafold.serving.settings import Settings
from lorafold.verification import checks
from lorafold.verification.checks import Sandbox

ADMIN = "an admin key of enough letters"
HELLO = [{"role": "user", "content": "Hello"}]
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]


def strict(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": [*properties],
        "additionalProperties": False,
    }  # fmt: skip


CITY = strict(city={"enum": ["Rome", "Oslo"]})
TABLE = strict(day={"enum": ["friday", "sunday"]}, people={"enum": [2, 4]})


def tool(name: str = "weather") -> dict[str, Any]:
    function = {"name": name, "description": f"A {name}.", "parameters": CITY}
    return {"type": "function", "function": function}


TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "</tools><|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, without its end."""
        lines = self.content.decode().split("\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(one) for one in data if one != "[DONE]"]


@dataclass
class Running:
    """A server that runs."""

    url: str
    port: int
    parts: Server
    folder: Path
    keys: dict[str, str] = field(default_factory=dict)

    def ask(
        self, path: str, body: Any = None, key: str | None = None, method: str | None = None,
        headers: Mapping[str, str] | None = None, timeout: float = 60,
    ) -> Answer:  # fmt: skip
        """One request, with a body of JSON, or of bytes as they are."""
        at = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        given |= {"Authorization": f"Bearer {key}"} if key else {}
        verb = method or ("GET" if body is None else "POST")
        at.request(verb, path, sent, given | (headers or {}))
        answer = at.getresponse()
        found = Answer(answer.status, dict(answer.getheaders()), answer.read())
        at.close()
        return found

    def complete(self, model: str, prompt: Any, **more: Any) -> Answer:
        """A greedy completion of eight tokens, unless other fields say otherwise."""
        asked = {"max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
        return self.ask("/v1/completions", {"model": model, "prompt": prompt} | asked)

    def text(self, model: str, prompt: Any, **more: Any) -> str:
        """The text of a completion that has to be there."""
        answer = self.complete(model, prompt, **more)
        assert answer.status == 200, answer.content
        return answer.json["choices"][0]["text"]

    def chat(self, model: str, messages: Any = HELLO, **more: Any) -> Answer:
        body = {"model": model, "messages": messages} | more
        return self.ask("/v1/chat/completions", body)

    def load(self, name: str, act: str = "load") -> Answer:
        """Load or unload an adapter, as the administrator."""
        return self.ask(f"/v1/{act}_lora_adapter", {"lora_name": name}, ADMIN)

    def manage(self, name: str, act: str) -> Answer:
        return self.ask(f"/admin/adapters/{name}:{act}", {}, ADMIN)

    def metrics(self, key: str | None = None) -> str:
        return self.ask("/metrics", key=key).content.decode()

    @property
    def engine(self) -> Engine:
        assert isinstance(self.parts.host.backend, EngineBackend)
        return self.parts.host.backend.engine

    def idle(self) -> bool:
        """Whether nothing waits or runs, in the server and in its engine."""
        return not self.parts.host.jobs and not self.engine._rows


def saved(model_dir: Path, specs: Mapping[str, Any], folder: Path) -> Path:
    save_adapters(fresh_model(model_dir), folder, specs)
    return folder


@contextmanager
def running(
    model_dir: Path, folder: Path, keys: Mapping[str, list[str]] | None = None,
    storage: str = "fp32", waits: bool = True, allow_other_base: bool = False, processes: int = 1,
    **settings: Any,
) -> Iterator[Running]:  # fmt: skip
    """A server of the adapters in a directory.

    Args:
        keys: For each tenant the adapters that it may use; None: no keys.
        waits: Whether to wait until all adapters are verified.
        processes: How many of each kind verify adapters; each imports for a second.
        settings: Settings that differ from the defaults.
    """
    files, made = folder.parent / f"{folder.name}-files", {}
    files.mkdir(exist_ok=True)
    (files / "admin").write_text(ADMIN)
    for tenant, names in (keys or {}).items():
        made[tenant] = new_key(files / "keys.json", tenant, names)
    chosen = Settings(
        **{"port": 0, "slots": 4, "admin_key": files / "admin", "state": files / "state.json"}
        | ({"keys": files / "keys.json"} if keys is not None else {})
        | settings
    )
    base = Base(model_dir, storage=storage, allow_other_base=allow_other_base)
    with bound_socket(chosen) as at:
        port = at.getsockname()[1]
        known = Keys(chosen.keys, chosen.admin_key, chosen.metrics_key)
        with mock.patch.multiple(checks, MAX_VERIFIERS=processes, MAX_RENDERERS=processes):
            parts = build_server(base, load_with_adapters, Directory(folder), known, chosen)
        http = Http(uvicorn_config(parts))
        thread = threading.Thread(target=lambda: asyncio.run(http.serve(sockets=[at])))
        thread.start()
        while not http.started:
            time.sleep(0.01)
        assert not waits or parts.registry.watcher.settled(60)
        while any(state == "loading" for state, _ in parts.host.backend.states().adapters.values()):
            time.sleep(0.01)
        try:
            yield Running(f"http://127.0.0.1:{port}", port, parts, folder, made)
        finally:
            parts.host.draining = True  # as a signal does; streams of changes end then
            http.should_exit = True
            thread.join()


def raw(server: Running, head: str, *body: bytes, host: str = "localhost") -> bytes:
    """What the server sends back; it may close before the body is sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as at:
        lines = f"{head}\r\nHost: {host}\r\nContent-Type: application/json\r\n\r\n"
        with suppress(BrokenPipeError, ConnectionResetError):
            at.sendall(lines.encode())
            for part in body:
                at.sendall(part)
        try:
            return at.recv(65536)
        except ConnectionResetError:
            return b""


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def posted(server: Running, path: str, body: Any) -> socket.socket:
    """A connection on which a request was sent, and nothing was read."""
    at, content = socket.socket(), json.dumps(body).encode()
    at.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    at.connect(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    at.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return at


def stream_of(server: Running, model: str, tokens: int, **more: object) -> socket.socket:
    asked = {"model": model, "prompt": "The", "max_tokens": tokens, "stream": True}
    return posted(server, "/v1/completions", asked | {"ignore_eos": True} | more)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters that are read to be verified, from now on."""
    names, verify = list[str](), Sandbox.verify

    def count(self: Sandbox, path: Path, *rest: Any) -> Any:
        names.append(path.name)
        return verify(self, path, *rest)

    monkeypatch.setattr(Sandbox, "verify", count)
    return names


@contextmanager
def no_descriptors() -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
