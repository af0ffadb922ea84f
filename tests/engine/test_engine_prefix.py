"""Prefix reuse changes no token, and nobody starts from what others computed."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_cases import (
    METHODS,
    check,
    ended,
    failing,
    generated,
    loaded,
    poison,
    prompt,
    room,
    sampling,
    save_adapters,
    together,
    watch,
)
from lorafold.engine import Engine, Request, kv_cache
from lorafold.engine.kv_cache import CACHED_SHARE, BlockCache, CachedPrefixes, common_length

OPTIONS: dict[str, Any] = {"length": 96, "chunk": 12, "budget": 24}


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), METHODS)


def conversations(n: int, seed: int) -> list[Request]:
    """Requests whose prompts share beginnings of all lengths, under few adapters and tenants."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    names = [None, None, "lora", "dora", "houlsby", "prompt"]
    asked: list[Request] = []
    for i in range(n):
        name, tenant = names[draw(6)], "ab"[draw(5) == 0]
        same = [r for r in asked[-9:] if (r.adapter, r.tenant) == (name, tenant)]
        before = same[draw(len(same))].prompt if same and draw(6) else prompt(20, draw(3))
        ids = (*before[: 1 + draw(2 * len(before))], *prompt(draw(9), 100 + i))[:70]
        sampled = sampling(draw(99))
        asked.append(Request(str(i), ids, 1 + draw(10), name, sampled, tenant=tenant))
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(("n", "seed"), [(120, 0), *((250, seed) for seed in range(1, 9))])
def test_tokens_are_the_same_with_reuse_and_without(model, paths, n: int, seed: int) -> None:
    asked = conversations(n, seed)
    with loaded(Engine(model, slots=1, prefix_reuse=False, **OPTIONS), paths) as engine:
        expected = [together(engine, [request])[0] for request in asked]
    with loaded(Engine(model, slots=5, **OPTIONS), paths) as engine:
        streams = []
        for i, request in enumerate(asked):
            streams.append(engine.submit(request))
            for _ in range(i % 7):
                engine.step()
                check(engine)
        engine.run()
        check(engine)
        found = [stream.result() for stream in streams]
    assert [i for i in range(n) if found[i].tokens != expected[i]] == []
    computed: dict[Any, list[tuple[int, ...]]] = {}
    for request, end in zip(asked, found, strict=True):
        earlier = computed.setdefault((request.adapter, request.tenant), [])
        most = max((common_length(e, request.prompt) for e in earlier), default=0)
        assert end.cached <= (0 if request.adapter == "prompt" else most)
        earlier.append(request.prompt + end.tokens)
    assert sum(end.cached > 0 for end in found) > n / 4


def test_the_next_turn_starts_where_the_last_ended(model, paths) -> None:
    with Engine(model, slots=3, **OPTIONS) as engine:
        engine.load("lora", paths["lora"])
        first = ended(engine, Request("1", prompt(20, 0), 6, "lora"))
        assert first.cached == 0
        turn = (*prompt(20, 0), *first.tokens, *prompt(5, 1))
        assert ended(engine, Request("2", turn, 4, "lora")).cached == 20 + 6 - 1
        assert ended(engine, Request("3", turn, 4, "lora")).cached == len(turn) - 1
        # a beginning leaves the conversation that it is the beginning of
        assert ended(engine, Request("4", prompt(20, 0), 4, "lora")).cached == 19
        assert ended(engine, Request("5", turn, 4, "lora")).cached == len(turn) - 1


def test_nobody_starts_from_what_others_computed(model, paths, tmp_path) -> None:
    ids = prompt(30, 0)
    where = tmp_path / "it"
    shutil.copytree(paths["lora"], where)
    adapters = {"it": where, "dora": paths["dora"], "soft": paths["prompt"]}
    with loaded(Engine(model, slots=8, **OPTIONS), adapters) as engine:
        # the last has virtual tokens in the cache
        named = [*product((None, "it"), ("", "a")), ("dora", ""), ("soft", ""), ("soft", "")]
        asked = [Request(str(i), ids, 5, name, tenant=t) for i, (name, t) in enumerate(named)]
        assert [ended(engine, request).cached for request in asked] == [0] * 7
        again = [ended(engine, request).cached for request in asked]
        assert again == [29, 29, 29, 29, 29, 0, 0]
        engine.unload("it")
        engine.load("it", where)
        assert ended(engine, asked[2]).cached == 0  # the same files, another generation
        assert ended(engine, asked[2]).cached == 29
        shutil.rmtree(where)
        shutil.copytree(paths["ia3"], where)
        engine.load("it", where)
        assert ended(engine, asked[2]).cached == 0


