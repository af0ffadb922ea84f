"""The linear probe: a classifier's head and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import lorafold as lf
from method_cases import classifier

IDS = torch.randint(3, 250, (6, 7), generator=torch.Generator().manual_seed(4))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_trains_the_head_over_features_that_stay(kind: str) -> None:
    model = classifier(kind)
    with torch.no_grad():
        bare = model(IDS).logits
    adapter = lf.attach(model, lf.LinearProbe())
    assert list(adapter.sites) == ["score"]
    assert sum(p.numel() for p in adapter.parameters()) == 3 * 32
    assert torch.equal(model(IDS).logits.detach(), bare)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=LABELS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    features = {}
    model.score.register_forward_hook(lambda m, args, y: features.update(h=args[0]))
    with torch.no_grad():
        y = model(input_ids=IDS).logits
        head = adapter.deltas["score"].copy.weight
        torch.testing.assert_close(y, features["h"][:, -1] @ head.T)
        with lf.only(model):
            assert torch.equal(model(IDS).logits, bare)
        adapter.merge()
        torch.testing.assert_close(model(IDS).logits, y)
    assert cross_entropy(y, LABELS) < losses[0]


def test_a_model_without_a_head_has_none_to_train() -> None:
    with pytest.raises(lf.LorafoldError, match="'head': LlamaModel has no modules of this preset"):
        lf.attach(classifier("llama").model, lf.LinearProbe())
