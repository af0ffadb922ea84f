"""Dropped places: what they follow from, their probability, and one draw for all readers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafold as lf
from lorafold.core.active_adapters import (
    DropoutSite,
    RandomSource,
    expert_token_names,
    seeded_dropout,
    token_names,
)
from lorafold.core.attach import selection_of
from lorafold.ops.dropout import (
    EMPTY,
    MASKED,
    Dropped,
    drop_elements,
    dropout,
    keep_scale,
    key_of,
    philox,
    shared_dropout,
    zero_dropped,
)
from lorafold.ops.operators import plain_implementations
from noise import moved

SHARES = [0.0, 0.001, 0.05, 0.5, 0.9]
N = 1 << 20
pytestmark = pytest.mark.usefixtures("each_form")


def drawn(x: Tensor, p: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return drop_elements(x, p)[1]


def mask(n: int, p: float, seed: int) -> Tensor:
    """(n,) bool, True where dropped."""
    return torch.zeros(n, dtype=torch.bool).index_fill_(
        0, drawn(torch.empty(n), p, seed).long(), True
    )


def within(found: float, expected: float, variance: float, sigmas: float = 5) -> bool:
    """Five sigma: once in 1.7 million seeds."""
    return abs(found - expected) <= sigmas * math.sqrt(variance)


@pytest.mark.few(17)
@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 9), (64, 0), (40, 50)])
def test_places_are_ascending_and_inside(shape: tuple[int, ...], p: float) -> None:
    for seed in range(20):
        where = drawn(torch.empty(shape), p, seed)
        assert where.dtype is torch.int32
        assert (where.diff() > 0).all()
        assert ((where >= 0) & (where < math.prod(shape))).all()


@pytest.mark.parametrize("p", SHARES)
def test_share_dropped_is_binomial(p: float) -> None:
    found = mask(N, p, 1)
    assert within(found.sum().item(), N * p, N * p * (1 - p))
    for half in found.chunk(2):  # no end has more of them than the other
        assert within(half.sum().item(), N * p / 2, N * p * (1 - p) / 2)


@pytest.mark.parametrize("p", [p for p in SHARES if p])
def test_every_place_is_dropped_as_often_as_any_other(p: float) -> None:
    rows, n = 4000, 130  # the first place and the last one of a row among them
    found = drawn(torch.empty(rows, n), p, 5).long() % n
    counts = torch.bincount(found, minlength=n)
    assert all(within(count, rows * p, rows * p * (1 - p)) for count in counts.tolist())


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_places_are_independent(p: float) -> None:
    drop = mask(N, p, 2).double() - p
    for lag in (1, 2, 3, 4, 8, 16, 64, 576):
        correlation = (drop[lag:] * drop[:-lag]).mean().item() / (p * (1 - p))
        assert within(correlation, 0, 1 / N)


@pytest.mark.parametrize("p", [p for p in SHARES if p])
def test_gaps_are_geometric(p: float) -> None:
    gaps = drawn(torch.empty(N), p, 3).diff()
    m = len(gaps)
    for k in (1, 2, 3, 5, 10, 20, 100, 1000):
        one, longer = p * (1 - p) ** (k - 1), (1 - p) ** k
        for found, share in ((gaps == k, one), (gaps > k, longer)):
            assert m * share < 20 or within(
                found.sum().item(), m * share, m * share * (1 - share), 6
            )


def test_elements_of_a_call_are_independent() -> None:
    """Chi-square over the 256 patterns of eight elements of a call, of rows, sites and steps."""
    rows, n, p = 1024, 1024, 0.5

    def at(key: int, number: int) -> Tensor:
        return of_site(torch.empty(rows, n), p, DropoutSite(key, torch.arange(rows), number))

    within_calls = at(1, 2).view(-1, 8)
    over_rows = at(1, 2).t().reshape(-1, 8)
    over_sites = torch.stack([at(1, number) for number in range(8)], -1).view(-1, 8)
    over_keys = torch.stack([at(key_of(7, step), 2) for step in range(8)], -1).view(-1, 8)
    for patterns in (within_calls, over_rows, over_sites, over_keys):
        counts = torch.bincount((patterns * 2 ** torch.arange(8)).sum(1), minlength=256)
        mean = len(patterns) / 256
        chi_square = ((counts - mean) ** 2 / mean).sum().item()
        assert within(chi_square, 255, 2 * 255)


def test_nothing_is_drawn_where_nothing_can_be_dropped() -> None:
    before = torch.get_rng_state()
    for x, p in ((torch.empty(100), 0.0), (torch.empty(3, 0), 0.5)):
        assert drop_elements(x, p)[1].numel() == 0
    assert torch.equal(torch.get_rng_state(), before)


def of_site(x: Tensor, p: float, site: DropoutSite) -> Tensor:
    """A boolean mask in x's shape, True where dropped."""
    return zero_dropped(torch.ones(x.shape), drop_elements(x, p, site)[1]) == 0


