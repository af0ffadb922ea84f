"""A server among hostile adapters: what it is asked meanwhile, and what became of it.

    siege = Siege(server)
    with siege.watched():       `/livez` every 20 ms, and good adapters all the time
        siege.settle()          until every adapter was verified or named
        siege.load(names)       each by the administrator
        siege.request(names)    completions, chats and tools under each
    siege.latencies, siege.faults
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from serving_cases import ADMIN, Answer, Running

EVERY = 0.02  # seconds between two questions whether the server lives
BOUND = 20_000  # bytes of an answer that is an error
TOLD = 5 * 2500  # characters of why an adapter is wrong
HELLO = [{"role": "user", "content": "Hello, who is there?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}
QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3, "tools": [TOOL]}),
    (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 3, "tools": [TOOL], "tool_choice": "required"},
    ),
    ("/tokenize", {"messages": HELLO}),
    ("/tokenize", {"prompt": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"}),
)


class Siege:
    """What is asked of one server; `texts` has what good adapters said before, by name."""

    def __init__(self, server: Running, texts: dict[str, str]) -> None:
        self.server, self.texts = server, texts
        self.latencies: list[float] = []
        self.faults: list[str] = []
        self.answers = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ask whether the server lives, and good adapters, until the block ends."""
        ended = threading.Event()

        def live() -> None:
            while not ended.wait(EVERY):
                began = time.perf_counter()
                answer = self.server.ask("/livez")
                self.latencies.append(time.perf_counter() - began)
                self.check(answer.status == 200, f"/livez: {answer.status}")

        def good() -> None:
            while not ended.wait(0.05):
                for name, text in self.texts.items():
                    found = said(self.server, name)
                    self.check(found == text, f"{name} said {found!r:.300}, expected {text!r}")

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(live), pool.submit(good)]
            try:
                yield
            finally:
                ended.set()
            for one in asking:
                one.result()

    def check(self, holds: bool, fault: str) -> None:
        """Note a fault unless something holds."""
        if not holds:
            self.faults.append(fault)

    @property
    def adapters(self) -> dict[str, Any]:
        """What the administrator is told of all adapters."""
        answer = self.server.ask("/admin/adapters", key=ADMIN)
        assert answer.status == 200, answer.content[:2000]
        found: dict[str, Any] = answer.json
        for name, why in found["wrong"].items():
            self.check(0 < len(why) <= TOLD, f"{name}: a reason of {len(why)} characters")
        return found

    def settle(self, seconds: float = 600) -> float:
        """Wait until none is left to verify; how long it took."""
        began = time.monotonic()
        while left := self.adapters["unverified"]:
            if time.monotonic() - began > seconds:
                self.faults.append(f"never verified: {left[:20]}")
                break
            time.sleep(0.1)
        return time.monotonic() - began

    def load(self, names: Sequence[str]) -> None:
        """Have each read by the administrator."""
        self._all([("/v1/load_lora_adapter", {"lora_name": name}, ADMIN) for name in names])

    def request(self, names: Sequence[str]) -> None:
        """Ask under each."""
        self._all(
            [(path, {"model": name} | body, None) for name in names for path, body in QUESTIONS]
        )

    def _all(self, asked: Sequence[tuple[str, dict[str, Any], str | None]]) -> None:
        with ThreadPoolExecutor(3) as pool:
            for _ in pool.map(lambda one: self._ask(*one), asked):
                pass

    def _ask(self, path: str, body: dict[str, Any], key: str | None) -> None:
        what = f"{path} of {body.get('model') or body.get('lora_name')!r:.80}"
        began = time.monotonic()
        try:
            answer: Answer = self.server.ask(path, body, key, timeout=300)
        except OSError as error:
            self.faults.append(f"{what}: {error!r} after {time.monotonic() - began:.0f} s")
            return
        self.answers += 1
        fine = answer.status < 500 or answer.code == "adapter_numerics"
        unavailable = ("adapter_unavailable", "machine_busy")
        fine |= answer.status == 503 and answer.code in unavailable
        self.check(fine, f"{what}: {answer.status} {answer.content[:300]!r}")
        if answer.status != 200:
            self.check(len(answer.content) <= BOUND, f"{what}: {len(answer.content):,} bytes")


def said(server: Running, name: str) -> str:
    """What a good adapter says, as text and in a chat, or what came instead."""
    more = {"model": name, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    text = server.ask("/v1/completions", {"prompt": "The quick brown"} | more)
    chat = server.ask("/v1/chat/completions", {"messages": HELLO} | more)
    if (text.status, chat.status) != (200, 200):
        return f"{text.content.decode()} {chat.content.decode()}"
    return str(text.json["choices"][0]["text"] + chat.json["choices"][0]["message"]["content"])