@pytest.mark.parametrize("options", [{"invariant": True}, {"prefix_reuse": False}], ids=str)
def test_without_reuse_nothing_is_kept(model, options) -> None:
    with Engine(model, slots=2, **OPTIONS, **options) as engine:
        for i in range(3):
            assert ended(engine, Request(str(i), prompt(20, 0), 4)).cached == 0
        assert not engine._runner.cache.references  # type: ignore[attr-defined]


def test_what_was_cancelled_or_failed_is_not_kept(model, paths, monkeypatch) -> None:
    request = Request("1", prompt(20, 0), 20, "lora")
    with Engine(model, slots=2, **OPTIONS) as engine:
        engine.load("lora", paths["lora"])
        stream = engine.submit(request)
        for _ in range(6):
            engine.step()
        engine.cancel("1")
        engine.run()
        assert stream.result().reason == "cancelled"
        assert ended(engine, request).cached == 0
        held = engine.adapters.entry("lora").loaded
        assert held is not None
        poison(held)
        other = Request("2", prompt(9, 3), 20, "lora")
        assert ended(engine, other).reason == "failed"
        assert len(engine._runner.prefixes.prefixes) == 1  # type: ignore[attr-defined]
        assert ended(engine, Request("3", prompt(9, 3), 3)).reason == "length"


def test_beyond_their_share_the_least_recently_used_prefix_is_dropped(model) -> None:
    with Engine(model, slots=3, kv_bytes=room(model, 3 * CACHED_SHARE), **OPTIONS) as engine:
        for i in range(3):
            ended(engine, Request("x", prompt(20, i), 3))
        assert ended(engine, Request("x", prompt(20, 0), 3)).cached == 19  # the latest now
        assert ended(engine, Request("x", prompt(20, 7), 3)).cached == 0  # takes the place of 1
        cached = [ended(engine, Request("x", prompt(20, i), 3)).cached for i in (0, 2, 7, 1)]
        assert cached == [19, 19, 19, 0]


def test_a_request_takes_the_lowest_slot_and_leaves_prefixes_unharmed(model) -> None:
    prompts = [prompt(30, i) for i in range(4)]
    with Engine(model, slots=4, **OPTIONS) as engine:
        streams = [engine.submit(Request(str(i), p, 3)) for i, p in enumerate(prompts)]
        engine.run()
        first = [stream.result().tokens for stream in streams]
        for i in (3, 2, 0, 1):
            stream = engine.submit(Request("again", prompts[i], 3))
            while engine.step():
                check(engine)
                assert all(row.slot == 0 for row in engine._scheduler.running)
            assert (stream.result().cached, stream.result().tokens) == (29, first[i])


def test_the_longest_beginning_is_found() -> None:
    cache = BlockCache(100, torch.device("cpu"))
    kept, key = CachedPrefixes(cache), (1, "tenant")
    blocks = [cache.allocate(1) for _ in range(3)]
    kept.add(key, [1, 2, 3], blocks[0])
    kept.add(key, [1, 2, 4, 5], blocks[1])
    kept.add((2, "tenant"), [1, 2, 3, 4, 5, 6, 7], blocks[2])
    assert kept.find(key, (1, 2, 4, 9)) == (blocks[1], 3)
    assert kept.find(key, (1, 2, 3)) == (blocks[0], 3)
    for other, ids in ((key, (9, 1)), (key, ()), ((1, "other"), (1, 2))):
        assert kept.find(other, ids) == ((), 0)
    more = cache.allocate(2)
    kept.add(key, [1, 2, 3, *range(40)], more)  # instead of its beginning
    assert cache.references == dict(zip(range(1, 6), (1, 2, 2, 2, 2), strict=True))


