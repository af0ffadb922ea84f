"""The optimizer of an adapter: AdamW with fp32 state, the up factors at a learning rate of their own, and the schedule.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns lambda = 16 times as fast as A, for every low-rank method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorafold.core.delta import Delta
from lorafold.train.recipe import Recipe


def param_groups(parts: Iterable[tuple[str, Delta]], lr: float, lr_up: float) -> list[dict]:
    """Two groups, by the role that each delta gives its own parameters: up factors, and everything else."""
    up: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for _, delta in parts:
        for name, p in delta.named_parameters():
            if p.requires_grad:
                (up if name in delta.up_names else rest).append(p)
    groups = ({"params": rest, "lr": lr, "peak": lr}, {"params": up, "lr": lr_up, "peak": lr_up})
    return [g for g in groups if g["params"]]


def make_optimizer(groups: list[dict], recipe: Recipe) -> AdamW:
    return AdamW(groups, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)


def set_learning_rates(optimizer: AdamW, recipe: Recipe, step: int, steps: int) -> None:
    """Each group's peak rate times the schedule at `step` (from 0) of `steps`: a function of the step, so nothing to resume.

    Linear warm-up over the first `warmup` share of the steps (rounded up), then cosine or linear to zero, or constant.
    """
    warm = math.ceil(recipe.warmup * steps)
    done = (step - warm) / max(1, steps - warm)
    after = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[recipe.schedule]
    factor = (step + 1) / (warm + 1) if step < warm else after
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def optimizer_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `<parameter number>.<name>`: what a checkpoint holds."""
    return {f"{i}.{k}": v for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}


def restore_optimizer(optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state() -> dict[str, Tensor]:
    """The states of torch's generators, on CPU and on CUDA where there is one."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng.cpu": torch.get_rng_state()} | {f"rng.cuda.{i}": s for i, s in enumerate(cuda)}


def restore_rng(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(f"rng.cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)
