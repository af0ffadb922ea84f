"""Adapters whose memory changed leave it, and those whose requests fail too often are refused."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_cases import METHODS, check, prompt, save_adapters, status
from lorafold.engine import Ended, Engine, Request
from lorafold.engine.adapter_cache import checksum
from lorafold.engine.adapters import LoadedAdapter
from lorafold.errors import LorafoldError

NAMES = ("lora", "dora", "ia3", "prompt")


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    specs = {name: METHODS[name] for name in NAMES}
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), specs)


def held_of(engine: Engine, name: str) -> LoadedAdapter:
    held = engine.adapters.entry(name).loaded
    assert held is not None
    return held


def tensors_of(held: LoadedAdapter) -> list[torch.Tensor]:
    found = [t for f in held.factors.values() for t in (f.down, f.up)]
    return found + [t for d in held.deltas.values() for t in (*d.parameters(), *d.buffers())]


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Change one bit of a tensor in memory."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    content[bit // 8 % len(content)] ^= 1 << bit % 8


def ended(engine: Engine, request: Request) -> Ended:
    stream = engine.submit(request)
    engine.run()
    check(engine)
    return stream.result()


@pytest.mark.parametrize("name", NAMES)
def test_any_flipped_bit_changes_the_checksum(model, paths, name) -> None:
    with Engine(model, slots=2, length=32) as engine:
        engine.load(name, paths[name])
        held = held_of(engine, name)
        before = checksum(held)
        for i, tensor in enumerate(tensors_of(held)):
            flip(tensor, 977 * i)
            assert checksum(held) != before
            flip(tensor, 977 * i)
            assert checksum(held) == before


def test_a_damaged_adapter_leaves_memory_and_is_read_again(model, paths) -> None:
    asked = {name: Request(name, prompt(6, 1), 6, name) for name in NAMES}
    with Engine(model, slots=2, length=32, prefix_reuse=False) as engine:
        for name in NAMES:
            engine.load(name, paths[name])
        expected = {name: ended(engine, request) for name, request in asked.items()}
        for _ in NAMES:
            engine.adapters.check_memory()
        assert engine.adapters.damaged == 0
        for damaged in NAMES:
            flip(tensors_of(held_of(engine, damaged))[-1], 300)
            for _ in NAMES:  # one at a time
                engine.adapters.check_memory()
            states = {name: status(engine.adapters, name) for name in NAMES}
            assert states == {n: "cold" if n == damaged else "resident" for n in NAMES}
            assert ended(engine, asked[damaged]) == expected[damaged]
        assert engine.adapters.damaged == len(NAMES)


def test_an_idle_engine_looks_by_itself(model, paths) -> None:
    engine = Engine(model, slots=2, length=32)
    try:
        engine.load("lora", paths["lora"])
        flip(tensors_of(held_of(engine, "lora"))[0], 5)
        engine.start()
        deadline = time.monotonic() + 30
        while not engine.adapters.damaged and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (engine.adapters.damaged, status(engine.adapters, "lora")) == (1, "cold")
        assert engine.submit(Request("1", prompt(5, 0), 4, "lora")).result().reason == "length"
    finally:
        engine.close()


def test_what_a_request_uses_is_not_looked_at(model, paths) -> None:
    with Engine(model, slots=2, length=32) as engine:
        engine.load("lora", paths["lora"])
        stream = engine.submit(Request("1", prompt(5, 0), 8, "lora"))
        engine.step()
        flip(tensors_of(held_of(engine, "lora"))[0], 0)
        engine.adapters.check_memory()
        assert engine.adapters.damaged == 0
        check(engine)
        engine.run()
        assert stream.result().reason == "length"
        engine.adapters.check_memory()
        assert engine.adapters.damaged == 1


def test_an_adapter_whose_requests_fail_is_refused_after_the_third(model, paths, tmp_path) -> None:
    where = tmp_path / "it"
    shutil.copytree(paths["lora"], where)
    with Engine(model, slots=1, length=32) as engine:
        engine.load("it", where)
        engine.load("dora", paths["dora"])
        for factors in held_of(engine, "it").factors.values():
            factors.up.fill_(float("nan"))
        for i in range(2):
            assert "NaN" in ended(engine, Request(str(i), prompt(5, i), 4, "it")).message
            assert status(engine.adapters, "it") == "resident"
        third = engine.submit(Request("3", prompt(5, 3), 4, "it"))
        waiting = engine.submit(Request("4", prompt(5, 4), 4, "it"))
        other = engine.submit(Request("5", prompt(5, 5), 4, "dora"))
        engine.run()
        check(engine)
        assert "NaN" in third.result().message
        assert waiting.result().reason == "failed"
        assert "in quarantine, since the logits of 3 of its requests" in waiting.result().message
        assert other.result().reason == "length"
        assert status(engine.adapters, "it") == "quarantined"
        with pytest.raises(LorafoldError, match="request '6': adapter 'it': in quara") as error:
            engine.submit(Request("6", prompt(5, 6), 4, "it"))
        assert "\n" not in str(error.value)
        engine.load("it", where)  # the same files
        assert status(engine.adapters, "it") == "quarantined"
        shutil.rmtree(where)
        shutil.copytree(paths["ia3"], where)
        engine.load("it", where)
        assert status(engine.adapters, "it") == "resident"
        assert ended(engine, Request("7", prompt(5, 7), 4, "it")).reason == "length"


def test_failures_of_the_base_and_of_passes_count_for_no_adapter(model, paths, monkeypatch) -> None:
    with Engine(model, slots=2, length=32, strikes=1) as engine:
        engine.load("lora", paths["lora"])
        forward = engine._runner.forward
        monkeypatch.setattr(engine._runner, "forward", lambda rows, counts: 1 / 0)
        assert "division" in ended(engine, Request("1", prompt(5, 0), 4, "lora")).message
        monkeypatch.setattr(engine._runner, "forward", lambda *a: forward(*a) * float("nan"))
        assert "NaN" in ended(engine, Request("2", prompt(5, 0), 4)).message
        assert status(engine.adapters, "lora") == "resident"
        assert "NaN" in ended(engine, Request("3", prompt(5, 0), 4, "lora")).message
        assert status(engine.adapters, "lora") == "quarantined"