def counting(model: Any, paths: Mapping[str, Path], slots: int, **options: Any) -> Any:
    """An engine with these adapters that counts the tokens it computes."""
    engine: Any = loaded(Engine(model, slots=slots, **OPTIONS, **options), paths)
    engine.computed = 0

    def count(rows: Any, counts: Sequence[int], logits: Any) -> None:
        engine.computed += sum(counts)

    watch(engine, count)
    return engine


def several(n: int, length: int = 40, seed: int = 0, **given: Any) -> list[Request]:
    ids = prompt(length, seed)
    name = f"{seed} {sorted(given.items())}"
    return [Request(f"{name} {i}", ids, 6, sampling=sampling(i), **given) for i in range(n)]


def each_alone(model: Any, paths: Mapping[str, Path], asked: Sequence[Request]) -> list[Any]:
    with loaded(Engine(model, slots=1, prefix_reuse=False, **OPTIONS), paths) as engine:
        return [together(engine, [request])[0] for request in asked]


@pytest.mark.parametrize("options", [{}, {"invariant": True}, {"prefix_reuse": False}], ids=str)
@pytest.mark.parametrize("length", [1, 40])
def test_the_prompt_is_computed_once(model, paths, length: int, options: Any) -> None:
    asked = several(6, length) + several(2, length, adapter="lora") + several(2, length, tenant="a")
    with counting(model, paths, 12, **options) as engine:
        found = together(engine, asked)
        # the last token of a completion is not computed
        assert engine.computed == 3 * length + len(asked) * (6 - 1)
    assert found == each_alone(model, paths, asked)
    assert found[0] == generated(model, asked[0])


@pytest.mark.parametrize("first", [33, 70])
def test_a_common_beginning_of_simultaneous_requests_is_computed_once(model, paths, first) -> None:
    """One question each under a system prompt; one of them reads it, and the others go on."""
    system = prompt(first, 5)
    ids = [system + prompt(2 + i, 50 + i) for i in range(8)]
    asked = [Request(str(i), p, 6, "lora") for i, p in enumerate(ids)]
    expected = each_alone(model, paths, asked)
    with counting(model, paths, 8) as engine:
        assert together(engine, asked) == expected
        assert engine.computed == first + sum(2 + i for i in range(8)) + 8 * 5


def test_a_system_prompt_of_500_tokens_is_computed_at_most_1_1_times(model) -> None:
    system = prompt(500, 5)
    streams, computed = [], Counter[int]()
    with Engine(model, slots=8, length=512, kv_bytes=room(model, 8 * 16)) as engine:

        def count(rows: Any, counts: Sequence[int], logits: Any) -> None:
            for row, n in zip(rows, counts, strict=True):
                computed.update(range(row.computed, row.computed + n))

        watch(engine, count)
        for i in range(8):
            streams.append(engine.submit(Request(str(i), (*system, i, i + 1, i), 5)))
        while engine.step():
            check(engine)
        assert sum(computed[at] for at in range(500)) <= 1.1 * 500
        assert sorted(stream.result().cached for stream in streams) == [0, *[500] * 7]
        again = ended(engine, Request("again", (*system, 3, 4, 3), 5))
        assert again.tokens == streams[3].result().tokens


def test_turns_of_a_conversation_that_come_together_wait_for_each_other(model, paths) -> None:
    ids = prompt(80, 4)
    asked = [Request(str(n), ids[:n], 6) for n in (35, 75, 80)]
    expected = each_alone(model, paths, asked)
    for order in permutations(range(3)):
        with counting(model, paths, 3) as engine:
            assert together(engine, [asked[i] for i in order]) == [expected[i] for i in order]
            assert engine.computed <= 80 + 3 * 5 + 5 + 40


