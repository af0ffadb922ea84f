"""A request has the adapter that its name stood for when it was submitted."""

import json
import os
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import lorafold as lf
from engine_cases import (
    alone,
    check,
    check_adapters,
    ended,
    evict,
    loaded,
    prompt,
    save_adapters,
    status,
    with_large_weights,
)
from lorafold.engine import Engine, EventStream, Request
from lorafold.engine.adapter_cache import AdapterCache
from lorafold.engine.adapters import KnownAdapter, LoadedAdapter
from lorafold.engine.kv_cache import common_length
from lorafold.errors import LorafoldError

SPECS = {
    "a1": lf.LoRA(rank=2),
    "a2": lf.LoRA(rank=3),
    "b1": lf.DoRA(over=lf.LoRA(rank=2)),
    "c1": lf.Bottleneck(size=4),
    "d1": lf.Prompt(tokens=2),
}
PROMPTS = [prompt(3, 0), prompt(19, 1), prompt(8, 2)]
PROMPTS += [(*PROMPTS[1][:9], *prompt(4, 3)), (*PROMPTS[1], *prompt(3, 4))]  # begin the same
NEW = 6
APART = ("c1", "d1")  # can't be mixed with others, and start from nothing


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), SPECS)


@pytest.fixture(scope="module")
def tokens(model, paths) -> dict[tuple[str | None, int], tuple[int, ...]]:
    return {
        (name, i): alone(model, Request("1", p, NEW, adapter=name), paths, slots=1, length=32)
        for name in (None, *paths)
        for i, p in enumerate(PROMPTS)
    }


def bytes_of(engine: Engine, name: str) -> int:
    held = engine.adapters.entry(name).loaded
    assert held is not None
    return held.nbytes


@pytest.mark.slow
def test_the_machine(model, paths, tokens) -> None:
    """Any order of operations, with room for two adapters, and two tenants."""
    with loaded(Engine(model, slots=1, length=32), paths) as engine:
        room = sum(sorted(bytes_of(engine, name) for name in paths)[-2:])

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.engine = Engine(model, slots=3, length=32, chunk=5, budget=10, adapter_bytes=room)
            self.versions: dict[str, str] = {}
            self.pinned: set[str] = set()
            self.streams: list[tuple[EventStream, str | None, int, bool]] = []
            self.generations: list[int] = []

        @rule(version=st.sampled_from(sorted(paths)), wait=st.booleans())
        @precondition(lambda self: not self.pinned)
        def load(self, version: str, wait: bool) -> None:
            name = version[0]
            loading = self.engine.adapters.load(name, paths[version])
            if loading.exception() is None:
                self.versions[name] = version

        @rule(name=st.sampled_from("abcd"))
        def unload(self, name: str) -> None:
            if name in self.versions:
                self.engine.unload(name)
                del self.versions[name]
                self.pinned.discard(name)
            else:
                with pytest.raises(LorafoldError, match=f"found '{name}'"):
                    self.engine.unload(name)

        @rule(which=st.integers(0, 3), busy=st.booleans())
        @precondition(lambda self: self.versions)
        def evict(self, which: int, busy: bool) -> None:
            name = sorted(self.versions)[which % len(self.versions)]
            if busy:  # while one of its requests is likely to run
                self.submit(name, which % len(PROMPTS))
                self.step(2)
            if evict(self.engine.adapters, name):
                assert name not in self.pinned
                assert status(self.engine.adapters, name) == "cold"

        @rule(name=st.sampled_from("abcd"), pinned=st.booleans())
        def pin(self, name: str, pinned: bool) -> None:
            if name in self.versions and (not pinned or not self.pinned):
                self.engine.adapters.pin(name, pinned)
                (self.pinned.add if pinned else self.pinned.discard)(name)

        @rule()
        def look(self) -> None:
            self.engine.adapters.check_memory()
            assert self.engine.adapters.damaged == 0

        @rule(
            name=st.sampled_from([None, *"abcd"]),
            i=st.integers(0, len(PROMPTS) - 1),
            tenant=st.sampled_from(["", "other"]),
        )
        def submit(self, name: str | None, i: int, tenant: str = "") -> None:
            request = Request(str(len(self.streams)), PROMPTS[i], NEW, name, tenant=tenant)
            if name is not None and name not in self.versions:
                with pytest.raises(LorafoldError, match=f"found '{name}'"):
                    self.engine.submit(request)
                return
            version = None if name is None else self.versions[name]
            generation = self.engine.adapters.entry(name).generation if name else 0
            self.generations.append(generation)
            self.streams.append((self.engine.submit(request), version, i, False))

        @rule(which=st.integers(0, 30))
        def cancel(self, which: int) -> None:
            if which < len(self.streams):
                stream, version, i, _ = self.streams[which]
                if self.engine.cancel(stream.request.id):
                    self.streams[which] = stream, version, i, True

        @rule(n=st.integers(1, 6))
        def step(self, n: int) -> None:
            for _ in range(n):
                self.engine.step()

        @invariant()
        def right(self) -> None:
            check(self.engine)
            assert set(self.engine.adapters.names()) == set(self.versions)

        def teardown(self) -> None:
            try:
                self.engine.run()
                check(self.engine)
                computed: dict[tuple[int, str], list[tuple[int, ...]]] = {}
                for at, (stream, version, i, cancelled) in enumerate(self.streams):
                    ended = stream.result()
                    expected = tokens[version, i]
                    key = self.generations[at], stream.request.tenant
                    same = computed.setdefault(key, [])
                    most = max((common_length(ids, PROMPTS[i]) for ids in same), default=0)
                    assert ended.cached <= (0 if version in APART else most)
                    same.append(PROMPTS[i] + expected)
                    if ended.reason == "cancelled":
                        assert cancelled
                        assert ended.tokens == expected[: len(ended.tokens)]
                    elif ended.reason == "failed":  # two that are pinned or large leave no room
                        assert "bytes" in ended.message
                    else:
                        assert ended.tokens == expected, (version, i)
                assert all(not s.leases for s in self.engine.adapters._entries)
            finally:
                self.engine.close()

    of = {"max_examples": 60, "stateful_step_count": 25, "deadline": None}
    Machine.TestCase.settings = settings(**of, suppress_health_check=list(HealthCheck))
    Machine.TestCase().runTest()


