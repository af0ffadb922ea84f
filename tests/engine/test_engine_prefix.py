"""A request that starts from what a free slot holds has the tokens that it has without, and nobody
starts from what another tenant, adapter or generation computed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_cases import METHODS, check, prompt, sampling, save_adapters, together
from lorafold.engine import Ended, Engine, Request
from lorafold.engine.kv_cache import CachedPrefixes, common

OPTIONS: dict[str, Any] = {"length": 96, "chunk": 12, "budget": 24}


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), METHODS)


def ended(engine: Engine, request: Request) -> Ended:
    stream = engine.submit(request)
    engine.run()
    check(engine)
    return stream.result()


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


def run_conversations(model: Any, paths: dict[str, Path], n: int, seed: int) -> None:
    asked = conversations(n, seed)
    with Engine(model, slots=1, prefix_reuse=False, **OPTIONS) as engine:
        for name, path in paths.items():
            engine.load(name, path)
        expected = [together(engine, [request])[0] for request in asked]
    with Engine(model, slots=5, **OPTIONS) as engine:
        for name, path in paths.items():
            engine.load(name, path)
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
        most = max((common(e, request.prompt) for e in earlier), default=0)
        assert end.cached <= (0 if request.adapter == "prompt" else most)
        earlier.append(request.prompt + end.tokens)
    assert sum(end.cached > 0 for end in found) > n / 4


@pytest.mark.slow
def test_tokens_are_the_same_with_reuse_and_without(model, paths) -> None:
    run_conversations(model, paths, 120, 0)


@pytest.mark.slow
def test_tokens_of_many_conversations_are_the_same_with_reuse(model, paths) -> None:
    for seed in range(1, 9):
        run_conversations(model, paths, 250, seed)


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
    with Engine(model, slots=8, **OPTIONS) as engine:
        engine.load("it", where)
        engine.load("dora", paths["dora"])
        engine.load("soft", paths["prompt"])
        asked = [
            Request("1", ids, 5),
            Request("2", ids, 5, tenant="a"),
            Request("3", ids, 5, "it"),
            Request("4", ids, 5, "it", tenant="a"),
            Request("5", ids, 5, "dora"),
            Request("6", ids, 5, "soft"),
            Request("7", ids, 5, "soft"),  # has virtual tokens in the cache
        ]
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
