"""Completions of one prompt read it once, whoever of them ends first, and nobody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine_cases import METHODS, check, generated, prompt, sampling, save_adapters, together
from lorafold.engine import Engine, Request

OPTIONS: dict[str, Any] = {"length": 96, "chunk": 12, "budget": 24}


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    kinds = {name: METHODS[name] for name in ("lora", "dora", "prompt")}
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), kinds)


class Counting(Engine):
    """An engine that counts the tokens that it computes."""

    def count(self, paths: Mapping[str, Path]) -> None:
        for name, path in paths.items():
            self.load(name, path)
        self.computed, forward = 0, self._runner.forward

        def spied(rows: Any, counts: Sequence[int]) -> Any:
            self.computed += sum(counts)
            return forward(rows, counts)

        self._runner.forward = spied  # type: ignore[method-assign]


def several(n: int, length: int = 40, seed: int = 0, **given: Any) -> list[Request]:
    ids = prompt(length, seed)
    name = f"{seed} {sorted(given.items())}"
    return [Request(f"{name} {i}", ids, 6, sampling=sampling(i), **given) for i in range(n)]


def alone(model: Any, paths: Mapping[str, Path], asked: Sequence[Request]) -> list[Any]:
    with Engine(model, slots=1, prefix_reuse=False, **OPTIONS) as engine:
        for name, path in paths.items():
            engine.load(name, path)
        return [together(engine, [request])[0] for request in asked]


@pytest.mark.parametrize("options", [{}, {"invariant": True}, {"prefix_reuse": False}], ids=str)
@pytest.mark.parametrize("length", [1, 40])
def test_the_prompt_is_computed_once(model, paths, length: int, options: Any) -> None:
    asked = several(6, length) + several(2, length, adapter="lora") + several(2, length, tenant="a")
    with Counting(model, slots=12, **OPTIONS, **options) as engine:
        engine.count(paths)
        found = together(engine, asked)
        # the last token of a completion is not computed
        assert engine.computed == 3 * length + len(asked) * (6 - 1)
    assert found == alone(model, paths, asked)
    assert found[0] == generated(model, asked[0])


def test_rows_with_more_in_the_cache_than_their_tokens_read_their_own(model, paths) -> None:
    asked = several(3, adapter="prompt")
    expected = alone(model, paths, asked)
    with Counting(model, slots=4, **OPTIONS) as engine:
        engine.count(paths)
        assert together(engine, asked) == expected
        assert engine.computed == 3 * (40 + 5)


def test_with_fewer_slots_the_others_start_from_what_is_there(model, paths) -> None:
    asked = several(7)
    expected = alone(model, paths, asked)
    with Counting(model, slots=3, **OPTIONS) as engine:
        engine.count(paths)
        assert together(engine, asked) == expected
        assert engine.computed == 40 + 7 * 5 + 2  # one of each three reads the prompt's last token


def test_one_that_comes_later_starts_from_what_a_running_one_has(model, paths) -> None:
    asked = several(3)
    expected = alone(model, paths, asked)
    with Counting(model, slots=3, **OPTIONS) as engine:
        engine.count(paths)
        assert together(engine, asked, steps_between=5) == expected
        assert engine.computed == 40 + 3 * 5 + 2
    with Counting(model, slots=3, **OPTIONS) as engine:  # while the first one still reads
        engine.count(paths)
        assert together(engine, asked, steps_between=1) == expected
        assert engine.computed == 40 + 3 * 5


def test_if_the_one_that_reads_is_cancelled_another_one_reads(model, paths) -> None:
    asked = several(4)
    expected = alone(model, paths, asked)
    with Counting(model, slots=4, **OPTIONS) as engine:
        engine.count(paths)
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
        forward = engine._runner.forward

        def faulty(rows: Any, counts: Any) -> Any:
            if any(row.request.id == asked[0].id for row in rows):
                raise RuntimeError("no")
            return forward(rows, counts)

        engine._runner.forward = faulty  # type: ignore[method-assign]
        streams = [engine.submit(request) for request in asked]
        while engine.step():
            check(engine)
        assert [stream.result().reason for stream in streams] == ["failed"] + 3 * ["length"]
    assert [s.result().tokens for s in streams[1:]] == alone(model, paths, asked[1:])


def test_requests_of_one_adapter_share_its_factors(model, paths) -> None:
    """They are held once beside the zeros of the base's rows, whatever the number of slots."""
    asked = several(6, adapter="lora")
    expected = alone(model, paths, asked)
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
