"""AdaLoRA's budget: its schedule, where ranks go, and that a resumed run is the run."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.methods.adalora import ranks

TOTAL = 20


def setting(spec: lf.AdaLoRA) -> tuple[nn.Sequential, lf.Adapter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    adapter = lf.attach(root, spec, ["0", "2"])
    return root, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.02)


def run(
    root: nn.Module,
    adapter: lf.Adapter,
    optimizer: torch.optim.Optimizer,
    steps: range,
    size: float = 1.0,
) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, target = size * torch.randn(64, 24, generator=g), torch.randn(64, 16, generator=g)
        loss = (root(x) - target).square().mean() + adapter.spec.penalty(
            adapter.own_deltas
        )
        loss.backward()
        optimizer.step()
        adapter.spec.after_step(adapter.own_deltas, step, TOTAL)
        optimizer.zero_grad()


def test_budget_falls_along_a_cubic_between_two_flat_phases() -> None:
    spec = lf.AdaLoRA(rank=2, init_rank=6, tinit=0.1, tfinal=5)
    budgets = [spec.budget(step, TOTAL, 120, 40) for step in range(1, TOTAL + 1)]
    assert spec.phases(TOTAL) == (2, 15)
    assert budgets[:2] == [120, 120]
    assert budgets[14:] == [40] * 6
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[7] == int(80 * (7 / 13) ** 3 + 40)  # step 8 of 2..15: 7 of 13 steps are left
    with pytest.raises(lf.LorafoldError, match="leave none of the 20"):
        lf.AdaLoRA(tinit=15, tfinal=5).phases(TOTAL)


def test_the_rank_goes_where_the_gradient_is() -> None:
    spec = lf.AdaLoRA(rank=2, init_rank=6, tinit=2, tfinal=5, orth_reg=0.0)
    root, adapter, optimizer = setting(spec)
    run(root, adapter, optimizer, range(1, TOTAL + 1), size=0.0)
    assert ranks(adapter.deltas) == {"0": 0, "2": 4}  # what enters the first layer is zero
    for delta in adapter.deltas.values():
        assert not delta.E[~delta.kept].any()
        assert delta.E[delta.kept].all()


def test_a_resumed_run_is_the_run() -> None:
    spec = lf.AdaLoRA(rank=2, init_rank=6, tinit=2, tfinal=5, delta_t=3)
    root, adapter, optimizer = setting(spec)
    run(root, adapter, optimizer, range(1, 11))
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    run(root, adapter, optimizer, range(11, TOTAL + 1))

    other, fresh, again = setting(spec)
    fresh.load_state_dict(state)
    again.load_state_dict(moments)
    run(other, fresh, again, range(11, TOTAL + 1))
    end = fresh.state_dict()
    assert all(torch.equal(v, end[k]) for k, v in adapter.state_dict().items())


def test_wrong_values_are_all_named() -> None:
    told = r"rank: found 0.*; delta_t: found 0.*; dropout: found 1\.5.*; beta1 .*: found 2 and "
    with pytest.raises(lf.LorafoldError, match=told):
        lf.AdaLoRA(rank=0, init_rank=4, dropout=1.5, delta_t=0, beta1=2)


def test_the_penalty_counts_matrices_that_lost_all_their_triplets(tmp_path: Path) -> None:
    root, adapter, _ = setting(lf.AdaLoRA(rank=3, tinit=1, tfinal=1))
    for i, delta in enumerate(adapter.own_deltas.values()):
        delta.kept.fill_(i > 0)
    path = adapter.save(tmp_path / "pruned")
    adapter.detach()
    loaded = lf.load(root, path)
    first, second = loaded.own_deltas.values()
    assert first.E.numel() == 0
    eye = torch.eye(second.E.numel())
    norms = [(second.P.T @ second.P - eye).norm(), (second.Q @ second.Q.T - eye).norm()]
    found = loaded.spec.penalty(loaded.own_deltas)
    assert torch.allclose(found, 0.5 * sum(norms) / 4)
