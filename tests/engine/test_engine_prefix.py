"""Prefix reuse changes no token, and nobody starts from what others computed."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
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
    prompt,
    sampling,
    save_adapters,
    together,
    watch,
)
from lorafold.engine import Engine, Request
from lorafold.engine.kv_cache import CachedPrefixes, common_length

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
        cache: Any = engine._runner.cache  # type: ignore[attr-defined]
        assert not any(buffer.any() for buffer in (*cache.keys.values(), *cache.values.values()))


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
        next(iter(held.factors.values())).up.fill_(float("nan"))
        other = Request("2", prompt(9, 3), 20, "lora")
        assert ended(engine, other).reason == "failed"
        assert len(engine._runner.prefixes.slots) == 1  # type: ignore[attr-defined]
        assert ended(engine, Request("3", prompt(9, 3), 3)).reason == "length"


def test_a_slot_is_taken_by_age_where_no_prompt_begins_the_same(model) -> None:
    with Engine(model, slots=3, **OPTIONS) as engine:
        for i in range(3):
            ended(engine, Request("x", prompt(20, i), 3))
        assert ended(engine, Request("x", prompt(20, 0), 3)).cached == 19  # the latest now
        assert ended(engine, Request("x", prompt(20, 7), 3)).cached == 0  # takes the place of 1
        cached = [ended(engine, Request("x", prompt(20, i), 3)).cached for i in (0, 2, 7, 1)]
        assert cached == [19, 19, 19, 0]


def test_running_rows_and_kept_slots_change_places(model) -> None:
    """A row that starts in a high slot moves down, and what was kept there moves up unharmed."""
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


def test_the_longest_beginning_is_found_and_the_last_token_is_computed() -> None:
    kept, key = CachedPrefixes(), (1, "tenant")
    kept.add(2, key, (1, 2, 3))
    kept.add(0, key, (1, 2, 3, 4, 5))
    kept.add(1, (2, "tenant"), (1, 2, 3, 4, 5, 6, 7))
    assert kept.find(key, (1, 2, 3, 4, 9)) == (0, 4)
    assert kept.find(key, (1, 2, 3)) == (2, 2)
    assert kept.find(key, (9, 1)) == (-1, 0)
    assert kept.find(key, (1,)) == (-1, 0)
    assert kept.find((1, "other"), (1, 2, 3, 4)) == (-1, 0)


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


def test_requests_of_one_adapter_share_its_factors(model, paths) -> None:
    """They are held once beside the zeros of the base's rows, whatever the number of slots."""
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
