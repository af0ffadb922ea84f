"""Blocks are counted, given back, and reserved before a request runs."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_cases import (
    METHODS,
    alone,
    check,
    ended,
    failing,
    loaded,
    prompt,
    room,
    save_adapters,
    together,
)
from lorafold.engine import Engine, Request, kv_cache
from lorafold.engine.kv_cache import BlockCache
from lorafold.engine.scheduler import COMPLETION_COST
from lorafold.errors import LorafoldError

OPTIONS: dict[str, Any] = {"length": 160, "chunk": 12, "budget": 24}


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    names = ("lora", "dora", "prompt")
    specs = {name: METHODS[name] for name in names}
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), specs)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools are tensors, as on other systems and devices."""
    monkeypatch.setattr(kv_cache, "sys", SimpleNamespace(platform="other"))


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "tensors"])
@pytest.mark.parametrize("size", [1, 8, 24, 64])
def test_free_blocks_are_zero_and_others_untouched(size, mapped, monkeypatch) -> None:
    """Blocks of less and of more than a page, whole pages or not."""
    if not mapped:
        elsewhere(monkeypatch)
    cache, rng = BlockCache(60, torch.device("cpu")), random.Random(size)
    cache.create(0, 3, size, 2 * size, torch.bfloat16)
    held: list[int] = []
    for _ in range(40):
        if rng.random() < 0.6:
            held += (new := cache.allocate(rng.randint(0, min(12, cache.num_free))))
            for pool in (cache.keys[0], cache.values[0]):
                assert not pool[new].any()
                pool[new] = 1
        else:
            rng.shuffle(held)
            n = rng.randint(0, len(held))
            cache.release(held[:n])
            del held[:n]
        for pool in (cache.keys[0], cache.values[0]):
            assert pool.is_contiguous()
            assert (pool.shape[0] == 61) is mapped or cache._end > 30
            assert pool[held].eq(1).all()
            assert not pool[[b for b in range(len(pool)) if b not in held]].any()
    cache.clear()
    assert cache.num_free == 60
    assert not any(pool.any() for pool in cache._pools())


def anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_that_of_written_blocks_and_is_given_back() -> None:
    cache = BlockCache(1 << 16, torch.device("cpu"))
    cache.create(0, 4, 64, 64, torch.float32)  # 32 KiB a block and pool, 4 GiB in all
    before = anonymous()
    blocks = cache.allocate(1000)
    assert anonymous() - before < 1 << 20
    for block in blocks:
        cache.keys[0][block] = 1
    assert 31 << 20 < anonymous() - before < 34 << 20
    cache.release(blocks[::2])
    assert 15 << 20 < anonymous() - before < 18 << 20
    cache.clear()
    assert anonymous() - before < 2 << 20


@pytest.mark.parametrize("slots", [2, 6])
def test_on_tensors_that_grow_tokens_are_the_same(slots, model, paths, monkeypatch) -> None:
    asked = [
        Request(str(i), prompt(9 * i + 1, i), 8, [None, "lora", "prompt"][i % 3]) for i in range(9)
    ]
    expected = [alone(model, request, paths, **OPTIONS) for request in asked]
    elsewhere(monkeypatch)
    with loaded(Engine(model, slots=slots, **OPTIONS), paths) as engine:
        assert together(engine, asked, steps_between=1) == expected
        engine.forget()
        assert not engine._runner.cache.keys  # type: ignore[attr-defined]


def test_requests_wait_for_blocks_and_large_ones_are_not_overtaken(model) -> None:
    """Four blocks: three requests of one run, then one of four, and only then the others."""
    lengths = [9, 9, 9, 100, 9, 9, 9]
    asked = [Request(str(i), prompt(n, i), 20) for i, n in enumerate(lengths)]
    expected = [alone(model, request, {}, **OPTIONS) for request in asked]
    with Engine(model, slots=8, kv_bytes=room(model, 4), **OPTIONS) as engine:
        assert engine.length == engine.kv_tokens == 128
        streams, order, running = [engine.submit(request) for request in asked], [], 0
        while engine._rows:
            engine.step()
            check(engine)
            running = max(running, len(engine._scheduler.running))
            order += [s.request.id for s in streams if s.ended and s.request.id not in order]
        assert [stream.result().tokens for stream in streams] == expected
        assert (order.index("3"), running) == (3, 3)


