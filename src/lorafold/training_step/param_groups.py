"""Parameter groups, the learning rate schedule, and optimizer state in checkpoints.

Up factors B have their own learning rate, as in LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafold.core.delta import Delta
from lorafold.errors import LorafoldError, differing_keys, listed

SHARED = {"qmap1", "qmap2"}  # 8-bit optimizers: constants shared by all parameters
# labels of the parameters that may have their own learning rate
UP, WHOLE = "up factors (LoRA+)", "fully trained modules"


def param_groups(
    parts: Iterable[tuple[str, Delta]],
    lr: float,
    lr_up: float,
    decay_vectors: bool = True,
    lr_whole: float | None = None,
) -> list[dict]:
    """The parameter groups of up factors, of fully trained modules (if they have their own learning
    rate), and of all others, each with and without weight decay. `decay_vectors=False` exempts
    all but matrices, because vectors such as norm gains, IA3's l and DoRA's magnitude must not
    decay to 0.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (kind, decays): {"params": list[nn.Parameter](), "lr": rate, "peak": rate, "of": kind}
        | ({} if decays else {"weight_decay": 0.0})
        for kind, rate in (("", lr), (UP, lr_up), (WHOLE, lr_whole))
        for decays in (True, False)
    }
    for _, delta in parts:
        whole = WHOLE if delta.whole and lr_whole is not None else ""
        matrices = None if decay_vectors else matrices_in(delta)
        for name, p in delta.named_parameters():
            # a sparse delta may be empty, and CUDA can't launch kernels on empty tensors
            if p.requires_grad and p.numel():
                decays = matrices is None or p in matrices
                kind = UP if name in delta.up_names else whole
                groups[kind, decays]["params"].append(p)
    return [g for g in groups.values() if g["params"]]


def matrices_in(delta: nn.Module) -> set[nn.Parameter]:
    """The parameters that are matrices, or entries of matrices."""
    matrices = set[nn.Parameter]()
    for module in delta.modules():
        vectors, entries = (getattr(module, f"{kind}_names", ()) for kind in ("vector", "entry"))
        for name, p in module.named_parameters(recurse=False):
            if (p.ndim > 1 and name not in vectors) or name in entries:
                matrices.add(p)
    return matrices


def sum_in_fp32(model: nn.Module) -> None:
    """Accumulates the gradients of trained 16-bit embeddings in fp32, because 16-bit sums are wrong
    by several units in the last place.
    """
    for module in model.modules():
        w = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        if w is not None and w.requires_grad and w.itemsize == 2:
            w.grad_dtype = torch.float32


def rates(groups: list[dict], lr: float) -> str:
    """A log line with the peak learning rates: "learning rate: 2e-4; up factors (LoRA+) 3e-3"."""
    texts = dict[str, None]()
    for group in groups:
        digits, _, power = f"{group['peak']:e}".partition("e")
        of = f"{group['of']} " if group["peak"] != lr else ""
        texts[f"{of}{float(digits):g}e{int(power)}"] = None
    return f"learning rate: {'; '.join(texts)}"


def warm_steps(recipe: Any, steps: int) -> int:
    return recipe.warmup_steps or math.ceil(recipe.warmup * steps)


def set_learning_rates(optimizer: Optimizer, recipe: Any, step: int, steps: int) -> None:
    """Sets each group's learning rate: linear warmup, then cosine decay, linear decay, or a
    constant.
    """
    warm = warm_steps(recipe, steps)
    done = (step - warm) / max(1, steps - warm)
    after = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    factor = (step + 1) / (warm + 1) if step < warm else after[recipe.schedule]
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors (any shapes) with keys `<parameter index>.<name>`."""
    tensors: dict[int, tuple[str, Tensor]] = {}  # by id, to store shared values once
    for i, p in enumerate(parameters(optimizer.param_groups)):
        for name, value in optimizer.state.get(p, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors.setdefault(id(tensor), (f"{i}.{name}", tensor))
    return dict(tensors.values())


def restore_optimizer(
    optimizer: Optimizer,
    tensors: dict[str, Tensor],
    updates: Callable[[nn.Parameter], bool] = lambda p: True,
) -> None:
    """Restores `optimizer_tensors` (any shapes) in an optimizer that has made no step. A step with
    zero gradients creates the state, because load_state_dict would not preserve dtypes and paged
    memory.
    """
    trained = parameters(optimizer.param_groups)
    others = {str(i) for i, p in enumerate(trained) if not updates(p)}
    tensors = {key: t for key, t in tensors.items() if key.split(".")[0] not in others}
    owners = {int(key.split(".")[0]) for key in tensors}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for i, p in enumerate(trained):
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if i in owners else None
    optimizer.step()
    optimizer.zero_grad()
    expected, found = (
        {key: tuple(t.shape) for key, t in state.items() if key.split(".")[1] not in SHARED}
        for state in (optimizer_tensors(optimizer), tensors)
    )
    if mismatches := [
        f"{key}: expected {expected.get(key, 'none')}, found {found.get(key, 'none')}"
        for key in differing_keys(expected, found)
    ]:
        raise LorafoldError(
            f"the optimizer state in the checkpoint does not fit this run:"
            f" {listed(mismatches, '; ')}; resume with the optimizer that wrote it"
        )
    for i, p in enumerate(trained):
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if (stored := tensors.get(f"{i}.{name}")) is not None:
                state[name] = value.copy_(stored) if isinstance(value, Tensor) else stored.item()


def parameters(groups: list[dict]) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]
