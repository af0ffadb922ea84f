"""Batch invariance: a request has the same bits alone and beside others, in 16 bits too."""

import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafold as lf
from engine_cases import METHODS, check, loaded, prompt, sampling, save_adapters
from lorafold.engine import Engine, Request
from lorafold.engine.operations import NUM_ROWS, BlockMatmuls, Operations
from lorafold.kernels.registry import DECODING, enable

T = torch.Tensor
SIZES: dict[str, Any] = {"length": 128, "chunk": 24, "budget": 48}


@pytest.fixture(scope="module")
def native() -> Operations:
    if why := enable(DECODING):
        pytest.skip(why)
    return Operations("cpu")


class Watched(Engine):
    """An engine that keeps the logits of every choice."""

    def watch(self) -> None:
        self.seen: dict[str, list[T]] = defaultdict(list)  # (V,) for each token
        choose = self._choose

        def spied(rows: Any, logits_BV: T) -> None:
            for b, row in rows:
                self.seen[row.request.id].append(logits_BV[b].clone())
            choose(rows, logits_BV)

        self._choose = spied  # type: ignore[method-assign]


def asked(n: int, names: Iterable[str]) -> list[Request]:
    """Prompts of which many begin alike, under adapters of these methods and none."""
    rng, begins = random.Random(0), [prompt(n, 90 + n) for n in (0, 9, 20, 33)]
    every = [None, *METHODS]
    made = [
        Request(
            str(i), rng.choice(begins) + prompt(rng.randint(1, 40), i), rng.randint(2, 10),
            every[i % len(every)], sampling(i),
        )
        for i in range(n)
    ]  # fmt: skip
    return [r for r in made if r.adapter is None or r.adapter in names]


def differing(engine: Watched, requests: list[Request]) -> tuple[list[str], int]:
    """Requests with other logits beside others than alone, and the tokens that were cached."""
    engine.watch()
    rng, waiting, company = random.Random(1), list(requests), {}
    followed: list[Request] = []
    while waiting or engine.step():
        for _ in range(rng.randint(0, 3)):
            if waiting:
                request = waiting.pop()
                company[request.id] = engine.submit(request)
        for stream in list(company.values()):
            own, end = stream.request, stream.ended
            if end and end.tokens and len(company) < 2 * len(requests) and own not in followed:
                followed.append(own)
                more = own.prompt + end.tokens + prompt(3, len(company))
                next_one = Request(f"{own.id}+", more, 4, own.adapter, own.sampling)
                if len(more) < 110:
                    company[next_one.id] = engine.submit(next_one)
        check(engine)
    ended = {id: stream.result() for id, stream in company.items()}
    assert not [end for end in ended.values() if end.reason == "failed"]
    among, wrong = dict(engine.seen), []
    for id, stream in company.items():
        engine.seen.clear()
        engine._runner.rebuild()  # nothing is left of any other
        again = engine.submit(stream.request)
        engine.run()
        alone = again.result()
        pairs = zip(engine.seen[id], among[id], strict=True)
        if alone != ended[id] or not all(torch.equal(x, y) for x, y in pairs):
            wrong.append(f"{id} under {stream.request.adapter}")
    return wrong, sum(end.cached for end in ended.values())


@pytest.mark.few(1)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "afresh"])
@pytest.mark.parametrize(
    ("kind", "many"),
    [
        ("llama", 27),
        pytest.param("gemma", 16, marks=pytest.mark.slow),
        pytest.param("llama-wide", 500, marks=pytest.mark.slow),
    ],
)
def test_in_bf16_a_request_is_as_alone(kind, many, reuse, native, tiny_model, tmp_path) -> None:
    methods = {
        k: v for k, v in METHODS.items() if kind != "gemma" or k in ("lora", "dora", "prompt")
    }
    paths = save_adapters(tiny_model(kind), tmp_path, methods)
    model = tiny_model(kind).bfloat16()
    engine = Watched(model, slots=12, prefix_reuse=reuse, **SIZES)
    with loaded(engine, paths):
        wrong, cached = differing(engine, asked(many, paths))
    assert (wrong, bool(cached)) == ([], reuse)


class Entered(BlockMatmuls):
    """Counts the passes that it was in."""

    passes = 0

    def __enter__(self) -> Any:
        type(self).passes += 1
        return super().__enter__()


@pytest.mark.parametrize(
    ("storage", "names"), [("nf4", ("lora", "dora")), ("int8", ()), ("int8", ("lora",))]
)
def test_over_quantized_weights_too_where_no_number_of_rows_is_steady(
    storage: str, names: tuple[str, ...], native: Operations, tiny_model_dir, tiny_model,
    tmp_path, monkeypatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lorafold.engine.mixed_adapters.min_matmul_rows", lambda *_: NUM_ROWS[-1])
    monkeypatch.setattr("lorafold.engine.runner.BlockMatmuls", Entered)
    monkeypatch.setattr("lorafold.engine.engine.plan_of", lambda _: None)  # as if memory were short
    if names:  # adapters of the fp32 model, whose fingerprints fp32 tables rounded to bf16 have not
        bf16 = True, "as asked"
        monkeypatch.setattr("lorafold.models.quantizations.native_bf16", lambda _: bf16)
    methods = {name: METHODS[name] for name in names}
    paths = save_adapters(tiny_model("llama"), tmp_path, methods)
    model = lf.load_model(str(tiny_model_dir("llama")), storage=storage)
    with loaded(Watched(model, slots=6, **SIZES), paths) as engine:
        for name, p in model.named_parameters():
            if "norm" in name:  # int8 keeps large inputs in 16 bits, and chooses by all rows
                p.data.mul_(20)
        assert differing(engine, asked(20, paths))[0] == []
    assert Entered.passes > 0


def test_adapters_that_are_active_on_a_model_in_int8_belong_to_the_base(tiny_model_dir) -> None:
    model = lf.load_model(str(tiny_model_dir("llama")), storage="int8")
    torch.manual_seed(0)
    for p in lf.attach(model, lf.LoRA(rank=4), targets=["q_proj", "down_proj"]).parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with Engine(model, slots=2, length=64):
            found = model(ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < 0.1


def test_int8_modules_of_other_adapters_run_without_them(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(  # all its linear modules can be stored in int8
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path / "base")
    paths = save_adapters(plain, tmp_path, {n: METHODS[n] for n in ("lora", "lokr", "ia3")})
    model = lf.load_model(str(tmp_path / "base"), storage="int8")
    monkeypatch.setattr("lorafold.engine.engine.plan_of", lambda _: None)
    with loaded(Engine(model, slots=2, length=64), paths) as engine:
        ended = []
        for name in ("ia3", "lora", "lokr", "ia3"):
            stream = engine.submit(Request(name, (5, 6, 7), 4, name))
            engine.run()
            ended.append(stream.result())
    assert [end.message for end in ended] == [""] * 4
    assert ended[0] == ended[3]


@pytest.mark.few(1)
@pytest.mark.parametrize("invariant", [False, True])
def test_completions_of_one_prompt_are_as_alone(invariant, native, tiny_model, tmp_path) -> None:
    names = (None, "lora", "prompt")
    paths = save_adapters(tiny_model("llama"), tmp_path, {n: METHODS[n] for n in names if n})
    requests = [
        Request(f"{name} {i}", prompt(50, 7), 3 + i, name, sampling(i))
        for i in range(3)
        for name in names
    ]
    model = tiny_model("llama").bfloat16()
    with loaded(Watched(model, slots=7, invariant=invariant, **SIZES), paths) as engine:
        wrong, cached = differing(engine, requests)
        assert wrong == []
        assert cached >= 50 * 2
