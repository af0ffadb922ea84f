"""Open WebUI against the server, as docs/serve.md configures it.

It has an environment of its own; the test runs where its command `open-webui` is on the path.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

import lorafold as lf
from serving_cases import Running

pytest_plugins = ["serving_fixtures"]
COMMAND = shutil.which("open-webui")
DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMMAND is None, reason="open-webui is not on the path"),
]


@pytest.fixture(scope="module")
def server(serve) -> Running:
    found = serve({n: lf.LoRA(rank=2) for n in ("acme-a", "beta-a")}, {"acme": ["acme-*"]})
    assert found.parts.registry.watcher.settled(30)
    return found


def told(server: Running) -> dict[str, str]:
    """The environment that the page tells, with this server's address and key."""
    section = DOCS.read_text(encoding="utf-8").partition("### Open WebUI\n")[2]
    block = section.partition("```sh")[2].partition("```")[0]
    found = dict(re.findall(r"^export (\w+)=(\S*)", block, re.MULTILINE))
    assert found["OPENAI_API_BASE_URL"] == "http://127.0.0.1:8000/v1"
    ours = {"OPENAI_API_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": server.keys["acme"]}
    return found | ours


class WebUI:
    def __init__(self, url: str) -> None:
        self.url, self.token = url, ""

    def ask(self, path: str, body: Any = None) -> bytes:
        sent = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        with urlopen(Request(self.url + path, sent, headers), timeout=60) as answer:
            return bytes(answer.read())


@pytest.fixture(scope="module")
def webui(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data = tmp_path_factory.mktemp("data")
    # nothing of the tests' environment is its own
    base = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment = base | told(server) | {"DATA_DIR": str(data), "WEBUI_SECRET_KEY": "of the test"}
    command = [str(COMMAND), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (data / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=data, stdout=log, stderr=log)
        found = WebUI(f"http://127.0.0.1:{port}")
        try:
            until = time.monotonic() + 240
            while True:
                try:
                    found.ask("/health")
                    break
                except (URLError, ConnectionError):
                    alive = process.poll() is None and time.monotonic() < until
                    assert alive, (data / "log").read_text()[-2000:]
                    time.sleep(0.5)
            # the user that it makes where nobody signs in
            user = {"email": "admin@localhost", "password": "admin"}
            found.token = json.loads(found.ask("/api/v1/auths/signin", user))["token"]
            yield found
        finally:
            process.terminate()
            process.wait(30)


def test_it_lists_the_models_that_the_key_may_use(webui: WebUI, server: Running) -> None:
    listed = [model["id"] for model in json.loads(webui.ask("/api/models"))["data"]]
    assert listed == [server.parts.registry.base, "acme-a"]


def test_it_chats_and_streams_what_the_server_says(webui: WebUI, server: Running) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    asked = {"model": "acme-a", "messages": messages, "max_tokens": 8, "temperature": 0}
    own = server.ask("/v1/chat/completions", asked, server.keys["acme"]).json
    text = own["choices"][0]["message"]["content"]
    whole = json.loads(webui.ask("/api/chat/completions", asked))
    assert whole["choices"][0]["message"]["content"] == text
    stream = webui.ask("/api/chat/completions", asked | {"stream": True}).decode()
    data = re.findall(r"^data: (\{.*\})$", stream, re.MULTILINE)
    chunks = [json.loads(one) for one in data]
    deltas = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c.get("choices")]
    assert "".join(deltas) == text
    assert sum(map(bool, deltas)) > 1
