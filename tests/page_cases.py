"""A server for tests, as `lorafold serve` runs it, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console

from lorafold.serving.app import application
from lorafold.serving.directory import Directory
from lorafold.serving.keys import Keys
from lorafold.serving.run import listening, server_of
from lorafold.serving.server import Server
from lorafold.serving.settings import Settings


@contextmanager
def running(model: Path, adapters: Path, **settings: Any) -> Iterator[tuple[str, Server]]:
    """A server that answers, and its address; it has ended afterwards.

    Args:
        model: the base's directory.
        adapters: the directory of adapters.
        settings: those that differ from the defaults; the port is a free one.
    """
    asked = Settings(**{"port": 0, "slots": 4, "adapter_bytes": 1 << 26} | settings)
    keys, how = Keys(asked.keys, asked.admin_key), {"storage": "fp32", "device": "cpu"}
    with listening(asked) as at:
        console = Console(quiet=True)
        server = server_of(str(model), Directory(adapters), keys, asked, console, how)
        config = uvicorn.Config(
            application(server), log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            while not http.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{at.getsockname()[1]}", server
        finally:
            http.should_exit = True
            thread.join()