def test_a_name_loaded_again_is_another_adapter_then(model, paths, tokens, tmp_path) -> None:
    where = tmp_path / "a"
    shutil.copytree(paths["a1"], where)
    with Engine(model, slots=2, length=32) as engine:
        engine.load("a", where)
        generation = engine.adapters.entry("a").generation
        engine.load("a", where)
        assert engine.adapters.entry("a").generation == generation  # the same files
        first = engine.submit(Request("1", PROMPTS[1], NEW, adapter="a"))
        waiting = engine.submit(Request("2", PROMPTS[0], NEW, adapter="a"))
        engine.step()
        shutil.rmtree(where)
        shutil.copytree(paths["a2"], where)
        engine.load("a", where)
        second = engine.submit(Request("3", PROMPTS[1], NEW, adapter="a"))
        engine.run()
        assert first.result().tokens == tokens["a1", 1]
        assert waiting.result().tokens == tokens["a1", 0]
        assert second.result().tokens == tokens["a2", 1]
        assert len(engine.adapters._entries) == 1


def test_files_that_changed_are_not_read_under_the_old_digest(model, paths, tmp_path) -> None:
    where = tmp_path / "a"
    shutil.copytree(paths["a1"], where)
    with Engine(model, slots=2, length=32) as engine:
        engine.load("a", where)
        assert evict(engine.adapters, "a")
        weights = where / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        stream = engine.submit(Request("1", PROMPTS[0], NEW, adapter="a"))
        other = engine.submit(Request("2", PROMPTS[0], NEW))
        engine.run()
        assert stream.result().reason == "failed"
        assert "changed since it was loaded" in stream.result().message
        assert other.result().reason == "length"
        with pytest.raises(LorafoldError, match="content differs"):
            engine.load("a", where)
        assert engine.adapters.names() == ("a",)


def stack(model, folder: Path) -> tuple[Path, Path]:
    """An adapter, and one that lies over it; no manifest says what they were."""
    low = save_adapters(model, folder, {"low": lf.LoRA(rank=2)})["low"]
    beneath = lf.load(model, low, "low")
    high = save_adapters(model, folder, {"high": lf.LoRA(rank=2)})["high"]
    beneath.detach()
    for path in (low, high):
        (path / "manifest.json").unlink()
    return low, high


