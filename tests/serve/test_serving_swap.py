"""Adapters that come, go and change under load: every answer is of one version, and the server
holds in the end what it held.
"""

import gc
import json
import random
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import lorafold as lf
from engine_cases import METHODS, check_adapters, evict
from hostile_adapters import CASES
from serving_cases import ADMIN, Running, running, saved, stream_of, until

pytest_plugins = ["serving_fixtures"]
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def server(serve) -> Running:
    return serve({"v1": lf.LoRA(rank=2), "v2": lf.LoRA(rank=3), "other": lf.DoRA()})


def point(server: Running, name: str, **body: object) -> None:
    answer = server.ask(f"/admin/aliases/{name}", body, ADMIN, "PUT")
    assert answer.status == 200, answer.content


@pytest.mark.parametrize("flips", [75, pytest.param(400, marks=pytest.mark.slow)])
def test_an_alias_flips_under_load(server: Running, flips):
    texts = {server.text(model, PROMPT): model for model in ("v1", "v2")}
    assert len(texts) == 2
    point(server, "now", target="v1")
    done, seen = threading.Event(), Counter[str]()

    def load(stream: bool) -> None:
        while not done.is_set():
            answer = server.complete("now", PROMPT, stream=stream)
            assert answer.status == 200, answer.content
            events = answer.events if stream else [answer.json]
            seen[texts["".join(event["choices"][0]["text"] for event in events)]] += 1

    with ThreadPoolExecutor(4) as pool:
        running_loads = [pool.submit(load, i % 2 == 0) for i in range(4)]
        for i in range(flips):
            point(server, "now", target=("v1", "v2")[i % 2])
        done.set()
        for one in running_loads:
            one.result()
    assert min(seen["v1"], seen["v2"]) > 0
    until(server.idle)
    states = server.engine.adapters
    assert all(state.references == state.leases == 0 for state in states._entries)


def test_rollback_weights_and_versions(server: Running):
    texts = {model: server.text(model, PROMPT) for model in ("v1", "v2")}
    point(server, "it", target="v1")
    point(server, "it", target="v2")
    assert server.text("it", PROMPT) == texts["v2"]
    point(server, "it", rollback=True)
    assert server.text("it", PROMPT) == texts["v1"]
    both = [{"adapter": "v1", "weight": 3}, {"adapter": "v2", "weight": 1}]
    point(server, "it", targets=both)
    random.seed(0)
    share = Counter(server.text("it", PROMPT) for _ in range(30))
    assert share[texts["v1"]] > share[texts["v2"]] > 0
    digest = server.parts.registry.adapters["v1"].digest
    point(server, "it", target=f"v1@{digest[:12]}")
    shown = server.ask("/v1/models/it").json
    assert shown["targets"] == [{"adapter": "v1", "digest": digest[:12], "weight": 1.0}]
    for name, body in (
        ("it", {"target": "nobody"}), ("v1", {"target": "v2"}), ("it", {"target": "v1@00000000"}),
        ("..", {"target": "v1"}), ("it", {}), ("it", {"targets": [{"adapter": "v1", "weight": 0}]}),
        ("new", {"rollback": True}),
    ):  # fmt: skip
        answer = server.ask(f"/admin/aliases/{name}", body, ADMIN, "PUT")
        assert answer.status in (400, 404), (name, body, answer.content)
    assert server.text("it", PROMPT) == texts["v1"]


def test_other_files_under_the_same_name(server: Running, llama, tmp_path):
    """Those that run finish with what they began with; no other version's keys are reused."""
    new = saved(llama, {"x": lf.IA3(), "v1": lf.LoRA(rank=4)}, tmp_path / "new")
    old = server.text("other", PROMPT, max_tokens=200)
    with ThreadPoolExecutor(1) as pool:
        runs = pool.submit(server.text, "other", PROMPT, max_tokens=200)
        until(lambda: server.engine._scheduler.running)
        shutil.rmtree(server.folder / "other")
        shutil.copytree(new / "v1", server.folder / "other")
        assert server.load("other").status == 200
        changed = server.text("other", PROMPT, max_tokens=30)
        assert runs.result() == old
    assert not old.startswith(changed)
    with running(llama, new) as alone:
        assert alone.text("v1", PROMPT, max_tokens=30) == changed
    until(lambda: len(server.engine.adapters._entries) == 3)


def test_what_was_said_holds_after_a_restart(llama, tmp_path):
    folder = saved(llama, {n: lf.LoRA(rank=2) for n in "abcd"}, tmp_path / "adapters")
    with running(llama, folder) as server:
        point(server, "now", target="a")
        point(server, "now", target="b")
        for name, act in (("a", "pin"), ("c", "quarantine")):
            assert server.manage(name, act).status == 200
        assert server.load("d", "unload").status == 200
        assert server.complete("d", "x").status == 404
        text = server.text("b", PROMPT)
    with running(llama, folder) as server:
        assert server.text("now", PROMPT) == text
        assert server.ask("/v1/models/a").json["pinned"]
        assert server.complete("c", "x").code == "adapter_quarantined"
        assert server.complete("d", "x").status == 404
        shown = server.ask("/admin/adapters", key=ADMIN).json
        assert (shown["unloaded"], list(shown["quarantined"])) == (["d"], ["c"])
        point(server, "now", rollback=True)
        for name in "cd":
            answer = server.load(name)
            assert answer.status == 200, answer.content
            assert server.complete(name, "x").status == 200
        assert server.text("now", PROMPT) == server.text("a", PROMPT)


