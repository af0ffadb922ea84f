"""A server under everything at once, for a while, holds in the end what it held."""

import gc
import json
import random
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

import lorafold as lf
from hostile_adapters import CASES
from serving_cases import Running, running, saved, stream_of, until

pytest_plugins = ["serving_fixtures"]
PROMPTS = ("The quick brown fox", "Book a table", "x" * 200, "The quick brown fox jumps. " * 12)
HOSTILE = ("config-deep", "config-huge-rank", "weights-trailing", "manifest-deep")
WRONG = (
    b"", b"[" * 5000, b'{"model": "nobody", "prompt": "x"}', b'{"model": "a", "prompt": [99999]}',
    b'{"model": "a", "prompt": "x", "n": 1000}', b'{"model": "a", "prompt": "x", "top_a": 1}',
)  # fmt: skip


class Load:
    """Clients of all kinds, each in a thread, until it is time."""


    def __init__(self, server: Running, seconds: float) -> None:
        self.server, self.until = server, time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.texts = {(m, p): server.text(m, p) for m in ("a", "b") for p in PROMPTS}

    def run(self) -> None:
        kinds = (self.ask, self.ask, self.leave, self.mistake, self.swap, self.look, self.harm)
        with ThreadPoolExecutor(len(kinds)) as pool:
            for one in [pool.submit(self.repeat, kind, i) for i, kind in enumerate(kinds)]:
                one.result()

    def repeat(self, kind, seed: int) -> None:  # type: ignore[no-untyped-def]
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            kind(draw)
            self.seen[kind.__name__] += 1

    def ask(self, draw: random.Random) -> None:
        model, prompt = draw.choice("ab"), draw.choice(PROMPTS)
        answer = self.server.complete(model, prompt, stream=draw.random() < 0.5)
        assert answer.status in (200, 429), answer.content
        if answer.status == 200:
            events = answer.events or [answer.json]
            text = "".join(event["choices"][0]["text"] for event in events)
            assert text == self.texts[model, prompt]

    def leave(self, draw: random.Random) -> None:
        at = stream_of(self.server, draw.choice("ab"), 300)
        at.settimeout(0.05 * draw.random())
        with suppress(TimeoutError):
            at.recv(2000)
        at.close()

    def mistake(self, draw: random.Random) -> None:
        answer = self.server.ask("/v1/completions", draw.choice(WRONG))
        assert 400 <= answer.status < 500, answer.content
        json.loads(answer.content)

    def swap(self, draw: random.Random) -> None:
        folder, version = self.server.folder, draw.choice("ab")
        shutil.rmtree(folder / "c", ignore_errors=True)
        shutil.copytree(folder / version, folder / "c")
        for answer in (
            self.server.load("c"), self.server.manage("c", "pin"), self.server.manage("c", "unpin"),
        ):  # fmt: skip
            assert answer.status == 200, answer.content
        prompt = draw.choice(PROMPTS)
        assert self.server.text("c", prompt) == self.texts[version, prompt]
        assert self.server.load("c", "unload").status == 200

    def harm(self, draw: random.Random) -> None:
        name = draw.choice(HOSTILE)
        loaded = self.server.load(name)
        assert 400 <= loaded.status < 500, loaded.content
        assert self.server.complete(name, "x").status == 404
        time.sleep(draw.random())

    def look(self, draw: random.Random) -> None:
        for path in ("/v1/models", "/metrics", "/readyz", "/"):
            assert self.server.ask(path).status == 200
        time.sleep(0.05)


def held() -> tuple[int, int, int]:
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), threading.active_count()


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_what_it_holds_stays_what_it_held(llama, tmp_path, seconds):
    specs = {"a": lf.LoRA(rank=2), "b": lf.DoRA(), "good": lf.LoRA(rank=2)}
    folder = saved(llama, specs, tmp_path / "adapters")
    for name in HOSTILE:
        CASES[name].make(folder, llama)
    with running(llama, folder, processes=3) as server:
        Load(server, max(2, seconds / 10)).run()  # what is made once is made
        until(server.idle)
        before = held()
        load = Load(server, seconds)
        load.run()
        until(server.idle)
        after = held()
        print(f"{dict(load.seen)}; bytes, files, threads: {before} -> {after}")
        assert after[0] < before[0] + (40 << 20)
        assert after[1] <= before[1] + 4
        assert after[2] <= before[2] + 2
        assert all(load.seen.values())
        bad = re.compile(r"lorafold_requests_total.*(internal_error|not_computed|unavailable)")
        failed = [line for line in server.metrics().splitlines() if bad.match(line)]
        assert failed == []
