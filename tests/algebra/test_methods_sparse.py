"""Sparse fine-tuning: what LT-SFT and FISH choose, against the definitions."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import lorafold as lf

N = 12
BATCHES = torch.randint(3, 250, (N, 2, 7), generator=torch.Generator().manual_seed(4))


def losses_of(model: nn.Module):
    def losses(n: int, rows: int | None = None) -> Iterator[Tensor]:
        for i in range(n):
            yield model(input_ids=BATCHES[i % N], labels=BATCHES[i % N]).loss

    return losses


def overlap(adapter: lf.Adapter, expected: dict[str, Tensor]) -> tuple[int, int]:
    """How many of the expected entries were chosen, and how many there are."""
    found = {path: {*delta.at.tolist()} for path, delta in adapter.deltas.items()}
    same = sum(len({*at.tolist()} & found[path]) for path, at in expected.items())
    return same, sum(len(at) for at in expected.values())


def top(scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """The definition of a choice over the whole model: everything above the k-th largest score."""
    every = torch.cat([s.flatten() for s in scores.values()])
    threshold = every.sort(descending=True).values[round(density * len(every)) - 1]
    return {path: (s.flatten() >= threshold).nonzero()[:, 0] for path, s in scores.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fish_keeps_the_largest_squared_gradients_of_the_model(kind: str, tiny_model) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    spec = lf.FishMask(density=0.02, samples=5)
    adapter = lf.attach(model, spec)
    spec.prepare(adapter.own_deltas, losses_of(model))
    scores = {path: torch.zeros(delta.shape) for path, delta in adapter.deltas.items()}
    for loss in losses_of(plain)(5):
        plain.zero_grad()
        loss.backward()
        for path, score in scores.items():
            grad = plain.get_submodule(path).weight.grad
            score += (grad.T if kind == "gpt2" else grad).square()
    same, total = overlap(adapter, top(scores, 0.02))
    assert total == sum(p.numel() for p in adapter.parameters())
    assert total == round(0.02 * sum(s.numel() for s in scores.values()))
    assert same >= 0.995 * total  # two entries that tie to rounding may change places


def test_lt_sft_keeps_what_moved_most_and_rewinds(tiny_model) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    spec = lf.LTSFT(density=0.02, dense_steps=4, dense_lr=1e-3)
    adapter = lf.attach(model, spec)
    with torch.no_grad():
        before = model(BATCHES[0]).logits
    spec.prepare(adapter.own_deltas, losses_of(model))
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]).logits, before)
    start = {path: plain.get_submodule(path).weight.detach().clone() for path in adapter.sites}
    optimizer = AdamW(
        [plain.get_submodule(path).weight for path in start], lr=1e-3, weight_decay=0.0
    )
    for loss in losses_of(plain)(4):
        plain.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {p: (plain.get_submodule(p).weight.detach() - w).abs() for p, w in start.items()}
    same, total = overlap(adapter, top(moved, 0.02))
    # AdamW's first steps are almost +-lr for every entry, so many movements are nearly equal
    assert same >= 0.95 * total


@pytest.mark.parametrize(
    "spec", [lf.LTSFT(density=0.01, dense_steps=2), lf.FishMask(density=0.01, samples=2)]
)
def test_after_the_choice_only_k_numbers_train_and_merge(spec, tiny_model) -> None:
    model = tiny_model("llama")
    adapter = lf.attach(model, spec, bias="none", modules_to_save=["norm"])
    spec.prepare(adapter.own_deltas, losses_of(model))
    assert all(p.grad is None for p in model.parameters())
    weights = sum(d.shape[0] * d.shape[1] for d in adapter.own_deltas.values())
    assert sum(d.values.numel() for d in adapter.own_deltas.values()) == round(0.01 * weights)
    optimizer = AdamW(adapter.parameters(), lr=1e-2)
    for loss in losses_of(model)(3):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = [d.values for d in adapter.own_deltas.values()]
    moments = sum(optimizer.state[p]["exp_avg"].numel() for p in values if p in optimizer.state)
    assert moments <= round(0.01 * weights)
    old = {path: model.get_submodule(path).weight.detach().clone() for path in adapter.own_deltas}
    at = {path: d.at for path, d in adapter.own_deltas.items()}
    with torch.no_grad():
        y = model(BATCHES[0]).logits
        adapter.merge()
        torch.testing.assert_close(model(BATCHES[0]).logits, y, rtol=1e-4, atol=1e-6)
    for path, w in old.items():
        changed = (model.get_submodule(path).weight != w).flatten().nonzero()[:, 0]
        assert set(changed.tolist()) <= set(at[path].tolist())


def test_without_a_choice_the_entries_are_random_ones(tiny_model) -> None:
    deltas = lf.attach(tiny_model("llama"), lf.FishMask(density=0.05)).deltas.values()
    for delta in deltas:
        size = delta.shape[0] * delta.shape[1]
        assert len(delta.at) == round(0.05 * size)
        assert 0 <= delta.at[0] <= delta.at[-1] < size
        assert (delta.at.diff() > 0).all()


def test_options_out_of_range() -> None:
    wrong = r"LTSFT: dense_steps: found 0.*density: found 0.*dense_lr: found 0"
    with pytest.raises(lf.LorafoldError, match=wrong):
        lf.LTSFT(density=0, dense_steps=0, dense_lr=0)
    with pytest.raises(lf.LorafoldError, match=r"FishMask: samples: found 0.*density: found 1.5"):
        lf.FishMask(density=1.5, samples=0)