@pytest.mark.slow
def test_every_request_is_what_it_is_alone(tiny_model_dir, tmp_path):
    folder = saved(tiny_model_dir("qwen2"), METHODS, tmp_path / "adapters")
    draw = random.Random(0)
    with running(tiny_model_dir("qwen2"), folder, slots=6) as server:
        models = [*METHODS, server.parts.registry.base]
        asked = [
            {
                "model": draw.choice(models), "prompt": PROMPT * draw.randint(1, 4),
                "max_tokens": draw.randint(1, 30), "temperature": draw.choice([0, 0, 0.9]),
                "seed": i, "top_p": draw.choice([1, 0.8]), "return_token_ids": True,
            }
            for i in range(60)
        ]  # fmt: skip

        def one(body: dict[str, object]) -> object:
            answer = server.complete(**body)  # type: ignore[arg-type]
            assert answer.status == 200, answer.content
            return answer.json["choices"][0]["token_ids"]

        with ThreadPoolExecutor(16) as pool:
            company = list(pool.map(one, asked))
        assert company == [one(body) for body in asked]


class Race(RuleBasedStateMachine):
    server: Running
    versions: dict[str, Path]
    texts: dict[str, str]
    names = st.sampled_from(["x", "y"])

    def __init__(self) -> None:
        super().__init__()
        self.now = {"x": "1", "y": "2"}
        for name, version in self.now.items():
            self.put(name, version)

    def put(self, name: str, version: str) -> None:
        shutil.rmtree(self.server.folder / name, ignore_errors=True)
        shutil.copytree(self.versions[version], self.server.folder / name)
        answer = self.server.load(name)
        assert answer.status == 200, answer.content
        self.now[name] = version

    @rule(name=names, version=st.sampled_from("123"))
    def load(self, name: str, version: str) -> None:
        self.put(name, version)

    @rule(name=names)
    def unload(self, name: str) -> None:
        status = self.server.load(name, "unload").status
        assert status == (200 if name in self.now else 404)
        self.now.pop(name, None)

    @rule(name=names, act=st.sampled_from(["pin", "unpin", "quarantine"]))
    def manage(self, name: str, act: str) -> None:
        status = self.server.manage(name, act).status
        assert status == (200 if name in self.now else 404)
        if act == "quarantine" and name in self.now:
            self.put(name, self.now[name])

    @rule(name=names)
    def evict(self, name: str) -> None:
        if name in self.now:
            adapters = self.server.engine.adapters
            evict(adapters, self.server.parts.registry.adapters[name].key)

    @rule(name=names, n=st.integers(1, 3))
    def complete(self, name: str, n: int) -> None:
        with ThreadPoolExecutor(n) as pool:
            answers = list(pool.map(lambda _: self.server.complete(name, PROMPT), range(n)))
        for answer in answers:
            if name not in self.now:
                assert answer.status == 404
            else:
                assert answer.json["choices"][0]["text"] == self.texts[self.now[name]]

    @rule(name=names)
    def swap_under_a_request(self, name: str) -> None:
        if name not in self.now:
            return
        before = self.now[name]
        with ThreadPoolExecutor(1) as pool:
            runs = pool.submit(self.server.complete, name, PROMPT)
            self.put(name, "3" if before != "3" else "1")
            answer = runs.result()
        if answer.status != 200:  # it had left memory, and then its files were others
            assert answer.code == "adapter_unavailable"
            return
        text = answer.json["choices"][0]["text"]
        assert text in (self.texts[before], self.texts[self.now[name]])

    @invariant()
    def the_books_balance(self) -> None:
        until(self.server.idle)
        check_adapters(self.server.engine.adapters)
        assert set(self.server.parts.registry.adapters) == set(self.now)


@pytest.mark.parametrize("steps", [25, pytest.param(120, marks=pytest.mark.slow)])
def test_any_order_of_loads_pins_evictions_and_requests(llama, tmp_path, steps):
    specs = {"1": lf.LoRA(rank=2), "2": lf.LoRA(rank=3), "3": lf.DoRA()}
    versions = saved(llama, specs, tmp_path / "versions")
    folder = tmp_path / "served"
    folder.mkdir()
    with running(llama, versions) as server:
        texts = {version: server.text(version, PROMPT) for version in specs}
    with running(llama, folder, processes=3) as server:
        Race.server, Race.texts = server, texts
        Race.versions = {version: versions / version for version in specs}
        few = settings(
            max_examples=2 if steps == 25 else 4, stateful_step_count=steps, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run_state_machine_as_test(Race, settings=few)


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


def holds_what_it_held(llama: Path, folder: Path, seconds: float) -> None:
    specs = {"a": lf.LoRA(rank=2), "b": lf.DoRA(), "good": lf.LoRA(rank=2)}
    folder = saved(llama, specs, folder)
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


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_what_it_holds_stays_what_it_held(llama, tmp_path, seconds):
    # in a process of its own: the heap that other tests leave behind grows by itself
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(holds_what_it_held, llama, tmp_path / "adapters", seconds).result()
