"""A serving peer in a process of its own, under a load of streams that begin at once.

    with Server("llama.cpp", command, "/completion", body) as server:
        server.load(prompts, [0, 1, None], 64)      tokens a second, times to the first token

Between loads the process is stopped, so that it takes no time from what is measured meanwhile.
"""

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Body = Callable[[Sequence[int], int | None, int], dict[str, Any]]  # ids, adapter, tokens -> JSON


class Server:
    """One peer.

    Args:
        name: what it is called in the table.
        command: how it is started; PORT stands for the port.
        path: where completions are asked for.
        body: makes the JSON of a request.
        log: the file that gets what it prints.
        environment: variables that it needs.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        path: str,
        body: Body,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.path, self.body, self.log = name, path, body, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [part.replace("PORT", str(self.port)) for part in command]
        self.environment = os.environ | (environment or {})

    def __enter__(self) -> "Server":
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, f"{self.name} ended; see {self.log}"
                time.sleep(0.5)
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)

    def load(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[int | None], new: int
    ) -> dict[str, float]:
        """Ask for all prompts at once, each under its adapter; None is the base."""
        with self.awake():
            return asyncio.run(self._load(prompts, adapters, new))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    async def _load(self, prompts: Any, adapters: Any, new: int) -> dict[str, float]:
        start = time.perf_counter()
        asked = zip(prompts, adapters, strict=True)
        times = await asyncio.gather(*(self._stream(ids, at, new) for ids, at in asked))
        seconds = max(t[-1] for t in times) - start
        firsts = [t[0] - start for t in times]
        return {
            "tokens_per_s": len(times) * new / seconds,
            "first": statistics.median(firsts),
            "slowest": max(firsts),
            "tokens": sum(map(len, times)),
        }

    async def _stream(self, ids: Sequence[int], adapter: int | None, new: int) -> list[float]:
        """When each token came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps(self.body(ids, adapter, new)).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        times: list[float] = []
        answer = b""
        while part := await reader.read(65536):
            answer += part
            times += [time.perf_counter()] * part.count(b"data: {")
        writer.close()
        assert b" 200 " in answer[:20], answer[:500]
        assert len(times) >= new, f"{self.name}: {len(times)} tokens"
        return times[:new]

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def lorafold(model: str, adapters: Sequence[Path], folder: Path, more: str = "") -> Server:
    """lorafold's own server, without prefix reuse, as the engine beside it; `more` are lines of its
    settings.
    """
    settings = folder / "serve.yaml"
    settings.write_text(f"length: 256\nprefix_reuse: false\n{more}")

    def body(ids: Sequence[int], adapter: int | None, new: int) -> dict[str, Any]:
        return {
            "model": model if adapter is None else adapters[adapter].name, "prompt": list(ids),
            "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip

    command = [
        sys.executable, "-m", "lorafold", "serve", "--model", model, "--adapters",
        str(adapters[0].parent), "--config", str(settings), "--port", "PORT", "--storage", "bf16",
    ]  # fmt: skip
    return Server("lorafold over HTTP", command, "/v1/completions", body, folder / "serve.log")


def llama_cpp(binary: Path, name: str, base: Path, adapters: Sequence[Path], log: Path) -> Server:
    """llama.cpp's server. Its prompt cache is off, since it ignores adapters, and every request
    names a scale, since it applies all adapters to a request that names none.
    """

    def body(ids: Sequence[int], adapter: int | None, new: int) -> dict[str, Any]:
        lora = {"id": adapter or 0, "scale": float(adapter is not None)}
        return {
            "prompt": list(ids), "n_predict": new, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False, "stream": True, "lora": [lora], "samplers": ["temperature"],
        }  # fmt: skip

    command = [
        str(binary), "-m", str(base), "--host", "127.0.0.1", "--port", "PORT", "-np", "16", "-c",
        "4096", "--cache-ram", "0", "-t", "2", "-tb", "2", "--no-ui", "--lora",
        ",".join(map(str, adapters)), "--lora-init-without-apply",
    ]  # fmt: skip
    return Server(name, command, "/completion", body, log)


def vllm(python: Path, base: Path, adapters: Sequence[Path], log: Path) -> Server:
    """vLLM on the CPU in bf16."""

    def body(ids: Sequence[int], adapter: int | None, new: int) -> dict[str, Any]:
        return {
            "model": "base" if adapter is None else f"a{adapter}", "prompt": list(ids),
            "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip

    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", "PORT", "--dtype",
        "bfloat16", "--max-model-len", "256", "--max-num-seqs", "16", "--enable-lora",
        "--max-loras", "16", "--max-lora-rank", "16", "--no-enable-prefix-caching",
        "--lora-modules", *(f"a{i}={path}" for i, path in enumerate(adapters)),
    ]  # fmt: skip
    variables = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    return Server("vLLM", command, "/v1/completions", body, log, variables)
