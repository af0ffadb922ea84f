"""Combinators: a mixture, a batch of many tenants and a bank, each against the deltas alone."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import lorafold as lf
import noise
from lorafold.core.attach import Selection, attach_delta
from lorafold.core.combine import Bank, Mix, PerExample, Slots, Stack
from lorafold.core.delta import Delta, LowRank, Opaque
from lorafold.layers import layer_class, layer_of
from lorafold.layers.dense import Linear
from lorafold.methods.bottleneck import BottleneckDelta
from lorafold.methods.common.biases_and_modules import BiasDelta
from lorafold.methods.ia3 import IA3Delta

OUT, IN, BATCH, TIME = 12, 8, 6, 5
X = torch.randn(BATCH, TIME, IN, generator=torch.Generator().manual_seed(7))
IDS = torch.randint(0, IN, (BATCH, TIME), generator=torch.Generator().manual_seed(7))


def moved(delta: Delta, seed: int) -> Delta:
    return noise.moved(delta, 0.3, seed)


def low_rank(module: nn.Module, rank: int, seed: int) -> LowRank:
    return moved(lf.LoRA(rank=rank, dropout=0.0).build(layer_of(module)), seed)  # type: ignore[return-value]


def base(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias)


def under(module: nn.Module, delta: Delta) -> nn.Module:
    """A twin of the module with a delta laid over it."""
    root = nn.Sequential(copy.deepcopy(module))
    selection = Selection()
    selection.names = ("it",)
    attach_delta(root[0], layer_class(root[0]), "it", delta, selection)
    return root


def alone(module: nn.Module, deltas: Sequence[Delta], x: torch.Tensor = X) -> list[torch.Tensor]:
    """What the module computes without a delta, and under each of them."""
    return [module(x), *(under(module, copy.deepcopy(delta))(x) for delta in deltas)]


def many(module: nn.Module) -> list[Delta]:
    """Four methods of four kinds: low rank, a bias, a stack, one with no weight-space form."""
    return [
        low_rank(module, 2, 1),
        moved(BiasDelta(OUT, torch.device("cpu")), 2),
        Stack([low_rank(module, 3, 3), moved(BiasDelta(OUT, torch.device("cpu")), 4)]),
        moved(BottleneckDelta(OUT, 4, "gelu", torch.device("cpu")), 5),
    ]


def test_a_mixture_is_its_formula_and_folds() -> None:
    module, gates = base(), torch.tensor([0.7, -0.4, 1.3])
    deltas = many(module)[:3]
    mix = Mix(deltas, gates)
    y, *each = alone(module, deltas)
    expected = y + sum(g * (own - y) for g, own in zip(gates, each, strict=True))
    torch.testing.assert_close(under(module, mix)(X), expected)
    w, b = mix.fold(module.weight, module.bias)
    torch.testing.assert_close(nn.functional.linear(X, w, b), expected)


def test_a_mixture_over_no_bias_folds_into_one() -> None:
    module = base(bias=False)
    mix = Mix(many(module)[:2], torch.tensor([0.5, 2.0]))
    w, b = mix.fold(module.weight, None)
    torch.testing.assert_close(nn.functional.linear(X, w, b), under(module, mix)(X))
    assert Mix([low_rank(module, 2, 1)], torch.ones(1)).fold(module.weight, None)[1] is None


@pytest.mark.usefixtures("each_arithmetic")
def test_a_mixture_of_low_rank_deltas_is_one_of_their_summed_rank() -> None:
    module, gates = base(), torch.tensor([0.7, -0.4])
    deltas = [low_rank(module, 2, 1), low_rank(module, 3, 2)]
    y, *each = alone(module, deltas)
    expected = y + sum(g * (own - y) for g, own in zip(gates, each, strict=True))
    torch.testing.assert_close(under(module, Mix(deltas, gates))(X), expected)
    narrow, twins = copy.deepcopy(module).bfloat16(), copy.deepcopy(deltas)
    for d in twins:
        d.B.data.mul_(1e-3)  # type: ignore[union-attr, operator]
    w, _ = Mix(twins, gates).fold(narrow.weight.double(), None)
    change = X.bfloat16().double() @ (w - narrow.weight.double()).T
    bare = nn.functional.linear(X.bfloat16().double(), narrow.weight.double(), narrow.bias.double())
    kept = under(narrow, Mix(twins, gates))(X.bfloat16()).double() - bare
    once = (bare + change).bfloat16().double() - bare
    # no worse than rounding the exact sum, but for one unit in each of the two places where the
    # exact path rounds too
    assert (kept - change).norm() <= 3 * (once - change).norm()


def test_gates_and_deltas_of_a_mixture_learn() -> None:
    module = base()
    mix = Mix(many(module), torch.full((4,), 0.25))
    under(module, mix)(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mix.parameters())
    shared = nn.Parameter(torch.ones(1))
    one, other = (Mix([low_rank(module, 2, 1)], shared) for _ in range(2))
    assert one.gates is other.gates


def test_an_opaque_member_makes_a_mixture_unmergeable() -> None:
    module = base()
    with pytest.raises(lf.NotMergeable, match="BottleneckDelta"):
        Mix(many(module), torch.ones(4)).fold(module.weight, module.bias)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4, 1], [4, 4, 4, 0, 0, 0], [3, 2, 1, 0, 1, 2]])
def test_each_row_is_computed_as_under_its_delta_alone(slots: list[int]) -> None:
    module = base()
    deltas = many(module)
    each = alone(module, deltas)
    y = under(module, PerExample(deltas, Slots(torch.tensor(slots))))(X)
    torch.testing.assert_close(y, torch.stack([each[slot][b] for b, slot in enumerate(slots)]))


def scaling(seed: int) -> IA3Delta:
    """A delta that changes the input of its layer."""
    return moved(IA3Delta(IN, True, torch.device("cpu")), seed)  # type: ignore[return-value]


def test_deltas_that_change_the_input_are_combined_as_they_compute_alone() -> None:
    module = base()
    deltas: list[Delta] = [scaling(1), low_rank(module, 2, 2), scaling(3)]
    slots = [0, 1, 2, 3, 3, 1]
    each = alone(module, deltas)
    assert (each[1] - each[0]).norm() > 0.1
    y = under(module, PerExample(deltas, Slots(torch.tensor(slots))))(X)
    torch.testing.assert_close(y, torch.stack([each[slot][b] for b, slot in enumerate(slots)]))
    gates = torch.tensor([0.7, -0.4, 1.3])
    mixed = each[0] + sum(g * (a - each[0]) for g, a in zip(gates, each[1:], strict=True))
    mix = Mix(deltas, gates)
    torch.testing.assert_close(under(module, mix)(X), mixed)
    w, b = mix.fold(module.weight, module.bias)
    torch.testing.assert_close(nn.functional.linear(X, w, b), mixed)


def test_the_base_runs_once_under_rows() -> None:
    module = base()
    calls = []

    class Counted(Linear):
        def __call__(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
            calls.append(len(x))
            return super().__call__(x, onto)

    PerExample([low_rank(module, 2, i) for i in range(3)], Slots(torch.tensor([0, 1, 2, 3, 1, 2])))(
        Counted(module), X
    )
    assert calls == [BATCH]


def test_rows_learn_each_from_its_own() -> None:
    module = base()
    slots = Slots(torch.tensor([0, 2, 2, 0, 2, 0]))
    rows = PerExample([low_rank(module, 2, 1), low_rank(module, 2, 2)], slots)
    under(module, rows)(X).square().sum().backward()
    first, second = rows.deltas
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None and p.grad.any() for p in second.parameters())


@pytest.mark.parametrize(
    ("module", "x"),
    [(base(), X), (base(bias=False), X), (base(), X[:, 0]), (nn.Embedding(IN, OUT), IDS)],
    ids=["linear", "no-bias", "no-time", "embedding"],
)
@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 3, 1], [2, 2, 2, 2, 0, 0]])
def test_a_bank_is_each_row_alone(module: nn.Module, x: torch.Tensor, slots: list[int]) -> None:
    deltas = [low_rank(module, rank, rank) for rank in (1, 4, 2)]
    each = alone(module, deltas, x)
    bank = Bank(deltas, Slots(torch.tensor(slots)))
    torch.testing.assert_close(
        under(module, bank)(x), torch.stack([each[slot][b] for b, slot in enumerate(slots)])
    )
    assert bank.up.shape == (4, OUT, 4)
    assert bank.down.shape == (4, 4, IN)


@pytest.mark.parametrize("combinator", [Bank, PerExample])
def test_one_compiled_frame_serves_every_assignment(combinator: type[Delta]) -> None:
    torch._dynamo.reset()
    module = base()
    slots = Slots(torch.zeros(BATCH, dtype=torch.long))
    root = under(module, combinator([low_rank(module, rank, rank) for rank in (1, 4, 2)], slots))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(root, backend=counter, fullgraph=True)
    for seed in range(12):
        slots.at = torch.randint(0, 4, (BATCH,), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(X), root(X))
    assert counter.frame_count == 1


def test_slots_stay_shared_in_a_copy_of_the_model() -> None:
    module, slots = base(), Slots(torch.zeros(BATCH, dtype=torch.long))
    combined = PerExample([low_rank(module, 2, 1)], slots), Bank([low_rank(module, 2, 2)], slots)
    both = nn.ModuleList([under(module, delta) for delta in combined])
    twin = copy.deepcopy(both)
    twin[0][0].deltas["it"].slots.at = torch.ones(BATCH, dtype=torch.long)
    assert twin[0][0].deltas["it"].slots is twin[1][0].deltas["it"].slots
    assert not torch.equal(twin[1](X), both[1](X))
    torch.testing.assert_close(both[0](X), module(X))


def test_parts_up_factors_and_penalties() -> None:
    module = base()
    deltas = many(module)
    stack = Stack(deltas)
    kinds = [type(p).__name__ for p in stack.parts()]
    assert kinds == ["LoRADelta", "BiasDelta", "LoRADelta", "BiasDelta", "BottleneckDelta"]
    mix, rows = Mix(deltas, torch.ones(4)), PerExample(deltas, Slots(torch.zeros(1)))
    assert list(mix.parts()) == [mix]
    assert list(rows.parts()) == [rows]
    assert mix.up_names == rows.up_names == ("deltas.0.B", "deltas.2.deltas.0.B", "deltas.3.up")
    assert set(mix.up_names) < {name for name, _ in mix.named_parameters()}
    assert issubclass(PerExample, Opaque)
    assert issubclass(Bank, Opaque)
