"""Batch invariance: a request has the same bits alone and beside others, in 16 bits too."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import lorafold as lf
from engine_cases import METHODS, check, loaded, prompt, sampling, save_adapters
from lorafold.engine import Engine, Request
from lorafold.engine.operations import ROWS, InBlocks, Operations
from lorafold.kernels.registry import DECODING, use
from lorafold.ops.decoding import STORED, SlotFactors
from lorafold.ops.elementwise import ACTIVATIONS

T = torch.Tensor
SIZES: dict[str, Any] = {"length": 128, "chunk": 24, "budget": 48}


@pytest.fixture(scope="module")
def native() -> Operations:
    if why := use(DECODING):
        pytest.skip(why)
    return Operations("cpu")


def random_of(*shape: int, dtype: torch.dtype, seed: int = 0) -> T:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# B rows of T tokens, of sizes at which blocks and vectors have ends; one function for each
# operation, of which rows and tokens it computes
B, TOKENS, D = 5, 6, 44


def low_rank(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    down, up = random_of(4, 3, D, dtype=dtype), random_of(4, 3, 37, dtype=dtype, seed=1)
    part, slots = SlotFactors(down, up, torch.full((4,), 3), 37), torch.tensor([2, 0, 2, 3, 1])
    x = random_of(B, TOKENS, D, dtype=dtype, seed=2)
    return lambda rows, tokens: of.low_rank([part], slots[rows])(x[rows, tokens])


def attend(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    q = random_of(B, 6, TOKENS, D, dtype=dtype)
    k, v = (random_of(B, 2, 40, D, dtype=dtype, seed=s) for s in (1, 2))
    seen = (
        torch.arange(40)
        <= torch.arange(TOKENS)[:, None] + torch.tensor([0, 9, 3, 30, 33])[:, None, None]
    )
    mask = torch.zeros(B, 1, TOKENS, 40, dtype=dtype).masked_fill_(~seen[:, None], float("-inf"))
    return lambda rows, tokens: of.attend(
        q[rows, :, tokens], k[rows], v[rows], mask[rows, :, tokens], 0.2
    )


def write(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    x, slots = random_of(B, 2, TOKENS, D, dtype=dtype), torch.tensor([3, 0, 4, 1, 2])
    starts = torch.tensor([0, 7, 2, 30, 11])

    def run(rows: slice, tokens: slice) -> T:
        buffer = torch.zeros(B, 2, 40, D, dtype=dtype)
        first = tokens.start or 0
        of.write(buffer, x[rows, :, tokens], slots[rows], starts[rows] + first)
        found = [
            buffer[slot, :, start : start + TOKENS]
            for slot, start in zip(slots[rows].tolist(), starts[rows].tolist(), strict=True)
        ]
        return torch.stack(found).transpose(1, 2)[:, tokens]

    return run


def rms_norm(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    x, gain = random_of(B, TOKENS, D, dtype=dtype), random_of(D, dtype=dtype, seed=1)
    return lambda rows, tokens: of.rms_norm(x[rows, tokens], gain, 1e-5)


def rotary(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    x = random_of(B, TOKENS, 3, D, dtype=dtype).transpose(1, 2)
    cos, sin = (random_of(B, 1, TOKENS, D, dtype=dtype, seed=s) for s in (1, 2))
    return lambda rows, tokens: of.rotary(
        x[rows, :, tokens], cos[rows, :, tokens], sin[rows, :, tokens]
    ).transpose(1, 2)


def gated(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    both = random_of(B, TOKENS, 2 * D, dtype=dtype)  # as a product with both matrices gives them
    known = [act for act in ACTIVATIONS if act != "gelu"]  # torch computes that one

    def run(rows: slice, tokens: slice) -> T:
        gate, up = both[rows, tokens].chunk(2, -1)
        return torch.cat([of.gated(gate, up, act) for act in known], -1)

    return run


def scale(of: Operations, dtype: torch.dtype) -> Callable[[slice, slice], T]:
    y = random_of(B, TOKENS, D, dtype=dtype)
    g, c = (random_of(B, D, dtype=torch.float32, seed=s) for s in (1, 2))
    return lambda rows, tokens: torch.cat(
        [of.scale(y[rows, tokens], g[rows], c[rows]), of.scale(y[rows, tokens], g[0], None)], -1
    )


CHECKS: dict[str, Any] = {
    f.__name__: f for f in (low_rank, attend, write, rms_norm, rotary, gated, scale)
}


def test_every_operation_says_whether_its_rows_are_independent() -> None:
    operations = {of.name for of in DECODING if of is not STORED}  # which computes nothing
    assert CHECKS.keys() == operations
    assert Operations().independent <= operations
    assert Operations("cpu").independent == operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "native"])
@pytest.mark.parametrize("name", CHECKS)
def test_rows_that_are_said_to_be_independent_are(
    name: str, kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    of = Operations() if kind == "plain" else request.getfixturevalue("native")
    if name not in of.independent:
        pytest.skip("it does not say so")
    compute = CHECKS[name](of, dtype)
    whole = compute(slice(None), slice(None))
    for b in range(B):
        assert torch.equal(compute(slice(b, b + 1), slice(None))[0], whole[b])
    for t in range(TOKENS):
        assert torch.equal(compute(slice(None), slice(t, t + 1))[:, 0], whole[:, t])
    for b, t in ((0, 0), (3, 4)):  # a pass of several tokens, and one of a single one
        assert torch.equal(compute(slice(b, B), slice(t, TOKENS))[0, 0], whole[b, t])
        assert torch.equal(compute(slice(b, b + 1), slice(t, t + 1))[0, 0], whole[b, t])


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
def test_in_bf16_a_request_has_the_bits_that_it_has_alone(
    kind: str, many: int, reuse: bool, native: Operations, tiny_model, tmp_path
) -> None:
    methods = {
        k: v for k, v in METHODS.items() if kind != "gemma" or k in ("lora", "dora", "prompt")
    }
    paths = save_adapters(tiny_model(kind), tmp_path, methods)
    model = tiny_model(kind).bfloat16()
    engine = Watched(model, slots=12, prefix_reuse=reuse, **SIZES)
    with loaded(engine, paths):
        wrong, cached = differing(engine, asked(many, paths))
    assert (wrong, bool(cached)) == ([], reuse)


class Entered(InBlocks):
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
    monkeypatch.setattr("lorafold.engine.mixed_adapters.plain_products", lambda *_: ROWS[-1])
    monkeypatch.setattr("lorafold.engine.runner.InBlocks", Entered)
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


@pytest.mark.few(1)
@pytest.mark.parametrize("invariant", [False, True])
def test_completions_of_one_prompt_have_the_bits_of_each_alone(
    invariant: bool, native: Operations, tiny_model, tmp_path
) -> None:
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