def test_an_adapter_below_that_changed_is_another_stack(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    low, high = stack(model, tmp_path)
    record = json.loads((low / "lorafold.json").read_text())
    with Engine(model, slots=1, length=32) as engine:
        engine.load("it", high)
        before = engine.adapters.entry("it")
        assert before.stack == engine._reader.verified(high)
        engine.load("it", high)
        assert engine.adapters.entry("it") == before
        (low / "lorafold.json").write_text(json.dumps(record | {"note": "another"}))
        assert evict(engine.adapters, "it")
        end = ended(engine, Request("1", PROMPTS[0], NEW, adapter="it"))
        assert end.reason == "failed"
        assert f"{low} changed since it was loaded" in end.message
        engine.load("it", high)
        after = engine.adapters.entry("it")
        assert (after.stack[0] != before.stack[0], after.stack[1]) == (True, before.stack[1])
        assert (after.stack != before.stack, after.generation > before.generation) == (True, True)
        assert ended(engine, Request("2", PROMPTS[0], NEW, adapter="it")).reason == "length"
        weights = low / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        with pytest.raises(LorafoldError, match="trained on top of"):
            engine.load("it", high)
        assert engine.adapters.entry("it") == after


def test_the_same_files_elsewhere_are_read_there_from_now(model, paths, tokens, tmp_path) -> None:
    for name in ("one", "two"):
        shutil.copytree(paths["a1"], tmp_path / name)
    with Engine(model, slots=1, length=32) as engine:
        engine.load("a", tmp_path / "one")
        engine.load("a", tmp_path / "two")
        shutil.rmtree(tmp_path / "one")
        assert evict(engine.adapters, "a")
        assert ended(engine, Request("1", PROMPTS[0], NEW, adapter="a")).tokens == tokens["a1", 0]


@pytest.mark.parametrize("kind", ["missing", "other-model", "truncated"])
def test_what_cannot_be_read_gets_no_name(model, paths, tmp_path, tiny_model, kind) -> None:
    where = tmp_path / "it"
    # of a path beside two bases the middle is cut
    said = "/it: the adapter was trained on another base" if kind == "other-model" else str(where)
    if kind == "other-model":
        where = save_adapters(tiny_model("gpt2"), tmp_path, {"it": lf.LoRA(rank=2)})["it"]
    if kind == "truncated":
        shutil.copytree(paths["a1"], where)
        weights = where / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    with Engine(model, slots=2, length=32) as engine:
        engine.load("a", paths["a1"])
        with pytest.raises(LorafoldError, match=said):
            engine.load("it", where)
        assert engine.adapters.names() == ("a",)
        with pytest.raises(LorafoldError, match=said):
            engine.load("a", where)
        ended(engine, Request("1", PROMPTS[0], NEW, adapter="a"))


def test_an_evicted_adapter_is_read_again_and_others_go_on_meanwhile(model, paths, tokens) -> None:
    with Engine(model, slots=2, length=32) as engine:
        engine.load("a", paths["a1"])
        evict(engine.adapters, "a")
        read, gate = engine.adapters._reader.read, threading.Event()

        def slow(entry: KnownAdapter) -> LoadedAdapter:
            assert gate.wait(30)
            return read(entry)

        engine.adapters._reader.read = slow  # type: ignore[method-assign]
        cold = engine.submit(Request("1", PROMPTS[0], NEW, adapter="a"))
        warm = engine.submit(Request("2", PROMPTS[1], NEW))
        while warm.ended is None:
            engine.step()
        assert cold.ended is None
        assert status(engine.adapters, "a") == "loading"
        gate.set()
        engine.run()
        assert warm.result().tokens == tokens[None, 1]
        assert cold.result().tokens == tokens["a1", 0]


def test_the_least_recently_used_leaves_and_pins_stay(model, paths) -> None:
    with Engine(model, slots=2, length=32) as engine:
        loaded(engine, {"a": paths["a1"], "b": paths["a2"], "c": paths["b1"]})
        budget = bytes_of(engine, "a") + bytes_of(engine, "b")
    books = AdapterCache(engine._reader, budget=budget)
    try:
        books.load("a", paths["a1"]).result()
        books.load("b", paths["a2"]).result()
        entry = books.bind("a")
        assert books.lease(entry)
        books.release(entry)
        books.unbind(entry)
        books.load("c", paths["b1"]).result()
        assert [status(books, n) for n in "abc"] == ["resident", "cold", "resident"] or (
            status(books, "b") == "cold"
        )
        books.pin("c")
        books.pin("a")
        with pytest.raises(LorafoldError, match="pinned adapters exceed adapter_bytes"):
            books.load("big", paths["a2"]).result()
        check_adapters(books)
        books.pin("a", False)
        books.unload("c")
        with pytest.raises(LorafoldError, match="found 'c'"):
            books.pin("c")
        check_adapters(books)
    finally:
        books.close()


LARGE, LITTLE = 64 << 20, 4 << 20  # bytes


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    return save_adapters(model, tmp_path, {"a": lf.LoRA(rank=2)})["a"]


@contextmanager
def taking_little() -> Iterator[None]:
    """What is done here takes little memory at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "lorafold.json", "manifest.json"])
def test_what_grew_since_it_was_verified_is_not_read(model, adapter, name) -> None:
    with Engine(model, slots=1, length=32) as engine:
        engine.load("a", adapter)
        assert evict(engine.adapters, "a")
        os.truncate(adapter / name, LARGE)
        with taking_little():
            end = ended(engine, Request("1", prompt(3, 0), 2, adapter="a"))
    assert end.reason == "failed"
    assert f"found more with {name}; if this file changed, load the adapter again" in end.message


def test_weights_that_memory_has_no_room_for_are_not_read(model, adapter, tmp_path) -> None:
    large = shutil.copytree(adapter, tmp_path / "large")
    with_large_weights(large, LARGE // 4)
    with Engine(model, slots=1, length=32, adapter_bytes=LARGE // 2) as engine:
        engine.load("a", adapter)
        told = f"found {LARGE // 4:,} parameters, expected at most {LARGE // 8:,}"
        with taking_little(), pytest.raises(LorafoldError, match=told):
            engine.load("large", large)
        assert engine.adapters.names() == ("a",)