# Random123's known answers: counter, key, words
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, words: str) -> None:
    at, under, expected = (
        tuple(int(word, 16) for word in text.split()) for text in (counter, key, words)
    )
    number = under[1] << 32 | under[0]
    assert philox(at, number) == expected
    tensors = tuple(torch.tensor([word]) for word in at)
    assert tuple(int(word) for word in philox(tensors, number)) == expected


def test_each_half_of_the_words_decides_on_an_element() -> None:
    """In each form: of the first call of a row, at the counter and key of the first answer."""
    words = [int(word, 16) for word in ANSWERS[0][2].split()]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    site = DropoutSite(0, torch.zeros(1).long(), 0)
    for number, half in enumerate(halves):
        for limit in (half, half + 1):
            found = drop_elements(torch.empty(1, 8), limit / 65536, site)[1]
            assert (number in found.tolist()) is (half < limit)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.99999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (2, 5, 128), (70, 576), (9, 1537)], ids=str)
def test_all_forms_draw_the_same(shape: tuple[int, ...], p: float, each_form: str) -> None:
    x, rows = torch.empty(shape), math.prod(shape[:-1])
    generator = torch.Generator().manual_seed(11)
    names = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    site = DropoutSite(2**62 + 12345, names, 2**32 - 7)
    found = drop_elements(x, p, site)[1]
    with plain_implementations():
        assert torch.equal(found, drop_elements(x, p, site)[1])
    assert found.dtype is torch.int32
    mask: Tensor = MASKED(x, p, names, site.key, site.number)[1]  # as on an accelerator
    assert torch.equal(mask.flatten().nonzero()[:, 0], found)


def test_a_row_keeps_its_own_elements_wherever_it_is() -> None:
    lengths, n, p = (5, 1, 9), 576, 0.3
    alone = [
        of_site(
            torch.empty(m, n), p,
            DropoutSite(4, token_names(torch.tensor([row]), torch.arange(m)), 6),
        )
        for row, m in enumerate(lengths)
    ]
    order = (2, 0, 1)
    names = torch.cat([token_names(torch.tensor([i]), torch.arange(lengths[i])) for i in order])
    packed = of_site(torch.empty(1, sum(lengths), n), p, DropoutSite(4, names, 6))[0]
    for i, part in zip(order, packed.split([lengths[i] for i in order]), strict=True):
        assert torch.equal(part, alone[i])
    padded = of_site(
        torch.empty(3, 9, n), p,
        DropoutSite(4, token_names(torch.arange(3)[:, None], torch.arange(9)), 6),
    )
    for row, own in zip(padded, alone, strict=True):
        assert torch.equal(row[: len(own)], own)


@pytest.mark.parametrize("change", ["seed", "step", "row", "branch", "slot", "position", "site"])
def test_another_counter_draws_others(change: str) -> None:
    def mask(changed: bool) -> Tensor:
        by = {name: changed and name == change for name in ("seed", "step", "site", "slot")}
        row, branch, position = (int(changed and name == change)
                                 for name in ("row", "branch", "position"))  # fmt: skip
        names = token_names(torch.tensor([row]), torch.arange(64) + position, branch)
        names = expert_token_names(names, torch.arange(64) * 2 + by["slot"], 2)
        key = key_of(3 + by["seed"], 5 + by["step"])
        return of_site(torch.empty(64, 256), 0.5, DropoutSite(key, names, 8 + by["site"]))

    assert within((mask(True) != mask(False)).sum().item(), 64 * 128, 64 * 64)