def test_unused_prefixes_are_dropped_after_some_seconds(model, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(kv_cache, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Engine(model, slots=2, **OPTIONS) as engine:
        cache: Any = engine._runner.cache  # type: ignore[attr-defined]
        for at, i in ((100.0, 0), (120.0, 1), (125.0, 0)):
            now[0] = at
            ended(engine, Request("x", prompt(20, i), 3))
        now[0] = 151.0
        engine.step()
        assert len(cache.references) == 1
        now[0] = 156.0
        engine.step()
        assert not cache.references
        check(engine)


def test_prefixes_of_a_replaced_adapter_are_dropped(model, paths) -> None:
    with loaded(Engine(model, slots=2, **OPTIONS), {"it": paths["lora"]}) as engine:
        cache: Any = engine._runner.cache  # type: ignore[attr-defined]
        ended(engine, Request("base", prompt(20, 0), 3))
        ended(engine, Request("x", prompt(20, 1), 3, "it"))
        stream = engine.submit(Request("y", prompt(20, 2), 9, "it"))
        engine.step()
        engine.load("it", paths["dora"])
        engine.step()
        assert len(cache.references) == 3  # a request still uses the old files
        engine.run()
        engine.step()
        assert stream.result().reason == "length"
        assert len(cache.references) == 1
        check(engine)


def test_rows_with_more_in_the_cache_than_their_tokens_read_their_own(model, paths) -> None:
    asked = several(3, adapter="prompt")
    expected = each_alone(model, paths, asked)
    with counting(model, paths, 4) as engine:
        assert together(engine, asked) == expected
        assert engine.computed == 3 * (40 + 5)


def test_with_fewer_slots_the_others_start_from_what_is_there(model, paths) -> None:
    asked = several(7)
    expected = each_alone(model, paths, asked)
    with counting(model, paths, 3) as engine:
        assert together(engine, asked) == expected
        assert engine.computed == 40 + 7 * 5 + 2  # one of each paths reads the prompt's last token


def test_one_that_comes_later_starts_from_what_a_running_one_has(model, paths) -> None:
    asked = several(3)
    expected = each_alone(model, paths, asked)
    with counting(model, paths, 3) as engine:
        assert together(engine, asked, steps_between=5) == expected
        assert engine.computed == 40 + 3 * 5 + 2
    with counting(model, paths, 3) as engine:  # while the first one still reads
        assert together(engine, asked, steps_between=1) == expected
        assert engine.computed == 40 + 3 * 5


def test_if_the_one_that_reads_is_cancelled_another_one_reads(model, paths) -> None:
    asked = several(4)
    expected = each_alone(model, paths, asked)
    with counting(model, paths, 4) as engine:
        streams = [engine.submit(request) for request in asked]
        engine.step()
        engine.cancel(asked[0].id)
        engine.cancel(asked[2].id)
        while engine.step():
            check(engine)
        found = [stream.result() for stream in streams]
        assert [end.reason for end in found] == ["cancelled", "length", "cancelled", "length"]
        assert [found[i].tokens for i in (1, 3)] == [expected[i] for i in (1, 3)]
        assert [found[i].cached for i in (1, 3)] == [0, 40]
        assert engine.computed == 12 + 40 + 2 * 5


def test_a_pass_that_raises_for_one_ends_it_alone(model, paths) -> None:
    asked = several(4)
    with Engine(model, slots=4, **OPTIONS) as engine:
        streams = [engine.submit(request) for request in asked]
        with failing(engine, lambda row, n: row.request.id == asked[0].id, RuntimeError("no")):
            while engine.step():
                check(engine)
        assert [stream.result().reason for stream in streams] == ["failed"] + 3 * ["length"]
    assert [s.result().tokens for s in streams[1:]] == each_alone(model, paths, asked[1:])


def test_requests_of_one_adapter_share_its_factors(model, paths, monkeypatch) -> None:
    """In torch too, they are held once beside the zeros of the base's rows, whatever the slots."""
    monkeypatch.setattr("lorafold.engine.engine.plan_of", lambda _: None)
    asked = several(6, adapter="lora")
    expected = each_alone(model, paths, asked)
    with Engine(model, slots=6, **OPTIONS) as engine:
        engine.load("lora", paths["lora"])
        streams = [engine.submit(request) for request in asked]
        engine.step()
        products = engine._runner.deltas.slot_adapters
        assert len(products.placed) == 6
        [held] = products.places
        tensors = [t for s in products.stacks for t in s.tensors.values()]
        assert sum(t.nbytes for t in tensors) == 2 * held.nbytes
        engine.run()
        assert [stream.result().tokens for stream in streams] == expected
        assert not products.places
