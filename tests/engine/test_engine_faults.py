"""What is refused, cancelled, damaged or fails touches no other request."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from conftest import make_tokenizer
from engine_cases import (
    METHODS,
    check,
    ended,
    failing,
    generated,
    loaded,
    poison,
    prompt,
    save_adapters,
    status,
)
from lorafold.engine import Ended, Engine, Request, Sampling, Token
from lorafold.engine.adapter_cache import checksum
from lorafold.engine.adapters import LoadedAdapter
from lorafold.errors import LorafoldError

NAMES = ("lora", "dora", "ia3", "prompt")


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    specs = {"one": lf.LoRA(rank=2), "two": lf.LoRA(rank=3), "opaque": lf.Bottleneck(size=4)}
    specs |= {name: METHODS[name] for name in NAMES}
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), specs)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("a", (), 4), "prompt: found no tokens"),
        (Request("a", (1, 300), 4), "prompt: found token 300, expected 0 to 299"),
        (Request("a", (1, -1), 4), "prompt: found token -1"),
        (Request("a", (1, 2), 0), "max_new_tokens: found 0"),
        (Request("a", (1, 2), 31), r"found 2 \+ 31 tokens, expected at most 32"),
        (Request("a", (1,) * 40, 1), r"found 40 \+ 1 tokens"),
        (Request("running", (1, 2), 4), "id: found 'running'"),
        (Request("a", (1, 2), 4, "none"), "found 'none', expected one of the loaded adapters: one"),
        (Request("a", (1,), 4, sampling=Sampling(logit_bias={400: 1.0})), "logit_bias.*400"),
        (Request("a", (1,), 4, sampling=Sampling(stop=("x",))), "no tokenizer"),
        (Request("a", (), 0), "prompt: found no tokens.*max_new_tokens: found 0"),
        (Request("a", (1, 2, 3), 2, prompt_logprobs=21), "logprobs: found 21, expected 0 to 20"),
        (Request("a", (1, 2, 4), 2, prompt_logprobs=-1), "prompt_logprobs: found -1"),
        (Request("a", (1, 2, 5), -1, prompt_logprobs=0), "max_new_tokens: found -1"),
    ],
    ids=lambda x: x.id + str(x.prompt)[:9] + str(x.adapter) if isinstance(x, Request) else None,
)
def test_what_cannot_be_computed_is_refused_in_one_line(model, paths, request_, says) -> None:
    running = Request("running", prompt(5, 1), 8)
    expected = generated(model, running)
    with Engine(model, slots=2, length=32) as engine:
        engine.load("one", paths["one"])
        stream = engine.submit(running)
        engine.step()
        with pytest.raises(LorafoldError, match=says) as error:
            engine.submit(request_)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"request {request_.id!r}: ")
        check(engine)
        engine.run()
        assert stream.result().tokens == expected
        engine.submit(running)  # its id is free again
        engine.run()


def test_cancelling_frees_the_slot_within_a_step(model, paths) -> None:
    asked = [Request(str(i), prompt(5 + i, i), 10) for i in range(4)]
    expected = [generated(model, request) for request in asked]
    with Engine(model, slots=2, length=32) as engine:
        engine.load("one", paths["one"])
        streams = [engine.submit(request) for request in asked]
        late = engine.submit(Request("late", prompt(3, 9), 5, adapter="one"))
        engine.step()
        engine.step()
        assert engine.cancel("0")
        assert engine.cancel("late")  # it waits
        engine.step()
        check(engine)
        assert not engine.cancel("0")
        engine.run()
        ended = [stream.result() for stream in streams]
    assert ended[0].reason == "cancelled"
    assert ended[0].tokens == expected[0][: len(ended[0].tokens)]
    assert [e.tokens for e in ended[1:]] == expected[1:]
    assert late.result() == Ended("late", "cancelled")


def test_ends_stops_and_texts(model) -> None:
    tokenizer = make_tokenizer()
    whole = generated(model, Request("", prompt(6, 2), 12))
    text = tokenizer.decode(whole, skip_special_tokens=True)
    end = whole[7]
    stop = text[4:6]
    asked = {
        "length": Request("length", prompt(6, 2), 12),
        "end": Request("end", prompt(6, 2), 12, ends=frozenset([end, 1])),
        "stop": Request("stop", prompt(6, 2), 12, sampling=Sampling(stop=(stop,))),
    }
    with Engine(model, tokenizer, slots=3, length=32) as engine:
        streams = {name: engine.submit(request) for name, request in asked.items()}
        engine.run()
    for name, stream in streams.items():
        events = list(stream)
        assert [type(event) for event in events] == [Token] * (len(events) - 1) + [Ended]
        last = events[-1]
        assert isinstance(last, Ended)
        assert last.reason == name
        assert last.tokens == tuple(e.token for e in events[:-1])  # type: ignore[union-attr]
        assert last.text.startswith("".join(e.text for e in events[:-1]))  # type: ignore[union-attr]
    assert streams["length"].result().text == text
    assert streams["length"].result().tokens == whole
    assert streams["end"].result().tokens == whole[: whole.index(end)]
    assert streams["stop"].result().text == text.split(stop)[0]


@pytest.mark.parametrize("bad", [["3"], ["0", "5"], [str(i) for i in range(6)]], ids=len)
def test_a_pass_that_raises_fails_its_suspects_only(model, paths, bad) -> None:
    """The fault is in the requests, or (all six) in the machine; then new requests run again."""
    names = [None, "one", "two", "opaque", "one", None]
    asked = [Request(str(i), prompt(3 + 5 * i, i), 8, adapter=names[i]) for i in range(6)]
    few = {name: paths[name] for name in ("one", "two", "opaque")}
    with loaded(Engine(model, slots=6, length=64, chunk=8, budget=24), few) as engine:

        def all_tokens() -> dict[str, Ended]:
            streams = [engine.submit(request) for request in asked]
            engine.run()
            check(engine)
            return {stream.request.id: stream.result() for stream in streams}

        sound, error = all_tokens(), MemoryError("no room for the pass")
        with failing(engine, lambda row, n: row.request.id in bad and n == 3, error):
            found = all_tokens()
        for id, end in found.items():
            if id in bad:
                assert (end.reason, end.message) == ("failed", "MemoryError: no room for the pass")
                assert end.tokens == sound[id].tokens[:3]
            else:
                assert end == sound[id]
        assert all_tokens() == sound


def test_a_fault_of_the_machine_does_not_lose_those_that_wait_or_read(model, monkeypatch) -> None:
    """The cache is emptied, and the row that was reading its prompt reads it again."""
    asked = [Request("0", prompt(3, 0), 8), Request("1", prompt(4, 1), 8)]
    long = Request("long", prompt(40, 2), 8)
    expected = generated(model, long)
    with Engine(model, slots=3, length=64, chunk=8, budget=8) as engine:
        cache: Any = engine._runner.cache  # type: ignore[attr-defined]
        emptied: list[int] = []
        monkeypatch.setattr(cache, "clear", lambda: emptied.append(1) or type(cache).clear(cache))
        error = RuntimeError("the device is gone")
        with failing(engine, lambda row, n: row.request.id != "long" and n == 2, error):
            streams = [engine.submit(request) for request in [*asked, long]]
            engine.run()
        assert [s.result().reason for s in streams] == ["failed", "failed", "length"]
        assert streams[2].result().tokens == expected
        assert emptied
        check(engine)


def test_what_a_sampler_raises_fails_its_request_alone(model, monkeypatch) -> None:
    asked = [Request(str(i), prompt(4, i), 6, sampling=Sampling(temperature=1.0)) for i in range(3)]
    with Engine(model, slots=3, length=32) as engine:
        streams = [engine.submit(request) for request in asked]
        row = engine._rows["1"]
        monkeypatch.setattr(row.sampler, "allowed", lambda tokens: 1 / 0)
        engine.run()
        check(engine)
    assert [s.result().reason for s in streams] == ["length", "failed", "length"]
    assert "division" in streams[1].result().message


def test_a_thread_serves_and_closing_ends_everything(model, paths) -> None:
    asked = [Request(str(i), prompt(4 + i, i), 12, adapter=[None, "one"][i % 2]) for i in range(12)]
    with Engine(model, slots=1, length=32) as engine:
        engine.load("one", paths["one"])
        expected = [ended(engine, request).tokens for request in asked]
    engine = Engine(model, slots=3, length=32)
    engine.load("one", paths["one"])
    engine.start()
    found: dict[int, Any] = {}

    def client(i: int) -> None:
        found[i] = engine.submit(asked[i]).result().tokens

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(12)] == expected
    open_ = [engine.submit(Request(f"long{i}", prompt(4, i), 28)) for i in range(6)]
    engine.close()
    engine.close()
    assert {stream.result().reason for stream in open_} <= {"cancelled", "length"}
    with pytest.raises(LorafoldError, match="closed"):
        engine.submit(asked[0])


def test_many_cancelled_requests_leave_nothing(model) -> None:
    with Engine(model, slots=4, length=32) as engine:
        engine.start()
        streams = [engine.submit(Request(str(i), prompt(6, i), 20)) for i in range(60)]
        for stream in streams:
            engine.cancel(stream.request.id)
        assert all(stream.result().reason in ("cancelled", "length") for stream in streams)
        assert not engine._rows


@pytest.mark.parametrize(
    ("options", "says"),
    [({"slots": 0}, "slots: found 0"), ({"length": 1}, "length: found 1"),
     ({"length": 513}, "length: found 513, expected at most 512")],
)  # fmt: skip
def test_options_out_of_range_are_refused(model, options, says) -> None:
    with pytest.raises(LorafoldError, match=says):
        Engine(model, **options)


def held_of(engine: Engine, name: str) -> LoadedAdapter:
    held = engine.adapters.entry(name).loaded
    assert held is not None
    return held


def tensors_of(held: LoadedAdapter) -> list[torch.Tensor]:
    return list(held.tensors)


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Change one bit of a tensor in memory."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    content[bit // 8 % len(content)] ^= 1 << bit % 8


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
    named = {name: paths[name] for name in NAMES}
    with loaded(Engine(model, slots=2, length=32, prefix_reuse=False), named) as engine:
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
    with Engine(model, slots=2, length=32) as engine:
        engine.load("lora", paths["lora"])
        flip(tensors_of(held_of(engine, "lora"))[0], 5)
        engine.start()
        deadline = time.monotonic() + 30
        while not engine.adapters.damaged and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (engine.adapters.damaged, status(engine.adapters, "lora")) == (1, "cold")
        assert engine.submit(Request("1", prompt(5, 0), 4, "lora")).result().reason == "length"


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
    named = {"it": where, "dora": paths["dora"]}
    with loaded(Engine(model, slots=1, length=32), named) as engine:
        poison(held_of(engine, "it"))
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
        assert "in quarantine, because 3 requests had NaN" in waiting.result().message
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