def test_a_step_of_a_model_drops_what_its_names_say() -> None:
    """With gradient checkpointing too, and without reading the random state."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    adapter = moved(lf.attach(model, lf.LoRA(rank=4, dropout=0.5), ["0", "1"]), 1.0)
    x, names = torch.randn(6, 16), token_names(torch.tensor([3]), torch.arange(6))
    before = torch.get_rng_state()

    def step(rows: slice, key: int, checkpointed: bool = False) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        with seeded_dropout(selection_of(model), RandomSource(key, names[rows])):
            y = checkpoint(model, x[rows], use_reentrant=False) if checkpointed else model(x[rows])
            y.square().sum().backward()
        return y.detach(), [p.grad.clone() for p in adapter.parameters()]

    whole, gradients = step(slice(0, 6), 1)
    again, replayed = step(slice(0, 6), 1, checkpointed=True)
    assert torch.equal(whole, again)
    assert all(map(torch.equal, gradients, replayed))
    for rows in (slice(0, 2), slice(2, 6), slice(5, 6)):
        torch.testing.assert_close(step(rows, 1)[0], whole[rows], rtol=1e-5, atol=1e-3)
    assert not torch.allclose(step(slice(0, 6), 2)[0], whole)
    assert torch.equal(torch.get_rng_state(), before)
    model(x)  # nobody says which tokens these are
    assert not torch.equal(torch.get_rng_state(), before)


def test_follows_the_default_generator() -> None:
    x = torch.empty(1000, dtype=torch.bfloat16)
    torch.manual_seed(3)
    first, second = drop_elements(x, 0.5)[1], drop_elements(x, 0.5)[1]
    torch.manual_seed(3)
    assert torch.equal(drop_elements(x, 0.5)[1], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("form", ["dropout", "shared"])
def test_checkpoint_replays_the_places(form: str) -> None:
    def loss(x: Tensor) -> Tensor:
        if form == "dropout":
            return dropout(x, 0.5).square().sum()
        # x is the same tensor when it is replayed
        return (x * shared_dropout(x, 0.5, 0).x).sum() + (x * shared_dropout(x, 0.5, 1).x).sum()

    def gradient(checkpointed: bool) -> Tensor:
        x = torch.linspace(-1, 1, 512).requires_grad_()
        torch.manual_seed(6)
        y = checkpoint(loss, x, use_reentrant=False) if checkpointed else loss(x)
        torch.rand(3)  # whatever else is drawn before the backward
        return torch.autograd.grad(y, x)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_elements_are_zero_or_scaled(dtype: torch.dtype) -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.manual_seed(1)
    y = dropout(x, 0.25)
    torch.manual_seed(1)
    places = drop_elements(x, 0.25)[1].long()
    kept = torch.ones(2000, dtype=dtype).index_fill_(0, places, 0).view(40, 50)
    assert y.dtype is dtype
    assert torch.equal(y, x * kept * (1 / 0.75))


def test_the_gradient_has_the_same_places_and_the_input_is_not_kept() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * keep_scale(0.25))
    assert all(t.numel() < x.numel() / 2 for t in kept)


@pytest.mark.parametrize("form", ["places", "mask"])
def test_emptied_copies_and_empty_does_not(form: str) -> None:
    x = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(7))
    where = drawn(x, 0.3, 8)
    expected = x.flatten().clone()
    expected[where.long()] = 0
    if form == "mask":
        where = (expected == 0).view(x.shape)
    before = x.clone()
    # places count in x's order, whatever its layout
    for given in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(zero_dropped(given, where).flatten(), expected)
    assert torch.equal(x, before)
    rows = x.flatten(0, 1)
    EMPTY(rows, where)
    assert torch.equal(x.flatten(), expected)


def test_compiled_code_takes_a_mask() -> None:
    torch._dynamo.reset()
    x = torch.ones(1 << 16, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return dropout(x, 0.3)

    torch.manual_seed(9)
    y = step(x)
    assert within((y == 0).sum().item(), 0.3 * len(x), 0.21 * len(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_refuses_what_is_no_probability(p: float) -> None:
    x = torch.empty(3)
    calls = (drop_elements, x, p), (dropout, x, p), (shared_dropout, x, p, 0), (keep_scale, p)
    for call, *given in calls:
        with pytest.raises(ValueError, match="expected 0 or more and below 1"):
            call(*given)


def same(a: Dropped, b: Dropped) -> bool:
    return a.x is b.x and a.where is b.where


def test_readers_of_a_tensor_share_a_draw() -> None:
    x = torch.randn(50, 20, requires_grad=True)
    torch.manual_seed(0)
    q, k, v = (shared_dropout(x, 0.5, reader) for reader in (1, 2, 3))
    assert same(q, k)
    assert same(q, v)
    assert torch.equal(q.x, zero_dropped(x.detach(), q.where))
    assert not q.x.requires_grad
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(drop_elements(x, 0.5)[1], q.where)
    assert torch.equal(torch.get_rng_state(), after)  # that was the one draw there was


def test_a_reader_never_gets_the_same_places_twice() -> None:
    x = torch.randn(50, 20)
    first, other = shared_dropout(x, 0.5, 1), shared_dropout(x, 0.5, 2)
    again = shared_dropout(x, 0.5, 1)
    assert same(first, other)
    assert not torch.equal(again.where, first.where)
    assert same(shared_dropout(x, 0.5, 2), again)


@pytest.mark.parametrize("change", ["value", "probability", "tensor"])
def test_another_input_gets_another_draw(change: str) -> None:
    x = torch.randn(50, 20)
    first = shared_dropout(x, 0.5, 1)
    if change == "value":
        x += 1
    given = x.clone() if change == "tensor" else x
    found = shared_dropout(given, 0.4 if change == "probability" else 0.5, 2)
    assert not torch.equal(found.where, first.where)
    assert torch.equal(found.x, zero_dropped(x, found.where))


def test_segments_that_are_replayed_apart_draw_apart() -> None:
    """As the cross-attentions of a decoder's blocks do, which all read one encoder's output."""

    def of(reader: int) -> Callable[[Tensor], Tensor]:
        return lambda x: reader * (x * shared_dropout(x, 0.5, reader).x).sum()

    def gradient(checkpointed: bool) -> Tensor:
        x = torch.linspace(-1, 1, 512).requires_grad_()
        torch.manual_seed(6)
        parts = [
            checkpoint(of(n), x, use_reentrant=False) if checkpointed else of(n)(x.view_as(x))
            for n in (1, 2, 3)
        ]
        return torch.autograd.grad(torch.stack(parts).sum(), x)[0]

    assert torch.equal(gradient(True), gradient(False))
    x = torch.randn(50, 20)
    first = shared_dropout(x, 0.5, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        second, third = shared_dropout(x, 0.5, 2), shared_dropout(x, 0.5, 3)
    assert same(second, third)
    assert not same(first, second)


def test_inference_tensors_are_drawn_for_anew() -> None:
    """They do not tell whether they were changed."""
    with torch.inference_mode():
        x = torch.randn(50, 20)
        first, second = shared_dropout(x, 0.5, 1), shared_dropout(x, 0.5, 2)
    assert not torch.equal(first.where, second.where)


def test_layers_that_read_an_input_drop_the_same_of_it() -> None:
    torch.manual_seed(0)
    q, k = nn.Linear(16, 8), nn.Linear(16, 8)
    k.load_state_dict(q.state_dict())
    model = nn.ModuleDict({"q": q, "k": k})
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.5), ["q", "k"])
    for delta in adapter.deltas.values():
        moved(delta)
    adapter.deltas["k"].load_state_dict(adapter.deltas["q"].state_dict())
    x = torch.randn(5, 16)
    first: Any = model["q"](x)
    assert torch.equal(model["k"](x), first)
    assert not torch.equal(model["q"](x), first)
    assert torch.equal(model.eval()["q"](x), model["k"](x))
