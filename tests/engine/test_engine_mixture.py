"""Any mixture of adapters in one batch: each request has the tokens that it has alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold as lf
from engine_cases import (
    METHODS,
    alone,
    check,
    evict,
    expected,
    generated,
    is_finite,
    loaded,
    poison,
    prompt,
    same_bits,
    sampling,
    save_adapters,
    together,
)
from lorafold.engine import Engine, Request, Sampling
from lorafold.errors import LorafoldError


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory) -> dict[str, Path]:
    return save_adapters(model, tmp_path_factory.mktemp("adapters"), METHODS)


def mixture(n: int, *, new: int = 8) -> list[Request]:
    names = [None, *METHODS]
    return [
        Request(str(i), prompt(3 + 7 * i % 31, i), new + i % 5, adapter=names[i % len(names)])
        for i in range(n)
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("invariant", [False, True], ids=["free", "invariant"])
def test_eight_methods_in_one_batch_are_each_as_generate_has_it(model, paths, invariant) -> None:
    asked = mixture(12)
    tokens = [expected(model, request, paths) for request in asked]
    assert len(set(tokens[:9])) == 9  # the adapters do something
    engine = Engine(model, slots=6, length=64, chunk=8, budget=16, invariant=invariant)
    with loaded(engine, paths):
        assert together(engine, asked, steps_between=1) == tokens
    assert not any("deltas" in vars(m).get("_modules", {}) for m in model.modules())


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["gpt2", "gemma", "qwen2"])
def test_other_models_mix_them_too(kind, tiny_model, tmp_path) -> None:
    model = tiny_model(kind)
    specs = {name: METHODS[name] for name in ("lora", "dora", "prompt", "houlsby", "ia3")}
    paths, names = save_adapters(model, tmp_path, specs), [None, *specs]
    asked = [Request(str(i), prompt(4 + i, i), 6, adapter=names[i % 6]) for i in range(9)]
    tokens = [alone(model, request, paths, length=64, slots=1) for request in asked]
    assert [expected(model, request, paths) for request in asked[:6]] == tokens[:6]
    with loaded(Engine(model, slots=8, length=64), paths) as engine:
        assert together(engine, asked) == tokens


def test_adapters_that_are_active_belong_to_the_base(model, paths) -> None:
    active = lf.load(model, paths["loha"], name="below")
    asked = [Request("1", prompt(6, 1), 8, adapter="lora"), Request("2", prompt(6, 1), 8)]
    over, base = (expected(model, request, paths) for request in asked)
    with Engine(model, slots=3, length=64) as engine:
        engine.load("lora", paths["lora"])
        assert together(engine, asked) == [over, base]
    assert over != base
    active.detach()


def test_what_is_attached_can_be_adopted_beside_what_is_loaded(model, paths, tmp_path) -> None:
    """Each under its own name, several as one stack, and beside adapters from files."""
    stacks = {name: (name,) for name in METHODS} | {
        "low": ("vera", "lora"),
        "both": ("lora", "dora"),
        "mixed": ("prompt", "lora"),
    }
    handles = [lf.load(model, paths[name], name=name) for name in METHODS]
    asked = [Request(str(i), prompt(3 + i, i), 8, name) for i, name in enumerate(stacks)]
    tokens = []
    for request in asked:
        with lf.only(model, *stacks[str(request.adapter)]):
            tokens.append(generated(model, request))
    asked += [Request("file", prompt(5, 5), 8, "file"), Request("base", prompt(5, 5), 8)]
    with lf.only(model, "lora"):
        tokens.append(generated(model, asked[-2]))
    with lf.only(model):
        tokens.append(generated(model, asked[-1]))
        with Engine(model, slots=6, length=64, chunk=8, adapter_bytes=10**5) as engine:
            for name, on_model in stacks.items():
                engine.adopt(name, on_model)
            engine.load("file", paths["lora"])
            assert together(engine, asked, steps_between=1) == tokens
            assert not evict(engine.adapters, "lora")
            engine.unload("lora")
            with pytest.raises(LorafoldError, match="found 'lora'"):
                engine.submit(Request("again", prompt(3, 1), 4, "lora"))
            with pytest.raises(LorafoldError, match="no adapter other"):
                engine.adopt("other", ["other"])
    assert generated(model, asked[0]) != tokens[0]  # all are active again
    with (
        Engine(model, slots=2, length=64) as engine,
        pytest.raises(LorafoldError, match="adapter lora: already active"),
    ):
        engine.adopt("lora", ["lora"])
    for handle in reversed(handles):
        handle.detach()
    assert not any("deltas" in vars(m).get("_modules", {}) for m in model.modules())


def test_stacks_of_many_ranks_and_targets(model, tmp_path) -> None:
    specs = {
        "one": lf.LoRA(rank=1),
        "wide": lf.LoRA(rank=9, rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 12}),
        "ada": lf.AdaLoRA(rank=3),
        "rs": lf.LoRA(rank=5, rslora=True),
    }
    paths = save_adapters(model, tmp_path, specs)
    paths |= save_adapters(model, tmp_path, {"qv": lf.LoRA(rank=6)}, targets=["q_proj", "v_proj"])
    rows = {"targets": ["k_proj"], "tokens": [5, 300, 301]}
    paths |= save_adapters(model, tmp_path, {"tok": lf.LoRA(rank=2)}, **rows)
    names = [*paths, None]
    asked = [Request(str(i), prompt(5 + i, i), 7, adapter=names[i % 7]) for i in range(11)]
    asked.append(Request("new", (*prompt(5, 3), 300, 301), 7, adapter="tok"))
    tokens = [expected(model, request, paths) for request in asked]
    with loaded(Engine(model, slots=7, length=64), paths) as engine:
        assert together(engine, asked, steps_between=1) == tokens


@pytest.mark.slow
@pytest.mark.parametrize(("n", "seed"), [(60, 0), (500, 1), (500, 2)])
def test_random_requests_are_each_as_alone(model, paths, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    names, asked = [None, *METHODS], []
    for i in range(n):
        ids, new, name = prompt(1 + draw(45), i), 1 + draw(14), names[draw(len(names))]
        asked.append(Request(str(i), ids, new, name, sampling(draw(99))))
    with loaded(Engine(model, slots=1, length=64), paths) as engine:
        tokens = [together(engine, [request])[0] for request in asked]
    with loaded(Engine(model, slots=7, length=64, chunk=12, budget=24), paths) as engine:
        streams = []
        for request in asked:
            streams.append(engine.submit(request))
            for _ in range(draw(3)):
                engine.step()
        engine.run()
        check(engine)
    found = [stream.result().tokens for stream in streams]
    assert [i for i in range(n) if found[i] != tokens[i]] == []


@pytest.mark.few(1)
@pytest.mark.parametrize("adapter", [None, "lora", "dora", "prompt", "houlsby", "vera"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_invariant_logits_are_the_same_bits(model, paths, tiny_model, adapter, kind) -> None:
    model = model if kind == "fp32" else tiny_model("llama").bfloat16()
    request = Request("it", prompt(21, 5), 10, adapter=adapter)
    with loaded(Engine(model, slots=6, length=64, chunk=8, invariant=True), paths) as engine:
        same_bits(engine, request, mixture(14))


@pytest.mark.parametrize("method", ["lora", "dora", "houlsby", "ia3"])
def test_nan_in_one_adapter_leaves_the_others_bits(model, paths, method) -> None:
    """The poisoned rows run in both engines' batches at the same places; in one they are sound."""
    asked = [
        Request(str(i), prompt(4 + 3 * i, i), 9, adapter=name, sampling=sampling(i))
        for i, name in enumerate([None, method, "loha", "lokr", None, method])
    ]

    def tokens(poisoned: bool) -> dict[str, Any]:
        with Engine(model, slots=6, length=64, chunk=16) as engine:
            for name in ("loha", "lokr", method):
                engine.load(name, paths[name])
            held = engine.adapters.entry(method).loaded
            assert held is not None
            if poisoned:
                poison(held)
            streams = [engine.submit(request) for request in asked]
            engine.run()
            check(engine)
            runner, bad = engine._runner, engine.adapters.entry(method).generation
            assert is_finite(runner.cache, range(runner.cache._end))  # type: ignore[attr-defined]
            kept = [prefix.key[0] for prefix in runner.prefixes.prefixes]  # type: ignore[attr-defined]
            alone = poisoned or held.separate
            assert (len(kept), bad in kept) == ((4, False) if alone else (6, True))
            again = engine.submit(Request("after", prompt(9, 9), 6))
            engine.run()
            return {s.request.id: s.result() for s in [*streams, again]}

    sound, poisoned = tokens(False), tokens(True)
    for request in asked:
        if request.adapter == method:
            assert poisoned[request.id].reason == "failed"
            assert "NaN" in poisoned[request.id].message
        else:
            assert poisoned[request.id] == sound[request.id]
    assert poisoned["after"] == sound["after"]


def test_sampled_with_adapters_as_alone(model, paths) -> None:
    asked = [
        Request(str(i), prompt(5, i), 10, name, Sampling(temperature=1.0, seed=7))
        for i, name in enumerate(paths)
    ]
    tokens = [alone(model, request, paths, slots=1, length=64) for request in asked]
    with loaded(Engine(model, slots=8, length=64), paths) as engine:
        assert together(engine, asked) == tokens