@pytest.mark.parametrize("name", [None, "lora", "prompt"])
def test_requests_without_room_for_their_next_token_run_again(name, model, paths) -> None:
    """Eight that may become long run at once in ten blocks; the youngest make room."""
    asked = [Request(str(i), prompt(20, i), 100, name) for i in range(8)]
    expected = [alone(model, request, paths, **OPTIONS) for request in asked]
    with loaded(Engine(model, slots=8, kv_bytes=room(model, 10), **OPTIONS), paths) as engine:
        streams, running, order = [engine.submit(request) for request in asked], 0, []
        while engine._rows:
            engine.step()
            check(engine)
            running = max(running, len(engine._scheduler.running))
            order += [s.request.id for s in streams if s.ended and s.request.id not in order]
        assert [stream.result().tokens for stream in streams] == expected
        assert running >= 6
        assert order == sorted(order)
        charged = engine._scheduler.waiting._used[asked[0].tenant]
        assert charged <= 8 * (20 + 99 * COMPLETION_COST)  # what is computed again is free


def test_what_never_fits_is_refused_with_the_length_that_fits(model) -> None:
    with Engine(model, slots=2, kv_bytes=room(model, 3) + 7, length=160) as engine:
        with pytest.raises(LorafoldError, match=r"found 90 \+ 7 tokens, expected at most 96 in"):
            engine.submit(Request("1", prompt(90, 0), 7))
        assert ended(engine, Request("1", prompt(90, 0), 6)).reason == "length"
    least = room(model, 1)
    with pytest.raises(LorafoldError, match=f"kv_bytes: found {least - 1:,}, expected {least:,}"):
        Engine(model, kv_bytes=least - 1)


def test_by_default_the_context_is_the_models(model, monkeypatch) -> None:
    with Engine(model) as engine:
        assert engine.length == model.config.max_position_embeddings == 512
    monkeypatch.setattr("lorafold.engine.engine.free_bytes", lambda _: 2 * room(model, 3))
    with Engine(model) as engine:
        assert engine.length == engine.kv_tokens == 96


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_of_requests_and_prefixes_whatever_happens(model, paths, seed) -> None:
    """Few blocks; requests that begin alike end, are cancelled, and fail alone or together."""
    rng, begins = random.Random(seed), [prompt(n, 7) for n in (0, 31, 32, 50, 70)]
    names, error = [None, None, "lora", "prompt"], RuntimeError("no")
    kv_bytes = room(model, rng.choice([6, 16, 40]))
    asked = [Request(str(i), prompt(50, i), 9, names[i]) for i in range(4)]
    expected = [alone(model, request, paths, **OPTIONS) for request in asked]
    bad: set[str] = set()
    with loaded(Engine(model, slots=4, kv_bytes=kv_bytes, **OPTIONS), paths) as engine:
        streams = []
        with failing(engine, lambda row, n: row.request.id in bad, error):
            for i in range(60):
                ids = rng.choice(begins) + prompt(rng.randint(1, 40), rng.randint(0, 5))
                name, tenant = rng.choice(names), rng.choice("aab")
                new = rng.randint(1, 20)
                streams.append(engine.submit(Request(str(i), ids, new, name, tenant=tenant)))
                for _ in range(rng.randint(0, 6)):
                    engine.step()
                    check(engine)
                running = sorted(engine._rows)
                if running and rng.random() < 0.4:
                    engine.cancel(rng.choice(running))
                bad = {id for id in running if rng.random() < 0.3} if rng.random() < 0.3 else set()
                if rng.random() < 0.1:
                    bad = {row.request.id for row in engine._scheduler.running}
            while engine._rows:
                engine.step()
                check(engine)
        assert {s.result().reason for s in streams} == {"cancelled", "failed", "length"}
        engine.forget()
        cache: Any = engine._runner.cache  # type: ignore[attr-defined]
        assert not cache.references
        bad = set()
        assert together(engine, asked) == expected


def test_if_the_cache_is_emptied_requests_that_shared_blocks_run_again(model) -> None:
    """Without what they share, they do not all fit at once; no token is lost or repeated."""
    ids = prompt(96, 3)
    asked = [Request(str(i), (*ids, i), 20) for i in range(4)]
    doomed = [Request(f"doomed{i}", prompt(3, i), 20) for i in range(2)]
    expected = [alone(model, request, {}, **OPTIONS) for request in asked]
    with Engine(model, slots=6, kv_bytes=room(model, 10), **OPTIONS) as engine:
        streams = [engine.submit(asked[0])]
        for _ in range(12):
            engine.step()
        streams += [engine.submit(request) for request in (*asked[1:], *doomed)]
        for _ in range(4):
            engine.step()
            check(engine)
        assert len(engine._scheduler.running) == 6
        with failing(engine, lambda row, n: row.request.id.startswith("doomed"), RuntimeError("")):
            engine.step()
            check(engine)
        assert not engine._scheduler.running
        assert [row.request.id for row in engine._scheduler.waiting] == ["0", "1", "2", "3"]
        while engine._rows:
            engine.step()
            check(engine)
        assert [stream.result().tokens for stream in streams[:4]] == expected
