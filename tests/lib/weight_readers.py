"""Modules that read the weight of another and never call it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafold as lf


class Past(nn.Module):
    """Computes with what it reads of a module, and never calls it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.at = module

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.at, Conv1D):
            return x @ self.at.weight + self.at.bias
        return F.linear(x, self.at.weight, getattr(self.at, "bias", None))


class Product(torch.autograd.Function):
    """x W^T as a kernel has it: no torch function is asked about W."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).t() @ x.flatten(0, -2)


STORAGES = {
    "linear": lambda: nn.Linear(16, 32),
    "no-bias": lambda: nn.Linear(16, 32, bias=False),
    "conv1d": lambda: Conv1D(32, 16),
    "embedding": lambda: nn.Embedding(32, 16),
}


def past(method: str, storage: str, dtype: torch.dtype = torch.float32) -> tuple[Past, Tensor]:
    torch.manual_seed(0)
    root = Past(STORAGES[storage]()).to(dtype).requires_grad_(False)
    if storage == "conv1d":
        nn.init.normal_(root.at.bias)
    return root, torch.randn(3, 5, 16, dtype=dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def gradients(adapter: lf.Adapter, y: Tensor) -> list[Tensor]:
    for p in adapter.parameters():
        p.grad = None
    y.sin().sum().backward()
    return [p.grad for p in adapter.parameters()]
