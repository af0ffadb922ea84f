"""Models to fuse, adapted, and a step of them that can be repeated."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

import lorafold as lf
from lorafold.data.batches import collate
from noise import moved
from sequence_cases import build, loss_and_gradients, rows


def model_of(name: str, **changes: Any) -> tf.PreTrainedModel:
    """A random model whose gains and biases are random too."""
    model = build(name, **changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return model


def adapted(model: tf.PreTrainedModel, spec: Any = None, **options: Any) -> lf.Adapter:
    adapter = lf.attach(model, lf.LoRA(rank=4, dropout=0.3) if spec is None else spec, **options)
    return moved(adapter, 0.05)


def together() -> list[dict[str, Tensor]]:
    return [collate(rows(), packed=True, pad_id=0)]


def seeded_step(
    model: tf.PreTrainedModel, batches: list[dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    return loss_and_gradients(model, batches)


def assert_same_step(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """1e-5 of the norm of the losses, and of that of all gradients."""
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert found[1].keys() == expected[1].keys() != set()
    whole = torch.cat([g.flatten() for g in expected[1].values()]).norm()
    assert whole > 0
    for name, g in expected[1].items():
        assert (found[1][name] - g).norm() <= 1e-5 * whole, name
