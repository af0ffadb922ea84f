"""For any optimizer of an adapter: its parameter groups, the learning rate schedule, and its state
as tensors in a checkpoint.

Up factors B have a learning rate of their own in every low-rank method, as in LoRA+ (Hayou et al.
2024, arXiv 2402.12354, with a ratio of 16), and so a group. Weight decay shrinks matrices alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafold.core.delta import Delta
from lorafold.errors import LorafoldError, differing, listed

SHARED = {"qmap1", "qmap2"}  # of 8-bit optimizers: constants that all parameters have in common
# the parameters that may have a learning rate of their own, as a run tells them
UP, WHOLE = "up factors (LoRA+)", "modules trained whole"


def param_groups(
    parts: Iterable[tuple[str, Delta]],
    lr: float,
    lr_up: float,
    decay_vectors: bool = True,
    lr_whole: float | None = None,
) -> list[dict]:
    """Divide the trained parameters of deltas into up factors, those of whole modules if they have
    a rate of their own, and all others, for the optimizer, and each into those that weight decay
    shrinks and those that it does not.

    Weights that act by their size, such as the gains of a norm, IA3's l and DoRA's magnitude, would
    be drawn to 0 by it, where the base is switched off.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (kind, decays): {"params": list[nn.Parameter](), "lr": rate, "peak": rate, "of": kind}
        | ({} if decays else {"weight_decay": 0.0})
        for kind, rate in (("", lr), (UP, lr_up), (WHOLE, lr_whole))
        for decays in (True, False)
    }
    for _, delta in parts:
        whole = WHOLE if delta.whole and lr_whole is not None else ""
        shrunk = None if decay_vectors else matrices_in(delta)
        for name, p in delta.named_parameters():
            # a sparse delta may have no entry at all, and CUDA launches no kernel on empty tensors
            if p.requires_grad and p.numel():
                decays = shrunk is None or p in shrunk
                kind = UP if name in delta.up_names else whole
                groups[kind, decays]["params"].append(p)
    return [g for g in groups.values() if g["params"]]


def matrices_in(delta: nn.Module) -> set[nn.Parameter]:
    """The parameters that are matrices, or entries of such."""
    matrices = set[nn.Parameter]()
    for module in delta.modules():
        vectors, entries = (getattr(module, f"{kind}_names", ()) for kind in ("vector", "entry"))
        for name, p in module.named_parameters(recurse=False):
            if (p.ndim > 1 and name not in vectors) or name in entries:
                matrices.add(p)
    return matrices


def sum_in_fp32(model: nn.Module) -> None:
    """Have the gradients of 16-bit embeddings that train summed in fp32 over micro-batches. A row
    that is rounded after each of them is off by several units.
    """
    for module in model.modules():
        w = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        if w is not None and w.requires_grad and w.itemsize == 2:
            w.grad_dtype = torch.float32


def rates(groups: list[dict], lr: float) -> str:
    """Return a line with the peak learning rates, as in "learning rate: 2e-4; up factors (LoRA+)
    3e-3", in which the up factors are named if their rate is another one.
    """
    texts = dict[str, None]()
    for group in groups:
        digits, _, power = f"{group['peak']:e}".partition("e")
        of = f"{group['of']} " if group["peak"] != lr else ""
        texts[f"{of}{float(digits):g}e{int(power)}"] = None
    return f"learning rate: {'; '.join(texts)}"


def warm_steps(recipe: Any, steps: int) -> int:
    """The steps over which learning rates rise, of a run's."""
    return recipe.warmup_steps or math.ceil(recipe.warmup * steps)


def set_learning_rates(optimizer: Optimizer, recipe: Any, step: int, steps: int) -> None:
    """Set each group's learning rate to its peak rate times the schedule at this step.

    The rate rises linearly over the first `warmup_steps`, or the `warmup` share of the steps
    (rounded up); then it falls to zero along a cosine or a line, or stays. It depends on the step
    alone, so a checkpoint stores nothing of it.
    """
    warm = warm_steps(recipe, steps)
    done = (step - warm) / max(1, steps - warm)
    after = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    factor = (step + 1) / (warm + 1) if step < warm else after[recipe.schedule]
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors of any shapes, by `<parameter's number>.<name>`, for
    a checkpoint.

    A Python number becomes a scalar tensor. A tensor that several parameters share is stored once,
    with the first of them.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}  # by the identity of the value
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
    """Restore the state of `optimizer_tensors`, of any shapes, to an optimizer over the same
    parameters that has made no step: that of the parameters that this process updates.

    The optimizer first makes a state of its own, with a step whose learning rates and gradients are
    zero and which changes nothing. The tensors are then copied into that state, which keeps its
    dtypes and its paged memory; load_state_dict would keep neither.
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
    if wrong := [
        f"{key}: expected {expected.get(key, 'none')}, found {found.get(key, 'none')}"
        for key in differing(expected, found)
    ]:
        raise LorafoldError(
            f"the checkpoint's optimizer state is from another optimizer:"
            f" {listed(wrong, '; ')}; resume with the optimizer that wrote it"
        )
    for i, p in enumerate(trained):
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if (stored := tensors.get(f"{i}.{name}")) is not None:
                state[name] = value.copy_(stored) if isinstance(value, Tensor) else stored.item()


def parameters(groups: list[dict]) -> list[nn.Parameter]:
    """Return the parameters of an optimizer's groups, in order."""
    return [p for group in groups for p in group["params"]]


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Restore the states of torch's generators, each (bytes,), as a checkpoint has them."""
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(f"rng.cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)
